"""
Run by test_graphs.py in a process of its own: plan, draw and store on CUDA tensors that have no data, so need no GPU.

A CPU's torch has no device guard for CUDA, which copies take: torch's own one that does nothing is registered first.
"""

import ctypes
import pathlib
import sys
from unittest import mock

import numpy as np
import torch as th
from gymnasium import spaces
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""
OBS, ACT, N_ENVS = 5, 2, 3


def register_guard() -> None:
    """Raises where there is no compiler."""
    from torch._inductor.codecache import CppCodeCache

    ctypes.CDLL(str(pathlib.Path(th.__file__).parent / "lib" / "libc10.so"), mode=ctypes.RTLD_GLOBAL)
    CppCodeCache.load(GUARD)


class OneDevice(TorchDispatchMode):
    """Refuses what goes from one device to another, and what waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in th.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, th.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if isinstance(kwargs.get("device"), th.device):
            devices.add(kwargs["device"].type)
        moved = name in ("_to_copy", "copy_", "index_copy_", "index_put_") and len(devices) > 1
        assert not moved and name not in ("_local_scalar_dense", "nonzero", "equal"), f"{name} between {devices}"
        return function(*args, **kwargs)


class Door:
    """In the place of ``send``: counts what passes."""

    def __init__(self) -> None:
        self.passed: list[list[str]] = []

    def __call__(self, arrays, device):
        self.passed.append(list(arrays))
        found = {}
        for name, array in arrays.items():
            like = th.from_numpy(array)
            found[name] = th.empty(like.shape, dtype=like.dtype, device=device)
        return found


def main() -> None:
    """Prints how often something was sent by an observation, a step, an episode's close, a batch."""
    from stable_baselines3.common.running_mean_std import RunningMeanStd

    from sb3_boom import buffers, drawing, policies
    from sb3_boom.buffers import WeightedReplayBuffer
    from sb3_boom.core import losses

    register_guard()
    door = Door()
    cuda = th.device("cuda", 0)
    observation_space = spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (ACT,), np.float32)
    rng = np.random.default_rng(0)

    def mirror(self) -> None:
        self._slots = np.full((self.buffer_size, self.n_envs), -1, np.int32)

    class Normaliser:
        norm_obs, norm_reward, norm_obs_keys = True, True, None
        obs_rms, ret_rms = RunningMeanStd(shape=(OBS,)), RunningMeanStd(shape=())
        epsilon, clip_obs, clip_reward = 1e-8, 10.0, 10.0

    with (
        mock.patch.object(policies, "send", door),
        mock.patch.object(buffers, "send", door),
        mock.patch.object(drawing, "send", door),
        mock.patch.object(WeightedReplayBuffer, "_mirror_slots", mirror),
        mock.patch.object(WeightedReplayBuffer, "_storage_device", lambda self, n_bytes: cuda),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        policy = policies.BOOMPolicy(
            observation_space, action_space, lambda _: 3e-4, model_size="tiny", compile=False,
            planner_kwargs=dict(n_samples=16, n_elites=4, n_policy_samples=2, n_iterations=2),
        )  # fmt: skip
        with mock.patch.object(th.nn.Module, "_apply", to_cuda):
            policy.to("cuda")
        assert policy.device.type == "cuda" and policy.q_scale.device.type == "cuda"
        buffer = WeightedReplayBuffer(60, observation_space, action_space, cuda, n_envs=N_ENVS)
        buffer.device = th.device("cuda")  # SB3 takes a CPU where there is no GPU; a GPU's number is missing, as with "cuda"

        def add(obs, next_obs, done: bool) -> None:
            dones = np.full(N_ENVS, done)
            buffer.add(obs, next_obs, np.zeros((N_ENVS, ACT)), np.zeros(N_ENVS), dones, [{} for _ in range(N_ENVS)])

        obs = rng.standard_normal((25, N_ENVS, OBS)).astype(np.float32)
        add(obs[0], obs[1], False)  # allocates
        door.passed.clear()
        with OneDevice():
            tensor, starts = policy.observations_and_starts(obs[0], np.zeros(N_ENVS, bool))
            mean = policy.initial_mean(N_ENVS).masked_fill(starts.view(-1, 1, 1), 0.0)
            plan = policy.plan(tensor, mean)
            assert len(door.passed) == 1 and plan.mean.device.type == "cuda"
            door.passed.clear()
            for t in range(1, 24):  # past the ring's end, over ends of episodes
                add(obs[t], obs[t + 1], t % 7 == 0)
            assert len(door.passed) == 23 and buffer.full, door.passed
            door.passed.clear()
            for _ in range(2):
                batch = buffer.sample(8, Normaliser)
                assert batch.rewards.device.type == "cuda"
            assert len(door.passed) == 1, door.passed  # the statistics, once
            Normaliser.obs_rms.update(np.ones((4, OBS)))
            buffer.sample(8, Normaliser)
            assert len(door.passed) == 2
            noise = losses.draw_noise(3, 8, ACT, policy.critic.n_critics, policy.critic.mlp_dim, 0.01, cuda)
            assert {part.device.type for part in noise} == {"cuda"}
    print("one device")


def to_cuda(module: th.nn.Module, function, recurse: bool = True) -> th.nn.Module:
    """``Module._apply`` for fake tensors, whose data can't be swapped."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = th.nn.Parameter(th.empty_like(parameter, device="cuda"), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = th.empty_like(buffer, device="cuda")
    return module


if __name__ == "__main__":
    try:
        register_guard()
    except Exception as error:
        print(f"no compiler: {error}")
        sys.exit(0)
    main()
