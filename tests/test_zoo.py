"""The sb3-boom command, rl_zoo3's for BOOM, and the hyperparameter files."""

import argparse
import copy
import json
import pathlib
import sys

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
import yaml
from conftest import TINY
from rl_zoo3.utils import ALGOS, get_wrapper_class
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

from sb3_boom import BOOM, cli, video, zoo
from sb3_boom.benchmark import step
from sb3_boom.core.compilation import eager

ENTRIES = [(path, env_id) for path in map(zoo.hyperparams_file, (False, True)) for env_id in zoo.read_hyperparams(path)]
PAPER = [
    f"dm_control/{task}-v0" for task in "dog-run dog-stand dog-trot dog-walk humanoid-run humanoid-stand humanoid-walk".split()
]
PAPER += [f"h1hand-{task}-v0" for task in "stand walk run sit_simple slide pole hurdle".split()]
QUICK = "-params learning_starts:30 pretrain_steps:2 n_envs:1 batch_size:16".split()

zoo.register()


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """:return: function that runs the command in an empty folder and returns exit status, output and errors"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)  # the command changes it
    monkeypatch.setattr("sb3_boom.policies.choose_compiler", lambda setting, device: eager)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sb3-boom", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run_command


@pytest.mark.parametrize(("path", "env_id"), ENTRIES, ids=[f"{path.stem}-{env_id}" for path, env_id in ENTRIES])
def test_entry_makes_a_model_that_trains(path, env_id):
    if zoo.missing_package(env_id):
        pytest.skip(zoo.missing_package(env_id))
    entry = yaml.safe_load(path.read_text())[env_id]
    assert int(entry["n_timesteps"]) >= 1000
    env = zoo.make_env(env_id, entry, 0, entry.get("n_envs", 1))
    entry = zoo.settings_of_the_model(entry, env.action_space.shape[0])
    small = dict(entry, learning_starts=8, pretrain_steps=1, batch_size=8, seed=0, buffer_size=1000)
    small["policy_kwargs"] = dict(entry.get("policy_kwargs", {}), model_size="tiny", compile=False)
    small["planner_kwargs"] = dict(entry.get("planner_kwargs", {}), **TINY["planner_kwargs"])
    model = BOOM(env=env, **small).learn(12)
    assert model._n_updates > 1
    expected = 500 if env_id.startswith("dm_control/") else None
    if expected:
        assert model.gamma == pytest.approx(0.99)  # which follows from the 500 steps
    env.close()


def test_settings_of_rl_zoo3_alone_are_named():
    with pytest.raises(ValueError, match=r"callback: no argument of BOOM.*sb3-boom train"):
        zoo.settings_of_the_model(dict(n_envs=2, tau=0.1, normalize=True, callback="sb3_boom.callbacks"), 1)


def test_noise_of_an_entry_is_put_on_every_dimension():
    assert zoo.settings_of_the_model(dict(tau=0.1), 3) == dict(tau=0.1)
    noise = zoo.settings_of_the_model(dict(noise_type="ornstein-uhlenbeck", noise_std=0.5), 3)["action_noise"]
    assert isinstance(noise, OrnsteinUhlenbeckActionNoise)
    np.random.seed(0)
    steps = np.stack([noise() for _ in range(1000)])
    assert steps.shape == (1000, 3)
    np.testing.assert_allclose(np.diff(steps, axis=0).std(axis=0), 0.5 * noise._dt**0.5, rtol=0.1)
    assert isinstance(zoo.settings_of_the_model(dict(noise_type="normal", noise_std=1), 1)["action_noise"], NormalActionNoise)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dict(noise_type="pink", noise_std=0.1), "noise_type must be normal or ornstein-uhlenbeck, not 'pink'"),
        (dict(noise_std=0.1), "noise_type must be normal or ornstein-uhlenbeck, not None"),
        (dict(noise_type="normal"), "needs a noise_std that is a number of 0 or more, not None"),
        (dict(noise_type="normal", noise_std=-1.0), "needs a noise_std that is a number of 0 or more, not -1.0"),
        (dict(noise_type="normal", noise_std=float("nan")), "needs a noise_std that is a number of 0 or more, not nan"),
        (dict(noise_type=["normal"], noise_std=0.1), "noise_type must be normal or ornstein-uhlenbeck, not .'normal'."),
    ],
)
def test_noise_that_can_not_be_made_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        zoo.settings_of_the_model(noise, 1)


def test_observations_are_normalized_as_the_entry_says_and_evaluations_leave_statistics_and_rewards_alone():
    assert zoo.make_env("Pendulum-v1", dict(normalize=False), 0).reset().std() > 0
    assert zoo.make_env("Pendulum-v1", dict(normalize=True, gamma=0.9), 0).gamma == 0.9
    entry = dict(normalize=dict(norm_obs=False), frame_stack=2)
    for evaluates in (False, True):
        env = zoo.make_env("Pendulum-v1", entry, 0, evaluates=evaluates).venv
        assert (env.norm_obs, env.norm_reward, env.training) == (False, not evaluates, not evaluates)
    with pytest.raises(ValueError, match=r"normalize must be true, false or a mapping .*, not 'dict\(\)'"):
        zoo.make_env("Pendulum-v1", dict(normalize="dict()"), 0)


def test_both_files_have_the_same_environments_and_all_of_the_paper():
    paper, cpu = (zoo.read_hyperparams(zoo.hyperparams_file(cpu)) for cpu in (False, True))
    assert set(paper) == set(cpu) and set(PAPER) <= set(paper)
    for env_id in PAPER:
        assert paper[env_id]["n_timesteps"] == 2e6 and paper[env_id]["policy_kwargs"]["model_size"] == "5M"
        assert paper[env_id].get("handle_terminations", True) == (not env_id.startswith("h1hand"))


def test_settings_written_out_are_those_that_follow_by_themselves():
    """Of the tasks that are installed: what the entry says is what "auto" would say."""
    paper = zoo.read_hyperparams(zoo.hyperparams_file())
    for env_id in ("dm_control/dog-run-v0", "dm_control/humanoid-run-v0"):
        entry = copy.deepcopy(paper[env_id])
        env = make_vec_env(env_id, wrapper_class=get_wrapper_class(entry))
        small = dict(model_size="tiny", compile=False)
        model = BOOM("MlpPolicy", env, preset="paper", policy_kwargs=small, buffer_size=10)
        for name in ("gamma", "learning_starts", "pretrain_steps", "align_coef"):
            assert getattr(model, name) == pytest.approx(entry[name]), name
        assert model.policy.planner_config.n_iterations == entry["planner_kwargs"]["n_iterations"]
        assert model.policy._constructor_kwargs["simnorm_dim"] == entry["policy_kwargs"]["simnorm_dim"]


def test_trains_enjoys_records_plots_and_continues(run, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    status, output, _ = run(
        "train", "--env", "Pendulum-v1", "--cpu", "-n", "60", "--seed", "1", "--eval-freq", "-1", "--save-replay-buffer",
        "-tb", "tb", *QUICK,
    )  # fmt: skip
    assert status == 0 and "boom-cpu.yml" in output
    folder = pathlib.Path("logs/boom/Pendulum-v1_1")
    assert (folder / "replay_buffer.pkl").exists() and list(pathlib.Path("tb").rglob("events*"))
    status, output, _ = run("enjoy", "--env", "Pendulum-v1", "--no-render", "-n", "200")
    assert status == 0 and "Mean reward" in output
    promises = []
    monkeypatch.setattr(video.PlanPanel, "planned", lambda self, plan: promises.append(float(plan.value[0])))
    status, output, _ = run("record", "--env", "Pendulum-v1", "-n", "3")
    assert status == 0 and list(folder.rglob("*.mp4")) and len(promises) == 3 and ALGOS["boom"] is BOOM
    status, output, _ = run(
        "train", "--env", "Pendulum-v1", "--cpu", "-n", "20", "--eval-freq", "-1", "-i", f"{folder}/Pendulum-v1.zip", *QUICK
    )
    assert status == 0 and "Loading replay buffer" in output
    assert BOOM.load("logs/boom/Pendulum-v1_2/Pendulum-v1.zip").num_timesteps == 20


def test_a_worker_that_dies_fails_the_command(run, monkeypatch):
    store = BOOM._store_transition

    def kill(self, *args):
        store(self, *args)
        if self.num_timesteps == 40:
            (process,) = self.env.unwrapped.processes[1:]
            process.kill()
            process.join()

    monkeypatch.setattr(BOOM, "_store_transition", kill)
    arguments = ["--env", "Pendulum-v1", "--cpu", "-n", "100", "--eval-freq", "-1", "--vec-env", "subproc", *QUICK, "n_envs:2"]
    status, _, errors = run("train", *arguments)
    assert status == 1 and "worker 1 of the SubprocVecEnv died" in errors


def test_plots_the_few_episodes_of_a_short_run(run, monkeypatch):
    folder = pathlib.Path("logs/boom/dm_control-cheetah-run-v0_1")
    folder.mkdir(parents=True)
    episodes = "".join(f"{i}.0,1000,{i}.5\n" for i in range(12))
    (folder / "0.monitor.csv").write_text('#{"t_start": 0.0, "env_id": "None"}\nr,l,t\n' + episodes)
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.extend(plt.gcf().axes[0].lines))
    status, _, _ = run("plot", "-e", "dm_control/cheetah-run-v0")
    plt.close("all")
    assert status == 0 and len(drawn) == 1


def optimize(run, *more: str) -> tuple[int, str, str]:
    return run(
        "optimize", "--env", "Pendulum-v1", "--cpu", "-n", "40", "--n-evaluations", "1", "--eval-episodes", "1",
        "--no-optim-plots", "--sampler", "random", "--pruner", "none", "--storage", "study.log", "--study-name", "s",
        *more, *QUICK,
    )  # fmt: skip


def load_study() -> optuna.Study:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    return optuna.load_study(study_name="s", storage=storage)


def test_optimizes_prunes_what_diverges_and_shares_a_journal(run, monkeypatch):
    train, calls = BOOM.train, []

    def diverging(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:  # in the first trial, after pretraining
            next(iter(self.policy.actor.parameters())).data.fill_(float("nan"))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(BOOM, "train", diverging)
    status, output, _ = optimize(run, "--n-trials", "2")
    assert status == 0, output
    states = [trial.state.name for trial in load_study().trials]
    assert states == ["PRUNED", "COMPLETE"]
    assert optimize(run, "--n-trials", "1")[0] == 0
    study = load_study()
    assert len(study.trials) == 3
    settings = zoo.convert_boom_params(study.best_trial.params)
    BOOM("MlpPolicy", "Pendulum-v1", buffer_size=10, **settings)


def test_lists_environments(run):
    here = "boom.yml" if th.cuda.is_available() else "boom-cpu.yml"
    for arguments, file in (((), here), (("--paper",), "boom.yml"), (("--cpu",), "boom-cpu.yml")):
        status, output, _ = run("list", *arguments)
        lines = output.splitlines()
        assert status == 0 and file in lines[0]
        assert len(lines) == 1 + len(zoo.read_hyperparams(zoo.hyperparams_file()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "unknown command"),
        (["train", "--env", "Pendulum-v9"], "Pendulum-v1"),
        (["train", "--env", "Pendulum-v1", "--frob", "1"], "unrecognized arguments: --frob"),
        (["train", "--env", "Pendulum-v1", "-params", "planer:1"], "planer"),
        (["train", "--env", "Pendulum-v1", "--conf-file", "no.yml"], "no.yml"),
        (["enjoy", "--env", "Pendulum-v1", "--cpu"], "takes no --cpu"),
        (["train", "--env", "Pendulum-v1", "--cpu", "--paper"], "choose one"),
        (["enjoy", "--env", "Pendulum-v1"], "not found"),
        (["list", "--frob"], "--frob"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, list) else None,
)
def test_user_errors_are_one_line(run, arguments, message):
    status, _, errors = run(*arguments)
    lines = [line for line in errors.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert status not in (0, None) and len(lines) == 1
    assert lines[0].startswith("sb3-boom: ") and message in lines[0]


@pytest.mark.skipif("h1hand-run-v0" in gym.registry, reason="installed")
def test_missing_environments_are_told_how_to_install(run):
    status, _, errors = run("train", "--env", "h1hand-run-v0")
    assert status == 1 and "docs/install.md" in errors


def test_a_missing_rl_zoo3_is_told_how_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "rl_zoo3.train", None)
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    status, _, errors = run("train", "--env", "Pendulum-v1")
    assert status == 1 and 'pip install "sb3_boom[zoo]"' in errors


def test_measures_what_a_step_costs(run, tmp_path):
    threads = th.get_num_threads()
    arguments = ["--calls", "2", "--n-envs", "1", "4", "--threads", str(threads), "--no-compile", "--json", "step.json"]
    status, output, _ = run("bench", *arguments)
    measured = json.loads((tmp_path / "step.json").read_text())
    assert status == 0 and "cores" in measured["machine"] and "plan_ratio" in output
    one, four = measured["rows"]
    # plans for four are four times the products; an update does not ask how many environments there are
    assert four["plan_gflop"] == pytest.approx(4 * one["plan_gflop"], rel=0.01)
    assert four["update_gflop"] == one["update_gflop"] > 0
    assert all(row[name] > 0 for row in (one, four) for name in row if name not in ("size", "what"))


def test_measures_what_a_step_of_other_algorithms_costs(monkeypatch):
    monkeypatch.setattr(step, "LOOP_STEPS", 1)
    row = step.measure_baseline("tiny", "SAC", 2, "cpu")
    assert (row["what"], row["n_envs"]) == ("SAC", 2) and row["env_steps_per_s"] > 0


def test_help_names_every_command(run):
    status, output, _ = run("--help")
    assert status == 0 and all(f"  {command} " in output for command in (*cli.BY_ENTRY, *cli.OTHERS))


def test_a_run_in_a_folder_of_its_own_goes_on_there(run):
    train = "train --env Pendulum-v1 --cpu --resume run --eval-freq 20 --eval-episodes 1 --save-freq 20".split()
    params = {**TINY, "n_envs": 1, "gradient_steps": 0, "env_kwargs": dict(max_episode_steps=10)}
    train += ["-params", *(f"{name}:{value!r}" for name, value in params.items() if name not in ("seed", "compile"))]
    status, output, _ = run(*train, "-n", "45")
    assert status == 0 and "run has no checkpoint: the run starts" in output
    first = pathlib.Path("run/0.monitor.csv").read_text()
    assert len(first.splitlines()) == 2 + 4
    status, output, _ = run(*train, "-n", "90")
    assert status == 0 and "run has a checkpoint: the run goes on" in output
    second = pathlib.Path("run/0.monitor.csv").read_text()
    assert second.startswith(first) and len(second.splitlines()) == 2 + 8  # one episode was cut at step 45
    evaluations = np.load("run/evaluations.npz")
    assert evaluations["timesteps"].tolist() == [20, 40, 60, 80]
    assert BOOM.resume("run", gym.make("Pendulum-v1")).num_timesteps == 90
    status, _, errors = run(*train, "tau:0.5", "-n", "90")
    assert status == 1 and "tau was" in errors and "is 0.5" in errors
