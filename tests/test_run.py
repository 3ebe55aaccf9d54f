"""BOOM as an SB3 algorithm: learn, predict, save and load."""

import copy
import itertools
import pickle
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from gymnasium import spaces
from gymnasium.wrappers import RepeatAction, TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_boom import BOOM
from sb3_boom.callbacks import PlannerPriorEvalCallback
from sb3_boom.core import losses
from sb3_boom.meters import Meters
from sb3_boom.presets import episode_length


class TargetEnv(gym.Env):
    """Reward for an action near the target that the observation shows; episodes end either way."""

    def __init__(self, action_space: spaces.Box | None = None, terminates: bool = False, length: int = 10) -> None:
        self.action_space = action_space or spaces.Box(-1, 1, (1,))
        self.observation_space = spaces.Box(-1, 1, (2,))
        self.terminates, self.length, self.n_steps = terminates, length, 0
        self.target = 0.0

    def _obs(self) -> np.ndarray:
        return np.array([self.target, self.n_steps / self.length], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps, self.target = 0, self.np_random.uniform(-0.8, 0.8)
        return self._obs(), {}

    def step(self, action):
        low, high = self.action_space.low, self.action_space.high
        scaled = 2 * (np.asarray(action, dtype=np.float64) - low) / (high - low) - 1
        reward = 1.0 - float(np.square(scaled - self.target).mean())
        self.n_steps += 1
        done = self.n_steps >= self.length
        return self._obs(), reward, done and self.terminates, done and not self.terminates, {}


def make_model(env=None, **kwargs) -> BOOM:
    return BOOM("MlpPolicy", env or TargetEnv(), **{**TINY, **kwargs})


@pytest.mark.parametrize("alignment", ["release", "forward_kl", "reverse_kl", "none"])
@pytest.mark.parametrize("planner", ["mppi", "cem"])
def test_learns_with_every_alignment_and_planner(alignment, planner):
    model = make_model(alignment=alignment, planner=planner, align_weighting="uniform").learn(40)
    assert model._n_updates == TINY["pretrain_steps"] + 21
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("handle_terminations", [True, False])
@pytest.mark.parametrize("buffer_kwargs", [dict(), dict(sampling="episode"), dict(value_temperature=1.0)])
def test_learns_from_every_sampling_with_and_without_terminations(handle_terminations, buffer_kwargs):
    env = TargetEnv(terminates=True)
    model = make_model(env, handle_terminations=handle_terminations, replay_buffer_kwargs=buffer_kwargs).learn(40)
    assert (model.policy.world_model.termination is not None) == handle_terminations
    assert model.policy.terminations_seen == 1.0


def test_termination_is_learned_apart_from_truncation():
    model = make_model(TargetEnv(terminates=False)).learn(40)
    assert model.policy.terminations_seen == 0.0


def test_a_task_is_learned():
    """Over the ten steps of an episode random actions earn 4.5 on average, the best ones 10."""
    model = make_model(learning_starts=100, pretrain_steps=100, batch_size=64).learn(400)
    env = make_vec_env(TargetEnv, n_envs=10, seed=1)
    planner_return, _ = evaluate_policy(model, env, 10, deterministic=True)
    prior_return, _ = evaluate_policy(model.prior, env, 10, deterministic=True)
    assert planner_return > 8.0
    assert prior_return > 6.5


def test_same_seed_gives_the_same_numbers():
    runs = [make_model(seed=3).learn(60) for _ in range(2)]
    actions = [run.replay_buffer._storage["steps"][: run.replay_buffer.pos] for run in runs]
    assert th.equal(*actions)
    for a, b in zip(runs[0].policy.parameters(), runs[1].policy.parameters(), strict=True):
        assert th.equal(a, b)
    other = make_model(seed=4).learn(60).replay_buffer._storage["steps"][: len(actions[0])]
    assert not th.equal(actions[0], other)


def test_warmup_and_pretraining_happen_once_per_model():
    model = make_model(learning_starts=20, pretrain_steps=7)
    model.learn(30)
    assert model._n_updates == 7 + 11  # after steps 20 to 30
    stored_std = model.replay_buffer._storage["steps"][:, 0, 2]
    assert (stored_std[:20] == losses.WARMUP_STD).all()
    assert (stored_std[20:30] <= 2.0).all()
    for reset_num_timesteps in (True, False):
        before = model._n_updates
        model.learn(10, reset_num_timesteps=reset_num_timesteps)
        assert model._n_updates == before + 10
    assert (stored_std[20:50] <= 2.0).all()


def test_interrupted_pretraining_goes_on_where_it_stopped(monkeypatch):
    model = make_model(learning_starts=20, pretrain_steps=250)
    update, calls = model._update, []

    def interrupted(gradient_steps, batch_size):
        calls.append(gradient_steps)
        if len(calls) == 2:
            raise KeyboardInterrupt
        update(1, batch_size)

    monkeypatch.setattr(model, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(20)
    assert model.pretrain_updates == 100
    model.learn(1, reset_num_timesteps=False)
    assert calls == [100, 100, 100, 50, 1]


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_several_environments_plan_in_one_call_each_with_its_own_warm_start(vec_env_cls, monkeypatch):
    env = make_vec_env("Pendulum-v1", n_envs=3, vec_env_cls=vec_env_cls, seed=0)
    model = make_model(env, learning_starts=30, gradient_steps=-1)
    seen = []
    plan = model.policy.plan

    def recorded(obs, previous_mean, deterministic=False):
        result = plan(obs, previous_mean, deterministic)
        seen.append((previous_mean, result.mean))
        return result

    monkeypatch.setattr(model.policy, "plan", recorded)
    model.learn(60)
    assert model._n_updates == TINY["pretrain_steps"] + 33
    for (_, last), (previous, _) in itertools.pairwise(seen):
        assert previous.shape == (3, 3, 1)
        assert th.equal(previous, last)
    env.close()


def test_sixteen_environments():
    model = make_model(make_vec_env(TargetEnv, n_envs=16), learning_starts=32, gradient_steps=-1)
    model.learn(100)
    assert model.num_timesteps == 112 and model.replay_buffer.size() * 16 == 112
    assert model._n_updates == TINY["pretrain_steps"] + 112 - 16
    actions, (mean,) = model.predict(model.get_env().reset())
    assert actions.shape == (16, 1) and mean.shape == (16, 3, 1)


def test_warm_start_is_dropped_where_an_episode_starts(monkeypatch):
    env = make_vec_env(lambda: TargetEnv(length=7), n_envs=2)
    model = make_model(env)
    seen = []
    plan = model.policy.plan

    def recorded(obs, previous_mean, deterministic=False):
        seen.append((obs[:, 1].clone(), previous_mean))
        return plan(obs, previous_mean, deterministic)

    monkeypatch.setattr(model.policy, "plan", recorded)
    model.learn(60)
    starts = th.cat([time == 0 for time, _ in seen])
    dropped = th.cat([(mean == 0).flatten(1).all(1) for _, mean in seen])
    assert starts.any()
    assert th.equal(starts[2:], dropped[2:])  # the very first plan has no predecessor


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-3.0, 0.5, (1,)),
        spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 5.0]), dtype=np.float64),
        spaces.Box(-2.0, 2.0, (2, 2)),
    ],
)
def test_actions_have_bounds_shape_and_type_of_the_space(space):
    model = make_model(TargetEnv(space)).learn(30)
    obs = model.env.reset()
    for actor in (model, model.prior):
        for observation in (obs, np.repeat(obs, 4, axis=0), obs[0]):
            action, _ = actor.predict(observation)
            assert action.dtype == space.dtype
            single = action if observation is obs[0] else action[0]
            assert space.contains(action if observation.ndim == 1 else single)


