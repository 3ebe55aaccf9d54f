"""One update of world model, critics and policy."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN

from sb3_boom.buffers import SubTrajectories, TensorObs
from sb3_boom.core import losses
from sb3_boom.core.actor import Actor
from sb3_boom.core.compilation import eager
from sb3_boom.core.critic import Critic
from sb3_boom.core.flat import FlatOptimizer, flat_optimizer
from sb3_boom.core.losses import LossConfig, UpdateNoise
from sb3_boom.core.optimizers import ADAMS, is_capturable, parameters_of
from sb3_boom.core.world_model import WorldModel
from sb3_boom.policies import BOOMPolicy

Gradients: TypeAlias = Sequence[th.Tensor | None]


def update(
    policy: BOOMPolicy, batch: SubTrajectories, noise: UpdateNoise, config: LossConfig, max_grad_norm: float
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    One update (paper, Algorithm 1): :func:`sb3_boom.core.losses.model_loss`, :func:`sb3_boom.core.losses.policy_loss`, and a
    step of the target critics, ``Q̄ ← Q̄ + τ (Q - Q̄)``.

    :param policy: the networks and their optimizers
    :param batch: sub-trajectories
    :param noise: all of the update's randomness
    :param config: coefficients
    :param max_grad_norm: bound of either optimizer's gradient, in its 2-norm
    :return: Q-values of the batch's steps ``[H, B, 1]``; the terms to log by their name, scalars
    """
    features, next_features = encode_observations(policy, batch.observations)
    tensors = (features, next_features, *batch[1:7], noise)
    if not (policy.may_capture() and may_capture_update(policy, features.requires_grad)):
        return learn(policy, config, max_grad_norm, *tensors)
    optimizers = (policy.model_optimizer, policy.actor_optimizer)
    trained_parameters = bytes(parameter.requires_grad for optimizer in optimizers for parameter in parameters_of(optimizer))
    return policy.graphs.run(learn, "update", policy, config, max_grad_norm, *tensors, given=trained_parameters)


def may_capture_update(policy: BOOMPolicy, features_are_trained: bool) -> bool:
    """
    :param policy: the networks and their optimizers
    :param features_are_trained: whether the features extractor has parameters
    :return: whether an update can be one CUDA graph; where a user's own choice bars it, a warning has told so once
    """
    reason = None
    for optimizer in (policy.model_optimizer, policy.actor_optimizer):
        if type(optimizer) not in ADAMS:
            reason = f"optimizer_class={type(optimizer).__name__}: Adam and AdamW alone can be captured"
        elif optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or has_gradient_hooks(optimizer):
            reason = "a hook on an optimizer or a gradient, which a graph does not call"
        elif not is_capturable(optimizer):
            return False  # loaded just now, and not yet met by set_learning_rates
    if features_are_trained and type(policy.features_extractor) not in (NatureCNN, CombinedExtractor):
        reason = "a features extractor of your own, which may do anything"
    if reason is not None:
        policy.graphs.explain_once("update", reason)
    return reason is None and not features_are_trained


