"""
Learn from rendered images: three grey frames of a pendulum, 64 pixels wide.

    python examples/pixels.py

Images are shifted at random while BOOM learns; ``image_shift=0`` switches
that off, where a few pixels are all that there is to see.
"""

import argparse

from sb3_boom import BOOM

# isort: split
import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AddRenderObservation, GrayscaleObservation, TransformObservation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack


def from_pixels() -> gym.Env:
    """:return: the pendulum, seen by a camera ``[64, 64, 1]``"""
    env: gym.Env = gym.make("Pendulum-v1", render_mode="rgb_array")
    env = GrayscaleObservation(AddRenderObservation(env), keep_dim=True)
    space = gym.spaces.Box(0, 255, (64, 64, 1), np.uint8)
    # the means of blocks of 7 x 7, of the picture's middle
    return TransformObservation(
        env, lambda image: image[26:474, 26:474].reshape(64, 7, 64, 7, 1).mean(axis=(1, 3)).astype(np.uint8), space
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=5, help="of the evaluation")
    args = parser.parse_args()
    # a single frame does not show the speed
    env = VecFrameStack(make_vec_env(from_pixels), n_stack=3)
    model = BOOM("CnnPolicy", env, buffer_size=20_000, seed=0, verbose=1)
    model.learn(args.steps)
    mean, std = evaluate_policy(model, env, args.episodes)
    print(f"planner: a return of {mean:.0f} ± {std:.0f}")


if __name__ == "__main__":
    main()
