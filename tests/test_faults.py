"""Faults in the midst of a run are named, and what is learned afterwards is right; waits end."""

import os
import pickle
import resource
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_boom import BOOM, waits
from sb3_boom.callbacks import PlannerPriorEvalCallback


class Counting(gym.Env):
    """Observes its number, its episode and the step in it; fails at a step, once."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, number: float = 0.0, fails_at: int = 0, fault: BaseException | float = np.nan) -> None:
        self.number, self.fails_at, self.fault = number, fails_at, fault
        self.episode = self.step_ = self.n_steps = 0

    def _obs(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.step_], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_ = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.n_steps, self.step_ = self.n_steps + 1, self.step_ + 1
        obs = self._obs()
        if self.n_steps == self.fails_at:
            if isinstance(self.fault, BaseException):
                raise self.fault
            obs[0] = self.fault
        return obs, 1.0, False, self.step_ == 12, {}


def make_model(env, **settings) -> BOOM:
    return BOOM("MlpPolicy", env, **{**TINY, **settings})


# ------------------------------------------------------------- after a fault


@pytest.mark.parametrize(
    ("fault", "normalize"),
    [(RuntimeError("broken"), False), (KeyboardInterrupt(), False), (np.nan, False), (KeyboardInterrupt(), True)],
    ids=["error", "Ctrl-C", "NaN", "normalised"],
)
def test_nothing_wrong_is_stored_after_a_fault_in_a_step(fault, normalize):
    env = DummyVecEnv([lambda: Counting(0.0), lambda: Counting(1.0, 30, fault), lambda: Counting(2.0)])
    env = VecNormalize(env, clip_obs=100.0) if normalize else env
    model = make_model(env)
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)):
        model.learn(300)
    stored = model.replay_buffer.size()
    model.learn(60, reset_num_timesteps=False)
    assert stored == 29 and model.replay_buffer.size() == 29 + 20
    buffer = model.replay_buffer
    th.manual_seed(0)
    observations, *_, valid, _ = buffer.sample(2_000)
    before, after = observations[:-1].clone(), observations[1:]
    before[..., 2] += 1.0
    assert th.allclose(before[valid.squeeze(-1)], after[valid.squeeze(-1)], atol=1e-3)


def test_a_reset_that_looks_like_the_step_before_is_not_joined_to_it_after_a_fault():
    class Blind(Counting):
        def _obs(self) -> np.ndarray:
            return np.zeros(3, dtype=np.float32)

    model = make_model(Blind(0.0, 30, RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        model.learn(100)
    model.learn(5, reset_num_timesteps=False)
    assert model.replay_buffer._storage["final_slot"][28] >= 1


# --------------------------------------------------------------------- workers


class Hangs(Counting):
    """At a step, for ever."""

    def step(self, action):
        if self.n_steps == self.fails_at - 1:
            time.sleep(1000)
        return super().step(action)


class Dies(Counting):
    def step(self, action):
        if self.n_steps == self.fails_at - 1:
            os._exit(3)
        return super().step(action)


def processes(last: type[Counting]) -> SubprocVecEnv:
    """With "fork", the pipe of a dead one stays open; test_callbacks has the others."""
    return SubprocVecEnv([Counting, Counting, lambda: last(0.0, 15 if last is not Counting else 0)], start_method="fork")


def test_a_worker_that_hangs_is_named():
    env = processes(Hangs)
    model = make_model(env, worker_timeout=1.0)
    with pytest.raises(
        TimeoutError, match=r"worker 2 of the SubprocVecEnv \(process \d+\) is alive, but has not answered for 1 s"
    ):
        model.learn(100)
    env.close()
    assert model.replay_buffer.size() == 14


def test_a_worker_that_dies_is_named_though_its_pipe_stays_open():
    env = processes(Dies)
    with pytest.raises(RuntimeError, match=r"worker 2 of the SubprocVecEnv died \(exit code 3\)"):
        make_model(env).learn(100)
    env.close()


def test_answers_that_an_interrupted_wait_has_left_behind_are_not_taken_for_others():
    env = processes(Counting)
    model = make_model(env).learn(30)

    class Interrupt(BaseCallback):
        def _on_training_start(self) -> None:
            self.recv = type(env.remotes[1]).recv

        def _on_step(self) -> bool:
            def interrupted(remote: waits.BoundedRemote) -> None:
                if remote.index == 1:
                    waits.BoundedRemote.recv = self.recv
                    raise KeyboardInterrupt
                return self.recv(remote)

            if self.num_timesteps == 60:
                waits.BoundedRemote.recv = interrupted
            return True

    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=Interrupt(), reset_num_timesteps=False)
    model.learn(60, reset_num_timesteps=False)
    observations, *_, valid, _ = model.replay_buffer.sample(500)
    steps = (observations[1:, ..., 2] - observations[:-1, ..., 2])[valid.squeeze(-1)]
    assert (steps == 1.0).all() and model.num_timesteps == 120
    env.close()


@pytest.mark.parametrize("timeout", [0, -1.0, "long"])
def test_worker_timeout_is_checked(timeout):
    with pytest.raises(ValueError, match="worker_timeout"):
        make_model(Counting(), worker_timeout=timeout)


# ----------------------------------------------------------------- evaluations


def cut_short() -> gym.Env:
    """As make_vec_env wraps, and as env_wrapper does."""
    return gym.wrappers.TimeLimit(Monitor(gym.make("Pendulum-v1")), 5)


@pytest.mark.parametrize("kind", ["planner and prior", "SB3's"])
def test_an_evaluation_whose_monitor_sees_no_end_says_why(kind):
    env = DummyVecEnv([cut_short])
    callback = {
        "planner and prior": lambda: PlannerPriorEvalCallback(env, n_eval_episodes=1, eval_freq=5),
        "SB3's": lambda: EvalCallback(env, n_eval_episodes=1, eval_freq=5, verbose=0),
    }[kind]()
    with pytest.raises(
        ValueError, match=r"waits for ever: environment 0 ended 50 episodes that its Monitor did not see.*TimeLimit"
    ):
        make_model(gym.make("Pendulum-v1")).learn(10, callback=callback)
    assert "step_wait" not in env.__dict__


def test_an_evaluation_that_never_ends_says_why(monkeypatch):
    monkeypatch.setattr(waits, "ENDLESS", 30)

    class Endless(Counting):
        def step(self, action):
            obs, reward, *_ = super().step(action)
            return obs, reward, False, False, {}

    callback = EvalCallback(Monitor(Endless()), n_eval_episodes=1, eval_freq=5, verbose=0)
    with pytest.raises(ValueError, match="has not ended in 30 steps"):
        make_model(Counting()).learn(10, callback=callback)
    evaluate_policy(
        make_model(Counting()), DummyVecEnv([lambda: Monitor(Counting())]), n_eval_episodes=2
    )  # one that ends does


# ------------------------------------------------------------ nothing to draw


@pytest.mark.parametrize("horizon", [3, 12])
def test_drawing_by_episode_says_when_there_is_nothing_to_draw(horizon):
    """Episodes have 12 steps, and must be longer than the horizon."""
    settings = dict(replay_buffer_kwargs=dict(sampling="episode"), horizon=horizon, gradient_steps=1, train_freq=10)
    model = make_model(Counting(), **settings)
    if horizon == 3:
        assert model.learn(60)._n_updates > 0
        return
    with pytest.warns(
        UserWarning, match='sampling="episode" has found no finished episode of more than horizon=12 steps'
    ) as told:
        model.learn(1_100)
    assert len([w for w in told if "episode" in str(w.message)]) == 1 and model._n_updates == 0


# ------------------------------------------------------------------ divergence


@pytest.mark.parametrize(
    ("settings", "spoil"),
    [
        (dict(), lambda model: next(model.policy.critic.parameters()).data.fill_(np.nan)),
        (dict(), lambda model: next(model.policy.world_model.reward.parameters()).data.fill_(np.inf)),
        (dict(gradient_steps=300), lambda model: next(model.policy.actor.parameters()).data.fill_(np.nan)),
    ],
)
def test_divergence_stops_learning_within_100_updates_and_names_the_term(settings, spoil):
    model = make_model(Counting()).learn(25)
    model.__dict__.update(settings)
    before = model._n_updates
    spoil(model)
    model._sample_action = lambda *_: (np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))  # planning would notice
    with pytest.raises(ValueError, match=r"learning has diverged: \w+ is (nan|inf) within \d+ updates. Lower learning_rate"):
        model.learn(5, reset_num_timesteps=False)
    assert model._n_updates <= before + 100


def test_a_parameter_that_no_loss_sees_is_found_too():
    model = make_model(Counting(), gradient_steps=30).learn(22)
    model.policy.register_parameter("unused", th.nn.Parameter(th.full((2,), np.nan)))
    with pytest.raises(ValueError, match="unused is NaN or infinite after 100 updates"):
        model.learn(4, reset_num_timesteps=False)


def test_a_model_that_has_diverged_is_saved_and_loaded_with_a_warning(tmp_path):
    model = make_model(Counting())
    model.policy.critic_target.net.head.bias.data[0] = np.inf
    with pytest.warns(UserWarning, match=r"model\.zip can't act: critic_target\.\S+ is NaN or infinite"):
        model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="can't act"):
        BOOM.load(tmp_path / "model.zip")


# --------------------------------------------------------------- buffer pickles


def test_a_buffers_pickle_is_as_large_as_what_is_in_it(tmp_path):
    sizes = []
    for capacity in (2_000, 200_000):
        model = make_model(Counting(), buffer_size=capacity, learning_starts=100).learn(50)
        model.save_replay_buffer(tmp_path / f"{capacity}")
        sizes.append((tmp_path / f"{capacity}.pkl").stat().st_size)
        again = make_model(Counting(), buffer_size=capacity)
        again.load_replay_buffer(tmp_path / f"{capacity}")
        assert again.replay_buffer.size() == 50 and len(again.replay_buffer._storage["steps"]) == capacity
    assert sizes[0] == pytest.approx(sizes[1], abs=200) and sizes[1] < 10_000


def test_a_full_disk_leaves_the_last_good_buffer(tmp_path):
    model = make_model(Counting(), learning_starts=2000).learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    before = (tmp_path / "buffer.pkl").read_bytes()
    model.learn(300, reset_num_timesteps=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(OSError):
            model.save_replay_buffer(tmp_path / "buffer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "buffer.pkl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_no_flipped_bit_of_a_buffers_pickle_is_loaded(tmp_path):
    model = make_model(Counting(), learning_starts=100).learn(40)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    content = (tmp_path / "buffer.pkl").read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content) - 60, 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        (tmp_path / "damaged.pkl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.pkl is damaged"):
            model.load_replay_buffer(tmp_path / "damaged.pkl")
    (tmp_path / "damaged.pkl").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged\.pkl can't be loaded .*Load an earlier copy"):
        model.load_replay_buffer(tmp_path / "damaged.pkl")
    assert model.replay_buffer.size() == 40


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("pos", -5),
        ("pos", 2_000),
        ("pos", 39),
        ("pos", 10.5),
        ("buffer_size", 10**9),
        ("buffer_size", 100),
        ("n_envs", 2),
        ("n_envs", 0),
        ("full", True),
        ("full", "yes"),
        ("_episode_open", np.array([False])),
        ("_last_slots", np.array([7])),
    ],
)
def test_a_buffer_whose_fields_contradict_each_other_is_refused(attribute, value, tmp_path):
    model = make_model(Counting(), learning_starts=100).learn(40)
    state = {**model.replay_buffer.__getstate__(), attribute: value}

    class Spoilt:
        def __reduce__(self):
            return _rebuilt, (state,)

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Spoilt()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bad\.pkl can't be loaded \(ValueError: its fields contradict each other"):
        model.load_replay_buffer(tmp_path / "bad.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000
    assert model.replay_buffer.size() == 40


def _rebuilt(state):
    from sb3_boom.buffers import WeightedReplayBuffer

    buffer = WeightedReplayBuffer.__new__(WeightedReplayBuffer)
    buffer.__setstate__(state)
    return buffer


def test_an_archive_with_a_flipped_bit_is_named(tmp_path):
    model = make_model(Counting())
    model.save(tmp_path / "model.zip")
    content = bytearray((tmp_path / "model.zip").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip is damaged"):
        BOOM.load(tmp_path / "model.zip")
