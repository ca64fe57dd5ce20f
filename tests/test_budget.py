"""Budgets, the choice by dynamic programming against all choices, and the sensitivities of a small model."""

import copy
import json
from itertools import product

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nmconvert.calibrate.budget import Budget, Option, Sensitivity, choose, measure, meet, packed_share, top1_drop
from nmconvert.calibrate.driver import Recipe
from nmconvert.cli import group
from nmconvert.errors import UsageError
from nmconvert.pattern import Pattern

NO_CORRECTION = Recipe(criterion="exact", block_steps=0, model_steps=0, copies=1)


def never(plan):
    raise AssertionError("only top1-drop measures")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("size<=0.35", Budget("size", 0.35)),
        (" speedup >= 1.5 ", Budget("speedup", 1.5)),
        ("top1-drop<=0.5", Budget("top1-drop", 0.5)),
    ],
)
def test_budgets_are_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["size>=0.3", "speedup<=2", "speedup>=0.5", "0.3", "size<=x", "top5-drop<=1"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match=r"budget|speedup"):
        Budget.parse(text)


tables = st.lists(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60)
@given(table=tables, share=st.floats(0, 1))
def test_the_choice_is_the_best_of_all_that_hold_the_limit(table, share):
    costs, losses = [[c for c, _ in layer] for layer in table], [[loss for _, loss in layer] for layer in table]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    limit = (least + share * (most - least)) * 1.01
    picks = choose(costs, losses, limit)
    spent = sum(layer[p] for layer, p in zip(costs, picks, strict=True))
    lost = sum(layer[p] for layer, p in zip(losses, picks, strict=True))
    assert spent <= limit * (1 + 1e-9)
    for other in product(*(range(len(layer)) for layer in costs)):
        cost = sum(layer[p] for layer, p in zip(costs, other, strict=True))
        if cost <= limit * (1 - len(costs) / 4000):  # what rounding up may cost
            assert lost <= sum(layer[p] for layer, p in zip(losses, other, strict=True)) + 1e-12


def test_a_limit_that_nothing_meets_is_said():
    with pytest.raises(UsageError, match=r"budget of 0\.1 cannot be met: the smallest patterns give 0\.5"):
        choose([[0.3, 0.6], [0.2, 0.4]], [[1, 0], [1, 0]], 0.1)


def two_layers():
    two, one = Pattern(2, 4), Pattern(1, 4)
    fragile = Sensitivity("a", "channel", (Option(None, 0.5, 0.2, 0), Option(two, 0.3, 0.1, 5), Option(one, 0.2, 0.05, 9)))
    robust = Sensitivity("b", "channel", (Option(None, 0.5, 0.8, 0), Option(two, 0.3, 0.4, 1), Option(one, 0.2, 0.2, 2)))
    return [fragile, robust]


def test_the_fragile_layer_stays_dense_where_the_budget_allows_it():
    assert meet(Budget("size", 0.71), two_layers(), never) == {"b": (Pattern(1, 4), "channel")}
    assert meet(Budget("size", 0.4), two_layers(), never) == {"a": (Pattern(1, 4), "channel"), "b": (Pattern(1, 4), "channel")}
    assert meet(Budget("speedup", 1.6), two_layers(), never) == {"b": (Pattern(2, 4), "channel")}


def test_the_drop_is_measured_and_held():
    drops = {frozenset(): 0.0, frozenset("b"): 1.0, frozenset("ab"): 6.0}
    asked = []

    def drop(plan):
        asked.append(set(plan))
        return drops[frozenset(plan)]

    assert set(meet(Budget("top1-drop", 2.0), two_layers(), drop)) == {"b"}
    assert meet(Budget("top1-drop", 0.5), two_layers(), drop) == {}
    assert {"a", "b"} in asked


def test_the_packed_share_is_what_packing_writes():
    assert packed_share(Pattern(2, 4), 64) == pytest.approx(0.5 + 1 / 32)
    assert packed_share(Pattern(2, 4), 6, bits=16) == pytest.approx(4 / 6 + 1 / 16)


def digits(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    return model.eval(), [torch.randn(8, 1, 8, 8) for _ in range(8)]


def test_sensitivities_grow_with_what_is_pruned_and_leave_the_model_alone():
    model, batches = digits()
    before = copy.deepcopy(model.state_dict())
    patterns = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8)]
    found = measure(model, batches, {"2.weight": "channel", "5.weight": "channel"}, patterns)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for layer in found:
        losses = [option.loss for option in layer.options]
        assert losses == sorted(losses)
        assert losses[0] == 0 < losses[1]
    assert sum(layer.options[0].size for layer in found) == pytest.approx(1)
    conv, linear = (layer.options[0].work for layer in found)
    assert conv / linear == pytest.approx(16 * 16 * 8 * 9 / (256 * 4))


