"""Waits that end: for workers that hang, for evaluations that never come to an end."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecMonitor, is_vecenv_wrapped

from sb3_boom.presets import episode_length

WORKER_TIMEOUT = 600.0  # seconds
POLL = 1.0  # seconds between two looks whether a worker is alive
UNSEEN_ENDS = 50  # of episodes that the Monitor did not see, one after another; an Atari life is one
ENDLESS = 100_000  # steps of an episode that is taken for one that never ends, where no limit is known


class BoundedRemote:
    """
    A pipe to a worker of a SubprocVecEnv whose answers are waited for, but not for ever.

    :param remote: the pipe
    :param process: the worker
    :param index: its environment
    :param timeout: seconds, or None to wait as long as it lives
    """

    def __init__(self, remote: Any, process: Any, index: int, timeout: float | None) -> None:
        self.remote, self.process, self.index, self.timeout = remote, process, index, timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.remote, name)

    def recv(self) -> Any:
        """
        :return: the worker's answer
        :raises EOFError: if the worker is dead; with the start method "fork" its pipe stays open
        :raises TimeoutError: if it does not answer
        """
        start = time.monotonic()
        while not self.remote.poll(POLL if self.timeout is None else min(POLL, self.timeout)):
            if not self.process.is_alive() and not self.remote.poll(0):
                raise EOFError
            if self.timeout is not None and time.monotonic() - start >= self.timeout:
                raise TimeoutError(
                    f"worker {self.index} of the SubprocVecEnv (process {self.process.pid}) is alive, but has not answered "
                    f"for {self.timeout:g} s: its environment hangs, or needs a longer worker_timeout. The model and its "
                    "replay buffer can still be saved"
                )
        return self.remote.recv()


@contextlib.contextmanager
def bounded_waits(env: VecEnv | None, timeout: float | None) -> Iterator[None]:
    """
    Wait for the answers of workers no longer than a while, and take those that an interrupted wait has left behind.

    :param env: the environments stepped meanwhile
    :param timeout: seconds, or None to wait as long as the workers live
    :raises TimeoutError: naming the worker that does not answer; all workers are stopped then, and the environments closed
    """
    workers = None if env is None else env.unwrapped
    if not isinstance(workers, SubprocVecEnv) or workers.closed:
        yield
        return
    remotes = workers.remotes
    pairs = zip(remotes, workers.processes, strict=True)
    workers.remotes = tuple(BoundedRemote(*pair, index, timeout) for index, pair in enumerate(pairs))
    try:
        _take_old_answers(workers)
        yield
    except TimeoutError:
        for process in workers.processes:  # close() would wait for the one that hangs
            process.kill()
        workers.closed = True
        raise
    finally:
        workers.remotes = remotes


def _take_old_answers(workers: SubprocVecEnv) -> None:
    """A wait that an error has interrupted leaves answers in the pipes, which would be taken for those to come."""
    if not workers.waiting:
        return
    for remote in workers.remotes:
        remote.send(("has_attr", "render_mode"))
    for remote in workers.remotes:
        while not isinstance(remote.recv(), bool):  # only this question is answered by yes or no
            pass
    workers.waiting = False


@contextlib.contextmanager
def evaluation_watched(env: Any) -> Iterator[None]:
    """
    SB3's ``evaluate_policy`` waits until it has seen enough episodes end: say why it would wait for ever.

    :param env: the environments that are evaluated meanwhile
    :raises ValueError: if no episode ends, or none that their Monitor sees
    """
    if not isinstance(env, VecEnv):  # evaluate_policy makes its own
        yield
        return
    limit = max(ENDLESS, 2 * (episode_length(env) or 0))
    monitored = is_vecenv_wrapped(env, VecMonitor) or env.env_is_wrapped(Monitor)[0]
    lengths, unseen = np.zeros(env.num_envs, dtype=int), np.zeros(env.num_envs, dtype=int)
    step_wait, watched_already = env.step_wait, env.__dict__.get("step_wait")

    def watched() -> Any:
        obs, rewards, dones, infos = step_wait()
        lengths[:] = np.where(dones, 0, lengths + 1)
        for i in np.flatnonzero(dones):
            unseen[i] = 0 if "episode" in infos[i] else unseen[i] + 1
        if monitored and unseen.max() >= UNSEEN_ENDS:
            raise ValueError(
                f"the evaluation waits for ever: environment {unseen.argmax()} ended {UNSEEN_ENDS} episodes that its Monitor "
                "did not see. A wrapper outside of the Monitor ends them (env_wrapper: a TimeLimit shorter than the "
                "environment's own?): wrap inside of it, give gym.make max_episode_steps, or put a VecMonitor around all"
            )
        if lengths.max() >= limit:
            raise ValueError(
                f"the evaluation waits for ever: the episode of environment {lengths.argmax()} has not ended in {limit} "
                "steps. Give the environment a TimeLimit (gym.make's max_episode_steps)"
            )
        return obs, rewards, dones, infos

    env.step_wait = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del env.__dict__["step_wait"]
        if watched_already is not None:
            env.__dict__["step_wait"] = watched_already
