"""Fine-tuning on real data, all five tasks: dense, one-shot, and after the same few epochs of each method.

    python -m benchmarks.finetune WORK               # all that is not there yet, in the order of `QUEUE`
    python -m benchmarks.finetune WORK resnet20      # of these cases alone
    python -m benchmarks.finetune WORK --table       # what is there, in Markdown
    python -m benchmarks.finetune WORK --commands    # how it was made

Each result is what `nmconvert prune`, `finetune` and `eval` print: a file in ``WORK/results``, with the commands. What is
there is not run again, a run that was killed is resumed, and several of these scripts share the queue. Data come from
``WORK/data`` and dense models from ``WORK``, or are made there (`benchmarks.data`, `benchmarks.dense`).

No label is used: the dense model is the teacher. Settings of ResNets were chosen on ``cifar10_choice``, which holds training
images alone; those of AdamW are what `nmconvert finetune` takes by itself, but for some learning rates. The figures are of
test parts, or of validation parts where there are no others.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, dense
from nmconvert.cli import group

SGD = ("--precision", dense.PRECISION, "--freeze-masks", "0.3", "--lr", "0.01", "--decay", "0.1")
ADAMW = ("--optimizer", "adamw", "--precision", dense.PRECISION, "--freeze-masks", "0.3", "--decay", "10")
TRAINED = "benchmarks.models.trained:"
METRICS = {
    "classification": ("top1", "top-1 ↑"),
    "detection": ("ap", "AP ↑"),
    "segmentation": ("mask_ap", "mask AP ↑"),
    "translation": ("bleu", "BLEU ↑"),
    "language_model": ("perplexity", "perplexity ↓"),
}


@dataclass(frozen=True)
class Case:
    """A model with its data: ``checkpoint`` is a name in the data folder's checkpoints, or None if it is trained here."""

    title: str
    data: str
    task: str
    model: str
    checkpoint: str | None
    training: tuple[str, ...]
    settings: tuple[str, ...] = ()
    tested: bool = False
    """The data has a test part beside the validation part."""


def resnet(depth: int) -> Case:
    """A ResNet of CIFAR-10."""
    file, model = data.CHECKPOINTS[f"resnet{depth}"], f"sample_models.resnet:resnet{depth}"
    training = ("--batch", "128", *SGD)
    return Case(f"ResNet-{depth}", "cifar10", "classification", model, file, training, ("temperature=4",))


CASES = {
    "resnet20": resnet(20),
    "resnet32": resnet(32),
    "resnet56": resnet(56),
    "stories": Case(
        "stories260K", "tinystories_told", "language_model", "benchmarks.models.llama:stories260k", "stories260K.pt",
        ("--batch", "8", "--lr", "3e-3", "--clip", "1", *ADAMW, "--precision", "fp32"), ("block=512",), tested=True,
    ),
    "tinyshakespeare": Case(
        "GPT", "tinyshakespeare", "language_model", TRAINED + "tinyshakespeare", None,
        ("--batch", "24", "--lr", "2e-3", "--clip", "1", *ADAMW), ("block=128",),
    ),
    "multi30k": Case(
        "Transformer", "multi30k", "translation", TRAINED + "multi30k", None,
        ("--batch", "64", "--lr", "1e-3", "--clip", "1", *ADAMW, "--decay", "3"), ("max_length=63",), tested=True,
    ),
    "bccd": Case(
        "detector", "bccd", "detection", TRAINED + "bccd", None,
        ("--batch", "8", "--lr", "1e-3", *ADAMW, "--ema", "0.98"), tested=True,
    ),
    "nuclei": Case(
        "segmenter", "nuclei", "segmentation", TRAINED + "nuclei", None,
        ("--batch", "6", "--lr", "2e-3", *ADAMW, "--ema", "0.98"),
    ),
    "fastestdet": Case(
        "FastestDet", "coco128_halves", "detection", "benchmarks.models.fastestdet:fastestdet",
        "fastestdet_coco_ap05_0.2532.pth", ("--batch", "8", "--lr", "2e-3", *ADAMW),
    ),
}  # fmt: skip

METHODS = ("sr-ste", "ste", "fixed-mask")
COLUMNS = {"magnitude": "magnitude", "calibrated": "calibrated", "sr-ste": "SR-STE", "ste": "STE", "fixed-mask": "fixed mask"}


