"""
Train BOOM on any environment id, with the settings of a hyperparameter file; evaluate planner and policy prior.

Writes a zip, the Monitor's CSV, a CSV row per evaluation and the learning curve as PNG:

    python scripts/train.py --env Pendulum-v1 --seed 0
    python scripts/train.py --env dm_control/cartpole-swingup-v0 --steps 50000 --eval-freq 10000 --eval-envs 10
    python scripts/train.py --env Hopper-v5 -params handle_terminations:False n_envs:4
"""

from sb3_boom import BOOM, zoo  # before torch: see core/processor.py

# isort: split
import argparse
import pathlib
import warnings

import numpy as np
import torch as th
from rl_zoo3.utils import StoreDict
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecEnv

from sb3_boom.benchmark import rows, runner
from sb3_boom.benchmark.rows import EvaluationLog, Row
from sb3_boom.callbacks import PlannerPriorEvalCallback

ROOT = pathlib.Path(__file__).parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="Gymnasium id; shimmy's dm_control/... too")
    parser.add_argument("--steps", type=int, help="agent steps; default: the file's n_timesteps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hyperparams", type=pathlib.Path, default=ROOT / "zoo_hyperparams" / "boom-cpu.yml")
    parser.add_argument("-params", nargs="+", action=StoreDict, default={}, help="key:value, over the file's, as in rl_zoo3")
    parser.add_argument("--eval-freq", type=int, default=0, help="agent steps between evaluations; default: only at the end")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--eval-envs", type=int, help="environments evaluated side by side; default: as many as train")
    parser.add_argument("--folder", type=pathlib.Path, help="default: logs/<env>-seed<seed>")
    parser.add_argument("--csv", type=pathlib.Path, help="file to append evaluations to; default: the folder's own")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--random", action="store_true", help="no training: only evaluate random actions, for comparison")
    parser.add_argument("--no-compile", action="store_true", help="never use torch.compile")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser.parse_args()


class RandomActions:
    """What a policy is compared with."""

    def __init__(self, env: VecEnv, seed: int) -> None:
        self.space = env.action_space
        self.space.seed(seed)

    def predict(self, observation: np.ndarray, state: tuple | None = None, *_, **__) -> tuple[np.ndarray, tuple | None]:
        return np.stack([self.space.sample() for _ in observation]), state


def plot(path: pathlib.Path, evaluations: PlannerPriorEvalCallback, title: str) -> None:
    """Training episodes and evaluations against agent steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    episodes = load_results(str(path.parent))  # of all training environments, by time
    figure, axes = plt.subplots(figsize=(7, 4))
    # the monitor counts simulation steps, of which there are several in an agent step
    agent_steps = episodes["l"].cumsum() / rows.env_steps_per_agent_step(evaluations.eval_env)
    axes.plot(agent_steps, episodes["r"], ".-", color="0.6", label="training episodes")
    for name, returns in (("planner", evaluations.planner_returns), ("policy prior", evaluations.prior_returns)):
        axes.errorbar(
            evaluations.timesteps, np.mean(returns, axis=1), np.std(returns, axis=1), fmt="o-", capsize=3, label=name
        )
    axes.set(xlabel="agent steps", ylabel="return", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    if args.threads:
        th.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    zoo.register_environments()
    try:
        entry = zoo.entry(args.hyperparams, args.env) | args.params
    except ValueError as error:
        raise SystemExit(error) from None
    steps = 0 if args.random else args.steps or int(entry["n_timesteps"])
    changed = [f"{key}:{value}" for key, value in args.params.items() if key != "alignment"]
    variant = " ".join(changed) or runner.own_variant(entry)
    run = (args.env, "random" if args.random else variant, args.seed)
    folder = args.folder or ROOT / "logs" / f"{args.env.replace('/', '-')}-seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    csv = args.csv or folder / "evaluations.csv"
    if args.csv and csv.exists() and any(row.run == run and row.agent_steps >= steps for row in rows.read(csv)[0]):
        print(f"{csv} has this run already: {', '.join(map(str, run))}, {steps} steps")
        return
    if not args.random:  # what an earlier run left here would stand beside this one's
        for old in (*folder.glob("*.monitor.csv"), *([] if args.csv else [csv])):
            old.unlink(missing_ok=True)
    monitor_dir = None if args.random else str(folder)
    env = zoo.make_env(args.env, entry, args.seed, entry.get("n_envs", 1), monitor_dir)
    # another number of environments would be another plan to compile
    eval_env = zoo.make_env(args.env, entry, args.seed + 1000, n_envs=args.eval_envs or env.num_envs, evaluates=True)

    if args.random:
        mean, _ = evaluate_policy(RandomActions(eval_env, args.seed), eval_env, args.eval_episodes)  # type: ignore[arg-type]
        assert isinstance(mean, float)
        rows.append(csv, [Row(*run, 0, 0, mean, mean, 0.0, rows.revision(), rows.versions())])
        print(f"random actions: mean return {mean:.1f} over {args.eval_episodes} episodes")
        return
    settings = zoo.settings_of_the_model(entry, int(np.prod(env.action_space.shape or ())))
    if args.no_compile:
        settings["policy_kwargs"] = {**settings.get("policy_kwargs", {}), "compile": False}
    model = BOOM(env=env, seed=args.seed, verbose=1, **settings)
    evaluations = EvaluationLog(eval_env, csv, run, args.eval_episodes, args.eval_freq // env.num_envs)
    model.learn(steps, callback=evaluations, progress_bar=not args.no_progress)
    if not evaluations.timesteps or evaluations.timesteps[-1] != model.num_timesteps:
        evaluations.evaluate()
    model.save(folder / "model.zip")
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:  # the model acts on what it normalises
        normalizer.save(str(folder / "vecnormalize.pkl"))
    plot(folder / "learning_curve.png", evaluations, f"BOOM on {args.env}, seed {args.seed}")

    print(f"planner:      mean return {np.mean(evaluations.planner_returns[-1]):.1f} over {args.eval_episodes} episodes")
    print(f"policy prior: mean return {np.mean(evaluations.prior_returns[-1]):.1f} over {args.eval_episodes} episodes")
    for what, path in (
        ("model", folder / "model.zip"),
        ("learning curve", folder / "learning_curve.png"),
        ("training episodes", folder / "0.monitor.csv"),
        ("evaluations", evaluations.path),
        *([("normalisation", folder / "vecnormalize.pkl")] if normalizer is not None else []),
    ):
        print(f"{what + ':':18} {path}")


if __name__ == "__main__":
    main()
