"""Videos with the planner's promise beside the frames."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_boom import BOOM
from sb3_boom.video import WIDTH, PlanPanel


class Lamp(gym.Env):
    """Episodes of five steps; its frames are black, and of a height that is no whole number of inches."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    render_mode = "rgb_array"

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(self.steps), False, self.steps == 5, {}

    def render(self):
        return np.zeros((133, 50, 3), np.uint8)


@pytest.fixture
def panel() -> PlanPanel:
    return PlanPanel(DummyVecEnv([Lamp]))


def test_frames_keep_their_picture_and_gain_the_curves_of_the_episode(panel):
    model = BOOM("MlpPolicy", panel, **TINY)
    obs = panel.reset()
    plan = model.policy.plan(model.policy.obs_to_tensor(obs)[0], model.policy.initial_mean(1))
    empty = panel.render()
    assert empty.shape == (133, 50 + WIDTH, 3) and empty.dtype == np.uint8 and not empty[:, :50].any()
    panel.planned(plan)
    panel.step(np.zeros((1, 1)))
    panel.step(np.zeros((1, 1)))  # nothing was planned for it
    assert panel.promised[0] == float(plan.value[0]) and np.isnan(panel.promised[1]) and panel.rewards == [1.0, 2.0]
    assert (panel.render() != empty).any()
    for _ in range(3):
        panel.step(np.zeros((1, 1)))
    assert panel.promised == [] and panel.rewards == []  # a new episode


def test_what_is_no_picture_is_left_alone(panel, monkeypatch):
    panel.reset()
    monkeypatch.setattr(panel.venv, "render", lambda mode=None: None)
    assert panel.render() is None
