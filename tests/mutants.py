"""Mutants: lines changed on purpose, each of which some test must notice. No part of the suite.

    python -m tests.mutants [--only=NAME] [--room=ROOM] [--list]

Each mutant changes one line to what a slip of the hand would make of it, most of them without any
error: only a number is wrong then. The line is changed in a copy of the tree, in which its nearest
tests run. A mutant that they pass has survived, and the exit status is 1.

`tests/test_mutants.py`, which is part of the suite, checks that every line is still there.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds that pytest may take for the tests of one mutant
PROCESSES = 2
COPIED = ("dljax", "experiments", "tests", "setup.cfg", "pyproject.toml", "README.md")
ROOMS = ("models", "ops", "tasks", "data", "recipes", "optim", "train", "interop", "report",
         "launch")
# What serves the command line counts as one room.
_OF_LAUNCH = ("launch", "errors", "config", "downloads", "runs")


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One line changed.

  Attributes:
    name: a name that no other mutant has.
    file: the path from the root of the repository.
    old: a part of the file that occurs once.
    new: what takes its place.
    tests: the nearest tests, as pytest names them.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]

  @property
  def room(self) -> str:
    """The part of dljax that the file belongs to, one of `ROOMS`."""
    part = Path(self.file).parts[1].removesuffix(".py")
    return "launch" if part in _OF_LAUNCH else part

  def mutate(self, text: str) -> str:
    """The file's text with the change; raises `ValueError` unless `old` occurs exactly once."""
    if (count := text.count(self.old)) != 1:
      raise ValueError(f"{self.name}: {self.old!r} occurs {count} times in {self.file}; mend the "
                       "list in tests/mutants.py")
    return text.replace(self.old, self.new)


