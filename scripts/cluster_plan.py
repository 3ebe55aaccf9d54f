"""
What a large grid would cost, from measured step times and checkpoint sizes: a table of Markdown. Nothing is run.

    python scripts/cluster_plan.py --runs 1000 --nodes 100

Step times are of ``benchmarks/results/gpu-h200.json`` (the environment's own time is not in them), sizes of
``benchmarks/results/checkpoint-cost.json``, to which the optimizers' moments are added. A GPU's price is an assumption.
"""

import argparse
import json
import pathlib

from sb3_boom.cluster.storage import BEATS, LEASE_S
from sb3_boom.cluster.task import REPORT_S

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
OPTIMIZERS_MB = 40.0  # docs/surviving.md
EPISODE = 500  # agent steps, of the paper's DMC tasks
PAPER = (14, 3, 2_000_000)  # tasks, seeds, agent steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=100, help="with one GPU each")
    parser.add_argument("--steps", type=int, default=PAPER[2], help="of a run")
    parser.add_argument("--eval-freq", type=int, default=10_000)
    parser.add_argument("--env-ms", type=float, default=0.0, help="of a step of the environment")
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU's hour, assumed")
    args = parser.parse_args()
    parts = json.loads((RESULTS / "gpu-h200.json").read_text())["parts"]
    sizes = json.loads((RESULTS / "checkpoint-cost.json").read_text())

    step_s = (parts["5M-1"]["step_ms"] + args.env_ms) / 1000
    # ten episodes side by side, of the planner and of the prior, whose step is taken as dear as the planner's: an upper bound
    evaluation_s = 2 * EPISODE * (parts["5M-16"]["plan_ms"] + 10 * args.env_ms) / 1000
    checkpoints = args.steps // args.eval_freq
    interval_s = args.eval_freq * step_s + evaluation_s + sizes["next_seconds"]
    run_s = checkpoints * interval_s
    megabytes = sizes["next_megabytes"] + OPTIMIZERS_MB
    at_once = min(args.runs, args.nodes)
    kept_gb = (sizes["first_megabytes"] + 2 * OPTIMIZERS_MB + sizes["next_model_megabytes"]) / 1000
    tasks, seeds, _ = PAPER
    paper_h = tasks * seeds * run_s / 3600
    lines = {
        "a run of the size 5M alone on a GPU": f"{run_s / 3600:.1f} h, evaluations included",
        f"{args.runs} runs on {args.nodes} GPUs": f"{args.runs / args.nodes * run_s / 86400:.1f} days",
        "a checkpoint": f"{megabytes:.0f} MB every {interval_s:.0f} s",
        f"written by {at_once} runs at once": f"{at_once * megabytes / interval_s:.0f} MB/s",
        "written in all": f"{args.runs * checkpoints * megabytes / 1e6:.1f} TB",
        "kept, with a full ring of 1M": f"{kept_gb:.2f} GB a run, {args.runs * kept_gb / 1000:.2f} TB in all",
        "read when a node dies": f"{kept_gb:.2f} GB a run, {sizes['resume_seconds']:.0f} s",
        "claims": f"{at_once * BEATS / LEASE_S:.1f} small writes/s, and as many reads",
        "calls of the head's board": f"{at_once / REPORT_S:.0f}/s",
        f"the paper's {tasks} x {seeds} runs": f"{paper_h:.0f} GPU hours, {paper_h * args.price:.0f} at {args.price:g} each",
        "a task's result of the paper's": f"{paper_h / tasks * args.price:.0f}",
    }  # fmt: skip
    print("| | |\n|---|---|")
    for what, value in lines.items():
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
