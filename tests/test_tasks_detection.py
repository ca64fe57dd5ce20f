"""Object detection and instance segmentation: formats, the metric, and the conventions of the models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nmconvert.errors import DataError
from nmconvert.tasks.coco_ap import average_precision, record
from nmconvert.tasks.detection import Detection, map_distance
from nmconvert.tasks.scenes import Scene, decode, encode, open_scenes
from nmconvert.tasks.segmentation import Segmentation

Image = pytest.importorskip("PIL.Image")
pycocotools = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

HEIGHT, WIDTH = 30, 40
POLYGON = [5, 5, 15, 5, 15, 25, 5, 25]


def annotations() -> list[dict]:
    flat = np.zeros((HEIGHT, WIDTH), bool)
    flat[10:20, 20:30] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.T.ravel().astype(int)])))
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 5, 10, 20], "segmentation": [POLYGON]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [20, 10, 10, 10],
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}},
        {"id": 3, "image_id": 8, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        {"id": 4, "image_id": 8, "category_id": 1, "bbox": [1, 2, 8, 9], "segmentation": [POLYGON]},
    ]  # fmt: skip


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images with four annotations, of which one is a crowd; the same as train.json and val.json."""
    (tmp_path / "images").mkdir()
    for number in (7, 8):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 100, 200)).save(tmp_path / "images" / f"{number}.png")
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (7, 8)]
    content = {"images": images, "annotations": annotations(), "categories": [{"id": 1}, {"id": 3}]}
    for part in ("train", "val"):
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    return tmp_path


class Oracle(nn.Module):
    """Finds what it was told, by the red of the image; in training mode it returns a loss of 1 for each box."""

    num_classes = 4

    def __init__(self, found: dict[int, dict], scale: float = 1.0) -> None:
        super().__init__()
        self.found, self.scale = found, scale

    def forward(self, images, targets=None):
        if self.training:
            return {
                "a": sum(t["boxes"].sum() for t in targets),
                "b": torch.tensor(float(sum(len(t["labels"]) for t in targets))),
            }
        return [self.found[round(float(image[0, 0, 0]) * 255)] for image in images]


def perfect(task: Detection, data: str) -> dict[int, dict]:
    """What an oracle has to say about each image of the data: exactly what is there."""
    found = {}
    for scene in task.dataset(data, split="val", augment=False):
        target = task._target(scene)
        target["scores"] = torch.ones(len(target["labels"]))
        found[int(scene.image[0, 0, 0])] = target
    return found


def run(task: Detection, model: nn.Module, data: str) -> dict[str, float]:
    loader = DataLoader(task.dataset(data, split="val", augment=False), 2, collate_fn=task.collate)
    return task.evaluate(task.predictor(model.eval()), loader)


@pytest.mark.parametrize("task", [Detection(), Detection(size=64), Segmentation(), Segmentation(size=64)])
def test_an_oracle_is_right(coco, task):
    result = run(task, Oracle(perfect(task, str(coco))), str(coco))
    assert result["ap50"] == pytest.approx(100)
    assert result["ap"] == pytest.approx(100)
    if task.with_masks:
        assert result["mask_ap50"] == pytest.approx(100)


def test_half_of_it_is_half(coco):
    found = perfect(Detection(), str(coco))
    found[7] = {name: value[:1] for name, value in found[7].items()}  # the only single object of class 3 is missed
    assert run(Detection(), Oracle(found), str(coco))["ap"] == pytest.approx(50)


def test_classes_that_are_counted_from_another_number_are_suspected(coco):
    found = perfect(Detection(), str(coco))
    shifted = {number: one | {"labels": one["labels"] - 1} for number, one in found.items()}
    with pytest.warns(UserWarning, match=r"hardly a label fits; with --task-arg label_offset=-1 AP50 of 2 images is 100\.0"):
        assert run(Detection(), Oracle(shifted), str(coco))["ap50"] == 0
    assert run(Detection(label_offset=-1), Oracle(shifted), str(coco))["ap50"] == 100


def test_nothing_found_is_zero(coco):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert run(Detection(), Oracle({7: nothing, 8: nothing}), str(coco))["ap"] == 0


