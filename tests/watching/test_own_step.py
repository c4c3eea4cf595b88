"""Coherence measured on a training step's own gradients: exact and without a trace, else on the probe set."""

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import diag
from diag.registry import instrument
from diag.result import Result, measured

BATCH, STEPS = 16, 8


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, 1, 6, 6, generator=generator)
    return x, x[:, 0, :2, :2].flatten(1).argmax(1)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 4))


def conv():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def normalised():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.embed(x[:, 0])).mean(1))


def one_step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def in_half_precision(model, optimizer, x, y):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()


def accumulating(model, optimizer, x, y):
    optimizer.zero_grad(set_to_none=False)
    for rows in torch.arange(len(x)).split(8):
        (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
    optimizer.step()


def train(model, step=one_step, steps=STEPS, batch=BATCH, each=None):
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        rows = torch.randperm(len(x))[:batch]
        if each is not None:
            each(model, x[rows], y[rows])
        step(model, optimizer, x[rows], y[rows])


def watch(model, instruments=("gradient_coherence",), **options):
    given = {"probe": data(), "budget": math.inf, "every": 1, "instruments": instruments} | options
    return diag.watch(model, **given)


def results(run, name="gradient_coherence"):
    assert not [e for e in run.events if e.kind == "internal error"], [e.text for e in run.events]
    return run.series(name)


def notes(run, name="gradient_coherence"):
    return " ".join(note for _, result in results(run, name) for note in result.notes)


CASES = {
    "linear": (mlp, one_step),
    "convolution": (conv, one_step),
    "transformer": (Transformer, one_step),
    "autocast": (conv, in_half_precision),
    "accumulation": (mlp, accumulating),
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical(name, helpers):
    make, step = CASES[name]
    unwatched, _ = helpers.final_state(lambda model: train(model, step), False, make)
    wanted = {"instruments": ["gradient_coherence", "gradient_conflict"]}
    given = {"probe": data(), "budget": math.inf, "every": 1} | wanted
    watched, run = helpers.final_state(lambda model: train(model, step), True, make, **given)
    helpers.assert_identical(watched, unwatched)
    size = 8 if name == "accumulation" else BATCH  # the first micro-batch
    for asked in wanted["instruments"]:
        assert {r.num_examples for _, r in results(run, asked)[1:]} == {size}
        assert f"Measured on the training batch of {size} examples" in notes(run, asked)


def coherence(model, x, y):
    """alpha of the batch from one gradient an example, float64."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows).double()
    return float(g.mean(0).square().sum() / g.square().sum(1).mean())


def test_the_numbers_are_those_of_the_step_before_its_update():
    torch.manual_seed(0)
    model, expected = conv().double(), []
    x, y = data()
    with watch(model, probe=(x.double(), y)) as watcher:
        train(model, lambda m, o, a, b: one_step(m, o, a.double(), b), each=lambda m, a, b: expected.append(
            coherence(copy.deepcopy(m), a.double(), b)))  # fmt: skip
    found = results(watcher.run)
    assert [step for step, _ in found] == [3, 5, 7]
    for step, result in found:
        assert result.coherence == pytest.approx(expected[step - 1], rel=1e-10)
        assert result.provenance.num_examples == BATCH
        assert len(result.classes) >= 2 and result.coverage == 1.0


def test_what_cannot_be_read_is_measured_on_the_probe_set():
    torch.manual_seed(0)
    model = normalised()
    with watch(model) as watcher:
        train(model)
    assert {result.num_examples for _, result in results(watcher.run)} == {96}
    assert "Measured on the probe set: the training steps' own gradients are not used, because" in notes(
        watcher.run
    )
    assert "BatchNorm on batch statistics" in notes(watcher.run)


def test_a_contrast_needs_passes_of_its_own():
    torch.manual_seed(0)
    model = mlp()
    with watch(model, {"gradient_coherence": {"contrast": True}, "gradient_conflict": {}}) as watcher:
        train(model)
    assert {result.num_examples for _, result in results(watcher.run)} == {96}
    assert "contrast=True needs a model" in notes(watcher.run)
    assert {r.num_examples for _, r in results(watcher.run, "gradient_conflict")} == {BATCH}


def penalised(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    (loss + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()


def penalised_elsewhere(model, optimizer, x, y):
    """The gradient of a penalty arrives by a backward pass of its own."""
    optimizer.zero_grad()
    (0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def contrasting(model, optimizer, x, y):
    """Each example's loss depends on the whole batch."""
    optimizer.zero_grad()
    z = model(x)
    F.cross_entropy(z @ z.T, torch.arange(len(x))).backward()
    optimizer.step()


def averaged_with_others(model, optimizer, x, y):
    """Something changes the gradient before anybody sees it, as the mean over processes does."""
    optimizer.zero_grad()
    handles = [p.register_hook(lambda g: 0.5 * g) for p in model[1].parameters()]
    F.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (penalised, "backward() was not called on a multiple of one loss function's value"),
        (penalised_elsewhere, "gradients were left over from an earlier backward pass"),
        (contrasting, "cross_entropy is called on something that was computed from the model's outputs"),
        (averaged_with_others, "do not add up to its gradient"),
    ],
)
def test_what_a_step_descends_is_checked(step, reason):
    torch.manual_seed(0)
    model = mlp()
    with watch(model, loss_fn=F.cross_entropy) as watcher:
        train(model, step, steps=12)
    assert {result.num_examples for _, result in results(watcher.run)} == {96}
    assert reason in notes(watcher.run)


