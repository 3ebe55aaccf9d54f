"""An exported model acts as the one it was exported from."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_PLANNER, TINY_POLICY, OneLayer
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_boom import BOOM, cli
from sb3_boom.core import kernels, planner
from sb3_boom.deployment import Agent, model_file

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4
N = 50
FLOATS = spaces.Box(-1.0, 1.0, (3,), np.float32)
KINDS = {
    "vector": dict(
        space=FLOATS,
        actions=spaces.Box(np.float32([-2.0, 0.0]), np.float32([2.0, 5.0])),
        normalize=True,
        terminations=1.0,
        planner_kwargs=dict(max_std=0.4),  # few actions at a bound, where candidates that end at once would tie
    ),
    "dict": dict(
        policy="MultiInputPolicy",
        space=spaces.Dict(
            {
                "camera": spaces.Box(0, 255, (36, 40, 3), np.uint8),
                "joints": spaces.Box(-10.0, 10.0, (2, 2), np.float64),
                "mode": spaces.Discrete(4),
                "switches": spaces.MultiBinary(3),
            }
        ),
        actions=spaces.Box(-1.0, 3.0, (2, 1), np.float64),
    ),
    "image": dict(
        policy="CnnPolicy", space=spaces.Box(0, 255, (36, 36, 3), np.uint8), planner_kwargs=dict(horizon_value="min")
    ),
    "extractor": dict(
        space=spaces.Box(-5.0, 5.0, (2, 3), np.float64),
        actions=spaces.Box(-3, 100, (2,), np.int32),
        normalize=True,
        settings=dict(planner="cem", horizon=2, handle_terminations=False),
        planner_kwargs=dict(n_policy_samples=0),
        policy_kwargs=dict(simnorm_dim=None, n_critics=2, features_extractor_class=OneLayer),
    ),
}


def load(path, **settings) -> Agent:
    """An agent, without the trial in a process of its own (tests/test_trust.py)."""
    return Agent.load(path, check=False, **settings)


class Env(gym.Env):
    """Random observations of any space."""

    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def make_model(kind: str) -> BOOM:
    """A model whose networks are random in every parameter, so that no two values tie."""
    case = KINDS[kind]
    env = DummyVecEnv([lambda: Env(case["space"], case.get("actions", spaces.Box(-1.0, 1.0, (1,))))])
    if case.get("normalize"):
        env = VecNormalize(env, norm_reward=False, clip_obs=2.0)
        env.obs_rms.mean = np.full(env.observation_space.shape, 0.3)
        env.obs_rms.var = np.full(env.observation_space.shape, 0.2)
    model = BOOM(
        case.get("policy", "MlpPolicy"),
        env,
        **{
            **TINY,
            **case.get("settings", {}),
            "policy_kwargs": {**TINY_POLICY, **case.get("policy_kwargs", {})},
            "planner_kwargs": {**TINY_PLANNER, "n_iterations": 3, **case.get("planner_kwargs", {})},
        },
    )
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * th.randn(parameter.shape, generator=generator)
        model.policy.terminations_seen.fill_(case.get("terminations", 0.0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module", params=list(KINDS))
def exported(request, folder):
    model = make_model(request.param)
    return model, load(model.export(folder / request.param))


@pytest.fixture(scope="module")
def vector(folder):
    path = folder / "vector.onnx"
    model = make_model("vector")
    return model, path if path.exists() else model.export(path)


def observations(model: BOOM, n: int = N):
    env = model.env.envs[0]
    env.observation_space.seed(0)
    samples = [env.observation_space.sample() for _ in range(n)]
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def as_the_model_sees(model: BOOM, obs):
    normalizer = model.get_vec_normalize_env()
    return obs if normalizer is None else normalizer.normalize_obs(obs)


def torch_plan(model: BOOM, obs, mean, noise):
    policy = model.policy
    tensors, _ = policy.obs_to_tensor(as_the_model_sees(model, obs))
    with th.no_grad():
        z = policy.world_model.encode(policy.features(tensors))
        return planner.plan(
            policy.world_model, policy.actor, policy.critic, policy.planner_config, z, mean, noise, policy.terminations_seen
        )


def as_arrays(noise) -> dict[str, np.ndarray]:
    names = ("policy", "candidates", "terminal", "elite", "critic_pairs")
    return {name: getattr(noise, name).numpy() for name in names}


def test_the_same_noise_gives_the_same_plan(exported):
    model, agent = exported
    th.manual_seed(0)
    obs, noise = observations(model), model.policy._noise(N)
    mean = 0.3 * th.randn(N, model.horizon, model.policy.action_dim)
    expected = torch_plan(model, obs, mean, noise)
    action, next_mean, _ = agent.plan(obs, mean.numpy(), as_arrays(noise))
    wanted = model.policy.to_action_space(expected.planner_action.numpy())
    assert action.dtype == wanted.dtype == model.action_space.dtype and action.shape == wanted.shape
    # an elite as good as another to rounding may take its place: hardly ever in random networks
    equal = np.isclose(action, wanted, atol=TOLERANCE).reshape(N, -1).all(axis=1)
    equal_means = np.isclose(next_mean, expected.mean.numpy(), atol=1e-3).reshape(N, -1).all(axis=1)
    assert equal.mean() >= 0.96 and equal_means.mean() >= 0.96


def test_prior_is_the_models(exported):
    model, agent = exported
    obs = observations(model)
    wanted, _ = model.prior.predict(as_the_model_sees(model, obs), deterministic=True)
    assert np.allclose(agent.prior(obs), wanted, atol=TOLERANCE)


def test_one_observation_is_a_batch_of_one_and_deterministic_in_any_batch(exported):
    model, agent = exported
    obs = observations(model, 4)
    batch, state = agent.predict(obs, deterministic=True)
    one = {key: value[2] for key, value in obs.items()} if isinstance(obs, dict) else obs[2]
    action, _ = agent.predict(one, deterministic=True)
    assert action.shape == model.action_space.shape and np.allclose(action, batch[2], atol=TOLERANCE)
    assert state[0].shape == (4, model.horizon, model.policy.action_dim)
    again, _ = agent.predict(obs, deterministic=True)
    assert (again == batch).all()
    assert np.allclose(batch, model.policy.to_action_space(state[0][:, 0]), atol=TOLERANCE)  # the elites' mean
    assert (batch >= model.action_space.low).all() and (batch <= model.action_space.high).all()


def test_iterations_one_by_one_are_the_whole_plan(exported):
    model, agent = exported
    obs = observations(model, 2)
    whole, state = agent.predict(obs, deterministic=True)
    agent.deadline_ms = 1e6
    try:
        stepwise, next_state = agent.predict(obs, deterministic=True)
    finally:
        agent.deadline_ms = None
    assert agent.iterations_done == model.policy.planner_config.n_iterations
    assert np.allclose(stepwise, whole, atol=TOLERANCE) and np.allclose(next_state[0], state[0], atol=1e-3)


def test_a_deadline_that_has_passed_leaves_the_prior_and_the_old_plan_a_step_later(vector):
    model, path = vector
    agent = load(path, deadline_ms=1e-6)
    obs, mean = observations(model, 2), np.random.default_rng(0).uniform(-1, 1, (2, 3, 2)).astype(np.float32)
    action, state = agent.predict(obs, (mean,))
    assert agent.iterations_done == 0
    assert np.allclose(action, agent.prior(obs), atol=1e-6)
    assert np.array_equal(state[0], np.concatenate([mean[:, 1:], np.zeros_like(mean[:, :1])], axis=1))


def test_agent_goes_on_from_its_last_plan_until_reset(vector):
    model, path = vector
    agent, obs = load(path), observations(model, 2)
    first, state = agent.predict(obs, deterministic=True)
    second, _ = agent.predict(obs, state, deterministic=True)
    assert (agent(obs, deterministic=True) == first).all()
    assert (agent(obs, deterministic=True) == second).all() and (first != second).any()
    agent.reset([1])
    third = agent(obs, deterministic=True)
    assert np.allclose(third[1], first[1], atol=TOLERANCE) and (third[0] != first[0]).any()
    agent.reset()
    assert (agent(obs, deterministic=True) == first).all()
    with pytest.raises(ValueError, match="2 robots in the last call, now 1"):
        agent(obs[0])
    _, started = agent.predict(obs, state, np.array([False, True]), deterministic=True)
    _, cold = agent.predict(obs, deterministic=True)
    assert np.allclose(started[0][1], cold[0][1], atol=1e-5) and not np.allclose(started[0][0], cold[0][0])


def test_seeded_noise_repeats(vector):
    model, path = vector
    obs = observations(model, 3)
    a, b, c = (load(path, seed=seed)(obs) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()


def test_images_may_have_their_channels_first_or_last(folder):
    model, agent = make_model("image"), load(folder / "image.onnx")
    last = model.env.envs[0].observation_space.sample()
    assert (agent.predict(last, deterministic=True)[0] == agent.predict(last.transpose(2, 0, 1), deterministic=True)[0]).all()


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (np.zeros(4), "shape"),
        (np.zeros((2, 2, 3)), "shape"),
        (np.float32([0, np.nan, 0]), r"NaN or infinite at index \(1,\)"),
        ({"observation": np.zeros(3)}, "must be an array"),
        ("text", "shape"),
    ],
)
def test_wrong_observations_are_refused(vector, obs, message):
    agent = load(vector[1])
    with pytest.raises(ValueError, match=message):
        agent(obs)


def test_wrong_dict_observations_are_refused(folder):
    agent = load(folder / "dict.onnx")
    obs = observations(make_model("dict"), 2)
    for change, message in (
        (dict(mode=np.array([0, 4])), "mode must be at least 0 and below"),
        (dict(mode=np.array([0.5, 1.0])), "whole numbers"),
        (dict(mode=np.array([1, 2, 3])), "different numbers of robots"),
        (dict(camera=np.zeros((2, 36, 36, 3), np.uint8)), "camera must be of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            agent({**obs, **change})
    with pytest.raises(ValueError, match="has no camera"):
        agent({"mode": obs["mode"]})


@pytest.mark.parametrize("settings", [dict(threads=0), dict(deadline_ms=0.0), dict(deadline_ms=float("nan"))])
def test_wrong_settings_are_refused(vector, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        load(vector[1], **settings)


def test_prior_alone(vector, tmp_path):
    model, _ = vector
    path = model.export(tmp_path / "prior", prior_only=True)
    assert path == tmp_path / "prior.onnx" and path.stat().st_size < vector[1].stat().st_size / 3
    agent, obs = load(path), observations(model)
    wanted, _ = model.prior.predict(as_the_model_sees(model, obs), deterministic=True)
    assert np.allclose(agent(obs), wanted, atol=TOLERANCE) and np.allclose(agent.prior(obs[0]), wanted[0], atol=TOLERANCE)
    assert agent.predict(obs)[1] is None


def test_metadata_says_what_a_runner_must_know(vector):
    model, path = vector
    told = model_file.read(path)[1]
    assert told["format_version"] == 1 and told["kind"] == "planner" and told["torch"] == th.__version__
    assert told["observation"] == {"observation": dict(kind="box", shape=[3], dtype="float32")}
    assert told["action"] == dict(shape=[2], dtype="float32", low=[-2.0, 0.0], high=[2.0, 5.0])
    assert told["normalization"] == dict(observations=["observation"], epsilon=1e-8, clip_obs=2.0)
    assert told["planner"]["n_iterations"] == 3 and told["planner"]["gamma"] == model.gamma
    assert told["warm_start"] == ["n_envs", 3, 2] and told["num_timesteps"] == 0 and told["env_id"] is None
    # where other programs look for it
    (entry,) = onnx.load(path).metadata_props
    assert json.loads(entry.value) == told


def test_compiled_model_exports_without_its_kernels(vector, tmp_path, monkeypatch):
    model, _ = vector
    monkeypatch.setattr(kernels, "loaded", True)  # torch.export is taken for a compiler
    parameters = {name: value.clone() for name, value in model.policy.state_dict().items()}
    exported = model.export(tmp_path / "again", prior_only=True)
    assert {node.domain for node in onnx.load(exported).graph.node} == {""} and kernels.loaded is True
    assert all(th.equal(value, parameters[name]) for name, value in model.policy.state_dict().items())


class BatchInPython(OneLayer):
    """Looks at the batch's size as a number."""

    def forward(self, observations):
        return super().forward(observations) * th.ones(len(observations), 1)


