"""What a user would pick instead, on the same environments and seeds: SB3's and sb3-contrib's algorithms by their defaults."""

import importlib
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_boom import zoo

ALGORITHMS = {"SAC": "stable_baselines3", "TQC": "sb3_contrib", "CrossQ": "sb3_contrib"}
LEARNING_STARTS = 1_000


def algorithm(name: str) -> type[OffPolicyAlgorithm]:
    """
    :param name: a key of :data:`ALGORITHMS`
    :return: the class
    """
    return getattr(importlib.import_module(ALGORITHMS[name]), name)


def settings() -> dict[str, Any]:
    """
    :return: constructor arguments of all of them, beside ``env`` and ``seed``: their defaults after a longer warm-up
    """
    return {"policy": "MlpPolicy", "learning_starts": LEARNING_STARTS}


def entry(ours: dict[str, Any]) -> dict[str, Any]:
    """
    :param ours: BOOM's entry of a hyperparameter file
    :return: theirs: the same wrappers and environments, observations as they come, their own defaults
    """
    shared = {key: ours[key] for key in zoo.OF_THE_ENVIRONMENT if key in ours and key != "normalize"}
    return shared | settings()
