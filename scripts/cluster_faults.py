"""
Faults of a Ray cluster, made on purpose in the middle of a grid: a JSON that counts what was lost, doubled or made anew.

    python scripts/cluster_faults.py --out benchmarks/results/cluster-faults.json

Three nodes on this machine, of which two have a CPU each; the runs are small ones of BOOM.

* node: one that trains is killed, with its processes
* driver: killed by SIGKILL, and started again
* memory: a worker gets SIGKILL, which is what the kernel's out-of-memory killer sends
* drivers: two on one grid and one CSV
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

from sb3_boom.cluster.connection import import_ray

ROOT = pathlib.Path(__file__).parents[1]
FAULTS = ("node", "driver", "memory", "drivers")
SETTINGS = [
    "planner_kwargs:dict(n_samples=8,n_elites=2,n_policy_samples=1,n_iterations=1)",
    "policy_kwargs:dict(model_size='tiny',mlp_dim=16,enc_dim=16,latent_dim=8,n_critics=2,compile=False)",
    *("learning_starts:20", "pretrain_steps:2", "n_envs:1", "gradient_steps:1", "batch_size:8"),
]
EVAL_FREQ = 20  # steps
PATIENCE_S = 400.0


class Grid:
    """
    One grid on a cluster of its own.

    :param folder: for the storage, the CSV and logs
    :param runs: number of runs
    :param steps: of a run
    """

    def __init__(self, folder: pathlib.Path, runs: int, steps: int) -> None:
        import_ray()
        from ray.cluster_utils import Cluster

        small: dict[str, Any] = dict(object_store_memory=80_000_000, include_dashboard=False)
        self.cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **small))
        self.nodes = [self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
        self.folder, self.runs, self.steps = folder, runs, steps
        self.storage, self.csv = folder / "storage", folder / "results.csv"
        self.drivers: list[subprocess.Popen] = []

    def drive(self) -> subprocess.Popen:
        """:return: a new driver of the grid"""
        command = [sys.executable, "-m", "sb3_boom", "benchmark", "run", "--cpu", "--tasks", "Pendulum-v1", "--seeds"]
        command += [*map(str, range(self.runs)), "--steps", str(self.steps), "--eval-freq", str(EVAL_FREQ)]
        command += ["--eval-episodes", "1", "--csv", str(self.csv), "--ray", self.cluster.address, "--lease", "8"]
        command += ["--storage", str(self.storage), "-params", *SETTINGS]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self.folder / f"driver-{len(self.drivers)}.txt").open("w") as log:
            self.drivers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return self.drivers[-1]

    def under_way(self) -> dict[str, dict[str, Any]]:
        """:return: claims of the runs, by name, once each that is claimed has a checkpoint and a row"""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            claims = {}
            for path in self.storage.glob("*/claim.json"):
                try:
                    claims[path.parent.name] = json.loads(path.read_text())
                except FileNotFoundError:  # it has just ended
                    continue
            if claims and all(1 <= self.rows(name) < self.steps // EVAL_FREQ for name in claims):
                return claims
            if any(driver.poll() not in (None, 0) for driver in self.drivers):
                break
            time.sleep(0.05)
        raise RuntimeError(f"no run is under way, see {self.folder}/driver-*.txt")

    def rows(self, name: str) -> int:
        """:param name: of a run. :return: how many rows it has"""
        path = self.storage / name / "rows.csv"
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def starts(self, name: str) -> list[tuple[str, int]]:
        """:param name: of a run. :return: its attempts: node, and the step they went on from"""
        path = self.storage / name / "log.txt"
        return self.attempts(path.read_text()) if path.exists() else []

    @staticmethod
    def attempts(text: str) -> list[tuple[str, int]]:
        """:param text: of a log. :return: the attempts in it"""
        return [(node, int(step)) for node, step in re.findall(r": node (\w+), from step (\d+)", text)]

    def counts(self, statuses: list[int]) -> dict[str, Any]:
        """:param statuses: exit statuses of the drivers that ended by themselves. :return: what there is to be counted"""
        found = Counter(tuple(line.split(",")[2:4]) for line in self.csv.read_text().splitlines()[1:])
        expected = {(str(run), str(step)) for run in range(self.runs) for step in range(EVAL_FREQ, self.steps + 1, EVAL_FREQ)}
        attempts = {path.name: self.starts(path.name) for path in self.storage.glob("Pendulum*")}
        return {
            "runs": self.runs,
            "rows": sum(found.values()),
            "rows_lost": len(expected - found.keys()),
            "rows_twice": sum(found.values()) - len(found),
            "attempts": sum(map(len, attempts.values())),
            "went_on_from": sorted(step for starts in attempts.values() for _, step in starts if step),
            "trained_twice_from_the_start": sum(max(0, [s for _, s in starts].count(0) - 1) for starts in attempts.values()),
            "drivers_that_failed": sum(status != 0 for status in statuses),
        }

    def close(self) -> None:
        """End all that was started."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()


def fault(name: str, folder: pathlib.Path, runs: int, steps: int) -> dict[str, Any]:
    """
    :param name: of a fault
    :param folder: for all files of it
    :param runs: of the grid
    :param steps: of a run
    :return: counts
    """
    grid = Grid(folder, runs, steps)
    try:
        begin = time.monotonic()
        drivers = [grid.drive()]
        if name == "drivers":
            drivers.append(grid.drive())
        else:
            claims = grid.under_way()
            print(f"{name}: under way are {', '.join(claims)}", flush=True)
            run = next(iter(claims))
            if name == "node":
                where = grid.starts(run)[-1][0]
                grid.cluster.remove_node(next(n for n in grid.nodes if n.node_id.startswith(where)), allow_graceful=False)
            elif name == "memory":
                os.kill(claims[run]["pid"], signal.SIGKILL)
            else:
                drivers[0].kill()
                drivers[0].wait()
                drivers = [grid.drive()]
        statuses = [driver.wait(PATIENCE_S) for driver in drivers]
        return {**grid.counts(statuses), "seconds": round(time.monotonic() - begin, 1)}
    finally:
        grid.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help=f"of a run, a multiple of {EVAL_FREQ}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/cluster-faults.json"))
    args = parser.parse_args()
    found = {}
    for name in args.faults:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = fault(name, pathlib.Path(folder), args.runs, args.steps)
        print(json.dumps({name: found[name]}), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
