"""What a tensor is, by name and shape alone: the rules for checkpoints that come without their model.

Each rule leaves a tensor dense and says why; ``--include`` overrides it. The names are those that PyTorch, torchvision, timm,
Hugging Face transformers and llama-style checkpoints use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nmconvert.matrix import Kind

_EMBEDDING = re.compile(
    r"embed|(^|[._])emb([._]|$)|_emb([._]|$)|(^|\.)(wte|wpe|shared|cls_token|mask_token|class_token|dist_token)(\.|$)|codebook"
)
_POSITION = re.compile(
    r"(^|[._])pos(ition(al)?)?([._]|$)|pos_?(embed|enc)|relative_(position|attention)|rope|rotary|freqs_(cis|cos|sin)|anchors?"
)
_NORM = re.compile(r"(^|[._])(bn|norm|layernorm|ln|batchnorm|groupnorm)\d*([._]|$)|layer_norm|running_(mean|var)")
_RECURRENT = re.compile(r"(^|\.)weight_[ih]h_l\d+(_reverse)?$")  # torch's RNN, GRU and LSTM
_OUTPUT = re.compile(
    r"^(fc|linear|classifier|head|heads|lm_head|output|out|score|logits|predictions|cls|qa_outputs|proj_out|final)$"
)
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")  # Hugging Face Conv1D (GPT-2) stores [I, O]
_TRANSPOSED = re.compile(r"deconv|upconv|conv_?transpose|convtranspose|transposed?_conv|(^|[._])up(_?sample)?\d*([._]|$)")


def guess_kind(name: str, shape: Sequence[int]) -> Kind:
    """The most likely kind of a weight with 2 to 5 dimensions."""
    if len(shape) == 2:
        return "matmul" if _CONV1D.search(name) else "linear"
    return "conv_transpose" if _TRANSPOSED.search(name.lower()) else "conv"


def is_embedding(name: str) -> bool:
    """Whether a tensor's name says that it is an embedding table."""
    return _EMBEDDING.search(name.lower()) is not None


def output_matrix(tensors: Sequence[tuple[str, Sequence[int]]]) -> str | None:
    """The name of the network's output layer: the last matrix, if one part of its name says that it is one.

    A listing in alphabetical order (safetensors) does not say what is last: there it is the one whose first part says so.
    Embeddings and recurrent layers are none, wherever they stand.
    """
    found = [name for name, shape in tensors if len(shape) == 2 and not (is_embedding(name) or _RECURRENT.search(name))]
    matrices = [(name, _own_parts(name, tensors)) for name in found]
    if not matrices:
        return None
    last, parts = matrices[-1]
    if _OUTPUT.match(parts[0]) or _OUTPUT.match(".".join(parts[-2:-1])):
        return last
    if [name for name, _ in matrices] != sorted(name for name, _ in matrices):
        return None
    return next((name for name, parts in reversed(matrices) if _OUTPUT.match(parts[0])), None)


def _own_parts(name: str, tensors: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """The parts of a name in lower case, without the first one where all tensors have the same (``module``, ``model``)."""
    first = name.partition(".")[0]
    parts = name.lower().split(".")
    return parts[1:] if len(parts) > 2 and all(other.startswith(f"{first}.") for other, _ in tensors) else parts


def rule_against(name: str, shape: Sequence[int], kind: Kind | None, *, groups: int = 1, is_output: bool) -> str | None:
    """Why a weight should stay dense unless somebody asks for it, or None.

    ``kind`` is None where it is not known; a known kind is not second-guessed from the name. A convolution in ``groups`` reads
    few channels in each, wherever it stands.
    """
    if kind is None:
        lower = name.lower()
        if _POSITION.search(lower):
            return "a position table, by its name"
        if is_embedding(name):
            return "an embedding, by its name"
        if _NORM.search(lower):
            return "a norm, by its name"
        if _RECURRENT.search(lower):
            return "a recurrent layer, by its name: no runtime is faster with its zeros"
        if len(shape) == 2 and 1 in shape:
            return "a vector"
    if len(shape) >= 3 and kind in (None, "conv", "conv_transpose"):
        if shape[1] == 1:
            return "depthwise, or a first layer: one input channel" if shape[0] > 1 else "a single filter"
        if kind != "conv_transpose" and groups == 1 and shape[1] <= 4:
            return f"the first layer: {shape[1]} input channels"
    if is_output:
        return "the output layer; --include prunes it"
    return None
