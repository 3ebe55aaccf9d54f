"""
An environment of your own: a cart to be parked at a mark, within the rails.

    python examples/own_environment.py

What matters to BOOM: actions are a Box, rewards are of the order of 1, a TimeLimit truncates, and an episode terminates only
where nothing can follow.
"""

import argparse
from typing import Any

from sb3_boom import BOOM

# isort: split
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from sb3_boom.callbacks import PlannerPriorEvalCallback


class Parking(gym.Env):
    """A cart of 1 kg on rails from -1 to 1 m, and a mark on them. Leaving the rails ends the episode."""

    def __init__(self) -> None:
        limits = np.array([1.5, 5.0, 0.8], np.float32)  # position in m, speed in m/s, the mark's position in m
        self.observation_space = spaces.Box(-limits, limits)
        self.action_space = spaces.Box(-2.0, 2.0, (1,))  # force in N

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: of the random numbers
        :param options: unused
        :return: observation ``[3]``, no information
        """
        super().reset(seed=seed)
        self.position, self.speed = self.np_random.uniform(-0.8, 0.8), 0.0
        self.mark = self.np_random.uniform(-0.8, 0.8)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: force ``[1]``
        :return: observation, reward, whether the cart left the rails, False (TimeLimit truncates), no information
        """
        self.speed += 0.1 * float(action[0])
        self.position += 0.1 * self.speed
        reward = 1.0 - abs(self.position - self.mark) - 0.1 * self.speed**2
        fell = abs(self.position) > 1.0
        return self._observation(), reward - 10.0 * fell, fell, False, {}

    def _observation(self) -> np.ndarray:
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        return np.clip(np.array([self.position, self.speed, self.mark], np.float32), space.low, space.high)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=10, help="of each evaluation")
    args = parser.parse_args()
    # the time limit makes gamma and the length of warm-up
    gym.register("Parking-v0", Parking, max_episode_steps=100)  # type: ignore[arg-type]  # it takes no further arguments
    check_env(gym.make("Parking-v0").unwrapped, skip_render_check=True)
    model = BOOM("MlpPolicy", "Parking-v0", seed=0, verbose=1)
    model.learn(args.steps)

    env = model.get_env()
    assert env is not None
    evaluation = PlannerPriorEvalCallback(env, n_eval_episodes=args.episodes)
    evaluation.init_callback(model)
    evaluation.evaluate()
    print(f"planner {np.mean(evaluation.planner_returns[-1]):.1f}, policy {np.mean(evaluation.prior_returns[-1]):.1f}")


if __name__ == "__main__":
    main()
