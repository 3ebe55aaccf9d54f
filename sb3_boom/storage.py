"""What a replay buffer holds, as arrays: for pickles sized by content, and for checkpoints that add what is new."""

import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

if TYPE_CHECKING:
    from sb3_boom.buffers import WeightedReplayBuffer

SEGMENT_BYTES = 64_000_000  # that a part of the rows takes at most, in memory too
Arrays = dict[str, np.ndarray]


def new_id() -> str:
    """:return: a name that no other buffer or run has; it costs no random number of the run's"""
    return uuid.uuid4().hex


def zeros(shape: tuple[int, ...], dtype: th.dtype, device: th.device) -> th.Tensor:
    """
    ``th.zeros``, which on a CPU would touch every page: NumPy's take memory only as they are written.

    :param shape: of the result
    :param dtype: of the result
    :param device: of the result
    :return: zeros
    """
    if device.type != "cpu":
        return th.zeros(shape, dtype=dtype, device=device)
    return th.from_numpy(np.zeros(shape, dtype=th.empty((), dtype=dtype).numpy().dtype))


# ------------------------------------------------------------------ pickles


def content(buffer: "WeightedReplayBuffer") -> dict[str, Any]:
    """
    :param buffer: to pickle
    :return: its attributes, arrays cut to what is in them
    """
    state = dict(buffer.__dict__, _episodes=None)
    state.pop("_free_slots")
    storage = buffer._storage
    n_rows = None if buffer.full else buffer.pos
    state["_storage"] = {name: tensor[:n_rows].cpu().numpy() for name, tensor in storage.items()}
    n_slots = 1 + max(int(storage["final_slot"][:n_rows].max()), buffer.n_envs - 1) if storage and n_rows != 0 else 0
    state["_final_observations"] = {name: t[:n_slots].cpu().numpy() for name, t in buffer._final_observations.items()}
    state["_capacity"] = len(storage["steps"]) if storage else 0
    return state


def set_content(buffer: "WeightedReplayBuffer", state: dict[str, Any]) -> None:
    """
    :param buffer: to fill, fresh from unpickling
    :param state: from :func:`content`, or all attributes with arrays of the buffer's capacity, as they were pickled before
    :raises ValueError: if the attributes contradict each other; the buffer is not to be used then
    """
    arrays = state["_storage"], state["_final_observations"]
    check_content(state)
    capacity, n_rows = int(state["buffer_size"]), _n_rows(state)
    state = {name: value for name, value in state.items() if name not in ("_capacity", "_free_slots")}
    buffer.__dict__.update(state)
    buffer.__dict__.setdefault("_n_added", n_rows if not buffer.full else capacity + buffer.pos)
    buffer.__dict__.setdefault("_id", new_id())
    n_slots = buffer.n_envs + capacity * buffer.n_envs // 20 + 1
    buffer._storage = {name: _grown(array, capacity) for name, array in arrays[0].items()}
    buffer._final_observations = {name: _grown(array, max(n_slots, len(array))) for name, array in arrays[1].items()}
    _find_free_slots(buffer)


def _n_rows(state: dict[str, Any]) -> int:
    return int(state["buffer_size"] if state["full"] else state["pos"])


def _grown(array: np.ndarray, length: int) -> th.Tensor:
    """
    :param array: what there is
    :param length: rows of the result
    :return: the same with rows of zeros after it
    """
    if len(array) >= length:
        return th.from_numpy(np.require(array, requirements="W"))
    try:
        longer = np.zeros((length, *array.shape[1:]), dtype=array.dtype)
    except MemoryError as error:
        raise ValueError(f"there is no memory for its {length} rows of {array[:1].nbytes} bytes") from error
    longer[: len(array)] = array
    return th.from_numpy(longer)


def _find_free_slots(buffer: "WeightedReplayBuffer") -> None:
    """Places for final observations that no row names, the last one being taken first."""
    if not buffer._storage:
        buffer._free_slots = np.empty(0, dtype=np.int32)
        return
    n_rows = buffer.buffer_size if buffer.full else buffer.pos
    free = np.ones(len(next(iter(buffer._final_observations.values()))), dtype=bool)
    slots = buffer._storage["final_slot"][:n_rows].cpu().numpy()
    free[: buffer.n_envs] = False
    free[slots[slots >= 0]] = False
    buffer._free_slots = np.flatnonzero(free)[::-1].astype(np.int32)