def test_the_padding_of_onnx_outputs_does_not_count(coco):
    found = perfect(Detection(), str(coco))

    def graph(images):
        """As an ONNX file: three rows an image, the score of unused ones 0."""
        rows = [found[round(float(image[0, 0, 0]) * 255)] for image in images]
        fill = {"boxes": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), "scores": torch.zeros(3)}
        return {name: torch.stack([torch.cat([r[name], fill[name]])[:3] for r in rows]) for name in fill}

    loader = DataLoader(Detection().dataset(str(coco), split="val", augment=False), 2, collate_fn=Detection().collate)
    assert Detection().evaluate(Detection().predictor(graph), loader)["ap"] == pytest.approx(100)


def test_boxes_and_masks_are_those_of_the_file_without_crowds(coco):
    scenes = [*Segmentation().dataset(str(coco), split="val", augment=False)]
    assert scenes[0].boxes.tolist() == [[5, 5, 15, 25], [20, 10, 30, 20]]
    assert scenes[0].labels.tolist() == [1, 3]
    assert scenes[1].labels.tolist() == [1]
    assert scenes[0].masks.sum((1, 2)).tolist() == [200, 100]
    assert scenes[0].masks[1, 10:20, 20:30].all()
    assert len(scenes[1].truth) == 2


def test_a_flip_moves_boxes_with_pixels_and_masks():
    image = np.zeros((6, 10, 3), np.uint8)
    image[1:3, 2:5] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)[None]
    flipped = Scene(image, np.array([[2, 1, 5, 3]], np.float32), np.array([1]), [], mask).flipped()
    x1, y1, x2, y2 = flipped.boxes[0].astype(int)
    assert (flipped.image[y1:y2, x1:x2] == 255).all()
    assert flipped.masks[0, y1:y2, x1:x2].sum() == mask.sum() == (flipped.image[..., 0] > 0).sum()


def test_a_zoom_keeps_what_lies_in_its_window():
    image = np.zeros((20, 40, 3), np.uint8)
    image[4:10, 8:20] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)[None]
    boxes, masks = np.array([[8, 4, 20, 10], [30, 2, 38, 8]], np.float32), np.concatenate([mask, np.zeros_like(mask)])
    part = Scene(image, boxes, np.array([1, 2]), [], masks, (20, 40)).zoomed(2, 4, 10, 20)
    assert part.image.shape == image.shape
    assert part.labels.tolist() == [1]
    assert part.boxes.tolist() == [[8, 4, 32, 16]]
    assert part.masks[0, 4:16, 8:32].all()
    assert part.masks.sum() == 24 * 12
    assert part.image[6:14, 10:30].min() > 250
    cut = Scene(image, boxes, np.array([1, 2]), [], masks, (20, 40)).zoomed(0, 10, 10, 20)
    assert cut.boxes.tolist() == [[0, 8, 20, 20]]


def test_zooms_are_drawn_within_bounds(coco):
    scenes = Segmentation(flip=False, zoom=2.0).dataset(str(coco), split="train", augment=True)
    plain = Segmentation(flip=False).dataset(str(coco), split="train", augment=True)
    assert plain.augment is None
    scenes.set_epoch(1)
    assert all(scenes[i].image.shape == plain[i].image.shape for i in range(len(plain)))
    assert any(scenes[i].boxes.tolist() != plain[i].boxes.tolist() for i in range(len(plain)))


def test_resizing_moves_boxes_and_masks(coco):
    scene = Segmentation(size=60).dataset(str(coco), split="val", augment=False)[0]
    assert scene.image.shape == (60, 60, 3)
    x1, y1, x2, y2 = scene.boxes[1].round().astype(int)
    assert scene.masks[1, y1:y2, x1:x2].mean() > 0.95
    assert scene.masks[1].sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.1)


@pytest.mark.parametrize("shape", [[[1, 2]], [], "abc", {"size": [9, 7]}, {"size": [9, 7], "counts": [1, "x"]}])
def test_a_segmentation_that_is_none_is_said(shape):
    with pytest.raises(DataError, match=r"a\.png: annotation 5 has a segmentation that is none"):
        encode({"id": 5, "segmentation": shape}, 9, 7, "a.png")


@pytest.mark.parametrize("far", [5e8, -1e7, float("inf"), float("nan"), 1e300])
def test_a_polygon_far_outside_is_said(far):
    """pycocotools goes along all pixels of its edges: it took minutes, or wrote beyond its memory."""
    with pytest.raises(DataError, match=r"a\.png: annotation 5 has a segmentation far outside of the image, 7 × 9"):
        encode({"id": 5, "segmentation": [[1, 1, far, 1, 1, 5]]}, 9, 7, "a.png")


