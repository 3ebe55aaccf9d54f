"""What a user can get wrong, found early and told with what to change."""

import contextlib
import inspect
import io
import json
import math
import numbers
import pathlib
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.core import losses
from sb3_boom.episode_length import episode_length
from sb3_boom.policies import BOOMPolicy, is_dog_sized

if TYPE_CHECKING:
    from sb3_boom.boom import BOOM

FORMAT_VERSION = 1  # of saved archives
SLOW_ON_CPU = 4_000_000  # parameters
GATE_WARNING_STEPS = 50_000
# arguments of the policy that the algorithm passes on
OWNED_BY_BOOM = ("encoder_lr_scale", "handle_terminations", "planner", "planner_kwargs", "horizon", "gamma", "compile")
WHOLE_NUMBERS = {"buffer_size": 1, "batch_size": 1, "horizon": 1, "learning_starts": 0, "pretrain_steps": 0}  # lowest
# lowest and highest of the others; those in POSITIVE may not be 0 either
RANGES = {
    "tau": (0.0, 1.0),
    "gamma": (0.0, 1.0),
    **dict.fromkeys(("consistency_coef", "reward_coef", "value_coef", "termination_coef", "align_coef"), (0.0, math.inf)),
    **dict.fromkeys(("rho", "ent_coef", "encoder_lr_scale", "align_temperature", "max_grad_norm"), (0.0, math.inf)),
}
POSITIVE = ("tau", "align_temperature", "max_grad_norm")
AUTO = ("learning_starts", "pretrain_steps", "gamma", "align_coef")


def check_settings(model: "BOOM") -> None:
    """
    :param model: whose settings to check, before anything is built with them
    :raises ValueError: for settings that are unsupported, out of range or contradict each other
    """
    unsupported = {
        "optimize_memory_usage": (False, "the replay buffer already stores every observation once"),
        "n_steps": (1, f"use `horizon` (now {model.horizon}), the steps that the world model looks ahead"),
        "use_sde": (False, "the planner explores by itself"),
    }
    for name, (supported, reason) in unsupported.items():
        if getattr(model, name) != supported:
            raise ValueError(f"BOOM supports only {name}={supported}: {reason}")
    for name, choices in (("alignment", losses.ALIGNMENTS), ("align_weighting", losses.ALIGN_WEIGHTINGS)):
        if getattr(model, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(model, name)!r}")
    for name in (*WHOLE_NUMBERS, *RANGES):
        _check_number(name, getattr(model, name))
    for name in ("handle_terminations", "align_warmup", "tf32"):
        if not isinstance(getattr(model, name), bool):
            raise ValueError(f"{name} must be True or False, not {getattr(model, name)!r}")
    if not isinstance(model.compile, bool) and model.compile != "auto":
        raise ValueError(f'compile must be True, False or "auto", not {model.compile!r}')
    widest = (model.planner_kwargs or {}).get("max_std", 0.0)
    if not model.align_warmup and widest >= losses.PLANNED_STD:
        raise ValueError(
            f"align_warmup=False needs max_std below {losses.PLANNED_STD:.2f}, not {widest}: a random action has more"
        )
    if "horizon" in model.replay_buffer_kwargs:
        raise ValueError("horizon: pass to BOOM itself, not in replay_buffer_kwargs")
    bounds = model.action_space
    if isinstance(bounds, spaces.Box) and not (bounds.low < bounds.high).all():
        raise ValueError(f"every action needs low < high, unlike {bounds}: leave out the ones that are fixed")
    buffer_class = model.replay_buffer_class
    if buffer_class is not None and not issubclass(buffer_class, WeightedReplayBuffer):
        raise ValueError(
            f"replay_buffer_class must be a subclass of WeightedReplayBuffer, not {buffer_class.__name__}: "
            "BOOM learns from sub-trajectories and from what the planner did"
        )
    _check_policy_kwargs(model)


def _check_number(name: str, value: Any) -> None:
    if name in AUTO and value == "auto":
        return
    or_auto = ' or "auto"' if name in AUTO else ""
    if name == "ent_coef" and isinstance(value, str):
        or_auto = ": BOOM does not tune it by itself as SAC does"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number{or_auto}, not {value!r}")
    low, high = RANGES.get(name, (WHOLE_NUMBERS.get(name, 0), math.inf))
    if not low <= float(value) <= high or (name in POSITIVE and value == low):
        bounds = f"above {low:g}" if name in POSITIVE else f"at least {low:g}"
        bounds += "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be {bounds}{or_auto}, not {value!r}")
    if name in WHOLE_NUMBERS and value % 1 != 0:
        raise ValueError(f"{name} must be a whole number{or_auto}, not {value!r}")


