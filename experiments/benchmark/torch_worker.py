"""The peer's side of the row "models". The peer's interpreter runs it, without our packages.

  PYTHON torch_worker.py               prints the packages that it finds
  PYTHON torch_worker.py JSON          one side of a case: see `serve.py`

The JSON object: "family" (a file of `peers`), "case" (a key of its NETWORKS), "batch" and
"classes" (those of our side), "layout" ("contiguous" or "channels_last"), "threads", "accelerator"
(whether our side has one), "turn_seconds".
"""

import importlib
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
  # In place of this folder, whose files have names like those of other packages' parts; and for no
  # longer, as our packages may be for another Python.
  sys.path[0] = str(Path(__file__).resolve().parents[2])
  from experiments.benchmark import peers, serve
  del sys.path[0]


def _random_batch(shapes, classes):
  """A batch like that of our side's `random_batch`, with the images' channels first."""
  import torch

  if "image" not in shapes:
    batch = {name: torch.randint(1, classes, shapes[name]) for name in ("tokens", "targets")
             if name in shapes}
    if "places" in shapes:  # of the tokens to be predicted
      batch["places"] = torch.randint(shapes["tokens"][1], shapes["places"])
    if "features" in shapes:
      batch["features"] = torch.randn(shapes["features"])
      for name, field in (("length", "features"), ("token_length", "tokens")):
        batch[name] = torch.full(shapes[name], shapes[field][1])
    return batch
  size, height, width, channels = shapes["image"]
  batch = {"image": torch.randn(size, channels, height, width)}
  for name in ("label", "segmentation", "box_label"):
    if name in shapes:
      batch[name] = torch.randint(classes, shapes[name])
  if "boxes" in shapes:
    corner, size = (torch.tensor([width, height]) * (least
                                                     + extent * torch.rand(*shapes["boxes"][:-1],
                                                                           2))
                    for least, extent in ((0, 0.6), (0.1, 0.3)))
    batch["boxes"] = torch.cat([corner, corner + size], -1)
  return batch


def _build(spec):
  import torch

  torch.set_num_threads(spec["threads"])
  torch.set_num_interop_threads(1)
  # JAX multiplies float32 in TF32 where a GPU has it.
  torch.set_float32_matmul_precision("high")
  cuda = spec["accelerator"] and torch.cuda.is_available()
  device = torch.device("cuda" if cuda else "cpu")
  wait = torch.cuda.synchronize if cuda else lambda: None
  torch.manual_seed(0)

  layout = {"contiguous": torch.contiguous_format,
            "channels_last": torch.channels_last}[spec["layout"]]
  networks = importlib.import_module(f"experiments.benchmark.peers.{spec['family']}").NETWORKS
  model = networks[spec["case"]](spec["classes"]).to(device, memory_format=layout)
  batch = {name: x.to(device) for name, x in _random_batch(spec["batch"], spec["classes"]).items()}
  if "image" in batch:
    batch["image"] = batch["image"].to(memory_format=layout)
  x, label = batch[serve.input_field(batch)], batch.get("segmentation", batch.get("label"))
  optimizer = torch.optim.SGD(model.parameters(), lr=serve.LEARNING_RATE, momentum=serve.MOMENTUM)

  loss = None

  def train_step():
    nonlocal loss
    optimizer.zero_grad()
    loss = model.loss(batch) if hasattr(model,
                                        "loss") else torch.nn.functional.cross_entropy(model(x),
                                                                                       label)
    loss.backward()
    optimizer.step()

  def train(steps):
    model.train()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
      train_step()
    wait()
    seconds = (time.perf_counter() - start) / steps
    if not loss.isfinite():
      raise FloatingPointError("the loss is not finite")
    return seconds

  @torch.inference_mode()
  def time_each(f, steps):
    f()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
      f()
      wait()
    return (time.perf_counter() - start) / steps

  def inference(steps):
    model.eval()
    return time_each(lambda: model(x), steps)

  def product(steps):
    x = torch.ones(serve.PRODUCT, serve.PRODUCT, device=device)
    return time_each(lambda: torch.mm(x, x), steps)

  def describe():
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "platform": device.type,
        "parameters": sum(p.numel() for p in model.parameters()),
    }

  return describe, {"train": train, "inference": inference, "product": product}


def _device_peak():
  import torch
  return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


if __name__ == "__main__":
  if len(sys.argv) == 1:
    print(json.dumps(peers.find_packages()))
  else:
    packages = peers.find_packages()  # imported before the clock starts
    serve.serve(_build, _device_peak)