def test_a_mask_of_another_image_is_said():
    with pytest.raises(DataError, match=r"a\.png: annotation 5 has a mask of size \[3, 3\], the image \[9, 7\]"):
        encode({"id": 5, "segmentation": {"size": [3, 3], "counts": [9]}}, 9, 7, "a.png")


def test_encoding_undoes_decoding():
    mask = np.random.default_rng(0).integers(0, 2, (9, 7)).astype(np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel().astype(int)])))
    rle = {"segmentation": {"size": [9, 7], "counts": np.diff([0, *edges, mask.size]).tolist()}}
    assert (decode(encode(rle, 9, 7)) == mask).all()


def test_the_loss_is_the_sum_of_the_models(coco):
    task = Detection()
    batch = task.collate([*task.dataset(str(coco), split="train", augment=False)])
    assert task.loss(Oracle({}).train(), batch) == sum(t["boxes"].sum() for t in batch.targets["targets"]) + 3


def test_a_teacher_that_has_no_raw_maps_gives_its_detections(coco):
    task, teacher = Detection(), Oracle(perfect(Detection(), str(coco))).eval()
    batch = task.collate([*task.dataset(str(coco), split="train", augment=False)])
    assert task.distill(Oracle({}).train(), teacher, batch) == task.loss(Oracle({}).train(), batch)
    for found in teacher.found.values():
        found["scores"] = torch.full_like(found["scores"], 0.1)
    assert task.distill(Oracle({}).train(), teacher, batch) == 0


def test_map_distance_is_nothing_between_equals():
    maps = {"logits": torch.randn(2, 3, 4, 4), "box": torch.randn(2, 4, 4, 4)}
    other = {name: value + 1 for name, value in maps.items()}
    assert map_distance(maps, maps).abs() < 1e-5
    assert map_distance(other, maps) > 0.1
    fine = {"prototypes": torch.randn(2, 5, 8, 8)}
    assert map_distance(maps | fine, maps | fine).abs() < 1e-5
    assert map_distance(maps | {"prototypes": fine["prototypes"] + 1}, maps | fine) > 0.5
    with pytest.raises(DataError, match="same architecture"):
        map_distance({"logits": maps["logits"]}, maps)


def test_classes_of_a_softmax_are_compared_as_distributions():
    maps = {"logits": torch.randn(2, 1, 4, 4), "classes": torch.randn(2, 5, 4, 4)}
    ours = torch.randn(2, 5, 4, 4)
    assert map_distance(maps | {"classes": maps["classes"] + 3}, maps).abs() < 1e-5  # the same after a softmax
    theirs, weight = maps["classes"].softmax(1), maps["logits"].sigmoid()
    divergence = (theirs * (theirs / ours.softmax(1)).log()).sum(1, keepdim=True)
    torch.testing.assert_close(map_distance(maps | {"classes": ours}, maps), (weight * divergence).sum() / weight.sum())


