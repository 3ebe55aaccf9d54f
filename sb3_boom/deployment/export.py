"""Export a model to ONNX: the policy prior and the planner in one file."""

import copy
import os
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_boom
from sb3_boom.core import kernels, planner
from sb3_boom.deployment import compose, model_file
from sb3_boom.deployment.layers import make_fast
from sb3_boom.policies import BOOMPolicy

if TYPE_CHECKING:
    from sb3_boom.boom import BOOM

EXAMPLE_BATCH = 2  # what is traced; the exported batch is free
SINGLE = "observation"  # name of an observation that is no Dict


class Normalization(nn.Module):
    """
    VecNormalize's normalisation of an observation, in double precision as there.

    :param mean: running mean, the observation's shape
    :param var: running variance, the observation's shape
    :param epsilon: added to the variance
    :param clip: bound of the result
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, mean: np.ndarray, var: np.ndarray, epsilon: float, clip: float) -> None:
        super().__init__()
        self.register_buffer("mean", th.as_tensor(mean, dtype=th.float64))
        self.register_buffer("std", th.as_tensor(np.sqrt(var + epsilon), dtype=th.float64))
        self.clip = float(clip)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: as the environment gives it, ``[n, ...]``
        :return: normalised, float32, ``[n, ...]``
        """
        return ((obs.double() - self.mean) / self.std).clamp(-self.clip, self.clip).float()


