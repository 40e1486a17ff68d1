"""The user's own images: what is found, what is split how, and what is refused."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dljax.data.image import folder, labelled
from dljax.errors import UserError
from tests.data.hosts import share
from tests.data.image import own_images
from tests.data.image.own_images import config, looked_up

THREE = {"cat": 10, "dog": 20, "eel": 10}


def build(data, seed=0, batch_size=4, **more):
  return labelled.ImageSet(data).pipelines(
      batch_size=batch_size, eval_batch_size=64, seed=seed, **more)


def names(data):
  """Split -> the names of its images, by the set's own list."""
  images = labelled.ImageSet(data)
  return {split: [photo.name for photo in photos] for split, photos in images.dataset.splits.items()}


def refused(place, seed=0, **fields):
  with pytest.raises(UserError) as error:
    build(looked_up(place, seed, **fields)).train.open()
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_folder_per_class_decides_classes_channels_mean_and_std(tmp_path, caplog):
  root = own_images.folders(tmp_path, THREE)
  (root / "notes.txt").write_text("")
  (root / ".cache").mkdir()
  own_images.image(0, 0).save(root / ".cache" / "0.png")
  found = looked_up(root)
  assert (found.classes, found.num_classes, found.labels) == (("cat", "dog", "eel"), 3, "class")
  assert (found.image_shape, found.num_train_examples) == ((8, 8, 3), 32)
  assert found.class_counts == (8, 16, 8)
  assert "left out what has no image's ending, 1 file: notes.txt" in caplog.text
  data = build(found, batch_size=32)
  data.train.open()
  batch = data.train.batch(0)
  assert abs(batch["image"].mean(axis=(0, 1, 2))).max() < 1e-3
  assert abs(batch["image"].std(axis=(0, 1, 2)) - 1).max() < 1e-3
  assert Counter(batch["label"].tolist()) == {0: 8, 1: 16, 2: 8}
  shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
  assert shapes == {key: (value.shape, value.dtype) for key, value in data.batch_spec.items()}
  assert data.name == str(root) and data.assets()["classes"] == ["cat", "dog", "eel"]


def test_mean_and_std_are_those_of_the_training_images_alone(tmp_path):
  for split, grey in (("train", 100), ("validation", 200), ("test", 250)):
    for name in "ab":
      (tmp_path / split / name).mkdir(parents=True)
      for i in range(2):
        Image.fromarray(np.full((8, 8), grey + i, np.uint8)).save(tmp_path / split / name / f"{i}.png")
  found = looked_up(tmp_path)
  assert found.image_shape == (8, 8, 1)
  assert found.mean == (round(100.5 / 255, 4),) and found.std == (round(0.5 / 255, 4),)
  for i in range(2):
    for name in "ab":
      Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "train" / name / f"{i}.png")
  assert (looked_up(tmp_path).mean, looked_up(tmp_path).std) == ((0.2,), (1.0,))  # a constant has no deviation


@pytest.mark.parametrize("mode, channels", [(mode, 1 if mode in ("L", "LA", "1") else 3) for mode in own_images.MODES])
def test_images_of_any_mode_have_the_channels_that_their_headers_say(tmp_path, mode, channels):
  suffix = "jpg" if mode == "CMYK" else "png"
  for colour, name in enumerate("ab"):
    (tmp_path / name).mkdir()
    for i in range(3):
      own_images.image(colour, i).convert(mode).save(tmp_path / name / f"{i}.{suffix}")
  found = looked_up(tmp_path)
  assert found.image_shape == (8, 8, channels) and len(found.mean) == len(found.std) == channels
  build(found, batch_size=2).train.open()


def test_a_palette_of_greys_has_one_channel(tmp_path):
  for name in "ab":
    (tmp_path / name).mkdir()
    for i in range(3):
      own_images.image(0, i).convert("L").convert("P").save(tmp_path / name / f"{i}.gif")
  assert looked_up(tmp_path).image_shape[-1] == 1


