"""Observations and actions of every kind that SB3 preprocesses; as SB3's own test_spaces, test_cnn and test_dict_env."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY, OneLayer
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_boom import BOOM, MlpPolicy
from sb3_boom.core.augmentation import random_shift
from sb3_boom.prior import PolicyPrior

SMALL_IMAGES = dict(TINY, buffer_size=200)


class AnySpaceEnv(gym.Env):
    """Observations sampled from a space; episodes of seven steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box | None = None) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(-1, 1, (1,))
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self.steps >= 7, {}


def learn_save_load_predict(model: BOOM, path) -> None:
    """What every kind of space has to survive."""
    model.learn(40)
    assert model._n_updates > 0
    observation = model.get_env().reset()
    action, _ = model.predict(observation, deterministic=True)
    assert action.shape == (model.n_envs, *model.action_space.shape) and action.dtype == model.action_space.dtype
    model.save(path / "model")
    loaded = BOOM.load(path / "model", device="cpu")
    again, _ = loaded.predict(observation, deterministic=True)
    np.testing.assert_array_equal(again, action)
    one = {key: value[0] for key, value in observation.items()} if isinstance(observation, dict) else observation[0]
    assert loaded.predict(one)[0].shape == model.action_space.shape


OBSERVATION_SPACES = {
    "float32": spaces.Box(-2, 2, (3,), np.float32),
    "float64 matrix": spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
    "uint8 vector": spaces.Box(0, 255, (4,), np.uint8),
    "int64 vector": spaces.Box(-5, 5, (4,), np.int64),
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([3, 4]),
    "multi-binary": spaces.MultiBinary(6),
}


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_observations_of_every_space(name, n_envs, tmp_path):
    env = make_vec_env(lambda: AnySpaceEnv(OBSERVATION_SPACES[name]), n_envs=n_envs)
    learn_save_load_predict(BOOM("MlpPolicy", env, **TINY), tmp_path)


ACTION_SPACES = {
    "asymmetric": spaces.Box(-3.0, 0.5, (1,)),
    "each its own bounds": spaces.Box(np.array([-1.0, 0.0, 5.0], np.float32), np.array([0.0, 3.0, 9.0], np.float32)),
    "matrix": spaces.Box(-1.0, 2.0, (2, 2)),
    "float64": spaces.Box(-1.0, 1.0, (2,), np.float64),
}


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_actions_of_every_space(name, tmp_path):
    env = AnySpaceEnv(spaces.Box(-1, 1, (3,)), ACTION_SPACES[name])  # asserts that actions are in the space
    check_env(env, warn=False)
    learn_save_load_predict(BOOM("MlpPolicy", env, **TINY), tmp_path)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("size", [64, 84])
def test_images(channel_first, size, tmp_path):
    env = FakeImageEnv(screen_height=size, screen_width=size, n_channels=3, discrete=False, channel_first=channel_first)
    model = BOOM("CnnPolicy", env, **SMALL_IMAGES)
    assert isinstance(model.get_env(), VecTransposeImage) != channel_first
    learn_save_load_predict(model, tmp_path)
    stored = model.replay_buffer._storage["obs/"]
    assert stored.dtype == th.uint8 and stored.shape[2:] == (3, size, size)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MultiInputPolicy"])
def test_features_of_dark_images_differ_from_the_start(policy):
    """Else the latents' consistency pulls them all to one point before anything is seen."""
    space = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    images = np.zeros((16, 3, 64, 64), np.uint8)
    for i, image in enumerate(images):
        image[:, 20:40, 3 * i : 3 * i + 4] = 60  # a dim bar, elsewhere in every image
    env = AnySpaceEnv(space if policy == "CnnPolicy" else spaces.Dict({"a": space}))
    model = BOOM(policy, env, **SMALL_IMAGES)
    obs, _ = model.policy.obs_to_tensor(images if policy == "CnnPolicy" else {"a": images})
    features = model.policy.features(obs)
    assert features.std(dim=0).mean() > 0.5 * features.abs().mean()


