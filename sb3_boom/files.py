"""Files that are whole or not there: atomic writes, checksums, a lock."""

import contextlib
import hashlib
import os
import pathlib
import pickle
import sys
from collections.abc import Iterator
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

CHUNK = 1 << 20
TRAILER = b"sb3_boom checksum "  # after a pickle, where whoever unpickles does not look


def sync_folder(folder: pathlib.Path) -> None:
    """
    Make the names in a folder last.

    :param folder: that files were put into, renamed in or removed from
    """
    if os.name == "nt":  # where a folder can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """
    Write a file whole: until the end, and if an error comes between, what was there before stays.

    :param path: of the file
    :return: where to write
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def checksum(file: IO[bytes], n_bytes: int | None = None) -> str:
    """
    :param file: read from where it stands
    :param n_bytes: how much; default: to the end
    :return: its checksum
    """
    digest = hashlib.blake2b(digest_size=20)
    left = n_bytes if n_bytes is not None else -1
    while left and (chunk := file.read(CHUNK if left < 0 else min(CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk) if left > 0 else 0
    return digest.hexdigest()


def checksum_of(path: pathlib.Path) -> str:
    """
    :param path: of a file
    :return: its checksum
    """
    with path.open("rb") as file:
        return checksum(file)


def save_pickle(path: pathlib.Path, value: Any) -> None:
    """
    Write a pickle atomically, with a checksum after it.

    :param path: of the file
    :param value: to pickle
    :raises OSError: if the disk is full; a file that was there before still is
    """
    with replacing(path) as file:
        pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.seek(0)
        digest = checksum(file)
        file.seek(0, os.SEEK_END)
        file.write(TRAILER + digest.encode())


def load_pickle(path: pathlib.Path) -> Any:
    """
    :param path: of a file by :func:`save_pickle`, or of any pickle
    :return: what was pickled
    :raises ValueError: if the file is damaged, as far as its checksum or the pickle itself tells
    :raises OSError: if there is no such file
    """
    length = len(TRAILER) + 40
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - length))
        end = file.read()
        file.seek(0)
        if end.startswith(TRAILER) and checksum(file, size - length).encode() != end[len(TRAILER) :]:
            raise ValueError(f"{path} is damaged: its checksum is another one. Load an earlier copy")
        file.seek(0)
        try:
            return pickle.load(file)
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{path} can't be loaded ({type(error).__name__}: {error}). Load an earlier copy") from error


class FolderLock:
    """
    Keeps other processes out of a folder; gone with the process that holds it, in whatever way that ends.

    :param folder: to lock, made if it is not there
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """:raises OSError: if another process, or another model of this one, has it"""
        if fcntl is None or self._file is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise OSError(
                f"{self.folder} is in use by process {owner}: a folder is for one run at a time. Wait for it, or take another"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hint_at_statistics(model: pathlib.Path) -> None:
    """
    Print a line for every ``vecnormalize.pkl`` where rl_zoo3 or a user would have put it for a model. It is a pickle, so it is
    loaded only where it was asked for.

    :param model: the zip
    """
    for path in (model.parent / "vecnormalize.pkl", *sorted(model.parent.glob("*/vecnormalize.pkl"))):
        if path.exists():
            print(f"{path} is left out: if the model was trained with it, add --vec-normalize {path}", file=sys.stderr)
