"""
A function as one captured CUDA graph (torch only).

A graph is a fixed list of kernels on fixed addresses: its inputs are copied into tensors that stay, its outputs are tensors
that the next replay overwrites, and what it was given besides tensors is baked in.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch as th
from torch.utils import _pytree as pytree

WARM_UP_CALLS = 3  # kernels are chosen, libraries loaded and workspaces made, which no capture allows
MAX_GRAPHS = 16  # of one function: coefficients that change all the time would fill the memory else

_streams: dict[th.device, th.cuda.Stream] = {}


class Capture:
    """
    A recorded function.

    :param replay: does the recorded work again, on the arguments it was recorded with
    :param outputs: what it leaves its results in: the function's own structure of tensors
    """

    def __init__(self, replay: Callable[[], None], outputs: Any) -> None:
        self.replay = replay
        self.outputs = outputs


class _Entry:
    """One structure of arguments: their static copies, and the capture once it is there."""

    def __init__(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        self.tensors = [static_copy(leaf) for leaf in leaves if isinstance(leaf, th.Tensor)]
        tensors = iter(self.tensors)
        static = [next(tensors) if isinstance(leaf, th.Tensor) else leaf for leaf in leaves]
        self.arguments: Any = pytree.tree_unflatten(static, spec)
        # one launch copies many tensors, if they are of one type
        dtypes = {tensor.dtype for tensor in self.tensors}
        self.groups = [[i for i, tensor in enumerate(self.tensors) if tensor.dtype == dtype] for dtype in dtypes]
        self.calls = 0
        self.capture: Capture | None = None

    def fill(self, leaves: Sequence[Any]) -> None:
        """:param leaves: arguments of the same structure, whose tensors to take"""
        given = [leaf for leaf in leaves if isinstance(leaf, th.Tensor)]
        for group in self.groups:
            th._foreach_copy_([self.tensors[i] for i in group], [given[i] for i in group])


class Graphed:
    """
    A function that is captured at its fourth call with arguments of one structure, and replayed from then on.

    The first three calls do their work on a side stream, as the capture will. Arguments that are tensors, in tuples
    too, may have other values at each call; all others (networks, configurations) are constants, by which, with the
    tensors' shapes, strides and types, graphs are told apart. Only tensors may be results, and they are overwritten by the
    next call. Where a capture fails the function itself is called from then on, after one warning. Copies and pickles
    start without graphs.

    :param function: works on one device without waiting for it, and draws no random numbers
    :param name: what a warning calls it
    """

    def __init__(self, function: Callable, name: str) -> None:
        self.function = function
        self.name = name
        self.entries: dict[Any, _Entry] = {}
        self.failed = False

    def __reduce__(self) -> tuple[type["Graphed"], tuple[Callable, str]]:
        return type(self), (self.function, self.name)

    def __call__(self, *arguments: Any, given: Hashable = None) -> Any:
        """
        :param arguments: the function's
        :param given: what else its work depends on: another constant by which graphs are told apart
        :return: the function's result
        """
        leaves, spec = pytree.tree_flatten(arguments)
        device = next((leaf.device for leaf in leaves if isinstance(leaf, th.Tensor)), None)
        if self.failed or device is None or not captures_on(device):
            return self.function(*arguments)
        key = (given, spec, *(_kind(leaf) for leaf in leaves))
        entry = self.entries.get(key)
        if entry is None:
            while len(self.entries) >= MAX_GRAPHS:
                del self.entries[next(iter(self.entries))]
            entry = self.entries[key] = _Entry(leaves, spec)
        entry.fill(leaves)
        if entry.capture is None:
            entry.calls += 1
            if entry.calls <= WARM_UP_CALLS:
                return warm_up(self.function, entry.arguments, device)
            try:
                entry.capture = capture(self.function, entry.arguments, device)
            except Exception as error:  # an operation that waits, an old driver, too little memory
                self.forget()
                self.failed = True
                warn_without_graph(self.name, reason_of(error))
                return self.function(*arguments)
        entry.capture.replay()
        return entry.capture.outputs

    def forget(self) -> None:
        """Drop all graphs, since something they hold by its address has been replaced: they are captured anew."""
        self.entries.clear()


class Graphs:
    """
    The graphs of the functions that work with one module. Copies and pickles have none, as if nothing had been called.
    """

    def __init__(self) -> None:
        self.functions: dict[str, Graphed] = {}
        self.hooks: list[dict] | None = None
        self.explained: set[str] = set()

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        return type(self), ()

    def run(self, function: Callable, name: str, *arguments: Any, given: Hashable = None) -> Any:
        """
        :param function: at its module's level
        :param name: what a warning calls it
        :param arguments: its own
        :param given: see :class:`Graphed`
        :return: its result, from a graph if there is one; the next call overwrites it then
        """
        if name not in self.functions:
            self.functions[name] = Graphed(function, name)
        return self.functions[name](*arguments, given=given)

    def forget(self) -> None:
        """Drop all graphs."""
        self.hooks = None
        for graphed in self.functions.values():
            graphed.forget()

    def bars(self, module: th.nn.Module) -> bool:
        """
        :param module: the functions', always the same one
        :return: whether it has forward hooks, which no graph calls; a warning has told so once
        """
        if self.hooks is None:
            self.hooks = [
                hooks
                for part in module.modules()
                for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
            ]
        if any(self.hooks):
            self.explain_once("plan and update", "a forward hook, which a graph does not call")
        return any(self.hooks)

    def explain_once(self, what: str, reason: str) -> None:
        """
        :param what: is not captured
        :param reason: why
        """
        if what not in self.explained:
            self.explained.add(what)
            warn_without_graph(what, reason)

    def counts(self) -> dict[str, int]:
        """:return: number of graphs by function"""
        return {
            name: sum(entry.capture is not None for entry in graphed.entries.values())
            for name, graphed in self.functions.items()
        }


def captures_on(device: th.device) -> bool:
    """
    :param device: where tensors are
    :return: whether there are graphs
    """
    return device.type == "cuda"


def static_copy(tensor: th.Tensor) -> th.Tensor:
    """
    :param tensor: an argument, any shape
    :return: one of its own memory with the same shape, strides and values
    """
    with th.no_grad():
        if tensor.is_contiguous():
            copy = th.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        else:
            copy = th.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        copy.copy_(tensor)
    return copy.requires_grad_(tensor.requires_grad)


def side_stream(device: th.device) -> th.cuda.Stream:
    """
    :param device: a GPU
    :return: the stream that graphs are warmed up and captured on, always the same, so that libraries have their workspace
    """
    if device not in _streams:
        _streams[device] = th.cuda.Stream(device)
    return _streams[device]


def warm_up(function: Callable, arguments: Sequence[Any], device: th.device) -> Any:
    """
    :param function: to call
    :param arguments: its own, tensors and constants
    :param device: a GPU
    :return: its result, made on the side stream
    """
    stream, current = side_stream(device), th.cuda.current_stream(device)
    stream.wait_stream(current)
    with th.cuda.stream(stream):
        result = function(*arguments)
    current.wait_stream(stream)
    return result


def capture(function: Callable, arguments: Sequence[Any], device: th.device) -> Capture:
    """
    :param function: to record; it is called, but does no work
    :param arguments: its own, tensors and constants
    :param device: a GPU
    :return: the graph
    :raises Exception: whatever broke the capture off; the allocator is as before then
    """
    with th.cuda.device(device):
        graph, pool = th.cuda.CUDAGraph(), th.cuda.graph_pool_handle()
        try:
            # a thread of another kind, such as a renderer's, may use the GPU meanwhile
            recording = th.cuda.graph(graph, pool=pool, stream=side_stream(device), capture_error_mode="thread_local")
            # torch does not leave the stream of a capture that breaks off
            with th.cuda.stream(th.cuda.current_stream(device)), collection_paused(), recording:
                outputs = function(*arguments)
        except Exception:
            recover(device, pool)
            raise
    return Capture(graph.replay, outputs)


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Have no cycle collected meanwhile: to free an event or another graph is not allowed while capturing."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def recover(device: th.device, pool: Any) -> None:
    """
    Bring torch's allocator and random generator back from a capture that was broken off: they still wait for its end.

    :param device: a GPU
    :param pool: of the graph's memory
    """
    with contextlib.suppress(Exception):
        th.cuda.synchronize(device)
    with contextlib.suppress(Exception):
        th._C._cuda_endAllocateToPool(device.index or 0, pool)
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph without kernels
        with th.cuda.stream(th.cuda.Stream(device)):
            empty = th.cuda.CUDAGraph()
            empty.capture_begin()  # its end is what the generator waits for
            empty.capture_end()


def reason_of(error: BaseException) -> str:
    """
    :param error: what a capture was broken off by
    :return: why, in one line: to end such a capture raises too, after what was the matter
    """
    first = error.__context__ or error
    return (str(first).strip() or repr(first)).splitlines()[0]


def warn_without_graph(what: str, reason: str) -> None:
    """
    :param what: is not captured
    :param reason: why
    """
    warnings.warn(
        f"BOOM runs without a CUDA graph of its {what}, which is slower ({reason}). Results are the same.", stacklevel=3
    )


def _kind(leaf: Any) -> Any:
    """What tells one argument's graphs apart. :param leaf: an argument"""
    if isinstance(leaf, th.Tensor):
        # a dimension of size one has any stride
        strides = None if leaf.is_contiguous() else leaf.stride()
        return leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf
