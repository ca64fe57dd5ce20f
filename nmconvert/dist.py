"""Ranks: one process or many, started by torchrun; and tensors that are spread over them (FSDP2's DTensor).

Every function works in a single process too, where it costs nothing, so that the training loop has no second path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeGuard

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from nmconvert.errors import NmconvertError, UsageError, first_line


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return td.get_rank() if td.is_available() and td.is_initialized() else 0


def started_rank() -> int:
    """The number that torchrun gave this process, joined or not; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def device(name: str | None = None) -> torch.device:
    """The device ``name``; left out: a GPU if there is one, else the CPU. Of GPUs without a number, this process's own.

    Raises:
        UsageError: there is none of that name here.
    """
    name = own_device(name)
    try:
        found = torch.zeros(1, device=name)
        found.item()  # "meta" has no numbers
        return found.device
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        said = first_line(error).rstrip(".")
        raise UsageError(f"--device {name}: cannot be used here ({said}); --device cpu always can") from error


def own_device(name: str | None) -> str:
    """The name of the device that ``name`` is to this process: each that torchrun starts on a machine has another GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started (nccl on GPUs, else gloo); nothing without torchrun.

    Raises:
        NmconvertError: another rank has died; the message says what to run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what nccl gathers of objects goes through the current GPU, by default the first on all
    td.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except (td.DistBackendError, td.DistNetworkError, RuntimeError) as error:
        if not lost_peer(error):
            raise
        raise NmconvertError(
            f"rank {rank()} of {world()} lost another rank, which died or hangs: see its own message above; "
            "run the same command with --resume to go on from the last checkpoint"
        ) from error
    finally:
        td.destroy_process_group()


def lost_peer(error: Exception) -> bool:
    """Whether ``error`` is what this process sees of another one's death."""
    text = str(error)
    return isinstance(error, td.DistError) or "gloo" in text or "peer" in text or "NCCL" in text


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
    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter))

    lists = [module for module in model.modules() if type(module) is nn.ModuleList]  # parametrizations are another kind
    for block in (block for blocks in lists for block in blocks):
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def sync_gradients(parallel: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """A context for forward and backward: whether their gradients are averaged over the processes already."""
    if isinstance(parallel, DistributedDataParallel):
        return nullcontext() if wanted else parallel.no_sync()
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(wanted)
    return nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers (statistics of norms) of the first; masks are equal on all as it is."""
    if world() > 1:
        for buffer in model.buffers():
            if buffer.dtype != torch.bool:
                td.broadcast(buffer, 0)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds a part of ``tensor`` only, as FSDP2 makes of a parameter."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, gathered where it is sharded; then every rank has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of ``full`` that belongs to this rank's part of ``like``; a view."""
    if not is_sharded(like):
        return full
    for mesh_dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = full.chunk(like.device_mesh.size(mesh_dim), placement.dim)  # as DTensor does: the last may be missing
            index = like.device_mesh.get_local_rank(mesh_dim)
            full = parts[index] if index < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def shard_dims(tensor: Tensor) -> set[int]:
    """The dimensions along which ``tensor`` is spread over ranks."""
    return {p.dim for p in tensor.placements if isinstance(p, Shard)} if is_sharded(tensor) else set()


def assemble(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank has ``part``, spread as ``like`` is."""
    if not is_sharded(like):
        return part
    spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return spread.full_tensor()
