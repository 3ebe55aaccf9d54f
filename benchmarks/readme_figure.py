"""
Draw the README's figures: BOOM's learning curves beside SAC's published ones on DMC, and beside SAC run here on Hopper.

    python benchmarks/readme_figure.py

Ours are the three seeds of ``results/dmc6.csv``, each evaluation ten episodes of the planner. SAC's are the means that
TD-MPC2's authors released; they come from other machines, with one point for every 100,000 env steps. On ``Hopper-v5`` all
are three seeds of ours, by ``results/settings-hopper.csv`` and ``results/sac-hopper.csv``.
"""

import argparse
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from sb3_boom.benchmark.report import published_curves
from sb3_boom.benchmark.runner import SUITES

# label: file, variant, colour
HOPPER = {
    'BOOM, horizon_value="min"': ("settings-hopper.csv", "min_value", "tab:blue"),
    'BOOM, horizon_value="mean"': ("settings-hopper.csv", "forward_kl", "tab:cyan"),
    "SAC (SB3)": ("sac-hopper.csv", "SAC", "tab:orange"),
}
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


def draw_hopper(folder: pathlib.Path, output: pathlib.Path) -> None:
    """
    :param folder: with the CSVs
    :param output: the PNG
    """
    figure, axes = plt.subplots(figsize=(6.0, 3.4))
    for label, (name, variant, colour) in HOPPER.items():
        table = pd.read_csv(folder / name)
        by_step = table[table["variant"] == variant].groupby("env_steps")["planner_return"]
        axes.plot(by_step.mean().index / 1000, by_step.mean(), "o-", color=colour, label=label)
        axes.fill_between(by_step.mean().index / 1000, by_step.min(), by_step.max(), color=colour, alpha=0.15)
    axes.set(
        title="Hopper-v5, three seeds: mean and range", xlabel="environment steps, thousands", ylabel="return", ylim=(0, None)
    )
    axes.legend(frameon=False, loc="upper left")
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
    draw_hopper(args.csv.parent, args.out.with_name("boom-beside-sac-hopper.png"))


if __name__ == "__main__":
    main()
