"""torch.compile where it works, and fast floats (torch only)."""

import contextlib
import ctypes
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator

import torch as th

from sb3_boom.core import kernels

# a graph per model shape, coefficient and number of environments: more than the eight of one function that torch allows
DYNAMO_LIMITS = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024, "trace_autograd_ops": True}
# what Python checks of every tensor between two kernels at every call; shapes are guarded before
INDUCTOR_OPTIONS: dict[str, str | int | bool | Callable] = {"size_asserts": False, "alignment_asserts": False}
# glibc's mallopt(3): parameter and value. Blocks of up to 32 MiB, its limit, come from a heap of which 512 MiB may be free
MALLOC_OPTIONS = ((-3, 2**25), (-1, 2**29))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def compiled(function: Callable) -> Callable:
    """
    Compile a function, once per process. Graphs are specialised on shapes, and kept out of models and their pickles.

    :param function: a function of tensors, modules and constants without graph breaks, except gradients by
        ``torch.autograd.grad``, which belong to the graph with torch 2.11 or later
    :return: the compiled function, which compiles at its first call
    """
    # torch keeps these by thread and context, so they are looked at in every call, and set in a new one
    for name, least in DYNAMO_LIMITS.items():
        if getattr(th._dynamo.config, name, least) < least:
            setattr(th._dynamo.config, name, least)
    return _compile(function)


@functools.cache
def _compile(function: Callable) -> Callable:
    traces_gradients = hasattr(th._dynamo.config, "trace_autograd_ops")
    return th.compile(function, fullgraph=traces_gradients, dynamic=False, options=INDUCTOR_OPTIONS)


def eager(function: Callable) -> Callable:
    """
    :param function: any
    :return: the same
    """
    return function


@functools.cache
def compiler_works(device_type: str) -> bool:
    """
    Whether torch.compile can make kernels here: tried once per process, on a trivial function.

    :param device_type: "cpu" or "cuda"
    :return: True if so; else a warning has told why not
    """
    reason: object = None
    if device_type == "cpu" and not any(shutil.which(cxx) for cxx in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        reason = "no C++ compiler found; on Debian, `apt install g++ python3-dev` brings one"
    else:
        try:
            th.compile(lambda x: (x + 1.0).relu(), dynamic=False)(th.zeros(8, device=device_type))
        except Exception as error:  # a missing header, an unwritable cache, an old driver: all mean eager
            reason = (str(error).strip() or repr(error)).splitlines()[0]
    if reason is not None:
        warnings.warn(
            f"BOOM runs without torch.compile, which is slower ({reason}). Pass compile=False to silence this.",
            stacklevel=2,
        )
    return reason is None


def choose_compiler(setting: bool | str, device: th.device) -> Callable[[Callable], Callable]:
    """
    :param setting: True, False, or "auto": compile where it works
    :param device: where the networks live
    :return: :func:`compiled` or :func:`eager`
    :raises ValueError: for another setting
    """
    if setting not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", not {setting!r}')
    if setting is True or (setting == "auto" and compiler_works(device.type)):
        if device.type == "cpu":
            kernels.load()
        return compiled
    return eager


def allow_tf32(device: th.device) -> None:
    """
    Let a GPU's matrix products use TF32, unless torch has been told something coarser already.

    :param device: where they are done; nothing changes for a CPU
    """
    if device.type == "cuda":
        # torch's newer settings, once used, make the older ones raise: then the user has chosen
        with contextlib.suppress(RuntimeError):
            if th.get_float32_matmul_precision() == "highest":
                th.set_float32_matmul_precision("high")


@functools.cache
def bf16_works(device_type: str) -> bool:
    """
    Whether matrix products of bfloat16 factors are fast here.

    :param device_type: "cpu" or "cuda"
    :return: True if so; else a warning has told why not
    """
    if device_type == "cpu":
        works = th.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        works = device_type == "cuda" and th.cuda.is_bf16_supported(including_emulation=False)
    if not works:
        warnings.warn(f"bf16=True changes nothing: this {device_type} has no bfloat16 products of its own", stacklevel=2)
    return works


def bf16_products(setting: bool, device: th.device) -> contextlib.AbstractContextManager:
    """
    :param setting: whether they are wanted
    :param device: where
    :return: a context in which the factors of matrix products are rounded to bfloat16, if they are wanted and fast there
    """
    return th.autocast(device.type, th.bfloat16) if setting and bf16_works(device.type) else contextlib.nullcontext()


@contextlib.contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Take subnormal floats as 0 in this thread meanwhile: SimNorm's tiny gradients are some, and slow a CPU down."""
    were_flushed = bool(th.tensor(1e-310, dtype=th.float64) * 1.0 == 0.0)
    th.set_flush_denormal(True)
    try:
        yield
    finally:
        th.set_flush_denormal(were_flushed)


@functools.cache
def keep_freed_memory() -> None:
    """
    Have glibc keep what an update frees for the next one, in this process from now on.

    To give it back to the system, and to fault it in anew page by page, took up to a sixth of an update. Leaves glibc alone
    where the user has set a ``MALLOC_...`` variable; does nothing with another C library.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOC_OPTIONS:
            mallopt(parameter, value)