def check_content(state: dict[str, Any]) -> None:
    """
    :param state: attributes of a buffer
    :raises ValueError: if they contradict each other
    """
    size, pos, n_envs, storage = (state[name] for name in ("buffer_size", "pos", "n_envs", "_storage"))

    def require(condition: Any, what: str) -> None:
        if not condition:
            raise ValueError(f"its fields contradict each other: {what}")

    for name, value in (("buffer_size", size), ("pos", pos), ("n_envs", n_envs)):
        require(isinstance(value, (int, np.integer)) and not isinstance(value, bool), f"{name} is {value!r}")
    require(isinstance(state["full"], (bool, np.bool_)), f"full is {state['full']!r}")
    require(size >= 1 and n_envs >= 1, f"buffer_size is {size}, n_envs is {n_envs}")
    require(0 <= pos < size, f"pos is {pos}, buffer_size is {size}")
    require(isinstance(storage, dict), f"the storage is a {type(storage).__name__}")
    if not storage:
        require(pos == 0 and not state["full"], f"pos is {pos}, but nothing is stored")
        return
    n_rows = _n_rows(state)
    capacity = state.get("_capacity", len(storage["steps"]))
    require(capacity == size, f"buffer_size is {size}, the storage was made for {capacity}")
    n_stored = n_rows if "_capacity" in state else size
    for name, array in storage.items():
        require(array.shape[:2] == (n_stored, n_envs), f"{name} has the shape {array.shape}, not {(n_stored, n_envs)} first")
    require(storage["steps"].shape[2:] == (sum(state["_step_widths"]),), f"steps have the shape {storage['steps'].shape}")
    finals, rows = state["_final_observations"], storage["final_slot"][:n_rows]
    require(finals.keys() == state["_last_next_obs"].keys(), "observations have different keys")
    for key, array in finals.items():
        shape, like = array.shape[1:], storage.get(f"obs/{key}", np.empty((0, 0)))
        require(shape == like.shape[2:] == state["_last_next_obs"][key].shape[1:], f"observations {key} have different shapes")
        require(n_rows == 0 or rows.max() < len(array), f"a row names a final observation that is not among {len(array)}")
    ends = rows[rows >= n_envs]
    require(rows.min(initial=-1) >= -1 and len(np.unique(ends)) == len(ends), "two rows name the same final observation")
    if n_rows == 0:
        return
    newest = rows[pos - 1]
    require(np.array_equal(newest, state["_last_slots"]), "the newest row does not end where it says")
    require(np.array_equal(newest < n_envs, state["_episode_open"]), "open episodes do not end with the newest row")
    require(((rows >= 0) & (rows < n_envs)).sum() == (newest < n_envs).sum(), "a row before the newest is open")


# -------------------------------------------------------------- checkpoints


