"""Three sentences: what the world model, the critics and the planner are worth."""

from dataclasses import dataclass

import numpy as np

# what runs that learn keep within, and those that do not leave: docs/when_it_does_not_learn.md
LATENT_ERROR = 0.75  # at the planning horizon, where 1 is no better than to predict no change
VALUE_BIAS = (-0.75, 0.5)  # critics' mean less the returns that came, as a part of the returns' scale
NOTHING = np.zeros(0)


@dataclass(frozen=True)
class Sentence:
    """
    A part of the verdict.

    :param about: "world model", "critics", "planner" or "reward"
    :param healthy: whether it is within what runs that learn keep within; None where nothing could be measured
    :param text: of the verdict
    """

    about: str
    healthy: bool | None
    text: str


def of_world_model(latent: np.ndarray, reward: np.ndarray, constant: np.ndarray, horizon: int) -> Sentence:
    """
    :param latent: open-loop error by depth, ``[D]``, see :func:`sb3_boom.probing.open_loop`
    :param reward: absolute error of the reward, ``[D]``
    :param constant: that of the mean reward, ``[D]``
    :param horizon: ``H`` of the planner
    :return: the sentence
    """
    error, part = latent[horizon - 1], float(reward[0] / max(constant[0], 1e-9))
    if not np.isfinite(error):
        return Sentence("world model", None, f"No episode lasted {horizon} steps, so the world model could not be judged.")
    if constant[0] < 1e-6:
        return Sentence(
            "world model", error < LATENT_ERROR, f"The world model's latent is off by {error:.0%} of its way {horizon} steps "
            "ahead; every reward was the same, so that it has learned nothing about rewards.",
        )  # fmt: skip
    healthy = bool(error < LATENT_ERROR and part < 1.0)
    judged = "The world model foresees well" if healthy else "The world model is the first suspect"
    return Sentence(
        "world model", healthy, f"{judged}: {horizon} steps ahead its latent is off by {error:.0%} of the way it went, and "
        f"its reward's error is {part:.0%} of a constant guess's.",
    )  # fmt: skip


def of_critics(
    promised: np.ndarray, came: np.ndarray, prior_promised: np.ndarray = NOTHING, prior_came: np.ndarray = NOTHING
) -> Sentence:
    """
    :param promised: critics' values of the planner's actions, ``[n]``
    :param came: discounted returns from there, ``[n]``
    :param prior_promised: the same of the prior's actions, which the verdict mentions where it is off, ``[m]``
    :param prior_came: see there, ``[m]``
    :return: the sentence
    """
    if len(came) == 0:
        return Sentence("critics", None, "No episode was long enough to hold the critics against a return.")
    mean, bias = float(np.mean(came)), float(np.mean(promised - came))
    healthy = _is_near(promised, came)
    judged = "The critics can be believed" if healthy else f"The critics promise too {'much' if bias > 0 else 'little'}"
    times = f", {np.mean(promised) / mean:.1f} × what comes" if mean > 0.1 * float(np.std(came)) and mean > 0 else ""
    text = f"{judged}: {np.mean(promised):.3g} on average where {mean:.3g} came{times}"
    if len(prior_came) and not _is_near(prior_promised, prior_came):
        text += f" (for the prior's actions {np.mean(prior_promised):.3g} where {np.mean(prior_came):.3g} came)"
    return Sentence("critics", healthy, f"{text}.")


def _is_near(promised: np.ndarray, came: np.ndarray) -> bool:
    """:param promised: values. :param came: returns. :return: whether the values' bias is within :data:`VALUE_BIAS`"""
    scale = max(abs(float(np.mean(came))), float(np.std(came)), 1e-6)
    return VALUE_BIAS[0] * scale < float(np.mean(promised - came)) < VALUE_BIAS[1] * scale


def of_planner(planner: list[float], prior: list[float], at_bounds: float, by_policy: float) -> Sentence:
    """
    :param planner: returns of its episodes
    :param prior: returns of the policy's own
    :param at_bounds: share of the planner's actions at a bound
    :param by_policy: share of elites that the policy made
    :return: the sentence
    """
    ours, other = float(np.mean(planner)), float(np.mean(prior))
    spread = max(float(np.std([*planner, *prior])), 1e-9)
    same = abs(ours - other) <= 0.5 * spread or abs(ours - other) <= 0.05 * max(abs(ours), abs(other), 1e-9)
    judged = "earns as much as" if same else ("earns more than" if ours > other else "earns less than")
    return Sentence(
        "planner", same or ours > other, f"The planner {judged} the policy alone: {ours:.4g} against {other:.4g} an episode; "
        f"{at_bounds:.0%} of its actions are at a bound, and {by_policy:.0%} of its elites are the policy's own.",
    )  # fmt: skip


def of_reward(rewards: np.ndarray) -> Sentence | None:
    """
    :param rewards: of all steps
    :return: a sentence, if there was nothing to learn from
    """
    if np.ptp(rewards) > 1e-6:
        return None
    return Sentence(
        "reward", False, f"Every step was rewarded {rewards[0]:.3g}: nothing tells good actions from bad ones yet. Explore "
        "for longer (learning_starts), or give a reward on the way.",
    )  # fmt: skip
