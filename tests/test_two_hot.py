"""Scalars as two-hot classes."""

import numpy as np
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_boom.core.two_hot import TwoHot, symexp, symlog

TWO_HOT = TwoHot()
finite = st.floats(-1e8, 1e8, width=32)


@given(finite)
def test_symexp_undoes_symlog(x):
    value = th.tensor([x])
    th.testing.assert_close(symexp(symlog(value)), value, rtol=1e-4, atol=1e-6)


@given(st.floats(-2e4, 2e4, width=32))
def test_decoding_the_encoding_gives_the_scalar_back(x):
    value = th.tensor([[x]])
    decoded = TWO_HOT.decode(TWO_HOT.encode(value).log())
    th.testing.assert_close(decoded, value, rtol=1e-4, atol=1e-5)


@given(finite)
def test_mass_is_one_on_at_most_two_neighbouring_bins(x):
    encoded = TWO_HOT.encode(th.tensor([x]))
    assert (encoded >= 0).all()
    assert abs(encoded.sum().item() - 1.0) < 1e-5
    bins = encoded.nonzero().ravel().tolist()
    assert len(bins) in (1, 2)
    assert bins[-1] - bins[0] == len(bins) - 1


@given(st.floats(2.3e4, 1e30), st.sampled_from([-1.0, 1.0]))
def test_values_beyond_the_range_fall_on_the_outer_bin(x, sign):
    encoded = TWO_HOT.encode(th.tensor([sign * x]))
    assert encoded[0 if sign < 0 else -1] == 1.0


def test_cross_entropy_is_that_of_the_dense_distributions():
    generator = np.random.default_rng(0)
    logits = th.as_tensor(generator.normal(size=(64, 101)), dtype=th.float32)
    x = th.as_tensor(10 * generator.normal(size=(64, 1)), dtype=th.float32)
    expected = th.nn.functional.cross_entropy(logits, TWO_HOT.encode(x), reduction="none").unsqueeze(-1)
    th.testing.assert_close(TWO_HOT.cross_entropy(logits, x), expected)
