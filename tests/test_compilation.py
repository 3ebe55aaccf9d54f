"""Compiled and eager programs give the same numbers, and nothing is compiled twice."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch as th
from conftest import TINY, OneLayer
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_boom import BOOM
from sb3_boom.buffers import SubTrajectories
from sb3_boom.core import kernels, losses
from sb3_boom.core.actor import Actor
from sb3_boom.core.compilation import allow_tf32, compiled, compiler_works
from sb3_boom.core.critic import Critic
from sb3_boom.update import encode_observations, model_gradients, policy_gradients, update

pytestmark = pytest.mark.skipif(not compiler_works("cpu"), reason="no C++ compiler")


def make_model(compile: bool) -> BOOM:
    return BOOM(
        "MlpPolicy",
        "Pendulum-v1",
        **dict(TINY, policy_kwargs=dict(TINY["policy_kwargs"], compile=compile), learning_rate=lambda left: 3e-4 * left),
    )


@pytest.fixture(scope="module")
def models() -> tuple[BOOM, BOOM]:
    """Eager and compiled, with the same parameters and data."""
    eager, compiled = make_model(False).learn(60), make_model(True)
    compiled.set_parameters(copy.deepcopy(eager.get_parameters()))  # optimizers would share their state else
    compiled.replay_buffer = eager.replay_buffer
    compiled.set_logger(eager.logger)
    return eager, compiled


def n_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def draw(model: BOOM) -> tuple[SubTrajectories, losses.UpdateNoise]:
    """An update's data and noise, the same ones at every call."""
    th.manual_seed(0)
    policy, batch = model.policy, model.replay_buffer.sample(16)
    sizes = (policy.action_dim, policy.critic.n_critics, policy.critic.mlp_dim)
    return batch, losses.draw_noise(model.horizon, 16, *sizes, policy.dropout, model.device)


def squares_gradient(x: th.Tensor) -> th.Tensor:
    return th.autograd.grad(x.square().sum(), [x])[0]


def observations(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, 3)).astype(np.float32)


def test_compiled_plans_equal_eager_ones(models):
    """To 1e-3 on 95 of 100: a plan picks elites, so a last digit may decide."""
    actions = [model.predict(observations(100), deterministic=True)[0] for model in models]
    close = np.abs(actions[0] - actions[1]).max(axis=1) < 1e-3
    assert close.mean() >= 0.95


def test_compiled_planning_iterations_equal_eager_ones(models):
    plans = []
    for model in models:
        policy = model.policy
        config = policy.planner_config
        policy.planner_config = dataclasses.replace(config, n_iterations=1)
        obs, _ = policy.obs_to_tensor(observations(100))
        plans.append(policy.plan(obs, policy.initial_mean(100), deterministic=True))
        policy.planner_config = config
    for ours, theirs in zip(*plans, strict=True):
        th.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("end_to_end", "n_steps"), [(False, 1), (True, 1), (True, 2)])
def test_compiled_gradients_equal_eager_ones(models, end_to_end, n_steps):
    gradients = []
    for model in models:
        policy, config = model.policy, dataclasses.replace(model._loss_config(), n_steps=n_steps)
        batch, noise = draw(model)
        features, next_features = encode_observations(policy, batch.observations)
        of_model, latents, _ = policy.compiler(model_gradients)(
            policy.world_model, policy.actor, policy.critic, policy.critic_target, config, end_to_end,
            features, next_features, batch.actions, batch.rewards, batch.terminations, batch.valid, noise,
        )  # fmt: skip
        of_policy, *_ = policy.compiler(policy_gradients)(
            policy.actor, policy.critic, config, end_to_end, latents, batch.planner_actions, batch.planner_stds,
            batch.valid, policy.q_scale, noise,
        )  # fmt: skip
        gradients.append([*of_model, *of_policy])
    for eager, ours in zip(*gradients, strict=True):
        assert (ours - eager).norm() <= 1e-5 * eager.norm()


