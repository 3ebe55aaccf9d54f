"""Export a model to ONNX: the policy prior and the planner in one file."""

import logging
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_boom
from sb3_boom.core import kernels, planner
from sb3_boom.deployment import model_file
from sb3_boom.deployment.stages import (
    SINGLE,
    Begin,
    Finish,
    Normalization,
    PriorAction,
    Refine,
    Trajectories,
    inference_copy,
    module_key,
)
from sb3_boom.policies import BOOMPolicy

try:
    import onnx

    from sb3_boom.deployment import compose
except ImportError as error:
    raise ImportError('exporting needs onnx and onnxscript: pip install "sb3_boom[export]"') from error

if TYPE_CHECKING:
    from sb3_boom.boom import BOOM

EXAMPLE_BATCH = 2  # what is traced; the exported batch is free


def observation_inputs(space: spaces.Space, normalized: set[str]) -> dict[str, dict[str, Any]]:
    """
    :param space: the observation space
    :param normalized: names of observations that VecNormalize normalises
    :return: by name, what the graph takes: shape and dtype; and what an observation is, for who feeds it
    """
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {SINGLE: space}
    inputs = {}
    for name, part in parts.items():
        if isinstance(part, spaces.Box):
            image = is_image_space(part)
            double = name in normalized and part.dtype == np.float64
            dtype = "uint8" if part.dtype == np.uint8 else "float64" if double else "float32"
            inputs[name] = dict(kind="image" if image else "box", shape=list(part.shape), dtype=dtype)
        elif isinstance(part, spaces.Discrete):
            inputs[name] = dict(kind="discrete", shape=[], dtype="int64", n=[int(part.n)])
        elif isinstance(part, spaces.MultiDiscrete):
            inputs[name] = dict(kind="discrete", shape=list(part.shape), dtype="int64", n=part.nvec.reshape(-1).tolist())
        elif isinstance(part, spaces.MultiBinary):
            inputs[name] = dict(kind="discrete", shape=list(part.shape), dtype="int64", n=[2])
        else:
            raise ValueError(f"an observation of {part} can't be exported")
    return inputs


def metadata(policy: BOOMPolicy, inputs: dict[str, Any], normalizer: VecNormalize | None, prior_only: bool) -> dict[str, Any]:
    """
    :param policy: what is exported
    :param inputs: see :func:`observation_inputs`
    :param normalizer: of its observations
    :param prior_only: whether there is no planner in the file
    :return: what a runner must know
    """
    space, config = policy.action_space, policy.planner_config
    assert isinstance(space, spaces.Box)
    if str(space.dtype) not in model_file.DTYPES:
        raise ValueError(f"actions of dtype {space.dtype} can't be exported, only of {', '.join(model_file.DTYPES)}")
    told: dict[str, Any] = dict(
        format_version=model_file.FORMAT_VERSION,
        kind="prior" if prior_only else "planner",
        sb3_boom=sb3_boom.__version__,
        torch=th.__version__,
        observation=inputs,
        dict_observation=isinstance(policy.observation_space, spaces.Dict),
        action=dict(
            shape=list(space.shape),
            dtype=str(space.dtype),
            low=space.low.astype(np.float64).reshape(-1).tolist(),
            high=space.high.astype(np.float64).reshape(-1).tolist(),
        ),
        normalization=None,
    )
    if normalizer is not None:
        told["normalization"] = dict(
            observations=_normalized_names(normalizer, inputs), epsilon=normalizer.epsilon, clip_obs=normalizer.clip_obs
        )
    if not prior_only:
        told["planner"] = dict(
            name="cem" if config.uniform_elites else "mppi",
            horizon=config.horizon,
            action_dim=policy.action_dim,
            latent_dim=policy.latent_dim,
            n_critics=policy.critic.n_critics,
            gamma=config.gamma,
            **{name: getattr(config, name) for name in planner.PLANNER_KWARGS},
        )
        told["warm_start"] = ["n_envs", config.horizon, policy.action_dim]
    return told


def _normalized_names(normalizer: VecNormalize | None, names: Any) -> list[str]:
    if normalizer is None or not normalizer.norm_obs:
        return []
    return [name for name in names if normalizer.norm_obs_keys is None or name in normalizer.norm_obs_keys]


