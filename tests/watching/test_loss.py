"""Which loss is learned from which loop: it must give again what training saw, or be refused with the reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy as imported

import diag
import diag.reporting
from diag.errors import MissingQuantity

V, B, T = 11, 6, 5


class Language(nn.Module):
    """A token model; with labels it returns its loss as Hugging Face models do."""

    def __init__(self, half=False):
        super().__init__()
        self.embed, self.head, self.half = nn.Embedding(V, 8), nn.Linear(8, V), half

    def forward(self, tokens, labels=None):
        logits = self.head(self.embed(tokens))
        if self.half:
            logits = logits.half()
        if labels is None:
            return logits
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = F.cross_entropy(logits.float().view(-1, V), shifted.reshape(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def classify(loss_of, outputs=4, make_targets=None):
    torch.manual_seed(0)
    model = nn.Linear(7, outputs)
    x = torch.randn(24, 7)
    y = make_targets(24) if make_targets else torch.randint(0, outputs, (24,))
    return model, (x,), y, lambda m: loss_of(m(x), y)


def language(loss_of, half=False):
    torch.manual_seed(0)
    model = Language(half)
    tokens = torch.randint(0, V, (B, T))
    return model, (tokens,), tokens, lambda m: loss_of(m(tokens), tokens)


WEIGHTS = torch.tensor([0.1, 1.0, 2.0, 0.5])
REPEATED = {
    "cross_entropy": classify(F.cross_entropy),
    "a module": classify(nn.CrossEntropyLoss()),
    "imported": classify(imported),
    "label smoothing": classify(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2)),
    "class weights": classify(lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS)),
    "ignore_index": classify(lambda z, y: F.cross_entropy(z, y, ignore_index=2)),
    "log_softmax and nll": classify(lambda z, y: F.nll_loss(F.log_softmax(z, -1), y)),
    "log_softmax over dim 1": classify(lambda z, y: nn.NLLLoss()(z.log_softmax(1), y)),
    "soft targets": classify(F.cross_entropy, make_targets=lambda n: torch.rand(n, 4).softmax(1)),
    "mse": classify(F.mse_loss, make_targets=lambda n: torch.randn(n, 4)),
    "mse, squeezed": classify(lambda z, y: F.mse_loss(z.squeeze(1), y), 1, torch.randn),
    "mse of a column": classify(lambda z, y: F.mse_loss(z[:, 0], y), 2, torch.randn),
    "bce with logits": classify(
        lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(-1), y), 1, lambda n: torch.rand(n).round()
    ),
    "bce of a sigmoid": classify(
        lambda z, y: F.binary_cross_entropy(torch.sigmoid(z).flatten(), y), 1, lambda n: torch.rand(n).round()
    ),
    "huber": classify(lambda z, y: F.huber_loss(z, y, delta=0.5), 3, lambda n: torch.randn(n, 3)),
    "flattened tokens": language(lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1))),
    "transposed tokens": language(lambda z, y: F.cross_entropy(z.transpose(1, 2), y)),
    "shifted tokens": language(lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))),
    "shifted, ellipsis": language(
        lambda z, y: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1))
    ),
    "widened": language(lambda z, y: F.cross_entropy(z.float().view(-1, V), y.view(-1)), half=True),
    "flattened log_softmax": language(lambda z, y: F.nll_loss(F.log_softmax(z.view(-1, V), dim=1), y.view(-1))),
}


def learned(model, loss_of, steps=2, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with diag.watch(model, instruments=[], **arguments) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
    return watcher, loss.item()


@pytest.mark.parametrize("name", REPEATED)
def test_the_loss_is_learned_and_gives_again_what_training_saw(name):
    model, inputs, _, loss_of = REPEATED[name]
    watcher, value = learned(model, loss_of)
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    found = watcher._losses.loss_fn
    assert found is not None, watcher.run.events
    batch = watcher._probe.batches[0]
    assert batch.size == len(inputs[0]) and torch.equal(batch.args[0], inputs[0])
    assert found(batch.forward(model), batch.targets).item() == pytest.approx(
        value, rel=2e-3 if model_is_half(model) else 1e-5
    )
    snapshot = diag.Snapshot(model, found, watcher._probe.batches)
    assert len(snapshot.quantity("losses")) == batch.size
    if not batch.targets.is_floating_point():
        assert len(snapshot.quantity("labels")) == len(snapshot.quantity("logits"))


def model_is_half(model):
    return getattr(model, "half", False) is True


def test_the_mean_over_examples_as_many_times_as_a_sum_descends_it(helpers):
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, value = learned(model, lambda m: F.cross_entropy(m(*inputs), y, reduction="sum"))
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    loss_fn = watcher._losses.loss_fn
    assert loss_fn(model(*inputs), y).item() == pytest.approx(value, rel=1e-6)
    # Of fewer examples it is as many times the mean: the objective of the run, whatever it is measured on.
    half = F.cross_entropy(model(inputs[0][:12]), y[:12]).item()
    assert loss_fn(model(inputs[0][:12]), y[:12]).item() == pytest.approx(24 * half, rel=1e-6)
    assert (
        "training reduces cross_entropy by 'sum'; measurements use the mean" in helpers.texts(watcher.run).lower()
    )


def test_what_was_observed_as_it_should_be_is_no_caveat():
    """That the loss was seen is routine; that it is another than the measured one must be known."""
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, _ = learned(model, lambda m: F.cross_entropy(m(*inputs), y, reduction="sum"))
    kinds = {e.text.split(" ")[0]: e.kind for e in watcher.run.events}
    assert (kinds["The"], kinds["Training"]) == ("info", "note")
    (note,) = watcher.run.history.notes
    assert note.startswith("Training reduces cross_entropy")
    page = diag.reporting.document(watcher.run)
    assert page["method"]["observed"] == ["The loss was observed: cross_entropy()."]
    assert not any("was observed" in caveat["text"] for caveat in page["caveats"])


def test_a_loss_reduced_by_hand_is_recorded_as_backward_saw_it(helpers):
    model, inputs, y, _ = classify(F.cross_entropy)
    weights = torch.rand(len(y))
    watcher, value = learned(model, lambda m: (F.cross_entropy(m(*inputs), y, reduction="none") * weights).sum(), 7)
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    texts = helpers.texts(watcher.run)
    assert "what backward() was called on, for the losses of its rows are weighted, masked or" in texts
    assert "beside the targets: probe=(inputs, (targets, weights))); give loss_fn=" in texts
    assert watcher._losses.loss_fn is None


def test_an_unknown_loss_is_recorded_as_backward_saw_it(helpers):
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, value = learned(model, lambda m: -m(*inputs).log_softmax(1)[torch.arange(len(y)), y].mean(), 7)
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    assert "no loss function of torch was seen to lead to it" in helpers.texts(watcher.run)


def test_a_loss_of_something_else_is_refused_with_the_reason(helpers):
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, value = learned(model, lambda m: F.cross_entropy(m(*inputs).exp() * 0.1, y), 7)
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    assert "computed from the model's outputs in a way diag cannot repeat; give loss_fn=" in helpers.texts(
        watcher.run
    )
    assert watcher._losses.loss_fn is None


def test_a_penalty_is_part_of_the_recorded_loss_as_it_is_of_the_recorded_gradient(helpers):
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, value = learned(model, lambda m: F.cross_entropy(m(*inputs), y) + 0.1 * m.weight.square().sum())
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    assert "cross_entropy is only a part of it: something that is not known is added" in helpers.texts(watcher.run)


def test_two_losses_are_recorded_by_their_sum(helpers):
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, value = learned(
        model, lambda m: F.cross_entropy(m(*inputs), y) + F.mse_loss(m(*inputs), torch.zeros(24, 4)), 7
    )
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    assert "several loss functions lead to it" in helpers.texts(watcher.run)


def test_a_model_that_returns_its_loss():
    torch.manual_seed(0)
    model, tokens = Language(), torch.randint(0, V, (B, T))
    watcher, value = learned(model, lambda m: m(tokens, labels=tokens)["loss"])
    batch = watcher._probe.batches[0]
    snapshot = diag.Snapshot(model, watcher._losses.loss_fn, watcher._probe.batches)
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    assert snapshot.batch_loss(batch.forward(model), batch.targets).item() == pytest.approx(value, rel=1e-6)
    assert len(snapshot.quantity("labels")) == B * (T - 1) == len(snapshot.quantity("logits"))


def test_a_model_whose_own_loss_is_made_of_two():
    class Two(Language):
        def forward(self, tokens, labels=None):
            out = super().forward(tokens, labels)
            return out | {"loss": out["loss"] + F.mse_loss(out["logits"], torch.zeros(B, T, V))}

    torch.manual_seed(0)
    model, tokens = Two(), torch.randint(0, V, (B, T))
    watcher, value = learned(model, lambda m: m(tokens, labels=tokens)["loss"])
    assert watcher._losses.loss_fn is None and watcher._losses.learned
    batch = watcher._probe.batches[0]
    snapshot = diag.Snapshot(model, None, watcher._probe.batches)
    assert snapshot.batch_loss(batch.forward(model), batch.targets).item() == pytest.approx(value, rel=1e-6)


class Focal(nn.Module):
    def forward(self, outputs, targets):
        p = outputs.softmax(1)[torch.arange(len(targets)), targets]
        return (-(1 - p).square() * p.log()).mean()


@pytest.mark.parametrize("as_module", [True, False])
def test_a_loss_of_the_users_own(as_module, helpers):
    focal = Focal()
    loss_fn = focal if as_module else (lambda outputs, targets: focal(outputs, targets))
    model, inputs, y, _ = classify(F.cross_entropy)
    watcher, value = learned(model, lambda m: loss_fn(m(*inputs), y), 7, loss_fn=loss_fn)
    assert watcher.run.history.loss[-1] == pytest.approx(value, rel=1e-6)
    if as_module:
        assert torch.equal(watcher._probe.batches[0].targets, y)
    else:
        assert {b.targets for b in watcher._probe.batches} == {None}
        with pytest.raises(MissingQuantity, match="targets that belong to loss_fn= were not seen"):
            watcher._losses.objective(None, None)
        assert "targets that belong to loss_fn= were not seen; give probe=" in helpers.texts(watcher.run)


def test_the_users_word_counts_first():
    model, inputs, y, _ = classify(F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[]) as watcher:
        for value in (3.0, torch.tensor(5.0), None):
            loss = F.cross_entropy(model(*inputs), y)
            loss.backward()
            if value is not None:
                watcher.loss(value)
            optimizer.step()
    assert watcher.run.history.loss.tolist() == [3.0, 5.0, pytest.approx(loss.item())]


def test_the_probe_is_the_first_examples_and_stays(watch_all):
    model, _, _, _ = classify(F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(900, 7), torch.randint(0, 4, (900,))
    buffer_x, buffer_y = torch.empty(100, 7), torch.empty(100, dtype=torch.long)
    watcher = watch_all(model, instruments=["softmax_collapse"], every=2)
    for i in range(9):  # a loop that reuses its buffers
        buffer_x.copy_(x[100 * i : 100 * i + 100])
        buffer_y.copy_(y[100 * i : 100 * i + 100])
        F.cross_entropy(model(buffer_x), buffer_y).backward()
        optimizer.step()
    watcher.close()
    assert torch.equal(torch.cat([b.args[0] for b in watcher._probe.batches]), x[:512])
    assert torch.equal(torch.cat([b.targets for b in watcher._probe.batches]), y[:512])
    prints = {r.provenance.data_fingerprint for _, r in watcher.run.series("softmax_collapse")}
    fingerprint = diag.Snapshot(model, None, watcher._probe.batches).fingerprint
    assert prints == {fingerprint}
    assert any(e.kind == "probe" and fingerprint in e.text and "512 examples" in e.text for e in watcher.run.events)


def test_a_given_probe_is_used(watch_all):
    model, _, _, loss_of = classify(F.cross_entropy)
    probe = (torch.randn(10, 7), torch.randint(0, 4, (10,)))
    watcher = watch_all(model, instruments=["softmax_collapse"], probe=probe)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model).backward()
    optimizer.step()
    assert watcher.run.series("softmax_collapse")[0][1].provenance.num_examples == 10


def test_large_outputs_bound_the_probe():
    from diag.watching.measure.probe import Probe

    probe = Probe(limit=100, limit_bytes=10 * (4 * 4 + 8 + 4 * 50))
    y, z = torch.zeros(8, dtype=torch.long), torch.randn(8, 50)
    for _ in range(3):
        probe.add((torch.randn(8, 4),), {}, y, z)
    assert [b.size for b in probe.batches] == [8, 2] and probe.complete


def test_an_example_is_in_the_probe_once():
    from diag.watching.measure.probe import Probe

    x, y = torch.randn(6, 4), torch.arange(6)
    probe = Probe()
    probe.add((x[:4],), {}, y[:4], x)
    probe.add((x[2:],), {}, y[2:], x)
    assert [b.targets.tolist() for b in probe.batches] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(probe.batches[1].args[0], x[4:]) and not probe.complete
    probe.add((x[1:5],), {}, y[1:5], x)
    assert probe.complete and probe.size == 6
