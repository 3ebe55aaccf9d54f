"""
Export the weights of a zip that is not trusted: nothing in it is unpickled but tensors.

``BOOM.load`` runs what a zip holds, as all of SB3 does. Here its settings are read where they are plain JSON, its networks
are built from these, and its weights are read by ``torch.load(weights_only=True)``.
"""

import inspect
import io
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecTransposeImage

from sb3_boom.checks import FORMAT_VERSION
from sb3_boom.deployment import model_file
from sb3_boom.deployment.export import build, write
from sb3_boom.policies import BOOMPolicy, CnnPolicy, MultiInputPolicy
from sb3_boom.presets import PRESETS, model_size

MAX_DATA = 2**24  # bytes of the settings
MAX_WEIGHTS = 2**31  # bytes
MAX_TEXT = 2**20  # characters of a printed array
LARGEST = dict(enc_dim=2**16, mlp_dim=2**16, latent_dim=2**16, n_critics=2**8, n_enc_layers=2**6, horizon=2**7)
PICKLED = ":serialized:"  # SB3 marks so what is no plain JSON
OF_THE_MODEL = ("handle_terminations", "planner", "planner_kwargs", "horizon", "gamma")
OF_LEARNING = ("optimizer_class", "optimizer_kwargs", "compile", "encoder_lr_scale", "tf32", "bf16")  # these change no plan
NOT_KNOWN = (
    "VecNormalize's statistics, in a file of their own: this agent takes observations as the networks do",
    "a policy or features extractor of its own: the networks are those of this package",
)


def export_untrusted(
    path: str | os.PathLike, output: str | os.PathLike, env_id: str | None = None, prior_only: bool = False
) -> pathlib.Path:
    """
    Export a model from somebody else's zip without running anything that is in it. See :data:`NOT_KNOWN` for what can't be.

    :param path: what ``model.save`` wrote
    :param output: where to write the ONNX file
    :param env_id: an environment that is installed here, whose spaces to take. Default: as the zip's plain text tells them,
        which it does for vectors and images
    :param prior_only: without the planner
    :return: the file
    :raises ValueError: for a zip that is none of BOOM's, is damaged, or needs unpickling
    :raises OSError: if it can't be read
    """
    try:
        with zipfile.ZipFile(path) as archive:
            told = settings(_read(archive, "data", MAX_DATA))
            observation_space, action_space = _spaces(told, env_id)
            weights = _weights(archive, bare_size(told, observation_space, action_space))
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} can't be exported without trusting it: {error}") from error
    policy = _policy(told, observation_space, action_space, weights)
    try:
        policy.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the networks in {path} are not those of its own settings") from error
    if not all(th.isfinite(tensor).all() for tensor in policy.state_dict().values()):
        raise ValueError(f"{path} holds weights that are NaN or infinite")
    count = told.get("num_timesteps")
    about = dict(env_id=env_id, num_timesteps=count if isinstance(count, int) else None, untrusted=True)
    return write(output, build(policy, None, prior_only, about))


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """
    :param archive: a zip
    :param name: of a member
    :param limit: bytes
    :return: its content
    :raises ValueError: if it is missing, damaged, or larger
    """
    try:
        info = archive.getinfo(name)
        if info.file_size > limit:
            raise ValueError(f"its {name} has {info.file_size} bytes, where {limit} are the most there can be")
        with archive.open(info) as member:
            return member.read(limit + 1)
    except KeyError as error:
        raise ValueError(f"it has no {name}, so no BOOM model saved it") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"its {name} can't be read ({error})") from error


def settings(data: bytes) -> dict[str, Any]:
    """
    :param data: the zip's settings
    :return: those that are plain JSON, and the text that SB3 adds to pickled ones
    :raises ValueError: for others than a model of BOOM that this version knows
    """
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its settings are no JSON ({error})") from error
    version = told.get("format_version") if isinstance(told, dict) else None
    if not isinstance(version, int):
        raise ValueError("another algorithm saved it, or none")
    if version > FORMAT_VERSION:
        raise ValueError(f"its format version is {version}, this sb3_boom reads up to {FORMAT_VERSION}: upgrade sb3_boom")
    for name in ("policy_kwargs", *OF_THE_MODEL):
        value = told.get(name)
        if isinstance(value, dict) and PICKLED in value:
            raise ValueError(f"its {name} are pickled, with a class perhaps, which is not read")
    return told


def _spaces(told: Mapping[str, Any], env_id: str | None) -> tuple[spaces.Space, spaces.Box]:
    """:param told: settings :param env_id: see :func:`export_untrusted` :return: observation and action space"""
    if env_id is None:
        return _observation_space(told.get("observation_space")), _action_space(told.get("action_space"))
    env = gym.make(env_id)
    observation, action = env.observation_space, env.action_space
    env.close()
    if isinstance(observation, spaces.Dict):
        observation = spaces.Dict({key: _channels_first(space, key) for key, space in observation.items()})
    if not isinstance(action, spaces.Box):
        raise ValueError(f"the actions of {env_id} are {action}, which BOOM does not take")
    return _channels_first(observation), action