def test_a_scaled_loss():
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    torch.manual_seed(0)
    model, scaler = mlp(), torch.amp.GradScaler("cpu", init_scale=256.0)
    with watch(model) as watcher:
        train(model, step)
    assert {result.num_examples for _, result in results(watcher.run)} == {BATCH}


def test_small_batches_are_left_to_the_probe_set():
    torch.manual_seed(0)
    model = mlp()
    with watch(model) as watcher:
        train(model, batch=4, steps=10)
    assert {result.num_examples for _, result in results(watcher.run)} == {96}
    assert "because no call with a batch of at least 8 examples" in notes(watcher.run)


def test_at_the_end_without_a_step():
    torch.manual_seed(0)
    model = mlp()
    with watch(model) as watcher:
        train(model, steps=1)
    (_, result), = results(watcher.run)  # fmt: skip
    assert result.num_examples == 96 and result.notes[-1].endswith("as no training step was at hand.")


def test_a_model_that_raises_and_one_that_is_copied():
    """While a step is armed: the user's error passes, nothing stays active, and copies carry no hook of ours."""

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calm = nn.Linear(36, 4), True

        def forward(self, x):
            if not self.calm:
                raise ValueError("not today")
            return self.layer(x.flatten(1))

    torch.manual_seed(0)
    model = Moody()
    watcher = watch(model)
    train(model, steps=2)
    if not watcher._own_step.armed:
        train(model, steps=1)
    assert watcher._own_step.armed
    twin = copy.deepcopy(model)
    assert torch.equal(twin(data()[0]), model(data()[0]))
    pickle.dumps(model.state_dict())
    model.calm = False
    with pytest.raises(ValueError, match="not today"):
        model(data()[0])
    assert not torch.overrides._get_current_function_mode_stack()
    model.calm = True
    train(model, steps=6)
    watcher.close()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert {result.num_examples for _, result in results(watcher.run)} == {BATCH}


