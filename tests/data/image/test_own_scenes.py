"""Scenes of the user's own: the same batches as from a prepared set, whatever tool wrote them; and what is refused."""

import io
import json
import os
from unittest import mock

import jax
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dljax.data import sources
from dljax.data.image import own_scenes, scenes
from dljax.errors import UserError
from tests.data.image import own_folders

SPLITS = {"train": range(8), "validation": range(8, 11), "test": range(11, 14)}


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The scenes of `own_folders` as a TFDS set."""

  VERSION = tfds.core.Version("1.0.0")
  name = "prepared"

  def _info(self):
    image = tfds.features.Image(shape=(96, 96, 1), encoding_format="png")
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        "image": image, "segmentation": image, "objects": tfds.features.Sequence({
            "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=own_folders.NAMES)})}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(numbers) for split, numbers in SPLITS.items()}

  def _generate_examples(self, numbers):
    for n in numbers:
      scene = own_folders.scene(n)
      boxes = [tfds.features.BBox(y0, x0, y1, x1) for x0, y0, x1, y1 in scene.boxes / 96]
      yield n, {"image": Image.fromarray(scene.image[..., 0]), "segmentation": Image.fromarray(scene.segmentation),
                "objects": [{"bbox": box, "label": int(label)} for box, label in zip(boxes, scene.labels)]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The directory of the prepared set, and the folders of the same scenes in all forms."""
  root = tmp_path_factory.mktemp("scenes")
  sources.build(Prepared, root / "tfds")
  own_folders.write_coco(root / "coco", SPLITS)
  own_folders.write_yolo(root / "yolo", SPLITS)
  for form in ("L", "P", "RGB"):
    own_folders.write_masks(root / form, SPLITS, form)
  return root


def configured(folder, target="boxes", seed=3, **fields):
  """A config for the folder, with what a look finds."""
  config = scenes.default_config()
  config.update({"folder": str(folder), **fields})
  found, _ = scenes.look_up(ml_collections.ConfigDict({"data": config, "seed": seed}), {f"data.{f}" for f in fields}, target)
  config.update({name.removeprefix("data."): value for name, value in found.items() if name != "monitor"})
  return config


def opened(config, target="boxes", split="train", seed=3, batch_size=4):
  data = scenes.SceneSet(config, [target]).pipelines(batch_size=batch_size, eval_batch_size=4, seed=seed)
  pipeline = data.train if split == "train" else data.evals[split]
  pipeline.open()
  return pipeline


def batches(config, target):
  return [opened(config, target, split).batch(step) for split in SPLITS for step in (0, 1 if split == "train" else 0)]


@pytest.mark.parametrize("form, target", [
    ("coco", "boxes"), ("yolo", "boxes"), ("L", "segmentation"), ("P", "segmentation"), ("RGB", "segmentation")])
def test_a_folder_gives_the_batches_of_the_prepared_set(prepared, monkeypatch, form, target):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared / "tfds"))
  more = {"scale": (0.8, 1.25), "shift": 8, "flip": True}
  config = configured(prepared / form, target, **more)
  assert config.image_shape == (96, 96, 1) and config.num_train_examples == 8
  plain = scenes.default_config()
  plain.update({"name": "prepared", "mean": config.mean, "std": config.std, "max_boxes": config.max_boxes, **more})
  for own, expected in zip(batches(config, target), batches(plain, target)):
    assert own.keys() == expected.keys()
    for field, value in expected.items():
      if field == "boxes":
        np.testing.assert_allclose(own[field], value, atol=1e-3 if form == "yolo" else 2e-5)
      else:
        np.testing.assert_array_equal(own[field], value, err_msg=field)


