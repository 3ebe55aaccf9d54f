"""The networks' layers in the form that onnxruntime runs fastest; same numbers, to rounding (torch only)."""

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_boom.core.torch_layers import MLP, EnsembleMLP, Mish, NormedLinear, SimNorm
from sb3_boom.core.two_hot import TwoHot, symexp

SAFE_FOR_MISH = 40.0  # below it, exp(x)² is finite in float32
SAFE_FOR_SIMNORM = 80.0  # within it, exp(x) neither overflows nor vanishes


def largest_output(weight: th.Tensor, bias: th.Tensor) -> float:
    """
    :param weight: of a LayerNorm, ``[..., D]``
    :param bias: of it, ``[..., D]``
    :return: a bound on the magnitude of what comes out: no normalised feature is larger than ``√D``
    """
    return float((weight.abs() * weight.shape[-1] ** 0.5 + bias.abs()).max())


class UnboundedMish(nn.Module):
    """Mish for inputs that are known to be small: without the clamp that keeps its exponential finite."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: any shape, below :data:`SAFE_FOR_MISH`
        :return: same shape
        """
        w = x.exp()
        n = w * (w + 2.0)
        return x * (n / (n + 2.0))


class ProductSimNorm(nn.Module):
    """
    SimNorm for inputs that are known to be small: groups are summed by a matrix product, since a softmax over eight
    neighbours costs more than the layer before it.

    :param features: size ``L`` of the latent
    :param group_size: features per simplex
    """

    same_group: th.Tensor

    def __init__(self, features: int, group_size: int) -> None:
        super().__init__()
        groups = th.arange(features) // group_size
        self.register_buffer("same_group", (groups[:, None] == groups).float())

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``[M, L]``, within ± :data:`SAFE_FOR_SIMNORM`
        :return: ``[M, L]``
        """
        e = x.exp()
        return e / (e @ self.same_group)


class FlatMLP(nn.Module):
    """
    An :class:`~sb3_boom.core.torch_layers.MLP` on rows, so that a layer and its bias are one product.

    :param net: the network
    """

    def __init__(self, net: MLP) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in net:
            if isinstance(layer, NormedLinear):
                bound = largest_output(layer.norm.weight, layer.norm.bias)
                layer.activation = _faster(layer.activation, layer.norm.weight.shape[-1], bound)
            self.layers.append(layer)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``[..., in_features]``
        :return: ``[..., out_features]``
        """
        rows = x.reshape(-1, x.shape[-1])
        for layer in self.layers:
            rows = layer(rows)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _faster(activation: nn.Module, features: int, bound: float) -> nn.Module:
    if type(activation) is Mish and bound < SAFE_FOR_MISH:
        return UnboundedMish()
    if type(activation) is SimNorm and bound < SAFE_FOR_SIMNORM:
        return ProductSimNorm(features, activation.group_size)
    return activation


class FlatEnsembleMLP(nn.Module):
    """
    Chosen members of an :class:`~sb3_boom.core.torch_layers.EnsembleMLP`, their vectors drawn from one table.

    :param net: the ensemble
    """

    vectors: th.Tensor

    def __init__(self, net: EnsembleMLP) -> None:
        super().__init__()
        normed = (net.first, net.second)
        linear = (net.first.linear, net.second.linear, net.head)
        for i, layer in enumerate(linear):
            self.register_buffer(f"weight_{i}", layer.weight.detach().transpose(1, 2).contiguous())
        parts = [layer.bias for layer in linear]
        parts += [tensor for layer in normed for tensor in (layer.norm_weight, layer.norm_bias)]
        self.sizes = [part.shape[1] for part in parts]
        self.register_buffer("vectors", th.cat([part.detach() for part in parts], dim=1))
        bound = max(largest_output(layer.norm_weight, layer.norm_bias) for layer in normed)
        self.activation = UnboundedMish() if bound < SAFE_FOR_MISH else Mish()

    def forward(self, x: th.Tensor, members: th.Tensor | None = None, dropout_mask: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: ``[M, in_features]``
        :param members: ``[m]`` int64; needed
        :param dropout_mask: only None: nothing is learned here
        :return: ``[m, M, out_features]``
        """
        assert members is not None and dropout_mask is None
        vectors = self.vectors.index_select(0, members).unsqueeze(1).split(self.sizes, dim=2)
        biases, norms = vectors[:3], vectors[3:]
        for i, bias in enumerate(biases):
            x = x @ getattr(self, f"weight_{i}").index_select(0, members) + bias
            if 2 * i < len(norms):
                x = self.activation(F.layer_norm(x, x.shape[-1:]) * norms[2 * i] + norms[2 * i + 1])
        return x


class ProductTwoHot(TwoHot):
    """:class:`~sb3_boom.core.two_hot.TwoHot` whose mean bin is a matrix product."""

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: ``[..., n_bins]``
        :return: ``[..., 1]``
        """
        return symexp(logits.softmax(dim=-1) @ self.bins.unsqueeze(1))


def make_fast(module: nn.Module) -> nn.Module:
    """
    Replace layers of this package by their faster forms, for inference alone. Layers of a user's own stay.

    :param module: changed in place, and all below it
    :return: the module, or what takes its place
    """
    if type(module) is MLP:
        return FlatMLP(module)
    if type(module) is EnsembleMLP:
        return FlatEnsembleMLP(module)
    if type(module) is TwoHot:
        return ProductTwoHot(module.n_bins, module.low, module.high)
    for name, child in module.named_children():
        setattr(module, name, make_fast(child))
    return module