def test_extractor_that_fixes_the_batch_is_refused(tmp_path):
    env = DummyVecEnv([lambda: Env(FLOATS, FLOATS)])
    policy_kwargs = {**TINY_POLICY, "features_extractor_class": BatchInPython}
    model = BOOM("MlpPolicy", env, **{**TINY, "policy_kwargs": policy_kwargs})
    with pytest.raises(ValueError, match="features extractor"):
        model.export(tmp_path / "model", prior_only=True)
    assert list(tmp_path.iterdir()) == []


def test_agent_is_evaluated_as_a_model(vector):
    _, path = vector
    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(Env(KINDS["vector"]["space"], KINDS["vector"]["actions"]), 3)] * 2)
    assert evaluate_policy(load(path), env, n_eval_episodes=2, warn=False) == (0.0, 0.0)


BARE = """
import sys, time
class Unimportable:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "stable_baselines3", "gymnasium", "onnx", "onnxscript", "scipy", "pandas"):
            raise ImportError(name)
sys.meta_path.insert(0, Unimportable())
start = time.process_time()
from sb3_boom.deployment import Agent
seconds = time.process_time() - start
import numpy as np
assert "onnxruntime" not in sys.modules
agent = Agent.load(sys.argv[1])
print(seconds, agent(np.zeros((2, 3), np.float32)).shape)
"""


