"""Policies for BOOM: world model, policy, critics and planner in one SB3 policy."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_boom.core import planner
from sb3_boom.core.actor import Actor
from sb3_boom.core.augmentation import random_shift
from sb3_boom.core.compilation import bf16_products, choose_compiler, compiled
from sb3_boom.core.critic import Critic
from sb3_boom.core.graphs import Graphs, captures_on
from sb3_boom.core.planner import Plan, PlannerConfig, PlannerNoise, make_config
from sb3_boom.core.torch_layers import set_mode
from sb3_boom.core.transfer import send
from sb3_boom.core.world_model import WorldModel
from sb3_boom.guards import check_observation, finite_actions
from sb3_boom.sizes import is_dog_sized, layer_sizes


class BOOMPolicy(BasePolicy):
    """
    The networks of BOOM and the planner that acts with them.

    :param observation_space: Observation space
    :param action_space: Action space, a Box
    :param lr_schedule: Learning rate schedule, from the remaining progress (1 to 0) to a rate
    :param model_size: "tiny", "1M", "5M", "19M", "48M" or "317M" parameters; the five dimensions that follow override it one
        by one, where they are not None. BOOM's default follows its ``preset``
    :param enc_dim: width of the encoder's hidden layers
    :param mlp_dim: width of the other networks' hidden layers
    :param latent_dim: size ``L`` of the latent
    :param n_critics: size of the critic ensemble, at least 2
    :param n_enc_layers: layers of the encoder, the last included
    :param simnorm_dim: features per simplex of the latent, a divisor of ``latent_dim``; None switches SimNorm off.
        Default "auto": 8, and None for 24 <= A <= 48 (the dogs), as the authors' release
    :param dropout: probability of dropping a unit in the critics' first layer, in the losses only
    :param features_extractor_class: Features extractor to use, before the encoder. Default None: FlattenExtractor;
        NatureCNN for CnnPolicy, CombinedExtractor for MultiInputPolicy
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to divide images by 255, to [0, 1]
    :param image_shift: pixels by which images are shifted at random, either way, while learning (as TD-MPC2); 0 for none
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments of both optimizers, without the learning rate
    :param encoder_lr_scale: the encoder's learning rate as a part of the others'
    :param compile: compile planner and losses with torch.compile. Default "auto": where it works
    :param tf32: on a GPU, let matrix products round their factors to TF32 (10 bits of mantissa), as its tensor cores multiply
        them; this is torch's own setting, of the whole process. Default True; False leaves it as it is
    :param bf16: plan with matrix products whose factors are rounded to bfloat16 (8 bits of mantissa), where the processor or
        GPU has them, which pays for large models alone. Updates never do. Default False
    :param handle_terminations: whether the world model predicts terminations; set by BOOM, as all that follow
    :param planner: "mppi" or "cem"
    :param planner_kwargs: see :class:`sb3_boom.BOOM`
    :param horizon: ``H``, agent steps looked ahead
    :param gamma: ``γ``, discount per agent step
    :ivar world_model: encoder ``h``, dynamics ``d``, reward ``R`` and termination ``g``, a
        :class:`~sb3_boom.core.world_model.WorldModel`
    :ivar actor: the policy ``π``
    :ivar critic: the critics ``Q_i``
    :ivar critic_target: the target critics ``Q̄_i``
    :ivar features_extractor: before the encoder, from observations to features ``[n, F]``
    :ivar planner_config: the planner's settings, a :class:`~sb3_boom.core.planner.PlannerConfig`
    :ivar model_optimizer: of features extractor, world model and critics
    :ivar actor_optimizer: of the policy
    :ivar q_scale: ``S``, running scale of Q-values, a scalar tensor
    :ivar terminations_seen: scalar tensor, 1 once the data held a termination, else 0; plans count them from then on
    :ivar expects_terminations: whether they are predicted and the host knows that one has been seen
    :ivar capture: False: on a GPU too, launch plan and update kernel by kernel, without CUDA graphs. Default True
    :raises ValueError: for settings outside of these
    """

    default_features_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor
    q_scale: th.Tensor
    terminations_seen: th.Tensor
    capture = True  # False: on a GPU too, launch plan and update kernel by kernel

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        model_size: str = "5M",
        enc_dim: int | None = None,
        mlp_dim: int | None = None,
        latent_dim: int | None = None,
        n_critics: int | None = None,
        n_enc_layers: int | None = None,
        simnorm_dim: int | Literal["auto"] | None = "auto",
        dropout: float = 0.01,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        image_shift: int = 3,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        encoder_lr_scale: float = 0.3,
        compile: bool | Literal["auto"] = "auto",
        tf32: bool = True,
        bf16: bool = False,
        handle_terminations: bool = True,
        planner: str = "mppi",
        planner_kwargs: dict[str, Any] | None = None,
        horizon: int = 3,
        gamma: float = 0.99,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        sizes = layer_sizes(model_size, (enc_dim, mlp_dim, latent_dim, n_critics, n_enc_layers))
        enc_dim, mlp_dim, latent_dim, n_critics, n_enc_layers = sizes.values()
        self.action_dim = get_action_dim(action_space)
        if simnorm_dim == "auto":
            simnorm_dim = None if is_dog_sized(self.action_dim) else 8
        if simnorm_dim is not None and (simnorm_dim < 1 or latent_dim % simnorm_dim != 0):
            raise ValueError(f"simnorm_dim={simnorm_dim} must divide latent_dim={latent_dim}, or be None for no SimNorm")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        if not isinstance(image_shift, int) or image_shift < 0:
            raise ValueError(f"image_shift must be a number of pixels of at least 0, not {image_shift!r}")
        if isinstance(encoder_lr_scale, (bool, str)) or not encoder_lr_scale >= 0.0:  # NaN neither
            raise ValueError(f"encoder_lr_scale must be at least 0, not {encoder_lr_scale!r}")
        if not isinstance(compile, bool) and compile != "auto":
            raise ValueError(f'compile must be True, False or "auto", not {compile!r}')
        if not isinstance(tf32, bool):
            raise ValueError(f"tf32 must be True or False, not {tf32!r}")
        if not isinstance(bf16, bool):
            raise ValueError(f"bf16 must be True or False, not {bf16!r}")
        self._constructor_kwargs = dict(
            model_size=model_size,
            **sizes,
            simnorm_dim=simnorm_dim,
            dropout=dropout,
            image_shift=image_shift,
            encoder_lr_scale=encoder_lr_scale,
            compile=compile,
            tf32=tf32,
            bf16=bf16,
            handle_terminations=handle_terminations,
            planner=planner,
            planner_kwargs=planner_kwargs,
            horizon=horizon,
            gamma=gamma,
        )
        self.model_size = model_size
        self.tf32 = tf32
        self.bf16 = bf16
        self.latent_dim = latent_dim
        self.dropout = dropout
        self.image_shift = image_shift
        self.compile_setting = compile
        self.graphs = Graphs()
        self.encoder_lr_scale = encoder_lr_scale
        self.planner_config = make_config(planner, planner_kwargs, self.action_dim, horizon, gamma)
        self.horizon_value_settles = (planner_kwargs or {}).get("horizon_value") == "auto"
        self.expects_terminations = False
        self.features_extractor = self.make_features_extractor()
        if type(self.features_extractor) in (NatureCNN, CombinedExtractor):  # not a user's, which may be trained already
            # as SB3's on-policy policies: torch's own start makes almost the same features of all dark images
            for module in self.features_extractor.modules():
                if isinstance(module, NatureCNN):
                    module.apply(functools.partial(self.init_weights, gain=np.sqrt(2)))
        self.world_model = WorldModel(
            self.features_extractor.features_dim,
            self.action_dim,
            latent_dim,
            enc_dim,
            mlp_dim,
            n_enc_layers,
            simnorm_dim,
            handle_terminations,
        )
        self.actor = Actor(latent_dim, self.action_dim, mlp_dim)
        self.critic = Critic(latent_dim, self.action_dim, mlp_dim, n_critics)
        self.critic_target = Critic(latent_dim, self.action_dim, mlp_dim, n_critics)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.register_buffer("q_scale", th.ones(()))  # S
        self.register_buffer("terminations_seen", th.zeros(()))
        self._build_optimizers(lr_schedule)

    def _build_optimizers(self, lr_schedule: Schedule) -> None:
        """One optimizer for world model and critics, one for the policy. :param lr_schedule: Learning rate schedule"""
        lr = lr_schedule(1)
        encoder = [*self.features_extractor.parameters(), *self.world_model.encoder.parameters()]
        in_encoder = {id(parameter) for parameter in encoder}
        others = [p for p in (*self.world_model.parameters(), *self.critic.parameters()) if id(p) not in in_encoder]
        kwargs = dict(self.optimizer_kwargs)
        if issubclass(self.optimizer_class, th.optim.Adam) and not kwargs.keys() & {"foreach", "differentiable"}:
            kwargs.setdefault("fused", True)
        # every group's own part of the schedule stays with it, through saving and loading too
        groups = [
            {"params": encoder, "lr": self.encoder_lr_scale * lr, "lr_scale": self.encoder_lr_scale},
            {"params": others, "lr": lr, "lr_scale": 1.0},
        ]
        self.model_optimizer = self.optimizer_class(groups, **kwargs)
        if issubclass(self.optimizer_class, th.optim.Adam):
            kwargs.setdefault("eps", 1e-5)
        self.actor_optimizer = self.optimizer_class(
            [{"params": list(self.actor.parameters()), "lr": lr, "lr_scale": 1.0}], **kwargs
        )

    @property
    def compiler(self) -> Callable[[Callable], Callable]:
        """Turns a function into its compiled self, or returns it as it is, by the ``compile`` setting."""
        return choose_compiler(self.compile_setting, self.device)

    def may_capture(self) -> bool:
        """:return: whether plan and update become CUDA graphs: on a GPU, compiled, where no forward hook is to be called"""
        return self.capture and captures_on(self.device) and self.compiler is compiled and not self.graphs.bars(self)

    def expect_terminations(self, seen: bool) -> None:
        """
        Settle what depends on whether episodes are terminated: a ``horizon_value`` of "auto".

        :param seen: whether ``terminations_seen`` is not 0, which the host can't know without waiting
        """
        self.expects_terminations = seen and self.world_model.termination is not None
        if self.horizon_value_settles:
            horizon_value = "min" if self.expects_terminations else "mean"
            self.planner_config = dataclasses.replace(self.planner_config, horizon_value=horizon_value)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.expect_terminations(bool(self.terminations_seen))
        return result

    def forget_graphs(self) -> None:
        """Drop all CUDA graphs; to be called after a layer or a parameter has been replaced, which none notices."""
        self.graphs.forget()

    def _apply(self, fn: Callable, recurse: bool = True) -> "BOOMPolicy":
        self.forget_graphs()  # parameters move
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "BOOMPolicy":
        """
        Set the mode. It changes twice a step, so layers that have none are passed over (:func:`set_mode`).

        :param mode: True to update, False to act
        :return: itself
        """
        self.training = mode
        for network in self.children():
            set_mode(network, mode)
        return self

    # ----------------------------------------------------------------- planning

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations ``[n, ...]``, not preprocessed
        :return: features ``[n, F]``
        """
        return self.extract_features(obs, self.features_extractor)

    def augment(self, obs: PyTorchObs) -> PyTorchObs:
        """
        Shift images at random by up to ``image_shift`` pixels; leave other observations as they are.

        :param obs: observations ``[n, ...]``, not preprocessed
        :return: the same shapes
        """
        if isinstance(obs, dict):
            assert isinstance(self.observation_space, spaces.Dict)
            return {key: self._augment(value, self.observation_space[key]) for key, value in obs.items()}
        return self._augment(obs, self.observation_space)

    def _augment(self, obs: th.Tensor, space: spaces.Space) -> th.Tensor:
        is_image = is_image_space(space, normalized_image=not self.normalize_images)
        return random_shift(obs, self.image_shift) if is_image and self.image_shift > 0 else obs

    def plan(self, obs: PyTorchObs, previous_mean: th.Tensor, deterministic: bool = False) -> Plan:
        """
        Plan for a batch of environments in one call.

        :param obs: observations ``[E, ...]``, not preprocessed
        :param previous_mean: warm start, the last plan's mean, ``[E, H, A]``; zeros where an episode starts
        :param deterministic: take the elites' mean, and draw all noise from generators seeded by the observations
        :return: the plan
        """
        with th.no_grad():
            features = self.features(obs)
            noise = self._deterministic_noise(obs) if deterministic else self._noise(len(features))
            # a graph is for one layout, and plans' own means are transposed
            arguments = (self, self.planner_config, features, previous_mean.contiguous(), noise)
            if not self.may_capture():
                return encode_and_plan(*arguments)
            # the next plan, maybe an evaluation's, overwrites this one's
            return Plan(*(tensor.clone() for tensor in self.graphs.run(encode_and_plan, "plan", *arguments)))

    def observations_and_starts(
        self, obs: np.ndarray | dict[str, np.ndarray], starts: np.ndarray
    ) -> tuple[PyTorchObs, th.Tensor]:
        """
        Bring what a plan starts from to the policy's device, in one transfer that nobody waits for.

        :param obs: observations of a VecEnv ``[E, ...]``
        :param starts: bool, where an episode starts ``[E]``
        :return: the same as tensors
        """
        if self.device.type != "cuda":
            return self.obs_to_tensor(obs)[0], th.as_tensor(starts, dtype=th.bool)
        by_key = obs if isinstance(obs, dict) else {"": obs}
        sent = send({**{f"obs/{key}": np.asarray(value) for key, value in by_key.items()}, "starts": starts}, self.device)
        starts_tensor = sent.pop("starts")
        tensors = {key.removeprefix("obs/"): value for key, value in sent.items()}
        return (tensors if isinstance(obs, dict) else tensors[""]), starts_tensor

    def _noise(self, n_envs: int) -> PlannerNoise:
        return planner.draw_noise(self.planner_config, n_envs, self.action_dim, self.critic.n_critics, self.device)

    def _deterministic_noise(self, obs: PyTorchObs) -> PlannerNoise:
        """Noise that depends on each row's observation alone. :param obs: observations ``[E, ...]``"""
        parts = [obs[key] for key in sorted(obs)] if isinstance(obs, dict) else [obs]
        rows = [part.reshape(len(part), -1).float().cpu().numpy() + 0.0 for part in parts]  # -0.0 is 0.0
        digests = (hashlib.blake2b(b"".join(part.tobytes() for part in row), digest_size=8) for row in zip(*rows, strict=True))
        seeds = [int.from_bytes(digest.digest(), "little") >> 1 for digest in digests]
        return planner.draw_noise_by_row(self.planner_config, seeds, self.action_dim, self.critic.n_critics, self.device)

    def initial_mean(self, n_envs: int) -> th.Tensor:
        """
        :param n_envs: ``E``
        :return: the warm start of an episode's first plan: zeros ``[E, H, A]``
        """
        return th.zeros(n_envs, self.planner_config.horizon, self.action_dim, device=self.device)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Plan an action, without exploration noise.

        :param observation: one observation, or a batch of them ``[n_envs, ...]``; by key for a Dict space
        :param state: the planner's warm start, as returned by the last call: ``(mean,)`` with ``[n_envs, H, A]``.
            Default None: a cold start
        :param episode_start: bool ``[n_envs]``, where to drop the warm start. Default None: nowhere
        :param deterministic: True takes the elites' mean and seeds all noise by the observation: the same observation
            and state give the same action. False draws the elite by its weight, with fresh noise, as the paper evaluates
        :return: the action, or ``[n_envs, ...]`` for a batch, within the action space's bounds and of its dtype; and the next
            state, for the next call
        :raises ValueError: for a state of another shape, for an observation of another one or that is not finite, or if no
            plan has a finite value
        """
        self.set_training_mode(False)
        check_observation(self, observation)
        obs, vectorized = self.obs_to_tensor(observation)
        n_envs = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        mean = self.initial_mean(n_envs)
        if state is not None:
            if not isinstance(state, tuple) or len(state) != 1 or np.shape(state[0]) != tuple(mean.shape):
                raise ValueError(
                    f"state must be what the last predict() returned, a tuple of one array of shape {tuple(mean.shape)} "
                    "[n_envs, horizon, action_dim]; pass None for a cold start"
                )
            mean = th.as_tensor(state[0], dtype=th.float32, device=self.device).clone()
        if episode_start is not None:
            mean[th.as_tensor(episode_start, dtype=th.bool, device=self.device).expand(n_envs)] = 0.0
        plan = self.plan(obs, mean, deterministic)
        actions = self.to_action_space(finite_actions(plan.planner_action))
        return actions if vectorized else actions[0], (plan.mean.cpu().numpy(),)

    def to_action_space(self, scaled_actions: np.ndarray) -> np.ndarray:
        """
        :param scaled_actions: ``[n, A]`` in [-1, 1]
        :return: ``[n, *action_space.shape]`` within the bounds and of the dtype of the action space
        """
        space = self.action_space
        assert isinstance(space, spaces.Box)
        # as unscale_action, but small integer types would overflow there
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        actions = low + 0.5 * (scaled_actions.reshape(-1, *space.shape) + 1.0) * (high - low)
        if np.issubdtype(space.dtype, np.integer):
            actions = np.rint(actions)
        return np.clip(actions, space.low, space.high).astype(space.dtype)

    def from_action_space(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: ``[n, *action_space.shape]``
        :return: scaled to [-1, 1], ``[n, A]``
        """
        space = self.action_space
        assert isinstance(space, spaces.Box)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        return np.clip(2.0 * (actions - low) / (high - low) - 1.0, -1.0, 1.0).astype(np.float32).reshape(len(actions), -1)

    # -------------------------------------------------- the policy without planning

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        The policy's own action, in [-1, 1].

        :param observation: observations ``[n, ...]``
        :param deterministic: the squashed mean instead of a sample
        :return: ``[n, A]``
        """
        z = self.world_model.encode(self.features(observation))
        noise = th.zeros if deterministic else th.randn
        return self.actor.sample(z, noise(len(z), self.action_dim, device=z.device))

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: observations ``[n, ...]``
        :param deterministic: the squashed mean instead of a sample
        :return: the policy's own action, without planning, in [-1, 1], ``[n, A]``
        """
        return self._predict(obs, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            self._constructor_kwargs,
            lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading the policy alone
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
        )
        return data


def encode_and_plan(
    policy: BOOMPolicy, config: PlannerConfig, features: th.Tensor, previous_mean: th.Tensor, noise: PlannerNoise
) -> Plan:
    """
    ``z = h(s)``, and :func:`sb3_boom.core.planner.plan` from there.

    :param policy: the networks
    :param config: the planner's settings
    :param features: of the observations, ``[E, F]``
    :param previous_mean: warm start ``[E, H, A]``
    :param noise: all of the plan's randomness
    :return: the plan
    """
    with bf16_products(policy.bf16, policy.device):
        # one graph, all iterations: a call of a compiled function costs as much as a small product
        return policy.compiler(planner.plan)(
            policy.world_model,
            policy.actor,
            policy.critic,
            config,
            policy.world_model.encode(features),
            previous_mean,
            noise,
            policy.terminations_seen,
        )


class CnnPolicy(BOOMPolicy):
    """:class:`BOOMPolicy` for images."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(BOOMPolicy):
    """:class:`BOOMPolicy` for Dict observations."""

    default_features_extractor = CombinedExtractor


MlpPolicy = BOOMPolicy