def test_fields_that_are_given_are_not_found(tmp_path):
  root = own_images.folders(tmp_path, {"cat": 4, "dog": 4})
  given = {"classes": ("dog", "cat"), "image_shape": (4, 4, 1), "mean": (0.5,), "std": (0.25,)}
  found = looked_up(root, **given)
  assert {name: found[name] for name in given} == given and found.num_classes == 2
  batch = build(found, batch_size=4)
  batch.train.open()
  assert batch.batch_spec["image"].shape == (4, 4, 4, 1)
  assert looked_up(root, classes=("dog", "cat")).class_counts == (2, 2)


def test_the_split_is_stratified_and_a_function_of_the_seed(tmp_path):
  root = own_images.folders(tmp_path, THREE)
  found = looked_up(root)
  parts = names(found)
  count = {split: Counter(name[:3] for name in part) for split, part in parts.items()}
  assert count == {"train": {"cat": 8, "dog": 16, "eel": 8}, "validation": {"cat": 1, "dog": 2, "eel": 1},
                   "test": {"cat": 1, "dog": 2, "eel": 1}}
  assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 40
  images = labelled.ImageSet(found)
  images.pipelines(batch_size=8, eval_batch_size=8, seed=1)
  assert [photo.name for photo in images.dataset.splits["train"]] != parts["train"]
  other = looked_up(root, shares=(0.5, 0.5, 0.0))
  assert other.test == "" and {k: len(v) for k, v in names(other).items()} == {
      "train": 20, "validation": 20, "test": 0}


def test_twins_come_into_one_split(tmp_path, caplog):
  root = own_images.folders(tmp_path, {"cat": 6, "dog": 6})
  for i in range(6):
    (root / "cat" / f"copy {i}.png").write_bytes((root / "cat" / f"{i}.png").read_bytes())
  for part in names(looked_up(root)).values():
    assert all(f"cat/copy {name[4:]}" in part for name in part if name.startswith("cat/") and "copy" not in name)
  assert "equal images" not in caplog.text
  (root / "dog" / "9.png").write_bytes((root / "cat" / "0.png").read_bytes())
  looked_up(root)
  assert "equal images have different labels: cat/0.png and dog/9.png" in caplog.text


def test_folders_of_splits_are_kept_and_validation_is_split_off_where_it_is_missing(tmp_path, caplog):
  own_images.folders(tmp_path / "Train", {"cat": 20, "dog": 10})
  own_images.folders(tmp_path / "testing", {"cat": 3, "dog": 3}, first=50)
  parts = names(looked_up(tmp_path))
  assert Counter(name.split("/")[0] for name in parts["train"] + parts["validation"]) == {"Train": 30}
  assert len(parts["validation"]) == 3 and len(parts["test"]) == 6
  off = looked_up(tmp_path, validation="")
  assert off.validation == "" and len(names(off)["train"]) == 30
  own_images.folders(tmp_path / "val", {"cat": 2}, first=90)
  parts = names(looked_up(tmp_path))
  assert parts["validation"] == ["val/cat/0.png", "val/cat/1.png"] and len(parts["train"]) == 30
  assert "equal images" not in caplog.text
  (tmp_path / "val" / "cat" / "0.png").write_bytes((tmp_path / "Train" / "cat" / "7.png").read_bytes())
  looked_up(tmp_path)
  assert "equal images have different splits: Train/cat/7.png and val/cat/0.png" in caplog.text


def test_without_a_folder_for_tests_there_is_no_test_split(tmp_path):
  own_images.folders(tmp_path / "train", {"cat": 4, "dog": 4})
  own_images.folders(tmp_path / "val", {"cat": 2, "dog": 2}, first=50)
  found = looked_up(tmp_path)
  assert (found.train, found.validation, found.test) == ("train", "validation", "")
  assert list(build(found, batch_size=4).evals) == ["validation"]


@pytest.mark.parametrize("options", [{}, {"random_resized_crop": 0.5}, {"sampler": "balanced"}], ids=str)
def test_images_from_disk_are_those_from_memory_on_any_hosts(tmp_path, monkeypatch, options):
  found = looked_up(own_images.folders(tmp_path, THREE))
  found.update(options)
  whole = build(found)
  whole.train.open()
  expected = [whole.train.batch(step) for step in (0, 5)]
  monkeypatch.setattr(labelled, "MEMORY_LIMIT", 0)
  parts = [build(found).train for _ in range(2)]
  for host, pipeline in enumerate(parts):
    pipeline.open(share(host, 2))
  for step, batch in zip((0, 5), expected):
    for host, pipeline in enumerate(parts):
      part = pipeline.batch(step)
      for key, value in batch.items():
        np.testing.assert_array_equal(part[key], value[host::2])
  for pipeline in parts:
    pipeline.close()


