"""
What torch reads once, when it is imported, and does not know best (standard library only).

**Matrix products at the processor's own speed.** On AMD's processors the MKL inside torch takes its AVX2 kernels, whatever
the processor can do, because it asks for the maker: half the speed where there is AVX-512. The question is a function of
its own, ``mkl_serv_intel_cpu_true``, and the dynamic linker takes the first definition of a name that it meets. So one of
ours, loaded before torch is, answers yes. MKL then chooses its kernels by what the processor says it can do, and results
differ in their last digits, as between two makers' processors.

**Threads that wait asleep.** A plan is many short parallel loops. After each, a thread of GNU's OpenMP waits for the
others awake, in 300,000 turns, about a millisecond. That is fastest as long as every thread has a core. Where another program
wants the cores, threads that wait keep those that work from running. 1,000 turns are long enough for a plan's own gaps.
"""

import ctypes
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

SETTING = "SB3_BOOM_MKL"  # environment variable: "0" leaves MKL alone
SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
CPUINFO = pathlib.Path("/proc/cpuinfo")
SPINS = "GOMP_SPINCOUNT"  # turns of GNU's OpenMP, which torch has on Linux

_reason: str | None = None  # why products are slower than they could be
_answered = False  # by us, or by what the user preloaded


def gains(cpuinfo: str) -> bool:
    """
    :param cpuinfo: Linux's description of the processors
    :return: whether MKL would be faster if it did not ask for the maker
    """
    return "AuthenticAMD" in cpuinfo and "avx512f" in cpuinfo


def use_all_instructions() -> None:
    """
    Have MKL use all that the processor can do, in this process, if torch is not imported yet; else :func:`why_slow` tells.

    Compiles one line of C, once, into the user's cache folder. Does nothing where there is nothing to gain.
    """
    global _answered, _reason
    on_linux = platform.system() == "Linux" and platform.machine() == "x86_64" and CPUINFO.exists()
    if _answered or not on_linux or not gains(CPUINFO.read_text(errors="replace")) or not _has_torch():
        return
    if _is_preloaded():
        _answered = True
    elif os.environ.get(SETTING) == "0":
        _reason = f"{SETTING}=0 leaves it so"
    elif "torch" in sys.modules:
        _reason = "import sb3_boom before torch and stable_baselines3"
    else:
        try:
            # its symbols come before those of what is loaded later
            ctypes.CDLL(str(_library()), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
            _answered, _reason = True, None
        except (OSError, subprocess.SubprocessError) as error:
            _reason = f"a C compiler and a cache folder to write to would help: {error}"


def wait_asleep() -> None:
    """
    Have idle threads of torch sleep after 1,000 turns, in this process if torch is not imported yet, and in its children.

    What the environment says already (``GOMP_SPINCOUNT``, ``OMP_WAIT_POLICY``) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPINS, "1000")


def why_slow() -> str | None:
    """
    :return: None, or why matrix products on this processor run at half of their speed, and what to do
    """
    return None if _reason is None else f"matrix products run at half of this AMD processor's speed: {_reason}"


def _has_torch() -> bool:
    """Whether torch is installed: it is not where exported models act."""
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # it can't be found out
        return False


def _is_preloaded() -> bool:
    """Whether the name is defined before torch does it."""
    return "torch" not in sys.modules and hasattr(ctypes.CDLL(None), "mkl_serv_intel_cpu_true")


def _library() -> pathlib.Path:
    """:return: path of the compiled line"""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "sb3_boom"
    library = cache / "mkl_serv_intel_cpu_true.so"
    if not library.exists():
        compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
        if compiler is None:
            raise OSError("no C compiler found")
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # another process may do the same
            fresh = pathlib.Path(folder) / library.name
            command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(fresh)]
            subprocess.run(command, input=SOURCE.encode(), check=True, capture_output=True, timeout=60)
            fresh.replace(library)
    return library
