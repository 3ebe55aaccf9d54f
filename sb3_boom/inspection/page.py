"""Runs a few episodes, and writes what they say of a model to a page."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_boom import probing
from sb3_boom.boom import BOOM
from sb3_boom.core.planner import statistic_names
from sb3_boom.inspection import figures, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN = (0.1, 0.5, 0.9)  # of an episode: the steps whose plans are shown


@dataclass
class Inspection:
    """
    What was found.

    :param title: of the page
    :param sentences: the verdict
    :param numbers: behind it, by name: returns, biases (both in the unit of the rewards), errors and shares
    :param figures: matplotlib's, by title
    :param captions: what each says, by title
    :param notes: what could not be looked at, and why
    """

    title: str
    sentences: list[verdict.Sentence] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    figures: dict[str, "Figure"] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def html(self) -> str:
        """:return: the page, which needs no other file"""
        import jinja2

        environment = jinja2.Environment(loader=jinja2.PackageLoader("sb3_boom.inspection", "."), autoescape=True)
        images = {title: figures.svg(figure) for title, figure in self.figures.items()}
        return environment.get_template("page.html.j2").render(inspection=self, images=images)

    def _repr_html_(self) -> str:
        return self.html()

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """
        :param path: of the page; its figures are written beside it as PNG
        :return: the page
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        for title, figure in self.figures.items():
            figure.savefig(path.parent / f"{path.stem}-{title.lower().replace(' ', '-')}.png", dpi=120, facecolor="white")
        return path

    def attempt(self, title: str, caption: str, draw: Callable[[], "Figure"]) -> None:
        """
        Draw a figure, or note why there is none.

        :param title: of the figure
        :param caption: below it
        :param draw: returns it
        """
        try:
            self.figures[title], self.captions[title] = draw(), caption
        except Exception as error:  # a page without one figure says more than none
            self.notes.append(f"{title}: {error or type(error).__name__}")


def as_vec_env(model: BOOM, env: gym.Env | VecEnv | str) -> VecEnv:
    """
    :param model: to act in it
    :param env: or its id
    :return: normalised as the model's own
    """
    if isinstance(env, str):
        env = make_vec_env(env)
    elif not isinstance(env, VecEnv):
        given = env
        env = DummyVecEnv([lambda: given])
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None and not isinstance(env, VecNormalize):
        env = VecNormalize(
            env, training=False, norm_obs=normalizer.norm_obs, norm_reward=False, clip_obs=normalizer.clip_obs,
            gamma=normalizer.gamma, epsilon=normalizer.epsilon, norm_obs_keys=normalizer.norm_obs_keys,
        )  # fmt: skip
        if normalizer.norm_obs:
            env.obs_rms = normalizer.obs_rms
    return env


def inspect(
    model: BOOM, env: gym.Env | VecEnv | str, n_episodes: int = 3, seed: int = 0, max_steps: int = 3_000
) -> Inspection:
    """
    Let planner and prior act for a few episodes each, of the same seeds, and hold what the model promises against them. The
    model goes on as if there had been nothing.

    :param model: to inspect
    :param env: to act in, not the one that the model learns in, or its id
    :param n_episodes: of planner and prior each
    :param seed: of environments and generators
    :param max_steps: steps of either, after which episodes are cut
    :return: verdict and figures; :meth:`Inspection.save` writes the page
    :raises ImportError: without matplotlib or jinja2
    :raises ValueError: if the environment's spaces are not the model's
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'sb3_boom[inspect]'") from error
    name, env = (env if isinstance(env, str) else ""), as_vec_env(model, env)
    probing.check_spaces(model, env)
    with probing.own_randomness(model.device, seed):
        by_planner = probing.collect(model, env, n_episodes, seed, True, True, max_steps)
        by_prior = probing.collect(model, env, n_episodes, seed, False, True, max_steps)
        found = Inspection(f"{name or 'BOOM'} after {model.num_timesteps:,} steps")
        _judge(found, model, by_planner, by_prior)
    return found


def _judge(found: Inspection, model: BOOM, by_planner: list[probing.Episode], by_prior: list[probing.Episode]) -> None:
    horizon = model.policy.planner_config.horizon
    errors = probing.open_loop(model, by_planner)
    calibrated = {
        name: probing.calibration(model, episodes) for name, episodes in (("planner", by_planner), ("prior", by_prior))
    }
    returns = [[float(episode.raw_rewards.sum()) for episode in episodes] for episodes in (by_planner, by_prior)]
    statistics = np.nanmean(np.concatenate([episode.statistics for episode in by_planner]), axis=0)
    of_plans = dict(zip(statistic_names(horizon), statistics.tolist(), strict=True))
    nothing = verdict.of_reward(np.concatenate([episode.raw_rewards for episode in (*by_planner, *by_prior)]))
    found.sentences += [
        *([nothing] if nothing else []),
        verdict.of_world_model(errors["latent"], errors["reward"], errors["reward_constant"], horizon),
        verdict.of_critics(*calibrated["planner"], *calibrated["prior"]),
        verdict.of_planner(returns[0], returns[1], of_plans["at_bounds"], of_plans["policy_elites"]),
    ]
    seconds = np.concatenate([episode.seconds for episode in by_planner])[1:]  # the first one may compile
    scores = probing.termination_scores(model, [*by_planner, *by_prior])
    found.numbers |= {
        "planner's return": float(np.mean(returns[0])),
        "prior's return": float(np.mean(returns[1])),
        f"latent error, {horizon} steps ahead": float(errors["latent"][horizon - 1]),
        **{f"critics' bias, {name}": float(np.mean(p - c)) for name, (p, c) in calibrated.items() if len(c)},
        **{f"terminations' {name}": score for name, score in scores.items()},
        **{f"planner/{name}": value for name, value in of_plans.items()},
    }
    if not scores:
        found.notes.append("terminations: none were met, none foreseen")
    _draw(found, model, by_planner[0], errors, calibrated, returns)
    found.attempt("Latency", "Time of an action, planning included, on this machine.", lambda: figures.latency(1e3 * seconds))


def _draw(
    found: Inspection,
    model: BOOM,
    episode: probing.Episode,
    errors: dict[str, np.ndarray],
    calibrated: dict[str, tuple[np.ndarray, np.ndarray]],
    returns: list[list[float]],
) -> None:
    def along() -> Any:
        z, actions = probing.encode(model, episode)[:-1], th.as_tensor(episode.actions, dtype=th.float32, device=model.device)
        with th.no_grad():
            world = model.policy.world_model
            predicted = world.two_hot.decode(world.reward_logits(z, actions)).squeeze(-1).cpu().numpy()
        return figures.along(episode, predicted, probing.returns_to_come(model, episode))

    def plans() -> Any:
        steps = sorted({int(part * len(episode)) for part in CHOSEN})
        return figures.plans({step: probing.iterations(model, episode, step) for step in steps})

    found.attempt(
        "Return", "Planner and policy prior on episodes of the same seeds.", lambda: figures.returns(returns[0], returns[1])
    )
    found.attempt(
        "Along an episode", "What was predicted, and what came. Where the end was cut, the return is unknown.", along
    )
    found.attempt("Plans", "How the first action settles, from a cold start, at three steps of the episode.", plans)
    found.attempt(
        "Imagined against real", "Error by how far the model looks ahead. At the dashed line it is worth nothing.",
        lambda: figures.depth(errors),
    )  # fmt: skip
    found.attempt(
        "Calibration", "Points above the line are promises that were not kept.", lambda: figures.calibration(calibrated)
    )
