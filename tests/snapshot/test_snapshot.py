"""The snapshot computes each quantity once, right, and says what is missing."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput, MissingQuantity
from diag.snapshot.glossary import GLOSSARY, lookup
from diag.snapshot.parameters import FlatLayout, flat_of
from diag.testing import classification, is_one_sentence, leaves_no_trace


@pytest.fixture(scope="module")
def problem():
    return classification()


@pytest.fixture
def snapshot(problem):
    return problem.snapshot(micro_batch=37)  # 37 + 37 + 16: a ragged last batch


def test_every_row_of_the_glossary_is_a_documented_function():
    for name, row in GLOSSARY.items():
        assert row.function().__doc__, name
        assert row.cost and row.how, name


def test_forward_quantities(problem, snapshot):
    x, y = problem.data
    z = problem.model(x).detach()
    assert torch.equal(snapshot.quantity("inputs"), x)
    assert torch.equal(snapshot.quantity("labels"), y)
    torch.testing.assert_close(snapshot.quantity("logits"), z)
    torch.testing.assert_close(snapshot.quantity("losses"), F.cross_entropy(z, y, reduction="none"))
    residual = z.softmax(1) - F.one_hot(y, 3)  # the closed form of d cross_entropy / d logits
    torch.testing.assert_close(snapshot.quantity("logit_gradients"), residual, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(snapshot.quantity("features"), problem.model[:-1](x).detach())
    weight, bias = snapshot.quantity("classifier")
    torch.testing.assert_close(snapshot.quantity("features") @ weight.T + bias, z)
    torch.testing.assert_close(snapshot.quantity("layer_features")["2"], problem.model[:3](x).detach())


def test_the_gradient_weighs_a_ragged_last_batch_right(problem, snapshot):
    loss = F.cross_entropy(problem.model(problem.data[0]), problem.data[1])
    expected = torch.autograd.grad(loss, list(problem.model.parameters()))
    torch.testing.assert_close(
        flat_of(snapshot.quantity("gradient").values()), flat_of(expected), rtol=1e-5, atol=1e-7
    )


def test_loss_at_moves_no_parameter(problem, snapshot):
    loss_at, values = snapshot.quantity("loss_at"), snapshot.quantity("params")
    with leaves_no_trace(problem.model):
        moved = loss_at({k: 0 * v for k, v in values.items()})
    assert moved == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-6)  # all logits equal: log K
    assert loss_at(values) == pytest.approx(snapshot.quantity("losses").mean().item(), rel=1e-6)


def test_flatten_and_unflatten_are_inverse(snapshot):
    values = snapshot.quantity("params")
    layout = FlatLayout.of({name: value.shape for name, value in values.items()})
    back = layout.named_views(flat_of(values.values()))
    assert torch.equal(layout.flatten(back.values(), flat_of(values.values())), flat_of(values.values()))
    assert all(torch.equal(values[k], back[k]) for k in values)


def test_earlier_and_other_states(problem, snapshot):
    torch.testing.assert_close(
        snapshot.quantity("update")["0.weight"], problem.model[0].weight.detach() - problem.previous["0.weight"]
    )
    before = copy.deepcopy(problem.model)
    before.load_state_dict(problem.previous)
    expected = F.cross_entropy(before(problem.data[0]), problem.data[1], reduction="none").detach()
    with leaves_no_trace(problem.model):
        torch.testing.assert_close(snapshot.quantity("previous_losses"), expected)
    assert torch.equal(snapshot.quantity("other_params")["0.weight"], problem.other["0.weight"])


def test_the_optimizer_is_read_as_data(snapshot):
    found = snapshot.quantity("optimizer")
    assert (found.kind, found.learning_rate, found.groups[0]["momentum"]) == ("SGD", 0.1, 0.9)


def test_a_history_of_one_row_is_measured_where_no_run_is_there(problem, snapshot):
    row = snapshot.quantity("history")
    norms = [g.norm().item() for g in snapshot.quantity("gradient").values()]
    assert row.gradient_norm[0] == pytest.approx(norms, rel=1e-5)
    assert row.loss[0] == pytest.approx(snapshot.quantity("losses").mean().item(), rel=1e-6)
    assert len(row) == 1
    assert row.layers == tuple(dict(problem.model.named_parameters()))


def test_held_out_data_is_asked_for_by_a_prefix(problem, snapshot):
    expected = problem.model(problem.held_out[0]).detach()
    torch.testing.assert_close(snapshot.quantity("held_out_logits"), expected)
    assert lookup("held_out_logits") is GLOSSARY["logits"]


def test_each_quantity_is_computed_once(problem, monkeypatch):
    calls, forward = [], nn.Linear.forward  # a hook would not fire
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: calls.append(m is problem.model[0]) or forward(m, x))
    snapshot = problem.snapshot()
    for name in ("logits", "losses", "features", "classifier", "logits", "labels"):
        snapshot.quantity(name)
    assert sum(calls) == 1


def test_measuring_leaves_the_model_alone(problem):
    problem.model.train()
    with leaves_no_trace(problem.model):
        snapshot = problem.snapshot()
        for name in ("logits", "losses", "gradient", "layer_features", "history", "held_out_logits", "update"):
            snapshot.quantity(name)


def test_dropout_and_batch_norm_are_measured_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y))
    model.eval()
    expected = model(x).detach()
    model.train()
    torch.testing.assert_close(snapshot.quantity("logits"), expected)


class Tokens(nn.Module):
    """A sequence model in the style of Hugging Face: a dict in, an object with logits (and loss) out."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        loss = F.cross_entropy(logits.transpose(1, 2), labels) if labels is not None else None
        return {"logits": logits, "loss": loss}


