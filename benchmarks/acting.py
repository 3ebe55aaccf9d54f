"""
How to act, on the models of a benchmark's grid: by the elites' mean ("last mean"), which is `deterministic=True`, by the
heaviest elite, by a random elite, as the paper evaluates, or by the policy prior (`make evidence-acting`). With `--planner`,
the planner has other settings than those it learned with.

    python benchmarks/acting.py --tasks Hopper-v5 --variants forward_kl --folder logs/evidence/settings --csv acting.csv \
        --planner max_std=0.2

Rows that the CSV has already are not made again.
"""

from sb3_boom import BOOM, zoo  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import csv
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

from sb3_boom.benchmark.runner import checkpoint_folder, entry_of_a_run, run_folder

WAYS = ("heaviest elite", "random elite", "last mean", "policy prior")
COLUMNS = ("task", "variant", "seed", "agent_steps", "acting", "planner", "episodes", "mean", "std")


class HeaviestElite:
    """
    Acts by the heaviest elite.

    :param model: whose planner to use
    """

    def __init__(self, model: BOOM) -> None:
        self.model = model

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        """As :meth:`sb3_boom.BOOM.predict`, with noise that picks another elite."""
        policy = self.model.policy
        drawn = policy._deterministic_noise

        def heaviest(obs):
            noise = drawn(obs)
            return noise._replace(elite=th.zeros_like(noise.elite))

        with mock.patch.object(policy, "_deterministic_noise", heaviest):
            return self.model.predict(observation, state, episode_start, deterministic=True)


def main() -> None:
    """Evaluate every checkpoint in every way, and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="the grid's")
    parser.add_argument("--csv", type=Path, required=True, help="where rows are appended")
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument(
        "--planner", nargs="*", default=[], metavar="NAME=NUMBER", help="of planner_kwargs, instead of the model's"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to act")
    parser.add_argument(
        "--conf-file", type=Path, default=zoo.hyperparams_file(cpu=True), help="hyperparameter file of the grid"
    )
    args = parser.parse_args()
    zoo.register()
    changed = {name: yaml.safe_load(number) for name, number in (setting.split("=") for setting in args.planner)}
    done = set()
    if args.csv.exists():
        with args.csv.open(newline="") as file:
            done = {tuple(row[name] for name in COLUMNS[:6]) for row in csv.DictReader(file)}
    else:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(",".join(COLUMNS) + "\n")
    for task in args.tasks:
        for variant in args.variants:
            for seed in args.seeds:
                run = run_folder(args.folder, task, variant, seed)
                entry = entry_of_a_run(task, variant, args.conf_file)
                model = BOOM.resume(checkpoint_folder(run), zoo.make_env(task, entry, seed, entry.get("n_envs", 1)))
                model.policy.planner_config = dataclasses.replace(model.policy.planner_config, **changed)
                ways: dict[str, tuple[Any, bool]] = {
                    "heaviest elite": (HeaviestElite(model), True),
                    "random elite": (model, False),
                    "last mean": (model, True),
                    **({} if changed else {"policy prior": (model.prior, True)}),
                }
                for acting, (actor, deterministic) in ways.items():
                    if acting not in args.ways:
                        continue
                    key = (task, variant, str(seed), str(model.num_timesteps), acting, " ".join(args.planner))
                    if key in done:
                        continue
                    th.manual_seed(seed)
                    env = zoo.make_env(task, entry, seed + 2000, args.episodes, evaluates=True)
                    if model.get_vec_normalize_env() is not None:
                        sync_envs_normalization(model.get_env(), env)
                    returns, _ = evaluate_policy(
                        actor, env, args.episodes, deterministic=deterministic, return_episode_rewards=True
                    )
                    row = (*key, args.episodes, f"{np.mean(returns):.2f}", f"{np.std(returns, ddof=1):.2f}")
                    with args.csv.open("a", newline="") as file:
                        csv.writer(file, lineterminator="\n").writerow(row)
                    print(*row, flush=True)


if __name__ == "__main__":
    main()
