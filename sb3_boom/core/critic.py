"""The ensemble of two-hot critics Q_i(z, a) (torch only)."""

import torch as th
from torch import nn

from sb3_boom.core.torch_layers import EnsembleMLP, Members
from sb3_boom.core.two_hot import TwoHot


class Critic(nn.Module):
    """
    ``Q_i``: ``n_critics`` networks from latent and action to the logits of a two-hot value.

    :param latent_dim: size ``L`` of the latent
    :param action_dim: number ``A`` of action dimensions
    :param mlp_dim: width of the two hidden layers
    :param n_critics: ensemble size, at least 2
    """

    def __init__(self, latent_dim: int, action_dim: int, mlp_dim: int, n_critics: int) -> None:
        super().__init__()
        self.n_critics = n_critics
        self.mlp_dim = mlp_dim
        self.two_hot = TwoHot()
        self.net = EnsembleMLP(n_critics, latent_dim + action_dim, mlp_dim, self.two_hot.n_bins)
        nn.init.zeros_(self.net.head.weight)  # every value starts at 0

    def forward(
        self, z: th.Tensor, action: th.Tensor, members: Members = None, dropout_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """
        :param z: latents ``[..., L]``
        :param action: ``[..., A]``
        :param members: ``[m]`` int64, the critics to compute, as constants. Default: all, with gradients.
        :param dropout_mask: bool, the units to keep, ``[n_critics or m, M, mlp_dim]``, ``M`` being the product of the
            leading dimensions. Default None: no dropout
        :return: logits ``[n_critics or m, ..., n_bins]``
        """
        x = th.cat([z, action], dim=-1)
        return self.net(x.flatten(0, -2), members, dropout_mask).unflatten(1, x.shape[:-1])

    def values(self, z: th.Tensor, action: th.Tensor, members: Members, dropout_mask: th.Tensor | None = None) -> th.Tensor:
        """
        Values of some of the critics. Gradients flow to the inputs, not to the critics.

        Planning, TD target and policy loss use two critics each, so only two are computed.

        :param z: latents ``[..., L]``
        :param action: ``[..., A]``
        :param members: ``[m]`` int64
        :param dropout_mask: see :meth:`forward`
        :return: in the unit of the rewards, ``[m, ..., 1]``
        """
        return self.two_hot.decode(self(z, action, members, dropout_mask))


def draw_pairs(n_pairs: int, n_critics: int, device: th.device, generator: th.Generator | None = None) -> th.Tensor:
    """
    Pairs of different critics, uniformly at random, without host synchronisation.

    :param n_pairs: how many
    :param n_critics: ensemble size, at least 2
    :param device: where the result lives
    :param generator: source of randomness; default: torch's global one
    :return: ``[n_pairs, 2]`` int64
    """
    first = th.randint(n_critics, (n_pairs,), device=device, generator=generator)
    step = th.randint(1, n_critics, (n_pairs,), device=device, generator=generator)
    return th.stack([first, (first + step) % n_critics], dim=1)
