"""The world model: encoder, latent dynamics, reward and termination (torch only)."""

import torch as th
from torch import nn

from sb3_boom.core.torch_layers import SimNorm, mlp
from sb3_boom.core.two_hot import TwoHot


class WorldModel(nn.Module):
    """
    Predicts latents, rewards and terminations; it never decodes observations.

    Its networks are ``encoder`` (``h``), ``dynamics`` (``d``), ``reward`` (``R``) and ``termination`` (``g``: a logit, on
    reaching a latent; None without). ``two_hot`` turns rewards into classes and back.

    :param features_dim: size ``F`` of the features extracted from an observation
    :param action_dim: number ``A`` of action dimensions
    :param latent_dim: size ``L`` of the latent
    :param enc_dim: width of the encoder's hidden layers
    :param mlp_dim: width of the other networks' hidden layers
    :param n_enc_layers: the encoder's layers, the last included
    :param simnorm_dim: features per simplex of the latent; None switches SimNorm off (the LayerNorm stays)
    :param handle_terminations: whether there is a termination head
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        latent_dim: int,
        enc_dim: int,
        mlp_dim: int,
        n_enc_layers: int = 2,
        simnorm_dim: int | None = 8,
        handle_terminations: bool = True,
    ) -> None:
        super().__init__()

        def latent_activation() -> nn.Module:
            return nn.Identity() if simnorm_dim is None else SimNorm(simnorm_dim)

        self.two_hot = TwoHot()
        self.encoder = mlp(features_dim, [enc_dim] * (n_enc_layers - 1), latent_dim, latent_activation())
        self.dynamics = mlp(latent_dim + action_dim, [mlp_dim] * 2, latent_dim, latent_activation())
        self.reward = mlp(latent_dim + action_dim, [mlp_dim] * 3, self.two_hot.n_bins)
        nn.init.orthogonal_(self.reward[-1].weight)  # type: ignore[arg-type]
        self.termination = mlp(latent_dim, [mlp_dim] * 2, 1) if handle_terminations else None

    def encode(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: ``[..., F]``
        :return: latents ``z = h(s)``, ``[..., L]``
        """
        return self.encoder(features)

    def next(self, z: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        :param z: latents ``[..., L]``
        :param action: ``[..., A]``
        :return: next latents ``d(z, a)``, ``[..., L]``
        """
        return self.dynamics(th.cat([z, action], dim=-1))

    def reward_logits(self, z: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        :param z: latents ``[..., L]``
        :param action: ``[..., A]``
        :return: logits of the two-hot reward ``R(z, a)``, ``[..., n_bins]``
        """
        return self.reward(th.cat([z, action], dim=-1))
