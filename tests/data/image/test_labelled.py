"""Image pipelines and the reading of the user's images."""

import functools
import io
import json
import pickle
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from dljax.data import sources
from dljax.data.image import augment, decode, labelled
from dljax.data.pipeline import InMemory, Plan, Streaming
from dljax.errors import UserError
from tests.data.hosts import share

EVERYTHING = {"pad_crop": 2, "flip": True, "color_jitter": 0.4, "cutout": 3, "randaugment_layers": 2,
              "mixup": 0.4, "cutmix": 1.0, "random_resized_crop": 0.3}
ONE_BY_ONE = [{}] + [{key: value} for key, value in EVERYTHING.items()] + [EVERYTHING]
NAMES = [",".join(options) or "plain" if len(options) < 2 else "everything" for options in ONE_BY_ONE]


def build(config, seed=0, batch_size=16, **kwargs):
  data = labelled.ImageSet(config).pipelines(
      batch_size=batch_size, eval_batch_size=50, seed=seed, **kwargs)
  return data


def test_batches_agree_with_the_specification(digits):
  digits.mixup = 0.2
  data = build(digits)
  data.train.open()
  batch = data.train.batch(0)
  on_device = {key: value for key, value in batch.items() if not key.startswith("host/")}
  assert {k: (v.shape, v.dtype) for k, v in on_device.items()} == {
      k: (v.shape, v.dtype) for k, v in data.batch_spec.items()}
  assert data.train.num_examples == 1293


