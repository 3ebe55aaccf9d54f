"""
Draw the README's figures: BOOM's learning curves beside SAC's on DMC, and beside SAC's and others' on Gymnasium's MuJoCo.

    python benchmarks/readme_figure.py

Ours are the three seeds of ``results/dmc6.csv``, each evaluation ten episodes of the planner. SAC's are the means that
TD-MPC2's authors released; they come from other machines, with one point for every 100,000 env steps. On Gymnasium's tasks
ours are those of ``results/gym5.csv``, with the seeds that are there; SAC's are SB3's, run by us
(``results/others.csv``); the others are published, see ``sb3_boom/benchmark/published``.
"""

import argparse
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from sb3_boom.benchmark.report import published_curves
from sb3_boom.benchmark.runner import SUITES

# whose published curves are drawn on Gymnasium's tasks, and their colours
BESIDE = {"CrossQ": "tab:green", "SimbaV2": "tab:purple", "DR.Q": "tab:red"}
ROOT = pathlib.Path(__file__).parents[1]
FURTHEST = 300_000  # env steps


def draw(csv: pathlib.Path, output: pathlib.Path) -> None:
    """
    :param csv: of ``sb3-boom benchmark run``
    :param output: the PNG
    """
    table = pd.read_csv(csv)
    table = table[table["variant"] == "forward_kl"]
    figure, panels = plt.subplots(2, 3, figsize=(9.5, 5.2), sharex=True, sharey=True)
    for axes, task in zip(panels.flat, SUITES["dmc6"], strict=True):
        by_step = table[table["task"] == task].groupby("env_steps")["planner_return"]
        steps = by_step.mean().index / 1000
        axes.plot(
            steps,
            by_step.mean(),
            "o-",
            color="tab:blue",
            label="BOOM, this package, one CPU core a run (3 seeds: mean and range)",
        )
        axes.fill_between(steps, by_step.min(), by_step.max(), color="tab:blue", alpha=0.2)
        sac = next(curve for curve in published_curves(task) if curve.algorithm == "SAC")
        near = sac.env_steps <= FURTHEST
        axes.plot(sac.env_steps[near] / 1000, sac.mean[near], "s--", color="tab:orange", label="SAC, published (mean)")
        axes.set(title=task.removeprefix("dm_control/").removesuffix("-v0"), ylim=(-20, 1020))
    figure.supxlabel("environment steps, thousands", fontsize=10)
    figure.supylabel("return, of at most 1000", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(output, dpi=110)


def draw_gymnasium(results: pathlib.Path, output: pathlib.Path) -> None:
    """
    :param results: folder with CSVs of ``sb3-boom benchmark run``
    :param output: the PNG
    """
    table = pd.read_csv(results / "gym5.csv")
    others = pd.read_csv(results / "others.csv")
    run_here = (
        (table, "tab:blue", "BOOM, this package:\nmean and range"),
        (others[others["variant"] == "SAC"], "tab:orange", "SAC (SB3), run by us:\nthree seeds"),
    )
    figure, grid = plt.subplots(2, 3, figsize=(9.5, 5.2), sharex=True)
    *panels, legend = grid.flat
    for axes, task in zip(panels, SUITES["gym5"], strict=True):
        for rows, color, label in run_here:
            by_step = rows[rows["task"] == task].groupby("env_steps")["planner_return"]
            steps = by_step.mean().index / 1000
            axes.plot(steps, by_step.mean(), "o-", color=color, label=label)
            axes.fill_between(steps, by_step.min(), by_step.max(), color=color, alpha=0.2)
        for curve in published_curves(task):
            if curve.algorithm in BESIDE:
                near = curve.env_steps <= table["env_steps"].max()
                label = f"{curve.algorithm}, published (v4)"
                axes.plot(curve.env_steps[near] / 1000, curve.mean[near], "s--", color=BESIDE[curve.algorithm], label=label)
        n_seeds = table[table["task"] == task]["seed"].nunique()
        axes.set(title=f"{task} ({n_seeds} seed{'s' * (n_seeds > 1)})", ylim=(0, None))
    legend.axis("off")
    legend.legend(*axes.get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("environment steps, thousands", fontsize=10)
    figure.supylabel("return", fontsize=10)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "dmc6.csv")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "boom-beside-sac.png")
    args = parser.parse_args()
    matplotlib.use("Agg")
    draw(args.csv, args.out)
    draw_gymnasium(args.csv.parent, args.out.with_name("boom-on-gymnasium.png"))


if __name__ == "__main__":
    main()
