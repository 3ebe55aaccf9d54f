"""One update of world model, critics and policy."""

from typing import Any

import torch as th

from sb3_boom import losses
from sb3_boom.buffers import SubTrajectories
from sb3_boom.losses import LossConfig, UpdateNoise
from sb3_boom.policies import BOOMPolicy


def update(
    policy: BOOMPolicy, batch: SubTrajectories, noise: UpdateNoise, config: LossConfig, max_grad_norm: float
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    One update (paper, Algorithm 1; reference, sections 5 and 6).

    :param policy: the networks and their optimizers
    :param batch: sub-trajectories
    :param noise: all of the update's randomness
    :param config: coefficients
    :param max_grad_norm: bound of either optimizer's gradient
    :return: Q-values of the batch's steps ``[H, B, 1]``; the terms to log by their name
    """
    features, next_features = encode_observations(policy, batch.observations)

    # World model and critics: predict latents, rewards, terminations and values along the latent rollout
    loss, latents, model_terms = policy.compiler(losses.model_loss)(
        policy.world_model,
        policy.actor,
        policy.critic,
        policy.critic_target,
        config,
        features,
        next_features,
        batch.actions,
        batch.rewards,
        batch.terminations,
        batch.valid,
        noise,
    )
    grad_norm = descend(policy.model_optimizer, loss, max_grad_norm)

    # Policy: maximise value, align with the planner where value is high
    loss, q_scale, values, policy_terms = policy.compiler(losses.policy_loss)(
        policy.actor,
        policy.critic,
        config,
        latents,
        batch.planner_actions,
        batch.planner_stds,
        batch.valid,
        policy.q_scale,
        noise,
    )
    policy_grad_norm = descend(policy.actor_optimizer, loss, max_grad_norm)

    with th.no_grad():
        policy.q_scale.copy_(q_scale)
        th.maximum(policy.terminations_seen, batch.terminations.amax(), out=policy.terminations_seen)
        # the target critics follow: SB3's polyak_update, in one call
        th._foreach_lerp_(list(policy.critic_target.parameters()), list(policy.critic.parameters()), config.tau)
    return values, {**model_terms, **policy_terms, "grad_norm": grad_norm, "policy_grad_norm": policy_grad_norm}


def encode_observations(policy: BOOMPolicy, observations: Any) -> tuple[th.Tensor, th.Tensor]:
    """
    :param policy: whose features extractor to use
    :param observations: ``[H+1, B, ...]``, or a dict of such; images are shifted at random
    :return: features of the first ones ``[B, F]`` and of the others ``[H, B, F]``, these without gradient
    """
    if isinstance(observations, dict):
        first = {key: value[0] for key, value in observations.items()}
        following: Any = {key: value[1:].flatten(0, 1) for key, value in observations.items()}
    else:
        first, following = observations[0], observations[1:].flatten(0, 1)
    features = policy.features(policy.augment(first))
    with th.no_grad():
        next_features = policy.features(policy.augment(following))
    return features, next_features.unflatten(0, (-1, len(features)))


def descend(optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float) -> th.Tensor:
    """
    :param optimizer: steps its parameters down the gradient of the loss, clipped
    :param loss: scalar
    :param max_grad_norm: bound of the gradient's norm
    :return: norm of the gradient before clipping
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return norm
