"""The search for a channel order, and the proof that a permuted model computes what it did."""

import copy
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permutable import (
    MODELS,
    Attention,
    Causal,
    Flattened,
    Grouped,
    Masked,
    Padded,
    Pyramid,
    Relative,
    Residual,
    Rotary,
    Routed,
    SharedHeads,
    Shuffled,
    built,
    example,
)
from torch import nn

from nmconvert.calibrate.axes_torch import RULES, exported, find_channels
from nmconvert.calibrate.permute import _apart, _kept, apply, kept_score, orders_of, permute_model, search
from nmconvert.errors import ModelError
from nmconvert.pattern import Pattern

NM = Pattern(2, 4)


@pytest.mark.parametrize("nm", ["2:4", "1:4", "3:4", "4:8", "6:8", "3:5", "1:16"])
def test_what_groups_keep_is_what_topk_finds(nm):
    pattern = Pattern.parse(nm)
    groups = torch.rand(7, 5, pattern.m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(_kept(_apart(groups), pattern.n), groups.topk(pattern.n, dim=2).values.sum((0, 2)))


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


def plan_of(model):
    kinds = nn.Conv2d | nn.Linear
    return {f"{n}.weight": (NM, "channel") for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_a_permuted_model_computes_the_same(kind, seed):
    model = built(kind, seed)
    before, batch = copy.deepcopy(model), example(kind)
    reports = permute_model(model, batch, plan_of(model), seed=seed)
    assert {name for report in reports for name in report.names} == set(plan_of(model))
    assert any(report.after > report.before for report in reports)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed
    torch.testing.assert_close(model(batch), before(batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_every_class_that_is_not_frozen_may_be_permuted_at_will(kind):
    model = built(kind)
    before, batch = copy.deepcopy(model), example(kind)
    generator = torch.Generator().manual_seed(1)
    proof = find_channels(exported(model, batch))
    assert proof.channels
    apply(model, orders_of(proof, {n: torch.randperm(c.size, generator=generator) for n, c in enumerate(proof.channels)}))
    torch.testing.assert_close(model(batch), before(batch), rtol=1e-10, atol=1e-12)


def reports(kind):
    model = built(kind)
    found = permute_model(model, example(kind), plan_of(model))
    return {name: report for report in found for name in report.names}


def test_the_residual_stream_is_permuted_as_one():
    found = reports(Residual)
    assert found["conv1.weight"].names == ("conv1.weight", "head.weight")
    assert found["stem.weight"].reason == "its channels have to keep their order: the model's input"


def test_what_needs_its_order_is_left_alone_and_says_why():
    assert reports(Grouped)["twice.weight"].reason == "its channels have to keep their order: a group of one channel"
    alone = permute_model(built(Grouped), example(Grouped), {"up.weight": (NM, "channel")})
    assert [report.reason for report in alone] == ["a transposed convolution with groups"]
    found = reports(Flattened)
    assert found["first.weight"].reason == "its groups hold channels that move with one another"
    assert "'first.weight' reads them" in found["second.weight"].reason
    assert found["last.weight"].reason is None


def classes(kind):
    model = built(kind)
    proof = find_channels(exported(model, example(kind)))
    return {(m.name, m.dim, m.positions): c for c in proof.channels for m in c.members}, proof


def places(channels):
    return {(member.name, member.dim) for member in channels.members}


def test_attention_is_permuted_within_its_heads():
    found, _ = classes(Attention)
    for head in (range(8), range(8, 16)):
        values = found["o.weight", 1, tuple(head)]
        assert {(m.name, m.dim, m.positions) for m in values.members} == {
            ("o.weight", 1, tuple(head)), ("v.weight", 0, tuple(head)), ("v.bias", 0, tuple(head)),
        }  # fmt: skip
    stream = places(found["up.weight", 1, tuple(range(16))])
    assert {("embed.weight", 1), ("norm1.weight", 0), ("o.weight", 0), ("down.bias", 0), ("q.weight", 1)} <= stream


def test_tokens_that_are_channels_keep_their_order_under_a_causal_mask_and_move_with_a_mask_that_is_a_tensor():
    assert reports(Causal)["read.weight"].reason == "its channels have to keep their order: a causal mask"
    for kind, tables in ((Masked, ("mask",)), (Relative, ("distance",)), (Rotary, ("cos", "sin"))):
        found, _ = classes(kind)
        tokens = places(found["tokens.weight", 0, tuple(range(16))])
        assert {("read.weight", 1), *((table, 0) for table in tables)} <= tokens


def test_keys_and_values_move_with_all_heads_that_share_them():
    found, _ = classes(SharedHeads)
    values = found["kv.weight", 0, (8, 9, 10, 11)]  # the first of two heads of values, which two heads of queries read
    assert sorted((m.name, m.positions) for m in values.members if m.dim == 1) == [
        ("o.weight", (0, 1, 2, 3)),
        ("o.weight", (4, 5, 6, 7)),
    ]


def test_a_shuffle_and_a_padded_shortcut_are_followed():
    found = reports(Shuffled)
    units = [f"units.{n}.{name}.weight" for n in range(3) for name in ("first", "last")]
    assert all(found[name].after > found[name].before for name in units)
    _, proof = classes(Padded)
    assert sorted(c.size for c in proof.channels if ("last.weight", 1) in places(c)) == [4, 4, 8]
    assert found["stem.weight"].reason is not None


def test_channels_that_are_read_at_several_places_move_at_all_of_them():
    found, _ = classes(Pyramid)
    down = found["down.weight", 0, tuple(range(8))]
    assert sorted(m.positions[0] for m in down.members if (m.name, m.dim) == ("fuse.weight", 1)) == [0, 8, 16]
    assert {("chain.0.weight", 0), ("chain.2.bias", 0), ("up.weight", 0)} <= places(down)


def test_layers_of_different_patterns_are_searched_together():
    model = built(Attention)
    mixed = {name: (Pattern(1, 8) if name.startswith("up") else NM, axis) for name, (_, axis) in plan_of(model).items()}
    before, found = copy.deepcopy(model), permute_model(model, example(Attention), mixed)
    own = {report.names: report for report in found}
    kept = [own["up.weight",], own["q.weight", "k.weight", "v.weight", "out.weight"]]
    assert sum(report.after for report in kept) > sum(report.before for report in kept)
    torch.testing.assert_close(model(example(Attention)), before(example(Attention)), rtol=1e-10, atol=1e-12)


def test_a_wrong_proof_shows_in_a_run_and_is_taken_back(monkeypatch):
    monkeypatch.setitem(RULES, "scaled_dot_product_attention", lambda graph, node, operator: graph.first(node))
    model = built(Causal)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"the permuted model gives something else \(relative error .*leave --permute out"):
        permute_model(model, example(Causal), plan_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Choosing(Causal):
    """Says where its largest outputs are, too."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.argmax(-1)


def test_a_wrong_proof_shows_where_the_model_chooses_too(monkeypatch):
    monkeypatch.setitem(RULES, "scaled_dot_product_attention", lambda graph, node, operator: graph.first(node))
    with pytest.raises(ModelError, match=r"the permuted model gives something else"):
        permute_model(built(Choosing), example(Causal), plan_of(built(Choosing)))


class Tied(nn.Module):
    """Two layers share a weight: torch.export reads it by the name of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.two.weight = self.one.weight

    def forward(self, x):
        y = self.last(self.two(self.one(self.first(x).relu()).relu()).relu())
        return y, y.argmax(-1)


def test_a_weight_of_two_names_moves_once():
    torch.manual_seed(0)
    model, x = Tied().double().eval(), torch.randn(5, 8, dtype=torch.float64)
    before = model(x)[0]
    found = permute_model(model, x, dict.fromkeys(("one.weight", "last.weight"), (NM, "channel")))
    assert any(report.after > report.before for report in found)
    torch.testing.assert_close(model(x)[0], before, rtol=1e-10, atol=1e-12)


def test_channels_of_tokens_that_the_data_routes_keep_their_order():
    torch.manual_seed(0)
    model, x = Routed().double().eval(), torch.randn(24, 16, dtype=torch.float64)
    before = model(x)
    found = permute_model(model, x, dict.fromkeys(("experts.0.2.weight", "out.weight"), (NM, "channel")))
    assert "of a size that the data decides" in next(r.reason for r in found if r.names == ("experts.0.2.weight",))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)


def test_outputs_that_are_not_finite_are_no_sign_of_a_wrong_proof():
    batch = example(Residual).index_fill(0, torch.tensor(0), torch.nan)
    assert any(report.after > report.before for report in permute_model(built(Residual), batch, plan_of(built(Residual))))


def test_an_operator_that_is_not_known_freezes_what_it_touches():
    class Rolled(Residual):
        def forward(self, x):
            return self.conv2(torch.roll(self.conv1(self.stem(x)), 1, dims=1))

    model = built(Rolled)
    found = {r.names[0]: r.reason for r in permute_model(model, example(Rolled), {"conv2.weight": (NM, "channel")})}
    assert found == {"conv2.weight": "its channels have to keep their order: roll"}