@pytest.mark.parametrize("alignment", losses.ALIGNMENTS)
def test_compiled_gradients_of_every_alignment_equal_eager_ones(models, alignment):
    """With more action dimensions than Pendulum's one, which makes other loops; once the gradient of "none" alone was NaN."""
    kernels.load()
    n_actions, horizon, batch = 6, 3, 16
    config = dataclasses.replace(models[0]._loss_config(), alignment=alignment)
    th.manual_seed(0)
    actor, critic = Actor(16, n_actions, 32), Critic(16, n_actions, 32, 3)
    noise = losses.draw_noise(horizon, batch, n_actions, 3, 32, 0.01, th.device("cpu"))
    latents, planner_actions = th.rand(horizon, batch, 16), 2.0 * th.rand(horizon, batch, n_actions) - 1.0
    valid = th.ones(horizon, batch, 1, dtype=th.bool)
    gradients = []
    for function in (policy_gradients, compiled(policy_gradients)):
        scale = th.tensor(3.0)  # so that "release" aligns
        found, *_ = function(
            actor, critic, config, True, latents, planner_actions, th.ones_like(planner_actions), valid, scale, noise
        )
        gradients.append(th.cat([gradient.flatten() for gradient in found]))
    eager, ours = gradients
    assert 0.0 < eager.norm() and (ours - eager).norm() <= 1e-5 * eager.norm()


def test_compiled_updates_equal_eager_ones(models):
    results = []
    for model in models:
        model.meters.take_terms()
        model._current_progress_remaining = 1.0  # the same learning rate
        th.manual_seed(0)
        model.train(1, 16)
        terms = model.meters.take_terms()
        results.append((terms, {name: p.detach().clone() for name, p in model.policy.named_parameters()}))
    (eager_terms, eager_parameters), (terms, parameters) = results
    assert terms == pytest.approx(eager_terms, rel=1e-4, abs=1e-5)
    # Adam's steps have the learning rate's size however small the gradient is: where that is zero a last digit decides
    moved = th.cat([(parameters[name] - eager_parameters[name]).abs().flatten() for name in parameters])
    assert (moved > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("compile", [False, True])
def test_features_extractor_gets_the_losses_gradient(compile, monkeypatch):
    """Its part of the way back lies outside of the compiled graph, since a user's may not compile."""
    policy_kwargs = dict(TINY["policy_kwargs"], features_extractor_class=OneLayer)
    model = BOOM("MlpPolicy", "Pendulum-v1", **dict(TINY, policy_kwargs=policy_kwargs)).learn(30)
    policy, config = model.policy, model._loss_config()
    policy.compile_setting = compile
    batch, noise = draw(model)
    weight = policy.features_extractor.layer.weight
    features, next_features = encode_observations(policy, batch.observations)
    loss, *_ = losses.model_loss(
        policy.world_model, policy.actor, policy.critic, policy.critic_target, config, features, next_features,
        batch.actions, batch.rewards, batch.terminations, batch.valid, noise,
    )  # fmt: skip
    (expected,) = th.autograd.grad(loss, [weight])
    met = []
    step = policy.model_optimizer.step
    monkeypatch.setattr(policy.model_optimizer, "step", lambda: (met.append(weight.grad.clone()), step()))
    weight.grad = th.ones_like(weight)  # of an earlier loss
    for _ in range(2):  # the second's is not added to the first's
        parameters = copy.deepcopy(policy.state_dict())
        update(policy, batch, noise, config, max_grad_norm=1e6)
        policy.load_state_dict(parameters)
    for found in met:
        th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("frozen", ["world_model.encoder", "world_model.dynamics.0.linear", "critic", "actor"])
def test_frozen_parameters_stay_and_the_others_are_trained(compile, frozen):
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY).learn(30)
    policy = model.policy
    policy.compile_setting = compile
    for parameter in policy.get_submodule(frozen).requires_grad_(False).parameters():
        parameter.grad = th.ones_like(parameter)  # of an earlier loss
    before = copy.deepcopy(dict(policy.named_parameters()))
    model.train(2, 16)
    for name, parameter in policy.named_parameters():
        assert th.equal(parameter, before[name]) == name.startswith(f"{frozen}."), name


@pytest.mark.parametrize("compile", [False, True])
def test_parameters_that_no_loss_uses_are_left_alone_and_hooks_on_gradients_are_called(compile):
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY).learn(30)
    policy = model.policy
    policy.compile_setting = compile
    policy.actor.auxiliary = th.nn.Linear(2, 2)
    policy._build_optimizers(model.lr_schedule)
    bias = next(parameter for name, parameter in policy.actor.named_parameters() if name.endswith("bias"))
    bias.register_hook(th.zeros_like)
    before = copy.deepcopy((policy.actor.auxiliary.weight, bias))
    model.train(2, 16)
    for parameter, was in zip((policy.actor.auxiliary.weight, bias), before, strict=True):
        assert th.equal(parameter, was)