def test_predict_hands_over_its_warm_start_as_state():
    model = make_model(TargetEnv()).learn(30)
    obs = np.repeat(model.env.reset(), 2, axis=0)
    action, state = model.predict(obs, deterministic=True)
    assert isinstance(state, tuple)
    assert state[0].shape == (2, 3, 1)
    np.testing.assert_array_equal(action, model.policy.to_action_space(state[0][:, 0]))  # the elites' mean
    warm, _ = model.predict(obs, state=state, deterministic=True)
    cold, _ = model.predict(obs, state=state, episode_start=np.array([True, True]), deterministic=True)
    mixed, _ = model.predict(obs, state=state, episode_start=np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(cold, action, atol=1e-5)
    np.testing.assert_allclose(mixed, [cold[0], warm[1]], atol=1e-5)


def test_deterministic_prediction_depends_on_observation_and_state_alone(tmp_path):
    model = make_model(TargetEnv()).learn(30)
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    rng_state = th.get_rng_state()
    batch, _ = model.predict(obs, deterministic=True)
    assert th.equal(th.get_rng_state(), rng_state)
    model.save(tmp_path / "model")
    loaded = BOOM.load(tmp_path / "model")
    for other in (model, loaded):
        alone = [other.predict(row, deterministic=True)[0] for row in obs]
        np.testing.assert_allclose(alone, batch, atol=1e-5)
    zeros = [np.where([True, False], zero, obs) for zero in np.float32([0.0, -0.0])]
    np.testing.assert_array_equal(*(model.predict(x, deterministic=True)[0] for x in zeros))
    sampled = [model.predict(obs)[0] for _ in range(2)]
    assert not np.allclose(*sampled)


def test_loaded_model_has_the_same_settings_and_goes_on_with_the_same_update(tmp_path):
    model = make_model(learning_rate=lambda progress: 1e-3 * progress).learn(40)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = BOOM.load(tmp_path / "model.zip", env=TargetEnv())
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    for name in ("gamma", "learning_starts", "pretrain_steps", "align_coef", "pretrain_updates", "num_timesteps"):
        assert getattr(loaded, name) == getattr(model, name)
    for one in (model, loaded):
        one.set_logger(model.logger)
        th.manual_seed(7)
        one.train(gradient_steps=3, batch_size=16)
    for (name, a), b in zip(model.policy.state_dict().items(), loaded.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), name
    before = loaded._n_updates
    loaded.learn(5, reset_num_timesteps=False)
    assert loaded._n_updates == before + 5


def test_policy_and_buffer_pickle_and_copy():
    model = make_model().learn(30)
    obs = model.env.reset()
    expected, _ = model.predict(obs, deterministic=True)
    for policy in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        np.testing.assert_allclose(policy.predict(obs, deterministic=True)[0], expected, atol=1e-6)
    assert pickle.loads(pickle.dumps(model.replay_buffer)).size() == 30


@pytest.mark.parametrize("optimizer_kwargs", [dict(foreach=True), dict(fused=False), dict(betas=(0.8, 0.9))], ids=str)
def test_optimizer_takes_its_own_arguments(optimizer_kwargs):
    model = make_model(policy_kwargs=dict(TINY["policy_kwargs"], optimizer_kwargs=optimizer_kwargs)).learn(25)
    assert optimizer_kwargs.items() <= model.policy.model_optimizer.defaults.items() and model._n_updates > 0


def test_learning_rate_schedule_keeps_the_encoders_ratio():
    model = make_model(
        learning_rate=lambda progress: 1e-3 * (0.5 + 0.4 * progress),
        policy_kwargs=dict(TINY["policy_kwargs"], encoder_lr_scale=0.5),
    ).learn(40)
    encoder, others = model.policy.model_optimizer.param_groups
    assert others["lr"] == pytest.approx(5e-4, rel=0.05)
    assert encoder["lr"] == pytest.approx(0.5 * others["lr"])
    assert model.policy.actor_optimizer.param_groups[0]["lr"] == pytest.approx(others["lr"])


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda env: env, None),
        (lambda env: TimeLimit(env, 100), 100),
        (lambda env: TimeLimit(RepeatAction(env, 2), 100), 100),
        (lambda env: RepeatAction(TimeLimit(env, 100), 2), 50),
        (lambda env: TimeLimit(TimeLimit(env, 100), 40), 40),
    ],
)
@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_automatic_settings_follow_the_episode_length(wrap, expected, vec_env_cls):
    env = make_vec_env(lambda: wrap(TargetEnv()), n_envs=1, vec_env_cls=vec_env_cls)
    assert episode_length(env) == expected
    model = BOOM("MlpPolicy", env, **{**TINY, "learning_starts": "auto", "pretrain_steps": "auto"})
    env.close()
    if expected is None:
        assert (model.gamma, model.learning_starts) == (0.99, 2500)
    else:
        assert model.gamma == pytest.approx(np.clip((expected / 5 - 1) / (expected / 5), 0.95, 0.995))
        assert model.learning_starts == 1000
    assert model.pretrain_steps == model.learning_starts


