"""Plans, with the rules and targets that they are made of, on the names and shapes of common models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nmconvert.errors import UsageError
from nmconvert.matrix import Kind
from nmconvert.pattern import Pattern
from nmconvert.plan import Plan, make_plan
from nmconvert.rules import guess_kind, unready
from nmconvert.targets import TARGETS, usable_by
from nmconvert.tensor import TensorInfo

Shapes = dict[str, tuple[int, ...]]


def tensors(shapes: Shapes, dtype: str = "float32") -> list[TensorInfo]:
    return [TensorInfo(name, shape, dtype) for name, shape in shapes.items()]


def plan(shapes: Shapes, pattern: str = "2:4", **options: Any) -> Plan:
    return make_plan(tensors(shapes), Pattern.parse(pattern), **options)


def reasons(made: Plan) -> dict[str, str | None]:
    return {row.name: row.reason for row in made.rows}


# Names and shapes as the published checkpoints have them (two blocks of each are enough): name → the start of the reason why
# the tensor stays dense, None where it is pruned.
MODELS: dict[str, dict[str, tuple[tuple[int, ...], str | None]]] = {
    "torchvision resnet50": {
        "conv1.weight": ((64, 3, 7, 7), "the first layer: 3 input channels"),
        "bn1.weight": ((64,), "fewer than two dimensions"),
        "bn1.running_mean": ((64,), "fewer than two dimensions"),
        "bn1.num_batches_tracked": ((), "fewer than two dimensions"),
        "layer1.0.conv1.weight": ((64, 64, 1, 1), None),
        "layer1.0.conv2.weight": ((64, 64, 3, 3), None),
        "layer1.0.downsample.0.weight": ((256, 64, 1, 1), None),
        "layer4.2.conv3.weight": ((2048, 512, 1, 1), None),
        "fc.weight": ((1000, 2048), "the output layer"),
        "fc.bias": ((1000,), "fewer than two dimensions"),
    },
    "torchvision mobilenet_v2": {
        "features.0.0.weight": ((32, 3, 3, 3), "the first layer"),
        "features.1.conv.0.0.weight": ((32, 1, 3, 3), "depthwise"),
        "features.1.conv.1.weight": ((16, 32, 1, 1), None),
        "classifier.1.weight": ((1000, 1280), "the output layer"),
    },
    "torchvision vit_b_16": {
        "class_token": ((1, 1, 768), "an embedding"),
        "conv_proj.weight": ((768, 3, 16, 16), "the first layer"),
        "encoder.pos_embedding": ((1, 197, 768), "a position table"),
        "encoder.layers.encoder_layer_0.ln_1.weight": ((768,), "fewer than two dimensions"),
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": ((2304, 768), None),
        "encoder.layers.encoder_layer_0.self_attention.out_proj.weight": ((768, 768), None),
        "encoder.layers.encoder_layer_0.mlp.0.weight": ((3072, 768), None),
        "heads.head.weight": ((1000, 768), "the output layer"),
    },
    "timm vit": {
        "cls_token": ((1, 1, 192), "an embedding"),
        "pos_embed": ((1, 197, 192), "a position table"),
        "patch_embed.proj.weight": ((192, 3, 16, 16), "the first layer"),
        "blocks.0.attn.qkv.weight": ((576, 192), None),
        "blocks.0.mlp.fc2.weight": ((192, 768), None),
        "head.weight": ((1000, 192), "the output layer"),
    },
    "timm swin": {
        "patch_embed.proj.weight": ((96, 3, 4, 4), "the first layer"),
        "layers.0.blocks.0.attn.relative_position_bias_table": ((169, 3), "a position table"),
        "layers.0.blocks.0.attn.qkv.weight": ((288, 96), None),
        "layers.0.downsample.reduction.weight": ((192, 384), None),
        "head.fc.weight": ((1000, 768), "the output layer"),
    },
    "timm convnext": {
        "stem.0.weight": ((96, 3, 4, 4), "the first layer"),
        "stages.0.blocks.0.conv_dw.weight": ((96, 1, 7, 7), "depthwise"),
        "stages.0.blocks.0.mlp.fc1.weight": ((384, 96), None),
        "stages.1.downsample.1.weight": ((192, 96, 2, 2), None),
        "head.fc.weight": ((1000, 768), "the output layer"),
    },
    "HF bert": {
        "bert.embeddings.word_embeddings.weight": ((30522, 768), "an embedding"),
        "bert.embeddings.position_embeddings.weight": ((512, 768), "a position table"),
        "bert.embeddings.token_type_embeddings.weight": ((2, 768), "an embedding"),
        "bert.embeddings.LayerNorm.weight": ((768,), "fewer than two dimensions"),
        "bert.encoder.layer.0.attention.self.query.weight": ((768, 768), None),
        "bert.encoder.layer.0.attention.output.dense.weight": ((768, 768), None),
        "bert.encoder.layer.0.intermediate.dense.weight": ((3072, 768), None),
        "bert.encoder.layer.0.output.dense.weight": ((768, 3072), None),
        "bert.pooler.dense.weight": ((768, 768), None),
        "classifier.weight": ((2, 768), "the output layer"),
    },
    "HF gpt2": {
        "transformer.wte.weight": ((50257, 768), "an embedding"),
        "transformer.wpe.weight": ((1024, 768), "an embedding"),
        "transformer.h.0.attn.c_attn.weight": ((768, 2304), None),
        "transformer.h.0.attn.c_proj.weight": ((768, 768), None),
        "transformer.h.0.mlp.c_fc.weight": ((768, 3072), None),
        "transformer.h.0.mlp.c_proj.weight": ((3072, 768), None),
        "lm_head.weight": ((50257, 768), "the output layer"),
    },
    "HF llama": {
        "model.embed_tokens.weight": ((32000, 4096), "an embedding"),
        "model.layers.0.self_attn.q_proj.weight": ((4096, 4096), None),
        "model.layers.0.self_attn.k_proj.weight": ((1024, 4096), None),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ((64,), "fewer than two dimensions"),
        "model.layers.0.mlp.gate_proj.weight": ((11008, 4096), None),
        "model.layers.0.mlp.up_proj.weight": ((11008, 4096), None),
        "model.layers.0.mlp.down_proj.weight": ((4096, 11008), None),
        "model.layers.0.input_layernorm.weight": ((4096,), "fewer than two dimensions"),
        "lm_head.weight": ((32000, 4096), "the output layer"),
    },
    "llama.c": {
        "tok_embeddings.weight": ((512, 64), "an embedding"),
        "layers.0.attention.wq.weight": ((64, 64), None),
        "layers.0.feed_forward.w2.weight": ((64, 172), None),
        "freqs_cos": ((512, 4), "a position table"),
        "output.weight": ((512, 64), "the output layer"),
    },
    "HF t5": {
        "shared.weight": ((32128, 512), "an embedding"),
        "encoder.block.0.layer.0.SelfAttention.q.weight": ((512, 512), None),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ((32, 8), "a position table"),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": ((2048, 512), None),
        "lm_head.weight": ((32128, 512), "the output layer"),
    },
    "HF bert, masked words": {
        "bert.encoder.layer.0.output.dense.weight": ((768, 3072), None),
        "cls.predictions.transform.dense.weight": ((768, 768), None),
        "cls.predictions.decoder.weight": ((30522, 768), "the output layer"),
    },
    "HF segformer": {
        "segformer.encoder.patch_embeddings.0.proj.weight": ((32, 3, 7, 7), "the first layer"),
        "segformer.encoder.patch_embeddings.1.proj.weight": ((64, 32, 3, 3), None),
    },
    "HF resnet": {
        "resnet.embedder.embedder.convolution.weight": ((64, 3, 7, 7), "the first layer"),
        "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": ((64, 64, 1, 1), None),
        "classifier.1.weight": ((1000, 2048), "the output layer"),
    },
    "HF deberta": {
        "deberta.encoder.layer.0.attention.self.pos_key_proj.weight": ((768, 768), None),
        "deberta.encoder.rel_embeddings.weight": ((512, 768), "an embedding"),
    },
    "HF mixtral": {
        "lm_head.weight": ((32000, 4096), "the output layer"),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": ((14336, 4096), None),
        "model.layers.0.block_sparse_moe.gate.weight": ((8, 4096), "a router of experts"),
        "model.layers.0.mlp.gate_proj.weight": ((14336, 4096), None),
    },
    "HF gpt-oss": {
        "model.layers.0.mlp.experts.gate_up_proj": ((32, 2880, 5760), "several matrices in one tensor"),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ((32, 5760), "no weight"),
        "model.layers.0.mlp.experts.down_proj": ((32, 2880, 2880), "several matrices in one tensor"),
        "model.layers.0.mlp.router.weight": ((32, 2880), "a router of experts"),
        "model.layers.0.self_attn.q_proj.weight": ((4096, 2880), None),
    },
    "HF granite": {
        "model.layers.0.block_sparse_moe.input_linear.weight": ((32, 1024, 1536), "several matrices in one tensor"),
        "model.layers.0.block_sparse_moe.router.layer.weight": ((32, 1536), "a router of experts"),
    },
    "HF mamba": {
        "backbone.layers.0.mixer.A_log": ((1536, 16), "no weight"),
        "backbone.layers.0.mixer.in_proj.weight": ((3072, 768), None),
        "backbone.layers.0.mixer.conv1d.weight": ((1536, 1, 4), "depthwise"),
    },
    "HF xlnet": {
        "transformer.layer.0.rel_attn.r_w_bias": ((12, 64), "no weight"),
        "transformer.layer.0.ff.layer_1.weight": ((3072, 768), None),
        "logits_proj.weight": ((2, 768), "the output layer"),
    },
    "HF detr": {
        "class_labels_classifier.weight": ((92, 256), "the output layer"),
        "model.decoder.layers.0.fc1.weight": ((2048, 256), None),
    },
    "torchvision detectors": {
        "backbone.body.conv1.weight": ((64, 3, 7, 7), "the first layer"),
        "rpn.head.conv.0.0.weight": ((256, 256, 3, 3), None),
        "rpn.head.cls_logits.weight": ((3, 256, 1, 1), "the output layer"),
        "rpn.head.bbox_pred.weight": ((12, 256, 1, 1), "the output layer"),
        "roi_heads.box_head.fc6.weight": ((1024, 12544), None),
        "roi_heads.box_predictor.cls_score.weight": ((91, 1024), "the output layer"),
        "roi_heads.box_predictor.bbox_pred.weight": ((364, 1024), "the output layer"),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": ((91, 256, 1, 1), "the output layer"),
    },
    "timm deit, distilled": {
        "head.weight": ((1000, 192), "the output layer"),
        "head_dist.weight": ((1000, 192), "the output layer"),
        "blocks.0.mlp.fc2.weight": ((192, 768), None),
    },
    "torchvision squeezenet": {
        "features.0.weight": ((64, 3, 3, 3), "the first layer"),
        "features.12.expand1x1.weight": ((256, 64, 1, 1), None),
        "classifier.1.weight": ((1000, 512, 1, 1), "the output layer"),
    },
    "torchvision retinanet": {
        "head.classification_head.conv.0.0.weight": ((256, 256, 3, 3), None),
        "head.classification_head.cls_logits.weight": ((819, 256, 3, 3), "the output layer"),
        "head.regression_head.bbox_reg.weight": ((36, 256, 3, 3), "the output layer"),
    },
    "yolo": {
        "model.2.cv2.conv.weight": ((32, 48, 1, 1), None),
        "model.22.cv2.0.0.conv.weight": ((64, 64, 3, 3), None),
        "model.22.cv2.0.2.weight": ((64, 64, 1, 1), "the output layer"),
        "model.22.cv3.2.2.weight": ((80, 80, 1, 1), "the output layer"),
        "model.22.dfl.conv.weight": ((1, 16, 1, 1), "too few to gain from: 1 output channels"),  # the numbers 0 to 15
    },
    "shufflenet": {
        "stage4.3.branch2.0.weight": ((232, 232, 1, 1), None),
        "conv_last.0.weight": ((1024, 464, 1, 1), None),  # before the classifier
        "classifier.0.weight": ((1000, 1024), "the output layer"),
    },
    "smp segformer": {
        "decoder.mlp_stage.3.linear.weight": ((256, 32), None),
        "decoder.fuse_stage.0.weight": ((256, 1024, 1, 1), None),
        "segmentation_head.0.weight": ((21, 256, 1, 1), "the output layer"),
    },
    "diffusers": {
        "time_embedding.linear_1.weight": ((256, 64), None),
        "down_blocks.0.resnets.0.time_emb_proj.weight": ((64, 256), None),
        "class_embedding.weight": ((10, 256), "an embedding"),
        "conv_out.weight": ((8, 64, 3, 3), "the output layer"),
    },
    "HF wav2vec2": {
        "encoder.pos_conv_embed.conv.weight": ((64, 16, 128), None),
        "encoder.layers.0.attention.q_proj.weight": ((64, 64), None),
    },
    "torchvision ssd": {
        "backbone.features.2.weight": ((64, 64, 3, 3), None),
        "head.classification_head.module_list.0.weight": ((364, 512, 3, 3), "the output layer"),
        "head.classification_head.module_list.1.weight": ((546, 1024, 3, 3), "the output layer"),
        "head.regression_head.module_list.0.weight": ((16, 512, 3, 3), "the output layer"),
        "head.regression_head.module_list.1.weight": ((24, 1024, 3, 3), "the output layer"),
    },
    "HF dac": {
        "encoder.block.0.res_unit1.snake1.alpha": ((1, 64, 1), "no layer's weight"),
        "encoder.block.0.res_unit1.conv1.weight": ((64, 64, 7), None),
        "decoder.block.0.conv_t1.weight": ((64, 32, 4), None),
    },
    "a mixture": {
        "layers.0.gate.weight": ((4, 32), "a router of experts"),
        "layers.0.experts.0.w1.weight": ((64, 32), None),
        "layers.0.glu.gate.weight": ((32, 32), None),
    },
    "a detector of branches": {
        "body.0.0.weight": ((64, 64, 3, 3), None),
        "head.logits.0.0.weight": ((64, 64, 3, 3), None),
        "head.logits.1.weight": ((10, 64, 1, 1), "the output layer"),
        "head.box.0.0.weight": ((64, 64, 3, 3), None),
        "head.box.1.weight": ((4, 64, 1, 1), "the output layer"),
    },
    "yolox": {
        "backbone.dark2.0.conv.weight": ((64, 32, 3, 3), None),
        "head.stems.0.conv.weight": ((128, 256, 1, 1), None),
        "head.cls_convs.0.0.conv.weight": ((128, 128, 3, 3), None),
        "head.cls_preds.0.weight": ((80, 128, 1, 1), "the output layer"),
        "head.cls_preds.1.weight": ((80, 128, 1, 1), "the output layer"),
        "head.obj_preds.0.weight": ((1, 128, 1, 1), "the output layer"),
    },
    "torchvision efficientnet": {
        "features.1.0.block.1.fc1.weight": ((8, 32, 1, 1), None),
        "features.1.0.block.1.fc2.weight": ((96, 4, 1, 1), "too few to gain from: 4 input channels"),
    },
    "g2p": {
        "fc.weight": ((74, 256), "the output layer"),
        "encoder.embedding.weight": ((29, 256), "an embedding"),
        "encoder.gru.weight_ih_l0": ((768, 256), "a recurrent layer"),
        "encoder.gru.weight_hh_l0": ((768, 256), "a recurrent layer"),
        "decoder.embedding.weight": ((74, 256), "an embedding"),
        "decoder.gru.weight_ih_l0": ((768, 256), "a recurrent layer"),
        "decoder.gru.weight_hh_l0_reverse": ((768, 256), "a recurrent layer"),
    },
    "unet": {
        "inc.double_conv.0.weight": ((64, 3, 3, 3), "the first layer"),
        "down1.conv.weight": ((128, 64, 3, 3), None),
        "up1.up.weight": ((1024, 512, 2, 2), None),
        "up1.conv.double_conv.0.weight": ((512, 1024, 3, 3), None),
        "outc.conv.weight": ((21, 64, 1, 1), "the output layer"),
    },
}


@pytest.mark.parametrize("model", MODELS)
def test_rules_on_published_names(model: str) -> None:
    expected = MODELS[model]
    found = reasons(plan({name: shape for name, (shape, _) in expected.items()}))
    for name, (_, why) in expected.items():
        if why is None:
            assert found[name] is None, (name, found[name])
        else:
            assert (found[name] or "pruned").startswith(why), (name, found[name])


@pytest.mark.parametrize("model", MODELS)
def test_rules_in_alphabetical_order(model: str) -> None:
    """As safetensors list them, the output layer need not be the last."""
    expected = dict(sorted(MODELS[model].items()))
    found = reasons(plan({name: shape for name, (shape, _) in expected.items()}))
    assert {name for name, why in found.items() if why is None} == {name for name, (_, why) in expected.items() if why is None}


def test_with_known_kinds_the_output_layer_is_found_by_name_too() -> None:
    infos = [replace(info, kind="linear") for info in tensors({"a.weight": (8, 8), "fc.weight": (8, 8)})]
    assert reasons(make_plan(infos, Pattern(2, 4)))["fc.weight"] == "the output layer; --include prunes it"


def test_shards_do_not_hide_the_output_layer() -> None:
    """Their tensors come shard after shard: neither in the model's order nor in that of the alphabet."""
    names = ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    found = reasons(plan(dict.fromkeys(names, (64, 64))))
    assert [name for name, why in found.items() if why] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "is of quantised weights: prune the checkpoint that was quantised"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "is of quantised weights"),
        ("model.layers.0.mlp.up_proj.SCB", "is of quantised weights"),
        ("base_model.model.layers.0.q_proj.lora_A.weight", "is of a LoRA adapter: merge it into its model first"),
        ("model.layers.0.q_proj.lora_B.default.weight", "is of a LoRA adapter"),
    ],
)
def test_what_is_no_checkpoint_to_prune(name: str, says: str) -> None:
    told = unready(["model.layers.0.mlp.up_proj.weight", name])
    assert told is not None
    assert told.startswith(f"'{name}' {says}")


