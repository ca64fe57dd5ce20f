"""Layer inputs, the replay and the sequential driver on small models, against what torch itself computes."""

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from permutable import Routed
from torch import nn

from nmconvert.calibrate.answers import all_trainable, answer_of, heads
from nmconvert.calibrate.correct import held_out_error, keep_if_better, output_error, reconstruct, reestimate_norms
from nmconvert.calibrate.driver import Recipe, prune_model
from nmconvert.calibrate.images import augment, is_images, scenes
from nmconvert.calibrate.moments import Moments, find_followers, find_sites, inputs_seen
from nmconvert.calibrate.replay import Call, Replay, as_call, find_units, outputs_of, trace
from nmconvert.calibrate.resume import fingerprint, read, write
from nmconvert.calibrate.store import Store
from nmconvert.calibrate.unfold import columns
from nmconvert.detect import satisfies
from nmconvert.errors import DataError, ModelError, WeightError
from nmconvert.masks import nm_mask
from nmconvert.matrix import MatrixView
from nmconvert.norms import estimated_anew, norms
from nmconvert.pattern import Pattern

NM = Pattern(2, 4)
PLAIN = Recipe(criterion="sparsegpt", against_dense=False, correct_means=False, reestimate=False, block_steps=0, model_steps=0)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def small_net(seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


def plan_for(model, pattern=NM, axis="channel"):
    return {n: (pattern, axis) for n, p in model.named_parameters() if p.dim() == 4 and "stem" not in n}


# ── unfolding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def convolution(draw, transposed=False):
    rank = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": False, "dtype": torch.float64}
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    if transposed:
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[rank - 1]
        return kind(*channels, kernel, padding=padding, output_padding=extra, **options)
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(rank))
    if padding == "same":
        options["stride"] = 1
    return (nn.Conv1d, nn.Conv2d)[rank - 1](*channels, kernel, padding=padding, padding_mode=mode, **options)


@settings(max_examples=60)
@given(data=st.data(), transposed=st.booleans(), axis=st.sampled_from(["channel", "kernel"]))
def test_a_convolution_is_its_matrix_times_the_unfolded_inputs(data, transposed, axis):
    layer = convolution(data.draw, transposed)
    rank = len(layer.kernel_size)
    x = torch.randn(2, layer.in_channels, *[data.draw(st.integers(7, 9)) for _ in range(rank)], dtype=torch.float64)
    expected = layer(x)
    view = MatrixView.of("conv_transpose" if transposed else "conv", layer.weight.shape, axis, layer.groups)
    rows = view.to_matrix(layer.weight).chunk(layer.groups)
    blocks = columns(layer, "weight", (x,), {}, axis)
    assert len(blocks) == layer.groups
    found = torch.cat([block @ row.T for block, row in zip(blocks, rows, strict=True)], 1)
    torch.testing.assert_close(found, expected.movedim(1, -1).reshape(-1, layer.out_channels))


def test_a_limit_takes_the_same_tokens_of_two_inputs():
    layer = nn.Conv2d(4, 4, 3)
    x = torch.randn(3, 4, 9, 9)
    (whole,) = columns(layer, "weight", (x,), {}, "channel")
    (some,) = columns(layer, "weight", (x,), {}, "channel", 20)
    (twice,) = columns(layer, "weight", (2 * x,), {}, "channel", 20)
    assert some.shape == (20, 36)
    assert torch.equal(2 * some, twice)
    assert all((whole == token).all(1).any() for token in some)


def test_a_limit_holds_for_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    q, kv = torch.randn(2, 30, 8), torch.randn(2, 5, 8)
    for parameter, counts in (("in_proj_weight", [20, 10, 10]), ("out_proj.weight", [20])):
        assert [len(x) for x in columns(attention, parameter, (q, kv, kv), {}, "channel", 20)] == counts


