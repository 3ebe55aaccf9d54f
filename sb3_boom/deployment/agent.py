"""Act with an exported model: numpy and onnxruntime alone."""

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sb3_boom.deployment import model_file, trial
from sb3_boom.deployment.model_file import MAX_BYTES

Observation = np.ndarray | Mapping[str, np.ndarray]

PROVIDERS = ["CPUExecutionProvider"]
MAX_MEMORY = 2**32  # bytes that onnxruntime may take for all agents of a process
MAX_TRIAL_SECONDS = 60.0  # of the first call, when loading
PAIRS_SEED = 0  # the critics are shared by a batch, so their choice can't depend on a row
FORGETTING = 0.98  # how much of the slowest iteration is remembered from one to the next
HEADROOM = 1.1  # the next iteration may take so much of the slowest
STATE = ("mean", "std", "latent", "policy_actions")  # what the next iteration goes on with


class Agent:
    """
    A trained model on a robot, or on a batch of robots: ``Agent.load(path)``, then ``action = agent(observation)``.

    Observations are those of the environment, as they are: what VecNormalize did is in the file, what other wrappers did
    (frame stacks for instance) is not. The planner goes on from its last plan, so call :meth:`reset` where an episode
    starts.

    :param content: of an exported file
    :param metadata: of it
    :param threads: see :meth:`load`
    :param deadline_ms: see :meth:`load`
    :param seed: see :meth:`load`
    :ivar metadata: of the file: spaces, normalisation, the planner's settings
    :ivar deadline_ms: milliseconds, or None; may be changed between calls
    :ivar plans: whether the file has a planner, or the policy prior alone
    :ivar iterations_done: how many iterations the last call's plan has had
    :raises ValueError: as :meth:`load`
    :raises ImportError: without onnxruntime
    """

    def __init__(
        self,
        content: bytes,
        metadata: dict[str, Any],
        threads: int = 1,
        deadline_ms: float | None = None,
        seed: int | None = None,
    ) -> None:
        if deadline_ms is not None and not deadline_ms > 0.0:
            raise ValueError(f"deadline_ms must be positive, or None for none, not {deadline_ms}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.metadata = metadata
        self.deadline_ms = deadline_ms
        self.plans = metadata["kind"] == "planner"
        self.iterations_done = 0  # of the last call
        self._parts = metadata["observation"]
        self._of_dict = metadata["dict_observation"]
        self._settings = metadata.get("planner", {})
        self._rng = np.random.default_rng(seed)
        self._mean: np.ndarray | None = None  # the warm start
        self._slowest = 0.0  # seconds of an iteration, lately
        self._session = _session(content, threads)
        self._check_graph()
        self._try()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        threads: int = 1,
        deadline_ms: float | None = None,
        seed: int | None = None,
        max_bytes: int = MAX_BYTES,
        check: bool = True,
    ) -> "Agent":
        """
        Load an exported file. It is data: nothing in it can run as a program.

        :param path: what :meth:`sb3_boom.BOOM.export` returned
        :param threads: of onnxruntime, for one action. Default 1: a second one pays for large networks alone
        :param deadline_ms: milliseconds that a call may take: the planner stops after the last iteration that is sure to
            end by then, and the policy prior acts if there is none. Default None: all iterations
        :param seed: of the noise of calls that are not deterministic. Default None: from the system
        :param max_bytes: refuse a larger file. Default: 2 GiB
        :param check: run it in a process of its own first, since a file made to hurt can end the one that onnxruntime is in.
            False saves a second for a file of one's own
        :return: an agent, which has run once
        :raises ValueError: for a file that is damaged, of a later format, or no export; for a number outside of these
        :raises OSError: if it can't be read
        :raises ImportError: without onnxruntime
        """
        content, metadata = model_file.read(path, max_bytes)
        reason = trial.run(content) if check else None
        if reason is not None:
            raise ValueError(f"{path} is no export of sb3_boom that can be loaded: {reason}")
        try:
            return cls(content, metadata, threads, deadline_ms, seed)
        except _Refused as error:
            raise ValueError(f"{path} is no export of sb3_boom that can be loaded: {error}") from error

    # ------------------------------------------------------------------------ act

    def __call__(self, observation: Observation, deterministic: bool = False) -> np.ndarray:
        """
        Plan the next action, from where the last call left off.

        :param observation: of one robot, or a batch ``[n, ...]`` of them; an array, or a dictionary of them
        :param deterministic: as :meth:`predict`
        :return: the action, or ``[n, ...]``, within the action space's bounds and of its dtype
        :raises ValueError: for an observation of another shape, or not finite; for another number of robots than in the
            last call, without :meth:`reset`
        """
        mean = self._mean
        batch, vectorized = self._batch(observation)
        n_envs = _length(batch)
        if mean is not None and len(mean) != n_envs:
            raise ValueError(f"there were {len(mean)} robots in the last call, now {n_envs}: call reset() first")
        actions, self._mean = self._act(batch, mean, deterministic)
        return actions if vectorized else actions[0]

    def reset(self, robots: Sequence[int] | np.ndarray | None = None) -> None:
        """
        Forget the last plan, where an episode starts.

        :param robots: indices, or a mask ``[n]``, of those whose episode starts. Default None: all
        """
        if robots is None:
            self._mean = None
        elif self._mean is not None:
            self._mean[np.asarray(robots)] = 0.0

    def predict(
        self,
        observation: Observation,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As :meth:`sb3_boom.BOOM.predict`, so that ``evaluate_policy(agent, env)`` works; the agent's own warm start is neither
        used nor changed. Numpy draws other random numbers than torch, so the actions are others, as good.

        :param observation: of one robot, or a batch ``[n, ...]``
        :param state: the warm start, as returned by the last call: ``(mean,)`` with ``[n, H, A]``. Default None: cold
        :param episode_start: bool ``[n]``, where to drop the warm start. Default None: nowhere
        :param deterministic: take the elites' mean, and draw all noise from a generator seeded by the observation's float32
            bytes: the same observation and state give the same action
        :return: the action, or ``[n, ...]``, and the next state; None without a planner
        :raises ValueError: as when called
        """
        batch, vectorized = self._batch(observation)
        mean = None
        if self.plans and state is not None:
            shape = (_length(batch), self._settings["horizon"], self._settings["action_dim"])
            if np.shape(state[0]) != shape:
                raise ValueError(f"state must be what the last predict() returned, with an array of shape {shape}")
            mean = np.array(state[0], np.float32)
            if episode_start is not None:
                mean[np.broadcast_to(np.asarray(episode_start, bool), len(mean))] = 0.0
        actions, mean = self._act(batch, mean, deterministic)
        return actions if vectorized else actions[0], None if mean is None else (mean,)

    def prior(self, observation: Observation) -> np.ndarray:
        """
        The policy without planning: its squashed mean.

        :param observation: of one robot, or a batch ``[n, ...]``
        :return: the action, or ``[n, ...]``
        :raises ValueError: as when called
        """
        batch, vectorized = self._batch(observation)
        actions = self._prior_action(batch)
        return actions if vectorized else actions[0]

    def plan(
        self, observation: Observation, mean: np.ndarray, noise: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Plan with random numbers given: the same ones give the same plan everywhere.

        :param observation: a batch ``[n, ...]``
        :param mean: the warm start ``[n, H, A]``
        :param noise: as :meth:`draw_noise`, of as many iterations as there are to be
        :return: actions ``[n, ...]``, and mean and std of the final distribution, ``[n, H, A]``
        :raises ValueError: for an observation of another shape, or not finite; for noise of another shape
        """
        batch, _ = self._batch(observation)
        feeds = {**batch, "mean": mean, **{f"noise.{name}": value for name, value in noise.items()}}
        outputs = self._run(feeds)
        return outputs["action"], outputs["next_mean"], outputs["next_std"]

    def draw_noise(self, n_envs: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """
        Draw the random numbers of one plan.

        :param n_envs: robots ``n``
        :param rng: where from. Default: the agent's own generator
        :return: standard normal ``policy`` ``[H, n, P, A]``, ``candidates`` ``[I, H, n, N-P, A]`` and ``terminal``
            ``[I, n, N, A]``; standard Gumbel ``elite`` ``[n, K]``; ``critic_pairs`` ``[I, 2]``
        """
        rng = rng or self._rng
        shapes = model_file.noise_shapes(self._settings, n_envs)
        noise = {name: rng.standard_normal(shapes[name], np.float32) for name in ("policy", "candidates", "terminal")}
        noise["elite"] = -np.log(rng.standard_exponential(shapes["elite"], np.float32))
        noise["critic_pairs"] = self._draw_pairs(rng)
        return noise

    # -------------------------------------------------------------------- inwards

    def _draw_pairs(self, rng: np.random.Generator) -> np.ndarray:
        n_critics, n_iterations = self._settings["n_critics"], self._settings["n_iterations"]
        first = rng.integers(n_critics, size=n_iterations)
        step = rng.integers(1, n_critics, size=n_iterations)
        return np.stack([first, (first + step) % n_critics], axis=1)

    def _deterministic_noise(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Noise that depends on each row's observation alone. :param batch: the graph's observations"""
        parts = [batch[name] for name in sorted(batch)]
        rows = [part.reshape(len(part), -1).astype(np.float32) + np.float32(0.0) for part in parts]  # -0.0 is 0.0
        noises = []
        for row in zip(*rows, strict=True):
            digest = hashlib.blake2b(b"".join(part.tobytes() for part in row), digest_size=8).digest()
            noises.append(self.draw_noise(1, np.random.default_rng(int.from_bytes(digest, "little"))))
        axes = dict(policy=1, candidates=2, terminal=1, elite=0)
        noise = {name: np.concatenate([one[name] for one in noises], axis=axis) for name, axis in axes.items()}
        noise["elite"][:] = np.inf  # the graph takes the mean
        noise["critic_pairs"] = self._draw_pairs(np.random.default_rng(PAIRS_SEED))
        return noise

    def _batch(self, observation: Observation) -> tuple[dict[str, np.ndarray], bool]:
        """
        :param observation: of one robot, or a batch
        :return: the graph's observations, and whether it is a batch
        """
        if self._of_dict != isinstance(observation, Mapping):
            wanted = f"a dictionary of {', '.join(self._parts)}" if self._of_dict else "an array"
            raise ValueError(f"the observation must be {wanted}, not a {type(observation).__name__}")
        given = observation if isinstance(observation, Mapping) else {"observation": observation}
        missing = sorted(set(self._parts) - set(given))
        if missing:
            raise ValueError(f"the observation has no {', '.join(missing)}")
        batch, vectorized = {}, False
        for name, part in self._parts.items():
            array, vectorized = self._array(name, given[name], part)
            batch[model_file.input_name(name, self._of_dict)] = array
        if len({len(array) for array in batch.values()}) != 1:
            raise ValueError("the observation's parts are of different numbers of robots")
        return batch, vectorized

    def _array(self, name: str, value: Any, part: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
        array, shape = np.asarray(value), tuple(part["shape"])
        if part["kind"] == "image" and array.shape[-3:] == (*shape[1:], shape[0]) != shape:
            array = np.moveaxis(array, -1, -3)  # as SB3: channels first
        if part["kind"] == "discrete" and array.dtype.kind not in "iub":
            raise ValueError(f"{name} must be whole numbers, not {array.dtype}")
        if (array.shape[-len(shape) :] != shape and shape) or array.ndim not in (len(shape), len(shape) + 1):
            raise ValueError(f"{name} must be of shape {shape}, or (n, {str(shape)[1:]} for n robots, not {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} is NaN or infinite at index {tuple(np.argwhere(~np.isfinite(array))[0].tolist())}")
        if part["kind"] == "discrete":
            limit = np.reshape(part["n"], shape) if len(part["n"]) > 1 else part["n"][0]
            if not ((array >= 0) & (array < limit)).all():
                raise ValueError(f"{name} must be at least 0 and below {limit}, not {array}")
        vectorized = array.ndim > len(shape)
        return np.ascontiguousarray(array if vectorized else array[None], part["dtype"]), vectorized

    def _act(
        self, batch: dict[str, np.ndarray], mean: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """
        :param batch: the graph's observations
        :param mean: the warm start ``[n, H, A]``, or None
        :param deterministic: see :meth:`predict`
        :return: actions ``[n, ...]``, and the next warm start
        """
        start = time.perf_counter()
        if not self.plans:
            return self._prior_action(batch), None
        if mean is None:
            mean = np.zeros((_length(batch), self._settings["horizon"], self._settings["action_dim"]), np.float32)
        if self.deadline_ms is not None:
            outputs = self._plan_until(start + 1e-3 * self.deadline_ms, batch, mean, deterministic)
        else:
            outputs = self._run({**batch, "mean": mean, **self._noise(batch, deterministic)})
            self.iterations_done = self._settings["n_iterations"]
        if not np.isfinite(outputs["next_mean"]).all():
            raise ValueError("planning failed: no action sequence has a finite value, so the networks have diverged")
        return outputs["action"], outputs["next_mean"]

    def _noise(self, batch: Mapping[str, np.ndarray], deterministic: bool) -> dict[str, np.ndarray]:
        noise = self._deterministic_noise(batch) if deterministic else self.draw_noise(_length(batch))
        return {f"noise.{name}": value for name, value in noise.items()}

    def _plan_until(
        self, end: float, batch: dict[str, np.ndarray], mean: np.ndarray, deterministic: bool, options: Any = None
    ) -> dict[str, np.ndarray]:
        """
        :param end: when the plan must be there, as :func:`time.perf_counter`
        :param batch: the graph's observations
        :param mean: the warm start
        :param deterministic: see :meth:`predict`
        :param options: onnxruntime's, of every run
        :return: what the graph gave after the last iteration that was sure to end in time
        """
        outputs = self._prior(batch, mean)
        noise = self._noise(batch, deterministic)
        self.iterations_done = 0
        now = time.perf_counter()
        while self.iterations_done < self._settings["n_iterations"] and now + HEADROOM * self._slowest < end:
            step = slice(self.iterations_done, self.iterations_done + 1)
            one = {f"noise.{name}": noise[f"noise.{name}"][step] for name in ("candidates", "terminal", "critic_pairs")}
            outputs = self._run({**batch, **noise, **one, **_state(outputs)}, options)
            self.iterations_done += 1
            before, now = now, time.perf_counter()
            self._slowest = max(now - before, FORGETTING * self._slowest)
        return outputs

    def _prior_action(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        action = (self._prior(batch) if self.plans else self._run(batch))["action"]
        if action.dtype.kind == "f" and not np.isfinite(action).all():
            raise ValueError("the policy's action is NaN or infinite, so the networks have diverged")
        return action

    def _prior(self, batch: Mapping[str, np.ndarray], mean: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """A plan of no iterations. :param batch: the graph's observations :param mean: the warm start"""
        n_envs = _length(batch)
        settings = dict(self._settings, n_iterations=0)
        noise = {
            f"noise.{name}": np.zeros(shape, np.int64 if name == "critic_pairs" else np.float32)
            for name, shape in model_file.noise_shapes(settings, n_envs).items()
        }
        if mean is None:
            mean = np.zeros((n_envs, settings["horizon"], settings["action_dim"]), np.float32)
        return self._run({**batch, **noise, "mean": mean})

    def _run(self, feeds: Mapping[str, np.ndarray], options: Any = None) -> dict[str, np.ndarray]:
        outputs = _refusing(lambda: self._session.run(self._outputs, feeds, options))
        return dict(zip(self._outputs, outputs, strict=True))

    def _check_graph(self) -> None:
        """:raises _Refused: if inputs or outputs are not those that the metadata speaks of"""
        wanted = {model_file.input_name(name, self._of_dict) for name in self._parts}
        if self.plans:
            wanted |= {"mean", *(f"noise.{name}" for name in model_file.noise_shapes(self._settings, 1))}
        there = {node.name for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        outputs = ["action", *(f"next_{name}" for name in STATE)] if self.plans else ["action"]
        if there != wanted or sorted(self._outputs) != sorted(outputs):
            raise _Refused("its graph does not have the inputs and outputs that its metadata speaks of")

    def _try(self) -> None:
        """
        Run twice, so that the first call takes no longer than others, and that a graph which can't run is refused here.

        :raises _Refused: for such a graph
        """
        batch = {
            model_file.input_name(name, self._of_dict): np.zeros((1, *part["shape"]), part["dtype"])
            for name, part in self._parts.items()
        }
        action = self.metadata["action"]
        for _ in range(2):
            outputs = _bounded(lambda options: self._run(self._cold(batch) if self.plans else batch, options))
            result = outputs["action"]
            if result.shape != (1, *action["shape"]) or result.dtype != np.dtype(action["dtype"]):
                raise _Refused(f"its action is {result.dtype} of shape {result.shape}, not what its metadata says")
        if self.plans and not np.isfinite(outputs["next_mean"]).all():
            raise _Refused("its networks give no finite value")
        if self.plans:
            cold = np.zeros_like(outputs["next_mean"])
            _bounded(lambda options: self._plan_until(np.inf, batch, cold, True, options))

    def _cold(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        mean = np.zeros((1, self._settings["horizon"], self._settings["action_dim"]), np.float32)
        return {**batch, "mean": mean, **self._noise(batch, True)}


def _state(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: outputs[f"next_{name}"] for name in STATE}


def _length(batch: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(batch.values())))


class _Refused(ValueError):
    """A graph that onnxruntime refuses, or that is not what its metadata says."""


def _session(content: bytes, threads: int) -> Any:
    """
    :param content: of an exported file, looked at by :mod:`sb3_boom.deployment.model_file`
    :param threads: of onnxruntime
    :return: its session
    :raises _Refused: for a graph that it does not take
    """
    try:
        import onnxruntime  # late: importing this module takes a tenth of the time without
    except ImportError as error:
        raise ImportError('an agent needs onnxruntime: pip install "sb3_boom[deploy]"') from error

    _bound_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry("session.use_env_allocators", "1")
    return _refusing(lambda: onnxruntime.InferenceSession(content, options, providers=PROVIDERS, enable_fallback=0))


@functools.cache
def _bound_memory() -> None:
    """Once per process."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    arena = onnxruntime.OrtArenaCfg({"max_mem": MAX_MEMORY, "arena_extend_strategy": 1})
    with contextlib.suppress(RuntimeError):  # the program has one of its own for all its sessions
        onnxruntime.create_and_register_allocator(memory, arena)


def _refusing(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except _Refused:
        raise
    except (ImportError, KeyboardInterrupt):
        raise
    except Exception as error:  # onnxruntime's have no common class
        lines = str(error).strip().splitlines() or [repr(error)]
        raise _Refused(f"onnxruntime refuses its graph ({lines[0][:300]})") from error


def _bounded(function: Callable[[Any], Any]) -> Any:
    """
    :param function: runs a graph for the first time, with the options that it is given
    :return: what it returns
    :raises _Refused: if it fails, or takes longer than :data:`MAX_TRIAL_SECONDS`
    """
    import onnxruntime

    options = onnxruntime.RunOptions()

    def stop() -> None:
        options.terminate = True

    timer = threading.Timer(MAX_TRIAL_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        return function(options)
    finally:
        timer.cancel()
