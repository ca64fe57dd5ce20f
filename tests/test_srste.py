"""SR-STE against the formula of the paper, and inside everything that a training loop may do to a model."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import nmconvert
from nmconvert import dist
from nmconvert.errors import ModelError, PatternError, UsageError
from nmconvert.masks import nm_mask
from nmconvert.matrix import MatrixView
from nmconvert.pattern import Pattern
from nmconvert.srste import DECAY, DECOUPLED_DECAY, plain_state_dict, sparsify

AXES = ["channel", "kernel"]
EVERYTHING = ["*"]
TWO_OF_FOUR = Pattern(2, 4)


class Conv1D(nn.Module):
    """Hugging Face's: weight [I, O]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.body = nn.Linear(16, 16)
        self.logits = nn.Linear(16, 10, bias=False)
        self.logits.weight = self.embedding.weight

    def forward(self, tokens):
        return self.logits(self.body(self.embedding(tokens)))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3), (2, 8, 5, 5)),
    "conv2d-grouped": (lambda: nn.Conv2d(16, 6, 3, groups=2), (2, 16, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 2), (2, 8, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 6, 3), (2, 8, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(16, 6, 3, groups=2), (2, 16, 5, 5)),
    "linear": (lambda: nn.Linear(18, 5), (3, 18)),
    "attention": (Attention, (2, 3, 16)),
    "hf-conv1d": (lambda: Conv1D(16, 5), (3, 16)),
}


def is_nm(weight, kind, groups, axis, pattern=TWO_OF_FOUR):
    matrix = MatrixView.of(kind, weight.shape, axis, groups).to_matrix(weight.detach())
    padded = F.pad((matrix != 0).int(), (0, -matrix.shape[1] % pattern.m))
    return bool((padded.reshape(len(matrix), -1, pattern.m).sum(-1) <= pattern.n).all())


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))