def test_a_look_shows_what_is_there(prepared):
  config = scenes.default_config()
  config.folder = str(prepared / "coco")
  found = own_scenes.look(config, "boxes", 0, {"folder", "mean"})
  assert found.fields["classes"] == tuple(own_folders.NAMES) and found.fields["num_classes"] == 10
  assert found.fields["max_boxes"] == max(len(own_folders.scene(n).boxes) for n in range(14))
  assert "mean" not in found.fields  # it was given
  pixels = np.concatenate([own_folders.scene(n).image.ravel() for n in SPLITS["train"]]) / 255
  assert found.fields["std"] == (round(float(pixels.std()), 4),)
  assert found.lines[0] == "found 14 images: 8 for training, 3 for validation, 3 for test"
  count = sum(int((own_folders.scene(n).labels == 4).sum()) for n in SPLITS["train"])
  assert "boxes of 10 classes, for training '0' " in found.lines[1] and f"'4' {count}" in found.lines[1]
  config.folder = str(prepared / "RGB")
  found = own_scenes.look(config, "segmentation", 0, {"folder"})
  assert found.fields["mask_colors"][:2] == ("#000000", "#14e607") and found.fields["mask_values"] == ()
  assert "found 11 classes of pixels: #000000 is '#000000', #14e607" in found.lines[1]


def test_the_seed_splits_what_names_no_splits(tmp_path):
  root = own_folders.write_yolo(tmp_path, {"": range(12)})
  (root / "images" / "twin.png").write_bytes((root / "images" / "000.png").read_bytes())
  (root / "labels" / "twin.txt").write_bytes((root / "labels" / "000.txt").read_bytes())
  shares = {"shares": (0.6, 0.2, 0.2)}
  names = {}
  for seed in (1, 1, 2):
    config = configured(root, seed=seed, classes=tuple(own_folders.NAMES), **shares)
    dataset, _ = own_scenes.open_scenes(config, "boxes", seed)
    parts = {split: [example.image.name for example in part] for split, part in dataset.splits.items()}
    assert {name for part in parts.values() for name in part} == {p.name for p in (root / "images").iterdir()}
    assert any({"000.png", "twin.png"} <= set(part) for part in parts.values())
    assert names.setdefault(seed, parts) == parts and config.num_train_examples == len(parts["train"])
  assert names[1] != names[2] and all(len(part) >= 2 for part in names[1].values())
  with pytest.raises(UserError, match="only 2 images that differ in .*, too few"):
    configured(own_folders.write_yolo(tmp_path / "few", {"": range(2)}))


def test_validation_is_drawn_from_training_where_only_the_test_is_named(tmp_path):
  config = configured(own_folders.write_coco(tmp_path, {"train2017": range(9), "test-dev": range(9, 12)}))
  dataset, _ = own_scenes.open_scenes(config, "boxes", 3)
  assert {split: len(part) for split, part in dataset.splits.items()} == {"train": 8, "validation": 1, "test": 3}
  assert config.test == "test" and config.validation == "validation"


def png(pixels, orientation=1, **options):
  """The bytes of a PNG file."""
  content, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(pixels).save(content, "PNG", exif=exif, **options)
  return content.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("written", ["stored", "upright", "yolo"])
def test_boxes_turn_with_their_image(tmp_path, orientation, written):
  """COCO's are of the pixels as stored, or of the upright image if that has the file's size; YOLO's are upright."""
  pixels = np.zeros((24, 40), np.uint8)
  pixels[3:9, 5:20] = 255
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(png(pixels, orientation))
  upright = np.rot90(pixels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
  rows, columns = np.nonzero(upright)
  x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
  if written == "yolo":
    (tmp_path / "labels").mkdir()
    h, w = upright.shape
    (tmp_path / "labels" / "a.txt").write_text(
        f"0 {(x0 + x1) / 2 / w} {(y0 + y1) / 2 / h} {(x1 - x0) / w} {(y1 - y0) / h}\n")
  else:
    if written == "upright" and orientation in (6, 8):
      size, box = upright.shape[::-1], [x0, y0, x1 - x0, y1 - y0]
    else:
      size, box = (40, 24), [5, 3, 15, 6]
    (tmp_path / "boxes.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": list(map(int, box))}],
        "categories": [{"id": 7, "name": "bar"}]}))
  config = configured(tmp_path, shares=(1.0, 0.0, 0.0), image_shape=(40, 40, 1), mean=(0.0,), std=(1.0,))
  batch = opened(config, batch_size=1).batch(0)
  found, = batch["boxes"][0][batch["box_mask"][0] > 0]
  rows, columns = np.nonzero(batch["image"][0, ..., 0] > 0.5)
  np.testing.assert_allclose(found, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1e-4)


