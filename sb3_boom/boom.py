"""BOOM: collect with the planner, store what it did, learn from it."""

import contextlib
import dataclasses
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    Schedule,
)
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.checks import (
    FORMAT_VERSION,
    MOVED_TO_POLICY,
    WHOLE_NUMBERS,
    check_finite,
    check_settings,
    moved_arguments_named,
    warn_if_never_aligned,
    worker_deaths_named,
)
from sb3_boom.collection import CollectingAlgorithm
from sb3_boom.core import losses
from sb3_boom.core.actor import Actor
from sb3_boom.core.compilation import allow_tf32, compiled, keep_freed_memory, subnormals_flushed
from sb3_boom.core.critic import Critic
from sb3_boom.core.losses import BY_Q_SCALE, LossConfig
from sb3_boom.core.optimizers import set_learning_rates
from sb3_boom.diagnostics import of_newest
from sb3_boom.foresight import FreshTerminations, PlanOptimism
from sb3_boom.guards import (
    UPDATES_PER_CHECK,
    check_losses,
    check_parameters,
)
from sb3_boom.meters import Meters
from sb3_boom.policies import BOOMPolicy, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_boom.presets import TAU, TAU_WITH_TERMINATIONS, model_size, resolve_auto
from sb3_boom.prior import PolicyPrior
from sb3_boom.progress import Pace, PretrainingStopped, leaves, show_pretraining
from sb3_boom.update import update
from sb3_boom.waits import WORKER_TIMEOUT, bounded_waits, evaluation_watched

if TYPE_CHECKING:
    from sb3_boom.inspection import Inspection

SelfBOOM = TypeVar("SelfBOOM", bound="BOOM")

PRETRAIN_CHUNK = 100  # updates between two rows of progress
UPDATES_PER_WAIT = 32  # on a GPU, whose losses are read that often


