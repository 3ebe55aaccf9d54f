"""``sb3-boom export``: its arguments."""

import argparse
import pathlib
import sys


def export(arguments: list[str]) -> None:
    """
    :param arguments: of ``sb3-boom export``
    :raises ValueError: for a model that can't be loaded or exported
    """
    parser = argparse.ArgumentParser(
        "sb3-boom export", description="Write policy prior and planner of a trained model to one ONNX file."
    )
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL.zip", help="what model.save wrote; it can run programs")
    parser.add_argument("output", type=pathlib.Path, metavar="OUT", help="the ONNX file")
    parser.add_argument("--prior-only", action="store_true", help="without the planner")
    parser.add_argument(
        "--env", metavar="ID", help="the environment's id, to tell it in the file; with --untrusted, its spaces"
    )
    parser.add_argument(
        "--vec-normalize", type=pathlib.Path, metavar="PKL", help="what VecNormalize.save wrote; it can run programs"
    )
    parser.add_argument(
        "--untrusted", action="store_true", help="unpickle nothing: read plain settings and weights alone, of a foreign zip"
    )
    args = parser.parse_args(arguments)
    if args.untrusted:
        from sb3_boom.deployment import foreign

        if args.vec_normalize:
            raise ValueError("--vec-normalize names a pickle, which can run programs: leave it out, or --untrusted")
        path = foreign.export_untrusted(args.model, args.output, args.env, args.prior_only)
        for what in foreign.NOT_KNOWN:
            print(f"not looked at, since that is pickled: {what}", file=sys.stderr)
    else:
        path = _export_trusted(args)
    print(f"wrote {path}")


def _export_trusted(args: argparse.Namespace) -> pathlib.Path:
    from stable_baselines3.common.save_util import load_from_pkl
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_boom import BOOM
    from sb3_boom.deployment.export import export
    from sb3_boom.files import hint_at_statistics

    normalizer = load_from_pkl(args.vec_normalize) if args.vec_normalize else None
    if normalizer is not None and not isinstance(normalizer, VecNormalize):
        raise ValueError(f"{args.vec_normalize} is no VecNormalize, but a {type(normalizer).__name__}")
    model = BOOM.load(args.model, device="cpu")
    if normalizer is None:
        hint_at_statistics(args.model)
    return export(model, args.output, args.prior_only, normalizer, args.env)
