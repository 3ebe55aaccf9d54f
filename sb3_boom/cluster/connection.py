"""The way to a Ray cluster, and what its nodes must have in common before anything runs there."""

import contextlib
import importlib
import os
import platform
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3 as sb3
import torch as th

import sb3_boom
from sb3_boom import zoo
from sb3_boom.cluster.storage import Storage

CONNECT_S = 5.0  # until an address that does not answer is given up; Ray itself tries for two minutes, and exits
HEALTH_S = 20.0  # for a process that asks what answers there whether it is a cluster
PROBE_S = 180.0  # until a node must have answered what it has; its first worker imports torch
LOCAL = "local"


def import_ray() -> Any:
    """
    :return: the module
    :raises ImportError: that names the extra
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ImportError('Ray is not installed: pip install "sb3_boom[ray]"') from error
    except ImportError as error:
        raise ImportError(f'Ray can not be imported ({error}): pip install --force-reinstall "sb3_boom[ray]"') from error


def connect(address: str = LOCAL, **kwargs: Any) -> bool:
    """
    Connect this process to a cluster, unless it is connected already.

    :param address: ``host:port`` of a cluster's head, ``auto`` for the one that this machine belongs to, or ``local`` for one
        on this machine that lives as long as this process
    :param kwargs: of ``ray.init``
    :return: whether it was not connected before, so that who asks should call ``ray.shutdown``
    :raises ConnectionError: if nothing answers there
    :raises ValueError: if it is no address
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    if address not in (LOCAL, "auto"):
        _check_reachable(address)
    if address == LOCAL:
        kwargs = {"include_dashboard": False, **kwargs}
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, **kwargs)
    except (ConnectionError, RuntimeError) as error:  # a version of Ray or of Python that differs, a token that is wrong, ...
        raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
    return True


@contextlib.contextmanager
def oom_retries(number: int) -> Iterator[None]:
    """
    For a process that connects meanwhile: how often Ray starts a task anew that it killed for want of memory. Otherwise
    that is for ever, as Ray does not count it among a task's retries.

    :param number: of times; not where ``RAY_task_oom_retries`` is set
    """
    name = "RAY_task_oom_retries"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(number)
    try:
        yield
    finally:
        del os.environ[name]


def _check_reachable(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise ValueError(
            f"{address!r} is no address of a Ray cluster: give host:port of its head (ray start --head prints it), auto on "
            "one of its nodes, or local"
        )
    hint = "Is the cluster up (ray status, on its head), the port open, this machine in its network?"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster at {address}: {error}. {hint}") from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=HEALTH_S)
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"what answers at {address} is no Ray cluster. {hint}") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or ["unhealthy"]
        raise ConnectionError(f"the Ray cluster at {address} refuses: {reason[0]}. {hint}") from error


def versions() -> dict[str, str]:
    """:return: what must not differ between nodes, by name"""
    return {
        "python": platform.python_version(),
        "torch": th.__version__.partition("+")[0],
        "sb3_boom": sb3_boom.__version__,
        "stable_baselines3": sb3.__version__,
        "gymnasium": gym.__version__,
        "numpy": np.__version__,
    }


def what_is_wrong_here(storage: Storage, marker: str, expected: dict[str, str], tasks: Sequence[str]) -> list[str]:
    """
    Look at the machine that this is called on.

    :param storage: that must be the driver's
    :param marker: what the driver has written there
    :param expected: versions of the driver
    :param tasks: environments that must be there
    :return: lines, none if all is well
    """
    problems = [
        f"it has {name} {version}, the driver {expected[name]}"
        for name, version in versions().items()
        if version != expected[name]
    ]
    try:
        seen = storage.read(f".markers/{marker}")
    except Exception as error:
        problems.append(f"{storage.url} can't be read there ({type(error).__name__}: {error})")
    else:
        if seen != marker.encode():
            problems.append(f"it does not see {storage.url} as the driver does: a folder must be shared by all nodes")
    zoo.register()
    for task in tasks:
        try:
            zoo.check_installed(task)
        except (ImportError, gym.error.Error) as error:
            problems.append(f"environment {error}" if task in str(error) else f"environment {task}: {error}")
    return problems


def check_nodes(storage: Storage, tasks: Sequence[str], num_cpus: float, num_gpus: float, timeout: float = PROBE_S) -> str:
    """
    Ask every node that runs could be placed on for what they need there.

    :param storage: of the runs
    :param tasks: their environments
    :param num_cpus: of a run
    :param num_gpus: of a run
    :param timeout: seconds to wait for the nodes
    :return: the marker, for nodes that come later
    :raises ValueError: naming each node and what it lacks
    """
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    able = [n for n in nodes if n["Resources"].get("CPU", 0) >= num_cpus and n["Resources"].get("GPU", 0) >= num_gpus]
    if not able:
        most = {kind: max((node["Resources"].get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
        raise ValueError(
            f"no node has the {num_cpus:g} CPUs and {num_gpus:g} GPUs of a run: the largest have {most['CPU']:g} CPUs and "
            f"{most['GPU']:g} GPUs"
        )
    marker = uuid.uuid4().hex
    try:
        storage.write(f".markers/{marker}", marker.encode())
    except OSError as error:
        raise ValueError(f"--storage {storage.url} can't be written: {error}") from error
    probe = ray.remote(num_cpus=0, max_retries=1)(what_is_wrong_here)
    asked = {}
    for node in able:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
        ref = probe.options(scheduling_strategy=strategy).remote(storage, marker, versions(), tasks)
        asked[ref] = name
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
    problems = []
    for ref, name in asked.items():
        if ref not in ready:
            problems.append(f"{name}: no answer in {timeout:g} s")
            continue
        try:
            problems += [f"{name}: {problem}" for problem in ray.get(ref)]
        except Exception as error:  # sb3_boom, or what it needs, can't be imported there
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            problems.append(f"{name}: can't run sb3_boom ({reason})")
    if problems:
        storage.remove(f".markers/{marker}")
        lacking = len({problem.partition(":")[0] for problem in problems})
        raise ValueError(f"{lacking} of {len(able)} nodes can't take runs: " + "; ".join(problems))
    return marker
