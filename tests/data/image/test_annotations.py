"""What others' tools write about boxes, and every way in which it can be wrong."""

import copy
import json

import numpy as np
import pytest

from dljax.data.image import annotations
from dljax.errors import UserError

COCO = {
    "images": [{"id": 9, "file_name": "b.jpg", "width": 64, "height": 48}, {"id": "x", "file_name": "a.jpg"}],
    "categories": [{"id": 90, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 0, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 90, "bbox": [1, 2, 3.5, 4], "iscrowd": 1},
        {"id": 2, "image_id": 9, "category_id": 1, "bbox": [0, 0, 10, 20]}],
}


def test_categories_are_in_the_order_of_their_ids_whatever_these_are(tmp_path):
  found = annotations.parse_coco(tmp_path / "f.json", COCO)
  assert found.classes == ["cat", "dog"]  # of two dogs the one without boxes is left out
  assert list(found.images) == ["b.jpg", "a.jpg"]
  boxes = found.images["b.jpg"]
  np.testing.assert_array_equal(boxes.corners, [[1, 2, 4.5, 6], [0, 0, 10, 20]])
  assert (boxes.labels.tolist(), boxes.crowd.tolist(), boxes.size) == ([1, 0], [True, False], (64, 48))
  empty = found.images["a.jpg"]  # an image without boxes is kept
  assert (empty.corners.shape, empty.size) == ((0, 4), None)
  other = found.relabelled(["dog", "bird", "cat"])
  assert other.images["b.jpg"].labels.tolist() == [0, 2]
  with pytest.raises(UserError, match=r"f.json: annotation 2 has the class 'cat', which is none of the classes \(dog\)"):
    found.relabelled(["dog"])


def _set(path, value):
  def change(coco):
    *parents, last = path
    for parent in parents:
      coco = coco[parent]
    coco[last] = value

  return change


