"""
Train BOOM on a pendulum, save it, load it, act with it.

    python examples/quickstart.py

Some minutes on two cores. Prints the return of the planner, and of the policy without planning.
"""

import argparse

from sb3_boom import BOOM

# isort: split
from stable_baselines3.common.evaluation import evaluate_policy


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--episodes", type=int, default=10, help="of each evaluation")
    args = parser.parse_args()
    model = BOOM("MlpPolicy", "Pendulum-v1", seed=0, verbose=1)
    model.learn(args.steps)
    model.save("boom_pendulum")

    model = BOOM.load("boom_pendulum", env=model.get_env())
    env = model.get_env()
    assert env is not None
    for name, actor in (("planner", model), ("policy without planning", model.prior)):
        mean, std = evaluate_policy(actor, env, args.episodes)  # type: ignore[arg-type]
        print(f"{name}: a return of {mean:.0f} ± {std:.0f}")


if __name__ == "__main__":
    main()