def test_a_mask_turns_with_its_image(tmp_path):
  pixels = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40) // 130
  for folder in ("images", "masks"):
    (tmp_path / folder).mkdir()
  (tmp_path / "images" / "a.png").write_bytes(png(pixels * 30, orientation=6))
  (tmp_path / "masks" / "a.png").write_bytes(png(pixels))
  config = configured(tmp_path, "segmentation", shares=(1.0, 0.0, 0.0), image_shape=(40, 24, 1), mean=(0.0,), std=(1.0,))
  batch = opened(config, "segmentation", batch_size=1).batch(0)
  np.testing.assert_array_equal(batch["segmentation"][0], np.rot90(pixels, -1))
  np.testing.assert_array_equal(np.round(batch["image"][0, ..., 0] * 255), np.rot90(pixels, -1) * 30)


def write_pairs(root, masks, suffix=".png"):
  """Images of 6x8 pixels with masks, which are the content of files."""
  for folder in ("images", "masks"):
    (root / folder).mkdir(parents=True, exist_ok=True)
  for i, mask in enumerate(masks):
    (root / "images" / f"{i}.png").write_bytes(png(np.full((6, 8), i, np.uint8)))
    (root / "masks" / f"{i}{suffix}").write_bytes(mask)
  return root


def mask_of(*values, palette=None, mode="L"):
  """A mask of 6x8 pixels in which these values occur."""
  image = Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8)))
  if palette is not None:
    image.putpalette(np.array(palette, np.uint8).ravel().tolist())
  content = io.BytesIO()
  image.convert(mode if palette is None else image.mode).save(content, "PNG")
  return content.getvalue()


BLACK, RED, BLUE = [0, 0, 0], [255, 0, 0], [0, 0, 255]


@pytest.mark.parametrize("masks, found", [
    ([mask_of(0, 1, 3), mask_of(1, 255)], ((0, 1, 3), (), "255", ("0", "1", "3"))),
    ([mask_of(0, 255), mask_of(255)], ((0, 255), (), "", ("0", "255"))),  # a mask of black and white
    ([mask_of(0, 1, mode="RGB"), mask_of(2)], ((0, 1, 2), (), "", ("0", "1", "2"))),  # grey in three channels
    ([mask_of(0, 1, 1, palette=[BLACK, RED]), mask_of(1, palette=[BLACK, RED, BLUE])], ((0, 1), (), "", ("0", "1"))),
    # A palette of each file's own: number 1 is red in one and blue in the other.
    ([mask_of(0, 1, palette=[BLACK, RED]), mask_of(0, 1, palette=[BLACK, BLUE])],
     ((), ("#000000", "#0000ff", "#ff0000"), "", ("#000000", "#0000ff", "#ff0000"))),
])
def test_what_the_values_of_masks_mean_is_found(tmp_path, masks, found):
  config = configured(write_pairs(tmp_path, masks), "segmentation", shares=(1.0, 0.0, 0.0), mean=(0.0,), std=(1.0,),
                      image_shape=(6, 8, 1))
  assert (config.mask_values, config.mask_colors, config.mask_ignore, config.mask_names) == found
  assert config.mask_classes == len(config.mask_names)
  batch = opened(config, "segmentation", batch_size=len(masks)).batch(0)
  for pixels, classes in zip(batch["image"], batch["segmentation"]):
    mask = Image.open(tmp_path / "masks" / f"{round(float(pixels[0, 0, 0]) * 255)}.png")
    if config.mask_colors:
      value = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.asarray(mask.convert("RGB")).reshape(-1, 3)]
      names = dict(enumerate(config.mask_colors))
    else:
      value = np.asarray(mask if mask.mode == "P" else mask.convert("L")).ravel().tolist()
      names = dict(enumerate(config.mask_values)) | {-1: 255}
    assert [names[i] for i in classes.ravel().tolist()] == value


