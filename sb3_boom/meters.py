"""What is measured between two logs."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.core.graphs import WARM_UP_CALLS
from sb3_boom.core.planner import statistic_names


class Meters:
    """
    Means of losses, which stay on the device until they are logged, and of durations.

    :ivar n_updates: since the losses were last taken
    """

    def __init__(self) -> None:
        self._terms: dict[str, th.Tensor] = {}
        self._seconds: dict[str, tuple[float, int]] = {}
        self.n_updates = 0  # since the losses were last taken
        self._plans: th.Tensor | None = None  # [S + 1], sums of the plans' statistics, and how many plans there were
        self._started: dict[str, int] = {}
        self._pending: deque[tuple[str, int, th.cuda.Event, th.cuda.Event]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _pending=deque())  # a GPU's events can't be copied

    def add_terms(self, terms: dict[str, th.Tensor]) -> None:
        """
        Count the terms of one update, without host synchronisation.

        :param terms: scalar tensors by name
        """
        if self._terms.keys() != terms.keys():
            self._terms = {name: th.zeros_like(term) for name, term in terms.items()}
            self.n_updates = 0
        th._foreach_add_(list(self._terms.values()), list(terms.values()))
        self.n_updates += 1

    def means(self) -> dict[str, float]:
        """
        Waits for the device.

        :return: means of all terms since :meth:`take_terms`, by name; empty if there were no updates
        """
        if self.n_updates == 0:
            return {}
        means = (th.stack(list(self._terms.values())) / self.n_updates).tolist()
        return dict(zip(self._terms, means, strict=True))

    def take_terms(self) -> dict[str, float]:
        """
        Waits for the device.

        :return: means since the last call, by name; empty if there were no updates
        """
        means = self.means()
        self._terms, self.n_updates = {}, 0
        return means

    def add_plans(self, statistics: th.Tensor) -> None:
        """
        Count the plans of one step, without host synchronisation.

        :param statistics: of all environments' plans, ``[E, S]``
        """
        sums = th.nn.functional.pad(statistics, (0, 1), value=1.0).sum(dim=0)
        self._plans = sums if self._plans is None else self._plans.to(sums.device).add_(sums)

    def take_plans(self, horizon: int) -> dict[str, float]:
        """
        Waits for the device.

        :param horizon: of the plans, ``H``
        :return: means of the plans' statistics since the last call, by :func:`~sb3_boom.core.planner.statistic_names`; what
            has none is left out, such as the distance to a policy that makes none of a plan's samples
        """
        if self._plans is None:
            return {}
        *sums, count = self._plans.tolist()
        self._plans = None
        means = zip(statistic_names(horizon), (total / count for total in sums), strict=True)
        return {name: mean for name, mean in means if math.isfinite(mean)}

    @contextlib.contextmanager
    def timing(self, name: str, count: int, device: th.device) -> Iterator[None]:
        """
        Measure what is done meanwhile: on a GPU the work, not its launch, and nobody waits for it.

        :param name: what takes the time
        :param count: how many of it are done
        :param device: where
        """
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self.add_seconds(name, time.perf_counter() - start, count)
            return
        begin, end = th.cuda.Event(enable_timing=True), th.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pending.append((name, count, begin, end))
        self._count_finished()

    @contextlib.contextmanager
    def timing_steps(self, env: VecEnv) -> Iterator[None]:
        """
        Measure how long this process waits for the steps of environments, by its own clock.

        :param env: stepped meanwhile; the innermost VecEnv is timed, since its wrappers may be saved meanwhile
        """
        base = env.unwrapped
        step_wait, own = base.step_wait, base.__dict__.get("step_wait")

        def timed() -> Any:
            start = time.perf_counter()
            result = step_wait()
            self.add_seconds("env", time.perf_counter() - start, 1)
            return result

        base.step_wait = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            del base.__dict__["step_wait"]
            if own is not None:
                base.__dict__["step_wait"] = own

    def _count_finished(self) -> None:
        """Count what the GPU has finished."""
        while self._pending and self._pending[0][-1].query():
            name, count, begin, end = self._pending.popleft()
            # a graph is warmed up and captured first
            self.add_seconds(name, begin.elapsed_time(end) / 1000.0, count, n_first=WARM_UP_CALLS + 1)

    def add_seconds(self, name: str, seconds: float, count: int, n_first: int = 1) -> None:
        """
        Count a duration, except the first ones of its kind, which may include compiling.

        :param name: what took the time
        :param seconds: how long it took
        :param count: how many of it were done meanwhile
        :param n_first: how many to leave out
        """
        started = self._started.get(name, 0)
        if started < n_first:
            self._started[name] = started + count
            return
        total, n = self._seconds.get(name, (0.0, 0))
        self._seconds[name] = (total + seconds, n + count)

    def state(self) -> dict[str, Any]:
        """:return: for JSON, what :meth:`set_state` takes; without losses that were not taken yet"""
        return {"seconds": self._seconds, "plans": None if self._plans is None else self._plans.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """:param state: of another one, to go on from"""
        self._seconds = {name: (total, n) for name, (total, n) in state["seconds"].items()}
        plans = state.get("plans")  # format 1 has none
        self._plans = None if plans is None else th.tensor(plans)

    def milliseconds(self) -> dict[str, float]:
        """
        :return: mean durations so far, in milliseconds, by name; waits for what a GPU has still to do
        """
        if self._pending:
            self._pending[-1][-1].synchronize()
            self._count_finished()
        return {name: 1000.0 * total / n for name, (total, n) in self._seconds.items()}

    def take_milliseconds(self) -> dict[str, float]:
        """
        :return: mean durations since the last call, in milliseconds, by name
        """
        means, self._seconds = self.milliseconds(), {}
        return means
