"""Plans with bfloat16 products."""

import copy

import numpy as np
import pytest
import torch as th
from conftest import TINY

from sb3_boom import BOOM
from sb3_boom.core.compilation import bf16_products, bf16_works

SUPPORTED = pytest.mark.skipif(not th.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has none")


def make_model(bf16: bool) -> BOOM:
    return BOOM("MlpPolicy", "Pendulum-v1", **dict(TINY, policy_kwargs=dict(TINY["policy_kwargs"], bf16=bf16)))


@SUPPORTED
def test_plans_are_nearly_the_same_and_updates_quite():
    models = [make_model(bf16) for bf16 in (False, True)]
    values = []
    for model in models:
        model.learn(60)
        th.manual_seed(0)
        model.set_parameters(copy.deepcopy(models[0].get_parameters()))
        plan = model.policy.plan(th.rand(20, 3), model.policy.initial_mean(20))
        assert {tensor.dtype for tensor in plan} == {th.float32}
        values.append(plan.planner_std)
    assert not th.equal(*values)
    assert (values[0] - values[1]).abs().median() < 0.05
    for model in models:
        th.manual_seed(0)
        model.replay_buffer = models[0].replay_buffer
        model.train(1, 16)
    for a, b in zip(*(model.policy.parameters() for model in models), strict=True):
        assert th.equal(a, b)


def test_it_is_off_unless_asked_for_and_saved(tmp_path):
    assert not make_model(False).policy.bf16 and "bf16" not in TINY["policy_kwargs"]
    make_model(True).save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model")
    assert loaded.policy.bf16
    assert np.isfinite(loaded.predict(np.zeros(3, np.float32))[0]).all()


def test_without_such_products_plans_are_as_before_after_one_warning():
    device = th.device("meta")
    bf16_works.cache_clear()
    with pytest.warns(UserWarning, match="bf16=True changes nothing: this meta has no bfloat16"):
        context = bf16_products(True, device)
    with context:
        assert not th.is_autocast_enabled("cpu")


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="bf16 must be True or False"):
        make_model("yes")
