"""One run of a benchmark, which goes on where it was interrupted, and a grid of them side by side."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_boom import BOOM, checkpoint, zoo
from sb3_boom.benchmark import baselines, rows
from sb3_boom.benchmark.rows import AgentLog, EvaluationLog
from sb3_boom.callbacks import ResumableCheckpointCallback

SUITES: dict[str, tuple[str, ...]] = {
    "dmc6": tuple(
        f"dm_control/{task}-v0"
        for task in ("cartpole-swingup", "pendulum-swingup", "ball_in_cup-catch", "reacher-easy", "finger-spin", "cheetah-run")
    ),
    "development": ("Hopper-v5", "dm_control/finger-spin-v0", "dm_control/cheetah-run-v0"),  # what settings are chosen by
    "gym5": ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5"),
    "picked": (  # what the algorithms of baselines.py are compared on
        "Hopper-v5",
        "HalfCheetah-v5",
        "Walker2d-v5",
        "dm_control/cartpole-swingup-v0",
        "dm_control/cheetah-run-v0",
    ),
    "dmc-hard": tuple(
        f"dm_control/{task}-v0"
        for task in ("humanoid-stand", "humanoid-walk", "humanoid-run", "dog-stand", "dog-walk", "dog-trot", "dog-run")
    ),
    "h1hand": tuple(f"h1hand-{task}-v0" for task in ("stand", "walk", "run", "sit_simple", "slide", "pole", "hurdle")),
}
# variant: settings that differ from the file's; a function gets the number of action dimensions, a dict adds to the file's
VARIANTS: dict[str, dict[str, Any]] = {
    "release": {"alignment": "release"},
    "forward_kl": {"alignment": "forward_kl"},
    "reverse_kl": {"alignment": "reverse_kl"},
    "none": {"alignment": "none"},
    "uniform": {"align_weighting": "uniform"},
    "no_warmup": {"align_warmup": False},
    "coef_A/1000": {"align_coef": lambda action_dim: action_dim / 1000},
    "coef_A/50": {"align_coef": lambda action_dim: action_dim / 50},
    "coef_1": {"align_coef": 1.0},
    "by_q_scale": {"align_scale": "q_scale"},
    **{f"align_scale_{scale:g}": {"align_scale": scale} for scale in (2.0, 5.0, 20.0)},
    **{f"max_std_{value:g}": {"planner_kwargs": {"max_std": value}} for value in (0.3, 0.5, 2.0)},
    "coef_1_max_std_0.5": {"align_coef": 1.0, "planner_kwargs": {"max_std": 0.5}},
    "min_value": {"planner_kwargs": {"horizon_value": "min"}},
    "mean_value": {"planner_kwargs": {"horizon_value": "mean"}},
    "one_update": {"gradient_steps": 1},
    "two_updates": {"gradient_steps": 2},
    "gamma_0.99": {"gamma": 0.99},
    "tau_0.01": {"tau": 0.01},
    "mean_tau_0.01": {"tau": 0.01, "planner_kwargs": {"horizon_value": "mean"}},
    "mean_tau_0.01_starts_auto": {"tau": 0.01, "planner_kwargs": {"horizon_value": "mean"}, "learning_starts": "auto"},
    "tau_0.05": {"tau": 0.05},
    "n_steps_3": {"n_steps": 3},
    "starts_auto": {"learning_starts": "auto"},
    **{f"temperature_{value:g}": {"planner_kwargs": {"temperature": value}} for value in (0.05, 0.01)},
    "policy_samples_64": {"planner_kwargs": {"n_policy_samples": 64}},
    "normalized": {"normalize": {"norm_reward": False}},
}


def own_variant(entry: dict[str, Any]) -> str:
    """
    :param entry: of a hyperparameter file
    :return: the variant that changes nothing of it: its alignment
    """
    return entry.get("alignment", inspect.signature(BOOM).parameters["alignment"].default)


def check_variant(variant: str, overrides: dict[str, Any]) -> None:
    """
    :param variant: a key of :data:`VARIANTS`, or an algorithm of :mod:`sb3_boom.benchmark.baselines`
    :param overrides: settings instead of the hyperparameter file's
    :raises ValueError: for settings of BOOM's that another algorithm is to be run with
    """
    if variant in baselines.ALGORITHMS and overrides:
        raise ValueError(f"{variant} runs by its own defaults: leave -params ({', '.join(overrides)}) out, or {variant}")


def entry_of_a_run(task: str, variant: str, hyperparams: Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    What a run's environments are made of, and its model, but for what the variant changes there (:func:`changes`);
    parameters as :func:`train_one`.

    :param task: environment id
    :param variant: see :func:`check_variant`
    :param hyperparams: hyperparameter file
    :param overrides: settings instead of the file's
    :return: an entry of a hyperparameter file
    """
    entry = zoo.entry(hyperparams, task) | (overrides or {})
    if variant in baselines.ALGORITHMS:
        return baselines.entry(entry)
    return entry | {name: value for name, value in VARIANTS[variant].items() if name in zoo.OF_THE_ENVIRONMENT}


