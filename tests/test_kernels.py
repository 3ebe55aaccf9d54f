"""The C++ kernels against the same written in torch."""

import pytest
import torch as th

from sb3_boom import kernels
from sb3_boom.compilation import compiler_works
from sb3_boom.torch_layers import norm_mish

pytestmark = pytest.mark.skipif(not compiler_works("cpu"), reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def load_kernels():
    kernels.load()
    assert kernels.loaded


def make_inputs(members: int, rows: int, features: int) -> list[th.Tensor]:
    """:return: matrix product, bias, LayerNorm's weight and bias"""
    th.manual_seed(0)
    h = 3.0 * th.randn(members, rows, features)
    others = [th.randn(members, features) for _ in range(3)]
    return [tensor.requires_grad_() for tensor in (h, *others)]


SHAPES = pytest.mark.parametrize("shape", [(1, 1, 8), (5, 96, 128), (2, 77, 53), (3, 33, 3)], ids=str)


@SHAPES
@pytest.mark.parametrize("dropout", [False, True])
def test_norm_mish_and_its_gradients_equal_torch(shape, dropout):
    inputs = make_inputs(*shape)
    mask = (th.rand(shape) > 0.1).float() if dropout else None
    ours, theirs = kernels.norm_mish(*inputs, mask), norm_mish(*inputs, mask)
    th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with th.no_grad():
        assert th.equal(kernels.norm_mish(*inputs, mask), ours)
    grad = th.randn(shape)
    ours, theirs = (th.autograd.grad(y, inputs, grad) for y in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        th.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@SHAPES
def test_norm_mish_reads_members_side_by_side(shape):
    """As one matrix product for all members leaves them, and gradients of any layout."""
    h, *others = make_inputs(*shape)
    interleaved = h.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    grad = th.randn(shape[0], shape[2], shape[1]).transpose(1, 2)
    expected = kernels.norm_mish(h, *others, None)
    y = kernels.norm_mish(interleaved, *others, None)
    assert th.equal(y, expected)
    for a, b in zip(
        th.autograd.grad(y, [interleaved, *others], grad), th.autograd.grad(expected, [h, *others], grad), strict=True
    ):
        assert th.equal(a, b)


def test_kernels_keep_the_rules_of_custom_operators():
    """Shapes known without running, no output that aliases another; torch's own check."""
    h, *others = (tensor.detach() for tensor in make_inputs(2, 40, 16))
    mask = th.ones(2, 40, 16)
    tests = ("test_schema", "test_faketensor")
    for keep in (True, False):
        th.library.opcheck(th.ops.sb3_boom.norm_mish.default, (h, *others, mask, keep), test_utils=tests)
    saved = th.ops.sb3_boom.norm_mish(h, *others, mask, True)[1:]
    for parameters in (True, False):
        arguments = (th.randn(2, 40, 16), *saved, others[1], mask, parameters)
        th.library.opcheck(th.ops.sb3_boom.norm_mish_backward.default, arguments, test_utils=tests)


def test_norm_mish_gives_constants_no_gradient():
    h, *others = make_inputs(2, 40, 16)
    y = kernels.norm_mish(h, *(tensor.detach() for tensor in others), None)
    expected = norm_mish(h, *(tensor.detach() for tensor in others), None)
    (ours,), (theirs,) = (th.autograd.grad(out.sum(), [h]) for out in (y, expected))
    th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_norm_mish_of_extreme_and_broken_inputs():
    """Large values neither overflow nor vanish, and NaN stays in its row."""
    h = th.zeros(1, 3, 16)
    h[0, 0, 0], h[0, 1, 3] = 1e6, th.nan
    weight = th.full((1, 16), 100.0)
    y = kernels.norm_mish(h, th.zeros(1, 16), weight, th.zeros(1, 16), None)
    th.testing.assert_close(y, norm_mish(h, th.zeros(1, 16), weight, th.zeros(1, 16)), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y[0, 1].isnan().all() and not y[0, [0, 2]].isnan().any()


def test_norm_mish_does_not_depend_on_the_number_of_threads():
    inputs = make_inputs(3, 100, 24)
    threads = th.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            th.set_num_threads(n)
            y = kernels.norm_mish(*inputs, None)
            results.append([y, *th.autograd.grad(y.sum(), inputs)])
    finally:
        th.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert th.equal(a, b)