MUTANTS = (
    # models
    Mutant(
        "bn_biased_running_variance", "dljax/models/layers.py",
        "unbiased = var * (count / jnp.maximum(count - 1, 1))",
        "unbiased = var",
        ("tests/models/test_layers.py::test_equals_flax_but_for_the_unbiased_running_variance",)),
    Mutant(
        "stochastic_depth_scale", "dljax/models/layers.py",
        "jnp.where(kept, x / keep, 0)",
        "jnp.where(kept, x, 0)",
        ("tests/models/test_efficientnet.py::"
         "test_stochastic_depth_keeps_the_mean_and_leaves_out_whole_rows",)),
    Mutant(
        "deepspeech_length_down", "dljax/models/deepspeech.py",
        "length = -(-length // self.stride[0])",
        "length = length // self.stride[0]",
        ("tests/models/test_deepspeech.py::test_a_last_odd_frame_is_heard",)),
    Mutant(
        "pyramid_relu", "dljax/models/retinanet.py",
        "nn.relu(levels[-1]) if i else",
        "levels[-1] if i else",
        ("tests/models/test_retinanet.py::"
         "test_the_second_extra_level_sees_what_the_first_has_above_zero",)),
    Mutant(
        "vit_depth", "dljax/models/vit.py",
        "self.stochastic_depth * i / max(1, self.num_layers - 1)",
        "self.stochastic_depth * i / max(1, self.num_layers)",
        ("tests/models/test_vit.py::test_stochastic_depth_grows_with_depth",)),
    Mutant(
        "bert_norm_before", "dljax/models/bert.py",
        'norm(name="norm1")(x + drop()(project((width,), axes=2, name="project")(y)))',
        'x + norm(name="norm1")(drop()(project((width,), axes=2, name="project")(y)))',
        ("tests/interop/test_bert.py::test_bert_gives_transformers_outputs",)),
    Mutant(
        "bert_padding_seen", "dljax/models/bert.py",
        "jnp.arange(tokens.shape[1]) < length[:, None]",
        "jnp.arange(tokens.shape[1]) <= length[:, None]",
        ("tests/models/test_bert.py::test_padding_changes_nothing",)),
    Mutant(
        "bert_texts_seen", "dljax/models/bert.py",
        'rules = {} if segment is None else {"segment": segment}',
        "rules = {}",
        ("tests/models/test_bert.py::test_packed_texts_see_nothing_of_each_other",)),
    Mutant(
        "bert_dropout_always", "dljax/models/bert.py",
        "rate = self.attention_dropout if train else 0.0",
        "rate = self.attention_dropout",
        ("tests/models/test_bert.py::test_units_are_dropped_in_training_only",)),
    Mutant(
        "bert_head_dropout", "dljax/models/bert.py",
        "rate = self.dropout if self.head_dropout is None else self.head_dropout",
        "rate = self.head_dropout or self.dropout",
        ("tests/models/test_bert.py::test_the_heads_dropout_is_that_of_the_encoder_unless_it_is_stated",)),
    # ops
    Mutant(
        "attention_scale", "dljax/ops/attention.py",
        "  form = _form(q.shape[1], k.shape[1], causal, window, scale, plain)",
        "  form = _form(q.shape[1], k.shape[1], causal, window, scale**2, plain)",
        ("tests/ops/test_attention.py::"
         "test_value_and_gradients_are_those_of_the_masked_softmax",)),
    Mutant(
        "attention_window", "dljax/ops/attention.py",
        "parts.append(away < form.window)",
        "parts.append(away <= form.window)",
        ("tests/ops/test_attention.py::"
         "test_value_and_gradients_are_those_of_the_masked_softmax",)),
    Mutant(
        "attention_causal", "dljax/ops/attention.py",
        "parts.append(away >= 0)",
        "parts.append(away > 0)",
        ("tests/ops/test_attention.py::"
         "test_value_and_gradients_are_those_of_the_masked_softmax",)),
    Mutant(
        "attention_padding", "dljax/ops/attention.py",
        "if form.keys % form.blocks[1]:",
        "if False:",
        ("tests/ops/test_attention.py::"
         "test_value_and_gradients_are_those_of_the_masked_softmax",)),
    Mutant(
        "attention_old_sums", "dljax/ops/attention.py",
        "y + old_y * shrink[..., None]",
        "y + old_y",
        ("tests/ops/test_attention.py::"
         "test_value_and_gradients_are_those_of_the_masked_softmax",)),
    Mutant(
        "attention_gradient_mean", "dljax/ops/attention.py",
        "dscores = weights * (dweights - blocks.cut_queries(mean, i)[..., None])",
        "dscores = weights * dweights",
        ("tests/ops/test_attention.py::"
         "test_value_and_gradients_are_those_of_the_masked_softmax",)),
    Mutant(
        "attention_pairs", "dljax/ops/attention.py",
        "before >= window or",
        "before >= window - 1 or",
        ("tests/ops/test_attention.py::test_pairs_of_blocks_that_see_nothing_are_left_out",)),
    Mutant(
        "gelu_slope", "dljax/ops/gelu.py",
        "(below + wide * density)",
        "(below + density)",
        ("tests/ops/test_gelu.py::test_value_and_derivatives_are_the_native_ones",)),
    Mutant(
        "gelu_tanh_slope", "dljax/ops/gelu.py",
        "(1 + 3 * 0.044715 * square)",
        "(1 + 0.044715 * square)",
        ("tests/ops/test_gelu.py::test_value_and_derivatives_are_the_native_ones",)),
    Mutant(
        "norm_gradient", "dljax/ops/norm.py",
        "dunit - jnp.mean(dunit, axis=-1, keepdims=True) - unit * along",
        "dunit - unit * along",
        ("tests/ops/test_norm.py::test_value_and_gradients_are_the_native_ones",)),
    Mutant(
        "barrier_everywhere", "dljax/ops/barrier.py",
        "default=_same",
        "default=lax.optimization_barrier",
        ("tests/ops/test_norm.py::test_only_a_cpu_gets_the_barrier",)),
    Mutant(
        "ctc_cotangent", "dljax/ops/ctc.py",
        "(jnp.exp(log_p) - share) * g[:, None, None], 0)",
        "(jnp.exp(log_p) - share), 0)",
        ("tests/ops/test_ctc.py::test_the_gradient_is_that_of_the_loss",)),
    Mutant(
        "max_pool_nan", "dljax/ops/pool.py",
        "better = (value > best) | (value != value)",
        "better = value > best",
        ("tests/ops/test_pool.py::test_a_nan_is_the_maximum_and_takes_the_gradient",)),
    Mutant(
        "kernel_hidden_keys", "dljax/ops/kernels.py",
        "jnp.min(own, axis=1, keepdims=True) - 1",
        "jnp.min(own, axis=1, keepdims=True)",
        ("tests/ops/test_kernels.py::test_rows_that_see_nothing_get_zeros",)),
    Mutant(
        "kernel_zeros", "dljax/ops/attention.py",
        "return jnp.where(seen, y, 0)",
        "return y",
        ("tests/ops/test_kernels.py::test_rows_that_see_nothing_get_zeros",)),
    Mutant(
        "kernel_scale", "dljax/ops/kernels.py",
        "for x in (q * scale, k, v))",
        "for x in (q, k, v))",
        ("tests/ops/test_kernels.py::test_rows_that_see_nothing_get_zeros",)),
    Mutant(
        "kernel_second_derivative", "dljax/ops/attention.py",
        "*jax.vjp(_blocked_of(form, *arguments[3:]), *arguments[:3])[1](cotangents[0])",
        "*jax.vjp(_blocked_of(form, None, None), *arguments[:3])[1](cotangents[0])",
        ("tests/ops/test_kernels.py::"
         "test_a_second_derivative_is_that_of_the_blocks_whatever_the_kernel",)),
    Mutant(
        "kernel_window", "dljax/ops/kernels.py",
        "local_window_size=None if window is None else (window - 1, 0)",
        "local_window_size=None if window is None else (window, 0)",
        ("tests/ops/test_kernels.py::test_cudnn_is_asked_for_the_same_attention",)),
    Mutant(
        "kernel_length", "dljax/ops/kernels.py",
        "all(n and n % _LANES == 0 for n in lengths)",
        "all(n % _LANES == 0 for n in lengths[:1])",
        ("tests/ops/test_kernels.py::test_what_is_lowered_for_tpus",)),
    Mutant(
        "kernel_one_head_of_keys", "dljax/ops/attention.py",
        "of_keys = heads if k.shape[2] > 1 else",
        "of_keys = heads if k.shape[2] else",
        ("tests/ops/test_kernels.py::test_devices_work_on_their_own_rows_and_heads",)),
    Mutant(
        "parts_that_do_not_divide", "dljax/ops/collectives.py",
        "        del axes[role]",
        "        pass",
        ("tests/ops/test_collectives.py::test_a_dimension_is_cut_by_the_axes_of_its_role",)),
    Mutant(
        "target_stays", "dljax/ops/collectives.py",
        "    _target.reset(token)",
        "    pass",
        ("tests/ops/test_collectives.py::"
         "test_outside_of_a_target_nothing_is_known_and_the_whole_is_computed",)),
    Mutant(
        "attention_forward_mode", "dljax/ops/attention.py",
        "batching.primitive_batchers[_tangent] = _refuse",
        "batching.defvectorized(_tangent)",
        ("tests/ops/test_attention.py::test_forward_mode_is_refused_by_name",)),
    Mutant(
        "axis_stays", "dljax/ops/collectives.py",
        "_axis_name.reset(token)",
        "pass",
        ("tests/ops/test_collectives.py::test_a_sum_over_rows_is_that_over_all_devices",
         "tests/ops/test_collectives.py::test_outside_of_a_context_nothing_happens",)),
    Mutant(
        "recurrence_held_gradient", "dljax/ops/recurrence.py",
        "dold = _select(valid, dold, held)",
        "dold = _select(valid, dold, dold)",
        ("tests/ops/test_recurrence.py::test_the_gradient_passes_through_padding",)),
    Mutant(
        "winograd_padding", "dljax/ops/conv.py",
        "all(p <= 2 for pair in self.padding for p in pair))",
        "all(p <= 3 for pair in self.padding for p in pair))",
        ("tests/ops/test_conv.py::"
         "test_a_form_takes_no_more_padding_than_its_gradient_can_take_away",)),
    # tasks
    Mutant(
        "packed_documents_leak", "dljax/tasks/language_modeling.py",
        'return {"segment": batch["segment"], "position": batch["position"]}',
        'return {"position": batch["position"]}',
        ("tests/tasks/test_language_modeling.py::"
         "test_no_gradient_passes_from_one_document_to_another",)),
    Mutant(
        "texts_without_lengths", "dljax/tasks/text_classification.py",
        'return batch["tokens"], batch["length"], batch["token_type"]',
        'return batch["tokens"], None, batch["token_type"]',
        ("tests/tasks/test_text_classification.py::test_padding_and_types_reach_the_model",)),
    Mutant(
        "class_weights_in_evaluation", "dljax/tasks/classification.py",
        "weighted = bool(self.class_weights) and train",
        "weighted = bool(self.class_weights)",
        ("tests/tasks/test_classification.py::"
         "test_the_weighted_loss_is_a_weighted_mean_in_training_alone",)),
    Mutant(
        "class_weights_by_this_part_alone", "dljax/tasks/classification.py",
        'examples, weights = denominators["weight"], jnp.sum(self._weights(batch) * mask)',
        "examples = weights = jnp.sum(self._weights(batch) * mask)",
        ("tests/tasks/test_classification.py::"
         "test_weighted_shares_of_uneven_parts_add_up_to_the_whole",)),
    Mutant(
        "multilabel_weight_of_what_fails", "dljax/tasks/multilabel.py",
        "weight * label * holds + (1 - label) * fails",
        "weight * (label * holds + (1 - label) * fails)",
        ("tests/tasks/test_multilabel.py::"
         "test_weights_smoothing_and_mixed_labels_count_in_training_alone",)),
    Mutant(
        "regression_mae_normalised", "dljax/tasks/regression.py",
        '"mae": absolute * std',
        '"mae": absolute',
        ("tests/tasks/test_regression.py::test_loss_and_metrics_by_hand_in_both_units",)),
    Mutant(
        "box_match_threshold", "dljax/tasks/boxes.py",
        "value >= foreground",
        "value > foreground",
        ("tests/tasks/test_boxes.py::test_an_overlap_of_just_a_threshold_is_enough",)),
    Mutant(
        "suppression_threshold", "dljax/tasks/boxes.py",
        "boxes) > threshold)",
        "boxes) >= threshold)",
        ("tests/tasks/test_boxes.py::test_suppression_spares_an_overlap_of_just_the_threshold",)),
    Mutant(
        "score_threshold", "dljax/tasks/detection.py",
        "scores > self.score_threshold",
        "scores >= self.score_threshold",
        ("tests/tasks/test_detection.py::test_a_score_of_just_the_threshold_is_no_detection",)),
    Mutant(
        "calibration_edge", "dljax/tasks/scores.py",
        "np.ceil(confidence * bins).astype(int) - 1",
        "np.floor(confidence * bins).astype(int)",
        ("tests/tasks/test_scores.py::test_a_confidence_on_an_edge_lies_in_the_bin_below",)),
    Mutant(
        "sampling_key", "dljax/tasks/decoding.py",
        "keys = jax.vmap(jax.random.fold_in)(keys, rows[\"place\"])",
        "keys = row_keys(rng, {\"id\": rows[\"id\"] + rows[\"place\"]})",
        ("tests/tasks/test_decoding.py::test_no_two_examples_or_places_share_a_draw",)),
    Mutant(
        "mistake_threshold", "dljax/tasks/detection.py",
        "overlap.max() >= threshold",
        "overlap.max() > threshold",
        ("tests/tasks/test_detection.py::test_mistakes_are_misses_and_false_alarms",)),
    Mutant(
        "dice_of_void", "dljax/tasks/segmentation.py",
        "jnp.where(known[..., None], jnp.exp(log_p), 0)",
        "jnp.exp(log_p)",
        ("tests/tasks/test_segmentation.py::"
         "test_padding_and_pixels_without_a_class_never_change_a_result",)),
    Mutant(
        "rank_of_ties", "dljax/tasks/classification.py",
        "jnp.arange(logits.shape[-1]) >= label[:, None]",
        "jnp.arange(logits.shape[-1]) <= label[:, None]",
        ("tests/tasks/test_classification.py::test_of_equal_logits_the_lower_class_comes_first",)),
    Mutant(
        "last_prompt_token", "dljax/tasks/decoding.py",
        "known = jnp.maximum(length - 1, 0)",
        "known = jnp.maximum(length - 2, 0)",
        ("tests/tasks/test_decoding.py::"
         "test_what_follows_a_prompt_is_predicted_by_its_last_token",)),
    Mutant(
        "penalty_of_negative_logits", "dljax/tasks/decoding.py",
        "jnp.where(logits < 0, logits * self",
        "jnp.where(logits > 0, logits * self",
        ("tests/tasks/test_decoding.py::test_one_step_is_that_of_transformers",)),
    Mutant(
        "ngram_that_is_not_complete", "dljax/tasks/decoding.py",
        "jnp.arange(starts) + n <= count",
        "jnp.arange(starts) + n - 1 <= count",
        ("tests/tasks/test_decoding.py::test_one_step_is_that_of_transformers",)),
    Mutant(
        "least_length", "dljax/tasks/decoding.py",
        'text["place"] < self.min_new_tokens',
        'text["place"] <= self.min_new_tokens',
        ("tests/tasks/test_decoding.py::test_the_least_length_is_a_number_of_tokens",)),
    Mutant(
        "min_p", "dljax/tasks/decoding.py",
        "math.log(self.min_p)",
        "self.min_p",
        ("tests/tasks/test_decoding.py::"
         "test_min_p_leaves_tokens_that_are_probable_beside_the_best",)),
    Mutant(
        "end_of_a_text", "dljax/tasks/decoding.py",
        '"done": done | ended}',
        '"done": done}',
        ("tests/tasks/test_decoding.py::"
         "test_a_text_ends_with_a_stop_token_and_the_loop_with_the_last_text",)),
    Mutant(
        "probability_after_penalties", "dljax/tasks/decoding.py",
        "jax.nn.log_softmax(logits, axis=-1)",
        "jax.nn.log_softmax(allowed, axis=-1)",
        ("tests/tasks/test_decoding.py::test_probabilities_are_the_models_own",)),
    Mutant(
        "context_that_slides", "dljax/tasks/decoding.py",
        'text["count"] - half, text',
        'text["count"] - half - 1, text',
        ("tests/tasks/test_decoding.py::"
         "test_a_text_beyond_the_context_goes_on_from_the_last_half",)),
    Mutant(
        "beginning_of_a_stop_text", "dljax/tasks/decoding.py",
        "for size in range(1, len(stop))",
        "for size in range(2, len(stop))",
        ("tests/tasks/test_decoding.py::test_what_may_become_a_stop_text_is_not_shown_yet",)),
    Mutant(
        "stop_text_between_parts", "dljax/tasks/language_modeling.py",
        "return self.before_stop(tokens) != self.decode(tokens)",
        "return self.before_stop(tokens[-8:]) != self.decode(tokens[-8:])",
        ("tests/recipes/test_language_modeling.py::"
         "test_a_stop_text_between_two_parts_ends_generation",)),
    Mutant(
        "tokens_after_a_stop_text", "dljax/recipes/language_modeling.py",
        "np.sum(before < len(text))",
        "np.sum(before <= len(text))",
        ("tests/recipes/test_language_modeling.py::"
         "test_a_stop_text_takes_the_tokens_after_it_along",)),
    # data
    Mutant(
        "npy_pickle", "dljax/data/image/decode.py",
        "allow_pickle=False",
        "allow_pickle=True",
        ("tests/data/image/test_labelled.py::test_reading_npy_runs_no_code",)),
    Mutant(
        "tar_filter", "dljax/data/datasets/stock.py",
        'filter="data"',
        'filter="fully_trusted"',
        ("tests/data/test_prepare.py::test_an_archive_writes_nothing_outside_of_its_folder",)),
    Mutant(
        "pad_crop_last_shift", "dljax/data/image/labelled.py",
        "integers(-config.pad_crop, config.pad_crop + 1, (2, size))",
        "integers(-config.pad_crop, config.pad_crop, (2, size))",
        ("tests/data/image/test_labelled.py::test_pad_and_crop_draws_every_shift",)),
    Mutant(
        "mixed_with_the_next_row", "dljax/data/image/labelled.py",
        "partners = plan.rows ^ 1",
        "partners = plan.rows + 1",
        ("tests/data/image/test_labelled.py::test_a_host_of_eight_that_mixes_reads_its_own_rows_alone",)),
    Mutant(
        "own_split_without_the_seed", "dljax/data/own.py",
        'f"{seed}/{key}"',
        'f"{key}"',
        ("tests/data/test_own.py::"
         "test_a_split_has_its_share_of_every_stratum_and_depends_on_the_seed_alone",)),
    Mutant(
        "own_twins_torn_apart", "dljax/data/image/folder.py",
        "own.split([keys[i] for i in free]",
        "own.split([photos[i].name for i in free]",
        ("tests/data/image/test_folder.py::test_twins_come_into_one_split",)),
    Mutant(
        "own_mean_over_all_splits", "dljax/data/image/folder.py",
        "_mean_and_std(config, train, seed, skipped)",
        "_mean_and_std(config, everything, seed, skipped)",
        ("tests/data/image/test_folder.py::"
         "test_mean_and_std_are_those_of_the_training_images_alone",)),
    Mutant(
        "own_tested_documents_are_left_out", "dljax/data/own.py",
        'for key, split in trained.get("files", {}).values() if split == "train"}\n  known',
        'for key, split in trained.get("files", {}).values()}\n  known',
        ("tests/data/text/test_corpus.py::"
         "test_a_run_is_not_evaluated_on_documents_that_it_was_trained_on",)),
    Mutant(
        "own_trained_images_are_tested", "dljax/data/image/folder.py",
        "kept = {name for name, _ in rest} - known",
        "kept = {name for name, _ in rest}",
        ("tests/data/image/test_folder.py::"
         "test_images_that_the_run_was_trained_on_are_no_test_of_it",)),
    Mutant(
        "balanced_order_of_one_epoch", "dljax/data/balance.py",
        "rng(self._seed, epoch, f\"class {label}\")",
        "rng(self._seed, 0, f\"class {label}\")",
        ("tests/data/test_balance.py::test_the_stream_is_random_and_depends_on_the_seed",)),
    Mutant(
        "bicubic", "dljax/data/image/augment.py",
        "Image.Resampling.BILINEAR, box=box",
        "Image.Resampling.BICUBIC, box=box",
        ("tests/data/image/test_augment.py::test_resize_is_bilinear",)),
    Mutant(
        "scene_last_shift", "dljax/data/image/scenes.py",
        "draw.integers(-config.shift, config.shift + 1, (size, 2))",
        "draw.integers(-config.shift, config.shift, (size, 2))",
        ("tests/data/image/test_scenes.py::test_every_shift_is_drawn",)),
    Mutant(
        "coco_size_upright", "dljax/data/image/own_scenes.py",
        "if boxes.size in (None, stored.size):",
        "if boxes.size in (None, stored.upright):",
        ("tests/data/image/test_own_scenes.py::test_boxes_turn_with_their_image",)),
    Mutant(
        "mask_palette_of_each_file", "dljax/data/image/masks.py",
        "elif any(color_of.setdefault(i, color) != color",
        "elif any(color_of.setdefault(i, color) != color_of[i]",
        ("tests/data/image/test_own_scenes.py::test_what_the_values_of_masks_mean_is_found",)),
    Mutant(
        "mask_ignored_is_a_class", "dljax/data/image/scenes.py",
        "table[number(config.mask_ignore)] = VOID_BYTE",
        "table[number(config.mask_ignore)] = 0",
        ("tests/data/image/test_own_scenes.py::test_what_the_values_of_masks_mean_is_found",)),
    Mutant(
        "rng_name", "dljax/data/pipeline.py",
        "[seed, step, zlib.crc32(name.encode())]",
        "[seed, step, 0]",
        ("tests/data/test_pipeline.py::test_every_name_seed_and_step_has_draws_of_its_own",)),
    Mutant(
        "normaliser_sees_all", "dljax/data/series/windows.py",
        "values=series.values[begin:end]",
        "values=series.values",
        ("tests/data/series/test_windows.py::"
         "test_the_normaliser_is_that_of_the_training_rows_without_the_missing_ones",)),
    Mutant(
        "whole_seconds", "dljax/data/series/times.py",
        "return time - (offset or 0)",
        "return time // SECOND * SECOND - (offset or 0)",
        ("tests/data/series/test_times.py::test_times_are_read_and_written_back",)),
    Mutant(
        "shares_rounded_alone", "dljax/data/series/windows.py",
        "ends = [int(sum(sizes[:i + 1]))",
        "ends = [sum(map(int, sizes[:i + 1]))",
        ("tests/data/series/test_windows.py::test_splits_by_rows_shares_and_times",)),
    Mutant(
        "speakers_torn", "dljax/data/audio/transcripts.py",
        "utterances[i].speaker if by_speaker else keys[i]",
        "keys[i]",
        ("tests/data/audio/test_transcripts.py::test_a_speaker_is_in_one_split",)),
    Mutant(
        "stream_spare", "dljax/data/text/streams.py",
        "integers(spare + 1)",
        "integers(max(spare, 1))",
        ("tests/data/text/test_corpus.py::test_every_token_is_some_epochs_first_or_last",)),
    Mutant(
        "window_spare", "dljax/data/text/streams.py",
        "integers(self._spare + 1)",
        "integers(max(self._spare, 1))",
        ("tests/data/text/test_corpus.py::test_every_epochs_windows_begin_at_one_of_all_places",)),
    Mutant(
        "windows_counted_twice", "dljax/data/text/streams.py",
        "np.where(indices > 0, length - self._stride, 0)",
        "np.where(indices > 1, length - self._stride, 0)",
        ("tests/data/text/test_corpus.py::test_windows_of_an_evaluation_predict_every_token_once",)),
    Mutant(
        "packed_positions_go_on", "dljax/data/text/packing.py",
        '"position": put(within.astype(np.int32))',
        '"position": put(places[1].astype(np.int32))',
        ("tests/data/text/test_packing.py::test_rows_say_whose_each_place_is",)),
    Mutant(
        "packed_by_first_fit", "dljax/data/text/packing.py",
        "for free in range(length, capacity + 1) if",
        "for free in range(capacity, length - 1, -1) if",
        ("tests/data/text/test_packing.py::test_rows_are_those_of_best_fit_decreasing",)),
    Mutant(
        "hidden_by_host", "dljax/data/text/masked.py",
        "random((len(plan.indices), length, 3))[plan.rows]",
        "random((len(plan.rows), length, 3))",
        ("tests/data/text/test_masked.py::test_hosts_share_out_the_global_batch",)),
    Mutant(
        "all_chosen_are_hidden", "dljax/data/text/masked.py",
        "np.where(kind < MASKED, frames",
        "np.where(kind < 1, frames",
        ("tests/data/text/test_masked.py::"
         "test_of_ten_tokens_eight_are_hidden_one_is_replaced_and_one_is_kept",)),
    Mutant(
        "special_tokens_are_hidden", "dljax/data/text/masked.py",
        "~np.isin(content, self._special)",
        "np.ones(len(content), bool)",
        ("tests/data/text/test_masked.py::"
         "test_the_text_is_there_and_its_share_is_to_be_predicted",)),
    Mutant(
        "first_text_is_cut", "dljax/data/text/labelled.py",
        "if len(parts[0]) <= len(parts[1]) else",
        "if len(parts[0]) > len(parts[1]) else",
        ("tests/data/text/test_labelled.py::"
         "test_texts_are_framed_and_the_longer_one_is_cut",)),
    Mutant(
        "equal_texts_are_torn", "dljax/data/text/labelled.py",
        "json.dumps(self.texts)",
        "json.dumps([self.texts, self.where])",
        ("tests/data/text/test_labelled.py::test_rows_of_one_text_come_into_one_split",)),
    Mutant(
        "held_out_glosses_are_learnt", "dljax/data/datasets/wordnet.py",
        "if gloss.label < 0 and gloss.text not in held_out]",
        "if gloss.label < 0]",
        ("tests/data/datasets/test_wordnet.py::"
         "test_equal_glosses_are_in_one_split_and_those_held_out_are_in_no_other",)),
    Mutant(
        "pieces_in_any_order", "dljax/data/text/tokenize.py",
        "special_tokens=special + within)",
        "special_tokens=special)",
        ("tests/data/text/test_tokenize.py::test_the_same_text_makes_the_same_tokenizer",)),
    Mutant(
        "special_token_spelled", "dljax/data/text/tokenize.py",
        "tokenizer.encode_special_tokens = True",
        "tokenizer.encode_special_tokens = False",
        ("tests/data/text/test_pretrained.py::test_what_a_text_spells_is_never_the_end",)),
    Mutant(
        "second_text_is_cut_first", "dljax/data/text/tokenize.py",
        "return [short, long] if sizes[0] <= sizes[1] else [long, short]",
        "return [short, long]",
        ("tests/data/text/test_pretrained.py::test_the_longer_text_is_cut",)),
    Mutant(
        "roles_lost_in_a_run", "dljax/data/text/tokenize.py",
        'value["roles"] = self.roles',
        'value["roles"] = {}',
        ("tests/data/text/test_pretrained.py::"
         "test_a_run_keeps_the_tokenizer_its_roles_and_its_chat",)),
    Mutant(
        "token_without_a_row", "dljax/data/text/pretrained.py",
        "if tokenizer.size > rows:",
        "if tokenizer.size > rows + 1:",
        ("tests/data/text/test_pretrained.py::test_what_is_wrong_with_a_folder_is_one_line",)),
    Mutant(
        "end_of_another_model", "dljax/data/text/pretrained.py",
        "if tokenizer.roles[role] not in numbers:",
        "if tokenizer.roles[role] < min(numbers):",
        ("tests/data/text/test_pretrained.py::test_what_is_wrong_with_a_folder_is_one_line",)),
    Mutant(
        "second_text_of_type_0", "dljax/data/text/pretrained.py",
        'single + [f"{part}:1"',
        'single + [f"{part}:0"',
        ("tests/data/text/test_pretrained.py::"
         "test_special_tokens_surround_a_text_and_a_pair",)),
    Mutant(
        "template_by_jinjas_white_space", "dljax/data/text/chat.py",
        "trim_blocks=True, lstrip_blocks=True",
        "trim_blocks=True, lstrip_blocks=False",
        ("tests/data/text/test_pretrained.py::"
         "test_a_template_sees_what_transformers_shows_it",)),
    Mutant(
        "first_space_swallowed", "dljax/data/text/sentencepiece.py",
        "if dummy_prefix and not plain:",
        "if dummy_prefix and plain:",
        ("tests/data/text/test_tokenize.py::"
         "test_a_model_that_keeps_white_space_counts_a_space_at_the_beginning",)),
    # recipes
    Mutant(
        "sub_words_that_are_fitted_again", "dljax/recipes/text_classification.py",
        "found = beside | found", "found = dict(found)",
        ("tests/recipes/test_texts.py::test_a_run_with_sub_words_passes_them_on_to_what_is_fine_tuned",)),
    Mutant(
        "bytes_that_are_passed_on", "dljax/recipes/texts.py",
        "if isinstance(tokenize.load(file), tokenize.Subwords):", "if tokenize.load(file):",
        ("tests/recipes/test_texts.py::test_a_run_of_bytes_has_nothing_to_pass_on",)),
    Mutant(
        "size_order", "dljax/recipes/object_detection.py",
        "size[:, ::-1].astype(np.float32)",
        "size.astype(np.float32)",
        ("tests/recipes/test_object_detection.py::"
         "test_the_users_images_have_a_place_and_a_size",)),
    Mutant(
        "pet_values", "dljax/recipes/semantic_segmentation.py",
        '"mask_values": (2, 1, 3)',
        '"mask_values": (1, 2, 3)',
        ("tests/recipes/test_semantic_segmentation.py::"
         "test_the_preset_of_pets_has_the_papers_widths",)),
    Mutant(
        "speech_decode_beam", "dljax/recipes/speech.py",
        "functools.partial(_show, config.model.beam)",
        "functools.partial(_show, 1)",
        ("tests/recipes/test_speech.py::test_the_users_recordings_are_decoded_by_the_beam",)),
    Mutant(
        "label_smoothing_lost", "dljax/recipes/image_classification.py",
        "label_smoothing=smoothing, criterion",
        "label_smoothing=0.0, criterion",
        ("tests/recipes/test_image_classification.py::"
         "test_the_label_smoothing_reaches_the_task",)),
    Mutant(
        "cifar_validation_leak", "dljax/recipes/image_classification.py",
        '0.2616), "train": "train[:90%]",\n                "validation": "train[90%:]"',
        '0.2616), "train": "train[:90%]",\n                "validation": "test"',
        ("tests/recipes/test_image_classification.py::"
         "test_the_splits_of_a_set_are_three_and_share_no_example",)),
    # optim
    Mutant(
        "gain_margin", "dljax/optim.py",
        "gain > margin",
        "gain >= margin",
        ("tests/test_optim.py::test_plateau_counts_exactly",)),
    Mutant(
        "plateau_patience", "dljax/optim.py",
        "tracker.plateau_stale < config.plateau_patience",
        "tracker.plateau_stale <= config.plateau_patience",
        ("tests/test_optim.py::test_plateau_counts_exactly",)),
    Mutant(
        "step_boundary", "dljax/optim.py",
        "k >= boundaries",
        "k > boundaries",
        ("tests/test_optim.py::test_schedule_is_its_closed_form",)),
    Mutant(
        "newton_schulz_epsilon", "dljax/optim.py",
        "(jnp.linalg.norm(wide) + 1e-7)",
        "jnp.linalg.norm(wide)",
        ("tests/test_optim.py::test_newton_schulz_nearly_orthogonalises",)),
    Mutant(
        "infinite_best", "dljax/optim.py",
        "math.isfinite(value) and gain",
        "not math.isnan(value) and gain",
        ("tests/test_optim.py::test_values_that_are_not_finite_are_never_best",)),
    # train
    Mutant(
        "flops_of_kernels", "dljax/train/flops.py",
        'times = math.prod(params["grid_mapping"].grid)',
        'times = params["grid_mapping"].grid[0]',
        ("tests/ops/test_kernels.py::test_the_work_of_a_kernel_counts",)),
    Mutant(
        "last_players_loss", "dljax/train/step.py",
        "finite &= jnp.isfinite(out.loss) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(out.loss) & jnp.isfinite(norm)",
        ("tests/train/test_step.py::test_every_players_loss_has_to_be_finite",)),
    Mutant(
        "file_fsync", "dljax/train/durable.py",
        "      file.flush()\n      os.fsync(file.fileno())\n",
        "      file.flush()\n",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "name_fsync", "dljax/train/durable.py",
        "    raise\n  sync(path.parent)\n",
        "    raise\n",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "new_folder_fsync", "dljax/train/durable.py",
        "  path.mkdir(exist_ok=True)\n  sync(path.parent)\n",
        "  path.mkdir(exist_ok=True)\n",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "sync_does_nothing", "dljax/train/durable.py",
        "    os.fsync(descriptor)\n",
        "    pass\n",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "payload_fsync", "dljax/train/checkpoint.py",
        "        os.fsync(file.fileno())\n        digest",
        "        digest",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "payload_folder_fsync", "dljax/train/checkpoint.py",
        "    else:\n      durable.sync(path)\n  return entries",
        "  return entries",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "step_name_fsync", "dljax/train/checkpoint.py",
        "    durable.sync(directory.parent)",
        "    pass",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "metrics_fsync", "dljax/train/metrics.py",
        "      os.fsync(self._files[0].fileno())\n",
        "      pass\n",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "metrics_name_fsync", "dljax/train/metrics.py",
        "      durable.sync(self._workdir)\n",
        "",
        ("tests/train/test_metrics.py::"
         "test_the_rows_are_durable_before_the_mark_is_given",)),
    Mutant(
        "picture_fsync", "dljax/train/workdir.py",
        "        durable.sync(self.figures / f\"{stem}.png\")\n",
        "",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "picture_name_fsync", "dljax/train/workdir.py",
        "      durable.sync(self.figures)\n",
        "",
        ("tests/train/test_durable.py::"
         "test_a_power_failure_at_any_moment_loses_nothing",)),
    Mutant(
        "metrics_start_fsync", "dljax/train/metrics.py",
        "      os.fsync(rows.fileno())\n",
        "",
        ("tests/train/test_metrics.py::test_the_rows_are_durable_before_the_mark_is_given",)),
    Mutant(
        "rows_of_the_first_device", "dljax/train/parallel.py",
        "any(device.process_index == process for device in devices)",
        "devices[0].process_index == process",
        ("tests/train/test_parallel.py::test_a_process_reads_the_rows_of_its_devices",)),
    Mutant(
        "everything_over_hosts", "dljax/train/evaluate.py",
        'if k == "mask" or self._reads(k)',
        "if True",
        ("tests/train/test_evaluate.py::test_each_real_row_counts_once_and_comes_back_in_order",)),
    Mutant(
        "sums_in_float32", "dljax/train/evaluate.py",
        "np.asarray(x, np.float64), new)",
        "np.asarray(x, np.float32), new)",
        ("tests/train/test_evaluate.py::test_sums_of_many_batches_lose_no_digits",)),
    Mutant(
        "kept_steps", "dljax/train/checkpoint.py",
        "steps[:-self._keep]",
        "steps[:-self._keep - 1]",
        ("tests/train/test_checkpoint.py::test_the_best_step_outlives_the_newest",)),
    Mutant(
        "ema_ramp", "dljax/train/step.py",
        "(1 + state.step) / (10 + state.step)",
        "(1 + state.step) / (11 + state.step)",
        ("tests/train/test_step.py::"
         "test_the_average_of_the_parameters_by_hand_and_evaluation_uses_it",)),
    # interop
    Mutant(
        "conv_layout", "dljax/interop/table.py",
        "2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))",
        "2, 3, 1, 0), lambda x: x.transpose(3, 2, 1, 0))",
        ("tests/interop/test_interop.py::"
         "test_load_is_the_inverse_of_dump_for_other_sizes_and_channels",)),
    Mutant(
        "pickle_archive", "dljax/interop/files.py",
        'start == b"PK\\3\\4" or ',
        "",
        ("tests/interop/test_interop.py::test_pickles_are_known_by_their_first_bytes",)),
    Mutant(
        "hub_checksum", "dljax/interop/hub.py",
        "downloads.sha256(path) != entry.sha256",
        "not downloads.sha256(path)",
        ("tests/interop/test_main.py::test_what_the_hub_cannot_give_is_told_in_one_line",)),
    Mutant(
        "recognise_least", "dljax/interop/weights.py",
        "max(common, key=common.get)",
        "min(common, key=common.get)",
        ("tests/interop/test_interop.py::test_weights_are_recognised_by_their_names",)),
    Mutant(
        "temporary_stays", "dljax/interop/folder.py",
        "temporary.unlink(missing_ok=True)",
        "pass",
        ("tests/interop/test_interop.py::test_nothing_is_left_of_what_could_not_be_written",)),
    Mutant(
        "bert_heads_last", "dljax/interop/families/bert.py",
        "x.reshape(heads, 1, -1, x.shape[1]).transpose(3, 0, 1, 2)",
        "x.reshape(-1, 1, heads, x.shape[1]).transpose(3, 2, 1, 0)",
        ("tests/interop/test_bert.py::test_bert_gives_transformers_outputs",)),
    Mutant(
        "bert_other_bias", "dljax/interop/families/bert.py",
        'if not name.endswith(f"{_WORDS}.bias")}',
        'if not name.endswith(f"{_WORDS}.decoder.bias")}',
        ("tests/interop/test_bert.py::test_of_two_biases_the_one_that_transformers_reads_counts",)),
    Mutant(
        "bert_config_classes", "dljax/interop/families/bert.py",
        "if model.head in _CLASSIFIES and model.num_classes != 2:",
        "if model.num_classes < 2:",
        ("tests/interop/test_bert.py::test_a_config_is_written_as_transformers_writes_it",)),
    Mutant(
        "bert_classes", "dljax/interop/families/bert.py",
        "len(labels) if labels else",
        "",
        ("tests/interop/test_bert.py::test_a_config_says_the_settings",)),
    Mutant(
        "always_partial", "dljax/interop/weights.py",
        "  if partial:\n",
        "  if True:\n",
        ("tests/interop/test_bert.py::test_fine_tuning_starts_from_any_head",)),
    Mutant(
        "gpt2_parts_last", "dljax/interop/families/gpt.py",
        "x.reshape(x.shape[0], 3, heads, -1).transpose(0, 2, 1, 3)",
        "x.reshape(x.shape[0], heads, 3, -1)",
        ("tests/interop/test_gpt.py::test_decoders_give_transformers_logits_and_hidden_states",)),
    Mutant(
        "llama_gate_swapped", "dljax/interop/families/gpt.py",
        'f"{theirs}.mlp.gate_proj"',
        'f"{theirs}.mlp.up_proj"',
        ("tests/interop/test_gpt.py::test_decoders_give_transformers_logits_and_hidden_states",)),
    Mutant(
        "any_rope_type", "dljax/interop/families/gpt.py",
        'if kind not in ("default", "llama3"):',
        "if not kind:",
        ("tests/interop/test_gpt.py::test_other_configs_are_refused_by_name",)),
    Mutant(
        "other_layers_windowed", "dljax/interop/families/gpt.py",
        'if kind == "full_attention")',
        'if kind != "full_attention")',
        ("tests/interop/test_gpt.py::test_decoders_give_transformers_logits_and_hidden_states",)),
    Mutant(
        "positions_cropped_at_the_start", "dljax/interop/families/gpt.py",
        "return table[:shape[0]]",
        "return table[-shape[0]:]",
        ("tests/interop/test_gpt.py::test_positions_are_cropped_to_a_shorter_context",)),
    Mutant(
        "dtype_widened", "dljax/interop/weights.py",
        "None if keep_dtype else specs[path].dtype",
        "specs[path].dtype",
        ("tests/interop/test_gpt.py::test_a_folder_goes_through_ours_and_back_bit_for_bit_in_its_dtype",)),
    Mutant(
        "greedy_ignored", "dljax/interop/generation.py",
        'bool(fields.get("do_sample", False))',
        "True",
        ("tests/interop/test_gpt.py::test_a_folder_says_how_its_authors_generate",)),
    Mutant(
        "biases_everywhere", "dljax/models/gpt.py",
        "self.use_bias if self.mlp_bias is None else self.mlp_bias",
        "self.use_bias",
        ("tests/interop/test_gpt.py::test_decoders_give_transformers_logits_and_hidden_states",)),
    # report
    Mutant(
        "confusion_axis", "dljax/report/classification.py",
        "matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)",
        "matrix / np.maximum(matrix.sum(axis=0, keepdims=True), 1)",
        ("tests/report/test_classification.py::test_confusion_matrix_writes_counts_and_colours_by_truth",)),
    Mutant(
        "moving_average_end", "dljax/report/curves.py",
        "np.minimum(index + width + 1, len(values))",
        "np.minimum(index + width, len(values))",
        ("tests/report/test_curves.py::test_the_moving_average_keeps_a_line_and_calms_noise",)),
    Mutant(
        "alignment_peak", "dljax/report/sequences.py",
        "at = start + int(np.argmax(shares[start:end, symbol]))",
        "at = int(np.argmax(shares[start:end, symbol]))",
        ("tests/report/test_sequences.py::test_alignments_name_each_run_of_a_symbol_at_its_peak",)),
    Mutant(
        "forecast_past", "dljax/report/sequences.py",
        '["window"])[-shown:, c]',
        '["window"])[:shown, c]',
        ("tests/report/test_sequences.py::test_forecasts_stand_after_their_window_and_beside_the_truth",)),
    Mutant(
        "box_half_pixel", "dljax/report/scenes.py",
        "Rectangle((x0 - 0.5, y0 - 0.5)",
        "Rectangle((x0, y0)",
        ("tests/tasks/test_detection.py::"
         "test_the_picture_has_a_box_for_each_object_and_each_detection",)),
    # what a run says
    Mutant(
        "compilation_counts", "dljax/train/progress.py",
        "took = time.monotonic() - self._first[1] - self._paused",
        "took = time.monotonic() - self._first[1]",
        ("tests/train/test_progress.py::test_the_time_left_counts_steps_and_evaluations_but_no_compilation",)),
    Mutant(
        "border_unread", "dljax/data/image/typical.py",
        "np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])",
        "np.concatenate(image)",
        ("tests/data/image/test_typical.py::test_measured_are_the_whole_image_and_its_border",)),
    Mutant(
        "dots_cut", "dljax/report/classification.py",
        "clip_on=False, ",
        "",
        ("tests/report/test_classification.py::test_a_reliability_diagram_shows_accuracy_by_confidence",)),
    # launch
    Mutant(
        "ema_of_one", "dljax/config.py",
        "not 0 <= config.ema_decay < 1",
        "not 0 <= config.ema_decay <= 1",
        ("tests/test_config.py::test_a_shared_field_out_of_range_is_refused",)),
    Mutant(
        "download_never_rests", "dljax/downloads.py",
        "idle = 0 if part.exists() and part.stat().st_size > done else idle + 1",
        "idle = idle + 1",
        ("tests/data/test_prepare.py::"
         "test_a_download_may_break_off_as_often_as_it_brings_something",)),
    Mutant(
        "full_download_appended", "dljax/downloads.py",
        "      done = 0  # the server sends everything again",
        "      pass",
        ("tests/data/test_prepare.py::test_download_goes_on_where_the_connection_broke",)),
    Mutant(
        "term_handler", "dljax/errors.py",
        "if before is _end_early else before or signal.SIG_DFL)",
        "if before is _end_early else signal.SIG_DFL)",
        ("tests/test_errors.py::test_a_command_gives_signals_back_their_handlers",)),
    Mutant(
        "unchecked_under_the_lock", "dljax/train/workdir.py",
        "      check()",
        "      pass",
        ("tests/train/test_loop.py::"
         "test_a_run_that_another_finished_before_the_lock_was_had_is_not_begun_again",)),
    Mutant(
        "assets_unverified", "dljax/train/workdir.py",
        "if digest and _sha256(path.read_bytes()) != digest:",
        "if False:",
        ("tests/train/test_workdir.py::test_assets_that_were_edited_are_named",)),
    Mutant(
        "events_by_the_clock", "dljax/train/metrics.py",
        "*(second + 1 for second in earlier)",
        "*()",
        ("tests/train/test_metrics.py::"
         "test_tensorboard_reads_a_resumed_run_last_even_if_the_clock_was_set_back",)),
    Mutant(
        "signal_lost_in_last_save", "dljax/train/loop.py",
        "      self.signals.release(stopped)",
        "      pass",
        ("tests/train/test_loop.py::test_a_signal_in_the_last_steps_save_is_not_lost",)),
    Mutant(
        "evaluation_not_left", "dljax/train/loop.py",
        'self.monitor.left = restored.host.get("left", "")',
        "pass",
        ("tests/train/test_loop.py::test_a_signal_within_an_evaluation_or_the_report_leaves_the_rest_to_"
         "the_next_call",)),
    Mutant(
        "manifest_not_amended", "dljax/train/loop.py",
        "      self.checkpointer.amend(start, self._host(writer))",
        "      pass",
        ("tests/train/test_loop.py::test_a_signal_within_an_evaluation_or_the_report_leaves_the_rest_to_"
         "the_next_call",)),
    Mutant(
        "stop_where_some_have_passed", "dljax/train/watch.py",
        "max(self._reported.values()) + 1",
        "max(self._reported.values())",
        ("tests/train/test_watch.py::test_all_stop_at_one_point_that_none_has_passed",)),
    Mutant(
        "well_ended_taken_for_dead", "dljax/train/watch.py",
        "      gone = index not in self._left",
        "      gone = True",
        ("tests/train/test_watch.py::test_processes_that_end_well_end_nobody",)),
    Mutant(
        "mpi_helpers_joined", "dljax/train/hosts.py",
        "  if _SLURM.several(env) and by_srun:",
        "  if _SLURM.several(env):",
        ("tests/train/test_hosts.py::test_processes_that_jax_cannot_connect_are_refused_by_name",)),
    Mutant(
        "smoothed_evaluation", "dljax/tasks/classification.py",
        "self.label_smoothing if train else 0.0",
        "self.label_smoothing",
        ("tests/tasks/test_classification.py::test_the_loss_of_an_evaluation_has_no_smoothing",)),
    Mutant(
        "positions_decay", "dljax/optim.py",
        "return not vector and not _matches(prefix + name, no_decay)",
        "return not vector",
        ("tests/test_optim.py::test_a_model_names_more_that_does_not_decay",)),
    Mutant(
        "nan_weights_loaded", "dljax/interop/weights.py",
        "  check_finite({name: tensors[name] for entry in entries for name in entry.names})",
        "",
        ("tests/interop/test_interop.py::test_weights_that_are_not_finite_are_refused_by_name",)),
    Mutant(
        "output_probe_stays", "dljax/launch/output.py",
        "  if new:\n    place.unlink",
        "  if not new:\n    place.unlink",
        ("tests/test_output.py::test_a_place_is_tried_without_leaving_or_changing_anything",)),
)