def _normalization(normalizer: VecNormalize | None, names: list[str]) -> nn.ModuleDict:
    modules = nn.ModuleDict()
    for name in names:
        assert normalizer is not None
        statistics = normalizer.obs_rms[name] if isinstance(normalizer.obs_rms, dict) else normalizer.obs_rms
        modules[module_key(name)] = Normalization(statistics.mean, statistics.var, normalizer.epsilon, normalizer.clip_obs)
    return modules


def build(
    policy: BOOMPolicy, normalizer: VecNormalize | None = None, prior_only: bool = False, about: dict[str, Any] | None = None
) -> bytes:
    """
    :param policy: what to export
    :param normalizer: whose normalisation of observations becomes part of the graph
    :param prior_only: without the planner
    :param about: further metadata
    :return: the file's content
    :raises ValueError: if a features extractor can't be exported
    """
    space = policy.observation_space
    names = list(space.spaces) if isinstance(space, spaces.Dict) else [SINGLE]
    normalized = _normalized_names(normalizer, names)
    inputs = observation_inputs(space, set(normalized))
    normalization = _normalization(normalizer, normalized)
    told = {**metadata(policy, inputs, normalizer, prior_only), **(about or {})}
    model_file.check_metadata(told)  # before anything is allocated by it
    policy = inference_copy(policy)
    examples = [
        th.zeros(EXAMPLE_BATCH, *part["shape"], dtype=getattr(th, part["dtype"])) for part in inputs.values()
    ]  # fmt: skip
    batch = th.export.Dim("n_envs")
    observation_names = [model_file.input_name(name, told["dict_observation"]) for name in inputs]
    shapes = [{0: batch} for _ in examples]
    if prior_only:
        parts = {"prior": Part(PriorAction(policy, normalization), examples, shapes, observation_names, ["action"])}
        return model_file.with_metadata(compose.standalone(trace(parts)["prior"]), told)
    parts = _planner_parts(policy, normalization, examples, batch, observation_names)
    config = policy.planner_config
    sizes = compose.Sizes(
        config.horizon, config.n_samples, config.n_policy_samples, config.n_elites, policy.action_dim, policy.latent_dim
    )
    return model_file.with_metadata(compose.planner(trace(parts), sizes, observation_names), told)


class Part(NamedTuple):
    """
    A part of a plan, to be traced.

    :param module: a function of tensors
    :param args: example arguments, no tensor twice: torch would take it for one input
    :param shapes: of each argument, which dimension is the batch
    :param inputs: names
    :param outputs: names
    """

    module: nn.Module
    args: Sequence[th.Tensor]
    shapes: Sequence[dict[int, Any] | None]
    inputs: list[str]
    outputs: list[str]


class Together(nn.Module):
    """
    Several parts as one function, since to start torch's exporter takes longer than to trace one.

    :param parts: by name
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.module for part in parts.values())
        self.counts = [len(part.args) for part in parts.values()]

    def forward(self, *args: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param args: all parts' arguments
        :return: all parts' outputs
        """
        outputs: list[th.Tensor] = []
        for module, count in zip(self.parts, self.counts, strict=True):
            output = module(*args[:count])
            outputs += output if isinstance(output, tuple) else (output,)
            args = args[count:]
        return tuple(outputs)


def _planner_parts(
    policy: BOOMPolicy, normalization: nn.ModuleDict, examples: list[th.Tensor], batch: Any, observation_names: list[str]
) -> dict[str, Part]:
    config, n = policy.planner_config, EXAMPLE_BATCH
    horizon, n_policy, action_dim = config.horizon, config.n_policy_samples, policy.action_dim
    first, second = {0: batch}, {1: batch}
    state, best = ["mean", "std"], ["first_actions", "weights"]

    def of_steps(*sizes: int) -> th.Tensor:
        return th.zeros(horizon, n, *sizes, action_dim)

    parts = {
        "begin": Part(
            Begin(policy, normalization),
            [th.zeros(n, horizon, action_dim), *examples],
            [first for _ in (None, *examples)],
            ["mean", *observation_names],
            ["latent", *state, *best],
        ),
        "refine": Part(
            Refine(policy),
            [
                th.zeros(n, policy.latent_dim),
                *(of_steps(n_policy), of_steps(), of_steps(), of_steps(config.n_samples - n_policy)),
                th.zeros(n, config.n_samples, action_dim),
                th.tensor([0, 1]),
            ],
            [first, second, second, second, second, first, None],
            ["latent", "policy_actions", *state, "candidates", "terminal", "pair"],
            [*state, *best],
        ),
        "finish": Part(
            Finish(policy),
            [
                th.zeros(n, config.n_elites, action_dim),
                *(th.ones(n, config.n_elites), th.zeros(n, config.n_elites)),
                *(of_steps(), of_steps()),
            ],
            [first, first, first, second, second],
            [*best, "elite", *state],
            ["action", *state],
        ),
    }
    if n_policy:
        parts["trajectories"] = Part(
            Trajectories(policy),
            [th.zeros(n, policy.latent_dim), of_steps(n_policy)],
            [first, second],
            ["latent", "noise"],
            ["policy_actions"],
        )
    return parts