def test_a_checkpoint_of_plain_weights_is_ready() -> None:
    assert unready(name for shapes in MODELS.values() for name in shapes) is None


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_rules_see_through_prefixes(prefix: str) -> None:
    expected = MODELS["torchvision resnet50"]
    found = reasons(plan({prefix + name: shape for name, (shape, _) in expected.items()}))
    assert {name for name, why in found.items() if why is None} == {
        prefix + name for name, (_, why) in expected.items() if why is None
    }


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("transformer.h.0.attn.c_attn.weight", (768, 2304), "matmul"),
        ("layers.0.wq.weight", (64, 64), "linear"),
        ("layer1.0.conv1.weight", (64, 64, 3, 3), "conv"),
        ("decoder.upconv1.weight", (64, 32, 2, 2), "conv_transpose"),
        ("up1.up.weight", (64, 32, 2, 2), "conv_transpose"),
        ("upper.conv.weight", (64, 32, 2, 2), "conv"),
        ("up1.conv.double_conv.0.weight", (64, 64, 3, 3), "conv"),
        ("up_blocks.0.resnets.1.conv1.weight", (64, 64, 3, 3), "conv"),
        ("up_blocks.1.attentions.0.proj_in.weight", (64, 64, 1, 1), "conv"),
        ("upsamplers.0.conv.weight", (64, 64, 3, 3), "conv"),
        ("upconv1.weight", (64, 64, 3, 3), "conv"),  # on an image that was enlarged
        ("deconv_layers.0.weight", (256, 256, 4, 4), "conv_transpose"),
    ],
)
def test_assumed_kinds(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    row = plan({name: shape}).rows[0]
    assert (row.info.kind, row.assumed, row.axis, row.pattern) == (kind, True, "channel", Pattern(2, 4))


def test_known_kinds_are_not_assumed_and_their_names_not_read() -> None:
    infos = [TensorInfo("embed.up.weight", (8, 16, 3), "float32", kind="conv"), TensorInfo("bn", (8, 8), "float32")]
    rows = make_plan(infos, Pattern(2, 4)).rows
    assert (rows[0].pattern, rows[0].assumed) == (Pattern(2, 4), False)
    assert rows[1].reason == "a norm, by its name"


BODY: Shapes = {
    "stem.weight": (16, 3, 3, 3),
    "a.weight": (16, 16, 3, 3),
    "b.weight": (16, 16, 3, 3),
    "dw.weight": (16, 1, 3, 3),
    "embed.weight": (100, 16),
    "c.weight": (32, 16),
    "fc.weight": (10, 32),
}


def test_layer_patterns_the_last_that_matches_wins() -> None:
    layers = [("*.weight", Pattern(1, 4)), ("a.*", Pattern(4, 8)), ("b.*", None), ("c.*", None), ("c.weight", Pattern(1, 2))]
    layers.append(("fc.weight", Pattern(1, 4)))
    made = {row.name: row for row in plan(BODY, layers=layers).rows}
    assert made["a.weight"].pattern == Pattern(4, 8)
    assert (made["b.weight"].pattern, made["b.weight"].reason) == (None, "dense, by --layer 'b.*'")
    assert made["c.weight"].pattern == Pattern(1, 2)
    assert made["fc.weight"].pattern == Pattern(1, 4)  # asked for by its name, the rules do not hold
    assert made["embed.weight"].reason == "an embedding, by its name"  # a pattern for many is not a wish to prune all


def test_include_overrides_the_rules_and_leaves_out_the_rest() -> None:
    found = reasons(plan(BODY, include=["fc.*", "embed*", "c.*", "stem*"]))
    assert found["fc.weight"] is found["embed.weight"] is found["c.weight"] is found["stem.weight"] is None
    assert found["a.weight"] == "not included"
    assert reasons(plan(BODY, include=["dw.weight"], axis="kernel"))["dw.weight"] is None


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"axis": "chanel"}, "axis 'chanel' is none of channel, kernel"),
        ({"target": "trt"}, "target 'trt' is none of generic, ort, tensorrt, cusparselt"),
    ],
)
def test_a_word_that_is_no_choice_is_named(option: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan({"a.weight": (8, 8)}, **option)


def test_exclude() -> None:
    found = reasons(plan(BODY, exclude=["a.*", "c.*"]))
    assert found["a.weight"] == "excluded by 'a.*'"
    assert found["b.weight"] is None
    assert reasons(plan(BODY, include=["*"], exclude=["a.*"]))["a.weight"] == "excluded by 'a.*'"


@pytest.mark.parametrize("option", [{"include": ["x.*"]}, {"exclude": ["x.*"]}, {"layers": [("x.*", None)]}])
def test_globs_that_match_nothing(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"'x\.\*' matches no tensor of the checkpoint; `nmconvert inspect` lists their names"):
        plan(BODY, **option)


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (TensorInfo("w", (4, 4), "int8"), "int8: only fp32, fp16, bf16 and fp64 weights are pruned"),
        (TensorInfo("w", (4, 4), "complex64"), "complex64: only fp32, fp16, bf16 and fp64 weights are pruned"),
        (TensorInfo("w", (0, 4), "float32"), "empty"),
        (TensorInfo("w", (4,) * 6, "float32"), "6 dimensions: neither a convolution nor a linear layer"),
        (TensorInfo("w", (4, 4), "float32", reason="tied"), "tied"),
        (TensorInfo("w", (8, 3), "float32"), "3 weights per output, fewer than a group of 4"),
        (TensorInfo("w", (8, 2), "float32"), "2 weights per output, fewer than a group of 4"),
        (TensorInfo("w", (8, 1), "float32"), "a vector"),
    ],
)
def test_what_cannot_be_pruned_says_why(info: TensorInfo, reason: str) -> None:
    assert make_plan([info], Pattern(2, 4)).rows[0].reason == reason


