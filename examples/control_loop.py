"""
A control loop at 50 Hz with an exported model, on Gymnasium's pendulum in place of a robot.

    sb3-boom export logs/boom/Pendulum-v1_1/Pendulum-v1.zip pendulum.onnx
    python examples/control_loop.py pendulum.onnx

Prints the return, and how punctual the loop was. On a robot, ``read_sensors`` and ``send`` are the robot's; the loop needs
numpy and onnxruntime alone.
"""

import argparse
import time

import gymnasium as gym
import numpy as np

from sb3_boom.deployment import Agent


class Pendulum:
    """What a robot would be: sensors to read, a motor to command."""

    def __init__(self) -> None:
        self.env = gym.make("Pendulum-v1")
        self.observation, _ = self.env.reset(seed=0)
        self.reward = 0.0

    def read_sensors(self) -> np.ndarray:
        """:return: cosine, sine and speed of the angle ``[3]``"""
        return self.observation

    def send(self, action: np.ndarray) -> None:
        """:param action: torque ``[1]``"""
        self.observation, reward, _, _, _ = self.env.step(action)
        self.reward += float(reward)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported model")
    parser.add_argument("--hz", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    period = 1.0 / args.hz
    # a quarter of the period stays for sensors and motors
    agent = Agent.load(args.model, deadline_ms=0.75e3 * period)
    robot = Pendulum()
    late, took, iterations = np.zeros(args.steps), np.zeros(args.steps), np.zeros(args.steps, int)
    start = time.perf_counter()
    for step in range(args.steps):
        due = start + step * period
        time.sleep(max(0.0, due - time.perf_counter()))
        begun = time.perf_counter()
        robot.send(agent(robot.read_sensors()))
        late[step], took[step] = begun - due, time.perf_counter() - begun
        iterations[step] = agent.iterations_done
    print(f"return of {args.steps} steps: {robot.reward:.1f}")
    for name, values in (("begun late by", 1e3 * late), ("step took", 1e3 * took)):
        middle, most = np.quantile(values, 0.99), values.max()
        print(f"{name}: median {np.median(values):.2f} ms, 99 % within {middle:.2f} ms, at most {most:.2f} ms")
    print(f"steps that ended after the next was due: {int((late + took > period).sum())}")
    print(f"iterations of the planner: at least {iterations.min()}, on average {iterations.mean():.2f}")


if __name__ == "__main__":
    main()
