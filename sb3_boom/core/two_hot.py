"""Scalars as classes: symlog, two-hot encoding and its cross-entropy (torch only)."""

import torch as th
from torch import nn


def symlog(x: th.Tensor) -> th.Tensor:
    """
    ``sign(x) * ln(1 + |x|)``: compresses large magnitudes, keeps small ones.

    :param x: any shape
    :return: same shape
    """
    return th.sign(x) * th.log1p(th.abs(x))


def symexp(x: th.Tensor) -> th.Tensor:
    """
    ``sign(x) * (exp(|x|) - 1)``, the inverse of :func:`symlog`.

    :param x: any shape
    :return: same shape
    """
    return th.sign(x) * th.expm1(th.abs(x))


class TwoHot(nn.Module):
    """
    A scalar as a distribution over bins spread evenly in symlog space.

    :param n_bins: number of bins, at least 2
    :param low: the first bin's centre, in symlog space
    :param high: the last bin's centre, in symlog space
    """

    bins: th.Tensor
    positions: th.Tensor

    def __init__(self, n_bins: int = 101, low: float = -10.0, high: float = 10.0) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.low = low
        self.high = high
        self.bin_size = (high - low) / (n_bins - 1)
        self.register_buffer("bins", th.linspace(low, high, n_bins), persistent=False)
        self.register_buffer("positions", th.arange(n_bins, dtype=th.float32), persistent=False)

    def encode(self, x: th.Tensor) -> th.Tensor:
        """
        Spread the unit mass over the two bins around symlog(x), by linear interpolation.

        :param x: ``[..., 1]``, any range; symlog(x) is clamped to the outer bins
        :return: ``[..., n_bins]``, sums to 1
        """
        position = (symlog(x).clamp(self.low, self.high) - self.low) / self.bin_size
        return (1.0 - (position - self.positions).abs()).clamp(min=0.0)  # a tent of one bin's width, two bins inside

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """
        The scalar that a distribution stands for: symexp of the mean bin.

        :param logits: ``[..., n_bins]``
        :return: ``[..., 1]``
        """
        return symexp((logits.softmax(dim=-1) * self.bins).sum(dim=-1, keepdim=True))

    def cross_entropy(self, logits: th.Tensor, x: th.Tensor) -> th.Tensor:
        """
        Cross-entropy of the predicted distribution with the two-hot encoding of ``x``.

        :param logits: ``[..., n_bins]``
        :param x: targets, ``[..., 1]``, broadcast against ``logits``
        :return: ``[..., 1]``
        """
        return -(self.encode(x) * logits.log_softmax(dim=-1)).sum(dim=-1, keepdim=True)