@pytest.mark.parametrize("change, words", [
    (_set(["images"], {}), "'images' is no list of objects"),
    (_set(["annotations", 0], 7), "'annotations' is no list of objects"),
    (_set(["images", 1, "id"], 9), "two images have the id 9"),
    (_set(["images", 1, "id"], None), "an image has the id None"),
    (_set(["images", 1, "id"], True), "an image has the id True"),
    (_set(["images", 1, "file_name"], "b.jpg"), "two images have the file_name 'b.jpg'"),
    (_set(["images", 1, "file_name"], 3), "image 'x' has no file_name"),
    (_set(["images", 0, "width"], -4), "image 9 has the width and height [-4, 48]"),
    (_set(["images", 0, "height"], "48"), "image 9 has the width and height"),
    (_set(["images", 0, "height"], 10**400), "image 9 has the width and height"),
    (_set(["categories", 0, "id"], 1), "two categories have the id 1"),
    (_set(["categories", 0, "id"], "1"), "a category has the id '1'"),
    (_set(["categories", 0, "name"], ""), "category 90 has the name ''"),
    (_set(["categories", 0, "name"], "a\nb"), "category 90 has the name 'a\\nb'"),
    (_set(["categories", 1, "name"], "dog"), "two categories have the name 'dog'"),
    (_set(["categories"], []), "there are 0 classes"),
    (_set(["annotations", 1, "id"], 1), "two annotations have the id 1"),
    (_set(["annotations", 1, "image_id"], 5), "annotation 2 is of image 5, which is not among the images"),
    (_set(["annotations", 1, "image_id"], [9]), "the image of annotation 2 has the id [9]"),
    (_set(["annotations", 1, "category_id"], 2), "annotation 2 has the category 2"),
    (_set(["annotations", 1, "iscrowd"], 2), "annotation 2 has iscrowd 2"),
    (_set(["annotations", 1, "bbox"], [1, 2, 3]), "annotation 2 has the bbox [1, 2, 3]"),
    (_set(["annotations", 1, "bbox"], [1, 2, 3, float("nan")]), "annotation 2 has the bbox [1, 2, 3, nan]"),
    (_set(["annotations", 1, "bbox"], [1, 2, 3, 1e300]), "annotation 2 has the bbox"),
    (_set(["annotations", 1, "bbox"], [1, 2, 3, True]), "annotation 2 has the bbox"),
    (_set(["annotations", 1, "bbox"], None), "annotation 2 has the bbox None"),
])
def test_damaged_objects_of_coco_are_told(tmp_path, change, words):
  coco = copy.deepcopy(COCO)
  coco["annotations"].append({"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]})  # needs no id
  annotations.parse_coco(tmp_path / "f.json", coco)
  change(coco)
  with pytest.raises(UserError) as error:
    annotations.parse_coco(tmp_path / "f.json", coco)
  assert str(error.value).startswith(f"{tmp_path}/f.json: {words}") and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("content, words", [
    (b'{"images": [', "is not JSON"), (b"[" * 100_000, "is not JSON"), (b"\xff\xfe\x00", "is not UTF-8 text"),
    (b"1" * 5000, "is not JSON")])
def test_what_is_no_json_is_told_in_a_line(tmp_path, content, words):
  (tmp_path / "f.json").write_bytes(content)
  with pytest.raises(UserError, match=rf"f.json {words} .*[)]; ") as error:
    annotations.read_json(tmp_path / "f.json")
  assert "\n" not in str(error.value)


def test_a_file_is_measured_before_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setitem(annotations.MOST_BYTES, ".json", 10)
  (tmp_path / "f.json").write_bytes(json.dumps(COCO).encode())
  with pytest.raises(UserError, match="f.json has .* bytes, and 10 are read at most"):
    annotations.read_json(tmp_path / "f.json")


@pytest.mark.parametrize("name", ["../b.jpg", "/etc/b.jpg", "a/../../b.jpg", "..\\b.jpg", "C:\\b.jpg", "http://h/b.jpg"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
  with pytest.raises(UserError, match="leads out of the folder"):
    annotations.safe_name(name, tmp_path / "f.json")
  assert annotations.safe_name("a\\./b.jpg", tmp_path / "f.json") == "a/b.jpg"


def test_lines_of_yolo_are_boxes_or_points(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("1 0.5 0.5 0.25 1e-1\n\n  0 0.1 0.2 0.3 0.2 0.2 0.6 \n")
  found = annotations.parse_yolo(file, 2)
  np.testing.assert_allclose(found.corners, [[0.375, 0.45, 0.625, 0.55], [0.1, 0.2, 0.3, 0.6]])
  assert (found.labels.tolist(), found.relative, list(found.places)) == ([1, 0], True, ["line 1", "line 3"])
  assert annotations.parse_yolo(tmp_path / "none.txt", 2).corners.shape == (0, 4)


@pytest.mark.parametrize("line, words", [
    ("0 0.5 0.5 0.1", "has 4 numbers, and needs 5"), ("0 0.5 0.5 0.1 0.1 0.9", "has 6 numbers"),
    ("0 0.5 nan 0.1 0.1", "has 'nan'"), ("0 0.5 1_0 0.1 0.1", "has '1_0'"), ("0 0.5 0,5 0.1 0.1", "has '0,5'"),
    ("0 0.5 1e999 0.1 0.1", "has '1e999'"), ("2 0.5 0.5 0.1 0.1", "has the class 2, and the classes are 0 to 1"),
    ("0.5 0.5 0.5 0.1 0.1", "has the class 0.5"), ("-1 0.5 0.5 0.1 0.1", "has the class -1"),
    ("cat 0.5 0.5 0.1 0.1", "has 'cat'")])
def test_damaged_lines_of_yolo_are_told(tmp_path, line, words):
  (tmp_path / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
  with pytest.raises(UserError) as error:
    annotations.parse_yolo(tmp_path / "a.txt", 2)
  assert str(error.value).startswith(f"{tmp_path}/a.txt, line 2: {words}"), error.value


@pytest.mark.parametrize("content, names", [
    ("names: [no, 'yes', 3]", ["no", "yes", "3"]),  # in YAML, no is False
    ("names:\n  1: dog\n  0: cat\n", ["cat", "dog"]), ("nc: 2", None),
    ("names: {0: a, 2: b}", "the keys of 'names' are not 0, 1, 2"), ("names: 7", "'names' is no list"),
    ("names: [a, [b]]", "class 1 has the name ['b']"), ("names: [a, a]", "two classes have the name 'a'"),
    ("names: []", "there are 0 classes"), ("a: [", "is not YAML"), ("[" * 5000, "is not YAML"),
    ("a: &a [x,x]\nb: &b [*a,*a]\nnames: [*b,*b]", "class 0 has the name"),
    ("names: !!python/object/apply:os.system ['true']", None)])
def test_the_names_in_a_yaml_file(tmp_path, content, names):
  file = tmp_path / "data.yaml"
  file.write_text(content)
  if names is None and "python" not in content or isinstance(names, list):
    assert annotations.yolo_classes(file) == names
  elif names is None:  # the tag is text, and nothing runs
    assert annotations.yolo_classes(file) == ["true"]
  else:
    with pytest.raises(UserError) as error:
      annotations.yolo_classes(file)
    assert names in str(error.value) and "\n" not in str(error.value), error.value
