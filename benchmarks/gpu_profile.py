"""
Where a captured plan and update spend a GPU's time, kernel by kernel, at the paper's size and at steady clocks.

    PYTHONPATH=. python benchmarks/gpu_profile.py
"""

from sb3_boom import BOOM  # before torch, for fast products: see core/processor.py

# isort: split
import time
from collections.abc import Callable

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from torch.profiler import ProfilerActivity, profile

from sb3_boom.benchmark.step import PROBLEMS, RandomEnv

CALLS = 200
PROFILED = 20
SHOWN = 22


def milliseconds(function: Callable[[], object]) -> float:
    """Of one of many calls in a row, waited for at the end."""
    for _ in range(10):
        function()
    th.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    th.cuda.synchronize()
    return 1000.0 * (time.perf_counter() - start) / CALLS


def main() -> None:
    env = make_vec_env(lambda: RandomEnv(*PROBLEMS["5M"]))
    settings = dict(preset="paper", learning_starts=300, pretrain_steps=0, buffer_size=20_000, seed=0, device="cuda")
    model = BOOM("MlpPolicy", env, **settings).learn(330)
    policy = model.policy
    obs, mean = policy.obs_to_tensor(model._last_obs)[0], policy.initial_mean(1)
    for name, function in (("plan", lambda: policy.plan(obs, mean)), ("update", lambda: model.train(1))):
        print(f"{name}: {milliseconds(function):.2f} ms, graphs {policy.graphs.counts()}")
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED):
                function()
            th.cuda.synchronize()
        kernels = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in kernels) / PROFILED
        print(f"  {total:.0f} us in {sum(event.count for event in kernels) / PROFILED:.0f} kernels and copies")
        for event in kernels[:SHOWN]:
            print(f"  {event.self_device_time_total / PROFILED:8.1f} us {event.count / PROFILED:6.1f} x  {event.key[:110]}")


if __name__ == "__main__":
    main()
