"""``sb3-boom inspect``: its arguments."""

import argparse
import pathlib


def inspect(arguments: list[str]) -> None:
    """
    :param arguments: of ``sb3-boom inspect``
    :raises ValueError: for a model that can't be loaded, or an environment that is not its own
    """
    parser = argparse.ArgumentParser("sb3-boom inspect", description="Write a page that shows why a model does not learn.")
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL.zip", help="what model.save wrote; it can run programs")
    parser.add_argument("--env", required=True, metavar="ID", help="the environment's id; a zip does not hold it")
    parser.add_argument("--out", type=pathlib.Path, help="the page (default: MODEL.html); its figures are written beside it")
    parser.add_argument("--episodes", type=int, default=3, help="of planner and prior each (default: 3)")
    parser.add_argument("--max-steps", type=int, default=3_000, help="of either, after which episodes are cut (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes (default: 0)")
    parser.add_argument(
        "--vec-normalize", type=pathlib.Path, metavar="PKL", help="what VecNormalize.save wrote; it can run programs"
    )
    args = parser.parse_args(arguments)
    if args.episodes < 1 or args.max_steps < 1:
        raise ValueError("--episodes and --max-steps must be at least 1")
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

    from sb3_boom import BOOM
    from sb3_boom.files import hint_at_statistics
    from sb3_boom.inspection.page import inspect

    env: VecEnv = make_vec_env(args.env)
    model = BOOM.load(args.model)
    if args.vec_normalize:
        env = VecNormalize.load(str(args.vec_normalize), env)
        env.training = env.norm_reward = False
        model.set_env(env)
    else:
        hint_at_statistics(args.model)
    found = inspect(model, env, args.episodes, args.seed, args.max_steps)
    found.title = f"{args.env} after {model.num_timesteps:,} steps"
    path = found.save(args.out or args.model.with_suffix(".html"))
    for sentence in found.sentences:
        print(sentence.text)
    for note in found.notes:
        print(f"not looked at: {note}")
    print(f"wrote {path}")
