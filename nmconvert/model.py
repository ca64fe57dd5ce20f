"""An ``nn.Module`` from an import path, a Python file, a Hugging Face folder or an exported program; and its layers.

Naming a callable runs it: that is what ``--model`` says, and needs no trust. Loading a file that holds a program does.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nmconvert import hugging_face
from nmconvert.checkpoint import Checkpoint, open_checkpoint
from nmconvert.errors import ModelError, UsageError
from nmconvert.imports import ImportPath, brief
from nmconvert.matrix import Kind

_FORM = "give it as package.module:callable, path/to/file.py:callable, or a Hugging Face model folder"
_SHOWN = 3  # names in an error; the rest is counted


@dataclass(frozen=True)
class Layer:
    """One weight that can be sparse: parameter ``parameter`` of ``module``, which is called ``name`` in the model."""

    name: str
    module: nn.Module
    parameter: str
    kind: Kind
    groups: int
    weight: Tensor

    @property
    def tensor(self) -> str:
        """The name of the weight in the model's state dict."""
        return f"{self.name}.{self.parameter}" if self.name else self.parameter


def layers(model: nn.Module) -> list[Layer]:
    """The weights of convolutions, linear layers and attention, in the model's order; no forward pass is needed.

    A weight that several modules share is one layer, the first of them.
    """
    found: dict[int, Layer] = {}
    for name, module in model.named_modules():
        for parameter, kind, groups in _weights(module):
            weight = getattr(module, parameter)
            if isinstance(weight, Tensor):
                found.setdefault(id(weight), Layer(name, module, parameter, kind, groups, weight))
    return list(found.values())


def named_layers(model: nn.Module) -> dict[str, Layer]:
    """:func:`layers` by the names of their weights in the state dict, all of them where modules share one."""
    known = {id(layer.weight): layer for layer in layers(model)}
    found = {
        f"{name}.{parameter}" if name else parameter: known.get(id(getattr(module, parameter)))
        for name, module in model.named_modules(remove_duplicate=False)
        for parameter, _, _ in _weights(module)
    }
    return {name: layer for name, layer in found.items() if layer is not None}


