"""What a user can get wrong, found early and told with what to change."""

import contextlib
import functools
import inspect
import io
import json
import math
import numbers
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.core import losses
from sb3_boom.policies import BOOMPolicy

# of saved archives. 1: compile, tf32 and encoder_lr_scale beside policy_kwargs, no preset; 2: no align_scale;
# 3: horizon_value "mean" where it is not given
FORMAT_VERSION = 4
MAX_DATA_BYTES = 2**28  # of an archive's settings; a replay buffer has a file of its own
GATE_WARNING_STEPS = 50_000
# arguments of the policy that the algorithm passes on
OWNED_BY_BOOM = ("handle_terminations", "planner", "planner_kwargs", "horizon", "gamma")
# constructor arguments of old. Those of the policy change no network, so load() takes them too
MOVED_TO_POLICY = ("encoder_lr_scale", "compile", "tf32")
MOVED = {
    **{name: f"policy_kwargs=dict({name}=...)" for name in MOVED_TO_POLICY},
    "use_sde": "nowhere: the planner explores by itself",
}
WHOLE_NUMBERS = {  # lowest
    "buffer_size": 1,
    "batch_size": 1,
    "horizon": 1,
    "n_steps": 1,
    "learning_starts": 0,
    "pretrain_steps": 0,
}
# lowest and highest of the others; those in POSITIVE may not be 0 either
RANGES = {
    "tau": (0.0, 1.0),
    "gamma": (0.0, 1.0),
    **dict.fromkeys(("consistency_coef", "reward_coef", "value_coef", "termination_coef", "align_coef"), (0.0, math.inf)),
    **dict.fromkeys(("rho", "ent_coef", "align_scale", "align_temperature", "max_grad_norm"), (0.0, math.inf)),
    "worker_timeout": (0.0, math.inf),
}
POSITIVE = ("tau", "worker_timeout", "align_scale", "align_temperature", "max_grad_norm")
# what may be a word in a number's place
WORDS = {
    **dict.fromkeys(("learning_starts", "pretrain_steps", "batch_size", "tau", "gamma", "align_coef"), ("auto",)),
    "align_scale": ("auto", losses.BY_Q_SCALE),
}
Self = TypeVar("Self")
Arguments = ParamSpec("Arguments")


