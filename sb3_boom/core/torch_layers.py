"""Layers that the world model, the policy and the critics are made of (torch only)."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_boom.core import kernels

INIT_STD = 0.02
ALIGNMENT = 8  # a GPU's tensor cores want rows of 16 bytes: 4 float32, or 8 bfloat16


class Draw(NamedTuple):
    """
    Some members of an ensemble, one draw among several: what compiles for a GPU gathers the parameters of all at once.

    :param draws: int64, the members of every draw, ``[I, m]``
    :param number: of the draw, from 0
    """

    draws: th.Tensor
    number: int


def separate_draws(draws: th.Tensor) -> Sequence[th.Tensor | Draw]:
    """
    :param draws: int64, the members of every draw, ``[I, m]``
    :return: the draws one by one, to be given to an ensemble as its ``members``
    """
    if compiles_for_gpu(draws):
        return [Draw(draws, i) for i in range(len(draws))]
    return draws.unbind(0)


def compiles_for_gpu(x: th.Tensor) -> bool:
    """
    :param x: an input, of any shape
    :return: whether what is done with it is being compiled for a GPU, where to prepare a product's factors costs little
    """
    return x.device.type == "cuda" and th.compiler.is_compiling()


def aligned(x: th.Tensor) -> th.Tensor:
    """
    A factor of a matrix product, with zeros behind its rows where they'd not be of a length that a GPU multiplies at full
    speed. Only where it is compiled, and so written with whatever is written anyway, and without gradients: to cut these to
    size again takes as long as is saved.

    :param x: ``[..., in_features]``, the inputs or the weights
    :return: the same, or with longer rows: ``[..., in_features]`` rounded up to a multiple of 8
    """
    missing = -x.shape[-1] % ALIGNMENT
    return F.pad(x, (0, missing)) if missing and compiles_for_gpu(x) and not th.is_grad_enabled() else x


def mish(x: th.Tensor) -> th.Tensor:
    """
    Mish, ``x * tanh(softplus(x))``, with a single exponential.

    With ``w = exp(x)`` and ``n = w * (w + 2)`` it equals ``x * n / (n + 2)``, which a compiler fuses into one
    vectorised loop; ``torch.nn.functional.mish`` takes longer on a CPU than the matrix products around it.

    :param x: any shape
    :return: same shape
    """
    w = x.clamp(max=20.0).exp()  # above 20 the ratio is 1 in float32
    n = w * (w + 2.0)
    return x * (n / (n + 2.0))


class Mish(nn.Module):
    """:func:`mish` as a module."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: any shape
        :return: same shape
        """
        return mish(x)


class SimNorm(nn.Module):
    """
    Simplicial normalisation: a softmax over every group of ``group_size`` neighbouring features.

    :param group_size: features per simplex; divides the last dimension of the input
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``[..., L]``
        :return: ``[..., L]``, non-negative, every group sums to 1
        """
        return x.unflatten(-1, (-1, self.group_size)).softmax(dim=-1).flatten(-2)


class AlignedLinear(nn.Linear):
    """torch's linear layer, with :func:`aligned` factors."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``[..., in_features]``
        :return: ``[..., out_features]``
        """
        return F.linear(aligned(x), aligned(self.weight), self.bias)


class NormedLinear(nn.Module):
    """
    Linear, LayerNorm, activation.

    :param in_features: size of the last input dimension
    :param out_features: size of the last output dimension
    :param activation: applied last
    """

    def __init__(self, in_features: int, out_features: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear = AlignedLinear(in_features, out_features)
        self.norm = nn.LayerNorm(out_features)
        self.activation = activation
        init_linear(self.linear)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``[..., in_features]``
        :return: ``[..., out_features]``
        """
        return self.activation(self.norm(self.linear(x)))


class MLP(nn.Sequential):
    """
    A multi-layer perceptron of LayerNorm + Mish layers; see :func:`mlp`.

    :param args: layers, :class:`NormedLinear`, the last one possibly ``nn.Linear``
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``[..., in_features]``
        :return: ``[..., out_features]``
        """
        if not (kernels.usable(x) and self._is_what_the_kernel_does()):
            return super().forward(x)
        normed = [layer for layer in self if isinstance(layer, NormedLinear)]
        linear: list[nn.Linear] = [layer.linear for layer in normed]
        if isinstance(self[-1], nn.Linear):
            linear.append(self[-1])
        layers = kernels.Layers(
            [layer.weight for layer in linear],
            [layer.bias for layer in linear],
            [layer.norm.weight for layer in normed],
            [layer.norm.bias for layer in normed],
        )
        last = self[-1].activation if isinstance(self[-1], NormedLinear) else None
        group_size = last.group_size if isinstance(last, SimNorm) else 0
        return kernels.mlp(x.flatten(0, -2), layers, group_size).view(*x.shape[:-1], linear[-1].out_features)

    def _is_what_the_kernel_does(self) -> bool:
        """Whether all layers are those of :func:`mlp`: a user's policy may have put others in their place."""
        *hidden, last = self
        return all(isinstance(layer, NormedLinear) and type(layer.activation) is Mish for layer in hidden) and (
            type(last) is nn.Linear or (isinstance(last, NormedLinear) and type(last.activation) in (SimNorm, nn.Identity))
        )


Members: TypeAlias = th.Tensor | Draw | None


def chosen(parameter: th.Tensor, members: Members) -> th.Tensor:
    """
    :param parameter: of an ensemble, ``[n, ...]``
    :param members: ``[m]`` int64, which to take, **as constants**. None: all, with gradients
    :return: ``[n or m, ...]``
    """
    if members is None:
        return parameter
    if isinstance(members, Draw):
        return parameter.detach()[members.draws][members.number]
    return parameter.detach()[members]


