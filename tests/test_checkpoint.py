"""Runs that survive: what is resumed is what was interrupted, whatever it was interrupted by."""

import csv
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_boom import BOOM, checkpoint, manifests
from sb3_boom.callbacks import ResumableCheckpointCallback

TESTS = pathlib.Path(__file__).parent


def pendulum(steps: int = 10) -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=steps)


def make_model(env=None, **settings) -> BOOM:
    return BOOM("MlpPolicy", env or pendulum(), **{**TINY, **settings})


def train(folder, steps: int = 40, env=None, learn=None, settings=None, **callback) -> BOOM:
    """A run that has checkpoints in a folder, every 10 steps."""
    callback = ResumableCheckpointCallback(folder, **{"save_freq": 10, **callback})
    return make_model(env, **(settings or {})).learn(steps, callback=callback, **(learn or {}))


def go_on(model: BOOM, until: int, *callbacks: BaseCallback) -> BOOM:
    return model.learn(until - model.num_timesteps, callback=list(callbacks), reset_num_timesteps=False)


def same(one: BOOM, other: BOOM) -> bool:
    """Whether networks, optimizers and what is drawn from the buffer are equal to the last bit."""
    for ours, theirs in zip(one.get_parameters().values(), other.get_parameters().values(), strict=True):
        ours, theirs = (p.get("state", p) for p in (ours, theirs))
        flat = [[x for v in p.values() for x in (v.values() if isinstance(v, dict) else [v])] for p in (ours, theirs)]
        if not all(th.equal(a, b) for a, b in zip(*flat, strict=True)):
            return False
    batches = []
    for model in (one, other):
        th.manual_seed(0)
        batches.append(model.replay_buffer.sample(64))
    counters = [(m.num_timesteps, m._n_updates, m._episode_num, m.replay_buffer._n_added) for m in (one, other)]
    return all(th.equal(a, b) for a, b in zip(*batches, strict=True)) and counters[0] == counters[1]


def segment_bytes(folder: pathlib.Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (folder / "segments").iterdir()}


class Die(BaseCallback):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps == self.at:
            raise MemoryError
        return True


# ------------------------------------------------------------------ exactness

RUNS = {
    "plain": {},
    "full ring": dict(buffer_size=25),
    "by value": dict(replay_buffer_kwargs=dict(value_temperature=0.5)),
    "by episode": dict(replay_buffer_kwargs=dict(sampling="episode")),
    "rollouts of 4": dict(train_freq=4, gradient_steps=-1),
    "rollouts of episodes": dict(train_freq=(2, "episode"), gradient_steps=3),
    "noise": dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))),
    "in warm-up": dict(learning_starts=40),
    "three environments": dict(n_envs=3),
    "normalised": dict(n_envs=2, normalize=True),
}


def environment(settings: dict):
    n_envs, normalize = settings.get("n_envs", 1), settings.get("normalize", False)
    env = make_vec_env(pendulum, n_envs=n_envs, seed=0, env_kwargs=dict(steps=14))
    return VecNormalize(env) if normalize else env


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_a_run_that_is_resumed_goes_on_as_the_one_that_was_not_interrupted(settings, tmp_path):
    """Checkpoints lie in the midst of episodes and rollouts; both begin an episode there."""
    of_model = {name: value for name, value in settings.items() if name not in ("n_envs", "normalize")}
    env = environment(settings)
    whole = train(tmp_path, 90, env, settings=of_model, save_freq=31, fresh_episodes=True, keep=9)
    for later in sorted(tmp_path.glob("checkpoint-*"))[1:]:
        shutil.rmtree(later)
    resumed = BOOM.resume(tmp_path, environment(settings))
    assert 31 <= resumed.num_timesteps < 35
    go_on(resumed, 90, ResumableCheckpointCallback(tmp_path, save_freq=31, fresh_episodes=True))
    assert same(whole, resumed)
    if "normalize" in settings:
        assert np.array_equal(whole.env.obs_rms.mean, resumed.env.obs_rms.mean)


PROGRAM = """
import sys
from sb3_boom import BOOM  # in the order of conftest, which torch's products depend on
import gymnasium as gym, torch as th
sys.path.insert(0, {tests!r})
from test_checkpoint import ResumableCheckpointCallback, go_on, pendulum, train
{body}
"""


def run(body: str, cwd: pathlib.Path, **kwargs) -> subprocess.Popen:
    program = PROGRAM.format(tests=str(TESTS), body=body)
    return subprocess.Popen([sys.executable, "-c", program], cwd=cwd, text=True, **kwargs)