def test_attention_reads_queries_keys_and_values_and_its_heads_outputs():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    q, kv = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    found = columns(attention, "in_proj_weight", (q, kv, kv), {}, "channel")
    assert [tuple(x.shape) for x in found] == [(6, 8), (10, 8), (10, 8)]
    (same,) = columns(attention, "in_proj_weight", (q, q, q), {}, "channel")
    assert torch.equal(same, q.reshape(-1, 8))
    (heads,) = columns(attention, "out_proj.weight", (q, kv, kv), {}, "channel")
    projection = attention.out_proj
    expected = attention(q, kv, kv)[0].reshape(-1, 8)
    torch.testing.assert_close(heads @ projection.weight.T + projection.bias, expected)


def test_a_layer_that_is_not_understood_is_named():
    with pytest.raises(ModelError, match="LSTM cannot be calibrated: exclude 'weight_ih_l0'"):
        columns(nn.LSTM(2, 2), "weight_ih_l0", (torch.zeros(1, 1, 2),), {}, "channel")


@given(cuts=st.lists(st.integers(1, 39), max_size=3), seed=st.integers(0, 20))
@settings(max_examples=20)
def test_moments_do_not_depend_on_the_parts(cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    x, dense = torch.randn(2, 40, 6, generator=generator) + 1
    moments = Moments()
    for part, other in zip(x.tensor_split(sorted(cuts)), dense.tensor_split(sorted(cuts)), strict=True):
        if len(part):
            moments.add(part, other)
    hessian, cross = moments.centred()
    both = torch.cat([x, dense], 1).double()
    covariance = torch.cov(both.T, correction=0)
    torch.testing.assert_close(hessian, covariance[:6, :6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross, covariance[6:, :6], rtol=1e-4, atol=1e-5)


# ── units and replay ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_units_and_single_layers_their_own():
    model = small_net()
    names = ["stem", "body.0.conv1", "body.0.conv2", "body.1.conv1", "head"]
    assert find_units(model, names) == ["stem", "body.0", "body.1", "head"]
    assert find_units(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"]) == ["0", "2"]
    assert find_units(nn.Linear(2, 2), [""]) == [""]


def test_a_replay_gives_each_unit_what_the_changed_model_gives_it():
    model, batches = small_net(), images(2)
    replay = Replay(model, batches, {"body.0": 1, "body.1": 1, "head": 1})
    with torch.no_grad():
        model.body[0].conv1.weight.mul_(0.5)
        expected = model.body[0](model.stem(batches[1]))
    first = replay.calls("body.0")
    replay.answer("body.0", outputs_of(model.body[0], first))
    torch.testing.assert_close(replay.calls("body.1")[1][0].args[0], expected)
    assert "forward" not in model.body[0].__dict__


def test_a_unit_that_is_used_twice_is_replayed_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.shared(torch.relu(self.shared(x))))

    model, batch = Twice().eval(), torch.randn(4, 3)
    assert [name for name, _ in trace(model, batch, ["shared", "head"])] == ["shared", "shared", "head"]
    replay = Replay(model, [batch], {"shared": 2, "head": 1})
    calls = replay.calls("shared")
    assert len(calls[0]) == 2
    replay.answer("shared", outputs_of(model.shared, calls))
    torch.testing.assert_close(replay.calls("head")[0][0].args[0], model.shared(torch.relu(model.shared(batch))))


def test_layer_inputs_are_seen_with_what_is_pruned_before_them():
    model, batch = small_net(), images(1)[0]
    sites = find_sites(model, {"body.0.conv2.weight": (NM, "channel")})
    block = model.body[0]
    x = model.stem(batch)
    seen = inputs_seen(model, block, sites, [Call((x,), {})], 1 << 20)["body.0.conv2.weight"]
    inner = F.relu(block.bn1(block.conv1(x)))
    torch.testing.assert_close(seen[0][0], columns(block.conv2, "weight", (inner,), {}, "channel")[0])


def test_the_norm_after_a_convolution_is_found():
    model = small_net()
    names = ["stem", "body.0.conv1", "body.1.conv2"]
    assert find_followers(model, images(1)[0], names) == {"body.0.conv1": "body.0.bn1", "body.1.conv2": "body.1.bn2"}


def test_a_norm_after_an_activation_in_place_is_none_of_the_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    assert find_followers(model.eval(), images(1)[0], ["0", "3"]) == {"3": "4"}


def test_norms_and_parameters_are_left_as_they_were_where_a_run_fails():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    model[0].weight.requires_grad_(False)
    for within in (estimated_anew(norms(model)), all_trainable(model)):
        with pytest.raises(RuntimeError, match="no such thing"), within:
            raise RuntimeError("no such thing")
    assert model[1].momentum == 0.1
    assert model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


# ── the driver ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("axis", ["channel", "kernel"])
@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt", "auto"])
def test_the_result_holds_the_pattern_and_nothing_else_moved(criterion, axis):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    plan = plan_for(model, Pattern(1, 4), axis)
    result = prune_model(model, images(), plan, Recipe(criterion=criterion, block_steps=0, model_steps=0))
    for name in plan:
        matrix = MatrixView.of("conv", before[name].shape, axis).to_matrix(result.state[name])
        assert ((matrix.reshape(len(matrix), -1, 4) != 0).sum(2) <= 1).all()
    assert {report.name for report in result.layers} == set(plan)
    assert not {name for name in result.state if name.startswith(("stem", "head"))}
    fresh = small_net()
    fresh.load_state_dict({**before, **result.state})
    assert torch.equal(fresh(images()[0]), model(images()[0]))


def test_each_ingredient_lowers_the_error_on_inputs_never_seen():
    held_out = images(4, seed=99)
    dense = small_net()
    calls = [[as_call(batch)] for batch in held_out]
    targets = outputs_of(dense, calls)
    errors = []
    for recipe in (
        Recipe(criterion="magnitude", correct_means=False, reestimate=False, block_steps=0, model_steps=0),
        PLAIN,
        Recipe(block_steps=0, model_steps=0, copies=1),
        Recipe(block_steps=0, model_steps=60, copies=1),
    ):
        model = small_net()
        prune_model(model, images(16), plan_for(model), recipe)
        errors.append(held_out_error(model, calls, targets))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[1]


def test_biases_and_running_means_take_up_the_mean_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    dense = copy.deepcopy(model)
    batches = [torch.randn(50, 8) + 3 for _ in range(4)]
    prune_model(model, batches, {"0.weight": (NM, "channel")}, Recipe(block_steps=0, model_steps=0))
    seen = torch.cat(batches[:-1])
    torch.testing.assert_close(model(seen).mean(0), dense(seen).mean(0), rtol=1e-4, atol=1e-5)


@given(limit=st.integers(0, 900), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
@settings(max_examples=20)
def test_a_store_keeps_the_values_and_holds_its_limit(limit, dtype):
    store = Store(limit)
    tensors = [torch.arange(n * 8).reshape(8, n).T.to(dtype) for n in range(8)]
    kept = [store.keep((tensor, {"array": tensor.float().numpy(), "text": "x"})) for tensor in tensors]
    for (copied, rest), tensor in zip(kept, tensors, strict=True):
        assert torch.equal(copied, tensor)
        assert (rest["array"] == tensor.float().numpy()).all()
        assert rest["text"] == "x"
    assert store.held <= limit
    assert store.held + store.spilled == sum(t.numel() * (t.element_size() + 4) for t in tensors)
    assert not torch.equal(kept[3][0].add_(1), tensors[3])  # ordinary tensors, and copies
    del kept, copied, rest
    gc.collect()
    assert store.held == 0


def test_what_is_on_disk_is_in_few_files_that_go_when_nothing_refers_to_them(monkeypatch):
    monkeypatch.setattr("nmconvert.calibrate.store._FILE", 1000)
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    store = Store(0)
    kept = store.keep([torch.full((n,), n) for n in (*[1] * 100, 300)])
    assert len(list(files.iterdir())) - before <= 8  # 16 in each, as every one begins at a multiple of 64 bytes
    assert all((tensor == len(tensor)).all() for tensor in kept)
    del kept, store
    gc.collect()
    assert len(list(files.iterdir())) == before


def test_activations_beyond_the_limit_are_on_disk_and_change_nothing(monkeypatch):
    stores = []
    monkeypatch.setattr("nmconvert.calibrate.driver.Store", lambda limit: stores.append(Store(limit)) or stores[-1])
    models = []
    for limit in (1 << 30, 20_000):
        models.append(small_net())
        prune_model(models[-1], images(), plan_for(models[-1]), Recipe(block_steps=3, model_steps=0, memory=limit))
    assert stores[0].spilled == 0 < stores[1].spilled
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes():
    states = []
    for _ in range(2):
        model = small_net()
        prune_model(model, images(), plan_for(model), Recipe(block_steps=3, model_steps=3, copies=2, seed=5))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    recipe = Recipe(block_steps=4, model_steps=3, copies=2)
    straight, batches = small_net(), images()
    expected = prune_model(straight, batches, plan_for(straight), recipe)
    file, lines = tmp_path / "out.calibration", []

    def interrupt(line):
        lines.append(line)
        if "body.1.conv1" in line:
            raise KeyboardInterrupt

    model = small_net()
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, batches, plan_for(model), recipe, interrupt, file)
    model, told = small_net(), []
    result = prune_model(model, batches, plan_for(model), recipe, told.append, file)
    assert not any("body.0.conv" in line for line in told)
    assert result.layers == expected.layers
    assert result.corrections == expected.corrections
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in straight.state_dict().items())


def test_what_another_run_left_is_not_taken(tmp_path):
    file, batches = tmp_path / "out.calibration", images()
    file.write_bytes(b"damaged")
    model = small_net()
    first = prune_model(model, batches, plan_for(model), Recipe(block_steps=0, model_steps=0), resume=file)
    key = fingerprint(model.state_dict(), batches, 1)
    write(file, key, {"units": ["body.0"]})
    assert read(file, key)["units"] == ["body.0"]
    assert read(file, fingerprint(model.state_dict(), batches[1:], 1)) == {}
    model = small_net()
    again = prune_model(model, batches, plan_for(model), Recipe(block_steps=0, model_steps=0), resume=file)
    assert again.layers == first.layers


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, scale):
        return self.layers(x) * scale


