"""The training loop: what it reaches, that it goes on bit for bit, and what it says when it cannot."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nmconvert.errors import CheckpointError, DataError, ModelError, NmconvertError, UsageError
from nmconvert.pattern import Pattern
from nmconvert.plan import make_plan
from nmconvert.srste import weights_of
from nmconvert.tasks import Classification, Samples, misfits_named
from nmconvert.tasks.images import shifted
from nmconvert.train import Settings, train
from nmconvert.train.batches import Batches
from nmconvert.train.curves import curves_svg
from nmconvert.train.diagnose import slow_in
from nmconvert.train.log import Log, Row
from nmconvert.train.loop import Training
from nmconvert.train.stage import FinetuneResult

CLASSES = 4
TASK = Classification(mean=(0.5,), std=(0.25,), flip=False)


def samples(count=96, *, seed=0, augment=False, labelled=True):
    """Gray 8×8 images, each class with a bright quadrant of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 120, (count, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(int(label), 2)
        image[4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 60
    read = partial(_read, images, labels if labelled else np.full(count, -1))
    return Samples(read, count, augment=_shifted if augment else None)


def _read(images, labels, index):
    return images[index], int(labels[index])


def _shifted(sample, rng):
    return shifted(sample[0], 1, rng), sample[1]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def plan_of(model, pattern="2:4"):
    return make_plan(weights_of(model), Pattern.parse(pattern))


UNLABELLED = Settings(epochs=6, batch=16, lr=0.05)


def run(settings=None, *, model=None, teacher=None, data=None, validation=None, **more):
    model = network() if model is None else model
    data = samples(augment=True) if data is None else data
    validation = samples(64, seed=1) if validation is None else validation
    return train(model, plan_of(model), TASK, data, validation, settings or Settings(batch=32), teacher=teacher, **more)


def accuracy(rows):
    return [row.metrics["top1"] for row in rows]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def dense():
    """A network that was trained dense."""
    model = network()
    plan = make_plan(weights_of(model), Pattern(2, 4), exclude=["*"])
    result = train(model, plan, TASK, samples(), samples(64, seed=1), Settings(epochs=12, batch=16, lr=0.05))
    assert accuracy(result.rows)[-1] > 95
    return model


def test_it_learns_and_ends_nm():
    model = network()
    result = run(Settings(epochs=10, batch=16, freeze_masks=0.3), model=model)
    assert accuracy(result.rows)[-1] > 90 > accuracy(result.rows)[0]
    assert [row.label for row in result.rows] == ["start", *map(str, range(1, 11))]
    assert same(result.weights, model.state_dict())
    matrix = result.weights["3.weight"].permute(0, 2, 3, 1).reshape(-1, 4)
    assert int((matrix != 0).sum(1).max()) == 2
    assert result.rows[-1].sad == 0, "the masks stood still in the last epochs"
    assert result.rows[1].sad > 0


def test_a_teacher_replaces_labels(dense):
    model = copy.deepcopy(dense)
    result = run(Settings(epochs=3, batch=16, lr=0.02), model=model, teacher=copy.deepcopy(dense), data=samples(labelled=False))
    assert [row.label for row in result.rows[:2]] == ["dense", "start"]
    assert accuracy(result.rows)[-1] >= accuracy(result.rows)[1]
    assert accuracy(result.rows)[-1] > 95
    with pytest.raises(DataError, match="labels"):
        run(Settings(batch=16), data=samples(labelled=False))


def test_no_label_is_needed_anywhere(dense, tmp_path):
    """Neither to learn from nor to measure by: the teacher gives both, and a resumed run still knows it."""
    unlabelled = samples(64, seed=1, labelled=False)
    result = run(UNLABELLED, teacher=copy.deepcopy(dense), data=samples(labelled=False), validation=unlabelled)
    agreement = accuracy(result.rows)
    assert result.judged_by_teacher
    assert agreement[0] == 100
    assert agreement[-1] > max(90, agreement[1])
    told = run(UNLABELLED, teacher=copy.deepcopy(dense), data=samples(labelled=False), folder=tmp_path)
    assert not told.judged_by_teacher
    with pytest.raises(DataError, match=r"no labels.*--teacher"):
        run(UNLABELLED, validation=unlabelled)


def test_a_model_that_cannot_take_the_data_is_said(dense):
    wrong = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, CLASSES))
    with pytest.raises(ModelError, match=r"Sequential cannot take this data: RuntimeError: .* 3 channels.*--task"):
        run(model=wrong)
    with pytest.raises(RuntimeError, match="gloo"), misfits_named(wrong):
        raise RuntimeError("gloo: another rank is gone")


