"""The replay buffer: sub-trajectories with what the planner did."""

import warnings
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom import storage
from sb3_boom.core.losses import WARMUP_STD
from sb3_boom.core.transfer import send, to_gpu
from sb3_boom.drawing import Episodes, Normalization, draw_by_episode, draw_by_value, finished_episodes

try:
    import psutil
except ImportError:
    psutil = None

SAMPLINGS = ("uniform", "episode")

TensorObs: TypeAlias = th.Tensor | dict[str, th.Tensor]


class SubTrajectories(NamedTuple):
    """
    ``B`` windows of ``H`` steps; a window that runs past its episode's end is masked there.

    :param observations: ``[H+1, B, ...]``, a dict of such for Dict spaces
    :param actions: in [-1, 1], ``[H, B, A]``
    :param planner_actions: the planner's choice before exploration noise, ``a_β``, ``[H, B, A]``
    :param planner_stds: std of the planner's last distribution, ``σ_β``, ``[H, B, A]``
    :param rewards: as learned from, by VecNormalize too, ``[H, B, 1]``
    :param terminations: 1 where the step ended the episode by termination, not by truncation, ``[H, B, 1]``
    :param valid: bool, whether step t belongs to the window's episode (its last step does), ``[H, B, 1]``
    :param indices: flat index of every step's transition, for :meth:`WeightedReplayBuffer.update_values`, ``[H, B]``
    """

    observations: TensorObs
    actions: th.Tensor
    planner_actions: th.Tensor
    planner_stds: th.Tensor
    rewards: th.Tensor
    terminations: th.Tensor
    valid: th.Tensor
    indices: th.Tensor


