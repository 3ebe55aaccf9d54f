"""What a user sees while a model learns, beside the log of losses and returns."""

import time
import warnings
from collections.abc import Iterator

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback

from sb3_boom.core.processor import why_slow
from sb3_boom.policies import BOOMPolicy

SLOW_ON_CPU = 4_000_000  # parameters


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


def pace_line(policy: BOOMPolicy, preset: str, batch_size: int, seconds: float, steps: int, n_envs: int) -> str:
    """
    Say what was chosen, and how long learning will take.

    :param policy: that learns
    :param preset: that was chosen
    :param batch_size: sub-trajectories per update
    :param seconds: that a step of all environments takes
    :param steps: remaining ones, counted by environment
    :param n_envs: number of environments
    :return: a line, and another where products are slower than the processor
    """
    planner = policy.planner_config
    of_all = f" of all {n_envs} environments" if n_envs > 1 else ""
    line = (
        f'preset "{preset}" on {policy.device}: model "{policy.model_size}", {planner.n_samples} samples '
        f"x {planner.n_iterations} iterations a plan, batches of {batch_size}. A step{of_all} takes "
        f"{1000.0 * seconds:.0f} ms, the remaining {steps:,} timesteps about {duration(seconds * steps / n_envs)}"
    )
    reason = why_slow() if policy.device.type == "cpu" else None
    return f"{line}\n{reason}" if reason else line


def warn_if_slow(policy: BOOMPolicy, seconds: float, warned: set[str]) -> None:
    """
    Warn once if a step is long for want of a GPU.

    :param policy: that learns
    :param seconds: that a step takes
    :param warned: what a warning has told of; "slow" is added
    """
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    if policy.device.type == "cpu" and n_parameters >= SLOW_ON_CPU and "slow" not in warned:
        warned.add("slow")
        warnings.warn(
            f"one step of this model takes about {1000.0 * seconds:.0f} ms on this CPU. "
            'preset="cpu", whose model_size is "tiny", takes a fraction of it.',
            stacklevel=3,
        )


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