@pytest.mark.parametrize("file, text, masks, found", [
    ("classes.txt", "road\ncar\n\n", [mask_of(0, 1, 255)], ((0, 1), (), ("road", "car"), "255")),
    ("classes.txt", "no\nyes\n", [mask_of(0, 255)], ((0, 255), (), ("no", "yes"), "")),
    ("classes.csv", "id;name\n7;car\n2;road\n", [mask_of(7, 2)], ((7, 2), (), ("car", "road"), "")),
    ("class_dict.csv", "name,r,g,b\nred,255,0,0\nground,0,0,0\n", [mask_of(0, 1, palette=[BLACK, RED])],
     ((), ("#ff0000", "#000000"), ("red", "ground"), "")),
])
def test_a_file_names_the_classes_of_pixels(tmp_path, file, text, masks, found):
  (write_pairs(tmp_path, masks) / file).write_text(text)
  config = configured(tmp_path, "segmentation", shares=(1.0, 0.0, 0.0))
  assert (config.mask_values, config.mask_colors, config.mask_names, config.mask_ignore) == found


def jpeg(values):
  content = io.BytesIO()
  Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8))).save(content, "JPEG")
  return content.getvalue()


def photo():
  return png(np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8))


@pytest.mark.parametrize("masks, files, words", [
    ([mask_of(0, 1), jpeg([0, 200])], {}, ["masks/1.jpg", "is a JPEG file", "save masks as PNG"]),
    ([mask_of(0, 1), png(np.zeros((6, 9), np.uint8))], {}, ["masks/1.png has 9x6 pixels, and its image", "images/1.png has 8x6"]),
    ([photo()], {"images/0.png": png(np.zeros((80, 60), np.uint8))}, ["masks/0.png", "has more than 256 colours"]),
    ([mask_of(0, 1)], {"images/b.png": png(np.zeros((6, 8), np.uint8))}, ["images/b.png has no mask", "masks/b.png"]),
    ([mask_of(0, 1)], {"masks/b.png": mask_of(0, 1)}, ["masks/b.png is the mask of no image"]),
    ([mask_of(0, 1)], {"images/0.jpg": b"x"}, ["0.jpg", "same name but for the ending"]),
    ([mask_of(0, 1), b"PNG, but no more"], {}, ["masks/1.png cannot be used (is no image"]),
    ([mask_of(1, 1)], {}, ["hold only one class, 1"]),
    ([mask_of(0, 1, 2)], {"classes.txt": b"ground\ncar\n"}, ["masks/0.png has pixels of 2, which is no class (0, 1)"]),
    ([mask_of(0, 1)], {"classes.csv": b"name,r,g,b\na,0,0,0\nb,0,0,300\n"}, ["classes.csv: '300' is no whole number"]),
    ([mask_of(0, 1)], {"classes.csv": b"name,id\na,0\nb,0\n"}, ["two classes have the same colour or number"]),
    ([mask_of(0, 1, palette=[BLACK, RED], mode="RGB"), mask_of(0, 1, palette=[BLACK, BLUE])],
     {"classes.txt": b"ground\ncar\n"}, ["classes.txt names classes without their colours", "classes.csv"]),
])
def test_masks_that_cannot_be_used_are_named(tmp_path, masks, files, words):
  write_pairs(tmp_path, masks)
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  for path in (tmp_path / "masks").iterdir():
    if path.read_bytes()[:2] == b"\xff\xd8":
      path.rename(path.with_suffix(".jpg"))
  refused(tmp_path, "segmentation", words)


def refused(folder, target, words, **fields):
  with pytest.raises(UserError) as error:
    configured(folder, target, **{"shares": (1.0, 0.0, 0.0), **fields})
  assert "\n" not in str(error.value)
  assert not [word for word in words if word not in str(error.value)], error.value


