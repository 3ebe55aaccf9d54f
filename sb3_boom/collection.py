"""How experience comes in: random warm-up, then plans, which are stored with what they led to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.checks import check_finite
from sb3_boom.foresight import PlanOptimism
from sb3_boom.guards import STEPS_WITHOUT_A_DRAW, finite_actions, warn_of_nothing_to_draw
from sb3_boom.meters import Meters
from sb3_boom.progress import Pace, pace_line, warn_if_slow
from sb3_boom.saving import SavedAlgorithm


class CollectingAlgorithm(SavedAlgorithm):
    """How :class:`sb3_boom.BOOM` acts in its environments and stores what came; its constructor is SB3's."""

    preset: str
    meters: Meters
    pace: Pace
    plan_optimism: PlanOptimism
    warned: set[str]
    collected: tuple[int, int]
    takes_up_rollout: bool
    between_steps: list[Callable[[], None]]
    _planner_mean: th.Tensor | None
    _planned: np.ndarray | None

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """
        SB3's, which leaves two things out: it does not store the step at which a callback stops, so that what follows would
        be joined to the step before; and it counts warm-up in timesteps, which a second ``learn`` resets.

        :param env: The training environment
        :param callback: Callback that will be called at each step
        :param train_freq: How much experience to collect
        :param replay_buffer: where to
        :param action_noise: added to the plan, if any
        :param learning_starts: Number of steps before SB3's loop calls :meth:`train`
        :param log_interval: Log data every ``log_interval`` episodes. Default None: never
        :return: number of steps and episodes, and whether to go on
        :raises ValueError: as :meth:`learn`
        """
        steps, episodes = self.collected if self.takes_up_rollout else (0, 0)
        self.collected, self.takes_up_rollout = (steps, episodes), False
        left = train_freq.frequency - (steps if train_freq.unit == TrainFrequencyUnit.STEP else episodes)
        if left > 0:
            train_freq = TrainFreq(left, train_freq.unit)
            with self.meters.timing_steps(env):
                rollout = super().collect_rollouts(
                    env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
                )
        else:  # interrupted when only its updates were left to do
            rollout = RolloutReturn(0, 0, continue_training=True)
        rollout = RolloutReturn(
            rollout.episode_timesteps + steps * env.num_envs, rollout.n_episodes + episodes, rollout.continue_training
        )
        if not rollout.continue_training:
            names = ("buffer_actions", "new_obs", "rewards", "dones", "infos")
            self._store_transition(replay_buffer, *(callback.locals[name] for name in names))
        elif self.num_timesteps <= learning_starts:
            gradient_steps = self.gradient_steps if self.gradient_steps >= 0 else rollout.episode_timesteps
            if gradient_steps > 0:
                self.train(gradient_steps, self.batch_size)
        return rollout

    def _in_warmup(self) -> bool:
        """Whether actions are still random: until the first update, once per model."""
        return self._n_updates == 0 and not (self.gradient_steps == 0 and self._has_enough_data())

    def _has_enough_data(self) -> bool:
        """Whether there is enough to learn from: ``learning_starts`` transitions, or what the buffer can hold."""
        buffer = self.replay_buffer
        assert buffer is not None
        if not self._enough_data:
            enough = min(self.learning_starts, buffer.buffer_size * self.n_envs)
            held, can_sample = buffer.size() * self.n_envs, buffer.can_sample()
            self._enough_data = held >= enough and can_sample
            waits_long = held >= enough + STEPS_WITHOUT_A_DRAW or buffer.full
            if not can_sample and waits_long and "nothing to draw" not in self.warned:
                self.warned.add("nothing to draw")
                warn_of_nothing_to_draw(buffer.horizon)
        return self._enough_data

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        for hook in self.between_steps:
            hook()
        if self._in_warmup():
            self._planned = None
            scaled = self.policy.from_action_space(np.array([self.action_space.sample() for _ in range(n_envs)]))
        else:
            if (seconds := self.pace.step()) is not None:
                if self.verbose >= 1:
                    left = max(self._total_timesteps - self.num_timesteps, 0)
                    print(pace_line(self.policy, self.preset, self.batch_size, seconds, left, self.n_envs))
                warn_if_slow(self.policy, seconds, self.warned)
            with self.meters.timing("plan", 1, self.device):
                scaled = self._plan(n_envs)
        self._catch_up()
        if action_noise is not None:
            scaled = np.clip(scaled + np.asarray(action_noise()).reshape(-1, scaled.shape[1]), -1.0, 1.0)
        return self.policy.to_action_space(scaled), scaled

    def _plan(self, n_envs: int) -> np.ndarray:
        """
        Plan for all environments at once, each from its own last plan.

        :param n_envs: ``E``
        :return: exploratory actions in [-1, 1], ``[E, A]``
        """
        assert self._last_obs is not None and self._last_episode_starts is not None
        self.policy.set_training_mode(False)
        obs, starts = self.policy.observations_and_starts(self._last_obs, self._last_episode_starts)  # type: ignore[arg-type]
        mean = self._planner_mean
        if mean is None or len(mean) != n_envs:
            mean = self.policy.initial_mean(n_envs)
        plan = self.policy.plan(obs, mean.masked_fill(starts.view(-1, 1, 1), 0.0))
        self._planner_mean = plan.mean
        self.meters.add_plans(plan.statistics)
        planned = finite_actions(
            th.cat([plan.exploratory_action, plan.planner_action, plan.planner_std, plan.value.unsqueeze(1)], dim=1)
        )
        self._planned = planned[:, self.policy.action_dim :]
        return planned[:, : self.policy.action_dim]

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        normalizer = self._vec_normalize_env
        raw_obs = new_obs if normalizer is None else normalizer.get_original_obs()
        check_finite(raw_obs, "an observation", self.num_timesteps)
        check_finite(reward if normalizer is None else normalizer.get_original_reward(), "a reward", self.num_timesteps)
        for i, info in enumerate(infos):
            if dones[i] and (final := info.get("terminal_observation")) is not None:
                check_finite(final, "an observation", self.num_timesteps, env_index=i)
        if self._planned is not None:
            dim = self.policy.action_dim
            # in copies: the dicts are the environments', which may keep them, or all return the same one
            infos = [
                {**info, "planner_action": planned[:dim], "planner_std": planned[dim : 2 * dim]}
                for info, planned in zip(infos, self._planned, strict=True)
            ]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        assert isinstance(replay_buffer, WeightedReplayBuffer) and self._last_episode_starts is not None
        if self._n_updates > 0:
            self.fresh_terminations.see(self.policy, replay_buffer, normalizer)
        values = None if self._planned is None else self._planned[:, -1]
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        for gap in self.plan_optimism.see(values, reward, dones, truncated, self._last_episode_starts, self.gamma):
            self.logger.record_mean("rollout/plan_optimism", gap)
        self._last_episode_starts = dones
        self.collected = (self.collected[0] + 1, self.collected[1] + int(np.sum(dones)))