def _check_policy_kwargs(model: "BOOM") -> None:
    misplaced = [name for name in OWNED_BY_BOOM if name in model.policy_kwargs]
    if misplaced:
        raise ValueError(f"{', '.join(misplaced)}: pass to BOOM itself, not in policy_kwargs")
    if "lr" in (model.policy_kwargs.get("optimizer_kwargs") or {}):
        raise ValueError("lr: pass learning_rate to BOOM itself, not in optimizer_kwargs")
    known = dict(inspect.signature(BOOMPolicy).parameters) | dict(inspect.signature(model.policy_class).parameters)
    choices = [name for name in known if name not in (*OWNED_BY_BOOM, "observation_space", "action_space", "lr_schedule")]
    unknown = sorted(set(model.policy_kwargs) - set(choices))
    if unknown:
        raise ValueError(f"unknown policy_kwargs {', '.join(unknown)}: choose among {', '.join(choices)}")


def resolve_auto(model: "BOOM") -> None:
    """
    Replace every "auto" among the settings by the paper's rule.

    :param model: whose settings to change
    """
    length = episode_length(model.env)
    if model.gamma == "auto":
        model.gamma = 0.99 if length is None else float(np.clip((length / 5 - 1) / (length / 5), 0.95, 0.995))
    if model.learning_starts == "auto":
        model.learning_starts = 2500 if length is None else max(1000, 5 * length)
    if model.pretrain_steps == "auto":
        model.pretrain_steps = model.learning_starts
    for name in WHOLE_NUMBERS:
        setattr(model, name, int(getattr(model, name)))
    if model.align_coef == "auto":
        action_dim = int(np.prod(model.action_space.shape or ()))
        model.align_coef = action_dim / (1000 if is_dog_sized(action_dim) else 50)


def check_buffer(model: "BOOM", buffer: Any) -> None:
    """
    :param model: whose replay buffer it is to be
    :param buffer: what was loaded
    :raises ValueError: for a buffer that is not one for this model
    """
    if not isinstance(buffer, WeightedReplayBuffer):
        raise ValueError(f"the replay buffer must be a WeightedReplayBuffer, not {type(buffer).__name__}")
    for name in ("observation_space", "action_space", "n_envs"):
        ours, theirs = getattr(model, name), getattr(buffer, name)
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
            version = json.loads(archive.read("data")).get("format_version") if "data" in names else None
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
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
    unknown = sorted(set(kwargs) - set(known))
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


def warn_if_never_aligned(model: "BOOM", align_active: float) -> None:
    """
    Once, after long training: the alignment never took part.

    :param model: the model
    :param align_active: how often it did since the last log, from 0 to 1
    """
    if align_active > 0.0 or model.alignment == "none":
        model.warned.add("alignment")  # it can be on: no warning needed any more
    elif model.num_timesteps >= GATE_WARNING_STEPS and "alignment" not in model.warned:
        model.warned.add("alignment")
        warnings.warn(
            f"the policy was never aligned with the planner in {model.num_timesteps} steps: the Q scale stays at or below "
            f'{losses.GATE_SCALE}, where alignment="release" is off. Scale rewards up, or use alignment="forward_kl".',
            stacklevel=2,
        )


def warn_if_slow(model: "BOOM") -> None:
    """
    Once, on a CPU: what a step of a large model costs.

    :param model: the model
    """
    milliseconds = model.meters.milliseconds()
    if model.device.type != "cpu" or "slow" in model.warned or model._n_updates < 20 or "plan" not in milliseconds:
        return
    model.warned.add("slow")
    if sum(parameter.numel() for parameter in model.policy.parameters()) >= SLOW_ON_CPU:
        warnings.warn(
            f"one step of this model takes about {sum(milliseconds.values()):.0f} ms on this CPU. "
            'policy_kwargs=dict(model_size="tiny") with fewer planner samples takes a fraction of it.',
            stacklevel=2,
        )


@contextlib.contextmanager
def worker_deaths_named(env: VecEnv) -> Iterator[None]:
    """
    Say which process is gone where SubprocVecEnv says only that a pipe is closed.

    :param env: the environments stepped meanwhile
    :raises RuntimeError: if a worker of theirs died
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
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
