"""
From training to one file that plans without torch: train, export, act.

    pip install ".[export]" ".[deploy]"
    python examples/deploy.py

``control_loop.py`` runs the file at 50 Hz.
"""

import argparse

from sb3_boom import BOOM

# isort: split
import gymnasium as gym

from sb3_boom.deployment import Agent


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--episodes", type=int, default=5, help="to act for")
    args = parser.parse_args()
    model = BOOM("MlpPolicy", "Pendulum-v1", seed=0, verbose=1)
    model.learn(args.steps)
    path = model.export("pendulum.onnx")

    # from here on numpy and onnxruntime are enough, on a robot for instance
    agent = Agent.load(path, deadline_ms=15)
    env = gym.make("Pendulum-v1")
    total = 0.0
    for episode in range(args.episodes):
        observation, _ = env.reset(seed=episode)
        agent.reset()  # an episode starts: no plan to go on from
        over = False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(agent(observation))
            total += float(reward)
            over = terminated or truncated
    print(f"the exported planner: a return of {total / args.episodes:.0f}")


if __name__ == "__main__":
    main()
