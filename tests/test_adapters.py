"""Fine-tuning by matrices of low rank: all else stays as it was, and a dump has them in the kernels."""

import numpy as np
import pytest
from flax import traverse_util

import dljax
from dljax import interop
from dljax.interop import table
from experiments import gpt
from tests.command import run

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n" * 12
SIZES = ("--config.model.embed_dim=16", "--config.model.num_layers=1", "--config.model.num_heads=2",
         "--config.model.mlp_dim=16", "--config.data.length=8", "--config.batch_size=4", "--config.eval_batch_size=16",
         "--config.total_steps=3", "--config.eval_every=3", "--config.checkpoint_every=3", "--config.log_every=1",
         "--config.sampling.max_new_tokens=4", "--mesh=data:1")


def _train(workdir, *arguments):
  outcome = run(gpt, f"--workdir={workdir}", *SIZES, *arguments)
  assert outcome.status == 0, outcome
  return outcome, dljax.load(workdir, build=gpt.build)


@pytest.mark.slow
def test_only_the_adapters_learn_and_a_dump_merges_them(tmp_path):
  (tmp_path / "text.txt").write_text(TEXT)
  text = f"--config.data.file={tmp_path / 'text.txt'}"
  _, base = _train(tmp_path / "base", text)
  outcome, tuned = _train(tmp_path / "tuned", text, f"--config.init.source={tmp_path / 'base'}", "--config.model.lora_rank=2",
                          "--config.optimizer.learning_rate=0.1")
  said = outcome.out + outcome.err
  assert "block0/gate/lora_down" in said and "start from scratch" in said
  assert "found optimizer.freeze=embed/*" in outcome.out
  before, after = (traverse_util.flatten_dict(r.variables["params"], sep="/") for r in (base, tuned))
  assert {path for path in after if not table.is_adapter(path)} == set(before)
  for path in before:
    np.testing.assert_array_equal(before[path], after[path])
  assert all(np.abs(after[path]).max() > 0 for path in after if path.endswith("lora_up"))

  tensors = interop.dump(tuned.model, tuned.variables, "transformers")
  plain = tuned.model.clone(lora_rank=0)
  tokens = np.arange(8, dtype=np.int32)[None]
  merged = interop.load(plain, tensors, "transformers")
  np.testing.assert_allclose(plain.apply(merged, tokens)["logits"],
                             tuned.model.apply(tuned.variables, tokens)["logits"], atol=1e-5)
