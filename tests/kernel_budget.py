"""
Run by test_graphs.py in a process of its own: how many kernels inductor would launch on a GPU for a plan and an update.

The functions are traced on fake tensors of the CPU, retargeted to CUDA, lowered and put through inductor's scheduler; no code
is made, so neither a GPU nor Triton is needed.
"""

import sys
from unittest import mock

import numpy as np
import torch as th
from fake_cuda import register_guard
from gymnasium import spaces
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor import scheduler
from torch._inductor.codegen.cuda_combined_scheduling import CUDACombinedScheduling
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.runtime import hints
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from sb3_boom.core import losses, planner, torch_layers
from sb3_boom.core.losses import LossConfig
from sb3_boom.policies import BOOMPolicy
from sb3_boom.update import model_gradients, policy_gradients

OBS, ACT, BATCH, HORIZON = 223, 38, 256, 3  # the paper's largest tasks
CONFIG = LossConfig(
    gamma=0.99, n_steps=1, rho=0.5, consistency_coef=20.0, reward_coef=0.1, value_coef=0.1, termination_coef=1.0,
    ent_coef=1e-4, alignment="forward_kl", align_coef=0.04, align_scale="q_scale", align_weighting="softmax",
    align_temperature=1.0, align_warmup=True, tau=0.01,
)  # fmt: skip
H200 = dict(
    index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    warp_size=32,
)  # fmt: skip


class Properties:
    """What inductor asks of a GPU."""

    name, major, minor, warp_size, multi_processor_count = "H200", 9, 0, 32, 132
    regs_per_multiprocessor, max_threads_per_multi_processor, max_threads_per_block = 65536, 2048, 1024
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 232448
    total_memory, L2_cache_size, gcnArchName = 140 << 30, 50 << 20, ""


def inputs_for_constants(module: th.fx.GraphModule) -> list[th.Tensor]:
    """Parameters become inputs. :return: their values, in order"""
    values: list[th.Tensor] = []
    seen: dict[str, th.fx.Node] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target not in seen:
            value: object = module
            for part in node.target.split("."):
                value = getattr(value, part)
            with module.graph.inserting_before(next(iter(module.graph.nodes))):
                seen[node.target] = module.graph.placeholder("constant_" + node.target.replace(".", "_"))
            values.insert(0, value)  # type: ignore[arg-type]
        node.replace_all_uses_with(seen[node.target])
        module.graph.erase_node(node)
    return values


def n_kernels(function, arguments, on_cpu: FakeTensorMode, on_gpu: FakeTensorMode) -> int:
    """
    :param function: of tensors
    :param arguments: fake ones of the CPU
    :param on_cpu: their mode
    :param on_gpu: the mode of those it is lowered with
    :return: Triton kernels and calls of libraries
    """

    def flat(*args):
        return [leaf for leaf in pytree.tree_leaves(function(*args)) if isinstance(leaf, th.Tensor)]

    with on_cpu:
        module = make_fx(flat, decomposition_table=select_decomp_table())(*arguments)
    module.graph.eliminate_dead_code()
    values = inputs_for_constants(module)
    for node in module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": th.device("cuda:0")}
    module.recompile()
    with on_gpu:
        moved = [th.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda") for x in (*values, *arguments)]
        module = make_fx(th.fx.Interpreter(module).run)(*moved)
    module = th.fx.GraphModule(module, fx_graph_cse(module.graph))  # as AOTAutograd does for torch.compile
    module.graph.eliminate_dead_code()
    module.recompile()
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    graph = GraphLowering(module, example_inputs=inputs, shape_env=ShapeEnv(), is_inference=True)
    with V.set_debug_handler(DebugContext()), V.set_graph_handler(graph), V.set_fake_mode(on_gpu):
        graph.run(*inputs)
        with mock.patch.object(scheduler.Scheduler, "create_backend", lambda self, device: CUDACombinedScheduling(self)):
            nodes = scheduler.Scheduler(graph.operations).nodes
    # a library's second result has a node of its own, but no kernel
    nothing = [isinstance(x, scheduler.NopKernelSchedulerNode) or isinstance(x.node, MultiOutput) for x in nodes]
    return nothing.count(False)


def main() -> None:
    """Prints the numbers of kernels of a plan, the model's gradients and the policy's."""
    register_guard()
    on_cpu, on_gpu = FakeTensorMode(shape_env=ShapeEnv()), FakeTensorMode(shape_env=ShapeEnv())
    with on_cpu:
        policy = BOOMPolicy(
            spaces.Box(-np.inf, np.inf, (OBS,), np.float32), spaces.Box(-1, 1, (ACT,), np.float32), lambda _: 3e-4,
            model_size="5M", gamma=0.99, compile=False,
        )  # fmt: skip
        z, mean, noise = th.empty(1, policy.latent_dim), policy.initial_mean(1), policy._noise(1)
        sizes = (policy.critic.n_critics, policy.critic.mlp_dim, policy.dropout, policy.device)
        update_noise = losses.draw_noise(HORIZON, BATCH, ACT, *sizes)
        steps, ones = th.empty(HORIZON, BATCH, ACT), th.empty(HORIZON, BATCH, 1)
        valid = th.ones(HORIZON, BATCH, 1, dtype=th.bool)
        features = (th.empty(BATCH, OBS), th.empty(HORIZON, BATCH, OBS))
        latents = th.empty(HORIZON, BATCH, policy.latent_dim)

    def plan(z, mean, *noise):
        with th.no_grad():
            return planner.plan(
                policy.world_model, policy.actor, policy.critic, policy.planner_config, z, mean,
                planner.PlannerNoise(*noise), policy.terminations_seen,
            )  # fmt: skip

    def of_model(*data):
        networks = (policy.world_model, policy.actor, policy.critic, policy.critic_target)
        return model_gradients(*networks, CONFIG, False, *data[:6], losses.UpdateNoise(*data[6:]))

    def of_policy(*data):
        return policy_gradients(policy.actor, policy.critic, CONFIG, False, *data[:5], losses.UpdateNoise(*data[5:]))

    properties = hints.DeviceProperties(type="cuda", **H200)
    with (
        mock.patch("torch._inductor.utils.is_gpu", lambda device: device == "cuda"),
        mock.patch.object(hints.DeviceProperties, "create", classmethod(lambda cls, device: properties)),
        mock.patch.object(torch_layers, "compiles_for_gpu", lambda x: True),
        mock.patch.object(planner, "compiles_for_gpu", lambda x: True),
        mock.patch("torch.cuda.get_device_properties", lambda *args, **kwargs: Properties),
        mock.patch("torch.cuda.get_device_capability", lambda *args, **kwargs: (9, 0)),
    ):
        found = [
            n_kernels(function, arguments, on_cpu, on_gpu)
            for function, arguments in [
                (plan, (z, mean, *noise)),
                (of_model, (*features, steps, ones, ones, valid, *update_noise)),
                (of_policy, (latents, steps, steps, valid, policy.q_scale, *update_noise)),
            ]
        ]
    print("kernels", *found)


if __name__ == "__main__":
    try:
        register_guard()
    except Exception as error:
        print(f"no compiler: {error}")
        sys.exit(0)
    main()