class Maps(nn.Module):
    """Two raw maps of a convolution, asked for by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, images, targets=None, raw=False):
        assert raw
        logits, box = self.conv(torch.stack(images)).split([2, 4], 1)
        return {"logits": logits, "box": box}


def test_raw_maps_are_compared_where_both_have_them(coco):
    task, teacher = Detection(), Maps()
    batch = task.collate([*task.dataset(str(coco), split="train", augment=False)])
    student = Maps()
    distance = task.distill(nn.parallel.DataParallel(student), teacher, batch)  # wrapped, as in a training of many
    assert distance == map_distance(student(batch.inputs, raw=True), teacher(batch.inputs, raw=True))
    assert task.distill(teacher, teacher, batch).abs() < 1e-5


def test_unlabelled_images_serve_for_distillation_only(coco):
    task = Detection()
    batch = task.collate([*task.dataset(str(coco / "images"), split="test", augment=False)])
    assert not batch.labelled
    teacher = Oracle(perfect(task, str(coco))).eval()
    assert task.distill(Oracle({}).train(), teacher, batch) > 0
    with pytest.raises(DataError, match=r"no labels to compare with: detection and segmentation take a COCO file"):
        task.loss(Oracle({}).train(), batch)


@pytest.mark.parametrize("task", [Detection(), Detection(size=64), Segmentation(), Segmentation(size=64, label_offset=1)])
def test_what_a_teacher_finds_is_a_truth(coco, task):
    """The images alone: their teacher agrees with itself, and a model that finds half of it, with half."""
    teacher = Oracle(perfect(task, str(coco)), 1.0).eval()
    batch = task.collate([*task.dataset(str(coco / "images"), split="test", augment=False)])
    taught = task.taught(teacher, batch)
    assert taught.labelled
    assert task.evaluate(task.predictor(teacher), [taught])[task.metric] == pytest.approx(100)
    known = task.collate([*task.dataset(str(coco), split="val", augment=False)])
    for ours, theirs in zip(taught.targets["truths"], known.targets["truths"], strict=True):
        single = [annotation for annotation in theirs if not annotation["iscrowd"]]
        assert [a["category_id"] for a in ours] == [a["category_id"] for a in single]
        assert np.allclose([a["bbox"] for a in ours], [a["bbox"] for a in single], atol=1e-3)
    teacher.found[7] = {name: value[:1] for name, value in teacher.found[7].items()}
    assert task.evaluate(task.predictor(teacher), [taught])[task.metric] == pytest.approx(50)


def test_images_without_annotations(coco):
    content = json.loads((coco / "val.json").read_text())
    del content["annotations"]
    (coco / "val.json").write_text(json.dumps(content))
    assert [s.truth for s in Detection().dataset(str(coco), split="val", augment=False)] == [None, None]
    (coco / "train.json").unlink()
    (coco / "images").rename(coco / "train")  # images in parts, annotations for one of them
    assert [s.truth for s in Detection().dataset(str(coco), split="train", augment=False)] == [None, None]


def test_the_images_of_another_part_are_not_measured(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train" / "1.png")
    assert len(open_scenes(str(tmp_path), "train", with_masks=False)) == 1
    with pytest.raises(DataError, match="has the part 'train' and none called test"):
        open_scenes(str(tmp_path), "test", with_masks=False)


def test_ranks_are_joined(coco):
    task = Detection()
    model = Oracle(perfect(task, str(coco))).eval()
    data, seen = task.dataset(str(coco), split="val", augment=False), []
    for number in (0, 1):
        result = task.evaluate(task.predictor(model), [task.collate([data[number]])], gather=lambda m: seen.extend(m) or seen)
    assert result["ap"] == pytest.approx(100)


def voc(folder: Path) -> Path:
    (folder / "Annotations").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for number, (name, difficult) in enumerate([("dog", 0), ("cat", 1)]):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages" / f"{number}.jpg")
        box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>23</ymax></bndbox>"
        thing = f"<object><name>{name}</name><difficult>{difficult}</difficult>{box}</object>"
        text = f"<annotation><filename>{number}.jpg</filename>{thing}</annotation>"
        (folder / "Annotations" / f"{number}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n")
    return folder


def test_pascal_voc(tmp_path):
    scenes = [*Detection().dataset(str(voc(tmp_path / "voc")), split="train", augment=False)]
    assert scenes[0].boxes.tolist() == [[2, 3, 12, 23]]
    assert scenes[0].labels.tolist() == [2]  # cat is 1
    assert scenes[1].labels.tolist() == []  # difficult
    assert scenes[1].truth[0]["iscrowd"] == 1


def test_official_names_of_coco_folders(coco):
    (coco / "annotations").mkdir()
    (coco / "val.json").rename(coco / "annotations" / "instances_val2017.json")
    (coco / "images").rename(coco / "val2017")
    assert len(Detection().dataset(str(coco), split="val", augment=False)[0].boxes) == 2


def test_a_label_beyond_the_model_is_said(coco):
    task = Detection(label_offset=5)
    batch = task.collate([*task.dataset(str(coco), split="train", augment=False)])
    with pytest.raises(DataError, match="label 8 is out of range: the model has 4 classes"):
        task.loss(Oracle({}).train(), batch)
    task = Detection(label_offset=-2)
    batch = task.collate([*task.dataset(str(coco), split="train", augment=False)])
    with pytest.raises(DataError, match="label -1 is out of range"):
        task.loss(Oracle({}).train(), batch)


@pytest.mark.parametrize("name", ["train", "trainval"])
def test_the_images_of_another_list_are_not_measured(tmp_path, name):
    folder = voc(tmp_path / "voc")
    (folder / "ImageSets" / "Main" / "train.txt").rename(folder / "ImageSets" / "Main" / f"{name}.txt")
    assert len(open_scenes(str(folder), "train", with_masks=False)) == 2
    for split in ("val", "test"):
        with pytest.raises(DataError, match=rf"Main: has {name}\.txt and none called {split}\.txt"):
            open_scenes(str(folder), split, with_masks=False)


def edited(folder: Path, old: str, new: str) -> str:
    """A VOC folder whose first XML says something else."""
    file = voc(folder) / "Annotations" / "0.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return str(folder)


def test_voc_of_other_habits(tmp_path):
    folder = Path(edited(tmp_path / "voc", "<filename>0.jpg</filename>", ""))
    Image.open(folder / "JPEGImages" / "0.jpg").save(folder / "JPEGImages" / "0.png")
    for place in (folder / "JPEGImages" / "0.jpg", folder / "ImageSets" / "Main" / "train.txt"):
        place.unlink()
    xml = (folder / "Annotations" / "0.xml").read_text()
    xml = xml.replace("object>", "Object>").replace("<name>dog", "<name> dog\n").replace(">0</difficult>", "></difficult>")
    (folder / "Annotations" / "0 a.xml").write_text(xml)
    (folder / "JPEGImages" / "0.png").rename(folder / "JPEGImages" / "0 a.png")
    (folder / "Annotations" / "0.xml").unlink()
    (folder / "ImageSets" / "Main" / "val.txt").write_text("0 a\n1 \n")
    scenes = [*Detection().dataset(str(folder), split="val", augment=False)]
    assert [scene.labels.tolist() for scene in scenes] == [[2], []]
    assert scenes[0].truth[0]["iscrowd"] == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>dog</name>", "", "an object has no name"),
        ("<xmin>3<", "<xmin>nan<", r"an object has the bndbox \[nan, 4.0, 12.0, 23.0\], which are no pixels"),
        ("<xmin>3<", "<xmin><", "an object has no complete bndbox"),
        ("<difficult>0<", "<difficult>very<", "an object is difficult to the degree 'very'; it has to be 0 or 1"),
    ],
)
def test_an_object_that_is_none_is_said(tmp_path, old, new, message):
    with pytest.raises(DataError, match=rf"0\.xml: {message}"):
        open_scenes(edited(tmp_path / "voc", old, new), "train", with_masks=False)


def changed(coco: Path, change) -> str:
    content = json.loads((coco / "val.json").read_text())
    change(content)
    (coco / "val.json").write_text(json.dumps(content))
    return str(coco)


def test_null_is_nothing(coco):
    data = changed(coco, lambda content: content["annotations"][0].update(iscrowd=None, area=None))
    first = open_scenes(data, "val", with_masks=False).truths[0][0]
    assert (first["iscrowd"], first["area"]) == (0, 200)


@pytest.mark.parametrize("box", [[1, 2, float("nan"), 4], [1, float("inf"), 3, 4], [1, 2, 3], None, ["1", "2", "3", "4"]])
def test_a_box_that_is_none_is_said(coco, box):
    data = changed(coco, lambda content: content["annotations"][0].update(bbox=box))
    with pytest.raises(DataError, match=r"val\.json: annotation 1 has the bbox .*, which is none"):
        open_scenes(data, "val", with_masks=False)


@pytest.mark.parametrize("counts", [[5, 5], [70, -7], "zz\x01zz", "abc", ""])
def test_runs_that_are_none_are_said(counts):
    with pytest.raises(DataError, match=r"a\.png: annotation 5 has a segmentation that is none"):
        encode({"id": 5, "segmentation": {"size": [9, 7], "counts": counts}}, 9, 7, "a.png")


@pytest.mark.parametrize("as_text", [False, True])
def test_compressed_runs_are_taken(as_text):
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 1):
        mask = (rng.random((90, 70)) < share).astype(np.uint8)
        rle = pycocotools.encode(np.asfortranarray(mask))
        rle = rle | {"counts": rle["counts"].decode()} if as_text else rle
        assert (decode(encode({"segmentation": rle}, 90, 70)) == mask).all()


def test_boxes_on_a_photograph_that_viewers_turn_are_on_the_turned_one(coco):
    """Cameras store the sensor's rows and which way up these are."""
    stored = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    stored[:20, :15] = 255  # top left; turned a quarter to the right, top right
    turn_right = Image.Exif()
    turn_right[0x0112] = 6
    Image.fromarray(stored).save(coco / "images" / "8.png", exif=turn_right)
    scene = Detection().dataset(str(coco), split="val", augment=False)[1]
    assert scene.image.shape == (HEIGHT, WIDTH, 3)
    assert scene.image[:15, 20:].min() == 255
    assert scene.image[:, :20].max() == scene.image[15:].max() == 0