def test_500_steps_after_a_checkpoint_are_the_same_in_another_process(tmp_path):
    body = """
model = go_on(BOOM.resume("run", pendulum(30)), 560)
model.save("resumed")
model.save_replay_buffer("buffer")
"""
    model = train(tmp_path / "run", 60, pendulum(30), settings=dict(train_freq=4), fresh_episodes=True)
    assert run(body, tmp_path).wait(300) == 0
    go_on(model, 560)
    resumed = BOOM.load(tmp_path / "resumed")
    resumed.load_replay_buffer(tmp_path / "buffer")
    assert same(model, resumed)


def test_without_fresh_episodes_a_run_is_not_changed_by_its_checkpoints(tmp_path):
    plain = make_model().learn(60)
    assert same(plain, train(tmp_path, 60))


def test_an_environment_that_begins_the_same_episode_at_the_checkpoint_needs_no_help(tmp_path):
    class Same(gym.Wrapper):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=7, options=options)

    whole = go_on(train(tmp_path, 40, Same(pendulum())), 80)  # the checkpoint is at the end of an episode
    assert same(whole, go_on(BOOM.resume(tmp_path, Same(pendulum())), 80))


def test_pretraining_that_was_interrupted_goes_on(tmp_path):
    settings = dict(pretrain_steps=300)
    whole = make_model(**settings)
    callback = ResumableCheckpointCallback(tmp_path, fresh_episodes=True)

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_pretraining(self) -> bool:
            if self.model.pretrain_updates == 200:
                os.kill(os.getpid(), signal.SIGTERM)
            return True

    with pytest.raises(SystemExit):
        whole.learn(40, callback=[Stop(), callback])
    resumed = BOOM.resume(tmp_path, pendulum())
    assert resumed.pretrain_updates == 200
    go_on(resumed, 30)
    assert resumed._n_updates == 300 + 1 + 10 and resumed.num_timesteps == 30


# ----------------------------------------------------------------------- cost


def test_a_checkpoint_writes_the_new_rows_alone(tmp_path):
    model = train(tmp_path, 20)
    before = segment_bytes(tmp_path)
    go_on(model, 30, ResumableCheckpointCallback(tmp_path, save_freq=10))
    after = segment_bytes(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + 1
    rows = [np.load(path)["steps"] for path in sorted((tmp_path / "segments").iterdir())]
    assert [len(row) for row in rows] == [10, 10, 10]


def test_only_the_last_checkpoints_are_kept_with_what_they_need(tmp_path):
    model = train(tmp_path, 100, settings=dict(buffer_size=25), keep=3)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [f"checkpoint-{i:06d}" for i in (8, 9, 10)]
    first_needed = 80 - 25
    assert min(int(name.split("-")[1]) for name in segment_bytes(tmp_path)) > first_needed
    assert len(segment_bytes(tmp_path)) == 5
    resumed = BOOM.resume(tmp_path, pendulum())
    assert resumed.replay_buffer.size() == 25 and resumed.replay_buffer._n_added == 100 == model.num_timesteps


# ---------------------------------------------------------------- other state


def test_meters_and_what_waits_to_be_logged_come_back(tmp_path):
    model = make_model()
    model.set_logger(configure(str(tmp_path / "logs"), ["csv"]))
    model.learn(35, callback=ResumableCheckpointCallback(tmp_path, save_freq=10), log_interval=100)
    resumed = BOOM.resume(tmp_path, pendulum())
    assert resumed.meters.state() == model.meters.state()
    assert list(resumed.ep_info_buffer) == list(model.ep_info_buffer)
    resumed.set_logger(configure(str(tmp_path / "logs"), ["csv"]))
    seen = {}

    class Look(BaseCallback):
        def _on_training_start(self) -> None:
            seen.update(self.model.logger.name_to_count)

        def _on_step(self) -> bool:
            return True

    go_on(resumed, 36, ResumableCheckpointCallback(tmp_path, save_freq=10), Look())
    assert seen["train/model_loss"] == model.logger.name_to_count["train/model_loss"] > 0


def monitored(path: pathlib.Path, appends: bool) -> gym.Env:
    return Monitor(pendulum(), str(path), override_existing=not appends)


@pytest.mark.parametrize("appends", [False, True])
def test_rows_of_monitor_and_logger_are_neither_lost_nor_doubled(appends, tmp_path):
    """A run goes on after its checkpoint at step 40, dies at step 65, and is resumed."""
    folder, path = tmp_path / "run", tmp_path / "0.monitor.csv"
    model = make_model(monitored(path, False))
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))

    with pytest.raises(MemoryError):
        model.learn(100, callback=[ResumableCheckpointCallback(folder, save_freq=40), Die(65)], log_interval=1)
    before = path.read_text().splitlines()
    assert len(before) == 2 + 6
    resumed = BOOM.resume(folder, monitored(path, appends))
    assert path.read_text().splitlines() == before[: 2 + 4]
    resumed.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))
    callback = ResumableCheckpointCallback(folder, save_freq=40)
    resumed.learn(60, callback=callback, reset_num_timesteps=False, log_interval=1)
    assert path.read_text().splitlines()[: 2 + 4] == before[: 2 + 4]
    assert len(path.read_text().splitlines()) == 2 + 10
    with open(tmp_path / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if not row["pretraining/update"]]
    steps = [int(row["time/total_timesteps"]) for row in rows]
    assert steps == list(range(10, 101, 10))
    with open(tmp_path / "progress.json") as file:
        rows = [row for row in map(json.loads, file) if "pretraining/update" not in row]
    assert [row["time/total_timesteps"] for row in rows] == steps