def trace(parts: Mapping[str, Part]) -> dict[str, onnx.ModelProto]:
    """
    :param parts: by name
    :return: their ONNX models, whose inputs' names begin with the part's name and ``.in.``, and outputs' with ``.out.``:
        torch does not look whether an inner value is called the same
    :raises ValueError: if torch can't export them
    """
    ends = {
        name: ([f"{name}.in.{i}" for i in part.inputs], [f"{name}.out.{o}" for o in part.outputs])
        for name, part in parts.items()
    }
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    loaded, kernels.loaded = kernels.loaded, False  # torch.export is a compiler too, and onnxruntime has no such kernel
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own future,
            logger.setLevel(logging.ERROR)  # and packages of other fields that are not installed
            program = th.onnx.export(
                Together(parts),
                tuple(arg for part in parts.values() for arg in part.args),
                input_names=[name for inputs, _ in ends.values() for name in inputs],
                output_names=[name for _, outputs in ends.values() for name in outputs],
                opset_version=compose.OPSET,
                dynamo=True,
                external_data=False,
                dynamic_shapes=(tuple(shape for part in parts.values() for shape in part.shapes),),
                verbose=False,
            )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # torch's exporter has no common error of its own
        reason = (str(error.__cause__ or error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"torch can't export these networks, a features extractor perhaps: {reason}") from error
    finally:
        logger.setLevel(level)
        kernels.loaded = loaded
    assert program is not None
    model = program.model_proto
    for info in model.graph.output:
        if not any(dim.dim_param for dim in info.type.tensor_type.shape.dim):
            raise ValueError(
                f"a batch of {EXAMPLE_BATCH} is fixed in the networks: let a features extractor take the batch's size from "
                f"x.shape[0], not from len(x) ({info.name})"
            )
    return {name: compose.extract(model, *ends[name]) for name in parts}


def export(
    model: "BOOM",
    path: str | os.PathLike,
    prior_only: bool = False,
    normalizer: VecNormalize | None = None,
    env_id: str | None = None,
) -> pathlib.Path:
    """
    Write a model's policy prior and planner to one ONNX file.

    :param model: what to export
    :param path: where to; ``.onnx`` is added where there is no suffix
    :param prior_only: without the planner
    :param normalizer: whose normalisation of observations becomes part of the graph. Default: the model's own environment's
    :param env_id: to tell in the file. Default: the model's own environment's
    :return: the file, for :meth:`sb3_boom.deployment.Agent.load`
    :raises ValueError: if a features extractor can't be exported
    :raises ImportError: without onnx or onnxscript
    """
    about = dict(env_id=env_id or environment_id(model), num_timesteps=model.num_timesteps, n_updates=model._n_updates)
    return write(path, build(model.policy, normalizer or model.get_vec_normalize_env(), prior_only, about))


def environment_id(model: "BOOM") -> str | None:
    """
    :param model: a model
    :return: its environment's id, if it has one that has
    """
    try:
        specs = model.env.get_attr("spec") if model.env is not None else []
    except Exception:  # an environment of the user's own need not have any
        return None
    return getattr(specs[0], "id", None) if specs else None


def write(path: str | os.PathLike, content: bytes) -> pathlib.Path:
    """
    Write a file that is there whole or not at all.

    :param path: where to; ``.onnx`` is added where there is no suffix
    :param content: of the file
    :return: the file
    """
    path = pathlib.Path(path)
    path = path if path.suffix else path.with_suffix(".onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
