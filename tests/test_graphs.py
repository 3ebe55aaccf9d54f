"""CUDA graphs without a GPU: what they would record, hold and overwrite, played through on a CPU."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch as th
from conftest import TINY, OneLayer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from sb3_boom import BOOM, policies
from sb3_boom.core import graphs, optimizers
from sb3_boom.core.compilation import eager
from sb3_boom.core.optimizers import is_capturable, set_learning_rates
from sb3_boom.core.transfer import send

HALVED = 2.0**-12  # learning rates that float32 holds exactly


def make_model(**settings) -> BOOM:
    """Its learning rate falls in steps."""
    policy_kwargs = {**TINY["policy_kwargs"], "encoder_lr_scale": 0.5, **settings.pop("policy_kwargs", {})}
    schedule = dict(learning_rate=lambda left: HALVED if left > 0.5 else HALVED / 2)
    env = settings.pop("env", None) or make_vec_env("Pendulum-v1", seed=0)
    return BOOM("MlpPolicy", env, **{**TINY, **schedule, **settings, "policy_kwargs": policy_kwargs})


def state_of(policy: policies.BOOMPolicy) -> list[th.Tensor]:
    """What an update changes."""
    states = [state for optimizer in (policy.model_optimizer, policy.actor_optimizer) for state in optimizer.state.values()]
    return [*policy.parameters(), policy.q_scale, policy.terminations_seen, *(t for state in states for t in state.values())]


def record(function, arguments, device) -> graphs.Capture:
    """
    A CUDA graph's manners on a CPU: recording does no work; a replay does the recorded operations on the same addresses, calls
    no Python, and leaves nothing of the last results.
    """
    policy = next(argument for argument in arguments if isinstance(argument, policies.BOOMPolicy))
    before = [tensor.detach().clone() for tensor in state_of(policy)]
    found = []

    def flat():
        leaves, spec = pytree.tree_flatten(function(*arguments))
        found.append(spec)
        return leaves

    program = make_fx(flat)()
    with th.no_grad():
        for tensor, was in zip(state_of(policy), before, strict=True):
            tensor.copy_(was)
    outputs = [node.meta["val"] for node in program.graph.find_nodes(op="output")[0].args[0]]
    outputs = [th.empty(value.shape, dtype=value.dtype) for value in outputs]

    def replay() -> None:
        with th.no_grad():
            for output in outputs:
                output.fill_(th.nan)
            for output, result in zip(outputs, program(), strict=True):
                output.copy_(result)

    return graphs.Capture(replay, pytree.tree_unflatten(outputs, found[0]))


@pytest.fixture
def recorded(monkeypatch):
    """Plan and update are captured, after three calls, as on a GPU."""
    for module in (graphs, policies, optimizers):
        monkeypatch.setattr(module, "captures_on", lambda device: True)
    monkeypatch.setattr(graphs, "warm_up", lambda function, arguments, device: function(*arguments))
    monkeypatch.setattr(graphs, "capture", record)
    monkeypatch.setattr(policies, "compiled", eager)  # operations are recorded, and inductor's are its own


def n_captured(model: BOOM) -> dict[str, int]:
    return model.policy.graphs.counts()


def learn(model: BOOM, evaluate: bool) -> BOOM:
    callback = None
    if evaluate:  # on as many environments as are learned from, so by the same graph
        env = make_vec_env("Pendulum-v1", seed=1)
        callback = EvalCallback(env, n_eval_episodes=1, eval_freq=25, verbose=0, deterministic=False)
    return model.learn(70, callback=callback)


def assert_same(ours: BOOM, theirs: BOOM) -> None:
    assert th.equal(ours.replay_buffer._storage["steps"], theirs.replay_buffer._storage["steps"])
    for tensor, expected in zip(state_of(ours.policy), state_of(theirs.policy), strict=True):
        assert th.equal(tensor, expected)


@pytest.mark.parametrize("evaluate", [False, True])
def test_learning_by_graphs_equals_learning_without_bit_for_bit(evaluate, request):
    """While the buffer grows and the learning rate falls: no number of the host is baked in, no result is read too late."""
    expected = learn(make_model(), evaluate)
    request.getfixturevalue("recorded")
    model = learn(make_model(), evaluate)
    assert n_captured(model) == {"plan": 1, "update": 1}
    assert_same(model, expected)
    assert all(th.isfinite(tensor).all() for tensor in state_of(model.policy))


def test_there_is_a_graph_for_every_number_of_environments_and_batch_size(recorded):
    model = make_model().learn(40)
    for n_envs in (2, 3):
        for _ in range(5):
            model.predict(np.zeros((n_envs, 3), np.float32))
    model.train(5, 8)
    assert n_captured(model) == {"plan": 3, "update": 2}


def test_a_later_plan_leaves_an_earlier_one_alone(recorded):
    model = make_model().learn(40)
    policy = model.policy
    obs, mean = th.zeros(1, 3), policy.initial_mean(1)
    first = policy.plan(obs, mean)
    kept = [tensor.clone() for tensor in first]
    policy.plan(obs + 1.0, mean)
    assert all(th.equal(tensor, was) for tensor, was in zip(first, kept, strict=True))


def test_loading_parameters_makes_new_graphs(request):
    """Those that are there know the old optimizers' memory, and not the file's."""

    def run() -> BOOM:
        model = make_model().learn(40)
        saved = copy.deepcopy(model.get_parameters())
        model.learn(10, reset_num_timesteps=False)
        model.set_parameters(saved)
        return model.learn(20, reset_num_timesteps=False)

    expected = run()
    request.getfixturevalue("recorded")
    model = run()
    assert n_captured(model) == {"plan": 1, "update": 1}
    assert_same(model, expected)


def test_what_is_frozen_later_stays(recorded):
    model = make_model().learn(40)
    weight = model.policy.actor.net[0].linear.weight.requires_grad_(False)
    before = weight.clone()
    model.train(6, 16)
    assert th.equal(weight, before) and n_captured(model)["update"] == 2


def test_copies_pickles_and_moved_policies_have_no_graphs(recorded):
    model = make_model(learning_rate=HALVED).learn(40)
    policy = model.policy
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert not other.graphs.functions
    assert n_captured(model) == {"plan": 1, "update": 1}
    policy.to("cpu")
    assert n_captured(model) == {"plan": 0, "update": 0}


def test_a_copy_goes_on_as_its_original(recorded):
    model = make_model(learning_rate=HALVED).learn(40)
    model._callback = None  # it holds the modules that it was called from
    other = copy.deepcopy(model)
    for each in (model, other):
        th.manual_seed(0)
        each.train(6, 16)
    assert_same(other, model)


def test_a_capture_that_fails_warns_once_and_changes_nothing(request, monkeypatch):
    expected = make_model().learn(32)
    request.getfixturevalue("recorded")

    def refuse(function, arguments, device):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture was invalidated")  # what ending it says then

    monkeypatch.setattr(graphs, "capture", refuse)
    with pytest.warns(UserWarning, match="CUDA graph") as caught:
        model = make_model().learn(32)
    told = [str(warning.message) for warning in caught if "CUDA graph" in str(warning.message)]
    assert len(told) == 2 and all("operation not permitted" in text for text in told)  # of plan and update
    assert_same(model, expected)


@pytest.mark.parametrize("user", ["forward hook", "gradient hook", "optimizer hook", "extractor", "optimizer"])
def test_users_own_code_is_called_and_said_to_bar_the_graph_once(recorded, user):
    policy_kwargs = {}
    if user == "extractor":
        policy_kwargs = dict(features_extractor_class=OneLayer)
    elif user == "optimizer":
        policy_kwargs = dict(optimizer_class=th.optim.RMSprop)
    model = make_model(policy_kwargs=policy_kwargs)
    policy, calls = model.policy, []
    if user == "forward hook":
        policy.actor.register_forward_hook(lambda *_: calls.append(1))
    elif user == "gradient hook":
        next(policy.actor.parameters()).register_hook(lambda gradient: calls.append(1))
    elif user == "optimizer hook":
        policy.actor_optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(32)
    assert sum("CUDA graph" in str(warning.message) for warning in caught) == 1
    assert n_captured(model).get("update", 0) == 0
    assert n_captured(model).get("plan", 0) == (user != "forward hook")
    assert "hook" not in user or len(calls) >= model._n_updates


def test_no_graph_without_compiler_or_gpu_and_no_word_of_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = make_model().learn(40)
    assert not model.policy.graphs.functions
    assert not any(group.get("capturable") for group in model.policy.model_optimizer.param_groups)


@pytest.mark.parametrize("fused", [True, False])
def test_optimizers_go_from_cpu_to_gpu_and_back(fused, monkeypatch):
    """A file's learning rate and flags are those of where it was written; what fits the device is imposed at every update."""
    parameter = th.nn.Parameter(th.ones(2))

    def fresh() -> th.optim.Adam:
        return th.optim.Adam([dict(params=[parameter], lr_scale=1.0)], lr=0.1, fused=fused)

    def step(optimizer: th.optim.Adam) -> None:
        parameter.grad = th.ones(2)
        optimizer.step()

    cpu = fresh()
    assert not set_learning_rates(cpu, [0.1], th.device("cpu"))
    step(cpu)
    gpu = fresh()
    gpu.load_state_dict(cpu.state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(optimizers, "captures_on", lambda device: True)
        assert set_learning_rates(gpu, [0.2], th.device("cpu")) and is_capturable(gpu)
        rate = gpu.param_groups[0]["lr"]
        assert not set_learning_rates(gpu, [0.3], th.device("cpu"))  # the graph's tensor, another value
        assert gpu.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.3)
        assert gpu.param_groups[0]["capturable"] and gpu.state[parameter]["step"].item() == 1.0
        gpu.load_state_dict(copy.deepcopy(gpu.state_dict()))
        assert not is_capturable(gpu) and set_learning_rates(gpu, [0.3], th.device("cpu"))
    back = fresh()
    back.load_state_dict(gpu.state_dict())
    assert not set_learning_rates(back, [0.1], th.device("cpu"))
    group = back.param_groups[0]
    assert group["lr"] == 0.1 and isinstance(group["lr"], float) and not group["capturable"]
    step(back)
    assert back.state[parameter]["step"].item() == 2.0


