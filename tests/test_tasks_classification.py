"""The protocol's parts that all tasks share, and image classification."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nmconvert.cli.common import TASKS as NAMES
from nmconvert.errors import DataError, UsageError
from nmconvert.evaluate import evaluate
from nmconvert.tasks import TASKS, build_task
from nmconvert.tasks.base import Samples, held_out
from nmconvert.tasks.classification import Classification
from nmconvert.tasks.distillation import kl
from nmconvert.tasks.images import find_images, read_image
from nmconvert.tasks.labelled import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(20) % 3


class Flat(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(192, classes)

    def forward(self, images):
        return self.linear(images.flatten(1))


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    np.savez(tmp_path / "data.npz", images=PIXELS, labels=LABELS)
    return str(tmp_path / "data.npz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for number, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        part = tmp_path / "images" / ("val" if number % 4 == 0 else "train") / f"class{label}"
        part.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(part / f"{number:02d}.png")
    return tmp_path / "images"


def read_all(data: str, split, **settings):
    task = Classification(**settings)
    return task.collate([*task.dataset(data, split=split, augment=False)])


def test_the_command_line_knows_all_tasks():
    assert list(NAMES) == list(TASKS)


def test_settings_are_read_as_their_field_says():
    task = build_task("classification", {"mean": "0.5,0.25,0", "size": "64", "flip": "off"})
    assert (task.mean, task.size, task.flip) == ((0.5, 0.25, 0.0), 64, False)


@pytest.mark.parametrize(
    "settings",
    [
        {"colour": "red"},
        {"size": "big"},
        {"flip": "maybe"},
        {"size": "0"},
        {"temperature": "0"},
        {"temperature": "nan"},
        {"std": "0.5,0,0.5"},
        {"mean": "123.7,116.8,103.9"},
        {"crop": "-1"},
        {"label_smoothing": "2"},
        {"mean": "0.5,0.5"},
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        build_task("classification", settings)


@pytest.mark.parametrize("task", ["classification", "detection", "translation", "language_model"])
def test_settings_at_their_limits_are_taken(task):
    limits = {"classification": {"crop": "0"}, "detection": {"zoom": "1"}, "translation": {"label_smoothing": "1"}}
    settings = limits.get(task, {"block": "1"})
    assert {name: getattr(build_task(task, settings), name) for name in settings} == {n: float(v) for n, v in settings.items()}


def test_an_empty_size_is_none():
    assert build_task("classification", {"size": ""}).size is None


def test_an_unknown_task_lists_the_known():
    with pytest.raises(UsageError, match="classification"):
        build_task("poetry")


def test_held_out_parts_are_disjoint_and_complete():
    train, val = held_out(25, "train"), held_out(25, "val")
    assert sorted([*train, *val]) == [*held_out(25, "test")] == [*range(25)]
    assert [*val] == [9, 19]


def test_arrays_are_normalised_and_keep_their_order(arrays):
    batch = read_all(arrays, "test", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    goal = (PIXELS / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    assert torch.allclose(batch.inputs.double(), torch.tensor(goal.transpose(0, 3, 1, 2)), atol=1e-5)
    assert batch.targets["labels"].tolist() == LABELS.tolist()
    assert batch.size == 20


def test_named_parts_are_used(tmp_path):
    path = tmp_path / "parts.npz"
    np.savez(path, train_images=PIXELS[:15], train_labels=LABELS[:15], val_images=PIXELS[15:], val_labels=LABELS[15:])
    assert [len(Classification().dataset(str(path), split=s, augment=False)) for s in ("train", "val", "test")] == [
        15,
        5,
        5,
    ]


@pytest.mark.parametrize("name", ["d/{}.npz", "d_{}.npz"])
def test_parts_may_be_files_of_their_own(tmp_path, name):
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / name.format("train"), images=PIXELS[:15], labels=LABELS[:15])
    np.savez(tmp_path / name.format("test"), images=PIXELS[15:], labels=LABELS[15:])
    task = Classification()
    assert [len(task.dataset(str(tmp_path / "d"), split=s, augment=False)) for s in ("train", "val", "test")] == [15, 5, 5]


def test_float_arrays_are_taken_as_they_are(tmp_path):
    pixels = np.random.default_rng(1).normal(size=(6, 1, 5, 7)).astype(np.float32)
    np.savez(tmp_path / "f.npz", images=pixels, labels=np.zeros(6, int))
    assert np.array_equal(read_all(str(tmp_path / "f.npz"), "test").inputs.numpy(), pixels)


def test_gray_images_become_as_many_channels_as_there_are_means(tmp_path):
    np.savez(tmp_path / "g.npz", images=PIXELS[..., 0], labels=LABELS)
    assert read_all(str(tmp_path / "g.npz"), "test").inputs.shape == (20, 3, 8, 8)
    assert read_all(str(tmp_path / "g.npz"), "test", mean=(0.0,), std=(1.0,)).inputs.shape == (20, 1, 8, 8)


def test_a_folder_has_sorted_classes_and_parts(folder):
    batch = read_all(str(folder), "val")
    assert sorted(batch.targets["labels"].tolist()) == sorted(LABELS[::4].tolist())
    assert len(Classification().dataset(str(folder), split="train", augment=True)) == 15


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_measured_part_has_many_names(folder, name):
    (folder / "val").rename(folder / name)
    for split in ("val", "test"):
        assert sorted(read_all(str(folder), split).targets["labels"].tolist()) == sorted(LABELS[::4].tolist())


@pytest.mark.parametrize(("missing", "split"), [("val", "test"), ("val", "val"), ("train", "train")])
def test_parts_are_no_classes(folder, missing, split):
    (folder / missing).rename(folder.parent / "elsewhere")
    other = "train" if missing == "val" else "val"
    with pytest.raises(DataError, match=rf"images: has the part '{other}' and none called {split}.*{other} itself"):
        open_source(str(folder), split)


def test_a_flat_folder_has_no_labels(folder):
    flat = read_all(str(folder / "val" / "class0"), "test")
    assert not flat.labelled
    with pytest.raises(DataError, match="no labels"):
        Classification().loss(Flat(), flat)
    assert Classification().distill(Flat(), Flat(), flat) > 0


def test_a_teacher_labels_what_has_no_labels(folder):
    flat, teacher = read_all(str(folder / "val" / "class0"), "test"), Flat()
    taught = Classification().taught(teacher, flat)
    assert taught.labelled
    assert Classification().evaluate(Classification().predictor(teacher), [taught])["top1"] == 100
    assert taught.targets["labels"].tolist() == teacher(flat.inputs).argmax(1).tolist()


def test_gray_files_are_gray_for_a_gray_model(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number, pixels in enumerate(PIXELS):
        image.fromarray(pixels[..., 0]).save(tmp_path / f"{number:02d}.png")
    gray = read_all(str(tmp_path), "test", mean=(0.0,), std=(1.0,))
    assert torch.equal(gray.inputs, torch.from_numpy(PIXELS[..., 0])[:, None] / 255)
    assert read_all(str(tmp_path), "test", mean=(0.0,), std=(1.0,), size=5).inputs.shape == (20, 1, 5, 5)
    assert read_all(str(tmp_path), "test").inputs.shape == (20, 3, 8, 8)
    image.fromarray(PIXELS[0]).save(tmp_path / "00.png")  # one of them in colour
    assert read_all(str(tmp_path), "test").inputs.shape == (20, 3, 8, 8)


def test_boxes_are_no_classes(folder):
    (folder / "train.json").write_text("{}")
    with pytest.raises(DataError, match=r"has boxes \(train\.json\).*--task detection"):
        open_source(str(folder), "train")


def test_large_images_are_resized_and_cropped(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number, size in enumerate([(300, 200), (120, 260), (500, 500)]):
        (tmp_path / "d" / "a").mkdir(parents=True, exist_ok=True)
        image.new("RGB", size, (255, 0, 0)).save(tmp_path / "d" / "a" / f"{number}.jpg")
    assert read_all(str(tmp_path / "d"), "test").inputs.shape == (3, 3, 224, 224)
    task = Classification(size=128)
    augmented = task.collate([*task.dataset(str(tmp_path / "d"), split="test", augment=True)])
    assert augmented.inputs.shape == (3, 3, 128, 128)


def test_augmentation_depends_on_seed_epoch_and_index_alone(arrays):
    data = Classification().dataset(arrays, split="train", augment=True)
    data.set_epoch(3, seed=7)
    first = [data[i][0] for i in range(len(data))]
    assert all(np.array_equal(data[i][0], first[i]) for i in reversed(range(len(data))))
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(copy[4][0], first[4])
    data.set_epoch(4, seed=7)
    assert any(not np.array_equal(data[i][0], first[i]) for i in range(len(data)))


def test_the_loop_over_samples_ends():
    assert [*Samples(lambda i: i, 3)] == [0, 1, 2]


def test_an_unreadable_image_is_named_or_skipped(folder):
    bad = next((folder / "val" / "class0").iterdir())
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=rf"{bad.name}.*--skip-bad"):
        read_all(str(folder), "val")
    with pytest.warns(UserWarning, match=bad.name):
        assert read_all(str(folder), "val", skip_bad=True).size == 4
    train_bad = next((folder / "train" / "class1").iterdir())
    train_bad.write_bytes(b"")
    with pytest.warns(UserWarning, match=train_bad.name):
        assert read_all(str(folder), "train", skip_bad=True).size == 15


def test_loss_is_cross_entropy_and_metrics_are_counted(arrays):
    task, model = Classification(), Flat().eval()
    batch = read_all(arrays, "test")
    logits = model(batch.inputs).detach()
    assert torch.allclose(task.loss(model, batch), nn.functional.cross_entropy(logits, batch.targets["labels"]))
    loader = DataLoader(task.dataset(arrays, split="test", augment=False), 7, collate_fn=task.collate)
    result = task.evaluate(task.predictor(model), loader)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1).numpy() == LABELS).mean())
    assert result["top5"] == 100
    assert result["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, batch.targets["labels"])), rel=1e-5)


def test_metrics_of_several_ranks_are_joined(arrays):
    task, model = Classification(), Flat().eval()
    data = task.dataset(arrays, split="test", augment=False)
    whole = task.evaluate(task.predictor(model), DataLoader(data, 20, collate_fn=task.collate))
    parts: list[list] = []
    for numbers in (range(0, 20, 2), range(1, 20, 2)):
        loader = DataLoader(torch.utils.data.Subset(data, numbers), 4, collate_fn=task.collate)
        joined = task.evaluate(task.predictor(model), loader, gather=lambda mine: parts.extend(mine) or parts)
    assert joined == pytest.approx(whole)


def test_distillation_is_nothing_between_equals_and_matches_its_formula():
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    p, q = (b / 3).softmax(1), (a / 3).softmax(1)
    assert torch.allclose(kl(a, b, 3.0), 9 * (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    assert kl(a, a, 2.0) == 0


def test_hugging_face_outputs_are_understood():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    task = Classification()
    batch = task.collate([(PIXELS[0], 0), (PIXELS[1], 2)])
    assert task.loss(transformers.ViTForImageClassification(config), batch) > 0


@pytest.mark.parametrize(
    ("classes", "message"), [(2, "label 2 is out of range: the model has 2 classes"), (None, "needs .batch, classes.")]
)
def test_what_does_not_fit_the_model_is_said(arrays, classes, message):
    model = Flat(classes) if classes else nn.Identity()
    with pytest.raises(DataError, match=message):
        Classification().loss(model, read_all(arrays, "test"))


def write(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_data_that_is_none_is_refused_with_its_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 damaged")
    cases = {
        str(tmp_path / "nowhere"): "no such data",
        str(tmp_path / "empty"): "no images",
        str(tmp_path / "text.txt"): "folder of images",
        str(tmp_path / "broken.npz"): "no readable .npz",
        write(tmp_path / "a.npz", ids=np.zeros(3)): "no array 'images'.*ids",
        write(tmp_path / "b.npz", images=PIXELS, labels=LABELS[:4]): "4|labels",
        write(tmp_path / "c.npz", images=PIXELS.astype(np.int64)): "uint8 .N, H, W, C.",
        write(tmp_path / "d.npz", images=np.zeros((0, 8, 8, 3), np.uint8)): "no images",
        "json:__name__": "is a str; name a callable, which gets 'test' and returns a dataset",
    }
    for data, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_source(data, "test")
    programs = {
        "json:no_such_thing": "there is no 'no_such_thing' in json",
        "no_such_package_at_all:data": "there is no module 'no_such_package_at_all'; install it, run from the folder",
        "no_such_file.py:data": r"there is no file no_such_file\.py",
    }
    for data, message in programs.items():
        with pytest.raises(UsageError, match=message):
            open_source(data, "test")


def test_a_callable_gives_any_dataset(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef data(split):\n    return [(torch.full((3, 2, 2), float(i)), i) for i in range(len(split))]\n"
    )
    batch = read_all(f"{tmp_path / 'mine.py'}:data", "train")
    assert batch.targets["labels"].tolist() == [0, 1, 2, 3, 4]
    assert batch.inputs[3].unique().tolist() == [3.0]


def test_a_callable_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "beside_mine.py").write_text("LENGTH = 4\n")
    (tmp_path / "mine_here.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Data:\n    split: str\n"
        "    def __len__(self):\n        import beside_mine\n        return beside_mine.LENGTH\n"
        "    def __getitem__(self, index):\n        return index, index\n"
    )
    monkeypatch.chdir(tmp_path)
    for spec in ("mine_here:Data", "mine_here.py:Data"):
        assert len(open_source(spec, "test")) == 4


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("1 +", "mine.py:data: importing it failed with SyntaxError"),
        ("open('no such file')", "importing it failed with FileNotFoundError: .*no such file"),
        ("import torchvision_of_old", "it imports 'torchvision_of_old', which is not installed"),
        ("def data(split):\n    raise KeyError(split)", "calling it failed with KeyError: 'test'; --debug shows where"),
    ],
)
def test_a_program_that_fails_is_one_line(tmp_path, program, message):
    (tmp_path / "mine.py").write_text(program)
    with pytest.raises(DataError, match=message):
        open_source(f"{tmp_path / 'mine.py'}:data", "test")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_class_has_the_same_number_in_all_parts(folder, split):
    (folder / "val" / "class1").rename(folder.parent / "elsewhere")
    paths, labels = zip(*open_source(str(folder), split).read.args[0], strict=True)
    assert [path.parent.name for path in paths] == [f"class{label}" for label in labels]
    assert set(labels) == ({0, 1, 2} if split == "train" else {0, 2})


def test_parts_may_be_written_in_other_ways(folder):
    (folder / "train").rename(folder / "Training")
    (folder / "val").rename(folder / "TESTING")
    assert [len(open_source(str(folder), split)) for split in ("train", "val", "test")] == [15, 5, 5]


def test_a_class_that_holds_classes_is_named(folder):
    (folder / "train").rename(folder / "Bilder")
    (folder / "val").rename(folder / "mehr")
    with pytest.raises(DataError, match=r"Bilder: holds no images, but 3 folders of them, such as 'class0'.*name it train"):
        open_source(str(folder), "test")
    (folder / "Bilder" / "class0").rename(folder.parent / "tiny")  # but Tiny ImageNet has them in <class>/images
    (folder.parent / "tiny").rename(folder / "mehr" / "images")
    for name in ("class0", "class1", "class2"):
        (folder / "mehr" / name).rename(folder.parent / name)
    (folder / "Bilder").rename(folder.parent / "Bilder")
    assert {label for _, label in open_source(str(folder), "test").read.args[0]} == {0}


def test_hidden_folders_hold_no_images(folder):
    before = len(open_source(str(folder), "train"))
    (folder / "val" / "class0").rename(folder / "train" / "class0" / ".ipynb_checkpoints")
    assert len(open_source(str(folder), "train")) == before


def test_all_parts_are_sized_by_the_first_image_to_train_on(folder):
    image = pytest.importorskip("PIL.Image")
    for path in (folder / "val").rglob("*.png"):
        image.new("RGB", (300, 200)).save(path)
    assert [read_all(str(folder), split).inputs.shape[2:] for split in ("train", "val", "test")] == [(8, 8)] * 3


def gray_files(folder: Path):
    """A ramp in gray, as Pillow writes it in several ways, with its name and what is to be read of it."""
    image = pytest.importorskip("PIL.Image")
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = ramp.astype(np.uint16) * 257
    (folder / "wide.pgm").write_bytes(b"P5 16 16 65535\n" + wide.astype(">u2").tobytes())
    image.fromarray(wide).save(folder / "wide.png")
    image.fromarray(wide).save(folder / "wide.tiff")
    image.fromarray(ramp).save(folder / "narrow.png")
    image.fromarray(ramp).convert("P").save(folder / "palette.png")
    image.fromarray(ramp).save(folder / "gray.gif")
    return ramp


def test_gray_is_gray_however_it_is_written(tmp_path):
    ramp, files = gray_files(tmp_path), find_images(tmp_path)
    assert len(files) == 6
    for file in files:
        assert np.array_equal(read_image(file, keep_gray=True), ramp[..., None]), file
        assert np.array_equal(read_image(file), np.stack([ramp] * 3, 2)), file


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats .Pillow's mode F"), (np.int32, "integers of 32 bits")])
def test_pixels_that_are_no_brightness_are_said(tmp_path, dtype, kind):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=rf"a\.tiff: its pixels are {kind}.*convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")


ITEMS = """
import numpy as np, torch
from PIL import Image
gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
colour = np.stack([gray, gray + 1, gray + 2], 2)
class Data:
    def __init__(self, item): self.item = item
    def __len__(self): return 3
    def __getitem__(self, index): return self.item()
