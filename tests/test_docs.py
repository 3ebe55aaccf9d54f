"""What the documentation names exists."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

from sb3_boom import BOOM
from sb3_boom.callbacks import PlannerPriorEvalCallback, WorldModelCallback

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
TABLE = (ROOT / "docs" / "sb3_features.md").read_text()
ROWS = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
}
# a block of Python, after what is run before it, or a reason not to run it: neither shows on the page
EXAMPLE = re.compile(
    r"(?:<!-- run before:\s(.*?)-->\n+)?(<!-- not run: .+? -->\n+)?```python\n(.*?)```",
    re.DOTALL,
)
PROGRAMS = ("sb3-boom", "python", "make", "pip")
HEADING = re.compile(r"^([a-z-]+):", re.MULTILINE)


def commands(page: str) -> list[str]:
    """:return: of the page's shell blocks, and of its indented lines that begin with one of our programs"""
    blocks = re.findall(r"^ *```sh\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^ *```.*?```", "", page, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in outside.splitlines() if line.startswith("    ") and line.split()[:1] != []]
    lines = [line.strip() for line in lines if pathlib.Path(line.split()[0]).name in PROGRAMS]
    for block in blocks:
        lines += [line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0] for line in lines if line and not line.startswith("#")]


def options(words: list[str]) -> list[str]:
    """:return: the long ones"""
    return [word.split("=")[0] for word in words if word.startswith("--")]


def check_make(words: list[str], command: str) -> None:
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    assert set(targets) <= set(HEADING.findall((ROOT / "Makefile").read_text())), command


def check_pip(words: list[str], command: str) -> None:
    extras = set(re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    for names in re.findall(r"(?:^|\s)(?:\.|sb3_boom)\[([\w,]+)\]", command.replace('"', "").replace("'", "")):
        assert set(names.split(",")) <= extras, command


def check_sb3_boom(words: list[str], command: str) -> None:
    paths = [*(ROOT / "sb3_boom").rglob("*.py")]
    described = (ROOT / "sb3_boom" / "cli.py").read_text()
    assert words[0].startswith("-") or words[0].isupper() or re.search(rf"^  {words[0]} ", described, re.MULTILINE), command
    if (zoo := importlib.util.find_spec("rl_zoo3")) is not None and zoo.origin is not None:
        text = "".join(path.read_text() for path in [*paths, *pathlib.Path(zoo.origin).parent.glob("*.py")])
        for option in options(words):
            assert f'"{option}"' in text, f"{option}: {command}"


def check_python(words: list[str], command: str) -> None:
    script = next((word for word in words if word.endswith(".py")), None)
    if words[:2] == ["-m", "sb3_boom"]:
        check_sb3_boom(words[2:], command)
    elif script is not None and "-c" not in words and (ROOT / script).parent.is_dir() and "/" in script:
        imported = (ROOT / "sb3_boom" / "experiment.py").read_text()  # scripts/train.py has its options from there
        for option in options(words):
            assert f'"{option}"' in (ROOT / script).read_text() + imported, f"{option}: {command}"


CHECKS = {"make": check_make, "pip": check_pip, "sb3-boom": check_sb3_boom, "python": check_python, "python3": check_python}


def test_every_feature_names_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS) > 30


@pytest.mark.parametrize(("file", "test"), ROWS)
def test_named_test_exists(file, test):
    assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE)


def test_pages_are_found():
    assert {"README.md", "docs/guide.md", "docs/algorithm.md"} <= set(PAGES) and len(PAGES) > 15


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_examples_run(page, small_scale, monkeypatch):
    """In order, in one namespace, on episodes of three steps, with numbers such as 5_000 as 40."""
    short = EnvSpec("Short-v1", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=3)
    monkeypatch.setitem(gym.registry, short.id, short)
    names: dict = {"__name__": "example"}
    for before, not_run, code in EXAMPLE.findall(PAGES[page]):
        if before:
            exec(small(before), names)
        if not not_run:
            exec(compile(small(code), page, "exec"), names)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_pages_import_the_package_before_torch(page):
    """For fast products on AMD processors: see core/processor.py."""
    imported = re.findall(
        r"^(?:from|import) (sb3_boom|torch|stable_baselines3)\b",
        "".join(code for *_, code in EXAMPLE.findall(PAGES[page])),
        re.M,
    )
    assert "sb3_boom" not in imported or imported[0] == "sb3_boom"