def test_few_of_each_class_can_be_asked_for(tmp_path):
  found = looked_up(own_images.folders(tmp_path, THREE))
  found.per_class = 3
  train = build(found, batch_size=9).train
  train.open()
  assert Counter(train.batch(0)["label"].tolist()) == {0: 3, 1: 3, 2: 3}


# What is refused


def test_classes_that_cannot_be_learnt_are_refused(tmp_path):
  root = own_images.folders(tmp_path, {"cat": 4, "dog": 2})
  assert "there are only 2 different images of 'dog' in " in refused(root)
  (root / "dog" / "2.png").write_bytes((root / "dog" / "0.png").read_bytes())
  assert "there are only 2 different images of 'dog' in " in refused(root)
  looked_up(root, shares=(0.9, 0.1, 0))
  (root / "eel").mkdir()
  assert f"{root / 'eel'} holds no image" in refused(root)
  (root / "eel").rmdir()
  own_images.image(0, 0).save(root / "1.png")
  assert "1.png lies in no class's folder" in refused(root)
  for path in (root / "1.png", *(root / "dog").iterdir()):
    path.unlink()
  (root / "dog").rmdir()
  assert "there is only one class, cat" in refused(root)
  for path in (root / "cat").iterdir():
    path.unlink()
  assert "holds no image; make a folder for each class" in refused(root)


def test_a_class_that_no_training_image_has_is_refused(tmp_path):
  own_images.folders(tmp_path / "train", {"cat": 4, "dog": 4})
  own_images.folders(tmp_path / "test", {"cat": 2, "emu": 2}, first=50)
  assert "the class 'emu' is in test, but no training image has it" in refused(tmp_path)
  (tmp_path / "test" / "emu").rename(tmp_path / "test" / "dog")
  own_images.folders(tmp_path / "more", {"cat": 1})
  assert "more/cat/0.png lies in no split, but beside test and train" in refused(tmp_path)


@pytest.mark.parametrize("one, other, how", [
    ("Cat", "cat", "case"), ("\u00e9", "e\u0301", None), ("STRASSE", "Stra\u00dfe", "case")])
def test_classes_that_look_alike_are_refused_or_one(tmp_path, one, other, how):
  root = own_images.folders(tmp_path, {one: 4, "dog": 4, other: 4})
  if how is None:  # the same text, written in two ways
    assert looked_up(root).classes == ("dog", "\u00e9")
    assert looked_up(root, classes=("e\u0301", "dog")).num_classes == 2
    return
  assert f"the classes {one!r} and {other!r} differ only by {how}; give them one name" in refused(root)
  assert looked_up(root, classes=(other, one, "dog")).num_classes == 3  # whoever names them means it


def test_a_class_that_was_not_asked_for_is_named(tmp_path):
  root = own_images.folders(tmp_path, {"cat": 4, "dog": 4})
  assert "cat/0.png: 'cat' is none of the 1 classes (dog)" in refused(root, classes=("dog",))
  assert f"--config.data.num_classes=5: {root} has 2 classes" in refused(root, num_classes=5)
  assert "0.png: is an image; name a folder" in refused(root / "cat" / "0.png")
  assert "own data have the split train; write train" in refused(root, train="train[:50%]")


def test_a_file_that_is_no_image_is_named(tmp_path):
  root = own_images.folders(tmp_path, {"cat": 4, "dog": 4})
  (root / "cat" / "3.png").write_bytes(b"no")
  assert "cat/3.png cannot be used (is no image that Pillow can read); mend the file, remove it" in refused(
      root, shares=(1.0, 0.0, 0.0))


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "a$b_{", "two\nlines", "-x [1]"])
def test_names_of_classes_are_data(tmp_path, name):
  found = looked_up(own_images.folders(tmp_path, {name: 4, "dog": 4}))
  shown = {os.fsdecode(b"caf\xe9"): r"caf\xe9", "two\nlines": r"two\nlines"}.get(name, name)
  assert shown in found.classes and json.dumps(found.to_dict()).isascii()
  shown.encode()