class BOOM(CollectingAlgorithm):
    """
    Bootstrap Off-policy with World Model (BOOM), https://arxiv.org/abs/2511.00423.

    A planner (MPPI) acts in a learned latent world model. The policy learns from the critics and from what the planner
    did, softly weighted by value, and starts the next plan. Defaults are the paper's, with learned terminations and uniform
    sampling. The machine decides the sizes, see ``preset``; "auto" settings are resolved at construction, but for
    ``tau`` and ``horizon_value``, which follow the episodes.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: learning rate of both Adam optimizers, it can be a function of the current progress remaining
        (from 1 to 0). The encoder's is a part of it, see ``encoder_lr_scale``
    :param buffer_size: transitions in the replay buffer, of all environments together
    :param learning_starts: random steps, of all environments together, before the first update, once per model. Default
        "auto": ``max(1000, 5 T)`` for episodes of ``T`` agent steps, 2500 if ``T`` is unknown
    :param batch_size: sub-trajectories ``B`` per update. Default "auto": 256 with the paper's preset, 128 with "cpu"
    :param tau: ``τ``, Polyak factor of the target critics and of the running Q scale ``S``, per update. Default "auto": 0.01,
        and 0.05 once an episode has ended by a termination, except with ``alignment="release"``
    :param gamma: ``γ``, discount per agent step. Default "auto": ``(T/5 - 1) / (T/5)`` within [0.95, 0.995], 0.99 if ``T`` is
        unknown
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout. Set to ``-1`` means to do as many gradient
        steps as steps done in the environment during the rollout.
    :param action_noise: the action noise type, added to the planner's own exploration, where actions are in [-1, 1]
    :param replay_buffer_class: a subclass of :class:`~sb3_boom.buffers.WeightedReplayBuffer`, the default
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation, such as
        ``sampling="episode"`` or ``value_temperature=1.0``. With a ``value_temperature`` the buffer draws by value, so
        the alignment's own weights become uniform
    :param optimize_memory_usage: only False: the buffer already stores every observation once
    :param n_steps: rewards that a critic's target sums before it trusts the target critics, at most ``horizon``; fewer towards
        the end of a window. Default 1, the paper's
    :param preset: sizes that belong together. "paper": 5M parameters, 512 samples a plan, batches of 256. "cpu", for two
        cores: the "tiny" model, 128 samples (16 elites, 6 by the policy, 4 iterations), batches of 128. Default "auto": the
        paper's on a GPU, "cpu" on a CPU. ``batch_size``, ``planner_kwargs`` and ``policy_kwargs`` given as well win
    :param pretrain_steps: updates at the end of warm-up, once per model. Default "auto": ``learning_starts``
    :param horizon: ``H``, steps of the latent rollout, in learning and planning
    :param rho: ``ρ``: step ``t`` of the rollout weighs ``ρ^t`` in every loss
    :param consistency_coef: weight of the latent consistency loss, the mean of ``(z_{t+1} - z̄_{t+1})²``
    :param reward_coef: weight of the reward loss, a cross-entropy over 101 bins
    :param value_coef: weight of the critics' loss, a cross-entropy over 101 bins
    :param termination_coef: weight of the termination loss, a binary cross-entropy
    :param handle_terminations: learn to predict terminations, stop targets and plans there. False: no termination head,
        every end bootstraps, as the authors' release
    :param ent_coef: weight of the policy's log-probability ``log π(a|z)``, scaled by the action dimension ``A`` as in the
        release; a number, which is not tuned as SAC's is
    :param max_grad_norm: The maximum value for the gradient clipping (of the 2-norm), of either optimizer
    :param alignment: how the policy is taught by the planner, ``ℓ``: "forward_kl" (default, the paper's formula
        ``log π(a_β|z)``, on actions before squashing), "release" (the authors' program, behind
        the published curves; it is off while ``S`` is at most 2, see ``train/align_active``), "reverse_kl" or "none"
    :param align_coef: weight of the alignment term ``-Σ_B w ℓ``. Default "auto": A/1000 for 24 <= A <= 48 action
        dimensions, else A/50
    :param align_scale: what ``ℓ`` is divided by. "q_scale": ``S``, as in the authors' program, so that the policy learns the
        less from the planner the larger returns are; a number: the same balance whatever the rewards' scale. Default "auto":
        "q_scale" with ``alignment="release"``, else 5
    :param align_weighting: "softmax" (soft value weights ``w = softmax_B(Q / (S τ_w))``, default) or "uniform" over the batch
    :param align_temperature: ``τ_w``, temperature of the soft value weights, in units of ``S``; lower favours high values more
    :param align_warmup: imitate the random actions of warm-up too, as the release does; False: only what was planned
    :param planner: "mppi" or "cem"
    :param planner_kwargs: ``n_samples`` ``N`` (512 with the paper's preset) action sequences scored in every one of
        ``n_iterations`` ``I`` ("auto": 6, or 8 for A >= 20), ``n_policy_samples`` ``P`` (24) of them by the policy; the best
        ``n_elites`` ``K`` (64) shape the next iteration, weighted by ``exp(temperature * value)`` (0.5) except by "cem";
        ``min_std`` (0.05) and ``max_std`` (2) bound its std, of actions in [-1, 1];
        ``horizon_value`` is "mean" of two critics, the paper's, "min" of all, or (default, except with
        ``alignment="release"``) "auto": "mean" until an episode has ended by a termination, then "min"
    :param policy_kwargs: additional arguments to be passed to the policy on creation, such as ``dict(model_size="1M")``,
        ``encoder_lr_scale``, ``compile`` or ``tf32``. See :class:`~sb3_boom.policies.BOOMPolicy`
    :param worker_timeout: seconds after which a worker of a SubprocVecEnv that does not answer is an error; None waits as
        long as it lives
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average the
        reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
        messages
    :param seed: Seed for the pseudo random generators. Default None: they are not seeded
    :param device: Device (cpu, cuda, ...) on which the code should be run. Setting it to auto, the code will be run on
        the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :ivar policy: networks, optimizers and planner, a :class:`~sb3_boom.policies.BOOMPolicy`
    :ivar actor: the policy ``π``, an :class:`~sb3_boom.core.actor.Actor` of ``policy``
    :ivar critic: the critics ``Q_i``, a :class:`~sb3_boom.core.critic.Critic` of ``policy``
    :ivar critic_target: the target critics ``Q̄_i``
    :ivar replay_buffer: a :class:`~sb3_boom.buffers.WeightedReplayBuffer`; a loaded model's is empty
    :ivar pretrain_updates: how many of ``pretrain_steps`` are done
    :raises ValueError: for settings outside of these
    :raises TypeError: for arguments that there are not, or not any more
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    actor: Actor
    critic: Critic
    critic_target: Critic

    @moved_arguments_named
    def __init__(
        self,
        policy: str | type[BOOMPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int | Literal["auto"] = "auto",
        batch_size: int | Literal["auto"] = "auto",
        tau: float | Literal["auto"] = "auto",
        gamma: float | Literal["auto"] = "auto",
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[WeightedReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        preset: str = "auto",
        pretrain_steps: int | Literal["auto"] = "auto",
        horizon: int = 3,
        rho: float = 0.5,
        consistency_coef: float = 20.0,
        reward_coef: float = 0.1,
        value_coef: float = 0.1,
        termination_coef: float = 1.0,
        handle_terminations: bool = True,
        ent_coef: float = 1e-4,
        max_grad_norm: float = 20.0,
        alignment: str = "forward_kl",
        align_coef: float | Literal["auto"] = "auto",
        align_scale: float | Literal["auto", "q_scale"] = "auto",
        align_weighting: str = "softmax",
        align_temperature: float = 1.0,
        align_warmup: bool = True,
        planner: str = "mppi",
        planner_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        worker_timeout: float | None = WORKER_TIMEOUT,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,  # type: ignore[arg-type]  # resolved in _setup_model
            batch_size,  # type: ignore[arg-type]  # resolved in _setup_model
            tau,  # type: ignore[arg-type]  # see _loss_config
            gamma,  # type: ignore[arg-type]  # resolved in _setup_model
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.format_version = FORMAT_VERSION
        self.preset = preset
        self.pretrain_steps: int = pretrain_steps  # type: ignore[assignment]  # resolved in _setup_model
        self.horizon = horizon
        self.rho = rho
        self.consistency_coef = consistency_coef
        self.reward_coef = reward_coef
        self.value_coef = value_coef
        self.termination_coef = termination_coef
        self.handle_terminations = handle_terminations
        self.ent_coef = ent_coef
        self.max_grad_norm = max_grad_norm
        self.alignment = alignment
        self.align_coef: float = align_coef  # type: ignore[assignment]  # resolved in _setup_model
        self.align_scale: float | str = align_scale  # as align_coef
        self.align_weighting = align_weighting
        self.align_temperature = align_temperature
        self.align_warmup = align_warmup
        self.planner = planner
        self.planner_kwargs = planner_kwargs
        self.pretrain_updates = 0  # of pretrain_steps, done so far
        self.meters = Meters()
        self.pace = Pace()
        self.fresh_terminations = FreshTerminations()
        self.plan_optimism = PlanOptimism()
        self.warned: set[str] = set()
        self._enough_data = False
        self._planner_mean: th.Tensor | None = None
        self._planned: np.ndarray | None = None
        self._callback: BaseCallback | None = None
        self._defers_updates = False
        self._owed: list[tuple[int, int]] = []  # updates that wait for the next plan: their number and batch size
        self.worker_timeout = worker_timeout
        # for callbacks that save: called where buffer, counters and last observation agree; undone when learning ends
        self.between_steps: list[Callable[[], None]] = []
        self.at_end = contextlib.ExitStack()
        self.lineages: dict[str, Any] = {}  # of the checkpoints this model was resumed from or written to, by folder
        self.collected = (0, 0)  # steps and episodes of the rollout that goes on
        self.takes_up_rollout = False  # the next one, which a checkpoint has interrupted
        if _init_setup_model:
            self._setup_model()

    # -------------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        self._take_moved_arguments()
        check_settings(vars(self))
        action_dim = int(np.prod(self.action_space.shape or ()))
        for name, value in resolve_auto(vars(self), self.device, self.env, action_dim).items():
            setattr(self, name, value)
        for name in WHOLE_NUMBERS:
            setattr(self, name, int(getattr(self, name)))
        if self.replay_buffer_class is None:
            self.replay_buffer_class = WeightedReplayBuffer
        policy_kwargs, replay_buffer_kwargs, n_steps = self.policy_kwargs, self.replay_buffer_kwargs, self.n_steps
        # what the policy shares with the algorithm is given once, to the algorithm
        self.policy_kwargs = {
            **policy_kwargs,
            "model_size": model_size(self.preset, policy_kwargs),
            "handle_terminations": self.handle_terminations,
            "planner": self.planner,
            "planner_kwargs": self.planner_kwargs,
            "horizon": self.horizon,
            "gamma": self.gamma,
        }
        self.replay_buffer_kwargs = {**replay_buffer_kwargs, "horizon": self.horizon}
        self.n_steps = 1  # for SB3, which has a replay buffer of its own for more
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs, self.replay_buffer_kwargs, self.n_steps = policy_kwargs, replay_buffer_kwargs, n_steps
        self.actor, self.critic, self.critic_target = self.policy.actor, self.policy.critic, self.policy.critic_target
        if self.policy.tf32:
            allow_tf32(self.device)

    def _take_moved_arguments(self) -> None:
        """What ``load`` was given, or an archive of format 1 holds, beside ``policy_kwargs``."""
        defaults = inspect.signature(BOOMPolicy).parameters
        for name in MOVED_TO_POLICY:
            value = self.__dict__.pop(name, None)
            if value is not None and (name in self.policy_kwargs or value != defaults[name].default):
                self.policy_kwargs = {**self.policy_kwargs, name: value}
        if self.format_version < 2:
            self.preset = "paper"  # its sizes were the defaults then
        if self.format_version < 3 and self.align_scale == "auto":
            self.align_scale = BY_Q_SCALE  # there was nothing else
        if self.format_version < 4:
            self.planner_kwargs = {"horizon_value": "mean", **(self.planner_kwargs or {})}
        self.format_version = FORMAT_VERSION

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        setup = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        check_finite(self._last_obs if self._vec_normalize_env is None else self._last_original_obs, "an observation", 0)
        for leaf in leaves(setup[1]):
            if isinstance(evaluated := getattr(leaf, "eval_env", None), VecEnv):
                self.at_end.enter_context(bounded_waits(evaluated, self.worker_timeout))
                self.at_end.enter_context(evaluation_watched(evaluated))
        self._callback, self.pace = setup[1], Pace()
        for name in ("preset", "batch_size", "gamma", "learning_starts", "pretrain_steps", "align_coef", "align_scale"):
            self.logger.record(f"config/{name}", getattr(self, name))
        self.logger.record("config/model_size", self.policy.model_size)
        for name in ("n_samples", "n_elites", "n_policy_samples", "n_iterations"):
            self.logger.record(f"config/{name}", getattr(self.policy.planner_config, name))
        return setup

    # ---------------------------------------------------------------------- learn

    def learn(
        self: SelfBOOM,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "BOOM",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfBOOM:
        """
        Act, store, update, as in any SB3 algorithm. Random warm-up and pretraining happen once per model; a model that was
        loaded without its replay buffer acts with its planner until the new one holds ``learning_starts`` transitions.

        :param total_timesteps: The total number of samples (steps of all environments together) to train on
        :param callback: callback(s) called at every step with state of the algorithm. One that has a method
            ``_on_pretraining() -> bool`` is asked after every 100 updates of pretraining too, and stops learning by False
        :param log_interval: episodes, of all environments together, between two logs
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: for an observation, a reward, a loss or a parameter that is NaN or infinite, or if planning failed
        :raises RuntimeError: if a worker of a SubprocVecEnv died
        :raises TimeoutError: if one has not answered for ``worker_timeout`` seconds
        """
        keep_freed_memory()
        self.at_end = contextlib.ExitStack()
        waits = bounded_waits(self.env, self.worker_timeout)
        with self.at_end, subnormals_flushed(), worker_deaths_named(self.env), waits, self._updates_beside_steps():
            try:
                return super().learn(
                    int(total_timesteps), callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
                )
            except PretrainingStopped:
                assert self._callback is not None
                self._callback.on_training_end()
                return self
            except BaseException:
                # the environments may have gone on alone: close their episodes, start the next ones from a reset
                self._last_obs = None
                if self.replay_buffer is not None:
                    self.replay_buffer.close_episodes()
                raise
            finally:
                self._callback = None

    @contextlib.contextmanager
    def _updates_beside_steps(self) -> Iterator[None]:
        """
        On a GPU, launch a rollout's updates when the next plan has been read back: the GPU learns while the environment
        steps. On a CPU they would only make that plan older.
        """
        self._defers_updates = self.device.type == "cuda"
        try:
            yield
            self._catch_up()
        finally:
            self._defers_updates = False

    def _catch_up(self) -> None:
        """Do the updates that are owed."""
        owed, self._owed = self._owed, []
        for gradient_steps, batch_size in owed:
            self._update(gradient_steps, batch_size)
            if self.device.type == "cpu" or self.meters.n_updates >= UPDATES_PER_WAIT:
                self._record_losses()

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Update world model, critics and policy. Within ``learn`` it waits until the replay buffer holds ``learning_starts``
        transitions, and pretrains the first time; called by itself it does the given updates and nothing else.

        :param gradient_steps: number of updates
        :param batch_size: sub-trajectories ``B`` per update; default: the model's
        :raises ValueError: if the replay buffer is empty, or for a loss or a parameter that is NaN or infinite
        """
        assert self.replay_buffer is not None
        within_learn = self._callback is not None
        if within_learn and not (self._has_enough_data() and self.replay_buffer.can_sample()):
            return
        if within_learn and self._n_updates == 0 and self.replay_buffer.holds_terminations():
            self.policy.terminations_seen.fill_(1.0)  # now, since what follows from them is compiled
            self._expect_terminations()
        if self._n_updates == 0 and self.verbose >= 1 and self.policy.compiler is compiled:
            print("Compiling losses and planner: up to two minutes the first time, seconds from the cache later")
        if within_learn:
            self._pretrain(batch_size or self.batch_size)
        self._owed.append((gradient_steps, batch_size or self.batch_size))
        if not self._defers_updates or self._n_updates == 0:  # nothing is planned before there has been an update
            self._catch_up()
        self.collected = (0, 0)  # nothing else is owed to the rollout

    def _pretrain(self, batch_size: int) -> None:
        """Update ``pretrain_steps`` times on fresh batches; an interrupted pretraining goes on where it stopped."""
        while self.pretrain_updates < self.pretrain_steps:
            chunk = min(PRETRAIN_CHUNK, self.pretrain_steps - self.pretrain_updates)
            start = time.perf_counter()
            self._update(chunk, batch_size)
            self.pretrain_updates += chunk
            self._record_losses(exclude="stdout")  # a page for every hundred updates would hide the rest
            left = (self.pretrain_steps - self.pretrain_updates) * (time.perf_counter() - start) / chunk
            row = {"update": self.pretrain_updates, "of": self.pretrain_steps, "seconds_left": round(left)}
            for name, value in row.items():
                self.logger.record(f"pretraining/{name}", value)
            self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
            self.logger.dump(self.num_timesteps)
            show_pretraining(self._callback, self.pretrain_updates, self.pretrain_steps, left)

    def _update(self, gradient_steps: int, batch_size: int) -> None:
        """
        :param gradient_steps: number of updates
        :param batch_size: sub-trajectories per update
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.policy.model_optimizer, self.policy.actor_optimizer])
        with self.meters.timing("update", gradient_steps, self.device):
            self._descend(gradient_steps, batch_size)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _descend(self, gradient_steps: int, batch_size: int) -> None:
        assert self.replay_buffer is not None
        config = self._loss_config()
        for _ in range(gradient_steps):
            with self.meters.timing("sample", 1, self.device):
                batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            noise = losses.draw_noise(
                self.horizon,
                batch_size,
                self.policy.action_dim,
                self.policy.critic.n_critics,
                self.policy.critic.mlp_dim,
                self.policy.dropout,
                self.device,
            )
            values, terms = update(self.policy, batch, noise, config, self.max_grad_norm)
            self.replay_buffer.update_values(batch.indices, values, batch.valid, self.policy.q_scale)
            self.meters.add_terms(terms)
            self._n_updates += 1
            if self._n_updates % UPDATES_PER_CHECK == 0:
                check_losses(self.meters.means(), self._n_updates)
                check_parameters(self.policy, self._n_updates)

    def _record_losses(self, exclude: str | None = None) -> None:
        """
        Hand the losses to the logger, which shows their means over what it was given; waits for the device.

        :param exclude: a format that is not to have them
        """
        terms = self.meters.take_terms()
        check_losses(terms, self._n_updates)
        if terms.pop("terminations_seen", 0.0) > 0.0 and not self.policy.expects_terminations:
            self._expect_terminations()
        for name, value in terms.items():
            self.logger.record_mean(f"train/{name}", value, exclude)
        if "alignment" not in self.warned and terms:
            can_be_on = terms["align_active"] > 0.0 or self.alignment == "none"
            if can_be_on or warn_if_never_aligned(self.num_timesteps):
                self.warned.add("alignment")

    def _expect_terminations(self) -> None:
        self.policy.expect_terminations(True)
        if self.verbose >= 1 and self.policy.expects_terminations:
            changed = [f"tau={TAU_WITH_TERMINATIONS}"] if self.tau == "auto" else []
            changed += ['horizon_value="min" for plans'] if self.policy.horizon_value_settles else []
            if changed:
                print(f"Episodes are terminated: {' and '.join(changed)} from now on")

    def _loss_config(self) -> LossConfig:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(LossConfig)}
        if self.tau == "auto":
            settings["tau"] = TAU_WITH_TERMINATIONS if self.policy.expects_terminations else TAU
        if self.replay_buffer is not None and self.replay_buffer.value_temperature is not None:
            settings["align_weighting"] = "uniform"  # what is drawn by value is weighted already
        return LossConfig(**settings)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        # SB3's sets one number for all groups
        scale = self.policy.encoder_lr_scale
        self.policy.model_optimizer.param_groups[0]["lr_scale"] = scale  # loaded parameters have their own
        rate = self.lr_schedule(self._current_progress_remaining)
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            rates = [rate * group["lr_scale"] for group in optimizer.param_groups]
            if set_learning_rates(optimizer, rates, self.device):
                self.policy.forget_graphs()

    # -------------------------------------------------------------------- predict

    @property
    def prior(self) -> PolicyPrior:
        """The policy without planning; has ``predict``, so that ``evaluate_policy(model.prior, env)`` works."""
        return PolicyPrior(self.policy)

    def inspect(self, env: GymEnv | str, **kwargs: Any) -> "Inspection":
        """
        Let planner and prior act for a few episodes, and show what the model promised against what came: in a notebook as it
        is, else ``model.inspect(env).save("page.html")``. Needs ``sb3_boom[inspect]``.

        :param env: to act in, not the one that the model learns in, or its id
        :param kwargs: ``n_episodes``, ``seed`` and ``max_steps`` of :func:`sb3_boom.inspection.inspect`
        :return: verdict and figures
        :raises ImportError: without matplotlib or jinja2
        :raises ValueError: if the environment's spaces are not the model's
        """
        # by name: it is made of models, and plots, which nobody needs to learn
        return importlib.import_module("sb3_boom.inspection").inspect(self, env, **kwargs)

    # ------------------------------------------------------------------------ log

    def dump_logs(self) -> None:
        """
        Write log data: losses and times are means since the last call.

        :raises ValueError: for a loss that is NaN or infinite
        """
        self._record_losses()
        for name, value in self.fresh_terminations.take_scores().items():
            self.logger.record(f"train/{name}", value)
        for name, value in self.meters.take_plans(self.policy.planner_config.horizon).items():
            self.logger.record(f"planner/{name}", value)
        if self._n_updates > 0:
            measured = of_newest(self.policy, self.replay_buffer, self._vec_normalize_env, self.gamma)
            for name, value in measured.items():
                self.logger.record(f"train/{name}", value)
        for name, milliseconds in self.meters.take_milliseconds().items():
            self.logger.record(f"time/{name}_ms", milliseconds)
        super().dump_logs()