def moved_arguments_named(init: Callable[Concatenate[Self, Arguments], None]) -> Callable[Concatenate[Self, Arguments], None]:
    """
    Say where an argument has gone, where Python would say only that there is none of that name.

    :param init: a constructor
    :return: the same, which raises a TypeError that names the new place
    """

    @functools.wraps(init)
    def checked(self: Self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        for name in MOVED.keys() & kwargs.keys():
            raise TypeError(f"BOOM() takes no {name} any more: it went to {MOVED[name]}")
        init(self, *args, **kwargs)

    return checked


def check_settings(settings: Mapping[str, Any]) -> None:
    """
    :param settings: BOOM's, by name, before anything is built with them
    :raises ValueError: for settings that are unsupported, out of range or contradict each other
    """
    if settings["optimize_memory_usage"]:
        raise ValueError(
            "BOOM supports only optimize_memory_usage=False: the replay buffer already stores every observation once"
        )
    for name, choices in (("alignment", losses.ALIGNMENTS), ("align_weighting", losses.ALIGN_WEIGHTINGS)):
        if settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {settings[name]!r}")
    for name in (*WHOLE_NUMBERS, *RANGES):
        if not (name == "worker_timeout" and settings[name] is None):
            _check_number(name, settings[name])
    if settings["n_steps"] > settings["horizon"]:
        raise ValueError(
            f"n_steps={settings['n_steps']} must be at most horizon={settings['horizon']}: updates see no more in a row"
        )
    for name in ("handle_terminations", "align_warmup"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} must be True or False, not {settings[name]!r}")
    widest = (settings["planner_kwargs"] or {}).get("max_std", 0.0)
    if not settings["align_warmup"] and widest >= losses.PLANNED_STD:
        raise ValueError(
            f"align_warmup=False needs max_std below {losses.PLANNED_STD:.2f}, not {widest}: a random action has more"
        )
    if "horizon" in settings["replay_buffer_kwargs"]:
        raise ValueError("horizon: pass to BOOM itself, not in replay_buffer_kwargs")
    bounds = settings["action_space"]
    if isinstance(bounds, spaces.Box) and not (bounds.low < bounds.high).all():
        raise ValueError(f"every action needs low < high, unlike {bounds}: leave out the ones that are fixed")
    buffer_class = settings["replay_buffer_class"]
    if buffer_class is not None and not issubclass(buffer_class, WeightedReplayBuffer):
        raise ValueError(
            f"replay_buffer_class must be a subclass of WeightedReplayBuffer, not {buffer_class.__name__}: "
            "BOOM learns from sub-trajectories and from what the planner did"
        )
    _check_policy_kwargs(settings["policy_kwargs"], settings["policy_class"])


def _check_number(name: str, value: Any) -> None:
    words = WORDS.get(name, ())
    if isinstance(value, str) and value in words:
        return
    or_word = "".join(f' or "{word}"' for word in words)
    if name == "ent_coef" and isinstance(value, str):
        or_word = ": BOOM does not tune it by itself as SAC does"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number{or_word}, not {value!r}")
    low, high = RANGES.get(name, (WHOLE_NUMBERS.get(name, 0), math.inf))
    if not low <= float(value) <= high or (name in POSITIVE and value == low):
        bounds = f"above {low:g}" if name in POSITIVE else f"at least {low:g}"
        bounds += "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be {bounds}{or_word}, not {value!r}")
    if name in WHOLE_NUMBERS and value % 1 != 0:
        raise ValueError(f"{name} must be a whole number{or_word}, not {value!r}")


def _check_policy_kwargs(policy_kwargs: Mapping[str, Any], policy_class: type) -> None:
    misplaced = [name for name in OWNED_BY_BOOM if name in policy_kwargs]
    if misplaced:
        raise ValueError(f"{', '.join(misplaced)}: pass to BOOM itself, not in policy_kwargs")
    if "lr" in (policy_kwargs.get("optimizer_kwargs") or {}):
        raise ValueError("lr: pass learning_rate to BOOM itself, not in optimizer_kwargs")
    known = dict(inspect.signature(BOOMPolicy).parameters) | dict(inspect.signature(policy_class).parameters)
    choices = [name for name in known if name not in (*OWNED_BY_BOOM, "observation_space", "action_space", "lr_schedule")]
    unknown = sorted(set(policy_kwargs) - set(choices))
    if unknown:
        raise ValueError(f"unknown policy_kwargs {', '.join(unknown)}: choose among {', '.join(choices)}")


def check_buffer(buffer: Any, expected: Mapping[str, Any]) -> None:
    """
    :param buffer: what was loaded
    :param expected: the model's ``observation_space``, ``action_space`` and ``n_envs``
    :raises ValueError: for a buffer that is not one for this model
    """
    if not isinstance(buffer, WeightedReplayBuffer):
        raise ValueError(f"the replay buffer must be a WeightedReplayBuffer, not {type(buffer).__name__}")
    for name, ours in expected.items():
        theirs = getattr(buffer, name)
        if ours != theirs:
            raise ValueError(f"the replay buffer was filled with {name}={theirs}, the model has {ours}: it fits another one")


