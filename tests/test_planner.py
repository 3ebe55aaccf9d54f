"""MPPI and CEM, on problems whose answers are known."""

import math
from dataclasses import replace

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sb3_boom import BOOM
from sb3_boom.core import planner, torch_layers
from sb3_boom.core.actor import Actor
from sb3_boom.core.critic import Critic, draw_pairs
from sb3_boom.core.planner import PlannerConfig, PlannerNoise
from sb3_boom.core.world_model import WorldModel

CONFIG = PlannerConfig(n_samples=128, n_elites=16, n_policy_samples=8, n_iterations=6, horizon=3, gamma=0.9)
CPU = th.device("cpu")
SEEN, UNSEEN = th.ones(()), th.zeros(())


class Identity:
    """Decodes a "logit" as the scalar itself."""

    def decode(self, logits):
        return logits


class KnownWorld(nn.Module):
    """The latent stays; a reward function of latent and action; perhaps a termination where actions are large."""

    def __init__(self, reward, termination=None, action_dim=2):
        super().__init__()
        self.two_hot = Identity()
        self.reward, self.termination = reward, termination

    def next(self, z, action):
        return z + 0.0 * action.sum(-1, keepdim=True) if self.termination is None else th.cat([z[..., :1], action], -1)

    def reward_logits(self, z, action):
        return self.reward(z, action)


class KnownActor(nn.Module):
    def __init__(self, action_dim=2):
        super().__init__()
        self.action_dim = action_dim

    def sample(self, z, noise):
        return th.tanh(noise)


class KnownCritic(nn.Module):
    """The same value for every state."""

    n_critics = 5

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def values(self, z, action, members, dropout_mask=None):
        return th.full((2, *z.shape[:-1], 1), self.value)


def make_plan(world, critic=None, config=CONFIG, n_envs=1, z=None, mean=None, noise=None, seen=SEEN, action_dim=2):
    z = th.zeros(n_envs, 1 if getattr(world, "termination", None) is None else 3) if z is None else z
    noise = noise or planner.draw_noise(config, n_envs, action_dim, 5, CPU, th.Generator().manual_seed(0))
    mean = th.zeros(n_envs, config.horizon, action_dim) if mean is None else mean
    return planner.plan(world, KnownActor(), critic or KnownCritic(), config, z, mean, noise, seen)


def real_networks(handle_terminations=True):
    th.manual_seed(0)
    world = WorldModel(4, 2, 16, 16, 16, simnorm_dim=8, handle_terminations=handle_terminations)
    networks = (world, Actor(16, 2, 16), Critic(16, 2, 16, 3))
    for module in networks:
        for parameter in module.parameters():
            parameter.data += 0.3 * th.randn_like(parameter)
    return networks


