"""Zip files, parameters and replay buffers come back as they were; as SB3's own test_save_load."""

import io
import subprocess
import sys
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom import BOOM
from sb3_boom.checks import FORMAT_VERSION

PENDULUM = "Pendulum-v1"


@pytest.fixture(scope="module")
def model() -> BOOM:
    return BOOM("MlpPolicy", PENDULUM, **TINY).learn(40)


def observations(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, 3)).astype(np.float32)


def same_parameters(a: BOOM, b: BOOM) -> bool:
    ours, theirs = a.policy.state_dict(), b.policy.state_dict()
    return ours.keys() == theirs.keys() and all(th.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["str", "path", "file"])
def test_archive_is_read_from_where_it_was_written(model, kind, tmp_path):
    path = {"str": str(tmp_path / "model"), "path": tmp_path / "model.zip", "file": io.BytesIO()}[kind]
    model.save(path)
    if kind == "file":
        path.seek(0)
    loaded = BOOM.load(path)
    assert isinstance(loaded, BOOM) and same_parameters(loaded, model)
    assert loaded.policy.q_scale == model.policy.q_scale
    for name in ("model_optimizer", "actor_optimizer"):
        ours, theirs = (getattr(m.policy, name).state_dict()["state"] for m in (model, loaded))
        assert ours.keys() == theirs.keys() and len(ours) > 0
        assert all(th.equal(ours[i]["exp_avg"], theirs[i]["exp_avg"]) for i in ours)


