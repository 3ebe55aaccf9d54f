"""What a model promises, held against what comes: episodes of its own, with random numbers of its own."""

import contextlib
import random
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage

from sb3_boom.boom import BOOM
from sb3_boom.core import planner
from sb3_boom.core.planner import statistic_names
from sb3_boom.waits import evaluation_watched

DEPTH = 10  # steps looked ahead
MAX_STARTS = 2_000  # states that predictions start from
CLEAR_OF_THE_END = 0.5  # weight of the critics' word at a truncation, above which a return counts as unknown


@dataclass
class Episode:
    """
    An episode as the model sees it: observations and rewards are normalised as in training.

    :param observations: by key, "" without a Dict, ``[T + 1, ...]``
    :param actions: in [-1, 1], ``[T, A]``
    :param rewards: ``[T]``
    :param raw_rewards: the environment's, ``[T]``
    :param terminated: whether its end is a termination
    :param values: what the plans promised, NaN without plans, ``[T]``
    :param statistics: of the plans, ``[T, S]``, see :func:`~sb3_boom.core.planner.statistic_names`
    :param seconds: that each action took, of all environments together, ``[T]``
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    raw_rewards: np.ndarray
    terminated: bool
    values: np.ndarray
    statistics: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)


@contextlib.contextmanager
def own_randomness(device: th.device, seed: int) -> Iterator[None]:
    """
    Draw from generators seeded anew meanwhile; those of the process go on as if nothing had been.

    :param device: of the model
    :param seed: of torch's, numpy's and Python's
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        th.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


_seeded: weakref.WeakSet[VecEnv] = weakref.WeakSet()
_unseedable: weakref.WeakSet[VecEnv] = weakref.WeakSet()


def seed_or_warn(env: VecEnv, seed: int) -> None:
    """
    :param env: to seed from its next reset on. The first time it is reset once, since only then does it look at its seed
    :param seed: of the first environment
    """
    if env in _unseedable:
        return
    try:
        env.seed(seed)
        if env not in _seeded:
            env.reset()
            env.seed(seed)
        _seeded.add(env)
    except Exception as error:
        env._reset_seeds()
        _unseedable.add(env)
        warnings.warn(
            f"the environment can't be seeded ({error}): episodes differ from one evaluation to the next", stacklevel=2
        )


def check_spaces(model: BOOM, env: VecEnv) -> None:
    """
    :param model: to act
    :param env: to act in
    :raises ValueError: if they do not fit
    """

    def shapes(space: spaces.Space) -> dict[str, Any]:
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        return {key: part.shape for key, part in parts.items()}

    theirs: list[spaces.Space] = [env.observation_space]
    with contextlib.suppress(Exception):  # not an image
        theirs.append(VecTransposeImage(env).observation_space)
    if shapes(model.observation_space) not in [shapes(space) for space in theirs]:
        raise ValueError(
            f"the evaluation environment's observations, {env.observation_space}, are not the model's, "
            f"{model.observation_space}: wrap it as the training environment"
        )
    ours, other = model.action_space, env.action_space
    assert isinstance(ours, spaces.Box)
    if not isinstance(other, spaces.Box) or not all(
        np.array_equal(getattr(ours, bound), getattr(other, bound)) for bound in ("low", "high")
    ):
        raise ValueError(f"the evaluation environment's actions, {other}, are not the model's, {ours}")


def collect(
    model: BOOM, env: VecEnv, n_episodes: int, seed: int, planned: bool, deterministic: bool = True, max_steps: int = 5_000
) -> list[Episode]:
    """
    Let a model act; draws from the process's generators, see :func:`own_randomness`.

    :param model: acts
    :param env: acted in, seeded at first
    :param n_episodes: how many to wait for, of all environments together
    :param seed: of the environments
    :param planned: by the planner, else by its prior
    :param deterministic: as in ``predict``
    :param max_steps: of the environments together; unfinished episodes are returned then as if they were truncated
    :return: the episodes
    """
    policy, normalizer = model.policy, model.get_vec_normalize_env()
    policy.set_training_mode(False)
    seed_or_warn(env, seed)
    last: Any = env.reset()
    n_envs, mean = env.num_envs, policy.initial_mean(env.num_envs)
    names = statistic_names(policy.planner_config.horizon)
    running: list[list[tuple]] = [[] for _ in range(n_envs)]
    finished: list[Episode] = []
    for _ in range(max_steps):
        start = time.perf_counter()
        tensors, _ = policy.obs_to_tensor(last)
        if planned:
            plan = policy.plan(tensors, mean, deterministic)
            mean, scaled = plan.mean, plan.planner_action.cpu().numpy()
            values, statistics = plan.value.cpu().numpy(), plan.statistics.cpu().numpy()
        else:
            with th.no_grad():
                scaled = policy(tensors, deterministic).cpu().numpy()
            values, statistics = np.full(n_envs, np.nan), np.full((n_envs, len(names)), np.nan)
        seconds = time.perf_counter() - start
        following, rewards, dones, infos = env.step(policy.to_action_space(scaled))
        original = getattr(env, "get_original_reward", lambda given=rewards: given)()
        seen = original if normalizer is None else normalizer.normalize_reward(np.array(original, dtype=np.float64))
        for i in range(n_envs):
            running[i].append((_row(last, i), scaled[i], seen[i], original[i], values[i], statistics[i], seconds))
            if dones[i]:
                truncated = infos[i].get("TimeLimit.truncated", False)
                final = infos[i].get("terminal_observation")
                at_end = {"": final} if final is not None and not isinstance(final, dict) else final
                final_row = _row(following, i) if at_end is None else at_end
                finished.append(_episode(running[i], final_row, not truncated))
                running[i] = []
                mean[i] = 0.0
        last = following
        if len(finished) >= n_episodes:
            return finished
    cut = [_episode(rows, _row(last, i), False) for i, rows in enumerate(running) if rows]
    return [*finished, *cut]


