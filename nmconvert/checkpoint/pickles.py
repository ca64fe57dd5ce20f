"""Reading the structure of a pickle without running any of it.

Every global that a pickle names is replaced by a stand-in: a tensor becomes the description of where its bytes lie, a
plain container itself, and anything else an inert :class:`Opaque` that only remembers its state. Nothing is imported
and nothing is called, whatever the file asks for. Which globals were named decides whether a file needs to be trusted.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, BinaryIO, TypeAlias

import torch

from nmconvert.errors import CheckpointError, UntrustedFileError, one_line


class _Sealed:
    """What is checked when it is made; a pickle cannot change it afterwards."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a tensor that is given another state")


@dataclass(frozen=True)
class StorageRef(_Sealed):
    """A storage as a pickle names it: ``key`` in the file, ``numel`` elements of ``dtype`` (None: bytes)."""

    key: str
    dtype: torch.dtype | None
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True)
class TensorRef(_Sealed):
    """A tensor as a pickle names it: a strided view of a storage, ``start`` in elements."""

    storage: StorageRef
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class OtherTensor(_Sealed):
    """A tensor that is no strided view of a storage; ``kind`` says what it is, in words."""

    kind: str
    shape: tuple[int, ...]  # () where it is not said


class Opaque(dict[Any, Any]):
    """An object of a class that stays unknown: takes any construction, state and items, and does nothing with them."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        """Whatever it is made from, nothing of it is kept."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.state: Any = None
        self.items_added: list[Any] = []

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """As a list subclass would."""
        self.items_added.append(item)

    def extend(self, items: Any) -> None:
        """As a list subclass would."""
        self.items_added.extend(items)

    add = append


class _Dict(OrderedDict[Any, Any]):
    """An OrderedDict, which state dicts are, with room for the ``_metadata`` attribute that torch gives them."""


@dataclass
class Structure:
    """What a pickle holds: ``root``, its storages by key, and the globals that it would import if it were loaded."""

    root: Any = None
    storages: dict[str, StorageRef] = field(default_factory=dict)
    globals: set[str] = field(default_factory=set)

    @property
    def foreign(self) -> list[str]:
        """The globals that are neither tensors nor plain data: loading them runs code that comes from elsewhere."""
        return sorted(name for name in self.globals if not _is_plain(name))


def require_trust(path: object, what: str, *, trust: bool) -> None:
    """Raise UntrustedFileError unless ``trust``: ``what`` says what the file is."""
    if not trust:
        raise UntrustedFileError(
            f"{path}: {what}; whoever made such a file can run any program on this machine when it is loaded: "
            "pass --trust only if you know where it comes from, or save the model's state_dict() instead"
        )


def read_pickle(stream: BinaryIO, path: object) -> Structure:
    """The structure of the pickle at the position of ``stream``, which is left after it.

    Raises:
        CheckpointError: it is damaged.
    """
    structure = Structure()
    try:
        data = _next_pickle(stream)
        structure.root = _Unpickler(data, structure).load()
    # Damaged bytes can raise anything: what matters is that the file cannot be read.
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged: its pickle cannot be read ({one_line(error, 100)}); copy the file anew"
        ) from error
    return structure


def _next_pickle(stream: BinaryIO) -> bytes:
    """Its bytes; refuses memo indices beyond its size, for which the unpickler would fill the memory."""
    start, highest = stream.tell(), 0
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            highest = max(highest, int(argument or 0))
    size = stream.tell() - start
    if highest > size:
        raise ValueError(f"memo index {highest}")
    stream.seek(start)
    return stream.read(size)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, structure: Structure) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._structure = structure

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        self._structure.globals.add(full)
        if full in _STAND_INS:
            return _STAND_INS[full]
        if full in _OTHER_TENSORS:
            return partial(_other_tensor, _OTHER_TENSORS[full])
        if module.startswith("torch") and name.endswith("Storage"):
            return type(name, (Opaque,), {"dtype": _STORAGE_DTYPES.get(name), "__module__": module})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Opaque,), {"__module__": module})

    def persistent_load(self, identifier: Any) -> Any:
        kind, *rest = identifier
        if kind == "module":  # the legacy format's note of a class and its source text
            return rest[0]
        storage_type, key, _location, numel = rest[:4]
        if kind != "storage" or (len(rest) > 4 and rest[4] is not None):
            raise ValueError(f"unknown storage {identifier!r:.60}")
        if not isinstance(numel, int) or numel < 0:
            raise ValueError(f"a storage of {numel!r:.20} elements")
        storage = StorageRef(str(key), getattr(storage_type, "dtype", None), numel)
        return self._structure.storages.setdefault(storage.key, storage)


