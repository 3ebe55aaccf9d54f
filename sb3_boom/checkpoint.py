"""
Runs that survive: checkpoints that are whole or not there, cost what is new, and bring back all that a run consists of.

A folder holds ``checkpoint-000001/`` and so on (:mod:`sb3_boom.manifests`), each of ``model.zip`` (SB3's), ``state.npz`` and
``logs.npz``, and parts of the replay buffer in ``segments/``, which checkpoints share.
"""

import contextlib
import json
import pathlib
import random
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom import logs, storage
from sb3_boom.files import FolderLock, replacing, sync_folder
from sb3_boom.guards import check_parameters
from sb3_boom.manifests import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    body_checksum,
    described,
    in_folder,
    is_there,
    newest_whole,
    number_of,
    read_manifest,
    read_npz,
    write_npz,
)
from sb3_boom.storage import Arrays

if TYPE_CHECKING:
    from sb3_boom.boom import BOOM

SelfBOOM = TypeVar("SelfBOOM", bound="BOOM")

MAY_DIFFER = ("verbose", "tensorboard_log", "worker_timeout", "stats_window_size")  # from the checkpoint's settings
OF_NORMALIZATION = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")


@dataclass
class Lineage:
    """
    The checkpoints in a folder that a model comes from.

    :param run: the run's name
    :param numbers: of the checkpoints, in order
    :param last: manifest of the last one
    :param pending: arrays of the last one's ``logs.npz``, until learning has opened its logs; None afterwards
    """

    run: str
    numbers: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    pending: Arrays | None = None


# --------------------------------------------------------------------- state


