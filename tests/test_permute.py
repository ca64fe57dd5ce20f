"""The search for a channel order, and the proof that a permuted model computes what it did."""

import copy
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nmconvert.calibrate.axes import find_channels
from nmconvert.calibrate.permute import apply, kept_score, permute_model, search
from nmconvert.pattern import Pattern

NM = Pattern(2, 4)


@settings(max_examples=25)
@given(
    groups=st.integers(1, 6),
    rows=st.integers(1, 9),
    nm=st.sampled_from(["2:4", "1:4", "3:5", "2:8", "4:4"]),
    seed=st.integers(0, 99),
)
def test_an_order_keeps_at_least_as_much(groups, rows, nm, seed):
    pattern = Pattern.parse(nm)
    scores = torch.rand(rows, groups * pattern.m, generator=torch.Generator().manual_seed(seed)) ** 3
    order = search(scores, pattern)
    assert sorted(order.tolist()) == list(range(scores.shape[1]))
    assert kept_score(scores[:, order], pattern) >= kept_score(scores, pattern) * (1 - 1e-6)


def test_the_search_finds_the_best_order_of_two_groups():
    for seed in range(5):
        scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) ** 2
        pattern = Pattern(1, 3)
        best = max(float(kept_score(scores[:, list(p)], pattern)) for p in permutations(range(6)))
        assert float(kept_score(scores[:, search(scores, pattern)], pattern)) >= 0.97 * best


def test_strong_channels_are_spread_over_the_groups():
    scores = torch.full((16, 16), 0.1)
    scores[:, :8] = 1.0  # the first two groups hold all that counts
    assert kept_score(scores, NM) == pytest.approx(16 * (4 + 0.4))
    assert kept_score(scores[:, search(scores, NM)], NM) == pytest.approx(16 * 8, rel=1e-5)


class Residual(nn.Module):
    """A stem, residual blocks with norms, a depthwise convolution, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu6(self.bn1(self.conv1(x)))
        y = F.hardswish(self.bn2(self.depth(y)))
        return self.head((x + self.conv2(y)).mean((2, 3)))


class Padded(nn.Module):
    """A shortcut that pads channels, as in the CIFAR ResNets."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.conv2(self.conv1(x).relu())


class Attention(nn.Module):
    """Embedding, attention over heads, an MLP, norms over the residual stream, and a tied head that is not permuted."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.out = nn.Linear(width, 6)

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm1(x)
        a = F.scaled_dot_product_attention(self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h)))
        x = x + self.o(a.transpose(1, 2).reshape(*x.shape))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(1))


class Shuffled(nn.Module):
    """Two branches of half the channels, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.after, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        a, b = self.stem(x).relu().chunk(2, 1)
        return self.last(self.after(torch.cat([self.left(a), self.right(b)], 1)).relu())


def example(model):
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Attention):
        return torch.randint(0, 11, (2, 5), generator=generator)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


def built(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def plan_of(model):
    kinds = nn.Conv2d | nn.Linear
    return {f"{n}.weight": (NM, "channel") for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("kind", [Residual, Padded, Attention, Shuffled])
@pytest.mark.parametrize("seed", range(2))
def test_a_permuted_model_computes_the_same(kind, seed):
    model = built(kind, seed)
    before, batch = copy.deepcopy(model), example(model)
    reports = permute_model(model, batch, plan_of(model), seed=seed)
    assert {name for report in reports for name in report.names} == set(plan_of(model))
    assert any(report.after > report.before for report in reports)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed
    torch.testing.assert_close(model(batch), before(batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Residual, Padded, Attention, Shuffled])
def test_every_class_that_is_not_frozen_may_be_permuted_at_will(kind):
    model = built(kind)
    before, batch = copy.deepcopy(model), example(model)
    generator = torch.Generator().manual_seed(1)
    moved = 0
    for channels in find_channels(model, batch):
        if channels.frozen is None and channels.size > 1:
            blocks = range(0, channels.size, channels.block)
            order = torch.cat([low + torch.randperm(channels.block, generator=generator) for low in blocks])
            apply(model, channels, order)
            moved += 1
    assert moved
    torch.testing.assert_close(model(batch), before(batch), rtol=1e-10, atol=1e-12)


def reasons(kind):
    model = built(kind)
    return {name: r.reason for r in permute_model(model, example(model), plan_of(model)) for name in r.names}


def test_the_residual_stream_is_permuted_as_one():
    model = built(Residual)
    by_name = {r.names[0]: r for r in permute_model(model, example(model), plan_of(model))}
    assert by_name["conv1.weight"].names == ("conv1.weight", "head.weight")
    assert "no multiple of 4" in by_name["stem.weight"].reason or "input" in by_name["stem.weight"].reason


def test_what_needs_its_order_is_left_alone_and_says_why():
    assert "padding" in reasons(Padded)["conv1.weight"]
    assert reasons(Padded)["conv2.weight"] is None
    shuffled = reasons(Shuffled)
    assert "order" in shuffled["after.weight"]
    assert shuffled["last.weight"] is None


def test_attention_is_permuted_within_its_heads():
    model = built(Attention)
    classes = {member: c for c in find_channels(model, example(model)) for member in c.members}
    values = classes["o.weight", 1]
    assert (values.size, values.block, values.frozen) == (16, 8, None)
    assert set(values.members) == {("o.weight", 1), ("v.weight", 0), ("v.bias", 0)}
    stream = classes["up.weight", 1]
    assert {("embed.weight", 1), ("norm1.weight", 0), ("o.weight", 0), ("down.bias", 0), ("q.weight", 1)} <= set(stream.members)
    assert stream.frozen is None


def test_an_operator_that_is_not_known_freezes_what_it_touches():
    class Rolled(Residual):
        def forward(self, x):
            return self.conv2(torch.roll(self.conv1(self.stem(x)), 1, dims=1))

    model = built(Rolled)
    found = {r.names[0]: r.reason for r in permute_model(model, example(model), {"conv2.weight": (NM, "channel")})}
    assert found == {"conv2.weight": "its channels have to keep their order: roll"}