def segments(buffer: "WeightedReplayBuffer", begin: int) -> Iterator[tuple[int, int, Arrays]]:
    """
    The rows that were added from ``begin`` on, in parts of bounded size.

    :param buffer: to save
    :param begin: how many rows had been added before the first one; those overwritten since are left out
    :return: first row, row after the last, and arrays: what the rows hold, ``steps [n, n_envs, ...]`` and
        ``obs/... [n, n_envs, ...]``, and where episodes end. The latter is known only when the next row is stored, so that it
        is told of the rows before: ``ended [n, n_envs]`` is for the rows from ``begin - 1`` on, and ``final/... [k, ...]``
        holds the observations after those that ended, in order
    """
    end = buffer._n_added
    begin = max(begin, end - buffer.buffer_size)
    if not buffer._storage or begin >= end:
        return
    names = ["steps", *(f"obs/{key}" for key in buffer._final_observations)]
    row_bytes = sum(buffer._storage[name][0].nbytes for name in names)
    for first in range(begin, end, max(1, SEGMENT_BYTES // row_bytes)):
        last = min(end, first + max(1, SEGMENT_BYTES // row_bytes))
        at = _positions(buffer, np.arange(first, last))
        arrays = {name: buffer._storage[name][at].cpu().numpy() for name in names}
        slots = buffer._storage["final_slot"][_positions(buffer, np.arange(first, last) - 1)].cpu().numpy()
        if first == max(0, end - buffer.buffer_size):
            slots[0] = -1  # the row before is gone, or never was
        ended = slots >= 0
        where = th.from_numpy(slots[ended].astype(np.int64))
        finals = {f"final/{key}": t[where.to(t.device)].cpu().numpy() for key, t in buffer._final_observations.items()}
        yield first, last, {**arrays, "ended": ended, **finals}


def _positions(buffer: "WeightedReplayBuffer", rows: np.ndarray) -> th.Tensor:
    return th.from_numpy(rows % buffer.buffer_size).to(buffer._storage["steps"].device)


def newest(buffer: "WeightedReplayBuffer") -> Arrays:
    """
    :param buffer: to save
    :return: what later rows may still change, and the values, which every update may change
    """
    arrays = {f"next_obs/{key}": rows for key, rows in buffer._last_next_obs.items()}
    # what lies beyond the newest row is drawn too, and masked; a restored buffer draws the same
    arrays |= {f"own/{key}": t[: buffer.n_envs].cpu().numpy() for key, t in buffer._final_observations.items()}
    arrays["episode_open"] = buffer._episode_open
    if "values" in buffer._storage:
        arrays["values"] = buffer._storage["values"][: buffer.size()].cpu().numpy()
    return arrays


def restore(buffer: "WeightedReplayBuffer", n_added: int, parts: Iterable[tuple[int, Arrays]], newest: Arrays) -> None:
    """
    Fill a buffer with what :func:`segments` and :func:`newest` gave.

    :param buffer: to fill, empty
    :param n_added: rows that had been added
    :param parts: first row and arrays of every segment, in order
    :param newest: see there
    :raises ValueError: if a row is missing
    """
    if n_added == 0:
        return
    size = buffer.buffer_size
    oldest = max(0, n_added - size)
    prefix = "next_obs/"
    last_next_obs = {name[len(prefix) :]: rows for name, rows in newest.items() if name.startswith(prefix)}
    buffer._allocate(last_next_obs)
    storage = buffer._storage
    storage["final_slot"][: min(n_added, size)] = -1
    expected = oldest
    for first, arrays in parts:
        rows = first + np.arange(len(arrays["steps"]))
        kept = rows >= oldest
        if first > expected or (kept.any() and rows[kept][0] != expected):
            raise ValueError(f"rows {expected} to {first} are missing")
        expected = first + len(rows)
        for name in ("steps", *(f"obs/{key}" for key in last_next_obs)):
            storage[name][_positions(buffer, rows[kept])] = th.from_numpy(arrays[name][kept]).to(storage[name].device)
        told = rows - 1 >= oldest
        finals = {
            key: arrays[f"final/{key}"][np.nonzero(arrays["ended"])[0] >= len(told) - told.sum()] for key in last_next_obs
        }
        _keep_apart(buffer, rows[told] - 1, arrays["ended"][told], finals)
    if expected != n_added:
        raise ValueError(f"rows {expected} to {n_added} are missing")
    buffer._n_added, buffer.pos, buffer.full = n_added, n_added % size, n_added >= size
    open_, at = newest["episode_open"], (n_added - 1) % size
    _keep_apart(buffer, np.array([n_added - 1]), ~open_[None], {key: rows[~open_] for key, rows in last_next_obs.items()})
    own = th.arange(buffer.n_envs, dtype=th.int32, device=storage["final_slot"].device)
    storage["final_slot"][at] = th.where(th.from_numpy(open_).to(own.device), own, storage["final_slot"][at])
    for key, store in buffer._final_observations.items():
        store[: buffer.n_envs] = th.from_numpy(newest[f"own/{key}"]).to(own.device)
    if "values" in storage and "values" in newest:
        storage["values"][: len(newest["values"])] = th.from_numpy(newest["values"]).to(own.device)
    buffer._mirror_slots()
    buffer._last_slots = storage["final_slot"][at].cpu().numpy().copy()
    buffer._episode_open, buffer._last_next_obs = open_, last_next_obs


def _keep_apart(buffer: "WeightedReplayBuffer", rows: np.ndarray, ended: np.ndarray, finals: Arrays) -> None:
    """
    Give the rows that ended a place for the observation after them.

    :param buffer: to fill
    :param rows: their number, counted from the first that was ever added, ``[n]``
    :param ended: which of them ended, ``[n, n_envs]``
    :param finals: the observations after those, ``[k, ...]``
    """
    if not ended.any():
        return
    slots = np.full(ended.shape, -1, dtype=np.int32)
    slots[ended] = taken = buffer._take_slots(int(ended.sum()))
    buffer._storage["final_slot"][_positions(buffer, rows)] = th.from_numpy(slots).to(buffer._storage["final_slot"].device)
    for key, observations in finals.items():
        store = buffer._final_observations[key]
        store[th.from_numpy(taken.astype(np.int64)).to(store.device)] = th.from_numpy(observations).to(store.device)
