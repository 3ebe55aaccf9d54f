"""
The ``sb3-boom`` command. Most of it is rl_zoo3's, for BOOM.

    sb3-boom train --env Pendulum-v1 -P
    sb3-boom enjoy --env Pendulum-v1 --no-render
    sb3-boom list
"""

import argparse
import functools
import os
import pathlib
import runpy
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import gymnasium as gym

USAGE = """usage: sb3-boom [--traceback] COMMAND [--cpu | --paper] ...

commands, of which the first five take rl_zoo3's options (sb3-boom COMMAND --help):
  train      train BOOM on an environment with the settings of its entry
  enjoy      run a trained model
  optimize   search hyperparameters with Optuna
  record     write a video of a trained model
  plot       plot the returns of training
  list       environments with an entry, and whether they are installed
  benchmark  train a grid of tasks and seeds, and report it beside published results
  bench      measure what a step costs on this machine
  export     write a trained model to an ONNX file, for a robot
  inspect    write a page that shows why a model does not learn

options:
  --cpu        train, optimize, list, benchmark: settings for two CPU cores (boom-cpu.yml), the default without a GPU
  --paper      the same: the paper's settings (boom.yml), the default with a GPU
  --resume     train: a folder for the whole run, with checkpoints; the same command goes on where the run was interrupted
  --heartbeat  optimize: seconds between signs of life of a trial in a database (default: 60); without any for three times as
               long, it is tried again
  --traceback  show where an error comes from"""
# by what an error says: the Debian package that brings the library
GL_PACKAGES = {
    "OSMesa": "libosmesa6", "libEGL": "libegl1", "eglQuery": "libegl1", "libGLU": "libglu1-mesa", "libGL": "libgl1",
    "GLFWError": "libglfw3", "gladLoadGL": "libgl1",
}  # fmt: skip
USER_ERRORS = (ValueError, ImportError, OSError, gym.error.Error)
OTHER_ERRORS = (TypeError, AssertionError, KeyError, RuntimeError)  # a mistake of the user's, or of a program's


def fail(message: object, status: int = 2, hint: str = "") -> NoReturn:
    """
    End the program with one line.

    :param message: what is wrong
    :param status: the exit status
    :param hint: what else to say in this line
    """
    lines = str(message).strip().splitlines() or [repr(message)]
    print(f"sb3-boom: {lines[0]}{hint}", file=sys.stderr)
    raise SystemExit(status)


def _rl_zoo3(arguments: list[str]) -> None:
    """What every command of rl_zoo3 needs. :param arguments: the command's"""
    from sb3_boom import zoo

    zoo.register()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env")
    env_id = parser.parse_known_args(arguments)[0].env
    missing = zoo.missing_package(env_id) if env_id else None
    if missing:
        raise ImportError(f"{env_id}: {missing}")


def train(arguments: list[str], cpu: bool) -> None:
    """
    :param arguments: of rl_zoo3's ``train``
    :param cpu: which hyperparameter file to take, unless ``--conf-file`` names one
    """
    import rl_zoo3.train

    from sb3_boom import zoo
    from sb3_boom.experiment import ResumableExperiment

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=pathlib.Path)
    options, arguments = parser.parse_known_args(arguments)
    _rl_zoo3(arguments)
    path = zoo.hyperparams_file(cpu)
    if not {"-conf", "--conf-file"} & set(arguments):
        sizes, other = ("two CPU cores", "--paper") if cpu else ("a GPU", "--cpu")
        print(f"settings for {sizes}: {path} ({other} takes the others)", flush=True)
    sys.argv[1:] = ["--algo", "boom", "--conf-file", str(path), *arguments]  # the last one counts
    if options.resume is None:
        rl_zoo3.train.train()
        return
    manager = rl_zoo3.train.ExperimentManager
    rl_zoo3.train.ExperimentManager = functools.partial(ResumableExperiment, folder=options.resume)  # type: ignore
    try:
        rl_zoo3.train.train()
    finally:
        rl_zoo3.train.ExperimentManager = manager  # type: ignore[misc]


def optimize(arguments: list[str], cpu: bool) -> None:
    """
    :param arguments: of rl_zoo3's ``train``
    :param cpu: which hyperparameter file to take
    """
    from sb3_boom import tuning

    parser = argparse.ArgumentParser("sb3-boom optimize", add_help=False, allow_abbrev=False)
    parser.add_argument("--heartbeat", type=int, default=tuning.HEARTBEAT_S)
    options, arguments = parser.parse_known_args(arguments)
    if options.heartbeat < 1:
        raise ValueError(f"--heartbeat must be at least 1 second, not {options.heartbeat}")
    with tuning.studies_survive(options.heartbeat, 3 * options.heartbeat):
        train(["-optimize", *arguments], cpu)


def enjoy(arguments: list[str]) -> None:
    """
    :param arguments: of rl_zoo3's ``enjoy``
    """
    from rl_zoo3.enjoy import enjoy as rl_zoo3_enjoy

    _rl_zoo3(arguments)
    sys.argv[1:] = ["--algo", "boom", "-f", "logs", *arguments]
    rl_zoo3_enjoy()