@dataclass(frozen=True)
class Run:
    """One figure of the table; ``method`` is ``dense``, ``magnitude``, ``calibrated``, or one of `METHODS` with epochs."""

    case: str
    method: str
    pattern: str = "2:4"
    epochs: int = 0
    axis: str = "channel"

    @property
    def name(self) -> str:
        """Of its files."""
        if self.method == "dense":
            return f"{self.case}.dense"
        return f"{self.case}.{self.pattern.replace(':', '-')}.{self.axis}.{self.method}.{self.epochs}"


def trained(case: str, epochs: int, pattern: str = "2:4", methods: tuple[str, ...] = METHODS) -> list[Run]:
    """The same budget for each method."""
    return [Run(case, method, pattern, epochs) for method in methods]


PATTERNS = ("1:4", "4:8", "2:8", "1:16")
EPOCHS = {
    "resnet56": 1, "resnet32": 1, "stories": 4, "tinyshakespeare": 2, "multi30k": 1, "bccd": 16, "nuclei": 8, "fastestdet": 40,
}  # fmt: skip
"""Of 2:4, as many as make a run of some minutes on one core."""
QUEUE = [  # what tells something, the most important first
    *(Run(case, "dense") for case in CASES),
    *trained("resnet20", 3, methods=("sr-ste",)),
    *trained("resnet20", 5, "1:4", ("sr-ste",)),
    *(Run(case, "magnitude") for case in ("bccd", "stories", "multi30k")),
    *(run for case, epochs in EPOCHS.items() for run in trained(case, epochs, methods=("sr-ste",))),
    *(run for case, epochs in EPOCHS.items() for run in trained(case, epochs, methods=("ste", "fixed-mask"))),
    *trained("resnet20", 1),
    *(run for p in PATTERNS for run in (*trained("resnet20", 1, p, ("sr-ste",)), *trained("stories", 2, p, ("sr-ste",)))),
    *(Run("resnet20", "sr-ste", pattern, 1, "kernel") for pattern in ("2:4", "1:4")),
    *(Run(case, "calibrated") for case in ("stories", "bccd", "tinyshakespeare", "fastestdet", "nuclei")),
]


class Bench:
    """The folder ``work``, and the commands that fill it."""

    def __init__(self, work: Path) -> None:
        self.work, self.commands = work, list[str]()
        (work / "results").mkdir(parents=True, exist_ok=True)

    def result(self, run: Run) -> Path:
        """The file with what came of it."""
        return self.work / "results" / f"{run.name}.json"

    def ready(self, run: Run) -> bool:
        """Not there yet, and can be made: its dense model is there."""
        return not self.result(run).exists() and (run.method == "dense" or self.result(Run(run.case, "dense")).exists())

    def measure(self, run: Run) -> None:
        """Prune, train and evaluate; write the result."""
        began, self.commands = time.process_time(), []
        line: dict[str, Any]
        if run.method == "dense":
            if CASES[run.case].checkpoint is None:
                self.commands.append(f"python -m benchmarks.dense {self.work} {run.case}")
            line = {"metrics": self.evaluate(run, self.checkpoint(run.case))}
        elif run.method in METHODS:
            line = self.finetune(run, self.prune(run))
        else:
            line = {"metrics": self.evaluate(run, self.prune(run))}
        line = {**asdict(run), "seconds": time.process_time() - began, **line, "commands": self.commands}
        self.result(run).write_text(json.dumps(line, indent=1))

    def prune(self, run: Run) -> Path:
        """The pruned checkpoint."""
        output = self.work / f"{run.name}.pt"
        said = ["prune", str(self.checkpoint(run.case)), "--nm", run.pattern, "--axis", run.axis, "--output", str(output)]
        said += ["--model", CASES[run.case].model]
        if run.method == "calibrated":
            said += ["--calib", str(self.folder(run.case)), "--samples", "128", *self.task(run.case)]
        self.nmconvert(*said)
        return output

    def finetune(self, run: Run, pruned: Path) -> dict[str, Any]:
        """Train the pruned checkpoint: every row of the table that `nmconvert finetune` prints, and the metrics at the end."""
        case, output = CASES[run.case], self.work / f"{run.name}.ft.pt"
        said = ["finetune", str(pruned), "--data", str(self.folder(run.case)), *self.task(run.case), "--from-dense"]
        said += ["--method", run.method, "--epochs", str(run.epochs), *case.training, "--save-minutes", "3"]
        rows = self.nmconvert(*said, "--resume", "--output", str(output))["rows"]
        return {"metrics": self.evaluate(run, output) if case.tested else rows[-1]["metrics"], "rows": rows}

    def evaluate(self, run: Run, file: Path) -> dict[str, float]:
        """All metrics on the test part."""
        said = ["eval", str(file), "--data", str(self.folder(run.case)), *self.task(run.case)]
        metrics: dict[str, float] = self.nmconvert(*said, "--model", CASES[run.case].model)["metrics"]
        return metrics

    def nmconvert(self, *arguments: str) -> dict[str, Any]:
        """What ``python -m nmconvert ARGUMENTS --json`` prints."""
        self.commands.append(shlex.join(["python", "-m", "nmconvert", *arguments]))
        printed = StringIO()
        with redirect_stdout(printed):
            group.main([*arguments, "--json"], prog_name="nmconvert", standalone_mode=False)
        result: dict[str, Any] = json.loads(printed.getvalue())
        return result

    def task(self, name: str) -> list[str]:
        """The options that say what the model does."""
        case = CASES[name]
        settings = [*case.settings]
        if case.task == "translation":
            settings.append(f"tokenizer={self.folder(name) / 'tokenizer.json'}")
        return ["--task", case.task, *(part for text in settings for part in ("--task-arg", text))]

    def folder(self, name: str) -> Path:
        """The data, made if they are not there."""
        if CASES[name].data != "cifar10":
            return dense.prepared(self.work, CASES[name].data)
        file = self.work / "data" / "cifar10.npz"
        if not file.exists():
            data.cifar10(file)
        return file

    def checkpoint(self, name: str) -> Path:
        """The dense checkpoint, trained if it is not there."""
        file, ours = CASES[name].checkpoint, self.work / f"{name}.pt"
        if file is not None:
            return data.ROOT / "checkpoints" / file
        if not ours.exists():
            dense.train(name, self.work)
        return ours


