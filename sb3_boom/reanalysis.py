"""Lazy reanalysis: plans of long ago, made anew with the networks of today."""

from sb3_boom.buffers import SubTrajectories, WeightedReplayBuffer
from sb3_boom.policies import BOOMPolicy

REANALYZED = 20  # transitions at once, as BMPC


def reanalyze(policy: BOOMPolicy, buffer: WeightedReplayBuffer, batch: SubTrajectories) -> None:
    """
    Plan for the first transitions of the batch, from a cold start, and store ``a_β`` and ``σ_β`` in the old ones' place.

    :param policy: the networks
    :param buffer: where the batch was drawn from
    :param batch: sub-trajectories, of which the first :data:`REANALYZED` are taken, their first step each
    """
    observations = batch.observations
    if isinstance(observations, dict):
        observations = {key: value[0, :REANALYZED] for key, value in observations.items()}
    else:
        observations = observations[0, :REANALYZED]
    indices = batch.indices[0, :REANALYZED]
    policy.set_training_mode(False)
    plan = policy.plan(observations, policy.initial_mean(len(indices)))
    policy.set_training_mode(True)
    buffer.update_plans(indices, plan.planner_action, plan.planner_std)
