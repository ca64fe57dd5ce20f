"""``make demo``: prune, fine-tune, export and verify a small trained model, and measure it at each step.

``make demo TASK=detection`` (or segmentation, language_model, translation) does it for another task. Files land in ``demo/``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nmconvert.report import new_table, size

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """One sample model: ``files`` are copied from this folder, ``data`` is one of them or a folder that ``maker`` writes."""

    name: str
    model: str
    files: tuple[str, ...]
    data: str
    inputs: str
    maker: str = ""
    task: str = ""
    epochs: int = 3


DEMOS = {
    "classification": Demo(
        "digits", "digits.py:digits", ("digits.pt", "digits.py", "digits.npz"), "digits.npz", "--input 1,1,8,8"
    ),
    "detection": Demo(
        name="detector",
        model="sample_models.detector:detector",
        files=("detector.pt",),
        data="scenes",
        inputs="--input 1,3,64,64",
        maker="sample_models.digit_scenes",
        task=" --task detection",
        epochs=6,
    ),
    "segmentation": Demo(
        name="segmenter",
        model="sample_models.segmenter:segmenter",
        files=("segmenter.pt",),
        data="scenes",
        inputs="--input 1,3,64,64",
        maker="sample_models.digit_scenes",
        task=" --task segmentation",
        epochs=4,
    ),
    "language_model": Demo(
        name="gpt",
        model="sample_models.gpt:gpt",
        files=("gpt.pt",),
        data="stdlib",
        inputs="--input input_ids=1,128:int64",
        maker="sample_models.stdlib_text --excerpt",
        task=" --task language_model --task-arg block=128",
        epochs=1,
    ),
    "translation": Demo(
        name="translator",
        model="sample_models.translator:translator",
        files=("translator.pt", "tokenizer.json"),
        data="sentences",
        inputs="--input input_ids=2,12:int64 --input attention_mask=2,12:int64 --input decoder_input_ids=2,9:int64"
        " --dynamic 0=batch --dynamic 1=length",
        maker="sample_models.sentences",
        task=" --task translation --task-arg source=en --task-arg target=de --task-arg tokenizer=tokenizer.json",
        epochs=1,
    ),
}


def main(task: str = "classification") -> None:
    """Run every step for ``task`` in a fresh folder ``demo``; raises CalledProcessError where one fails."""
    if task not in DEMOS:
        sys.exit(f"no demo for '{task}': TASK is one of {', '.join(DEMOS)}")
    demo = DEMOS[task]
    folder = HERE.parent / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in demo.files:
        shutil.copy(HERE / file, folder)
    console = Console()
    if demo.maker:
        run(f"{demo.maker} {demo.data}", folder)
    for why, command in steps(demo):
        console.print(Text.assemble("\n", (why, "italic"), "\n", ("$ ", "bold green"), (command, "bold")))
        run(command, folder)
    console.print()
    console.print(comparison(demo, folder))


def steps(demo: Demo) -> list[tuple[str, str]]:
    """What each step is for, and its command line."""
    pruned, tuned = f"{demo.name}.nm2-4", f"{demo.name}.nm2-4.ft"
    return [
        (
            "Keep 2 of every 4 weights, those of largest magnitude.",
            f"nmconvert prune {demo.name}.pt --nm 2:4 --model {demo.model}",
        ),
        ("Train back what that cost.", f"nmconvert finetune {pruned}.pt --data {demo.data}{demo.task} --epochs {demo.epochs}"),
        ("Write an ONNX file that holds only what was kept.", f"nmconvert export {tuned}.pt --onnx {demo.inputs}"),
        ("Prove that it is what it says.", f"nmconvert verify {tuned}.onnx --against {tuned}.pt"),
    ]


def comparison(demo: Demo, folder: Path) -> Table:
    """Size and metric of the file that each step wrote, as ``nmconvert eval`` measures them."""
    what = {
        f"{demo.name}.pt": "as it was trained",
        f"{demo.name}.nm2-4.pt": "pruned to 2:4",
        f"{demo.name}.nm2-4.ft.pt": "fine-tuned",
        f"{demo.name}.nm2-4.ft.onnx": "the same, compressed, in onnxruntime",
    }
    measured = {}
    for name in what:
        command = f"nmconvert eval {name} --data {demo.data} --model {demo.model}{demo.task} --json"
        measured[name] = json.loads(run(command, folder, capture=True))
    metric = measured[f"{demo.name}.pt"]["metric"]
    table = new_table("What happened", "file", "what it is", "size", metric, right=("size", metric))
    for name, result in measured.items():
        table.add_row(name, what[name], size((folder / name).stat().st_size), f"{result['metrics'][metric]:.2f}")
    return table


def run(command: str, folder: Path, *, capture: bool = False) -> str:
    """Run ``command``, a module and its arguments, in ``folder`` with this Python; what it printed, where that is asked for."""
    program = [sys.executable, "-m", *shlex.split(command)]
    paths = filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))  # the checkout, installed or not
    one_thread = {"OMP_NUM_THREADS": "1"}  # the models are so small that threads would only wait for each other
    environment = one_thread | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    done = subprocess.run(
        program, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


if __name__ == "__main__":
    main(*sys.argv[1:])
