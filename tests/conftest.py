"""What all tests share: tiny models, a features extractor, and the golden vectors' place."""

from sb3_boom import BOOM  # before torch, for fast products: see core/processor.py

# isort: split
import os
import pathlib

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import settings
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_boom import boom
from sb3_boom.core.compilation import eager

th.set_num_threads(1)  # tiny matrices: a second thread only costs
# first calls are slow on a loaded machine, and a suite should fail on the change that breaks it
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

TINY_PLANNER = dict(n_samples=32, n_elites=4, n_policy_samples=2, n_iterations=2)
TINY_POLICY = dict(model_size="tiny", mlp_dim=32, enc_dim=32, latent_dim=16, n_critics=3, compile=False)
TINY = dict(
    buffer_size=2_000,
    learning_starts=20,
    pretrain_steps=2,
    batch_size=16,
    planner_kwargs=TINY_PLANNER,
    policy_kwargs=TINY_POLICY,
    seed=0,
)


SMALL = dict(
    learning_starts=20,
    pretrain_steps=2,
    batch_size=8,
    planner_kwargs=dict(n_samples=16, n_elites=4, n_policy_samples=2, n_iterations=1),
)


class OneLayer(BaseFeaturesExtractor):
    """A user's own extractor, with parameters."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 5) -> None:
        super().__init__(observation_space, features_dim)
        self.layer = th.nn.Linear(int(np.prod(observation_space.shape)), features_dim)

    def forward(self, observations):
        return self.layer(observations.flatten(1))


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """The folder of the authors' numbers: SB3_BOOM_GOLDEN, else the one beside the repository."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "golden"
    folder = pathlib.Path(os.environ.get("SB3_BOOM_GOLDEN", default))
    if not (folder / "transforms.npz").exists():
        pytest.skip(f"no golden vectors in {folder}: set SB3_BOOM_GOLDEN to their folder")
    return folder


@pytest.fixture
def small_scale(tmp_path, monkeypatch):
    """
    For programs as a user would write them: tiny plans and batches, few random steps, no compiler, a folder of their own, in
    which they learn within forty steps. Gives a list of the models that they train.
    """
    resolve_auto, learn, trained = boom.resolve_auto, BOOM.learn, []

    def learn_and_tell(self, *args, **kwargs):
        trained.append(self)
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(boom, "resolve_auto", lambda *arguments: resolve_auto(*arguments) | SMALL)
    monkeypatch.setattr(BOOM, "learn", learn_and_tell)
    monkeypatch.setattr("sb3_boom.policies.choose_compiler", lambda setting, device: eager)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.chdir(tmp_path)
    return trained