@pytest.mark.parametrize("uniform_elites", [False, True])
@settings(max_examples=10)
@given(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_finds_the_optimum_of_a_quadratic_problem(uniform_elites, x, y):
    target = th.tensor([x, y])
    world = KnownWorld(lambda z, action: -10.0 * (action - target).square().sum(-1, keepdim=True))
    plan = make_plan(
        world, config=replace(CONFIG, n_samples=512, n_iterations=12, min_std=0.01, uniform_elites=uniform_elites)
    )
    th.testing.assert_close(plan.mean[0, 0], target, rtol=0, atol=0.06)
    th.testing.assert_close(plan.planner_action[0], target, rtol=0, atol=0.1)


@pytest.mark.parametrize("uniform_elites", [False, True])
def test_batched_plans_equal_single_ones(uniform_elites):
    config = replace(CONFIG, uniform_elites=uniform_elites, n_iterations=3)
    networks = real_networks()
    noise = planner.draw_noise(config, 4, 2, 3, CPU)
    z, mean = th.rand(4, 16), 0.1 * th.randn(4, 3, 2)
    with th.no_grad():
        together = planner.plan(*networks, config, z, mean, noise, SEEN)
        for e in range(4):
            own = PlannerNoise(
                noise.policy[:, e : e + 1],
                noise.candidates[:, :, e : e + 1],
                noise.terminal[:, e : e + 1],
                noise.exploration[e : e + 1],
                noise.elite[e : e + 1],
                noise.critic_pairs,
            )
            alone = planner.plan(*networks, config, z[e : e + 1], mean[e : e + 1], own, SEEN)
            for ours, single in zip(together, alone, strict=True):
                th.testing.assert_close(ours[e], single[0], rtol=0, atol=1e-5)


def test_warm_start_shifts_one_step_and_a_zero_one_is_a_cold_start(monkeypatch):
    received = []
    refine = planner.refine

    def recorded(*args):
        received.append((args[6], args[7]))
        return refine(*args)

    monkeypatch.setattr(planner, "refine", recorded)
    mean = th.arange(12.0).view(2, 3, 2) / 12
    mean[1] = 0.0  # an episode starts there
    world = KnownWorld(lambda z, action: action.sum(-1, keepdim=True))
    make_plan(world, n_envs=2, mean=mean)
    first_mean, first_std = received[0]
    assert th.equal(first_mean[:, 0], th.cat([mean[0, 1:], th.zeros(1, 2)]))
    assert not first_mean[:, 1].any()
    assert (first_std == CONFIG.max_std).all()


def value_of(world, actions, critic=None, seen=SEEN, config=CONFIG):
    z = th.zeros(1, 3)
    noise = th.zeros(1, actions.shape[2], 2)
    pair = th.tensor([0, 1])
    return planner.trajectory_values(world, KnownActor(), critic or KnownCritic(), config, z, actions, noise, pair, seen)


def test_value_is_discounted_reward_plus_discounted_critic():
    world = KnownWorld(lambda z, action: th.ones_like(action[..., :1]))
    value = value_of(world, th.zeros(3, 1, 1, 2), KnownCritic(10.0))
    assert value.item() == pytest.approx(1 + 0.9 + 0.81 + 0.729 * 10)


def ends_above_half(z):
    return 20.0 * (z[..., 1:2] - 0.5)


def test_predicted_termination_thins_out_rewards_and_critic_once_terminations_were_seen():
    odds = {0.0: 1 / 3, 1.0: 9.0}  # of ending where the first action was that
    world = KnownWorld(
        lambda z, action: th.ones_like(action[..., :1]),
        lambda z: th.where(z[..., 1:2] > 0.5, math.log(odds[1.0]), math.log(odds[0.0])),
    )
    actions = th.zeros(3, 1, 2, 2)
    actions[1, 0, 1, 0] = 1.0  # the second trajectory most likely ends with its second step
    values = value_of(world, actions, KnownCritic(10.0))
    goes_on, ends = 0.75, 0.1  # survival: 1 - odds / (1 + odds)
    expected = [
        1 + 0.9 * alive[0] + 0.81 * alive[0] * alive[1] + 0.729 * alive[0] * alive[1] * alive[2] * 10
        for alive in ((goes_on, goes_on, goes_on), (goes_on, ends, goes_on))
    ]
    assert values[0].tolist() == pytest.approx(expected)
    full = 1 + 0.9 + 0.81 + 0.729 * 10
    assert value_of(world, actions, KnownCritic(10.0), UNSEEN)[0].tolist() == pytest.approx([full, full])


def test_value_at_the_horizon_is_a_pairs_mean_or_the_minimum_of_all():
    world, actor, critic = real_networks()
    z, actions, noise, pair = th.rand(2, 16), th.rand(3, 2, 5, 2), th.randn(2, 5, 2), th.tensor([0, 2])
    final = z.unsqueeze(1).expand(-1, 5, -1)
    for action in actions:
        final = world.next(final, action)
    q = critic.values(final, actor.sample(final, noise), th.arange(critic.n_critics)).squeeze(-1)
    values = {
        how: planner.trajectory_values(
            world, actor, critic, replace(CONFIG, horizon_value=how), z, actions, noise, pair, UNSEEN
        )
        for how in planner.HORIZON_VALUES
    }
    difference = CONFIG.gamma**3 * (q.amin(dim=0) - q[[0, 2]].mean(dim=0))
    assert difference.abs().max() > 0.01
    th.testing.assert_close(values["min"] - values["mean"], difference, rtol=1e-3, atol=1e-5)


def test_planner_avoids_a_known_termination():
    """Large first actions earn more at once, but end the episode."""
    world = KnownWorld(lambda z, action: 1.0 + action[..., :1], ends_above_half)
    assert make_plan(world, KnownCritic(10.0)).planner_action[0, 0] <= 0.5
    assert make_plan(world, KnownCritic(10.0), seen=UNSEEN).planner_action[0, 0] > 0.5


def test_value_of_a_plan_is_its_best_elites(monkeypatch):
    scored = []
    trajectory_values = planner.trajectory_values

    def recorded(*args):
        scored.append(trajectory_values(*args))
        return scored[-1]

    monkeypatch.setattr(planner, "trajectory_values", recorded)
    plan = make_plan(KnownWorld(lambda z, action: action[..., :1] + z), n_envs=2, z=th.tensor([[0.0], [1.0]]))
    assert plan.value.tolist() == scored[-1].amax(dim=1).tolist()


@pytest.mark.parametrize("bad", [th.nan, th.inf])
def test_value_that_is_not_finite_never_wins(bad):
    def reward(z, action):
        return th.where(action[..., :1] > 0.0, bad, -10.0 - action[..., :1].abs())

    plan = make_plan(KnownWorld(reward))
    assert th.isfinite(plan.mean).all()
    assert plan.planner_action[0, 0] <= 0.0


def test_plan_without_any_finite_value_is_nan_and_leaves_the_others_alone():
    world = KnownWorld(lambda z, action: action[..., :1] + z)
    z = th.tensor([[0.0], [th.nan], [0.0]])
    plan = make_plan(world, n_envs=3, z=z)
    for part in plan:
        assert part[1].isnan().all() or part is plan.planner_std
        assert th.isfinite(part[[0, 2]]).all()


def test_elites_are_the_best_and_cem_weighs_them_alike():
    world = KnownWorld(lambda z, action: action[..., :1])
    actions = 2 * th.rand(3, 1, CONFIG.n_samples, 2) - 1
    values = value_of(world, actions)
    best = actions[0, 0, values[0].argsort(descending=True)[: CONFIG.n_elites]]
    noise = th.zeros(3, 1, 0, 2), th.zeros(1, CONFIG.n_samples, 2)
    weights = {}
    for uniform in (False, True):
        config = replace(CONFIG, uniform_elites=uniform)
        mean, std = th.zeros(3, 1, 2), th.ones(3, 1, 2)
        mean, std, first, weights[uniform], best_value = planner.refine(
            world, KnownActor(), KnownCritic(), config, th.zeros(1, 1), actions, mean, std, *noise, th.tensor([0, 1]), SEEN
        )
        assert th.equal(first[0], best)
        assert th.equal(best_value, values.amax(dim=1))
        w = weights[uniform][0, :, None]
        th.testing.assert_close(mean[0, 0], (w * best).sum(0))
        th.testing.assert_close(std[0, 0], (w * (best - mean[0, 0]).square()).sum(0).sqrt().clamp(0.05, 2.0))
    expected = th.exp(0.5 * (values[0].sort(descending=True).values[: CONFIG.n_elites] - values.max()))
    th.testing.assert_close(weights[False][0], expected / expected.sum())
    th.testing.assert_close(weights[True][0], th.full((CONFIG.n_elites,), 1 / CONFIG.n_elites))


def test_std_stays_within_its_bounds():
    world = KnownWorld(lambda z, action: -1e4 * (action - 0.3).square().sum(-1, keepdim=True))
    config = replace(CONFIG, min_std=0.2, max_std=0.5, n_iterations=20)
    assert th.allclose(make_plan(world, config=config).planner_std, th.tensor(0.2))


def test_elite_is_drawn_by_its_weight_without_noise_the_heaviest_and_by_infinite_noise_the_mean():
    world = KnownWorld(lambda z, action: action[..., :1])
    config = replace(CONFIG, n_iterations=1, temperature=2.0)
    noise = planner.draw_noise(config, 1, 2, 5, CPU)
    first = make_plan(world, config=config, noise=noise._replace(elite=th.zeros(1, config.n_elites)))
    mean, std = th.zeros(3, 1, 2), th.full((3, 1, 2), config.max_std)
    policy = th.tanh(noise.policy)
    _, _, elites, weights, _ = planner.refine(
        world, KnownActor(), KnownCritic(), config, th.zeros(1, 1), policy, mean, std,
        noise.candidates[0], noise.terminal[0], noise.critic_pairs[0], SEEN,
    )  # fmt: skip
    assert th.equal(first.planner_action[0], elites[0, 0])
    averaged = make_plan(world, config=config, noise=noise._replace(elite=th.full((1, config.n_elites), th.inf)))
    assert th.equal(averaged.planner_action, averaged.mean[:, 0]) and not th.equal(averaged.planner_action[0], elites[0, 0])
    draws = planner.draw_noise(replace(config, n_samples=16), 4000, 2, 5, CPU).elite
    picked = (weights.log() + draws).argmax(dim=1)
    frequency = th.bincount(picked, minlength=config.n_elites) / len(picked)
    th.testing.assert_close(frequency, weights[0], rtol=0, atol=0.03)


def test_exploration_adds_the_final_std_and_clamps():
    world = KnownWorld(lambda z, action: -50.0 * (action - 0.9).square().sum(-1, keepdim=True))
    noise = planner.draw_noise(CONFIG, 1, 2, 5, CPU)
    noise = noise._replace(exploration=th.tensor([[100.0, -1.0]]))
    plan = make_plan(world, noise=noise)
    assert plan.exploratory_action[0, 0] == 1.0
    th.testing.assert_close(plan.exploratory_action[0, 1], plan.planner_action[0, 1] - plan.planner_std[0, 1])


def test_noise_is_reproducible_and_pairs_are_distinct_and_uniform():
    draws = [planner.draw_noise(CONFIG, 2, 3, 5, CPU, th.Generator().manual_seed(5)) for _ in range(2)]
    for a, b in zip(*draws, strict=True):
        assert th.equal(a, b)
    pairs = draw_pairs(20_000, 5, CPU)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    counts = th.bincount(5 * pairs[:, 0] + pairs[:, 1], minlength=25).view(5, 5)
    assert (counts[~th.eye(5, dtype=th.bool)] - 1000).abs().max() < 200


@pytest.mark.parametrize(
    "bad",
    [dict(n_elites=200), dict(horizon=0), dict(n_iterations=0), dict(min_std=3.0), dict(min_std=0.0), dict(temperature=0.0),
     dict(n_policy_samples=-1), dict(n_samples=16.5), dict(horizon_value="max")],
)  # fmt: skip
def test_impossible_settings_are_value_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(CONFIG, **bad)


def test_what_is_prepared_for_a_gpu_makes_the_same_plan(monkeypatch):
    """Rows filled up with zeros, critics gathered at once, biases added last, and one sort, here without a GPU."""
    policy = BOOM("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs=dict(model_size="tiny", compile=False)).policy
    for parameter in policy.critic.parameters():  # biases and heads start at 0
        nn.init.normal_(parameter, std=0.3)
    obs = th.randn(2, 3, generator=th.Generator().manual_seed(0))
    plain = policy.plan(obs, policy.initial_mean(2), deterministic=True)
    prepared = []
    for module in (torch_layers, planner):
        monkeypatch.setattr(module, "compiles_for_gpu", lambda x: prepared.append(x.shape) or True)
    assert (policy.action_dim + policy.latent_dim) % torch_layers.ALIGNMENT != 0
    of_gpu = policy.plan(obs, policy.initial_mean(2), deterministic=True)
    assert prepared
    for ours, theirs in zip(of_gpu, plain, strict=True):
        assert th.allclose(ours, theirs, atol=1e-4, equal_nan=True)
