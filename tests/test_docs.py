"""What the documentation names exists."""

import pathlib
import re

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec

from sb3_boom.core.compilation import eager

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
TABLE = (ROOT / "docs" / "sb3_features.md").read_text()
ROWS = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)


def test_every_feature_names_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS) > 30


@pytest.mark.parametrize(("file", "test"), ROWS)
def test_named_test_exists(file, test):
    assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/surviving.md"])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sb3_boom.policies.choose_compiler", lambda setting, device: eager)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert examples
    short = EnvSpec("Short-v1", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=3)
    monkeypatch.setitem(gym.registry, short.id, short)
    for name, few in (("Pendulum-v1", "Short-v1"), ("5_000", "40"), ("range(200)", "range(3)")):
        examples = [example.replace(name, few) for example in examples]
    exec("\n".join(examples), {"__name__": "example"})


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