def test_the_drop_of_an_empty_plan_is_zero_and_of_a_wild_one_is_not():
    model, batches = digits()
    drop = top1_drop(model, batches, NO_CORRECTION)
    assert drop({}) == 0
    wild = dict.fromkeys(["2.weight", "5.weight"], (Pattern(1, 16), "channel"))
    assert 0 < drop(wild) <= 100


MODEL = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(16, 5))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    space: dict = {}
    exec(MODEL, space)
    torch.save(space["make"]().state_dict(), "net.pt")
    images = np.random.default_rng(0).integers(0, 256, (48, 12, 12, 3), dtype=np.uint8)
    np.savez("data.npz", train_images=images, train_labels=np.zeros(48, dtype=np.int64))
    return ["--model", "net.py:make", "--calib", "data.npz", "--samples", "32", "--batch-size", "8"]


def invoke(*args):
    result = CliRunner().invoke(group, list(args), catch_exceptions=False, standalone_mode=False)
    assert result.exception is None
    return result.output


def test_prune_with_calibration_writes_a_sparse_file_with_other_weights(project):
    invoke("prune", "net.pt", "--nm", "2:4", *project, "-o", "calibrated.pt")
    invoke("prune", "net.pt", "--nm", "2:4", "-o", "magnitude.pt")
    dense, solved, plain = (torch.load(f) for f in ("net.pt", "calibrated.pt", "magnitude.pt"))
    assert list(solved) == list(dense)
    kept = solved["4.weight"].permute(0, 2, 3, 1).reshape(-1, 4) != 0
    assert (kept.sum(1) <= 2).all()
    changed = (solved["4.weight"] != dense["4.weight"]) & (solved["4.weight"] != 0)
    assert changed.any()
    assert not ((plain["4.weight"] != dense["4.weight"]) & (plain["4.weight"] != 0)).any()
    assert not torch.equal(solved["4.bias"], dense["4.bias"])


def test_permuted_channels_are_written_with_all_that_reads_them(project):
    invoke("prune", "net.pt", "--nm", "2:4", "--permute", *project, "-o", "permuted.pt")
    dense, permuted = torch.load("net.pt"), torch.load("permuted.pt")
    rows, moved = (state["0.weight"].reshape(8, -1) for state in (dense, permuted))
    order = torch.cdist(moved, rows).argmin(1).tolist()  # left dense, and fitted a little; but its channels moved
    assert sorted(order) == list(range(8))
    assert order != list(range(8))


def test_the_report_of_a_permutation_says_what_it_keeps_and_where_it_was_refused(project):
    arguments = ["prune", "net.pt", "--nm", "2:4", "--permute", "--include", "0.weight", "--include", "2.weight", *project]
    told = json.loads(invoke(*arguments, "-o", "permuted.pt", "--json"))
    refused, done = sorted(told["permutations"], key=lambda one: one["names"])
    assert (refused["names"], refused["reason"]) == (["0.weight"], "its channels have to keep their order: the model's input")
    assert done["names"] == ["2.weight"]
    assert done["after"] > done["before"] > 0.5
    dense, permuted = torch.load("net.pt"), torch.load("permuted.pt")
    order = torch.cdist(permuted["0.weight"].reshape(8, -1), dense["0.weight"].reshape(8, -1)).argmin(1)
    assert sorted(order.tolist()) == list(range(8))
    ordered = dense["2.weight"][:, order]
    kept = float(ordered[permuted["2.weight"] != 0].square().sum() / ordered.square().sum())
    energy = next(row["energy_kept"] for row in told["tensors"] if row["name"] == "2.weight")
    assert energy == pytest.approx(kept, rel=1e-5)
    assert "its channels have to keep their order" in invoke(*arguments, "-o", "again.pt")


def test_prune_under_a_budget_mixes_patterns_within_it(project):
    invoke("prune", "net.pt", "--budget", "size<=0.4", *project, "-o", "mixed.pt")
    dense, mixed = torch.load("net.pt"), torch.load("mixed.pt")
    names = [n for n, t in dense.items() if t.dim() == 4 and (mixed[n] == 0).any()]
    assert names
    kept = sum(int((mixed[n] != 0).sum()) for n in names)
    assert kept / sum(dense[n].numel() for n in names) <= 0.4


def test_sensitivity_shows_every_layer(project):
    output = invoke("sensitivity", "net.pt", "--nm", "2:4,1:4", *project)
    assert "4.weight" in output
    assert "1:4" in output
    assert "█" in output


def test_a_criterion_without_data_is_refused(project):
    with pytest.raises(UsageError, match="give --calib DATA"):
        invoke("prune", "net.pt", "--nm", "2:4", "--criterion", "wanda")
    with pytest.raises(UsageError, match="give --model and --calib"):
        invoke("prune", "net.pt", "--budget", "size<=0.4")
    with pytest.raises(UsageError, match="--nm N:M for all layers, or --budget"):
        invoke("prune", "net.pt")
