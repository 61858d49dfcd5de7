"""Several processes that train one model, as torchrun starts them; without it, every function is of one process."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started: gloo for tensors on the CPU, NCCL for those on GPUs."""
    if "RANK" not in os.environ:
        yield
        return
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        dist.init_process_group()
    else:
        # torchrun goes on serving the store in which the processes that ended left their addresses: whoever reads one
        # before its successor has written its own finds nobody there. (Nodes may count restarts differently.)
        store, number, count = next(dist.rendezvous("env://"))
        dist.init_process_group(store=dist.PrefixStore(f"restart {restarts}", store), rank=number, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine: the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes, the same bits in all of them."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def largest(*values: int, device: torch.device) -> list[int]:
    """Of each value, the largest over the processes."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """Every process's tensor of one shape, on the CPU, in all of them. device: of the group's tensors."""
    if not dist.is_initialized():
        return [tensor]
    tensor = tensor.to(device)
    tensors = [torch.empty_like(tensor) for _ in range(processes())]
    dist.all_gather(tensors, tensor)
    return [each.cpu() for each in tensors]


def share_buffers(model: nn.Module) -> None:
    """Give all processes the running statistics of process 0: each has its own batches' otherwise."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the group ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
