"""
What logging costs: plans and updates with all that is logged of them, and without any of it, in turns: a JSON.

    python benchmarks/diagnostics_cost.py --sizes tiny 5M --out benchmarks/results/diagnostics-cost.json

Without it, the compiled graphs leave out what only a log needs. ``plan_ratio`` and ``update_ratio`` are the medians of the
time with, divided by the time without in the same turn, with their standard errors by bootstrap. ``row_ms`` is what
:func:`sb3_boom.diagnostics.of_newest` takes, once for every row logged.
"""

from sb3_boom import update  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import contextlib
import json
import os
import pathlib
from typing import Any
from unittest import mock

import numpy as np
import torch as th

from sb3_boom.benchmark.step import PROBLEMS, make_model, processor, seconds
from sb3_boom.core import planner
from sb3_boom.core.compilation import keep_freed_memory, subnormals_flushed
from sb3_boom.diagnostics import of_newest

model_gradients, policy_gradients = update.model_gradients, update.policy_gradients


def model_gradients_alone(*arguments: Any) -> tuple:
    """As :func:`update.model_gradients`, with nothing to log."""
    return *model_gradients(*arguments)[:-1], {}


def policy_gradients_alone(*arguments: Any) -> tuple:
    """As :func:`update.policy_gradients`, with nothing to log but what training itself looks at."""
    *results, terms = policy_gradients(*arguments)
    return *results, {"align_active": terms["align_active"]}


WITHOUT_TERMS = {"model_gradients": model_gradients_alone, "policy_gradients": policy_gradients_alone}


def no_statistics(elites: planner.Elites, std: th.Tensor, *_: Any) -> th.Tensor:
    """As :func:`planner.statistics`, with nothing measured."""
    return elites.values.new_zeros(len(elites.values), len(planner.statistic_names(len(std))))


def ratio(pairs: np.ndarray) -> tuple[float, float]:
    """
    :param pairs: times with and without, ``[n, 2]``
    :return: median ratio, and its standard error
    """
    ratios = pairs[:, 0] / pairs[:, 1]
    resampled = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    return float(np.median(ratios)), float(np.median(resampled, axis=1).std())


def measure(size: str, calls: int, device: str) -> dict[str, Any]:
    """
    :param size: a key of ``PROBLEMS``
    :param calls: turns
    :param device: as BOOM's
    :return: a row
    """
    model = make_model(size, 1, compile=True, device=device, changes={})
    model.gradient_steps = 0
    model.learn(1000)  # fills the buffer, at random
    policy = model.policy
    obs, _ = policy.obs_to_tensor(model._last_obs)
    mean = policy.initial_mean(1)
    functions = {
        "plan": (lambda: policy.plan(obs, mean), (planner, {"statistics": no_statistics})),
        "update": (lambda: model.train(1, model.batch_size), (update, WITHOUT_TERMS)),
    }
    row: dict[str, Any] = {"size": size, "calls": calls}
    for name, (function, (module, replaced)) in functions.items():
        pairs = np.empty((calls + 5, 2))
        for turn in range(len(pairs)):
            for without in (False, True) if turn % 2 else (True, False):
                with mock.patch.multiple(module, **replaced) if without else contextlib.nullcontext():
                    pairs[turn, int(without)] = seconds(function, model.device)
        pairs = pairs[5:]  # compiled meanwhile
        row[f"{name}_ms"] = 1e3 * float(np.median(pairs[:, 0]))
        row[f"{name}_ratio"], row[f"{name}_ratio_se"] = ratio(pairs)
    rows = [
        seconds(lambda: of_newest(policy, model.replay_buffer, model.get_vec_normalize_env(), model.gamma), model.device)
        for _ in range(20)
    ]
    row["row_ms"] = 1e3 * float(np.median(rows))
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(PROBLEMS), default=["tiny"])
    parser.add_argument("--calls", type=int, default=100, help="turns (default: 100)")
    parser.add_argument("--threads", type=int, default=th.get_num_threads(), help="torch's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=pathlib.Path, help="JSON to write")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    keep_freed_memory()
    with subnormals_flushed():
        rows = [measure(size, args.calls, args.device) for size in args.sizes]
    machine = {"processor": processor(), "threads": args.threads, "torch": th.__version__, "load_average": os.getloadavg()[0]}
    text = json.dumps({"machine": machine, "rows": rows}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
