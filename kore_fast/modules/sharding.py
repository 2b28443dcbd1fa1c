"""Parameters that are spread over ranks (FSDP2, ZeRO-3, tensor parallelism), and how to see one whole."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

# What activation checkpointing, torch.compile and FSDP put into the names of what they wrap.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a module or parameter as it was before anything was wrapped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only a part of some parameter."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def is_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has the parameters."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter with what all ranks hold of it.

    Where it is sharded, every rank must call this for the same parameters in the same order.
    """
    held: Any = parameter.detach()
    if hasattr(held, "full_tensor"):
        # FSDP2's offloaded parts lie on the host, where NCCL cannot gather.
        return cast(torch.Tensor, held.to(held.device_mesh.device_type).full_tensor())
    if hasattr(parameter, "ds_id"):
        zero = import_module("deepspeed").zero
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def first_rank() -> bool:
    """Whether this process is the one that writes files."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def wait_for_ranks() -> None:
    """Until every rank is here; nothing where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def place_among_ranks() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's CPU tensor; the tensor itself where there is one rank."""
    if place_among_ranks()[1] == 1:
        return values
    on_cpu = "cpu:" in str(dist.distributed_c10d.get_backend_config())
    summed = values.clone() if on_cpu else values.to(torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(summed)
    return summed.cpu()
