"""
What a step of RayVecEnv costs beside SubprocVecEnv, with environments that cost nothing: a JSON.

    python benchmarks/ray_vec_env.py --out benchmarks/results/ray-vec-env.json

Medians of milliseconds for a step of all environments. Each actor is a process of its own, as a worker of SubprocVecEnv is;
``grouped`` has all environments in one actor. The large observations are 96 x 96 x 9 bytes.
"""

import argparse
import functools
import json
import os
import pathlib
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_boom.cluster import RayVecEnv
from sb3_boom.cluster.connection import connect, import_ray

SHAPES: dict[str, tuple[int, ...]] = {"small": (24,), "large": (96, 96, 9)}


class Nothing(gym.Env):
    """
    Does nothing.

    :param shape: of observations
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        dtype: Any = np.uint8 if len(shape) == 3 else np.float32
        self.observation_space = spaces.Box(0, 255, shape, dtype)
        self.action_space = spaces.Box(-1, 1, (6,))
        self._obs = np.zeros(shape, dtype)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """:param seed: unused. :param options: unused. :return: an observation and an info"""
        super().reset(seed=seed)
        return self._obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """:param action: unused. :return: see gymnasium"""
        return self._obs, 0.0, False, False, {}


def step_ms(env: VecEnv, seconds: float) -> float:
    """
    :param env: to be stepped
    :param seconds: for how long
    :return: median of a step, in milliseconds
    """
    env.reset()
    actions = np.zeros((env.num_envs, 6), dtype=np.float32)
    for _ in range(20):
        env.step(actions)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        env.step(actions)
        times.append(time.perf_counter() - start)
    env.close()
    return round(1000 * float(np.median(times)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/ray-vec-env.json"))
    args = parser.parse_args()
    connect(num_cpus=max(args.envs), object_store_memory=200_000_000)
    found: dict[str, Any] = {"cores": os.cpu_count(), "ray": import_ray().__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for n in args.envs:
        for name, shape in SHAPES.items():
            env_fns: list[Any] = [functools.partial(Nothing, shape)] * n
            kinds: dict[str, Any] = {
                "subproc": lambda fns=env_fns: SubprocVecEnv(fns),
                "ray": lambda fns=env_fns: RayVecEnv(fns, num_cpus=0),
                "ray_grouped": lambda fns=env_fns, n=n: RayVecEnv(fns, envs_per_actor=n, num_cpus=0),
            }
            found[f"{name}-{n}"] = {kind: step_ms(make(), args.seconds) for kind, make in kinds.items()}
            found[f"{name}-{n}"]["load_average"] = round(os.getloadavg()[0], 1)
            print(name, n, found[f"{name}-{n}"], flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
