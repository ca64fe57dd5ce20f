"""Ranks: one process or many, started by torchrun; and tensors that are spread over them (FSDP2's DTensor).

Every function works in a single process too, where it costs nothing, so that the training loop has no second path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmconvert.errors import NmconvertError


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return td.get_rank() if td.is_available() and td.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started (nccl on GPUs, else gloo); nothing without torchrun.

    Raises:
        NmconvertError: another rank has died; the message says what to run.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    td.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except (td.DistBackendError, td.DistNetworkError, RuntimeError) as error:
        if not isinstance(error, td.DistError) and not _lost_peer(error):
            raise
        raise NmconvertError(
            f"rank {rank()} of {world()} lost another rank, which died or hangs: see its own message above; "
            "run the same command with --resume to go on from the last checkpoint"
        ) from error
    finally:
        td.destroy_process_group()


def _lost_peer(error: RuntimeError) -> bool:
    text = str(error)
    return "gloo" in text or "peer" in text or "NCCL" in text


def total(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks."""
    if world() > 1:
        value = value.clone()
        td.all_reduce(value)
    return value


def gather(items: list[Any]) -> list[Any]:
    """The lists of all ranks joined, in the order of the ranks; the same on each."""
    if world() == 1:
        return list(items)
    parts: list[Any] = [None] * world()
    td.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        td.barrier()


def parallelize(
    model: nn.Module, *, shard_dim: Callable[[nn.Parameter], int] | None = None, not_shared: Collection[str] = ()
) -> nn.Module:
    """What to call in place of ``model`` so that gradients are averaged over all processes; itself, if there is one.

    Without ``shard_dim`` every process has a copy (DDP), equal but for the buffers named in ``not_shared``, which each
    keeps for itself. With it, parameters are spread over the processes along the dimension that it names (FSDP2), in place; the
    blocks in the model's `torch.nn.ModuleList`\\ s are gathered one after the other.
    """
    if world() == 1:
        return model
    if shard_dim is not None:
        _shard(model, shard_dim)
        return model
    device = next(model.parameters()).device
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(not_shared))
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _shard(model: nn.Module, shard_dim: Callable[[nn.Parameter], int]) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter))

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def sync_gradients(parallel: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """A context for forward and backward: whether their gradients are averaged over the processes already."""
    if isinstance(parallel, DistributedDataParallel):
        return nullcontext() if wanted else parallel.no_sync()
    if hasattr(parallel, "set_requires_gradient_sync"):
        parallel.set_requires_gradient_sync(wanted)
    return nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers (statistics of norms) of the first; masks are equal on all as it is."""
    if world() > 1:
        for buffer in model.buffers():
            if buffer.dtype != torch.bool:
                td.broadcast(buffer, 0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of ``tensor`` only (a DTensor, as FSDP2 makes of a parameter)."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds: all of it, unless it is sharded."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]
    return part


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of ``full`` that belongs to this rank's part of ``like``; a view."""
    if not is_sharded(like):
        return full
    mesh = like.device_mesh  # type: ignore[attr-defined]
    for mesh_dim, placement in enumerate(like.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            parts = full.chunk(mesh.size(mesh_dim), placement.dim)  # as DTensor does: the last ones may be missing
            index = mesh.get_local_rank(mesh_dim)
            full = parts[index] if index < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def shard_dims(tensor: Tensor) -> set[int]:
    """The dimensions along which ``tensor`` is spread over ranks."""
    if not is_sharded(tensor):
        return set()
    return {p.dim for p in tensor.placements if p.is_shard()}  # type: ignore[attr-defined]


def assemble(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank has ``part``, spread as ``like`` is."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()
