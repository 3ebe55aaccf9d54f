"""Where runs of a cluster keep what they have: a folder that all nodes see, or an fsspec URL that their folders go to."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sb3_boom.files import replacing

LEASE_S = 60.0  # after which a run whose claim nobody has renewed is free
SETTLE_S = 1.0  # in which a claim written at the same moment is seen
BEATS = 4  # per lease
RETRY_S = 1.0  # between two tries to reach a storage that is away
LAST = ("manifest.json", "rows.csv")  # they tell that what they name is there
NOT_STORED = ("lock", "claim.json")


class ClaimLost(Exception):
    """Another process has this run."""


class Storage:
    """
    Files by name, relative to a place.

    A plain path is a folder that every node sees, and runs work in it. A URL (``s3://``, ``gs://``, ``file://``, ...) is
    fsspec's: runs work in a folder of their node, whose changed files are copied there.

    What fails is an ``OSError``, whichever errors the protocol's package has.

    :param url: a path or a URL
    :param patience: seconds in which a storage that can't be reached is tried again; local files are not
    :raises ValueError: if fsspec does not know the protocol, or its package is not installed
    """

    def __init__(self, url: str | Path, patience: float = 0.0) -> None:
        self.patience = patience
        self.is_folder = "://" not in str(url)
        self.url = str(Path(url).absolute()) if self.is_folder else str(url)
        try:
            self.fs, self.root = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"--storage {url}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.url, self.patience)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """
        :param name: of a file
        :return: what it holds, or None if there is none
        """
        self.fs.invalidate_cache()
        try:
            return self._call(self.fs.cat_file, self._path(name))
        except FileNotFoundError:
            return None

    def _call(self, method: Callable[..., Any], *arguments: Any, patience: float | None = None) -> Any:
        """
        :param method: of the file system
        :param arguments: its arguments
        :param patience: instead of the storage's
        :return: what it returned
        :raises OSError: if it failed until patience ended
        """
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            try:
                return method(*arguments)
            except (FileNotFoundError, PermissionError):  # the storage's answer
                raise
            except Exception as error:
                if isinstance(self.fs, LocalFileSystem):
                    raise
                if time.monotonic() > deadline:
                    raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error
            time.sleep(RETRY_S)

    def write(self, name: str, data: bytes, patience: float | None = None) -> None:
        """
        Replace a file; whoever reads it sees all of one version or of the other.

        :param name: of the file
        :param data: what to hold
        :param patience: instead of the storage's
        """
        if isinstance(self.fs, LocalFileSystem):
            with replacing(Path(self._path(name))) as file:
                file.write(data)
        else:
            self._call(self.fs.pipe_file, self._path(name), data, patience=patience)

    def remove(self, name: str) -> None:
        """
        :param name: of a file, which may be gone
        """
        with contextlib.suppress(FileNotFoundError):
            self._call(self.fs.rm_file, self._path(name))

    def put(self, path: Path, name: str) -> None:
        """
        :param path: of a file here
        :param name: of the file there
        """
        if isinstance(self.fs, LocalFileSystem):
            with replacing(Path(self._path(name))) as file, path.open("rb") as source:
                while chunk := source.read(1 << 20):
                    file.write(chunk)
        else:
            self._call(self.fs.put_file, str(path), self._path(name))

    def get(self, name: str, path: Path) -> None:
        """
        :param name: of a file there
        :param path: of the file here
        """
        self._call(self.fs.get_file, self._path(name), str(path))

    def names(self, folder: str) -> list[str]:
        """
        :param folder: relative to the place
        :return: names of all files below it, relative to it
        """
        self.fs.invalidate_cache()
        start = self._path(folder).rstrip("/") + "/"
        found = self._call(self.fs.find, start)
        start = start.lstrip("/")
        return sorted(path.lstrip("/").removeprefix(start) for path in found)


class Mirror:
    """
    A run's folder on this node, and what of it is in the storage.

    :param storage: with URL
    :param name: of the run's folder there
    :param folder: here
    """

    def __init__(self, storage: Storage, name: str, folder: Path) -> None:
        self.storage, self.name, self.folder = storage, name, folder
        self._there: dict[str, tuple[int, int]] = {}  # size and time of what was copied
        self.n_bytes = 0

    def fetch(self) -> None:
        """Bring all that is there here."""
        for name in self.storage.names(self.name):
            path = self.folder / name
            if path.name in NOT_STORED or path.name.startswith("."):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            self.storage.get(f"{self.name}/{name}", path)
            self._there[name] = self._state(path)

    @staticmethod
    def _state(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_size, status.st_mtime_ns

    def push(self) -> None:
        """Copy what has changed, manifests and rows last; remove there what is gone here, manifests first."""
        here = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name not in NOT_STORED and not any(p.startswith(".") for p in path.parts[-2:]):
                here[path.relative_to(self.folder).as_posix()] = self._state(path)

        def order(name: str) -> int:
            last = PurePosixPath(name).name
            return LAST.index(last) + 1 if last in LAST else 0

        for name in sorted(here, key=order):
            if self._there.get(name) != here[name]:
                self.storage.put(self.folder / name, f"{self.name}/{name}")
                self._there[name] = here[name]
                self.n_bytes += here[name][0]
        for name in sorted(self._there.keys() - here.keys(), key=order, reverse=True):
            self.storage.remove(f"{self.name}/{name}")
            del self._there[name]


class Claim:
    """
    Says which process has a run, in a file of the run, renewed as long as that process lives.

    Only one that sees its own claim a while after writing it has the run. Clocks of different machines are not compared: a
    claim is free when somebody has seen it unchanged for a lease.

    :param storage: of the run
    :param name: of the run's folder there
    :param driver: whose task this is; Ray starts a task of a driver anew only when the one before is dead
    :param lease_s: seconds
    """

    def __init__(self, storage: Storage, name: str, driver: str, lease_s: float = LEASE_S) -> None:
        self.storage, self.file, self.driver, self.lease_s = storage, f"{name}/claim.json", driver, lease_s
        self.owner = uuid.uuid4().hex
        self.lost = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _write(self, beat: int) -> None:
        claim = {"owner": self.owner, "driver": self.driver, "beat": beat, "host": os.uname().nodename, "pid": os.getpid()}
        # not tried again: after a while somebody else's may be there
        self.storage.write(self.file, json.dumps(claim).encode(), patience=0.0)

    def _is_mine(self) -> bool:
        found = self.storage.read(self.file)
        return found is not None and json.loads(found)["owner"] == self.owner

    def take(self, unchanged: bytes | None = None) -> bool:
        """
        :param unchanged: a claim of another process that was seen unchanged for a lease
        :return: whether the run is this process's now
        """
        found = self.storage.read(self.file)
        if found is not None and found != unchanged and json.loads(found)["driver"] != self.driver:
            return False
        self._write(0)
        time.sleep(SETTLE_S)
        if not self._is_mine():
            return False
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()
        return True

    def _renew(self) -> None:
        beat = 0
        while not self._stop.wait(self.lease_s / BEATS):
            beat += 1
            with contextlib.suppress(OSError):  # a storage that is away for a moment
                if not self._is_mine():
                    self.lost = True
                    return
                self._write(beat)

    def check(self) -> None:
        """:raises ClaimLost: if another process has taken the run"""
        if self.lost or not self._is_mine():
            self.lost = True
            raise ClaimLost(f"another process has taken {self.file.rpartition('/')[0]}; this one stops")

    def release(self) -> None:
        """Leave the run to others."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            if not self.lost and self._is_mine():
                self.storage.remove(self.file)