def settings_of_a_run(
    task: str, variant: str, steps: int, csv: Path | str, hyperparams: Path, overrides: dict[str, Any] | None = None
) -> str:
    """
    What has to be the same where a run is gone on with; parameters as :func:`train_one`.

    :param task: environment id
    :param variant: see :func:`check_variant`
    :param steps: agent steps
    :param csv: where rows are appended; only its name, if it is in the run's own folder, wherever that is
    :param hyperparams: hyperparameter file
    :param overrides: settings instead of the file's
    :return: as JSON
    """
    entry = entry_of_a_run(task, variant, hyperparams, overrides)
    place = csv if isinstance(csv, str) else str(csv.resolve())
    return json.dumps(dict(entry, variant=variant, steps=steps, csv=place), default=repr, indent=2)


def train_one(
    task: str,
    variant: str,
    seed: int,
    steps: int,
    eval_freq: int,
    csv: Path,
    folder: Path,
    hyperparams: Path,
    n_eval_episodes: int = 10,
    overrides: dict[str, Any] | None = None,
    callbacks: Sequence[BaseCallback] = (),
    stored: Callable[[], None] = lambda: None,
) -> None:
    """
    Train until ``steps``, evaluating every ``eval_freq``; go on from the last checkpoint where there is one.

    :param task: environment id
    :param variant: see :func:`check_variant`
    :param seed: of the run
    :param steps: agent steps
    :param eval_freq: agent steps between evaluations
    :param csv: where rows are appended
    :param folder: where the run keeps its checkpoint
    :param hyperparams: hyperparameter file
    :param n_eval_episodes: episodes of an evaluation, for planner and policy prior each
    :param overrides: settings instead of the file's, the same for the whole grid
    :param callbacks: further ones
    :param stored: called whenever there is something new in the folder: a checkpoint, a row
    :raises ValueError: if the folder is of a run with other settings, or the CSV has rows of a run whose folder is gone
    """
    zoo.register()
    place = csv.name if csv.parent == folder else csv
    identity = settings_of_a_run(task, variant, steps, place, hyperparams, overrides)
    _check_folder(folder, identity, csv, (task, variant, seed))
    check_variant(variant, overrides or {})
    entry = entry_of_a_run(task, variant, hyperparams, overrides)
    env = zoo.make_env(task, entry, seed, entry.get("n_envs", 1))
    eval_env = zoo.make_env(task, entry, seed + 1000, n_eval_episodes, evaluates=True)
    algorithm: type[OffPolicyAlgorithm]
    log_class: type[EvaluationLog]
    if variant in baselines.ALGORITHMS:
        algorithm, settings, log_class = baselines.algorithm(variant), baselines.settings(), AgentLog
    else:
        action_dim = int(np.prod(env.action_space.shape or ()))
        algorithm, settings, log_class = BOOM, zoo.settings_of_the_model(entry, action_dim), EvaluationLog
        settings |= changes(variant, settings, action_dim)
    settings["buffer_size"] = min(settings.get("buffer_size", 1_000_000), steps)  # it never holds more

    own = folder / "checkpoint"  # a baseline's, which SB3 saves
    for whole in (folder / "checkpoint-new", folder / "checkpoint-old"):  # killed between the two renames of _save
        if not own.exists() and (whole / "wall_s").exists():
            whole.rename(own)
    resumable = [ResumableCheckpointCallback(checkpoint_folder(folder), save_freq=eval_freq)] if algorithm is BOOM else []
    model: OffPolicyAlgorithm
    if resumable and checkpoint.is_there(checkpoint_folder(folder)):
        model = BOOM.resume(checkpoint_folder(folder), env)
    elif own.exists() and not resumable:
        model = algorithm.load(own / "model", env=env)
        model.load_replay_buffer(own / "replay_buffer")
    else:
        model = algorithm(env=env, seed=seed, **settings)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(identity)
    if model.num_timesteps:
        print(f"{task} {variant} seed {seed}: goes on from {model.num_timesteps} steps", flush=True)
    there = rows.of_run(csv, (task, variant, seed))
    wall_s = max((row.wall_s for row in there), default=0.0)
    log = log_class(eval_env, csv, (task, variant, seed), n_eval_episodes, eval_freq=0, wall_s=wall_s)
    # a checkpoint is written before the row there, and the run may have been killed between the two
    row_is_due = 0 < model._total_timesteps <= model.num_timesteps not in [row.agent_steps for row in there]
    while row_is_due or model.num_timesteps < steps:
        until = min((model.num_timesteps // eval_freq + 1) * eval_freq, steps)
        left = 0 if row_is_due else until - model.num_timesteps
        try:
            model.learn(left, callback=[log, *callbacks, *resumable], reset_num_timesteps=False)
        finally:
            stored()
        log.evaluate()
        row_is_due = False
        if not resumable:
            _save(model, log.wall_s, own)
        stored()


def checkpoint_folder(folder: Path) -> Path:
    """
    :param folder: of a run
    :return: where its checkpoints are
    """
    return folder / "checkpoints"


def changes(variant: str, settings: dict[str, Any], action_dim: int) -> dict[str, Any]:
    """
    :param variant: a key of :data:`VARIANTS`
    :param settings: of the hyperparameter file
    :param action_dim: number of action dimensions
    :return: the model's settings that the variant changes
    """
    changed = {}
    for name, value in VARIANTS[variant].items():
        if name in zoo.OF_THE_ENVIRONMENT:
            continue
        if callable(value):
            value = value(action_dim)
        changed[name] = {**(settings.get(name) or {}), **value} if isinstance(value, dict) else value
    return changed


def _check_folder(folder: Path, settings: str, csv: Path, run: tuple[str, str, int]) -> None:
    """
    :param folder: of a run that starts or goes on, with its settings if there are any yet
    :param settings: of the run, see :func:`settings_of_a_run`
    :param csv: its CSV
    :param run: task, variant and seed
    :raises ValueError: if the folder is of a run with other settings, or the CSV has rows of a run whose folder is gone
    """
    theirs = _settings_in(folder)
    if theirs is not None:
        check_same(folder, theirs, settings)
    elif rows.of_run(csv, run):
        raise ValueError(
            f"{csv} has rows of {' '.join(map(str, run))}, not made in {folder}: remove them, or take another --csv"
        )


def _settings_in(folder: Path) -> str | None:
    """:param folder: of a run. :return: its settings, see :func:`settings_of_a_run`, or None if there are none yet"""
    path = folder / "settings.json"
    return path.read_text() if path.exists() else None


def check_same(folder: Path | str, theirs: str, ours: str) -> None:
    """
    :param folder: of a run
    :param theirs: the settings there, see :func:`settings_of_a_run`
    :param ours: those that the run is to have
    :raises ValueError: if they differ
    """
    if theirs != ours:
        was, now = json.loads(theirs), json.loads(ours)
        differing = sorted(name for name in now.keys() | was.keys() if now.get(name) != was.get(name))
        changes = ", ".join(f"{name} was {was.get(name)}, is {now.get(name)}" for name in differing)
        raise ValueError(f"{folder} is of a run with other settings ({changes}): take another --folder, or remove it")


def _save(model: OffPolicyAlgorithm, wall_s: float, checkpoint: Path) -> None:
    """
    Replace the checkpoint; killed at any point, one that is whole stays.

    :param model: what to save
    :param wall_s: seconds that the run took
    :param checkpoint: where to
    """
    fresh, old = (checkpoint.with_name(f"checkpoint-{name}") for name in ("new", "old"))
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save(fresh / "model")
    model.save_replay_buffer(fresh / "replay_buffer")
    (fresh / "wall_s").write_text(f"{wall_s:.2f}")  # last: it tells that the checkpoint is whole
    if checkpoint.exists():
        checkpoint.rename(old)
    fresh.rename(checkpoint)
    shutil.rmtree(old, ignore_errors=True)


def run_folder(folder: Path, task: str, variant: str, seed: int) -> Path:
    """
    :param folder: of the benchmark
    :param task: environment id
    :param variant: see :func:`check_variant`
    :param seed: of the run
    :return: the run's own folder
    """
    return folder / f"{task.replace('/', '-')}_{variant.replace('/', '-')}_{seed}"


def due(
    tasks: Sequence[tuple[str, str]],
    seeds: Iterable[int],
    steps: int,
    csv: Path,
    overrides: dict[str, Any],
    folder_of: Callable[[tuple[str, str, int]], Path | str],
    settings_in: Callable[[tuple[str, str, int]], str | None],
    settings_of: Callable[[tuple[str, str, int]], str],
) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
    """
    Runs of a grid, wherever they train.

    :param tasks: environment ids, each with a variant, see :func:`check_variant`
    :param seeds: of the runs
    :param steps: agent steps of a run
    :param csv: that says what is done
    :param overrides: settings instead of the hyperparameter file's
    :param folder_of: where a run is, for messages
    :param settings_in: the settings that a run was made with, or None where nothing tells them
    :param settings_of: those that it is to have
    :return: all runs, and those of them that are not done
    :raises ValueError: if one that is done was made with other settings, or for settings that a variant can't have
    """
    for _, variant in tasks:
        check_variant(variant, overrides)
    done = {row.run for row in rows.read(csv)[0] if row.agent_steps >= steps} if csv.exists() else set()
    grid = [(task, variant, seed) for seed in seeds for task, variant in tasks]
    for run in grid:
        theirs = settings_in(run) if run in done else None
        if theirs is not None:
            check_same(folder_of(run), theirs, settings_of(run))
        elif run in done:
            print(f"{' '.join(map(str, run))} is taken as {csv} has it: nothing in {folder_of(run)} tells its settings")
    return grid, [run for run in grid if run not in done]


def run_grid(
    tasks: Sequence[tuple[str, str]],
    seeds: Iterable[int],
    steps: int,
    jobs: int,
    csv: Path,
    folder: Path,
    hyperparams: Path,
    overrides: dict[str, Any],
    arguments: Sequence[str] = (),
) -> int:
    """
    Train a grid, ``jobs`` runs side by side, each in a process of its own; those that the CSV has already are left out.

    :param tasks: environment ids, each with a variant, see :func:`check_variant`
    :param seeds: of the runs
    :param steps: agent steps of a run
    :param jobs: runs side by side, which share the cores
    :param csv: where rows are appended
    :param folder: of the benchmark
    :param hyperparams: hyperparameter file
    :param overrides: settings instead of the file's
    :param arguments: further ones for each run's command
    :return: number of runs that failed
    :raises ValueError: if one that is done was made with other settings, or for settings that a variant can't have
    """
    grid, todo = due(
        tasks, seeds, steps, csv, overrides,
        folder_of=lambda run: run_folder(folder, *run),
        settings_in=lambda run: _settings_in(run_folder(folder, *run)),
        settings_of=lambda run: settings_of_a_run(*run[:2], steps, csv, hyperparams, overrides),
    )  # fmt: skip
    print(f"{len(grid)} runs, {len(grid) - len(todo)} of them done, {jobs} side by side", flush=True)
    further = ["--conf-file", str(hyperparams), *arguments]
    if overrides:
        further += ["-params", *(f"{key}:{value!r}" for key, value in overrides.items())]
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def start(run: tuple[str, str, int]) -> bool:
        task, variant, seed = run
        own = run_folder(folder, *run)
        own.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sb3_boom", "--traceback", "benchmark", "one", "--task", task, "--variant", variant]
        command += ["--seed", str(seed), "--steps", str(steps), "--csv", str(csv), "--folder", str(folder), *further]
        begin = time.monotonic()
        with (own / "log.txt").open("a") as log:
            environment = dict(os.environ, OMP_NUM_THREADS=str(threads))  # torch's number of threads, too
            status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        what = "done" if status == 0 else f"FAILED with status {status}, see {own / 'log.txt'}"
        print(f"{task} {variant} seed {seed}: {what} after {time.monotonic() - begin:.0f} s", flush=True)
        return status == 0

    with ThreadPoolExecutor(jobs) as pool:
        failed = sum(not ok for ok in pool.map(start, todo))
    print(f"evaluations: {csv}\nlogs and models: {folder}", flush=True)
    return failed
