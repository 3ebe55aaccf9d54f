"""What a driver shows while a grid runs."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

LINE_S = 60.0  # between two lines where there is no terminal
WINDOW_S = 300.0  # that steps per second are the mean of


class Table:
    """
    A line for all runs, and in a terminal one for each that is running, renewed in place.

    :param todo: runs that are not done
    :param steps: of a run
    :param n_done: number of those that are
    """

    def __init__(self, todo: Sequence[tuple[str, str, int]], steps: int, n_done: int) -> None:
        self.todo, self.steps, self.n_done = list(todo), steps, n_done
        self.done: set[tuple[str, str, int]] = set()
        self.failed: set[tuple[str, str, int]] = set()
        self._began: dict[tuple[str, str, int], float] = {}
        self._past: deque[tuple[float, int]] = deque()  # time, steps of all that were made since
        self._height = 0
        self._next = 0.0

    def ended(self, run: tuple[str, str, int], error: str | None) -> None:
        """
        :param run: that ended
        :param error: if it failed, why
        """
        (self.done if error is None else self.failed).add(run)
        self._erase()
        print(f"{' '.join(map(str, run))}: {'done' if error is None else f'FAILED, {error}'}", flush=True)

    def summary(self, reports: Mapping[Any, Mapping[str, Any]], n_elsewhere: int, now: float) -> str:
        """
        :param reports: last news by run
        :param n_elsewhere: number of runs that other drivers have
        :param now: seconds
        :return: the line for all
        """
        running = [run for run in reports if run in self.todo and run not in self.done | self.failed]
        made = sum(max(0, report.get("steps", 0) - report.get("began", 0)) for report in reports.values())
        self._past.append((now, made))
        while self._past[0][0] < now - WINDOW_S:
            self._past.popleft()
        since, before = self._past[0]
        rate = (made - before) / (now - since) if now > since else 0.0
        left = sum(
            self.steps - reports.get(run, {}).get("steps", 0) for run in self.todo if run not in self.done | self.failed
        )
        parts = [f"running {len(running)}", f"done {self.n_done + len(self.done)}", f"failed {len(self.failed)}"]
        waiting = len(self.todo) - len(self.done) - len(self.failed) - len(running) - n_elsewhere
        parts += [f"waiting {max(0, waiting)}"] + [f"of other drivers {n_elsewhere}"] * bool(n_elsewhere)
        parts += [f"{rate:.1f} steps/s", f"{_duration(left / rate)} left" if rate > 0 else "time left unknown"]
        return " | ".join(parts)

    def show(self, reports: Mapping[Any, Mapping[str, Any]], n_elsewhere: int = 0) -> None:
        """
        :param reports: last news by run
        :param n_elsewhere: number of runs that other drivers have
        """
        now = time.monotonic()
        line = self.summary(reports, n_elsewhere, now)
        if not sys.stdout.isatty():
            if now >= self._next:
                self._next = now + LINE_S
                print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            return
        size = shutil.get_terminal_size()
        lines = [line]
        for run, report in reports.items():
            if run in self.todo and run not in self.done | self.failed:
                steps = report.get("steps", 0)
                lines.append(f"  {' '.join(map(str, run)):50} {steps:>9,} of {self.steps:,}  node {report.get('where', '')}")
        lines = [text[: size.columns - 1] for text in lines[: max(1, size.lines - 2)]]
        self._erase()
        print("\n".join(lines), flush=True)
        self._height = len(lines)

    def _erase(self) -> None:
        if self._height:
            print(f"\x1b[{self._height}A\x1b[J", end="")
            self._height = 0


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
