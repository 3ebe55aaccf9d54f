"""A Markdown page of a benchmark's CSVs beside published results: tables, curves, interquartile means."""

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

from sb3_boom.benchmark import rows
from sb3_boom.benchmark.baselines import ALGORITHMS, LEARNING_STARTS
from sb3_boom.benchmark.rows import Row

PUBLISHED = Path(__file__).parent / "published"
# in the order in which they are believed
SOURCES = ("boom_paper_curves.csv", "tdmpc2_dmc_hard_4M.csv", "dmc_state_1M.csv", "bmpc_dmc_1M.csv", "gym_mujoco_1M.csv")
NAMES = {
    "boom": "BOOM (paper)",
    "tdmpc2": "TD-MPC2",
    "tdmpc2_rerun_by_bmpc": "TD-MPC2 (BMPC's rerun)",
    "bmpc": "BMPC",
    "dreamerv3": "DreamerV3",
    "sac": "SAC",
    "crossq": "CrossQ",
    "simbaV2_utd1": "SimbaV2",
    "bro_utd2": "BRO, 2 updates a step",
    "bro_utd10": "BRO, 10 updates a step",
    "drq": "DR.Q",
}
# by the task's prefix, what scores are normalised by: the maximum, or else CrossQ's published return at 100k env steps
MAX_RETURN = {
    "dm_control/": 1000.0,
    "Hopper-v5": 2764.0,
    "Walker2d-v5": 3914.0,
    "HalfCheetah-v5": 8112.0,
    "Ant-v5": 2299.0,
    "Humanoid-v5": 2603.0,
}
LEVEL = 0.95
NEAR = 0.05  # of the env steps asked for


class Curve(NamedTuple):
    """
    A published learning curve.

    :param algorithm: its name
    :param env_steps: simulation steps ``[n]``
    :param mean: mean returns ``[n]``
    :param std: standard deviations over seeds ``[n]``; NaN where they were not published
    :param source: the file it is from
    """

    algorithm: str
    env_steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    source: str

    def at(self, env_steps: int) -> float:
        """
        :param env_steps: simulation steps
        :return: mean return at the point nearest to them; NaN if it is off by more than :data:`NEAR`, since a line drawn to
            it, from the start for instance, says nothing
        """
        nearest = np.abs(self.env_steps - env_steps).argmin()
        near = abs(self.env_steps[nearest] - env_steps) <= NEAR * env_steps
        return float(self.mean[nearest]) if near else float("nan")


def published_name(task: str) -> str:
    """
    :param task: environment id
    :return: the task's name in the published files
    """
    name = task.removeprefix("dm_control/").rsplit("-v", 1)[0]
    if task.startswith("dm_control/"):
        name = name.replace("ball_in_cup", "cup").replace("_", "-")
    return name


def published_curves(task: str) -> list[Curve]:
    """
    :param task: environment id
    :return: the published curves of this task, one an algorithm: from the first of :data:`SOURCES` that has it
    """
    curves: dict[str, Curve] = {}
    for file in SOURCES:
        table = pd.read_csv(PUBLISHED / file)
        table = table[table["task"] == published_name(task)]
        for algorithm, points in table.groupby("algorithm"):
            if file == "boom_paper_curves.csv" and algorithm == "tdmpc2" and task.startswith("dm_control/"):
                continue  # drawn on the wrong axis there; the next file has them
            name = NAMES[str(algorithm)]
            points = points.sort_values("env_steps")
            std = points["return_std"] if "return_std" in points else np.full(len(points), np.nan)
            steps, mean, std = (
                np.asarray(column, dtype=float) for column in (points["env_steps"], points["return_mean"], std)
            )
            curves.setdefault(name, Curve(name, steps, mean, std, file))
    return list(curves.values())


def max_return(task: str) -> float | None:
    """
    :param task: environment id
    :return: what to normalise a return by, or None where it is unknown
    """
    return next((value for prefix, value in MAX_RETURN.items() if task.startswith(prefix)), None)