def _row(obs: Any, index: int) -> dict[str, np.ndarray]:
    """:param obs: of a VecEnv :param index: an environment. :return: its own, by key"""
    return {key: value[index] for key, value in (obs if isinstance(obs, dict) else {"": obs}).items()}


def _episode(rows: list[tuple], final: dict[str, np.ndarray], terminated: bool) -> Episode:
    by_step, *others = zip(*rows, strict=True)
    observations = {key: np.stack([*(obs[key] for obs in by_step), final[key]]) for key in final}
    actions, rewards, raw_rewards, values, statistics, seconds = (np.array(column) for column in others)
    return Episode(observations, actions, rewards, raw_rewards, terminated, values, statistics, seconds)


def encode(model: BOOM, episode: Episode) -> th.Tensor:
    """
    :param model: whose encoder
    :param episode: ``T`` steps
    :return: latents ``[T + 1, L]``
    """
    obs = episode.observations
    tensors, _ = model.policy.obs_to_tensor(obs[""] if set(obs) == {""} else obs)
    with th.no_grad():
        return model.policy.world_model.encode(model.policy.features(tensors))


def mean_value(model: BOOM, z: th.Tensor, actions: th.Tensor | None = None) -> th.Tensor:
    """
    :param model: whose critics
    :param z: latents ``[..., L]``
    :param actions: ``[..., A]``. Default: the prior's
    :return: mean of all critics, ``[...]``
    """
    policy = model.policy
    with th.no_grad():
        actions = policy.actor(z)[0].tanh() if actions is None else actions
        critics = th.arange(policy.critic.n_critics, device=z.device)
        return policy.critic.values(z, actions, critics).mean(dim=0).squeeze(-1)