def pillow(split): return Data(lambda: (Image.fromarray(colour), 1))
def pillow_gray(split): return Data(lambda: (Image.fromarray(gray), 1))
def array_gray(split): return Data(lambda: (gray, 1))
def tensor(split): return Data(lambda: (torch.from_numpy(colour).permute(2, 0, 1), torch.tensor(1)))
def double(split): return Data(lambda: (torch.ones(3, 8, 8, dtype=torch.float64), np.int64(1)))
def onehot(split): return Data(lambda: (gray, torch.eye(10)[1]))
def word(split): return Data(lambda: (gray, "seven"))
def none(split): return Data(lambda: (gray, None))
def part(split): return Data(lambda: (gray, 7.7))
def broken(split): return Data(lambda: 1 / 0)
def row(split): return Data(lambda: (gray[0], 1))
"""


@pytest.mark.parametrize("name", ["pillow", "pillow_gray", "array_gray", "tensor", "double"])
def test_items_of_a_callable_are_made_images(tmp_path, name):
    pytest.importorskip("PIL.Image")
    (tmp_path / "mine.py").write_text(ITEMS)
    batch = read_all(f"{tmp_path / 'mine.py'}:{name}", "test", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert batch.targets["labels"].tolist() == [1, 1, 1]
    assert (batch.inputs.dtype, batch.inputs.shape) == (torch.float32, (3, 3, 8, 8))
    first = torch.arange(64).reshape(8, 8)
    steps = [0, 1, 2] if name in ("pillow", "tensor") else [0, 0, 0]
    goal = torch.ones(3, 8, 8) if name == "double" else torch.stack([first + step for step in steps]) / 255
    assert torch.equal(batch.inputs[0], goal)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onehot", r"sample 0 has the label tensor\(\[0., 1., .*: one whole number"),
        ("word", "sample 0 has the label 'seven'"),
        ("none", "sample 0 has the label None"),
        ("part", "sample 0 has the label 7.7"),
        ("broken", "reading sample 0 failed with ZeroDivisionError: division by zero; --debug"),
        ("row", r"sample 0 is uint8 \[8\], and no image"),
    ],
)
def test_an_item_of_a_callable_that_is_none_is_one_line(tmp_path, name, message):
    pytest.importorskip("PIL.Image")
    (tmp_path / "mine.py").write_text(ITEMS)
    with pytest.raises(DataError, match=message):
        read_all(f"{tmp_path / 'mine.py'}:{name}", "test")


def test_why_there_are_no_labels_is_said(tmp_path):
    typo = write(tmp_path / "typo.npz", images=PIXELS, label=LABELS)
    with pytest.raises(DataError, match="has no 'labels' but images, label: is 'label' what"):
        open_source(typo, "test")
    parts = write(tmp_path / "parts.npz", train_images=PIXELS, train_labels=LABELS)
    with pytest.raises(DataError, match=r"has train_images, but none called test_images or .* or validation_images"):
        open_source(parts, "test")
    some = read_all(write(tmp_path / "some.npz", images=PIXELS, labels=LABELS - (np.arange(20) == 3)), "test")
    with pytest.raises(DataError, match="an image has the label -1, others have one of 0 or more"):
        Classification().loss(Flat(), some)
    with pytest.raises(DataError, match="an image has the label -1"):
        Classification().evaluate(Classification().predictor(Flat()), [some])


def test_what_was_skipped_is_not_counted(folder, tmp_path):
    next((folder / "val").rglob("*.png")).write_bytes(b"damaged")
    (tmp_path / "flat.py").write_text(
        "from torch import nn\ndef flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).state_dict(), tmp_path / "flat.pt")
    task = Classification(skip_bad=True)
    with pytest.warns(UserWarning, match="skipped"):
        found = evaluate(tmp_path / "flat.pt", task, str(folder), model=f"{tmp_path / 'flat.py'}:flat")
    assert found.samples == 4