def _copy(tree: Path) -> None:
  """Copies what the tests need into the new folder `tree`."""
  tree.mkdir()
  for name in COPIED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy2(ROOT / name, tree / name)


def _pytest(tree: Path, tests: Sequence[str]) -> tuple[str, str]:
  """Runs tests in a copy of the tree.

  Returns:
    "passed", "failed" or what else has happened, and the end of what pytest printed.
  """
  # No bytecode: Python would take that of a file with the same size and second for the mutant's.
  environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
  command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider",
             "-m", "slow or not slow"]
  try:
    done = subprocess.run([*command, *tests], cwd=tree, env=environment, capture_output=True,
                          text=True, timeout=LIMIT, check=False)
  except subprocess.TimeoutExpired:
    return f"no end within {LIMIT} s", ""
  verdicts = {0: "passed", 1: "failed"}
  verdict = verdicts.get(done.returncode, f"pytest ended with {done.returncode}")
  return verdict, done.stdout[-3000:]


def _judge(mutant: Mutant, tree: Path) -> str:
  """"killed", or why not; the copy `tree` is afterwards as it was before."""
  path = tree / mutant.file
  text = path.read_text()
  path.write_text(mutant.mutate(text))
  try:
    verdict, _ = _pytest(tree, mutant.tests)
  finally:
    path.write_text(text)
  return {"failed": "killed", "passed": "SURVIVED"}.get(verdict, verdict)


