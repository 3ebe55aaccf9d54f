"""The replay buffer against a plain record of what went in."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.core.losses import WARMUP_STD

OBS_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTION_SPACE = spaces.Box(-1, 1, (1,), np.float32)
GO, TERMINATED, TRUNCATED, RESET = "go", "terminated", "truncated", "reset without a done"


class Recorder:
    """Fills a buffer and keeps what it should hold; every observation and reward is unique."""

    def __init__(self, capacity: int, n_envs: int = 1, **kwargs: Any) -> None:
        self.n_envs = n_envs
        self.buffer = WeightedReplayBuffer(capacity * n_envs, OBS_SPACE, ACTION_SPACE, "cpu", n_envs=n_envs, **kwargs)
        self.steps: list[list[dict[str, Any]]] = [[] for _ in range(n_envs)]
        self.clock = [1e5 * env for env in range(n_envs)]

    def add(self, *fates: str) -> None:
        """:param fates: what becomes of each environment in this step"""
        rng = np.random.default_rng(len(self.steps[0]))
        obs, next_obs, actions, infos = [], [], [], []
        for env, fate in enumerate(fates):
            now = self.clock[env]
            action, std = rng.uniform(-1, 1, 2)
            step = dict(obs=[now, 1.0], next_obs=[now + 1, 1.0], reward=now, action=action, planner_std=std + 2, fate=fate)
            self.steps[env].append(step)
            self.clock[env] = now + (1 if fate == GO else 100)
            obs.append(step["obs"])
            next_obs.append(step["next_obs"])
            actions.append([action])
            infos.append(
                {"TimeLimit.truncated": fate == TRUNCATED, "planner_action": [-action], "planner_std": [step["planner_std"]]}
            )
        rewards = np.array([steps[-1]["reward"] for steps in self.steps])
        dones = np.array([fate in (TERMINATED, TRUNCATED) for fate in fates])
        self.buffer.add(np.array(obs, np.float32), np.array(next_obs, np.float32), np.array(actions), rewards, dones, infos)

    def held(self) -> dict[float, tuple[int, int]]:
        """Environment and index of the steps that fit, by their unique reward."""
        size = self.buffer.buffer_size
        return {
            steps[k]["reward"]: (env, k)
            for env, steps in enumerate(self.steps)
            for k in range(max(0, len(steps) - size), len(steps))
        }

    def check(self, batch) -> set[float]:
        """Compare every step of every window. :return: rewards that windows started at"""
        held = self.held()
        for w in range(batch.actions.shape[1]):
            env, first = held[batch.rewards[0, w, 0].item()]
            steps, inside = self.steps[env], True
            for t in range(len(batch.actions)):
                assert batch.valid[t, w, 0].item() == inside
                if not inside:
                    continue
                step = steps[first + t]
                assert batch.observations[t, w].tolist() == step["obs"]
                assert batch.observations[t + 1, w].tolist() == step["next_obs"]
                assert batch.actions[t, w, 0].item() == np.float32(step["action"])
                assert batch.planner_actions[t, w, 0].item() == np.float32(-step["action"])
                assert batch.planner_stds[t, w, 0].item() == np.float32(step["planner_std"])
                assert batch.rewards[t, w, 0].item() == step["reward"]
                assert batch.terminations[t, w, 0].item() == (step["fate"] == TERMINATED)
                inside = step["fate"] == GO and first + t + 1 < len(steps)
        assert th.isfinite(batch.observations).all()
        return set(batch.rewards[0, :, 0].tolist())

    def draw_all(self):
        """Every stored transition once, by the buffer's own gathering."""
        n_rows = self.buffer.size()
        index = th.arange(n_rows * self.n_envs)
        self.buffer._draw = lambda batch_size: (index // self.n_envs, index % self.n_envs)  # type: ignore[method-assign]
        batch = self.buffer.sample(len(index))
        del self.buffer._draw
        return batch


fates = st.sampled_from([GO, GO, GO, TERMINATED, TRUNCATED, RESET])


@settings(max_examples=150)
@given(st.data())
def test_windows_stay_within_episode_and_write_head_and_all_transitions_can_be_drawn(data):
    n_envs = data.draw(st.integers(1, 3))
    recorder = Recorder(data.draw(st.integers(1, 8)), n_envs, horizon=data.draw(st.integers(1, 4)))
    for step in data.draw(st.lists(st.tuples(*[fates] * n_envs), min_size=1, max_size=25)):
        recorder.add(*step)
    assert recorder.check(recorder.draw_all()) == set(recorder.held())
    assert recorder.check(recorder.buffer.sample(32)) <= set(recorder.held())


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED, RESET])
@pytest.mark.parametrize("length", range(1, 7))
def test_masks_are_right_for_short_episodes_ending_either_way(length, end):
    recorder = Recorder(50, horizon=3)
    for _ in range(3):
        for fate in [GO] * (length - 1) + [end]:
            recorder.add(fate)
    batch = recorder.draw_all()
    recorder.check(batch)
    position = th.arange(batch.actions.shape[1]) % length  # within its episode
    for t in range(3):
        assert th.equal(batch.valid[t, :, 0], position + t < length)
    assert batch.terminations[batch.valid].sum() == (0 if end != TERMINATED else 3 * min(length, 3))


