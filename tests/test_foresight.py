"""What was foretold against what came: terminations on steps not learned from yet, the promises of plans."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_POLICY
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom import BOOM
from sb3_boom.foresight import BLOCK, FreshTerminations, PlanOptimism, Snapshot, count_terminations


class Edge(gym.Env):
    """A point on a square, beside noise; the episode ends where the coordinates' sum is above 0.8, or after `length` steps."""

    def __init__(self, n_noise: int = 2, length: float = np.inf) -> None:
        self.n_noise, self.length = n_noise, length
        self.observation_space = spaces.Box(-1.0, 1.0, (2 + n_noise,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _obs(self) -> np.ndarray:
        return np.concatenate([self.at, self.np_random.uniform(-1, 1, self.n_noise)]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.n_steps = self.np_random.uniform(-0.5, 0.5, 2), 0
        return self._obs(), {}

    def step(self, action):
        self.at = np.clip(self.at + 0.5 * action, -1.0, 1.0)
        self.n_steps += 1
        return self._obs(), 1.0, bool(self.at.sum() > 0.8 or self.n_steps >= self.length), False, {}


def fill(replay_buffer, n_steps, seed):
    env, rng = Edge(), np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    for _ in range(n_steps):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        next_obs, reward, done, _, _ = env.step(action)
        replay_buffer.add(obs[None], next_obs[None], action[None], np.array([reward]), np.array([done]), [{}])
        obs = env.reset()[0] if done else next_obs


def make_model(env, **kwargs):
    model = BOOM("MlpPolicy", env, **{**TINY, **kwargs})
    model.set_logger(configure(None, []))
    return model


def networks_of(model):
    return Snapshot(model.policy.features_extractor, model.policy.world_model)


def test_terminations_are_foreseen_on_steps_never_trained_on():
    """Whatever the loss weighs. Let into the dynamics, it hides them there: one in five is recognised once it is met."""
    kwargs = dict(policy_kwargs=dict(TINY_POLICY, mlp_dim=64, enc_dim=64, latent_dim=32, n_critics=2))
    model = make_model(Edge(), learning_rate=1e-3, termination_coef=20.0, **kwargs)
    fill(model.replay_buffer, 1000, seed=0)
    model.train(300, 64)
    fresh = make_model(Edge()).replay_buffer
    fill(fresh, 2000, seed=100)
    counts = count_terminations(model.policy, networks_of(model), fresh.newest(2000)).tolist()
    for foreseen, met, both in counts:
        assert met > 50
        assert both / met > 0.7
        assert both / foreseen > 0.6


def test_foreseen_met_and_both_are_counted():
    model = make_model(Edge())
    fill(model.replay_buffer, 200, seed=0)
    batch = model.replay_buffer.newest(200)
    met = int(batch.terminations[0].sum())
    assert met > 0
    head = model.policy.world_model.termination[-1]
    for bias, expected in ((-100.0, [0, met, 0]), (100.0, [200, met, met])):
        with th.no_grad():
            head.bias.fill_(bias)
        assert count_terminations(model.policy, networks_of(model), batch).tolist() == [expected, expected]


def test_only_the_predicted_latent_hangs_on_the_action():
    model = make_model(Edge())
    fill(model.replay_buffer, 200, seed=0)
    batch = model.replay_buffer.newest(200)
    world_model = copy.deepcopy(model.policy.world_model)
    world_model.next = lambda z, action: th.full_like(z, th.nan)
    counts = count_terminations(model.policy, Snapshot(model.policy.features_extractor, world_model), batch)
    assert counts[0, 0] == 0
    assert counts[1].tolist() == count_terminations(model.policy, networks_of(model), batch)[1].tolist()


def test_blocks_are_scored_by_the_networks_from_before_them(monkeypatch):
    """Each step once, and by networks that can't have learned from it."""
    model = make_model(Edge())
    scored = []

    def recorded(policy, networks, batch):
        scored.append((networks.world_model.termination[-1].bias.item(), batch.observations[0].clone()))
        return th.tensor([[2, 4, 1], [0, 4, 0]])

    monkeypatch.setattr("sb3_boom.foresight.count_terminations", recorded)
    fresh, stored = FreshTerminations(), []
    for step in range(1 + 3 * BLOCK):
        with th.no_grad():
            model.policy.world_model.termination[-1].bias.fill_(float(step))
        fill(model.replay_buffer, 1, seed=step)
        stored.append(model.replay_buffer.newest(1).observations[0])
        fresh.see(model.policy, model.replay_buffer, None)
    assert [version for version, _ in scored] == [0.0, BLOCK, 2 * BLOCK]
    assert th.equal(th.cat([obs for _, obs in scored]), th.cat(stored[1:]))
    assert fresh.take_scores() == dict(termination_precision=0.5, termination_recall=0.25, termination_encoded_recall=0.0)
    assert fresh.take_scores() == {}


def test_no_termination_head_no_scores():
    model = make_model(Edge(), handle_terminations=False)
    fill(model.replay_buffer, 2 * BLOCK, seed=0)
    fresh = FreshTerminations()
    for _ in range(2 * BLOCK):
        fresh.see(model.policy, model.replay_buffer, None)
    assert fresh.take_scores() == {}


def test_newest_are_the_last_stored_across_the_end_of_the_ring():
    model = make_model(Edge(), buffer_size=50)
    fill(model.replay_buffer, 70, seed=0)
    batch = model.replay_buffer.newest(30)
    whole = make_model(Edge(), buffer_size=100)
    fill(whole.replay_buffer, 70, seed=0)
    for mine, theirs in zip(batch[:-1], whole.replay_buffer.newest(30)[:-1], strict=True):
        assert th.equal(mine[0], theirs[0])
    with pytest.raises(ValueError, match="n_steps must be between 1 and the 50 stored"):
        model.replay_buffer.newest(51)


def played(fates, gamma=0.9, seed=0):
    """Random episodes of several environments: (optimism seen, optimism by the definition), of each that was planned."""
    rng = np.random.default_rng(seed)
    optimism, seen, expected = PlanOptimism(), [], []
    n_envs, starts = len(fates), np.ones(len(fates), dtype=bool)
    episodes = [[] for _ in range(n_envs)]
    for t in range(max(map(len, fates))):
        values, rewards = (None if t < 2 else rng.normal(size=n_envs)), rng.normal(size=n_envs)
        fate = [f[t] if t < len(f) else "go" for f in fates]
        dones, truncated = np.array([f in ("end", "cut") for f in fate]), np.array([f == "cut" for f in fate])
        for i in range(n_envs):
            if starts[i] or fate[i] == "reset":
                episodes[i] = []
        starts |= np.array([f == "reset" for f in fate])
        for i in range(n_envs):
            episodes[i].append((np.nan if values is None else values[i], rewards[i]))
            if dones[i]:
                v, r = (np.array(x) for x in zip(*episodes[i], strict=True))
                n = len(r) - 1 if truncated[i] else len(r)
                tail = v[-1] if truncated[i] else 0.0
                met = [sum(gamma ** (k - s) * r[k] for k in range(s, n)) + gamma ** (n - s) * tail for s in range(n)]
                if not np.isnan(v[:n]).all():
                    expected.append(np.nanmean(v[:n] - met))
        seen += optimism.see(values, rewards, dones, truncated, starts, gamma)
        starts = dones
    return seen, expected


def test_optimism_is_the_mean_of_promise_less_return_met():
    """Warm-up has no promises; a termination ends the return, a truncation goes on with the last plan's promise."""
    go = ["go"] * 5
    seen, expected = played([[*go, "end", *go, "cut"], [*go, "cut", "go", "end"], ["end", "cut", *go, "reset", *go, "end"]])
    assert len(expected) == 5
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_training_logs_foresight(normalize):
    venv = make_vec_env(Edge, n_envs=2, seed=0, env_kwargs=dict(length=10))
    model = make_model(VecNormalize(venv) if normalize else venv)
    logged = {}
    dump = model.logger.dump

    def kept(step=0):
        logged.update(model.logger.name_to_value)
        dump(step)

    model.logger.dump = kept
    model.learn(300, log_interval=4)
    model.dump_logs()
    assert 0.0 <= logged["train/termination_encoded_recall"] <= 1.0
    assert np.isfinite(logged["rollout/plan_optimism"])