def test_a_transformer_with_packed_attention_and_keyword_inputs():
    torch.manual_seed(0)
    model = Encoder().eval()
    batches = [{"x": torch.randn(4, 5, 8), "scale": 2.0} for _ in range(4)]
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    before = copy.deepcopy(model)
    result = prune_model(model, batches, dict.fromkeys(names, (NM, "channel")), Recipe(block_steps=5, model_steps=0))
    assert [layer.name.split("layers.0.")[-1] for layer in result.layers[:4]] == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    ]  # fmt: skip
    for name in names:
        assert ((model.get_parameter(name).reshape(-1, 4) != 0).sum(1) <= 2).all()
    calls = [[as_call(batch)] for batch in batches]
    assert held_out_error(model, calls, outputs_of(before, calls)) < 0.2


def test_what_cannot_be_calibrated_is_said():
    model = small_net()
    with pytest.raises(DataError, match="at least 2 batches"):
        prune_model(model, images(1), plan_for(model))
    with pytest.raises(ModelError, match=r"'body\.0\.bn1\.weight' is no weight"):
        prune_model(model, images(2), {"body.0.bn1.weight": (NM, "channel")})
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="'unused' was not used by the first batch"):
        prune_model(model, images(2), {"unused.weight": (NM, "channel")})


