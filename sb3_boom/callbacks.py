"""Callbacks that know what BOOM consists of."""

import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_boom import checkpoint
from sb3_boom.boom import BOOM
from sb3_boom.evaluation import PlannerPriorEvalCallback, WorldModelCallback

__all__ = ["PlannerPriorEvalCallback", "ResumableCheckpointCallback", "WorldModelCallback"]


class ResumableCheckpointCallback(BaseCallback):
    """
    Save all that a run consists of, so that :meth:`sb3_boom.BOOM.resume` goes on where it was.

    A checkpoint is written between two steps, where replay buffer, counters and last observation agree, and when learning
    ends; on SIGTERM and Ctrl-C, too, which end learning after the step. It costs what is new since the one before. See
    ``docs/surviving.md``.

    :param folder: for the checkpoints of this run alone
    :param save_freq: timesteps, of all environments together, between two checkpoints
    :param keep: how many checkpoints to keep, the last ones
    :param fresh_episodes: begin an episode in every environment at every checkpoint, seeded by the run's seed and timestep. A
        resumed run does so anyway; with it, the run that was never interrupted goes on exactly alike. Costs an unfinished
        episode per environment and checkpoint
    :param files: further files that grow by lines, such as the Monitors' of environments in other processes, to be cut where a
        resumed run goes on
    :param verbose: Verbosity level: 0 for no output, 1 for a line per checkpoint
    :ivar writer: a :class:`sb3_boom.checkpoint.Writer`
    :raises ValueError: when learning starts, if the folder holds checkpoints that the model was not resumed from
    :raises OSError: when learning starts, if another process works in the folder
    """

    model: BOOM

    def __init__(
        self,
        folder: str | pathlib.Path,
        save_freq: int = 10_000,
        keep: int = 2,
        fresh_episodes: bool = False,
        files: Sequence[str | pathlib.Path] = (),
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep", keep)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.save_freq = save_freq
        self.fresh_episodes = fresh_episodes
        self.writer = checkpoint.Writer(pathlib.Path(folder), keep, tuple(map(pathlib.Path, files)))
        self._next = 0
        self._signal: signal.Signals | None = None

    def _init_callback(self) -> None:
        self.writer.open(self.model)
        at_end = self.model.at_end
        at_end.callback(self.writer.close)
        self._next = (self.model.num_timesteps // self.save_freq + 1) * self.save_freq
        self._signal = None
        self.model.between_steps.append(self._between_steps)
        at_end.callback(self.model.between_steps.remove, self._between_steps)
        if threading.current_thread() is threading.main_thread():  # others can't handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._on_signal)
                at_end.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
        at_end.push(self._on_error)

    def _on_signal(self, number: int, _: object) -> None:
        if self._signal is not None and number == signal.SIGINT:  # once more: now
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

    def _on_step(self) -> bool:
        return True

    def _between_steps(self) -> None:
        if self._signal is not None:
            self._end()
        if self.model.num_timesteps >= self._next:
            self._next = (self.model.num_timesteps // self.save_freq + 1) * self.save_freq
            self.save()

    def _on_pretraining(self) -> bool:
        if self._signal is not None:
            self._end()
        return True

    def _on_training_end(self) -> None:
        if self._between_steps not in self.model.between_steps:  # learning is over; rl_zoo3 calls this once more
            return
        if self.writer.is_new(self.model):
            self.save()
        if self._signal is not None:
            self._end()

    def save(self) -> pathlib.Path | None:
        """
        Write a checkpoint now. If the disk is full, a warning says so, and learning goes on.

        :return: the checkpoint's folder, or None if it could not be written
        :raises ValueError: if the model's parameters are NaN or infinite; the checkpoints before are kept
        """
        path = None
        try:
            path = self.writer.write(self.model)
        except (OSError, RuntimeError) as error:  # torch tells a failed write by the latter
            warnings.warn(
                f"no checkpoint was written at step {self.model.num_timesteps} ({error}); learning goes on, and earlier "
                f"checkpoints in {self.writer.folder} are kept. Is the disk full?",
                stacklevel=2,
            )
        else:
            if self.verbose >= 1:
                print(f"Saved {path} at step {self.model.num_timesteps}")
        if self.fresh_episodes:
            checkpoint.begin_episodes(self.model)
        return path

    def _end(self) -> NoReturn:
        """:raises KeyboardInterrupt: or SystemExit, by the signal, with a line that says how to go on"""
        assert self._signal is not None
        saved = not self.writer.is_new(self.model) or self.save() is not None
        where = f"at step {self.model.num_timesteps}, which is saved" if saved else "but this step could not be saved"
        message = f'stopped by {self._signal.name} {where}. Go on with BOOM.resume("{self.writer.folder}", env)'
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(128 + self._signal)

    def _on_error(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Ctrl-C in a terminal ends the environments' processes too, in the midst of a step, which does not count then."""
        if self._signal is not None and isinstance(error, (RuntimeError, EOFError, ConnectionError)):
            try:
                self._end()
            except (KeyboardInterrupt, SystemExit) as end:
                raise end from error
