"""Exported programs (``.pt2``): a zip archive with one record a weight, and a JSON table that says how each lies there.

torch.export.load falls back to unpickling whatever it does not know, so a crafted file can run anything: reading one here
runs nothing, but trust is asked for. The manifest is a further record, ``nmconvert.json``.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from nmconvert.checkpoint.base import FileCheckpoint, Slot, link_shared, manifest_from_bytes
from nmconvert.checkpoint.pickles import require_trust
from nmconvert.checkpoint.torch_zip import rewriter
from nmconvert.checkpoint.zip_records import Archive
from nmconvert.errors import CheckpointError
from nmconvert.manifest import MANIFEST
from nmconvert.tensor import TensorInfo, dtype_name

_CONFIG = "_weights_config.json"

# torch._export.serde.schema.ScalarType
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}


def is_exported_program(archive: Archive) -> bool:
    """Whether a zip archive is one, of this format or of the one before torch 2.8."""
    return any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in archive.records)


def open_exported_program(archive: Archive, *, trust: bool) -> FileCheckpoint:
    """An exported program.

    Raises:
        UntrustedFileError: ``trust`` is False.
        CheckpointError: it is damaged, holds no weights, or is of torch 2.7 or older.
    """
    path = archive.path
    require_trust(path, "an exported program (.pt2)", trust=trust)
    configs = [name for name in archive.records if name.endswith(_CONFIG) and "/data/weights/" in name]
    if not configs:
        raise CheckpointError(f"{path}: written by torch 2.7 or older; export it again with a newer torch")
    slots: list[Slot] = []
    for config in configs:
        folder, _, file = config.rpartition("/")
        program = file.removesuffix(_CONFIG)
        try:
            weights = json.loads(archive.read(config))["config"]
            slots += [slot for name, entry in weights.items() if (slot := _slot(archive, f"{folder}/", program, name, entry))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged: '{config}' cannot be read ({error!r:.80}); export it again") from error
    prefix = configs[0].partition("/")[0]
    name = f"{prefix}/{MANIFEST}"
    linked = link_shared(slots)
    manifest = manifest_from_bytes(archive.read(name), path) if name in archive.records else None
    return FileCheckpoint(path, "exported program", linked, manifest, rewriter(archive, linked, name))


def _slot(archive: Archive, folder: str, program: str, name: str, entry: dict[str, Any]) -> Slot | None:
    meta = entry["tensor_meta"]
    dtype = _DTYPES.get(meta["dtype"])
    if entry["use_pickle"] or dtype is None:
        return None
    record = archive.records[folder + entry["path_name"]]
    shape = tuple(int(size["as_int"]) for size in meta["sizes"])
    stride = tuple(int(step["as_int"]) for step in meta["strides"])
    start = int(meta["storage_offset"]["as_int"])
    info = TensorInfo(
        name if program == "model" else f"{program}/{name}", shape, dtype_name(dtype), secondary=program != "model"
    )
    slot = Slot(info, archive.stored(record), record.size, start, stride, record.crc)
    if min(start, *shape, *stride, 0) < 0 or len(shape) != len(stride) or slot.span[1] > record.end:
        raise ValueError(f"{name} {shape} lies beyond its record of {record.size} bytes")
    return slot
