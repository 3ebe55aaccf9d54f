"""
Train for long, and measure whether a step's time and the memory stay as they are: a JSON with a row per 10,000 steps.

    python scripts/soak.py --steps 100000 --out benchmarks/results/soak.json
"""

from sb3_boom import BOOM  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import json
import pathlib
import platform
import shutil
import tempfile
import time

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_boom.benchmark import rows
from sb3_boom.callbacks import ResumableCheckpointCallback


def resident_mb() -> float:
    """:return: memory of this process"""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


class Soak(BaseCallback):
    """
    Measures between checkpoints, and these.

    :param every: steps of a row
    :param out: the JSON, written anew after every row
    :param about: what it says besides
    """

    def __init__(self, every: int, out: pathlib.Path, about: dict) -> None:
        super().__init__()
        self.every, self.out, self.about = every, out, about
        self.rows: list[dict] = []

    def _on_training_start(self) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def _on_step(self) -> bool:
        if self.n_calls % self.every == 0:
            assert isinstance(self.model, BOOM) and self.model.replay_buffer is not None
            row = {
                "steps": self.num_timesteps,
                "updates": self.model._n_updates,
                "step_ms": round(1000 * (time.perf_counter() - self.start) / self.every, 3),
                "step_cpu_ms": round(1000 * (time.process_time() - self.cpu) / self.every, 3),
                "memory_mb": round(resident_mb(), 1),
                "buffer_rows": self.model.replay_buffer.size(),
                "threads_of_torch": th.get_num_threads(),
            }
            self.rows.append(row)
            print(row, flush=True)
            self.out.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")
            self.start, self.cpu = time.perf_counter(), time.process_time()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedPendulum-v5")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10_000)
    parser.add_argument("--train-freq", type=int, default=16)
    parser.add_argument("--buffer-size", type=int, default=50_000, help="smaller than --steps: the ring is written over, too")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/soak.json"))
    args = parser.parse_args()
    th.set_num_threads(1)
    # small plans and few updates: what grows, grows by the step
    settings = dict(
        train_freq=args.train_freq,
        gradient_steps=1,
        buffer_size=args.buffer_size,
        learning_starts=1000,
        pretrain_steps=500,
        planner_kwargs=dict(n_samples=16, n_elites=4, n_policy_samples=2, n_iterations=1),
        seed=0,
    )
    about = {
        "env": args.env,
        "settings": settings,
        "revision": rows.revision(),
        "versions": rows.versions(),
        "machine": platform.processor() or platform.machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        model = BOOM("MlpPolicy", make_vec_env(args.env, seed=0), **settings)  # type: ignore[arg-type]
        checkpoints = ResumableCheckpointCallback(folder, save_freq=args.every)
        model.learn(args.steps, callback=[Soak(args.every, args.out, about), checkpoints])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