def record(arguments: list[str]) -> None:
    """
    :param arguments: of rl_zoo3's ``record_video``
    """
    from sb3_boom import video

    _rl_zoo3(arguments)
    sys.argv[1:] = ["--algo", "boom", "-f", "logs", *arguments]
    try:
        video.record(functools.partial(runpy.run_module, "rl_zoo3.record_video", run_name="__main__"))
    except Exception as error:
        if (package := missing_gl_package(f"{type(error).__name__}: {error}")) is not None:
            raise ImportError(
                f"frames can't be drawn ({error}): on Debian, `apt install {package}` brings what is missing"
            ) from error
        raise


def missing_gl_package(message: str) -> str | None:
    """
    :param message: an error's
    :return: the Debian package of the OpenGL library that it is for want of, if it is
    """
    return next((package for sign, package in GL_PACKAGES.items() if sign.lower() in message.lower()), None)


def plot(arguments: list[str]) -> None:
    """
    :param arguments: of rl_zoo3's ``plot_train``
    """
    from rl_zoo3.plots.plot_train import plot_train

    # rl_zoo3 names folders without slashes, and smooths over 100 episodes: more than a run of a preset may have
    arguments = [argument if os.path.exists(argument) else argument.replace("/", "-") for argument in arguments]
    sys.argv[1:] = ["-a", "boom", "-f", "logs", "-w", "10", *arguments]
    plot_train()


def list_environments(arguments: list[str], cpu: bool) -> None:
    """
    :param arguments: none are taken
    :param cpu: which hyperparameter file to list
    """
    from sb3_boom import zoo

    argparse.ArgumentParser("sb3-boom list").parse_args(arguments)
    zoo.register()
    path = zoo.hyperparams_file(cpu)
    print(f"{'environment':42} {'steps':>9}  ({path})")
    for env_id, entry in zoo.read_hyperparams(path).items():
        missing = zoo.missing_package(env_id)
        print(f"{env_id:42} {int(entry['n_timesteps']):>9,}  {f'not installed: {missing}' if missing else ''}".rstrip())


def benchmark(arguments: list[str], cpu: bool) -> None:
    """
    :param arguments: of :func:`sb3_boom.benchmark.command.benchmark`
    :param cpu: which hyperparameter file to take
    """
    from sb3_boom.benchmark import command

    def on_a_cluster(*args: Any) -> int:
        from sb3_boom.cluster import run_grid

        return run_grid(*args)

    command.benchmark(arguments, cpu, on_a_cluster)


def bench(arguments: list[str]) -> None:
    """
    :param arguments: of :func:`sb3_boom.benchmark.step.bench`
    """
    from sb3_boom.benchmark import step

    step.bench(arguments)


def export(arguments: list[str]) -> None:
    """
    :param arguments: of :func:`sb3_boom.deployment.command.export`
    """
    from sb3_boom.deployment import command

    command.export(arguments)


def inspect(arguments: list[str]) -> None:
    """
    :param arguments: of :func:`sb3_boom.inspection.command.inspect`
    """
    from sb3_boom import zoo
    from sb3_boom.inspection import command

    zoo.register()
    command.inspect(arguments)


BY_ENTRY: dict[str, Callable[[list[str], bool], None]] = dict(
    train=train, optimize=optimize, list=list_environments, benchmark=benchmark
)
OTHERS: dict[str, Callable[[list[str]], None]] = dict(
    enjoy=enjoy, record=record, plot=plot, bench=bench, export=export, inspect=inspect
)


def _one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    fail(f"{message} (sb3-boom COMMAND --help lists the options)")


def _has_no_gpu() -> bool:
    """:return: whether the settings for a CPU are the ones for this machine"""
    from stable_baselines3.common.utils import get_device

    from sb3_boom.presets import choose_preset

    return choose_preset("auto", get_device("auto")) == "cpu"


def _output_is_closed() -> bool:
    """:return: whether what reads our output has gone"""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def main() -> None:
    """Entry point of ``sb3-boom``."""
    arguments = sys.argv[1:]
    traceback = "--traceback" in arguments[:1]
    arguments = arguments[1:] if traceback else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, *arguments = arguments
    if command not in BY_ENTRY and command not in OTHERS:
        fail(f"unknown command {command}: choose among {', '.join((*BY_ENTRY, *OTHERS))}")
    chosen = [argument for argument in arguments if argument in ("--cpu", "--paper")]
    if chosen and command in OTHERS:
        fail(f"{command} takes no {chosen[0]}, which chooses the settings of {', '.join(BY_ENTRY)}")
    if len(set(chosen)) > 1:
        fail("--cpu and --paper: choose one of the two")
    cpu = command in BY_ENTRY and ("--cpu" in chosen if chosen else _has_no_gpu())
    arguments = [argument for argument in arguments if argument not in chosen]
    sys.argv[0] = f"sb3-boom {command}"
    argparse.ArgumentParser.error = _one_line  # type: ignore[method-assign, assignment]  # rl_zoo3's parsers are its own
    try:
        BY_ENTRY[command](arguments, cpu) if command in BY_ENTRY else OTHERS[command](arguments)
    except KeyboardInterrupt as error:
        fail(error if error.args else "interrupted", status=130)
    except (*USER_ERRORS, *OTHER_ERRORS) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():  # `sb3-boom list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        if traceback:
            raise
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in ("rl_zoo3", "optuna"):
            fail(f'{command} needs rl_zoo3: pip install "sb3_boom[zoo]"', status=1)
        hint = f" (sb3-boom --traceback {command} ... shows where)" if isinstance(error, OTHER_ERRORS) else ""
        fail(f"{type(error).__name__}: {error}", status=1, hint=hint)


if __name__ == "__main__":
    main()