def _coco_at(root, change=lambda coco: None, name="boxes.json"):
  """Two scenes in images/ and one file of COCO's form, which `change` changes."""
  names = own_folders.write_images(root / "images", range(2))
  coco = own_folders.coco(names, range(2))
  change(coco)
  (root / name).write_text(json.dumps(coco))
  return root


def test_crowds_and_images_without_boxes_are_kept(tmp_path):
  def change(coco):
    for annotation in coco["annotations"]:
      annotation["iscrowd"] = int(annotation["image_id"] == 100)
    coco["images"].append({"id": 7, "file_name": own_folders.write_images(tmp_path / "images", [5])[0]})

  config = configured(_coco_at(tmp_path, change), shares=(1.0, 0.0, 0.0))
  assert config.num_train_examples == 3
  dataset = scenes.SceneSet(config, ["boxes"])
  batch = dataset.pipelines(batch_size=3, eval_batch_size=1, seed=0) and dataset.first("train", 3)
  counts = [len(own_folders.scene(n).boxes) for n in range(2)]
  assert batch["host/box_crowd"].sum(axis=1).tolist() == [counts[0], 0, 0]
  assert batch["box_mask"].sum(axis=1).tolist() == [0, counts[1], 0]


def test_a_box_is_cut_at_the_border_or_left_out_and_counted(tmp_path):
  """Half a pixel beyond it is rounding."""
  boxes = {0: [-0.4, 0, 50.4, 96.5], 1: [90, 90, 50, 3], 2: [5, 5, 0, 3], 3: [200, 200, 5, 5]}

  def change(coco):
    for i, box in boxes.items():
      coco["annotations"][i]["bbox"] = box
    del coco["annotations"][4:]

  _coco_at(tmp_path, change)
  found = {}
  for mode in ("drop", "cut"):
    config = scenes.default_config()
    config.update({"folder": str(tmp_path), "shares": (1.0, 0.0, 0.0), "bad_boxes": mode})
    look = own_scenes.look(config, "boxes", 0, {"folder", "shares", "bad_boxes"})
    config.update(look.fields)
    batch = scenes.SceneSet(config, ["boxes"])
    batch.pipelines(batch_size=1, eval_batch_size=1, seed=0)
    first = batch.first("train", 1)
    found[mode] = look.lines[1].partition("; ")[2], first["boxes"][0][first["box_mask"][0] > 0].tolist()
  assert found["drop"] == ("3 without area or outside of their image are left out", [[0, 0, 50, 96]])
  assert found["cut"] == ("2 without area or outside of their image are left out", [[0, 0, 50, 96], [90, 90, 96, 93]])
  refused(tmp_path, "boxes", ["images/000.png: annotation 2 of ", "boxes.json lies outside of the image (90, 90, 140, 93 "
                              "of 96x96 pixels)", "--config.data.bad_boxes=drop"])


def _yolo_at(root):
  return own_folders.write_yolo(root, {"": range(2)})