def test_experts_whose_tokens_are_routed_otherwise_are_solved_on_their_own():
    torch.manual_seed(0)
    model, batches = Routed().eval(), [torch.randn(64, 16) for _ in range(4)]
    dense, held = copy.deepcopy(model), torch.randn(256, 16)
    plan = dict.fromkeys(("first.weight", "experts.0.0.weight", "experts.1.2.weight"), (NM, "channel"))
    magnitude = copy.deepcopy(model)
    for name in plan:
        weight = magnitude.get_parameter(name).data
        weight *= nm_mask(weight.abs(), NM)
    prune_model(model, batches, plan)
    with torch.no_grad():
        error, naive = (float((m(held) - dense(held)).square().mean()) for m in (model, magnitude))
    assert all(satisfies(model.get_parameter(name).detach().numpy(), NM) for name in plan)
    assert error < naive


# ── corrections ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_finite_is_named_with_the_sample_that_brings_it():
    def refused(model, batches):
        with pytest.raises(WeightError) as error:
            prune_model(model, batches, plan_for(model), PLAIN)
        return str(error.value)

    batches = images()
    batches[1][4, 0, 2, 2] = torch.nan
    first = "body.0.conv1.weight"
    inputs = f"{first}: its inputs hold NaN or infinite values"
    assert refused(small_net(), batches) == f"{inputs}, as sample 5 of calibration batch 2 does; repair it or leave it out"
    batches = images()
    batches[-1][2, 0, 0, 0] = torch.nan  # held out: no layer is solved on it, and it judges all corrections
    with pytest.raises(WeightError, match=rf"NaN for sample 3 of calibration batch {len(batches)}, which holds such values"):
        prune_model(small_net(), batches, plan_for(small_net()), Recipe(block_steps=0, model_steps=0))
    model = small_net()
    model.stem.weight.data[0] = 3e38
    assert refused(model, images()).startswith(f"{inputs}, which no calibration sample does; look for what makes them")
    model = small_net()
    model.body[0].conv1.weight.data[0] = torch.nan
    assert refused(model, images()).startswith(f"{first}: holds NaN or infinite weights; repair the checkpoint")


