"""The scenes of digits, held against what their docstring promises."""

import hashlib

import numpy as np
import pytest

from dljax.data.image import decode
from dljax.data import sources
from dljax.data.datasets import digit_scenes
from dljax.data.datasets.digit_scenes import iou, tight_box
from dljax.data.datasets.digits import split_indices

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def built(prepared):
  """Split -> (image, segmentation, boxes, labels, ids) of every example."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(prepared("digit_scenes")))
    dataset = sources.open_dataset("digit_scenes")
    return {split: [read(record) for record in dataset.records(split)[range(len(dataset.records(split)))]]
            for split in SPLITS}


def read(record):
  image, segmentation = (decode.decode_image(record[name][0], 1)[..., 0] for name in ("image", "segmentation"))
  boxes = np.reshape(record["objects/bbox"], (-1, 4))[:, [1, 0, 3, 2]] * digit_scenes.SIZE
  np.testing.assert_allclose(boxes, np.round(boxes), atol=1e-4)
  return (image, segmentation, np.round(boxes).astype(int), np.array(record["objects/label"]),
          np.array(record["objects/id"]))


def test_sizes_counts_heights_and_overlaps(built):
  assert {split: len(examples) for split, examples in built.items()} == digit_scenes.SCENES
  counts, heights = [], []
  for image, segmentation, boxes, labels, ids in sum(built.values(), []):
    assert image.shape == segmentation.shape == (96, 96)
    assert len(boxes) == len(labels) == len(ids)
    counts.append(len(boxes))
    heights += list(boxes[:, 3] - boxes[:, 1])
    assert boxes.min() >= 0 and boxes.max() <= 96
    for i, box in enumerate(boxes[:-1]):
      assert iou(boxes[i + 1:], box).max() <= 0.3
  assert set(counts) == set(range(3, 9)) and np.bincount(counts)[3:].min() > len(counts) / 8
  assert (min(heights), max(heights)) == (10, 40)
  assert np.bincount(heights)[10:].min() > len(heights) / 31 / 2  # all heights are there, none is rare


def test_no_digit_is_in_two_splits_and_labels_are_the_digits(built):
  from sklearn.datasets import load_digits

  target = load_digits().target
  ids = {split: np.unique(np.concatenate([example[4] for example in examples])) for split, examples in built.items()}
  assert not any(np.intersect1d(ids[one], ids[other]).size for one in SPLITS for other in SPLITS if one != other)
  for split, indices in split_indices(target, "stratified").items():
    assert np.isin(ids[split], indices).all() and len(ids[split]) >= 0.99 * len(indices)
  for _, segmentation, _, labels, sources_of in sum(built.values(), []):
    np.testing.assert_array_equal(labels, target[sources_of])
    assert set(np.unique(segmentation)) == {0, *(labels + 1)}


def test_boxes_are_tight_around_what_is_drawn(built):
  for _, segmentation, boxes, labels, _ in sum(built.values(), []):
    inside = np.zeros(segmentation.shape, bool)
    for (x0, y0, x1, y1), label in zip(boxes, labels):
      inside[y0:y1, x0:x1] = True
      own = segmentation[y0:y1, x0:x1] == label + 1
      assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()
    assert not segmentation[~inside].any()
    for label in labels:  # where a class occurs once, its pixels are the digit
      if np.sum(labels == label) == 1:
        np.testing.assert_array_equal(tight_box(segmentation == label + 1), boxes[labels == label][0])


def test_the_grounds_contrast_is_a_third_of_the_inks(built):
  ratios = []
  for image, segmentation, *_ in sum(built.values(), []):
    ground, ink = image[segmentation == 0].astype(int), image.max()
    ratios.append((ground.max() - ground.min()) / (ink - (ground.max() + ground.min()) / 2))
    assert image[segmentation > 0].min() > (ground.max() + ground.min()) / 2
  assert abs(np.median(ratios) - 1 / 3) < 0.01  # a digit may lie on the brightest or the darkest place
  assert np.percentile(ratios, 99) < 0.36
  ground = digit_scenes.texture(np.random.RandomState(0), 96, 40, 90)
  assert ground.min() == 40 and ground.max() == 90 and len(np.unique(ground)) > 40


def test_the_pixels_are_the_same_everywhere(built):
  digest = lambda split: hashlib.sha256(
      b"".join(part.astype(np.uint8).tobytes() for example in built[split] for part in example[:4])).hexdigest()[:16]
  assert {split: digest(split) for split in SPLITS} == {
      "train": "e969f8b8280c3e75", "validation": "b2ef31eddb9c776d", "test": "89c46a9d1bbf855f"}


def test_scenes_of_coloured_sprites():
  rng = np.random.RandomState(0)
  disc = np.hypot(*np.mgrid[-20:20, -20:20]) < 20
  colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
  sprites = [np.concatenate([np.broadcast_to(colour, (40, 40, 3)), 255 * disc[..., None]], -1).astype(np.uint8)
             for colour in colours]
  drawn = digit_scenes.scene(
      rng, np.full((64, 80, 3), 50, np.uint8), sprites, [7, 8, 9], count=(2, 4), height=(12, 20), max_iou=0.1)
  assert drawn.image.shape == (64, 80, 3) and drawn.segmentation.shape == (64, 80)
  assert 2 <= len(drawn.boxes) <= 4 and (np.diff(drawn.boxes[:, 3] - drawn.boxes[:, 1]) <= 0).all()
  for box, label, source in zip(drawn.boxes, drawn.labels, drawn.sources):
    assert label == source + 7
    x, y = (box[:2] + box[2:]) // 2
    if drawn.segmentation[y, x] == label + 1:
      np.testing.assert_array_equal(drawn.image[y, x], colours[source])
  np.testing.assert_array_equal(drawn.image[drawn.segmentation == 0], 50)
  again = digit_scenes.scene(
      np.random.RandomState(0), np.full((64, 80, 3), 50, np.uint8), sprites, [7, 8, 9], count=(2, 4), height=(12, 20),
      max_iou=0.1)
  np.testing.assert_array_equal(again.image, drawn.image)
