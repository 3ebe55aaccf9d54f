"""Learning that has gone wrong is stopped before it is saved over what was right, and no action is NaN."""

import math
import warnings
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy

UPDATES_PER_CHECK = 100  # a look at the parameters waits for the device
STEPS_WITHOUT_A_DRAW = 1_000
WHAT_TO_CHANGE = "Lower learning_rate, or check the range of rewards and observations"


def check_losses(terms: dict[str, float], n_updates: int) -> None:
    """
    :param terms: means of losses, by name
    :param n_updates: done so far, for the message
    :raises ValueError: if one is NaN or infinite
    """
    for name, value in terms.items():
        if not math.isfinite(value):
            raise ValueError(f"learning has diverged: {name} is {value} within {n_updates} updates. {WHAT_TO_CHANGE}")


def non_finite_parameter(policy: th.nn.Module) -> str | None:
    """
    Waits for the device once.

    :param policy: the networks
    :return: the name of the first tensor of theirs that has a NaN or infinite number, None if there is none
    """
    tensors = {name: tensor for name, tensor in policy.state_dict().items() if tensor.is_floating_point() and tensor.numel()}
    largest = th._foreach_norm(list(tensors.values()), math.inf)
    finite = th.stack([norm.float() for norm in largest]).isfinite().tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


def check_parameters(policy: th.nn.Module, n_updates: int) -> None:
    """
    :param policy: the networks
    :param n_updates: done so far, for the message
    :raises ValueError: if a parameter is NaN or infinite
    """
    name = non_finite_parameter(policy)
    if name is not None:
        raise ValueError(f"learning has diverged: {name} is NaN or infinite after {n_updates} updates. {WHAT_TO_CHANGE}")


def warn_if_non_finite(policy: th.nn.Module, path: Any) -> None:
    """
    :param policy: the networks
    :param path: of the file they come from or go to
    """
    name = non_finite_parameter(policy)
    if name is not None:
        warnings.warn(f"the model in {path} can't act: {name} is NaN or infinite. Go back to an earlier one", stacklevel=3)


def warn_of_nothing_to_draw(horizon: int) -> None:
    """:param horizon: steps of a window"""
    warnings.warn(
        f'sampling="episode" has found no finished episode of more than horizon={horizon} steps for {STEPS_WITHOUT_A_DRAW} '
        'steps since warm-up, so that nothing is learned: use sampling="uniform", a TimeLimit, or a shorter horizon',
        stacklevel=2,
    )


def finite_actions(actions: th.Tensor) -> np.ndarray:
    """
    Bring planned actions to the host, where a failed plan is seen without another synchronisation.

    :param actions: ``[E, A]``
    :return: the same as an array
    :raises ValueError: if a plan failed
    """
    array = actions.cpu().numpy()
    if not np.isfinite(array).all():
        raise ValueError(
            "planning failed: no action sequence has a finite value, so the networks have diverged. "
            "Check the rewards' and observations' range, or lower learning_rate"
        )
    return array


def check_observation(policy: BasePolicy, observation: Any) -> None:
    """
    :param policy: whose ``predict`` it is
    :param observation: what that was given
    :raises ValueError: for what would end in an action of NaN, and for what SB3 refuses
    """
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
        BasePolicy.predict(policy, observation)  # type: ignore[arg-type]  # raises SB3's own message
    for key, value in (observation if isinstance(observation, dict) else {"": observation}).items():
        array = np.asarray(value)
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            where = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
            name = f"observation[{key!r}]" if key else "observation"
            raise ValueError(f"predict() was given an {name} that is NaN or infinite at index {where}")
