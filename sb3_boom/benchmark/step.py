"""
What a step costs: plan, update, buffer and loop, and how far plan and update are from their matrix products alone.

    sb3-boom bench
    sb3-boom bench --sizes tiny 5M --n-envs 1 16 --json step.json
    sb3-boom bench --scaling --json scaling.json

The floor of a plan or an update is the time of its matrix products alone, the same shapes one after the other, as this
package computes them in float32. It is measured in turns with what it is compared to; the ratio is the median of the pairs.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_boom import BOOM
from sb3_boom.benchmark import baselines
from sb3_boom.core.compilation import keep_freed_memory, subnormals_flushed
from sb3_boom.core.processor import why_slow

# size: observation and action dimensions. tiny comes with the CPU preset's planner and batch, the others with the paper's
PROBLEMS = {"tiny": (3, 1), "1M": (24, 6), "5M": (223, 38)}
# what --scaling changes, one at a time: the planner's settings, the networks' sizes, and BOOM's own
SCALING: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    *((f"n_samples={n}", {"planner_kwargs": {"n_samples": n, "n_elites": n // 8}}) for n in (64, 256, 512)),
    *((f"n_iterations={n}", {"planner_kwargs": {"n_iterations": n}}) for n in (2, 6, 8)),
    *((f"horizon={n}", {"horizon": n}) for n in (1, 5)),
    *((f"latent_dim={n}", {"policy_kwargs": {"latent_dim": n}}) for n in (128, 256)),
    *((f"mlp_dim={n}", {"policy_kwargs": {"mlp_dim": n}}) for n in (64, 256)),
    *((f"batch_size={n}", {"batch_size": n}) for n in (64, 256)),
]
BF16 = ("bf16", {"policy_kwargs": {"bf16": True}})
LOOP_STEPS = 50


class RandomEnv(gym.Env):
    """Costs next to nothing itself; episodes of 500 steps."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self.observations = np.random.default_rng(0).standard_normal((64, obs_dim), dtype=np.float32)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observations[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self.observations[self.steps % 64], float(action[0]), False, self.steps == 500, {}


class MatrixProducts(TorchDispatchMode):
    """Notes the shapes of every matrix product, to do them again alone."""

    FIRST_FACTOR: ClassVar[dict[str, int]] = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # its place among the arguments

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[th.Size, th.Size]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.FIRST_FACTOR:
            first = self.FIRST_FACTOR[name]
            self.shapes.append((args[first].shape, args[first + 1].shape))
        return function(*args, **(kwargs or {}))

    @property
    def gflop(self) -> float:
        """Floating-point operations of all products, in billions."""
        return sum(2.0 * left.numel() * right[-1] for left, right in self.shapes) / 1e9

    def alone(self, device: th.device) -> Callable[[], object]:
        """
        :param device: where to do them
        :return: function that does the products, one after the other, into memory that is there already
        """
        factors = {shape: th.randn(shape, device=device) for pair in self.shapes for shape in pair}
        results = {(left, right): th.empty(*left[:-1], right[-1], device=device) for left, right in self.shapes}

        def run() -> None:
            for left, right in self.shapes:
                th.matmul(factors[left], factors[right], out=results[left, right])

        return run


def wait(device: th.device) -> None:
    """:param device: whose work is waited for"""
    if device.type == "cuda":
        th.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: th.device) -> float:
    """
    :param function: called once
    :param device: it works on
    :return: how long it took
    """
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def median_us(function: Callable[[], object], n: int, device: th.device) -> float:
    """
    :param function: called ``n`` times
    :param n: number of calls
    :param device: it works on
    :return: median of the times it took, in microseconds
    """
    return 1e6 * float(np.median([seconds(function, device) for _ in range(n)]))


def make_model(size: str, n_envs: int, compile: bool, device: str, changes: dict[str, Any]) -> BOOM:
    """
    :param size: a key of :data:`PROBLEMS`
    :param n_envs: number of environments
    :param compile: as :class:`sb3_boom.policies.BOOMPolicy`'s
    :param device: as :class:`sb3_boom.BOOM`'s
    :param changes: settings that differ from the size's
    :return: an untrained model
    """
    settings: dict[str, Any] = dict(
        preset="cpu" if size == "tiny" else "paper", policy_kwargs=dict(model_size=size, compile=compile)
    )
    for name, value in changes.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    env = make_vec_env(lambda: RandomEnv(*PROBLEMS[size]), n_envs=n_envs)
    return BOOM(
        "MlpPolicy", env, learning_starts=1000, pretrain_steps=0, buffer_size=50_000, seed=0, device=device,
        **settings,
    )  # fmt: skip


