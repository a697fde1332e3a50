"""transformers' Trainer with a subclass that draws in ``training_step``."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

import bnn
from bnn.sampler import active_factors


class SGPTrainer(Trainer):
    """Draws before the forward and keeps the draw until backward has ended."""

    loss_is_scaled_for_ga = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        generator = torch.Generator().manual_seed(self.state.global_step)
        with bnn.sample(model, 1, generator) as self.live:
            return super().training_step(model, inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + 1e-4 * self.live.kl()
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def logits_of(model, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_steps_then_saved_and_reloaded(checkpointing, make_llama, make_adapted, ids, tmp_path):
    """Accumulation over two micro-batches; the default (fused) AdamW; the checkpoint equals the model in memory."""
    model = make_adapted(make_llama(torch.float32))
    before = logits_of(model, ids)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    with torch.random.fork_rng():
        trainer = SGPTrainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(torch.tensor(losses).isfinite())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(f.has_sample for f in active_factors(model))
    after = logits_of(model, ids)
    assert (after - before).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(make_llama(torch.float32), tmp_path / "checkpoint-3")
    assert torch.equal(logits_of(loaded, ids), after)
