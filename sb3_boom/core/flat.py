"""
An optimizer's parameters, gradients and moments laid end to end, so that a step is one pass over memory (torch only).

What others see stays as it was: every parameter, its gradient and its state are views of the flat tensors.
"""

from collections.abc import Sequence

import torch as th

from sb3_boom.core.graphs import captures_on
from sb3_boom.core.optimizers import ADAMS, parameters_of


class FlatOptimizer:
    """
    Takes an optimizer's steps on one flat tensor per group of parameters.

    :param optimizer: Adam or AdamW, which keeps parameters, settings and state, for files and for whoever looks
    """

    def __init__(self, optimizer: th.optim.Adam) -> None:
        self.optimizer = optimizer
        self.parameters = parameters_of(optimizer)
        self.gradient, self.gradients = lay_end_to_end([th.zeros_like(parameter) for parameter in self.parameters])
        groups, at = [], 0
        for group in optimizer.param_groups:
            flat, views = lay_end_to_end(group["params"])
            for parameter, view in zip(group["params"], views, strict=True):
                parameter.data = view
            flat = th.nn.Parameter(flat)
            flat.grad = self.gradient[at : at + flat.numel()]
            at += flat.numel()
            groups.append({**group, "params": [flat]})
        self.places = [parameter.data_ptr() for parameter in self.parameters]
        self.inner = type(optimizer)(groups)
        self.states: list[dict[str, th.Tensor]] = []
        self.steps = th.zeros(0)
        if optimizer.state:
            for group, (flat,) in zip(optimizer.param_groups, self._inner_parameters(), strict=True):
                states = [optimizer.state[parameter] for parameter in group["params"]]
                for name, first in states[0].items():
                    values = [state[name] for state in states]
                    self.inner.state[flat][name] = first if name == "step" else lay_end_to_end(values)[0]
            self._share_state()

    def _inner_parameters(self) -> list[list[th.Tensor]]:
        """:return: of every group the flat one"""
        return [group["params"] for group in self.inner.param_groups]

    def _share_state(self) -> None:
        """Let the optimizer's state be views of the flat one. Whoever steps it by itself moves all on alike."""
        # each counts in memory of its own, the groups' first ones in the flat optimizer's, too
        step = next(iter(self.inner.state.values()))["step"]
        self.steps = step.repeat(len(self.parameters))
        at = 0
        for group, (flat,) in zip(self.optimizer.param_groups, self._inner_parameters(), strict=True):
            state = self.inner.state[flat]
            state["step"] = self.steps[at]
            sizes = [parameter.numel() for parameter in group["params"]]
            parts = {name: value.split(sizes) for name, value in state.items() if name != "step"}
            for i, parameter in enumerate(group["params"]):
                own = {name: values[i].view_as(parameter) for name, values in parts.items()}
                self.optimizer.state[parameter] = {"step": self.steps[at], **own}
                at += 1
        self.states = [self.optimizer.state[parameter] for parameter in self.parameters]

    def is_intact(self) -> bool:
        """:return: whether parameters and state still are views: what moves, copies or loads them makes others"""
        state = self.optimizer.state
        return (
            len(state) == len(self.states)
            and all(state.get(p) is own for p, own in zip(self.parameters, self.states, strict=False))
            and all(p.data_ptr() == place for p, place in zip(self.parameters, self.places, strict=True))
        )

    def step(self, gradient: th.Tensor, max_grad_norm: float) -> th.Tensor:
        """
        :param gradient: of all parameters, in order, end to end, ``[n]``
        :param max_grad_norm: bound of its 2-norm
        :return: that norm before clipping, scalar
        """
        norm = th.linalg.vector_norm(gradient)
        th.mul(gradient, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0), out=self.gradient)  # torch's clip_grad_norm_
        for parameter, view in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not view:
                parameter.grad = view
        for inner, group in zip(self.inner.param_groups, self.optimizer.param_groups, strict=True):
            inner.update(group, params=inner["params"])
        self.inner.step()
        if not self.states:
            self._share_state()
        else:
            self.steps[1:] = self.steps[0]
        return norm


def flat_optimizer(optimizer: th.optim.Optimizer, networks: Sequence[th.nn.Module]) -> FlatOptimizer | None:
    """
    :param optimizer: any
    :param networks: all that it trains, as far as they get gradients
    :return: what takes its steps, or None where it has to do so itself: on a GPU, where a graph holds its steps; where its
        parameters are others than the networks', or in another order; where a user has frozen some of them, has
        other optimizers than Adam, or looks on by a hook; where parameters differ in how often they were stepped
    """
    known: FlatOptimizer | None = getattr(optimizer, "flat", None)  # copies and pickles have none
    parameters = parameters_of(optimizer)
    if (
        type(optimizer) not in ADAMS
        or "step" in vars(optimizer)  # wrapped by a user
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or not all(parameter.requires_grad and not parameter._backward_hooks for parameter in parameters)
    ):
        optimizer.flat = None  # type: ignore[attr-defined]  # it would not know of steps that parameters take apart
        return None
    if known is not None and known.is_intact():
        return known
    theirs = [parameter for network in networks for parameter in network.parameters()]
    if len(theirs) != len(parameters) or not all(a is b for a, b in zip(theirs, parameters, strict=True)):
        return None
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) != 1 or captures_on(parameters[0].device):
        return None
    if not all(group["params"] for group in optimizer.param_groups):
        return None
    steps = [optimizer.state[parameter]["step"] for parameter in parameters if optimizer.state.get(parameter)]
    if steps and (len(steps) != len(parameters) or len(set(map(float, steps))) != 1):
        return None
    assert isinstance(optimizer, th.optim.Adam)  # as AdamW is
    flat = FlatOptimizer(optimizer)
    optimizer.flat = flat  # type: ignore[attr-defined]
    return flat


def lay_end_to_end(tensors: Sequence[th.Tensor]) -> tuple[th.Tensor, list[th.Tensor]]:
    """
    :param tensors: of one type, any shapes
    :return: a flat copy of all of them, ``[n]``, and its views of their shapes
    """
    flat = th.cat([tensor.detach().reshape(-1) for tensor in tensors])
    parts = flat.split([tensor.numel() for tensor in tensors])
    return flat, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