def test_losses_and_times_are_logged(tmp_path):
    from stable_baselines3.common.logger import configure

    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60)
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    expected = [
        "rollout/ep_rew_mean", "time/plan_ms", "time/update_ms", "train/consistency_loss", "train/reward_loss",
        "train/critic_loss", "train/termination_loss", "train/actor_loss", "train/align_loss", "train/align_active",
        "train/q_scale", "train/grad_norm", "train/learning_rate", "train/n_updates",
    ]  # fmt: skip
    assert set(expected) <= set(header)


def test_a_policy_that_is_never_aligned_is_warned_about(monkeypatch):
    monkeypatch.setattr("sb3_boom.checks.GATE_WARNING_STEPS", 30)
    model = make_model(alignment="release")
    with pytest.warns(UserWarning, match="never aligned"):
        model.learn(60, log_interval=1)


def test_planner_and_prior_are_evaluated_side_by_side():
    callback = PlannerPriorEvalCallback(make_vec_env(TargetEnv, n_envs=2), n_eval_episodes=2, eval_freq=20)
    make_model().learn(40, callback=callback)
    assert callback.timesteps == [20, 40]
    assert np.shape(callback.planner_returns) == np.shape(callback.prior_returns) == (2, 2)


def test_learning_leaves_float_arithmetic_as_it_was():
    make_model().learn(30)
    assert np.float64(1e-310) * 1.0 != 0.0


