"""What a tensor is, by name and shape alone: the rules for checkpoints that come without their model.

Each rule leaves a tensor dense and says why; ``--include`` overrides it. The names are those that PyTorch, torchvision, timm,
Hugging Face transformers and llama-style checkpoints use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nmconvert.matrix import Kind

_EMBEDDING = re.compile(
    r"embed|(^|[._])emb([._]|$)|_emb([._]|$)|(^|\.)(wte|wpe|shared|cls_token|mask_token|class_token|dist_token)(\.|$)|codebook"
)
_PROJECTS = re.compile(r"(^|[._])(linear|proj|projection|fc|dense)_?\d*\.weight$")  # a layer of an embedding
_POSITION = re.compile(
    r"(^|[._])pos(ition(al)?)?([._]|$)|pos_?(embed|enc)|relative_(position|attention)|rope|rotary|freqs_(cis|cos|sin)|anchors?"
)
_NORM = re.compile(r"(^|[._])(bn|norm|layernorm|ln|batchnorm|groupnorm)\d*([._]|$)|layer_norm|running_(mean|var)")
_RECURRENT = re.compile(r"(^|\.)weight_[ih]h_l\d+(_reverse)?$")  # torch's RNN, GRU and LSTM
_OUTPUT = re.compile(
    r"^(fc|linear|classifier|head|heads|outc|seg(mentation)?_head|lm_head|output|out|score|logits|predictions|cls|"
    r"qa_outputs|proj_out|final)$"
)
_ANSWERS = re.compile(  # of several outputs
    r"^(cls_score|bbox_(reg|ctrness)|(cls|obj|reg|box|bbox)_preds?|(\w+_)?logits|class_labels_classifier|logits_proj|"
    r"head_dist|last_linear)$"
)
_LAST_CONV = re.compile(
    r"^(outc|(out|final|last|seg)_?conv|conv_?(out|last|seg)|seg(mentation)?_head)$"
)  # where no matrix follows
_OF_SIZES = re.compile(  # of each of several sizes: torchvision's SSDs, YOLOs
    r"_head\.module_list\.\d+(\.1)?\.weight$|(^|\.)\d+\.(one2one_)?cv[2-5]\.\d+\.2\.weight$"
)
_HIDDEN = re.compile(r"(^|\.)(transform|dense)\.")  # inside of a head
_ROUTER = re.compile(r"(^|\.)(router(\.(layer|classifier))?|(\w*(moe|mlp|ffn|feed_forward)\.)?gate)\.weight$")
_EXPERTS = re.compile(r"(^|\.)experts?\.|_(proj|linear)(\.weight)?$")
_NO_WEIGHT = re.compile(r"(^|[._])(bias|a_log)$")
_WEIGHT = re.compile(r"(^|[._/])(weight|kernel|filters?|w)(_orig)?$")  # and what torch's masks make it of
_QUANTISED = re.compile(r"\.(qweight|qzeros|scb|absmax|quant_map|weight_scale(_inv)?|weight_format)$")
_ADAPTER = re.compile(r"(^|\.)lora_(a|b|embedding_a|embedding_b)(\.|$)")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")  # Hugging Face Conv1D (GPT-2) stores [I, O]
_TRANSPOSED = re.compile(r"deconv|conv_?t\d*$|conv_?transpose|transposed?_conv")  # what a module calls itself
_ENLARGES = re.compile(r"^up(_?(sampler?|conv))?_?\d*$")  # transposed where its kernel is even, else on an enlarged image
_PARTS = {"weight_v": "weight_g", "weight_orig": "weight_u"}  # of weight_norm and spectral_norm, and what stands beside them
COMPUTED = "a weight is computed from it: fold it in first (remove_weight_norm, or parametrize.remove_parametrizations)"
_FEW = 4  # channels
_WIDE = 16  # places of a kernel: a convolution in one dimension rarely has as many


def guess_kind(name: str, shape: Sequence[int]) -> Kind:
    """The most likely kind of a weight with 2 to 5 dimensions."""
    if len(shape) == 2:
        return "matmul" if _CONV1D.search(name) else "linear"
    own = next((part for part in reversed(name.lower().split(".")[:-1]) if not part.isdigit()), "")
    enlarges = _ENLARGES.match(own) is not None and all(size % 2 == 0 for size in shape[2:])
    return "conv_transpose" if enlarges or _TRANSPOSED.search(own) else "conv"


def is_embedding(name: str) -> bool:
    """Whether a tensor's name says that it is an embedding table."""
    return _EMBEDDING.search(name.lower()) is not None and _PROJECTS.search(name.lower()) is None


