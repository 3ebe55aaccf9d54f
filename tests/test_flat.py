"""One tensor per group of parameters: a faster way to the same steps, which nobody notices."""

import copy
import io

import pytest
import torch as th
from conftest import TINY

from sb3_boom import BOOM
from sb3_boom import update as update_module
from sb3_boom.core.flat import flat_optimizer


def make_model(**policy_kwargs) -> BOOM:
    settings = dict(TINY, policy_kwargs=dict(TINY["policy_kwargs"], compile=False, **policy_kwargs))
    return BOOM("MlpPolicy", "Pendulum-v1", **settings).learn(30)


def step_counts(model: BOOM) -> set[float]:
    """Of both optimizers' parameters, as a file would have them."""
    optimizers = (model.policy.model_optimizer, model.policy.actor_optimizer)
    return {float(state["step"]) for optimizer in optimizers for state in optimizer.state_dict()["state"].values()}


def parameters(model: BOOM) -> dict[str, th.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}


def assert_equal(found: BOOM, expected: BOOM, **tolerance) -> None:
    th.testing.assert_close(parameters(found), parameters(expected), **tolerance)
    for name in ("model_optimizer", "actor_optimizer"):
        states = [getattr(model.policy, name).state_dict()["state"] for model in (found, expected)]
        th.testing.assert_close(*states, **tolerance)


def is_flat(model: BOOM) -> list[bool]:
    policy = model.policy
    networks = {policy.model_optimizer: (policy.world_model, policy.critic), policy.actor_optimizer: (policy.actor,)}
    return [flat_optimizer(optimizer, of) is not None for optimizer, of in networks.items()]


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        dict(),
        dict(optimizer_kwargs=dict(amsgrad=True, betas=(0.8, 0.95), fused=False)),
        dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=0.1)),
    ],
    ids=str,
)
def test_flat_steps_are_those_of_every_parameter_by_itself(policy_kwargs, monkeypatch):
    flat = make_model(**policy_kwargs)
    assert is_flat(flat) == [True, True]
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "flat_optimizer", lambda *_: None)
        apart = make_model(**policy_kwargs)
        assert not hasattr(apart.policy.model_optimizer, "flat")
    assert step_counts(flat) == step_counts(apart) == {flat._n_updates}
    assert_equal(flat, apart, rtol=1e-4, atol=1e-6)


def test_learning_rates_and_settings_changed_later_reach_the_next_step():
    model = make_model()
    before = parameters(model)
    model.lr_schedule = lambda _: 0.0
    model.train(2, 16)
    moved = {name for name, now in parameters(model).items() if not th.equal(now, before[name])}
    assert all(name.startswith("critic_target") for name in moved)


def test_copies_and_files_go_on_alike_and_by_themselves():
    model = make_model()
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = BOOM.load(file, env=model.get_env())
    loaded.replay_buffer = copy.deepcopy(model.replay_buffer)
    loaded.set_logger(model.logger)
    policy, before = copy.deepcopy(model.policy), parameters(model)
    th.manual_seed(0)
    model.train(2, 16)
    assert any(not th.equal(now, before[name]) for name, now in parameters(model).items())
    for name, parameter in (*policy.named_parameters(), *loaded.policy.named_parameters()):
        assert th.equal(parameter, before[name]), name  # what one model learns, its copies don't
    th.manual_seed(0)
    loaded.train(2, 16)
    assert is_flat(loaded) == is_flat(model) == [True, True]
    assert_equal(loaded, model, rtol=0, atol=0)


def test_optimizer_of_another_model_is_copied_not_shared():
    """Torch's own load_state_dict takes the tensors as they are."""
    giver, taker = make_model(), make_model()
    taker.policy.model_optimizer.load_state_dict(giver.policy.model_optimizer.state_dict())
    before = copy.deepcopy(giver.policy.model_optimizer.state_dict()["state"])
    taker.train(2, 16)
    th.testing.assert_close(giver.policy.model_optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_steps_of_ones_own_count_too():
    model = make_model()
    loss = sum(parameter.square().sum() for parameter in model.policy.actor.parameters())
    model.policy.actor_optimizer.zero_grad()
    loss.backward()
    model.policy.actor_optimizer.step()
    counts = {float(state["step"]) for state in model.policy.actor_optimizer.state.values()}
    assert counts == {model._n_updates + 1}
    model.train(1, 16)
    assert {float(state["step"]) for state in model.policy.actor_optimizer.state.values()} == {model._n_updates + 1}


def test_frozen_parameters_are_stepped_apart_from_then_on():
    model = make_model()
    model.policy.world_model.encoder.requires_grad_(False)
    model.train(2, 16)
    assert is_flat(model) == [False, True]
    model.policy.world_model.encoder.requires_grad_(True)
    model.train(1, 16)
    assert is_flat(model) == [False, True]
    counts = {float(state["step"]) for state in model.policy.model_optimizer.state.values()}
    assert counts == {model._n_updates, model._n_updates - 2}


def test_parameters_that_no_loss_uses_are_left_alone():
    model = make_model()
    model.policy.actor.auxiliary = th.nn.Linear(2, 2)
    model.policy._build_optimizers(model.lr_schedule)
    weight = model.policy.actor.auxiliary.weight
    before = weight.detach().clone()
    weight.grad = th.ones_like(weight)  # of an earlier loss
    model.train(2, 16)
    assert th.equal(weight, before)
    assert weight not in model.policy.actor_optimizer.state


def test_gradients_are_where_users_look_for_them():
    model = make_model()
    model.policy.actor_optimizer.zero_grad()
    model.train(1, 16)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.policy.critic.parameters())
    norm = th.nn.utils.get_total_norm([parameter.grad for parameter in model.policy.actor.parameters()])
    assert 0.0 < norm <= model.max_grad_norm


@pytest.mark.parametrize("hook", ["optimizer", "gradient"])
def test_hooks_are_called(hook):
    model, called = make_model(), []
    if hook == "optimizer":
        model.policy.model_optimizer.register_step_post_hook(lambda *_: called.append(1))
    else:
        next(model.policy.world_model.parameters()).register_hook(lambda _: called.append(1))
    model.train(2, 16)
    assert called == [1, 1]
    assert is_flat(model) == [False, True]