class EnsembleLinear(nn.Module):
    """
    One linear layer per ensemble member, as a single batched matrix product.

    :param n_members: number of members ``n``
    :param in_features: size of the last input dimension
    :param out_features: size of the last output dimension
    """

    def __init__(self, n_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.empty(n_members, out_features, in_features))
        self.bias = nn.Parameter(th.zeros(n_members, out_features))
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: th.Tensor, members: Members = None) -> th.Tensor:
        """
        :param x: ``[M, in_features]``, shared by all members, or ``[n or m, M, in_features]``
        :param members: ``[m]`` int64, the members to compute, **as constants**: their weights get no gradient.
            Default: all, with gradients.
        :return: ``[n or m, M, out_features]``
        """
        x, weight, bias = aligned(x), chosen(aligned(self.weight), members), chosen(self.bias, members)
        if x.ndim == 2:
            # one large matrix product for all members, instead of one small one each
            return F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape).transpose(0, 1)
        if compiles_for_gpu(x):
            return th.bmm(x, weight.transpose(1, 2)) + bias.unsqueeze(1)  # else the bias is written out first, for every row
        return th.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


class EnsembleNormedLinear(nn.Module):
    """
    Linear, dropout, LayerNorm, Mish, once per ensemble member.

    :param n_members: number of members ``n``
    :param in_features: size of the last input dimension
    :param out_features: size of the last output dimension
    """

    def __init__(self, n_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = EnsembleLinear(n_members, in_features, out_features)
        self.norm_weight = nn.Parameter(th.ones(n_members, out_features))
        self.norm_bias = nn.Parameter(th.zeros(n_members, out_features))

    def forward(self, x: th.Tensor, members: Members = None, dropout_mask: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: ``[M, in_features]`` or ``[n or m, M, in_features]``
        :param members: see :meth:`EnsembleLinear.forward`
        :param dropout_mask: bool, the units to keep, ``[n or m, M, out_features]``. Drawn by the caller, since random
            numbers inside a compiled CPU kernel are drawn one by one. Default None: no dropout
        :return: ``[n or m, M, out_features]``
        """
        weight, shift = chosen(self.norm_weight, members), chosen(self.norm_bias, members)
        h = self.linear(x, members)
        if dropout_mask is not None:
            # the factor 1 / (1 - p) on what is kept would vanish in the LayerNorm
            h = h * dropout_mask
        return mish(F.layer_norm(h, h.shape[-1:]) * weight.unsqueeze(1) + shift.unsqueeze(1))


class EnsembleMLP(nn.Module):
    """
    An ensemble of multi-layer perceptrons of LayerNorm + Mish layers with a plain last one; dropout in the first.

    :param n_members: number of members ``n``
    :param in_features: size of the last input dimension
    :param hidden: width of both hidden layers
    :param out_features: size of the last output dimension
    """

    def __init__(self, n_members: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.first = EnsembleNormedLinear(n_members, in_features, hidden)
        self.second = EnsembleNormedLinear(n_members, hidden, hidden)
        self.head = EnsembleLinear(n_members, hidden, out_features)

    def forward(self, x: th.Tensor, members: Members = None, dropout_mask: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: ``[M, in_features]``
        :param members: see :meth:`EnsembleLinear.forward`
        :param dropout_mask: of the first layer, see :meth:`EnsembleNormedLinear.forward`
        :return: ``[n or m, M, out_features]``
        """
        if isinstance(members, Draw) or not kernels.usable(x):
            return self.head(self.second(self.first(x, members, dropout_mask), members), members)
        normed = (self.first, self.second)
        linear = (self.first.linear, self.second.linear, self.head)
        layers = kernels.Layers(
            [layer.weight for layer in linear],
            [layer.bias for layer in linear],
            [layer.norm_weight for layer in normed],
            [layer.norm_bias for layer in normed],
        )
        return kernels.mlp(x, layers, members=members, dropout_mask=dropout_mask)


def init_linear(layer: nn.Linear) -> None:
    """
    Initialise as the paper's release: weights normal with std 0.02, bias zero.

    :param layer: changed in place
    """
    nn.init.normal_(layer.weight, std=INIT_STD)
    nn.init.zeros_(layer.bias)


def mlp(in_features: int, hidden: Sequence[int], out_features: int, out_activation: nn.Module | None = None) -> MLP:
    """
    A multi-layer perceptron of LayerNorm + Mish layers.

    :param in_features: size of the last input dimension
    :param hidden: width of every hidden layer
    :param out_features: size of the last output dimension
    :param out_activation: with it the last layer is a :class:`NormedLinear` too; default: a plain linear layer
    :return: the network
    """
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [NormedLinear(n_in, n_out, Mish()) for n_in, n_out in itertools.pairwise(widths)]
    if out_activation is not None:
        layers.append(NormedLinear(widths[-1], out_features, out_activation))
    else:
        last = nn.Linear(widths[-1], out_features)
        init_linear(last)
        layers.append(last)
    return MLP(*layers)


def set_mode(module: nn.Module, mode: bool) -> None:
    """
    ``module.train(mode)``, without the milliseconds that it takes to tell layers that have no mode: all of this package,
    since dropout is drawn with the other noise of an update, and the plain ones inside them.

    :param module: networks; a user's own layers among them are told
    :param mode: True to train, False to evaluate
    """
    if type(module).__module__.startswith(__package__) or type(module) in (nn.Linear, nn.LayerNorm, nn.Identity):
        for child in module.children():
            set_mode(child, mode)
    else:
        module.train(mode)
