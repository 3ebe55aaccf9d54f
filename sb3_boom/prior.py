"""The policy that plans start from, by itself."""

import numpy as np
import torch as th

from sb3_boom.guards import check_observation
from sb3_boom.policies import BOOMPolicy


class PolicyPrior:
    """
    The policy ``π`` that plans start from, without planning: ``evaluate_policy(model.prior, env)``.

    :param policy: the policy it belongs to
    """

    def __init__(self, policy: BOOMPolicy) -> None:
        self.policy = policy

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The policy's own action.

        :param observation: one observation, or a batch of them ``[n, ...]``; by key for a Dict space
        :param state: returned as it is: the policy has no memory
        :param episode_start: unused
        :param deterministic: the squashed mean instead of a sample
        :return: the action, or ``[n, ...]`` for a batch, within the action space's bounds and of its dtype; and ``state``
        :raises ValueError: for what would end in an action of NaN, and for what SB3 refuses
        """
        policy = self.policy
        policy.set_training_mode(False)
        check_observation(policy, observation)
        obs, vectorized = policy.obs_to_tensor(observation)
        with th.no_grad():
            actions = policy.to_action_space(policy(obs, deterministic).cpu().numpy())
        return actions if vectorized else actions[0], state
