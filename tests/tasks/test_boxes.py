"""Boxes: against plain loops, and by properties on random boxes."""

import jax
import numpy as np
import pytest

from dljax.tasks import boxes as box_lib


iou = jax.jit(box_lib.iou)
encode = jax.jit(box_lib.encode)
decode = jax.jit(box_lib.decode)
match = jax.jit(box_lib.match)
suppress = jax.jit(box_lib.suppress, static_argnames=("count", "threshold"))
to_original_pixels = jax.jit(box_lib.to_original_pixels)


def random_boxes(count, seed=0, size=60.0, least=0.0):
  """[count, 4], overlapping often."""
  draw = np.random.default_rng(seed)
  corner = draw.uniform(0, size, (count, 2))
  return np.concatenate([corner, corner + draw.uniform(least, size / 2, (count, 2))], axis=-1).astype(np.float32)


def plain_iou(a, b):
  """By its definition, for two boxes."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  shared = max(width, 0) * max(height, 0)
  union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
  return shared / union if union > 0 else 0.0


def plain_suppress(boxes, scores, labels, threshold):
  """Greedy, by a loop; the rows that are kept, the best first."""
  order, kept = sorted(np.flatnonzero(scores > -np.inf), key=lambda i: -scores[i]), []
  for i in order:
    if not any(labels[i] == labels[j] and plain_iou(boxes[i], boxes[j]) > threshold for j in kept):
      kept.append(i)
  return kept


def test_anchors_by_hand():
  """Half-sides 4/sqrt(ratio) and 4 sqrt(ratio), rounded: 5.66 -> 6 and 2.83 -> 3; around every second pixel."""
  anchors = box_lib.Anchors(sizes=((8,),), ratios=(0.5, 1.0, 2.0)).boxes([(1, 2)], height=2, width=4)
  np.testing.assert_array_equal(anchors, [
      [-6, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6], [-4, -3, 8, 3], [-2, -4, 6, 4], [-1, -6, 5, 6]])


def test_anchors_are_in_the_order_level_row_column_ratio_size():
  spec = box_lib.Anchors.octaves((8, 16), ratios=(1.0, 2.0))
  assert spec.sizes == ((8, 10, 12), (16, 20, 25)) and spec.per_cell == 6
  grids = [(3, 5), (2, 3)]
  anchors = spec.boxes(grids, height=24, width=40)
  assert anchors.shape == ((15 + 6) * 6, 4) and anchors.dtype == np.float32
  fine = anchors[:15 * 6].reshape(3, 5, 2, 3, 4)
  centre = (fine[..., :2] + fine[..., 2:]) / 2
  np.testing.assert_array_equal(centre[2, 3], np.broadcast_to([3 * 8, 2 * 8], (2, 3, 2)))
  side = fine[..., 2:] - fine[..., :2]
  np.testing.assert_array_equal(side[0, 0, 0, :, 0], [8, 10, 12])
  assert (side[..., 1, :, 1] > side[..., 1, :, 0]).all()  # ratio 2 is high
  coarse = anchors[15 * 6:].reshape(2, 3, 2, 3, 4)
  np.testing.assert_array_equal(coarse[1, 1, 0, 0], [13 - 8, 12 - 8, 13 + 8, 12 + 8])  # 40 // 3 and 24 // 2


def test_iou_equals_a_loop_and_touching_boxes_do_not_overlap():
  a, b = random_boxes(20), random_boxes(30, seed=1)
  expected = [[plain_iou(x, y) for y in b] for x in a]
  np.testing.assert_allclose(iou(a[:, None], b), expected, atol=1e-5)
  np.testing.assert_allclose(iou(a, a), 1, rtol=1e-6)
  assert iou(np.array([0., 0, 2, 2]), np.array([2., 0, 4, 2])) == 0
  assert iou(np.zeros(4), np.zeros(4)) == 0  # no area, and no NaN


def test_decoding_undoes_encoding():
  boxes, anchors = random_boxes(50, least=2.0), random_boxes(50, seed=1, least=2.0)
  code = encode(boxes, anchors)
  np.testing.assert_allclose(decode(code, anchors), boxes, atol=2e-4)
  np.testing.assert_allclose(encode(anchors, anchors), 0, atol=1e-6)
  # By hand: half a side to the right, twice as wide, half as high.
  code = encode(np.array([0., 1, 20, 6]), np.array([0., 0, 10, 10]))
  np.testing.assert_allclose(code, [0.5, -0.15, np.log(2), -np.log(2)], rtol=1e-6)


def test_a_stretch_beyond_the_limit_is_cut():
  boxes = decode(np.array([0., 0, 1e6, 0]), np.array([0., 0, 16, 16]))
  np.testing.assert_allclose(boxes, [8 - 500, 0, 8 + 500, 16], rtol=1e-5)


def test_clip():
  np.testing.assert_array_equal(
      jax.jit(box_lib.clip)(np.array([[-3, -1, 50, 60], [2, 3, 4, 5]], np.float32), height=30, width=40), [[0, 0, 40, 30], [2, 3, 4, 5]])


def test_boxes_are_carried_back_to_the_picture_that_was_laid_on_the_image():
  """A picture of 200x100, at half its size, its corner at (10, 30)."""
  place, size = np.array([10., 30, 110, 80]), np.array([200., 100])
  boxes = np.array([[20., 40, 60, 60], [0, 0, 500, 500], [10, 30, 110, 80]])
  np.testing.assert_allclose(
      to_original_pixels(boxes, place, size), [[20, 20, 100, 60], [0, 0, 200, 100], [0, 0, 200, 100]], rtol=1e-6)
  assert np.isfinite(to_original_pixels(boxes, np.zeros(4), np.zeros(2))).all()  # a row that is padding


def plain_match(anchors, boxes, foreground=0.5, background=0.4):
  """By loops: thresholds, then every object's best anchors, ties included."""
  table = np.array([[plain_iou(b, a) for a in anchors] for b in boxes])
  best = [column.argmax() for column in table.T]
  found = [int(b) if table[b, i] >= foreground else -1 if table[b, i] < background else -2 for i, b in enumerate(best)]
  for row in table:
    for i in np.flatnonzero(row == row.max()):
      found[i] = int(best[i])
  return found