def _channels_first(space: spaces.Space, key: str = "") -> spaces.Space:
    if isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        return VecTransposeImage.transpose_space(space, key)
    return space


def _box(told: Any, what: str) -> tuple[tuple[int, ...], np.dtype]:
    if not isinstance(told, dict) or told.get(":type:") != "<class 'gymnasium.spaces.box.Box'>":
        raise ValueError(f"its {what} is pickled, which is not read: name the environment with --env")
    shape, dtype = told.get("_shape"), told.get("dtype")
    if not isinstance(shape, list) or not all(isinstance(n, int) and 0 < n for n in shape) or len(shape) > 8:
        raise ValueError(f"its {what} has no shape")
    if math.prod(shape) > model_file.MAX_ELEMENTS or dtype not in model_file.DTYPES:
        raise ValueError(f"its {what} is of shape {shape} and dtype {dtype}, which can't be exported")
    return tuple(shape), np.dtype(dtype)


def _observation_space(told: Any) -> spaces.Box:
    """Bounds do not matter to the networks, except an image's. :param told: what SB3 writes beside its pickle"""
    shape, dtype = _box(told, "observation_space")
    if dtype == np.uint8:
        return spaces.Box(0, 255, shape, np.uint8)
    low, high = (-np.inf, np.inf) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return spaces.Box(low, high, shape, dtype.type)


def _action_space(told: Any) -> spaces.Box:
    """:param told: what SB3 writes beside its pickle :return: the space, its bounds as they were printed"""
    shape, dtype = _box(told, "action_space")
    bounds = []
    for name in ("low", "high"):
        text = told.get(name)
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise ValueError(f"its action_space has no {name}")
        try:
            values = [float(word) for word in text.replace("[", " ").replace("]", " ").split()]
        except ValueError as error:
            raise ValueError(f"its action_space's {name} is cut off: name the environment with --env") from error
        if len(values) != math.prod(shape) or not np.isfinite(values).all():
            raise ValueError(f"its action_space's {name} is not of its shape: name the environment with --env")
        bounds.append(np.array(values).astype(dtype).reshape(shape))
    if not (bounds[0] < bounds[1]).all():
        raise ValueError("its action_space has no room between its bounds")
    return spaces.Box(bounds[0], bounds[1], shape, dtype.type)


def _policy(
    told: Mapping[str, Any],
    observation_space: spaces.Space,
    action_space: spaces.Box,
    weights: Mapping[str, Any] | None = None,
) -> BOOMPolicy:
    """
    :param told: settings
    :param observation_space: of the model
    :param action_space: of the model
    :param weights: whose names tell an image's encoder. Default None: by the observation alone
    :return: a policy with these settings
    """
    kwargs = dict(told.get("policy_kwargs") or {})
    kwargs = {name: value for name, value in kwargs.items() if name not in OF_LEARNING}
    kwargs |= {name: told[name] for name in OF_THE_MODEL if name in told}
    if told.get("preset") in PRESETS:
        kwargs["model_size"] = model_size(told["preset"], kwargs)
    known = inspect.signature(BOOMPolicy).parameters
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(f"its policy_kwargs have {', '.join(unknown)}, which this sb3_boom does not know")
    for name, largest in LARGEST.items():
        value = kwargs.get(name)
        if isinstance(value, (int, float)) and not value <= largest:
            raise ValueError(f"its {name} is {value}, more than {largest}")
    policy_class: type[BOOMPolicy] = BOOMPolicy
    if isinstance(observation_space, spaces.Dict):
        policy_class = MultiInputPolicy
    elif is_image_space(observation_space) and (weights is None or any("features_extractor.cnn" in name for name in weights)):
        policy_class = CnnPolicy
    try:
        return policy_class(observation_space, action_space, lambda _: 0.0, compile=False, **kwargs)
    except (TypeError, RuntimeError, AssertionError, AttributeError) as error:
        raise ValueError(f"its settings make no policy ({error})") from error


def bare_size(told: Mapping[str, Any], observation_space: spaces.Space, action_space: spaces.Box) -> int:
    """
    :param told: settings
    :param observation_space: of the model
    :param action_space: of the model
    :return: bytes of its parameters, found without allocating any
    :raises ValueError: if they are too many
    """
    with th.device("meta"):
        policy = _policy(told, observation_space, action_space)
    size = sum(tensor.numel() * tensor.element_size() for tensor in policy.state_dict().values())
    if size > MAX_WEIGHTS:
        raise ValueError(f"its settings ask for {size} bytes of weights")
    return size


def _weights(archive: zipfile.ZipFile, size: int) -> dict[str, th.Tensor]:
    """
    :param archive: the zip
    :param size: bytes of all parameters
    :return: parameters by name
    """
    limit = int(1.25 * size) + 2**20  # names and padding
    content = _read(archive, "policy.pth", limit)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as inner:  # a bomb may be in there as well
            if sum(info.file_size for info in inner.infolist()) > limit:
                raise ValueError("its policy.pth unpacks to more than its networks have")
        weights = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it meets
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"its policy.pth can't be read as weights alone ({reason})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, th.Tensor) for value in weights.values()):
        raise ValueError("its policy.pth holds other things than weights")
    return weights