def learn(
    policy: BOOMPolicy,
    config: LossConfig,
    max_grad_norm: float,
    features: th.Tensor,
    next_features: th.Tensor,
    actions: th.Tensor,
    planner_actions: th.Tensor,
    planner_stds: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
    valid: th.Tensor,
    noise: UpdateNoise,
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    The update proper: no random numbers, nothing that waits for the device, no number of the host but constants.

    :param policy: the networks and their optimizers
    :param config: coefficients
    :param max_grad_norm: bound of either optimizer's gradient
    :param features: of the first observations, ``[B, F]``
    :param next_features: of the following ones, ``[H, B, F]``
    :param actions: ``[H, B, A]``; as all that follow, see :class:`~sb3_boom.buffers.SubTrajectories`
    :param planner_actions: ``a_β``, ``[H, B, A]``
    :param planner_stds: ``σ_β``, ``[H, B, A]``
    :param rewards: ``[H, B, 1]``
    :param terminations: ``[H, B, 1]``
    :param valid: bool ``[H, B, 1]``
    :param noise: all of the update's randomness
    :return: as :func:`update`
    """
    compiler = policy.compiler
    model_flat = flat_optimizer(policy.model_optimizer, (policy.world_model, policy.critic))
    actor_flat = flat_optimizer(policy.actor_optimizer, (policy.actor,))
    for optimizer, flat in ((policy.model_optimizer, model_flat), (policy.actor_optimizer, actor_flat)):
        if flat is None:
            optimizer.zero_grad()
            if has_gradient_hooks(optimizer):
                compiler = eager  # a user's hook on a parameter's gradient is not called in a compiled graph

    # World model and critics: predict latents, rewards, terminations and values along the latent rollout
    gradients, latents, model_terms = compiler(model_gradients)(
        policy.world_model,
        policy.actor,
        policy.critic,
        policy.critic_target,
        config,
        model_flat is not None,
        features.detach().requires_grad_(features.requires_grad),
        next_features,
        actions,
        rewards,
        terminations,
        valid,
        noise,
    )
    if features.requires_grad:
        *gradients, features_gradient = gradients
        features.backward(features_gradient)
    grad_norm = descend(model_flat or policy.model_optimizer, (policy.world_model, policy.critic), gradients, max_grad_norm)

    # Policy: maximise value, align with the planner where value is high
    gradients, q_scale, values, policy_terms = compiler(policy_gradients)(
        policy.actor,
        policy.critic,
        config,
        actor_flat is not None,
        latents,
        planner_actions,
        planner_stds,
        valid,
        policy.q_scale,
        noise,
    )
    policy_grad_norm = descend(actor_flat or policy.actor_optimizer, (policy.actor,), gradients, max_grad_norm)

    with th.no_grad():
        policy.q_scale.copy_(q_scale)
        th.maximum(policy.terminations_seen, terminations.amax(), out=policy.terminations_seen)
        # the target critics follow: SB3's polyak_update, in one call
        th._foreach_lerp_(list(policy.critic_target.parameters()), list(policy.critic.parameters()), config.tau)
    norms = {"grad_norm": grad_norm, "policy_grad_norm": policy_grad_norm}
    return values, {**model_terms, **policy_terms, **norms, "terminations_seen": policy.terminations_seen}


def encode_observations(policy: BOOMPolicy, observations: TensorObs) -> tuple[th.Tensor, th.Tensor]:
    """
    :param policy: whose features extractor to use
    :param observations: ``[H+1, B, ...]``, or a dict of such; images are shifted at random
    :return: features of the first ones ``[B, F]`` and of the others ``[H, B, F]``, these without gradient
    """
    first: TensorObs
    following: TensorObs
    if isinstance(observations, dict):
        first = {key: value[0] for key, value in observations.items()}
        following = {key: value[1:].flatten(0, 1) for key, value in observations.items()}
    else:
        first, following = observations[0], observations[1:].flatten(0, 1)
    features = policy.features(policy.augment(first))
    with th.no_grad():
        next_features = policy.features(policy.augment(following))
    return features, next_features.unflatten(0, (-1, len(features)))


def model_gradients(
    world_model: WorldModel,
    actor: Actor,
    critic: Critic,
    critic_target: Critic,
    config: LossConfig,
    end_to_end: bool,
    features: th.Tensor,
    *data: Any,
) -> tuple[Gradients, th.Tensor, dict[str, th.Tensor]]:
    """
    :func:`losses.model_loss` and its gradients: one compiled graph, forward and backward.

    :param world_model: to train
    :param actor: the policy, for the TD target
    :param critic: to train
    :param critic_target: the target critics
    :param config: coefficients
    :param end_to_end: see :func:`differentiate`
    :param features: of the first observations, ``[B, F]``
    :param data: the loss's other arguments, from ``next_features`` on
    :return: gradients of world model's and critics' trained parameters, and of the features if they require one; latents
        ``[H, B, L]``; the terms by their logged name
    """
    loss, latents, terms = losses.model_loss(world_model, actor, critic, critic_target, config, features, *data)
    inputs = trained(world_model, critic)
    if features.requires_grad:
        inputs.append(features)
    return differentiate(loss, inputs, end_to_end), latents, terms


def policy_gradients(
    actor: Actor, critic: Critic, config: LossConfig, end_to_end: bool, *data: Any
) -> tuple[Gradients, th.Tensor, th.Tensor, dict[str, th.Tensor]]:
    """
    :func:`losses.policy_loss` and its gradients, as one graph too.

    :param actor: to train
    :param critic: the critics
    :param config: coefficients
    :param end_to_end: see :func:`differentiate`
    :param data: the loss's other arguments, from ``latents`` on
    :return: gradients of the policy's trained parameters; the new Q scale ``S``, scalar; Q-values ``[H, B, 1]``; the terms by
        their logged name
    """
    loss, q_scale, values, terms = losses.policy_loss(actor, critic, config, *data)
    return differentiate(loss, trained(actor), end_to_end), q_scale, values, terms


def trained(*networks: th.nn.Module) -> list[th.Tensor]:
    """
    :param networks: any
    :return: their parameters, except those that a user has frozen
    """
    return [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]


def differentiate(loss: th.Tensor, inputs: Sequence[th.Tensor], end_to_end: bool) -> Gradients:
    """
    :param loss: scalar
    :param inputs: of any shapes, maybe none
    :param end_to_end: whether to lay the gradients into one tensor ``[n]``, where the loss depends on all inputs
    :return: the loss's gradient by each of them, of its shape, None where it does not depend on it; or that one tensor
    """
    gradients = th.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    if end_to_end and all(gradient is not None for gradient in gradients):
        return (th.cat([gradient.reshape(-1) for gradient in gradients]),)
    return gradients


def descend(
    optimizer: th.optim.Optimizer | FlatOptimizer, networks: Sequence[th.nn.Module], gradients: Gradients, max_grad_norm: float
) -> th.Tensor:
    """
    :param optimizer: steps its parameters down their gradients, clipped
    :param networks: whose gradients are given
    :param gradients: of their trained parameters, in order, of their shapes or as one tensor ``[n]``; the optimizer's other
        parameters have theirs
    :param max_grad_norm: bound of the gradient's 2-norm
    :return: that norm before clipping, scalar
    """
    if isinstance(optimizer, FlatOptimizer):
        if len(gradients) == 1 and gradients[0] is not None and gradients[0].shape == optimizer.gradient.shape:
            return optimizer.step(gradients[0], max_grad_norm)
        optimizer = optimizer.optimizer  # the loss does not depend on all of its parameters
        optimizer.zero_grad()
    for parameter, gradient in zip(trained(*networks), gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient.contiguous()  # fused Adam does not look at strides
    norm = th.nn.utils.clip_grad_norm_(parameters_of(optimizer), max_grad_norm)
    optimizer.step()
    return norm


def has_gradient_hooks(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: any
    :return: whether a user has registered a hook on a parameter's gradient
    """
    return any(parameter._backward_hooks for parameter in parameters_of(optimizer))