def random_states(model: "BOOM") -> dict[str, Any]:
    """
    :param model: whose action space's state to take, too
    :return: states of all generators, for JSON, but torch's
    """
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def set_random_states(model: "BOOM", states: dict[str, Any]) -> None:
    """
    :param model: whose action space's state to set, too
    :param states: from :func:`random_states`
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = states["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    model.action_space.np_random.bit_generator.state = states["action_space"]


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")


def _arrays_of(model: "BOOM") -> Arrays:
    """:param model: to save. :return: what ``state.npz`` holds"""
    assert model.replay_buffer is not None
    arrays = {f"buffer/{name}": array for name, array in storage.newest(model.replay_buffer).items()}
    arrays["random/torch"] = th.get_rng_state().numpy()
    if model.device.type == "cuda":
        arrays["random/cuda"] = th.cuda.get_rng_state(model.device).numpy()
    if model._planner_mean is not None:
        arrays["planner_mean"] = model._planner_mean.cpu().numpy()
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        for name, rms in _statistics(normalizer).items():
            arrays |= {f"{name}/mean": rms.mean, f"{name}/var": rms.var, f"{name}/count": np.array(rms.count)}
    return arrays


def _statistics(normalizer: VecNormalize) -> dict[str, Any]:
    obs_rms = getattr(normalizer, "obs_rms", None)
    by_key = obs_rms if isinstance(obs_rms, dict) else {} if obs_rms is None else {"": obs_rms}
    return {"normalization/reward": normalizer.ret_rms} | {f"normalization/obs/{key}": rms for key, rms in by_key.items()}


def _normalization(model: "BOOM") -> dict[str, Any] | None:
    normalizer = model.get_vec_normalize_env()
    return None if normalizer is None else {name: getattr(normalizer, name) for name in OF_NORMALIZATION}


def _set_arrays(model: "BOOM", arrays: Arrays) -> None:
    th.set_rng_state(th.from_numpy(arrays["random/torch"]))
    if model.device.type == "cuda" and "random/cuda" in arrays:
        th.cuda.set_rng_state(th.from_numpy(arrays["random/cuda"]), model.device)
    if "planner_mean" in arrays:
        model._planner_mean = th.from_numpy(arrays["planner_mean"]).to(model.device)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        for name, rms in _statistics(normalizer).items():
            rms.mean, rms.var, rms.count = arrays[f"{name}/mean"], arrays[f"{name}/var"], arrays[f"{name}/count"].item()


def begin_episodes(model: "BOOM") -> None:
    """
    Begin an episode in every environment, seeded by the run's seed and step, so that a run that goes on and one that is
    resumed there go on alike. Episodes that were open are closed as truncated.

    :param model: whose environments to reset
    """
    assert model.env is not None and model.replay_buffer is not None
    seed = model.seed if model.seed is not None else model._n_updates
    drawn = np.random.SeedSequence([seed, model.num_timesteps]).generate_state(1)[0]
    model.env.seed(int(drawn) >> 1)  # every environment adds its index
    model._last_obs = model.env.reset()  # type: ignore[assignment]
    model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
    if model._vec_normalize_env is not None:
        model._last_original_obs = model._vec_normalize_env.get_original_obs()
    if model.action_noise is not None:
        model.action_noise.reset()
    model.replay_buffer.close_episodes()


# --------------------------------------------------------------------- write


class Writer:
    """
    Writes checkpoints of one model into one folder, which it keeps other processes out of.

    :param folder: of the run
    :param keep: how many checkpoints to keep, the last ones
    :param files: further files that grow by lines, to be cut where a resumed run goes on
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2, files: tuple[pathlib.Path, ...] = ()) -> None:
        self.folder, self.keep, self.files = folder, keep, files
        self.lock = FolderLock(folder)
        self.lineage = Lineage("")
        self._fresh: list[pathlib.Path] = []  # segments that the last checkpoint has written

    def open(self, model: "BOOM") -> None:
        """
        Lock the folder, and cut the logs where the model goes on.

        :param model: to save from now on
        :raises ValueError: if the folder has checkpoints that the model does not come from
        :raises OSError: if another process works in the folder
        """
        self.lock.acquire()
        try:
            self.lineage = _lineage_of(model, self.folder)
            opened = logs.of_logger(model.logger) | {f"file {path}": path for path in self.files}
            logs.restore(self.lineage.pending or {}, opened)
        except BaseException:
            self.lock.release()
            raise
        if self.lineage.pending is not None:
            _restore_pending_means(model, self.lineage.last)
        self.lineage.pending = None
        for unfinished in self.folder.glob(".checkpoint-*"):
            shutil.rmtree(unfinished)
        for unfinished in self.folder.glob("segments/.*.tmp"):
            unfinished.unlink()

    def close(self) -> None:
        """Let other processes in."""
        self.lock.release()

    def is_new(self, model: "BOOM") -> bool:
        """
        :param model: maybe unchanged since the last checkpoint
        :return: whether it has changed
        """
        counters = self.lineage.last.get("counters", {})
        return counters.get("num_timesteps") != model.num_timesteps or counters.get("n_updates") != model._n_updates

    def write(self, model: "BOOM") -> pathlib.Path:
        """
        Write a checkpoint where the replay buffer, the counters and the last observation agree.

        :param model: to save
        :return: the checkpoint's folder
        :raises ValueError: if the model's parameters are NaN or infinite; the checkpoints before are kept
        :raises OSError: if the disk is full; the checkpoints before are kept
        """
        model._catch_up()  # with updates that a GPU does beside the next step
        check_parameters(model.policy, model._n_updates)
        model._record_losses()  # what was not read from the device yet
        number = 1 + max(map(number_of, in_folder(self.folder)), default=0)
        self._fresh = []
        unfinished, finished = (self.folder / f"{start}checkpoint-{number:06d}" for start in (".", ""))
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            body = {
                "format": FORMAT,
                "run": self.lineage.run,
                "counters": {
                    "num_timesteps": model.num_timesteps,
                    "n_updates": model._n_updates,
                    "n_envs": model.n_envs,
                    "collected": model.collected,
                    "enough_data": model._enough_data,
                },
                "random": random_states(model),
                "meters": model.meters.state(),
                "means": _pending_means(model),
                "normalization": _normalization(model),
                "buffer": self._write_segments(model),
                "files": self._write_files(model, unfinished),
            }
            text = json.dumps(body, default=_as_json, sort_keys=True)
            body = json.loads(text)
            with replacing(unfinished / MANIFEST) as file:
                file.write(json.dumps({"checksum": body_checksum(body), "body": body}).encode())
            unfinished.rename(finished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            for path in self._fresh:
                path.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        self.lineage.numbers.append(number)
        self.lineage.last = body
        model.lineages[str(self.folder.resolve())] = self.lineage
        self._prune()
        return finished

    def _write_files(self, model: "BOOM", path: pathlib.Path) -> list[dict[str, Any]]:
        with replacing(path / "model.zip") as file:
            model.save(file)  # type: ignore[arg-type]
        write_npz(path / "state.npz", _arrays_of(model))
        write_npz(path / "logs.npz", logs.contents(model, self.files), compressed=True)
        return [described(path / name) for name in ("model.zip", "state.npz", "logs.npz")]

    def _write_segments(self, model: "BOOM") -> dict[str, Any]:
        """:param model: to save. :return: what its manifest says of the replay buffer, whose new rows are written"""
        buffer = model.replay_buffer
        assert buffer is not None
        known = self.lineage.last.get("buffer", {})
        same = known.get("id") == buffer._id and known["n_added"] <= buffer._n_added
        begin, kept = (known["n_added"], known["segments"]) if same else (0, [])
        kept = [entry for entry in kept if entry["last"] > buffer._n_added - buffer.buffer_size]
        for first, last, arrays in storage.segments(buffer, begin):
            path = self.folder / "segments" / f"{first:012d}-{last:012d}-{storage.new_id()[:8]}.npz"
            self._fresh.append(path)
            write_npz(path, arrays)
            kept = [*kept, {**described(path), "first": first, "last": last}]
        return {"id": buffer._id, "n_added": buffer._n_added, "buffer_size": buffer.buffer_size, "segments": kept}

    def _prune(self) -> None:
        """Remove what is not among the last ``keep`` checkpoints that the model comes from."""
        self.lineage.numbers = self.lineage.numbers[-self.keep :]
        kept = set(self.lineage.numbers)
        needed = set()
        for path in in_folder(self.folder):
            try:
                if number_of(path) in kept:
                    needed |= {entry["name"] for entry in read_manifest(path)["buffer"]["segments"]}
                    continue
            except ValueError:  # damaged since, and of no use any more
                pass
            except OSError:  # what it needs is not known: remove nothing
                return
            with contextlib.suppress(OSError):  # the next one removes what is left
                (path / MANIFEST).unlink(missing_ok=True)  # first, so that what is left of it is taken for nothing
                shutil.rmtree(path)
        for path in (self.folder / "segments").glob("*.npz"):
            if path.name not in needed:
                path.unlink(missing_ok=True)


def _lineage_of(model: "BOOM", folder: pathlib.Path) -> Lineage:
    lineage = model.lineages.get(str(folder.resolve()))
    if lineage is None and is_there(folder):
        raise ValueError(
            f'{folder} has checkpoints that this model does not come from: go on with BOOM.resume("{folder}", env), '
            "or take another folder"
        )
    if lineage is not None and lineage.last and not is_there(folder):
        lineage = None  # removed meanwhile
    return lineage or Lineage(storage.new_id())


def _pending_means(model: "BOOM") -> dict[str, Any]:
    """:param model: to save. :return: what its logger will show next, by name: value, how many it is the mean of, not where"""
    values, counts = model.logger.name_to_value, model.logger.name_to_count
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float, np.number))}
    excluded = model.logger.name_to_excluded
    return {name: [value, counts.get(name, 0), excluded.get(name)] for name, value in numbers.items()}


