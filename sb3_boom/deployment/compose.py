"""
The planner's graph, put together from traced pieces (onnx alone).

One graph does everything: with the noise of ``I`` iterations it plans so many; with none its action is the prior's; with the
last call's state it goes on from there, one iteration at a time if need be.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, utils

OPSET = 20  # of torch's exporter by default; all of onnxruntime's releases since 1.18 know it
IR_VERSION = 10
BATCH = "n_envs"


class Sizes(NamedTuple):
    """
    Sizes of a planner.

    :param horizon: ``H``
    :param n_samples: ``N``
    :param n_policy_samples: ``P``
    :param n_elites: ``K``
    :param action_dim: ``A``
    :param latent_dim: ``L``
    """

    horizon: int
    n_samples: int
    n_policy_samples: int
    n_elites: int
    action_dim: int
    latent_dim: int


class Weights:
    """Constants of the whole file, each once."""

    def __init__(self) -> None:
        self.tensors: dict[tuple, onnx.TensorProto] = {}

    def add(self, tensor: onnx.TensorProto) -> str:
        """
        :param tensor: a constant
        :return: the name under which it is in the file
        """
        raw = onnx.TensorProto()
        raw.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)))
        key = (raw.data_type, tuple(raw.dims), raw.raw_data)
        if key not in self.tensors:
            raw.name = f"weight_{len(self.tensors)}"
            self.tensors[key] = raw
        return self.tensors[key].name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """
        :param value: a number or a list of them
        :param dtype: of the tensor
        :return: its name
        """
        return self.add(numpy_helper.from_array(np.asarray(value, dtype)))


def extract(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """
    :param model: several pieces in one
    :param inputs: one piece's
    :param outputs: one piece's
    :return: the piece
    """
    if len(model.functions):
        model = inliner.inline_local_functions(model)
    return utils.Extractor(model).extract_model(inputs, outputs)


def rename(model: onnx.ModelProto, weights: Weights, prefix: str, names: Mapping[str, str]) -> list[onnx.NodeProto]:
    """
    A traced piece as nodes of a larger graph.

    :param model: the piece
    :param weights: where its constants go
    :param prefix: of its own names
    :param names: its inputs' and outputs' names in the larger graph, by their own without the prefix
    :return: its nodes
    """
    known = {"": "", **{f"{prefix}.{own}" if prefix else own: name for own, name in names.items()}}
    known.update((tensor.name, weights.add(tensor)) for tensor in model.graph.initializer)
    nodes = []
    for node in model.graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.ClearField("metadata_props")
        copied.ClearField("doc_string")
        copied.ClearField("name")
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise ValueError(f"a features extractor's control flow ({node.op_type}) can't be exported")
        for of, given in ((copied.input, node.input), (copied.output, node.output)):
            del of[:]
            of.extend(known.setdefault(name, f"{prefix}/{name}") for name in given)
        nodes.append(copied)
    return nodes


def value(name: str, dtype: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    """
    :param name: of an input or output
    :param dtype: ONNX's number of a dtype
    :param shape: with names for what is free; None where all is
    :return: its declaration
    """
    return helper.make_tensor_value_info(name, dtype, shape)


def declared(model: onnx.ModelProto, name: str, rename_to: str) -> onnx.ValueInfoProto:
    """
    :param model: a piece
    :param name: of one of its inputs or outputs
    :param rename_to: its name in the whole graph
    :return: its declaration, with the batch free
    """
    found = next(info for info in (*model.graph.input, *model.graph.output) if info.name == name)
    tensor = found.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else BATCH for dim in tensor.shape.dim]
    return value(rename_to, tensor.elem_type, dims)


def standalone(model: onnx.ModelProto) -> bytes:
    """
    :param model: a piece that is a whole graph
    :return: it, cleaned of what tracing left
    """
    weights = Weights()
    names = {info.name: info.name.split(".", 2)[2] for info in (*model.graph.input, *model.graph.output)}
    inputs = [declared(model, info.name, names[info.name]) for info in model.graph.input]
    outputs = [declared(model, info.name, names[info.name]) for info in model.graph.output]
    nodes = rename(model, weights, "", names)
    return _finished(nodes, "boom_prior", inputs, outputs, weights.tensors.values())


def planner(pieces: Mapping[str, onnx.ModelProto], sizes: Sizes, observations: Sequence[str]) -> bytes:
    """
    :param pieces: traced "begin", "refine", "finish" and, with policy trajectories, "trajectories"
    :param sizes: the planner's
    :param observations: names of the inputs that are observations
    :return: the graph
    """
    horizon, n_policy, action_dim = sizes.horizon, sizes.n_policy_samples, sizes.action_dim
    float32, weights = TensorProto.FLOAT, Weights()
    begin = pieces["begin"]
    inputs = [
        *(declared(begin, f"begin.in.{name}", name) for name in observations),
        value("mean", float32, [BATCH, horizon, action_dim]),
        value("noise.policy", float32, [horizon, BATCH, n_policy, action_dim]),
        value("noise.candidates", float32, ["n_iterations", horizon, BATCH, sizes.n_samples - n_policy, action_dim]),
        value("noise.terminal", float32, ["n_iterations", BATCH, sizes.n_samples, action_dim]),
        value("noise.elite", float32, [BATCH, sizes.n_elites]),
        value("noise.critic_pairs", TensorProto.INT64, ["n_iterations", 2]),
    ]
    # what is not given is empty: the default
    given = {
        "latent": [0, sizes.latent_dim],
        "policy_actions": [horizon, 0, n_policy, action_dim],
        "std": [0, horizon, action_dim],
    }
    optional = [
        value(name, float32, ["n_given" if dim == 0 and i < 2 else dim for i, dim in enumerate(dims)])
        for name, dims in given.items()
    ]
    defaults = [helper.make_tensor(name, float32, dims, b"", raw=True) for name, dims in given.items()]

    node, zero = helper.make_node, weights.constant(0)
    first, last = weights.constant([0]), weights.constant([1])
    state = ["latent", "mean", "std", "first_actions", "weights"]
    fresh = rename(
        begin,
        weights,
        "begin",
        {"in.mean": "mean", **{f"in.{n}": n for n in observations}, **{f"out.{n}": f"begun.{n}" for n in state}},
    )
    # going on, the elites are those of the iterations to come
    resumed = [
        node("Identity", ["latent"], ["resume.latent"]),
        node("Transpose", ["mean"], ["resume.mean"], perm=[1, 0, 2]),
        node("Transpose", ["std"], ["resume.std"], perm=[1, 0, 2]),
        node("Slice", ["mean", first, last, last], ["resume.step"]),
        node("Expand", ["resume.step", weights.constant([1, sizes.n_elites, 1])], ["resume.first_actions"]),
        node("Shape", ["noise.elite"], ["resume.shape"]),
        node("Expand", [weights.constant(1.0 / sizes.n_elites, np.float32), "resume.shape"], ["resume.weights"]),
    ]
    nodes = [
        node("Shape", ["noise.critic_pairs"], ["n_iterations"], start=0, end=1),
        node("Squeeze", ["n_iterations"], ["iterations"]),
        node("Size", ["latent"], ["given.latent"]),
        node("Greater", ["given.latent", zero], ["goes_on"]),
        node(
            "If",
            ["goes_on"],
            ["z", *(f"first.{name}" for name in state[1:])],
            then_branch=_branch(resumed, "resume", [f"resume.{name}" for name in state]),
            else_branch=_branch(fresh, "begin", [f"begun.{name}" for name in state]),
        ),
        node("Identity", ["z"], ["next_latent"]),
    ]
    if n_policy:
        # with no iteration to come they are not needed: that is the prior alone
        drawn = rename(
            pieces["trajectories"], weights, "trajectories",
            {"in.latent": "z", "in.noise": "noise.policy", "out.policy_actions": "drawn.policy_actions"},
        )  # fmt: skip
        kept = [node("Identity", ["policy_actions"], ["kept.policy_actions"])]
        nodes += [
            node("Size", ["policy_actions"], ["given.policy_actions"]),
            node("Equal", ["given.policy_actions", zero], ["without_trajectories"]),
            node("Greater", ["iterations", zero], ["plans"]),
            node("And", ["without_trajectories", "plans"], ["draws_trajectories"]),
            node(
                "If",
                ["draws_trajectories"],
                ["next_policy_actions"],
                then_branch=_branch(drawn, "drawn", ["drawn.policy_actions"]),
                else_branch=_branch(kept, "kept", ["kept.policy_actions"]),
            ),
        ]
    else:
        nodes.append(node("Identity", ["noise.policy"], ["next_policy_actions"]))
    carried = ["mean", "std", "first_actions", "weights"]
    body = [
        node("Gather", ["noise.candidates", "step"], ["step.candidates"]),
        node("Gather", ["noise.terminal", "step"], ["step.terminal"]),
        node("Gather", ["noise.critic_pairs", "step"], ["step.pair"]),
        node("Identity", ["step.go"], ["next.go"]),
        *rename(
            pieces["refine"], weights, "refine",
            {
                "in.latent": "z", "in.policy_actions": "next_policy_actions", "in.mean": "step.mean", "in.std": "step.std",
                "in.candidates": "step.candidates", "in.terminal": "step.terminal", "in.pair": "step.pair",
                **{f"out.{name}": f"next.{name}" for name in carried},
            },
        ),
    ]  # fmt: skip
    dims: dict[str, list[int | str]] = {
        "mean": [horizon, BATCH, action_dim],
        "std": [horizon, BATCH, action_dim],
        "first_actions": [BATCH, sizes.n_elites, action_dim],
        "weights": [BATCH, sizes.n_elites],
    }
    loop = helper.make_graph(
        body,
        "iteration",
        [
            value("step", TensorProto.INT64, []),
            value("step.go", TensorProto.BOOL, []),
            *(value(f"step.{n}", float32, dims[n]) for n in carried),
        ],
        [value("next.go", TensorProto.BOOL, []), *(value(f"next.{n}", float32, dims[n]) for n in carried)],
    )
    nodes.append(node("Loop", ["iterations", "", *(f"first.{n}" for n in carried)], [f"last.{n}" for n in carried], body=loop))
    finish = pieces["finish"]
    names = {f"in.{name}": f"last.{name}" for name in carried} | {"in.elite": "noise.elite"}
    names |= {"out.action": "action", "out.mean": "next_mean", "out.std": "next_std"}
    nodes += rename(finish, weights, "finish", names)
    outputs = [
        declared(finish, "finish.out.action", "action"),
        value("next_mean", float32, [BATCH, horizon, action_dim]),
        value("next_std", float32, [BATCH, horizon, action_dim]),
        value("next_latent", float32, [BATCH, sizes.latent_dim]),
        value("next_policy_actions", float32, [horizon, "n_drawn", n_policy, action_dim]),
    ]
    return _finished(nodes, "boom_planner", [*inputs, *optional], outputs, [*defaults, *weights.tensors.values()])


def _branch(nodes: list[onnx.NodeProto], name: str, outputs: Sequence[str]) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [value(output, TensorProto.FLOAT, None) for output in outputs])


def _finished(
    nodes: list[onnx.NodeProto],
    name: str,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: Iterable[onnx.TensorProto],
) -> bytes:
    graph = helper.make_graph(nodes, name, inputs, outputs, list(constants))
    model = helper.make_model(
        graph, producer_name="sb3_boom", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()
