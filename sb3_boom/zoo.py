"""BOOM in rl_zoo3: its name there, its hyperparameter files, its search space for Optuna."""

import importlib
import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import yaml
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS, get_wrapper_class
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_boom import BOOM
from sb3_boom.presets import choose_preset

OF_THE_ENVIRONMENT = ("n_envs", "n_timesteps", "env_wrapper", "env_kwargs", "frame_stack", "normalize")
OF_THE_NOISE = ("noise_type", "noise_std")
NOISES = {"normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}
ENVIRONMENT_PACKAGES = ("shimmy", "humanoid_bench")  # they register their environments when imported
MAX_YAML_BYTES = 2**20
MAX_YAML_ITEMS = 100_000
MISSING = {
    "dm_control/": 'dm_control is missing: pip install "sb3_boom[dmc]" (Python 3.12 at most)',
    "h1hand-": "Humanoid-Bench is missing, and is on no package index: docs/install.md has the recipe",
    "LunarLander": 'Box2D is missing: pip install "sb3_boom[box2d]"',
    "BipedalWalker": 'Box2D is missing: pip install "sb3_boom[box2d]"',
}
NO_MODULE = {"LunarLander": "Box2D", "BipedalWalker": "Box2D"}  # registered by Gymnasium, whether they work or not


def hyperparams_file(cpu: bool = False) -> Path:
    """
    :param cpu: the file sized for two CPU cores instead of the paper's
    :return: path of the hyperparameter file, in a wheel or in the repository
    """
    name = "boom-cpu.yml" if cpu else "boom.yml"
    in_package = Path(__file__).parent / "zoo_hyperparams" / name
    return in_package if in_package.exists() else Path(__file__).parents[1] / "zoo_hyperparams" / name


def read_yaml(path: Path) -> dict[str, Any]:
    """
    A hyperparameter file, as data: no tag in it makes an object, and it may not grow far beyond what was written.

    :param path: hyperparameter file in rl_zoo3's format
    :return: what is in it
    :raises ValueError: if it is no mapping, no YAML, or larger than :data:`MAX_YAML_BYTES` or :data:`MAX_YAML_ITEMS`
    """
    with path.open("rb") as file:
        text = file.read(MAX_YAML_BYTES + 1)
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{path} has more than {MAX_YAML_BYTES} bytes: no hyperparameter file is so large")
    try:
        # before anything is made of it: a merge of aliases of merges is written out while loading
        count = _count(yaml.compose(text, yaml.SafeLoader), {})
        entries = yaml.safe_load(text) if count <= MAX_YAML_ITEMS else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} can't be read as YAML: {error or type(error).__name__}") from error
    if count > MAX_YAML_ITEMS:  # an alias is a word, and what it stands for as large as one likes
        raise ValueError(f"{path} has aliases that make it more than {MAX_YAML_ITEMS} items")
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no hyperparameter file: it must map environments to settings")
    return entries


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """
    :param node: of a YAML file
    :param known: sizes by identity; what is within itself counts as too large
    :return: how many items it is when written out
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_YAML_ITEMS + 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def read_hyperparams(path: Path) -> dict[str, dict[str, Any]]:
    """
    :param path: hyperparameter file in rl_zoo3's format
    :return: the entries by environment id, without ``default``
    """
    entries = read_yaml(path)
    return {env_id: entry for env_id, entry in entries.items() if env_id != "default"}


def entry(path: Path, env_id: str) -> dict[str, Any]:
    """
    :param path: hyperparameter file in rl_zoo3's format
    :param env_id: a Gymnasium id
    :return: the environment's entry, else ``default``
    :raises ValueError: if there is neither
    """
    entries = read_yaml(path)
    if env_id not in entries and "default" not in entries:
        raise ValueError(f"{path} has no entry for {env_id}, only for {', '.join(entries)}")
    return dict(entries.get(env_id) or entries["default"])


def settings_of_the_model(entry: dict[str, Any], action_dim: int) -> dict[str, Any]:
    """
    :param entry: of a hyperparameter file
    :param action_dim: number of action dimensions, ``A``
    :return: those of its settings that are arguments of :class:`sb3_boom.BOOM`, its noise made
    :raises ValueError: for others that rl_zoo3 may know, and for a noise that can't be made
    """
    unknown = sorted(set(entry) - {*OF_THE_ENVIRONMENT, *OF_THE_NOISE} - set(inspect.signature(BOOM).parameters))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no argument of BOOM. `sb3-boom train` understands all of rl_zoo3's; here, besides "
            f"BOOM's arguments, there are {', '.join(OF_THE_ENVIRONMENT + OF_THE_NOISE)}"
        )
    settings = {key: value for key, value in entry.items() if key not in OF_THE_ENVIRONMENT + OF_THE_NOISE}
    if any(entry.get(key) is not None for key in OF_THE_NOISE):
        settings["action_noise"] = _make_noise(entry.get("noise_type"), entry.get("noise_std"), action_dim)
    return settings


def _make_noise(noise_type: Any, noise_std: Any, action_dim: int) -> ActionNoise:
    """
    :param noise_type: a key of :data:`NOISES`
    :param noise_std: of each dimension, of actions in [-1, 1]
    :param action_dim: number of action dimensions, ``A``
    :return: the noise, as rl_zoo3 makes it
    :raises ValueError: if there is no such noise, or no std
    """
    if not isinstance(noise_type, str) or noise_type not in NOISES:
        raise ValueError(f"noise_type must be {' or '.join(NOISES)}, not {noise_type!r}")
    if isinstance(noise_std, bool) or not isinstance(noise_std, int | float) or not noise_std >= 0:  # NaN neither
        raise ValueError(f"noise_type {noise_type} needs a noise_std that is a number of 0 or more, not {noise_std!r}")
    return NOISES[noise_type](mean=np.zeros(action_dim), sigma=np.full(action_dim, float(noise_std)))


def make_env(
    env_id: str,
    entry: dict[str, Any],
    seed: int,
    n_envs: int = 1,
    monitor_dir: str | None = None,
    evaluates: bool = False,
) -> VecEnv:
    """
    :param env_id: a Gymnasium id
    :param entry: its entry of a hyperparameter file
    :param seed: of the environments
    :param n_envs: number of environments
    :param monitor_dir: where to log episodes; default: nowhere
    :param evaluates: whether a ``VecNormalize`` leaves rewards as they are and its statistics to the training environment's
    :return: the environments, wrapped as the entry says
    :raises ValueError: for a ``normalize`` that is neither a boolean nor a mapping
    """
    normalize = entry.get("normalize", False)
    if not isinstance(normalize, bool | dict):
        raise ValueError(f"normalize must be true, false or a mapping of VecNormalize's arguments, not {normalize!r}")
    env = make_vec_env(
        env_id,
        n_envs=n_envs,
        seed=seed,
        monitor_dir=monitor_dir,
        wrapper_class=get_wrapper_class(entry),
        env_kwargs=entry.get("env_kwargs"),
    )
    if normalize is not False:
        settings = {key: entry[key] for key in ("gamma",) if key in entry} | (normalize if isinstance(normalize, dict) else {})
        env = VecNormalize(env, **settings | (dict(training=False, norm_reward=False) if evaluates else {}))
    return VecFrameStack(env, entry["frame_stack"]) if "frame_stack" in entry else env


def register_environments() -> None:
    """Import the packages that register environments, where they are installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GLFWError.*|.*DISPLAY.*")  # no display is no news
        for package in ENVIRONMENT_PACKAGES:
            if importlib.util.find_spec(package):
                importlib.import_module(package)


