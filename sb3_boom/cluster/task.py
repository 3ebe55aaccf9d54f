"""What a node does for a grid: one run, from its last checkpoint on."""

import contextlib
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_boom.benchmark import rows, runner
from sb3_boom.benchmark.rows import Row
from sb3_boom.cluster.connection import what_is_wrong_here
from sb3_boom.cluster.storage import LEASE_S, Claim, ClaimLost, Mirror, Storage
from sb3_boom.files import FolderLock

Run = tuple[str, str, int]  # task, variant, seed
REPORT_S = 5.0  # between two reports of a run
LEFT_S = 10.0  # that a lock is old before it can be a leftover's
ROWS = "rows.csv"
ON_A_NODE = "sb3_boom_run_"  # how the folders begin that runs with a URL work in
DONE, BUSY, FAILED = "done", "busy", "failed"


@dataclass(frozen=True)
class Work:
    """
    What all runs of a grid have in common.

    :param storage: of the runs
    :param steps: agent steps of a run
    :param eval_freq: agent steps between evaluations, each after a checkpoint
    :param n_eval_episodes: episodes of an evaluation
    :param hyperparams: text of the hyperparameter file
    :param overrides: settings instead of the file's
    :param driver: name of the process that the grid belongs to
    :param marker: see :func:`sb3_boom.cluster.connection.check_nodes`
    :param versions: of the driver
    :param threads: of torch
    :param lease_s: see :class:`sb3_boom.cluster.storage.Claim`
    """

    storage: Storage
    steps: int
    eval_freq: int
    n_eval_episodes: int
    hyperparams: str
    overrides: dict[str, Any]
    driver: str
    marker: str
    versions: dict[str, str]
    threads: int = 1
    lease_s: float = LEASE_S


class Result(NamedTuple):
    """
    How an attempt ended.

    :param state: :data:`DONE`, :data:`BUSY` (another process has the run) or :data:`FAILED`
    :param message: what failed
    """

    state: str
    message: str = ""


class Board:
    """What runs report: an actor of the driver's, so that a look at all of them is one call."""

    def __init__(self) -> None:
        self.reports: dict[Run, dict[str, Any]] = {}

    def report(self, run: Run, **news: Any) -> None:
        """
        :param run: that has news
        :param news: ``steps`` it has, ``stored`` whether there may be new rows, ``where`` it is, ``began`` at which step
        """
        stored = self.reports.get(run, {}).get("stored", 0) + bool(news.pop("stored", False))
        self.reports.setdefault(run, {}).update(news, stored=stored)

    def look(self) -> dict[Run, dict[str, Any]]:
        """:return: the last news by run"""
        return self.reports


class Watched(BaseCallback):
    """
    Reports steps, and stops a run that another process has taken.

    :param report: gets the steps
    :param claim: of the run
    """

    def __init__(self, report: Callable[[int], None], claim: Claim) -> None:
        super().__init__()
        self.report, self.claim, self._next = report, claim, 0.0

    def _on_training_start(self) -> None:
        self.report(self.model.num_timesteps)

    def _on_step(self) -> bool:
        if self.claim.lost:
            self.claim.check()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REPORT_S
            self.report(self.num_timesteps)
        return True


def name_of(run: Run) -> str:
    """
    :param run: of a grid
    :return: of its folder in the storage
    """
    return runner.run_folder(Path(), *run).name


def rows_in(storage: Storage, run: Run) -> list[Row]:
    """
    :param storage: of the run
    :param run: of a grid
    :return: the rows it has written so far; a line that is still being written is left for later
    """
    data = storage.read(f"{name_of(run)}/{ROWS}")
    if not data:
        return []
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(data[: data.rfind(b"\n") + 1])
        file.flush()
        return [row for row in rows.read(Path(file.name))[0] if row.run == run]


