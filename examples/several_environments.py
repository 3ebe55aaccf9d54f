"""
Eight environments at once, with normalised observations and rewards; then the model in another environment.

    python examples/several_environments.py

One plan serves all environments. ``gradient_steps=-1`` updates once for each environment's step; fewer updates are quicker,
and learn less from a step.
"""

import argparse
import pathlib

from sb3_boom import BOOM

# isort: split
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of all environments together")
    parser.add_argument("--episodes", type=int, default=8, help="of the evaluation")
    args = parser.parse_args()
    folder = pathlib.Path("boom_normalised")
    folder.mkdir(exist_ok=True)
    # vec_env_cls=SubprocVecEnv pays where a step of the environment takes milliseconds
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=8, seed=0), gamma=0.99)
    model = BOOM("MlpPolicy", env, gradient_steps=-1, seed=0, verbose=1)
    model.learn(args.steps)
    model.save(folder / "model")
    env.save(str(folder / "normalisation.pkl"))

    # the zip has the model alone: what was learned about the observations is loaded beside it, and kept as it is
    new = VecNormalize.load(str(folder / "normalisation.pkl"), make_vec_env("Pendulum-v1", n_envs=4))
    new.training = new.norm_reward = False
    model = BOOM.load(folder / "model", env=new)
    mean, std = evaluate_policy(model, new, args.episodes)
    print(f"planner: a return of {mean:.0f} ± {std:.0f}, in the environment's own units")


if __name__ == "__main__":
    main()