class TrainedCNN(NatureCNN):
    """A user's own network, which would have loaded its weights."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        th.nn.init.constant_(self.cnn[0].weight, 0.5)


def test_features_extractor_of_ones_own_starts_as_it_was_made():
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=True)
    policy_kwargs = dict(TINY["policy_kwargs"], features_extractor_class=TrainedCNN)
    model = BOOM("CnnPolicy", env, **dict(SMALL_IMAGES, policy_kwargs=policy_kwargs))
    assert (model.policy.features_extractor.cnn[0].weight == 0.5).all()


def test_images_are_shifted_while_learning_only(monkeypatch):
    shifted = []
    monkeypatch.setattr("sb3_boom.policies.random_shift", lambda images, by: shifted.append((len(images), by)) or images)
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=True)
    model = BOOM("CnnPolicy", env, **SMALL_IMAGES).learn(30)
    n_updates = model._n_updates
    assert shifted == [(16, 3), (3 * 16, 3)] * n_updates
    model.predict(model.get_env().reset())
    assert len(shifted) == 2 * n_updates
    without = dict(SMALL_IMAGES, policy_kwargs=dict(TINY["policy_kwargs"], image_shift=0))
    BOOM("CnnPolicy", env, **without).learn(30)
    assert len(shifted) == 2 * n_updates


def test_vectors_are_never_shifted():
    policy = BOOM("MlpPolicy", AnySpaceEnv(spaces.Box(0, 255, (4,), np.uint8)), **TINY).policy
    obs = th.randint(255, (5, 4), dtype=th.uint8)
    assert policy.augment(obs) is obs


def test_shifts_move_whole_images_and_repeat_their_border():
    th.manual_seed(0)
    images = th.arange(2 * 9 * 7).view(1, 2, 9, 7).repeat(200, 1, 1, 1)
    seen = set()
    for shifted in random_shift(images, 2):
        row, column = divmod(int(shifted[0, 4, 3]), 7)
        down, right = row - 4, column - 3
        seen.add((down, right))
        rows, columns = (th.arange(9) + down).clamp(0, 8), (th.arange(7) + right).clamp(0, 6)
        assert th.equal(shifted, images[0][:, rows][:, :, columns])
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_stacked_frames(tmp_path):
    env = make_vec_env(lambda: FakeImageEnv(screen_height=64, screen_width=64, n_channels=1, discrete=False), n_envs=2)
    model = BOOM("CnnPolicy", VecFrameStack(env, 3), **SMALL_IMAGES)
    learn_save_load_predict(model, tmp_path)
    assert model.observation_space.shape == (3, 64, 64)


def test_images_normalised_before_they_are_transposed_are_refused():
    class Pictures(gym.Env):
        observation_space, action_space = spaces.Box(0, 255, (40, 36, 3), np.uint8), spaces.Box(-1.0, 1.0, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    env = DummyVecEnv([Pictures])
    with pytest.raises(ValueError, match=r"wrap the other way round, VecNormalize\(VecTransposeImage"):
        BOOM("CnnPolicy", VecNormalize(env, norm_obs=False), **TINY).learn(2)
    BOOM("CnnPolicy", VecNormalize(VecTransposeImage(env), norm_obs=False), **TINY).learn(2)


def test_dictionaries_of_images_and_vectors(tmp_path):
    env = SimpleMultiObsEnv(num_col=4, num_row=4, random_start=False, discrete_actions=False, channel_last=False)
    learn_save_load_predict(BOOM("MultiInputPolicy", env, **SMALL_IMAGES), tmp_path)


def test_dictionaries_of_several_environments_normalised(tmp_path):
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3), "c": spaces.Box(5, 9, (2, 2))})
    env = VecNormalize(make_vec_env(lambda: AnySpaceEnv(space), n_envs=2), norm_obs_keys=["a", "c"])
    model = BOOM("MultiInputPolicy", env, **TINY)
    learn_save_load_predict(model, tmp_path)
    stored = model.replay_buffer._storage["obs/c"][: model.replay_buffer.size()]
    assert stored.amin() >= 5.0  # as the environment gave it


def test_features_extractor_of_ones_own_learns_with_the_encoder(tmp_path):
    env = AnySpaceEnv(spaces.Box(-1, 1, (2, 3)))
    policy_kwargs = dict(
        TINY["policy_kwargs"], features_extractor_class=OneLayer, features_extractor_kwargs=dict(features_dim=7)
    )
    model = BOOM("MlpPolicy", env, **dict(TINY, policy_kwargs=policy_kwargs))
    before = model.policy.features_extractor.layer.weight.detach().clone()
    learn_save_load_predict(model, tmp_path)
    assert not th.equal(model.policy.features_extractor.layer.weight, before)
    assert model.policy.world_model.encoder[0].linear.in_features == 7
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)


class Normalised(BaseFeaturesExtractor):
    """What differs between training and evaluation: batch statistics."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, observation_space.shape[0])
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(observations)