def test_sequence_models_count_positions_and_leave_ignored_ones_out():
    ids = torch.randint(11, (4, 5))
    labels = ids.clone()
    labels[:, -2:] = -100
    snapshot = diag.Snapshot(Tokens(), None, {"input_ids": ids, "labels": labels})
    assert snapshot.quantity("logits").shape == (12, 11)
    assert torch.equal(snapshot.quantity("labels"), ids[:, :3].reshape(-1))
    assert snapshot.quantity("features").shape == (12, 6)


def test_max_examples_and_fingerprint(problem):
    assert problem.snapshot(max_examples=50, micro_batch=20).num_examples == 50
    assert problem.snapshot().fingerprint == problem.snapshot().fingerprint
    assert problem.snapshot().fingerprint != problem.snapshot(max_examples=50).fingerprint


def test_a_compiled_or_wrapped_model_is_measured_through_its_bare_module(problem):
    wrapped = nn.DataParallel(problem.model)
    assert diag.Snapshot(wrapped, problem.loss_fn, problem.data).model is problem.model
    compiled = torch.compile(problem.model, backend="eager")
    assert diag.Snapshot(compiled, problem.loss_fn, problem.data).model is problem.model


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x) * 2


def test_two_moments_are_never_mixed():
    model = nn.Linear(2, 2)
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])))
    logits = snapshot.quantity("logits")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert snapshot.quantity("logits") is logits
    with pytest.raises(InvalidInput, match="has changed since the snapshot was made"):
        snapshot.quantity("gradient")