def _restore_pending_means(model: "BOOM", manifest: dict[str, Any]) -> None:
    logger = model.logger
    for name, (value, count, excluded) in manifest.get("means", {}).items():
        logger.name_to_value[name], logger.name_to_count[name], logger.name_to_excluded[name] = value, count, excluded


# -------------------------------------------------------------------- resume


def resume(
    cls: type[SelfBOOM], folder: pathlib.Path, env: GymEnv | str, device: th.device | str, settings: dict[str, Any]
) -> SelfBOOM:
    """
    See :meth:`sb3_boom.BOOM.resume`.

    :param cls: of the model
    :param folder: of the run
    :param env: to go on in
    :param device: of the model
    :param settings: that the checkpoint must have, or :data:`MAY_DIFFER`
    :return: the model
    """
    if not is_there(folder):
        raise FileNotFoundError(
            f"{folder} has no complete checkpoint to resume from: look for the right folder, or start a run"
        )
    with FolderLock(folder):
        checkpoint = newest_whole(folder)
        counters = checkpoint.manifest["counters"]
        env = cls._wrap_env(maybe_make_env(env, verbose=0), verbose=0)
        if env.num_envs != counters["n_envs"]:
            raise ValueError(
                f"n_envs: {checkpoint.path} was written with {counters['n_envs']} environments, not {env.num_envs}"
            )
        changed = {name: value for name, value in settings.items() if name in MAY_DIFFER}
        model = cls.load(checkpoint.path / "model.zip", env, device, **changed)
        _check_same(model, checkpoint, {name: value for name, value in settings.items() if name not in MAY_DIFFER})
        _restore(model, checkpoint)
        numbers = sorted(number_of(path) for path in in_folder(folder))
        model.lineages[str(folder.resolve())] = Lineage(
            checkpoint.manifest["run"],
            [number for number in numbers if number <= checkpoint.number],
            checkpoint.manifest,
            read_npz(checkpoint.path / "logs.npz"),
        )
    return model