# Continuing and evaluating


def _assets(found):
  data = build(found)
  data.train.open()
  return json.loads(json.dumps(data.assets()))


@pytest.mark.parametrize("change, message", [
    (lambda root: own_images.image(0, 99).save(root / "cat" / "new.png"), "added: cat/new.png"),
    (lambda root: (root / "dog" / "1.png").unlink(), "removed: dog/1.png"),
    (lambda root: own_images.image(0, 99).save(root / "cat" / "1.png"), "changed: cat/1.png"),
    (lambda root: (root / "cat" / "1.png").rename(root / "dog" / "9.png"), "added: dog/9.png; removed: cat/1.png")],
    ids=["added", "removed", "changed", "moved"])
def test_a_folder_that_has_changed_is_refused_by_what_changed(tmp_path, change, message):
  root = own_images.folders(tmp_path, {"cat": 5, "dog": 5})
  found = looked_up(root)
  assets = _assets(found)
  again = build(found)
  again.restore(assets)
  again.train.open()
  first = again.fingerprint()
  change(root)
  again = build(found)
  again.restore(assets)
  with pytest.raises(UserError, match=f"--config.data.folder=.* has changed since the run began .{message}"):
    again.train.open()
  changed = build(found)
  changed.train.open()
  assert changed.fingerprint() != first


def test_another_folder_is_evaluated_as_a_whole_but_not_trained_on(tmp_path, caplog):
  found = looked_up(own_images.folders(tmp_path / "one", {"cat": 10, "dog": 10}))
  assets = _assets(found)
  other = own_images.folders(tmp_path / "other", {"dog": 5, "cat": 4}, first=50)
  found.folder = str(other)
  data = build(found)
  data.restore(assets)
  assert list(data.evals) == ["test"] and data.name == str(other)
  data.evals["test"].open()
  labels = data.evals["test"].batch(0)
  assert labels["label"][labels["mask"] > 0].tolist() == [0] * 4 + [1] * 5
  with pytest.raises(UserError, match="this is not what the run was trained on"):
    data.train.open()
  (other / "emu").mkdir()
  own_images.image(0, 0).save(other / "emu" / "0.png")
  data = build(found)
  data.restore(assets)
  with pytest.raises(UserError, match="emu/0.png: 'emu' is none of the 2 classes .cat, dog."):
    data.evals["test"].open()
  assert "trained on" not in caplog.text


def test_images_that_the_run_was_trained_on_are_no_test_of_it(tmp_path, caplog):
  root = own_images.folders(tmp_path / "one", {"cat": 10, "dog": 10})
  found = looked_up(root)
  before = build(found).evals["test"]
  before.open()
  assets = _assets(found)
  root.rename(tmp_path / "moved")
  found.folder = str(tmp_path / "moved")

  def test_images():
    data = build(found)
    data.restore(assets)
    data.evals["test"].open()
    batch = data.evals["test"].batch(0)
    return batch["image"][batch["mask"] > 0]

  np.testing.assert_array_equal(test_images(), before.batch(0)["image"][:2])  # the same data: the same split
  own_images.image(0, 99).save(tmp_path / "moved" / "cat" / "new.png")
  assert len(test_images()) == 5  # two for validation, two for test, and the new one
  assert "left out what the run was trained on, 16 of 21 images: " in caplog.text
  own_images.folders(tmp_path / "moved" / "train", {"cat": 1})
  for name in ("cat", "dog"):
    (tmp_path / "moved" / name).rename(tmp_path / "moved" / "train" / f"{name} ")
  own_images.folders(tmp_path / "moved" / "test", {"cat": 3}, first=70)
  assert len(test_images()) == 3  # a folder's own test images


# Tables