def test_annotations_of_another_size_are_said(coco):
    data = changed(coco, lambda content: content["images"][1].update(width=80))
    with pytest.raises(DataError, match=r"8\.png: is 40 × 30 pixels, its annotations are of 80 × 30"):
        [*Detection().dataset(data, split="val", augment=False)]
    with pytest.warns(UserWarning, match="80 × 30"):
        assert [*Detection(skip_bad=True).dataset(data, split="val", augment=False)][1] is None


@pytest.mark.parametrize(
    ("file", "images", "data"),
    [
        ("annotations/instances_val2017.json", "images/val2017", ""),
        ("annotations/instances_val2017.json", "val2017", "annotations/instances_val2017.json"),
        ("annotations/val.json", "annotations", ""),
        ("annotations/val.json", "", ""),
        ("valid/_annotations.coco.json", "valid", ""),
        ("valid/_annotations.coco.json", "valid", "valid"),
        ("valid/_annotations.coco.json", "valid", "valid/_annotations.coco.json"),
    ],
)
def test_layouts_of_coco(coco, tmp_path, file, images, data):
    new = tmp_path / "new"
    for folder in {(new / file).parent, new / images}:
        folder.mkdir(parents=True, exist_ok=True)
    (coco / "val.json").rename(new / file)
    (coco / "images" / "8.png").rename(new / images / "8.png")  # not the first one, which is named where the other lies
    assert open_scenes(str(new / data), "test", with_masks=False).paths == [new / images / "7.png", new / images / "8.png"]


