"""Trials of several machines in one study: ``sb3-boom optimize --storage``."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import optuna

HEARTBEAT_S = 60  # between two signs of life of a trial
GRACE_S = 180  # after the last one, until a trial counts as failed
MAX_RETRIES = 3  # of a trial whose process died


def shared_storage(url: str, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S) -> optuna.storages.RDBStorage:
    """
    A database whose trials give signs of life: when their process or machine dies, they are tried again, by whoever asks next.

    :param url: of the database, as SQLAlchemy has it
    :param heartbeat_s: seconds between two signs of life
    :param grace_s: seconds after the last one
    :return: the storage
    """
    names = inspect.signature(optuna.storages.RDBStorage).parameters
    renamed = "heartbeat_stale_trial_callback" in names  # in Optuna 4.9
    callback: Any = getattr(optuna.storages, "RetryHeartbeatStaleTrialCallback" if renamed else "RetryFailedTrialCallback")
    name = "heartbeat_stale_trial_callback" if renamed else "failed_trial_callback"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(
            url, heartbeat_interval=heartbeat_s, grace_period=grace_s, **{name: callback(max_retry=MAX_RETRIES)}
        )


@contextlib.contextmanager
def studies_survive(heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S) -> Iterator[None]:
    """
    Studies that are created meanwhile in a database, by its URL, are of :func:`shared_storage`.

    :param heartbeat_s: see there
    :param grace_s: see there
    """
    create_study = optuna.create_study

    @functools.wraps(create_study)
    def create(*args: Any, storage: Any = None, **kwargs: Any) -> optuna.Study:
        if isinstance(storage, str) and "://" in storage and not storage.startswith("redis"):
            storage = shared_storage(storage, heartbeat_s, grace_s)
        return create_study(*args, storage=storage, **kwargs)

    optuna.create_study = create
    try:
        yield
    finally:
        optuna.create_study = create_study
