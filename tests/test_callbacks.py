"""Callbacks, loggers and the options of learn(); as SB3's own test_callbacks, test_logger and test_run."""

import csv
import json
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from stable_baselines3.her import HerReplayBuffer

from sb3_boom import BOOM
from sb3_boom.callbacks import PlannerPriorEvalCallback

PENDULUM = "Pendulum-v1"


def short_pendulum() -> gym.Env:
    return gym.make(PENDULUM, max_episode_steps=10)


def make_model(env=None, **kwargs) -> BOOM:
    return BOOM("MlpPolicy", env or short_pendulum(), **{**TINY, **kwargs})


def test_evaluation_uses_the_training_environments_normalisation():
    env = VecNormalize(make_vec_env(PENDULUM))
    eval_env = VecNormalize(make_vec_env(PENDULUM), training=False, norm_reward=False)
    callback = PlannerPriorEvalCallback(eval_env, n_eval_episodes=1, eval_freq=30)
    make_model(env).learn(30, callback=callback)
    assert env.obs_rms.count > 30 and eval_env.obs_rms.count == env.obs_rms.count
    assert np.array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)


@pytest.mark.parametrize("step", [7, 10, 27, 30])
def test_after_a_callbacks_stop_the_same_episode_goes_on(step):
    """SB3 stops before it stores the step, of which its own algorithms then join the two sides."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps != step  # an episode's last one where it is a multiple of 10

    env = Monitor(short_pendulum(), allow_early_resets=False)
    model = make_model(env)
    model.learn(60, callback=Stop())
    assert model.num_timesteps == model.replay_buffer.size() == step
    model.learn(25, reset_num_timesteps=False)
    assert env.get_episode_lengths() == [10] * ((step + 25) // 10)
    stored = model.replay_buffer
    ends = (stored._storage["final_slot"][: stored.size() - 1] >= 1).nonzero()[:, 0].tolist()
    assert ends == [i for i in range(stored.size() - 1) if i % 10 == 9]


class Counter(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def _on_training_start(self) -> None:
        self.count("training_start")

    def _on_rollout_start(self) -> None:
        self.count("rollout_start")

    def _on_step(self) -> bool:
        self.count("step")
        return True

    def _on_rollout_end(self) -> None:
        self.count("rollout_end")

    def _on_training_end(self) -> None:
        self.count("training_end")


def test_callbacks_are_called_as_in_sb3():
    counter, steps = Counter(), []
    make_model().learn(30, callback=counter)
    assert counter.calls == dict(training_start=1, rollout_start=30, step=30, rollout_end=30, training_end=1)
    make_model().learn(30, callback=lambda local, _: steps.append(local["self"].num_timesteps) is None)
    assert steps == list(range(1, 31))


def test_callbacks_evaluate_and_save(tmp_path):
    model = make_model()
    callbacks = [
        EvalCallback(
            short_pendulum(), n_eval_episodes=2, eval_freq=20, log_path=str(tmp_path), best_model_save_path=str(tmp_path)
        ),
        CheckpointCallback(20, str(tmp_path), name_prefix="boom", save_replay_buffer=True, save_vecnormalize=True),
        EveryNTimesteps(10, Counter()),
        LogEveryNTimesteps(10),
    ]
    model.learn(45, callback=callbacks)
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 2
    for name in ("best_model.zip", "boom_20_steps.zip", "boom_40_steps.zip"):
        BOOM.load(tmp_path / name)
    loaded = BOOM.load(tmp_path / "boom_40_steps", env=short_pendulum())
    loaded.load_replay_buffer(tmp_path / "boom_replay_buffer_40_steps")
    assert loaded.replay_buffer.size() == 39  # SB3 calls callbacks before it stores the step


@pytest.mark.parametrize("what", ["function", "episodes", "reward", "no improvement"])
def test_callbacks_stop_learning(what):
    def evaluate(**kwargs) -> EvalCallback:
        return EvalCallback(short_pendulum(), n_eval_episodes=1, eval_freq=10, verbose=0, **kwargs)

    callback = {
        "function": lambda local, _: local["self"].num_timesteps < 30,
        "episodes": StopTrainingOnMaxEpisodes(3),
        "reward": evaluate(callback_on_new_best=StopTrainingOnRewardThreshold(-1e9)),
        "no improvement": evaluate(callback_after_eval=StopTrainingOnNoModelImprovement(0, min_evals=0)),
    }[what]
    model = make_model().learn(1_000, callback=callback)
    assert model.num_timesteps < 300
    stopped = model.num_timesteps
    model.learn(25, reset_num_timesteps=False)  # and goes on where it stopped
    assert model.num_timesteps == stopped + 25


def test_learn_takes_floats_and_counts_on_or_anew():
    model = make_model().learn(3e1)
    assert model.num_timesteps == 30
    updates = model._n_updates
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (40, updates + 10)
    model.learn(10)
    assert (model.num_timesteps, model._n_updates) == (10, updates + 20)  # no second warm-up, no second pretraining


def test_progress_bar():
    make_model().learn(25, progress_bar=True)


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        (dict(train_freq=4), 11),
        (dict(train_freq=(5, "step"), gradient_steps=-1), 45),
        (dict(train_freq=(1, "episode"), gradient_steps=-1), 50),
        (dict(train_freq=(2, "episode"), gradient_steps=3), 9),
        (dict(gradient_steps=2), 82),
        (dict(gradient_steps=0), 0),
    ],
)
def test_updates_follow_train_freq_and_gradient_steps(options, updates):
    """60 steps in episodes of 10; updates follow every round from the end of warm-up on, which is step 20."""
    model = make_model(pretrain_steps=0, **options).learn(60)
    assert model._n_updates == updates


def test_environment_steps_of_all_environments_count():
    model = make_model(make_vec_env(short_pendulum, n_envs=4), pretrain_steps=0, gradient_steps=-1).learn(80)
    assert model.num_timesteps == 80 and model._n_updates == 64  # after 20 of warm-up, 4 for every round


@pytest.mark.parametrize("noise", ["normal", "correlated", "vectorised"])
def test_action_noise_is_added_to_the_plan(noise):
    action_noise = {
        "normal": NormalActionNoise(np.zeros(1), 10 * np.ones(1)),
        "correlated": OrnsteinUhlenbeckActionNoise(np.zeros(1), 100 * np.ones(1)),
        "vectorised": VectorizedActionNoise(NormalActionNoise(np.zeros(1), 10 * np.ones(1)), 2),
    }[noise]
    env = make_vec_env(short_pendulum, n_envs=2)
    model = make_model(env, action_noise=action_noise).learn(60)
    stored = model.replay_buffer._storage["steps"][15:30, :, 0]
    assert (stored.abs() == 1.0).float().mean() > 0.6  # clipped, so large was the noise


def test_losses_are_written_to_every_format(tmp_path):
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))
    model.learn(60, log_interval=1)
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    with open(tmp_path / "progress.json") as file:
        assert len([json.loads(line) for line in file]) == len(rows)
    for name in ("rollout/ep_rew_mean", "train/model_loss", "train/actor_loss", "train/learning_rate", "time/plan_ms"):
        assert np.isfinite(float(rows[-1][name])), name


def test_tensorboard_runs_are_named(tmp_path):
    pytest.importorskip("tensorboard")
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(25)
    model.learn(5, reset_num_timesteps=False)
    model.learn(5, tb_log_name="other")
    assert sorted(os.listdir(tmp_path)) == ["BOOM_1", "other_1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(replay_buffer_class=HerReplayBuffer), "WeightedReplayBuffer"),
        (dict(optimize_memory_usage=True), "stores every observation once"),
    ],
)
def test_what_boom_does_not_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_death_of_a_worker_is_named_and_the_model_can_be_saved(tmp_path):
    env = make_vec_env(short_pendulum, n_envs=3, vec_env_cls=SubprocVecEnv)
    model = make_model(env)

    def kill(local, _):
        if local["self"].num_timesteps == 60:
            os.kill(env.processes[1].pid, signal.SIGKILL)
            env.processes[1].join()
        return True

    with pytest.raises(RuntimeError, match=r"worker 1 .*died"):
        model.learn(300, callback=kill)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    assert BOOM.load(tmp_path / "model").num_timesteps >= 60
    env.close()  # waits for nobody
    for process in env.processes:
        process.join(timeout=10)
        assert not process.is_alive()
