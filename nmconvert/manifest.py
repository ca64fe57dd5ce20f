"""The manifest: what was done to each tensor, carried inside the file from one stage to the next.

It is JSON, and never needed to read the weights. Where it is present nothing is inferred again; ``verify`` holds the file
against it. A file may have been tampered with, so reading it checks every field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nmconvert import __version__
from nmconvert.errors import CheckpointError, NmconvertError
from nmconvert.matrix import KINDS, MatrixView
from nmconvert.pattern import AXES, Axis, Pattern
from nmconvert.signature import is_ours, sign
from nmconvert.tensor import PRUNABLE_DTYPES, Row, TensorInfo

if TYPE_CHECKING:
    from onnx import ModelProto

    from nmconvert.inputs import InputSpec

FORMAT = 1
MANIFEST = "nmconvert.json"  # a record in a .pt zip, a file beside shards
HARMLESS = ("input", "source")  # settings that name shapes and files, nothing that is run
METADATA_KEY = "nmconvert"  # the key in safetensors and ONNX metadata


class Carrier(Protocol):
    """A file that may carry a manifest: any checkpoint."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    def manifest_text(self) -> str | None:
        """The manifest's JSON."""
        ...


@dataclass(frozen=True)
class Layer:
    """One sparse tensor: where its groups lie, and the SHA-256 of its dense values (row-major, little-endian)."""

    info: TensorInfo
    pattern: Pattern
    axis: Axis
    digest: str
    assumed: bool = False
    energy: float | None = None  # share of the sum of squares that pruning kept, where it is known

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.info.name

    @property
    def view(self) -> MatrixView:
        """The matrix view of the tensor as it is stored."""
        return self.info.view(self.axis)

    @property
    def row(self) -> Row:
        """The row of the plan that this layer was."""
        return Row(self.info, self.pattern, self.axis, self.assumed)


@dataclass(frozen=True)
class Manifest:
    """``layers`` are the sparse tensors, ``dense`` the reasons of those that could have been; ``settings`` what was said once
    (model, input, data, …), ``history`` one entry a stage.

    A setting can name a callable, which is then run. Settings that were not said by this user on this machine are therefore
    dropped when a manifest is read, but for those that cannot (:data:`HARMLESS`); the file works as if they were never said.
    """

    layers: tuple[Layer, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()

    def layer(self, name: str) -> Layer | None:
        """The entry of tensor ``name``."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def after(self, stage: str, **facts: Any) -> Manifest:
        """This manifest with one more stage in its history."""
        return replace(self, history=(*self.history, {"stage": stage, "nmconvert": __version__, **facts}))

    def with_settings(self, **settings: Any) -> Manifest:
        """This manifest with further settings; None leaves one as it was."""
        said = {key: value for key, value in settings.items() if value is not None}
        return replace(self, settings={**self.settings, **said})

    def said_model(
        self, path: Path, model: str | None, arguments: Mapping[str, str] | None
    ) -> tuple[str | None, Mapping[str, str]]:
        """What builds the module of the checkpoint ``path``, and the arguments for it: as given, or else as was said before.

        A Hugging Face folder builds itself where nothing was said. Arguments of before belong to the model of before only.
        """
        before = self.settings.get("model")
        spec = model or before or (str(path) if (path / "config.json").is_file() else None)
        known = self.settings.get("model_arguments") if spec == before else None
        return spec, arguments or known or {}

    def said_inputs(self) -> list[InputSpec]:
        """The example inputs of the model, as far as they were said."""
        from nmconvert.inputs import InputSpec

        said = self.settings.get("input")
        return [InputSpec.parse(text) for text in said if isinstance(text, str)] if isinstance(said, list | tuple) else []

    def said_task(self, task: str | None, settings: Mapping[str, str] | None) -> tuple[str, Mapping[str, str]]:
        """The name of the task and its settings, each as given, or else as was said before of the same task."""
        before = self.settings.get("task")
        name = task or before or "classification"
        known = self.settings.get("task_settings") if name == before else None
        return name, {**(known or {}), **(settings or {})}

    def to_json(self) -> str:
        """The manifest as one line of JSON."""
        content = {
            "format": FORMAT,
            "layers": [_layer_to_json(layer) for layer in self.layers],
            "dense": dict(self.dense),
            "settings": dict(self.settings),
            "signature": sign(_canonical(self.settings)),
            "history": [dict(stage) for stage in self.history],
        }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def of(cls, file: Carrier) -> Manifest | None:
        """The manifest that ``file`` carries, if it carries one.

        Raises:
            CheckpointError: as :meth:`from_json`.
        """
        text = file.manifest_text()
        return None if text is None else cls.from_json(text, str(file.path))

    @classmethod
    def in_metadata(cls, model: ModelProto, source: str) -> Manifest | None:
        """The manifest in the metadata of an ONNX model, the file ``source``, if it carries one.

        Raises:
            CheckpointError: as :meth:`from_json`.
        """
        text = metadata_text(model)
        return None if text is None else cls.from_json(text, source)

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read the manifest that file ``source`` carries.

        Raises:
            CheckpointError: it is damaged, or was written by a newer nmconvert.
        """
        try:
            content = json.loads(text)
            if content["format"] > FORMAT:
                raise CheckpointError(
                    f"{source}: its manifest has format {content['format']}, newer than {FORMAT}: update nmconvert"
                )
            return cls(
                layers=tuple(_layer_from_json(layer) for layer in content["layers"]),
                dense={str(name): str(reason) for name, reason in content["dense"].items()},
                settings=_trusted(dict(content["settings"]), content.get("signature")),
                history=tuple(dict(stage) for stage in content["history"]),
            )
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, NmconvertError) as error:
            raise CheckpointError(
                f"{source}: its nmconvert manifest is damaged ({error!r}): start from the file that it was made from"
            ) from error


