"""Grids that go on where they were interrupted, CSVs that stay whole, and the report."""

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize, is_vecenv_wrapped

from sb3_boom import cli, zoo
from sb3_boom.benchmark import baselines, export, report, rows, runner
from sb3_boom.benchmark.rows import Row

ROW = Row("Pendulum-v1", "release", 0, 10, 10, -1200.5, -1300.25, 3.0, "abc", "python 3")
SMALL = dict(
    planner_kwargs=dict(n_samples=8, n_elites=2, n_policy_samples=1, n_iterations=1),
    policy_kwargs=dict(model_size="tiny", mlp_dim=16, enc_dim=16, latent_dim=8, n_critics=2, compile=False),
)
OTHERS = dict(learning_starts=20, pretrain_steps=2, n_envs=1, gradient_steps=1, batch_size=8)
QUICK = ["-params", *(f"{name}:{value!r}" for name, value in {**SMALL, **OTHERS}.items())]
RUN = ["benchmark", "run", "--cpu", "--tasks", "Pendulum-v1", "--eval-episodes", "1", "--csv", "results.csv"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)  # the command changes it


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sb3-boom", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def table() -> list[Row]:
    found, problems = rows.read(Path("results.csv"))
    assert not problems
    return found


# ---------------------------------------------------------------- the CSV


def test_rows_come_back_and_none_is_written_twice():
    path = Path("results.csv")
    rows.append(path, [ROW, ROW._replace(seed=1)])
    with pytest.warns(UserWarning, match="planner_return=0.0.* remove one"):
        rows.append(path, [ROW._replace(planner_return=0.0), ROW._replace(agent_steps=20)])
    assert table() == [ROW, ROW._replace(seed=1), ROW._replace(agent_steps=20)]
    assert path.read_text().splitlines()[0] == (
        "task,variant,seed,agent_steps,env_steps,planner_return,prior_return,wall_s,revision,versions"
    )


def test_several_writers_share_a_file():
    path = Path("results.csv")

    def write(seed: int) -> None:
        for step in range(10):
            rows.append(path, [ROW._replace(seed=seed, agent_steps=step)])

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(row.seed, row.agent_steps) for row in table()} == {(seed, step) for seed in range(4) for step in range(10)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Pendulum-v1,release,0", "agent_steps is missing"),
        ("Pendulum-v1,release,zero,10,10,1.0,1.0,1.0,abc,v", "seed is 'zero'"),
        ("Pendulum-v1,release,0,30,30,nan,1.0,1.0,abc,v", "planner_return is 'nan'"),
        ("Pendulum-v1,release,0,30,30,1.0,1.0,1.0,abc,v,more", "too many columns"),
    ],
)
def test_corrupt_rows_are_named_and_skipped(line, reason, monkeypatch, capsys):
    path = Path("results.csv")
    rows.append(path, [ROW])
    with path.open("a") as file:
        file.write(line)  # cut off, without its line's end
    rows.append(path, [ROW._replace(agent_steps=20)])
    found, problems = rows.read(path)
    assert found == [ROW, ROW._replace(agent_steps=20)]
    assert len(problems) == 1 and problems[0].startswith("results.csv:3: ") and reason in problems[0]
    assert command(monkeypatch, "benchmark", "report", "results.csv", "--out", "page.md") == 1
    assert "results.csv:3" in capsys.readouterr().err
    assert "-1200.5" in Path("page.md").read_text()


def test_a_full_disk_leaves_earlier_rows_intact(monkeypatch):
    path = Path("results.csv")
    rows.append(path, [ROW])
    before = path.read_bytes()
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:-10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        rows.append(path, [ROW._replace(agent_steps=20)])
    assert path.read_bytes() == before


def test_another_csv_is_refused(monkeypatch, capsys):
    Path("other.csv").write_text("a,b\n1,2\n")
    assert command(monkeypatch, "benchmark", "report", "other.csv") == 1
    assert "other.csv is no benchmark CSV" in capsys.readouterr().err