@pytest.mark.parametrize("make, words", [
    (lambda root: None, ["there is neither a JSON file of COCO's form nor the folders images/ and labels/"]),
    (lambda root: [_coco_at(root), _yolo_at(root)], ["holds boxes both in COCO's form and in YOLO's", "--config.data.format=coco"]),
    (lambda root: _coco_at(root, lambda coco: coco["images"][0].update(file_name="../x.png")), ["'../x.png' leads out of the folder"]),
    (lambda root: _coco_at(root, lambda coco: coco["images"][0].update(file_name="no.png")), ["names the image 'no.png', which is not in"]),
    (lambda root: _coco_at(root, lambda coco: coco["images"][1].update(width=95)),
     ["says that", "001.png has 95x96 pixels, but it has 96x96"]),
    (lambda root: _coco_at(root, lambda coco: coco["annotations"].clear()), ["there is no box that can be used"]),
    (lambda root: [_coco_at(root), _coco_at(root, name="more.json")], ["boxes.json and more.json are not named after a split"]),
    (lambda root: [_coco_at(root), _coco_at(root, name="val.json")], ["boxes.json is not named after a split, but other files are"]),
    (lambda root: [_coco_at(root, name="train.json"), _coco_at(root, name="train2017.json")], ["are both for train"]),
    (lambda root: [_coco_at(root), (root / "images" / "000.png").write_bytes(b"no")], ["images/000.png cannot be used (is no image"]),
    (lambda root: [_yolo_at(root), (root / "labels" / "x.txt").write_text("")], ["labels/x.txt is the label file of no image"]),
    (lambda root: [_yolo_at(root), [p.unlink() for p in (root / "labels").iterdir()]], ["labels holds no label file"]),
    (lambda root: [_yolo_at(root), (root / "labels" / "001.txt").write_text("12 0.5 0.5 0.1 0.1")], ["001.txt, line 1: has the class 12"]),
    (lambda root: [_yolo_at(root), (root / "a.yaml").write_text("names: [x]"), (root / "data.yaml").rename(root / "b.yaml")],
     ["a.yaml and", "both name classes"]),
    (lambda root: [own_folders.write_yolo(root, {"train": [0], "val": [1]}), [p.unlink() for p in (root / "labels/val").iterdir()],
                   (root / "labels/val").rmdir()], ["there is no folder labels/validation, but images/val"]),
    (lambda root: own_folders.write_coco(root, {"val": [0], "test": [1]}), ["there are no training images, but validation, test"]),
    (lambda root: own_folders.write_coco(root, {"train": [0], "val": range(1, 6)}), ["no training image shows the class"]),
])
def test_folders_that_cannot_be_used_are_told_in_a_line(tmp_path, make, words):
  make(tmp_path)
  refused(tmp_path, "boxes", words)


def test_other_forms_of_folders_are_known(tmp_path):
  """A file in each split's folder beside the images (Roboflow's); YOLO's with SPLIT/images; names in labels/."""
  splits = {"train": range(8), "valid": range(8, 10)}
  for split, numbers in splits.items():
    names = own_folders.write_images(tmp_path / "a" / split, numbers)
    (tmp_path / "a" / split / "_annotations.coco.json").write_text(json.dumps(own_folders.coco(names, numbers)))
    names = own_folders.write_images(tmp_path / "b" / split / "images", numbers)
    (tmp_path / "b" / split / "labels").mkdir()
    for name, number in zip(names, numbers):
      (tmp_path / "b" / split / "labels" / name).with_suffix(".txt").write_text(own_folders.yolo_lines(number))
  names = own_folders.write_images(tmp_path / "c" / "images" / "default", range(10))  # CVAT's
  (tmp_path / "c" / "annotations").mkdir()
  (tmp_path / "c" / "annotations" / "instances_default.json").write_text(json.dumps(own_folders.coco(names, range(10))))
  assert configured(tmp_path / "c", shares=(0.9, 0.1, 0.0)).num_train_examples == 9
  (tmp_path / "b" / "train" / "labels" / "classes.txt").write_text("\n".join(own_folders.NAMES) + "\n")
  (tmp_path / "a" / "train" / "notes.json").write_text("[1]")  # of no form
  for folder in ("a", "b"):
    config = configured(tmp_path / folder)
    assert (config.num_train_examples, config.validation, config.test) == (8, "validation", "")
    assert config.classes == tuple(own_folders.NAMES)


