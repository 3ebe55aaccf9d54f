"""The page that says why a model does not learn."""

import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import TINY
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom import BOOM, cli
from sb3_boom.inspection import figures, verdict


def short_pendulum() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=20)


@pytest.fixture(scope="module")
def model() -> BOOM:
    return BOOM("MlpPolicy", short_pendulum(), **TINY).learn(30)


def test_the_page_needs_nothing_else_and_the_model_is_left_alone(model, tmp_path):
    before = th.get_rng_state()
    found = model.inspect(short_pendulum(), n_episodes=2)
    assert th.equal(th.get_rng_state(), before)
    path = found.save(tmp_path / "new" / "page.html")
    page = path.read_text()
    assert set(found.figures) == {"Return", "Along an episode", "Plans", "Imagined against real", "Calibration", "Latency"}
    assert len(re.findall(r'src="data:image/svg', page)) == 6 and len(list(path.parent.glob("page-*.png"))) == 6
    assert not re.search(r'(src|href)="(?!data:)', page) and "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert [sentence.about for sentence in found.sentences] == ["world model", "critics", "planner"]
    assert all(sentence.text in page.replace("&#39;", "'") for sentence in found.sentences)


def test_a_figure_that_fails_is_noted_and_the_others_are_made(model, monkeypatch):
    monkeypatch.setattr(figures, "calibration", lambda _: 1 / 0)
    found = model.inspect(short_pendulum(), n_episodes=1)
    assert "Calibration" not in found.figures and len(found.figures) == 5
    assert any("Calibration: division by zero" in note for note in found.notes)


class Unseedable(gym.Wrapper):
    """As some robots' environments."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            raise NotImplementedError("the real world has no seed")
        return self.env.reset(options=options)


def test_an_environment_that_cannot_be_seeded_is_named_and_the_page_made(model):
    with pytest.warns(UserWarning, match="can't be seeded .the real world has no seed"):
        found = model.inspect(Unseedable(short_pendulum()), n_episodes=1)
    assert len(found.figures) == 6


def test_environments_are_normalised_as_the_models_own():
    env = VecNormalize(make_vec_env(short_pendulum))
    found = BOOM("MlpPolicy", env, **TINY).learn(30).inspect(short_pendulum(), n_episodes=1)
    assert found.numbers["planner's return"] < 0.0


def test_another_environment_is_refused(model):
    with pytest.raises(ValueError, match=r"observations.*are not the model's"):
        model.inspect("MountainCarContinuous-v0")


def test_the_verdict_names_what_is_wrong():
    bad = verdict.of_critics(np.full(9, 28.0), np.full(9, 10.0))
    assert not bad.healthy and "promise too much" in bad.text and "2.8 × what comes" in bad.text
    assert verdict.of_critics(np.full(9, 10.5), np.full(9, 10.0)).healthy
    prior = verdict.of_critics(np.full(9, 10.5), np.full(9, 10.0), np.full(9, 28.0), np.full(9, 10.0))
    assert prior.healthy and "for the prior's actions 28 where 10 came" in prior.text
    assert verdict.of_critics(np.zeros(0), np.zeros(0)).healthy is None
    well, ill, constant = np.full(10, 0.1), np.full(10, 0.9), np.full(10, 1.0)
    assert verdict.of_world_model(well, well, constant, 3).healthy
    assert not verdict.of_world_model(ill, well, constant, 3).healthy
    assert verdict.of_planner([10.0, 11.0], [2.0, 3.0], 0.1, 0.5).healthy
    assert "earns less than" in verdict.of_planner([2.0, 3.0], [10.0, 11.0], 0.1, 0.5).text
    assert verdict.of_reward(np.zeros(5)).about == "reward" and verdict.of_reward(np.arange(5.0)) is None


def test_the_command_writes_a_page(model, tmp_path, monkeypatch, capsys):
    model.save(tmp_path / "model.zip")
    command = ["sb3-boom", "inspect", str(tmp_path / "model.zip"), "--env", "Pendulum-v1", "--episodes", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--max-steps", "30"])
    (tmp_path / "Pendulum-v1").mkdir()
    (tmp_path / "Pendulum-v1" / "vecnormalize.pkl").touch()  # as rl_zoo3 leaves it
    cli.main()
    output = capsys.readouterr()
    assert (tmp_path / "model.html").exists() and "promise" in output.out
    assert "vecnormalize.pkl is left out" in output.err
    monkeypatch.setattr(sys, "argv", command[:3])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--env" in capsys.readouterr().err


def test_a_missing_gl_library_is_named_by_its_package():
    assert cli.missing_gl_package('ImportError: Library "OSMesa" was not found') == "libosmesa6"
    assert cli.missing_gl_package("OSError: libEGL.so.1: cannot open shared object file") == "libegl1"
    assert cli.missing_gl_package("ValueError: no") is None
