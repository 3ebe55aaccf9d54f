"""
What `sb3-boom inspect` measures on the models of a benchmark's grid: a CSV, by which the thresholds of its verdict are set.

    python benchmarks/inspect_runs.py --folder logs/evidence/settings --csv logs/evidence/inspected.csv
"""

from sb3_boom import BOOM, checkpoint, zoo  # before torch, for fast products: see core/processor.py

# isort: split
import argparse
import csv
import json
import pathlib

from stable_baselines3.common.vec_env import sync_envs_normalization

from sb3_boom.benchmark.runner import checkpoint_folder, entry_of_a_run

COLUMNS = ("run", "agent_steps", "about", "healthy", "name", "value")


def main() -> None:
    """Inspect the last checkpoint of every run that has one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="the grid's")
    parser.add_argument("--csv", type=pathlib.Path, required=True, help="where rows are appended")
    parser.add_argument("--episodes", type=int, default=2)
    args = parser.parse_args()
    zoo.register()
    tasks = {task.replace("/", "-"): task for task in zoo.read_hyperparams(zoo.hyperparams_file(cpu=True))}
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for run in sorted(args.folder.iterdir()):
            if not (run.is_dir() and checkpoint.is_there(checkpoint_folder(run))):
                continue
            task = next(env_id for name, env_id in tasks.items() if run.name.startswith(f"{name}_"))
            variant = run.name.removeprefix(f"{task.replace('/', '-')}_").rpartition("_")[0]
            entry = entry_of_a_run(task, variant, zoo.hyperparams_file(cpu=True))
            model = BOOM.resume(checkpoint_folder(run), zoo.make_env(task, entry, 0, entry.get("n_envs", 1)))
            env = zoo.make_env(task, entry, 3000, evaluates=True)
            if model.get_vec_normalize_env() is not None:
                sync_envs_normalization(model.get_env(), env)
            found = model.inspect(env, n_episodes=args.episodes, max_steps=1000 * args.episodes)
            for sentence in found.sentences:
                writer.writerow((run.name, model.num_timesteps, sentence.about, sentence.healthy, "verdict", sentence.text))
            for name, value in found.numbers.items():
                writer.writerow((run.name, model.num_timesteps, "", "", name, f"{value:.4g}"))
            file.flush()
            print(run.name, json.dumps(found.numbers), flush=True)


if __name__ == "__main__":
    main()