def test_a_table_names_a_class_for_each_image(tmp_path, caplog):
  root = own_images.table(tmp_path, "file,label,split,camera", [
      "cat,train,left", "dog,train,right", "cat,val,left", "dog,test,right"])
  own_images.image(0, 0).save(root / "more.png")
  found = looked_up(root, groups=("camera",))
  assert (found.labels, found.classes, found.num_train_examples) == ("class", ("cat", "dog"), 16)
  assert f"left out what has no label there, 1 image: {root / 'more.png'}" in caplog.text
  assert looked_up(root / "labels.csv").classes == ("cat", "dog")
  test = build(found).evals["test"]
  test.open()
  batch = test.batch(0)
  assert batch["label"][:7].tolist() == [1] * 7 and set(batch["host/group/camera"][:7]) == {"right"}
  assert len(names(found)["validation"]) == 7


@pytest.mark.parametrize("header, rows, fields", [
    ("file,label", ["a;b", "b", "", "a"], {}), ("file,label", ["a|b", "b", "", "a"], {}),
    ("file,a,b", ["1,1", "0,1", "0,0", "1,0"], {}),
    ("name,no,b,a", ["x,1,1", "x,1,0", "x,0,0", "x,0,1"],
     {"file_column": "name", "label_columns": ("a", "b")})], ids=["semicolons", "bars", "columns", "fields"])
def test_a_table_names_several_classes_for_each_image(tmp_path, header, rows, fields):
  found = looked_up(own_images.table(tmp_path, header, rows, 40), **fields)
  assert (found.labels, found.classes) == ("classes", ("a", "b"))
  data = build(found)
  data.train.open()
  batch = data.train.batch(0)
  assert batch["label"].shape == (4, 2) and data.batch_spec["label"].shape == (4, 2)
  colour = batch["image"].mean(axis=(1, 2)).argmax(axis=1)  # the image's number mod 3
  assert len(np.unique(np.column_stack([colour, batch["label"]]), axis=0)) > 2
  first = labelled.ImageSet(found)
  chosen = {photo.name: photo.label for part in first.dataset.splits.values() for photo in part}
  assert [chosen[f"{i}.png"] for i in range(4)] == [(0, 1), (1,), (), (0,)]
  assert found.class_counts == tuple(
      sum(i in photo.label for photo in first.dataset.splits["train"]) for i in range(2))


def test_classes_of_unequal_number_take_turns_where_an_image_has_several(tmp_path):
  rows = ["a", "a", "a;b", "a", "a", "", "a", "c", "a", "a"]
  data = build(looked_up(own_images.table(tmp_path, "file,label", rows, 40), sampler="balanced"))
  data.train.open()
  label = np.concatenate([data.train.batch(step)["label"] for step in range(9)])
  assert label.shape == (36, 3)  # nine turns of a, b, c and none; b comes with a
  assert label[:, 1].sum() >= 9 and label[:, 2].sum() == 9
  assert (label.sum(axis=1) == 0).sum() == 9


def test_images_are_grouped_by_columns_that_give_each_one_value(tmp_path):
  found = looked_up(own_images.table(tmp_path, "file,label,camera", ["a;b,x", "b,y", ",x"]), groups=("camera",))
  test = build(found).evals["test"]
  test.open()
  assert set(test.batch(0)["host/group/camera"][:3]) <= {"x", "y"}
  with pytest.raises(UserError, match="--config.data.groups: there is no 'label'; choose one of: camera"):
    build(looked_up(tmp_path, groups=("label",))).evals["test"].open()
  own_images.table(tmp_path / "plain", "file,label", ["a;b", "b", ""])
  with pytest.raises(UserError, match="--config.data.groups=camera: .*plain has nothing to group by; drop it"):
    build(looked_up(tmp_path / "plain", groups=("camera",))).evals["test"].open()


def test_a_rare_class_of_several_is_in_every_split(tmp_path):
  rows = ["a"] * 9 + ["a;rare"]
  found = looked_up(own_images.table(tmp_path, "file,label", rows, 100))
  images = labelled.ImageSet(found).dataset.splits
  rare = found.classes.index("rare")
  assert {split: sum(rare in photo.label for photo in photos) for split, photos in images.items()} == {
      "train": 8, "validation": 1, "test": 1}


