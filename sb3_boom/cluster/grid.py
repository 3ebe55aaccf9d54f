"""A grid of a benchmark on a Ray cluster: every run a task, every row once in one CSV."""

import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sb3_boom.benchmark import rows, runner
from sb3_boom.cluster.connection import LOCAL, check_nodes, connect, import_ray, oom_retries, versions
from sb3_boom.cluster.storage import BEATS, LEASE_S, Storage
from sb3_boom.cluster.table import Table
from sb3_boom.cluster.task import BUSY, DONE, ROWS, Board, Run, Work, name_of, rows_in, train_run

LOOK_S = 1.0  # between two looks at what has ended
GATHER_S = 5.0  # between two looks for new rows
CANCEL_S = 120.0  # for runs to write a checkpoint after Ctrl-C


def run_grid(
    tasks: Sequence[tuple[str, str]],
    seeds: Iterable[int],
    steps: int,
    csv: Path,
    storage: str | Path,
    hyperparams: Path,
    overrides: dict[str, Any] | None = None,
    eval_freq: int = 10_000,
    n_eval_episodes: int = 10,
    address: str = "",
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_retries: int = 10,
    lease_s: float = LEASE_S,
) -> int:
    """
    Train a grid as tasks of a Ray cluster; those that the storage or the CSV has already are left out.

    A run whose node or process dies goes on from its last checkpoint elsewhere. The same call, after Ctrl-C or after the
    driver was killed, goes on with all of them. Several drivers may work on one grid.

    :param tasks: environment ids, each with a variant, see :func:`sb3_boom.benchmark.runner.check_variant`
    :param seeds: of the runs
    :param steps: agent steps of a run
    :param csv: where the driver appends rows
    :param storage: a folder that all nodes see, or an fsspec URL; for checkpoints, rows and logs of the runs
    :param hyperparams: hyperparameter file, which only the driver needs
    :param overrides: settings instead of the file's, by name
    :param eval_freq: agent steps between checkpoints, each with an evaluation
    :param n_eval_episodes: episodes of an evaluation
    :param address: see :func:`sb3_boom.cluster.connection.connect`; default: ``RAY_ADDRESS``, else local
    :param num_cpus: of a run, which are its threads, too
    :param num_gpus: of a run; a fraction lets several share one
    :param max_retries: how often a run is started anew after its process or node died, and as often after Ray killed it
        for want of memory (only where Ray was not connected before)
    :param lease_s: seconds after which a run of a driver that was killed is free for another one
    :return: number of runs that failed
    :raises ImportError: without Ray
    :raises ConnectionError: if there is no cluster at the address
    :raises ValueError: if nodes lack what runs need, or for settings that can't be
    :raises KeyboardInterrupt: after Ctrl-C or SIGTERM, once all runs are stored
    """
    overrides = overrides or {}
    ray = import_ray()
    place = Storage(storage)
    with oom_retries(max_retries):
        ours = connect(address or os.environ.get("RAY_ADDRESS") or LOCAL)
    try:
        driver = Driver(place, csv, lease_s)
        seeds = list(seeds)
        driver.gather([(task, variant, seed) for seed in seeds for task, variant in tasks])
        grid, todo = runner.due(
            tasks, seeds, steps, csv, overrides,
            folder_of=lambda run: f"{place.url}/{name_of(run)}",
            settings_in=lambda run: (place.read(f"{name_of(run)}/settings.json") or b"").decode() or None,
            settings_of=lambda run: runner.settings_of_a_run(*run[:2], steps, ROWS, hyperparams, overrides),
        )  # fmt: skip
        print(f"{len(grid)} runs, {len(grid) - len(todo)} of them done, on {_size(ray)}", flush=True)
        if not todo:
            return 0
        marker = check_nodes(place, sorted({task for task, _, _ in todo}), num_cpus, num_gpus)
        place.patience = lease_s / 2  # less than a lease, or what is written late may be another attempt's
        work = Work(
            place, steps, eval_freq, n_eval_episodes, hyperparams.read_text(), overrides, uuid.uuid4().hex, marker,
            versions(), max(1, int(num_cpus)), lease_s,
        )  # fmt: skip
        remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=max_retries)(train_run)
        with _sigterm_is_an_interrupt():
            failed = driver.work(ray, remote, work, todo, len(grid) - len(todo))
        place.remove(f".markers/{marker}")
    finally:
        if ours:
            ray.shutdown()
    print(f"evaluations: {csv}\nlogs and checkpoints: {place.url}", flush=True)
    return failed


