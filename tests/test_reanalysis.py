"""Lazy reanalysis: stored plans are made anew, and nothing else of what is stored changes."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_boom import BOOM, reanalysis


def trained(reanalyze_freq: int, steps: int = 40, env="Pendulum-v1", policy="MlpPolicy", **settings) -> BOOM:
    return BOOM(policy, env, **{**TINY, "reanalyze_freq": reanalyze_freq, **settings}).learn(steps)


def stored(model: BOOM) -> tuple[th.Tensor, ...]:
    """What the planner did, ``[n, 2A]``, and what happened, ``[n, A + 2]``."""
    buffer = model.replay_buffer
    steps, dim = buffer._storage["steps"][: buffer.pos].flatten(0, 1), buffer.action_dim
    return steps[:, dim : 3 * dim].clone(), th.cat([steps[:, :dim], steps[:, 3 * dim :]], dim=1)


def test_plans_of_drawn_transitions_become_those_of_the_present_networks(monkeypatch):
    model = trained(0)
    before, happened = stored(model)
    batch = model.replay_buffer.sample(30)
    plans = []
    plan = model.policy.plan

    def noted(obs, mean, deterministic=False):
        assert not model.policy.training  # no dropout
        plans.append((obs, mean, plan(obs, mean, deterministic)))
        return plans[-1][2]

    monkeypatch.setattr(model.policy, "plan", noted)
    model.policy.set_training_mode(True)
    reanalysis.reanalyze(model.policy, model.replay_buffer, batch)
    [(obs, mean, made)] = plans
    assert model.policy.training and not mean.any()
    assert obs.equal(batch.observations[0, :20])
    expected = before.clone()
    for row, action, std in zip(batch.indices[0, :20], made.planner_action, made.planner_std, strict=True):
        expected[row] = th.cat([action, std])
    after, still = stored(model)
    assert after.equal(expected) and not after.equal(before)
    assert still.equal(happened)


@pytest.mark.parametrize("reanalyze_freq", [0, 1, 5])
def test_plans_are_made_anew_every_so_many_updates(reanalyze_freq, monkeypatch):
    calls = []
    monkeypatch.setattr("sb3_boom.boom.reanalyze", lambda *arguments: calls.append(arguments))
    model = trained(reanalyze_freq, steps=30)
    assert model._n_updates > 10
    assert len(calls) == (model._n_updates // reanalyze_freq if reanalyze_freq else 0)


def test_a_plan_that_failed_leaves_the_one_that_was_stored():
    model = trained(0)
    before, _ = stored(model)
    actions, stds = th.full((3, 1), 0.25), th.full((3, 1), 0.5)
    actions[1] = th.nan
    model.replay_buffer.update_plans(th.tensor([4, 5, 6]), actions, stds)
    after, _ = stored(model)
    assert after[5].equal(before[5])
    assert after[[4, 6]].equal(th.tensor([[0.25, 0.5]]).expand(2, 2))


@pytest.mark.parametrize("kind", ["normalised", "dictionary", "several"])
def test_learns_with_plans_made_anew_from_every_kind_of_observation(kind):
    if kind == "dictionary":
        model = trained(1, env=SimpleMultiObsEnv(random_start=False, discrete_actions=False), policy="MultiInputPolicy")
    else:
        env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * (3 if kind == "several" else 1))
        model = trained(1, env=VecNormalize(env) if kind == "normalised" else env, steps=60)
    plans, _ = stored(model)
    n_warmup = (plans[:, -1] > 7).sum()  # stds of random actions
    assert n_warmup < 20 and np.isfinite(plans.numpy()).all()