def test_groups_of_channels_that_are_not_there() -> None:
    assert reasons(plan({"a.weight": (16, 8, 3, 3)}, "1:16")) == {"a.weight": "8 input channels, fewer than a group of 16"}
    assert reasons(plan({"a.weight": (16, 8, 3, 3)}, "1:16", axis="kernel")) == {"a.weight": None}
    assert reasons(plan({"a.weight": (16, 8, 3, 3)}, "1:16", include=["a*"])) == {"a.weight": None}
    assert reasons(plan({"a.weight": (16, 16)}, "4:4")) == {"a.weight": "4:4 is dense"}


def test_few_channels_of_a_group_are_no_first_layer() -> None:
    grouped = TensorInfo("w", (128, 4, 3, 3), "float32", kind="conv", groups=32)
    depthwise = replace(grouped, shape=(64, 1, 3, 3))
    for info, reason in (
        (grouped, None),
        (replace(grouped, groups=1), "the first layer: 4 input channels"),
        (replace(grouped, shape=(64, 2, 3, 3)), "2 input channels, fewer than a group of 4"),
        (depthwise, "depthwise, or a first layer: one input channel"),
    ):
        assert make_plan([info], Pattern(2, 4)).rows[0].reason == reason


def test_tied_weights_are_pruned_once() -> None:
    infos = tensors({"a.weight": (8, 8), "b.weight": (8, 8), "embed.weight": (9, 8), "head.weight": (9, 8)})
    infos[1] = replace(infos[1], shared_with="a.weight")
    infos[3] = replace(infos[3], shared_with="embed.weight")
    assert reasons(make_plan(infos, Pattern(2, 4))) == {
        "a.weight": None,
        "b.weight": "shares its storage with a.weight, pruned there",
        "embed.weight": "an embedding, by its name",
        "head.weight": "shares its storage with embed.weight",
    }