@pytest.mark.parametrize("where", ["gradients.capture.get_gradient_edge", "gradients.step.Assembly"])
def test_an_error_of_the_recording_stays_ours(where, monkeypatch, helpers):
    def broken(*args):
        raise RuntimeError("a stone in the shoe")

    def train_broken(model):
        train(model, steps=2)
        with monkeypatch.context() as patch:
            patch.setattr(f"diag.{where}", broken)
            train(model, steps=2)
        train(model, steps=STEPS - 4)

    def train_plain(model):
        for steps in (2, 2, STEPS - 4):
            train(model, steps=steps)

    unwatched, _ = helpers.final_state(train_plain, False, mlp)
    given = {"probe": data(), "budget": math.inf, "every": 1, "instruments": ["gradient_coherence"]}
    watched, run = helpers.final_state(train_broken, True, mlp, **given)
    helpers.assert_identical(watched, unwatched)
    assert results(run)


@pytest.mark.parametrize("planned", [True, False])
def test_no_activation_is_held_after_the_backward_pass(planned, monkeypatch):
    """What the instruments ask is answered on the way; where that is not planned, the activations are kept."""
    from diag.gradients import StepGradients

    if not planned:
        monkeypatch.setattr(StepGradients, "ask_only", lambda self, queries: None)
    torch.manual_seed(0)
    model, alive, held = mlp(), [], []
    model[3].register_forward_hook(
        lambda module, args, output: alive.append(StorageWeakRef(output.untyped_storage()))
    )
    with watch(model, ["gradient_coherence", "gradient_conflict"]) as watcher:
        measure = watcher._measurements.measure_step

        def measuring(read, names):
            held.append(not alive[-1].expired())
            return measure(read, names)

        monkeypatch.setattr(watcher._measurements, "measure_step", measuring)
        train(model)
    assert held == [not planned] * 3
    for name in ("gradient_coherence", "gradient_conflict"):
        assert [r.num_examples for _, r in results(watcher.run, name)] == [BATCH] * 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Curious(Result):
    """How many pairs of examples agree."""

    agreeing: float = measured("share of pairs with a positive product")


@instrument(source="a test")
def curious(per_example_gradients) -> Curious:
    """Asks for products only where the gradients do not vanish, which no rehearsal on zeros can show."""
    if not per_example_gradients.norms().any():
        return Curious(agreeing=math.nan)
    return Curious(agreeing=float((per_example_gradients.gram() > 0).double().mean()))


def test_an_instrument_that_asks_what_was_not_foreseen(monkeypatch):
    """One step gives it nothing; the next ones are kept for whatever it asks."""
    monkeypatch.setattr("diag.watching.measure.measuring.find", lambda name: curious)
    torch.manual_seed(0)
    model, kept = mlp(), []
    with watch(model, ["curious"]) as watcher:
        watcher._measurements._record = lambda step, outcome, seconds: kept.append((step, outcome))
        train(model)
    assert [step for step, _ in kept] == [4, 6, 8]  # step 3 was read in vain, and the end has no other measure
    for _, outcome in kept:
        assert 0 < outcome.agreeing <= 1
        assert "from its own backward pass" in outcome.notes[-1]


@pytest.mark.slow
def test_a_compiled_model_is_left_alone():
    torch.manual_seed(0)
    model = mlp()
    model.compile()
    with watch(model) as watcher:
        train(model)
    assert "because the model is compiled" in notes(watcher.run)


def test_what_reading_a_step_takes_is_charged(monkeypatch):
    """The time by which a step that is read is longer than others counts as the watch's and the instrument's."""
    import time

    from diag.watching.measure.own_step import OwnStep

    original = OwnStep.forward_begins

    def slow(self, inputs):
        original(self, inputs)
        time.sleep(0.2)

    monkeypatch.setattr(OwnStep, "forward_begins", slow)
    torch.manual_seed(0)
    model = mlp()
    with watch(model) as watcher:
        train(model, steps=6)
    costs = [c.seconds for c in watcher.run.costs if c.instrument == "gradient_coherence"]
    assert all(seconds > 0.15 for seconds in costs) and len(costs) == len(results(watcher.run)) >= 2
    assert watcher.clock.measuring > 0.15 * len(costs)