def interquartile_mean(scores: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """
    Interquartile mean over all runs, with a bootstrap interval that draws seeds anew within every task.

    :param scores: of every task, its runs' scores ``[n_seeds]``
    :param seed: of the bootstrap
    :return: the mean, and the interval's ends; these are NaN where a task has a single run
    """

    def iqm(*tasks: np.ndarray) -> float:
        return float(stats.trim_mean(np.concatenate(tasks), 0.25))

    if any(len(task) < 2 for task in scores):
        return iqm(*scores), np.nan, np.nan
    result = stats.bootstrap(
        tuple(scores), iqm, vectorized=False, confidence_level=LEVEL, method="percentile", n_resamples=2000, rng=seed
    )
    return iqm(*scores), float(result.confidence_interval.low), float(result.confidence_interval.high)


def last_rows(table: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """
    :param table: rows of a benchmark
    :return: by task and variant, each run's evaluation at the last step that all of its seeds reached
    """
    runs: dict[tuple[str, str], dict[int, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in table:
        runs[row.task, row.variant][row.seed][row.agent_steps] = row
    result = {}
    for key, seeds in runs.items():
        common = set.intersection(*(set(steps) for steps in seeds.values()))
        if common:
            result[key] = [steps[max(common)] for _, steps in sorted(seeds.items())]
    return result


def write(
    paths: Sequence[Path],
    output: Path,
    tasks: Sequence[str] | None = None,
    until: int | None = None,
    variants: Sequence[str] | None = None,
) -> list[str]:
    """
    Write ``output`` and, beside it, a curve per task as PNG.

    :param paths: CSVs of benchmarks
    :param output: the Markdown page
    :param tasks: environment ids of those to show; default: all
    :param until: agent steps beyond which evaluations are left out, to compare runs of different lengths; default: none
    :param variants: names of those to show; default: all
    :return: what was left out: lines of the CSVs that are no rows, variants whose seeds were evaluated at different steps,
        tasks and variants that were asked for and are not there
    :raises ValueError: for a file that is no benchmark CSV, or if there is no row at all
    """
    by_key: dict[tuple, Row] = {}
    problems: list[str] = []
    for path in paths:
        found, wrong = rows.read(path)
        problems += wrong
        for row in found:
            chosen = (not tasks or row.task in tasks) and (not variants or row.variant in variants)
            if chosen and (until is None or row.agent_steps <= until):
                if by_key.setdefault((*row.run, row.agent_steps), row) != row:
                    problems.append(f"{path}: {row} is in an earlier file too, otherwise; it is left out")
    table = list(by_key.values())
    within = "" if until is None else f" up to step {until}"
    if not table:
        asked = ", ".join([*(tasks or ()), *(variants or ())])
        raise ValueError(f"no evaluation{asked and f' of {asked}'}{within} in {', '.join(map(str, paths))}")
    there = {row.task for row in table} | {row.variant for row in table}
    problems += [f"no evaluation of {name}{within}" for name in (*(tasks or ()), *(variants or ())) if name not in there]
    output.parent.mkdir(parents=True, exist_ok=True)
    shown = list(dict.fromkeys(row.task for row in table))
    last = dict(sorted(last_rows(table).items(), key=lambda item: shown.index(item[0][0])))
    for task, variant in dict.fromkeys((row.task, row.variant) for row in table):
        if (task, variant) not in last:
            problems.append(f"{task} {variant}: its seeds have no step in common; it is in the curves alone")
    lines = [
        f"# {escaped(output.stem.capitalize())}",
        "",
        "Returns at the last evaluation that all seeds of a row reached: mean and sample standard deviation. The prior is",
        "the policy without planning. A variant is named for its alignment, or for what differs from its hyperparameter file.",
        "",
    ]
    lines += _returns(last)
    lines += _beside_published(last)
    lines += _aggregates(last)
    lines += ["", "## Curves", ""]
    for task in shown:
        image = output.parent / f"{output.stem}-{file_name(task)}.png"
        plot(task, [row for row in table if row.task == task], image)
        lines.append(f"![{escaped(task)}]({quote(image.name)})")
    revisions = sorted({row.revision for row in table})
    versions = sorted({row.versions for row in table})
    lines += ["", f"Revisions: {escaped(', '.join(revisions))}. Versions: {escaped('; '.join(versions))}."]
    output.write_text("\n".join(lines) + "\n")
    return problems


def escaped(text: str) -> str:
    """
    A CSV's text on a page: nothing in it is Markdown, HTML, or a new line.

    :param text: any
    :return: to be put into a table or a paragraph
    """
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*\[\]<>|!&$~#^]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def plain(text: str) -> str:
    """
    :param text: any
    :return: for Matplotlib, which takes what is between two dollars for mathematics
    """
    return "".join(character if character.isprintable() else " " for character in text).replace("$", r"\$")


def file_name(text: str) -> str:
    """
    :param text: a task
    :return: its name as a part of a file's, in the page's folder
    """
    name = re.sub(r"[^\w.+-]", "-", text.replace("/", "-"), flags=re.ASCII)[:100]
    return name if name == text.replace("/", "-") else f"{name}-{zlib.crc32(text.encode()):08x}"


def _mean_and_std(returns: np.ndarray) -> str:
    return f"{returns.mean():.1f}" + (f" ± {returns.std(ddof=1):.1f}" if len(returns) > 1 else "")


def _returns(last: dict[tuple[str, str], list[Row]]) -> list[str]:
    others = [name for name in ALGORITHMS if any(name == variant for _, variant in last)]
    lines, clock, align = [], "", ""
    if others:
        names = ", ".join(others)
        lines = [f"Run here too, by their own defaults after {LEARNING_STARTS:,} random steps and without a planner: {names}."]
        lines += ["BOOM runs by each task's entry in its hyperparameter file, which may do more updates a step than they do."]
        lines += ["Minutes are of one thread, evaluations and whatever else the machine did included.", ""]
        clock, align = " minutes |", "--:|"
    lines += [f"| task | variant | agent steps | env steps | seeds | planner | policy prior | each seed's planner |{clock}"]
    lines += [f"|---|---|--:|--:|--:|--:|--:|---|{align}"]
    for (task, variant), runs in last.items():
        planner, prior, wall_s = (
            np.array([getattr(row, name) for row in runs]) for name in ("planner_return", "prior_return", "wall_s")
        )
        each = ", ".join(f"{value:.0f}" for value in planner)
        lines.append(
            f"| {escaped(task)} | {escaped(variant)} | {runs[0].agent_steps:,} | {runs[0].env_steps:,} | {len(runs)} "
            f"| {_mean_and_std(planner)} | {'' if variant in ALGORITHMS else _mean_and_std(prior)} | {each} |"
            + (f" {wall_s.mean() / 60:.0f} |" if others else "")
        )
    return lines


def _beside_published(last: dict[tuple[str, str], list[Row]]) -> list[str]:
    published = {
        (task, variant): at
        for (task, variant), runs in last.items()
        if (at := {c.algorithm: mean for c in published_curves(task) if np.isfinite(mean := c.at(runs[0].env_steps))})
    }
    if not published:
        return []
    names = [name for name in NAMES.values() if any(name in at for at in published.values())]
    lines = ["", "## Beside published means, at the same env steps", ""]
    lines += [f"| task | variant | env steps | ours | {' | '.join(names)} |", f"|---|---|--:|--:|{'--:|' * len(names)}"]
    for (task, variant), at in published.items():
        runs = last[task, variant]
        cells = [f"{at[name]:.0f}" if name in at else "" for name in names]
        ours = np.mean([row.planner_return for row in runs])
        lines.append(f"| {escaped(task)} | {escaped(variant)} | {runs[0].env_steps:,} | {ours:.0f} | {' | '.join(cells)} |")
    return [*lines, "", "Published values are means over seeds, without the seeds: they are shown, not resampled."]


def _aggregates(last: dict[tuple[str, str], list[Row]]) -> list[str]:
    # scores by step, variant, task and seed
    scores: dict[int, dict[str, dict[tuple[str, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for (task, variant), runs in last.items():
        if highest := max_return(task):
            for row in runs:
                scores[row.agent_steps][variant][task, row.seed] = row.planner_return / highest
    lines = []
    for steps, variants in scores.items():
        shared = set.intersection(*(set(runs) for runs in variants.values()))
        counted = [("all", variant, sorted(score)) for variant, score in variants.items()]
        if shared and any(set(score) != shared for score in variants.values()):
            counted += [("shared", variant, sorted(shared)) for variant in variants]
        for which, variant, chosen in counted:
            tasks = sorted({task for task, _ in chosen})
            by_task = [np.array([variants[variant][run] for run in chosen if run[0] == task]) for task in tasks]
            mean, low, high = interquartile_mean(by_task)
            interval = f"{low:.3f} to {high:.3f}" if np.isfinite(low) else "a seed alone has none"
            counts = f"{len(tasks)} | {len(chosen)}, {which}"
            average = np.mean([task.mean() for task in by_task])
            lines.append(f"| {steps:,} | {escaped(variant)} | {counts} | {mean:.3f} | {interval} | {average:.3f} |")
    if not lines:
        return []
    return [
        "",
        "## Interquartile mean",
        "",
        "These are planner returns divided by the task's maximum, over all runs (task and seed) of a variant. To compare",
        "variants, they are also given over the runs that all variants with this last step share.",
        f"{LEVEL:.0%} bootstrap interval. Gymnasium's tasks have no maximum: their returns are divided by what CrossQ is",
        "published with there at 100k env steps.",
        "",
        "| agent steps | variant | tasks | runs | interquartile mean | interval | mean |",
        "|--:|---|--:|--:|--:|--:|--:|",
        *lines,
    ]


def plot(task: str, table: Sequence[Row], path: Path) -> None:
    """
    Draw our curves over the published ones, on one axis of env steps; and where algorithms are compared, against minutes.

    :param task: environment id
    :param table: its rows
    :param path: the PNG
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = list(dict.fromkeys(row.variant for row in table))
    if set(variants) & set(ALGORITHMS):
        figure, (axes, clock) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
        clock.set(xlabel="minutes of one thread, evaluations included")
    else:
        (figure, axes), clock = plt.subplots(figsize=(7, 4.5)), None
    furthest = max(row.env_steps for row in table)
    for curve in published_curves(task):
        near = curve.env_steps <= max(2 * furthest, curve.env_steps[min(1, len(curve.env_steps) - 1)])
        (line,) = axes.plot(curve.env_steps[near], curve.mean[near], "--", linewidth=1, label=curve.algorithm)
        if np.isfinite(curve.std).any():
            low, high = (curve.mean[near] + sign * curve.std[near] for sign in (-1, 1))
            axes.fill_between(curve.env_steps[near], low, high, alpha=0.08, color=line.get_color())
    for variant in variants:
        frame = pd.DataFrame([row for row in table if row.variant == variant], columns=list(Row._fields))
        by_step = frame.groupby("env_steps")["planner_return"]
        mean, low, high = by_step.mean(), by_step.min(), by_step.max()
        n_seeds = frame["seed"].nunique()
        whose = "run here" if variant in ALGORITHMS else "ours"
        label = f"{whose}, {plain(variant)} ({n_seeds} seed{'s' * (n_seeds > 1)}, range)"
        (line,) = axes.plot(mean.index, mean, "o-", label=label)
        axes.fill_between(mean.index, low, high, alpha=0.2, color=line.get_color())
        if clock is not None:
            clock.plot(frame.groupby("env_steps")["wall_s"].mean() / 60.0, mean, "o-", color=line.get_color())
    axes.set(xlabel="env steps", ylabel="return", title=plain(task))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
