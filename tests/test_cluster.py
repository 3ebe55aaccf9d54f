"""Grids and environments on a Ray cluster, of processes on this machine."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_boom.cluster import RayVecEnv, connection, grid, run_grid, task
from sb3_boom.cluster.storage import Claim, Mirror, Storage
from sb3_boom.cluster.table import Table
from sb3_boom.files import FolderLock

try:
    import ray
except ImportError:
    ray = None  # type: ignore[assignment]

needs_ray = pytest.mark.skipif(ray is None, reason='Ray is not installed: pip install "sb3_boom[ray]"')
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this machine that ends with the module."""
    connection.connect(num_cpus=2, num_gpus=1, object_store_memory=80_000_000)  # a GPU that is only declared
    yield
    ray.shutdown()


PENDULUM = functools.partial(gym.make, "Pendulum-v1", max_episode_steps=5)  # of a module that actors have


# ------------------------------------------------------------------ environments


@needs_ray
def test_environments_in_actors_are_those_of_one_process(cluster):
    actors, here = RayVecEnv([PENDULUM] * 3, envs_per_actor=2, num_cpus=0.5), DummyVecEnv([PENDULUM] * 3)
    for env in (actors, here):
        env.seed(3)
    np.testing.assert_array_equal(actors.reset(), here.reset())
    for step in range(7):
        actions = np.full((3, 1), 0.1 * step, dtype=np.float32)
        ours, theirs = actors.step(actions), here.step(actions)
        for mine, other in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(mine.astype(other.dtype), other)  # DummyVecEnv has rewards of 32 bits
        for mine, other in zip(ours[3], theirs[3], strict=True):
            assert mine.keys() == other.keys() and mine["TimeLimit.truncated"] == other["TimeLimit.truncated"]
            if "terminal_observation" in mine:
                np.testing.assert_array_equal(mine["terminal_observation"], other["terminal_observation"])
    ours[0][:] = 0.0  # what comes out of the object store can't be changed; what the user gets can
    actors.set_attr("mark", 5, indices=[0, -1])
    assert actors.get_attr("mark", indices=[2, 0]) == [5, 5] and not actors.has_attr("mark")
    assert actors.env_is_wrapped(Monitor) == [False] * 3
    actors.close()


