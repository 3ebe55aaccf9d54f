"""
What a run's folder holds: checkpoints, each with a ``manifest.json``, which is written last and names every file of the
checkpoint with its length and checksum.
"""

import io
import json
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sb3_boom.files import checksum, checksum_of, replacing
from sb3_boom.storage import Arrays

FORMAT = 1
MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """
    One that has a readable manifest.

    :param path: its folder
    :param number: of the checkpoint, counted up in its folder
    :param manifest: what its ``manifest.json`` says: files, counters, random states, settings of VecNormalize, the replay
        buffer's parts
    """

    path: pathlib.Path
    number: int
    manifest: dict[str, Any]


def number_of(path: pathlib.Path) -> int:
    """:param path: of a checkpoint. :return: its number"""
    return int(path.name.rpartition("-")[2])


def in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """
    :param folder: of a run
    :return: folders of its checkpoints, complete or not, the newest first
    """
    return sorted(folder.glob("checkpoint-[0-9]*"), key=number_of, reverse=True)


def is_there(folder: pathlib.Path) -> bool:
    """
    :param folder: of a run
    :return: whether it has a checkpoint that was finished
    """
    return any((path / MANIFEST).exists() for path in in_folder(folder))


def write_npz(path: pathlib.Path, arrays: Arrays, compressed: bool = False) -> None:
    """
    :param path: of the file, which is there whole or not at all
    :param arrays: what it is to hold
    :param compressed: smaller, and slower
    """
    with replacing(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]


def read_npz(path: pathlib.Path) -> Arrays:
    """:param path: from :func:`write_npz`. :return: what it holds"""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def described(path: pathlib.Path) -> dict[str, Any]:
    """:param path: of a file. :return: what a manifest says of it"""
    return {"name": path.name, "bytes": path.stat().st_size, "checksum": checksum_of(path)}


def body_checksum(body: dict[str, Any]) -> str:
    """:param body: of a manifest. :return: its checksum"""
    return checksum(io.BytesIO(json.dumps(body, sort_keys=True).encode()))


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """
    :param path: of a checkpoint
    :return: what its manifest says
    :raises ValueError: if it is damaged or of a later format
    :raises OSError: if it can't be read
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text())
        body = content["body"]
        whole = content["checksum"] == body_checksum(body)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    if not whole:
        raise ValueError(f"{file} is damaged: its checksum is another one")
    if body["format"] > FORMAT:
        raise ValueError(f"{file} has format {body['format']}, this sb3_boom reads up to {FORMAT}: upgrade sb3_boom to go on")
    return body


def files_of(path: pathlib.Path, manifest: dict[str, Any]) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
    """:param path: of a checkpoint. :param manifest: its own. :return: all of its files, each with what is said of it"""
    for entry in manifest["files"]:
        yield path / entry["name"], entry
    for entry in manifest["buffer"]["segments"]:
        yield path.parent / "segments" / entry["name"], entry


def read(path: pathlib.Path) -> Checkpoint:
    """
    Look whether a checkpoint is whole, without loading it.

    :param path: of the checkpoint
    :return: the checkpoint
    :raises ValueError: naming the file that is damaged
    :raises OSError: naming the file that is missing or can't be read
    """
    manifest = read_manifest(path)
    for file, entry in files_of(path, manifest):
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{file} is damaged: it has {size} bytes, not {entry['bytes']}")
        if checksum_of(file) != entry["checksum"]:
            raise ValueError(f"{file} is damaged: its checksum is another one")
    return Checkpoint(path, number_of(path), manifest)


def newest_whole(folder: pathlib.Path) -> Checkpoint:
    """
    :param folder: of a run
    :return: its last checkpoint that is whole; a warning names the file for which a later one is damaged
    :raises FileNotFoundError: if there is none
    """
    problems = []
    for path in in_folder(folder):
        if not (path / MANIFEST).exists():  # being removed
            continue
        try:
            checkpoint = read(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}. {path} is used, the checkpoint before", stacklevel=4)
        return checkpoint
    damaged = f": {'; '.join(problems)}" if problems else ""
    raise FileNotFoundError(f"{folder} has no complete checkpoint to resume from{damaged}. Start a new run in another folder")
