"""Callbacks of other trainers: they begin and end a watch, hand on numbers, and go on after a restart."""

import logging

import pytest
import torch
from torch import nn

import diag

EXTRA = "pip install diag[trainers]"
QUICK = {"instruments": ["softmax_collapse"], "budget": 0.5}


def data(count=96):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


@pytest.fixture
def lightning():
    found = pytest.importorskip("lightning", reason=EXTRA)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return found


def fit(lightning, callback, epochs, checkpoint=None, folder=None, **settings):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 2)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=16)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    keep = {"enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[callback], **quiet, **keep, **settings)
    torch.manual_seed(0)
    trainer.fit(Net(), loader, loader, ckpt_path=checkpoint)
    if folder is not None:
        trainer.save_checkpoint(folder / "net.ckpt")


def test_lightning_is_watched_with_held_out_data_and_logged_numbers(lightning, tmp_path):
    from diag.integrations.lightning import LightningCallback

    fit(lightning, LightningCallback(tmp_path / "run", **QUICK), 2)
    run = diag.load(tmp_path / "run")
    assert run.last_step == 12 and not [e for e in run.events if e.kind == "internal error"]
    assert {"val_loss", "train_loss"} <= set(run.metrics) and len(run.metrics["val_loss"]) >= 2
    (_, last) = run.series("softmax_collapse")[-1]
    assert 0 <= last.held_out_accuracy <= 1, "the sanity check's batches are the held-out data"


def test_lightning_goes_on_with_the_run(lightning, tmp_path):
    from diag.integrations.lightning import LightningCallback

    fit(lightning, LightningCallback(tmp_path / "run", **QUICK), 1, folder=tmp_path)
    assert diag.load(tmp_path / "run").last_step == 6
    fit(lightning, LightningCallback(tmp_path / "run", **QUICK), 3, checkpoint=tmp_path / "net.ckpt")
    run = diag.load(tmp_path / "run")
    assert run.history.steps.tolist() == list(range(1, 19))


def train_hugging_face(transformers, folder, run, steps, resume=False):
    from diag.integrations.transformers import HuggingFaceCallback

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 2)

        def forward(self, x, labels=None):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_safetensors": False}
    known = transformers.TrainingArguments.__dataclass_fields__
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, logging_steps=2, save_steps=4,
        **{k: v for k, v in quiet.items() if k in known},
    )  # fmt: skip
    torch.manual_seed(0)
    callbacks = [HuggingFaceCallback(run, **QUICK)]
    trainer = transformers.Trainer(Net(), arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)


def test_hugging_face_is_watched_and_goes_on(tmp_path):
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    pytest.importorskip("accelerate", reason=EXTRA)
    train_hugging_face(transformers, tmp_path / "out", tmp_path / "run", 4)
    run = diag.load(tmp_path / "run")
    assert run.last_step == 4 and "learning_rate" in run.metrics and len(run.metrics["loss"]) == 2
    train_hugging_face(transformers, tmp_path / "out", tmp_path / "run", 8, resume=True)
    assert diag.load(tmp_path / "run").history.steps.tolist() == list(range(1, 9))


def test_accelerate_gets_a_tracker(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason=EXTRA)
    from diag.integrations.accelerate import AccelerateTracker

    model, (x, y) = nn.Linear(6, 2), data()
    tracker = AccelerateTracker(tmp_path / "run", model, **QUICK)
    accelerator = accelerate.Accelerator(log_with=tracker, cpu=True)
    accelerator.init_trackers("project", config={"rate": 0.1})
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"train_loss": loss.item()})
    accelerator.end_training()
    run = diag.load(tmp_path / "run")
    assert run.last_step == 5 and len(run.metrics["train_loss"]) == 5
    assert run.metrics["config.rate"] == [(0, 0.1)]
