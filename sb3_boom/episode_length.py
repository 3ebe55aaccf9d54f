"""How long an episode can get, in steps of the agent."""

import itertools
import re

from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv


def episode_length(env: GymEnv | None) -> int | None:
    """
    The outermost TimeLimit, divided by the repeats of a RepeatAction around it.

    :param env: the vectorized environment, or None
    :return: steps ``T`` as the agent counts them, None if there is no TimeLimit
    """
    if not isinstance(env, VecEnv) or not env.has_attr("_max_episode_steps"):
        return None
    limit = env.get_attr("_max_episode_steps", indices=0)[0]
    if limit is None:
        return None
    # a worker process can send the names of its wrappers, outermost first, but hardly the wrappers themselves
    wrappers = re.findall(r"<(\w+)", str(env.env_method("__str__", indices=0)[0]))
    around = list(itertools.takewhile(lambda name: not name.endswith("TimeLimit"), wrappers))
    if "RepeatAction" in around:
        limit = -(-limit // env.get_attr("num_repeats", indices=0)[0])
    return int(limit)