def output_layers(tensors: Sequence[tuple[str, Sequence[int]]]) -> frozenset[str]:
    """The names of the network's output layers, as far as one part of a name says that it is one.

    Of matrices that is the last; where the listing does not say what is last (in alphabetical order, in shards), the one whose
    first part says so; where no matrix is one, 1×1 convolutions may be, that or those at the end of each branch of a head.
    Embeddings and recurrent layers are none, wherever they stand. What detectors call theirs are outputs, too.
    """
    parts = _own_parts([name for name, _ in tensors])
    own = {name: ".".join(parts[name][-2:-1]) for name in parts}  # what the module calls itself
    ends = _ends(tensors, parts)
    matrices = [name for name, shape in tensors if len(shape) == 2 and not (is_embedding(name) or _RECURRENT.search(name))]
    filters = [name for name, shape in tensors if len(shape) > 2]
    answers = [
        name for name in [*matrices, *filters] if _calls_itself(_ANSWERS, name, own, ends) or _OF_SIZES.search(name.lower())
    ]
    last_convs = [name for name in filters if _calls_itself(_LAST_CONV, name, own, ends)]
    others = [*answers, *last_convs]
    named = [name for name in matrices if _OUTPUT.match(parts[name][0])]
    last = [name for name in matrices[-1:] if name in named or _OUTPUT.match(own[name])]
    if last and last[0] not in named and own[last[0]] == "linear" and others:
        last = []  # as many call themselves
    last = last or named[-1:]
    if last and _HIDDEN.search(last[0]):
        last = [name for name in named if not _HIDDEN.search(name)][-1:] or last
    if not last:
        places = [name for name, shape in tensors if len(shape) == 4 and max(shape[2:]) == 1 and _OUTPUT.match(parts[name][0])]
        numbered = [name for name in places if name in ends and own[name].isdigit()]
        last = [*last_convs, *(numbered or places[-1:] * (not others))]
    return frozenset([*answers, *last])


def _calls_itself(what: re.Pattern[str], name: str, own: dict[str, str], ends: dict[str, str]) -> bool:
    """Whether a module, or the branch that it ends, has such a name."""
    return what.match(own[name]) is not None or what.match(ends.get(name, "")) is not None


def _ends(tensors: Sequence[tuple[str, Sequence[int]]], parts: dict[str, list[str]]) -> dict[str, str]:
    """The last weight of each branch, and those of its shape, which a list of outputs holds; with what the branch is called.

    A branch is a module, or that before the first number in a name: ``head.box.0.weight`` and ``head.box.1.weight`` are of one.
    """
    branches: dict[tuple[str, ...], list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in tensors:
        if len(shape) > 1:
            modules = parts[name][:-1]
            number = next((i for i, part in enumerate(modules) if part.isdigit()), len(modules))
            branches.setdefault(tuple(modules[:number]), []).append((name, tuple(shape)))
    return {
        name: ".".join(branch[-1:])
        for branch, weights in branches.items()
        for name, shape in weights
        if shape == weights[-1][1]
    }


def _own_parts(names: Sequence[str]) -> dict[str, list[str]]:
    """The parts of each name in lower case, without the first one where all have the same (``module``, ``model``)."""
    shared = len({name.partition(".")[0] for name in names}) == 1
    parts = {name: name.lower().split(".") for name in names}
    return {name: own[1:] if shared and len(own) > 2 else own for name, own in parts.items()}


def parts_of_weights(names: Iterable[str]) -> frozenset[str]:
    """Of ``names`` those that weights are computed from: parametrizations, weight_norm and spectral_norm."""
    there = frozenset(names)
    beside = {name.removesuffix(end) + other: name for name in there for end, other in _PARTS.items() if name.endswith(end)}
    parametrized = frozenset(name for name in there if ".parametrizations." in f".{name}")
    return parametrized.union(name for other, name in beside.items() if other in there)


def unready(names: Iterable[str]) -> str | None:
    """Why a checkpoint is not one to prune, by what its tensors are called, with the remedy; or None."""
    for name in names:
        if _QUANTISED.search(name.lower()):
            return f"'{name}' is of quantised weights: prune the checkpoint that was quantised"
        if _ADAPTER.search(name.lower()):
            return f"'{name}' is of a LoRA adapter: merge it into its model first (peft: merge_and_unload)"
    return None


def rule_against(name: str, shape: Sequence[int], kind: Kind | None, *, groups: int = 1, is_output: bool) -> str | None:
    """Why a weight should stay dense unless somebody asks for it, or None.

    ``kind`` is None where it is not known; a known kind is not second-guessed from the name. A convolution in ``groups`` reads
    few channels in each, wherever it stands.
    """
    lower = name.lower()
    if _ROUTER.search(lower) and len(shape) == 2 and 2 * shape[0] < shape[1]:
        return "a router of experts, by its name: what it gets wrong, no expert makes good"
    if kind is None:
        if _NO_WEIGHT.search(lower):
            return "no weight, by its name"
        if _POSITION.search(lower) and not lower.endswith("_proj.weight") and not (len(shape) > 2 and "conv" in lower):
            return "a position table, by its name"
        if is_embedding(name) and not (len(shape) > 2 and lower.endswith(".weight")):
            return "an embedding, by its name"
        if len(shape) == 3 and shape[2] >= _WIDE and _EXPERTS.search(lower):
            return "several matrices in one tensor, by its name: which way they are read is not known"
        if _NORM.search(lower):
            return "a norm, by its name"
        if _RECURRENT.search(lower):
            return "a recurrent layer, by its name: no runtime is faster with its zeros"
        if len(shape) == 2 and 1 in shape:
            return "a vector"
        if len(shape) > 2 and not _WEIGHT.search(lower):
            return "no layer's weight, by its name: which way it is read is not known"
    if len(shape) >= 3 and kind in (None, "conv", "conv_transpose"):
        if shape[1] == 1:
            return "depthwise, or a first layer: one input channel" if shape[0] > 1 else "a single filter"
        if kind != "conv_transpose" and groups == 1 and shape[1] <= _FEW:
            first = "the first layer: " if max(shape[2:]) > 1 else "too few to gain from: "
            return f"{first}{shape[1]} input channels"
    if is_output:
        return "the output layer; --include prunes it"
    outputs = shape[1] * groups if kind == "conv_transpose" else shape[0]
    if len(shape) >= 3 and kind in (None, "conv", "conv_transpose") and outputs <= _FEW:
        return f"too few to gain from: {outputs} output channels"
    return None