class Unscaling(nn.Module):
    """
    From [-1, 1] to the action space, as :meth:`sb3_boom.policies.BOOMPolicy.to_action_space`.

    :param space: the action space
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.register_buffer("low", th.as_tensor(space.low.astype(np.float64)))
        self.register_buffer("high", th.as_tensor(space.high.astype(np.float64)))
        self.whole = np.issubdtype(space.dtype, np.integer)
        self.dtype = getattr(th, str(space.dtype))

    def forward(self, scaled: th.Tensor) -> th.Tensor:
        """
        :param scaled: ``[n, A]`` in [-1, 1]
        :return: ``[n, *action_space.shape]``, within the bounds and of the dtype of the action space
        """
        action = self.low + 0.5 * (scaled.reshape(-1, *self.low.shape).double() + 1.0) * (self.high - self.low)
        if self.whole:
            action = action.round()
        return th.minimum(th.maximum(action, self.low), self.high).to(self.dtype)


class Prior(nn.Module):
    """
    Encoder and squashed mean.

    :param policy: whose networks
    :param normalization: of some observations, by name
    """

    def __init__(self, policy: BOOMPolicy, normalization: nn.ModuleDict) -> None:
        super().__init__()
        self.policy = policy
        self.normalization = normalization
        space = policy.observation_space
        self.names = list(space.spaces) if isinstance(space, spaces.Dict) else [SINGLE]

    def latent(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: by :attr:`names`, as the environment gives them, ``[n, ...]``
        :return: latents ``[n, L]``
        """
        obs = {
            name: self.normalization[_key(name)](value) if _key(name) in self.normalization else value
            for name, value in zip(self.names, observations, strict=True)
        }
        single = not isinstance(self.policy.observation_space, spaces.Dict)
        return self.policy.world_model.encode(self.policy.features(obs[SINGLE] if single else obs))

    def action(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: latents ``[n, L]``
        :return: the policy's squashed mean, ``[n, A]`` in [-1, 1]
        """
        return self.policy.actor.sample(z, th.zeros((), device=z.device))

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: see :meth:`latent`
        :return: ``[n, A]`` in [-1, 1]
        """
        return self.action(self.latent(*observations))


class Begin(Prior):
    """What is done once for every plan: the latent, the prior's action, and where the first iteration samples."""

    def forward(self, mean: th.Tensor, *observations: th.Tensor) -> tuple[th.Tensor, ...]:  # type: ignore[override]
        """
        :param mean: the warm start, ``[n, H, A]``
        :param observations: see :meth:`latent`
        :return: latents ``[n, L]``, mean and std ``[H, n, A]``, the prior's action as the elites' first ones ``[n, K, A]``,
            and their weights ``[n, K]``
        """
        z = self.latent(*observations)
        config = self.policy.planner_config
        elites = self.action(z).unsqueeze(1).expand(-1, config.n_elites, -1)
        weights = th.full_like(elites[:, :, 0], 1.0 / config.n_elites)
        return z, *planner.first_distribution(config, mean), elites, weights


class Trajectories(nn.Module):
    """
    The policy's own trajectories.

    :param policy: whose networks
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, z: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param z: latents ``[n, L]``
        :param noise: ``[H, n, P, A]``
        :return: actions ``[H, n, P, A]``
        """
        return planner.policy_trajectories(self.policy.world_model, self.policy.actor, z, noise)


class Refine(nn.Module):
    """
    One iteration of the planner.

    :param policy: whose networks
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *args: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param args: latents, policy trajectories, mean, std, candidates' noise, terminal noise, pair of critics, as
            :func:`sb3_boom.core.planner.refine`
        :return: mean, std, the elites' first actions, their weights
        """
        policy = self.policy
        return planner.refine(
            policy.world_model, policy.actor, policy.critic, policy.planner_config, *args, policy.terminations_seen
        )[:4]


class Finish(nn.Module):
    """
    The action, and the next warm start.

    :param policy: whose action space
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        super().__init__()
        assert isinstance(policy.action_space, spaces.Box)
        self.unscaling = Unscaling(policy.action_space)

    def forward(
        self, first_actions: th.Tensor, weights: th.Tensor, noise: th.Tensor, mean: th.Tensor, std: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        """
        :param first_actions: the elites', ``[n, K, A]``
        :param weights: the elites', ``[n, K]``
        :param noise: Gumbel ``[n, K]``
        :param mean: ``[H, n, A]``
        :param std: ``[H, n, A]``
        :return: action ``[n, *action_space.shape]``, mean and std ``[n, H, A]``
        """
        action = planner.choose(first_actions, weights, noise, mean)
        return self.unscaling(action), mean.transpose(0, 1), std.transpose(0, 1)


class PriorAction(Prior):
    """The prior alone, to the environment's action."""

    def __init__(self, policy: BOOMPolicy, normalization: nn.ModuleDict) -> None:
        super().__init__(policy, normalization)
        assert isinstance(policy.action_space, spaces.Box)
        self.unscaling = Unscaling(policy.action_space)

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: see :meth:`Prior.latent`
        :return: ``[n, *action_space.shape]``
        """
        return self.unscaling(super().forward(*observations))


def _key(name: str) -> str:
    """A ModuleDict's keys have no dots. :param name: of an observation"""
    return "of_" + name.replace(".", "\N{ONE DOT LEADER}")


def inference_copy(policy: BOOMPolicy) -> BOOMPolicy:
    """
    :param policy: a policy
    :return: the same on the CPU, without gradients or optimizers, of layers that onnxruntime runs fast
    """
    with th.no_grad():
        bare = copy.copy(policy)
        bare.__dict__ = {key: value for key, value in policy.__dict__.items() if not isinstance(value, th.optim.Optimizer)}
        bare = copy.deepcopy(bare).cpu()
    bare.requires_grad_(False)
    nn.Module.train(bare, False)
    for name in ("world_model", "actor", "critic"):
        setattr(bare, name, make_fast(getattr(bare, name)))
    if not float(bare.terminations_seen):
        bare.world_model.termination = None  # it never takes part
    return bare


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
        modules[_key(name)] = Normalization(statistics.mean, statistics.var, normalizer.epsilon, normalizer.clip_obs)
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
    policy = inference_copy(policy)
    examples = [
        th.zeros(EXAMPLE_BATCH, *part["shape"], dtype=getattr(th, part["dtype"])) for part in inputs.values()
    ]  # fmt: skip
    batch = th.export.Dim("n_envs")
    of_observations = tuple({0: batch} for _ in examples)
    observation_names = [model_file.input_name(name, told["dict_observation"]) for name in inputs]
    loaded, kernels.loaded = kernels.loaded, False  # torch.export is a compiler too, and onnxruntime has no such kernel
    try:
        if prior_only:
            module = PriorAction(policy, normalization)
            piece = trace(module, tuple(examples), (of_observations,), observation_names, ["action"])
            return model_file.with_metadata(compose.standalone(piece), told)
        pieces = _planner_pieces(policy, normalization, examples, batch, observation_names)
    finally:
        kernels.loaded = loaded
    config = policy.planner_config
    shapes = compose.Shapes(
        config.n_iterations, config.horizon, config.n_samples, config.n_policy_samples, config.n_elites,
        policy.action_dim, policy.latent_dim,
    )  # fmt: skip
    return model_file.with_metadata(compose.planner(pieces, shapes, observation_names), told)


def _planner_pieces(
    policy: BOOMPolicy, normalization: nn.ModuleDict, examples: list[th.Tensor], batch: Any, observation_names: list[str]
) -> dict[str, Any]:
    config, n = policy.planner_config, EXAMPLE_BATCH
    horizon, n_policy, action_dim = config.horizon, config.n_policy_samples, policy.action_dim
    z, mean = th.zeros(n, policy.latent_dim), th.zeros(horizon, n, action_dim)
    trajectories = th.zeros(horizon, n, n_policy, action_dim)
    candidates = th.zeros(horizon, n, config.n_samples - n_policy, action_dim)
    terminal = th.zeros(n, config.n_samples, action_dim)
    elites, weights = th.zeros(n, config.n_elites, action_dim), th.ones(n, config.n_elites)
    first, second = {0: batch}, {1: batch}
    state, best = ["mean", "std"], ["first_actions", "weights"]
    pieces = {
        "begin": trace(
            Begin(policy, normalization),
            (mean.transpose(0, 1), *examples),
            (first, tuple(first for _ in examples)),
            ["mean", *observation_names],
            ["latent", *state, *best],
        ),
        "refine": trace(
            Refine(policy),
            (z, trajectories, mean, mean + 1.0, candidates, terminal, th.tensor([0, 1])),
            ((first, second, second, second, second, first, None),),
            ["latent", "policy_actions", *state, "candidates", "terminal", "pair"],
            [*state, *best],
        ),
        "finish": trace(
            Finish(policy),
            (elites, weights, weights + 0.0, mean, mean + 1.0),  # torch takes one tensor given twice for one input
            (first, first, first, second, second),
            [*best, "elite", *state],
            ["action", *state],
        ),
    }
    if n_policy:
        pieces["trajectories"] = trace(
            Trajectories(policy), (z, trajectories), (first, second), ["latent", "noise"], ["policy_actions"]
        )
    return pieces


def trace(module: nn.Module, args: tuple, dynamic_shapes: Any, inputs: list[str], outputs: list[str]) -> Any:
    """
    :param module: a function of tensors
    :param args: example arguments
    :param dynamic_shapes: as :func:`torch.export.export`'s
    :param inputs: names, which begin with ``in.`` in the model: torch looks not whether an inner one is the same
    :param outputs: names, with ``out.`` before them
    :return: its ONNX model
    :raises ValueError: if torch can't export it
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own future
            program = th.onnx.export(
                module, args, dynamo=True, dynamic_shapes=dynamic_shapes, external_data=False, optimize=True, verbose=False,
                input_names=[f"in.{name}" for name in inputs], output_names=[f"out.{name}" for name in outputs],
                opset_version=compose.OPSET,
            )  # fmt: skip
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # torch's exporter has no common error of its own
        reason = (str(error.__cause__ or error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"torch can't export {type(module).__name__}, a features extractor perhaps: {reason}") from error
    model = program.model_proto
    if not all(any(dim.dim_param for dim in info.type.tensor_type.shape.dim) for info in model.graph.output):
        raise ValueError(
            f"{type(module).__name__} was traced for a batch of {EXAMPLE_BATCH} alone: let the features extractor take the "
            "batch's size from x.shape[0], not from len(x)"
        )
    return model


def export(
    model: "BOOM", path: str | os.PathLike, prior_only: bool = False, normalizer: VecNormalize | None = None
) -> pathlib.Path:
    """
    Write a model's policy prior and planner to one ONNX file.

    :param model: what to export
    :param path: where to; ``.onnx`` is added where there is no suffix
    :param prior_only: without the planner
    :param normalizer: whose normalisation of observations becomes part of the graph. Default: the model's own environment's
    :return: the file, for :meth:`sb3_boom.deployment.Agent.load`
    :raises ValueError: if a features extractor can't be exported
    :raises ImportError: without onnx or onnxscript
    """
    about = dict(env_id=environment_id(model), num_timesteps=model.num_timesteps, n_updates=model._n_updates)
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
