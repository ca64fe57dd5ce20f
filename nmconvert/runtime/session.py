"""An onnxruntime session in which the calls of our functions run on the native kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from nmconvert.runtime.locate import kernels

CPU = "CPUExecutionProvider"


def session(
    model: str | os.PathLike[str] | bytes,
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    provider_options: Sequence[Mapping[str, Any]] | None = None,
) -> onnxruntime.InferenceSession:
    """``onnxruntime.InferenceSession`` of ``model`` (a path, or the file's bytes) with the kernels registered.

    Where the kernels cannot be used a warning says why, and the session runs on the functions that the file carries:
    the same outputs, at dense speed. ``sess_options`` are changed: the library is registered with them.
    """
    options = sess_options or onnxruntime.SessionOptions()
    found = kernels()
    if found.usable:
        options.register_custom_ops_library(str(found.path))
    else:
        warnings.warn(f"no native kernels, dense speed: {found.reason}; {found.remedy}", RuntimeWarning, stacklevel=2)
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else os.fspath(model), options, providers or [CPU], provider_options
    )
