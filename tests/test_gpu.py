"""On a GPU: what is captured gives the numbers of what is launched, and models move between devices."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY, OneLayer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom import BOOM
from sb3_boom.core import graphs
from sb3_boom.core.transfer import send

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="no GPU")


def make_model(n_envs: int = 1, env=None, **settings) -> BOOM:
    policy_kwargs = {**TINY["policy_kwargs"], "compile": True, "tf32": False, **settings.pop("policy_kwargs", {})}
    env = env or make_vec_env("Pendulum-v1", n_envs=n_envs, seed=0)
    return BOOM("MlpPolicy", env, **{**TINY, "device": "cuda", **settings, "policy_kwargs": policy_kwargs})


@pytest.fixture(scope="module")
def model() -> BOOM:
    """It has learned by graphs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph.*")
        return make_model().learn(60)


def n_captured(model: BOOM) -> dict[str, int]:
    return model.policy.graphs.counts()


def state_of(policy) -> list[th.Tensor]:
    states = [state for optimizer in (policy.model_optimizer, policy.actor_optimizer) for state in optimizer.state.values()]
    return [*policy.parameters(), policy.q_scale, *(tensor for state in states for tensor in state.values())]


def updates(model: BOOM, n: int) -> list[th.Tensor]:
    """What so many updates make of the parameters; they are put back."""
    before = [tensor.detach().clone() for tensor in state_of(model.policy)]
    th.manual_seed(0)
    model.train(n, 16)
    after = [tensor.detach().clone() for tensor in state_of(model.policy)]
    with th.no_grad():
        for tensor, was in zip(state_of(model.policy), before, strict=True):
            tensor.copy_(was)
    return after


def test_plan_and_update_are_captured(model):
    assert n_captured(model) == {"plan": 1, "update": 1}
    assert all(bool(th.isfinite(tensor).all()) for tensor in state_of(model.policy))


def test_captured_plans_equal_launched_ones(model):
    """To 1e-5: the same kernels, but libraries may take others."""
    policy = model.policy
    obs, mean = th.rand(1, 3, device="cuda"), policy.initial_mean(1)
    plans = []
    for policy.capture in (True, False):
        th.manual_seed(0)
        plans.append([policy.plan(obs, mean) for _ in range(3)])
    policy.capture = True
    for ours, theirs in zip(*plans, strict=True):
        for tensor, expected in zip(ours, theirs, strict=True):
            th.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


def test_captured_updates_equal_launched_ones(model):
    """Adam's steps have the learning rate's size however small the gradient is: where that is zero a last digit decides."""
    results = []
    for model.policy.capture in (True, False):
        results.append(updates(model, 3))
    model.policy.capture = True
    n = len(list(model.policy.parameters()))
    moved = th.cat([(a - b).abs().flatten() for a, b in zip(results[0][:n], results[1][:n], strict=True)])
    assert (moved > 1e-5).float().mean() < 1e-3


def test_captured_updates_equal_eager_ones(model):
    captured = updates(model, 1)
    model.policy.compile_setting = False
    expected = updates(model, 1)
    model.policy.compile_setting = True
    n = len(list(model.policy.parameters()))
    moved = th.cat([(a - b).abs().flatten() for a, b in zip(captured[:n], expected[:n], strict=True)])
    assert (moved > 1e-5).float().mean() < 1e-2


def test_neither_planning_nor_storing_nor_updating_waits(model):
    """As far as torch notices; the action's read-back and the losses' are left out."""
    model.meters.take_terms()
    model._n_updates = 1  # at every hundredth the parameters are looked at
    policy, obs, starts = model.policy, np.zeros((1, 3), np.float32), np.zeros(1, bool)
    infos = [{"planner_action": np.zeros(1), "planner_std": np.ones(1)}]
    th.cuda.synchronize()
    th.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            tensor, starts_tensor = policy.observations_and_starts(obs, starts)
            policy.plan(tensor, policy.initial_mean(1).masked_fill(starts_tensor.view(-1, 1, 1), 0.0))
            model.train(2, 16)
            model.replay_buffer.add(obs, obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1, bool), infos)
    finally:
        th.cuda.set_sync_debug_mode("default")