def test_a_changed_folder_and_another_folder(tmp_path):
  root, other = _coco_at(tmp_path / "a"), _coco_at(tmp_path / "b")
  config = configured(root, shares=(1.0, 0.0, 0.0))

  def make(folder, assets):
    changed = config.copy_and_resolve_references()
    changed.folder = str(folder)
    data = scenes.SceneSet(changed, ["boxes"]).pipelines(batch_size=1, eval_batch_size=1, seed=0)
    if assets:
      data.restore(assets)
    return data

  assets = json.loads(json.dumps(make(root, None).assets()))
  assert make(root, assets).assets() == assets and assets["classes"] == own_folders.NAMES
  own_folders.write_images(other / "images", [6])
  coco = own_folders.coco(["000.png", "006.png"], [0, 6])
  coco["categories"].append({"id": 1000, "name": "yak"})
  (other / "boxes.json").write_text(json.dumps(coco))
  data = make(other, assets)
  assert list(data.evals) == ["test"] and data.name == str(other)
  data.evals["test"].open()
  assert data.evals["test"].num_examples == 1  # the other is among the training images
  with pytest.raises(UserError, match="this is not what the run was trained on"):
    data.train.open()
  coco["annotations"][-1]["category_id"] = 1000
  (other / "boxes.json").write_text(json.dumps(coco))
  with pytest.raises(UserError, match="annotation .* has the class 'yak', which is none of the classes"):
    make(other, assets).evals["test"].open()
  (root / "boxes.json").write_text(json.dumps(own_folders.coco(["000.png", "001.png"], range(2), {i: i for i in range(10)})))
  with pytest.raises(UserError, match="has changed since the run began .changed: boxes.json.; restore it"):
    make(root, assets).train.open()


def test_masks_of_another_folder_mean_the_same(tmp_path):
  root = write_pairs(tmp_path / "a", [mask_of(0, 1, 255)])
  (root / "classes.txt").write_text("road\ncar\n")
  config = configured(root, "segmentation", shares=(1.0, 0.0, 0.0), image_shape=(6, 8, 1), mean=(0.0,), std=(1.0,))
  other = write_pairs(tmp_path / "b", [mask_of(0, 1)])
  config.folder = str(other)
  assert set(opened(config, "segmentation", "test").batch(0)["segmentation"][0].ravel()) == {0, 1}
  (other / "classes.txt").write_text("road\nbus\n")
  with pytest.raises(UserError, match="the value 1 is 'bus' there, and 'car' in the run"):
    opened(config, "segmentation", "test")
  (other / "classes.txt").unlink()
  (other / "masks" / "0.png").write_bytes(mask_of(0, 3))
  with pytest.raises(UserError, match="images/0.png: pixel .1, 0. of .*masks/0.png is 3, the value of no class"):
    opened(config, "segmentation", "test")


def test_a_folder_that_is_missing_asks_for_what_a_dry_run_needs(tmp_path):
  config = scenes.default_config()
  config.folder = str(tmp_path / "no")
  with pytest.raises(UserError, match="no: there is no such folder; name one, or for --dry_run without it give "
                                      "--config.data.num_classes and --config.data.image_shape"):
    own_scenes.look(config, "boxes", 0, {"folder"})
  assert own_scenes.look(config, "boxes", 0, {"folder", "num_classes", "image_shape"}).fields == {}
  config.update({"num_classes": 3, "mask_classes": 4, "image_shape": (32, 64, 3)})
  for target in scenes.TARGETS:
    data = scenes.SceneSet(config, [target]).pipelines(batch_size=2, eval_batch_size=2, seed=0)
    assert data.batch_spec["image"].shape == (2, 32, 64, 3)
  config.folder = "~nobody-at-all/x"
  with pytest.raises(UserError, match="--config.data.folder=~nobody-at-all/x: .*; name a folder"):
    own_scenes.look(config, "boxes", 0, {"folder"})


def test_the_canvas_holds_the_images_as_far_as_it_may():
  assert own_scenes.canvas([(100, 60), (40, 90)], 3) == (128, 96, 3)
  assert own_scenes.canvas([(3000, 4000)], 1) == (480, 640, 1)
  assert own_scenes.canvas([(3, 1)], 1) == (32, 32, 1)


