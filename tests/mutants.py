"""
Mutated exports, loaded one after the other: what comes of each is counted.

    python tests/mutants.py MODEL.onnx 10000

They are loaded in a process that is started anew where onnxruntime ended it, without the trial in a process of its own that
``Agent.load`` makes of every file by default: what ends this one would be refused there.
"""

import json
import os
import resource
import sys
import tempfile
from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

from sb3_boom.deployment import Agent, model_file, trial

ABSURD = (None, True, -1, 0, 2**31, 2**80, 1e308, "x", "", [], [0], [2**40, 2**40], {}, {"a": 1}, [[[]]])

MEMORY = 2**32 + 2**30  # bytes


def parts(path) -> tuple[bytes, dict]:
    """An export's graph without metadata, and its metadata."""
    content, told = model_file.read(path)
    fields = model_file.fields(memoryview(content))
    return b"".join(bytes(raw) for number, _, raw in fields if number != 14), told


def signed(graph: bytes, told, raw_text: bytes | None = None) -> bytes:
    """What a hostile program would write: with the digest that belongs to it."""
    if raw_text is None:
        try:
            digest = model_file._digest(model_file.fields(memoryview(graph)))
        except ValueError:
            digest = "none"
        raw_text = json.dumps({**told, "digest": digest} if isinstance(told, dict) else told).encode()
    return graph + model_file._field(14, model_file._field(1, b"sb3_boom") + model_file._field(2, raw_text))


def flip_bits(rng, graph, told, whole):
    data = bytearray(whole)
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)


def truncate(rng, graph, told, whole):
    return whole[: rng.integers(len(whole))]


def splice(rng, graph, told, whole):
    a, b, c = sorted(rng.integers(len(whole), size=3))
    return [whole[:a] + whole[b:], whole[:b] + whole[a:], whole[:a] + rng.bytes(c - b) + whole[a:]][rng.integers(3)]


def flip_bits_and_sign(rng, graph, told, whole):
    return signed(flip_bits(rng, graph, told, graph), told)


def change_metadata(rng, graph, told, whole):
    told = json.loads(json.dumps(told))
    place = told
    while True:
        key = list(place)[rng.integers(len(place))]
        if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = ABSURD[rng.integers(len(ABSURD))]
    return signed(graph, told)


def bomb(rng, graph, told, whole):
    deep = 10 ** int(rng.integers(2, 6))
    texts = [
        b"[" * deep,
        b'{"a":' * deep + b"1" + b"}" * deep,
        b'{"format_version":' + b"9" * deep + b"}",
        b'{"format_version": 1e' + b"9" * (deep % 1000) + b"}",
        b'"' + b"x" * 2**21 + b'"',
        b'{"format_version": NaN}',
        rng.bytes(100),
        b'{"a":1,' * min(deep, 1000) + b"}",
    ]
    return signed(graph, told, texts[rng.integers(len(texts))])


def change_graph(rng, graph, told, whole):
    """Absurd constants, shapes, operators and connections, properly written and signed."""
    model = onnx.load_from_string(graph)
    constants, nodes = model.graph.initializer, list(model.graph.node)
    for node in model.graph.node:
        for attribute in node.attribute:
            nodes += list(attribute.g.node)
    node, constant = nodes[rng.integers(len(nodes))], constants[rng.integers(len(constants))]
    which = rng.integers(9)
    if which == 0 and len(constant.dims):
        constant.dims[rng.integers(len(constant.dims))] = int(rng.choice([0, -1, 7, 2**31, 2**62]))
    elif which == 1:  # shapes, axes and indices among them
        whole_numbers = [c for c in constants if c.data_type == onnx.TensorProto.INT64]
        constant = whole_numbers[rng.integers(len(whole_numbers))]
        array = numpy_helper.to_array(constant)
        absurd = rng.choice([-(2**62), -7, -1, 0, 1, 5, 10**6, 10**9, 2**40, 2**62], size=array.shape)
        constant.raw_data = np.asarray(absurd, np.int64).tobytes()
    elif which == 2:
        bad = rng.choice([np.nan, np.inf, -np.inf, 1e38])
        array = numpy_helper.to_array(constant)
        if array.dtype == np.float32 and array.size:
            constant.raw_data = np.full_like(array, bad).tobytes()
    elif which == 3:
        node.op_type = str(rng.choice(["Tile", "Expand", "Range", "ConstantOfShape", "Pad", "Loop", "If", "MatMul", "Nope"]))
    elif which == 4 and len(node.input):
        other = nodes[rng.integers(len(nodes))]
        node.input[rng.integers(len(node.input))] = [*other.output, *other.input][0]
    elif which == 5:
        del model.graph.node[rng.integers(len(model.graph.node))]
    elif which == 6:
        constant.data_location = onnx.TensorProto.EXTERNAL
        entry = constant.external_data.add()
        entry.key, entry.value = "location", str(rng.choice(["../../../etc/passwd", "/etc/passwd", "weights.bin"]))
        constant.ClearField("raw_data")
    elif which == 7 and node.attribute:
        attribute = node.attribute[rng.integers(len(node.attribute))]
        attribute.i = int(rng.choice([-1, 0, 99, 2**40]))
    else:
        given = model.graph.input[rng.integers(len(model.graph.input))]
        given.type.tensor_type.elem_type = int(rng.integers(1, 20))
    return signed(model.SerializeToString(), told)


KINDS = (flip_bits, truncate, splice, flip_bits_and_sign, change_metadata, bomb, change_graph)


def load(path: str, observation: np.ndarray) -> str:
    """Load a file, and act once. :param path: of the file :param observation: to act on :return: what came of it"""
    try:
        agent = Agent.load(path, check=False)
        action = agent(observation)
    except (ValueError, OSError):
        return "refused"
    except MemoryError:
        return "refused for memory"
    return "loaded" if list(action.shape) == agent.metadata["action"]["shape"] else "loaded wrong"


def serve(n: int, first: int, pipe: int, original: str, path: str) -> None:
    """Load mutants from the ``first`` to the ``n``-th. :param pipe: where to write what came of each, a line each"""
    trial.limit_resources(2**27)
    with open(original, "rb") as file:
        whole = file.read()
    graph, told = parts(original)
    observation = np.zeros(told["observation"]["observation"]["shape"], np.float32)
    for i in range(first, n):
        kind = KINDS[i % len(KINDS)]
        with open(path, "wb") as file:
            file.write(kind(np.random.default_rng(i), graph, told, whole))
        os.write(pipe, f"{kind.__name__} {load(path, observation)}\n".encode())


def main(original: str, n: int) -> dict[str, dict[str, int]]:
    """:param original: an export :param n: mutants of it :return: by kind, how many came to what"""
    counts: dict[str, Counter] = {kind.__name__: Counter() for kind in KINDS}
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        while done < n:
            reads, writes = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.close(reads)
                    os.chdir(folder)
                    serve(n, done, writes, original, os.path.join(folder, "mutant.onnx"))
                finally:
                    os._exit(0)
            os.close(writes)
            with open(reads) as lines:
                for line in lines:
                    kind, outcome = line.rstrip().split(" ", 1)
                    counts[kind][outcome] += 1
                    done += 1
            os.waitpid(child, 0)
            if done < n:
                counts[KINDS[done % len(KINDS)].__name__]["ended the process"] += 1
                done += 1
        left = os.listdir(folder)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"counts": {kind: dict(count) for kind, count in counts.items()}, "most_mib": round(children), "files": left}


if __name__ == "__main__":
    print(json.dumps(main(os.path.abspath(sys.argv[1]), int(sys.argv[2]))))
