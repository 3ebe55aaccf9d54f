"""
What is in an exported file, looked at before onnxruntime is: metadata, shapes, nothing outside of the file.

An ONNX file is a protocol buffer. Its fields are read here one by one, so that a robot needs no package for it, and so that a
damaged or hostile file is refused before anything is allocated by what it says.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FORMAT_VERSION = 1
KEY = "sb3_boom"  # of the metadata
MAX_BYTES = 2**31  # protocol buffers end there
MAX_METADATA_BYTES = 2**20
MAX_NOISE = 2**25  # numbers drawn for one robot's plan
MAX_STEPS = 1000  # of a plan, either way
MAX_NODES = 100_000
MAX_DEPTH = 4  # of graphs in graphs
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
# fields of ONNX's messages, by number
MODEL = {1: "ir_version", 2: "producer_name", 7: "graph", 8: "opset_import", 14: "metadata_props"}
GRAPH = {1: "node", 2: "name", 5: "initializer", 11: "input", 12: "output", 13: "value_info"}
NODE = {1: "input", 2: "output", 3: "name", 4: "op_type", 5: "attribute"}
ATTRIBUTE = {1: "name", 2: "f", 3: "i", 4: "s", 5: "t", 6: "g", 7: "floats", 8: "ints", 9: "strings", 20: "type"}
TENSOR = {1: "dims", 2: "data_type", 4: "float_data", 5: "int32_data", 7: "int64_data", 8: "name", 9: "raw_data"}
# bytes of a number, by TensorProto's data types
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
KINDS = ("planner", "prior")
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
MAX_ELEMENTS = 2**24  # of an observation or action


def input_name(name: str, of_dict: bool) -> str:
    """
    :param name: of an observation
    :param of_dict: whether it is one of a Dict
    :return: its name as an input of the graph
    """
    return f"observation.{name}" if of_dict else name


# ------------------------------------------------------------------- the wire


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
    raise ValueError("it is cut off, or damaged")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """
    :param data: a message
    :return: number, value and all bytes of each of its fields
    :raises ValueError: for what is no message
    """
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        value: int | memoryview
        if wire_type == VARINT:
            value, at = _varint(data, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(wire_type, -1)
            if wire_type == BYTES:
                size, at = _varint(data, at)
            if size < 0 or size > len(data) - at:
                raise ValueError("it is cut off, or damaged")
            value, at = data[at : at + size], at + size
        yield number, value, data[start:at]


def _message(data: Any, known: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    if not isinstance(data, memoryview):
        raise ValueError("it is damaged")
    for number, value, _ in fields(data):
        if number not in known:
            raise ValueError(f"it has field {number}, which no export has, of a message of {', '.join(known.values())}")
        yield known[number], value


def _text(value: Any) -> str:
    if not isinstance(value, memoryview):
        raise ValueError("it is damaged")
    return bytes(value).decode()


# ------------------------------------------------------------------- the graph


def _check_tensor(data: Any) -> None:
    dims, data_type, raw = [], 0, None
    for name, value in _message(data, TENSOR):
        if name == "dims":
            dims += _integers(value)
        elif name == "data_type":
            data_type = value if isinstance(value, int) else 0
        elif name == "raw_data":
            raw = value
    if data_type not in ITEM_BYTES or not isinstance(raw, memoryview):
        raise ValueError("it has a constant that is not kept in the file as raw numbers")
    if any(dim < 0 or dim > MAX_BYTES for dim in dims) or math.prod(dims) * ITEM_BYTES[data_type] != len(raw):
        raise ValueError(f"a constant of {len(raw)} bytes says that its shape is {dims}")


def _integers(value: Any) -> list[int]:
    """Repeated integers, packed or not. :param value: of the field :return: the integers"""
    if isinstance(value, int):
        return [value]
    result, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        result.append(number)
    return result


def _check_graph(data: Any, depth: int = 1) -> int:
    """:param data: a GraphProto :param depth: of graphs around it, and itself :return: number of its nodes"""
    if depth > MAX_DEPTH:
        raise ValueError("its graphs are nested too deeply")
    nodes = 0
    for name, value in _message(data, GRAPH):
        if name == "initializer":
            _check_tensor(value)
        elif name == "node":
            nodes += 1
            for field, part in _message(value, NODE):
                if field == "attribute":
                    nodes += _check_attribute(part, depth)
        if nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} nodes")
    return nodes


def _check_attribute(data: Any, depth: int) -> int:
    nodes = 0
    for name, value in _message(data, ATTRIBUTE):
        if name == "t":
            _check_tensor(value)
        elif name == "g":
            nodes += _check_graph(value, depth + 1)
    return nodes


# ------------------------------------------------------------------- metadata


def with_metadata(model: bytes, told: Mapping[str, Any]) -> bytes:
    """
    :param model: an ONNX model without metadata
    :param told: what to say about it, without its digest
    :return: the model with it
    :raises ValueError: if it is not what :func:`read` takes
    """
    text = json.dumps({**told, "digest": _digest(fields(memoryview(model)))}, allow_nan=False).encode()
    entry = _field(1, KEY.encode()) + _field(2, text)
    content = model + _field(14, entry)
    parse(memoryview(content))
    return content


def _field(number: int, data: bytes) -> bytes:
    return _encode(number << 3 | BYTES) + _encode(len(data)) + data


def _encode(number: int) -> bytes:
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    return bytes([*result, number])


def _digest(parts: Iterator[tuple[int, Any, memoryview]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for number, _, raw in parts:
        if MODEL.get(number) != "metadata_props":
            digest.update(raw)
    return digest.hexdigest()


def read(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> tuple[bytes, dict[str, Any]]:
    """
    :param path: an exported file
    :param max_bytes: refuse a larger one
    :return: its content and metadata
    :raises ValueError: if it is damaged, or none, or of a later format
    :raises OSError: if it can't be read
    """
    size = os.stat(path)
    if not stat.S_ISREG(size.st_mode):
        raise ValueError(f"{path} is no file")
    if size.st_size > max_bytes:
        raise ValueError(f"{path} has {size.st_size} bytes, more than max_bytes={max_bytes}")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    try:
        return content, parse(memoryview(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no export of sb3_boom that can be loaded: {error}") from error


def parse(content: memoryview) -> dict[str, Any]:
    """
    :param content: of an exported file
    :return: its metadata
    :raises ValueError: see :func:`read`
    """
    told: dict[str, Any] | None = None
    graphs = 0
    for name, value in _message(content, MODEL):
        if name == "metadata_props":
            if told is not None:
                raise ValueError("it has metadata twice")
            told = _metadata(dict(_message(value, {1: "key", 2: "value"})))
        graphs += name == "graph"
    if told is None:
        raise ValueError("it has no metadata: model.export() writes files that do")
    # what reads on depends on these being right
    if told.get("format_version") != FORMAT_VERSION:
        version = told.get("format_version")
        later = isinstance(version, int) and version > FORMAT_VERSION
        raise ValueError(
            f"it has format version {version!r}, this sb3_boom reads {FORMAT_VERSION}: "
            + ("upgrade sb3_boom" if later else "export the model again")
        )
    check_metadata(told)
    if told.get("digest") != _digest(fields(content)):
        raise ValueError("its digest is another one: it was damaged, or changed after the export")
    for name, value in _message(content, MODEL):
        if name == "graph":
            _check_graph(value)
    if graphs != 1:
        raise ValueError("it has no graph, or several")
    return told


def _metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    if _text(entry.get("key")) != KEY:
        raise ValueError("it has metadata of another program")
    value = entry.get("value")
    if not isinstance(value, memoryview) or len(value) > MAX_METADATA_BYTES:
        raise ValueError(f"its metadata has more than {MAX_METADATA_BYTES} bytes")

    def refuse(constant: str) -> None:
        raise ValueError(f"its metadata has {constant}")

    told = json.loads(_text(value), parse_constant=refuse)
    if not isinstance(told, dict):
        raise ValueError("its metadata is no object")
    return told


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"its metadata is wrong about {what}")


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= 8
        and all(_whole(dim, 1, MAX_ELEMENTS) for dim in shape)
        and math.prod(shape) <= MAX_ELEMENTS
    )


def check_metadata(told: Mapping[str, Any]) -> None:
    """
    :param told: the metadata, of the right version
    :raises ValueError: if what an agent uses of it is not what it must be
    """
    _need(told.get("kind") in KINDS, "its kind")
    _need(isinstance(told.get("dict_observation"), bool), "dict_observation")
    observation, action = told.get("observation"), told.get("action")
    _need(isinstance(observation, dict) and 1 <= len(observation) <= 1000, "observation")
    for part in observation.values() if isinstance(observation, dict) else ():
        _need(isinstance(part, dict) and _is_shape(part.get("shape")) and part.get("dtype") in DTYPES, "an observation")
        _need(part.get("kind") in ("box", "image", "discrete"), "an observation's kind")
        if part["kind"] == "discrete":
            counts = part.get("n")
            right = isinstance(counts, list) and all(_whole(n, 1, 2**31) for n in counts)
            _need(right and len(counts) in (1, math.prod(part["shape"])), "an observation's n")
    if not isinstance(action, dict) or not _is_shape(action.get("shape")) or action.get("dtype") not in DTYPES:
        raise ValueError("its metadata is wrong about action")
    for name in ("low", "high"):
        _need(_are_numbers(action.get(name), math.prod(action["shape"])), f"action.{name}")
    if told["kind"] == "planner":
        _check_planner(told.get("planner"), math.prod(action["shape"]))


def _are_numbers(values: Any, n: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == n
        and all(isinstance(value, (int, float)) and abs(value) < 1e39 for value in values)
    )


def _check_planner(settings: Any, action_dim: int) -> None:
    if not isinstance(settings, dict):
        raise ValueError("its metadata is wrong about planner")
    for name in ("n_samples", "n_elites", "latent_dim"):
        _need(_whole(settings.get(name), 1, 2**20), f"planner.{name}")
    for name in ("horizon", "n_iterations"):
        _need(_whole(settings.get(name), 1, MAX_STEPS), f"planner.{name}")
    _need(settings.get("action_dim") == action_dim, "planner.action_dim")
    _need(_whole(settings.get("n_policy_samples"), 0, settings["n_samples"]), "planner.n_policy_samples")
    _need(settings["n_elites"] <= settings["n_samples"], "planner.n_elites")
    _need(_whole(settings.get("n_critics"), 2, 2**10), "planner.n_critics")
    drawn = settings["n_iterations"] * (settings["horizon"] + 1) * settings["n_samples"] * action_dim
    _need(drawn <= MAX_NOISE, f"its planner, which draws {drawn} numbers for a plan")


def noise_shapes(settings: Mapping[str, Any], n_envs: int) -> dict[str, Sequence[int]]:
    """
    :param settings: the metadata's ``planner``
    :param n_envs: robots
    :return: shapes of a plan's random numbers, by name of the input without ``noise.``
    """
    horizon, samples, action_dim = settings["horizon"], settings["n_samples"], settings["action_dim"]
    iterations, n_policy = settings["n_iterations"], settings["n_policy_samples"]
    return dict(
        policy=(horizon, n_envs, n_policy, action_dim),
        candidates=(iterations, horizon, n_envs, samples - n_policy, action_dim),
        terminal=(iterations, n_envs, samples, action_dim),
        elite=(n_envs, settings["n_elites"]),
        critic_pairs=(iterations, 2),
    )