def test_drawing_is_uniform_over_transitions():
    recorder = Recorder(20, 2)
    for k in range(30):
        recorder.add(TERMINATED if k % 7 == 0 else GO, GO)
    first = recorder.buffer.sample(40_000).indices[0]
    counts = th.bincount(first, minlength=40)
    assert (counts - 1000).abs().max() < 160  # five standard deviations


def test_drawing_by_episode_is_uniform_over_long_enough_finished_episodes():
    recorder = Recorder(40, horizon=3)
    for length in (5, 2, 12, 3, 4):
        for fate in [GO] * (length - 1) + [TERMINATED]:
            recorder.add(fate)
    recorder.add(GO)  # unfinished
    recorder.buffer.sampling = "episode"
    th.manual_seed(0)
    batch = recorder.buffer.sample(30_000)
    assert batch.valid.all()
    first = th.bincount(batch.indices[0], minlength=27)
    expected = th.zeros(27)
    for begin, length in ((0, 5), (7, 12), (22, 4)):
        n_windows = length - 3 + 1
        expected[begin : begin + n_windows] = 10_000 / n_windows
    assert (first - expected).abs().max() < 5 * 10_000**0.5 / 2
    assert not first[expected == 0].any()


def test_drawing_by_episode_works_after_wrap_around_and_needs_a_finished_episode():
    recorder = Recorder(10, 2, horizon=2, sampling="episode")
    recorder.add(GO, GO)
    with pytest.raises(ValueError, match="no finished episode"):
        recorder.buffer.sample(4)
    for k in range(28):
        recorder.add(TERMINATED if k % 4 == 0 else GO, TRUNCATED if k % 5 == 0 else GO)
    batch = recorder.buffer.sample(200)
    assert batch.valid.all()
    recorder.check(batch)


@given(st.data())
def test_episodes_known_from_the_last_draw_are_those_found_anew(data):
    n_envs, horizon = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    recorder = Recorder(data.draw(st.integers(4, 9)), n_envs, horizon=horizon, sampling="episode")
    for step in data.draw(st.lists(st.tuples(*[fates] * n_envs), min_size=5, max_size=40)):
        recorder.add(*step)
        if data.draw(st.booleans()):
            continue
        windows = []
        for buffer in (recorder.buffer, copy.deepcopy(recorder.buffer)):  # a copy knows of none
            th.manual_seed(0)
            windows.append(buffer.sample(8).indices if buffer.can_sample() else None)
        assert (windows[0] is None) == (windows[1] is None)
        if windows[0] is not None:
            assert windows[0].tolist() == windows[1].tolist()


