"""What is measured to see why a run does not learn, and that nothing of it disturbs the run."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3.common.logger import configure

from sb3_boom import BOOM
from sb3_boom.core import planner
from sb3_boom.diagnostics import effective_rank
from sb3_boom.meters import Meters


def short_pendulum() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=10)


def make_model(env=None, **kwargs) -> BOOM:
    return BOOM("MlpPolicy", env or short_pendulum(), **{**TINY, **kwargs})


def elites(values, by_policy) -> planner.Elites:
    n = len(values)
    return planner.Elites(th.zeros(1, n, 2), th.ones(1, n) / n, th.tensor([values]), th.tensor([by_policy]))


def test_statistics_of_a_plan():
    std = th.tensor([[[0.2, 0.4]], [[1.0, 1.0]]])  # [H, E, A]
    policy_actions = th.tensor([[[[0.0, 0.0], [0.4, 0.0]]], [[[9.0, 9.0], [9.0, 9.0]]]])
    action = th.tensor([[1.0, 0.6]])
    measured = planner.statistics(elites([4.0, 2.0, -th.inf], [True, False, False]), std, action, policy_actions)[0]
    found = dict(zip(planner.statistic_names(2), measured.tolist(), strict=True))
    assert found == pytest.approx(
        dict(
            value=4.0, value_spread=1.0, policy_elites=1 / 3, at_bounds=0.5, std_1=0.3, std_2=1.0,
            prior_distance=np.sqrt((0.8**2 + 0.6**2) / 2),
        )
    )  # fmt: skip


def test_effective_rank_counts_the_directions_latents_vary_in():
    generator = th.Generator().manual_seed(0)
    few = th.randn(200, 3, generator=generator) @ th.linalg.qr(th.randn(16, 3, generator=generator)).Q.T
    assert effective_rank(few + 5.0) == pytest.approx(3.0, abs=0.1)
    assert effective_rank(th.ones(10, 4)) == pytest.approx(1.0)
    assert effective_rank(th.randn(8, 16, generator=generator)) <= 7.0


def test_all_signals_are_logged_and_finite(tmp_path):
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60, log_interval=1)
    with open(tmp_path / "progress.csv") as file:
        row = {name: value for name, value in list(csv.DictReader(file))[-1].items() if value}
    expected = [
        *(f"planner/{name}" for name in planner.statistic_names(model.horizon)),
        "train/align_effective", "train/align_loss_scaled", "train/entropy", "train/latent_norm", "train/latent_rank",
        "train/td_error_q05", "train/td_error_q50", "train/td_error_q95",
        "time/env_ms", "time/sample_ms", "time/plan_ms", "time/update_ms",
    ]  # fmt: skip
    assert all(np.isfinite(float(row[name])) for name in expected)
    assert 1 / TINY["batch_size"] <= float(row["train/align_effective"]) <= 1.0
    assert float(row["train/align_loss_scaled"]) == pytest.approx(model.align_coef * float(row["train/align_loss"]), rel=1e-3)


def test_a_planner_without_samples_of_the_policy_has_no_distance_to_it(tmp_path):
    model = make_model(planner_kwargs={**TINY["planner_kwargs"], "n_policy_samples": 0})
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, log_interval=1)
    header = (tmp_path / "progress.csv").read_text()
    assert "planner/value_spread" in header and "prior_distance" not in header


def test_means_of_plans_are_over_all_since_the_last_row_and_come_back():
    meters = Meters()
    meters.add_plans(th.tensor([[1.0, 10.0], [3.0, 30.0]]))
    meters.add_plans(th.tensor([[5.0, 50.0]]))
    other = Meters()
    other.set_state(meters.state())
    assert meters.take_plans() == other.take_plans() == [3.0, 30.0]
    assert meters.take_plans() == []


def test_environments_are_timed_without_a_trace(monkeypatch):
    model = make_model()
    model.learn(40, log_interval=100)
    assert model.meters.milliseconds()["env"] > 0.0
    assert "step_wait" not in model.env.unwrapped.__dict__