def open_loop(model: BOOM, episodes: list[Episode], depth: int = DEPTH) -> dict[str, np.ndarray]:
    """
    Errors of predictions that follow the actions taken and see nothing on their way, by how far ahead they are.

    :param model: predicts
    :param episodes: to start from, at every step or every few
    :param depth: ``D`` steps
    :return: mean over starts, ``[D]`` each, NaN where no episode is as long: ``latent``, squared distance as a part of how
        far the latent has moved, so that 1 is no better than to predict no change; ``reward``, absolute error;
        ``reward_constant``, that of the mean reward in its place; ``termination``, absolute error of the probability;
        ``value``, absolute difference between the critics' values of the predicted and of the encoded state
    """
    names = ("latent", "moved", "reward", "reward_constant", "termination", "value")
    sums, counts = {name: np.zeros(depth) for name in names}, np.zeros(depth)
    world, device = model.policy.world_model, model.device
    stride = max(1, sum(map(len, episodes)) // MAX_STARTS)
    mean_reward = float(np.mean(np.concatenate([episode.rewards for episode in episodes])))
    for episode in episodes:
        encoded, steps = encode(model, episode), len(episode)
        actions = th.as_tensor(episode.actions, dtype=th.float32, device=device)
        rewards = th.as_tensor(episode.rewards, dtype=th.float32, device=device)
        true_values = mean_value(model, encoded)
        starts = th.arange(0, steps, stride, device=device)
        z = encoded[starts]
        with th.no_grad():
            for k in range(depth):
                kept = starts + k < steps
                starts, z = starts[kept], z[kept]
                if len(starts) == 0:
                    break
                at, following = starts + k, starts + k + 1
                reward = world.two_hot.decode(world.reward_logits(z, actions[at])).squeeze(-1)
                z = world.next(z, actions[at])
                ended = (following == steps).float() * float(episode.terminated)
                foreseen = th.zeros_like(ended)
                if world.termination is not None:
                    foreseen = world.termination(z).sigmoid().squeeze(-1) * model.policy.terminations_seen
                measured = {
                    "latent": (z - encoded[following]).square().sum(dim=-1),
                    "moved": (encoded[starts] - encoded[following]).square().sum(dim=-1),
                    "reward": (reward - rewards[at]).abs(),
                    "reward_constant": (rewards[at] - mean_reward).abs(),
                    "termination": (foreseen - ended).abs(),
                    "value": (mean_value(model, z) - true_values[following]).abs(),
                }
                for name, value in measured.items():
                    sums[name][k] += float(value.sum())
                counts[k] += len(starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = {name: total / counts for name, total in sums.items()}
        means["latent"] = means["latent"] / means.pop("moved")
    return means


def returns_to_come(model: BOOM, episode: Episode) -> np.ndarray:
    """
    Discounted return from every step on. Beyond a truncation the critics' word stands for what would have come.

    :param model: whose discount and critics
    :param episode: ``T`` steps
    :return: ``[T]``; NaN where the critics' word weighs more than :data:`CLEAR_OF_THE_END`
    """
    gamma, steps = float(model.gamma), len(episode)
    beyond = 0.0 if episode.terminated else float(mean_value(model, encode(model, episode)[-1:]))
    found = np.zeros(steps)
    for t in reversed(range(steps)):
        beyond = found[t] = episode.rewards[t] + gamma * beyond
    if not episode.terminated:
        found[gamma ** np.arange(steps, 0, -1) > CLEAR_OF_THE_END] = np.nan
    return found


def calibration(model: BOOM, episodes: list[Episode]) -> tuple[np.ndarray, np.ndarray]:
    """
    :param model: whose critics
    :param episodes: with actions of the planner, or of the prior
    :return: the critics' values of the actions taken, and the returns that came, ``[n]`` each
    """
    promised, came = [], []
    for episode in episodes:
        actions = th.as_tensor(episode.actions, dtype=th.float32, device=model.device)
        values = mean_value(model, encode(model, episode)[:-1], actions).cpu().numpy()
        returns = returns_to_come(model, episode)
        known = np.isfinite(returns)
        promised.append(values[known])
        came.append(returns[known])
    return np.concatenate(promised), np.concatenate(came)


def termination_scores(model: BOOM, episodes: list[Episode]) -> dict[str, float]:
    """
    :param model: predicts terminations, one step ahead
    :param episodes: to predict those of
    :return: ``precision`` and ``recall`` of predictions above a half; left out where there is nothing to count
    """
    head, foreseen, met, both = model.policy.world_model.termination, 0, 0, 0
    if head is None:
        return {}
    for episode in episodes:
        z = encode(model, episode)[:-1]
        with th.no_grad():
            following = model.policy.world_model.next(z, th.as_tensor(episode.actions, dtype=th.float32, device=z.device))
            predicted = (head(following).squeeze(-1) > 0.0).cpu().numpy() & bool(model.policy.terminations_seen)
        foreseen += int(predicted.sum())
        met += episode.terminated
        both += int(predicted[-1] and episode.terminated)
    scores = {"precision": (both, foreseen), "recall": (both, met)}
    return {name: part / whole for name, (part, whole) in scores.items() if whole}


def watched_episodes(
    model: BOOM, env: VecEnv, n_episodes: int, seed: int, planned: bool, deterministic: bool
) -> list[Episode]:
    """
    :func:`collect` that leaves training alone: with random numbers of its own, and an error where it would wait for ever.

    :param model: acts
    :param env: acted in
    :param n_episodes: how many
    :param seed: of environments and generators
    :param planned: by the planner, else by its prior
    :param deterministic: as in ``predict``
    :return: the episodes
    """
    with own_randomness(model.device, seed), evaluation_watched(env):
        return collect(model, env, n_episodes, seed, planned, deterministic)


def iterations(model: BOOM, episode: Episode, step: int) -> tuple[np.ndarray, np.ndarray]:
    """
    How a plan comes about, from a cold start.

    :param model: plans
    :param episode: of the state planned from
    :param step: of the episode
    :return: mean and std of the first action after every iteration, ``[I, A]`` each
    """
    policy, config = model.policy, model.policy.planner_config
    z = encode(model, episode)[step : step + 1]
    noise = planner.draw_noise(config, 1, policy.action_dim, policy.critic.n_critics, policy.device)
    networks = (policy.world_model, policy.actor, policy.critic, config)
    means, stds = [], []
    with th.no_grad():
        by_policy = planner.policy_trajectories(policy.world_model, policy.actor, z, noise.policy)
        mean, std = planner.first_distribution(config, policy.initial_mean(1))
        for i in range(config.n_iterations):
            mean, std, *_ = planner.refine(
                *networks, z, by_policy, mean, std, noise.candidates[i], noise.terminal[i], noise.critic_pairs[i],
                policy.terminations_seen,
            )  # fmt: skip
            means.append(mean[0, 0].cpu().numpy())
            stds.append(std[0, 0].cpu().numpy())
    return np.stack(means), np.stack(stds)