def test_a_table_gives_numbers_that_training_normalises(tmp_path):
  root = own_images.table(tmp_path, "file,age,height", ["10,1.5", "30,1.5", "50,4.5"])
  found = looked_up(root, label_columns=("age", "height"))
  assert (found.labels, found.classes, found.num_classes) == ("number", ("age", "height"), 2)
  data = build(found, batch_size=found.num_train_examples)
  data.train.open()
  label = data.train.batch(0)["label"]
  np.testing.assert_allclose(label.mean(axis=0), 0, atol=1e-6)
  np.testing.assert_allclose(label.std(axis=0), 1, rtol=1e-6)
  back = np.unique((label * found.target_std + found.target_mean).round(3), axis=0)
  np.testing.assert_allclose(back, [[10, 1.5], [30, 1.5], [50, 4.5]])
  constant = looked_up(own_images.table(tmp_path / "c", "file,label", ["0.1"]))
  assert constant.target_std == (1.0,) and constant.target_mean == (pytest.approx(0.1),)


@pytest.mark.parametrize("header, rows, fields, message", [
    ("file,label", ["1", "2"], {}, "whole numbers such as 1, which may be classes or amounts; add --config.data.labels"),
    ("file,label", ["cat", "", "dog"], {}, "labels.csv, line 3: has no label"),
    ("file,label", ["1.5", "x", "2"], {"labels": "number"}, "line 3: 'x' in the column label is no number"),
    ("file,label", ["1.5", "1e999"], {"labels": "number"}, "line 3: '1e999' in the column label is no number"),
    ("file,label", ["1.5", "1_0"], {"labels": "number"}, "line 3: '1_0' in the column label is no number"),
    ("file,label,split", ["cat,train", "dog,tset"], {}, "line 3: 'tset' is no split"),
    ("file,label,split", ["cat,test", "dog,test"], {}, "names no image for the split train"),
    ("file,class", ["cat", "dog"], {}, "has no column label, and class do not all hold 0 or 1"),
    ("name,label", ["cat", "dog"], {}, "--config.data.file_column=file: .* there is no 'file'"),
    ("file,label", ["cat", "dog"], {"split_column": "part"}, "--config.data.split_column=part"),
    ("file,label", ["cat", "dog"], {"label_columns": ("lable",)}, "did you mean label"),
    ("file,a,b", ["1,cat", "0,dog"], {"label_columns": ("a", "b")}, "hold neither numbers nor only 0 and 1"),
    ("file,a,b", ["1,2", "0,1"], {"label_columns": ("a", "b"), "labels": "classes"}, "hold more than 0 and 1"),
    ("file,a,b", ["x,y", "z,y"], {"label_columns": ("a", "b"), "labels": "class"}, "name one column"),
    ("file,label", ["", ""], {"labels": "classes"}, "no image has a label"),
    ("file,label", ["cat", "cat"], {}, "there is only one class, cat"),
    ("file,label", ["cat", "dog"], {"sampler": "even"}, "--config.data.sampler='even': choose one of"),
    ("file,label", ["1.5", "2"], {"sampler": "balanced"}, "--config.data.sampler='balanced': has no meaning"),
    ("file,label", ["1.5", "2"], {"class_weights": ("balanced",)}, "class_weights=balanced: has no meaning")])
def test_a_table_of_another_form_is_refused(tmp_path, header, rows, fields, message):
  with pytest.raises(UserError, match=message) as error:
    build(looked_up(own_images.table(tmp_path, header, rows, 12), **fields))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("cells, message", [
    (["1,5", "20", "3,25"], "the column label has decimal commas, such as 1,5; write decimal points"),
    (["1.5", "NA", "2.5"], "line 3: 'NA' is no number, but most cells of the column label are; mend it, or for classes add")])
def test_numbers_that_are_not_written_as_such_are_no_classes(tmp_path, cells, message):
  root = own_images.table(tmp_path, "file,label", cells, 12)
  table = (root / "labels.csv").read_text().splitlines()
  (root / "labels.csv").write_text("\n".join(line.replace(",", ";", 1) for line in table))
  with pytest.raises(UserError, match=message):
    looked_up(root)
  assert looked_up(root, labels="class", shares=(1.0, 0.0, 0.0)).num_classes == 3