class WeightedReplayBuffer(ReplayBuffer):
    """
    Replay buffer for BOOM: draws windows of consecutive steps.

    Every environment has a ring of transitions that stores each observation once. The observation after a transition
    is the next row's, unless the episode ends there, or the data does: then ``final_slot`` says where it is kept
    apart. A window stops at the first such row, so none crosses an episode or the write head, and every stored
    transition can start one. Storage is allocated by the first :meth:`add`.

    :param buffer_size: transitions held by all environments together
    :param observation_space: any that SB3 preprocesses, Dict included
    :param action_space: Box
    :param device: where samples go, and the storage too if it fits
    :param n_envs: number of environments
    :param optimize_memory_usage: must be False: every observation is already stored once
    :param handle_timeout_termination: must be True: a truncation is never taken for a termination
    :param horizon: ``H``, steps of a window
    :param sampling: "uniform" over transitions (default), or "episode" as the authors' release: first a finished episode
        longer than ``horizon``, then a window inside it, which over-draws short episodes
    :param value_temperature: draw half of the windows by ``softmax(Q / (S · value_temperature))`` of their first transition,
        half uniformly; :meth:`update_values` keeps the values. Default None: no value weighting. Costs a pass over all
        stored values per draw.
    :ivar pos: row that the next step is written to
    :ivar full: whether rows have been overwritten
    :raises ValueError: for settings outside of these
    """

    obs_shape: Any
    _closing = False  # a class's attribute, for buffers that were pickled without

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        horizon: int = 3,
        sampling: str = "uniform",
        value_temperature: float | None = None,
    ) -> None:
        # ReplayBuffer's own constructor would allocate its flat arrays
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise ValueError("optimize_memory_usage must be False: WeightedReplayBuffer already stores every observation once")
        if not handle_timeout_termination:
            raise ValueError(
                "handle_timeout_termination must be True: WeightedReplayBuffer tells truncations from terminations"
            )
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, not {horizon}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, not {sampling!r}")
        if value_temperature is not None and value_temperature <= 0.0:
            raise ValueError(f"value_temperature must be positive or None, not {value_temperature}")
        if value_temperature is not None and sampling != "uniform":
            raise ValueError('value_temperature draws transitions, so it needs sampling="uniform"')
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = False
        self.handle_timeout_termination = True
        self.horizon = horizon
        # action, planner's action and std, reward, whether it terminated: one row, written and drawn at once
        self._step_widths = [self.action_dim] * 3 + [1, 1]
        self.sampling = sampling
        self.value_temperature = value_temperature
        self._storage: dict[str, th.Tensor] = {}
        self._final_observations: dict[str, th.Tensor] = {}
        self._free_slots = np.empty(0, dtype=np.int32)
        self._last_next_obs: dict[str, np.ndarray] = {}
        self._last_slots = np.empty(0, dtype=np.int32)
        self._episode_open = np.zeros(self.n_envs, dtype=bool)
        self._episodes: Episodes | None = None  # None: to be found anew
        self._n_overwritten = 0  # rows since they were found
        self._n_added = 0  # rows, overwritten ones too
        self._id = storage.new_id()  # of what is stored: a checkpoint adds to what it has of the same
        self._warn_if_too_large()
        self._slots = np.empty((0, self.n_envs), dtype=np.int32)  # final_slot, where the host reads it
        self._normalization = Normalization()

    def holds_terminations(self) -> bool:
        """:return: whether a stored step ended its episode by a termination; waits for the device"""
        return self.size() > 0 and bool(self._storage["steps"][: self.size(), :, -1].any())

    # ------------------------------------------------------------------ storing

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store one transition of every environment.

        An environment whose ``obs`` is not its previous ``next_obs`` was reset without a ``done`` (a second ``learn``,
        ``set_env``, a load): its episode is closed as truncated.

        :param obs: ``[n_envs, ...]``
        :param next_obs: ``[n_envs, ...]``, the final observation where ``done``
        :param action: scaled to [-1, 1], ``[n_envs, A]``
        :param reward: ``[n_envs]``
        :param done: whether the episode ended, either way, ``[n_envs]``
        :param infos: per environment; ``planner_action`` and ``planner_std`` (both ``[A]``) default to the action and
            ``e²``, ``TimeLimit.truncated`` tells a truncation from a termination
        :raises ValueError: for images with their channels last under a wrapper that puts them first
        """
        obs_rows, next_rows = self._as_rows(obs), self._as_rows(next_obs)
        if not self._storage:
            self._allocate(next_rows)
        done = np.asarray(done, dtype=bool).reshape(self.n_envs)
        pos = self.pos
        arrays = self._link_to_previous(obs_rows)
        if self.full:
            self._free(self._slots[pos])
            self._n_overwritten += 1
        slots = np.arange(self.n_envs, dtype=np.int32)  # the newest row's next observation has its environment's own slot
        ended = done.nonzero()[0]
        if len(ended):
            slots[ended] = self._take_slots(len(ended))
        dim = self.action_dim
        steps = np.zeros((self.n_envs, 3 * dim + 2), dtype=np.float32)
        steps[:, :dim] = steps[:, dim : 2 * dim] = np.asarray(action).reshape(self.n_envs, dim)
        steps[:, 2 * dim : 3 * dim], steps[:, -2] = WARMUP_STD, np.asarray(reward).reshape(-1)
        for i, info in enumerate(infos):
            if "planner_action" in info:
                steps[i, dim : 2 * dim], steps[i, 2 * dim : 3 * dim] = info["planner_action"], info["planner_std"]
        for i in ended.tolist():
            steps[i, -1] = not infos[i].get("TimeLimit.truncated", False)

        arrays |= {"steps": steps, "slots": slots, **{f"obs/{key}": rows for key, rows in obs_rows.items()}}
        self._slots[pos] = slots
        self._store(pos, arrays, slots, next_rows)
        if self.value_temperature is not None:
            self._storage["values"][pos] = self._mean_value()
        self._last_next_obs, self._last_slots, self._episode_open = next_rows, slots, ~done

        self.pos += 1
        self._n_added += 1
        if self.pos == self.buffer_size:
            self.full, self.pos = True, 0

    def _store(self, pos: int, arrays: dict[str, np.ndarray], slots: np.ndarray, finals: dict[str, np.ndarray]) -> None:
        """
        :param pos: row to write
        :param arrays: what to write there, by name, and what to write into the row before it
        :param slots: places of the next observations ``[n_envs]``
        :param finals: the next observations ``[n_envs, ...]``
        """
        device = self._storage["steps"].device
        if device.type == "cpu":  # numpy is quicker for a row
            for name, array in arrays.items():
                if not name.endswith("slots"):  # written already: the host's are the storage's own
                    self._storage[name].numpy()[pos] = array
            for key, rows in finals.items():
                self._final_observations[key].numpy()[slots] = rows
            return
        wanted = {**arrays, "places": slots.astype(np.int64), **{f"final/{key}": rows for key, rows in finals.items()}}
        sent = send(wanted, device)
        for name in arrays:
            if name.endswith("slots"):
                self._storage["final_slot"][pos if name == "slots" else pos - 1].copy_(sent[name])
            else:
                self._storage[name][pos].copy_(sent[name])
        for key, stored in self._final_observations.items():
            stored.index_copy_(0, sent["places"], sent[f"final/{key}"])

    def _as_rows(self, obs: np.ndarray | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """
        Observations by key ("" where the space is no Dict), as they are stored, ``[n_envs, ...]``, always a copy.

        :raises ValueError: for images with their channels last under a wrapper that puts them first
        """
        by_key = obs if isinstance(obs, dict) else {"": obs}
        shapes = self.obs_shape if isinstance(self.obs_shape, dict) else {"": self.obs_shape}
        rows = {}
        for key, shape in shapes.items():
            value = np.asarray(by_key[key])
            if value.ndim == 4 and value.shape[1:] != shape:
                raise ValueError(
                    f"images of shape {value.shape[1:]} do not fit the observation space's {shape}. VecNormalize keeps them "
                    "as they were before VecTransposeImage: wrap the other way round, VecNormalize(VecTransposeImage(env))"
                )
            space = self.observation_space[key] if key else self.observation_space  # type: ignore[index]
            # whole numbers, of which the first observation of a careless environment may be made, would cut off later ones
            is_real = np.issubdtype(space.dtype, np.floating) and not np.issubdtype(value.dtype, np.floating)
            dtype = np.dtype(np.float32) if is_real or value.dtype == np.float64 else value.dtype
            rows[key] = np.array(value, dtype=dtype).reshape(self.n_envs, *shape)
        return rows

    def _allocate(self, rows: dict[str, np.ndarray]) -> None:
        """Make the rings. :param rows: observations whose dtype and shape to take, ``[n_envs, ...]``"""
        shape = (self.buffer_size, self.n_envs)
        n_finals = self.n_envs + self.buffer_size * self.n_envs // 20 + 1
        device = self._storage_device(self._full_bytes(sum(row.nbytes for row in rows.values()) // self.n_envs))
        zeros = {
            "steps": ((sum(self._step_widths),), th.float32),
            "final_slot": ((), th.int32),
        }
        if self.value_temperature is not None:
            zeros["values"] = ((), th.float32)
        self._storage = {name: storage.zeros((*shape, *tail), dtype, device) for name, (tail, dtype) in zeros.items()}
        for key, row in rows.items():
            like = th.from_numpy(row)
            self._storage[f"obs/{key}"] = storage.zeros((*shape, *like.shape[1:]), like.dtype, device)
            self._final_observations[key] = storage.zeros((n_finals, *like.shape[1:]), like.dtype, device)
        self._free_slots = np.arange(n_finals - 1, self.n_envs - 1, -1, dtype=np.int32)
        self._mirror_slots()

    def _mirror_slots(self) -> None:
        """Keep ``final_slot`` where the host reads it without waiting; on a CPU that is the storage itself."""
        if self._storage:
            self._slots = self._storage["final_slot"].cpu().numpy()

    def _full_bytes(self, observation_bytes: int) -> int:
        """
        :param observation_bytes: of one observation
        :return: what the full buffer takes, with final observations for episodes of 20 steps
        """
        per_transition = observation_bytes * 21 // 20 + 4 * sum(self._step_widths) + 8
        return self.buffer_size * self.n_envs * per_transition

    def _warn_if_too_large(self) -> None:
        """As SB3's own: pages are taken as they are filled, so that a lack of memory would show after hours only."""
        if psutil is None:
            return
        shapes = self.obs_shape if isinstance(self.obs_shape, dict) else {"": self.obs_shape}
        dtypes = {key: (self.observation_space[key] if key else self.observation_space).dtype for key in shapes}  # type: ignore[index]
        itemsize = {key: 4 if dtype == np.float64 else np.dtype(dtype).itemsize for key, dtype in dtypes.items()}
        needed = self._full_bytes(sum(int(np.prod(shape)) * itemsize[key] for key, shape in shapes.items()))
        available = psutil.virtual_memory().available
        if needed > available:
            warnings.warn(
                f"the full replay buffer will take {needed / 1e9:.2f}GB, and {available / 1e9:.2f}GB of memory are free: "
                f"lower buffer_size, now {self.buffer_size * self.n_envs}",
                stacklevel=2,
            )

    def _storage_device(self, n_bytes: int) -> th.device:
        """The samples' device if half of its free memory holds the storage, else the CPU."""
        if self.device.type == "cuda" and n_bytes > 0.5 * th.cuda.mem_get_info(self.device)[0]:
            return th.device("cpu")
        return self.device

    def _link_to_previous(self, obs_rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """
        Join the last transition of every environment to the one about to be stored, or close its episode.

        :return: the last transitions' new ``final_slot`` ``[n_envs]`` as "last_slots", nothing if there are none
        """
        closing, self._closing = self._closing, False
        if not self._episode_open.any():
            return {}
        continues = self._episode_open & (not closing)
        for key, rows in obs_rows.items():
            continues &= (rows == self._last_next_obs[key]).reshape(self.n_envs, -1).all(axis=1)
        last_slots = self._last_slots.copy()
        last_slots[continues] = -1
        closed = (self._episode_open ^ continues).nonzero()[0]
        if len(closed):
            last_slots[closed] = self._take_slots(len(closed))
            places = dict(to=last_slots[closed].astype(np.int64), own=closed)
            at = send(places, self._storage["steps"].device)
            for finals in self._final_observations.values():
                finals[at["to"]] = finals[at["own"]]
        self._slots[self.pos - 1] = last_slots
        return {"last_slots": last_slots}

    def close_episodes(self) -> None:
        """What is added next does not follow on what was added last, whatever its observation is."""
        self._closing = True

    def _take_slots(self, n: int) -> np.ndarray:
        """Reserve ``n`` places for the final observations of ended episodes, growing the store where these are short."""
        self._episodes = None
        if n > len(self._free_slots):
            size = len(next(iter(self._final_observations.values())))
            extra = max(n, size // 2)
            self._final_observations = {
                key: th.cat([finals, finals.new_zeros(extra, *finals.shape[1:])])
                for key, finals in self._final_observations.items()
            }
            self._free_slots = np.concatenate([np.arange(size + extra - 1, size - 1, -1, dtype=np.int32), self._free_slots])
        taken, self._free_slots = self._free_slots[-n:], self._free_slots[:-n]
        return taken

    def _free(self, slots: np.ndarray) -> None:
        """Give back the places of rows about to be overwritten (an environment's own slot is never given back)."""
        freed = slots[slots >= self.n_envs]
        if len(freed):
            self._free_slots = np.concatenate([self._free_slots, freed])

    # ----------------------------------------------------------------- sampling

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SubTrajectories:  # type: ignore[override]
        """
        Draw windows of ``horizon`` steps.

        :param batch_size: number of windows ``B``
        :param env: normalises observations and rewards with its current statistics. Default None: as they were stored
        :return: the windows
        :raises ValueError: if there is nothing to draw from
        """
        if self.size() == 0:
            raise ValueError("the replay buffer is empty: store transitions (or call learn) before sampling")
        return self._windows(*(self._draw_by_episode if self.sampling == "episode" else self._draw)(batch_size), env)

    def newest(self, n_steps: int, env: VecNormalize | None = None) -> SubTrajectories:
        """
        The windows that start with the last transitions stored.

        :param n_steps: how many of every environment
        :param env: as in :meth:`sample`
        :return: ``B = n_steps * n_envs`` windows, oldest first
        :raises ValueError: if fewer are stored
        """
        if not 1 <= n_steps <= self.size():
            raise ValueError(f"n_steps must be between 1 and the {self.size()} stored, not {n_steps}")
        index = th.arange(n_steps * self.n_envs, device=self._storage["steps"].device)
        start = (self.pos - n_steps + index // self.n_envs) % self.buffer_size
        return self._windows(start, index % self.n_envs, env)

    def _windows(self, start: th.Tensor, env_index: th.Tensor, env: VecNormalize | None) -> SubTrajectories:
        """
        :param start: first rows ``[B]``
        :param env_index: their environments ``[B]``
        :param env: see :meth:`sample`
        :return: windows of ``horizon`` steps
        """
        steps = th.arange(self.horizon + 1, device=start.device).unsqueeze(1)
        rows = (start + steps) % self.buffer_size * self.n_envs + env_index  # [H+1, B]
        indices = rows[:-1]

        slots = _take(self._flat("final_slot"), indices)
        ends = slots >= 0
        valid = ends.cumsum(0) == ends  # no earlier step ended the episode
        obs = {key: self._observations(key, rows, slots) for key in self._final_observations}
        actions, planner_actions, planner_stds, rewards, terminations = _take(self._flat("steps"), indices).split(
            self._step_widths, dim=-1
        )
        if env is not None:
            obs, rewards = self._normalization(obs, rewards, env)
        batch = SubTrajectories(
            obs if isinstance(self.obs_shape, dict) else obs[""],  # type: ignore[arg-type]
            actions,
            planner_actions,
            planner_stds,
            rewards,
            terminations,
            valid.unsqueeze(-1),
            indices,
        )
        if indices.device.type == self.device.type:  # one of them may lack its number
            return batch
        return SubTrajectories(*(self._to_device(x) for x in batch))

    def _flat(self, name: str) -> th.Tensor:
        return self._storage[name].flatten(0, 1)

    def _to_device(self, x: TensorObs) -> Any:
        if isinstance(x, dict):
            return {key: self._to_device(value) for key, value in x.items()}
        if self.device.type != "cuda" or x.device.type == "cuda":
            return x.to(self.device)
        return to_gpu(x, self.device)

    def _draw(self, batch_size: int) -> tuple[th.Tensor, th.Tensor]:
        """First rows and environments of windows, ``[B]`` each; uniform, or half of them by value."""
        device = self._storage["steps"].device
        index = th.randint(self.size() * self.n_envs, (batch_size,), device=device)
        if self.value_temperature is not None:
            values = self._flat("values")[: self.size() * self.n_envs]
            by_value = draw_by_value(values, self.value_temperature, batch_size)
            index = th.where(th.rand(batch_size, device=device) < 0.5, by_value, index)
        return index // self.n_envs, index % self.n_envs

    def can_sample(self) -> bool:
        """:return: whether there is anything to draw from; with ``sampling="episode"`` a finished episode, long enough"""
        return self.sampling == "uniform" or (self.size() > 0 and len(self._finished_episodes().begin) > 0)

    def _finished_episodes(self) -> Episodes:
        """Those to draw from; looked for only when they may be others than the last time."""
        known = self._episodes
        if known is None or known.horizon != self.horizon or self._n_overwritten > known.lasts:
            first = self.pos if self.full else 0  # the oldest row
            slots = np.roll(self._slots, -first, axis=0)[: self.size()]
            known = finished_episodes(slots, self.n_envs, self.horizon, self._storage["steps"].device)
            self._episodes, self._n_overwritten = known, 0
        gone = self._n_overwritten
        return known._replace(begin=(known.begin - gone).clamp(min=0), end=known.end - gone)

    def _draw_by_episode(self, batch_size: int) -> tuple[th.Tensor, th.Tensor]:
        """First rows and environments of windows inside uniformly drawn finished episodes, ``[B]`` each."""
        first, env_index = draw_by_episode(self._finished_episodes(), batch_size)
        return (first + (self.pos if self.full else 0)) % self.buffer_size, env_index

    def _observations(self, key: str, rows: th.Tensor, slots: th.Tensor) -> th.Tensor:
        """
        :param rows: flat indices of the steps and of the row after them, ``[H+1, B]``
        :param slots: where the observation after a step is kept apart, else -1, ``[H, B]``
        :return: observations before and after the steps, ``[H+1, B, ...]``
        """
        obs = _take(self._flat(f"obs/{key}"), rows)
        finals = _take(self._final_observations[key], slots.clamp(min=0))
        kept_apart = (slots >= 0).view(*slots.shape, *[1] * (obs.ndim - 2))
        th.where(kept_apart, finals, obs[1:], out=obs[1:])
        return obs

    # ------------------------------------------------------------ value weights

    def update_values(self, indices: th.Tensor, values: th.Tensor, valid: th.Tensor, scale: th.Tensor | float) -> None:
        """
        Refresh the values that weighted drawing goes by; does nothing without ``value_temperature``.

        :param indices: from a sample, ``[H, B]``
        :param values: Q-values of these transitions, ``[H, B, 1]``
        :param valid: from the same sample, ``[H, B, 1]``
        :param scale: Q scale ``S``, scalar
        """
        if self.value_temperature is None:
            return
        stored = self._flat("values")
        # an invalid step writes what its window's first one, which is valid, does: to select would wait for the device
        indices, scaled = (th.where(valid.squeeze(-1), x, x[0]) for x in (indices, (values / scale).squeeze(-1)))
        stored[indices.to(stored.device)] = scaled.to(stored.device, stored.dtype)

    def _mean_value(self) -> th.Tensor | float:
        """Mean value of what is stored: what new transitions start from."""
        n_rows = self.size()
        return self._storage["values"][:n_rows].mean() if n_rows else 0.0

    # -------------------------------------------------------------------- SB3's

    def reset(self) -> None:
        """Forget everything stored."""
        super().reset()
        self._storage, self._final_observations, self._last_next_obs = {}, {}, {}
        self._normalization = Normalization()
        self._episode_open = np.zeros(self.n_envs, dtype=bool)
        self._episodes = None
        self._n_added, self._id = 0, storage.new_id()

    def draw_like(
        self,
        horizon: int,
        sampling: str = "uniform",
        value_temperature: float | None = None,
        handle_timeout_termination: bool = True,
    ) -> None:
        """
        Draw by other settings than those it was made with. Values that were not kept so far start alike.

        :param horizon: see the class, as for all that follow
        :param sampling: see there
        :param value_temperature: see there
        :param handle_timeout_termination: see there
        """
        self.horizon, self.sampling, self.value_temperature = horizon, sampling, value_temperature
        if self.value_temperature is None:
            self._storage.pop("values", None)
        elif self._storage:
            self._storage.setdefault("values", th.zeros(self.buffer_size, self.n_envs))

    def move_storage(self) -> None:
        """Move what is stored to where the samples go, if it fits there: a pickled buffer comes back on the CPU."""
        device = self._storage_device(sum(tensor.nbytes for tensor in self._storage.values()))
        for name in ("_storage", "_final_observations"):
            setattr(self, name, {key: tensor.to(device) for key, tensor in getattr(self, name).items()})
        self._episodes = None
        self._mirror_slots()

    def __getstate__(self) -> dict[str, Any]:
        return dict(storage.content(self), _normalization=None, _slots=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        storage.set_content(self, state)
        self._normalization = Normalization()
        self._slots = np.empty((0, self.n_envs), dtype=np.int32)
        self._mirror_slots()


def _take(stored: th.Tensor, indices: th.Tensor) -> th.Tensor:
    """``stored[indices]``; on a CPU, index_select copies a row at once, where indexing copies number by number."""
    return stored.index_select(0, indices.flatten()).unflatten(0, indices.shape)
