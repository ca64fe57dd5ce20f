"""Budgets, the choice by dynamic programming against all choices, and the sensitivities of a small model."""

import copy
import json
import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import patterns
from torch import nn

from nmconvert.calibrate.budget import Budget, Met, Option, Sensitivity, _first, choose, measure, meet, packed_share, top1_drop
from nmconvert.calibrate.driver import Recipe
from nmconvert.checkpoint.base import FileCheckpoint
from nmconvert.cli import group
from nmconvert.errors import CheckpointError, DataError, UsageError, WeightError
from nmconvert.packing import pack
from nmconvert.pattern import Pattern
from nmconvert.plot import sensitivities_svg

NO_CORRECTION = Recipe(criterion="exact", block_steps=0, model_steps=0, copies=1)


def never(*plan):
    raise AssertionError("is measured for another budget only")


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
    fragile = Sensitivity("a", "channel", (Option(None, 0.5, 0), Option(two, 0.3, 5), Option(one, 0.2, 9)))
    robust = Sensitivity("b", "channel", (Option(None, 0.5, 0), Option(two, 0.3, 1), Option(one, 0.2, 2)))
    return [fragile, robust]


def test_the_fragile_layer_stays_dense_where_the_budget_allows_it():
    one = (Pattern(1, 4), "channel")
    assert meet(Budget("size", 0.71), two_layers(), never, never).plan == {"b": one}
    assert meet(Budget("size", 0.4), two_layers(), never, never).plan == {"a": one, "b": one}


def test_what_is_not_pruned_counts_against_the_size():
    halves = [replace(s, options=tuple(replace(o, size=o.size / 2) for o in s.options)) for s in two_layers()]
    one = (Pattern(1, 4), "channel")
    met = meet(Budget("size", 0.701), halves, never, never)
    assert met.plan == {"a": one, "b": one}
    assert met.reached == pytest.approx(0.7)
    with pytest.raises(UsageError, match=r"size<=0\.69 cannot be met: the smallest patterns give 0\.700, of which 0\.500"):
        meet(Budget("size", 0.69), halves, never, never)


class Stopwatch:
    """Layer "a" has no kernel; "b" takes 8 of 10 seconds, half of that with 2:4; only the whole model shows the ``loss``."""

    def __init__(self, loss=0.0):
        self.loss = loss

    def layers(self, plan):
        return {"b": (8.0, 8.0 * plan["b"][0].density)} if "b" in plan else {}

    def speedup(self, plan):
        return 10 / (2 + 8 * (plan["b"][0].density if "b" in plan else 1) + self.loss)


def test_the_speedup_is_that_of_the_whole_model_and_layers_that_gain_nothing_stay_dense():
    half = meet(Budget("speedup", 1.6), two_layers(), never, Stopwatch)
    assert half.plan == {"b": (Pattern(2, 4), "channel")}
    assert half.reached == pytest.approx(10 / 6)
    assert meet(Budget("speedup", 2.0), two_layers(), never, Stopwatch).plan == {"b": (Pattern(1, 4), "channel")}
    slower = partial(Stopwatch, loss=0.5)
    assert meet(Budget("speedup", 1.6), two_layers(), never, slower).plan == {"b": (Pattern(1, 4), "channel")}
    with pytest.raises(UsageError, match=r"speedup>=2\.5 cannot be met: the fastest patterns give 2\.22 on this machine"):
        meet(Budget("speedup", 2.5), two_layers(), never, slower)


def test_a_speedup_that_asks_for_nothing_is_met_without_a_kernel():
    class Slow(Stopwatch):
        def layers(self, plan):
            return {}

    assert meet(Budget("speedup", 1.0), two_layers(), never, Slow).plan == {}


def test_the_drop_is_measured_and_held():
    drops = {frozenset(): 0.0, frozenset("b"): 1.0, frozenset("ab"): 6.0}
    asked = []

    def drop(plan):
        asked.append(set(plan))
        return drops[frozenset(plan)]

    met = meet(Budget("top1-drop", 2.0), two_layers(), drop, never)
    assert (set(met.plan), met.reached) == ({"b"}, 1.0)
    assert meet(Budget("top1-drop", 0.5), two_layers(), drop, never) == Met({}, 0.0)
    assert {"a", "b"} in asked


@given(pattern=patterns(dense=False), columns=st.integers(1, 80), dtype=st.sampled_from([np.float16, np.float32]))
def test_the_packed_share_is_what_packing_writes(pattern, columns, dtype):
    matrix = np.zeros((840, columns), dtype)
    share = packed_share(pattern, columns, 8 * matrix.itemsize)
    assert share == pytest.approx(pack(matrix, pattern).nbytes / matrix.nbytes, rel=1e-3)


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
    planned, whole = 16 * 8 * 9 + 256 * 4, sum(p.numel() for p in model.parameters())
    assert sum(layer.options[0].size for layer in found) == pytest.approx(planned / whole)