def test_norms_of_an_unpruned_model_stay_as_they_are():
    model, dense = small_net(), small_net()
    calls = [[as_call(batch)] for batch in images(3)]
    reestimate_norms(model, dense, calls, calls)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_norms_undo_a_scale_and_a_shift_before_them():
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        model[0].bias.mul_(0.5).add_(1.0)
    calls = [[as_call(batch)] for batch in images(3)]
    reestimate_norms(model, dense, calls, calls)
    torch.testing.assert_close(model(images()[0]), dense(images()[0]), rtol=1e-4, atol=1e-4)


def test_reconstruction_keeps_masks_and_reaches_the_dense_block():
    torch.manual_seed(0)
    dense, model = nn.Linear(8, 8), nn.Linear(8, 8)
    mask = torch.rand(8, 8) < 0.5
    with torch.no_grad():
        for layer in (dense, model):
            layer.weight.mul_(mask)
    batches = images(4)
    pairs = [(Call((b.reshape(-1, 8),), {}), dense(b.reshape(-1, 8)).detach()) for b in batches]
    before = held_out_error(model, [[pairs[0][0]]], [[pairs[0][1]]])

    def loss(pair):
        return output_error(model(*pair[0].args), pair[1])

    reconstruct(model, loss, lambda step: pairs[step % 4], {"weight": mask}, steps=300, rate=0.02)
    assert not model.weight[~mask].any()
    assert held_out_error(model, [[pairs[0][0]]], [[pairs[0][1]]]) < 1e-3 * before


def test_a_change_that_does_not_help_is_taken_back():
    model, dense = small_net(), small_net()
    calls = [[as_call(batch)] for batch in images(2)]
    targets = outputs_of(dense, calls)

    def spoil():
        with torch.no_grad():
            model.head.weight.mul_(3)

    before, after = keep_if_better(model, spoil, lambda: held_out_error(model, calls, targets))
    assert before == 0 < after
    assert torch.equal(model.head.weight, dense.head.weight)