def missing_package(env_id: str) -> str | None:
    """
    :param env_id: a Gymnasium id
    :return: what to install for it, or None if nothing is known to be missing
    """
    for prefix, message in MISSING.items():
        if env_id.startswith(prefix):
            module = NO_MODULE.get(prefix)
            there = importlib.util.find_spec(module) is not None if module else env_id in gym.registry
            return None if there else message
    return None


def check_installed(env_id: str) -> None:
    """
    :param env_id: a Gymnasium id
    :raises ImportError: if its package is missing
    :raises gymnasium.error.Error: if there is no such environment
    """
    missing = missing_package(env_id)
    if missing:
        raise ImportError(f"{env_id}: {missing}")
    gym.spec(env_id)


def register() -> None:
    """Make ``--algo boom`` known to rl_zoo3, and every environment that is installed to Gymnasium."""
    register_environments()
    ALGOS["boom"] = BOOM
    HYPERPARAMS_SAMPLER["boom"] = sample_boom_params
    HYPERPARAMS_CONVERTER["boom"] = convert_boom_params


def sample_boom_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    BOOM's search space. Sizes follow the machine, as BOOM's defaults do: on two cores a trial of a large model takes hours.

    :param trial: the trial to sample for
    :param n_actions: unused, as rl_zoo3 passes it
    :param n_envs: unused, as rl_zoo3 passes it
    :param additional_args: unused, as rl_zoo3 passes it
    :return: arguments of :class:`sb3_boom.BOOM`
    """
    on_cpu = choose_preset("auto", get_device("auto")) == "cpu"
    return convert_boom_params(
        dict(
            model_size=trial.suggest_categorical("model_size", ["tiny"] if on_cpu else ["1M", "5M"]),
            horizon=trial.suggest_int("horizon", 1, 5),
            n_samples_pow=trial.suggest_int("n_samples_pow", *((5, 8) if on_cpu else (7, 10))),
            n_iterations=trial.suggest_int("n_iterations", *((2, 6) if on_cpu else (4, 8))),
            align_coef=trial.suggest_float("align_coef", 1e-3, 1.0, log=True),
            learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
            rho=trial.suggest_float("rho", 0.3, 1.0),
        )
    )


def convert_boom_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: a trial's parameters; ``n_samples_pow`` is the binary logarithm of the planner's samples, of which
        an eighth are elites and 3 in 64 policy trajectories, as the paper's 512, 64 and 24
    :return: arguments of :class:`sb3_boom.BOOM`. Its planner_kwargs and policy_kwargs are whole: rl_zoo3 puts them in place of
        the hyperparameter file's
    """
    hyperparams = dict(sampled_params)
    n_samples = 2 ** hyperparams.pop("n_samples_pow")
    hyperparams["planner_kwargs"] = dict(
        n_samples=n_samples,
        n_elites=n_samples // 8,
        n_policy_samples=n_samples * 3 // 64,
        n_iterations=hyperparams.pop("n_iterations"),
    )
    hyperparams["policy_kwargs"] = dict(model_size=hyperparams.pop("model_size"))
    return hyperparams