def check_archive(path: str | pathlib.Path | io.BufferedIOBase) -> None:
    """
    Look at the names and the format version of a saved model, without unpickling anything.

    :param path: path to the file (or a file-like)
    :raises ValueError: for a file that is no archive of BOOM, or of a later format
    """
    file = open_path(path, "r", verbose=0, suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            if "data" in names and archive.getinfo("data").file_size > MAX_DATA_BYTES:
                raise ValueError(f"{path} is no BOOM model: its settings unpack to more than {MAX_DATA_BYTES} bytes")
            damaged = archive.testzip()  # which reads all of it, and unpickles nothing
            if damaged is not None:
                raise ValueError(f"{path} is damaged: the checksum of {damaged} in it is another one. Load an earlier copy")
            data = json.loads(archive.read("data")) if "data" in names else None
            version = data.get("format_version") if isinstance(data, dict) else None
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no BOOM model: it is not a readable zip archive ({error})") from error
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
        else:
            file.seek(start)
    if "policy.model_optimizer.pth" not in names or not isinstance(version, int):
        raise ValueError(f"{path} is no BOOM model: it was saved by another algorithm. Load it with the class that saved it")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this sb3_boom reads up to {FORMAT_VERSION}: upgrade sb3_boom to load it"
        )


def check_finite(values: Any, what: str, step: int, env_index: int | None = None) -> None:
    """
    Stop before a NaN spreads from an environment into buffer and networks.

    :param values: array or dict of arrays; the first dimension is the environments', if ``env_index`` is None
    :param what: name for the message, with its article
    :param step: timestep for the message
    :param env_index: the one environment that ``values`` are from
    :raises ValueError: if a value is NaN or infinite
    """
    for value in values.values() if isinstance(values, dict) else [values]:
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
            continue
        if env_index is None:
            env_index = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
        raise ValueError(
            f"environment {env_index} returned {what} that is NaN or infinite at step {step}: "
            "mend the environment, or wrap it so that it clips or ends the episode there"
        )


def check_load_arguments(classes: Sequence[type], kwargs: dict[str, Any]) -> None:
    """
    :param classes: the model's and its bases up to BOOM, whose constructors know the names
    :param kwargs: constructor arguments to change when loading
    :raises TypeError: for a name that no constructor has
    """
    known = dict.fromkeys(name for cls in classes for name in inspect.signature(cls).parameters)
    unknown = sorted(set(kwargs) - set(known) - set(MOVED_TO_POLICY))
    if unknown:
        name = classes[0].__name__
        raise TypeError(f"{name}.load() got unexpected arguments {', '.join(unknown)}: choose among {', '.join(known)}")


@contextlib.contextmanager
def misfit_named(path: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """
    Say what loading can't change where torch says which tensors are missing.

    :param path: of the archive loaded meanwhile
    :param kwargs: constructor arguments to change when loading
    :raises ValueError: if the archive's networks are others
    """
    try:
        yield
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise ValueError(
            f"the networks in {path} are not those of {', '.join(kwargs) or 'its own settings'}: load without what changes "
            "them, such as handle_terminations"
        ) from error


def warn_if_never_aligned(num_timesteps: int) -> bool:
    """
    After long training: the alignment never took part.

    :param num_timesteps: steps so far
    :return: whether training has been long
    """
    if num_timesteps < GATE_WARNING_STEPS:
        return False
    warnings.warn(
        f"the policy was never aligned with the planner in {num_timesteps} steps: the Q scale stays at or below "
        f'{losses.GATE_SCALE}, where alignment="release" is off. Scale rewards up, or use alignment="forward_kl".',
        stacklevel=2,
    )
    return True


@contextlib.contextmanager
def worker_deaths_named(env: VecEnv | None) -> Iterator[None]:
    """
    Say which process is gone where SubprocVecEnv says only that a pipe is closed.

    :param env: the environments stepped meanwhile
    :raises RuntimeError: if a worker of theirs died
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        assert env is not None
        processes = getattr(env.unwrapped, "processes", [])
        for index, process in enumerate(processes):
            process.join(timeout=1.0)
            if not process.is_alive():
                for other in processes:  # close() would wait for their answers, or the dead one's
                    other.terminate()
                env.unwrapped.closed = True  # type: ignore[attr-defined]
                raise RuntimeError(
                    f"worker {index} of the SubprocVecEnv died (exit code {process.exitcode}): its environment crashed or the "
                    "system killed it, perhaps for memory. The model and its replay buffer can still be saved"
                ) from error
        raise
