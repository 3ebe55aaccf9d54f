"""How the package is built: what each room may import, and what an installation holds."""

import ast
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser

import pytest
from conftest import TINY

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "sb3_boom"
# a room imports those before it; rooms of a tuple do not import each other
ROOMS = [
    "core",
    ("files", "guards", "sizes", "storage", "drawing"),
    ("buffers", "policies", "manifests"),
    ("update", "presets", "prior", "checks", "meters", "progress", "logs", "foresight", "diagnostics"),
    ("waits", "checkpoint"),
    "saving",
    "collection",
    "boom",
    "probing",
    "evaluation",
    "callbacks",
    ("inspection", "deployment"),
    "zoo",
    "benchmark",
    "cluster",
    ("experiment", "tuning", "video"),
    "cli",
    "__main__",
]
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in ([names] if isinstance(names, str) else names)}
CORE = ["kernels", ("torch_layers", "two_hot"), ("world_model", "actor", "critic"), ("losses", "planner")]


def imported(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, below functions too, except those for type checkers alone."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # lazy
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "sb3_boom" and len(parts) > 1 and parts[1] in RANK and parts[1] != room:
            assert RANK[parts[1]] < RANK[room], f"{room} imports {name}"


def test_the_mathematics_imports_one_way_and_torch_alone():
    rank = {name: i for i, names in enumerate(CORE) for name in ([names] if isinstance(names, str) else names)}
    for path in (PACKAGE / "core").glob("*.py"):
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top in (*sys.stdlib_module_names, "torch", "sb3_boom"), f"{path.name} imports {name}"
            other = rest.removeprefix("core.").split(".")[0]
            if top == "sb3_boom" and path.stem in rank and other in rank and other != path.stem:
                assert rank[other] < rank[path.stem], f"{path.name} imports {name}"


def test_the_mathematics_works_without_sb3_and_gymnasium():
    """In a process of its own, where importing them is an error."""
    program = """
import sys
for name in ("stable_baselines3", "gymnasium", "rl_zoo3", "numpy.random.mtrand_", "pandas"):
    sys.modules[name] = None
import torch as th
import sb3_boom
from sb3_boom.core import actor, augmentation, compilation, critic, kernels, losses, planner, two_hot, world_model
model = world_model.WorldModel(3, 1, 8, 8, 8)
policy, critics = actor.Actor(8, 1, 8), critic.Critic(8, 1, 8, 2)
config = planner.PlannerConfig(n_samples=8, n_elites=2, n_policy_samples=1, n_iterations=1)
noise = planner.draw_noise(config, 1, 1, 2, th.device("cpu"))
with th.no_grad():
    plan = planner.plan(model, policy, critics, config, model.encode(th.zeros(1, 3)), th.zeros(1, 3, 1), noise, th.zeros(()))
assert plan.planner_action.shape == (1, 1)
assert not [name for name in sys.modules if name.startswith("sb3_boom.") and not name.startswith("sb3_boom.core")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[zipfile.ZipFile, tarfile.TarFile]:
    """Wheel and source distribution, of a copy: what an earlier build left in the repository would come into them."""
    out, root = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split():
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((ROOT / name).read_bytes())
    program = (
        "import sys, setuptools.build_meta as backend; out = sys.argv[1]; print(backend.build_sdist(out)); "
        "print(backend.build_wheel(out))"
    )
    subprocess.run([sys.executable, "-c", program, str(out)], cwd=root, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return zipfile.ZipFile(wheel), tarfile.open(sdist)


def test_the_wheel_has_every_module_and_data_file(built):
    names = set(built[0].namelist())
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    data = {"sb3_boom/py.typed", "sb3_boom/core/kernels.cpp"}
    data |= {f"sb3_boom/zoo_hyperparams/{path.name}" for path in (ROOT / "zoo_hyperparams").glob("*.yml")}
    data |= {str(path.relative_to(ROOT)) for path in (PACKAGE / "benchmark" / "published").iterdir()}
    assert modules | data <= names
    assert {name.split("/")[0] for name in names} == {"sb3_boom", "sb3_boom-0.1.0.dist-info"}


def test_the_wheel_trains_in_an_empty_environment(built, tmp_path):
    """
    Away from the checkout. What it depends on is borrowed from this environment by a line on the path, instead of a
    gigabyte's download; packages that are linked here, as this one is, do not come along.
    """
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    wheel = str(built[0].filename)
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    program = f"""
import sb3_boom
assert sb3_boom.__file__.startswith({str(packages)!r}), sb3_boom.__file__
model = sb3_boom.BOOM("MlpPolicy", "Pendulum-v1", **{dict(TINY, learning_starts=200)!r})
model.learn(300)
model.save("model")
assert sb3_boom.BOOM.load("model").num_timesteps == 300 and model._n_updates >= 100
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", program], check=True, cwd=tmp_path, env=environment)
    subprocess.run([python.with_name("sb3-boom"), "--help"], check=True, cwd=tmp_path, env=environment, capture_output=True)


def test_the_wheels_metadata_are_complete(built):
    wheel = built[0]
    metadata = Parser().parsestr(wheel.read("sb3_boom-0.1.0.dist-info/METADATA").decode())
    assert (metadata["Name"], metadata["License-Expression"], metadata["Requires-Python"]) == (
        "sb3_boom",
        "MIT",
        "<3.14,>=3.10",
    )
    assert metadata["Description-Content-Type"] == "text/markdown" and "# sb3_boom" in metadata.get_payload()
    requires = metadata.get_all("Requires-Dist")
    required = ["stable-baselines3<3,>=2.9", "torch>=2.7", "gymnasium<2,>=1.3", "numpy>=1.26"]
    assert [line for line in requires if "extra ==" not in line] == required
    assert {"dmc", "mujoco", "zoo", "box2d", "extra", "tests", "docs", "all"} <= set(metadata.get_all("Provides-Extra"))
    assert 'dm_control>=1.0.20; python_version < "3.13" and extra == "dmc"' in requires
    assert len(metadata.get_all("Classifier")) == 6 and len(metadata["Keywords"].split(",")) == 6
    assert "sb3-boom = sb3_boom.cli:main" in wheel.read("sb3_boom-0.1.0.dist-info/entry_points.txt").decode()


def test_the_source_distribution_has_what_building_and_testing_need(built):
    names = {name.partition("/")[2] for name in built[1].getnames()}
    needed = {"setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"}
    needed |= {
        "tests/conftest.py",
        "tests/data/boom-0.1.0.zip",
        "scripts/train.py",
        "docs/guide.md",
        "docs/conf.py",
        "docs/images/loop.svg",
        "examples/boom.ipynb",
        "CITATION.cff",
        "zoo_hyperparams/boom.yml",
    }
    assert needed <= names
