"""What others wrote is data: damaged, absurd or hostile files are refused, run nothing, and stay within bounds."""

import base64
import io
import json
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch as th
from conftest import TINY

from sb3_boom import BOOM
from sb3_boom.deployment import Agent, foreign, trial

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
mutants = pytest.importorskip("mutants")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = BOOM("MlpPolicy", "Pendulum-v1", **TINY).learn(30)
    folder = tmp_path_factory.mktemp("trust")
    model.save(folder / "model.zip")
    return model, model.export(folder / "model"), folder / "model.zip"


def test_mutated_exports_are_refused_or_load_right(exported):
    program = str(pathlib.Path(__file__).with_name("mutants.py"))
    result = subprocess.run([sys.executable, program, str(exported[1]), "140"], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    counts = found["counts"]
    assert sum(sum(count.values()) for count in counts.values()) == 140
    # what is not signed again is always noticed, and nothing acts that is not what it says
    for kind in ("flip_bits", "truncate", "splice", "bomb"):
        assert counts[kind] == {"refused": 20}
    assert all(set(count) <= {"refused", "loaded", "ended the process"} for count in counts.values())
    assert found["most_mib"] < 5 * 1024 and found["files"] == ["mutant.onnx"]


def test_file_that_ends_onnxruntime_ends_another_process(exported, monkeypatch):
    monkeypatch.setattr(trial, "PROGRAM", "import os; os.abort()")
    with pytest.raises(ValueError, match="does not survive it"):
        Agent.load(exported[1])
    Agent.load(exported[1], check=False)


def test_graph_that_takes_all_memory_is_refused(exported, tmp_path):
    graph, told = mutants.parts(exported[1])
    model = onnx.load_from_string(graph)
    (begin,) = (a.g for node in model.graph.node for a in node.attribute if a.name == "else_branch" and len(a.g.output) == 5)
    shape = onnx.numpy_helper.from_array(np.array([2**36]), "huge")
    model.graph.initializer.append(shape)
    begin.node.append(onnx.helper.make_node("Expand", [begin.output[0].name, "huge"], ["hugely"]))
    (tmp_path / "huge.onnx").write_bytes(mutants.signed(model.SerializeToString(), told))
    with pytest.raises(ValueError, match=r"huge\.onnx is no export"):
        Agent.load(tmp_path / "huge.onnx")


# ------------------------------------------------------------ exports without trust


class Marker:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rezip(source, target, changes: dict[str, bytes | None]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in {*old.namelist(), *changes}:
            content = changes.get(name, b"") if name in changes else old.read(name)
            if content is not None:
                new.writestr(name, content)


def data_of(path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


def pickled(value) -> dict:
    return {":type:": "x", ":serialized:": base64.b64encode(pickle.dumps(value)).decode()}


def test_untrusted_export_acts_as_the_trusted_one_and_unpickles_nothing(exported, tmp_path):
    _, path, archive = exported
    marker = tmp_path / "ran"
    data = data_of(archive)
    for name in ("lr_schedule", "policy_class", "train_freq", "replay_buffer_class", "_last_obs", "another"):
        data[name] = pickled(Marker(marker))
    space = data["observation_space"]
    data["observation_space"] = {**space, ":serialized:": pickled(Marker(marker))[":serialized:"]}
    rezip(archive, tmp_path / "foreign.zip", {"data": json.dumps(data).encode()})
    ours = foreign.export_untrusted(tmp_path / "foreign.zip", tmp_path / "foreign")
    assert not marker.exists()
    obs = np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)
    trusted, untrusted = (Agent.load(where).predict(obs, deterministic=True)[0] for where in (path, ours))
    assert np.array_equal(trusted, untrusted)
    with pytest.raises(Exception):  # noqa: B017  # whatever comes of it: loading has run what the file holds
        BOOM.load(tmp_path / "foreign.zip")
    assert marker.exists()


def weights(**changes) -> bytes:
    file = io.BytesIO()
    th.save(changes, file)
    return file.getvalue()


def pickled_weights(tmp_path) -> bytes:
    file = io.BytesIO()
    th.save({"a": Marker(tmp_path / "ran")}, file)
    return file.getvalue()


def bomb_of(n: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * n)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "member", "message"),
    [
        (dict(policy_kwargs=dict(mlp_dim=2**40)), None, "mlp_dim is"),
        (dict(policy_kwargs=dict(n_enc_layers=10**9)), None, "n_enc_layers is"),
        (dict(policy_kwargs=dict(mlp_dim=2**16)), None, "bytes of weights"),
        (dict(policy_kwargs=dict(model_size="1M")), None, "not those of its own settings"),
        (dict(policy_kwargs=pickled(1)), None, "policy_kwargs are pickled"),
        (dict(policy_kwargs=dict(enc_dim="x")), None, "enc_dim must be"),
        (dict(horizon=10**9), None, "horizon is"),
        (dict(planner_kwargs=dict(n_samples=10**9, n_elites=1)), None, "can't be exported|wrong about"),
        (dict(format_version=99), None, "upgrade sb3_boom"),
        (dict(format_version=None), None, "another algorithm"),
        (dict(observation_space=None), None, "--env"),
        (
            dict(action_space={":type:": "<class 'gymnasium.spaces.box.Box'>", "_shape": [10**9], "dtype": "float32"}),
            None,
            "shape",
        ),
        (None, "pickle", "weights alone"),
        (None, "bomb", "unpacks to more"),
        (None, "zeros", "most there can be"),
        (None, "other", "not those of its own settings"),
        (None, "list", "weights alone|other things"),
    ],
)
def test_hostile_zips_are_refused(exported, tmp_path, data, member, message):
    members = dict(
        pickle=pickled_weights(tmp_path), bomb=bomb_of(2**24), zeros=b"0" * 2**24, other=weights(a=th.ones(1)), list=b"[]"
    )
    changes = {} if data is None else {"data": json.dumps({**data_of(exported[2]), **data}).encode()}
    changes |= {} if member is None else {"policy.pth": members[member]}
    rezip(exported[2], tmp_path / "foreign.zip", changes)
    with pytest.raises(ValueError, match=message):
        foreign.export_untrusted(tmp_path / "foreign.zip", tmp_path / "out.onnx")
    assert os.listdir(tmp_path) == ["foreign.zip"]


