"""Models of Hugging Face transformers: made from their folders, the names of their weights, and their caches.

From version 5 on transformers names and groups the weights of a module otherwise than the files that it reads: a file's
``vit.encoder.layer.0.attention.attention.key`` is the module's ``vit.layers.0.attention.k_proj``, and the experts of a mixture
are slices of one parameter. It translates when it loads, and back when it saves; :func:`own_names` asks it how.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from nmconvert.errors import ModelError
from nmconvert.extras import require
from nmconvert.imports import brief


def is_model(module: nn.Module) -> bool:
    """Whether a module is one of transformers', which is not imported for it."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def build(folder: Path) -> nn.Module:
    """The module that the ``config.json`` of a folder describes, with random weights.

    Raises:
        ModelError: transformers cannot build it.
    """
    with _errors(folder) as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model: nn.Module = _class(transformers, config)._from_config(config)
        return model


def load(folder: Path) -> tuple[nn.Module, list[str]]:
    """The module of a folder with its weights, in their dtype, and the names of those that are not there or do not fit.

    Raises:
        ModelError: transformers cannot build it.
    """
    with _errors(folder) as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model, told = _class(transformers, config).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype="auto"
        )
    return model, [*sorted(told["missing_keys"]), *(str(key) for key in told["mismatched_keys"])]


def own_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Each name of a checkpoint → that of the parameter of ``model`` that transformers loads it into.

    A weight that it merges with others on the way, or cuts up, keeps its name, which is none of the model's.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # before version 5 files and modules had the same names
        return {name: name for name in names}
    steps = get_model_conversion_mapping(model)  # type: ignore[arg-type]  # one of transformers', as is_model says
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    own, prefix = model.state_dict(keep_vars=True), str(model.base_model_prefix)
    found = {}
    for name in sorted(names, key=dot_natural_key):  # as it loads them: some renamings wait for a name that tells of others
        renamed, converted = rename_source_key(name, renamings, converters, prefix, own)
        found[name] = renamed if converted is None and renamed in own else name
    return {name: found[name] for name in names}


def without_caches(model: nn.Module) -> None:
    """Let ``model`` and its parts return no keys and values of the past: what was computed before would be computed on."""
    for part in model.modules():  # a decoder has a configuration of its own
        if hasattr(part, "config") and hasattr(part.config, "use_cache"):
            part.config.use_cache = False


def _class(transformers: ModuleType, config: Any) -> Any:
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise ModelError(
        f"its architecture {', '.join(map(str, names)) or '(none)'} is not in transformers {transformers.__version__}"
    )


@contextmanager
def _errors(folder: Path) -> Iterator[ModuleType]:
    """transformers, whose errors become one line; folders of code (``trust_remote_code``) are never run."""
    transformers = require("transformers", "hf")
    transformers.utils.logging.set_verbosity_error()  # its advice and progress bars are not ours to print
    transformers.utils.logging.disable_progress_bar()
    try:
        yield transformers
    except Exception as error:  # a config.json can ask its classes for anything
        raise ModelError(f"{folder}: transformers cannot build it: {brief(error)}") from error
