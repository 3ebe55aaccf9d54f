"""
The losses of BOOM: model and critics, then the policy with its alignment to the planner.

Pure functions of networks, data and noise (torch only). Shapes: ``B`` batch, ``H`` horizon, ``A`` action dimensions,
``L`` latent dimensions, ``F`` features. Every time step is weighted by ``ρ^t``; invalid steps are cut with ``where``, and
sums over the batch are divided by the constant ``B``, so that every transition keeps its weight.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch as th
from torch.nn import functional as F

from sb3_boom.core.actor import Actor, gaussian_log_prob, scaled_gaussian_log_prob, squash_correction
from sb3_boom.core.critic import Critic, draw_pairs
from sb3_boom.core.world_model import WorldModel

ALIGNMENTS = ("release", "forward_kl", "reverse_kl", "none")
ALIGN_WEIGHTINGS = ("softmax", "uniform")
BY_Q_SCALE = "q_scale"
MIN_ALIGN_STD = 0.05  # floor of the stds inside the alignment terms
GATE_SCALE = 2.0  # the release aligns only once the Q scale is above this
WARMUP_STD = math.exp(2.0)  # std stored with actions that no planner made: the policy's widest
PLANNED_STD = 0.99 * WARMUP_STD  # those of the planner are below
ATANH_CLAMP = 0.999  # atanh is infinite at ±1, where clamped plans often lie


@dataclass(frozen=True)
class LossConfig:
    """
    Coefficients of the losses; see :class:`sb3_boom.BOOM` for their meaning and defaults.

    :param gamma: ``γ``, discount per agent step
    :param n_steps: rewards in a TD target, see :func:`td_target`
    :param rho: ``ρ``: step ``t`` weighs ``ρ^t``
    :param consistency_coef: of the latent consistency loss
    :param reward_coef: of the reward loss
    :param value_coef: of the critics' loss
    :param termination_coef: of the termination loss
    :param ent_coef: of the policy's log-probability, scaled by ``A``
    :param alignment: "release", "forward_kl", "reverse_kl" or "none", see :func:`alignment_likelihood`
    :param align_coef: of the alignment term
    :param align_scale: what the alignment term is divided by: a number, or :data:`BY_Q_SCALE` for ``S``
    :param align_weighting: "softmax" or "uniform", see :func:`value_weights`
    :param align_temperature: ``τ_w`` of the soft value weights, in units of the Q scale ``S``
    :param align_warmup: whether actions that no planner made are imitated too
    :param tau: ``τ``, Polyak factor per update, here of the Q scale
    """

    gamma: float
    n_steps: int
    rho: float
    consistency_coef: float
    reward_coef: float
    value_coef: float
    termination_coef: float
    ent_coef: float
    alignment: str
    align_coef: float
    align_scale: float | str
    align_weighting: str
    align_temperature: float
    align_warmup: bool
    tau: float


class UpdateNoise(NamedTuple):
    """
    All the randomness of one update.

    :param target_action: standard normal ``[H, B, A]``, the policy's in the TD target
    :param policy_action: standard normal ``[H, B, A]``, the policy's in its own loss
    :param critic_pairs: ``[2, 2]`` int64: the TD target's critics, the policy loss's critics
    :param value_dropout: bool, the critics' units to keep in the value loss, ``[n_critics, H*B, mlp_dim]``, or None
    :param policy_dropout: bool, the critics' units to keep in the policy loss, ``[2, H*B, mlp_dim]``, or None
    """

    target_action: th.Tensor
    policy_action: th.Tensor
    critic_pairs: th.Tensor
    value_dropout: th.Tensor | None
    policy_dropout: th.Tensor | None


def draw_noise(
    horizon: int, batch_size: int, action_dim: int, n_critics: int, mlp_dim: int, dropout: float, device: th.device
) -> UpdateNoise:
    """
    Draw the randomness of one update from torch's global generator.

    :param horizon: ``H``
    :param batch_size: ``B``
    :param action_dim: ``A``
    :param n_critics: size of the critic ensemble
    :param mlp_dim: width of the critics' hidden layers
    :param dropout: probability of dropping a unit
    :param device: where the result lives
    :return: noise for :func:`model_loss` and :func:`policy_loss`
    """
    normal = th.randn(2, horizon, batch_size, action_dim, device=device)
    value_dropout = policy_dropout = None
    if dropout > 0.0:
        kept = draw_kept((n_critics + 2, horizon * batch_size, mlp_dim), dropout, device)
        value_dropout, policy_dropout = kept.split([n_critics, 2])
    return UpdateNoise(normal[0], normal[1], draw_pairs(2, n_critics, device), value_dropout, policy_dropout)


def draw_kept(shape: tuple[int, ...], dropout: float, device: th.device) -> th.Tensor:
    """
    Draw which units dropout keeps: independent, by the gaps between dropped ones, which are geometrically distributed.

    A random number for every dropped unit, instead of one for every unit, which took as long as a tenth of an update on a CPU;
    on a GPU launches cost more than numbers.

    :param shape: of the result
    :param dropout: probability of dropping a unit, in (0, 1)
    :param device: where the result lives
    :return: bool of that shape, False where dropped
    """
    if device.type == "cuda":
        return th.empty(shape, dtype=th.bool, device=device).bernoulli_(1.0 - dropout)
    n = math.prod(shape)
    # ten standard deviations more than will be needed
    n_gaps = math.ceil(n * dropout + 10.0 * math.sqrt(n * dropout) + 10.0)
    gaps = th.empty(n_gaps, device=device).exponential_(-math.log1p(-dropout)).long() + 1
    dropped = (gaps.cumsum(0) - 1).clamp(max=n)  # those beyond the end meet in one more place
    return th.ones(n + 1, dtype=th.bool, device=device).index_fill_(0, dropped, False)[:n].view(shape)


def time_weights(horizon: int, rho: float, like: th.Tensor) -> th.Tensor:
    """
    ``ρ^t / H``, so that a sum over time is the weighted mean of the losses.

    :param horizon: ``H``
    :param rho: ``ρ``
    :param like: tensor of any shape, whose dtype and device to take
    :return: ``[H, 1, 1]``
    """
    return th.pow(rho, th.arange(horizon, dtype=like.dtype, device=like.device)).view(-1, 1, 1) / horizon


def masked_mean(losses: th.Tensor, valid: th.Tensor, weights: th.Tensor) -> th.Tensor:
    """
    Weighted sum over time of the mean over the batch, invalid steps left out but counted in ``B``.

    :param losses: ``[..., H, B, 1]``; may hold NaN where invalid
    :param valid: bool ``[H, B, 1]``
    :param weights: ``[H, 1, 1]``, see :func:`time_weights`
    :return: ``[...]``
    """
    return (weights * th.where(valid, losses, 0.0)).sum(dim=(-3, -2, -1)) / losses.shape[-2]


def td_target(
    actor: Actor,
    critic_target: Critic,
    next_latents: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
    valid: th.Tensor,
    gamma: float,
    n_steps: int,
    noise: th.Tensor,
    critic_pair: th.Tensor,
) -> th.Tensor:
    """
    ``y_t = r_t + γ (1 - terminated_t) V(z̄_{t+1})`` with ``V(z) = min(Q̄_i, Q̄_j)(z, π(z))``; with ``n_steps = n`` the return
    met, and ``V`` after it: ``y_t = Σ_{k<m} γ^k r_{t+k} + γ^m V(z̄_{t+m})``, without ``V`` if a termination comes first. ``m``
    is ``n``, or as many steps as window and episode hold from ``t`` on.

    :param actor: the policy
    :param critic_target: the target critics
    :param next_latents: ``z̄_{t+1}``, ``[H, B, L]``
    :param rewards: ``[H, B, 1]``
    :param terminations: 1 where the step ended the episode by termination (a truncation bootstraps), ``[H, B, 1]``
    :param valid: bool ``[H, B, 1]``
    :param gamma: ``γ``, discount per agent step
    :param n_steps: ``n``
    :param noise: standard normal ``[H, B, A]``
    :param critic_pair: ``i, j``, int64 ``[2]``
    :return: ``y``, in the unit of the rewards, ``[H, B, 1]``
    """
    next_values = th.minimum(*critic_target.values(next_latents, actor.sample(next_latents, noise), critic_pair))
    targets = rewards + gamma * (1.0 - terminations) * next_values
    for _ in range(n_steps - 1):
        met = th.where(valid[1:], targets[1:], next_values[:-1])  # from the next step on, where the window holds it
        targets = rewards + gamma * (1.0 - terminations) * th.cat([met, next_values[-1:]])
    return targets


def model_loss(
    world_model: WorldModel,
    actor: Actor,
    critic: Critic,
    critic_target: Critic,
    config: LossConfig,
    features: th.Tensor,
    next_features: th.Tensor,
    actions: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
    valid: th.Tensor,
    noise: UpdateNoise,
) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
    """
    Loss of world model and critics along a latent rollout, ``z_0 = h(s_0)``, ``z_{t+1} = d(z_t, a_t)``: the sum over ``t`` of
    ``ρ^t / H`` times

    ``consistency_coef · (z_{t+1} - z̄_{t+1})² + reward_coef · CE(R(z_t, a_t), r_t) + value_coef · CE(Q_i(z_t, a_t), y_t)
    + termination_coef · BCE(g(z_{t+1}), terminated_t)``.

    :param world_model: the world model
    :param actor: the policy, for the TD target
    :param critic: the critics
    :param critic_target: the target critics
    :param config: coefficients
    :param features: of the first observations, ``[B, F]``
    :param next_features: of the following observations, ``[H, B, F]``, without gradient
    :param actions: ``[H, B, A]``
    :param rewards: ``[H, B, 1]``
    :param terminations: 0 or 1, ``[H, B, 1]``; taken as 0 where the world model has no termination head
    :param valid: bool ``[H, B, 1]``
    :param noise: randomness of the update
    :return: the loss; the rollout's latents ``z_0..z_{H-1}``, detached, ``[H, B, L]``; the terms by their logged name
    """
    weights = time_weights(actions.shape[0], config.rho, rewards)
    # what lies beyond an episode's end must reach no network: 0 x NaN would come back in the gradients
    next_features, actions, rewards, terminations = (
        th.where(valid, x, 0.0) for x in (next_features, actions, rewards, terminations)
    )
    with th.no_grad():
        next_latents = world_model.encode(next_features)
        ended = terminations if world_model.termination is not None else th.zeros_like(terminations)
        targets = td_target(
            actor, critic_target, next_latents, rewards, ended, valid,
            config.gamma, config.n_steps, noise.target_action, noise.critic_pairs[0],
        )  # fmt: skip

    z = world_model.encode(features)
    rollout = [z]
    for step_actions in actions.unbind(0):
        rollout.append(world_model.next(rollout[-1], step_actions))
    latents, predicted = th.stack(rollout[:-1]), th.stack(rollout[1:])

    consistency = masked_mean((predicted - next_latents).square().mean(dim=-1, keepdim=True), valid, weights)
    reward = masked_mean(
        world_model.two_hot.cross_entropy(world_model.reward_logits(latents, actions), rewards), valid, weights
    )
    value_logits = critic(latents, actions, dropout_mask=noise.value_dropout)
    value = masked_mean(critic.two_hot.cross_entropy(value_logits, targets), valid, weights).mean()
    loss = config.consistency_coef * consistency + config.reward_coef * reward + config.value_coef * value
    terms = {"consistency_loss": consistency, "reward_loss": reward, "critic_loss": value}
    if world_model.termination is not None:
        termination = termination_loss(world_model.termination, predicted, next_latents, terminations, valid, weights)
        loss = loss + config.termination_coef * termination
        terms["termination_loss"] = termination
    terms["model_loss"] = loss
    return loss, latents.detach(), {name: term.detach() for name, term in terms.items()}


def termination_loss(
    head: th.nn.Module,
    predicted: th.Tensor,
    encoded: th.Tensor,
    terminations: th.Tensor,
    valid: th.Tensor,
    weights: th.Tensor,
) -> th.Tensor:
    """
    The head learns from predicted latents and from encoded observations, half each, and alone: its gradient ends at its
    input. In the dynamics it would teach them to flag the state-action pairs seen, which foresees no new fall.

    :param head: ``g``, gives a termination's logit on reaching a latent
    :param predicted: ``ẑ_1..ẑ_H``, ``[H, B, L]``
    :param encoded: ``z̄_1..z̄_H`` of the observations, ``[H, B, L]``
    :param terminations: 0 or 1, ``[H, B, 1]``
    :param valid: bool ``[H, B, 1]``
    :param weights: see :func:`time_weights`
    :return: scalar
    """
    logits = head(th.stack([predicted.detach(), encoded]))
    cross_entropies = F.binary_cross_entropy_with_logits(logits, terminations.expand_as(logits), reduction="none")
    return masked_mean(cross_entropies, valid, weights).mean()


def update_scale(scale: th.Tensor, values: th.Tensor, tau: float) -> th.Tensor:
    """
    The running Q scale ``S ← lerp(S, max(1, p95 - p5), τ)``, percentiles by linear interpolation.

    :param scale: ``S``, scalar tensor
    :param values: Q-values of the policy loss's first time step, ``[B, 1]``
    :param tau: ``τ``
    :return: the new ``S``, scalar
    """
    ordered = values.flatten().sort().values
    low, high = (_percentile(ordered, q) for q in (0.05, 0.95))
    return scale + tau * ((high - low).clamp(min=1.0) - scale)


def _percentile(ordered: th.Tensor, q: float) -> th.Tensor:
    """
    :param ordered: sorted values ``[n]``
    :param q: quantile in [0, 1]
    :return: scalar, linearly interpolated
    """
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def value_weights(q: th.Tensor, valid: th.Tensor, weighting: str, temperature: float) -> th.Tensor:
    """
    Soft value weights ``w = softmax_B(q / τ_w)`` of every time step, or uniform ones (paper, soft Q-weighting).

    :param q: scaled Q-values ``[H, B, 1]``
    :param valid: bool ``[H, B, 1]``; invalid steps get weight 0
    :param weighting: "softmax" or "uniform"
    :param temperature: ``τ_w``, in units of ``S``
    :return: ``[H, B, 1]``, no gradient
    """
    if weighting == "uniform":
        return valid / q.shape[1]
    # a step invalid in the whole batch would be softmax of -inf alone, which is NaN: cut it
    weights = th.where(valid, q.detach() / temperature, -th.inf).softmax(dim=1)
    return th.where(valid, weights, 0.0)


def alignment_likelihood(
    alignment: str,
    mean: th.Tensor,
    log_std: th.Tensor,
    noise: th.Tensor,
    planner_actions: th.Tensor,
    planner_stds: th.Tensor,
    scale: th.Tensor,
    divisor: th.Tensor | float,
) -> th.Tensor:
    """
    How well the policy agrees with the planner: ``ℓ``, higher is better.

    * ``release``: the authors' program. Pulls the policy's own sample towards the planner's action; off until the Q
      scale exceeds 2.
    * ``forward_kl``: the paper's likelihood-free KL(β‖π), ``log π(a_β | z)`` before squashing. What the paper leaves open:
      ``a_β`` within ±0.999 and the policy's std at least 0.05, where it would be infinite.
    * ``reverse_kl``: KL(π‖β) with a Gaussian around the planner's action.
    * ``none``: 0.

    :param alignment: one of these
    :param mean: of the policy, before squashing, ``[H, B, A]``
    :param log_std: of the policy, ``[H, B, A]``
    :param noise: standard normal ``[H, B, A]``, of the policy's sample
    :param planner_actions: ``a_β``, ``[H, B, A]``
    :param planner_stds: ``σ_β``, ``[H, B, A]``
    :param scale: Q scale ``S``, scalar
    :param divisor: of the result, scalar: ``S``, or a number where the alignment is not to fade as ``S`` grows
    :return: ``[H, B, 1]``
    :raises ValueError: for another ``alignment``
    """
    if alignment == "none":
        return th.zeros_like(mean[..., :1])
    action = th.tanh(mean + noise * log_std.exp())
    if alignment == "release":
        std = log_std.detach().exp().clamp(min=MIN_ALIGN_STD)
        log_prob = scaled_gaussian_log_prob((action - planner_actions) / std, std.log())
        return th.where(scale > GATE_SCALE, log_prob / divisor, 0.0)
    if alignment == "forward_kl":
        std = log_std.exp().clamp(min=MIN_ALIGN_STD)
        pre_squash = th.atanh(planner_actions.clamp(-ATANH_CLAMP, ATANH_CLAMP))
        return gaussian_log_prob((pre_squash - mean) / std, std.log()) / divisor
    if alignment == "reverse_kl":
        std = planner_stds.clamp(min=MIN_ALIGN_STD)
        log_policy = gaussian_log_prob(noise, log_std) - squash_correction(action)
        log_planner = gaussian_log_prob((action - planner_actions) / std, std.log())
        return (log_planner - log_policy) / divisor
    raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, not {alignment!r}")


def policy_loss(
    actor: Actor,
    critic: Critic,
    config: LossConfig,
    latents: th.Tensor,
    planner_actions: th.Tensor,
    planner_stds: th.Tensor,
    valid: th.Tensor,
    scale: th.Tensor,
    noise: UpdateNoise,
) -> tuple[th.Tensor, th.Tensor, th.Tensor, dict[str, th.Tensor]]:
    """
    Loss of the policy: its value, and its alignment with the planner. It is the sum over ``t`` of ``ρ^t / H`` times

    ``mean_B(ent_coef · log π(a|z) - min(Q_i, Q_j)(z, a) / S) - align_coef · Σ_B w ℓ``.

    :param actor: the policy
    :param critic: the critics, already stepped; they get no gradient
    :param config: coefficients
    :param latents: ``z_0..z_{H-1}``, without gradient, ``[H, B, L]``
    :param planner_actions: ``a_β``, ``[H, B, A]``
    :param planner_stds: ``σ_β``, ``[H, B, A]``
    :param valid: bool ``[H, B, 1]``
    :param scale: Q scale ``S`` before this update, scalar
    :param noise: randomness of the update
    :return: the loss; the new Q scale, scalar; the Q-values, unscaled and detached, ``[H, B, 1]``; the terms, scalars, by
        their logged name
    :raises ValueError: for an alignment that there is not
    """
    weights = time_weights(latents.shape[0], config.rho, latents)
    latents, planner_actions, planner_stds = (th.where(valid, x, 0.0) for x in (latents, planner_actions, planner_stds))
    mean, log_std = actor(latents)
    action = th.tanh(mean + noise.policy_action * log_std.exp())
    log_prob = scaled_gaussian_log_prob(noise.policy_action, log_std) - squash_correction(action)
    # not amin, whose compiled gradient asks which value equals the minimum: after a rounding of its own maybe none, 0 / 0
    values = th.minimum(*critic.values(latents, action, noise.critic_pairs[1], noise.policy_dropout))
    scale = update_scale(scale, values[0].detach(), config.tau)
    q = values / scale

    value_term = masked_mean(config.ent_coef * log_prob - q, valid, weights)
    divisor = scale if config.align_scale == BY_Q_SCALE else float(config.align_scale)
    likelihood = alignment_likelihood(
        config.alignment, mean, log_std, noise.policy_action, planner_actions, planner_stds, scale, divisor
    )
    imitated = valid if config.align_warmup else valid & (planner_stds[..., :1] < PLANNED_STD)
    batch_weights = value_weights(q, imitated, config.align_weighting, config.align_temperature)
    align_term = -(weights * batch_weights * th.where(imitated, likelihood, 0.0)).sum()
    loss = value_term + config.align_coef * align_term
    if config.alignment == "release":
        align_active = (scale > GATE_SCALE).float()
    else:
        align_active = th.full_like(scale, float(config.alignment != "none"))
    entropy = squash_correction(action) - gaussian_log_prob(noise.policy_action, log_std)
    n_imitated = imitated.sum(dim=1).clamp(min=1)
    # 1 / sum of squares, of weights that sum to 1: how many samples the alignment really learns from
    effective = 1.0 / (batch_weights.square().sum(dim=1) * n_imitated).clamp(min=1.0)
    terms = {
        "actor_loss": loss,
        "actor_value_loss": value_term,
        "align_loss": align_term,
        "align_loss_scaled": config.align_coef * align_term,
        "align_effective": effective.mean(),
        "align_active": align_active,
        "q_scale": scale,
        "q_mean": th.where(valid, values, 0.0).sum() / valid.sum(),
        "log_prob": th.where(valid, log_prob, 0.0).sum() / valid.sum(),
        "entropy": th.where(valid, entropy, 0.0).sum() / valid.sum(),
    }
    return loss, scale, values.detach(), {name: term.detach() for name, term in terms.items()}