def test_agent_needs_numpy_and_onnxruntime_alone_and_imports_at_once(vector):
    command = [sys.executable, "-c", BARE, str(vector[1])]
    seconds, shape = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert shape.strip() == "(2, 2)" and float(seconds) < 0.3


def test_cpp_example_acts(vector, tmp_path):
    """Where onnxruntime's C++ API is installed (Debian 13: libonnxruntime-dev), or unpacked where ONNXRUNTIME says."""
    source, build = pathlib.Path(__file__).parents[1] / "examples" / "cpp", tmp_path / "build"
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    place = [f"-DONNXRUNTIME={os.environ['ONNXRUNTIME']}"] if "ONNXRUNTIME" in os.environ else []
    configured = subprocess.run(["cmake", "-S", source, "-B", build, *place], capture_output=True, text=True, check=False)
    if "onnxruntime_cxx_api.h" in configured.stderr or "ONNXRUNTIME" in configured.stderr:
        pytest.skip("onnxruntime's C++ API is not installed")
    subprocess.run(["cmake", "--build", build], capture_output=True, check=True)
    run = subprocess.run([build / "boom_agent", vector[1], "3"], capture_output=True, text=True, check=True)
    prior, planner = run.stdout.splitlines()
    wanted = load(vector[1]).prior(np.zeros(3, np.float32))
    assert np.allclose([float(word) for word in prior.split()[-2:]], wanted, atol=1e-3)
    assert planner.startswith("planner: median") and len(planner.split()) == 8


