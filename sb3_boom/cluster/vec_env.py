"""Environments in Ray actors, on any node of a cluster."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs

from sb3_boom.cluster.connection import LOCAL, connect, import_ray

START_S = 180.0  # for the actors to start, which import what the environments need


class EnvGroup:
    """
    Some of the environments, in an actor.

    :param env_fns: that make them
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        self.envs = [env_fn() for env_fn in env_fns]

    def spaces(self) -> tuple[gym.Space, gym.Space]:
        """:return: of observations, of actions"""
        return self.envs[0].observation_space, self.envs[0].action_space

    def where(self) -> tuple[str, int]:
        """:return: node and process"""
        return os.uname().nodename, os.getpid()

    def step(self, actions: Any) -> tuple[VecEnvObs, Any, Any, list[dict], list[dict]]:
        """
        :param actions: one for each of the environments
        :return: observations, stacked; rewards, whether an episode ended, infos, and infos of resets
        """
        steps = [self._step(env, action) for env, action in zip(self.envs, actions, strict=True)]
        obs, rewards, dones, infos, reset_infos = zip(*steps, strict=True)
        return _stack_obs(obs, self.envs[0].observation_space), np.stack(rewards), np.stack(dones), [*infos], [*reset_infos]

    @staticmethod
    def _step(env: gym.Env, action: Any) -> tuple[Any, Any, bool, dict, dict]:
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        reset_info: dict = {}
        info["TimeLimit.truncated"] = truncated and not terminated
        if done:
            info["terminal_observation"] = obs
            obs, reset_info = env.reset()
        return obs, reward, done, info, reset_info

    def reset(self, seeds: Sequence[int | None], options: Sequence[dict]) -> tuple[VecEnvObs, list[dict]]:
        """
        :param seeds: one for each of the environments
        :param options: the same
        :return: observations, stacked, and infos
        """
        resets = []
        for env, seed, option in zip(self.envs, seeds, options, strict=True):
            resets.append(env.reset(seed=seed, **({"options": option} if option else {})))
        obs, infos = zip(*resets, strict=True)
        return _stack_obs(obs, self.envs[0].observation_space), [*infos]

    def render(self) -> list[Any]:
        """:return: images"""
        return [env.render() for env in self.envs]

    def has_attr(self, name: str) -> bool:
        """:param name: of an attribute. :return: whether all environments have it"""
        try:
            for env in self.envs:
                env.get_wrapper_attr(name)
        except AttributeError:
            return False
        return True

    def get_attr(self, indices: Sequence[int], name: str) -> list[Any]:
        """:param indices: within the group. :param name: of an attribute. :return: its values"""
        return [self.envs[i].get_wrapper_attr(name) for i in indices]

    def set_attr(self, indices: Sequence[int], name: str, value: Any) -> list[None]:
        """:param indices: within the group. :param name: of an attribute. :param value: of all"""
        for i in indices:
            setattr(self.envs[i], name, value)
        return [None] * len(indices)

    def env_method(self, indices: Sequence[int], name: str, args: tuple, kwargs: dict) -> list[Any]:
        """:param indices: within the group. :param name: of a method. :param args: its. :param kwargs: its. :return: all"""
        return [self.envs[i].get_wrapper_attr(name)(*args, **kwargs) for i in indices]

    def is_wrapped(self, indices: Sequence[int], wrapper: type[gym.Wrapper]) -> list[bool]:
        """:param indices: within the group. :param wrapper: a class. :return: whether an environment is wrapped by it"""
        return [is_wrapped(self.envs[i], wrapper) for i in indices]

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