class Unfinished(nn.Module):
    def forward(self, images):
        return self.head(images)


def test_a_mistake_in_the_models_code_is_not_laid_on_the_data():
    with pytest.raises(ModelError, match=r"Unfinished fails, which its code has to mend: AttributeError: .*'head'"):
        run(model=Unfinished())


@pytest.mark.parametrize(("able", "slow"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_half_precision_without_its_instructions_is_said_to_be_slow(monkeypatch, able, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: able)
    told = slow_in("bf16", torch.device("cpu"))
    assert (told is not None and "bf16 takes several times as long as fp32 on this CPU, which has AVX2" in told) == slow
    assert slow_in("bf16", torch.device("cuda")) is None
    assert slow_in("fp32", torch.device("cpu")) is None


@pytest.mark.parametrize("method", ["sr-ste", "ste", "fixed-mask"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_method_and_precision_learns(method, precision, dense):
    settings = Settings(epochs=3, batch=16, lr=0.02, method=method, precision=precision, clip=5.0)
    assert accuracy(run(settings, model=copy.deepcopy(dense)).rows)[-1] > 90


def test_adamw_and_averaged_weights_learn(dense):
    settings = Settings(epochs=4, batch=16, optimizer="adamw", lr=2e-3, ema=0.9)
    result = run(settings, model=copy.deepcopy(dense), teacher=copy.deepcopy(dense))
    assert accuracy(result.rows)[-1] > 90
    matrix = result.weights["3.weight"].permute(0, 2, 3, 1).reshape(-1, 4)
    assert int((matrix != 0).sum(1).max()) == 2


def test_norms_of_averaged_weights_are_estimated_with_them():
    """Not taken from the last weights, which spread further: the averaged ones are run on the data, and its mean is theirs."""
    model = network()
    weights = run(Settings(epochs=2, batch=16, lr=0.5, ema=0.95), model=model, data=samples()).weights
    images = torch.stack([TASK.collate([sample]).inputs[0] for sample in samples()])
    inputs = nn.functional.conv2d(images, weights["0.weight"], weights["0.bias"], padding=1)
    torch.testing.assert_close(weights["1.running_mean"], inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert weights["1.num_batches_tracked"] == 12  # as without an average
    assert model[1].momentum == 0.1


def test_accumulation_gives_the_same_weights():
    """To rounding, in a network without batch norm or dropout."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES)).double()
        task = _Doubled(mean=(0.5,), std=(0.25,))
        settings = Settings(epochs=2, batch=32, accumulate=parts, clip=1.0)
        results.append(train(model, plan_of(model), task, samples(), samples(8), settings).weights)
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-11)


class _Doubled(Classification):
    def collate(self, batch):
        made = super().collate(batch)
        return type(made)(made.inputs.double(), made.targets, made.size, made.labelled)


def test_the_order_of_samples_does_not_depend_on_parts_or_start():
    def order(settings, first=0):
        batches = Batches(_Numbers(50), _Lists(), settings, torch.device("cpu"))
        return [sorted(n for part in step for n in part.numbers) for step in batches.epoch(3, first)]

    whole = order(Settings(batch=12, seed=5))
    assert len(whole) == 4
    assert len({n for step in whole for n in step}) == 48
    assert order(Settings(batch=12, seed=5, accumulate=3)) == whole
    assert order(Settings(batch=12, seed=5), first=2) == whole[2:]
    assert order(Settings(batch=12, seed=6)) != whole


class _Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


class _Lists:
    class Numbers:
        def __init__(self, numbers):
            self.numbers = numbers

        def to(self, device):
            return self

    def collate(self, numbers):
        return self.Numbers(numbers)


# -- resume ---------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "sgd": Settings(epochs=3, batch=16, save_minutes=0.0005, workers=2, freeze_masks=0.3),
    "adamw-ema-fp16": Settings(
        epochs=3, batch=16, save_minutes=0.0, optimizer="adamw", ema=0.9, precision="fp16", accumulate=2
    ),
}


def _child(variant, folder, resume):
    """A run of its own in a process of its own; its weights go into ``folder``."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its workers, which would import everything anew otherwise
    result = run(VARIANTS[variant], folder=folder / "state", log=folder / "log.jsonl", resume=resume)
    torch.save([result.weights, [row.metrics for row in result.rows], [row.sad for row in result.rows]], folder / "result.pt")


def _start(*arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_train"])
    process = context.Process(target=_child, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_runs_end_with_the_same_weights(variant, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = _start(variant, tmp_path / "whole", False)
    whole.join()
    assert whole.exitcode == 0

    rng, kills, resume, folder = random.Random(variant), 0, False, tmp_path / "killed"
    for goal in [*sorted(rng.sample(range(1, 17), 3)), None]:
        process = _start(variant, folder, resume)
        while goal is not None and process.is_alive() and _steps_logged(folder / "log.jsonl") < goal:
            time.sleep(0.002)
        if goal is not None:
            time.sleep(rng.random() / 50)
            os.kill(process.pid, signal.SIGKILL)
            kills += process.is_alive()
            resume = any((folder / "state").glob("step-*/progress.json"))
        process.join()
    assert process.exitcode == 0
    expected, got = (torch.load(tmp_path / name / "result.pt") for name in ("whole", "killed"))
    assert same(expected[0], got[0])
    assert expected[1:] == got[1:], "the table is the same too"
    logs = [_without_times(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert logs[0] == logs[1], "the log is that of one run"


def _steps_logged(path):
    return sum('"step"' in line for line in path.read_text().splitlines()) if path.is_file() else 0


def _without_times(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def test_resume_refuses_another_run(tmp_path):
    run(Settings(epochs=1, batch=32), folder=tmp_path)
    with pytest.raises(UsageError, match=r"lr was 0\.02 and is 0\.1 now"):
        run(Settings(epochs=1, batch=32, lr=0.1), folder=tmp_path, resume=True)
    with pytest.raises(UsageError, match="samples was 96 and is 64 now"):
        run(Settings(epochs=1, batch=32), folder=tmp_path, resume=True, data=samples(64))
    with pytest.raises(UsageError, match="go on with --resume"):
        run(Settings(epochs=1, batch=32), folder=tmp_path)
    wider = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, CLASSES))
    with pytest.raises(CheckpointError, match="for another run"):
        run(Settings(epochs=1, batch=32), model=wider, folder=tmp_path, resume=True)
    (next(tmp_path.glob("step-*")) / "progress.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        run(Settings(epochs=1, batch=32), folder=tmp_path, resume=True)


class Planted:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("planted", ["program", "garbage", "nothing"])
def test_a_state_runs_no_program(tmp_path, planted):
    """Its metadata are a pickle, which torch loads as such."""
    run(Settings(epochs=1, batch=32), folder=tmp_path / "state")
    content = {"program": pickle.dumps(Planted(tmp_path / "ran")), "garbage": b"\x80\x04garbage", "nothing": b""}[planted]
    (next((tmp_path / "state").glob("step-*")) / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-\d+: its metadata are damaged .*; remove it and start anew"):
        run(Settings(epochs=1, batch=32), folder=tmp_path / "state", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_no_state_is_not_removed(tmp_path, what):
    states, mine = tmp_path / "a.state", tmp_path / "a.state" / "mine"
    if what == "link":
        (tmp_path / "elsewhere").mkdir()
        states.symlink_to(tmp_path / "elsewhere")
    else:
        mine.mkdir(parents=True)
        (mine / "precious").touch()
        if what == "file":
            (mine / "precious").rename(states / "precious")
            mine.rmdir()
    with pytest.raises(UsageError, match=r"a\.state.*(move it away|it is a link)"):
        run(Settings(epochs=1, batch=32), folder=states)


def test_resume_without_a_state_says_that_it_begins_anew(tmp_path):
    with pytest.warns(UserWarning, match=r"--resume: there is no state in .* to go on from; this run begins anew"):
        again = run(Settings(epochs=1, batch=32), folder=tmp_path / "none", resume=True)
    assert same(again.weights, run(Settings(epochs=1, batch=32), folder=tmp_path / "first").weights)


def test_a_finished_run_resumes_to_its_result(tmp_path):
    first = run(Settings(epochs=2, batch=32), folder=tmp_path)
    again = run(Settings(epochs=2, batch=32), folder=tmp_path, resume=True)
    assert same(first.weights, again.weights)
    assert first.rows == again.rows
    assert len(list(tmp_path.iterdir())) == 1, "older states are removed"


def test_early_stopping_comes_back_to_the_best_epoch(tmp_path, dense):
    """With a learning rate that destroys, the best epoch is the first."""
    settings = Settings(epochs=6, batch=16, lr=30.0, warmup=1.0, clip=1.0, patience=2)
    result = run(settings, model=copy.deepcopy(dense), folder=tmp_path)
    best = max(range(1, len(result.rows)), key=lambda i: accuracy(result.rows)[i])
    assert result.stopped_early
    assert len(result.rows) == best + 3
    model = network()
    model.load_state_dict(result.weights)
    loader = [TASK.collate([samples(64, seed=1)[i] for i in range(64)])]
    assert TASK.evaluate(model.eval(), loader)["top1"] == accuracy(result.rows)[best]
    with pytest.raises(UsageError, match="patience needs a folder"):
        run(settings)


@pytest.mark.parametrize("left", [1, 0], ids=["epochs-left", "no-epochs-left"])
def test_patience_from_a_resumed_run_on(left, tmp_path, dense):
    """The states of a run without patience do not hold its best epoch."""
    settings = Settings(epochs=3, batch=16, lr=30.0, warmup=1.0, clip=1.0)
    first = run(settings, model=copy.deepcopy(dense), folder=tmp_path)
    assert max(accuracy(first.rows)[1:]) > accuracy(first.rows)[-1], "the best epoch is not the last"
    patient = replace(settings, epochs=3 + left, patience=1)
    again = run(patient, model=copy.deepcopy(dense), folder=tmp_path, resume=True)
    assert not again.stopped_early, "nothing was waited for yet"
    assert len(again.rows) == len(first.rows) + left
    assert left or same(again.weights, first.weights)


# -- what is left to read -------------------------------------------------------------------------------------------------


def test_log_and_curves(tmp_path):
    result = run(Settings(epochs=2, batch=32), log=tmp_path / "log.jsonl", teacher=network())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["label"] for line in lines if line["kind"] == "row"] == ["dense", "start", "1", "2"]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "step")
    assert [line["metrics"] for line in lines if line["kind"] == "row"] == [row.metrics for row in result.rows]
    svg = (tmp_path / "log.svg").read_text()
    assert svg.count("<polyline") == 4
    assert ">dense<" in svg


def test_metrics_that_are_infinite_are_null_in_the_log(tmp_path):
    log = Log(tmp_path / "log.jsonl", "perplexity", 10, None)
    log.row(0, Row("dense", {"perplexity": 3.0}))
    log.row(0, Row("start", {"perplexity": math.inf}))
    log.row(10, Row("1", {"perplexity": 4.0}, loss=1.0, flip_rate=0.01))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"]["perplexity"] for line in lines] == [3.0, None, 4.0]
    assert "Infinity" not in "".join(lines)
    assert (tmp_path / "log.svg").read_text().count("<polyline") == 2


def test_curves_leave_out_what_is_not_finite_and_escape_names():
    svg = curves_svg({"a<b": [(0, 1.0), (1, math.nan), (2, 3.0)], "nothing": [], "flat": [(0, 5.0)]})
    assert "a&lt;b" in svg
    assert "nan" not in svg
    assert svg.count("<polyline") == 2


# -- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_names_step_and_layer(tmp_path):
    model = network()

    class Breaks(nn.Module):
        calls = 0

        def forward(self, x):
            if self.training:
                Breaks.calls += 1
            return x / 0 if Breaks.calls > 4 else x

    model[4] = Breaks()
    with pytest.raises(NmconvertError, match=r"step 5 \(epoch 2\): '4' is the first layer .*step-3 is the last good state"):
        run(Settings(epochs=2, batch=32), model=model, folder=tmp_path)
    model = network()
    model[8].weight.data.fill_(math.nan)
    with pytest.raises(NmconvertError, match=r"step 1 .*the weight '8\.weight' holds NaN"):
        run(Settings(epochs=2, batch=32), model=model)


def test_memory_that_runs_out_names_the_remedy():
    class Greedy(nn.Module):
        def forward(self, x):
            return x + torch.empty(1 << 60) if self.training else x

    with pytest.raises(NmconvertError, match=r"batches of 32: --accumulate 2"):
        run(model=nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), Greedy()))


def test_bad_settings_and_data_are_named():
    with pytest.raises(DataError, match="96 samples, fewer than a batch of 128"):
        run(Settings(batch=128))
    with pytest.raises(UsageError, match="multiple of 3"):
        run(Settings(batch=32, accumulate=3))
    for wrong in (
        {"epochs": 0},
        {"lr": -1.0},
        {"lr": math.inf},
        {"weight_decay": -1e-4},
        {"decay": math.nan},
        {"seed": -1},
        {"save_minutes": math.nan},
        {"freeze_masks": 1.5},
        {"ema": 1.0},
        {"patience": 0},
        {"optimizer": "lion"},
        {"precision": "int8"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
            Settings(**wrong)
    with pytest.raises(DataError, match="label 3 is out of range: the model has 2 classes"):
        run(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_one_line_with_its_path(workers):
    data = Samples(_unreadable, 64)
    with pytest.raises(DataError) as caught:
        run(Settings(batch=32, workers=workers), data=data)
    assert str(caught.value) == "cats/7.png: is no readable image; --skip-bad leaves out what cannot be read"


def _unreadable(index):
    raise DataError("cats/7.png: is no readable image; --skip-bad leaves out what cannot be read")


def test_what_is_left_out_goes_by_the_task():
    assert Settings().for_task("classification") == Settings(optimizer="sgd", lr=0.02, decay=0.1)
    assert Settings().for_task("detection") == Settings(optimizer="adamw", lr=1e-3, decay=10.0)
    told = Settings(optimizer="sgd", lr=0.3, decay=0.0)
    assert told.for_task("translation") == told


def test_the_learning_rate_warms_up_and_falls():
    settings = Settings(lr=0.1, warmup=0.2)
    rates = [settings.lr_at(step, 10) for step in range(10)]
    assert rates[:2] == pytest.approx([0.05, 0.1])
    assert rates[2] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.005


def _read_with_nan(read, index):
    image, label = read(index)
    image = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)
    return (image * float("nan") if index == 3 else image), label


def test_a_sample_that_is_not_finite_is_named_not_the_learning_rate(dense):
    bad = Samples(partial(_read_with_nan, partial(samples().__getitem__)), 96)
    good = Samples(partial(_read_with_nan, samples(seed=1).__getitem__), 3)
    with pytest.raises(DataError, match="holds NaN or infinity: repair the data"):
        run(model=copy.deepcopy(dense), data=bad, validation=good)
    with pytest.raises(DataError, match=r"sample 3 of those to be measured holds NaN or infinity"):
        run(model=copy.deepcopy(dense), validation=bad)


def test_a_run_that_ends_below_its_start_says_so():
    rows = (Row("dense", {"top1": 90.0}), Row("start", {"top1": 80.0}), Row("1", {"top1": 75.5}))
    made = FinetuneResult(Path("a"), Path("b"), Path("c"), None, "top1", Training(rows, 1, {}, stopped_early=False))
    assert made.worse_by == 4.5
    assert replace(made, higher_is_better=False).worse_by == 0
    assert replace(made, training=replace(made.training, rows=rows[:2])).worse_by == 0
