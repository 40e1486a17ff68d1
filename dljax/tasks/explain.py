"""Explanations of a classifier's guesses: maps [B, H, W] over its images.

All functions are pure, for the caller to compile.

Saliency. Karen Simonyan, Andrea Vedaldi, Andrew Zisserman. "Deep Inside Convolutional Networks",
2013. https://arxiv.org/abs/1312.6034, section 3.
Integrated gradients. Mukund Sundararajan, Ankur Taly, Qiqi Yan. "Axiomatic Attribution for Deep
Networks", 2017. https://arxiv.org/abs/1703.01365
Grad-CAM. Ramprasaath Selvaraju et al. "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", 2017. https://arxiv.org/abs/1610.02391
Attention rollout. Samira Abnar, Willem Zuidema. "Quantifying Attention Flow in Transformers",
2020. https://arxiv.org/abs/2005.00928

Each but `attention_maps`, which any transformer has, explains one logit of an image, that of its
target. By default the target is the class that the network guesses.

Dimensions: `B` batch, `H` height, `W` width, `C` channels, `K` features, `N` tokens.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dljax.errors import UserError, choose
from dljax.tasks.base import Array, Batch, Variables
from dljax.tasks.classification import Classification

CHUNK = 16  # the number of steps of integrated gradients that are computed at once


def target_logits(
    task: Classification, variables: Variables, batch: Batch, image: Array,
    target: Array | None = None,
) -> tuple[Array, Array]:
  """The logits [B] of the targets, at least float32, and the targets i32[B].

  Args:
    task: the task, which holds the model.
    variables: the model's variables.
    batch: the rows, of which the mask is used.
    image: [B, ...], the images to use instead of the batch's.
    target: i32[B], classes; by default those with the greatest logit.
  """
  logits = task.model.apply(variables, image, batch["mask"], train=False)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  target = jnp.argmax(logits, axis=-1) if target is None else target
  return jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0], target


def saliency(
    task: Classification, variables: Variables, batch: Batch, target: Array | None = None,
) -> Array:
  """How much each pixel moves the target's logit: its largest |gradient| over channels, [B, H, W].

  Args:
    task: the task, which holds the model.
    variables: the model's variables.
    batch: image [B, H, W, C] and mask.
    target: see `target_logits`.
  """
  return jnp.max(jnp.abs(_gradient(task, variables, batch, batch["image"], target)), axis=-1)


def integrated_gradients(
    task: Classification, variables: Variables, batch: Batch, target: Array | None = None, *,
    baseline: Array | float = 0.0, steps: int = 256,
) -> Array:
  """What each pixel adds to the target's logit on the straight path from a baseline, [B, H, W].

  This is equation 1, by the midpoint rule. The sum of the map is the logit at the image minus that
  at the baseline.

  Args:
    task: the task, which holds the model.
    variables: the model's variables.
    batch: image [B, H, W, C] and mask.
    target: see `target_logits`.
    baseline: an image, or a value, in the units of the normalised images.
    steps: the number of steps of the midpoint rule: a multiple of `CHUNK`, or less than `CHUNK`.

  Raises:
    UserError: `steps` is another number.
  """
  chunk = min(steps, CHUNK)
  if steps < 1 or steps % chunk:
    raise UserError(f"integrated gradients in {steps} steps: give a multiple of {CHUNK}")
  image = batch["image"]
  _, target = target_logits(task, variables, batch, image, target)
  start = jnp.broadcast_to(jnp.asarray(baseline, image.dtype), image.shape)

  def gradient(share: Array) -> Array:
    return _gradient(task, variables, batch, start + share * (image - start), target)

  def add(total: Array, part: Array) -> tuple[Array, None]:
    return total + jnp.sum(jax.vmap(gradient)(part), axis=0), None

  shares = ((jnp.arange(steps) + 0.5) / steps).astype(image.dtype).reshape(-1, chunk)
  total, _ = jax.lax.scan(add, jnp.zeros_like(image), shares)
  return jnp.sum((image - start) * total / steps, axis=-1)


def grad_cam(
    task: Classification, variables: Variables, batch: Batch, layer: str,
    target: Array | None = None,
) -> Array:
  """Where the features of a layer support the target, resized to the image, [B, H, W].

  These are equations 1 and 2.

  Args:
    task: the task, which holds the model.
    variables: the model's variables.
    batch: image [B, H, W, C] and mask.
    layer: the path of the module whose result [B, h, w, K] is used. Of a ResNet, this is usually
      the last block, "stage4_block2" in resnet50. A module inside another is "outer/inner".
    target: see `target_logits`.

  Raises:
    UserError: no module of that path was called (the message names those that were), or its result
      is not a feature map.
  """
  shapes: dict[str, tuple[int, ...]] = {}

  def note(path: str, y: Any) -> Any:
    if isinstance(y, jax.Array) and y.ndim == 4:
      shapes[path] = y.shape
    return y

  # Values inside a block that is traced for recomputation cannot be reached from outside.
  if getattr(task.model, "remat", False):
    task = dataclasses.replace(task, model=task.model.clone(remat=False))
  apply = functools.partial(target_logits, task, variables, batch, batch["image"], target)
  with nn.intercept_methods(_outputs(note)):
    jax.eval_shape(apply)
  shape = choose("Grad-CAM's layer", layer, shapes)

  def from_added(added: Array) -> tuple[Array, Array]:
    """The targets' logits, summed, with `added` in the layer's result; and that result."""
    seen = []

    def add(path: str, y: Any) -> Any:
      if path != layer:
        return y
      seen.append(y + added.astype(y.dtype))
      return seen[-1]

    with nn.intercept_methods(_outputs(add)):
      logits, _ = apply()
    return jnp.sum(logits), seen[-1]

  gradient, features = jax.grad(from_added, has_aux=True)(jnp.zeros(shape, jnp.float32))
  weights = jnp.mean(gradient, axis=(1, 2), keepdims=True)  # alpha of equation 1
  cam = nn.relu(jnp.sum(weights * features.astype(jnp.float32), axis=-1))
  return _resize(cam, batch["image"])


def attention_maps(
    model: nn.Module, variables: Variables, *inputs: Any, **options: Any,
) -> dict[str, Array]:
  """What each token of a network attends to: layer -> weights [B, heads, N, N], rows sum to 1.

  `report.attention` draws them.

  Args:
    model: a network whose blocks sow their attention weights as "attention" into the collection
      "intermediates".
    variables: the model's variables.
    *inputs, **options: the model's arguments, such as the tokens i32[B, N] of texts.

  Returns:
    The weights of the layers, from the first to the last, by their paths, such as "block0/attention".

  Raises:
    UserError: the model sows no attention weights.
  """
  _, sown = model.apply(variables, *inputs, train=False, mutable=["intermediates"], **options)
  paths = jax.tree_util.tree_flatten_with_path(sown.get("intermediates", {}))[0]
  layers = {}
  for path, weights in paths:
    names = [str(key.key) for key in path if hasattr(key, "key")]
    if "attention" in names:
      layers["/".join(names)] = weights
  if not layers:
    raise UserError(f"{type(model).__name__} keeps no attention weights; take a transformer")
  return {path: layers[path] for path in sorted(layers, key=_natural)}


def attention_rollout(task: Classification, variables: Variables, batch: Batch) -> Array:
  """How much of each patch reaches the class token through all layers, resized, [B, H, W].

  Without a class token it is the mean over all tokens. There is none if the number of tokens is
  that of the image's square patches of some size.

  Args:
    task: the task, which holds the model. The model's blocks sow their attention weights
      [B, heads, N, N] as "attention" into the collection "intermediates".
    variables: the model's variables.
    batch: image [B, H, W, C] and mask.

  Raises:
    UserError: the model sows no attention weights, or its tokens are not square patches.
  """
  layers = attention_maps(task.model, variables, batch["image"], batch["mask"])
  flow = rollout(list(layers.values()))
  tokens = flow.shape[-1]
  grid, grid_beside_token = (_grid(batch["image"], patches) for patches in (tokens, tokens - 1))
  if not grid and not grid_beside_token:
    raise UserError(f"attention rollout of {tokens} tokens: images of {batch['image'].shape[1]}x"
                    f"{batch['image'].shape[2]} pixels are no such number of square patches, with "
                    "or without a class token")
  patches = jnp.mean(flow, axis=1) if grid else flow[:, 0, 1:]
  return _resize(patches.reshape(-1, *(grid or grid_beside_token)), batch["image"])


def rollout(attention: Sequence[Array]) -> Array:
  """The paper's rollout: the product of the layers' mean attention.

  Half of each layer's factor is the identity, which stands for the residual connection.

  Args:
    attention: the weights [B, heads, N, N] of each layer, from the first; rows (queries) sum to 1.

  Returns:
    f[B, N, N], the share of each input token (column) in each output token (row); rows sum to 1.
  """
  flow = jnp.eye(attention[0].shape[-1])
  for weights in attention:
    mean = jnp.mean(weights.astype(jnp.float32), axis=1)
    flow = (0.5 * mean + 0.5 * jnp.eye(mean.shape[-1])) @ flow
  return flow


def _gradient(
    task: Classification, variables: Variables, batch: Batch, image: Array, target: Array | None,
) -> Array:
  """The gradient of each target's logit with respect to its image, [B, H, W, C]."""
  return jax.grad(lambda x: jnp.sum(target_logits(task, variables, batch, x, target)[0]))(image)


def _outputs(change: Callable[[str, Any], Any]) -> Callable[..., Any]:
  """An interceptor that replaces the result of each `__call__` by `change(path, result)`."""
  def intercept(call, args, kwargs, context):
    y = call(*args, **kwargs)
    return y if context.method_name != "__call__" else change("/".join(context.module.path), y)
  return intercept


def _grid(image: Array, patches: int) -> tuple[int, int] | None:
  """The rows and columns of `patches` square patches in images [B, H, W, C]; None if none fit."""
  _, height, width, _ = image.shape
  side = math.isqrt(height * width // max(patches, 1))
  if not side or height % side or width % side or height * width != patches * side**2:
    return None
  return height // side, width // side


def _resize(maps: Array, image: Array) -> Array:
  """Resizes maps [B, h, w] to the images' [B, H, W], by bilinear interpolation."""
  return jax.image.resize(maps, (len(maps), *image.shape[1:3]), "bilinear")


def _natural(path: str) -> list[Any]:
  """A sort key that puts "block2" before "block10"."""
  return [(0, int(part), "") if part.isdecimal() else (1, 0, part)
          for part in re.split(r"(\d+)", path)]