@needs_ray
def test_an_actor_that_dies_is_started_anew_and_its_episodes_are_truncated(cluster):
    env = RayVecEnv([PENDULUM] * 3, envs_per_actor=2, num_cpus=0.5, max_restarts=1)
    env.seed(0)
    env.reset()
    actions = np.zeros((3, 1), dtype=np.float32)
    before = env.step(actions)[0].copy()
    os.kill(env._where[0][1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.warns(UserWarning, match=r"actor 0 of the RayVecEnv \(environments 0 to 1, process .* started anew, 1 of 1"):
        obs, rewards, dones, infos = env.step(actions)
    assert dones.tolist() == [True, True, False] and rewards[:2].tolist() == [0.0, 0.0]
    for i in (0, 1):
        assert infos[i]["TimeLimit.truncated"]
        np.testing.assert_array_equal(infos[i]["terminal_observation"], before[i])
        assert not np.array_equal(obs[i], before[i])
    assert not env.step(actions)[2].any()
    os.kill(env._where[0][1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(ConnectionError, match=r"actor 0 .* after 1 restarts \(max_restarts\)"):
        for _ in range(3):
            env.step(actions)
    env.close()


@needs_ray
def test_a_death_between_steps_closes_the_episode_too(cluster):
    env = RayVecEnv([PENDULUM], num_cpus=0.5)
    last = env.reset().copy()
    os.kill(env._where[0][1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.warns(UserWarning, match="started anew"):
        assert env.get_attr("render_mode") == [None]
    _, _, dones, infos = env.step(np.zeros((1, 1), dtype=np.float32))
    assert dones[0] and infos[0]["TimeLimit.truncated"]
    np.testing.assert_array_equal(infos[0]["terminal_observation"], last[0])
    assert not env.step(np.zeros((1, 1), dtype=np.float32))[2][0]
    env.close()


@pytest.mark.parametrize("arguments", [dict(env_fns=[]), dict(env_fns=[PENDULUM], envs_per_actor=0)])
def test_environments_that_can_not_be(arguments):
    with pytest.raises(ValueError, match=r"env_fns|envs_per_actor"):
        RayVecEnv(**arguments)


# ---------------------------------------------------------------- before the first run


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"sb3_boom\[ray\]"):
        run_grid([("Pendulum-v1", "forward_kl")], [0], 20, tmp_path / "r.csv", tmp_path, ROOT / "zoo_hyperparams/boom-cpu.yml")


def test_a_ray_that_can_not_be_imported_is_told_from_none(monkeypatch, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/__init__.py").write_text("raise ImportError('libssl.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"libssl.* --force-reinstall .*sb3_boom\[ray\]"):
        connection.import_ray()


@needs_ray
@pytest.mark.parametrize(("address", "message"), [("127.0.0.1:9", "no Ray cluster at"), ("nonsense", "host:port")])
def test_an_address_that_does_not_answer_is_named_within_seconds(address, message, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begin = time.monotonic()
    with pytest.raises((ConnectionError, ValueError), match=message):
        connection.connect(address)
    assert time.monotonic() - begin < connection.CONNECT_S + 5


@needs_ray
def test_nodes_that_lack_something_are_named(cluster, tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    assert connection.check_nodes(storage, ["Pendulum-v1"], 1, 0)
    with pytest.raises(ValueError, match="no node has the 99 CPUs"):
        connection.check_nodes(storage, [], 99, 0)
    versions = connection.versions()
    monkeypatch.setattr(connection, "versions", lambda: dict(versions, torch="1.0"))
    with pytest.raises(ValueError, match=r"1 of 1 nodes can't take runs: .* has torch .*, the driver 1.0.*Missing"):
        connection.check_nodes(storage, ["Missing-v0"], 1, 0)


def test_a_storage_that_a_node_does_not_see_is_named(tmp_path):
    (problem,) = connection.what_is_wrong_here(Storage(tmp_path), "absent", connection.versions(), ["Pendulum-v1"])
    assert str(tmp_path) in problem and "shared by all nodes" in problem


def test_a_storage_of_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="nowhere"):
        Storage("nowhere://bucket")


# ------------------------------------------------------------------------- storage


def test_only_what_has_changed_is_copied(tmp_path):
    here, storage = tmp_path / "here", Storage(f"file://{tmp_path}/there")
    (here / "checkpoints/checkpoint-000001").mkdir(parents=True)
    for name in ("rows.csv", "checkpoints/lock", "checkpoints/checkpoint-000001/manifest.json"):
        (here / name).write_text(name)
    mirror = Mirror(storage, "run", here)
    mirror.push()
    assert storage.names("run") == ["checkpoints/checkpoint-000001/manifest.json", "rows.csv"]
    copied = mirror.n_bytes
    (here / "rows.csv").write_text("more rows")
    (here / "checkpoints/checkpoint-000001/manifest.json").unlink()
    mirror.push()
    assert mirror.n_bytes - copied == len("more rows")
    assert storage.names("run") == ["rows.csv"] and storage.read("run/rows.csv") == b"more rows"
    elsewhere = tmp_path / "elsewhere"
    other = Mirror(storage, "run", elsewhere)
    other.fetch()
    assert (elsewhere / "rows.csv").read_text() == "more rows"
    other.push()
    assert other.n_bytes == 0


class Away(Exception):
    """As of a protocol's package, no OSError."""


@pytest.fixture
def bucket(monkeypatch):
    """A storage by URL, and how many of its next calls fail."""
    storage, failures = Storage(f"memory://{time.monotonic_ns()}", patience=5.0), []
    monkeypatch.setattr("sb3_boom.cluster.storage.RETRY_S", 0.01)

    def call(method, *args):
        if failures:
            raise failures.pop()
        return method(*args)

    for name in ("cat_file", "pipe_file", "rm_file", "find", "put_file", "get_file"):
        monkeypatch.setattr(storage.fs, name, functools.partial(call, getattr(storage.fs, name)))
    return storage, failures


def test_a_storage_that_is_away_for_a_moment_is_waited_for(bucket, tmp_path):
    storage, failures = bucket
    (tmp_path / "here").mkdir()
    (tmp_path / "here/rows.csv").write_text("rows")
    calls = (
        lambda: Mirror(storage, "run", tmp_path / "here").push(),
        lambda: Mirror(storage, "run", tmp_path / "there").fetch(),
        lambda: storage.write("run/file", b"more"),
        lambda: storage.remove("run/file"),
        lambda: storage.names("run"),
    )
    for call in calls:
        failures += [Away("no answer")] * 2
        call()
        assert not failures
    assert (tmp_path / "there/rows.csv").read_text() == "rows" and storage.names("run") == ["rows.csv"]
    storage.patience = 0.0
    failures.append(Away("no answer"))
    with pytest.raises(OSError, match=r"memory://.*: Away: no answer"):
        storage.names("run")


def test_a_claim_outlives_a_storage_that_is_away(bucket, monkeypatch):
    storage, failures = bucket
    storage.patience = 0.0
    monkeypatch.setattr("sb3_boom.cluster.storage.SETTLE_S", 0.0)
    claim = Claim(storage, "run", "a", lease_s=0.1)
    assert claim.take()
    failures += [Away("no answer")] * 3
    deadline = time.monotonic() + 10.0
    while failures and time.monotonic() < deadline:
        time.sleep(0.01)
    seen = storage.read("run/claim.json")
    while storage.read("run/claim.json") == seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert storage.read("run/claim.json") != seen  # it goes on to renew it
    claim.release()


def test_a_claim_is_not_written_late(bucket):
    storage, failures = bucket
    failures.append(Away("no answer"))  # the storage is patient, a claim is not: another's may be there by then
    with pytest.raises(OSError, match="no answer"):
        Claim(storage, "run", "a")._write(0)


def test_what_a_killed_run_leaves_on_a_node_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "LEFT_S", -1.0)
    for name in ("dead", "alive"):
        (tmp_path / f"{task.ON_A_NODE}{name}").mkdir()
        (tmp_path / f"{task.ON_A_NODE}{name}/lock").touch()
    with FolderLock(tmp_path / f"{task.ON_A_NODE}alive"):
        task._remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{task.ON_A_NODE}alive"]


def test_one_process_has_a_run_until_it_lets_go_or_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_boom.cluster.storage.SETTLE_S", 0.0)
    storage = Storage(tmp_path)
    first, second, third = (Claim(storage, "run", driver, lease_s=0.2) for driver in ("a", "b", "b"))
    assert first.take() and not second.take()
    seen = storage.read("run/claim.json")
    time.sleep(0.3)
    assert storage.read("run/claim.json") != seen  # it is alive
    first._stop.set()  # dead
    first._thread.join()
    assert not second.take(seen)  # unchanged since then, it is not
    assert second.take(storage.read("run/claim.json"))
    with pytest.raises(Exception, match="another process has taken run"):
        first.check()
    assert third.take()  # an attempt of the same driver: Ray knows that the one before is dead
    third.release()
    assert storage.read("run/claim.json") is None


def test_the_table_counts_what_runs_and_how_long_it_will():
    runs = [("Pendulum-v1", "forward_kl", seed) for seed in range(4)]
    table = Table(runs, steps=100, n_done=2)
    table.summary({runs[0]: dict(steps=50, began=50)}, 0, 0.0)
    table.done.add(runs[1])
    line = table.summary({runs[0]: dict(steps=70, began=50), runs[1]: dict(steps=100, began=0)}, 1, 60.0)
    assert line == "running 1 | done 3 | failed 0 | waiting 1 | of other drivers 1 | 2.0 steps/s | 2 min left"


# --------------------------------------------------------------------------- grids


@needs_ray
def test_runs_share_a_gpu_and_see_no_other(cluster, tmp_path, monkeypatch):
    def instead_of_training(work, run, board, unchanged=None):
        begin = time.time()
        time.sleep(1.0)
        text = json.dumps([begin, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")])
        (pathlib.Path(work.storage.root) / f"seed-{run[2]}").write_text(text)
        return task.Result(task.DONE)

    monkeypatch.setattr(grid, "train_run", instead_of_training)
    arguments = [("Pendulum-v1", "forward_kl")], range(4), 20, tmp_path / "r.csv", tmp_path
    hyperparams = ROOT / "zoo_hyperparams/boom-cpu.yml"
    assert run_grid(*arguments, hyperparams, num_cpus=0.1, num_gpus=0.5) == 0  # by its CPUs, ten would fit
    spans = [json.loads(path.read_text()) for path in tmp_path.glob("seed-*")]
    assert len(spans) == 4 and {devices for _, _, devices in spans} == {"0"}
    at_once = [sum(begin <= moment < end for begin, end, _ in spans) for moment, _, _ in spans]
    assert max(at_once) == 2


OUT_OF_MEMORY = """
import os, pathlib, time
os.environ.update(RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100")  # whatever runs is too much
from sb3_boom.cluster import grid

def instead_of_training():
    time.sleep(60)

def work(self, ray, remote, *_):  # without the board, which would be killed first, and always
    print(*self._result(ray, remote.remote()))
    return 1

grid.train_run, grid.check_nodes, grid.Driver.work = instead_of_training, lambda *_: "marker", work
place, hyperparams = pathlib.Path("PLACE"), pathlib.Path("zoo_hyperparams/boom-cpu.yml")
grid.run_grid([("Pendulum-v1", "forward_kl")], [0], 20, place / "r.csv", place, hyperparams, max_retries=1)
"""


@needs_ray
def test_a_run_that_is_always_out_of_memory_is_given_up(tmp_path):
    script = OUT_OF_MEMORY.replace("PLACE", str(tmp_path))
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert "failed OutOfMemoryError" in process.stdout, process.stderr


@needs_ray
def test_a_node_that_has_a_folder_of_its_own_is_named(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    small = dict(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
    token = pathlib.Path.home() / ".ray/auth_token"  # there is one if a cluster was started before
    for home in ("one", "two"):
        (tmp_path / home / ".ray").mkdir(parents=True)
        if token.exists():
            shutil.copy(token, tmp_path / home / ".ray")
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        monkeypatch.setenv("HOME", str(tmp_path / "two"))
        other = cluster.add_node(**small)
        monkeypatch.setenv("HOME", str(tmp_path / "one"))
        command = [sys.executable, "-m", "sb3_boom", "benchmark", "run", "--cpu", "--tasks", "Pendulum-v1", "--steps", "20"]
        command += ["--ray", cluster.address, "--storage", "file://~/runs", "--csv", str(tmp_path / "r.csv")]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        cluster.shutdown()
    assert process.returncode and "1 of 2 nodes can't take runs" in process.stderr, process.stderr
    assert f"{other.node_id[:8]}): it does not see file://~/runs as the driver does" in process.stderr


@needs_ray
def test_a_grid_loses_nothing_when_a_node_is_killed(tmp_path):
    out = tmp_path / "counts.json"
    command = [sys.executable, "scripts/cluster_faults.py", "--faults", "node", "--runs", "2", "--steps", "100"]
    process = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    counts = json.loads(out.read_text())["node"]
    assert counts["rows"] == 10 and counts["rows_lost"] == counts["rows_twice"] == 0
    assert counts["attempts"] >= 3 and counts["went_on_from"]
    assert counts["trained_twice_from_the_start"] == counts["drivers_that_failed"] == 0
