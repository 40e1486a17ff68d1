"""Downloading and preparing, with small synthetic archives and a server on this machine."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

from dljax import downloads
from dljax.data import prepare, sources
from dljax.data.datasets import DOWNLOADED
from dljax.data.image import labelled
from dljax.errors import UserError

RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Info:
  """As TFDS registers a file."""

  size: int
  checksum: str


def info(data):
  return Info(len(data), hashlib.sha256(data).hexdigest())


def idx(array):
  sizes = b"".join(size.to_bytes(4) for size in array.shape)
  return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.fixture
def mnist(monkeypatch):
  """(files, images, labels) of an MNIST of 12 and 5 examples, registered in place of the real one."""
  from dljax.data.datasets import stock

  images = {"train": RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8),
            "t10k": RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)}
  labels = {part: RNG.integers(0, 10, len(pixels), dtype=np.uint8) for part, pixels in images.items()}
  files = {}
  for part in images:
    files[f"{part}-images-idx3-ubyte.gz"] = idx(images[part])
    files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels[part])
  for builder in stock.Mnist, stock.FashionMnist:
    infos = {builder.URL + name: info(data) for name, data in files.items()}
    monkeypatch.setattr(builder, "url_infos", infos)
  monkeypatch.setattr(stock.mnist, "_TRAIN_EXAMPLES", 12)
  monkeypatch.setattr(stock.mnist, "_TEST_EXAMPLES", 5)
  return files, images, labels


def write(folder, files):
  folder.mkdir(parents=True, exist_ok=True)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  return folder


def read(name, split, channels, monkeypatch, root):
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  records = sources.open_dataset(name).records(split)
  return [labelled.decode_record(record, channels) for record in records[range(len(records))]]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_from_files_at_hand(name, mnist, tmp_path, monkeypatch):
  files, images, labels = mnist
  path = prepare.prepare(name, tmp_path / "tfds", write(tmp_path / "manual", files))
  assert path == tmp_path / "tfds" / name / "3.0.1"
  for split, part in ("train", "train"), ("test", "t10k"):
    examples = read(name, split, 1, monkeypatch, tmp_path / "tfds")
    known = {pixels.tobytes(): label for pixels, label in zip(images[part], labels[part])}
    assert {e["image"].tobytes(): e["label"] for e in examples} == known
  names = sources.open_dataset(name).features["label"].names
  assert names[9] == ("Ankle boot" if name == "fashion_mnist" else "9")
  (tmp_path / "manual").rename(tmp_path / "gone")
  assert prepare.prepare(name, tmp_path / "tfds") == path  # it is there: nothing to do


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_files_at_hand(name, tmp_path, monkeypatch):
  builder = DOWNLOADED[name]()
  fine = name == "cifar100"
  members = ["train.bin", "test.bin"] if fine else [
      *(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
  archive, expected = io.BytesIO(), {}
  with tarfile.open(fileobj=archive, mode="w:gz") as tar:
    def add(member, data):
      entry = tarfile.TarInfo(("cifar-100-binary/" if fine else "cifar-10-batches-bin/") + member)
      entry.size = len(data)
      tar.addfile(entry, io.BytesIO(data))

    for member in members:
      pixels = RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
      label = RNG.integers(0, 100 if fine else 10, 3, dtype=np.uint8)
      coarse = RNG.integers(0, 20, 3, dtype=np.uint8)
      prefix = np.stack([coarse, label], 1) if fine else label[:, None]
      add(member, np.concatenate([prefix, pixels.reshape(3, -1)], axis=1).tobytes())
      split = "test" if "test" in member else "train"
      expected.setdefault(split, {}).update(zip((p.transpose(1, 2, 0).tobytes() for p in pixels), label))
    if fine:
      add("coarse_label_names.txt", "\n".join(f"group{i}" for i in range(20)).encode())
      add("fine_label_names.txt", "\n".join(f"class{i}" for i in range(100)).encode())
    else:
      add("batches.meta.txt", "\n".join(f"class{i}" for i in range(10)).encode() + b"\n\n")
  url = next(iter(builder.url_infos))
  file = url.rpartition("/")[2]
  monkeypatch.setattr(builder, "url_infos", {url: info(archive.getvalue())})
  path = prepare.prepare(name, tmp_path / "tfds", write(tmp_path / "manual", {file: archive.getvalue()}))
  assert path.name == "3.0.2"
  for split, known in expected.items():
    examples = read(name, split, 3, monkeypatch, tmp_path / "tfds")
    assert {e["image"].tobytes(): e["label"] for e in examples} == known
  assert sources.open_dataset(name).features["label"].names[7] == "class7"


@pytest.mark.parametrize("filters", [True, False])  # Python before 3.11.4 has none
@pytest.mark.parametrize("member", ["../outside", "a/../../outside", "link"])
def test_an_archive_writes_nothing_outside_of_its_folder(member, filters, tmp_path, monkeypatch):
  from dljax.data.datasets import stock

  if not filters:
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
  folder = tmp_path / "files"
  folder.mkdir()
  with tarfile.open(folder / "set.tar.gz", "w:gz") as archive:
    entry = tarfile.TarInfo(member)
    if member == "link":
      entry.type, entry.linkname = tarfile.SYMTYPE, "../../outside"
    archive.addfile(entry, io.BytesIO())
  with pytest.raises(UserError, match="set.tar.gz cannot be unpacked"):
    stock._LocalFiles(folder).download_and_extract("https://example.com/set.tar.gz")
  assert {path.name for path in tmp_path.iterdir()} == {"files"}
  assert not (folder / "outside").exists() and not (folder / "set" / "link").is_symlink()


def test_stock_builders_keep_names_versions_features_and_checksums():
  from tensorflow_datasets.datasets.tiny_shakespeare import tiny_shakespeare_dataset_builder as tiny_shakespeare
  from tensorflow_datasets.image_classification import cifar, mnist

  originals = {"mnist": mnist.MNIST, "fashion_mnist": mnist.FashionMNIST, "cifar10": cifar.Cifar10,
               "cifar100": cifar.Cifar100, "tiny_shakespeare": tiny_shakespeare.Builder}
  assert set(originals) <= set(DOWNLOADED)
  for name, original in originals.items():
    ours = DOWNLOADED[name]()
    assert (ours.name, ours.VERSION) == (original.name, original.VERSION) == (name, original.VERSION)
    assert ours.url_infos == original.url_infos and len(ours.url_infos) in (1, 4)
    features = [builder.info.features.to_json() for builder in (
        ours(folder=None, data_dir="/nonexistent"), original(data_dir="/nonexistent"))]
    assert features[0] == features[1]


def test_wrong_or_missing_files_at_hand(mnist, tmp_path):
  files, _, _ = mnist
  manual = write(tmp_path / "manual", files)
  name = "train-images-idx3-ubyte.gz"
  (manual / name).write_bytes(files[name][:-1] + b"!")
  with pytest.raises(UserError, match=f"--manual_dir: .*{name} does not have TFDS's checksum"):
    prepare.prepare("mnist", tmp_path / "tfds", manual)
  (manual / name).unlink()
  with pytest.raises(UserError, match=f"--manual_dir: .* lacks {name}; get it from https://"):
    prepare.prepare("mnist", tmp_path / "tfds", manual)
  with pytest.raises(UserError, match="--manual_dir: .*nowhere is not a folder"):
    prepare.prepare("mnist", tmp_path / "tfds", tmp_path / "nowhere")
  assert not list((tmp_path / "tfds").glob("mnist*"))


class Server(http.server.BaseHTTPRequestHandler):
  """Serves `files`; breaks off after `budget` bytes of a reply; notes the Range headers."""

  files, budget, ranges, honours_range = {}, 10**9, [], True

  def do_GET(self):
    data = self.files.get(self.path[1:])
    if data is None:
      self.send_error(404)
      return
    asked = self.headers.get("Range")
    self.ranges.append(asked)
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.honours_range else 0
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(data) - start))
    self.end_headers()
    self.wfile.write(data[start:start + self.budget])

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  handler = type("Handler", (Server,), {"ranges": []})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{httpd.server_address[1]}/"
    yield handler
    httpd.shutdown()


@pytest.mark.parametrize("honours_range", [True, False])
def test_download_goes_on_where_the_connection_broke(server, tmp_path, honours_range):
  data = RNG.bytes(300_000)
  server.files, server.budget, server.honours_range = {"big": data}, 130_000, honours_range
  if honours_range:
    prepare.fetch(server.url + "big", tmp_path / "big", len(data))
    assert server.ranges == [None, "bytes=130000-", "bytes=260000-"]
  else:
    with pytest.raises(UserError, match="no network .the connection broke off"):
      prepare.fetch(server.url + "big", tmp_path / "big", len(data))
    server.budget = len(data)
    prepare.fetch(server.url + "big", tmp_path / "big", len(data))  # sent from the start: not appended
  assert (tmp_path / "big").read_bytes() == data
  assert not (tmp_path / "big.part").exists()


def test_a_download_may_break_off_as_often_as_it_brings_something(server, tmp_path):
  data = RNG.bytes(10_000 * (downloads.ATTEMPTS + 2))
  server.files, server.budget = {"big": data}, 10_000
  prepare.fetch(server.url + "big", tmp_path / "big", len(data))
  assert (tmp_path / "big").read_bytes() == data


def test_a_second_run_resumes_the_first(server, tmp_path):
  data = RNG.bytes(100_000)
  (tmp_path / "big.part").write_bytes(data[:60_000])
  server.files = {"big": data}
  prepare.fetch(server.url + "big", tmp_path / "big", len(data))
  assert server.ranges == ["bytes=60000-"] and (tmp_path / "big").read_bytes() == data


def test_downloads_are_checked(server, tmp_path):
  good, bad = RNG.bytes(1000), RNG.bytes(1000)
  server.files = {"set.gz": bad}
  url = server.url + "set.gz"
  with pytest.raises(UserError, match="checksum"):
    prepare.collect({url: info(good)}, tmp_path, download=True)
  assert not list(tmp_path.iterdir())  # so that the next run starts afresh
  server.files = {"set.gz": good}
  prepare.collect({url: info(good)}, tmp_path, download=True)
  server.files = {}
  prepare.collect({url: info(good)}, tmp_path, download=True)  # at hand: the server is not asked
  with pytest.raises(UserError, match="404"):
    prepare.collect({server.url + "other": info(good)}, tmp_path, download=True)


def test_mnist_by_download(server, mnist, tmp_path, monkeypatch):
  from dljax.data.datasets import stock

  files, _, _ = mnist
  server.files, server.budget = files, 2000
  monkeypatch.setattr(stock.mnist.MNIST, "URL", server.url)
  infos = {server.url + name: info(data) for name, data in files.items()}
  monkeypatch.setattr(stock.Mnist, "url_infos", infos)
  assert prepare.main(["mnist", f"--data_dir={tmp_path}"]) == 0
  assert len(read("mnist", "train", 1, monkeypatch, tmp_path)) == 12


def test_nobody_answers(tmp_path):
  with pytest.raises(UserError, match="no network"):
    prepare.fetch("http://127.0.0.1:9/mnist.gz", tmp_path / "mnist.gz", 10)
  with pytest.raises(UserError, match="no network"):
    prepare.fetch("http://no-such-host.invalid/mnist.gz", tmp_path / "mnist.gz", 10)


@pytest.mark.parametrize("arguments, message", [
    (["minst"], "there is no 'minst'; did you mean mnist"),
    (["cifar-10"], "there is no 'cifar-10'; did you mean cifar10"),
    (["digits/by_writers"], "there is no 'digits/by_writers'; did you mean digits/by_writer"),
    (["mnist:1.0.0"], "its version is 3.0.1"),
    (["imagenet2012"], "--manual_dir"),
    (["mnist", "--data_dri=x"], "there is no '--data_dri'; did you mean --data_dir"),
    (["mnist", "--manual=x"], "there is no '--manual'; did you mean --manual_dir"),  # an abbreviation
    (["mnist", "cifar10"], "'cifar10' is one name too many"),
    (["mnist", "--manual_dir"], "--manual_dir"),
    ([], "name"),
])
def test_the_command_line_ends_in_one_line_and_status_2(arguments, message, tmp_path, capsys):
  assert prepare.main([f"--data_dir={tmp_path / 'tfds'}", *arguments]) == 2
  out, err = capsys.readouterr()
  assert err.startswith("error: ") and err.count("\n") == 1 and message in err and not out
  assert "--config" not in err  # of another command
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://no-such-host.invalid/"])
def test_without_a_network_one_line_is_all_that_there_is(url, mnist, tmp_path, monkeypatch, capsys):
  from dljax.data.datasets import stock

  monkeypatch.setattr(stock.Mnist, "url_infos", {url + name: info(data) for name, data in mnist[0].items()})
  assert prepare.main(["mnist", f"--data_dir={tmp_path / 'tfds'}"]) == 2
  out, err = capsys.readouterr()
  assert err.startswith("error: ") and err.count("\n") == 1 and "no network" in err
  assert not out.strip()
  assert not list(tmp_path.iterdir())


def test_the_embedded_set(tmp_path):
  done = subprocess.run(
      [sys.executable, "-m", "dljax.data.prepare", "digits/by_writer", f"--data_dir={tmp_path}"],
      capture_output=True, text=True, check=True)
  assert done.stdout.strip() == f"digits/by_writer is prepared in {tmp_path}/digits/by_writer/1.0.0"