@pytest.mark.parametrize("data", [b"[" * 10**5, b"\xff", b"[]", b"{}"])
def test_settings_that_are_none_are_refused(exported, tmp_path, data):
    rezip(exported[2], tmp_path / "foreign.zip", {"data": data})
    for load in (BOOM.load, lambda path: foreign.export_untrusted(path, tmp_path / "out.onnx")):
        with pytest.raises(ValueError, match=r"foreign\.zip"):
            load(tmp_path / "foreign.zip")


def test_zip_bomb_is_refused_before_it_is_unpacked(exported, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("data", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(b" " * 2**20)
    for load in (BOOM.load, lambda path: foreign.export_untrusted(path, tmp_path / "out.onnx")):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match="bytes"):
            load(tmp_path / "bomb.zip")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


# ------------------------------------------------------------------ our own files

YAML_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        YAML_BOMB,
        MERGE_BOMB,
        "a: &a [*a]",
        "[" * 2000,
        "x" * (2**20 + 1),
        "- a",
        "!!python/object/apply:os.system ['true']",
        "a: [",
    ],
)
def test_hyperparameter_files_are_data_and_bounded(text, tmp_path):
    zoo = pytest.importorskip("sb3_boom.zoo")
    (tmp_path / "file.yml").write_text(text)
    with pytest.raises(ValueError, match=r"file\.yml"):
        zoo.read_hyperparams(tmp_path / "file.yml")
    with pytest.raises(ValueError, match=r"file\.yml"):
        zoo.entry(tmp_path / "file.yml", "Pendulum-v1")


def test_report_escapes_what_it_prints(tmp_path):
    pytest.importorskip("rl_zoo3")
    from sb3_boom.benchmark import report, rows

    task = "../../<script>alert(1)</script>|[x](javascript:x) $\\frac$ `y`"
    cells = dict(variant="*a*|b", seed=0, agent_steps=10, env_steps=10, planner_return=1.0, prior_return=2.0, wall_s=1.0)
    row = rows.Row(task=task, revision="<b>", versions="_v_\n# title", **cells)
    rows.append(tmp_path / "in" / "rows.csv", [row])
    (tmp_path / "out").mkdir()
    assert report.write([tmp_path / "in" / "rows.csv"], tmp_path / "out" / "page.md") == []
    page = (tmp_path / "out" / "page.md").read_text()
    (table,) = (line for line in page.splitlines() if line.startswith("| ..") or line.startswith("| ../"))
    assert "<script" not in page.replace(r"\<", "") and r"\|\[x\]" in table and r"\*a\*\|b" in table
    assert "\n# title" not in page and r"\<b\>" in page
    images = [name for name in os.listdir(tmp_path / "out") if name.endswith(".png")]
    assert len(images) == 1 and set(os.listdir(tmp_path)) == {"in", "out"} and images[0] in page


@pytest.mark.parametrize(
    "change",
    [dict(task="x" * 2000), dict(agent_steps=10**30), dict(planner_return=1e300), dict(seed="1" * 900)],
    ids=["long", "steps", "return", "seed"],
)
def test_absurd_rows_are_skipped_and_named(change, tmp_path):
    pytest.importorskip("rl_zoo3")
    from sb3_boom.benchmark import rows

    cells = dict(task="a", variant="b", seed=0, agent_steps=1, env_steps=1, planner_return=1.0, prior_return=1.0)
    cells |= dict(wall_s=1.0, revision="r", versions="v") | change
    text = f"{','.join(rows.Row._fields)}\n{','.join(str(cells[name]) for name in rows.Row._fields)}\n"
    (tmp_path / "rows.csv").write_text(text)
    found, (problem,) = rows.read(tmp_path / "rows.csv")
    assert found == [] and next(iter(change)) in problem


@pytest.mark.parametrize("content", [b"\xff\xfe", b'"' + b"x" * 2**18, b"a\x00b"])
def test_what_is_no_csv_is_refused(content, tmp_path):
    pytest.importorskip("rl_zoo3")
    from sb3_boom.benchmark import rows

    header = ",".join(rows.Row._fields).encode() + b"\n"
    (tmp_path / "rows.csv").write_bytes(header + content)
    try:
        found, problems = rows.read(tmp_path / "rows.csv")
    except ValueError as error:
        assert "rows.csv" in str(error)
    else:
        assert found == [] and problems