def measure(size: str, n_envs: int, what: str, changes: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """
    :param size: a key of :data:`PROBLEMS`
    :param n_envs: number of environments
    :param what: name for ``changes``
    :param changes: settings that differ from the size's
    :param args: of the command
    :return: a row of the table
    """
    model = make_model(size, n_envs, compile=False, device=args.device, changes=changes)
    model.gradient_steps = 0
    model.learn(1000)  # fills the buffer, at random
    policy, buffer, device = model.policy, model.replay_buffer, model.device
    assert buffer is not None and isinstance(model._last_obs, np.ndarray)
    obs, _ = policy.obs_to_tensor(model._last_obs)
    mean = policy.initial_mean(n_envs)

    def plan() -> object:
        return policy.plan(obs, mean)

    def update() -> None:
        model.train(1, model.batch_size)

    # the products are those of the eager program, whose dispatcher sees them
    floors = {}
    for name, function in (("plan", plan), ("update", update)):
        with MatrixProducts() as floors[name]:
            function()
    policy.compile_setting, policy.capture = not args.no_compile, not args.no_graphs
    row: dict[str, Any] = dict(size=size, n_envs=n_envs, what=what)
    for name, function in (("plan", plan), ("update", update)):
        row[f"{name}_first_s"] = seconds(function, device)
        floor = floors[name].alone(device)
        for _ in range(5):
            function(), floor()
        pairs = np.array([(seconds(function, device), seconds(floor, device)) for _ in range(args.calls)])
        row[f"{name}_ms"], row[f"{name}_floor_ms"] = 1e3 * np.median(pairs, axis=0)
        row[f"{name}_ratio"] = float(np.median(pairs[:, 0] / pairs[:, 1]))
        row[f"{name}_gflop"] = floors[name].gflop

    row["sample_us"] = median_us(lambda: buffer.sample(model.batch_size), args.calls, device)
    last, action = model._last_obs, np.zeros((n_envs, policy.action_dim), np.float32)
    reward, done = np.zeros(n_envs), np.zeros(n_envs, bool)
    infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    row["add_us"] = median_us(lambda: buffer.add(last, last, action, reward, done, infos), args.calls, device)

    model.gradient_steps, model.pretrain_steps = 1, 0
    model.learn(n_envs, reset_num_timesteps=False)
    model.meters.take_milliseconds()
    spent = seconds(lambda: model.learn(LOOP_STEPS * n_envs, reset_num_timesteps=False), device)
    inside = model.meters.milliseconds()
    row["env_steps_per_s"] = LOOP_STEPS * n_envs / spent
    row["loop_ms"] = 1e3 * spent / LOOP_STEPS - inside["plan"] - inside["update"]  # SB3's loop, buffer and environment
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of this process so far
    if device.type == "cuda":
        row["peak_gpu_mb"] = th.cuda.max_memory_allocated(device) / 2**20
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def measure_baseline(size: str, name: str, n_envs: int, device: str) -> dict[str, Any]:
    """
    :param size: a key of :data:`PROBLEMS`, whose observations and actions to take
    :param name: a key of :data:`baselines.ALGORITHMS`, by its defaults: an update a step of all environments together
    :param n_envs: number of environments
    :param device: as SB3's
    :return: a row of the table
    """
    env = make_vec_env(lambda: RandomEnv(*PROBLEMS[size]), n_envs=n_envs)
    settings = baselines.settings() | {"buffer_size": 50_000, "seed": 0, "device": device}
    model = baselines.algorithm(name)(env=env, **settings).learn(1_100)
    start = time.perf_counter()
    model.learn(10 * LOOP_STEPS * n_envs, reset_num_timesteps=False)
    rate = 10 * LOOP_STEPS * n_envs / (time.perf_counter() - start)
    return {"size": size, "n_envs": n_envs, "what": name, "env_steps_per_s": round(rate, 3)}


def processor() -> str:
    """:return: the processor's name, where Linux tells it"""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def bench(arguments: list[str]) -> None:
    """:param arguments: of ``sb3-boom bench``"""
    parser = argparse.ArgumentParser(
        "sb3-boom bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(PROBLEMS), default=["tiny"], help="of the model (default: tiny)")
    parser.add_argument("--n-envs", nargs="+", type=int, default=[1], help="environments planned for at once (default: 1)")
    parser.add_argument(
        "--scaling", action="store_true", help="more rows, each of which differs from the first in one setting"
    )
    parser.add_argument("--bf16", action="store_true", help="one more row, with the plan's products in bfloat16")
    parser.add_argument(
        "--baselines", action="store_true", help="rows of SAC, TQC and CrossQ, for each number of environments"
    )
    parser.add_argument("--calls", type=int, default=100, help="to take the median of (default: 100)")
    threads = th.get_num_threads()  # OMP_NUM_THREADS, if it is set
    parser.add_argument("--threads", type=int, default=threads, help=f"torch's (default: its own, {threads} here)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compile", action="store_true", help="eager instead of torch.compile")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU, without CUDA graphs")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the table")
    args = parser.parse_args(arguments)
    th.set_num_threads(args.threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    keep_freed_memory()  # as while learning, and
    with subnormals_flushed():
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Print a table of every size and number of environments, and write it. :param args: of the command"""
    machine = dict(
        processor=processor(),
        cores=os.cpu_count(),
        threads=args.threads,
        gpu=th.cuda.get_device_name() if th.cuda.is_available() else None,
        torch=th.__version__,
        products=why_slow() or "at the processor's own speed",
        compiled=not args.no_compile,
        graphs=th.cuda.is_available() and not (args.no_compile or args.no_graphs),
        load_average=os.getloadavg()[0],
    )
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if machine["load_average"] > 0.5:
        print("the machine is loaded: these numbers are too high")
    measures: list[Callable[[], dict[str, Any]]] = [
        partial(measure, size, n_envs, what, changes, args)
        for size, n_envs, (what, changes) in itertools.product(
            args.sizes, args.n_envs, [*(SCALING if args.scaling else SCALING[:1]), *([BF16] if args.bf16 else [])]
        )
    ]
    if args.baselines:
        cases = itertools.product(args.sizes, baselines.ALGORITHMS, args.n_envs)
        measures += [partial(measure_baseline, *case, args.device) for case in cases]
    rows = []
    for measured in measures:
        rows.append(measured())
        for name, value in rows[-1].items():
            print(f"{name:16} {value}")
        print(flush=True)
        if args.json:
            args.json.write_text(json.dumps(dict(machine=machine, rows=rows), indent=2) + "\n")
    if args.json:
        print(f"wrote {args.json}")
