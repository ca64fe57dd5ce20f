"""Checkpoints in, checkpoints out: one file a format; :func:`open_checkpoint` finds out which one it is.

=======================================  ===========================  =========================
format                                   manifest                     module
=======================================  ===========================  =========================
torch zip, TorchScript, pickled module   record ``nmconvert.json``    ``torch_zip``
torch legacy                             behind the last storage      ``torch_legacy``
exported program (.pt2)                  record ``nmconvert.json``    ``exported_program``
safetensors                              entry of ``__metadata__``    ``safetensors_file``
Hugging Face folder                      of its weights, or the       ``hf_folder``
                                         file ``nmconvert.json``
ONNX                                     entry of the metadata        ``onnx_file``
=======================================  ===========================  =========================

What reads a format is imported when a file of it is met: the first ones and ONNX need large libraries, safetensors none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nmconvert.checkpoint.base import Checkpoint, Edit, Edits, FileCheckpoint
from nmconvert.checkpoint.hf_folder import open_hf_folder
from nmconvert.checkpoint.paths import beside, check_apart, check_copy, check_target
from nmconvert.checkpoint.safetensors_file import looks_like_safetensors, open_safetensors
from nmconvert.checkpoint.zip_records import open_archive
from nmconvert.errors import CheckpointError

if TYPE_CHECKING:
    from nmconvert.checkpoint.onnx_file import OnnxCheckpoint

__all__ = [
    "Checkpoint", "Edit", "Edits", "beside", "check_apart", "check_copy", "check_target", "has_manifest", "is_onnx",
    "open_checkpoint",
]  # fmt: skip

_NOT_OURS = {
    b"\x89HDF": "an HDF5 (Keras) file; nmconvert reads PyTorch, safetensors, Hugging Face and ONNX",
    b"GGUF": "a GGUF file, which is quantised already; start from the safetensors files it was made from",
    b"\x93NUMPY": "a NumPy array; save the model's state_dict with torch.save or as safetensors",
    b"version https://git-lfs": "only a Git LFS pointer; run 'git lfs pull' to get the file itself",
    b"\x1f\x8b": "a gzip file; unpack it first",
}


def open_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Open a checkpoint of any format; which one it is is seen from its bytes, whatever it is called.

    Nothing in it is executed, with ``trust`` or without; ``trust`` is asked for before a file is touched that would
    execute something wherever it is loaded.

    Raises:
        UntrustedFileError: it is such a file, and ``trust`` is False.
        CheckpointError: it is not there, not a checkpoint, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return open_hf_folder(path, _open_weights, trust=trust)
    return _open_file(path, trust=trust)


def _open_weights(path: Path, *, trust: bool) -> FileCheckpoint:
    """One of the weight files of a Hugging Face folder."""
    checkpoint = _open_file(path, trust=trust)
    if not isinstance(checkpoint, FileCheckpoint):
        raise CheckpointError(f"{path}: {checkpoint.format}, where a Hugging Face folder has its weights; rename it")
    return checkpoint


def is_onnx(path: Path) -> bool:
    """Whether :func:`open_checkpoint` takes ``path`` for an ONNX file.

    Raises:
        CheckpointError: it cannot be read.
    """
    return not path.is_dir() and _container(path, _head(path)) == "onnx"


def has_manifest(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that nmconvert wrote; nothing in it is executed."""
    try:
        return open_checkpoint(path, trust=True).manifest_text() is not None
    except CheckpointError:
        return False


def _head(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is a pipe or a device, and checkpoints are read in places; write it into a file first")
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error


def _container(path: Path, head: bytes) -> Literal["zip", "safetensors", "pickle", "onnx"] | None:
    """What a file that begins with ``head`` is; its name counts only where the bytes say nothing."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if looks_like_safetensors(head):
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    # A ModelProto starts with its IR version (field 1, a varint) in every writer seen.
    if head and (path.suffix == ".onnx" or (head[:1] == b"\x08" and b"\x01" <= head[1:2] <= b"\x20")):
        return "onnx"
    return None


def _open_file(path: Path, *, trust: bool) -> FileCheckpoint | OnnxCheckpoint:
    head = _head(path)
    container = _container(path, head)
    if container == "zip":
        return _open_zip(path, trust=trust)
    if container == "safetensors":
        return open_safetensors(path)
    if container == "pickle":
        return _open_pickle(path, head, trust=trust)
    if container == "onnx":
        from nmconvert.checkpoint.onnx_file import open_onnx

        return open_onnx(path)
    raise _unknown(path, head)


def _open_zip(path: Path, *, trust: bool) -> FileCheckpoint:
    from nmconvert.checkpoint.exported_program import is_exported_program, open_exported_program
    from nmconvert.checkpoint.torch_zip import open_torch_zip

    archive = open_archive(path)
    if is_exported_program(archive):
        return open_exported_program(archive, trust=trust)
    for name in archive.records:
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return open_torch_zip(archive, name.removesuffix("data.pkl"), trust=trust)
    if any(name.endswith(".npy") for name in archive.records):
        raise CheckpointError(f"{path}: NumPy arrays; save the model's state_dict with torch.save or as safetensors")
    raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote; unpack it first")


def _open_pickle(path: Path, head: bytes, *, trust: bool) -> FileCheckpoint:
    from nmconvert.checkpoint.pickles import require_trust
    from nmconvert.checkpoint.torch_legacy import MAGIC, open_torch_legacy

    if MAGIC.to_bytes(10, "little") in head:
        return open_torch_legacy(path, trust=trust)
    require_trust(path, "a bare pickle", trust=trust)
    raise CheckpointError(f"{path}: a bare pickle, not of torch.save; load it and torch.save its state dict")


def _unknown(path: Path, head: bytes) -> CheckpointError:
    if not head:
        return CheckpointError(f"{path}: is empty; copy the file anew")
    for start, what in _NOT_OURS.items():
        if head.startswith(start):
            return CheckpointError(f"{path}: {what}")
    return CheckpointError(f"{path}: not a checkpoint that nmconvert knows (PyTorch, safetensors, Hugging Face, ONNX)")
