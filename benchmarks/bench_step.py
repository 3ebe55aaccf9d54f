"""
Milliseconds of a plan, an update, a draw and a store, with the CPU preset.

    python benchmarks/bench_step.py --env Pendulum-v1 [--no-compile] [--json step.json]
"""

import argparse
import json
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch as th
import yaml

from sb3_boom import BOOM
from sb3_boom.compilation import subnormals_flushed

PRESET = pathlib.Path(__file__).parents[1] / "zoo_hyperparams" / "boom-cpu.yml"


def median_ms(function: Callable[[], object], n: int) -> float:
    """:return: median duration of ``n`` calls, after one that may compile"""
    function()
    durations = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return 1000.0 * float(np.median(durations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    warnings.simplefilter("ignore", DeprecationWarning)

    preset = yaml.safe_load(PRESET.read_text())["default"]
    settings = {key: preset[key] for key in ("policy", "batch_size", "planner_kwargs", "policy_kwargs")}
    model = BOOM(env=args.env, seed=0, gradient_steps=0, compile=not args.no_compile, **settings)
    model.learn(model.learning_starts)  # fills the buffer, at random
    policy, buffer = model.policy, model.replay_buffer
    assert buffer is not None and isinstance(model._last_obs, np.ndarray)
    obs, _ = policy.obs_to_tensor(model._last_obs)
    mean = policy.initial_mean(1)
    last = model._last_obs
    action, reward, done = np.zeros((1, policy.action_dim)), np.zeros(1), np.zeros(1, dtype=bool)

    start = time.perf_counter()
    policy.plan(obs, mean)
    model.train(1, model.batch_size)
    result = {
        "first_call_s": time.perf_counter() - start,
        "plan_ms": median_ms(lambda: policy.plan(obs, mean), args.calls),
        "update_ms": median_ms(lambda: model.train(1, model.batch_size), args.calls),
        "sample_ms": median_ms(lambda: buffer.sample(model.batch_size), args.calls),
        "add_ms": median_ms(lambda: buffer.add(last, last, action, reward, done, [{}]), args.calls),
    }
    result["step_ms"] = result["plan_ms"] + result["update_ms"]
    result["load_average"] = os.getloadavg()[0]
    machine = f"{platform.machine()}, {args.threads} threads of {os.cpu_count()} cores, torch {th.__version__}"
    for name, value in result.items():
        print(f"{name:14} {value:9.3f}")
    print(machine + (", compiled" if not args.no_compile else ", eager"))
    if result["load_average"] > 1.5 * args.threads:
        print("the machine is loaded: these numbers are too high")
    if args.json:
        args.json.write_text(json.dumps(dict(result, machine=machine, compiled=not args.no_compile), indent=2) + "\n")


if __name__ == "__main__":
    with subnormals_flushed():  # as while learning
        main()
