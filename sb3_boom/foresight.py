"""What world model and plans foretold, held against what came: counted on steps that nothing has learned from yet."""

import copy
from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom.buffers import SubTrajectories, WeightedReplayBuffer
from sb3_boom.core.world_model import WorldModel
from sb3_boom.policies import BOOMPolicy

BLOCK = 64  # steps scored in one pass: a pass costs as much as a plan's first step, so every step would be felt
FORETELLERS = ("termination", "termination_encoded")


class Snapshot(NamedTuple):
    """
    Networks as they were.

    :param features_extractor: of the policy
    :param world_model: of the policy
    """

    features_extractor: BaseFeaturesExtractor
    world_model: WorldModel


class FreshTerminations:
    """
    Precision and recall of predicted terminations on steps that the networks have not learned from.

    Every :data:`BLOCK` steps the transitions stored since the last time are scored, once and in one pass, by the networks as
    they were before the first of these was stored. A termination counts as foreseen if it is more likely than not, on the
    latent predicted from the state before with the action taken, and apart from that on the encoded observation itself.
    """

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._n_steps = 0
        self._counts: th.Tensor | None = None  # [2, 3], see count_terminations

    def see(self, policy: BOOMPolicy, replay_buffer: WeightedReplayBuffer, env: VecNormalize | None) -> None:
        """
        Count one stored step of all environments; nothing waits for the device.

        :param policy: whose world model to score
        :param replay_buffer: that has just stored the step
        :param env: normalises observations
        """
        if policy.world_model.termination is None:
            return
        self._n_steps += 1
        if self._snapshot is not None and self._n_steps < min(BLOCK, replay_buffer.buffer_size):
            return
        if self._snapshot is None:
            self._snapshot = Snapshot(copy.deepcopy(policy.features_extractor), copy.deepcopy(policy.world_model))
        else:
            batch = replay_buffer.newest(min(self._n_steps, replay_buffer.size()), env)  # it may have been emptied
            counts = count_terminations(policy, self._snapshot, batch)
            self._counts = counts if self._counts is None else self._counts + counts
            for network, name in zip(self._snapshot, Snapshot._fields, strict=True):
                network.load_state_dict(getattr(policy, name).state_dict())
        self._n_steps = 0

    def take_scores(self) -> dict[str, float]:
        """
        :return: since the last call, by the name to log: ``termination_precision``, the part of the foreseen terminations
            that were met, and ``termination_recall``, the part of the met ones that were foreseen; the same two of
            ``termination_encoded``. Those that nothing was counted for are left out.
        """
        if self._counts is None:
            return {}
        counts, self._counts = self._counts.tolist(), None
        scores = {}
        for name, (foreseen, met, both) in zip(FORETELLERS, counts, strict=True):
            for score, whole in (("precision", foreseen), ("recall", met)):
                if whole > 0.0:
                    scores[f"{name}_{score}"] = both / whole
        return scores


def count_terminations(policy: BOOMPolicy, networks: Snapshot, batch: SubTrajectories) -> th.Tensor:
    """
    :param policy: preprocesses observations
    :param networks: what to score
    :param batch: transitions, the first of each window
    :return: terminations foreseen, met, and both, by the latent predicted and by the one encoded, ``[2, 3]``
    """
    steps = [
        (
            {key: value[t] for key, value in batch.observations.items()}
            if isinstance(batch.observations, dict)
            else batch.observations[t]
        )
        for t in (0, 1)
    ]
    model = networks.world_model
    assert model.termination is not None
    with th.no_grad():
        z, next_z = (model.encode(policy.extract_features(obs, networks.features_extractor.eval())) for obs in steps)
        logits = model.termination(th.stack([model.next(z, batch.actions[0]), next_z])).squeeze(-1)  # [2, B]
        foreseen, met = logits > 0.0, (batch.terminations[0].squeeze(-1) > 0.5).expand_as(logits)
        return th.stack([foreseen.sum(dim=1), met.sum(dim=1), (foreseen & met).sum(dim=1)], dim=1)


class PlanOptimism:
    """
    How much more the plans of an episode promised than came: mean over its planned steps of ``V_t - G_t``, where ``V_t`` is
    the best elite's value and ``G_t = Σ_k γ^k r_{t+k}`` the return met from there on, exploration noise and all.

    A termination ends the sum. A truncation does not: ``G_t`` goes on with ``V`` of the last plan, the one before the last
    step, discounted; that plan itself and the reward of the last step are left out then. It is kept as running sums, which
    take no memory: with ``W_t = γ W_{t-1} + [t was planned]`` the returns' sum is ``Σ_t r_t W_t``.
    """

    def __init__(self) -> None:
        self._weights = self._gaps = self._counts = np.zeros(0)  # W, the sum of V - G so far, planned steps; [n_envs] each

    def see(
        self,
        values: np.ndarray | None,
        rewards: np.ndarray,
        dones: np.ndarray,
        truncated: np.ndarray,
        starts: np.ndarray,
        gamma: float,
    ) -> list[float]:
        """
        Count one step of all environments.

        :param values: the plans' best values, None where the actions were random, ``[n_envs]``
        :param rewards: ``[n_envs]``
        :param dones: whether the episode ended, ``[n_envs]``
        :param truncated: whether the end, if it is one, was a truncation, ``[n_envs]``
        :param starts: whether the step was an episode's first, ``[n_envs]``
        :param gamma: ``γ``, discount per agent step
        :return: of each episode that ended, unless it was not planned, in the unit of the rewards
        """
        if len(self._weights) != len(dones):
            self._weights, self._gaps, self._counts = np.zeros((3, len(dones)))
        for sums in (self._weights, self._gaps, self._counts):
            sums[starts] = 0.0
        planned = 0.0 if values is None else 1.0
        promised = np.zeros(len(dones)) if values is None else values
        weights = gamma * self._weights + planned
        cut = dones & truncated
        self._gaps += np.where(cut, -gamma * self._weights * promised, promised - weights * rewards)
        self._counts += np.where(cut, 0.0, planned)
        self._weights = weights
        ended = dones & (self._counts > 0.0)
        return (self._gaps[ended] / self._counts[ended]).tolist()