def test_images_that_are_nowhere_are_said(coco):
    (coco / "images").rename(coco / "pictures")
    with pytest.raises(DataError, match=rf"val\.json: none of its images is found, the first being 7\.png: looked in {coco}"):
        open_scenes(str(coco), "val", with_masks=False)


def test_annotations_of_another_part_are_not_taken_for_none(coco):
    (coco / "val.json").unlink()
    with pytest.raises(DataError, match=r"has train\.json and none called test\.json or .*train\.json itself"):
        open_scenes(str(coco), "test", with_masks=False)


def test_as_many_of_each_label_count_as_in_pycocotools():
    truth = [
        {"bbox": [10 * (i % 20), 10 * (i // 20), 8, 8], "category_id": 1 + i % 3, "area": 64, "iscrowd": 0} for i in range(390)
    ]
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in truth)], dtype=torch.float32)
    labels, scores = torch.tensor([a["category_id"] for a in truth]), torch.linspace(0.9, 0.1, 390)
    boxes[::7] += 100  # some of them are wrong
    shuffled = torch.randperm(390)
    found = {"boxes": boxes[shuffled], "labels": labels[shuffled], "scores": scores[shuffled]}
    ours = average_precision([record(truth, found, (200, 200), (200, 200), False)], "bbox")

    goal = COCO()
    goal.dataset = {"images": [{"id": 1}], "categories": [{"id": i} for i in (1, 2, 3)]}
    goal.dataset["annotations"] = [a | {"id": i + 1, "image_id": 1} for i, a in enumerate(truth)]
    goal.createIndex()
    each = zip(boxes, labels, scores, strict=True)
    results = [
        {"image_id": 1, "category_id": int(label), "score": float(score), "bbox": [*box[:2].tolist(), 8, 8]}
        for box, label, score in each
    ]
    judge = COCOeval(goal, goal.loadRes(results), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert [*ours.values()] == pytest.approx([100 * value for value in judge.stats[:3]])
    assert ours["ap50"] > 50


class Part(nn.Module):
    """Modules or numbers by name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (Part(roi_heads=Part(box_predictor=Part(cls_score=nn.Linear(8, 4)))), 1),
        (Part(head=Part(classification_head=Part(num_classes=4))), 0),
        (Part(head=Part(classification_head=Part(num_columns=4))), 1),
        (Part(config=Part(num_labels=4)), 0),
    ],
    ids=["R-CNN", "RetinaNet and FCOS", "SSD", "Hugging Face"],
)
def test_which_labels_detectors_have(coco, model, first):
    """Where torchvision's say it: one too high ends a process on a GPU, and 0 may be the background's."""

    def loss(offset):
        task = Detection(label_offset=offset)
        task.loss(model, task.collate([*task.dataset(str(coco), split="train", augment=False)]))

    with pytest.raises(DataError, match=f"label 8 is out of range: the model has 4 classes, {first} to 3.*label_offset=N"):
        loss(5)
    if first:
        with pytest.raises(DataError, match=r"label 0 is out of range: .* 1 to 3, 0 being the background; --task-arg"):
            loss(-1)


@pytest.mark.parametrize("output", [torch.zeros(2, 10), {"logits": torch.zeros(2, 5)}, [torch.zeros(3)]])
def test_a_model_of_another_task_is_said(coco, output):
    class Other(nn.Module):
        def forward(self, images):
            return output

    with pytest.raises(DataError, match="of another task"):
        run(Detection(), Other(), str(coco))


def test_data_of_another_task_is_said(coco, tmp_path):
    boxes = json.loads((coco / "val.json").read_text())
    for annotation in boxes["annotations"]:
        annotation.pop("segmentation", None)
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    (tmp_path / "broken.json").write_text('{"images": [')
    (tmp_path / "other.json").write_text('{"a": 1}')
    boxes["annotations"][2]["image_id"] = 99
    (tmp_path / "orphan.json").write_text(json.dumps(boxes))
    orphan = "annotation 3 is of image 99, which is none"
    cases = {"boxes.json": "no 'segmentation'", "orphan.json": orphan, "x": "COCO file"}
    cases |= {"broken.json": "no COCO file", "other.json": "no COCO file"}
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_scenes(str(tmp_path / name), "test", with_masks=True)


def test_a_missing_image_is_named(coco):
    (coco / "images" / "8.png").unlink()
    with pytest.raises(DataError, match=r"8\.png: No such file"):
        [*Detection().dataset(str(coco), split="val", augment=False)]
    with pytest.warns(UserWarning, match=r"8\.png"):
        assert [*Detection(skip_bad=True).dataset(str(coco), split="val", augment=False)][1] is None


def test_precision_agrees_with_a_ranking_by_hand():
    """Three objects; found: a hit (.9), a miss (.8), a hit (.7). AP at every IoU: precision 1 to recall 1/3, 2/3 to 2/3."""
    truth = [{"bbox": [i * 20, 0, 10, 10], "category_id": 1, "area": 100, "iscrowd": 0} for i in range(3)]
    boxes = torch.tensor([[0.0, 0, 10, 10], [60, 60, 70, 70], [20, 0, 30, 10]])
    found = {"boxes": boxes, "labels": torch.ones(3, dtype=torch.int64), "scores": torch.tensor([0.9, 0.8, 0.7])}
    one = record(truth, found, (100, 100), (100, 100), False)
    recalls = np.linspace(0, 1, 101)
    goal = np.mean(np.where(recalls <= 1 / 3, 1.0, np.where(recalls <= 2 / 3, 2 / 3, 0.0)))
    assert average_precision([one], "bbox")["ap"] == pytest.approx(100 * goal, abs=1e-6)


def test_hugging_face_detectors(coco):
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 48],
        patch_size=16, num_detection_tokens=5, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    task, model = Detection(size=48), transformers.YolosForObjectDetection(config)
    batch = task.collate([*task.dataset(str(coco), split="train", augment=False)])
    try:
        loss = task.loss(model.train(), batch)
    except ImportError as error:  # transformers matches boxes with SciPy
        pytest.skip(str(error))
    assert torch.isfinite(loss)
    assert task.distill(model.eval(), model, batch).abs() < 1e-4
    found = task.predictor(model.eval())(batch.inputs)
    assert found[0]["boxes"].shape == (5, 4)
    assert set(run(task, model, str(coco))) == {"ap", "ap50", "ap75"}