@pytest.mark.parametrize("target", ["boxes", "segmentation"])
def test_so_many_damaged_files_are_skipped_and_named(tmp_path, caplog, target):
  if target == "boxes":
    root = own_folders.write_yolo(tmp_path, {"train": range(8), "val": range(6, 8)})
    damaged, other = root / "images/train/002.png", root / "images/val/007.png"
  else:
    root = own_folders.write_masks(tmp_path, {"train": range(8), "val": range(6, 8)})
    damaged, other = root / "masks/train/002.png", root / "images/val/007.png"
  damaged.write_bytes(damaged.read_bytes()[:90])
  refused(root, target, [f"{damaged} cannot be used", "--config.data.skip_corrupt=1"])
  with mock.patch.object(jax, "process_index", side_effect=AssertionError):  # hosts do not know each other yet
    config = configured(root, target, skip_corrupt=1)
  assert config.num_train_examples == 7
  data = scenes.SceneSet(config, [target]).pipelines(batch_size=7, eval_batch_size=4, seed=0)
  data.train.open()
  assert "skipped 1 of 8 examples of train that cannot be decoded" in caplog.text and "002.png" in caplog.text
  assert data.train.num_examples == 7
  assert data.assets()["skipped"]["examples"] == {"train": [str(root / "images/train/002.png")]}
  other.write_bytes(b"no")
  refused(root, target, ["--config.data.skip_corrupt=1: 2 examples cannot be decoded, such as", "007.png"], skip_corrupt=1)
  assert configured(root, target, skip_corrupt=2).num_train_examples == 7


def test_other_files_are_told(tmp_path):
  write_pairs(tmp_path, [mask_of(0, 1)])
  (tmp_path / "images" / "notes.md").write_text("x")
  config = scenes.default_config()
  config.update({"folder": str(tmp_path), "shares": (1.0, 0.0, 0.0)})
  found = own_scenes.look(config, "segmentation", 0, {"folder", "shares"})
  assert found.lines[-1] == "left out 1 file of other kinds: images/notes.md"


def test_names_that_are_no_utf8_can_be_read_and_stored(tmp_path):
  write_pairs(tmp_path, [mask_of(0, 1), mask_of(1, 0)])
  for folder in ("images", "masks"):
    (tmp_path / folder / "1.png").rename(os.fsdecode(os.fsencode(tmp_path / folder) + b"/caf\xe9.png"))
  config = configured(tmp_path, "segmentation", shares=(0.5, 0.5, 0.0))
  data = scenes.SceneSet(config, ["segmentation"]).pipelines(batch_size=1, eval_batch_size=1, seed=3)
  assert r"images/caf\\xe9.png" in json.dumps(data.assets())
  os.unlink(os.fsencode(tmp_path) + b"/masks/caf\xe9.png")
  refused(tmp_path, "segmentation", [r"images/caf\xe9.png has no mask"])


def test_what_the_user_says_of_masks_is_not_looked_up(tmp_path):
  white = [255, 255, 255]
  write_pairs(tmp_path, [mask_of(0, 1, 2, palette=[BLACK, RED, white])])
  said = {"mask_colors": ("#ff0000", "#000000"), "mask_names": ("crop", "ground"), "mask_ignore": "#ffffff"}
  config = configured(tmp_path, "segmentation", shares=(1.0, 0.0, 0.0), image_shape=(6, 8, 1), mean=(0.0,), std=(1.0,), **said)
  assert {field: config[field] for field in said} == said and config.mask_classes == 2 and config.mask_values == ()
  classes = opened(config, "segmentation", batch_size=1).batch(0)["segmentation"]
  np.testing.assert_array_equal(classes.ravel()[:6], [1, 0, scenes.VOID] * 2)
  refused(tmp_path, "segmentation", ["masks/0.png has pixels of #ffffff, which is no class (#ff0000, #000000)"],
          mask_colors=said["mask_colors"], mask_names=said["mask_names"])
  refused(tmp_path, "segmentation", ["--config.data.mask_names: there are 3 names for 2 classes"],
          mask_values=(0, 1), mask_names=("a", "b", "c"), mask_ignore="2")
  refused(tmp_path, "segmentation", ["--config.data.mask_colors", "give colours such as #ff0000"], mask_colors=("red",))