class RayVecEnv(VecEnv):
    """
    Environments in Ray actors, on any node of the cluster; otherwise as SB3's SubprocVecEnv.

    An actor whose process or node dies is started anew, with a warning that names it. The episodes of its environments end as
    truncated, where they were last seen, with reward 0 for the step that was lost; new ones begin, seeded as far as
    :meth:`seed` was called. What :meth:`set_attr` and :meth:`env_method` have changed in them is lost. An exception of an
    environment is no death: it is raised here.

    Connects to the cluster at ``RAY_ADDRESS``, else to a local one, unless ``ray.init`` was called before.

    :param env_fns: each makes one environment
    :param envs_per_actor: how many share an actor; more make a step cheaper, if they are quick, and one after the other
    :param max_restarts: how often an actor is started anew, for each of them, before its death is an error
    :param num_cpus: that an actor reserves on its node; a fraction lets several share one
    :param num_gpus: the same
    :param timeout: seconds to wait for an answer
    :raises ValueError: without ``env_fns``, or for a number out of range
    :raises ImportError: without Ray
    :raises TimeoutError: if the cluster has no room for the actors, or if one does not answer
    :raises ConnectionError: if an actor dies more than ``max_restarts`` times
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        envs_per_actor: int = 1,
        max_restarts: int = 3,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        timeout: float = 600.0,
    ) -> None:
        if not env_fns:
            raise ValueError("env_fns is empty: give a function for each environment")
        for name, value, least in (("envs_per_actor", envs_per_actor, 1), ("max_restarts", max_restarts, 0)):
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        self._ray = import_ray()
        self._shuts_down = connect(os.environ.get("RAY_ADDRESS") or LOCAL)
        self.max_restarts, self.timeout, self.closed = max_restarts, timeout, False
        self._groups = [list(range(i, min(i + envs_per_actor, len(env_fns)))) for i in range(0, len(env_fns), envs_per_actor)]
        self._env_fns = list(env_fns)
        self._remote = self._ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(EnvGroup)
        self._needs = f"{len(self._groups)} actors with {num_cpus:g} CPUs and {num_gpus:g} GPUs each"
        self._restarts = [0] * len(self._groups)
        self._last: list[VecEnvObs | None] = [None] * len(self._groups)  # observations last seen
        self._begun: dict[int, tuple[VecEnvObs, list[dict]]] = {}  # of groups started anew, whose old episodes are still open
        self._steps: dict[int, Any] = {}
        self._base_seeds: list[int | None] = [None] * len(env_fns)
        self._where: list[tuple[str, int] | None] = [None] * len(self._groups)
        self._actors = [self._start(group) for group in range(len(self._groups))]
        try:
            spaces = self._ray.get([actor.spaces.remote() for actor in self._actors], timeout=START_S)
            self._where = self._ray.get([actor.where.remote() for actor in self._actors], timeout=START_S)
        except self._ray.exceptions.GetTimeoutError as error:
            self._kill()
            free = self._ray.available_resources()
            raise TimeoutError(
                f"{self._needs} have not started in {START_S:g} s; free are {free.get('CPU', 0):g} CPUs and "
                f"{free.get('GPU', 0):g} GPUs. Take more envs_per_actor, or less num_cpus"
            ) from error
        except BaseException:
            self._kill()
            raise
        super().__init__(len(env_fns), *spaces[0])

    # ------------------------------------------------------------- actors

    def _start(self, group: int) -> Any:
        return self._remote.remote([self._env_fns[i] for i in self._groups[group]])

    def _kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._shuts_down:
            self._ray.shutdown()

    def _get(self, group: int, ref: Any) -> Any:
        """
        :param group: that was asked
        :param ref: to its answer
        :return: the answer
        :raises ray.exceptions.RayActorError: if it is dead
        :raises TimeoutError: if it does not answer
        """
        try:
            return self._ray.get(ref, timeout=self.timeout)
        except self._ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(
                f"{self._name(group)} has not answered for {self.timeout:g} s: its environment hangs, or "
                "needs a longer timeout"
            ) from error

    def _name(self, group: int) -> str:
        first, last, where = self._groups[group][0], self._groups[group][-1], self._where[group]
        which = f"environment {first}" if first == last else f"environments {first} to {last}"
        return f"actor {group} of the RayVecEnv ({which}{f', process {where[1]} on {where[0]}' if where else ''})"

    def _start_anew(self, group: int, error: BaseException) -> None:
        """
        :param group: whose actor is dead
        :param error: that tells so
        :raises ConnectionError: if that is once too often
        """
        name, reason = self._name(group), str(error).strip().splitlines()[0]
        while True:
            if self._restarts[group] >= self.max_restarts:
                raise ConnectionError(
                    f"{name} died, after {self._restarts[group]} restarts (max_restarts): {reason}"
                ) from error
            self._restarts[group] += 1
            warnings.warn(
                f"{name} died and is started anew, {self._restarts[group]} of {self.max_restarts} times; its episodes are "
                f"closed as truncated ({reason})",
                stacklevel=4,
            )
            self._actors[group] = actor = self._start(group)
            seeds = [self._base_seeds[i] for i in self._groups[group]]
            fresh = [None if seed is None else seed + 100_003 * self._restarts[group] for seed in seeds]
            try:
                self._begun[group] = self._get(group, actor.reset.remote(fresh, [{} for _ in seeds]))
                self._where[group] = self._get(group, actor.where.remote())
                return
            except self._ray.exceptions.RayActorError as again:
                error = again

    def _ask(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        """
        Ask actors side by side; again those that were started anew meanwhile.

        :param method: of :class:`EnvGroup`
        :param arguments: by group
        :return: answers by group
        """
        refs = {group: getattr(self._actors[group], method).remote(*args) for group, args in arguments.items()}
        answers = {}
        for group, ref in refs.items():
            while group not in answers:
                try:
                    answers[group] = self._get(group, ref)
                except self._ray.exceptions.RayActorError as error:
                    self._start_anew(group, error)
                    ref = getattr(self._actors[group], method).remote(*arguments[group])
        return answers

    # ------------------------------------------------------- SB3's methods

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        :param seed: of the first environment, others count up from it
        :return: the seeds, used by the next :meth:`reset`
        """
        self._base_seeds = list(super().seed(seed))
        return self._base_seeds

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: one for each environment
        """
        for group, members in enumerate(self._groups):
            if group not in self._begun:
                self._steps[group] = self._actors[group].step.remote([actions[i] for i in members])

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, whether episodes ended, infos
        """
        results = []
        steps, self._steps = self._steps, {}
        for group in range(len(self._groups)):
            if group in steps:
                try:
                    results.append(self._get(group, steps[group]))
                    self._last[group] = results[-1][0]
                    continue
                except self._ray.exceptions.RayActorError as error:
                    self._start_anew(group, error)
            results.append(self._closed(group))
        obs, rewards, dones, infos, reset_infos = zip(*results, strict=True)
        self.reset_infos = [info for part in reset_infos for info in part]
        return self._joined(obs), np.concatenate(rewards), np.concatenate(dones), [info for part in infos for info in part]

    def _closed(self, group: int) -> tuple[VecEnvObs, Any, Any, list[dict], list[dict]]:
        """:param group: that was started anew. :return: the step that ends its old episodes"""
        obs, reset_infos = self._begun.pop(group)
        last, self._last[group] = self._last[group], obs
        n = len(self._groups[group])
        infos: list[dict] = [{"TimeLimit.truncated": True, "actor_restarted": True} for _ in range(n)]
        for i, info in enumerate(infos):
            info["terminal_observation"] = self._one(obs if last is None else last, i)
        return obs, np.zeros(n, dtype=np.float32), np.ones(n, dtype=bool), infos, reset_infos

    def _one(self, obs: VecEnvObs, i: int) -> Any:
        if isinstance(obs, dict):
            return {key: np.array(value[i]) for key, value in obs.items()}
        return tuple(np.array(part[i]) for part in obs) if isinstance(obs, tuple) else np.array(obs[i])

    def _joined(self, parts: Sequence[VecEnvObs]) -> VecEnvObs:
        """:param parts: observations of the groups, which lie in the object store. :return: those of all, writable"""
        first = parts[0]
        if isinstance(first, dict):
            return {key: np.concatenate([part[key] for part in parts]) for key in first}  # type: ignore[index, call-overload]
        if isinstance(first, tuple):
            return tuple(np.concatenate([part[i] for part in parts]) for i in range(len(first)))  # type: ignore[index]
        return np.concatenate(parts)  # type: ignore[arg-type]

    def reset(self) -> VecEnvObs:
        """
        :return: observations
        """
        arguments = {
            group: ([self._seeds[i] for i in members], [self._options[i] for i in members])
            for group, members in enumerate(self._groups)
        }
        answers = self._ask("reset", arguments)
        self._begun, self._steps = {}, {}
        self._last = [answers[group][0] for group in range(len(self._groups))]
        self.reset_infos = [info for group in range(len(self._groups)) for info in answers[group][1]]
        self._reset_seeds()
        self._reset_options()
        return self._joined([obs for obs in self._last if obs is not None])

    def close(self) -> None:
        """Close the environments, and end their actors."""
        if self.closed:
            return
        self.closed = True
        if self._ray.is_initialized():
            self._ray.wait([actor.close.remote() for actor in self._actors], num_returns=len(self._actors), timeout=10.0)
            self._kill()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        :return: an image of each environment
        """
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode}, but this method assumes it is `rgb_array` to obtain images.",
                stacklevel=2,
            )
            return [None] * self.num_envs
        answers = self._ask("render", {group: () for group in range(len(self._groups))})
        return [image for group in range(len(self._groups)) for image in answers[group]]

    def has_attr(self, attr_name: str) -> bool:
        """
        :param attr_name: of the environments
        :return: whether all have it
        """
        return all(self._ask("has_attr", {group: (attr_name,) for group in range(len(self._groups))}).values())

    def _by_index(self, method: str, indices: VecEnvIndices, *arguments: Any) -> list[Any]:
        chosen = [range(self.num_envs)[i] for i in self._get_indices(indices)]
        within: dict[int, list[int]] = {}
        for i in dict.fromkeys(chosen):
            within.setdefault(i // len(self._groups[0]), []).append(i % len(self._groups[0]))
        answers = self._ask(method, {group: (members, *arguments) for group, members in within.items()})
        by_index = {self._groups[g][i]: answer for g in within for i, answer in zip(within[g], answers[g], strict=True)}
        return [by_index[i] for i in chosen]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        :param attr_name: of the environments
        :param indices: of which of them
        :return: its values
        """
        return self._by_index("get_attr", indices, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        :param attr_name: of the environments
        :param value: for all of those
        :param indices: which of them
        """
        self._by_index("set_attr", indices, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        :param method_name: of the environments
        :param method_args: its arguments
        :param indices: which of them
        :param method_kwargs: its arguments
        :return: what it returned
        """
        return self._by_index("env_method", indices, method_name, method_args, method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        :param wrapper_class: to look for
        :param indices: in which of them
        :return: whether an environment has it
        """
        return self._by_index("is_wrapped", indices, wrapper_class)