def _size(ray: Any) -> str:
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{nodes} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


@contextlib.contextmanager
def _sigterm_is_an_interrupt() -> Iterator[None]:
    """What stops a job stops it as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class Driver:
    """
    Hands runs to the cluster, and brings their rows home.

    :param storage: of the runs
    :param csv: where rows are appended
    :param lease_s: see :class:`sb3_boom.cluster.storage.Claim`
    """

    def __init__(self, storage: Storage, csv: Path, lease_s: float) -> None:
        self.storage, self.csv, self.lease_s = storage, csv, lease_s
        self._known: set[tuple[Run, int]] = set()
        if csv.exists():
            self._known = {(row.run, row.agent_steps) for row in rows.read(csv)[0]}

    def gather(self, runs: Iterable[Run]) -> None:
        """
        Append the rows of runs that the CSV does not have yet.

        :param runs: of the grid
        """
        new = [row for run in runs for row in rows_in(self.storage, run) if (row.run, row.agent_steps) not in self._known]
        if new:
            rows.append(self.csv, new)
            self._known |= {(row.run, row.agent_steps) for row in new}

    def work(self, ray: Any, remote: Any, work: Work, todo: list[Run], n_done: int) -> int:
        """
        :param ray: the module
        :param remote: the task that trains a run
        :param work: what all runs have in common
        :param todo: runs that are not done
        :param n_done: number of those that are
        :return: number of runs that failed
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0, max_restarts=-1)(Board).options(scheduling_strategy=here).remote()
        shared = ray.put(work)  # once, not once per run
        pending = {remote.remote(shared, run, board): run for run in todo}
        busy: dict[Run, tuple[bytes | None, float]] = {}  # a claim of others, and since when it is the same
        failed: dict[Run, str] = {}
        table = Table(todo, work.steps, n_done)
        seen: dict[Run, int] = {}
        next_gather = next_busy = time.monotonic()
        try:
            while pending or busy:
                ready = ray.wait(list(pending), num_returns=len(pending), timeout=LOOK_S)[0] if pending else []
                if not pending:
                    time.sleep(LOOK_S)
                for ref in ready:
                    run = pending.pop(ref)
                    state, message = self._result(ray, ref)
                    if state == BUSY:
                        busy[run] = (self.storage.read(f"{name_of(run)}/claim.json"), time.monotonic())
                        continue
                    self.gather([run])
                    if state != DONE:
                        failed[run] = message
                    table.ended(run, message if state != DONE else None)
                now = time.monotonic()
                if now >= next_busy:
                    next_busy = now + self.lease_s / BEATS
                    for run, unchanged in self._free(busy):
                        del busy[run]
                        pending[remote.remote(shared, run, board, unchanged)] = run
                with contextlib.suppress(ray.exceptions.RayError):  # the board is on its way to another node
                    reports = ray.get(board.look.remote(), timeout=LOOK_S)
                    table.show(reports, len(busy))
                    if now >= next_gather:
                        next_gather = now + GATHER_S
                        changed = [run for run, report in reports.items() if report["stored"] != seen.get(run, 0)]
                        self.gather(changed)
                        seen |= {run: reports[run]["stored"] for run in changed}
        except KeyboardInterrupt:
            self._stop(ray, pending)
            raise KeyboardInterrupt("stopped; all runs are stored, and the same command goes on with them") from None
        finally:
            ray.kill(board)
        return len(failed)

    @staticmethod
    def _result(ray: Any, ref: Any) -> tuple[str, str]:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:  # its node or process died, again and again
            return "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    def _free(self, busy: dict[Run, tuple[bytes | None, float]]) -> list[tuple[Run, bytes | None]]:
        """:param busy: runs of others, updated. :return: those that can be taken, each with a claim that nobody renews"""
        free: list[tuple[Run, bytes | None]] = []
        for run, (claim, since) in busy.items():
            found = self.storage.read(f"{name_of(run)}/claim.json")
            if found is None:
                free.append((run, None))
            elif found != claim:
                busy[run] = (found, time.monotonic())
            elif time.monotonic() - since >= self.lease_s:
                free.append((run, found))
        return free

    def _stop(self, ray: Any, pending: dict[Any, Run]) -> None:
        """Let every run write a checkpoint. :param pending: runs that are under way"""
        print("stopping: runs write a checkpoint (Ctrl-C again ends at once)", file=sys.stderr, flush=True)
        for ref in pending:
            ray.cancel(ref, recursive=False)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=CANCEL_S)
        self.gather(pending.values())
