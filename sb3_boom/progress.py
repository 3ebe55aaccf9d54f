"""What a user sees while a model learns, beside the log of losses and returns."""

import time
from collections.abc import Iterator

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback


class PretrainingStopped(Exception):
    """A callback wants no more of it."""


class Pace:
    """
    What a step takes by the clock, everything included, over the first steps that plan.

    :param skipped: steps before the measured ones, which may include compiling
    :param measured: steps to measure
    """

    def __init__(self, skipped: int = 5, measured: int = 20) -> None:
        self.first, self.last = skipped + 1, skipped + 1 + measured
        self.n_steps, self.start = 0, 0.0

    def step(self) -> float | None:
        """
        Count the beginning of a step.

        :return: seconds a step, once: when they have been measured
        """
        self.n_steps += 1
        if self.n_steps == self.first:
            self.start = time.perf_counter()
        if self.n_steps == self.last:
            return (time.perf_counter() - self.start) / (self.last - self.first)
        return None


def duration(seconds: float) -> str:
    """
    :param seconds: how long
    :return: the same for a reader, such as "40 s", "12 min" or "3.5 h"
    """
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"


def show_pretraining(callback: BaseCallback | None, done: int, n_updates: int, seconds: float) -> None:
    """
    Show pretraining in the progress bar, and ask those callbacks that want to be asked: they have a method
    ``_on_pretraining() -> bool``.

    :param callback: of the run
    :param done: updates done
    :param n_updates: updates to be done in all
    :param seconds: that the rest will take
    :raises PretrainingStopped: if a callback returns False
    """
    goes_on = True
    for leaf in leaves(callback):
        if isinstance(leaf, ProgressBarCallback):
            text = f"Pretraining {done:,} / {n_updates:,}, {duration(seconds)} left"
            leaf.pbar.set_description(text if done < n_updates else "")
        elif hasattr(leaf, "_on_pretraining"):
            goes_on = leaf._on_pretraining() is not False and goes_on
    if not goes_on:
        raise PretrainingStopped


def leaves(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """
    :param callback: of a run, or None
    :return: it, or those that it is a list of
    """
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from leaves(child)
    elif callback is not None:
        yield callback