def metadata_text(model: ModelProto) -> str | None:
    """The manifest's JSON in the metadata of an ONNX model."""
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True, allow_nan=False)


def _trusted(settings: dict[str, Any], signature: object) -> dict[str, Any]:
    if is_ours(_canonical(settings), signature):
        return settings
    return {key: value for key, value in settings.items() if key in HARMLESS}


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    info = layer.info
    return {
        "name": info.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "kind": info.kind,
        "groups": info.groups,
        "transposed": None if info.transposed is None else list(info.transposed),
        "pattern": str(layer.pattern),
        "axis": layer.axis,
        "assumed": layer.assumed,
        "sha256": layer.digest,
        "energy": layer.energy,
    }


def _layer_from_json(content: Mapping[str, Any]) -> Layer:
    for key, known in (("kind", KINDS), ("axis", AXES), ("dtype", PRUNABLE_DTYPES)):
        if content[key] not in known:
            raise ValueError(f"unknown {key} {content[key]!r:.80}")
    transposed = content["transposed"]
    info = TensorInfo(
        name=str(content["name"]),
        shape=tuple(int(s) for s in content["shape"]),
        dtype=str(content["dtype"]),
        kind=content["kind"],
        groups=int(content["groups"]),
        transposed=None if transposed is None else tuple(int(p) for p in transposed),
    )
    if min(info.shape, default=0) < 1 or (
        transposed is not None and sorted(info.transposed or ()) != list(range(len(info.shape)))
    ):
        raise ValueError(f"impossible shape {info.shape} or transpose {transposed}")
    if info.groups < 1 or re.fullmatch("[0-9a-f]{64}", str(content["sha256"])) is None:
        raise ValueError(f"impossible groups {info.groups} or hash {content['sha256']!r:.80}")
    layer = Layer(
        info,
        Pattern.parse(content["pattern"]),
        content["axis"],
        str(content["sha256"]),
        bool(content["assumed"]),
        None if content["energy"] is None else float(content["energy"]),
    )
    if layer.energy is not None and not isfinite(layer.energy):
        raise ValueError(f"an energy of {layer.energy}")
    info.view(layer.axis)  # raises where kind, shape and groups contradict each other
    return layer
