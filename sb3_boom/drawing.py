"""Which windows are drawn from a replay buffer, and how what is drawn is normalised."""

from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom.core.transfer import send


class Episodes(NamedTuple):
    """
    The finished episodes longer than ``horizon``, rows counted from the oldest one.

    :param begin: first rows ``[n]``
    :param end: last rows ``[n]``
    :param env_index: environments ``[n]``
    :param horizon: what they were found for
    :param lasts: how many rows may be overwritten until one of them is too short
    """

    begin: th.Tensor
    end: th.Tensor
    env_index: th.Tensor
    horizon: int
    lasts: int


def finished_episodes(slots: np.ndarray, n_envs: int, horizon: int, device: th.device) -> Episodes:
    """
    :param slots: where the observation after a row is kept apart, of which those from ``n_envs`` on are of ended episodes;
        the oldest row first, ``[n_rows, n_envs]``
    :param n_envs: number of environments
    :param horizon: ``H``
    :param device: where to draw
    :return: the episodes to draw from
    """
    env_index, end = (slots.T >= n_envs).nonzero()
    previous_end = np.concatenate([[-1], end[:-1]])
    new_env = np.concatenate([[-1], env_index[:-1]]) != env_index
    begin = np.where(new_env, 0, previous_end + 1)
    long_enough = end - begin + 1 > horizon
    found = dict(begin=begin[long_enough], end=end[long_enough], env_index=env_index[long_enough])
    lasts = int(found["end"].min()) - horizon if long_enough.any() else len(slots)
    return Episodes(**send(found, device), horizon=horizon, lasts=lasts)


def draw_by_episode(episodes: Episodes, batch_size: int) -> tuple[th.Tensor, th.Tensor]:
    """
    :param episodes: to draw from, alike
    :param batch_size: ``B``
    :return: first rows and environments of windows inside them, ``[B]`` each
    :raises ValueError: if there are none
    """
    begin, end, env_index, horizon, _ = episodes
    if len(begin) == 0:
        raise ValueError(
            f'sampling="episode" found no finished episode longer than horizon={horizon}: '
            'collect one first (learning_starts), or use sampling="uniform"'
        )
    episode = th.randint(len(begin), (batch_size,), device=begin.device)
    begin = begin[episode]
    n_windows = end[episode] - begin + 2 - horizon
    offset = (th.rand(batch_size, device=begin.device) * n_windows).long().clamp(max=n_windows - 1)
    return begin + offset, env_index[episode]


def draw_by_value(values: th.Tensor, temperature: float, batch_size: int) -> th.Tensor:
    """
    :param values: of the transitions, ``[n]``
    :param temperature: ``τ``
    :param batch_size: ``B``
    :return: transitions drawn by ``softmax(values / τ)``, ``[B]``
    """
    cumulated = (values.double() / temperature).softmax(0).cumsum(0)
    # the last sum is 1 only up to rounding, so scale the draw to it
    draw = th.rand(batch_size, device=values.device, dtype=cumulated.dtype) * cumulated[-1]
    return th.searchsorted(cumulated, draw, right=True).clamp(max=len(cumulated) - 1)


class Normalization:
    """VecNormalize's arithmetic, where the data lies. Its means and variances are sent there only when they have changed."""

    def __init__(self) -> None:
        self._statistics: dict[str, tuple[np.ndarray, np.ndarray, th.Tensor]] = {}

    def __call__(
        self, obs: dict[str, th.Tensor], rewards: th.Tensor, env: VecNormalize
    ) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """
        :param obs: observations by their key, ``[H+1, B, ...]``
        :param rewards: ``[H, B, 1]``
        :param env: whose statistics to take
        :return: both, normalised as far as the environment does so
        """
        if env.norm_obs:
            obs = dict(obs)
            for key in env.norm_obs_keys or [""]:
                rms = env.obs_rms[key] if isinstance(env.obs_rms, dict) else env.obs_rms
                known = self._statistics.get(key)
                if known is None or known[0] is not rms.mean or known[1] is not rms.var:
                    mean_and_std = np.stack([rms.mean, np.sqrt(rms.var + env.epsilon)]).astype(np.float32)
                    known = (rms.mean, rms.var, send({"": mean_and_std}, obs[key].device)[""])
                    self._statistics[key] = known
                mean, std = known[2]
                obs[key] = ((obs[key] - mean) / std).clamp(-env.clip_obs, env.clip_obs)
        if env.norm_reward:
            rewards = (rewards / float(np.sqrt(env.ret_rms.var + env.epsilon))).clamp(-env.clip_reward, env.clip_reward)
        return obs, rewards
