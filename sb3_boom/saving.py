"""BOOM's models and replay buffers on disk: zip and pickle files as SB3's, checkpoints, exports."""

import importlib
import io
import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv

from sb3_boom import checkpoint
from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.checks import check_archive, check_buffer, check_load_arguments, misfit_named
from sb3_boom.files import load_pickle, save_pickle
from sb3_boom.foresight import FreshTerminations
from sb3_boom.guards import warn_if_non_finite
from sb3_boom.policies import BOOMPolicy

SelfSaved = TypeVar("SelfSaved", bound="SavedAlgorithm")


class SavedAlgorithm(OffPolicyAlgorithm):
    """What :class:`sb3_boom.BOOM` does with files; its constructor is SB3's."""

    policy: BOOMPolicy
    replay_buffer: WeightedReplayBuffer | None  # type: ignore[assignment]
    horizon: int
    fresh_terminations: FreshTerminations
    _enough_data: bool

    def _catch_up(self) -> None:
        """Do the updates that are owed."""
        raise NotImplementedError

    def _excluded_save_params(self) -> list[str]:
        ours = (
            "actor", "critic", "critic_target", "meters", "pace", "_enough_data", "_planner_mean", "_planned", "_callback",
            "_defers_updates", "_owed", "fresh_terminations", "plan_optimism",
            "between_steps", "at_end", "lineages", "collected", "takes_up_rollout",
        )  # fmt: skip
        return [*super()._excluded_save_params(), *ours]

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: state dicts by name: "policy" (all networks), "policy.model_optimizer" and "policy.actor_optimizer"; after the
            updates that are owed
        """
        self._catch_up()
        return super().get_parameters()

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.model_optimizer", "policy.actor_optimizer"], []

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip-file, see :meth:`stable_baselines3.common.base_class.BaseAlgorithm.save`. Warns if it has
        parameters that are NaN or infinite.

        :param path: path to the file (or a file-like) where to save it
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises OSError: if it can't be written
        """
        warn_if_non_finite(self.policy, path)
        super().save(path, exclude, include)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle file, as large as what is in it. A file that was there before is replaced whole, or
        stays if the disk is full.

        :param path: Path to the file where the replay buffer should be saved; ".pkl" is added where there is no suffix
        :raises OSError: if it can't be written
        """
        if self.num_timesteps > 0 and (self.replay_buffer is None or self.replay_buffer.size() == 0):
            warnings.warn(
                "the replay buffer to save is empty, as a loaded model's is: save it from the model that learned", stacklevel=2
            )
        if isinstance(path, (str, pathlib.Path)):
            save_pickle(_pickle_path(path), self.replay_buffer)
        else:
            super().save_replay_buffer(path)

    @classmethod
    def resume(
        cls: type[SelfSaved], folder: str | pathlib.Path, env: GymEnv | str, device: th.device | str = "auto", **settings: Any
    ) -> SelfSaved:
        """
        Go on from the last complete checkpoint of a :class:`~sb3_boom.callbacks.ResumableCheckpointCallback`, with all that
        belongs to it: networks, optimizers, replay buffer, counters and random states, those of Python, NumPy and torch too.
        The environments start new episodes; their Monitors' files go on after the checkpoint's last row.

        :param folder: the callback's
        :param env: as for the constructor; of the same spaces and the same number
        :param device: Device on which the code should run
        :param settings: constructor arguments that the checkpoint is expected to have; ``verbose``, ``tensorboard_log``,
            ``worker_timeout`` and ``stats_window_size`` may be changed
        :return: the model; ``learn(total - model.num_timesteps, callback, reset_num_timesteps=False)`` goes on
        :raises FileNotFoundError: if there is no complete checkpoint
        :raises ValueError: for other settings, spaces or another number of environments
        :raises TypeError: for a setting that there is not
        :raises OSError: if another process works in the folder
        """
        return checkpoint.resume(cls, pathlib.Path(folder), env, device, settings)  # type: ignore[type-var]

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file. It draws by the model's ``horizon`` and ``replay_buffer_kwargs`` then.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: unused, as with SB3's own ReplayBuffer: an open episode is closed by the next reset
        :raises ValueError: for a file that is damaged; for a buffer of another kind, of other spaces or of another number of
            environments
        :raises OSError: if it can't be read
        """
        if isinstance(path, (str, pathlib.Path)):
            path = pathlib.Path(path)
            loaded = load_pickle(path if path.exists() else _pickle_path(path))
        else:
            loaded = load_from_pkl(path, self.verbose)
        check_buffer(loaded, {name: getattr(self, name) for name in ("observation_space", "action_space", "n_envs")})
        loaded.device = self.device  # it was pickled with its own
        loaded.draw_like(self.horizon, **self.replay_buffer_kwargs)
        loaded.move_storage()
        self.replay_buffer = loaded
        self.fresh_terminations = FreshTerminations()  # newest is another's now
        self._enough_data = False

    def export(self, path: str | os.PathLike, prior_only: bool = False) -> pathlib.Path:
        """
        Write policy prior and planner to one ONNX file, for a robot that has numpy and onnxruntime alone.

        :param path: where to; ``.onnx`` is added where there is no suffix
        :param prior_only: without the planner
        :return: the file, for :meth:`sb3_boom.deployment.Agent.load`
        :raises ValueError: if a features extractor can't be exported
        :raises ImportError: without onnx or onnxscript
        """
        # a later room, as a plug-in: nothing of it is needed to learn
        return importlib.import_module("sb3_boom.deployment.export").export(self, path, prior_only)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfSaved],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSaved:
        """
        Load the model from a zip-file. See :meth:`stable_baselines3.common.base_class.BaseAlgorithm.load`.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on (can be None if you only need prediction)
        :param device: Device on which the code should run.
        :param custom_objects: objects to use instead of the stored ones, by name, for what can't be unpickled here
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        :param kwargs: constructor arguments to change when loading; of ``policy_kwargs`` only ``encoder_lr_scale``,
            ``compile`` and ``tf32`` can be, given by themselves
        :return: new model instance with loaded parameters
        :raises ValueError: for a file that is no archive of BOOM, that is damaged, or of a later format; for an argument that
            changes the networks
        :raises TypeError: for an argument that the constructor does not have
        :raises FileNotFoundError: if there is no such file
        """
        check_archive(path)
        check_load_arguments(cls.__mro__[: cls.__mro__.index(SavedAlgorithm)], kwargs)
        with misfit_named(path, kwargs):
            model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        warn_if_non_finite(model.policy, path)
        return model


def _pickle_path(path: str | pathlib.Path) -> pathlib.Path:
    """:param path: a user's. :return: it, with ".pkl" if it has no suffix, as in SB3"""
    path = pathlib.Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.pkl")
