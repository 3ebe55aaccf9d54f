"""
Planning in the world model: MPPI and CEM.

Pure functions of networks, latents and noise (torch only), batched over ``E`` environments. Shapes: ``H`` horizon,
``N`` samples, ``K`` elites, ``P`` policy trajectories, ``A`` action dimensions, ``L`` latent dimensions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th

from sb3_boom.core.actor import Actor
from sb3_boom.core.critic import Critic, draw_pairs
from sb3_boom.core.torch_layers import Members, compiles_for_gpu, separate_draws
from sb3_boom.core.world_model import WorldModel

PLANNERS = ("mppi", "cem")
HORIZON_VALUES = ("mean", "min")
AT_BOUND = 0.999  # an action in [-1, 1] at least that large counts as being at its bound
PAIRS_SEED = 0  # of the critics, where the rest of a plan's randomness is its observation's
PLANNER_KWARGS = (
    "n_samples",
    "n_elites",
    "n_policy_samples",
    "n_iterations",
    "temperature",
    "min_std",
    "max_std",
    "horizon_value",
)


@dataclass(frozen=True)
class PlannerConfig:
    """
    What a plan costs and how it is made (paper, MPPI; TD-MPC2's defaults).

    :param n_samples: action sequences ``N`` scored in every iteration, policy trajectories included
    :param n_elites: best sequences ``K`` that shape the next distribution
    :param n_policy_samples: of the samples, the ``P`` that are rolled out by the policy
    :param n_iterations: ``I``, refinements of the distribution
    :param temperature: of the elites' weights ``exp(temperature * (value - best))``; unused by CEM
    :param min_std: lower bound of the sampling std, of actions in [-1, 1]
    :param max_std: upper bound of the sampling std, and its start
    :param horizon_value: what the critics say at the horizon: "mean" of a random pair, as the paper and TD-MPC2, or "min" of
        all, which plans can exploit less
    :param horizon: agent steps ``H`` looked ahead before the critics take over
    :param gamma: ``γ``, discount per agent step
    :param uniform_elites: weigh all elites alike, which is CEM
    :raises ValueError: for settings that no plan can be made with
    """

    n_samples: int = 512
    n_elites: int = 64
    n_policy_samples: int = 24
    n_iterations: int = 6
    temperature: float = 0.5
    min_std: float = 0.05
    max_std: float = 2.0
    horizon_value: str = "mean"
    horizon: int = 3
    gamma: float = 0.99
    uniform_elites: bool = False

    def __post_init__(self) -> None:
        for name in ("n_samples", "n_elites", "n_iterations", "horizon"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.n_elites > self.n_samples:
            raise ValueError(f"n_elites={self.n_elites} is more than n_samples={self.n_samples}: elites are chosen among them")
        if not 0 <= self.n_policy_samples <= self.n_samples:
            raise ValueError(f"n_policy_samples={self.n_policy_samples} must be between 0 and n_samples={self.n_samples}")
        if not 0.0 < self.min_std <= self.max_std:
            raise ValueError(f"0 < min_std <= max_std is needed, not min_std={self.min_std}, max_std={self.max_std}")
        if self.temperature <= 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.horizon_value not in HORIZON_VALUES:
            raise ValueError(f'horizon_value must be {", ".join(HORIZON_VALUES)} or auto, not {self.horizon_value!r}')


def make_config(
    name: str, planner_kwargs: dict[str, Any] | None, action_dim: int, horizon: int, gamma: float
) -> PlannerConfig:
    """
    Check the planner's settings and fill in what is "auto".

    :param name: "mppi" or "cem"
    :param planner_kwargs: some of :data:`PLANNER_KWARGS`; ``n_iterations`` may be "auto": 6, or 8 for A >= 20; and
        ``horizon_value``: "mean", which is the policy's to change
    :param action_dim: ``A``
    :param horizon: ``H``
    :param gamma: ``γ``
    :return: the settings
    :raises ValueError: for an unknown planner or key, or a value that no plan can be made with
    """
    if name not in PLANNERS:
        raise ValueError(f"planner must be one of {', '.join(PLANNERS)}, not {name!r}")
    # numpy's numbers too, but Python's in what is compiled
    kwargs = {key: value.item() if hasattr(value, "item") else value for key, value in (planner_kwargs or {}).items()}
    unknown = sorted(set(kwargs) - set(PLANNER_KWARGS))
    if unknown:
        raise ValueError(f"unknown planner_kwargs {', '.join(unknown)}: choose among {', '.join(PLANNER_KWARGS)}")
    if kwargs.get("n_iterations", "auto") == "auto":
        kwargs["n_iterations"] = 8 if action_dim >= 20 else 6
    if kwargs.get("horizon_value") == "auto":
        kwargs["horizon_value"] = "mean"
    return PlannerConfig(**kwargs, horizon=horizon, gamma=gamma, uniform_elites=name == "cem")


class PlannerNoise(NamedTuple):
    """
    All the randomness of one plan: standard normal, except the last two.
    ``I`` is the number of iterations.

    :param policy: ``[H, E, P, A]``, the policy trajectories'
    :param candidates: ``[I, H, E, N-P, A]``, the sampled sequences' of every iteration
    :param terminal: ``[I, E, N, A]``, the policy's at the horizon
    :param exploration: ``[E, A]``, added to the chosen action while training
    :param elite: ``[E, K]`` standard Gumbel, picks the elite; zeros pick the heaviest, infinity the mean of all
    :param critic_pairs: ``[I, 2]`` int64, the critics used in every iteration
    """

    policy: th.Tensor
    candidates: th.Tensor
    terminal: th.Tensor
    exploration: th.Tensor
    elite: th.Tensor
    critic_pairs: th.Tensor


class Plan(NamedTuple):
    """
    The outcome of planning.

    :param planner_action: first action of the chosen elite, the paper's ``a_β``, ``[E, A]`` in [-1, 1]
    :param planner_std: std of the first step's final distribution, ``σ_β``, ``[E, A]``
    :param mean: mean of the final distribution, the next plan's warm start, ``[E, H, A]``
    :param exploratory_action: the planner action with exploration noise, clamped, ``[E, A]``
    :param value: value of the best elite, a discounted return in the unit of the rewards, ``[E]``
    :param statistics: how the plan came about, by :func:`statistic_names`, ``[E, S]``
    """

    planner_action: th.Tensor
    planner_std: th.Tensor
    mean: th.Tensor
    exploratory_action: th.Tensor
    value: th.Tensor
    statistics: th.Tensor


class Elites(NamedTuple):
    """
    The best sequences of an iteration, best first.

    :param first_actions: ``[E, K, A]``
    :param weights: sum to 1, ``[E, K]``
    :param values: ``[E, K]``, -inf where they are not finite
    :param by_policy: bool, whether the policy made them, ``[E, K]``
    """

    first_actions: th.Tensor
    weights: th.Tensor
    values: th.Tensor
    by_policy: th.Tensor


def draw_noise(
    config: PlannerConfig,
    n_envs: int,
    action_dim: int,
    n_critics: int,
    device: th.device,
    generator: th.Generator | None = None,
) -> PlannerNoise:
    """
    Draw the randomness of one plan.

    :param config: the planner's settings
    :param n_envs: environments ``E`` planned for
    :param action_dim: ``A``
    :param n_critics: size of the critic ensemble
    :param device: where the result lives
    :param generator: source of randomness; default: torch's global one
    :return: noise for :func:`plan`
    """
    horizon, n_iterations = config.horizon, config.n_iterations
    n_policy = config.n_policy_samples
    shapes = [
        (horizon, n_envs, n_policy, action_dim),
        (n_iterations, horizon, n_envs, config.n_samples - n_policy, action_dim),
        (n_iterations, n_envs, config.n_samples, action_dim),
        (n_envs, action_dim),
    ]
    sizes = [th.Size(shape).numel() for shape in shapes]
    normal = th.randn(sum(sizes), device=device, generator=generator)
    policy, candidates, terminal, exploration = (
        part.view(shape) for part, shape in zip(normal.split(sizes), shapes, strict=True)
    )
    gumbel = -th.empty(n_envs, config.n_elites, device=device).exponential_(generator=generator).log()
    pairs = draw_pairs(n_iterations, n_critics, device, generator)
    return PlannerNoise(policy, candidates, terminal, exploration, gumbel, pairs)


def draw_noise_by_row(
    config: PlannerConfig, seeds: Iterable[int], action_dim: int, n_critics: int, device: th.device
) -> PlannerNoise:
    """
    Draw the randomness of one plan so that a row's is its seed's alone, whatever it is planned with, and its action the mean.

    :param config: the planner's settings
    :param seeds: one for each of ``E`` environments
    :param action_dim: ``A``
    :param n_critics: size of the critic ensemble
    :param device: where the result lives
    :return: noise for :func:`plan`, with infinite ``elite``
    """
    generator = th.Generator(device)
    rows = [draw_noise(config, 1, action_dim, n_critics, device, generator.manual_seed(seed)) for seed in seeds]
    policy, candidates, terminal, exploration, elite, _ = zip(*rows, strict=True)
    # the critics are shared by the batch, so their choice can't depend on a row
    pairs = draw_pairs(config.n_iterations, n_critics, device, generator.manual_seed(PAIRS_SEED))
    return PlannerNoise(
        th.cat(policy, dim=1),
        th.cat(candidates, dim=2),
        th.cat(terminal, dim=1),
        th.cat(exploration),
        th.full_like(th.cat(elite), th.inf),
        pairs,
    )


def policy_trajectories(world_model: WorldModel, actor: Actor, z: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """
    Let the policy act in the world model: where planning starts from (paper, bootstrap loop).

    :param world_model: the world model
    :param actor: the policy
    :param z: latents ``[E, L]``
    :param noise: standard normal ``[H, E, P, A]``
    :return: actions ``[H, E, P, A]``
    """
    z = z.unsqueeze(1).expand(-1, noise.shape[2], -1)
    actions = []
    for t, step_noise in enumerate(noise.unbind(0)):
        actions.append(actor.sample(z, step_noise))
        if t + 1 < noise.shape[0]:
            z = world_model.next(z, actions[-1])
    return th.stack(actions)


def end_probabilities(logits: th.Tensor) -> th.Tensor:
    """
    :param logits: of the termination head, on reaching latents, any shape
    :return: ``p = σ(g(z))``, how likely it is that the episode ends there, same shape
    """
    return logits.sigmoid()


def trajectory_values(
    world_model: WorldModel,
    actor: Actor,
    critic: Critic,
    config: PlannerConfig,
    z: th.Tensor,
    actions: th.Tensor,
    terminal_noise: th.Tensor,
    critic_pair: Members,
    terminations_seen: th.Tensor,
) -> th.Tensor:
    """
    Value of action sequences: ``Σ_t γ^t alive_t R_t + γ^H alive_H avg(Q_i, Q_j)(z_H, π(z_H))``, with ``min_i Q_i`` in the
    average's place where ``horizon_value`` is "min".

    ``alive_t = Π_{s<=t} (1 - p_s)`` is the probability that no step before ended the episode, ``p_s`` the predicted one of
    a termination on reaching ``z_s``; it is 1 as long as no terminations have been seen at all.

    :param world_model: the world model
    :param actor: the policy
    :param critic: the critics
    :param config: the planner's settings
    :param z: latents ``[E, L]``
    :param actions: ``[H, E, N, A]``
    :param terminal_noise: standard normal ``[E, N, A]``
    :param critic_pair: ``[2]`` int64, the critics to average
    :param terminations_seen: scalar tensor, 1 once the data held a termination, else 0
    :return: values ``[E, N]``; what is not finite counts as -inf
    """
    z = z.unsqueeze(1).expand(-1, actions.shape[2], -1)
    latents = [z]
    for step_actions in actions.unbind(0):
        latents.append(world_model.next(latents[-1], step_actions))
    rollout, z_final = th.stack(latents), latents[-1]
    rewards = world_model.two_hot.decode(world_model.reward_logits(rollout[:-1], actions))
    final_action = actor.sample(z_final, terminal_noise)
    if config.horizon_value == "min":
        q_final = critic.values(z_final, final_action, th.arange(critic.n_critics, device=z.device)).amin(dim=0)
    else:
        q_final = critic.values(z_final, final_action, critic_pair).mean(dim=0)

    value = th.zeros_like(q_final)
    alive = th.ones_like(q_final)
    ended = th.zeros_like(rewards)
    if world_model.termination is not None:
        ended = end_probabilities(world_model.termination(rollout[1:])) * terminations_seen
    for t in range(config.horizon):
        value = value + config.gamma**t * alive * rewards[t]
        alive = alive * (1.0 - ended[t])
    value = (value + config.gamma**config.horizon * alive * q_final).squeeze(-1)
    return th.where(th.isfinite(value), value, -th.inf)


def best(values: th.Tensor, n: int) -> tuple[th.Tensor, th.Tensor]:
    """
    :param values: ``[E, N]``
    :param n: how many of each row
    :return: the highest values and their places, the highest first, ``[E, n]``
    """
    if compiles_for_gpu(values):  # one kernel, where to select and then to sort are two
        ordered, places = values.sort(dim=1, descending=True)
        return ordered[:, :n], places[:, :n]
    return values.topk(n, dim=1)


def refine(*arguments: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    :func:`search`, of whose elites what the next iteration and the choice of an action need.

    :param arguments: of :func:`search`
    :return: new mean and std ``[H, E, A]``, the elites' first actions ``[E, K, A]`` and weights ``[E, K]``, best first, and
        the best one's value ``[E]``
    """
    mean, std, elites = search(*arguments)
    return mean, std, elites.first_actions, elites.weights, elites.values[:, 0]


def search(
    world_model: WorldModel,
    actor: Actor,
    critic: Critic,
    config: PlannerConfig,
    z: th.Tensor,
    policy_actions: th.Tensor,
    mean: th.Tensor,
    std: th.Tensor,
    candidate_noise: th.Tensor,
    terminal_noise: th.Tensor,
    critic_pair: Members,
    terminations_seen: th.Tensor,
) -> tuple[th.Tensor, th.Tensor, Elites]:
    """
    One iteration: sample, score, keep the elites, fit mean and std to them.

    :param world_model: the world model
    :param actor: the policy
    :param critic: the critics
    :param config: the planner's settings
    :param z: latents ``[E, L]``
    :param policy_actions: ``[H, E, P, A]``, candidates in every iteration
    :param mean: of the sampling distribution, ``[H, E, A]``
    :param std: of the sampling distribution, ``[H, E, A]``
    :param candidate_noise: standard normal ``[H, E, N-P, A]``
    :param terminal_noise: standard normal ``[E, N, A]``
    :param critic_pair: ``[2]`` int64
    :param terminations_seen: scalar tensor, 0 or 1
    :return: new mean and std ``[H, E, A]``, and the elites
    """
    sampled = (mean.unsqueeze(2) + std.unsqueeze(2) * candidate_noise).clamp(-1.0, 1.0)
    actions = th.cat([policy_actions, sampled], dim=2)
    values = trajectory_values(world_model, actor, critic, config, z, actions, terminal_noise, critic_pair, terminations_seen)
    elite_values, elite_index = best(values, config.n_elites)
    horizon, n_envs, _, action_dim = actions.shape
    elites = actions.gather(2, elite_index[None, :, :, None].expand(horizon, n_envs, -1, action_dim))

    heaviest = elite_values[:, :1]
    if config.uniform_elites:
        weights = th.isfinite(elite_values).float()
    else:
        weights = th.exp(config.temperature * (elite_values - heaviest))
    weights = th.where(th.isfinite(heaviest), weights, th.nan)  # no finite value at all: let the caller see it
    weights = weights / weights.sum(dim=1, keepdim=True)
    w = weights[None, :, :, None]
    mean = (w * elites).sum(dim=2)
    std = (w * (elites - mean.unsqueeze(2)).square()).sum(dim=2).sqrt().clamp(config.min_std, config.max_std)
    return mean, std, Elites(elites[0], weights, elite_values, elite_index < policy_actions.shape[2])


def first_distribution(config: PlannerConfig, previous_mean: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Where the first iteration samples: around the last plan, one step later.

    :param config: the planner's settings
    :param previous_mean: the last plan's mean, ``[E, H, A]``; zeros where an episode starts
    :return: mean and std, ``[H, E, A]``
    """
    mean = previous_mean.transpose(0, 1)
    mean = th.cat([mean[1:], th.zeros_like(mean[:1])])
    return mean, th.full_like(mean, config.max_std)


def choose(first_actions: th.Tensor, weights: th.Tensor, elite_noise: th.Tensor, mean: th.Tensor) -> th.Tensor:
    """
    Draw an elite by its weight, and take its first action.

    :param first_actions: the elites', ``[E, K, A]``
    :param weights: the elites', ``[E, K]``
    :param elite_noise: standard Gumbel ``[E, K]``; zeros pick the heaviest. Where the first is infinite, the action is the
        mean's instead
    :param mean: of the final distribution, ``[H, E, A]``
    :return: the action ``[E, A]``; NaN for an environment whose plan failed
    """
    chosen = (weights.log() + elite_noise).argmax(dim=1)
    action = first_actions.gather(1, chosen[:, None, None].expand(-1, 1, first_actions.shape[2])).squeeze(1)
    action = th.where(elite_noise[:, :1].isinf(), mean[0], action)
    return th.where(th.isfinite(mean[0]), action, th.nan)


def statistic_names(horizon: int) -> list[str]:
    """
    What :func:`statistics` measures of a plan, by the name to log.

    ``value``: of the best elite. ``value_spread``: std of the elites' values. ``policy_elites``: share of the elites that the
    policy made. ``at_bounds``: share of the action's dimensions at a bound. ``prior_distance``: root mean square, over
    dimensions, of the action less the mean of the policy's own samples. ``std_1`` and so on: std of the final distribution,
    mean over dimensions, of each step.

    :param horizon: ``H``
    :return: ``S`` names
    """
    return ["value", "value_spread", "policy_elites", "at_bounds", "prior_distance", *(f"std_{t + 1}" for t in range(horizon))]


def statistics(elites: Elites, std: th.Tensor, action: th.Tensor, policy_actions: th.Tensor) -> th.Tensor:
    """
    :param elites: of the last iteration
    :param std: of the final distribution, ``[H, E, A]``
    :param action: the planner's, ``[E, A]``
    :param policy_actions: ``[H, E, P, A]``; without any the distance to them is NaN
    :return: ``[E, S]``, see :func:`statistic_names`
    """
    finite = th.isfinite(elites.values)
    n_finite = finite.sum(dim=1, keepdim=True)
    mean_value = th.where(finite, elites.values, 0.0).sum(dim=1, keepdim=True) / n_finite
    deviations = th.where(finite, elites.values - mean_value, 0.0)
    spread = (deviations.square().sum(dim=1, keepdim=True) / n_finite).sqrt()
    at_bounds = (action.abs() >= AT_BOUND).float().mean(dim=1, keepdim=True)
    distance = (action - policy_actions[0].mean(dim=1)).square().mean(dim=1, keepdim=True).sqrt()
    by_policy = elites.by_policy.float().mean(dim=1, keepdim=True)
    return th.cat([elites.values[:, :1], spread, by_policy, at_bounds, distance, std.mean(dim=2).transpose(0, 1)], dim=1)


def plan(
    world_model: WorldModel,
    actor: Actor,
    critic: Critic,
    config: PlannerConfig,
    z: th.Tensor,
    previous_mean: th.Tensor,
    noise: PlannerNoise,
    terminations_seen: th.Tensor,
) -> Plan:
    """
    Plan an action for every environment (paper, MPPI with policy trajectories).

    :param world_model: the world model
    :param actor: the policy
    :param critic: the critics
    :param config: the planner's settings
    :param z: latents ``[E, L]``
    :param previous_mean: the last plan's mean, ``[E, H, A]``; zeros where an episode starts
    :param noise: see :func:`draw_noise`
    :param terminations_seen: scalar tensor, 1 once the data held a termination, else 0
    :return: the plan. Its entries are NaN for an environment where no value was finite.
    """
    policy_actions = policy_trajectories(world_model, actor, z, noise.policy)
    mean, std = first_distribution(config, previous_mean)
    pairs = separate_draws(noise.critic_pairs)
    for i in range(config.n_iterations):
        arguments = (
            world_model, actor, critic, config, z, policy_actions, mean, std,
            noise.candidates[i], noise.terminal[i], pairs[i], terminations_seen,
        )  # fmt: skip
        if i + 1 < config.n_iterations:
            mean, std, *_ = refine(*arguments)
        else:
            mean, std, elites = search(*arguments)
    action = choose(elites.first_actions, elites.weights, noise.elite, mean)
    value = th.where(th.isfinite(elites.values[:, 0]), elites.values[:, 0], th.nan)
    exploratory = (action + std[0] * noise.exploration).clamp(-1.0, 1.0)
    measured = th.where(th.isfinite(value)[:, None], statistics(elites, std, action, policy_actions), th.nan)
    return Plan(action, std[0], mean.transpose(0, 1), exploratory, value, measured)
