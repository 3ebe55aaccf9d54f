"""Matrix products at the processor's own speed, and threads that do not keep each other from running."""

import os
import pathlib
import subprocess
import sys

import pytest

from sb3_boom.core import processor

AMD = "vendor_id : AuthenticAMD\nflags : fpu avx2 avx512f avx512_bf16\n"
PROGRAM = """
import ctypes, sys
{imports}
from sb3_boom.core import processor
answered = hasattr(ctypes.CDLL(None), "mkl_serv_intel_cpu_true")
import torch as th
x, w = th.randn(384, 550), th.randn(512, 550)
exact = x.double() @ w.double().T
error = ((th.nn.functional.linear(x, w) - exact).abs().max() / exact.abs().max()).item()
print(answered, error < 1e-6, processor.why_slow())
"""


def run(imports: str, cache: pathlib.Path, **environment: str) -> str:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    program = [sys.executable, "-c", PROGRAM.format(imports=imports)]
    return subprocess.run(program, env=variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (AMD, True),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), False),
        (AMD.replace("avx512f avx512_bf16", ""), False),
        ("", False),
    ],
)
def test_there_is_something_to_gain_on_amd_with_avx512_alone(cpuinfo, expected):
    assert processor.gains(cpuinfo) == expected


@pytest.fixture
def amd(monkeypatch, tmp_path):
    """A process in which torch has not been imported yet, on such a processor."""
    (tmp_path / "cpuinfo").write_text(AMD)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "_is_preloaded", lambda: False)
    monkeypatch.setattr(processor, "_answered", False)
    monkeypatch.setattr(processor, "_reason", None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_is_lost_and_how_to_get_it_is_said(amd, monkeypatch):
    processor.use_all_instructions()
    assert "import sb3_boom before torch" in processor.why_slow()
    monkeypatch.setenv(processor.SETTING, "0")
    processor.use_all_instructions()
    assert "SB3_BOOM_MKL=0" in processor.why_slow()


def test_without_a_compiler_all_goes_on(amd, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr("shutil.which", lambda _: None)
    processor.use_all_instructions()
    assert "no C compiler found" in processor.why_slow()


@pytest.mark.skipif(not processor.CPUINFO.exists(), reason="no Linux")
def test_products_are_right_and_nothing_is_lost_where_the_package_comes_first(tmp_path):
    gains = processor.gains(processor.CPUINFO.read_text())
    for _ in range(2):  # compiled, then from the cache
        assert run("from sb3_boom import BOOM", tmp_path) == f"{gains} True None"
    assert run("import sb3_boom.callbacks", tmp_path) == f"{gains} True None"  # whichever part of it comes first
    assert list(tmp_path.rglob("*.so")) == ([tmp_path / "sb3_boom" / "mkl_serv_intel_cpu_true.so"] if gains else [])
    assert run("from sb3_boom import BOOM", tmp_path, SB3_BOOM_MKL="0").startswith("False True")
    assert run("import torch; from sb3_boom import BOOM", tmp_path).startswith("False True")


def spins(imports: str, **environment: str) -> str:
    """:return: what GNU's OpenMP says of itself when torch loads it"""
    variables = {name: value for name, value in os.environ.items() if name not in (processor.SPINS, "OMP_WAIT_POLICY")}
    variables |= {"OMP_DISPLAY_ENV": "VERBOSE", **environment}
    program = [sys.executable, "-c", imports]
    return subprocess.run(program, env=variables, capture_output=True, text=True, check=True).stderr


@pytest.mark.skipif(not processor.CPUINFO.exists(), reason="no Linux")
def test_threads_wait_briefly_unless_the_user_says_how_long():
    assert "GOMP_SPINCOUNT = '1000'" in spins("from sb3_boom import BOOM")
    assert "GOMP_SPINCOUNT = '77'" in spins("from sb3_boom import BOOM", GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '1000'" not in spins("from sb3_boom import BOOM", OMP_WAIT_POLICY="ACTIVE")
    assert "GOMP_SPINCOUNT = '1000'" not in spins("import torch; from sb3_boom import BOOM")
