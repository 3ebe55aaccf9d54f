"""
What a checkpoint of a full replay buffer costs, and what the next one does after some new steps: a JSON.

    python scripts/checkpoint_cost.py --rows 1000000 --new 10000 --out benchmarks/results/checkpoint-cost.json
"""

from sb3_boom import BOOM, checkpoint  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import gc
import json
import pathlib
import resource
import shutil
import tempfile
import time

import gymnasium as gym
import numpy as np
import torch as th

from sb3_boom.buffers import WeightedReplayBuffer


class Dog(gym.Env):
    """Of dm_control's dogs the sizes alone."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (223,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (38,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.standard_normal(223).astype(np.float32), {}

    def step(self, action):
        return self.np_random.standard_normal(223).astype(np.float32), 0.0, False, False, {}


def fill(buffer: WeightedReplayBuffer, n_rows: int) -> None:
    """
    :param buffer: to add rows of noise to, in episodes of 1,000
    :param n_rows: how many
    """
    rng = np.random.default_rng(buffer._n_added)
    obs = rng.standard_normal((1, 223), dtype=np.float32)
    for row in range(n_rows):
        following = rng.standard_normal((1, 223), dtype=np.float32)
        done = row % 1000 == 999
        action = rng.standard_normal((1, 38), dtype=np.float32)
        buffer.add(obs, following, action, np.zeros(1), np.array([done]), [{"TimeLimit.truncated": True}])
        obs = rng.standard_normal((1, 223), dtype=np.float32) if done else following


def size(folder: pathlib.Path) -> int:
    """:param folder: any. :return: bytes of its files"""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--new", type=int, default=10_000)
    parser.add_argument("--preset", default="paper", help="of the model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/checkpoint-cost.json"))
    args = parser.parse_args()
    th.set_num_threads(1)
    folder = pathlib.Path(tempfile.mkdtemp())
    model = BOOM("MlpPolicy", Dog(), buffer_size=args.rows, preset=args.preset, policy_kwargs=dict(compile=False))
    model.learn(1)  # makes its logger
    assert model.replay_buffer is not None
    writer = checkpoint.Writer(folder, keep=2)
    writer.open(model)
    result = {"rows": args.rows, "new_rows": args.new, "preset": args.preset}
    for name, n_rows in (("first", args.rows), ("next", args.new)):
        fill(model.replay_buffer, n_rows)
        before, start = size(folder), time.perf_counter()
        path = writer.write(model)
        result[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
        result[f"{name}_megabytes"] = round((size(folder) - before) / 1e6, 1)
        result[f"{name}_model_megabytes"] = round(size(path) / 1e6, 1)
    writer.close()
    del model
    gc.collect()
    start = time.perf_counter()
    BOOM.resume(folder, Dog())
    result["resume_seconds"] = round(time.perf_counter() - start, 2)
    result["peak_memory_megabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(result), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