# ---------------------------------------------------------------- the grid


def test_grid_runs_once_and_takes_up_what_failed(monkeypatch, capsys):
    run = [*RUN, "--seeds", "0", "1", "--steps", "40", "--eval-freq", "20", "--jobs", "2", *QUICK]
    assert command(monkeypatch, *run) == 0
    first = table()
    assert sorted((row.seed, row.agent_steps, row.env_steps) for row in first) == [
        (0, 20, 20), (0, 40, 40), (1, 20, 20), (1, 40, 40),
    ]  # fmt: skip
    assert "2 runs, 0 of them done" in capsys.readouterr().out
    assert command(monkeypatch, *run) == 0
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    assert table() == first


def test_a_killed_run_goes_on_from_its_checkpoint_without_losing_or_doubling_rows(monkeypatch):
    one = ["benchmark", "one", "--cpu", "--task", "Pendulum-v1", "--eval-freq", "20", "--steps", "100"]
    one += ["--eval-episodes", "1", "--csv", "results.csv", *QUICK]
    process = subprocess.Popen([sys.executable, "-m", "sb3_boom", *one], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not rows.of_run(Path("results.csv"), ("Pendulum-v1", "forward_kl", 0)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = table()
    assert 1 <= len(before) < 5
    saved = []
    resume = runner.BOOM.resume
    monkeypatch.setattr(runner.BOOM, "resume", lambda *args, **kwargs: saved.append(resume(*args, **kwargs)) or saved[0])
    assert command(monkeypatch, *one) == 0
    assert len(saved) == 1 and saved[0].replay_buffer.size() == 100 and saved[0].num_timesteps == 100
    after = table()
    assert after[: len(before)] == before
    assert [row.agent_steps for row in after] == [20, 40, 60, 80, 100]
    assert np.all(np.diff([row.wall_s for row in after]) > 0)


def test_a_run_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    run = [*RUN, "--steps", "20", "--eval-freq", "20", "--seeds", "0", *QUICK, "horizon:0"]
    assert command(monkeypatch, *run) == 1
    output = capsys.readouterr()
    assert "FAILED" in output.out and "1 runs failed" in output.err
    assert command(monkeypatch, *run[:-1]) == 0
    assert len(table()) == 1


def test_a_folder_is_not_gone_on_with_under_other_settings(monkeypatch, capsys):
    run = [*RUN, "--seeds", "0", "--eval-freq", "20", *QUICK]
    assert command(monkeypatch, *run, "--steps", "20") == 0
    log = Path("logs/benchmark/Pendulum-v1_forward_kl_0/log.txt")
    for change, message in (
        (["--steps", "40"], "steps was 20, is 40"),
        (["--steps", "20", "--csv", "other.csv"], "other.csv"),
        (["--steps", "40", "-params", *QUICK[1:], "tau:0.5"], "tau was 0.05, is 0.5"),
    ):
        assert command(monkeypatch, *run, *change) == 1
        assert message in log.read_text().splitlines()[-1]
    assert len(table()) == 1 and not Path("other.csv").exists()


def test_a_run_that_is_killed_between_a_checkpoint_and_its_row_writes_the_row(monkeypatch):
    def train() -> None:
        runner.train_one("Pendulum-v1", "release", 0, 60, 20, Path("results.csv"), Path("run"), file, 1, overrides)

    file, overrides = zoo.hyperparams_file(True), {**SMALL, **OTHERS}
    append = rows.append

    def killed(path: Path, new: list[Row]) -> None:
        if new[0].agent_steps == 40:
            raise KeyboardInterrupt
        append(path, new)

    monkeypatch.setattr(rows, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.setattr(rows, "append", append)
    before = table()
    assert [row.agent_steps for row in before] == [20]
    train()
    assert [row.agent_steps for row in table()] == [20, 40, 60] and table()[:1] == before
    train()
    assert len(table()) == 3


def test_a_run_without_a_variant_has_the_name_of_its_alignment(monkeypatch):
    Path("own.yml").write_text("Pendulum-v1:\n  policy: MlpPolicy\n  alignment: forward_kl\n")
    run = [*RUN, "--seeds", "0", "--steps", "30", "--eval-freq", "30"]
    assert command(monkeypatch, *run, "--conf-file", "own.yml", *QUICK) == 0
    assert command(monkeypatch, *run, "--conf-file", "own.yml", "--variants", "release", *QUICK) == 0
    assert command(monkeypatch, *run, "--conf-file", "own.yml", *QUICK, "alignment:'none'") == 0
    assert [row.variant for row in table()] == ["forward_kl", "release", "none"]
    for variant in ("forward_kl", "release", "none"):
        folder = runner.run_folder(Path("logs/benchmark"), "Pendulum-v1", variant, 0)
        (path,) = runner.checkpoint_folder(folder).glob("checkpoint-*/model.zip")
        assert runner.BOOM.load(path).alignment == variant


def test_what_is_done_is_taken_only_for_the_same_settings(monkeypatch, capsys):
    run = [*RUN, "--seeds", "0", "--steps", "20", "--eval-freq", "20", *QUICK]
    assert command(monkeypatch, *run) == 0
    assert command(monkeypatch, *run, "tau:0.5") == 1
    assert "tau was 0.05, is 0.5" in capsys.readouterr().err
    shutil.rmtree("logs")
    assert command(monkeypatch, *run, "tau:0.5") == 0
    assert "is taken as results.csv has it" in capsys.readouterr().out
    rows_before = table()
    assert command(monkeypatch, *RUN, "--seeds", "0", "--steps", "40", "--eval-freq", "20", *QUICK) == 1
    assert "remove them, or take another --csv" in Path("logs/benchmark/Pendulum-v1_forward_kl_0/log.txt").read_text()
    assert table() == rows_before


@pytest.mark.parametrize("variant", runner.VARIANTS)
def test_variants_are_settings_of_the_model(variant, monkeypatch):
    made = []
    init = runner.BOOM.__init__
    noted = functools.wraps(init)(lambda self, **kwargs: made.append(kwargs) or init(self, **kwargs))
    monkeypatch.setattr(runner.BOOM, "__init__", noted)
    file, overrides = zoo.hyperparams_file(True), {**SMALL, **OTHERS}
    overrides["planner_kwargs"] = {**overrides["planner_kwargs"], "n_samples": 64}  # room for every variant
    runner.train_one("Pendulum-v1", variant, 0, 30, 30, Path("results.csv"), Path("run"), file, 1, overrides)
    assert [row.run for row in table()] == [("Pendulum-v1", variant, 0)]
    changed = dict(runner.VARIANTS[variant])
    assert is_vecenv_wrapped(made[0]["env"], VecNormalize) == ("normalize" in changed)
    changed.pop("normalize", None)
    for name, value in changed.items():
        value = value(1) if callable(value) else value
        assert made[0][name] == (overrides[name] | value if isinstance(value, dict) else value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--steps", "10"], "no task"),
        (["run", "--steps", "10", "--tasks", "Pendulum-v9"], "Pendulum"),
        (["run", "--steps", "10", "--suite", "none"], "invalid choice"),
        (["run", "--steps", "10", "--jobs", "0", "--suite", "dmc6"], "--jobs: must be at least 1"),
        (["report", "missing.csv"], "missing.csv"),
    ],
)
def test_user_errors_are_one_line(arguments, message, monkeypatch, capsys):
    assert command(monkeypatch, "benchmark", *arguments) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert len(lines) == 1 and message in lines[0]


# ---------------------------------------------------------------- the report


def test_report_stands_beside_published_results():
    task = "dm_control/cartpole-swingup-v0"
    for seed, value in enumerate((800.0, 850.0, 900.0)):
        for step in (10_000, 50_000):
            rows.append(Path("results.csv"), [ROW._replace(
                task=task, seed=seed, agent_steps=step, env_steps=2 * step, planner_return=value * step / 50_000
            )])  # fmt: skip
    rows.append(Path("results.csv"), [ROW._replace(task=task, seed=0, agent_steps=60_000, env_steps=120_000)])
    assert report.write([Path("results.csv")], Path("docs/page.md")) == []
    page = Path("docs/page.md").read_text()
    assert f"| {task} | release | 50,000 | 100,000 | 3 | 850.0 ± 50.0 |" in page  # the step that all seeds reached
    assert f"| {task} | release | 100,000 | 850 | 839 | 864 | 770 |" in page  # at the same env steps: TD-MPC2, its rerun, BMPC
    assert "| 50,000 | release | 1 | 3, all | 0.850 | 0.800 to 0.900 | 0.850 |" in page
    assert Path("docs/page-dm_control-cartpole-swingup-v0.png").stat().st_size > 10_000


def test_other_algorithms_stand_beside_ours_with_the_minutes_that_each_took():
    task = "dm_control/cartpole-swingup-v0"
    rows.append(Path("results.csv"), [ROW._replace(task=task, planner_return=800.0, prior_return=700.0, wall_s=600.0)])
    other = ROW._replace(task=task, variant="SAC", planner_return=300.0, prior_return=300.0, wall_s=150.0)
    rows.append(Path("results.csv"), [other, other._replace(seed=1, wall_s=210.0)])
    assert report.write([Path("results.csv")], Path("page.md")) == []
    page = Path("page.md").read_text()
    assert f"| {task} | release | 10 | 10 | 1 | 800.0 | 700.0 | 800 | 10 |" in page
    assert f"| {task} | SAC | 10 | 10 | 2 | 300.0 ± 0.0 |  | 300, 300 | 3 |" in page  # one policy, shown once


def test_variants_are_averaged_over_the_runs_that_they_share(tmp_path):
    task = "dm_control/cartpole-swingup-v0"
    for variant, seeds in (("release", (0, 1, 2)), ("none", (1, 2, 3))):
        for seed in seeds:
            row = ROW._replace(task=task, variant=variant, seed=seed, planner_return=100.0 * seed + 10.0 * len(variant))
            rows.append(Path("results.csv"), [row])
    rows.append(Path("results.csv"), [ROW._replace(task=task, variant="uniform", agent_steps=20)])
    rows.append(Path("results.csv"), [ROW._replace(task="dm_control/finger-spin-v0", planner_return=999.0)])
    assert report.write([Path("results.csv")], Path("page.md")) == []
    page = Path("page.md").read_text()
    for line in (
        "| 10 | release | 1 | 2, shared | 0.220 |", "| 10 | none | 1 | 2, shared | 0.190 |",
        "| 10 | none | 1 | 3, all | 0.240 |", "| 10 | release | 2 | 4, all |", "| 20 | uniform | 1 | 1, all |",
    ):  # fmt: skip
        assert line in page
    assert "1, shared" not in page  # one variant has nothing to be compared with


def test_a_row_that_is_in_two_files_is_shown_once():
    rows.append(Path("one.csv"), [ROW])
    rows.append(Path("two.csv"), [ROW._replace(planner_return=0.0)])
    (problem,) = report.write([Path("one.csv"), Path("two.csv")], Path("page.md"))
    assert "two.csv" in problem and "planner_return=0.0" in problem
    assert "| 1 | -1200.5 |" in Path("page.md").read_text()


def test_report_names_what_has_no_step_in_common():
    for seed, step in ((0, 10_000), (1, 10_002)):
        rows.append(Path("results.csv"), [ROW._replace(seed=seed, agent_steps=step)])
    (problem,) = report.write([Path("results.csv")], Path("page.md"))
    assert "Pendulum-v1 release" in problem and "no step in common" in problem
    assert "![Pendulum-v1]" in Path("page.md").read_text()


def test_runs_of_different_lengths_are_compared_at_the_shorter_ones_end(monkeypatch, capsys):
    for variant, steps in (("release", (10_000, 20_000)), ("none", (10_000,))):
        for step in steps:
            rows.append(Path("results.csv"), [ROW._replace(variant=variant, agent_steps=step, planner_return=step / 100)])
    assert command(monkeypatch, "benchmark", "report", "results.csv", "--out", "page.md", "--until", "10000") == 0
    page = Path("page.md").read_text()
    assert "| release | 10,000 | 10 | 1 | 100.0 | -1300.2 |" in page  # a seed alone has no deviation
    assert "| none | 10,000 |" in page and "20,000" not in page
    assert command(monkeypatch, "benchmark", "report", "results.csv", "--out", "page.md", "--until", "9999") != 0
    assert "no evaluation up to step 9999" in capsys.readouterr().err


def test_reports_table_goes_by_task_whatever_the_order_of_the_rows():
    runs = [(task, variant) for variant in ("release", "none") for task in ("Pendulum-v1", "Hopper-v5")]
    rows.append(Path("results.csv"), [ROW._replace(task=task, variant=variant) for task, variant in runs])
    report.write([Path("results.csv")], Path("page.md"))
    lines = [line.split("|") for line in Path("page.md").read_text().splitlines() if line.startswith("| ")]
    shown = [(cells[1].strip(), cells[2].strip()) for cells in lines if cells[1].strip() in ("Pendulum-v1", "Hopper-v5")]
    assert shown[:4] == sorted(runs, key=lambda run: run[0] == "Hopper-v5")


def test_report_shows_the_tasks_and_variants_that_it_was_asked_for(monkeypatch, capsys):
    for task in ("Pendulum-v1", "InvertedPendulum-v5"):
        rows.append(Path("results.csv"), [ROW._replace(task=task), ROW._replace(task=task, variant="uniform")])
    asked = "--tasks", "Pendulum-v1", "--variants", "release"
    assert command(monkeypatch, "benchmark", "report", "results.csv", "--out", "page.md", *asked) == 0
    page = Path("page.md").read_text()
    assert "| Pendulum-v1 | release |" in page and "Inverted" not in page and "uniform" not in page
    assert command(monkeypatch, "benchmark", "report", "results.csv", "--out", "page.md", *asked, "SAC") != 0
    assert "no evaluation of SAC" in capsys.readouterr().err and Path("page.md").read_text() == page
    assert command(monkeypatch, "benchmark", "report", "results.csv", "--tasks", "Pendulum-v2") != 0
    assert "no evaluation of Pendulum-v2" in capsys.readouterr().err


def test_published_curves_are_found_for_every_task_of_the_suites():
    for suite in runner.SUITES.values():
        for task in suite:
            assert len(report.published_curves(task)) >= 3, task
    dog = {(curve.algorithm, curve.source) for curve in report.published_curves("dm_control/dog-run-v0")}
    assert ("BOOM (paper)", "boom_paper_curves.csv") in dog
    assert [source for name, source in dog if name == "TD-MPC2"] == ["tdmpc2_dmc_hard_4M.csv"]


def test_published_means_stand_only_where_they_were_measured():
    (curve,) = (c for c in report.published_curves("dm_control/cheetah-run-v0") if c.algorithm == "TD-MPC2")
    assert curve.at(100_000) == curve.at(104_000) == pytest.approx(519, abs=1)
    assert np.isnan(curve.at(40_000))
    rows.append(Path("results.csv"), [ROW._replace(task="dm_control/cheetah-run-v0", env_steps=40_000)])
    report.write([Path("results.csv")], Path("page.md"))
    assert "Beside published" not in Path("page.md").read_text()


def test_interquartile_mean_leaves_out_the_extremes_and_its_interval_covers_it():
    scores = [np.array([0.0, 0.5, 0.6, 1.0]), np.array([0.4, 0.5, 0.7, 0.9])]
    mean, low, high = report.interquartile_mean(scores)
    assert mean == pytest.approx(np.mean([0.5, 0.5, 0.6, 0.7]))
    assert low < mean < high
    assert report.interquartile_mean(scores) == (mean, low, high)
    assert np.isnan(report.interquartile_mean([np.array([0.5])])[1])


# ----------------------------------------------------------- other algorithms, long form


def test_dictionaries_of_a_variant_add_to_the_files():
    settings = dict(planner_kwargs=dict(n_samples=128, max_std=2.0))
    changed = runner.changes("coef_1_max_std_0.5", settings, action_dim=3)
    assert changed == dict(align_coef=1.0, planner_kwargs=dict(n_samples=128, max_std=0.5))
    assert runner.changes("coef_A/50", {}, action_dim=3) == dict(align_coef=3 / 50)


@pytest.mark.parametrize("variant", ["SAC", "CrossQ"])
def test_other_algorithms_run_on_the_same_grid_and_go_on_where_they_stopped(variant, monkeypatch):
    monkeypatch.setattr(baselines, "LEARNING_STARTS", 20)
    arguments = dict(
        csv=Path("results.csv"), folder=Path("run"), hyperparams=zoo.hyperparams_file(cpu=True), n_eval_episodes=1
    )
    learn = baselines.algorithm(variant).learn

    def interrupted(self, *args, **kwargs):
        if self.num_timesteps >= 20:
            raise KeyboardInterrupt
        return learn(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(baselines.algorithm(variant), "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.train_one("Pendulum-v1", variant, 0, 60, 20, **arguments)
    assert [row.agent_steps for row in table()] == [20]
    runner.train_one("Pendulum-v1", variant, 0, 60, 20, **arguments)
    assert [row.agent_steps for row in table()] == [20, 40, 60]
    assert all(row.variant == variant and row.planner_return == row.prior_return < 0 for row in table())
    report.write([Path("results.csv")], Path("page.md"))
    assert Path("page-Pendulum-v1.png").exists()


def test_evaluations_see_observations_as_the_model_does_and_other_algorithms_see_them_raw(monkeypatch):
    seen = []
    evaluate = runner.EvaluationLog.evaluate
    monkeypatch.setattr(runner.EvaluationLog, "evaluate", lambda self: evaluate(self) or seen.append(self))
    file = zoo.hyperparams_file(True)
    overrides = {**SMALL, **OTHERS, "normalize": {"norm_reward": True}}
    runner.train_one("Pendulum-v1", "forward_kl", 0, 30, 30, Path("results.csv"), Path("run"), file, 1, overrides)
    (log,) = seen
    assert log.eval_env.obs_rms.count == log.training_env.obs_rms.count > 1
    assert not log.eval_env.norm_reward and not log.eval_env.training
    theirs = baselines.entry(dict(n_envs=4, normalize=True, tau=0.1))
    assert theirs == dict(n_envs=4, **baselines.settings())


def test_settings_of_boom_are_refused_for_another_algorithm(monkeypatch, capsys):
    assert command(monkeypatch, *RUN, "--steps", "10", "--variants", "TQC", "-params", "tau:0.5") != 0
    assert "leave -params (tau) out" in capsys.readouterr().err


def test_long_form_has_a_line_for_every_number(monkeypatch):
    rows.append(Path("results.csv"), [ROW, ROW._replace(variant="SAC", seed=1, env_steps=20)])
    assert command(monkeypatch, "benchmark", "export", "results.csv", "--out", "long.csv") == 0
    assert Path("long.csv").read_text().splitlines() == [
        "exp_name,env_name,seed,metric,env_step,value",
        "BOOM-release,Pendulum-v1,0,return,10,-1200.5",
        "BOOM-release,Pendulum-v1,0,prior_return,10,-1300.25",
        "BOOM-release,Pendulum-v1,0,wall_s,10,3.0",
        "SAC,Pendulum-v1,1,return,20,-1200.5",
        "SAC,Pendulum-v1,1,wall_s,20,3.0",
    ]


def test_long_form_names_corrupt_rows():
    rows.append(Path("results.csv"), [ROW])
    with Path("results.csv").open("a") as file:
        file.write("Pendulum-v1,release,0\n")
    assert len(export.write([Path("results.csv")], Path("long.csv"))) == 1