def test_matching_equals_a_loop_and_padding_matches_nothing():
  anchors = box_lib.Anchors.octaves((8, 16)).boxes([(8, 8), (4, 4)], 64, 64)
  boxes = np.concatenate([random_boxes(6, size=40.0, least=3.0), random_boxes(4, seed=7)])  # the last are padding
  mask = np.array([1.] * 6 + [0.] * 4, np.float32)
  found = match(anchors, boxes, mask)
  np.testing.assert_array_equal(found, plain_match(anchors, boxes[:6]))
  assert set(range(6)) <= set(np.asarray(found))  # every object has an anchor
  assert {box_lib.BACKGROUND, box_lib.IGNORED} <= set(np.asarray(found))
  np.testing.assert_array_equal(match(anchors, boxes, np.zeros(10, np.float32)), box_lib.BACKGROUND)


def test_an_overlap_of_just_a_threshold_is_enough():
  """IoUs of 1, 1/2, 1/4 and 1/8 exactly; the first anchor is the object's best, so that none of the others is forced."""
  anchors = np.array([[0., 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 1], [0, 0, 2, 1]])
  found = match(anchors, anchors[:1], np.ones(1), foreground=0.5, background=0.25)
  np.testing.assert_array_equal(found, [0, 0, box_lib.IGNORED, box_lib.BACKGROUND])


def test_a_box_that_no_anchor_meets_takes_none():
  anchors = np.array([[0., 0, 4, 4], [4, 0, 8, 4]])
  far = np.array([[50., 50, 60, 60]])
  np.testing.assert_array_equal(match(anchors, far, np.ones(1)), [-1, -1])


@pytest.mark.parametrize("seed", range(4))
def test_suppression_equals_a_greedy_loop_for_each_class(seed):
  draw = np.random.default_rng(seed)
  boxes, labels = random_boxes(60, seed=seed, size=30.0), draw.integers(0, 3, 60).astype(np.int32)
  scores = draw.permutation(60).astype(np.float32) / 60
  scores[draw.random(60) < 0.2] = -np.inf
  expected = plain_suppress(boxes, scores, labels, 0.3)
  kept, valid = map(np.asarray, suppress(boxes, scores, labels, count=60, threshold=0.3))
  assert len(expected) < np.sum(scores > -np.inf)
  np.testing.assert_array_equal(kept[valid], expected)
  few, valid = map(np.asarray, suppress(boxes, scores, labels, count=5, threshold=0.3))  # the best of the same
  np.testing.assert_array_equal(few[valid], expected[:5])
  together, valid = map(np.asarray, suppress(boxes, scores, np.zeros_like(labels), count=60, threshold=0.3))
  assert len(together[valid]) < len(expected)


def test_suppression_spares_an_overlap_of_just_the_threshold():
  boxes = np.array([[0., 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 2.5]])  # IoUs of 1/2 and 5/8 with the first
  kept, valid = suppress(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int32), count=3, threshold=0.5)
  np.testing.assert_array_equal(kept[:2], [0, 1])
  np.testing.assert_array_equal(valid, [True, True, False])


def test_a_box_without_area_is_taken_once():
  kept, valid = suppress(np.zeros((2, 4)), np.array([0.5, 0.9]), np.zeros(2, np.int32), count=4)
  np.testing.assert_array_equal(kept[:2], [1, 0])
  np.testing.assert_array_equal(valid, [True, True, False, False])
