"""What is measured to see why a run does not learn, and that nothing of it disturbs the run."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_boom import BOOM, probing
from sb3_boom.callbacks import PlannerPriorEvalCallback, WorldModelCallback
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
    names = planner.statistic_names(2)
    ones = th.ones(1, len(names))
    meters = Meters()
    meters.add_plans(th.cat([ones, 3.0 * ones]))
    meters.add_plans(5.0 * ones)
    other = Meters()
    other.set_state(meters.state())
    assert meters.take_plans(2) == other.take_plans(2) == dict.fromkeys(names, 3.0)
    assert meters.take_plans(2) == {}


def test_environments_are_timed_without_a_trace(monkeypatch):
    model = make_model()
    model.learn(40, log_interval=100)
    assert model.meters.milliseconds()["env"] > 0.0
    assert "step_wait" not in model.env.unwrapped.__dict__


# ------------------------------------------------------------------ callbacks


def eval_env(n_envs: int = 1):
    return make_vec_env(short_pendulum, n_envs=n_envs)


def test_callbacks_do_not_disturb_training(tmp_path):
    """Stochastic ones least of all."""

    def trained(callbacks):
        model = make_model().learn(500, callback=callbacks)
        return [*(parameter.detach() for parameter in model.policy.parameters()), th.rand(1), th.as_tensor(np.random.rand(1))]

    watching = [
        PlannerPriorEvalCallback(eval_env(2), n_eval_episodes=2, eval_freq=130, deterministic=False),
        WorldModelCallback(eval_env(), n_eval_episodes=1, eval_freq=170),
    ]
    assert all(th.equal(one, other) for one, other in zip(trained(None), trained(watching), strict=True))


class Noted(gym.Wrapper):
    """Notes where episodes start."""

    def __init__(self, starts: list) -> None:
        super().__init__(short_pendulum())
        self.starts = starts

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.starts.append(tuple(obs))
        return obs, info


def test_planner_and_prior_meet_the_same_episodes_and_the_best_of_each_are_kept(tmp_path, capsys):
    starts: list = []
    seen = []

    class OnBest(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(self.parent.best_mean_reward)
            return len(seen) < 2

    callback = PlannerPriorEvalCallback(
        make_vec_env(lambda: Noted(starts)), n_eval_episodes=1, eval_freq=20, log_path=str(tmp_path), verbose=1,
        best_model_save_path=str(tmp_path), callback_on_new_best=OnBest(),
    )  # fmt: skip
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, callback=callback)
    del starts[0]  # whether it can be seeded is tried once
    # an evaluation seeds, starts, and starts once more after its only episode; twice
    assert starts[0] == starts[2] != starts[1] and starts[4] == starts[6] != starts[0]
    with np.load(tmp_path / "evaluations.npz") as saved:
        assert saved["timesteps"].tolist() == callback.timesteps and saved["results"].tolist() == callback.planner_returns
        assert saved["prior_results"].tolist() == callback.prior_returns and saved["prior_ep_lengths"].tolist()[0] == [10]
    for name in ("best_planner", "best_prior"):
        BOOM.load(tmp_path / f"{name}.zip")
    assert seen == sorted(seen) and callback.best_mean_reward == max(np.mean(callback.planner_returns, axis=1))
    if len(seen) == 2:  # the callback has stopped learning
        assert callback.timesteps[-1] == model.num_timesteps < 200
    with open(tmp_path / "progress.csv") as file:
        row = next(row for row in csv.DictReader(file) if row.get("eval/planner_gap"))
    gap = np.mean(callback.planner_returns[0]) - np.mean(callback.prior_returns[0])
    assert float(row["eval/planner_gap"]) == pytest.approx(gap, rel=1e-4)
    assert "gap=" in capsys.readouterr().out


@pytest.mark.parametrize("callback", [PlannerPriorEvalCallback, WorldModelCallback])
def test_an_environment_of_other_spaces_is_named_before_training(callback):
    with pytest.raises(ValueError, match=r"observations.*are not the model's"):
        make_model().learn(30, callback=callback(make_vec_env("MountainCarContinuous-v0")))


class Counting(gym.Env):
    """Counts to 8, then terminates; a reward of 1 a step."""

    observation_space = gym.spaces.Box(0.0, 8.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.n += 1
        return np.array([self.n], np.float32), 1.0, self.n == 8, False, {}


def test_returns_to_come_are_discounted_sums_and_end_with_terminations():
    model = make_model(Counting(), gamma=0.5)
    (episode,) = probing.collect(model, make_vec_env(Counting), 1, seed=0, planned=True)
    assert episode.terminated and len(episode) == 8 and episode.observations[""][:, 0].tolist() == list(range(9))
    expected = [2.0 * (1.0 - 0.5 ** (8 - t)) for t in range(8)]
    assert probing.returns_to_come(model, episode) == pytest.approx(expected)
    episode.terminated = False  # critics start at 0, so what lies beyond is 0, and only where that weighs little it is known
    assert np.isfinite(probing.returns_to_come(model, episode)).tolist() == [True] * 8
    model.gamma = 0.9
    assert np.isfinite(probing.returns_to_come(model, episode)).tolist() == [0.9 ** (8 - t) <= 0.5 for t in range(8)]


def test_a_perfect_world_model_has_no_open_loop_error(monkeypatch):
    model = make_model(Counting())
    episodes = probing.collect(model, make_vec_env(Counting), 2, seed=0, planned=False)
    world = model.policy.world_model
    table = probing.encode(model, episodes[0])

    def following(z, action):
        return table[(th.cdist(z, table).argmin(dim=-1) + 1).clamp(max=8)]

    monkeypatch.setattr(world, "next", following)
    perfect = probing.open_loop(model, episodes, depth=10)
    assert np.allclose(perfect["latent"][:8], 0.0, atol=1e-6) and np.isnan(perfect["latent"][8:]).all()
    assert np.allclose(perfect["value"][:8], 0.0, atol=1e-6)
    monkeypatch.setattr(world, "next", lambda z, action: z)  # nothing ever changes
    assert np.allclose(probing.open_loop(model, episodes, depth=5)["latent"], 1.0)


def test_the_world_model_is_looked_at_while_it_learns(tmp_path):
    model = make_model(Counting())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60, callback=WorldModelCallback(make_vec_env(Counting, n_envs=2), n_eval_episodes=2, eval_freq=30))
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    expected = {f"world_model/{what}_error_{k}" for what in ("latent", "reward", "termination", "value") for k in range(1, 9)}
    expected |= {f"world_model/value_{what}_{who}" for what in ("bias", "ratio") for who in ("planner", "prior")}
    assert expected | {"world_model/termination_recall"} <= set(header)