def small(code: str) -> str:
    """:param code: of an example, whose numbers are a user's"""
    code = code.replace("Pendulum-v1", "Short-v1").replace("range(200)", "range(3)")
    return re.sub(r"\b\d{1,3}(_\d{3})+\b", "40", code)


def test_blocks_are_of_a_kind_that_is_checked():
    for page, text in PAGES.items():
        kinds = set(re.findall(r"^ *```(\S+)", text, re.MULTILINE))
        kinds = {kind for kind in kinds if not kind.startswith("{")}
        assert kinds <= {"python", "sh", "diff", "yaml", "text", "cpp"}, f"{page}: is a block of {kinds} right?"


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_and_their_options_exist(page):
    for command in commands(PAGES[page]):
        program, *words = shlex.split(command)
        check = CHECKS.get(pathlib.Path(program).name)
        if check is not None:
            check([word for word in words if word not in ("&&", "|")], command)


def apply(diff: str, root: pathlib.Path) -> None:
    """:param diff: unified, without line numbers :param root: of the files"""
    for file in diff.split("--- ")[1:]:
        name, *hunks = file.split("@@\n")
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if not line.startswith("+"))
            after = "".join(line[1:] for line in lines if not line.startswith("-"))
            text = (root / name.strip()).read_text()
            assert text.count(before) == 1, f"{name}: CONTRIBUTING.md no longer fits\n{before}"
            (root / name.strip()).write_text(text.replace(before, after))


def test_the_worked_example_of_contributing_trains(tmp_path):
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGES["CONTRIBUTING.md"], re.DOTALL)
    assert len(diff.splitlines()) < 40
    shutil.copytree(ROOT / "sb3_boom", tmp_path / "sb3_boom", ignore=shutil.ignore_patterns("__pycache__"))
    apply(diff, tmp_path)
    program = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(TESTS)]}
from conftest import BOOM, TINY
model = BOOM("MlpPolicy", "Pendulum-v1", **TINY, alignment="squared_error", planner="best").learn(30)
assert sys.modules["sb3_boom"].__file__.startswith({str(tmp_path)!r})
assert model.policy.planner_config.best_alone and model._n_updates > 2
model.dump_logs()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})


class Falls(gym.Env):
    """Terminates at every fourth step; says whether that was a success."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(2, self.t / 4, np.float32), 1.0, self.t == 4, False, {"is_success": True}


# what a short run need not come to
RARE = {"train/termination_precision", "train/termination_encoded_precision", "world_model/termination_precision"}


def test_every_logged_key_is_explained_and_no_other(monkeypatch):
    logged, dump = set(), Logger.dump

    def collect(self, step=0):
        logged.update(re.sub(r"_\d+$", "_k", name) for name in self.name_to_value)
        dump(self, step)

    monkeypatch.setattr(Logger, "dump", collect)
    model = BOOM("MlpPolicy", make_vec_env(Falls), **TINY)
    callbacks = [
        PlannerPriorEvalCallback(make_vec_env(Falls), n_eval_episodes=1, eval_freq=150),
        WorldModelCallback(make_vec_env(Falls), n_eval_episodes=1, eval_freq=150),
        EvalCallback(make_vec_env(Falls), n_eval_episodes=1, eval_freq=150, verbose=0),
    ]
    model.learn(170, callback=callbacks)
    explained = set(re.findall(r"`([a-z_]+/[a-z0-9_]+)`", PAGES["docs/metrics.md"])) - {"planner/std_1"}
    assert logged - explained == set()
    assert explained - logged <= RARE


def test_links_to_functions_name_one_of_the_file():
    links = re.findall(r"\[`(\w+)`\]\(\.\./(sb3_boom/[\w/]+\.py)\)", PAGES["docs/algorithm.md"])
    assert len(links) > 20
    for name, file in links:
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}: {name}"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_rows_of_a_table_have_as_many_cells_as_its_head():
    for page, text in PAGES.items():
        swallowed = re.search(r"^\|.*\n(?![|\n]).+", text, re.MULTILINE)
        assert not swallowed, f"{page}: a table ends with an empty line: {swallowed[0][-80:]}"
        for table in re.findall(r"(?:^ *\|.*\n?)+", text, re.MULTILINE):
            rows = table.strip().splitlines()
            cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
            assert len(set(cells)) == 1, f"{page}: {rows[next(i for i, n in enumerate(cells) if n != cells[0])][:80]}"