def train(model, optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(12, 16, generator=generator)
        target = torch.randint(4, (12,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:16", "3:5"])
def test_sgd_takes_exactly_the_step_of_the_paper(pattern, axis):
    torch.manual_seed(0)
    decay, lr = 0.03, 0.1
    conv = nn.Conv2d(32, 3, 3, dtype=torch.float64)
    sparse = sparsify(conv, pattern, axis=axis, include=EVERYTHING, decay=decay)
    optimizer = torch.optim.SGD(conv.parameters(), lr=lr)
    sparse.attach(optimizer)
    bias = conv.bias.detach().clone()
    weight = sparse.weights[0].dense.detach().clone()
    view = MatrixView.of("conv", weight.shape, axis)
    for step in range(4):
        x = torch.randn(2, 32, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mask = view.from_matrix(nm_mask(view.to_matrix(weight).abs(), Pattern.parse(pattern)))
        masked = (weight * mask).requires_grad_()
        grad, grad_bias = torch.autograd.grad(F.conv2d(x, masked, bias.requires_grad_()).square().mean(), (masked, bias))
        weight = weight - lr * (grad + decay * (1 - mask.double()) * weight)
        bias = (bias - lr * grad_bias).detach()

        optimizer.zero_grad()
        conv(x).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(sparse.weights[0].dense.detach(), weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("fused", [False, True])
def test_decay_is_the_same_under_loss_scaling(fused):
    results = []
    for scale in (1.0, 1024.0):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        sparse = sparsify(model, decay=0.1, include=EVERYTHING).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 16, generator=generator)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert sparse.steps == 3
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_decay_is_the_same_under_gradient_accumulation():
    results = []
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    for parts in (1, 4):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsify(model, decay=0.1, include=EVERYTHING).attach(optimizer)
        for part in x.chunk(parts):
            (model(part).square().mean() / parts).backward()
        optimizer.step()
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_decay_is_decoupled_for_all_but_sgd(optimizer_class):
    """The plain optimiser, given the same gradients, takes the same step from weights that were shrunk before it."""
    decay, lr = 2.0, 1e-2
    linear = nn.Linear(16, 8, bias=False)
    sparse = sparsify(linear, decay=decay, include=EVERYTHING)
    optimizer = optimizer_class(linear.parameters(), lr=lr)
    sparse.attach(optimizer)
    plain = nn.Parameter(sparse.weights[0].dense.detach().clone())
    reference = optimizer_class([plain], lr=lr)
    for step in range(4):
        optimizer.zero_grad()
        linear(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        plain.grad = sparse.weights[0].dense.grad.clone()
        with torch.no_grad():
            plain -= lr * decay * ~sparse.weights[0].mask.mask * plain
        optimizer.step()
        reference.step()
        torch.testing.assert_close(sparse.weights[0].dense.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_kind_ends_exactly_nm(layer, axis):
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    before = dict(model.named_parameters())
    sparse = nmconvert.sparsify(model, "2:4", axis=axis, include=EVERYTHING)
    masks = {w.name: (w.mask.kind, w.mask.groups) for w in sparse.weights}
    assert masks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    x = torch.randn(shape)
    expected = model(x)
    assert sparse.finalize() is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before), "the parameters are the same objects"
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    for name, (kind, groups) in masks.items():
        assert is_nm(after[name], kind, groups, axis), name
        assert not is_nm(after[name], kind, groups, axis, Pattern(1, 4)), name


def test_shared_weights_share_one_mask():
    torch.manual_seed(0)
    model = Tied()
    sparse = sparsify(model, include=EVERYTHING)
    assert len(sparse.weights) == 2
    tied = next(w for w in sparse.weights if len(w.owners) == 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    tokens = torch.arange(10)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
    assert torch.equal(model.embedding.weight, tied.dense * tied.mask.mask)
    sparse.finalize()
    assert model.logits.weight is model.embedding.weight
    assert is_nm(model.logits.weight, "linear", 1, "channel")


def test_first_last_and_small_layers_stay_dense_with_a_reason():
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 8, 3)
    model.body = nn.Conv2d(8, 8, 3)
    model.depthwise = nn.Conv2d(8, 8, 3, groups=8)
    model.fc = nn.Linear(8, 10)
    sparse = sparsify(model, "2:4")
    assert [w.name for w in sparse.weights] == ["body.weight"]
    reasons = {row.name: row.reason for row in sparse.plan.rows if row.pattern is None}
    assert {"stem.weight", "depthwise.weight", "fc.weight"} <= reasons.keys()
    assert all(reasons.values())


def test_state_dict_round_trip_goes_on_bit_for_bit():
    def fresh():
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparse = sparsify(model, decay=0.1, include=EVERYTHING)
        return model, optimizer, sparse.attach(optimizer, steps=6, freeze_masks=0.2)

    model, optimizer, sparse = fresh()
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save([owner.state_dict() for owner in (model, optimizer, sparse)], file)
    train(model, optimizer, 4, seed=2)
    assert sparse.frozen

    file.seek(0)
    others = fresh()
    for owner, state in zip(others, torch.load(file, weights_only=True), strict=True):
        owner.load_state_dict(state)
    train(others[0], others[1], 4, seed=2)
    assert others[2].frozen
    for name, value in model.state_dict().items():
        assert torch.equal(value, others[0].state_dict()[name]), name


def test_two_optimizers_share_the_work():
    model = mlp()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=50.0), torch.optim.AdamW([*model[2].parameters()], lr=0.05)]
    sparse = sparsify(model, decay=0.1, include=EVERYTHING)
    for optimizer in optimizers:
        sparse.attach(optimizer)
    before = [w.mask.mask.clone() for w in sparse.weights]
    for _ in range(5):
        model(torch.randn(8, 16)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    moved = [not torch.equal(w.mask.mask, mask) for w, mask in zip(sparse.weights, before, strict=True)]
    assert moved == [True, True, False], "the third belongs to neither"
    assert sparse.steps == 5


def test_statistics_survive_a_round_trip():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    sparse = sparsify(model, include=EVERYTHING).attach(optimizer)
    train(model, optimizer, 3)
    twin = sparsify(mlp(), include=EVERYTHING)
    twin.model.load_state_dict(model.state_dict())
    twin.load_state_dict(copy.deepcopy(sparse.state_dict()))
    statistics = twin.statistics()
    assert statistics.sad > 0
    assert statistics == sparse.statistics()


def test_plain_state_dict_is_what_finalize_leaves():
    torch.manual_seed(0)
    model = nn.Sequential(Tied(), nn.BatchNorm1d(10))
    names = list(model.state_dict())
    sparse = sparsify(model, include=EVERYTHING)
    plain = plain_state_dict(model)
    sparse.finalize()
    assert plain.keys() == set(names)
    for name, value in model.state_dict().items():
        assert torch.equal(plain[name], value), name


def test_deepcopy_is_independent():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsify(model, include=EVERYTHING).attach(optimizer)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 16)
    before = twin(x)
    assert torch.equal(model(x), before)
    train(model, optimizer)
    assert torch.equal(twin(x), before)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_fp32_masters_and_exact_masks(dtype):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = sparsify(model, include=EVERYTHING).attach(optimizer)
    with torch.autocast("cpu", dtype):
        output = model(torch.randn(4, 16))
        output.float().square().mean().backward()
    assert output.dtype == dtype
    optimizer.step()
    for weight in sparse.weights:
        assert weight.dense.dtype == torch.float32
        assert torch.equal(weight.mask.mask, nm_mask(weight.dense.detach().abs(), TWO_OF_FOUR))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_scaler_changes_no_weight(fused, optimizer_class):
    model = mlp()
    optimizer = optimizer_class(model.parameters(), lr=0.1, fused=fused)
    sparsify(model, decay=0.5, include=EVERYTHING).attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.full((2, 16), torch.inf)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_torch_compile_gives_the_same_training():
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparse = sparsify(model, decay=0.1, include=EVERYTHING).attach(optimizer, steps=4, freeze_masks=0.5)
        train(torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model, optimizer, 4)
        assert sparse.steps == 4
        results.append(flat(model))
    torch.testing.assert_close(*results)


def test_ste_has_no_decay():
    model = mlp()
    sparse = sparsify(model, method="ste", include=EVERYTHING)
    assert sparse.attach(torch.optim.SGD(model.parameters())).current_decay == 0


def test_a_fixed_mask_stays_and_pruned_weights_rest():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = sparsify(model, method="fixed-mask", include=EVERYTHING).attach(optimizer)
    masks = [w.mask.mask.clone() for w in sparse.weights]
    dense = [w.dense.detach().clone() for w in sparse.weights]
    train(model, optimizer)
    for weight, mask, before in zip(sparse.weights, masks, dense, strict=True):
        assert torch.equal(weight.mask.mask, mask)
        assert torch.equal(weight.dense[~mask], before[~mask])
        assert not torch.equal(weight.dense[mask], before[mask])
    assert sparse.statistics().flip_rate == 0


def test_masks_freeze_for_the_last_part():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    sparse = sparsify(model, decay=0.05, include=EVERYTHING).attach(optimizer, steps=10, freeze_masks=0.3)
    train(model, optimizer, 6)
    assert not sparse.frozen
    train(model, optimizer, 1)
    assert sparse.frozen
    assert sparse.statistics().sad > 0
    before = [w.dense.detach().clone() for w in sparse.weights]
    train(model, optimizer, 3, seed=5)
    assert sparse.statistics().sad == 0
    for weight, dense in zip(sparse.weights, before, strict=True):
        assert torch.equal(weight.dense[~weight.mask.mask], dense[~weight.mask.mask])


@pytest.mark.parametrize(
    ("anneal", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("rise", [0, 0.5 - 0.5**1.5, 0.5, 0.5 + 0.5**1.5, 1]),
        ("fall", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
    ],
)
def test_decay_is_annealed(anneal, expected):
    sparse = sparsify(mlp(), include=EVERYTHING)
    sparse.attach(torch.optim.SGD(sparse.model.parameters()), steps=4, anneal=anneal)
    seen = []
    for step in range(5):
        sparse.load_state_dict({**sparse.state_dict(), "steps": step})
        seen.append(sparse.current_decay / DECAY)
    assert seen == pytest.approx(expected)


def test_decay_makes_pruned_weights_fade():
    energy = {}
    for decay in (0.0, 1.0):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparse = sparsify(model, decay=decay, include=EVERYTHING).attach(optimizer)
        train(model, optimizer, 20)
        energy[decay] = sparse.statistics().pruned_energy
    assert 0 < energy[1.0] < energy[0.0] / 2


def test_statistics_count_flips_as_a_plain_loop_does():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    sparse = sparsify(model, include=EVERYTHING).attach(optimizer)
    first = previous = [w.mask.mask.clone() for w in sparse.weights]
    flips = 0
    for step in range(5):
        train(model, optimizer, 1, seed=step)
        now = [w.mask.mask.clone() for w in sparse.weights]
        flips += sum(int((a != b).sum()) for a, b in zip(now, previous, strict=True))
        previous = now
    statistics = sparse.statistics()
    pruned = sum(float((w.dense.detach() * ~w.mask.mask).double().square().sum()) for w in sparse.weights)
    whole = sum(float(w.dense.detach().double().square().sum()) for w in sparse.weights)
    assert flips > 0
    assert statistics.flip_rate == pytest.approx(flips / 5 / sum(m.numel() for m in first))
    assert statistics.sad == sum(int((a != b).sum()) for a, b in zip(previous, first, strict=True))
    assert statistics.pruned_energy == pytest.approx(pruned / whole)
    assert statistics.steps == 5
    assert sparse.statistics().steps == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(2, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_any_shape_and_pattern_ends_nm(rows, columns, n, extra, seed):
    torch.manual_seed(seed)
    pattern = Pattern(n, n + extra)
    model = nn.Sequential(nn.Linear(columns, rows))
    sparse = sparsify(model, pattern, include=EVERYTHING)
    if not sparse.weights:
        assert columns <= n
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse.attach(optimizer)
    model(torch.randn(3, columns)).square().sum().backward()
    optimizer.step()
    sparse.finalize()
    assert is_nm(model[0].weight, "linear", 1, "channel", pattern)


def test_a_model_that_cannot_be_finalized_stays_under_its_masks(monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = sparsify(model, include=EVERYTHING).attach(optimizer)
    names, last = list(model.state_dict()), sparse.weights[-1].dense
    assert len(sparse.weights) > 1
    monkeypatch.setattr(dist, "is_sharded", lambda tensor: tensor is last)
    with pytest.raises(ModelError, match="is sharded over ranks: gather the model before it is finalized"):
        sparse.finalize()
    monkeypatch.undo()
    assert list(model.state_dict()) == names
    train(model, optimizer, 2)
    assert sparse.steps == 2, "the optimiser's hooks are there, too"


def test_misuse_is_named():
    model = mlp()
    with pytest.raises(PatternError):
        sparsify(model, "two of four")
    with pytest.raises(UsageError, match="matches no"):
        sparsify(model, include=["nothing*"])
    with pytest.raises(UsageError, match="fixed-mask"):
        sparsify(model, method="asp")
    with pytest.raises(UsageError, match="-1"):
        sparsify(model, decay=-1.0)
    with pytest.raises(UsageError, match="axis 'chanel' is none of channel, kernel"):
        sparsify(model, axis="chanel")
    sparse = sparsify(model, include=EVERYTHING)
    with pytest.raises(ModelError, match="already"):
        sparsify(model, include=EVERYTHING)
    with pytest.raises(UsageError, match="another model"):
        sparse.attach(torch.optim.SGD(mlp().parameters()))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(UsageError, match="need steps"):
        sparse.attach(optimizer, freeze_masks=0.3)
    with pytest.raises(UsageError, match="'up' is none of"):
        sparse.attach(optimizer, steps=3, anneal="up")
    with pytest.raises(UsageError, match="a share"):
        sparse.attach(optimizer, steps=3, freeze_masks=30)
    sparse.attach(optimizer)
    with pytest.raises(UsageError, match="call backward first"):
        optimizer.step(lambda: 0.0)


def decayed(make_optimizer, step, steps=2, **attached):
    """By how much each step shrank the pruned weights of a model whose gradients are zero."""
    model = mlp().double()
    sparse = sparsify(model, decay=0.5, include=EVERYTHING)
    optimizer = make_optimizer(model.parameters())
    for _ in range(attached.pop("times", 1)):
        sparse.attach(optimizer, **attached)
    before = [weight.dense.detach().clone() for weight in sparse.weights]
    masks = [weight.mask.mask.clone() for weight in sparse.weights]
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step(optimizer)
    ratios = [(w.dense.detach() / old)[~mask] for w, old, mask in zip(sparse.weights, before, masks, strict=True)]
    return torch.cat(ratios)


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(
    ("kind", "step", "attached", "shrunk"),
    [
        (SGD, lambda optimizer: optimizer.step(None), {}, 1 - 0.1 * 0.5),  # as accelerate calls it
        (SGD, lambda optimizer: optimizer.step(), {"times": 2}, 1 - 0.1 * 0.5),  # attached twice, decayed once
        (SGD, lambda optimizer: optimizer.step(lambda: None), {"decoupled": True}, 1 - 0.1 * 0.5),
        (ADAMW, lambda optimizer: optimizer.step(lambda: None), {}, 1 - 0.1 * 0.5),
    ],
)
def test_the_decay_comes_once_however_a_step_is_called(kind, step, attached, shrunk):
    more = {} if kind is SGD else {"weight_decay": 0.0}
    ratios = decayed(lambda parameters: kind(parameters, lr=0.1, **more), step, **attached)
    torch.testing.assert_close(ratios, torch.full_like(ratios, shrunk**2))


def test_gradients_of_a_closure_come_after_the_decay():
    """`zero_grad` after the step: no weight has a gradient when the step begins."""
    model = mlp()
    optimizer = ADAMW(model.parameters(), lr=0.1, weight_decay=0.0)
    sparse = sparsify(model, decay=2.0, include=EVERYTHING).attach(optimizer)
    old = sparse.weights[0].dense.detach().clone()
    pruned = ~sparse.weights[0].mask.mask

    def closure():
        loss = 0 * model(torch.ones(2, 16)).sum()
        loss.backward()
        return loss

    optimizer.zero_grad()
    optimizer.step(closure)
    torch.testing.assert_close(sparse.weights[0].dense[pruned], 0.8 * old[pruned])


def test_an_optimizer_in_a_wrapper_is_the_one_inside():
    class Prepared(torch.optim.Optimizer):  # as accelerate's: it never calls Optimizer.__init__
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparse = sparsify(model, include=EVERYTHING).attach(Prepared(optimizer))
    train(model, optimizer)
    assert sparse.steps == 3


def test_the_usual_decay_is_that_of_the_optimizer():
    for kind, decay in ((SGD, DECAY), (ADAMW, DECOUPLED_DECAY)):
        model = mlp()
        assert sparsify(model).attach(kind(model.parameters())).current_decay == decay
        model = mlp()
        assert sparsify(model, decay=3.0).attach(kind(model.parameters())).current_decay == 3.0
    model = mlp()
    assert sparsify(model).attach(SGD(model.parameters()), decoupled=True).current_decay == DECAY
    model = mlp()
    assert sparsify(model).attach(torch.optim.Adadelta(model.parameters())).current_decay == DECAY  # its rate is 1


@pytest.mark.parametrize("tensor", [False, True])
def test_a_decay_takes_no_more_than_all(tensor):
    lr = torch.tensor(1.0) if tensor else 1.0
    model = mlp()
    sparse = sparsify(model, decay=5.0, include=EVERYTHING)
    optimizer = ADAMW([p for p in model.parameters() if p.dim() > 1], lr=lr, weight_decay=0.0, foreach=False)
    sparse.attach(optimizer)
    for weight in sparse.weights:
        weight.dense.grad = torch.zeros_like(weight.dense)
    pruned = [~weight.mask.mask for weight in sparse.weights]
    optimizer.step()
    assert all((weight.dense[mask] == 0).all() for weight, mask in zip(sparse.weights, pruned, strict=True))
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(UsageError, match="no learning rate"):
        sparse.attach(optimizer)


def test_a_second_phase_counts_its_own_steps():
    model = mlp()
    sparse = sparsify(model, include=EVERYTHING)
    first, second = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.01)
    sparse.attach(first)
    train(model, first, steps=5)
    sparse.attach(second, steps=10, freeze_masks=0.4)
    frozen = []
    for _ in range(10):
        frozen.append(sparse.frozen)
        train(model, second, steps=1)
    assert frozen == [False] * 6 + [True] * 4
    assert sparse.steps == 15
    sparse.attach(second, steps=4, freeze_masks=0.5)  # a third, of the same optimiser
    frozen = []
    for _ in range(4):
        frozen.append(sparse.frozen)
        train(model, second, steps=1)
    assert frozen == [False] * 2 + [True] * 2
    with pytest.raises(UsageError, match="steps 0 must be 1 or more"):
        sparse.attach(second, steps=0)


def test_masks_that_are_none_are_made_anew():
    """Another pattern's buffers, and averages of masks, are N:M of nothing."""
    other, model = mlp(), mlp()
    sparsify(other, "3:4", include=EVERYTHING)
    sparse = sparsify(model, "1:4", include=EVERYTHING)
    model.load_state_dict(other.state_dict())
    plain = plain_state_dict(model)
    assert torch.equal(sparse.finalize()[0].weight, plain["0.weight"])
    for layer in (model[0], model[2], model[4]):
        assert is_nm(layer.weight, "linear", 1, "channel", Pattern(1, 4))
        assert (layer.weight != 0).sum() == layer.weight.numel() // 4


def test_weights_that_are_computed_stay_dense_with_the_reason():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    nn.utils.weight_norm(model[4])
    sparse = sparsify(model, include=EVERYTHING)
    reasons = {row.name: row.reason for row in sparse.plan.rows}
    assert reasons["0.weight"] is None
    assert reasons["2.weight"] == "under WeightNorm: fold it in first, by torch.nn.utils.parametrize.remove_parametrizations"
    assert "make it a parameter first" in reasons["4.weight"]
    train(model, SGD(model.parameters(), lr=0.1))
    sparse.finalize()
    assert is_nm(model[0].weight, "linear", 1, "channel")


def test_what_cannot_be_masked_leaves_no_other_weight_masked():
    model = mlp()
    sparsify(model, include=["4.weight"])
    before = sorted(model.state_dict())
    with pytest.raises(ModelError, match=r"'4\.weight' is parametrized already"):
        sparsify(model, include=EVERYTHING)
    assert sorted(model.state_dict()) == before


def test_one_glob_and_a_dict_of_patterns_will_do():
    model = mlp()
    sparse = sparsify(model, "1:4", patterns={"2.*": "2:4"}, include="*", exclude="4.*")
    assert {row.name: str(row.pattern) for row in sparse.plan.pruned} == {"0.weight": "1:4", "2.weight": "2:4"}


def test_parameters_keep_their_order_so_that_an_optimiser_can_be_loaded() -> None:
    """Its state goes by their numbers."""
    for make in (lambda: nn.Linear(8, 8), lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4), lambda: nn.Conv2d(8, 8, 3)):
        model = nn.Sequential(make(), nn.ReLU(), nn.Linear(8, 8))
        before = [name for name, _ in model.named_parameters()]
        sparse = sparsify(model, "2:4", include=["*weight"])
        assert len(sparse.weights) >= 2
        sparse.finalize()
        assert [name for name, _ in model.named_parameters()] == before