def test_an_update_learns_at_every_replay(model):
    before = [parameter.clone() for parameter in model.policy.parameters()]
    steps = [state["step"].item() for state in model.policy.actor_optimizer.state.values()]
    model.train(4, 16)
    assert [state["step"].item() for state in model.policy.actor_optimizer.state.values()] == [step + 4 for step in steps]
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_the_learning_rate_reaches_the_graph(model):
    schedule = model.lr_schedule
    try:
        model.lr_schedule = lambda left: 0.0
        for tensor, expected in zip(updates(model, 2)[:20], list(model.policy.parameters())[:20], strict=True):
            assert th.equal(tensor, expected)
    finally:
        model.lr_schedule = schedule


def test_models_move_between_devices(model, tmp_path):
    model.save(tmp_path / "model")
    obs = np.zeros((1, 3), np.float32)
    there = BOOM.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    there.policy.compile_setting = False
    there.learn(40)
    assert there.policy.model_optimizer.param_groups[0]["capturable"] is False
    there.save(tmp_path / "back")
    back = BOOM.load(tmp_path / "back", env=gym.make("Pendulum-v1"), device="cuda")
    back.learn(60)
    assert n_captured(back) == {"plan": 1, "update": 1}
    assert np.isfinite(back.predict(obs)[0]).all()


def test_several_environments_with_normalised_observations():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0))
    model = make_model(env=env, policy_kwargs=dict(compile=False), buffer_size=60).learn(260)
    buffer = model.replay_buffer
    assert buffer.full and buffer._storage["steps"].device.type == "cuda"
    assert np.array_equal(buffer._slots, buffer._storage["final_slot"].cpu().numpy())
    assert bool(th.isfinite(buffer.sample(32, env).rewards).all())


def test_evaluation_in_between_does_not_disturb(model):
    evaluate_policy(model, make_vec_env("Pendulum-v1", seed=1), n_eval_episodes=1, deterministic=False)
    assert n_captured(model)["plan"] == 1
    assert all(bool(th.isfinite(tensor).all()) for tensor in state_of(model.policy))


def test_copies_capture_anew(model):
    model._callback = None
    other = copy.deepcopy(model)
    other.train(5, 16)
    assert n_captured(other) == {"update": 1}


def test_an_own_extractor_is_trained():
    model = make_model(policy_kwargs=dict(features_extractor_class=OneLayer, compile=False)).learn(40)
    assert all(bool(th.isfinite(tensor).all()) for tensor in state_of(model.policy))


def test_arrays_arrive_as_they_were_sent():
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal(3), "b": np.array([True, False]), "c": np.arange(5, dtype=np.int32)}
    arrays["d"] = rng.integers(0, 255, (2, 7), dtype=np.uint8)
    kept = copy.deepcopy(arrays)
    sent = send(arrays, th.device("cuda"))
    for name, array in arrays.items():
        array[...] = 0
        assert np.array_equal(sent[name].cpu().numpy(), kept[name])


def test_a_capture_that_breaks_off_is_survived():
    """Last: after it, torch may refuse to capture. An operation that waits is not allowed."""

    def waits(x: th.Tensor) -> th.Tensor:
        return x * float(x.sum().cpu())

    graphed, x = graphs.Graphed(waits, "product"), th.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="CUDA graph of its product"):
        for _ in range(graphs.WARM_UP_CALLS + 1):
            assert graphed(x).tolist() == [3.0, 3.0, 3.0]
    assert graphed(x).tolist() == [3.0, 3.0, 3.0]
    assert th.cuda.current_stream() == th.cuda.default_stream()
    assert bool(th.isfinite(th.randn(5, device="cuda")).all())
