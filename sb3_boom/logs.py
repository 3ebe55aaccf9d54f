"""Files that a run appends rows to: their state in a checkpoint, and back to it."""

import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, JSONOutputFormat, KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

if TYPE_CHECKING:
    from sb3_boom.boom import BOOM

Opened = dict[str, Any]  # files by a name that a resumed run has, too


def of_monitors(model: "BOOM") -> Opened:
    """
    :param model: in its environments
    :return: the files of their Monitors, as far as this process writes them
    """
    assert model.env is not None
    found = {}
    base = model.env.unwrapped
    for index, env in enumerate(base.envs if isinstance(base, DummyVecEnv) else []):
        while env is not env.unwrapped:
            if isinstance(env, Monitor) and env.results_writer is not None:
                found[f"monitor {index}"] = env.results_writer.file_handler
            env = env.env  # type: ignore[attr-defined]
    return found


def of_logger(logger: Logger) -> Opened:
    """
    :param logger: of a model
    :return: the files that it writes, but TensorBoard's
    """
    found = {}
    for output in logger.output_formats:
        if isinstance(output, (CSVOutputFormat, JSONOutputFormat)) or (
            isinstance(output, HumanOutputFormat) and output.own_file
        ):
            found[f"logger {pathlib.Path(output.file.name).name}"] = output
    return found


def contents(model: "BOOM", files: tuple[pathlib.Path, ...]) -> dict[str, np.ndarray]:
    """
    :param model: to save
    :param files: further files
    :return: what all of its files hold, as bytes
    """
    opened = of_monitors(model) | of_logger(model.logger)
    paths = {f"file {path}": path for path in files}
    for name, file in opened.items():
        file = _file(file)
        file.flush()
        paths[name] = pathlib.Path(file.name)
    return {name: np.frombuffer(path.read_bytes(), dtype=np.uint8) for name, path in paths.items() if path.exists()}


def _file(opened: Any) -> Any:
    """:param opened: an open file, or a logger's format. :return: the file"""
    return opened.file if isinstance(opened, KVWriter) else opened  # type: ignore[attr-defined]


def restore(saved: dict[str, np.ndarray], opened: Opened) -> None:
    """
    Let files go on where a checkpoint was written: rows that came later are cut, since the resumed run writes them again; rows
    that were lost, when a file was opened anew, are put back.

    :param saved: from :func:`contents`
    :param opened: open files, or paths, by the same names
    """
    for name, where in opened.items():
        if name not in saved:
            continue
        content = saved[name].tobytes()
        if isinstance(where, pathlib.Path):
            with where.open("r+b" if where.exists() else "w+b") as raw:
                _rewrite(raw.fileno(), content)
            continue
        file = _file(where)
        file.flush()
        if not pathlib.Path(file.name).exists():  # removed while it was open
            continue
        descriptor = os.open(file.name, os.O_RDWR)
        try:
            _rewrite(descriptor, content)
        finally:
            os.close(descriptor)
        file.seek(0, os.SEEK_END)
        if isinstance(where, CSVOutputFormat):
            header = content.decode().partition("\n")[0]
            where.keys = header.split(",") if header else []


def _rewrite(descriptor: int, content: bytes) -> None:
    """Only what differs is written: a file that was appended to is never empty, not for a moment."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    there = b""
    while len(there) < len(content) and (part := os.read(descriptor, len(content) - len(there))):
        there += part
    if there != content:
        os.lseek(descriptor, 0, os.SEEK_SET)
        left = content
        while left:
            left = left[os.write(descriptor, left) :]
    os.ftruncate(descriptor, len(content))
