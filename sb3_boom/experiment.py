"""rl_zoo3's experiment, which goes on where it was interrupted: ``sb3-boom train --resume``."""

import contextlib
import os
import pathlib
import sys
from typing import Any

import numpy as np
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom import BOOM, checkpoint
from sb3_boom.callbacks import ResumableCheckpointCallback

SAVE_FREQ = 10_000  # timesteps


class GoingOn:
    """
    What rl_zoo3 lets learn: a model that is to have learned for so many steps in all.

    :param model: maybe resumed
    """

    def __init__(self, model: BOOM) -> None:
        self.model, self.env = model, model.env

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        """
        :param total_timesteps: those before the interruption included
        :param kwargs: of the model's own
        :raises SystemExit: on Ctrl-C, which rl_zoo3 would take for the end of learning
        """
        left = max(0, total_timesteps - self.model.num_timesteps)
        try:
            self.model.learn(left, reset_num_timesteps=self.model.num_timesteps == 0, **kwargs)
        except KeyboardInterrupt as error:
            print(error, file=sys.stderr)
            raise SystemExit(130) from error


class ResumableExperiment(ExperimentManager):
    """
    Keeps everything of a run in one folder, and goes on there if it has a checkpoint.

    :param args: rl_zoo3's
    :param folder: of the run
    :param kwargs: rl_zoo3's
    """

    def __init__(self, *args: Any, folder: pathlib.Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = folder
        self.save_path = str(folder)
        self.params_path = os.path.join(self.save_path, str(self.env_name))
        self.continue_training = checkpoint.is_there(folder)
        print(f"{folder} has {'a' if self.continue_training else 'no'} checkpoint: the run ", end="")
        print("goes on" if self.continue_training else "starts")

    def create_callbacks(self) -> None:
        """rl_zoo3's, and the checkpoints instead of SB3's."""
        save_freq = self.save_freq if self.save_freq > 0 else SAVE_FREQ
        self.save_freq = -1
        super().create_callbacks()
        self.callbacks.append(ResumableCheckpointCallback(self.folder, save_freq, verbose=self.verbose))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        :param n_envs: see rl_zoo3, as for the others
        :param eval_env: see there
        :param no_log: see there
        :return: the environments, whose Monitors append where the run goes on
        """
        self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": not self.continue_training}
        return super().create_envs(n_envs, eval_env, no_log)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BOOM:
        settings = {**hyperparams, "tensorboard_log": self.tensorboard_log, "verbose": self.verbose}
        return BOOM.resume(self.folder, env, self.device, **settings)

    def learn(self, model: BOOM) -> None:  # type: ignore[override]
        """
        :param model: new or resumed
        """
        for callback in self.callbacks:
            callback.n_calls = model.num_timesteps // model.n_envs
            if isinstance(callback, EvalCallback) and callback.log_path is not None:
                with contextlib.suppress(OSError, ValueError):  # there was no evaluation yet
                    _restore_evaluations(callback, model.num_timesteps)
        super().learn(GoingOn(model))  # type: ignore[arg-type]


def _restore_evaluations(callback: EvalCallback, num_timesteps: int) -> None:
    """
    :param callback: whose file is written anew after every evaluation, with all that it knows
    :param num_timesteps: where the run goes on; later evaluations will be made again
    """
    with np.load(f"{callback.log_path}.npz") as saved:
        kept = saved["timesteps"] <= num_timesteps
        callback.evaluations_timesteps = saved["timesteps"][kept].tolist()
        callback.evaluations_results = saved["results"][kept].tolist()
        callback.evaluations_length = saved["ep_lengths"][kept].tolist()
    if kept.any():
        callback.best_mean_reward = float(np.mean(callback.evaluations_results, axis=1).max())
