"""Other people's trainers, watched from outside; each is skipped where its package is not installed.

pip install diag[trainers]
"""

import contextlib
import logging
import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag

CHEAP = ["softmax_collapse", "gradient_coherence"]


def compared(fit, **options):
    """`fit(watch)` unwatched and watched: the run, after the states were found to be the same."""

    def unwatched(model):
        return contextlib.nullcontext()

    def watched(model):
        watchers.append(diag.watch(model, **({"budget": math.inf, "instruments": CHEAP} | options)))
        return watchers[-1]

    watchers = []
    plain, found = fit(unwatched), fit(watched)
    for name in plain:
        assert torch.equal(plain[name], found[name]), f"{name} differs"
    run = watchers[0].run
    assert not [e for e in run.events if e.kind == "internal error"]
    return run


# Lightning


@pytest.fixture
def lightning():
    found = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return found


def fit_lightning(lightning, losses, norms, through_the_model=True, part=lambda m: m, **settings):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            layers = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
            self.net = nn.Sequential(nn.Flatten(), *layers)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            x, y = batch
            loss = F.cross_entropy(self(x) if through_the_model else self.net(x), y)
            losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            F.cross_entropy(self(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer):
            norms.append([p.grad.double().norm().item() for p in self.parameters()])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    def fit(watch):
        losses.clear()
        norms.clear()
        lightning.seed_everything(0, verbose=False)
        model = Net()
        x = torch.randn(96, 1, 8, 8)
        data = torch.utils.data.TensorDataset(x, x[:, 0, :2, :2].flatten(1).argmax(1))
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **settings,
        )  # fmt: skip
        with watch(part(model)):
            trainer.fit(
                model,
                torch.utils.data.DataLoader(data, 16, shuffle=True),
                torch.utils.data.DataLoader(data, 32),
            )
        return model.state_dict() | {"next draw": torch.rand(1)}

    return fit


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_lightning(lightning, settings):
    losses, norms = [], []
    run = compared(fit_lightning(lightning, losses, norms, **settings))
    parts = settings.get("accumulate_grad_batches", 1)
    expected = numpy.reshape(losses, (-1, parts)).mean(1)
    numpy.testing.assert_allclose(run.history.loss, expected, rtol=1e-6)
    # Lightning calls its hook before it clips, and the record has the gradients before clipping.
    numpy.testing.assert_allclose(run.history.gradient_norm, norms, rtol=1e-5)
    if settings.get("gradient_clip_algorithm") is None and "gradient_clip_val" in settings:
        numpy.testing.assert_allclose(run.history.applied_gradient_norm, 0.3, rtol=1e-5)
    assert set(run.instruments) == set(CHEAP)


def test_a_lightning_module_that_calls_only_its_parts(lightning):
    losses, norms = [], []
    run = compared(fit_lightning(lightning, losses, norms, through_the_model=False))
    numpy.testing.assert_allclose(run.history.loss, losses, rtol=1e-6)
    assert "watch the part that is called" in " ".join(e.text for e in run.events)
    fit = fit_lightning(lightning, losses, norms, through_the_model=False, part=lambda model: model.net)
    assert set(compared(fit).instruments) == set(CHEAP)


# Transformers


@pytest.fixture
def transformers(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    found = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found.logging.set_verbosity_error()
    return found


def gpt(transformers):
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert(transformers):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 3}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **rest))


def fit_transformers(transformers, folder, make, own_loss, reported, **settings):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **others):
            labels = inputs["labels"]
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = F.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    def fit(watch):
        transformers.set_seed(0)
        model = make(transformers)
        tokens = torch.randint(0, 50, (48, 12), generator=torch.Generator().manual_seed(1))
        labels = tokens if make is gpt else tokens[:, 0] % 3
        data = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=8, num_train_epochs=1, use_cpu=True, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        with watch(model):
            trainer = (Own if own_loss else transformers.Trainer)(model=model, args=arguments, train_dataset=data)
            reported[:] = [trainer.train().training_loss]
        return model.state_dict() | {"next draw": torch.rand(1)}

    return fit


@pytest.mark.parametrize(
    ("make", "own_loss", "settings"),
    [
        (gpt, False, {}),
        (gpt, False, {"gradient_accumulation_steps": 3}),
        (gpt, False, {"bf16": True}),
        (gpt, False, {"gradient_checkpointing": True}),
        (bert, False, {}),
        (bert, True, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_trainer_of_transformers(transformers, tmp_path, make, own_loss, settings):
    reported = []
    run = compared(fit_transformers(transformers, tmp_path, make, own_loss, reported, **settings))
    # The Trainer reports the mean over steps, under half precision of rounded numbers.
    tolerance = 1e-3 if "bf16" in settings else 1e-5
    assert run.history.loss.mean() == pytest.approx(reported[0], rel=tolerance)
    assert len(run.history.loss) == 6 // settings.get("gradient_accumulation_steps", 1)
    assert set(run.instruments) == set(CHEAP), run.outcomes
    assert "The loss was observed: cross_entropy()" in " ".join(e.text for e in run.events)


def test_a_loss_of_transformers_own_is_said_not_to_be_known(transformers, tmp_path):
    reported = []
    fit = fit_transformers(transformers, tmp_path, bert, False, reported, label_smoothing_factor=0.1)
    run = compared(fit)
    assert run.history.loss.mean() == pytest.approx(reported[0], rel=1e-5)
    assert "cannot be measured again: no loss function of torch was seen to lead to it; give loss_fn=" in " ".join(
        e.text for e in run.events
    )


def test_schedule_free():
    schedulefree = pytest.importorskip("schedulefree")

    def fit(watch):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), 0.05)
        x = torch.randn(64, 6)
        losses.clear()
        with watch(model):
            for part in torch.arange(64).chunk(8):
                model.train()
                optimizer.train()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[part]), x[part, :3].argmax(1))
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                model.eval()
                optimizer.eval()
                model(x)
        return model.state_dict() | {"next draw": torch.rand(1)}

    losses = []
    run = compared(fit)
    numpy.testing.assert_allclose(run.history.loss, losses, rtol=1e-6)
    assert set(run.instruments) == set(CHEAP)