def test_files_of_other_processes_are_cut_too(tmp_path):
    log = tmp_path / "monitor.csv"
    log.write_text("one\n")
    train(tmp_path / "run", 10, files=[log])
    log.write_text("one\ntwo\n")
    resumed = BOOM.resume(tmp_path / "run", pendulum())
    go_on(resumed, 11, ResumableCheckpointCallback(tmp_path / "run", files=[log]))
    assert log.read_text() == "one\n"


# -------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(number, status, tmp_path):
    process = run("train('run', 1_000_000)", tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not checkpoint.is_there(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    last = errors.strip().splitlines()[-1]
    assert f"stopped by {number.name}" in last and 'Go on with BOOM.resume("run", env)' in last
    resumed = BOOM.resume(tmp_path / "run", pendulum())
    assert f"at step {resumed.num_timesteps}, which is saved" in last
    go_on(resumed, resumed.num_timesteps + 5)


def test_signals_are_handled_as_before_when_learning_is_over(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    model = train(tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(MemoryError):
        model.learn(10, callback=[ResumableCheckpointCallback(tmp_path), Die(1)])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ----------------------------------------------------------------------- kills


def test_a_run_that_is_killed_again_and_again_reaches_its_end(tmp_path):
    """At length in scripts/kills.py."""
    body = """
import pathlib
env = gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 10)
from sb3_boom import checkpoint
callback = ResumableCheckpointCallback("run", save_freq=5, fresh_episodes=True)
if checkpoint.is_there(pathlib.Path("run")):
    model = go_on(BOOM.resume("run", env), 3_000, callback)
else:
    train("run", 3_000, env, save_freq=5, fresh_episodes=True)
"""
    steps = []
    for _ in range(3):
        process = run(body, tmp_path, stderr=subprocess.DEVNULL)
        written = len(list(tmp_path.glob("run/checkpoint-*/manifest.json"))) and max(
            int(path.name[-6:]) for path in tmp_path.glob("run/checkpoint-*")
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / f"checkpoint-{written + 3:06d}").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        steps.append(BOOM.resume(tmp_path / "run", pendulum()).num_timesteps)
    assert steps == sorted(steps) and steps[0] >= 15 and steps[-1] >= 45


def test_what_a_killed_process_has_left_unfinished_is_removed(tmp_path):
    model = train(tmp_path, 20)
    for path in (".checkpoint-000003/.model.zip.1.tmp", ".checkpoint-000003/state.npz", "segments/.a.npz.1.tmp"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"half")
    go_on(model, 30, ResumableCheckpointCallback(tmp_path, save_freq=10))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


# ---------------------------------------------------------------------- damage


def newest(folder: pathlib.Path) -> pathlib.Path:
    return sorted(folder.glob("checkpoint-*"))[-1]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["model.zip", "state.npz", "logs.npz", "manifest.json", "segment"])
def test_damage_is_named_and_the_checkpoint_before_is_used(name, damage, tmp_path):
    train(tmp_path, 30)
    path = sorted((tmp_path / "segments").iterdir())[-1] if name == "segment" else newest(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-3])
    if name == "manifest.json" and damage == "missing":  # it is being removed
        resumed = BOOM.resume(tmp_path, pendulum())
    else:
        with pytest.warns(UserWarning, match=f"{path.name}.*checkpoint-000002 is used"):
            resumed = BOOM.resume(tmp_path, pendulum())
    assert resumed.num_timesteps == resumed.replay_buffer.size() == 20
    go_on(resumed, 30, ResumableCheckpointCallback(tmp_path, save_freq=10))
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] in (
        ["checkpoint-000002", "checkpoint-000004"],
        ["checkpoint-000002", "checkpoint-000003"],
    )
    assert BOOM.resume(tmp_path, pendulum()).num_timesteps == 30


def test_where_nothing_is_whole_nothing_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere has no complete checkpoint"):
        BOOM.resume(tmp_path / "nowhere", pendulum())
    assert not (tmp_path / "nowhere").exists()
    train(tmp_path, 10)
    path = newest(tmp_path) / "model.zip"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"model\.zip is damaged: it has"):
        BOOM.resume(tmp_path, pendulum())


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        for module in (checkpoint, manifests):
            later.setattr(module, "FORMAT", 2)
        train(tmp_path, 10)
    with pytest.raises(FileNotFoundError, match=r"has format 2.*upgrade"):
        BOOM.resume(tmp_path, pendulum())


