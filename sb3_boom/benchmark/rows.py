"""The CSV of a benchmark: one row per evaluation, written at once and whole, by several processes."""

import csv
import fcntl
import io
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

import sb3_boom
from sb3_boom.callbacks import PlannerPriorEvalCallback

MAX_BYTES = 2**28  # of a CSV; a row has a hundred
MAX_TEXT = 1000  # characters of a cell
MAX_NUMBER = 2**53  # of steps and returns, either way


class Row(NamedTuple):
    """
    One evaluation.

    :param task: environment id, as in the hyperparameter file
    :param variant: what differs from the file's settings; its own alignment, such as "release", for nothing
    :param seed: of the run
    :param agent_steps: decisions until then
    :param env_steps: simulation steps until then, by the action repeat
    :param planner_return: mean return of the planner, or of an algorithm that has none
    :param prior_return: mean return of the policy prior, or of that algorithm again
    :param wall_s: seconds of this run until then
    :param revision: commit that ran
    :param versions: of what it ran on
    """

    task: str
    variant: str
    seed: int
    agent_steps: int
    env_steps: int
    planner_return: float
    prior_return: float
    wall_s: float
    revision: str
    versions: str

    @property
    def run(self) -> tuple[str, str, int]:
        """Task, variant and seed."""
        return self.task, self.variant, self.seed


def parse(record: dict[str, str | None]) -> Row:
    """
    :param record: a line of the CSV by column
    :return: the row
    :raises ValueError: if it is none
    """
    values = {}
    for name, kind in Row.__annotations__.items():
        text = record.get(name)
        if not text:
            raise ValueError(f"{name} is missing")
        if len(text) > MAX_TEXT:
            raise ValueError(f"{name} has {len(text)} characters")
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise ValueError(f"{name} is {text!r}") from error
        if kind is not str and not abs(values[name]) <= MAX_NUMBER:  # NaN neither
            raise ValueError(f"{name} is {text!r}")
    if None in record:
        raise ValueError("too many columns")
    return Row(**values)


def read(path: Path) -> tuple[list[Row], list[str]]:
    """
    :param path: a benchmark's CSV
    :return: its rows, the first one of each run's step; what is wrong with other lines, with their place
    :raises ValueError: if the file has other columns, is no text, or is larger than :data:`MAX_BYTES`
    """
    rows: dict[tuple, Row] = {}
    problems = []
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes: no benchmark CSV is so large")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames is None:
                return [], []  # nothing in it yet
            if list(reader.fieldnames) != list(Row._fields):
                raise ValueError(f"{path} is no benchmark CSV: its columns must be {','.join(Row._fields)}")
            for record in reader:
                try:
                    row = parse(record)
                except ValueError as error:
                    problems.append(f"{path}:{reader.line_num}: {error}; the row is skipped")
                    continue
                rows.setdefault((*row.run, row.agent_steps), row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    return list(rows.values()), problems


def of_run(path: Path, run: tuple[str, str, int]) -> list[Row]:
    """
    :param path: a benchmark's CSV, or where it will be
    :param run: task, variant and seed
    :return: its rows
    """
    return [row for row in read(path)[0] if row.run == run] if path.exists() else []


def append(path: Path, rows: Iterable[Row]) -> None:
    """
    Append rows that are not there yet, under a header if the file is new. Several processes may do so at once. A row that is
    there already stays as it is; with another return, a warning says so.

    :param path: a benchmark's CSV
    :param rows: what to append
    :raises OSError: if the disk is full; what was in the file before still is, and nothing else
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if size == 0:
            writer.writerow(Row._fields)
        else:
            there = {(*row.run, row.agent_steps): row for row in read(path)[0]}
            known = [row for row in rows if (*row.run, row.agent_steps) in there]
            for row in known:
                kept = there[(*row.run, row.agent_steps)]
                if abs(kept.planner_return - row.planner_return) > 0.01:
                    warnings.warn(f"{path} keeps {kept}, without {row}: remove one, or write to another file", stacklevel=2)
            rows = [row for row in rows if row not in known]
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a line that was cut off stays a line of its own
                text.write("\n")
        for row in rows:
            writer.writerow(f"{value:.2f}" if isinstance(value, float) else value for value in row)
        try:
            _write(file.fileno(), text.getvalue().encode())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def revision() -> str:
    """:return: the commit of the package's repository, else its version"""
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty"]
    if not (folder.parents[1] / ".git").exists():  # installed; a repository further up is another project's
        return sb3_boom.__version__
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return sb3_boom.__version__
    return result.stdout.strip() or sb3_boom.__version__


def versions() -> str:
    """:return: versions of Python and of the libraries that returns depend on"""
    return (
        f"python {platform.python_version()} torch {th.__version__} stable_baselines3 {sb3.__version__} "
        f"gymnasium {gym.__version__} numpy {np.__version__}"
    )


def env_steps_per_agent_step(env: VecEnv) -> int:
    """
    :param env: the environment
    :return: its action repeat
    """
    return int(env.get_attr("num_repeats", indices=0)[0]) if env.has_attr("num_repeats") else 1


class EvaluationLog(PlannerPriorEvalCallback):
    """
    Appends a row to a benchmark's CSV after every evaluation, so that an interrupted run keeps what it has.

    :param eval_env: see :class:`sb3_boom.callbacks.PlannerPriorEvalCallback`
    :param path: the CSV
    :param run: task, variant and seed
    :param n_eval_episodes: episodes for planner and policy prior each
    :param eval_freq: evaluate every ``eval_freq`` calls of the callback
    :param wall_s: seconds that the run took before, where it goes on
    """

    def __init__(
        self,
        eval_env: VecEnv,
        path: Path,
        run: tuple[str, str, int],
        n_eval_episodes: int = 10,
        eval_freq: int = 10_000,
        wall_s: float = 0.0,
    ) -> None:
        super().__init__(eval_env, n_eval_episodes, eval_freq)
        self.path = path
        self.run = run
        self.revision = revision()
        self.start = time.monotonic() - wall_s

    @property
    def wall_s(self) -> float:
        """Seconds of this run until now."""
        return time.monotonic() - self.start

    def evaluate(self) -> None:
        """Evaluate now, and append a row."""
        super().evaluate()
        self._append(*(float(np.mean(returns[-1])) for returns in (self.planner_returns, self.prior_returns)))

    def _append(self, planner_return: float, prior_return: float) -> None:
        steps = self.model.num_timesteps
        env_steps = steps * env_steps_per_agent_step(self.eval_env)
        append(
            self.path,
            [Row(*self.run, steps, env_steps, planner_return, prior_return, self.wall_s, self.revision, versions())],
        )


class AgentLog(EvaluationLog):
    """The same for an algorithm without a planner, whose return is in both columns."""

    def evaluate(self) -> None:
        """Evaluate now, and append a row."""
        mean, _ = evaluate_policy(self.model, self.eval_env, self.n_eval_episodes, deterministic=self.deterministic)
        assert isinstance(mean, float)
        self._append(mean, mean)
