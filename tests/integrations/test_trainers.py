"""Recipes for trainers of others, each with its real package on a tiny model."""

from __future__ import annotations

import copy

import accelerate
import lightning
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from cdat_torch import CDAT, further_differentiable


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(96, 6)
    return model, x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def build(model):
    return CDAT(
        torch.optim.AdamW(model.parameters()),
        sigma=1.0,
        initial_learning_rate=1e-2,
        max_growth=1.2,
    )


def plain_run(model, x, y, steps):
    optimizer = build(model)
    return [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(steps)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("form", ["closure", "backward"])
def test_accelerate(form, precision):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, x, y = problem()
    expected = plain_run(copy.deepcopy(model), x, y, 20)
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
    optimizer = build(model)
    # Prepare the model and the data, not the optimizer: it differentiates the loss itself.
    model = accelerator.prepare(model)
    losses = []
    for _ in range(20):
        if form == "closure":
            losses.append(float(optimizer.step(lambda: F.cross_entropy(model(x), y))))
            continue
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y))
        losses.append(float(optimizer.step()))
    tolerance = 1e-4 if precision == "no" else 0.05
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, tmp_path):
    model, x, y = problem()
    expected = plain_run(copy.deepcopy(model), x, y, 20)

    class Module(lightning.LightningModule):
        """Manual optimization: the closure returns the loss, and the optimizer does the rest."""

        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []
            self.automatic_optimization = False

        def training_step(self, batch, index):
            inputs, labels = batch
            closure = lambda: F.cross_entropy(self.model(inputs), labels)
            self.losses.append(float(self.optimizers().step(closure)))

        def configure_optimizers(self):
            return build(self.model)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=96)
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        devices=1,
        precision=precision,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader)
    tolerance = 1e-4 if precision == "32-true" else 0.05
    assert module.losses == pytest.approx(expected, rel=tolerance)


def test_hugging_face_trainer(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    tokens = (torch.arange(16)[None, :] * 3 + torch.arange(64)[:, None]) % 32
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = build(model)

    class Trainer(transformers.Trainer):
        """One method: the optimizer differentiates the loss."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager(), further_differentiable():
                loss = self.compute_loss(model, inputs)
            loss = loss / self.args.gradient_accumulation_steps
            optimizer.backward(loss)
            return loss.detach()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=16,
        gradient_accumulation_steps=2, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        logging_steps=5, report_to=[], save_strategy="no", use_cpu=True, max_grad_norm=1.0,
        disable_tqdm=True,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert int(optimizer.last.skipped) == 0
    assert float(optimizer.last.curvature) != 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