def test_only_a_few_graphs_are_kept(recorded):
    """A coefficient that changes at every update would fill the memory."""
    model = make_model().learn(30)
    for n in range(graphs.MAX_GRAPHS + 5):
        model.tau = 0.01 + 0.001 * n
        model.train(1, 16)
    assert len(model.policy.graphs.functions["update"].entries) == graphs.MAX_GRAPHS


def test_arrays_of_all_types_arrive_as_they_were_sent():
    rng = np.random.default_rng(0)
    arrays = {
        "float": rng.standard_normal((2, 3)).astype(np.float32),
        "double": rng.standard_normal(3),
        "slots": np.arange(2, dtype=np.int32),
        "flags": np.array([True, False, True]),
        "image": rng.integers(0, 255, (2, 3, 4, 4), dtype=np.uint8),
        "nothing": np.empty((0, 2), np.int64),
    }
    for name, tensor in send(arrays, th.device("cpu")).items():
        assert np.array_equal(tensor.numpy(), arrays[name]) and tensor.numpy().dtype == arrays[name].dtype


def run_alone(script: str) -> str:
    """What a script beside this file prints; skips where there is no compiler."""
    here = pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, here / script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.startswith("no compiler"):
        pytest.skip(done.stdout.strip())
    return done.stdout.strip()


def test_planning_storing_and_drawing_move_nothing_between_devices():
    """But for one transfer an observation and one a step, and VecNormalize's statistics when they have changed."""
    assert run_alone("fake_cuda.py").endswith("one device")


@pytest.mark.slow
def test_kernels_of_a_plan_and_an_update_stay_within_their_budget():
    """At the paper's size, by inductor's scheduler."""
    word, plan, of_model, of_policy = run_alone("kernel_budget.py").splitlines()[-1].split()
    assert word == "kernels" and int(plan) <= 500 and int(of_model) <= 230 and int(of_policy) <= 55
