"""BOOM (Bootstrap Off-policy with World Model) for Stable-Baselines3."""

import importlib
from typing import TYPE_CHECKING, Any

from sb3_boom.core import processor

if TYPE_CHECKING:
    from sb3_boom.boom import BOOM
    from sb3_boom.buffers import WeightedReplayBuffer
    from sb3_boom.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__version__ = "0.1.0"

processor.use_all_instructions()  # both before torch is imported
processor.wait_asleep()


_MODULES = {
    "BOOM": "boom",
    "WeightedReplayBuffer": "buffers",
    "MlpPolicy": "policies",
    "CnnPolicy": "policies",
    "MultiInputPolicy": "policies",
}
__all__ = ["BOOM", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "WeightedReplayBuffer"]


def __getattr__(name: str) -> Any:
    # lazily, so that what needs torch alone imports without SB3
    if name in _MODULES:
        return getattr(importlib.import_module(f"sb3_boom.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
