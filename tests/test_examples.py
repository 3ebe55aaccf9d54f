"""Every example runs, at a small scale that does learn."""

import json
import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "quickstart.py": "policy without planning: a return of",
    "own_environment.py": "planner ",
    "pixels.py": "planner: a return of",
    "several_environments.py": "planner: a return of",
    "deploy.py": "the exported planner: a return of",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_train_and_act(name, small_scale, monkeypatch, capsys):
    if name == "deploy.py":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)
    if name == "pixels.py":
        pytest.importorskip("pygame")
    monkeypatch.setattr(sys, "argv", [name, "--steps", "40", "--episodes", "1"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SCRIPTS[name] in capsys.readouterr().out
    assert small_scale[0].num_timesteps >= 40 and small_scale[0]._n_updates > 2


def test_every_script_is_tested_or_is_of_another_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "control_loop.py"}


def test_notebook_runs_cell_by_cell(small_scale):
    pytest.importorskip("matplotlib").use("Agg")
    notebook = json.loads((EXAMPLES / "boom.ipynb").read_text())
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict = {"__name__": "__main__"}
    for cell in cells:
        cell = cell.replace("STEPS = 5_000", "STEPS = 30").replace("range(200)", "range(3)")
        # one step of an episode and no more: evaluations are the slow part
        exec(cell.replace("n_eval_episodes=5", "n_eval_episodes=1").replace("STEPS // 5", "STEPS"), names)
    assert small_scale[0]._n_updates > 2 and len(names["angles"]) == 3
    assert len(names["evaluation"].planner_returns) == 1