def test_a_layer_whose_inputs_are_not_finite_is_named_with_the_sample():
    model, batches = digits()
    batches[2][3, 0, 1, 1] = torch.inf
    with pytest.raises(WeightError, match=r"^2\.weight: its inputs .* as sample 4 of calibration batch 3 does"):
        measure(model, batches, {"2.weight": "channel"})


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
    shown = invoke("prune", "net.pt", "--budget", "size<=0.4", *project, "-o", "mixed.pt")
    assert re.search(r"--budget 'size<=0\.4' is met: 0\.(3\d*|4) of the dense weights' bytes", shown)
    dense, mixed = torch.load("net.pt"), torch.load("mixed.pt")
    names = [n for n, t in dense.items() if t.dim() == 4 and (mixed[n] == 0).any()]
    assert names
    kept = sum(int((mixed[n] != 0).sum()) for n in names)
    assert kept / sum(dense[n].numel() for n in names) <= 0.4


def test_a_picture_that_has_no_folder_is_refused_before_anything_is_measured(project, monkeypatch):
    monkeypatch.setattr("nmconvert.calibrate.subject.measure", never)
    with pytest.raises(UsageError, match="missing: there is no such folder for --plot; make it first"):
        invoke("sensitivity", "net.pt", *project, "--plot", "missing/net.svg")


def test_a_folder_as_the_output_is_refused_before_anything_is_solved(project, monkeypatch):
    monkeypatch.setattr("nmconvert.calibrate.stage.prune_model", never)
    Path("folder").mkdir()
    with pytest.raises(UsageError, match="folder: is a folder; give the name of a file with --output"):
        invoke("prune", "net.pt", "--nm", "2:4", *project, "-o", "folder")


def test_what_calibration_has_done_is_kept_until_the_copy_is_written(project, monkeypatch):
    def full(*arguments):
        raise CheckpointError("the disk is full")

    command, resume = ["prune", "net.pt", "--nm", "2:4", *project, "-o", "out.pt"], Path("out.pt.calibration")
    with monkeypatch.context() as patch:
        patch.setattr(FileCheckpoint, "write_copy", full)
        with pytest.raises(CheckpointError):
            invoke(*command)
    assert resume.exists()
    invoke(*command)
    assert not resume.exists()


def test_sensitivity_shows_and_draws_every_layer(project):
    output = invoke("sensitivity", "net.pt", "--nm", "2:4,1:4", *project, "--plot", "net.svg", "--html", "net.html")
    assert Path("net.svg").read_text() in Path("net.html").read_text("utf-8")
    assert "4.weight" in output
    assert "1:4" in output
    assert "█" in output
    titles = [title.text for title in ElementTree.parse("net.svg").iter("{http://www.w3.org/2000/svg}title")]
    assert [title.split(":")[0] for title in titles if title.startswith("4.weight")] == ["4.weight 2", "4.weight 1"]
    assert len(titles) == 2 * output.count(".weight")


def test_longer_bars_are_larger_losses_and_a_loss_of_zero_is_drawn():
    svg = ElementTree.fromstring(sensitivities_svg([*two_layers(), fragile_by(0.0)]))
    bars = [float(bar.get("width")) for bar in svg.iter("{http://www.w3.org/2000/svg}rect") if bar.find("*") is not None]
    assert len(bars) == 6
    assert bars[0] < bars[1]
    assert bars[2] < bars[3] < bars[0]
    assert bars[4] == 0


def fragile_by(loss):
    first = two_layers()[0]
    return replace(first, options=(first.options[0], *(replace(o, loss=loss) for o in first.options[1:])))


def test_a_criterion_without_data_is_refused(project):
    with pytest.raises(UsageError, match="give --calib DATA"):
        invoke("prune", "net.pt", "--nm", "2:4", "--criterion", "wanda")
    with pytest.raises(UsageError, match="give --model and --calib"):
        invoke("prune", "net.pt", "--budget", "size<=0.4")
    with pytest.raises(UsageError, match="--permute runs the model on its inputs: give --model and --calib"):
        invoke("prune", "net.pt", "--nm", "2:4", "--permute", *project[:2])
    with pytest.raises(UsageError, match="--nm N:M for all layers, or --budget"):
        invoke("prune", "net.pt")


# ── a bare ONNX file ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bare(project):
    """The same model as a file without a module, and the arguments that it needs."""
    space: dict = {}
    exec(MODEL, space)
    model = space["make"]().eval()
    model.load_state_dict(torch.load("net.pt"))
    torch.onnx.export(
        model, torch.randn(2, 3, 12, 12), "net.onnx", input_names=["x"], dynamic_axes={"x": {0: "batch"}}, dynamo=False
    )
    return project[2:]