def work_through(bench: Bench, runs: Sequence[Run]) -> None:
    """Measure what is ready and nobody else is at, until nothing is left."""
    while any(not bench.result(run).exists() for run in runs):
        for run in filter(bench.ready, runs):
            with claimed(bench.result(run).with_suffix(".claim")) as ours:
                if ours and bench.ready(run):
                    print(time.strftime("%H:%M:%S"), run.name, flush=True)
                    bench.measure(run)
                    print(time.strftime("%H:%M:%S"), bench.result(run).read_text()[:400], flush=True)
                    break
        else:
            time.sleep(20)


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether this process has ``file`` to itself; the lock goes with the process, however that ends."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def table(bench: Bench) -> str:
    """What is there: a row for each model, pattern, axis and number of epochs, a column for each method."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for run in QUEUE:
        if run.method != "dense" and bench.result(run).exists():
            result = json.loads(bench.result(run).read_text())
            row = rows.setdefault((run.case, run.pattern, run.axis, run.epochs), {})
            row[run.method] = f"{figure(run.case, result['metrics'])} ({result['seconds']:.0f} s)"
            if result.get("rows") and not CASES[run.case].tested:
                row["magnitude"] = figure(run.case, result["rows"][1]["metrics"])
    heads = ["model, data", "metric", "dense", "pattern", "axis", "epochs", *COLUMNS.values()]
    lines = [heads, ["---"] * len(heads)]
    for (name, pattern, axis, epochs), row in rows.items():
        case, whole = CASES[name], json.loads(bench.result(Run(name, "dense")).read_text())
        about = [
            f"{case.title}, {case.data}",
            METRICS[case.task][1],
            figure(name, whole["metrics"]),
            pattern,
            axis,
            str(epochs),
        ]
        lines.append(about + [row.get(method, "") for method in COLUMNS])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(case: str, metrics: dict[str, float]) -> str:
    """The metric that decides, as it is written."""
    return f"{metrics[METRICS[CASES[case].task][0]]:.2f}"


def main() -> None:
    """Run what is asked for, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for data, models and results")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    asked = parser.parse_args()
    bench, runs = Bench(asked.work), [run for run in QUEUE if run.case in (asked.cases or CASES)]
    if asked.table:
        print(table(bench))
    elif asked.commands:
        for run in filter(lambda run: bench.result(run).exists(), runs):
            print(f"# {run.name}", *json.loads(bench.result(run).read_text())["commands"], sep="\n")
    else:
        torch.set_num_threads(1)
        work_through(bench, runs)


if __name__ == "__main__":
    main()
