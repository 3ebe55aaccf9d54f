"""Callbacks that look at a model from outside while it learns, and leave its learning alone."""

import pathlib

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization

from sb3_boom import probing
from sb3_boom.boom import BOOM
from sb3_boom.waits import evaluation_watched

SEEDS_APART = 1_000  # between two evaluations, more than there are environments


class PlannerPriorEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` for both actors of a model: the planner and the policy prior, on episodes of the same seeds.

    Logs ``eval/planner_return``, ``eval/prior_return`` and their difference ``eval/planner_gap``: what planning adds to
    the policy. ``eval/mean_reward`` and ``eval/mean_ep_length`` are the planner's, and so is ``best_mean_reward``. Training
    goes on as if there had been no evaluation.

    :param eval_env: the environment used for evaluation, wrapped as the training one
    :param n_eval_episodes: episodes for each of the two
    :param eval_freq: evaluate every ``eval_freq`` calls of the callback, one for each step of all environments together
    :param deterministic: whether both act deterministically
    :param callback_on_new_best: called when the planner's mean return is the best so far
    :param callback_after_eval: called after every evaluation
    :param log_path: folder of ``evaluations.npz``: the planner's as SB3 writes them, and ``prior_results``,
        ``prior_ep_lengths``. Default None: no file
    :param best_model_save_path: folder of ``best_planner.zip`` and ``best_prior.zip``, the models whose planner or prior was
        best so far. Default None: no files
    :param seed: of the episodes; those of the next evaluation have others
    :param verbose: Verbosity level: 0 for no output, 1 for a line per evaluation
    :ivar timesteps: when each evaluation was, in steps of all environments together
    :ivar planner_returns: of each evaluation a list of its episodes' returns, the planner's; ``planner_lengths``, their steps
    :ivar prior_returns: the same of the policy prior; ``prior_lengths``
    :ivar best_mean_reward: the planner's best mean return so far; ``best_prior_reward``, the prior's
    :raises ValueError: when learning starts, if the environment's spaces are not the model's; if an evaluation would wait for
        ever, for episodes that do not end
    """

    model: BOOM

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        n_eval_episodes: int = 10,
        eval_freq: int = 10_000,
        deterministic: bool = True,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        log_path: str | None = None,
        best_model_save_path: str | None = None,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            eval_env, callback_on_new_best, callback_after_eval, n_eval_episodes, eval_freq, log_path, best_model_save_path,
            deterministic, verbose=verbose,
        )  # fmt: skip
        self.seed = seed
        self.timesteps: list[int] = []
        self.planner_returns: list[list[float]] = []
        self.prior_returns: list[list[float]] = []
        self.planner_lengths: list[list[int]] = []
        self.prior_lengths: list[list[int]] = []
        self.best_prior_reward = -np.inf
        self._goes_on = True

    def _init_callback(self) -> None:
        super()._init_callback()
        if isinstance(self.model, BOOM):
            probing.check_spaces(self.model, self.eval_env)

    def _on_step(self) -> bool:
        self._goes_on = True
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self.evaluate()
            if self.callback is not None:
                self._goes_on = self._on_event() and self._goes_on
        return self._goes_on

    def evaluate(self) -> None:
        """
        Evaluate now: append the returns to ``planner_returns`` and ``prior_returns``, log them, keep the best models.

        :raises ValueError: for episodes that do not end
        """
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        seed = self.seed + SEEDS_APART * len(self.timesteps)
        self.timesteps.append(self.model.num_timesteps)
        for name, actor in (("planner", self.model), ("prior", self.model.prior)):
            with probing.own_randomness(self.model.device, seed), evaluation_watched(self.eval_env):
                probing.seed_or_warn(self.eval_env, seed)
                self._is_success_buffer = []
                returns, lengths = evaluate_policy(
                    actor,  # type: ignore[arg-type]
                    self.eval_env,
                    self.n_eval_episodes,
                    deterministic=self.deterministic,
                    return_episode_rewards=True,
                    callback=self._log_success_callback,
                )
            assert isinstance(returns, list) and isinstance(lengths, list)
            getattr(self, f"{name}_returns").append(returns)
            getattr(self, f"{name}_lengths").append(lengths)
            self.logger.record(f"eval/{name}_return", float(np.mean(returns)))
            if self._is_success_buffer:
                self.logger.record(f"eval/{name}_success_rate", float(np.mean(self._is_success_buffer)))
        planner, prior = (float(np.mean(returns[-1])) for returns in (self.planner_returns, self.prior_returns))
        self.last_mean_reward = planner
        self.logger.record("eval/planner_gap", planner - prior)
        self.logger.record("eval/mean_reward", planner)
        self.logger.record("eval/mean_ep_length", float(np.mean(self.planner_lengths[-1])))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.verbose >= 1:
            print(
                f"Eval num_timesteps={self.num_timesteps}, planner={planner:.2f} prior={prior:.2f} gap={planner - prior:.2f}"
            )
        if self.log_path is not None:
            np.savez(
                self.log_path, timesteps=self.timesteps, results=self.planner_returns, ep_lengths=self.planner_lengths,
                prior_results=self.prior_returns, prior_ep_lengths=self.prior_lengths,
            )  # fmt: skip
        self._keep_best(planner, prior)

    def _keep_best(self, planner: float, prior: float) -> None:
        """:param planner: its mean return :param prior: its mean return"""
        better = {"planner": planner > self.best_mean_reward, "prior": prior > self.best_prior_reward}
        self.best_mean_reward = max(planner, self.best_mean_reward)
        self.best_prior_reward = max(prior, self.best_prior_reward)
        for name in (name for name, is_better in better.items() if is_better):
            if self.verbose >= 1:
                print(f"New best mean reward of the {name}!")
            if self.best_model_save_path is not None:
                self.model.save(pathlib.Path(self.best_model_save_path) / f"best_{name}")
        if better["planner"] and self.callback_on_new_best is not None:
            self._goes_on = self.callback_on_new_best.on_step()


class WorldModelCallback(BaseCallback):
    """
    Hold what world model and critics promise against episodes in an environment of their own. Training goes on as if there
    had been none.

    Logs ``world_model/latent_error_1`` … ``_10``, ``reward_error_…``, ``termination_error_…`` and ``value_error_…`` by how
    many steps ahead they are (:func:`sb3_boom.probing.open_loop`); ``world_model/value_bias_planner`` and ``_prior``, the
    critics' values less the discounted returns that came, for the actions of either, and ``value_ratio_…``, the ratio of their
    means;
    ``world_model/termination_precision`` and ``termination_recall``, one step ahead.

    :param eval_env: the environment used, wrapped as the training one; its own
    :param n_eval_episodes: episodes of planner and prior each
    :param eval_freq: look every ``eval_freq`` calls of the callback, one for each step of all environments together
    :param depth: how many steps ahead it looks
    :param seed: of the episodes; those of the next look have others
    :param verbose: Verbosity level: 0 for no output, 1 for a line per look
    :raises ValueError: when learning starts, if the environment's spaces are not the model's; for episodes that do not end
    """

    model: BOOM

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        n_eval_episodes: int = 3,
        eval_freq: int = 10_000,
        depth: int = probing.DEPTH,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.eval_env = eval_env if isinstance(eval_env, VecEnv) else DummyVecEnv([lambda: eval_env])
        self.n_eval_episodes = n_eval_episodes
        self.eval_freq = eval_freq
        self.depth = depth
        self.seed = seed
        self.n_looks = 0

    def _init_callback(self) -> None:
        probing.check_spaces(self.model, self.eval_env)

    def _on_step(self) -> bool:
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self.look()
        return True

    def look(self) -> dict[str, float]:
        """
        Look now, and log it.

        :return: what was logged, by name without ``world_model/``
        :raises ValueError: for episodes that do not end
        """
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        seed = self.seed + SEEDS_APART * self.n_looks
        self.n_looks += 1
        by_planner, by_prior = (
            probing.watched_episodes(self.model, self.eval_env, self.n_eval_episodes, seed, planned, deterministic=False)
            for planned in (True, False)
        )
        found: dict[str, float] = {}
        for name, errors in probing.open_loop(self.model, by_planner, self.depth).items():
            if name != "reward_constant":
                found |= {f"{name}_error_{k + 1}": float(error) for k, error in enumerate(errors) if np.isfinite(error)}
        for name, episodes in (("planner", by_planner), ("prior", by_prior)):
            promised, came = probing.calibration(self.model, episodes)
            if len(came):
                found[f"value_bias_{name}"] = float(np.mean(promised - came))
                if abs(np.mean(came)) > 1e-6:
                    found[f"value_ratio_{name}"] = float(np.mean(promised) / np.mean(came))
        scores = probing.termination_scores(self.model, [*by_planner, *by_prior])
        found |= {f"termination_{name}": score for name, score in scores.items()}
        for name, value in found.items():
            between = name.rpartition("_")[2] in {str(k) for k in range(2, self.depth)}  # a page of them would hide the rest
            self.logger.record(f"world_model/{name}", value, exclude="stdout" if between else None)
        if self.verbose >= 1:
            print(
                f"World model num_timesteps={self.num_timesteps}, "
                + ", ".join(f"{name}={value:.3g}" for name, value in found.items() if "bias" in name or name.endswith("_1"))
            )
        self.logger.dump(self.num_timesteps)
        return found