def test_a_budget_of_size_is_met_by_the_exported_file(bare):
    told = json.loads(invoke("prune", "net.onnx", "--budget", "size<=0.6", *bare, "--json", "-o", "mixed.nm2-4.onnx"))
    assert len({row["pattern"] for row in told["tensors"]}) > 1
    invoke("export", "mixed.nm2-4.onnx", "--onnx", "-o", "small.onnx")
    weights = sum(tensor.nbytes for tensor in torch.load("net.pt").values())
    constants = onnx.load("small.onnx").graph.initializer
    packed = sum(len(c.raw_data) for c in constants if not c.name.startswith("nmconvert."))  # tables that do not grow
    assert packed / weights <= told["budget"]["reached"] <= 0.6
    invoke("verify", "small.onnx")


def test_a_file_and_its_module_are_equally_sensitive(bare, project):
    arguments = ["--nm", "2:4,1:4", "--json"]
    file = json.loads(invoke("sensitivity", "net.onnx", *bare, *arguments))["layers"]
    module = json.loads(invoke("sensitivity", "net.pt", *project, *arguments))["layers"]
    assert [layer["name"] for layer in module] == [*(layer["name"] for layer in file), "9.weight"]  # its output layer
    for one, other in zip(file, module[:-1], strict=True):
        for pattern in ("2:4", "1:4"):
            assert one["patterns"][pattern]["loss"] == pytest.approx(other["patterns"][pattern]["loss"], rel=0.02)
            assert one["patterns"][pattern]["size"] == pytest.approx(other["patterns"][pattern]["size"], rel=0.02)
    shown = invoke("sensitivity", "net.onnx", "--nm", "2:4", *bare, "--plot", "net.svg")
    assert "█" in shown
    assert Path("net.svg").read_text().count("<title>") == len(file)


def test_a_budget_of_agreement_and_one_of_speed_are_measured_on_the_graph(bare):
    told = json.loads(invoke("prune", "net.onnx", "--budget", "top1-drop<=100", *bare, "--json", "-o", "any.onnx"))
    assert "1:16" in {row["pattern"] for row in told["tensors"]}
    with pytest.raises(UsageError, match=r"speedup>=90 cannot be met: the fastest patterns give \d"):
        invoke("prune", "net.onnx", "--budget", "speedup>=90", *bare, "-o", "fast.onnx")


def test_what_a_file_lacks_for_a_budget_is_said(bare):
    with pytest.raises(UsageError, match=r"--budget runs the model .* \(an ONNX file needs --calib alone, a Hugging Face "):
        invoke("prune", "net.onnx", "--budget", "size<=0.4")
    with pytest.raises(UsageError, match="an ONNX file or a Hugging Face folder needs --calib alone"):
        invoke("sensitivity", "net.onnx")
    model = onnx.load("net.onnx")
    for dims, message in (([3, 12, 12], "samples come first"), ([5, 3, 12, 12], None), (["b", 3, 8, 8], "--task-arg size")):
        model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims))
        onnx.save(model, "other.onnx")
        if message is None:  # batches of 8 are cut into batches of 5
            assert json.loads(invoke("sensitivity", "other.onnx", "--nm", "2:4", *bare, "--json"))["layers"]
        else:
            with pytest.raises(DataError, match=message):
                invoke("prune", "other.onnx", "--nm", "2:4", *bare)
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [64, 3, 12, 12]))
    onnx.save(model, "other.onnx")
    with pytest.raises(DataError, match="takes 64 samples at once, the data has 32: give more"):
        invoke("sensitivity", "other.onnx", *bare)


def test_the_classes_of_an_answer_are_found_or_it_is_refused():
    """Maps have them second, logits and texts last; what a signal [B, ?, ?] has where is not known."""
    convolution, maps, texts = nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    with pytest.raises(UsageError, match=r"top1-drop: which dimension of an output \[4, 8, 6\] are classes is not known"):
        top1_drop(convolution, [torch.randn(4, 8, 6)] * 4, Recipe())({})
    assert top1_drop(maps, [torch.randn(4, 8, 6, 5)] * 4, Recipe())({}) == 0
    assert top1_drop(texts, [torch.randint(9, (4, 6))] * 4, Recipe())({}) == 0
    changed = copy.deepcopy(maps)
    with torch.no_grad():
        changed.weight.copy_(maps.weight.roll(1, 0))
        changed.bias.copy_(maps.bias.roll(1))
    x = torch.randn(4, 8, 6, 5)
    assert torch.equal((_first(maps, x) + 1) % 8, _first(changed, x))