def train_run(work: Work, run: Run, board: Any, unchanged: bytes | None = None) -> Result:
    """
    Train one run until its end, going on from what the storage has of it.

    :param work: what all runs have in common
    :param run: which one
    :param board: a handle of :class:`Board`, or None
    :param unchanged: see :meth:`sb3_boom.cluster.storage.Claim.take`
    :return: how it ended
    """
    problems = what_is_wrong_here(work.storage, work.marker, work.versions, [run[0]])
    if problems:  # a node that came after the driver had asked all
        return Result(FAILED, "; ".join(problems))
    if is_done(work, run):
        return Result(DONE)
    claim = Claim(work.storage, name_of(run), work.driver, work.lease_s)
    if not claim.take(unchanged):
        return Result(BUSY)
    th.set_num_threads(work.threads)
    try:
        with _folder(work, run) as (folder, push):
            return _train(work, run, board, claim, folder, push)
    except ClaimLost:
        return Result(BUSY)
    except Exception as error:
        return Result(FAILED, f"{type(error).__name__}: {error}")
    finally:
        with contextlib.suppress(OSError):
            claim.release()


def is_done(work: Work, run: Run) -> bool:
    """
    :param work: what all runs have in common
    :param run: which one
    :return: whether its last row is in the storage
    """
    return any(row.agent_steps >= work.steps for row in rows_in(work.storage, run))


@contextlib.contextmanager
def _folder(work: Work, run: Run) -> Iterator[tuple[Path, Callable[[], None]]]:
    """
    :param work: what all runs have in common
    :param run: which one
    :return: where it works, with all it has so far, and what to call when there is more
    """
    if work.storage.is_folder:
        folder = Path(work.storage.root) / name_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        _wait_for(runner.checkpoint_folder(folder), work.lease_s)
        yield folder, lambda: None
        return
    _remove_leftovers(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=ON_A_NODE)) / name_of(run)
    folder.mkdir()
    try:
        with FolderLock(folder.parent):
            mirror = Mirror(work.storage, name_of(run), folder)
            mirror.fetch()
            yield folder, mirror.push
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """
    Remove what attempts that were killed have left on this node, whose disk it would fill.

    :param place: where their folders are
    """
    for folder in place.glob(f"{ON_A_NODE}*"):
        with contextlib.suppress(OSError):  # in use, or of another user
            age = time.time() - (folder / "lock").stat().st_mtime  # just made, it is locked in a moment
            if age > LEFT_S and os.name != "nt":
                with FolderLock(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _wait_for(folder: Path, timeout: float) -> None:
    """
    Wait until a process that is about to end has left a folder.

    :param folder: of checkpoints
    :param timeout: seconds
    :raises OSError: if it does not leave
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            with FolderLock(folder):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _train(work: Work, run: Run, board: Any, claim: Claim, folder: Path, push: Callable[[], None]) -> Result:
    import ray

    context = ray.get_runtime_context()
    where = context.get_node_id()[:8]
    began: list[int] = []

    def report(steps: int | None = None, stored: bool = False) -> None:
        if steps is not None and not began:
            began.append(steps)
            print(f"{' '.join(map(str, run))}: node {where}, from step {steps}", flush=True)
        news = {} if steps is None else {"steps": steps, "began": began[0]}
        if board is not None:
            board.report.remote(run, where=where, stored=stored, **news)

    def stored() -> None:
        claim.check()
        push()
        report(stored=True)

    report()
    hyperparams = folder / "hyperparams.yml"
    hyperparams.write_text(work.hyperparams)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            runner.train_one(
                *run, work.steps, work.eval_freq, folder / ROWS, folder, hyperparams, work.n_eval_episodes, work.overrides,
                callbacks=[Watched(report, claim)], stored=stored,
            )  # fmt: skip
        except ClaimLost:
            raise
        except Exception:
            traceback.print_exc(file=log)
            log.flush()
            with contextlib.suppress(OSError, ClaimLost):
                stored()
            raise
    with contextlib.suppress(OSError):
        push()
    return Result(DONE)