def test_resolved_settings_are_stored_not_auto(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model")
    for name in ("gamma", "learning_starts", "pretrain_steps", "align_coef", "align_scale"):
        assert getattr(loaded, name) == getattr(model, name) != "auto"


def test_exclude_include_and_custom_objects(model, tmp_path):
    model.save(tmp_path / "model", exclude=["verbose"], include=["replay_buffer"])
    loaded = BOOM.load(tmp_path / "model", custom_objects=dict(learning_rate=1e-5, lr_schedule=lambda _: 1e-5))
    assert loaded.learning_rate == 1e-5 and loaded.lr_schedule(1.0) == 1e-5
    assert "verbose" not in zipfile.ZipFile(tmp_path / "model.zip").read("data").decode()
    assert loaded.replay_buffer.size() == model.replay_buffer.size()


def test_constructor_arguments_override_when_loading(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model", env=gym.make(PENDULUM), buffer_size=1, learning_rate=1e-5, seed=3, batch_size=4)
    assert loaded.replay_buffer.buffer_size == 1 and loaded.batch_size == 4 and loaded.seed == 3
    assert loaded.lr_schedule(1.0) == 1e-5
    loaded.learn(3)
    assert loaded.policy.model_optimizer.param_groups[1]["lr"] == 1e-5


def test_encoders_part_of_the_learning_rate_can_be_changed_when_loading(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model", env=gym.make(PENDULUM), encoder_lr_scale=0.9)
    loaded.learn(25)
    loaded.set_parameters(model.get_parameters())  # which have their own
    loaded.learn(3)
    encoder, others = loaded.policy.model_optimizer.param_groups
    assert encoder["lr"] == pytest.approx(0.9 * others["lr"])


def test_changed_networks_are_refused(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="handle_terminations"):
        BOOM.load(tmp_path / "model", handle_terminations=False)


@pytest.mark.parametrize("sampling", ["uniform", "episode"])
def test_loaded_without_its_buffer_a_model_plans_but_waits_for_data(model, sampling, tmp_path):
    model.save(tmp_path / "model")
    env = make_vec_env(PENDULUM, env_kwargs=dict(max_episode_steps=30))
    loaded = BOOM.load(tmp_path / "model", env=env, replay_buffer_kwargs=dict(sampling=sampling))
    done = loaded._n_updates
    loaded.learn(19)
    assert loaded._n_updates == done and loaded.replay_buffer._storage["steps"][0, 0, 2] < 7.0  # the planner's std
    loaded.learn(21, reset_num_timesteps=False)
    assert loaded._n_updates == done + (21 if sampling == "uniform" else 11)  # the first episode ends at step 30


def test_saving_the_empty_buffer_of_a_loaded_model_warns(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model", env=model.get_env())
    with pytest.warns(UserWarning, match="save it from the model that learned"):
        loaded.save_replay_buffer(tmp_path / "buffer")


@pytest.mark.parametrize(
    ("settings", "message"), [(dict(n_envs=2), "n_envs=2"), (dict(env_id="InvertedPendulum-v5"), "observation_space")]
)
def test_buffer_of_another_model_is_refused(model, settings, message, tmp_path):
    env = make_vec_env(settings.get("env_id", PENDULUM), n_envs=settings.get("n_envs", 1))
    BOOM("MlpPolicy", env, **TINY).learn(8).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=message):
        model.load_replay_buffer(tmp_path / "buffer")


def test_buffers_windows_are_as_long_as_the_models_horizon(model, tmp_path):
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = BOOM.load(tmp_path / "model", env=gym.make(PENDULUM), horizon=2)
    loaded.load_replay_buffer(tmp_path / "buffer")
    done = loaded._n_updates
    assert loaded.learn(3)._n_updates == done + 3


@pytest.mark.parametrize("kwargs", [dict(sampling="episode"), dict(value_temperature=0.5)])
def test_buffer_draws_as_the_model_it_is_loaded_into(kwargs, tmp_path):
    env = make_vec_env(PENDULUM, env_kwargs=dict(max_episode_steps=10))
    model = BOOM("MlpPolicy", env, **TINY).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = BOOM.load(tmp_path / "model", env=env, replay_buffer_kwargs=kwargs)
    loaded.load_replay_buffer(tmp_path / "buffer")
    buffer = loaded.replay_buffer
    assert dict(sampling=buffer.sampling, value_temperature=buffer.value_temperature).items() >= kwargs.items()
    loaded.learn(5)
    loaded.save_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer")
    assert (model.replay_buffer.sampling, model.replay_buffer.value_temperature) == ("uniform", None)
    model.learn(5)


def test_a_file_that_is_no_buffer_is_refused_and_changes_nothing(tmp_path):
    model = BOOM("MlpPolicy", PENDULUM, **TINY).learn(25)
    save_to_pkl(tmp_path / "buffer.pkl", dict(), verbose=0)
    with pytest.raises(ValueError, match="must be a WeightedReplayBuffer, not dict"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer.size() == 25
    model.learn(2)


class OwnBOOM(BOOM):
    def __init__(self, *args, own=1, **kwargs):
        self.own = own
        super().__init__(*args, **kwargs)


def test_subclass_with_arguments_of_its_own_is_loaded_with_them(model, tmp_path):
    own = OwnBOOM("MlpPolicy", PENDULUM, own=2, **TINY)
    own.save(tmp_path / "model")
    assert OwnBOOM.load(tmp_path / "model").own == 2
    loaded = OwnBOOM.load(tmp_path / "model", own=3, batch_size=4)
    assert loaded.own == 3 and loaded.batch_size == 4
    with pytest.raises(TypeError, match=r"OwnBOOM.load\(\) got unexpected arguments onw"):
        OwnBOOM.load(tmp_path / "model", onw=3)


def test_changed_policy_kwargs_are_refused(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="policy kwargs"):
        BOOM.load(tmp_path / "model", policy_kwargs=dict(model_size="1M"))
    BOOM.load(tmp_path / "model", policy_kwargs=TINY["policy_kwargs"])  # the same ones are fine


def test_environment_with_other_spaces_is_refused(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="spaces"):
        BOOM.load(tmp_path / "model", env=gym.make("MountainCarContinuous-v0"))
    with pytest.raises(ValueError, match="spaces"):
        model.set_env(gym.make("MountainCarContinuous-v0"))


def test_archive_of_a_later_format_is_refused_before_it_is_unpickled(model, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as saved, zipfile.ZipFile(tmp_path / "later.zip", "w") as archive:
        for name in saved.namelist():
            archive.writestr(
                name, saved.read(name).replace(f'"format_version": {FORMAT_VERSION}'.encode(), b'"format_version": 99')
            )
    monkeypatch.setattr("stable_baselines3.common.save_util.json_to_data", None)  # would unpickle
    with pytest.raises(ValueError, match="99"):
        BOOM.load(tmp_path / "later.zip")


def test_archive_of_sac_is_refused(tmp_path):
    SAC("MlpPolicy", PENDULUM, buffer_size=1).save(tmp_path / "sac")
    with pytest.raises(ValueError, match="another algorithm"):
        BOOM.load(tmp_path / "sac")


def test_parameters_are_exchanged_exactly_or_in_part(model):
    other = BOOM("MlpPolicy", PENDULUM, **dict(TINY, seed=5))
    assert not same_parameters(other, model)
    parameters = model.get_parameters()
    assert set(parameters) == {"policy", "policy.model_optimizer", "policy.actor_optimizer"}
    other.set_parameters(parameters)
    assert same_parameters(other, model)
    with pytest.raises(ValueError):
        other.set_parameters({"policy": parameters["policy"]}, exact_match=True)
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)


def test_deterministic_prediction_is_the_same_alone_in_a_batch_and_in_another_process(model, tmp_path):
    batch = observations()
    actions, _ = model.predict(batch, deterministic=True)
    for observation, action in zip(batch, actions, strict=True):
        np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], action, rtol=0, atol=1e-5)
    model.save(tmp_path / "model")
    np.save(tmp_path / "batch.npy", batch)
    program = (
        "import sys, numpy as np; from sb3_boom import BOOM; import torch as th; th.set_num_threads(1); "
        "model = BOOM.load(sys.argv[1] + '/model'); "
        "np.save(sys.argv[1] + '/actions.npy', model.predict(np.load(sys.argv[1] + '/batch.npy'), deterministic=True)[0])"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), actions)


@pytest.mark.parametrize("n_steps", [30, 61, 150], ids=["half-full", "mid-episode", "wrapped"])
def test_replay_buffer_comes_back(n_steps, tmp_path):
    """And learning goes on in it: what is drawn next is the same."""
    env = make_vec_env(PENDULUM, n_envs=2, seed=0)
    model = BOOM("MlpPolicy", env, **dict(TINY, buffer_size=100)).learn(n_steps)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = BOOM.load(tmp_path / "model", env=env)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == model.replay_buffer.size() and loaded.replay_buffer.full == model.replay_buffer.full
    batches = []
    for m in (model, loaded):
        th.manual_seed(1)
        batches.append(m.replay_buffer.sample(32))
    for ours, theirs in zip(*batches, strict=True):
        assert th.equal(ours, theirs)
    before = loaded._n_updates
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded._n_updates == before + 5 and loaded.pretrain_updates == model.pretrain_updates  # no second warm-up


def test_normalised_environment_round_trip(tmp_path):
    env = VecNormalize(make_vec_env(PENDULUM, n_envs=2, seed=0))
    model = BOOM("MlpPolicy", env, **TINY).learn(60)
    model.save(tmp_path / "model")
    env.save(tmp_path / "statistics.pkl")
    again = VecNormalize.load(tmp_path / "statistics.pkl", make_vec_env(PENDULUM, n_envs=2, seed=0))
    again.training = False
    loaded = BOOM.load(tmp_path / "model", env=again)
    observation = again.normalize_obs(observations(2))
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    evaluate_policy(loaded, again, n_eval_episodes=2)
    assert loaded.replay_buffer.size() == 0


def test_environment_can_be_changed_for_another_of_the_same_spaces(model):
    class Other(gym.Wrapper):
        pass

    learner = BOOM("MlpPolicy", PENDULUM, **TINY).learn(30)
    learner.set_env(Other(gym.make(PENDULUM)))
    learner.learn(20, reset_num_timesteps=False)
    assert learner.num_timesteps == 50