def test_command_exports_with_the_statistics_it_is_given(vector, tmp_path, capsys, monkeypatch):
    model, _ = vector
    model.save(tmp_path / "model.zip")
    model.env.save(str(tmp_path / "vecnormalize.pkl"))
    monkeypatch.setattr(
        sys, "argv", ["sb3-boom", "export", str(tmp_path / "model.zip"), str(tmp_path / "out"), "--prior-only"]
    )
    cli.main()
    assert "vecnormalize.pkl is left out" in capsys.readouterr().err
    assert load(tmp_path / "out.onnx").metadata["normalization"] is None
    sys.argv += ["--vec-normalize", str(tmp_path / "vecnormalize.pkl"), "--env", "Robot-v0"]
    cli.main()
    agent = load(tmp_path / "out.onnx")
    obs = observations(model)
    wanted, _ = model.prior.predict(as_the_model_sees(model, obs), deterministic=True)
    assert np.allclose(agent(obs), wanted, atol=TOLERANCE) and agent.metadata["env_id"] == "Robot-v0"
    assert capsys.readouterr().out.endswith("out.onnx\n")
    sys.argv.append("--untrusted")
    with pytest.raises(SystemExit):
        cli.main()
    assert "--vec-normalize names a pickle" in capsys.readouterr().err
