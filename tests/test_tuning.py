"""Studies that several processes share."""

import os
import subprocess
import sys
import time

import optuna
import pytest

from sb3_boom import tuning

QUICK = ["learning_starts:30", "pretrain_steps:2", "n_envs:1", "batch_size:16"]


def optimize(folder, steps: int, trials: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "sb3_boom", "--traceback", "optimize", "--env", "Pendulum-v1", "--cpu", "-n", str(steps)]
    command += ["--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots", "--sampler", "random", "--pruner", "none"]
    command += ["--storage", "sqlite:///study.db", "--study-name", "s", "--n-trials", str(trials), "--heartbeat", "1"]
    with (folder / f"{trials}.txt").open("w") as log:
        environment = dict(os.environ, TORCHDYNAMO_DISABLE="1")
        return subprocess.Popen([*command, "-params", *QUICK], cwd=folder, env=environment, stdout=log, stderr=log)


def trials_in(folder) -> list[optuna.trial.FrozenTrial]:
    try:
        return optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/study.db").trials
    except Exception:  # the database is being made
        return []


def test_a_trial_whose_process_is_killed_is_tried_again_by_another(tmp_path):
    killed = optimize(tmp_path, steps=1_000_000, trials=1)
    deadline = time.monotonic() + 120
    while not any(trial.params for trial in trials_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)  # for the first sign of life
    other = optimize(tmp_path, steps=40, trials=2)
    killed.kill()
    killed.wait()
    assert other.wait(200) == 0, (tmp_path / "2.txt").read_text()
    first, *others = trials_in(tmp_path)
    assert [trial.state.name for trial in (first, *others)] == ["FAIL", "COMPLETE", "COMPLETE"]
    # the other process may have begun a trial of its own before the first was given up
    again, new = sorted(others, key=lambda trial: "failed_trial" not in trial.system_attrs)
    assert again.system_attrs["failed_trial"] == first.number
    assert again.params == first.params and new.params != first.params


def test_a_database_gives_signs_of_life_and_a_journal_stays_one(tmp_path):
    with tuning.studies_survive(heartbeat_s=7, grace_s=21):
        study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
        journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
        assert optuna.create_study(storage=journal)._storage is journal
    assert study._storage._backend.heartbeat_interval == 7 and study._storage._backend.grace_period == 21
    assert optuna.create_study()._storage is not None  # as before


def test_a_heartbeat_of_nothing_is_refused(monkeypatch, capsys):
    from sb3_boom import cli

    monkeypatch.setattr(sys, "argv", ["sb3-boom", "optimize", "--cpu", "--env", "Pendulum-v1", "--heartbeat", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--heartbeat must be at least 1 second" in capsys.readouterr().err
