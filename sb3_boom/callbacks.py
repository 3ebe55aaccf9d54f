"""Callbacks that know what BOOM consists of."""

import numpy as np
from stable_baselines3.common.callbacks import EventCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_boom.boom import BOOM


class PlannerPriorEvalCallback(EventCallback):
    """
    Evaluate the planner and the policy prior on the same environment, each over its own episodes.

    Logs ``eval/planner_return`` and ``eval/prior_return``: what planning adds to the policy.

    :param eval_env: the environment used for evaluation, wrapped as the training one
    :param n_eval_episodes: episodes for each of the two
    :param eval_freq: evaluate every ``eval_freq`` calls of the callback
    :param deterministic: whether both act deterministically
    """

    model: BOOM

    def __init__(
        self, eval_env: VecEnv, n_eval_episodes: int = 10, eval_freq: int = 10_000, deterministic: bool = True
    ) -> None:
        super().__init__()
        self.eval_env = eval_env
        self.n_eval_episodes = n_eval_episodes
        self.eval_freq = eval_freq
        self.deterministic = deterministic
        self.timesteps: list[int] = []
        self.planner_returns: list[list[float]] = []
        self.prior_returns: list[list[float]] = []

    def _on_step(self) -> bool:
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        """Evaluate now: append the returns to ``planner_returns`` and ``prior_returns``, and log their means."""
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        self.timesteps.append(self.model.num_timesteps)
        for name, actor, history in (
            ("planner", self.model, self.planner_returns),
            ("prior", self.model.prior, self.prior_returns),
        ):
            returns, _ = evaluate_policy(
                actor,  # type: ignore[arg-type]
                self.eval_env,
                self.n_eval_episodes,
                deterministic=self.deterministic,
                return_episode_rewards=True,
            )
            assert isinstance(returns, list)
            history.append(returns)
            self.logger.record(f"eval/{name}_return", float(np.mean(returns)))
        self.logger.dump(self.num_timesteps)