def _check_same(model: "BOOM", checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """
    :param model: as the checkpoint has it, in its new environments
    :param checkpoint: where it comes from
    :param settings: expected of it
    :raises ValueError: naming what differs
    """
    theirs, ours = checkpoint.manifest["normalization"], _normalization(model)
    differing = {name: (getattr(model, name), value) for name, value in settings.items() if _differs(model, name, value)}
    if (theirs is None) != (ours is None):
        differing["VecNormalize"] = (theirs is not None, ours is not None)
    elif theirs is not None and ours is not None:
        differing |= {f"VecNormalize's {name}": (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
    if differing:
        text = ", ".join(f"{name} was {was}, is {now}" for name, (was, now) in differing.items())
        raise ValueError(f"{checkpoint.path} is of a run with other settings: {text}. Resume with its own, or start a new run")


def _differs(model: "BOOM", name: str, value: Any) -> bool:
    if name == "policy":
        return model.policy_aliases.get(value, value) is not model.policy_class
    if not hasattr(model, name):
        raise TypeError(f"{type(model).__name__}.resume() got an unexpected argument {name}")
    ours = getattr(model, name)
    if name in ("planner_kwargs", "policy_kwargs") and isinstance(value, dict):  # presets and "auto" have added to these
        return any((ours or {}).get(key) != given for key, given in value.items() if given != "auto")
    if name == "train_freq":
        value = tuple(value) if isinstance(value, (tuple, list)) else (value, "step")
        ours = (ours.frequency, ours.unit.value)
    # a schedule, or noise, can't be compared with what was unpickled
    return not callable(value) and value is not None and value not in ("auto", ours)


def _restore(model: "BOOM", checkpoint: Checkpoint) -> None:
    """
    :param model: as SB3 has loaded it; gets all the rest
    :param checkpoint: where it comes from
    """
    manifest, buffer = checkpoint.manifest, model.replay_buffer
    assert buffer is not None
    if manifest["buffer"]["buffer_size"] != buffer.buffer_size:
        sizes = f"{manifest['buffer']['buffer_size']}, not {buffer.buffer_size}"
        raise ValueError(f"buffer_size: the replay buffer of {checkpoint.path} has rows for {sizes}")
    arrays = read_npz(checkpoint.path / "state.npz")
    parts = (
        (entry["first"], read_npz(checkpoint.path.parent / "segments" / entry["name"]))
        for entry in manifest["buffer"]["segments"]
    )
    newest = {name.removeprefix("buffer/"): array for name, array in arrays.items() if name.startswith("buffer/")}
    storage.restore(buffer, manifest["buffer"]["n_added"], parts, newest)
    buffer._id = manifest["buffer"]["id"]
    model._enough_data = manifest["counters"]["enough_data"]
    model.collected, model.takes_up_rollout = tuple(manifest["counters"]["collected"]), True
    model.meters.set_state(manifest["meters"])
    _set_arrays(model, arrays)
    set_random_states(model, manifest["random"])
    begin_episodes(model)
    logs.restore(read_npz(checkpoint.path / "logs.npz"), logs.of_monitors(model))
