"""The compiled C++ kernel for a CPU (torch only); without it torch.compile makes its own, which are slower."""

import functools
import pathlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch as th

SOURCE = pathlib.Path(__file__).with_name("kernels.cpp")
loaded = False  # read while compiling: whether torch.ops.sb3_boom exists


class Layers(NamedTuple):
    """
    Parameters of a multi-layer perceptron of ``D`` layers, or of an ensemble of ``n`` of them.

    :param weights: ``D`` of ``[out, in]`` or ``[n, out, in]``
    :param biases: ``D`` of ``[out]`` or ``[n, out]``
    :param norm_weights: of the LayerNorms, as biases: ``D``, or ``D - 1`` where the last layer is plain
    :param norm_shifts: the LayerNorms' biases, as many
    """

    weights: Sequence[th.Tensor]
    biases: Sequence[th.Tensor]
    norm_weights: Sequence[th.Tensor]
    norm_shifts: Sequence[th.Tensor]


@functools.cache
def load() -> None:
    """Compile and load the kernel, once per process; the library is cached on disk where torch.compile keeps its own."""
    global loaded
    try:
        from torch._inductor.codecache import CppCodeCache

        CppCodeCache.load(SOURCE.read_text())
        th.library.register_fake("sb3_boom::mlp", _mlp_shapes)
        th.library.register_fake("sb3_boom::mlp_backward", _mlp_backward_shapes)
        loaded = True
    except Exception as error:  # another torch version's compiler, an unknown processor
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        warnings.warn(f"BOOM's own CPU kernel can't be built, so updates are slower ({reason})", stacklevel=2)


def usable(x: th.Tensor) -> bool:
    """
    :param x: what the kernel is to work on, any shape
    :return: whether it can, as a part of a compiled graph
    """
    if x.device.type != "cpu" or x.dtype != th.float32 or th.is_autocast_enabled("cpu"):
        return False
    return loaded and th.compiler.is_compiling()


class _MLP(th.autograd.Function):
    """The kernel and its gradient."""

    @staticmethod
    def forward(ctx, x, mask, members, group, n_layers, n_norms, *parameters):
        layers = _split(parameters, n_layers, n_norms)
        y, saved = th.ops.sb3_boom.mlp(x, *layers, mask, members, group, True)
        ctx.save_for_backward(x, y, saved, mask, members, *parameters)
        ctx.sizes = group, n_layers, n_norms
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, saved, mask, members, *parameters = ctx.saved_tensors
        group, n_layers, n_norms = ctx.sizes
        layers = _split(parameters, n_layers, n_norms)
        of_input, of_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:])
        grad_x, *grads = th.ops.sb3_boom.mlp_backward(
            grad.contiguous(), x, y, saved, *layers[:3], mask, members, group, of_input, of_parameters
        )
        if not of_parameters:
            grads = [None] * len(parameters)
        return grad_x if of_input else None, None, None, None, None, None, *grads


def mlp(
    x: th.Tensor,
    layers: Layers,
    group_size: int = 0,
    members: th.Tensor | None = None,
    dropout_mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    What the layers of :mod:`sb3_boom.core.torch_layers` do one after the other.

    :param x: ``[M, K]``, shared by all members, or ``[m, M, K]``
    :param layers: the parameters; a layer with a LayerNorm has Mish behind it, unless it is the last
    :param group_size: of the softmax behind the last layer's LayerNorm; default 0: none
    :param members: ``[m]`` int64, the members to compute, **as constants**. Default: all, with gradients
    :param dropout_mask: bool, the first layer's units to keep, ``[m, M, out]``. Default None: no dropout
    :return: ``[m, M, out]``, ``m`` being 1 for a single network
    """
    x = x.contiguous()
    if members is not None:
        layers = Layers(*([tensor.detach() for tensor in tensors] for tensors in layers))
    if not th.is_grad_enabled():
        return th.ops.sb3_boom.mlp(x, *layers, dropout_mask, members, group_size, False)[0]
    parameters = [tensor for tensors in layers for tensor in tensors]
    sizes = len(layers.weights), len(layers.norm_weights)
    return _MLP.apply(x, dropout_mask, members, group_size, *sizes, *parameters)


def _split(parameters: Sequence[th.Tensor], n_layers: int, n_norms: int) -> Layers:
    ends = [n_layers, 2 * n_layers, 2 * n_layers + n_norms]
    return Layers(*(list(parameters[i:j]) for i, j in zip([0, *ends], [*ends, None], strict=True)))


def _mlp_shapes(x, weights, biases, norm_weights, norm_shifts, mask, members, group, keep):
    if members is not None:
        n = members.shape[0]
    else:
        n = weights[0].shape[0] if weights[0].ndim == 3 else 1
    rows = x.shape[-2]
    saved = 0
    for i, weight in enumerate(weights):
        out, is_last, is_normed = weight.shape[-2], i + 1 == len(weights), i < len(norm_weights)
        saved += n * rows * (out * ((not is_last) + is_normed + (is_normed and not is_last)) + is_normed)
    return x.new_empty(n, rows, weights[-1].shape[-2]), x.new_empty(saved if keep else 0)


def _mlp_backward_shapes(grad, x, y, saved, weights, biases, norm_weights, mask, members, group, of_input, parameters):
    grads = [x.new_empty(x.shape if of_input else (0,))]
    if parameters:
        grads += [th.empty_like(tensor) for tensor in (*weights, *biases, *norm_weights, *norm_weights)]
    return grads
