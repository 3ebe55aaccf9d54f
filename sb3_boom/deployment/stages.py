"""What is traced: the parts of a plan as modules of tensors alone."""

import copy

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_boom.core import planner
from sb3_boom.deployment.layers import make_fast
from sb3_boom.policies import BOOMPolicy

SINGLE = "observation"  # name of an observation that is no Dict


class Normalization(nn.Module):
    """
    VecNormalize's normalisation of an observation, in double precision as there.

    :param mean: running mean, the observation's shape
    :param var: running variance, the observation's shape
    :param epsilon: added to the variance
    :param clip: bound of the result
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, mean: np.ndarray, var: np.ndarray, epsilon: float, clip: float) -> None:
        super().__init__()
        self.register_buffer("mean", th.as_tensor(mean, dtype=th.float64))
        self.register_buffer("std", th.as_tensor(np.sqrt(var + epsilon), dtype=th.float64))
        self.clip = float(clip)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: as the environment gives it, ``[n, ...]``
        :return: normalised, float32, ``[n, ...]``
        """
        return ((obs.double() - self.mean) / self.std).clamp(-self.clip, self.clip).float()


class Unscaling(nn.Module):
    """
    From [-1, 1] to the action space, as :meth:`sb3_boom.policies.BOOMPolicy.to_action_space`.

    :param space: the action space
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.register_buffer("low", th.as_tensor(space.low.astype(np.float64)))
        self.register_buffer("high", th.as_tensor(space.high.astype(np.float64)))
        self.whole = np.issubdtype(space.dtype, np.integer)
        self.dtype = getattr(th, str(space.dtype))

    def forward(self, scaled: th.Tensor) -> th.Tensor:
        """
        :param scaled: ``[n, A]`` in [-1, 1]
        :return: ``[n, *action_space.shape]``, within the bounds and of the dtype of the action space
        """
        action = self.low + 0.5 * (scaled.reshape(-1, *self.low.shape).double() + 1.0) * (self.high - self.low)
        if self.whole:
            action = action.round()
        return th.minimum(th.maximum(action, self.low), self.high).to(self.dtype)


class Prior(nn.Module):
    """
    Encoder and squashed mean.

    :param policy: whose networks
    :param normalization: of some observations, by name
    """

    def __init__(self, policy: BOOMPolicy, normalization: nn.ModuleDict) -> None:
        super().__init__()
        self.policy = policy
        self.normalization = normalization
        space = policy.observation_space
        self.names = list(space.spaces) if isinstance(space, spaces.Dict) else [SINGLE]

    def latent(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: by :attr:`names`, as the environment gives them, ``[n, ...]``
        :return: latents ``[n, L]``
        """
        obs = {
            name: self.normalization[module_key(name)](value) if module_key(name) in self.normalization else value
            for name, value in zip(self.names, observations, strict=True)
        }
        single = not isinstance(self.policy.observation_space, spaces.Dict)
        return self.policy.world_model.encode(self.policy.features(obs[SINGLE] if single else obs))

    def action(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: latents ``[n, L]``
        :return: the policy's squashed mean, ``[n, A]`` in [-1, 1]
        """
        return self.policy.actor.sample(z, th.zeros((), device=z.device))

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: see :meth:`latent`
        :return: ``[n, A]`` in [-1, 1]
        """
        return self.action(self.latent(*observations))


class Begin(Prior):
    """What is done once for every plan: the latent, the prior's action, and where the first iteration samples."""

    def forward(self, mean: th.Tensor, *observations: th.Tensor) -> tuple[th.Tensor, ...]:  # type: ignore[override]
        """
        :param mean: the warm start, ``[n, H, A]``
        :param observations: see :meth:`latent`
        :return: latents ``[n, L]``, mean and std ``[H, n, A]``, the prior's action as the elites' first ones ``[n, K, A]``,
            and their weights ``[n, K]``
        """
        z = self.latent(*observations)
        config = self.policy.planner_config
        elites = self.action(z).unsqueeze(1).expand(-1, config.n_elites, -1)
        weights = th.full_like(elites[:, :, 0], 1.0 / config.n_elites)
        return z, *planner.first_distribution(config, mean), elites, weights


class Trajectories(nn.Module):
    """
    The policy's own trajectories.

    :param policy: whose networks
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, z: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param z: latents ``[n, L]``
        :param noise: ``[H, n, P, A]``
        :return: actions ``[H, n, P, A]``
        """
        return planner.policy_trajectories(self.policy.world_model, self.policy.actor, z, noise)


class Refine(nn.Module):
    """
    One iteration of the planner.

    :param policy: whose networks
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        z: th.Tensor,
        policy_actions: th.Tensor,
        mean: th.Tensor,
        std: th.Tensor,
        candidates: th.Tensor,
        terminal: th.Tensor,
        pair: th.Tensor,
    ) -> tuple[th.Tensor, ...]:
        """
        As :func:`sb3_boom.core.planner.refine`, whose noise is the last three.

        :param z: latents ``[n, L]``
        :param policy_actions: ``[H, n, P, A]``
        :param mean: ``[H, n, A]``
        :param std: ``[H, n, A]``
        :param candidates: ``[H, n, N-P, A]``
        :param terminal: ``[n, N, A]``
        :param pair: ``[2]`` int64
        :return: mean, std, the elites' first actions, their weights
        """
        policy = self.policy
        return planner.refine(
            policy.world_model, policy.actor, policy.critic, policy.planner_config, z, policy_actions, mean, std,
            candidates, terminal, pair, policy.terminations_seen,
        )[:4]  # fmt: skip


class Finish(nn.Module):
    """
    The action, and the next warm start.

    :param policy: whose action space
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        super().__init__()
        assert isinstance(policy.action_space, spaces.Box)
        self.unscaling = Unscaling(policy.action_space)

    def forward(
        self, first_actions: th.Tensor, weights: th.Tensor, noise: th.Tensor, mean: th.Tensor, std: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        """
        :param first_actions: the elites', ``[n, K, A]``
        :param weights: the elites', ``[n, K]``
        :param noise: Gumbel ``[n, K]``
        :param mean: ``[H, n, A]``
        :param std: ``[H, n, A]``
        :return: action ``[n, *action_space.shape]``, mean and std ``[n, H, A]``
        """
        action = planner.choose(first_actions, weights, noise, mean)
        return self.unscaling(action), mean.transpose(0, 1), std.transpose(0, 1)


class PriorAction(Prior):
    """The prior alone, to the environment's action."""

    def __init__(self, policy: BOOMPolicy, normalization: nn.ModuleDict) -> None:
        super().__init__(policy, normalization)
        assert isinstance(policy.action_space, spaces.Box)
        self.unscaling = Unscaling(policy.action_space)

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: see :meth:`Prior.latent`
        :return: ``[n, *action_space.shape]``
        """
        return self.unscaling(super().forward(*observations))


def module_key(name: str) -> str:
    """A ModuleDict's keys have no dots. :param name: of an observation"""
    return "of_" + name.replace(".", "\N{ONE DOT LEADER}")


def inference_copy(policy: BOOMPolicy) -> BOOMPolicy:
    """
    :param policy: a policy
    :return: the same on the CPU, without gradients or optimizers, of layers that onnxruntime runs fast
    """
    with th.no_grad():
        bare = copy.copy(policy)
        bare.__dict__ = {key: value for key, value in policy.__dict__.items() if not isinstance(value, th.optim.Optimizer)}
        bare = copy.deepcopy(bare).cpu()
    bare.requires_grad_(False)
    nn.Module.train(bare, False)
    for name in ("world_model", "actor", "critic"):
        setattr(bare, name, make_fast(getattr(bare, name)))
    if not float(bare.terminations_seen):
        bare.world_model.termination = None  # it never takes part
    return bare
