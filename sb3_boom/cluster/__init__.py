"""Runs and environments on many machines, by Ray: ``pip install "sb3_boom[ray]"``, see ``docs/more_than_one_machine.md``."""

from sb3_boom.cluster.grid import run_grid
from sb3_boom.cluster.vec_env import RayVecEnv

__all__ = ["RayVecEnv", "run_grid"]
