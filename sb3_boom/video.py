"""Videos that show what the planner expects beside what happens."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rl_zoo3.utils import ALGOS
from stable_baselines3.common import vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper, VecVideoRecorder
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvObs, VecEnvStepReturn

from sb3_boom.boom import BOOM
from sb3_boom.core.planner import Plan

DPI = 80
WIDTH = 360  # pixels of the panel
SHOWN = 200  # steps: older ones leave the panel


class PlanPanel(VecEnvWrapper):
    """
    Draws two curves of the first environment to the right of its frames: what the plan made for each step promised to come
    (the value of its best elite, discounted), and the reward of the step. A step without a plan leaves a gap.

    :param venv: rendered, with ``render_mode="rgb_array"``
    :ivar promised: by step of the episode so far, in the unit of the rewards, NaN without a plan
    :ivar rewards: those met, by step
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.promised: list[float] = []
        self.rewards: list[float] = []
        self._newest = np.nan
        self._figure = Figure(dpi=DPI, layout="constrained")
        self._canvas = FigureCanvasAgg(self._figure)
        above, below = self._figure.subplots(2, sharex=True)
        above.set_title("return promised by the plan", fontsize=9)
        below.set_title("reward met", fontsize=9)
        below.set_xlabel("step", fontsize=8)
        self._axes = (above, below)
        self._lines = [axes.plot([], [], color=color)[0] for axes, color in ((above, "tab:blue"), (below, "tab:orange"))]
        for axes in self._axes:
            axes.tick_params(labelsize=8)

    def planned(self, plan: Plan) -> None:
        """:param plan: the newest, made for the observations of now"""
        self._newest = float(plan.value[0])

    def reset(self) -> VecEnvObs:
        """
        :return: observations ``[E, ...]``
        """
        self.promised, self.rewards = [], []
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: as any VecEnv
        """
        observations, rewards, dones, infos = self.venv.step_wait()
        self.promised.append(self._newest)
        self.rewards.append(float(rewards[0]))
        self._newest = np.nan
        if dones[0]:
            self.promised, self.rewards = [], []
        return observations, rewards, dones, infos

    def render(self, mode: str | None = None) -> np.ndarray | None:
        """
        :param mode: as any VecEnv. Default None: the environments' own
        :return: the frame with the panel, uint8, ``[height, width, 3]``; whatever else the environment renders, as it is
        """
        frame = self.venv.render(mode)
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            return frame
        panel = self.panel(frame.shape[0])
        return np.concatenate([frame[..., :3], panel], axis=1)

    def panel(self, height: int) -> np.ndarray:
        """
        :param height: in pixels
        :return: the curves, uint8 ``[height, WIDTH, 3]``
        """
        self._figure.set_size_inches(WIDTH / DPI, height / DPI)
        end = len(self.rewards)
        steps = range(max(0, end - SHOWN), end)
        for axes, line, values in zip(self._axes, self._lines, (self.promised, self.rewards), strict=True):
            line.set_data(steps, [values[step] for step in steps])
            axes.relim()
            axes.autoscale_view()
        self._canvas.draw()
        drawn = np.asarray(self._canvas.buffer_rgba())[..., :3]
        fitted = np.full((height, WIDTH, 3), 255, np.uint8)  # inches are not whole pixels
        fitted[: drawn.shape[0], : drawn.shape[1]] = drawn[:height, :WIDTH]
        return fitted


def record(run: Callable[[], object]) -> None:
    """
    Have SB3's video recorder draw a :class:`PlanPanel`.

    :param run: loads a model as rl_zoo3 does, by its registry, and then makes a recorder
    """
    loaded: list[BOOM] = []

    class Watched(BOOM):
        """Notes what has been loaded."""

        @classmethod
        def load(cls, *args: Any, **kwargs: Any) -> BOOM:  # type: ignore[override]
            """As BOOM's."""
            loaded.append(BOOM.load(*args, **kwargs))
            return loaded[-1]

    def recorder(venv: VecEnv, *args: Any, **kwargs: Any) -> VecVideoRecorder:
        panel, policy = PlanPanel(venv), loaded[-1].policy
        policy.plan = _told(policy.plan, panel.planned)  # type: ignore[method-assign]
        return VecVideoRecorder(panel, *args, **kwargs)

    vec_env.VecVideoRecorder, ALGOS["boom"] = recorder, Watched  # type: ignore[misc, assignment]
    try:
        run()
    finally:
        vec_env.VecVideoRecorder, ALGOS["boom"] = VecVideoRecorder, BOOM  # type: ignore[misc]


def _told(plan: Callable[..., Plan], listener: Callable[[Plan], None]) -> Callable[..., Plan]:
    """:param plan: makes plans :param listener: is given each. :return: makes plans, too"""

    def plan_and_tell(*args: Any, **kwargs: Any) -> Plan:
        made = plan(*args, **kwargs)
        listener(made)
        return made

    return plan_and_tell