def test_augmented_images_are_flipped_and_shifted_ones():
    batch = torch.arange(4 * 3 * 16 * 16, dtype=torch.float32).reshape(4, 3, 16, 16)
    changed = augment(batch, torch.Generator().manual_seed(0))
    assert changed.shape == batch.shape
    assert not torch.equal(changed, batch)
    for image, original in zip(changed, batch, strict=True):
        candidates = [F.pad(x, [2] * 4, mode="reflect") for x in (original, original.flip(2))]
        assert any(torch.equal(image, c[:, y : y + 16, x : x + 16]) for c in candidates for y in range(5) for x in range(5))


def test_images_in_a_list_may_differ_in_size():
    batch = ([torch.rand(3, 16, 24), torch.rand(3, 8, 8)],)
    assert is_images(batch)
    (changed,) = augment(batch, torch.Generator().manual_seed(0))
    assert [image.shape for image in changed] == [image.shape for image in batch[0]]
    assert not any(torch.equal(a, b) for a, b in zip(changed, batch[0], strict=True))
    assert not is_images((batch[0][0],))
    assert not is_images(([torch.zeros(2, 3)],))


def test_scenes_are_parts_of_the_images_and_other_every_time():
    coloured = [torch.full((3, 32, 48), float(value)) for value in (1, 2, 3)]
    batch, generator = torch.full((16, 3, 32, 48), 4.0), torch.Generator().manual_seed(0)
    changed = scenes(batch, coloured, generator)
    assert changed.shape == batch.shape
    assert {bool((image == image[0, 0, 0]).all()) for image in changed} == {True, False}  # of one image, and of several
    assert changed.min() > 0.999
    assert changed.max() < 4.001
    varied = torch.rand(4, 3, 32, 48, generator=generator)
    assert not torch.equal(scenes(varied, [*varied], generator), scenes(varied, [*varied], generator))
    one, other = (scenes(varied, [*varied], torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, other)


# ── models that choose ────────────────────────────────────────────────────────────────────────────────────────────────


class Points(Net):
    """As a detector: the best of its points, in the order of their scores."""

    def __init__(self):
        super().__init__()
        self.score, self.box = nn.Conv2d(8, 2, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))

    def maps(self, images):
        features = self.body(self.stem(torch.stack(images)))
        return self.score(features), self.box(features)

    def forward(self, images):
        heat, sides = self.maps(images)
        scores, places = heat.flatten(1).sigmoid_().topk(12)
        boxes = sides.flatten(2).mT.gather(1, (places % 64)[..., None].expand(-1, -1, 4))
        return [{"scores": s, "labels": p // 64, "boxes": b} for s, p, b in zip(scores, places, boxes, strict=True)]


def test_a_model_that_chooses_is_judged_by_what_it_chooses_from():
    torch.manual_seed(0)
    model, batch = Points().eval(), ([*images(1)[0]],)
    assert heads(model, batch) == {"score": 1, "box.2": 1}
    answer = answer_of(model, batch)
    for said, expected in zip(answer(*batch), model.maps(*batch), strict=True):
        torch.testing.assert_close(said, expected)
    assert not any(parameter.grad_fn or parameter.grad is not None for parameter in model.parameters())
    net = small_net()
    assert answer_of(net, images(1)[0]) is net


def test_a_model_that_chooses_keeps_its_points_apart():
    torch.manual_seed(0)
    dense = Points().eval()
    batches = [([*batch],) for batch in images(9)]
    plan = {n: (NM, "channel") for n, p in dense.named_parameters() if p.dim() == 4 and ("body" in n or "box" in n)}
    errors = []
    for steps in (0, 120):
        model = copy.deepcopy(dense)
        prune_model(model, batches[:8], plan, Recipe(block_steps=0, model_steps=steps, model_rate=3e-3))
        with torch.no_grad():
            said, expected = model.maps(*batches[8])[1], dense.maps(*batches[8])[1]
        errors.append(float((said - expected).square().mean() / (expected - expected.mean((0, 2, 3), True)).square().mean()))
    assert errors[1] < errors[0] < 0.5