def test_a_full_disk_is_a_warning_and_earlier_checkpoints_stay(tmp_path):
    """A limit on the size of files, by the system: writes really fail."""
    model = train(tmp_path, 20)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.warns(UserWarning, match="no checkpoint was written at step 30 .*Is the disk full"):
            go_on(model, 35, ResumableCheckpointCallback(tmp_path, save_freq=10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert model.num_timesteps == 35
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"} == before
    go_on(model, 40, ResumableCheckpointCallback(tmp_path, save_freq=10))
    assert BOOM.resume(tmp_path, pendulum()).replay_buffer.size() == 40


# -------------------------------------------------------------------- refusals


def test_a_second_process_is_refused(tmp_path):
    body = """
class Wait(ResumableCheckpointCallback):
    def _on_training_start(self):
        print("in", flush=True); sys.stdin.read()
from test_checkpoint import make_model
make_model().learn(10, callback=Wait("run"))
"""
    process = run(body, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(OSError, match=f"is in use by process {process.pid}"):
        train(tmp_path / "run")
    process.communicate("")
    assert process.returncode == 0
    BOOM.resume(tmp_path / "run", pendulum())


def test_another_runs_folder_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"does not come from: go on with BOOM\.resume"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        (lambda: make_vec_env(pendulum, n_envs=2), {}, "n_envs: .* with 1 environments, not 2"),
        (lambda: gym.make("MountainCarContinuous-v0"), {}, "spaces"),
        (lambda: VecNormalize(make_vec_env(pendulum)), {}, "VecNormalize was False, is True"),
        (pendulum, dict(batch_size=8), "batch_size was 16, is 8"),
        (pendulum, dict(planner_kwargs=dict(n_samples=8)), "planner_kwargs was .*n_samples"),
        (pendulum, dict(buffer_size=10), "buffer_size was 2000, is 10"),
    ],
)
def test_what_differs_from_the_checkpoint_is_refused_by_name(env, settings, message, tmp_path):
    train(tmp_path, 10)
    with pytest.raises(ValueError, match=message):
        BOOM.resume(tmp_path, env(), **settings)
    resumed = BOOM.resume(tmp_path, "Pendulum-v1", verbose=1, policy="MlpPolicy", **TINY)
    assert resumed.verbose == 1


@pytest.mark.parametrize("arguments", [dict(save_freq=0), dict(keep=0), dict(save_freq=0.5)])
def test_arguments_of_the_callback_are_checked(arguments, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ResumableCheckpointCallback(tmp_path, **arguments)


@pytest.mark.parametrize(("gradient_steps", "message"), [(0, "actor.* is NaN or infinite"), (1, "critic_loss is nan")])
def test_a_model_that_has_diverged_is_not_saved_over_one_that_has_not(gradient_steps, message, tmp_path):
    class Spoil(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 30:
                next(self.model.policy.actor.parameters()).data.fill_(np.nan)
            return True

    callbacks = [ResumableCheckpointCallback(tmp_path, save_freq=10), Spoil()]
    with pytest.raises(ValueError, match=message):
        make_model(gradient_steps=gradient_steps).learn(60, callback=callbacks)
    assert BOOM.resume(tmp_path, pendulum()).num_timesteps == 20


def test_ctrl_c_that_ends_the_workers_too_is_survived(tmp_path):
    """In a terminal it reaches every process: a step can't be finished then."""
    env = make_vec_env(pendulum, n_envs=2, vec_env_cls=SubprocVecEnv)
    model = make_model(env)

    class Interrupt(BaseCallback):
        def _on_training_start(self) -> None:
            self.model.between_steps.append(self.interrupt)

        def interrupt(self) -> None:
            if self.model.num_timesteps == 30:
                for process in env.processes:
                    os.kill(process.pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGINT)

        def _on_step(self) -> bool:
            return True

    callback = ResumableCheckpointCallback(tmp_path, save_freq=1000)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT at step 30, which is saved"):
        model.learn(100, callback=[callback, Interrupt()])
    assert BOOM.resume(tmp_path, make_vec_env(pendulum, n_envs=2)).replay_buffer.size() == 15


def test_no_warning_where_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, 30)
        go_on(BOOM.resume(tmp_path, pendulum()), 40, ResumableCheckpointCallback(tmp_path))
