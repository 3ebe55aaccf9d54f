"""What a type checker must accept of a user; see test_typing.py. Never run."""

from typing import assert_type

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_boom import BOOM, MlpPolicy


class MyBOOM(BOOM):
    pass


model = BOOM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(model_size="tiny"), planner_kwargs=dict(n_samples=64))
assert_type(model.learn(1_000, log_interval=2, progress_bar=True), BOOM)
assert_type(BOOM.load("model.zip", device="cpu"), BOOM)
assert_type(MyBOOM.load("model.zip"), MyBOOM)
assert_type(model.policy, MlpPolicy)
algorithm: BaseAlgorithm = model
action, state = model.predict(np.zeros(3, dtype=np.float32), deterministic=True)
action, state = model.predict(np.zeros(3, dtype=np.float32), state, np.array([False]))
model.prior.predict(np.zeros(3, dtype=np.float32))
