"""What is done with the optimizers of any kind (torch only)."""

from collections.abc import Sequence

import torch as th

from sb3_boom.core.graphs import captures_on

ADAMS = (th.optim.Adam, th.optim.AdamW)  # subclasses may do anything


def set_learning_rates(optimizer: th.optim.Optimizer, rates: Sequence[float], device: th.device) -> bool:
    """
    Set the learning rates, as tensors where a CUDA graph is to see them change, else as numbers.

    What belongs to the device is imposed anew, whatever was loaded: a file of a CPU goes on on a GPU and the other way round.

    :param optimizer: any; other than Adam and AdamW keep numbers
    :param rates: of every group of parameters
    :param device: the parameters'
    :return: whether the optimizer holds other tensors than at the last call, which no graph knows
    """
    groups = optimizer.param_groups
    if not (captures_on(device) and type(optimizer) in ADAMS):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = False
        return False
    if is_capturable(optimizer):
        for group, rate, last in zip(groups, rates, optimizer.last_rates, strict=True):  # type: ignore[attr-defined]
            if rate != last:
                group["lr"].fill_(rate)
        optimizer.last_rates = list(rates)  # type: ignore[attr-defined]
        return False
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = th.full((), rate, dtype=th.float32, device=device)
        group["capturable"] = True
    for state in optimizer.state.values():
        if "step" in state:  # a CPU's, where the file's optimizer was not fused
            state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=device)
    # copies and pickles lose these, and loading replaces the groups' tensors: either is seen at the next call
    optimizer.graph_rates = [group["lr"] for group in groups]  # type: ignore[attr-defined]
    optimizer.last_rates = list(rates)  # type: ignore[attr-defined]
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # it is, while warming up
    return True


def parameters_of(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any
    :return: all of its parameters, group by group
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_capturable(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: any
    :return: whether it is as :func:`set_learning_rates` left it for a graph
    """
    rates = getattr(optimizer, "graph_rates", None)
    groups = optimizer.param_groups
    if rates is None or len(rates) != len(groups):
        return False
    return all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))