def test_gradients_are_compiled_in_other_threads_too():
    """Torch keeps its settings by thread, and refuses them without."""

    def differentiate(n: int) -> list[float]:
        return compiled(squares_gradient)(th.ones(n, requires_grad=True)).tolist()

    assert differentiate(1) == [2.0]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(differentiate, 2).result() == [2.0, 2.0]


def test_nothing_is_compiled_again(models):
    """Whatever the learning rate, training or evaluation, and whoever plans; another number of environments is one more."""
    _, model = models
    model.predict(observations(1))
    model.train(1, 16)
    before = n_graphs()
    model.learn(40, reset_num_timesteps=False)
    model.predict(observations(1), deterministic=True)
    model.predict(observations(1)[0])
    model.prior.predict(observations(1))
    model.policy.set_training_mode(False)
    model.train(2, 16)
    assert n_graphs() == before
    model.predict(observations(3))
    first = n_graphs()
    assert first > before
    model.predict(observations(3), deterministic=True)
    assert n_graphs() == first


class Waiting(TorchDispatchMode):
    """Refuses what would make a GPU's host wait: reading a number, and results whose size depends on the data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == th.bool for i in args[1])
        assert not by_mask and name not in self.REFUSED, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("drawing", [{}, {"value_temperature": 1.0}, {"sampling": "episode"}], ids=str)
def test_nothing_waits_for_the_device(drawing):
    """Neither a plan, nor drawing a batch, nor an update."""
    model = BOOM("MlpPolicy", "Pendulum-v1", **dict(TINY, replay_buffer_kwargs=drawing)).learn(210)
    obs, _ = model.policy.obs_to_tensor(observations(2))
    with Waiting():
        model.policy.plan(obs, model.policy.initial_mean(2))
        model.train(2, 16)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            model.policy.q_scale.item()


@pytest.mark.parametrize("drawing", [{}, {"value_temperature": 1.0}], ids=str)
def test_everything_is_on_the_models_device(drawing):
    """Shown where tensors have no data: an operation that meets one of the CPU's there, other than a number, raises."""
    model = BOOM("MlpPolicy", "Pendulum-v1", **dict(TINY, replay_buffer_kwargs=drawing)).learn(60)
    policy_kwargs = dict(TINY["policy_kwargs"], optimizer_kwargs=dict(fused=False))  # Adam is not fused there
    with th.device("meta"):
        elsewhere = BOOM("MlpPolicy", "Pendulum-v1", **dict(TINY, device="meta", policy_kwargs=policy_kwargs))
    policy, buffer = elsewhere.policy, model.replay_buffer
    for store in (buffer._storage, buffer._final_observations):
        store.update({key: tensor.to("meta") for key, tensor in store.items()})
    buffer.device, elsewhere.replay_buffer = elsewhere.device, buffer
    elsewhere.set_logger(model.logger)
    elsewhere.train(2, 16)
    plan = policy.plan(th.zeros(2, 3, device="meta"), policy.initial_mean(2))
    assert {tensor.device.type for tensor in (*plan, *elsewhere.meters._terms.values())} == {"meta"}


def test_tf32_is_for_gpus_and_keeps_what_is_coarser():
    before = th.get_float32_matmul_precision()
    try:
        for device, setting, expected in [
            ("cuda", "highest", "high"),
            ("cuda", "medium", "medium"),
            ("cpu", "highest", "highest"),
        ]:
            th.set_float32_matmul_precision(setting)
            allow_tf32(th.device(device))
            assert th.get_float32_matmul_precision() == expected
    finally:
        th.set_float32_matmul_precision(before)


def test_waiting_for_the_compiler_is_announced_once(capsys):
    policy_kwargs = dict(TINY["policy_kwargs"], compile=True)
    settings = dict(TINY, policy_kwargs=policy_kwargs, verbose=1, learning_starts=5, pretrain_steps=1)
    model = BOOM("MlpPolicy", "Pendulum-v1", **settings)
    model.learn(8)
    assert capsys.readouterr().out.count("Compiling") == 1
    eager = BOOM("MlpPolicy", "Pendulum-v1", **dict(TINY, verbose=1, learning_starts=5, pretrain_steps=1))
    eager.learn(8)
    assert "Compiling" not in capsys.readouterr().out
