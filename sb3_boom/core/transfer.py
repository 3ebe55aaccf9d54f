"""Arrays on their way to a GPU (torch only)."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch as th

ALIGNMENT = 16  # bytes; no number is wider


@functools.cache
def can_pin() -> bool:
    """:return: whether there is memory that a GPU reads by itself: tried once per process, and else a warning tells"""
    try:
        th.empty(1, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"BOOM waits for its transfers to the GPU, since memory can't be pinned ({reason})", stacklevel=3)
        return False
    return True


def to_gpu(tensor: th.Tensor, device: th.device) -> th.Tensor:
    """
    :param tensor: of a CPU, any shape
    :param device: a GPU
    :return: the same there, or soon; nobody waits for it
    """
    return (tensor.pin_memory() if can_pin() else tensor).to(device, non_blocking=True)


def send(arrays: Mapping[str, Any], device: th.device) -> dict[str, th.Tensor]:
    """
    Send arrays of different types to a GPU in one transfer that nobody waits for.

    :param arrays: numpy arrays by name; free to be changed afterwards, if the device is a GPU
    :param device: where the tensors are wanted; on a CPU they share the arrays' memory
    :return: tensors by name, of the same shapes and types
    """
    if device.type != "cuda":
        return {name: th.from_numpy(array).to(device) for name, array in arrays.items()}
    ends, size = [], 0
    for array in arrays.values():
        ends.append(size + array.nbytes)
        size = -(-ends[-1] // ALIGNMENT) * ALIGNMENT
    # torch does not hand this memory out again before the copy is done
    host = th.empty(size, dtype=th.uint8, pin_memory=can_pin())
    memory, likes = host.numpy(), []
    for array, end in zip(arrays.values(), ends, strict=True):
        place = memory[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
        place[...] = array
        likes.append(th.from_numpy(place))
    packet = host.to(device, non_blocking=True)
    return {
        name: packet[end - like.nbytes : end].view(like.dtype).view(like.shape)
        for name, like, end in zip(arrays, likes, ends, strict=True)
    }