def test_weighted_drawing_follows_the_values():
    recorder = Recorder(10, 2, value_temperature=0.5)
    for _ in range(5):
        recorder.add(GO, GO)
    buffer = recorder.buffer
    q = th.linspace(-2, 2, 10)
    indices = th.arange(10).view(1, 10)
    buffer.update_values(indices, q.view(1, 10, 1), th.ones(1, 10, 1, dtype=th.bool), scale=2.0)
    th.manual_seed(0)
    counts = th.bincount(buffer.sample(40_000).indices[0], minlength=20)
    expected = 40_000 * (0.5 / 10 + 0.5 * (q / 2.0 / 0.5).softmax(0))
    assert ((counts[:10] - expected).abs() < 5 * expected.sqrt()).all()
    assert not counts[10:].any()


def test_new_entries_carry_the_mean_value_and_invalid_steps_refresh_none():
    recorder = Recorder(10, value_temperature=1.0)
    recorder.add(GO)
    recorder.add(GO)
    values = recorder.buffer._storage["values"]
    indices, valid = th.tensor([[0, 1]]), th.tensor([[[True], [True]]])
    recorder.buffer.update_values(indices, th.tensor([[[2.0], [6.0]]]), valid, scale=th.tensor(2.0))
    recorder.add(GO)
    assert values[:3, 0].tolist() == [1.0, 3.0, 2.0]
    values_of_a_window, valid = th.tensor([[[8.0]], [[th.nan]]]), th.tensor([[[True]], [[False]]])
    recorder.buffer.update_values(th.tensor([[0], [1]]), values_of_a_window, valid, scale=2.0)
    assert values[:3, 0].tolist() == [4.0, 3.0, 2.0]


def test_without_a_plan_the_action_stands_for_it_with_a_wide_std():
    buffer = WeightedReplayBuffer(10, OBS_SPACE, ACTION_SPACE, "cpu")
    obs = np.zeros((1, 2), np.float32)
    buffer.add(obs, obs, np.array([[0.3]]), np.array([1.0]), np.array([False]), [{}])
    batch = buffer.sample(1)
    assert batch.planner_actions[0, 0, 0] == np.float32(0.3)
    assert batch.planner_stds[0, 0, 0] == np.float32(WARMUP_STD)


@pytest.mark.parametrize("obs_dim", [1, 24, 223])
@pytest.mark.parametrize("episode_length", [20, 500])
def test_memory_stays_within_its_bound(obs_dim, episode_length):
    capacity, action_dim = 2_000, 4
    buffer = WeightedReplayBuffer(capacity, spaces.Box(-1, 1, (obs_dim,)), spaces.Box(-1, 1, (action_dim,)), "cpu")
    obs, action = np.zeros((1, obs_dim), np.float32), np.zeros((1, action_dim), np.float32)
    for k in range(4 * capacity):  # what was overwritten must be given back
        buffer.add(obs, obs, action, np.zeros(1), np.array([(k + 1) % episode_length == 0]), [{}])
    held = [*buffer._storage.values(), *buffer._final_observations.values()]
    n_bytes = sum(tensor.nbytes for tensor in held) + buffer._free_slots.nbytes
    assert n_bytes <= 1.15 * capacity * (4 * obs_dim + 12 * action_dim + 16)


def test_storage_is_made_by_the_first_transition_and_counts_as_sb3s():
    recorder = Recorder(5, 2)
    assert not recorder.buffer._storage
    with pytest.raises(ValueError, match="empty"):
        recorder.buffer.sample(1)
    sizes = []
    for _ in range(7):
        recorder.add(GO, GO)
        sizes.append((recorder.buffer.size(), recorder.buffer.pos, recorder.buffer.full))
    assert sizes == [(1, 1, False), (2, 2, False), (3, 3, False), (4, 4, False), (5, 0, True), (5, 1, True), (5, 2, True)]
    recorder.buffer.reset()
    assert recorder.buffer.size() == 0


@pytest.mark.parametrize("n_steps", [3, 11], ids=["half full", "wrapped"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_holds_the_same_and_goes_on_by_itself(n_steps, clone):
    recorder = Recorder(8, 2)
    for k in range(n_steps):
        recorder.add(TERMINATED if k == 1 else GO, GO)
    original, recorder.buffer = recorder.buffer, clone(recorder.buffer)
    samples = []
    for buffer in (original, recorder.buffer):
        th.manual_seed(0)
        samples.append(buffer.sample(16))
    for a, b in zip(*samples, strict=True):
        assert th.equal(a, b)
    recorder.add(GO, TRUNCATED)  # goes on in the middle of an episode
    recorder.check(recorder.draw_all())
    assert original.pos == n_steps % 8


@pytest.mark.parametrize(
    ("space", "stored"),
    [
        (spaces.Box(-1, 1, (3,), np.float64), {"": th.float32}),
        (spaces.Box(0, 255, (3, 4, 4), np.uint8), {"": th.uint8}),
        (spaces.Discrete(5), {"": th.int64}),
        (spaces.MultiBinary(4), {"": th.int8}),
        (spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(0, 255, (1, 4, 4), np.uint8)), {"a": th.float32, "b": th.uint8}),
    ],
)
def test_observations_are_stored_raw_in_their_own_type(space, stored):
    buffer = WeightedReplayBuffer(20, space, ACTION_SPACE, "cpu", n_envs=2)
    space.seed(0)

    def batch(samples):
        if isinstance(space, spaces.Dict):
            return {key: np.stack([sample[key] for sample in samples]) for key in space}
        return np.stack(samples)

    obs = [[space.sample() for _ in range(2)] for _ in range(5)]
    for k in range(4):
        args = (batch(obs[k]), batch(obs[k + 1]), np.zeros((2, 1)), np.zeros(2), np.zeros(2, dtype=bool))
        buffer.add(*args, [{}, {}])
    assert {name[4:]: tensor.dtype for name, tensor in buffer._storage.items() if name.startswith("obs/")} == stored
    observations = buffer.sample(8).observations
    for key, dtype in stored.items():
        tensor = observations[key] if key else observations
        shape = space[key].shape if key else buffer.obs_shape
        assert tensor.dtype == dtype
        assert tensor.shape == (4, 8, *shape)


def test_a_first_observation_of_whole_numbers_does_not_cut_off_later_ones():
    buffer = WeightedReplayBuffer(20, OBS_SPACE, ACTION_SPACE, "cpu")
    for obs, next_obs in (([[0, 0]], [[1, 1]]), ([[1, 1]], [[0.5, 0.7]])):
        buffer.add(np.array(obs), np.array(next_obs), np.zeros((1, 1)), np.zeros(1), np.ones(1, dtype=bool), [{}])
    assert buffer._storage["obs/"].dtype == th.float32
    assert buffer._last_next_obs[""].tolist() == [pytest.approx([0.5, 0.7])]


def test_samples_are_normalised_with_current_statistics():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0), clip_obs=1.5)
    env.reset()
    buffer = WeightedReplayBuffer(100, env.observation_space, env.action_space, "cpu", n_envs=2)
    last = env.get_original_obs()
    for _ in range(30):
        _, _, dones, infos = env.step(np.random.default_rng(0).uniform(-2, 2, (2, 1)))
        now = env.get_original_obs()
        buffer.add(last, now, np.zeros((2, 1)), env.get_original_reward(), dones, infos)
        last = now
    samples = []
    for normalizer in (None, env):
        th.manual_seed(0)
        samples.append(buffer.sample(16, env=normalizer))
    raw, normalised = samples
    np.testing.assert_allclose(normalised.observations, env.normalize_obs(raw.observations.numpy()), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalised.rewards, env.normalize_reward(raw.rewards.numpy()), rtol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        dict(optimize_memory_usage=True),
        dict(horizon=0),
        dict(sampling="recent"),
        dict(value_temperature=0.0),
        dict(value_temperature=1.0, sampling="episode"),
    ],
)
def test_wrong_settings_are_value_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        WeightedReplayBuffer(10, OBS_SPACE, ACTION_SPACE, "cpu", **bad)