def test_updates_train_and_predictions_evaluate_the_networks():
    """As SB3's test_train_eval_mode: batch statistics follow the updates, never a prediction or a plan."""
    env = AnySpaceEnv(spaces.Box(-1, 1, (3,)))
    policy_kwargs = dict(TINY["policy_kwargs"], features_extractor_class=Normalised)
    model = BOOM("MlpPolicy", env, **dict(TINY, policy_kwargs=policy_kwargs, gradient_steps=0, pretrain_steps=0))
    norm = model.policy.features_extractor.norm
    model.learn(60)
    obs = model.get_env().reset()
    before = norm.running_mean.clone()
    actions = [model.predict(obs, deterministic=True)[0] for _ in range(2)]
    assert np.array_equal(*actions) and th.equal(norm.running_mean, before) and not before.any()
    model.train(1, 16)
    after = norm.running_mean.clone()
    assert not th.equal(after, before)
    for predict in (model.predict, model.prior.predict):
        predict(obs)
    assert th.equal(norm.running_mean, after)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_integer_actions_reach_their_bounds(dtype):
    low, high = (0, 9) if dtype == np.int64 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    policy = BOOM("MlpPolicy", AnySpaceEnv(spaces.Box(-1, 1, (3,)), spaces.Box(low, high, (1,), dtype)), **TINY).policy
    assert policy.to_action_space(np.array([[-1.0], [0.99], [1.0]])).ravel().tolist() == [
        low,
        round(high - 0.005 * (high - low)),
        high,
    ]
    actions = np.array([[low], [high]], dtype)
    assert policy.from_action_space(actions).ravel().tolist() == [-1.0, 1.0]
    with th.no_grad():
        policy.actor.net[-1].bias[:] = 100.0  # squashed to 1
    assert PolicyPrior(policy).predict(np.zeros(3, np.float32), deterministic=True)[0] == high


class DroppingPolicy(MlpPolicy):
    """A policy whose own layers know modes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.world_model.encoder.append(th.nn.Dropout(0.5))


def test_layers_of_ones_own_policy_are_told_the_mode():
    model = BOOM(DroppingPolicy, AnySpaceEnv(spaces.Box(-1, 1, (3,))), **TINY)
    model.policy.set_training_mode(False)
    assert not model.policy.world_model.encoder[-1].training
    model.policy.set_training_mode(True)
    assert model.policy.world_model.encoder[-1].training


class OwnPolicy(MlpPolicy):
    """A policy with a method of its own."""

    def latent(self, obs: np.ndarray) -> th.Tensor:
        return self.world_model.encode(self.features(self.obs_to_tensor(obs)[0]))


def test_policy_class_of_ones_own(tmp_path):
    env = AnySpaceEnv(spaces.Box(-1, 1, (3,)))
    model = BOOM(OwnPolicy, env, **TINY)
    learn_save_load_predict(model, tmp_path)
    assert isinstance(model.policy, OwnPolicy)
    assert model.policy.latent(np.zeros((2, 3), np.float32)).shape == (2, model.policy.latent_dim)


def test_policy_for_another_kind_of_observation_is_refused():
    with pytest.raises(AssertionError):  # SB3's own
        BOOM("CnnPolicy", AnySpaceEnv(spaces.Box(-1, 1, (3,))), **TINY)
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        BOOM("MlpPolicy", AnySpaceEnv(spaces.Dict({"a": spaces.Box(-1, 1, (2,))})), **TINY)
