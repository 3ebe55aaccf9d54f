"""
Faults of a Ray cluster, made on purpose in the middle of a grid: a JSON that counts what was lost, doubled or made anew.

    python scripts/cluster_faults.py --out benchmarks/results/cluster-faults.json

Three nodes on this machine, of which two have a CPU each; the runs are small ones of BOOM.

* node: one that trains is killed, with its processes
* driver: killed by SIGKILL, and started again
* worker: one gets SIGKILL
* memory: a run takes memory until Ray's monitor kills it
* drivers: two on one grid and one CSV
* away (with ``--server PID``): the server of the storage is stopped for half a minute

Runs keep what they have in a folder, or with ``--storage URL`` below that URL, here on an S3 of this machine:

    pip install s3fs 'moto[server]'
    export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=us-east-1 AWS_ENDPOINT_URL=http://127.0.0.1:5005
    moto_server -p 5005 &
    python -c "import s3fs; s3fs.S3FileSystem().mkdir('runs')"
    python scripts/cluster_faults.py --faults node driver --storage s3://runs --out benchmarks/results/cluster-faults.json

What an ``--out`` that is there has of other faults stays.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_boom.cluster.connection import import_ray
from sb3_boom.cluster.storage import Storage

ROOT = pathlib.Path(__file__).parents[1]
FAULTS = ("node", "driver", "worker", "memory", "drivers")
SETTINGS = [
    "planner_kwargs:dict(n_samples=8,n_elites=2,n_policy_samples=1,n_iterations=1)",
    "policy_kwargs:dict(model_size='tiny',mlp_dim=16,enc_dim=16,latent_dim=8,n_critics=2,compile=False)",
    *("learning_starts:20", "pretrain_steps:2", "n_envs:1", "gradient_steps:1", "batch_size:8"),
]
EVAL_FREQ = 20  # steps
PATIENCE_S = 1800.0
AWAY_S = 30.0
GIB = 1 << 30
ROOM = 4 * GIB  # above what is in use before, for the grid and a hog; then Ray's monitor kills
MOST = 6 * GIB  # that a hog takes
LIMIT = 20 * GIB  # that all of the machine may use


class Hog(gym.Wrapper):
    """
    Takes memory without end, in the process that a file names.

    :param env: to wrap
    :param order: the file
    """

    def __init__(self, env: gym.Env, order: str) -> None:
        super().__init__(env)
        self.order = pathlib.Path(order)

    def step(self, action: Any) -> Any:
        """:param action: the environment's. :return: its step"""
        if self.order.exists() and self.order.read_text() == str(os.getpid()):
            block = GIB // 16
            taken: list[np.ndarray] = []
            while len(taken) * block < MOST:
                taken.append(np.ones(block, dtype=np.uint8))
                time.sleep(0.02)
            raise MemoryError(f"nobody has killed a process with {MOST / GIB:g} GiB")
        return self.env.step(action)