def _tensor(storage: Any, start: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    dtype = storage.dtype or torch.uint8
    return _checked(storage, dtype, start, tuple(shape), tuple(stride))


def _tensor_v3(storage: Any, start: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    return _checked(storage, dtype, start, tuple(shape), tuple(stride))


def _checked(storage: StorageRef, dtype: torch.dtype, start: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> TensorRef:
    whole = all(isinstance(number, int) and number >= 0 for number in (start, *shape, *stride))
    if not isinstance(dtype, torch.dtype) or not whole or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape}, stride {stride}")
    last = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(f"a tensor of shape {shape} beyond its storage of {storage.nbytes} bytes")
    return TensorRef(storage, dtype, start, shape, stride)


def _other_tensor(kind: str, *arguments: Any) -> OtherTensor:
    return OtherTensor(kind, _size_in(arguments))


def _size_in(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """The first tuple of numbers: in all of ``_OTHER_TENSORS`` that is the size."""
    for value in arguments:
        if isinstance(value, tuple):
            if value and all(isinstance(number, int) and number >= 0 for number in value):
                return value
            if size := _size_in(value):
                return size
    return ()


def _first(value: Any, *rest: Any) -> Any:
    return value


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    return function(*arguments)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Dict,
    "builtins.dict": dict,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}

_MOST_MODULES = 1_000_000

_OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, without values",
}

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

# Data that other programs put beside their weights, and that is made of nothing but values.
_PLAIN = {
    *_STAND_INS,
    "collections.defaultdict",
    "collections.Counter",
    "collections.deque",
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Tensor",
    "torch.device",
    "torch.torch_version.TorchVersion",
    "torch.serialization._get_layout",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    *(f"builtins.{name}" for name in ("list", "tuple", "int", "float", "bool", "complex", "bytearray", "frozenset", "slice")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}


def _is_plain(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return (
        name in _PLAIN
        or (module.startswith("torch") and last.endswith("Storage"))
        or (module == "torch" and isinstance(getattr(torch, last, None), torch.dtype))
        or (module == "torch._utils" and last.startswith("_rebuild_"))
        or module == "numpy.dtypes"
    )


# ── finding the model's state dict ────────────────────────────────────────────────────────────────────────────────────

AnyTensor: TypeAlias = TensorRef | OtherTensor

_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
_TRAINING_STATE = ("optim", "sched", "scaler", "loss_fn", "grad")


def state_dicts(root: Any) -> list[tuple[str, dict[str, AnyTensor]]]:
    """The model state dicts in ``root``: (path, tensors by name), the model's own first, under the path "".

    That is ``root`` itself if it holds tensors by name, else the first of ``state_dict``, ``model`` … that does. Others
    that hold tensors, an EMA copy or the other half of a GAN, follow under their path. Optimiser states are left out.
    """
    found = list(_walk(root, "", set()))
    if not found:
        return []
    own = min(range(len(found)), key=lambda index: (_preference(found[index][0]), index))
    rest = found[:own] + found[own + 1 :]
    return [("", _without_prefix(found[own][1])), *((path, _without_prefix(tensors)) for path, tensors in rest)]


def _preference(path: str) -> int:
    parts = path.split("/")
    if path == "":
        return -1
    if parts[0] in _MODEL_KEYS:
        return _MODEL_KEYS.index(parts[0])
    return len(_MODEL_KEYS) + any("ema" in part.lower() for part in parts)


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, dict[str, AnyTensor]]]:
    """``seen`` are the ids of what was met before: a dict may hold itself, and what is there twice is one state dict."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Opaque) and value.state is not None:
        tensors = dict(_module_tensors(value, "", (id(value),), count()))
        if tensors:
            yield path, tensors
        return
    if not isinstance(value, dict):
        return
    tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, AnyTensor)}
    if tensors:
        yield path, tensors
    for key, item in value.items():
        if isinstance(key, str) and not any(word in key.lower() for word in _TRAINING_STATE):
            yield from _walk(item, f"{path}/{key}" if path else key, seen)


def _module_tensors(
    module: Opaque, prefix: str, above: tuple[int, ...], visits: Iterator[int]
) -> Iterator[tuple[str, AnyTensor]]:
    """The parameters and buffers of a pickled nn.Module or a TorchScript object, under the names of its state dict.

    ``above`` are the ids of the objects that hold it, for it may hold one of them; a module that is there twice has two names,
    so that a few bytes can ask for any number: ``visits`` counts them.
    """
    if next(visits) >= _MOST_MODULES:
        raise RecursionError(f"more than {_MOST_MODULES:,} modules")
    state = module.state[0] if isinstance(module.state, tuple) and module.state else module.state
    if not isinstance(state, dict):
        return
    parts = [state[key] for key in ("_parameters", "_buffers", "_modules") if isinstance(state.get(key), dict)]
    transient = state.get("_non_persistent_buffers_set", ())
    for part in parts or [state]:
        for name, value in part.items():
            if isinstance(value, AnyTensor) and name not in transient:
                yield f"{prefix}{name}", value
            elif isinstance(value, Opaque) and id(value) not in above:
                yield from _module_tensors(value, f"{prefix}{name}.", (*above, id(value)), visits)


def _without_prefix(tensors: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Names as the bare module has them, without ``module.`` of DataParallel and ``_orig_mod.`` of torch.compile."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    if all(name.startswith("module.") for name in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    if len(set(names.values())) < len(names) or not all(names.values()):
        return tensors
    return {names[name]: value for name, value in tensors.items()}