def test_tables_as_other_systems_write_them(tmp_path, caplog):
  root = own_images.table(tmp_path / "photos", "file,label", ["cat", '"cat,dog"', "emu"])
  lines = (root / "labels.csv").read_text().splitlines()
  (root / "labels.csv").unlink()
  (root / "train.csv").write_bytes("\r\n".join([lines[0], *(rf".\{line}" for line in lines[1:])]).encode("utf-8-sig"))
  with pytest.raises(UserError, match=f"0.png lies in no .*, or name the table by --config.data.folder={root}/train.csv"):
    looked_up(root)
  (root / "train.csv").rename(root / "Labels.CSV")
  assert looked_up(root).classes == ("cat", "cat,dog", "emu")
  assert "each of the labels cat,dog is read as one class, though parts of it are labels too" in caplog.text


def test_files_that_are_missing_or_named_twice_are_refused(tmp_path):
  root = own_images.table(tmp_path, "file,label", ["cat", "dog"])
  text = (root / "labels.csv").read_text()
  (root / "labels.csv").write_text(text + "no.png,cat\nnot.png,dog\n")
  assert "line 32: there is no file " in refused(root) and "2 of 32 are missing (no.png, not.png)" in refused(root)
  (root / "labels.csv").write_text(text + "./3.png,cat\n")
  assert "line 32: ./3.png stands in line 5 too" in refused(root)
  (root / "labels.csv").write_text(text + ",cat\n")
  assert "line 32: names no file" in refused(root)


def test_labels_of_a_table_are_in_the_fingerprint(tmp_path):
  root = own_images.table(tmp_path, "file,label", ["cat", "dog"])
  found = looked_up(root)
  assets, first = _assets(found), build(found).fingerprint()
  text = (root / "labels.csv").read_text()
  (root / "labels.csv").write_text(text.replace("0.png,cat", "0.png,dog", 1))
  assert build(found).fingerprint() != first
  again = build(found)
  again.restore(assets)
  with pytest.raises(UserError, match="has changed since the run began .other labels, texts or splits"):
    again.train.open()
  (root / "labels.csv").write_text(text)
  assert build(found).fingerprint() == first


# Before the data are there


def test_without_the_folder_the_fields_that_a_dry_run_needs_are_named(tmp_path):
  place = tmp_path / "none"
  message = refused(place)
  assert f"--config.data.folder={place}: there is no such folder or table" in message
  assert "--config.data.num_classes and --config.data.image_shape" in message
  assert "--config.data.num_classes" not in refused(place, num_classes=7)
  found = looked_up(place, num_classes=7, image_shape=(16, 16, 3))
  assert build(found).batch_spec["image"].shape == (4, 16, 16, 3)
  with pytest.raises(UserError, match="there is no such folder"):
    build(found).train.open()


def test_the_sample_of_mean_and_std_is_drawn_by_the_seed(tmp_path, monkeypatch):
  root = own_images.folders(tmp_path, {"cat": 20, "dog": 20})
  monkeypatch.setattr(folder, "SAMPLE", 3)
  one, other = looked_up(root), looked_up(root, image_shape=(8, 8, 3))
  assert one.mean == other.mean and one.num_train_examples == 32
  assert config(root).mean != one.mean


def test_damaged_images_are_left_out_where_that_was_asked_for(tmp_path):
  root = own_images.folders(tmp_path, {"cat": 10, "dog": 10})
  for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
    (root / name).write_bytes((root / name).read_bytes()[:50])
  found = looked_up(root, skip_corrupt=3)
  data = build(found)
  for pipeline in (data.train, *data.evals.values()):
    pipeline.open()
  assert data.train.num_examples == found.num_train_examples == sum(found.class_counts)
  assert sum(pipeline.num_examples for pipeline in (data.train, *data.evals.values())) == 17
  named = sum(data.assets()["skipped"]["examples"].values(), [])
  assert sorted(named) == [str(root / name) for name in ("cat/1.png", "cat/2.png", "dog/3.png")]
  assert looked_up(root, per_class=2, skip_corrupt=3).class_counts == (2, 2)
