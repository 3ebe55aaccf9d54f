"""The figures of an inspection; their colours are read on white and on black."""

import base64
import io
from typing import Any

import numpy as np

from sb3_boom.probing import Episode

GREY, BLUE, ORANGE = "#80858d", "#3b8fd6", "#e0792b"
STYLE: Any = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "legend.frameon": False,
    "axes.titlesize": 11, "figure.constrained_layout.use": True, "svg.hashsalt": "sb3_boom",
}  # fmt: skip


def new(n_panels: int = 1) -> tuple[Any, list[Any]]:
    """
    :param n_panels: one under the other
    :return: figure and axes
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 0.6 + 2.3 * n_panels), layout="constrained")
        axes = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
    return figure, list(axes)


def svg(figure: Any) -> str:
    """
    :param figure: drawn
    :return: an image for a page, as a data URL
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(axis: Any) -> None:
    """:param axis: to explain"""
    axis.legend(
        frameon=False,
        labelcolor=GREY,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        borderaxespad=0.0,
        markerscale=2.0,
    )


def returns(planner: list[float], prior: list[float]) -> Any:
    """:param planner: by episode :param prior: by episode. :return: figure"""
    figure, (axis,) = new()
    for offset, values, colour, name in ((-0.2, planner, BLUE, "planner"), (0.2, prior, ORANGE, "prior")):
        axis.bar(np.arange(len(values)) + 1 + offset, values, 0.4, color=colour, label=name)
    axis.set_xticks(range(1, max(len(planner), len(prior)) + 1))
    axis.set(xlabel="episode", ylabel="return")
    legend(axis)
    return figure


def along(episode: Episode, predicted: np.ndarray, came: np.ndarray) -> Any:
    """
    :param episode: ``T`` steps
    :param predicted: reward of every step, ``[T]``
    :param came: discounted return from every step, NaN where unknown, ``[T]``
    :return: figure
    """
    figure, (reward, value) = new(2)
    reward.plot(episode.rewards, color=BLUE, label="met")
    reward.plot(predicted, color=ORANGE, label="predicted", linewidth=1)
    reward.set(ylabel="reward")
    value.plot(came, color=BLUE, label="came")
    value.plot(episode.values, color=ORANGE, label="promised by the plan", linewidth=1)
    value.set(xlabel="step of the episode", ylabel="discounted return")
    for axis in (reward, value):
        legend(axis)
    return figure


def plans(traces: dict[int, tuple[np.ndarray, np.ndarray]]) -> Any:
    """
    :param traces: by step of the episode, mean and std of the first action by iteration, ``[I, A]`` each
    :return: figure, of the first action dimension
    """
    figure, (axis,) = new()
    for colour, (step, (mean, std)) in zip((BLUE, ORANGE, GREY), traces.items(), strict=False):
        x = np.arange(1, len(mean) + 1)
        axis.plot(x, mean[:, 0], color=colour, marker="o", markersize=3, label=f"step {step}")
        axis.fill_between(x, mean[:, 0] - std[:, 0], mean[:, 0] + std[:, 0], color=colour, alpha=0.2, linewidth=0)
    axis.set_xticks(x)
    axis.set(xlabel="iteration", ylabel="mean ± std of action 1")
    legend(axis)
    return figure


def depth(errors: dict[str, np.ndarray]) -> Any:
    """:param errors: of :func:`sb3_boom.probing.open_loop`. :return: figure"""
    figure, (latent, reward, value) = new(3)
    x = np.arange(1, len(errors["latent"]) + 1)
    for axis, name, label in ((latent, "latent", "latent"), (reward, "reward", "reward"), (value, "value", "value")):
        axis.plot(x, errors[name], color=BLUE, marker="o", markersize=3, label="model")
        axis.set(ylabel=f"{label} error")
    latent.axhline(1.0, color=ORANGE, linestyle="--", label="nothing changes")
    reward.plot(x, errors["reward_constant"], color=ORANGE, linestyle="--", label="mean reward")
    value.set(xlabel="steps ahead, without looking")
    for axis in (latent, reward, value):
        axis.set_ylim(bottom=0)  # last, since the top stays where it is from here on
    for axis in (latent, reward):
        legend(axis)
    return figure


def calibration(by_actor: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """:param by_actor: values promised and returns that came. :return: figure"""
    figure, (axis,) = new()
    for colour, (name, (promised, came)) in zip((BLUE, ORANGE), by_actor.items(), strict=True):
        axis.scatter(came, promised, s=6, alpha=0.5, color=colour, label=name, linewidths=0)
    everything = np.concatenate([array for pair in by_actor.values() for array in pair])
    ends = [everything.min(), everything.max()]
    axis.plot(ends, ends, color=GREY, linewidth=1)
    axis.set(xlabel="return that came", ylabel="value promised")
    legend(axis)
    return figure


def latency(milliseconds: np.ndarray) -> Any:
    """:param milliseconds: of each action. :return: figure"""
    figure, (axis,) = new()
    axis.hist(np.clip(milliseconds, 0.0, np.quantile(milliseconds, 0.99)), bins=30, color=BLUE)
    axis.axvline(np.median(milliseconds), color=ORANGE, label=f"median {np.median(milliseconds):.1f} ms")
    axis.set(xlabel="milliseconds an action", ylabel="actions")
    legend(axis)
    return figure
