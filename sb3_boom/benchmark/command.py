"""``sb3-boom benchmark``: its arguments."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rl_zoo3.utils import StoreDict

from sb3_boom import zoo


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must not be negative, as {text} is")
    return number


def benchmark(arguments: list[str], cpu: bool, on_a_cluster: Callable[..., int]) -> None:
    """
    :param arguments: of ``run``, ``report`` or ``export``
    :param cpu: which hyperparameter file to take
    :param on_a_cluster: runs a grid by Ray, see :func:`sb3_boom.cluster.run_grid`
    :raises ValueError: for a task, suite or variant that does not exist
    """
    from sb3_boom.benchmark import baselines, export, report, runner

    parser = argparse.ArgumentParser("sb3-boom benchmark")
    commands = parser.add_subparsers(dest="command", required=True)

    variants = [*sorted(runner.VARIANTS), *baselines.ALGORITHMS]
    run = commands.add_parser("run", help="train a grid of tasks, variants and seeds; go on where it was interrupted")
    run.add_argument("--suite", choices=sorted(runner.SUITES), help="a list of tasks")
    run.add_argument("--tasks", nargs="+", default=[], metavar="ENV", help="environment ids, besides the suite's")
    run.add_argument("--variants", nargs="+", choices=variants, help="default: each entry's own alignment")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--jobs", type=_positive, default=1, help="runs side by side, which share the cores (default: 1)")
    run.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="as tasks of a Ray cluster at host:port, auto for this machine's, local (default: RAY_ADDRESS, else local)",
    )  # fmt: skip
    run.add_argument("--storage", help="--ray: a folder that all nodes see, or an fsspec URL (default: --folder)")
    run.add_argument("--num-cpus", type=_share, default=1.0, help="--ray: of a run (default: 1)")
    run.add_argument("--num-gpus", type=_share, default=0.0, help="--ray: of a run; 0.25 lets four share one (default: 0)")
    run.add_argument("--max-retries", type=int, default=10, help="--ray: of a run whose node or process dies (default: 10)")
    run.add_argument("--lease", type=_share, default=60.0, help="--ray: seconds until a killed driver's runs are free")
    one = commands.add_parser("one", help="one run of a grid")
    one.add_argument("--task", required=True)
    one.add_argument("--variant", choices=variants, help="default: the entry's own alignment")
    one.add_argument("--seed", type=int, default=0)
    for command in (run, one):
        command.add_argument("--steps", type=_positive, required=True, help="agent steps of a run")
        command.add_argument("--eval-freq", type=_positive, default=10_000, help="agent steps between evaluations")
        command.add_argument("--eval-episodes", type=_positive, default=10)
        command.add_argument("--csv", type=Path, default=Path("logs/benchmark/results.csv"), help="where rows are appended")
        command.add_argument("--folder", type=Path, default=Path("logs/benchmark"), help="for checkpoints and logs")
        command.add_argument("-conf", "--conf-file", type=Path, help="hyperparameter file")
        command.add_argument("-params", nargs="+", action=StoreDict, default={}, help="key:value, over the file's")

    page = commands.add_parser("report", help="a Markdown page with tables and curves, beside published results")
    page.add_argument("csv", nargs="+", type=Path, help="CSVs of benchmark run")
    page.add_argument("--out", type=Path, default=Path("logs/benchmark/report.md"))
    page.add_argument("--tasks", nargs="+", metavar="ENV", help="leave out all others")
    page.add_argument("--variants", nargs="+", metavar="NAME", help="leave out all others")
    page.add_argument("--until", type=_positive, help="agent steps: leave out later evaluations, of longer runs")
    long = commands.add_parser("export", help="CSVs in long form: exp_name,env_name,seed,metric,env_step,value")
    long.add_argument("csv", nargs="+", type=Path, help="CSVs of benchmark run")
    long.add_argument("--out", type=Path, default=Path("logs/benchmark/long.csv"))
    args = parser.parse_args(arguments)

    if args.command in ("report", "export"):
        if args.command == "report":
            problems = report.write(args.csv, args.out, args.tasks, args.until, args.variants)
        else:
            problems = export.write(args.csv, args.out)
        print(f"wrote {args.out}")
        for problem in problems:
            print(problem, file=sys.stderr)
        raise SystemExit(1 if problems else 0)

    hyperparams = args.conf_file or zoo.hyperparams_file(cpu)
    zoo.register()

    def own_variant(task: str) -> str:
        return runner.own_variant(zoo.entry(hyperparams, task) | args.params)

    if args.command == "one":
        variant = args.variant or own_variant(args.task)
        folder = runner.run_folder(args.folder, args.task, variant, args.seed)
        runner.train_one(
            args.task, variant, args.seed, args.steps, args.eval_freq, args.csv, folder, hyperparams,
            args.eval_episodes, args.params,
        )  # fmt: skip
        return
    tasks = list(dict.fromkeys([*runner.SUITES.get(args.suite, ()), *args.tasks]))
    if not tasks:
        raise ValueError("no task: name a --suite, or environments with --tasks")
    for task in tasks:
        zoo.check_installed(task)
    if args.ray is None and args.storage is not None:
        raise ValueError("--storage is for --ray; a grid on this machine alone takes --folder")
    further = ["--eval-freq", str(args.eval_freq), "--eval-episodes", str(args.eval_episodes)]
    grid = [(task, variant) for task in tasks for variant in args.variants or [own_variant(task)]]
    if args.ray is not None:
        failed = on_a_cluster(
            grid, args.seeds, args.steps, args.csv, args.storage or args.folder, hyperparams, args.params, args.eval_freq,
            args.eval_episodes, args.ray, args.num_cpus, args.num_gpus, args.max_retries, args.lease,
        )  # fmt: skip
    else:
        local = args.jobs, args.csv, args.folder
        failed = runner.run_grid(grid, args.seeds, args.steps, *local, hyperparams, args.params, further)
    if failed:
        raise ValueError(f"{failed} runs failed; the same command takes them up again")