REFUSALS = {
    "logits": (lambda p: diag.Snapshot(p.model), "has no data; give data="),
    "losses": (lambda p: diag.Snapshot(p.model, None, p.data), "has no loss; give loss_fn="),
    "held_out_logits": (lambda p: diag.Snapshot(p.model, p.loss_fn, p.data), "no held-out data; give held_out="),
    "features": (lambda p: diag.Snapshot(Headless(), p.loss_fn, p.data), "do not come from a final Linear layer"),
    "labels": (lambda p: diag.Snapshot(p.model, None, (p.data[0], p.data[0])), "targets are not class numbers"),
    "targets": (lambda p: diag.Snapshot(p.model, None, p.data), "targets are not floating-point numbers"),
    "optimizer": (lambda p: diag.Snapshot(p.model), "no optimizer; give it optimizer="),
    "previous_losses": (lambda p: diag.Snapshot(p.model, p.loss_fn, p.data), "give it previous="),
    "other_params": (lambda p: diag.Snapshot(p.model), "give it other="),
    "params": (lambda p: diag.Snapshot(nn.ReLU()), "no trainable parameter; set requires_grad"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_missing_is_said_in_one_sentence(problem, name):
    make, text = REFUSALS[name]
    with pytest.raises(MissingQuantity, match=text) as caught:
        make(problem).quantity(name)
    assert is_one_sentence(str(caught.value))
    assert str(caught.value).startswith(f"{name} is missing: ")


def test_numbers_are_converted_as_settings_are(problem):
    snapshot = diag.Snapshot(problem.model, seed="3", micro_batch=numpy.int64(8), max_examples=20.0)
    assert (snapshot.seed, snapshot.micro_batch, snapshot.max_examples) == (3, 8, 20)
    assert all(type(n) is int for n in (snapshot.seed, snapshot.micro_batch, snapshot.max_examples))


MISTAKES = {
    "no module": (lambda p: diag.Snapshot("model"), "The model is a str; expected a torch.nn.Module"),
    "loss": (lambda p: diag.Snapshot(p.model, 3), "loss_fn is an int; expected loss_fn.outputs, targets."),
    "loss class": (
        lambda p: diag.Snapshot(p.model, nn.CrossEntropyLoss),
        r"loss_fn is the class CrossEntropyLoss; expected one that is made: CrossEntropyLoss\(\)",
    ),
    "device": (lambda p: diag.Snapshot(p.model, device="cudda"), "device is 'cudda'; expected one such as 'cpu'"),
    "part": (lambda p: diag.Snapshot(p.model, micro_batch=0), "micro_batch is 0; expected a number of examples"),
    "size": (lambda p: diag.Snapshot(p.model, max_examples=2.5), "max_examples is 2.5; expected a number"),
    "seed": (lambda p: diag.Snapshot(p.model, seed="a"), "seed is 'a'; expected a whole number"),
    "unpack": (lambda p: diag.Snapshot(p.model, unpack=3), "unpack is an int; expected unpack.batch. -> .inputs"),
    "optimizer": (
        lambda p: p.snapshot(optimizer="sgd").quantity("optimizer"),
        "optimizer is a str; expected a torch",
    ),
    "previous": (lambda p: p.snapshot(previous=3).quantity("update"), "previous is an int; expected a state dict"),
    "empty": (lambda p: diag.Snapshot(p.model, p.loss_fn, []).batches, "holds no batch"),
    "shape": (
        lambda p: diag.Snapshot(p.model, p.loss_fn, (torch.ones(4, 5), p.data[1][:4])).quantity("logits"),
        "cannot be called on this data .mat1 and mat2 shapes cannot be multiplied",
    ),
    "unreduced loss": (
        lambda p: diag.Snapshot(p.model, nn.MSELoss(reduction="none"), (p.data[0], torch.ones(90, 3))).quantity(
            "losses"
        ),
        "The loss function returned a tensor of shape .*; expected one number",
    ),
    "other state": (
        lambda p: p.snapshot(other={"0.weight": torch.ones(2, 2)}).quantity("other_params"),
        r"0.weight has shape \(2, 2\) in other=; expected shape \(12, 8\), and 5 more differ",
    ),
    "name": (lambda p: p.snapshot().quantity("logit"), "'logit' is not a quantity of the glossary"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence_and_leave_the_model_alone(problem, name):
    make, text = MISTAKES[name]
    with leaves_no_trace(problem.model), pytest.raises(InvalidInput, match=text) as caught:
        make(problem)
    assert is_one_sentence(str(caught.value))


def test_a_model_that_gives_its_own_loss_shows_each_examples_where_torch_computes_it():
    class OwnLoss(torch.nn.Module):
        def __init__(self, by_hand):
            super().__init__()
            self.layer, self.by_hand = torch.nn.Linear(3, 2), by_hand

        def forward(self, x, labels=None):
            z = self.layer(x)
            own = -z.log_softmax(1)[torch.arange(3), labels].mean() if self.by_hand else F.cross_entropy(z, labels)
            return {"loss": own, "logits": z}

    labels = torch.tensor([0, 1, 1])
    data = {"x": torch.randn(3, 3), "labels": labels}
    seen, hidden = (diag.Snapshot(OwnLoss(b), None, data, unpack=lambda b: (b, b["labels"])) for b in (False, True))
    each = F.cross_entropy(seen.model.layer(data["x"]), labels, reduction="none").detach()
    torch.testing.assert_close(seen.quantity("losses"), each)
    with pytest.raises(MissingQuantity, match="the model gives its own loss, a mean over the batch"):
        hidden.quantity("losses")
