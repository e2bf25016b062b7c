"""Statistics of a batch that is spread over ranks."""

from typing import Any

import torch
from torch import Tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over the ranks of torch's default process group, through which the gradient flows.

    Each rank's gradient is the mean of the gradients of all ranks' losses, which DDP averages again as it must.
    """
    return _MeanOverRanks.apply(tensor)


class _MeanOverRanks(torch.autograd.Function):  # torch.distributed.nn.functional.all_reduce is deprecated
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return mean_over_ranks(gradient)