CONV = TensorInfo("conv", (16, 16, 3, 3), "float32", kind="conv")
LINEAR = TensorInfo("linear", (32, 32), "float16", kind="linear")


@pytest.mark.parametrize(
    ("target", "info", "pattern", "axis", "reason"),
    [
        ("generic", CONV, "1:7", "kernel", None),
        ("tensorrt", CONV, "2:4", "channel", None),
        ("tensorrt", CONV, "1:4", "channel", "tensorrt: only 2:4, not 1:4"),
        ("tensorrt", CONV, "2:4", "kernel", "tensorrt: only groups along the channel axis"),
        ("tensorrt", replace(CONV, shape=(16, 16, 1, 1)), "2:4", "kernel", None),
        ("tensorrt", replace(CONV, shape=(16, 18, 3, 3)), "2:4", "channel", "tensorrt: 18 input channels, not a multiple of 4"),
        ("tensorrt", replace(CONV, groups=2), "2:4", "channel", "tensorrt: no sparse grouped convolutions"),
        ("tensorrt", replace(CONV, kind="conv_transpose"), "2:4", "channel", "tensorrt: no sparse transposed convolutions"),
        ("tensorrt", replace(LINEAR, shape=(32, 30)), "2:4", "channel", "tensorrt: 30 input channels, not a multiple of 4"),
        ("cusparselt", LINEAR, "2:4", "channel", None),
        ("cusparselt", LINEAR, "4:8", "channel", "cusparselt: only 2:4, not 4:8"),
        ("cusparselt", CONV, "2:4", "channel", "cusparselt: only linear layers"),
        ("cusparselt", replace(LINEAR, dtype="float64"), "2:4", "channel", "cusparselt: no float64"),
        ("cusparselt", replace(LINEAR, shape=(32, 40)), "2:4", "channel", "cusparselt: 32×40 is no multiple of 16"),
        ("ort", CONV, "1:4", "kernel", None),
        ("ort", replace(CONV, dtype="float64"), "2:4", "channel", "ort: float64 has no kernel"),
        ("ort", replace(CONV, kind="conv_transpose"), "2:4", "channel", "ort: transposed convolutions have no kernel"),
        ("ort", replace(CONV, shape=(16, 16, 3, 3, 3)), "2:4", "channel", "ort: 3-D convolutions have no kernel"),
    ],
)
def test_targets(target: str, info: TensorInfo, pattern: str, axis: Any, reason: str | None) -> None:
    row = make_plan([info], Pattern.parse(pattern), axis, include=["*"], target=target).rows[0]
    assert row.reason == reason
    generic = make_plan([info], Pattern.parse(pattern), axis, include=["*"]).rows[0]
    assert (target in usable_by(generic)) == (reason is None and target != "generic")


def test_targets_of_the_command_line() -> None:
    from nmconvert.cli.prune import command

    (option,) = [parameter for parameter in command.params if parameter.name == "target"]
    assert set(option.type.to_info_dict()["choices"]) == set(TARGETS)


@pytest.mark.parametrize("name", ["decoder.block.0.conv_t1.weight", "upsampler.0.weight", "up1.weight", "net.conv_t.weight"])
def test_names_of_transposed_convolutions(name: str) -> None:
    assert guess_kind(name, (64, 32, 4)) == "conv_transpose"
    assert guess_kind("encoder.conv_to_x.weight", (64, 32, 4)) == "conv"
