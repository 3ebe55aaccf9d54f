"""The squashed Gaussian policy π(z) (torch only)."""

import math

import torch as th
from torch import nn

from sb3_boom.core.torch_layers import mlp

LOG_STD_MIN = -10.0
LOG_STD_MAX = 2.0
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Actor(nn.Module):
    """
    The policy ``π``: a tanh-squashed diagonal Gaussian over actions in ``[-1, 1]^A``, given a latent.

    :param latent_dim: size ``L`` of the latent
    :param action_dim: number ``A`` of action dimensions
    :param mlp_dim: width of the two hidden layers
    """

    def __init__(self, latent_dim: int, action_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.net = mlp(latent_dim, [mlp_dim, mlp_dim], 2 * action_dim)

    def forward(self, z: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param z: latents ``[..., L]``
        :return: mean before squashing and log-std (in [-10, 2]), both ``[..., A]``
        """
        mean, raw_log_std = self.net(z).chunk(2, dim=-1)
        return mean, bound_log_std(raw_log_std)

    def sample(self, z: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        The action ``tanh(mean + noise * std)``.

        :param z: latents ``[..., L]``
        :param noise: standard normal ``[..., A]``; zeros give the squashed mean
        :return: actions in [-1, 1], ``[..., A]``
        """
        mean, log_std = self(z)
        return th.tanh(mean + noise * log_std.exp())


def bound_log_std(raw: th.Tensor) -> th.Tensor:
    """
    Squash the head's raw output into the allowed range of the log-std: ``-10 + 6 (tanh(raw) + 1)``.

    :param raw: any shape
    :return: same shape, in [-10, 2]
    """
    return LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (th.tanh(raw) + 1.0)


def gaussian_log_prob(scaled_error: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of a diagonal Gaussian, ``Σ_d (-e_d² / 2 - ln σ_d - ½ ln 2π)``, ``e`` being the scaled error.

    :param scaled_error: ``(x - mean) / std``, ``[..., A]``
    :param log_std: ``[..., A]``
    :return: ``[..., 1]``
    """
    return (-0.5 * scaled_error.square() - log_std - HALF_LOG_2PI).sum(dim=-1, keepdim=True)


def scaled_gaussian_log_prob(scaled_error: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    The Gaussian term as the paper's release scales it: by the action dimension, the constant counted once.

    ``A (Σ_d (-e_d² / 2 - ln σ_d) - ½ ln 2π)``, ``e`` being the scaled error. ``ent_coef`` and the alignment coefficient were
    tuned with this factor.

    :param scaled_error: ``(x - mean) / std``, ``[..., A]``
    :param log_std: ``[..., A]``
    :return: ``[..., 1]``
    """
    action_dim = scaled_error.shape[-1]
    return action_dim * ((-0.5 * scaled_error.square() - log_std).sum(dim=-1, keepdim=True) - HALF_LOG_2PI)


def squash_correction(action: th.Tensor) -> th.Tensor:
    """
    Log-determinant of tanh, ``Σ ln(1 - a²)``, kept finite at ±1.

    :param action: squashed actions in [-1, 1], ``[..., A]``
    :return: ``[..., 1]``, to subtract from the Gaussian's log-density
    """
    return th.log(th.relu(1.0 - action.square()) + 1e-6).sum(dim=-1, keepdim=True)