def _weights(module: nn.Module) -> list[tuple[str, Kind, int]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return [("weight", "conv_transpose" if module.transposed else "conv", module.groups)]
    if isinstance(module, nn.Linear):
        return [("weight", "linear", 1)]
    if isinstance(module, nn.MultiheadAttention):
        return [(name, "linear", 1) for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers.pytorch_utils, not imported for it
        return [("weight", "matmul", 1)]
    return []


def build(spec: str, arguments: Mapping[str, str] | None = None, *, trust: bool = False) -> nn.Module:
    """The module that ``spec`` stands for, with the weights that it comes with.

    Args:
        spec: ``package.module:callable``, ``path/to/file.py:callable``, a Hugging Face model folder, or with ``trust`` an
            exported program, a TorchScript archive or a pickled module.
        arguments: keyword arguments of the callable as text, read as Python literals.
        trust: allow files that execute code when they are loaded.

    Raises:
        UsageError: ``spec`` has none of these forms or names what is not there, or the arguments do not fit.
        ModelError: the module cannot be imported or built.
        UntrustedFileError: the file is a program, and ``trust`` is False.
    """
    keywords = {name: literal(text) for name, text in (arguments or {}).items()}
    path = Path(spec)
    if path.is_dir():
        _no_arguments(spec, keywords)
        return _build_folder(path)
    if path.suffix != ".py" and path.is_file():
        _no_arguments(spec, keywords)
        return _load_program(path, trust=trust)
    named = ImportPath.parse(spec, f"--model {spec}", ModelError)
    if named is None:
        raise UsageError(f"--model '{spec}' does not say what builds the model; {_FORM}")
    made = _call(spec, named, keywords)
    if not isinstance(made, nn.Module):
        raise ModelError(f"{spec} returned a {type(made).__name__}, not a torch.nn.Module; name what builds the model")
    return made


def load(spec: str, checkpoint: Path, arguments: Mapping[str, str] | None = None, *, trust: bool = False) -> nn.Module:
    """The module of ``spec`` with the weights of ``checkpoint`` in it, every name and shape matched; in eval mode.

    Where all floating tensors of the checkpoint have one dtype, the module gets it. Checkpoints whose names all start with
    one more part than the module's (``model.`` of Lightning) fit too.

    Raises:
        ModelError: as :func:`build`, or names or shapes differ.
        CheckpointError: the checkpoint cannot be read.
    """
    if checkpoint.is_dir() and (checkpoint / "config.json").is_file():
        _no_arguments(spec, arguments or {})
        return _load_folder(checkpoint).eval()
    model = build(spec, arguments, trust=trust)
    fill(model, open_checkpoint(checkpoint, trust=trust))
    return model.eval()


def fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into ``model``, strictly.

    Raises:
        ModelError: names or shapes differ.
    """
    own = model.state_dict(keep_vars=True)
    if hugging_face.is_model(model) and (loaded := _same_model(model, checkpoint.path)):
        cast(model, next(loaded.parameters()).dtype).load_state_dict(loaded.state_dict())
        return
    infos = [info for info in checkpoint.tensors() if not info.secondary and not info.unread]
    names = matched_names([info.name for info in infos], model)
    shapes = {names[info.name]: info.shape for info in infos}
    for name, shape in shapes.items():
        if name in own and not has_shape(own[name], shape):
            raise ModelError(
                f"{checkpoint.path}: '{name}' is {list(shape)}, and {list(own[name].shape)} in the model; "
                "choose the model's size with --model-arg"
            )
    dtypes = {info.torch_dtype for info in infos if info.torch_dtype.is_floating_point}
    if len(dtypes) == 1:
        cast(model, dtypes.pop())
    state = {names[info.name]: checkpoint.read(info.name) for info in infos}
    result = model.load_state_dict(state, strict=False)
    tied = {id(own[name]) for name in state if name in own}
    missing = [name for name in result.missing_keys if id(own.get(name)) not in tied]
    if missing or result.unexpected_keys:
        raise ModelError(f"{checkpoint.path}: does not fit the model: {_differences(missing, result.unexpected_keys)}")


def has_shape(weight: Tensor, shape: Sequence[int]) -> bool:
    """Whether a parameter has a shape; a lazy one, which waits for its first input or a checkpoint, has any."""
    return is_lazy(weight) or tuple(weight.shape) == tuple(shape)


def forward_inputs(model: nn.Module) -> tuple[list[str], bool]:
    """What ``forward`` calls its inputs, and whether it takes others by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def is_part_of_weight(model: nn.Module, name: str) -> bool:
    """Whether a layer's weight is computed from the parameter ``name``: under weight_norm, spectral_norm and their like."""
    if ".parametrizations." in f".{name}":
        return True
    path, _, attribute = name.rpartition(".")
    module, weight = model.get_submodule(path), attribute.rpartition("_")[0]  # weight_v, weight_orig
    return bool(weight) and weight not in module._parameters and isinstance(getattr(module, weight, None), Tensor)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with its floating parameters and buffers in ``dtype``; complex ones, which `nn.Module.to` makes real, stay."""
    model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy of ``model``, also where hooks compute its weights anew at each call (`torch.nn.utils.weight_norm`)."""
    for module in model.modules():
        computed = {name: value for name, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn}
        vars(module).update({name: value.detach() for name, value in computed.items()})
    return deepcopy(model)


def literal(text: str) -> Any:
    """The Python value that ``text`` writes, or the text itself: ``10``, ``0.5``, ``[1,2]``, ``true``, ``none``, ``relu``."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _call(spec: str, named: ImportPath, keywords: Mapping[str, Any]) -> Any:
    factory = named.load()
    if isinstance(factory, nn.Module):
        _no_arguments(spec, keywords)
        return factory
    if not callable(factory):
        raise ModelError(f"--model {spec} is a {type(factory).__name__}, which cannot be called; {_FORM}")
    _check_arguments(spec, factory, keywords)
    with named.running("building it"):
        return factory(**keywords)


def _check_arguments(spec: str, factory: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # built in: it has no signature, and calling it will tell
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty and p.name not in keywords]
    if needed:
        raise UsageError(f"--model {spec} needs {', '.join(needed)}; give --model-arg {needed[0]}=VALUE")
    unknown = [name for name in keywords if name not in {p.name for p in named}]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = ", ".join(p.name for p in named) or "none"
        raise UsageError(f"--model {spec} takes no argument '{unknown[0]}'; its arguments: {takes}")


def _no_arguments(spec: str, keywords: Mapping[str, Any]) -> None:
    if keywords:
        raise UsageError(f"--model-arg {next(iter(keywords))}: {spec} is not a callable and takes no arguments")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _build_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {folder}: a folder without config.json, so no Hugging Face model; {_FORM}")
    return hugging_face.build(folder)


def _load_folder(folder: Path) -> nn.Module:
    model, missing = hugging_face.load(folder)
    if missing:
        raise ModelError(f"{folder}: its weights do not fit its config.json: {_differences(missing, [])}")
    return model


def _same_model(model: nn.Module, folder: Path) -> nn.Module | None:
    """The model that a Hugging Face folder holds, if it is of the class and the shapes of ``model``."""
    if not (folder / "config.json").is_file():
        return None
    loaded = _load_folder(folder)
    shapes, own = ({name: value.shape for name, value in m.state_dict().items()} for m in (loaded, model))
    return loaded if type(loaded) is type(model) and shapes == own else None


def _load_program(path: Path, *, trust: bool) -> nn.Module:
    form = open_checkpoint(path, trust=trust).format
    try:
        if form == "exported program":
            return _without_mode(torch.export.load(path).module())
        if form == "TorchScript":
            script: nn.Module = torch.jit.load(path, map_location="cpu")
            return script
        if form == "pickled module":
            return _first_module(torch.load(path, map_location="cpu", weights_only=False))
    except Exception as error:  # what is loaded is a program
        raise ModelError(f"{path}: loading it failed with {brief(error)}; --debug shows where") from error
    raise UsageError(f"--model {path}: a checkpoint ({form}) holds weights and no model; {_FORM}")


def _without_mode(module: nn.Module) -> nn.Module:
    """An exported graph is the same in both modes; torch gives it ``eval`` and ``train`` that raise, here they do nothing."""
    for name in ("eval", "train"):
        module.__dict__.pop(name, None)
    return module


def _first_module(value: Any) -> nn.Module:
    candidates = [value, *(value.values() if isinstance(value, Mapping) else ())]
    for candidate in candidates:
        if isinstance(candidate, nn.Module):
            return candidate
    raise TypeError("no torch.nn.Module in it")


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def matched_names(names: Sequence[str], model: nn.Module) -> dict[str, str]:
    """Each name of a checkpoint → its name in the model: the same, without the first part that all have, or transformers'."""
    own = model.state_dict(keep_vars=True)
    matched = {name: name for name in names}
    first = {name.partition(".")[0] for name in names}
    if len(first) == 1 and not any(name in own for name in names):
        shorter = {name: name.partition(".")[2] for name in names}
        if any(name in own for name in shorter.values()):
            matched = shorter
    if hugging_face.is_model(model):
        renamed = hugging_face.own_names(model, list(matched.values()))
        matched = {name: renamed[inner] for name, inner in matched.items()}
    return matched


def _differences(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing, unexpected)})")
    if unexpected:
        parts.append(f"{len(unexpected)} too many ({_some(unexpected, [])})")
    return ", ".join(parts) + "; choose the model that it was saved from with --model and --model-arg"


def _some(names: list[str], others: list[str]) -> str:
    shown = []
    for name in names[:_SHOWN]:
        close = get_close_matches(name, others, 1)
        shown.append(f"{name}, nearest {close[0]}" if close else name)
    return "; ".join(shown) + (", …" if len(names) > _SHOWN else "")
