"""The C++ kernel against the same layers written in torch."""

import itertools

import pytest
import torch as th

from sb3_boom.core import kernels
from sb3_boom.core.compilation import compiled, compiler_works
from sb3_boom.core.torch_layers import MLP, EnsembleMLP, SimNorm, mlp

pytestmark = pytest.mark.skipif(not compiler_works("cpu"), reason="no C++ compiler")

NETWORKS = {
    "plain head": lambda: mlp(7, [24, 24], 11),
    "one layer": lambda: mlp(7, [], 16, SimNorm(8)),
    "odd sizes": lambda: mlp(5, [13, 9, 3], 1),
    "simplices": lambda: mlp(7, [24], 32, SimNorm(8)),
    "odd simplices": lambda: mlp(7, [24], 33, SimNorm(3)),
    "wide simplices": lambda: mlp(7, [24], 38, SimNorm(19)),
    "no simplices": lambda: mlp(7, [24, 24], 32, th.nn.Identity()),
    "ensemble": lambda: EnsembleMLP(5, 7, 24, 11),
    "odd ensemble": lambda: EnsembleMLP(3, 7, 13, 101),
}
ROWS = [1, 15, 77, 600]


@pytest.fixture(scope="module", autouse=True)
def load_kernel():
    kernels.load()
    assert kernels.loaded


@pytest.fixture(autouse=True)
def one_or_two_threads():
    threads = th.get_num_threads()
    th.set_num_threads(2)
    yield
    th.set_num_threads(threads)


def make_network(name: str) -> MLP | EnsembleMLP:
    """With parameters far from their start, where LayerNorms do nothing and heads give 0."""
    th.manual_seed(0)
    network = NETWORKS[name]()
    for parameter in network.parameters():
        parameter.data.normal_()
    return network


def run_both(monkeypatch, network, *args, of_parameters: bool = True, **kwargs) -> list[list[th.Tensor]]:
    """:return: output and gradients (of the input, then of the parameters) of torch and of the kernel"""
    results = []
    for usable in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda x, usable=usable: usable)
        y = network(*args, **kwargs)
        grad = th.randn(y.shape, generator=th.Generator().manual_seed(1))
        wanted = [args[0], *(network.parameters() if of_parameters else ())]
        results.append([y, *th.autograd.grad(y, wanted, grad, allow_unused=True)])
    return results


def assert_close(expected: list[th.Tensor], ours: list[th.Tensor]) -> None:
    for a, b in zip(expected, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-6
            assert a.shape == b.shape


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rows", ROWS)
def test_kernel_and_its_gradients_equal_torch(monkeypatch, name, rows):
    network = make_network(name)
    x = th.randn(rows, 5 if name == "odd sizes" else 7, requires_grad=True)
    results = run_both(monkeypatch, network, x)
    assert_close(*results)
    with th.no_grad():  # which keeps nothing for gradients
        assert_close(results[1][:1], [network(x)])


@pytest.mark.parametrize("rows", ROWS)
def test_dropped_units_and_constant_members(monkeypatch, rows):
    network = make_network("ensemble")
    x = th.randn(rows, 7, requires_grad=True)
    mask = th.rand(5, rows, 24) > 0.2
    assert_close(*run_both(monkeypatch, network, x, None, mask))
    members = th.tensor([3, 1])
    assert_close(*run_both(monkeypatch, network, x, members, mask[:2]))
    assert network(x, members).shape == (2, rows, 11)
    assert all(grad is None for grad in run_both(monkeypatch, network, x, members)[1][2:])


def test_inputs_of_any_shape_and_layout(monkeypatch):
    network = make_network("simplices")
    x = th.randn(7, 3, 5).transpose(0, 2).requires_grad_()
    assert_close(*run_both(monkeypatch, network, x))
    z = th.randn(4, 1, 7, requires_grad=True)
    assert_close(*run_both(monkeypatch, network, z.expand(-1, 6, -1)))


def test_input_that_needs_no_gradient_costs_none(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    network = make_network("plain head")
    y = network(th.randn(3, 7))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_extreme_and_broken_inputs(monkeypatch):
    """Large values neither overflow nor vanish, and NaN stays in its row."""
    network = make_network("simplices")
    x = th.zeros(3, 7)
    x[0, 0], x[1, 3] = 1e6, th.nan
    with th.no_grad():
        expected = network(x)
        monkeypatch.setattr(kernels, "usable", lambda x: True)
        y = network(x)
    th.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y[1].isnan().any() and not y[[0, 2]].isnan().any()


def test_results_do_not_depend_on_who_else_is_in_the_batch_or_how_many_threads(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    network = make_network("simplices")
    x = th.randn(100, 7, requires_grad=True)
    results = []
    for threads in (1, 2):
        th.set_num_threads(threads)
        y = network(x)
        results.append([y, *th.autograd.grad(y.square().sum(), [x, *network.parameters()])])
    assert_close(*results)
    assert_close([results[0][0][40:43]], [network(x[40:43])])


def test_kernel_keeps_the_rules_of_custom_operators():
    """Shapes known without running, no output that aliases another; torch's own check."""
    tests = ("test_schema", "test_faketensor")
    weights = [th.randn(2, 16, 7), th.randn(2, 3, 16)]
    biases = [th.randn(2, 16), th.randn(2, 3)]
    norms = [th.randn(2, 16)]
    x, mask, members = th.randn(40, 7), th.ones(2, 40, 16, dtype=th.bool), th.tensor([1, 0])
    op, backward = th.ops.sb3_boom.mlp.default, th.ops.sb3_boom.mlp_backward.default
    for keep, chosen in itertools.product((True, False), (None, members)):
        th.library.opcheck(op, (x, weights, biases, norms, norms, mask, chosen, 0, keep), test_utils=tests)
    y, saved = op(x, weights, biases, norms, norms, mask, None, 0, True)
    for of_input, of_parameters in itertools.product((True, False), (True, False)):
        arguments = (th.randn_like(y), x, y, saved, weights, biases, norms, mask, None, 0, of_input, of_parameters)
        th.library.opcheck(backward, arguments, test_utils=tests)


def test_unfit_inputs_are_refused():
    weights, biases = [th.randn(2, 3, 7)], [th.randn(2, 3)]
    with pytest.raises(RuntimeError, match="no such member"):
        th.ops.sb3_boom.mlp(th.randn(4, 7), weights, biases, [], [], None, th.tensor([2]), 0, False)
    with pytest.raises(RuntimeError):
        th.ops.sb3_boom.mlp(th.randn(4, 6), weights, biases, [], [], None, None, 0, False)


@pytest.mark.parametrize("name", ["plain head", "simplices", "ensemble"])
def test_no_rows_are_no_work(monkeypatch, name):
    """A planner without policy trajectories."""
    network, shape = make_network(name), (0, 7) if name == "ensemble" else (1, 0, 7)
    outputs = []
    for usable in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda x, usable=usable: usable)
        with th.no_grad():
            outputs.append(network(th.zeros(shape)))
    assert outputs[0].shape == outputs[1].shape


def test_other_activations_are_compiled_as_they_are():
    """The kernel knows Mish alone; a user's policy may have put something else in its place."""
    network = make_network("plain head")
    network[0].activation = th.nn.Tanh()
    x = th.randn(15, 7)
    th.testing.assert_close(compiled(type(network).__call__)(network, x), network(x), rtol=1e-4, atol=1e-5)
