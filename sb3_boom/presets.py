"""What the machine decides, and what every other "auto" stands for."""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.core.losses import BY_Q_SCALE
from sb3_boom.sizes import is_dog_sized

TAU = 0.01
TAU_WITH_TERMINATIONS = 0.05  # Hopper, three seeds: docs/learning.md
ALIGN_SCALE = 5.0  # HalfCheetah decided it, one seed; DMC is level: docs/learning.md


class Preset(NamedTuple):
    """
    Sizes that belong together.

    :param model_size: of the networks, see :class:`sb3_boom.policies.BOOMPolicy`
    :param batch_size: sub-trajectories ``B`` per update
    :param planner_kwargs: what a plan costs, see :class:`sb3_boom.BOOM`
    """

    model_size: str
    batch_size: int
    planner_kwargs: dict[str, Any]


PRESETS = {
    "paper": Preset("5M", 256, dict(n_samples=512, n_elites=64, n_policy_samples=24, n_iterations="auto")),
    "cpu": Preset("tiny", 128, dict(n_samples=128, n_elites=16, n_policy_samples=6, n_iterations=4)),
}


def choose_preset(setting: str, device: th.device) -> str:
    """
    :param setting: a key of :data:`PRESETS`, or "auto"
    :param device: where the networks are to live
    :return: a key of :data:`PRESETS`: for "auto" the paper's sizes on a GPU, those for two cores on a CPU
    :raises ValueError: for another setting
    """
    if setting == "auto":
        return "cpu" if device.type == "cpu" else "paper"
    if setting not in PRESETS:
        raise ValueError(f'preset must be one of {", ".join(PRESETS)} or "auto", not {setting!r}')
    return setting


def resolve_auto(settings: Mapping[str, Any], device: th.device, env: GymEnv | None, action_dim: int) -> dict[str, Any]:
    """
    Replace every "auto" by what the machine, the episode's length or the paper's rule make of it.

    :param settings: BOOM's, by name, checked by :func:`sb3_boom.checks.check_settings`
    :param device: where the networks are to live
    :param env: the vectorized environment, or None
    :param action_dim: ``A``
    :return: the settings that may be "auto", resolved; ``policy_kwargs`` stay as they were given, see :func:`model_size`
    :raises ValueError: for a preset that there is not
    """
    name = choose_preset(settings["preset"], device)
    preset = PRESETS[name]
    released = settings["alignment"] == "release"
    planner_kwargs = {"horizon_value": "auto", **preset.planner_kwargs, **(settings["planner_kwargs"] or {})}
    if released and planner_kwargs["horizon_value"] == "auto":
        planner_kwargs["horizon_value"] = "mean"
    if planner_kwargs["n_iterations"] == "auto":
        planner_kwargs["n_iterations"] = 8 if action_dim >= 20 else 6
    length = episode_length(env)
    auto = {
        "batch_size": preset.batch_size,
        "gamma": 0.99 if length is None else float(np.clip((length / 5 - 1) / (length / 5), 0.95, 0.995)),
        "learning_starts": 2500 if length is None else max(1000, 5 * length),
        "align_coef": action_dim / (1000 if is_dog_sized(action_dim) else 50),
        "align_scale": BY_Q_SCALE if released else ALIGN_SCALE,
        "tau": TAU if released else "auto",  # stays so, as horizon_value: they follow the episodes
    }
    resolved = {key: value if settings[key] == "auto" else settings[key] for key, value in auto.items()}
    pretrain_steps = settings["pretrain_steps"]
    return resolved | {
        "preset": name,
        "planner_kwargs": planner_kwargs,
        "pretrain_steps": resolved["learning_starts"] if pretrain_steps == "auto" else pretrain_steps,
    }


def model_size(preset: str, policy_kwargs: Mapping[str, Any]) -> str:
    """
    :param preset: a key of :data:`PRESETS`
    :param policy_kwargs: as given to BOOM
    :return: their ``model_size``, or the preset's
    """
    size = policy_kwargs.get("model_size", "auto")
    return PRESETS[preset].model_size if size == "auto" else size


def episode_length(env: GymEnv | None) -> int | None:
    """
    The outermost TimeLimit, divided by the repeats of a RepeatAction around it.

    :param env: the vectorized environment, or None
    :return: ``T``, in agent steps, None if there is no TimeLimit
    """
    if not isinstance(env, VecEnv) or not env.has_attr("_max_episode_steps"):
        return None
    limit = env.get_attr("_max_episode_steps", indices=0)[0]
    if limit is None:
        return None
    # a worker process can send the names of its wrappers, outermost first, but hardly the wrappers themselves
    wrappers = re.findall(r"<(\w+)", str(env.env_method("__str__", indices=0)[0]))
    around = list(itertools.takewhile(lambda name: not name.endswith("TimeLimit"), wrappers))
    if "RepeatAction" in around:
        limit = -(-limit // env.get_attr("num_repeats", indices=0)[0])
    return int(limit)