def _show(chosen: Sequence[Mutant], verdicts: Sequence[str]) -> None:
  """A table by room, and each mutant that was not killed."""
  print(f"\n{'room':8} {'mutants':>7} {'killed':>7}")
  for room in ROOMS:
    found = [verdict for mutant, verdict in zip(chosen, verdicts) if mutant.room == room]
    if found:
      print(f"{room:8} {len(found):7} {found.count('killed'):7}")
  print(f"{'all':8} {len(verdicts):7} {verdicts.count('killed'):7}")
  for mutant, verdict in zip(chosen, verdicts):
    if verdict != "killed":
      print(f"\n{mutant.name}: {verdict}\n  {mutant.file}\n  - {mutant.old.strip()}"
            f"\n  + {mutant.new.strip()}")


def main() -> int:
  """The command line.

  Returns:
    The exit status: 0 where all were killed, 1 where one was not or the tests fail without any
    mutant. Bad flags end with 2.
  """
  parser = argparse.ArgumentParser(
      prog="python -m tests.mutants", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", action="append", default=[], metavar="NAME",
                      help="this mutant; may be repeated")
  parser.add_argument("--room", choices=ROOMS, help="those of one room")
  parser.add_argument("--list", action="store_true", help="name them, and run nothing")
  args = parser.parse_args()
  if unknown := set(args.only) - {mutant.name for mutant in MUTANTS}:
    parser.error(f"there is no mutant {', '.join(sorted(unknown))}; see --list")
  chosen = [mutant for mutant in MUTANTS
            if (not args.only or mutant.name in args.only) and args.room in (None, mutant.room)]
  if args.list:
    print("\n".join(f"{mutant.room:8} {mutant.name:28} {mutant.file}" for mutant in chosen))
    return 0
  for mutant in chosen:
    mutant.mutate((ROOT / mutant.file).read_text())  # an old list fails before anything runs
  with tempfile.TemporaryDirectory(prefix="dljax-mutants-") as folder:
    trees = queue.SimpleQueue()
    for i in range(PROCESSES):
      _copy(tree := Path(folder, str(i)))
      trees.put(tree)
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    verdict, output = _pytest(tree, tests)
    if verdict != "passed":
      print(f"{output}\nwithout a mutant the tests do not pass: {verdict}", file=sys.stderr)
      return 1

    def run(mutant: Mutant) -> str:
      tree = trees.get()
      try:
        found = _judge(mutant, tree)
      finally:
        trees.put(tree)
      print(f"{mutant.room:8} {mutant.name:28} {found}", flush=True)
      return found

    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
      verdicts = list(pool.map(run, chosen))
  _show(chosen, verdicts)
  return int(verdicts != ["killed"] * len(verdicts))


if __name__ == "__main__":
  sys.exit(main())