def test_specification_needs_no_data(digits, monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  digits.update(name="imagenet2012", image_shape=(224, 224, 3), num_classes=1000, mean=(0.5,) * 3,
                std=(0.5,) * 3)
  data = build(digits, batch_size=1024)
  assert data.batch_spec["image"] == jax.ShapeDtypeStruct((1024, 224, 224, 3), np.float32)
  with pytest.raises(UserError, match="python -m dljax.data.prepare imagenet2012 --data_dir="):
    data.train.open()
  assert not list(tmp_path.iterdir())


def test_training_set_is_normalised_by_the_default_config(digits):
  data = build(digits, batch_size=1293)
  data.train.open()
  pixels = data.train.batch(0)["image"]
  assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3


@pytest.mark.parametrize("options", ONE_BY_ONE, ids=NAMES)
def test_batch_does_not_depend_on_hosts_or_on_where_examples_are(digits, options, monkeypatch):
  digits.update(options)
  whole = build(digits, seed=5)
  whole.train.open()
  assert isinstance(whole.train._examples, InMemory)
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", 0)
  streamed = build(digits, seed=5)
  streamed.train.open()
  assert isinstance(streamed.train._examples, Streaming)
  monkeypatch.undo()
  shares = [share(0, 2), share(1, 2), share(3, 4), lambda size: np.arange(size)[4:12]]
  parts = [build(digits, seed=5).train for _ in shares]
  for rows, part in zip(shares, parts):
    part.rows, part._examples = rows(16), whole.train._examples  # as `open` does, without reading again
  for step in (0, 80):  # step 80 lies across two epochs
    expected = whole.train.batch(step)
    for key, value in streamed.train.batch(step).items():
      np.testing.assert_array_equal(value, expected[key])
    for rows, part in zip(shares, parts):
      own = part.batch(step)
      assert own.keys() == expected.keys()
      for key, value in expected.items():
        np.testing.assert_array_equal(own[key], value[rows(16)])
  streamed.train.close()


class _Counts:
  """An opened split that notes which rows are read."""

  def __init__(self, side=8):
    self.read, self._side = [], side

  def __len__(self):
    return 2000

  def gather(self, plan, rows):
    self.read.append(rows.tolist())
    image = np.zeros((len(rows), self._side, self._side, 1), np.uint8)
    return {"image": image, "label": plan.indices[rows].astype(np.int32)}


def _mixed(config, batch_size, rows):
  """(the training batch of a host, the rows that it read, the examples of the global batch)."""
  config.mixup = 0.4
  train = build(config, batch_size=batch_size).train
  train.rows, train._examples = rows, _Counts()
  return train.batch(0), train._examples.read[0], train.plan(0, 2000).indices


def test_a_host_of_eight_that_mixes_reads_its_own_rows_alone(digits):
  for host in range(8):
    rows = np.arange(1024).reshape(8, 128)[host]
    batch, read, indices = _mixed(digits, 1024, rows)
    assert read == rows.tolist()  # 128, not 256
    np.testing.assert_array_equal(batch["mix_label"], indices[rows ^ 1])


@pytest.mark.parametrize("batch_size, rows, partners, read", [
    (5, [0, 1, 2, 3, 4], [1, 0, 3, 2, 3], [0, 1, 2, 3, 4]),  # the last row has none: the one before it
    (5, [4], [3], [3, 4]), (1, [0], [0], [0]),
    (6, [0, 1, 2], [1, 0, 3], [0, 1, 2, 3]), (6, [3, 4, 5], [2, 5, 4], [2, 3, 4, 5])])
def test_a_row_without_a_partner_of_its_host_is_mixed_too(digits, batch_size, rows, partners, read):
  batch, found, indices = _mixed(digits, batch_size, np.array(rows))
  assert found == read
  assert batch["label"].tolist() == indices[rows].tolist()
  assert batch["mix_label"].tolist() == indices[partners].tolist()


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_do_not_depend_on_how_many_threads_read(digits, threads, monkeypatch):
  digits.update(EVERYTHING)
  expected = build(digits, batch_size=32)
  expected.train.open()  # in memory, without threads
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", 0)
  monkeypatch.setattr(labelled, "Streaming", functools.partial(Streaming, threads=threads))
  streamed = build(digits, batch_size=32)
  streamed.train.open()
  assert streamed.train._examples._threads == threads
  for step in (0, 1, 2, 40):  # step 40 lies across two epochs
    batch = streamed.train.batch(step)
    for key, value in expected.train.batch(step).items():
      np.testing.assert_array_equal(batch[key], value)
  streamed.train.close()


@pytest.mark.parametrize("options", ONE_BY_ONE[1:], ids=NAMES[1:])
def test_each_option_changes_the_images_anew_at_each_step(digits, options):
  plain = build(digits)
  digits.update(options)
  changed = build(digits)
  for data in plain, changed:
    data.train.open()
  before, after = plain.train.batch(0), changed.train.batch(0)
  np.testing.assert_array_equal(before["label"], after["label"])
  example = lambda data: data.train.plan(0, data.train.num_examples).indices
  np.testing.assert_array_equal(example(plain), example(changed))
  assert (before["image"] != after["image"]).any()
  again = changed.train.batch(0)
  np.testing.assert_array_equal(again["image"], after["image"])
  other_seed = build(digits, seed=1)
  other_seed.train.open()
  assert (other_seed.train.batch(0)["image"] != after["image"]).any()


def test_the_same_example_is_augmented_differently_in_the_next_epoch(digits):
  digits.pad_crop = 2
  data = build(digits, batch_size=1293)
  data.train.open()
  one, two = data.train.batch(0), data.train.batch(1)
  first, second = (np.argsort(data.train.plan(step, 1293).indices) for step in range(2))
  same = (one["image"][first] == two["image"][second]).all(axis=(1, 2, 3)).mean()
  assert 0.01 < same < 0.2  # 1 of 25 shifts, and some that move only black


def test_pad_and_crop_draws_every_shift(digits):
  """A point in the middle gets to each of the 5 x 5 places around it, about equally often."""
  digits.pad_crop = 2
  plan, rows = Plan(0, 0, np.arange(2000), np.arange(2000)), np.arange(2000)
  points = np.zeros((2000, 8, 8, 1), np.uint8)
  points[:, 4, 4] = 1
  seen = labelled.ImageSet(digits).augment(points, plan, rows).sum(axis=0)[..., 0]
  assert seen.sum() == 2000 and np.count_nonzero(seen) == 25
  assert seen[2:7, 2:7].min() > 40


PARTNERS = np.arange(16).reshape(8, 2)[:, ::-1].ravel()  # 1 0 3 2 ...


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_with_the_other_row_of_a_pair(digits, kind):
  plain = build(digits)
  digits[kind] = 0.7
  mixed = build(digits)
  for data in plain, mixed:
    data.train.open()
  for step in range(5):
    own, batch = plain.train.batch(step), mixed.train.batch(step)
    partner = own["image"][PARTNERS]
    np.testing.assert_array_equal(batch["mix_label"], own["label"][PARTNERS])
    weight = batch["mix_weight"][:, None, None, None]
    if kind == "mixup":
      np.testing.assert_allclose(batch["image"], weight * own["image"] + (1 - weight) * partner, atol=1e-5)
    else:
      kept = (batch["image"] == own["image"]) | (own["image"] == partner)
      assert ((batch["image"] == own["image"]) | (batch["image"] == partner)).all()
      boxed = ~kept.all(axis=(0, 3))  # pixels that changed in some row
      assert boxed.sum() <= round(64 * (1 - weight[0, 0, 0, 0]))


@pytest.mark.parametrize("limit", [labelled.MEMORY_LIMIT, 0], ids=["in memory", "streamed"])
def test_a_few_of_each_class_are_the_same_few_for_one_seed(digits, limit, monkeypatch):
  def few(seed, count=7):
    digits.per_class = count
    data = build(digits, seed=seed, batch_size=10 * count)
    data.train.open()
    assert data.train.num_examples == 10 * count and data.train.num_batches == 1
    batch = data.train.batch(0)
    assert np.bincount(batch["label"]).tolist() == [count] * 10
    evaluation = data.evals["test"]
    evaluation.open()
    assert evaluation.num_examples == 360  # of the whole split
    return {pixels.tobytes() for pixels in batch["image"]}

  monkeypatch.setattr(labelled, "MEMORY_LIMIT", limit)
  assert few(0) == few(0) != few(1)
  assert few(0) > few(0, 3)  # more are the same and others


def test_a_class_with_too_few_examples_is_named(digits):
  digits.per_class = 126
  with pytest.raises(UserError, match=r"--config.data.per_class=126: of '\d' there are only 12\d training examples"):
    build(digits).train.open()


def test_evaluation_pass(digits):
  data = build(digits)
  test = data.evals["test"]
  test.open()
  batches = [test.batch(step) for step in range(test.num_batches)]
  mask = np.concatenate([batch["mask"] for batch in batches])
  ids = np.concatenate([batch["id"] for batch in batches])
  assert mask.sum() == 360 == test.num_examples and len(mask) == 400
  np.testing.assert_array_equal(ids, np.where(mask > 0, np.arange(400), 0))
  assert np.isfinite(batches[-1]["image"]).all()
  for rows in share(0, 2), share(1, 2):
    part = build(digits).evals["test"]
    part.open(rows)
    np.testing.assert_array_equal(part.batch(7)["image"], batches[-1]["image"][rows(50)])


def test_resize_options(digits):
  digits.image_shape = (12, 10, 1)
  pictures = {}
  for how in labelled.RESIZE:
    digits.resize = how
    data = build(digits)
    data.evals["test"].open()
    pictures[how] = data.evals["test"].batch(0)["image"]
    assert pictures[how].shape == (50, 12, 10, 1)
  black = -digits.mean[0] / digits.std[0]
  np.testing.assert_allclose(pictures["pad"][:, :2], black, rtol=1e-5)
  assert (pictures["bilinear"] != pictures["crop"]).any()


def test_class_names_and_many_threads(digits):
  data = build(digits)
  assets = data.assets()
  assert assets["classes"] == [str(d) for d in range(10)]
  assert assets["brightness"]["mean"][0][0] == pytest.approx(digits.mean[0], abs=0.01)
  digits.flip = True
  data = build(digits)
  results = {}

  def work(step):
    data.train.open()
    results[step] = data.train.batch(step)["image"]

  threads = [threading.Thread(target=work, args=(step,)) for step in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for step, pixels in results.items():
    np.testing.assert_array_equal(pixels, data.train.batch(step)["image"])


@pytest.mark.parametrize("field, value, message", [
    ("image_shape", (8, 8), "image_shape"),
    ("image_shape", (8, 8, 2), "1 or 3 channels"),
    ("mean", (0.1, 0.2), "mean"),
    ("std", (0.0,), "std"),
    ("num_classes", 0, "num_classes"),
    ("resize", "stretch", "resize.*pad, bilinear, crop"),
    ("random_resized_crop", 1.5, "random_resized_crop"),
    ("color_jitter", -0.1, "color_jitter"),
    ("cutout", -1, "cutout"),
    ("cutout", 9, "cutout.*at most 8"),
    ("pad_crop", 9, "pad_crop.*at most 8"),
    ("pad_crop", 10**30, "pad_crop.*at most 8"),
    ("randaugment_layers", 11, "randaugment_layers.*at most 10"),
    ("per_class", -1, "per_class"),
    ("background", 256, "background.*from 0 to 255"),
    ("mixup", float("nan"), "mixup"),
    ("randaugment_magnitude", 31.0, "randaugment_magnitude"),
    ("train", "", "train"),
    ("name", "no such/name/at all", "name"),
])
def test_values_out_of_range_are_named(field, value, message):
  config = labelled.default_config()
  config[field] = value
  with pytest.raises(UserError, match=f"^--config.data.*{message}") as error:
    build(config)
  assert "\n" not in str(error.value)


def test_the_largest_augmentation_that_is_allowed_works(digits):
  digits.update({"image_shape": (6, 8, 1), "pad_crop": 8, "cutout": 8, "randaugment_layers": 10})
  data = build(digits)
  data.train.open()
  assert np.isfinite(data.train.batch(0)["image"]).all()


@pytest.mark.parametrize("options, message", [
    ({"num_classes": 12}, "num_classes=12.*digits has 10 classes"),
    ({"image_shape": (8, 8, 3), "mean": (0.5,) * 3, "std": (0.5,) * 3}, "image_shape.*1 channel"),
    ({"validation": "train[90%:]"}, "validation='train\\[90%:\\]' overlaps --config.data.train='train'"),
    ({"train": "train[:91%]", "validation": "train[90%:]"}, "overlaps"),
    ({"test": "tset"}, "--config.data.test: there is no 'tset'; did you mean test"),
    ({"train": "train[:ten]"}, "--config.data.train.*not a TFDS split expression"),
    ({"train": "train[5:5]"}, "--config.data.train.*holds no example"),
    ({"name": "digits/by_writers"}, "did you mean digits/by_writer"),
    ({"name": "mnist"}, "mnist is not prepared in"),
])
def test_data_that_does_not_fit_the_config(digits, options, message):
  digits.update(options)
  with pytest.raises(UserError, match=message) as error:
    build(digits).train.open()
  assert "\n" not in str(error.value)


def test_adjoining_ranges_are_no_overlap(digits):
  digits.update(train="train[:90%]", validation="train[90%:]", test="test+validation")
  data = build(digits)
  sizes = []
  for pipeline in data.train, *data.evals.values():
    pipeline.open()
    sizes.append(pipeline.num_examples)
  assert sum(sizes) == 1797


def test_encode_reads_as_evaluation_does(digits, tmp_path):
  data = build(digits)
  data.evals["test"].open()
  rows = data.evals["test"].batch(0)
  raw = np.round((rows["image"] * digits.std[0] + digits.mean[0]) * 255).astype(np.uint8)
  for i in range(12):
    Image.fromarray(raw[i, ..., 0]).save(tmp_path / f"digit{i}.png")
  batch, names, skipped = decode.encode([str(tmp_path)], digits)
  assert names == [str(tmp_path / f"digit{i}.png") for i in range(12)] and not skipped  # 2 before 10
  np.testing.assert_array_equal(batch["image"], rows["image"][:12])
  assert batch["mask"].tolist() == [1] * 12 and batch["id"].tolist() == list(range(12))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("background, expected", [(0, 100), (255, 228)])
def test_transparent_images_lie_on_the_background(mode, background, expected):
  pixels = np.full((4, 6, 4), 200, np.uint8)
  pixels[:, :3, 3], pixels[:, 3:, 3] = 128, 255
  picture = Image.fromarray(pixels)
  if mode == "LA":
    picture = picture.convert("LA")
  if mode == "P":
    picture = picture.quantize(4)
  file = io.BytesIO()
  picture.save(file, "png")
  for channels in 1, 3:
    decoded = decode.decode_image(file.getvalue(), channels, background)
    assert decoded.shape == (4, 6, channels)
    np.testing.assert_allclose(decoded[:, :3].astype(int), expected, atol=3)
    np.testing.assert_allclose(decoded[:, 3:].astype(int), 200, atol=1)


def saved(picture, form="png", **options):
  file = io.BytesIO()
  picture.save(file, form, **options)
  return file.getvalue()


@pytest.mark.parametrize("mode, options", [
    ("L", {"transparency": 7}), ("RGB", {"transparency": (7, 7, 7)}), ("P", {"transparency": 7}), ("L", {}), ("RGB", {})])
def test_training_shows_a_file_as_prediction_does(digits, mode, options):
  grey = np.full((8, 8), 7, np.uint8)
  grey[2:5, 3:6] = 90
  data = saved(Image.fromarray(grey).convert(mode), **options)
  for channels in (1, 3):
    expected = decode.decode_image(data, channels, 200)
    assert set(np.unique(expected)) == ({200, 90} if options else {7, 90})
    for files in ([data] * 3, [data + b"behind the end"] * 2):
      for image in decode.decode_images(files, channels, 200):
        np.testing.assert_array_equal(image, expected)
    digits.image_shape, digits.mean, digits.std = (8, 8, channels), (0.0,) * channels, (1 / 255,) * channels
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    for array in (rgba, rgba / 255, rgba[None]):  # an array's alpha counts as a file's does
      batch, _, skipped = decode.encode([array], digits, 200)
      assert not skipped
      np.testing.assert_allclose(batch["image"][0], expected, atol=1e-3)


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_every_orientation_is_turned_upright(form):
  stored = np.zeros((16, 24, 3), np.uint8)
  stored[:8, :16] = 200
  for number in range(1, 10):
    exif = Image.Exif()
    exif[0x0112] = number
    data = saved(Image.fromarray(stored), form, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode.decode_image(data, 3), shown)
    np.testing.assert_array_equal(next(decode.decode_images([data], 3)), shown)
  broken = saved(Image.fromarray(stored), form, exif=b"Exif\0\0no exif at all")
  assert decode.decode_image(broken, 3).shape == stored.shape


def test_a_mask_is_turned_with_its_image_and_keeps_its_values():
  classes = np.arange(6, dtype=np.uint8).reshape(2, 3)
  exif = Image.Exif()
  exif[0x0112] = 6
  image = saved(Image.fromarray(np.zeros((2, 3), np.uint8)), exif=exif)
  upright = np.rot90(classes, -1)
  plain = saved(Image.fromarray(classes), transparency=3)  # 3 is a class, not a hole
  np.testing.assert_array_equal(decode.decode_mask(plain, image), upright)
  np.testing.assert_array_equal(decode.decode_mask(saved(Image.fromarray(classes), exif=exif), image), upright)
  np.testing.assert_array_equal(decode.decode_mask(saved(Image.fromarray(upright)), image), upright)
  np.testing.assert_array_equal(decode.decode_mask(plain, saved(Image.new("L", (3, 2)))), classes)


def test_a_file_is_measured_before_it_is_decoded(digits, tmp_path, monkeypatch):
  monkeypatch.setattr(decode, "PIXELS_AT_ONCE", 100)  # a few rows at a time give the same
  pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
  whole = Image.alpha_composite(Image.new("RGBA", (40, 30), (9, 9, 9, 255)), Image.fromarray(pixels))
  np.testing.assert_array_equal(decode.decode_image(saved(Image.fromarray(pixels)), 3, 9), whole.convert("RGB"))
  monkeypatch.setattr(decode, "MAX_PIXELS", 1199)
  (tmp_path / "large.png").write_bytes(saved(Image.fromarray(pixels)))
  np.save(tmp_path / "a.npy", np.zeros((8, 8), np.uint8))
  (tmp_path / "short.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
  header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (900000, 900000), }"
  (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(64))
  np.savez(tmp_path / "b.npz", a=np.zeros((8, 8), np.uint8))
  (tmp_path / "b.npz").rename(tmp_path / "b.npy")
  _, names, skipped = decode.encode([str(tmp_path)], digits)
  assert names == [str(tmp_path / "a.npy")] and len(skipped) == 4
  assert "has 40x30 pixels, more than 1,199; make it smaller" in "".join(skipped)
  assert "huge.npy: mmap length is greater than file size" in "".join(skipped)
  assert "archive" in "".join(skipped)


def test_encode_npy_of_every_shape(digits, tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
  expected = augment.normalise(picture[None, ..., None], digits.mean, digits.std)[0]
  for name, array, rows in [
      ("hw", picture, 1), ("hwc", picture[..., None], 1), ("nhwc", np.stack([picture[..., None]] * 3), 3),
      ("nhw", np.stack([picture] * 2), 2), ("rgb", np.stack([picture] * 3, -1), 1),
      ("float", picture / 255, 1)]:
    np.save(tmp_path / f"{name}.npy", array)
    batch, names, skipped = decode.encode([str(tmp_path / f"{name}.npy")], digits)
    assert not skipped and len(names) == rows == len(set(names))
    for row in batch["image"]:
      np.testing.assert_allclose(row, expected, atol=1e-6)


class Opener:
  """Unpickled, it makes the file `path`."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


def test_reading_npy_runs_no_code(digits, tmp_path):
  for name in ("array", "bare"):
    trap = Opener(str(tmp_path / f"made-by-{name}"))
    with open(tmp_path / f"{name}.npy", "wb") as file:
      pickle.dump(trap, file) if name == "bare" else np.save(file, np.array([trap], object), allow_pickle=True)
    batch, names, skipped = decode.encode([str(tmp_path / f"{name}.npy")], digits)
    assert not names and not len(batch["image"]) and len(skipped) == 1
    assert not (tmp_path / f"made-by-{name}").exists()


def test_encode_skips_what_it_cannot_read_and_says_so(digits, tmp_path):
  (tmp_path / "a.png").write_bytes(b"\x89PNG no")
  (tmp_path / "notes.txt").write_text("hello")
  Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "good.jpg")
  data = (tmp_path / "good.jpg").read_bytes()
  (tmp_path / "cut.jpg").write_bytes(data[:len(data) // 2])
  np.save(tmp_path / "wide.npy", np.zeros((2, 2, 2, 2, 2), np.uint8))
  np.save(tmp_path / "range.npy", np.full((8, 8), 7.0))
  np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan))
  np.save(tmp_path / "code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
  Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
  batch, names, skipped = decode.encode([str(tmp_path)], digits)
  assert names == [str(tmp_path / "good.jpg")] and batch["image"].shape == (1, 8, 8, 1)
  assert len(skipped) == 8 and all("\n" not in line for line in skipped)
  for name in ("a.png", "notes.txt", "cut.jpg", "wide.npy", "range.npy", "nan.npy", "code.npy", "deep.png"):
    assert sum(name in line for line in skipped) == 1
  batch, names, skipped = decode.encode([str(tmp_path / "a.png")], digits)
  assert batch["image"].shape == (0, 8, 8, 1) and names == [] and len(skipped) == 1
  with pytest.raises(UserError, match="--input: there is no .*nowhere"):
    decode.encode([str(tmp_path / "nowhere")], digits)


def test_config_survives_json():
  config = labelled.default_config()
  assert json.loads(json.dumps(config.to_dict()))["image_shape"] == [8, 8, 1]


def test_importing_the_data_package_is_light():
  code = ("import sys, dljax.data.image.labelled, dljax.data.prepare\n"
          "heavy = 'tensorflow_datasets', 'grain', 'sklearn', 'PIL', 'rich'\n"
          "print([name for name in heavy if name in sys.modules])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """A config for 40 JPEG images of as many sizes, prepared as TFDS would."""
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class Photos(tfds.core.GeneratorBasedBuilder):
      name = "photos"
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=4)}))

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "validation": self._generate_examples(10)}

      def _generate_examples(self, n):
        for i in range(n):
          picture = np.full((20 + i, 60 - i, 3), 6 * i, np.uint8)
          yield i, {"image": Image.fromarray(picture), "label": i % 4}

  sources.build(Photos, tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config = labelled.default_config()
  config.update(name="photos", test="", num_classes=4, image_shape=(16, 24, 3), mean=(0.0,) * 3,
                std=(1.0,) * 3, resize="crop", random_resized_crop=0.2, flip=True)
  return config


@pytest.mark.parametrize("limit", [0, labelled.MEMORY_LIMIT], ids=["streamed", "in memory"])
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_told(digits, monkeypatch, limit, label):
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", limit)
  getitem = sources.Records.__getitem__
  unlabelled = lambda records, indices: [
      {**record, "label": [label if i == 7 else record["label"][0]]} for i, record in zip(indices, getitem(records, indices))]
  monkeypatch.setattr(sources.Records, "__getitem__", unlabelled)
  test = build(digits).evals["test"]
  with pytest.raises(UserError, match=f"--config.data.test='test': example 7 has the label {label}, outside of 0 to 9"):
    test.open()
    test.batch(0)
  test.close()


@pytest.mark.parametrize("label", [-1, 2])
def test_no_example_without_a_class_is_chosen(label):
  records = {i: {"label": [label if i == 3 else i % 2]} for i in range(9)}
  listed = type("Listed", (), {"__len__": lambda _: 9, "__getitem__": lambda _, rows: [records[i] for i in rows]})()
  with pytest.raises(UserError, match=f"example 3 has the label {label}, outside of 0 to 1"):
    labelled.few_of_each(listed, ["a", "b"], 5, 0)


@pytest.mark.parametrize("limit", [0, labelled.MEMORY_LIMIT], ids=["streamed", "in memory"])
@pytest.mark.parametrize("damage, words", [
    (lambda data: data[:len(data) // 2], "truncated|broken|incomplete"), (lambda data: b"", "is no image"),
    (lambda data: saved(Image.fromarray(np.zeros((8, 8), np.uint16))), "more than 8 bits per channel"), (None, "image")])
def test_a_damaged_example_is_named(digits, monkeypatch, limit, damage, words):
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", limit)
  digits.train = "train[:20]"
  digits.validation = ""
  getitem = sources.Records.__getitem__

  def damaged(records, indices):
    read = [dict(record) for record in getitem(records, indices)]
    for i, record in zip(indices, read):
      if i == 7:
        data = record.pop("image")
        record |= {"image": [damage(data[0])]} if damage else {}
    return read

  monkeypatch.setattr(sources.Records, "__getitem__", damaged)
  train = build(digits).train
  with pytest.raises(UserError, match=rf"^--config.data.train='train\[:20\]': example 7 of digits cannot be used \(.*({words})") as e:
    train.open()
    train.batch(0), train.batch(1)
  assert "\n" not in str(e.value)
  train.close()


@pytest.mark.parametrize("limit", [0, labelled.MEMORY_LIMIT], ids=["streamed", "in memory"])
def test_groups_travel_with_evaluation_batches(tmp_path, monkeypatch, limit):
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class Grouped(tfds.core.GeneratorBasedBuilder):
      name = "grouped"
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(4, 4, 1)), "label": tfds.features.ClassLabel(num_classes=2),
            "camera": tfds.features.ClassLabel(names=["old", "new one"]), "place": tfds.features.Text(),
            "weight": np.float32}))

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(5)}

      def _generate_examples(self, n):
        for i in range(n):
          picture = Image.fromarray(np.full((4, 4), 40 * i, np.uint8))
          yield i, {"image": picture, "label": i % 2, "camera": i // 3, "place": "Łódź" * i, "weight": 1.0}

  sources.build(Grouped, tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", limit)
  config = labelled.default_config()
  config.update(name="grouped", validation="", num_classes=2, image_shape=(4, 4, 1), groups=("camera", "place"))
  data = build(config, batch_size=4)
  assert all(p.open() for p in (data.train, data.evals["test"]))
  assert not any("group" in field for field in data.train.batch(0))
  batch = data.evals["test"].batch(0)
  numbers = np.round((batch["image"][:5, 0, 0, 0] * config.std[0] + config.mean[0]) * 255 / 40).astype(int)
  assert sorted(numbers) == [0, 1, 2, 3, 4]
  assert batch["host/group/camera"][:5].tolist() == [["old", "new one"][i // 3] for i in numbers]
  assert batch["host/group/place"][:5].tolist() == ["Łódź" * i for i in numbers]
  data.evals["test"].close()
  for wrong, words in (("camra", "did you mean camera"), ("weight", "--config.data.groups")):
    config.groups = (wrong,)
    with pytest.raises(UserError, match=words):
      build(config, batch_size=4).train.open()


def test_images_of_many_sizes_are_streamed(photos, monkeypatch):
  data = build(photos, batch_size=8)
  assert list(data.evals) == ["validation"]
  data.train.open()
  assert isinstance(data.train._examples, Streaming)
  seen = [data.train.batch(step) for step in range(4)]  # 32 rows of 30 images
  ids = np.concatenate([data.train.plan(step, 30).indices for step in range(4)])
  assert sorted(ids[:30]) == list(range(30))
  shades = np.concatenate([batch["image"] for batch in seen])
  assert shades.shape == (32, 16, 24, 3)
  assert np.ptp(shades, axis=(1, 2, 3)).max() < 0.02  # crops of one colour
  labels = np.concatenate([batch["label"] for batch in seen])
  np.testing.assert_array_equal(np.round(shades.mean(axis=(1, 2, 3)) * 255 / 6) % 4, labels)
  validation = data.evals["validation"]
  validation.open()
  assert isinstance(validation._examples, InMemory)  # one shape, once resized
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", 0)
  streamed = build(photos).evals["validation"]
  streamed.open()
  assert isinstance(streamed._examples, Streaming)
  for key, value in validation.batch(0).items():
    np.testing.assert_array_equal(streamed.batch(0)[key], value)
  data.train.close()
  streamed.close()


# Weights and samplers


def test_weights_of_classes_are_numbers_or_follow_from_the_counts(digits):
  digits.update(num_classes=3)
  assert labelled.class_weights(digits) == ()
  digits.update(class_weights=("1", "0.5", "0"))
  assert labelled.class_weights(digits) == (1.0, 0.5, 0.0)
  digits.update(class_weights=("balanced",), class_counts=(2, 4, 6))
  weights = labelled.class_weights(digits)
  np.testing.assert_allclose(weights, [2, 1, 2 / 3])
  assert np.dot(weights, (2, 4, 6)) == pytest.approx(12)  # the mean weight of an example is 1
  digits.update(folder="x", fitted_to="x", labels="classes", num_train_examples=12, mean=(0.5,), std=(0.5,))
  np.testing.assert_allclose(labelled.class_weights(digits), [5, 2, 1])


@pytest.mark.parametrize("weights, counts, message", [
    (("even",), (), "class_weights=even: write balanced, or a number"),
    (("1", "-1", "1"), (), "write balanced, or a number of at least 0"),
    (("0", "0", "0"), (), "write balanced, or a number of at least 0"),
    (("1", "nan", "1"), (), "write balanced, or a number"), (("1", "2"), (), "there are 3 classes; give a number for each"),
    (("balanced",), (3, 0, 2), "class 1 has no training example"),
    (("balanced",), (3, 2), "class_counts=3,2: give a whole number for each of 3 classes")])
def test_weights_of_another_form_are_refused(digits, weights, counts, message):
  digits.update(num_classes=3, class_weights=weights, class_counts=counts)
  with pytest.raises(UserError, match=message):
    build(digits)


def test_the_counts_of_a_prepared_set_are_looked_up_where_weights_need_them(digits):
  assert labelled.look_up(digits, 0, ()) == {}
  digits.class_weights = ("balanced",)
  counts = labelled.look_up(digits, 0, ("class_weights",))["class_counts"]
  assert sum(counts) == 1293 and len(counts) == 10 and min(counts) > 120
  assert labelled.look_up(digits, 0, ("class_weights", "class_counts")) == {}


def test_a_balanced_sampler_gives_every_class_equally_often(digits, monkeypatch):
  digits.update(train="train[:300]", sampler="balanced")
  train = build(digits, batch_size=100).train
  train.open()
  for step in (0, 7):
    assert np.bincount(train.batch(step)["label"]).tolist() == [10] * 10
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", 0)
  streamed = build(digits, batch_size=100).train
  streamed.open()
  np.testing.assert_array_equal(streamed.batch(3)["image"], train.batch(3)["image"])
  streamed.close()


# Examples that cannot be decoded


@pytest.fixture
def damaged(digits, monkeypatch):
  """Digits whose training examples 3 and 7, and test example 1, are cut."""
  digits.update(train="train[:40]", validation="", test="test[:20]")
  getitem, whole = sources.Records.__getitem__, {40: (3, 7), 20: (1,)}

  def cut(records, indices):
    read = [dict(record) for record in getitem(records, indices)]
    for i, record in zip(indices, read):
      if i in whole[len(records)]:
        record["image"] = [record["image"][0][:40]]
    return read

  monkeypatch.setattr(sources.Records, "__getitem__", cut)
  return digits


@pytest.mark.parametrize("limit", [0, labelled.MEMORY_LIMIT], ids=["streamed", "in memory"])
def test_damaged_examples_are_left_out_where_that_was_asked_for(damaged, monkeypatch, caplog, limit):
  damaged.skip_corrupt = 3
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", limit)
  data, other = build(damaged, batch_size=8), build(damaged, batch_size=8)
  for pipeline in (data.train, data.evals["test"]):
    pipeline.open()
  other.train.open(share(1, 2))
  assert (data.train.num_examples, data.evals["test"].num_examples) == (38, 19)
  assert data.assets()["skipped"] == {"fingerprint": data.fingerprint(), "examples": {
      "train[:40]": ["example 3 of digits", "example 7 of digits"], "test[:20]": ["example 1 of digits"]}}
  assert "skipped 2 of 40 examples of train that cannot be decoded: example 3 of digits, example 7" in caplog.text
  np.testing.assert_array_equal(other.train.batch(2)["image"], data.train.batch(2)["image"][1::2])
  for pipeline in (data.train, data.evals["test"], other.train):
    pipeline.close()


def test_more_damaged_examples_than_allowed_are_refused(damaged):
  damaged.skip_corrupt = 2
  data = build(damaged, batch_size=8)
  data.train.open()
  with pytest.raises(UserError, match="skip_corrupt=2: 3 examples cannot be decoded, such as .*test.*: example 1 of digits") as e:
    data.evals["test"].open()
  assert "\n" not in str(e.value)
  damaged.skip_corrupt = 1
  with pytest.raises(UserError, match="skip_corrupt=1: 2 examples cannot be decoded, such as .*example 3 of digits"):
    build(damaged, batch_size=8).train.open()


def test_a_run_goes_on_with_the_examples_that_it_began_with(damaged):
  damaged.skip_corrupt = 3
  data = build(damaged, batch_size=8)
  data.train.open()
  assets = json.loads(json.dumps(data.assets()))
  again = build(damaged, batch_size=8)
  again.restore(assets)
  again.train.open()
  skipped = assets["skipped"]["examples"]
  skipped["train[:40]"] = skipped["train[:40]"][:1]
  other = damaged.copy_and_resolve_references()
  other.train = "train[1:41]"  # of which nothing is known
  again = build(other, batch_size=8)
  again.restore(assets)
  again.train.open()
  again = build(damaged, batch_size=8)
  again.restore(assets)
  with pytest.raises(UserError, match="2 examples of train cannot be decoded .*, and 1 could not when the run began"):
    again.train.open()
