"""Benchmark CSVs in the long form that other tools read: a line for every number."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from sb3_boom.benchmark import rows
from sb3_boom.benchmark.baselines import ALGORITHMS
from sb3_boom.benchmark.rows import Row

COLUMNS = ("exp_name", "env_name", "seed", "metric", "env_step", "value")


def write(paths: Sequence[Path], output: Path) -> list[str]:
    """
    Write ``output``, with the columns :data:`COLUMNS`. The metrics are ``return`` (of the planner, or of an algorithm that has
    none), ``prior_return`` and ``wall_s``; the experiment is ``BOOM-<variant>``, or the algorithm.

    :param paths: CSVs of benchmarks
    :param output: the CSV
    :return: lines of the CSVs that are no rows
    :raises ValueError: for a file that is no benchmark CSV
    """
    problems: list[str] = []
    found: list[Row] = []
    for path in paths:
        table, wrong = rows.read(path)
        found += table
        problems += wrong
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in found:
            writer.writerows(long_form(row))
    return problems


def long_form(row: Row) -> Iterator[tuple[str, str, int, str, int, float]]:
    """
    :param row: one evaluation
    :return: its numbers, one by one
    """
    has_planner = row.variant not in ALGORITHMS
    metrics = {"return": row.planner_return, "prior_return": row.prior_return, "wall_s": row.wall_s}
    for metric, value in metrics.items():
        if has_planner or metric != "prior_return":
            yield f"BOOM-{row.variant}" if has_planner else row.variant, row.task, row.seed, metric, row.env_steps, value
