"""
What each of the three changes to TD-MPC2's termination head does alone (`make evidence-terminations`).

    python benchmarks/terminations.py --tasks Hopper-v5 Walker2d-v5 --csv logs/evidence/terminations.csv

| head | learns from | its gradient reaches the dynamics | a plan survives |
|---|---|---|---|
| old | predicted latents | yes | until an end is more likely than not |
| encoded | encoded observations too | yes | as old |
| detached | predicted latents | no | as old |
| soft | predicted latents | yes | by its probability |
| mended | encoded observations too | no | by its probability |

A row is an evaluation, with what was logged since the one before. Runs that the CSV has whole are not made again.
"""

from sb3_boom import BOOM, zoo  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import csv
import itertools
import multiprocessing
import pathlib
import time
from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F

from sb3_boom.benchmark.rows import revision
from sb3_boom.callbacks import PlannerPriorEvalCallback
from sb3_boom.core import losses, planner

SCORES = ("train/termination_recall", "train/termination_precision", "rollout/plan_optimism")
COLUMNS = ("task", "head", "seed", "agent_steps", "planner_return", "prior_return", "train_return")
COLUMNS += (*(score.split("/")[1] for score in SCORES), "wall_s", "revision")


class Head(NamedTuple):
    """
    How terminations are learned and used.

    :param encoded: whether encoded observations are learned from, too
    :param detached: whether the gradient ends at the head's input
    :param soft: whether a plan survives by probability, not by a threshold
    """

    encoded: bool
    detached: bool
    soft: bool


HEADS = {
    "old": Head(False, False, False),
    "encoded": Head(True, False, False),
    "detached": Head(False, True, False),
    "soft": Head(False, False, True),
    "mended": Head(True, True, True),
}


def use(head: Head) -> None:
    """
    Have this process learn and plan so; before anything is compiled.

    :param head: how
    """

    def termination_loss(network, predicted, encoded, terminations, valid, weights):
        predicted = predicted.detach() if head.detached else predicted
        logits = network(th.stack([predicted, encoded]) if head.encoded else predicted[None])
        cross_entropies = F.binary_cross_entropy_with_logits(logits, terminations.expand_as(logits), reduction="none")
        return losses.masked_mean(cross_entropies, valid, weights).mean()

    losses.termination_loss = termination_loss
    planner.end_probabilities = (lambda logits: logits.sigmoid()) if head.soft else (lambda logits: (logits > 0.0).float())


class Log(PlannerPriorEvalCallback):
    """
    Collects a row per evaluation.

    :param run: task, head and seed
    :param args: see :class:`sb3_boom.callbacks.PlannerPriorEvalCallback`
    """

    def __init__(self, run: tuple[str, str, int], *args) -> None:
        super().__init__(*args)
        self.run = run
        self.rows: list[tuple] = []
        self.begin = time.monotonic()

    def evaluate(self) -> None:
        """Evaluate now; what was logged until here is taken before the logger writes it."""
        self.logger.record("train/termination_recall", np.nan)  # of a stretch without ends
        self.logger.record("train/termination_precision", np.nan)
        for name, value in self.model.fresh_terminations.take_scores().items():
            self.logger.record(f"train/{name}", value)
        scores = [round(float(self.logger.name_to_value.get(score, np.nan)), 3) for score in SCORES]
        train = np.mean([info["r"] for info in list(self.model.ep_info_buffer)[-20:]])
        super().evaluate()
        returns = [round(float(np.mean(h[-1])), 2) for h in (self.planner_returns, self.prior_returns)]
        seconds = round(time.monotonic() - self.begin, 1)
        self.rows.append((*self.run, self.model.num_timesteps, *returns, round(float(train), 2), *scores, seconds, revision()))


def run_one(task: str, head: str, seed: int, steps: int, eval_freq: int) -> list[tuple]:
    """
    :param task: environment id
    :param head: a key of :data:`HEADS`
    :param seed: of the run
    :param steps: agent steps
    :param eval_freq: agent steps between evaluations
    :return: the rows
    """
    th.set_num_threads(1)
    use(HEADS[head])
    zoo.register()
    entry = zoo.entry(zoo.hyperparams_file(cpu=True), task)
    log = Log((task, head, seed), zoo.make_env(task, entry, seed + 1000, 10, evaluates=True), 10, eval_freq)
    env = zoo.make_env(task, entry, seed, 1)
    settings = zoo.settings_of_the_model(entry, int(np.prod(env.action_space.shape or ())))
    model = BOOM(env=env, **settings | {"buffer_size": steps, "seed": seed})
    model.learn(steps, callback=log, log_interval=steps)  # episodes: the evaluations alone write
    return log.rows


def main() -> None:
    """Train what is missing, and append each run's rows once it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["Hopper-v5", "Walker2d-v5"])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--eval-freq", type=int, default=5_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--csv", type=pathlib.Path, required=True)
    args = parser.parse_args()
    done = set()
    if args.csv.exists():
        with args.csv.open(newline="") as file:
            done = {tuple(row[name] for name in COLUMNS[:3]) for row in csv.DictReader(file)}
    else:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(",".join(COLUMNS) + "\n")
    grid = [
        (task, head, seed, args.steps, args.eval_freq)
        for seed, task, head in itertools.product(args.seeds, args.tasks, args.heads)
        if (task, head, str(seed)) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        results = [pool.apply_async(run_one, run) for run in grid]
        for result in results:
            rows = result.get()
            with args.csv.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            print(*rows[-1], flush=True)


if __name__ == "__main__":
    main()
