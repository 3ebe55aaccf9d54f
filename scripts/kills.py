"""
Kill a run again and again at random moments, and look whether anything is lost: a JSON with the counts.

    python scripts/kills.py --kills 50 --out benchmarks/results/kills.json

The run trains with a Monitor, a CSV logger and checkpoints, and begins fresh episodes there. Every process of it first tells
what it has found, to be compared with what the last one is known to have committed. At the end, its parameters are compared
with those of a run that was never killed.
"""

from sb3_boom import BOOM, checkpoint  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_boom.callbacks import ResumableCheckpointCallback

EPISODE = 25
SAVE_FREQ = 50
SETTINGS = dict(
    buffer_size=600,  # smaller than the run: the ring is written over
    learning_starts=100,
    pretrain_steps=20,
    batch_size=16,
    train_freq=4,
    planner_kwargs=dict(n_samples=16, n_elites=4, n_policy_samples=2, n_iterations=1),
    policy_kwargs=dict(model_size="tiny", mlp_dim=32, enc_dim=32, latent_dim=16, n_critics=2, compile=False),
    seed=0,
)


def train(folder: pathlib.Path, steps: int) -> BOOM:
    """
    :param folder: of the run, which goes on if it has a checkpoint
    :param steps: in all
    :return: the model
    """
    th.set_num_threads(1)
    env = make_vec_env(
        "Pendulum-v1", seed=0, env_kwargs=dict(max_episode_steps=EPISODE), monitor_dir=str(folder / "monitor"),
        monitor_kwargs=dict(override_existing=not checkpoint.is_there(folder)),
    )  # fmt: skip
    if checkpoint.is_there(folder):
        model = BOOM.resume(folder, env)
        rows = len((folder / "monitor" / "0.monitor.csv").read_text().splitlines()) - 2
        print(json.dumps({"resumed": model.num_timesteps, "rows": rows, "number": number_of_last(folder)}), flush=True)
    else:
        model = BOOM("MlpPolicy", env, **SETTINGS)  # type: ignore[arg-type]
    model.set_logger(configure(str(folder / "logs"), ["csv"]))
    callback = ResumableCheckpointCallback(folder, save_freq=SAVE_FREQ, fresh_episodes=True)
    return model.learn(steps - model.num_timesteps, callback, 1, reset_num_timesteps=False)


def number_of_last(folder: pathlib.Path) -> int:
    """:param folder: of a run. :return: number of its last finished checkpoint, 0 for none"""
    return max((int(path.parent.name[-6:]) for path in folder.glob("checkpoint-*/manifest.json")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--one", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/kills.json"))
    args = parser.parse_args()
    if args.one:
        train(args.one, args.steps)
        return

    moments = random.Random(args.seed)
    root = pathlib.Path(tempfile.mkdtemp())
    folder = root / "run"
    command = [sys.executable, __file__, "--steps", str(args.steps), "--one", str(folder)]
    counts = dict.fromkeys(("kills", "resumes", "during_a_write", "lost_checkpoints", "lost_rows", "failures"), 0)
    while counts["kills"] < args.kills:
        committed = number_of_last(folder)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = process.stdout.readline() if committed else ""  # type: ignore[union-attr]
        if committed:
            if not line:
                counts["failures"] += 1
                print(process.communicate()[1], flush=True)
                break
            found = json.loads(line)
            counts["resumes"] += 1
            counts["lost_checkpoints"] += found["number"] < committed
            # every checkpoint ends an episode: rows are all those of the steps before it
            counts["lost_rows"] += abs(found["rows"] - found["resumed"] // EPISODE)
        else:
            while not checkpoint.is_there(folder) and process.poll() is None:
                time.sleep(0.01)
        writes = counts["kills"] % 2 == 0  # every second one is meant to hit a write
        time.sleep(moments.uniform(0.0, 3.0))
        while writes and not list(folder.glob(".checkpoint-*")) and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0.0, 0.02) if writes else 0.0)
        if process.poll() is not None:
            counts["failures"] += process.returncode != 0
            print(f"the run ended by itself: {process.communicate()[1] or 'give it more --steps'}", flush=True)
            break
        process.kill()
        process.wait()
        counts["kills"] += 1
        counts["during_a_write"] += bool(list(folder.glob(".checkpoint-*")))
        print(counts, flush=True)

    steps = BOOM.resume(folder, make_vec_env("Pendulum-v1")).num_timesteps + 500
    subprocess.run([*command[:2], "--steps", str(steps), "--one", str(folder)], check=True, stdout=subprocess.DEVNULL)
    killed = BOOM.resume(folder, make_vec_env("Pendulum-v1"))
    whole = train(root / "whole", steps)
    differing = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(killed.policy.state_dict().values(), whole.policy.state_dict().values(), strict=True)
    )

    def logged(name: str) -> np.ndarray:
        return np.genfromtxt(root / name / "monitor" / "0.monitor.csv", delimiter=",", skip_header=2)[:, :2]

    result = {
        **counts,
        "steps": steps,
        "largest_difference_of_parameters": differing,
        "monitor_rows": len(logged("run")),
        "monitor_rows_are_the_same": bool(np.array_equal(logged("run"), logged("whole"))),
    }
    print(json.dumps(result), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
