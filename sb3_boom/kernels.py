"""The compiled C++ kernels for a CPU (torch only); without them torch.compile makes its own, which are slower."""

import functools
import pathlib
import warnings

import torch as th

SOURCE = pathlib.Path(__file__).with_name("kernels.cpp")
loaded = False  # read while compiling: whether torch.ops.sb3_boom exists


@functools.cache
def load() -> None:
    """Compile and load the kernels, once per process; the library is cached on disk where torch.compile keeps its own."""
    global loaded
    try:
        from torch._inductor.codecache import CppCodeCache

        CppCodeCache.load(SOURCE.read_text())
        th.library.register_fake("sb3_boom::norm_mish", _norm_mish_shapes)
        th.library.register_fake("sb3_boom::norm_mish_backward", _norm_mish_backward_shapes)
        loaded = True
    except Exception as error:  # another torch version's compiler, an unknown processor
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"BOOM's own CPU kernels can't be built, so updates are slower ({reason})", stacklevel=2)


def usable(x: th.Tensor) -> bool:
    """
    :param x: what a kernel is to work on
    :return: whether it can, as a part of a compiled graph
    """
    return loaded and th.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == th.float32


class _NormMish(th.autograd.Function):
    """The kernel and its gradient."""

    @staticmethod
    def forward(ctx, h, bias, weight, shift, dropout_mask):
        y, *saved = th.ops.sb3_boom.norm_mish(h, bias, weight, shift, dropout_mask, True)
        ctx.save_for_backward(*saved, weight, dropout_mask)
        return y

    @staticmethod
    def backward(ctx, grad):
        with_parameters = ctx.needs_input_grad[1]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = th.ops.sb3_boom.norm_mish_backward(grad, *ctx.saved_tensors, with_parameters)
        return *(grads if with_parameters else (grads[0], None, None, None)), None


def norm_mish(h: th.Tensor, bias: th.Tensor, weight: th.Tensor, shift: th.Tensor, dropout_mask: th.Tensor | None) -> th.Tensor:
    """
    What :func:`sb3_boom.torch_layers.norm_mish` does, in one pass over memory, and one more for the gradient.

    :param h: ``[n, M, F]``, rows contiguous
    :param bias: ``[n, F]``
    :param weight: ``[n, F]``
    :param shift: ``[n, F]``
    :param dropout_mask: ``[n, M, F]`` or None
    :return: ``[n, M, F]``
    """
    if th.is_grad_enabled():
        return _NormMish.apply(h, bias, weight, shift, dropout_mask)
    return th.ops.sb3_boom.norm_mish(h, bias, weight, shift, dropout_mask, False)[0]


def _norm_mish_shapes(h, bias, weight, shift, mask, keep):
    y = h.new_empty(h.shape)
    if not keep:
        return y, h.new_empty(0, h.shape[1]), h.new_empty(0, h.shape[1]), h.new_empty(0, h.shape[1])
    return y, th.empty_like(h), th.empty_like(h), h.new_empty(h.shape[:2])


def _norm_mish_backward_shapes(grad, normalised, slope, inv_std, weight, mask, parameters):
    sums = [grad.new_empty(weight.shape if parameters else (0, weight.shape[1])) for _ in range(3)]
    return th.empty_like(normalised), *sums
