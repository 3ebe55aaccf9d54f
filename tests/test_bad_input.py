"""What a user gets wrong is refused early, with what to change."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_boom import BOOM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(planner_kwargs=dict(n_sample=8)), "n_sample.*n_samples"),
        (dict(planner_kwargs=dict(n_samples=8, n_elites=16)), "n_elites=16.*n_samples=8"),
        (dict(planner_kwargs=dict(n_samples=8, n_elites=4, n_policy_samples=9)), "n_policy_samples"),
        (dict(planner_kwargs=dict(min_std=3.0)), "min_std"),
        (dict(policy_kwargs=dict(net_arch=[64])), "net_arch.*model_size"),
        (dict(policy_kwargs=dict(model_size="huge")), "huge"),
        (dict(policy_kwargs=dict(latent_dim=20, simnorm_dim=8)), "simnorm_dim=8 must divide latent_dim=20"),
        (dict(policy_kwargs=dict(n_critics=1)), "n_critics"),
        (dict(policy_kwargs=dict(horizon=5)), "pass to BOOM itself"),
        (dict(policy_kwargs=dict(dropout=1.0)), "dropout"),
        (dict(policy_kwargs=dict(optimizer_kwargs=dict(lr=1.0))), "learning_rate"),
        (dict(horizon=0), "horizon must be at least 1"),
        (dict(horizon=True), "horizon must be a number"),
        (dict(horizon=1.5), "horizon must be a whole number"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(buffer_size=0), "buffer_size must be at least 1"),
        (dict(tau=0), "tau must be above 0 and at most 1"),
        (dict(tau=5), "tau must be above 0 and at most 1"),
        (dict(gamma=1.5), 'gamma must be at least 0 and at most 1 or "auto"'),
        (dict(rho=-1), "rho must be at least 0"),
        (dict(policy_kwargs=dict(encoder_lr_scale=-1)), "encoder_lr_scale must be at least 0"),
        (dict(consistency_coef=float("nan")), "consistency_coef must be at least 0"),
        (dict(max_grad_norm=0), "max_grad_norm must be above 0"),
        (dict(ent_coef="auto"), "ent_coef must be a number: BOOM does not tune it"),
        (dict(handle_terminations="no"), "handle_terminations must be True or False"),
        (dict(align_warmup=1), "align_warmup must be True or False"),
        (dict(align_warmup=False, planner_kwargs=dict(max_std=8.0)), "max_std below 7.3"),
        (dict(policy_kwargs=dict(compile=1)), "compile must be True, False or"),
        (dict(replay_buffer_kwargs=dict(horizon=7)), "horizon: pass to BOOM itself"),
        (dict(alignment="kl"), "alignment must be one of release"),
        (dict(align_weighting="hard"), "align_weighting must be one of softmax"),
        (dict(align_temperature=0.0), "align_temperature"),
        (dict(align_scale=0.0), 'align_scale must be above 0 or "auto" or "q_scale"'),
        (dict(align_scale="S"), 'align_scale must be a number or "auto" or "q_scale"'),
        (dict(planner="random"), "planner must be one of mppi, cem"),
        (dict(policy_kwargs=dict(compile="maybe")), "compile"),
        (dict(policy_kwargs=dict(tf32=1)), "tf32 must be True or False"),
        (dict(preset="gpu"), 'preset must be one of paper, cpu or "auto"'),
        (dict(batch_size="large"), 'batch_size must be a number or "auto"'),
        (dict(replay_buffer_kwargs=dict(handle_timeout_termination=False)), "handle_timeout_termination must be True"),
        (dict(learning_starts="later"), "learning_starts"),
        (dict(pretrain_steps=1.5), "pretrain_steps must be a whole number"),
        (dict(optimize_memory_usage=True), "optimize_memory_usage=False"),
        (dict(n_steps=3, horizon=2), "n_steps=3 must be at most horizon=2"),
        (dict(n_steps=0), "n_steps must be at least 1"),
        (dict(replay_buffer_class=ReplayBuffer), "WeightedReplayBuffer"),
        (dict(replay_buffer_kwargs=dict(sampling="recent")), "sampling"),
    ],
)
def test_wrong_setting_is_a_value_error_that_says_what_to_change(arguments, message):
    with pytest.raises(ValueError, match=message):
        model = BOOM("MlpPolicy", "Pendulum-v1", **{**TINY, **arguments})
        model.predict(model.env.reset())


def test_numpys_numbers_are_numbers():
    numbers = dict(batch_size=np.int64(8), tau=np.float32(0.5), learning_starts=np.int32(20), buffer_size=2e3)
    numbers |= dict(planner_kwargs={key: np.int64(value) for key, value in TINY["planner_kwargs"].items()})
    numbers |= dict(policy_kwargs=dict(TINY["policy_kwargs"], mlp_dim=np.int64(16)))
    BOOM("MlpPolicy", "Pendulum-v1", **{**TINY, **numbers}).learn(22)


def test_action_that_can_take_one_value_only_is_refused():
    env = SpoiltEnv()
    env.action_space = spaces.Box(np.array([-1.0, 0.5], np.float32), np.array([1.0, 0.5], np.float32))
    with pytest.raises(ValueError, match="low < high"):
        BOOM("MlpPolicy", env, **TINY)


def test_unknown_constructor_argument_is_a_type_error():
    with pytest.raises(TypeError, match="net_arch"):
        BOOM("MlpPolicy", "Pendulum-v1", net_arch=[64])


@pytest.mark.parametrize(
    ("argument", "place"),
    [
        (dict(compile=False), r"policy_kwargs=dict\(compile"),
        (dict(tf32=False), r"policy_kwargs=dict\(tf32"),
        (dict(encoder_lr_scale=1.0), r"policy_kwargs=dict\(encoder_lr_scale"),
        (dict(use_sde=True), "planner explores"),
    ],
)
def test_moved_constructor_argument_is_a_type_error_that_names_its_place(argument, place):
    with pytest.raises(TypeError, match=place):
        BOOM("MlpPolicy", "Pendulum-v1", **TINY, **argument)


class SpoiltEnv(gym.Env):
    """Returns a bad value at one step, or at reset for step 0."""

    action_space = spaces.Box(-1, 1, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, where: str = "", value: float = 0.0, step: int = 10) -> None:
        self.where, self.value, self.bad_step = where, value, step
        self.n_steps = 0

    def _obs(self) -> np.ndarray:
        bad = self.where == "observation" and self.n_steps == self.bad_step
        return np.array([0.1 * self.n_steps, self.value if bad else 0.0], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        self.n_steps += 1
        reward = self.value if self.where == "reward" and self.n_steps == self.bad_step else 1.0
        return self._obs(), reward, self.where == "end" and self.n_steps == self.bad_step, False, {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["observation", "reward"])
@pytest.mark.parametrize("normalize", [False, True])
def test_non_finite_value_of_an_environment_is_refused_before_it_is_stored(where, value, normalize):
    env = DummyVecEnv([lambda: SpoiltEnv(), lambda: SpoiltEnv(where, value)])
    env = VecNormalize(env) if normalize else env
    model = BOOM("MlpPolicy", env, **TINY)
    with pytest.raises(ValueError, match=f"environment 1 returned an? {where}.* at step 20"):
        model.learn(60)
    assert model.replay_buffer.size() == 9
    assert np.isfinite(model.replay_buffer._storage["obs/"].numpy()).all()


def test_non_finite_first_observation_is_refused():
    model = BOOM("MlpPolicy", SpoiltEnv("observation", np.nan, step=0), **TINY)
    with pytest.raises(ValueError, match="environment 0 returned an observation"):
        model.learn(10)


class EndsBadly(SpoiltEnv):
    """The final observation of its episode is NaN, which a vectorized environment hides behind the reset."""

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        done = self.n_steps == 5
        if done:
            obs, self.n_steps = np.full(2, np.nan, dtype=np.float32), 0
        return obs, reward, done, False, info


def test_non_finite_final_observation_is_refused():
    model = BOOM("MlpPolicy", EndsBadly(), **TINY)
    with pytest.raises(ValueError, match=r"environment 0 returned an observation.* at step 5"):
        model.learn(10)


def test_diverged_networks_are_a_value_error():
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY)
    model.policy.world_model.reward[-1].bias.data.fill_(np.nan)
    with pytest.raises(ValueError, match="no action sequence has a finite value"):
        model.predict(model.env.reset())


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-np.inf, np.inf, (1,))])
def test_unsupported_action_space_is_sb3s_assertion(action_space):
    env = SpoiltEnv()
    env.action_space = action_space
    with pytest.raises(AssertionError):
        BOOM("MlpPolicy", env, **TINY)


def test_file_of_another_algorithm_is_refused(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10).save(tmp_path / "sac.zip")
    with pytest.raises(ValueError, match="saved by another algorithm"):
        BOOM.load(tmp_path / "sac.zip")


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 but broken"])
def test_file_that_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match="no BOOM model"):
        BOOM.load(tmp_path / "model.zip")


def test_unknown_argument_of_load_is_a_type_error(tmp_path):
    BOOM("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "model.zip")
    with pytest.raises(TypeError, match="gama"):
        BOOM.load(tmp_path / "model.zip", gama=0.9)


@pytest.mark.parametrize("state", [np.zeros((1, 3, 1)), (np.zeros((2, 3, 1)),), (np.zeros((1, 3, 1)),) * 2])
def test_state_of_another_shape_is_refused(state):
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY)
    with pytest.raises(ValueError, match=r"\(1, 3, 1\)"):
        model.predict(model.env.reset(), state=state)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predict_refuses_an_observation_that_would_end_in_no_action(value):
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY)
    observations = np.zeros((3, 3), dtype=np.float32)
    model.predict(observations)
    observations[1, 2] = value
    for who in (model, model.prior):
        with pytest.raises(ValueError, match=r"an observation that is NaN or infinite at index \(1, 2\)"):
            who.predict(observations)