def memory() -> tuple[int, int]:
    """:return: bytes of this machine, and how many are in use"""
    lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, total - free


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """:param variables: of what is started meanwhile"""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Grid:
    """
    One grid on a cluster of its own.

    :param folder: for the CSV, logs, and the storage if it is no URL
    :param runs: number of runs
    :param steps: of a run
    :param url: of the storage
    :param monitor: of the first node, what Ray's memory monitor there is set to
    """

    def __init__(self, folder: pathlib.Path, runs: int, steps: int, url: str, monitor: dict[str, str]) -> None:
        import_ray()
        from ray.cluster_utils import Cluster

        self.folder, self.runs, self.steps = folder, runs, steps
        self.url, self.csv, self.order = url or str(folder / "storage"), folder / "results.csv", folder / "order"
        self.storage = Storage(self.url)
        self.drivers: list[subprocess.Popen] = []
        small: dict[str, Any] = dict(object_store_memory=80_000_000, include_dashboard=False)
        paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
        others = {"RAY_memory_monitor_refresh_ms": "0"}  # all nodes are this machine, and would kill a run each
        with environment(PYTHONPATH=os.pathsep.join(paths)):
            with environment(**others):
                self.cluster: Any = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **small))
            with environment(**monitor or others):
                self.nodes = [self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000)]
            with environment(**others):
                self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000))

    def drive(self) -> subprocess.Popen:
        """:return: a new driver of the grid"""
        command = [sys.executable, "-m", "sb3_boom", "benchmark", "run", "--cpu", "--tasks", "Pendulum-v1", "--seeds"]
        command += [*map(str, range(self.runs)), "--steps", str(self.steps), "--eval-freq", str(EVAL_FREQ)]
        command += ["--eval-episodes", "1", "--csv", str(self.csv), "--ray", self.cluster.address, "--lease", "8"]
        command += ["--storage", self.url, "-params", *SETTINGS]
        command += [f"env_wrapper:[{{'cluster_faults.Hog':dict(order={str(self.order)!r})}}]"]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (self.folder / f"driver-{len(self.drivers)}.txt").open("w") as log, environment(PYTHONPATH=paths):
            self.drivers.append(subprocess.Popen(command, stdout=log, stderr=log))
        return self.drivers[-1]

    def under_way(self) -> dict[str, dict[str, Any]]:
        """:return: claims of the runs, by name, once each that is claimed has a checkpoint and a row"""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            claims = {}
            for name in self.names("claim.json"):
                claim = self.storage.read(f"{name}/claim.json")
                if claim is not None:  # it has not just ended
                    claims[name] = json.loads(claim)
            if claims and all(1 <= self.rows(name) < self.steps // EVAL_FREQ for name in claims):
                return claims
            if any(driver.poll() not in (None, 0) for driver in self.drivers):
                break
            time.sleep(0.05)
        raise RuntimeError(f"no run is under way; the drivers say:\n{self.logs()}")

    def logs(self) -> str:
        """:return: what the drivers have said"""
        return "".join(path.read_text() for path in sorted(self.folder.glob("driver-*.txt")))

    def names(self, file: str) -> list[str]:
        """:param file: of a run's folder. :return: the runs that have it"""
        found = [name.split("/") for name in self.storage.names("")]
        return [parts[0] for parts in found if parts[1:] == [file]]

    def rows(self, name: str) -> int:
        """:param name: of a run. :return: how many rows it has"""
        return max(0, len((self.storage.read(f"{name}/rows.csv") or b"").splitlines()) - 1)

    def starts(self, name: str) -> list[tuple[str, int]]:
        """:param name: of a run. :return: its attempts: node, and the step they went on from"""
        return self.attempts((self.storage.read(f"{name}/log.txt") or b"").decode())

    @staticmethod
    def attempts(text: str) -> list[tuple[str, int]]:
        """:param text: of a log. :return: the attempts in it"""
        return [(node, int(step)) for node, step in re.findall(r": node (\w+), from step (\d+)", text)]

    def counts(self, statuses: list[int]) -> dict[str, Any]:
        """:param statuses: exit statuses of the drivers that ended by themselves. :return: what there is to be counted"""
        found = Counter(tuple(line.split(",")[2:4]) for line in self.csv.read_text().splitlines()[1:])
        expected = {(str(run), str(step)) for run in range(self.runs) for step in range(EVAL_FREQ, self.steps + 1, EVAL_FREQ)}
        attempts = {name: self.starts(name) for name in self.names("log.txt")}
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

    def killed_for_memory(self) -> int:
        """:return: number of processes that Ray's memory monitor has killed"""
        logs = pathlib.Path(self.cluster.head_node.get_session_dir_path()) / "logs"
        return sum(path.read_text(errors="replace").count("Selected to kill") for path in logs.glob("raylet*.out"))

    def close(self) -> None:
        """End all that was started."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()


def fault(name: str, folder: pathlib.Path, runs: int, steps: int, url: str = "", server: int = 0) -> dict[str, Any]:
    """
    :param name: of a fault
    :param folder: for all files of it
    :param runs: of the grid
    :param steps: of a run
    :param url: of the storage; default: in the folder
    :param server: process of the storage's server
    :return: counts
    """
    monitor, further = {}, {}
    if name == "memory":
        total, used = memory()
        if used + ROOM + MOST > min(total, LIMIT):
            raise ValueError(f"memory: {used / GIB:.1f} GiB are in use, too much for {(ROOM + MOST) / GIB:g} more")
        monitor = {"RAY_memory_usage_threshold": f"{(used + ROOM) / total:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
        further = {"gib_in_use_before": round(used / GIB, 1), "gib_allowed": round((used + ROOM) / GIB, 1)}
    grid = Grid(folder, runs, steps, url, monitor)
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
            elif name == "worker":
                os.kill(claims[run]["pid"], signal.SIGKILL)
            elif name == "memory":
                run = next(name for name in claims if grid.nodes[0].node_id.startswith(grid.starts(name)[-1][0]))
                grid.order.write_text(str(claims[run]["pid"]))
            elif name == "away":
                os.kill(server, signal.SIGSTOP)
                time.sleep(AWAY_S)
                os.kill(server, signal.SIGCONT)
            else:
                drivers[0].kill()
                drivers[0].wait()
                drivers = [grid.drive()]
        statuses = [driver.wait(PATIENCE_S) for driver in drivers]
        if any(statuses):
            print(grid.logs(), file=sys.stderr)
        if name == "memory":
            further["killed_for_memory"] = grid.killed_for_memory()
        return {**grid.counts(statuses), **further, "seconds": round(time.monotonic() - begin, 1)}
    finally:
        grid.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS, "away"], default=list(FAULTS))
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help=f"of a run, a multiple of {EVAL_FREQ}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/cluster-faults.json"))
    parser.add_argument("--storage", default="", help="a URL of fsspec's; default: a folder of this machine")
    parser.add_argument("--server", type=int, default=0, help="away: process of the storage's server")
    args = parser.parse_args()
    if "away" in args.faults and not args.server:
        parser.error("away needs --server, the process that serves --storage")
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.faults:
        url = args.storage and f"{args.storage.rstrip('/')}/{name}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as folder:
            counts = fault(name, pathlib.Path(folder), args.runs, args.steps, url, args.server)
        label = f"{name}, {args.storage.partition('://')[0]}" if args.storage else name
        found[label] = counts
        print(json.dumps({label: counts}), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