def test_drawing_by_episode_waits_while_one_fills_the_buffer():
    class Growing(gym.Wrapper):
        """Every episode is longer than the one before."""

        n_episodes = 0

        def reset(self, **kwargs):
            self.n_steps, self.n_episodes = 0, self.n_episodes + 1
            return self.env.reset(**kwargs)

        def step(self, action):
            obs, reward, *_, info = self.env.step(action)
            self.n_steps += 1
            return obs, reward, False, self.n_steps >= 10 * self.n_episodes, info

    settings = {**TINY, "buffer_size": 15, "replay_buffer_kwargs": dict(sampling="episode"), "learning_starts": 10}
    model = BOOM("MlpPolicy", Growing(gym.make("Pendulum-v1")), **settings).learn(55)
    assert 0 < model._n_updates < 40  # of 45 steps after warm-up; the third episode leaves nothing of the second


def test_gradient_steps_zero_only_collects():
    model = make_model(gradient_steps=0).learn(40)
    assert model._n_updates == 0


def test_an_update_moves_the_targets_by_tau():
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY, tau=0.3).learn(25)
    policy = model.policy
    before = [parameter.clone() for parameter in policy.critic_target.parameters()]
    model.train(1, 16)
    for old, critic, target in zip(before, policy.critic.parameters(), policy.critic_target.parameters(), strict=True):
        th.testing.assert_close(target, old + 0.3 * (critic.detach() - old))
        assert not target.requires_grad


@pytest.mark.slow
def test_cost_of_an_update_does_not_grow_in_20_000():
    """
    A graph kept alive by the target critics would slow updates down for ever.

    The last 200 updates, in turns with updates 200 to 400 of a second model: a machine's speed changes within a minute.
    """
    models = [make_model(learning_starts=200, pretrain_steps=0).learn(200) for _ in range(2)]
    for model, n in zip(models, (19_800, 200), strict=True):
        model.train(n, 16)
    seconds: list[list[float]] = [[], []]
    for _ in range(200):
        for model, times in zip(models, seconds, strict=True):
            start = time.thread_time()  # of this thread, whatever else the machine does
            model.train(1, 16)
            times.append(time.thread_time() - start)
    assert np.median(seconds[0]) <= 1.1 * np.median(seconds[1])


def test_updates_leave_no_graph_behind():
    """After an update neither parameters nor targets hold on to what it computed, so its cost cannot grow."""
    import gc

    model = make_model().learn(30)
    counts = []
    for _ in range(5):
        model.train(5, 16)
        gc.collect()
        counts.append(sum(1 for thing in gc.get_objects() if type(thing) is th.Tensor))
    assert counts[-1] <= counts[1]
    for tensor in (*model.policy.critic_target.parameters(), model.policy.q_scale, *model.meters._terms.values()):
        assert tensor.grad_fn is None


def test_time_of_compiling_is_not_a_steps_time():
    meters = Meters()
    for seconds in (30.0, 0.01, 0.03):
        meters.add_seconds("plan", seconds, 1)
    assert meters.milliseconds() == {"plan": pytest.approx(20.0)}
