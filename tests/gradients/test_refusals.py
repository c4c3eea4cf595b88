"""What has no per-example gradients, or none that can be had exactly, is refused in one sentence."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import InvalidInput, Unsupported
from diag.gradients import MatrixGradients, ModelGradients, StackedGradients
from diag.snapshot.reading.forms import as_batch
from diag.testing import is_one_sentence, leaves_no_trace

PATH = Path(__file__).with_name("per_example_cases.py")
cases = importlib.util.module_from_spec(importlib.util.spec_from_file_location("per_example_cases", PATH))
cases.__spec__.loader.exec_module(cases)


def refusal(model, loss_fn, batch, kind, **options):
    with leaves_no_trace(model), pytest.raises(kind) as caught:
        ModelGradients(model, loss_fn, [batch], **options).norms()
    assert is_one_sentence(str(caught.value))
    return str(caught.value)


def classes(n=6):
    torch.manual_seed(0)
    return cases.mlp(), as_batch((cases.flat(n), torch.randint(cases.CLASSES, (n,))))


def test_a_summed_loss():
    model, batch = classes()
    text = refusal(model, nn.CrossEntropyLoss(reduction="sum"), batch, InvalidInput)
    assert text.startswith("The loss is a sum, not a mean") and 'reduction="mean"' in text


def test_a_summed_loss_of_one_example():
    model, batch = classes(1)
    # One example alone cannot tell; the plan's probe doubles it.
    assert "is a sum" in refusal(model, nn.CrossEntropyLoss(reduction="sum"), batch, InvalidInput)


def test_a_loss_that_returns_all_examples():
    model, batch = classes()
    text = refusal(model, nn.CrossEntropyLoss(reduction="none"), batch, InvalidInput)
    assert "a tensor of shape (3,)" in text


def test_class_weights():
    model, batch = classes()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0, 9.0]))
    assert "is not the mean of its examples' losses" in refusal(model, loss_fn, batch, InvalidInput)


def test_a_penalty_added_to_the_loss():
    model, batch = classes()

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets) + outputs.mean(0).square().sum()

    assert "adds a term that belongs to none" in refusal(model, loss_fn, batch, InvalidInput)


def test_a_loss_that_compares_examples():
    model, batch = classes()

    def contrast(outputs, targets):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    assert "compares them with each other" in refusal(model, contrast, batch, InvalidInput)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_batch_statistics(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cases.D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, cases.CLASSES)).train()
    batch = as_batch((cases.flat(n), torch.randint(cases.CLASSES, (n,))))
    text = refusal(model, F.cross_entropy, batch, Unsupported, mode="keep")
    assert ("examples influence each other" in text and "BatchNorm" in text) or n == 2
    assert "running statistics" in text
    ModelGradients(model, F.cross_entropy, [batch]).norms()  # in eval mode there is nothing to refuse


def test_coupling_that_no_class_name_gives_away():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    for layers in ([Centred(), nn.Linear(cases.D, cases.CLASSES)], [nn.Linear(cases.D, cases.CLASSES), Centred()]):
        model = nn.Sequential(*layers)
        _, batch = classes()
        assert "examples influence each other" in refusal(model, F.cross_entropy, batch, Unsupported)


class Coupled(nn.Module):
    """Logits that hold `share` of the batch's mean, beside a number of the whole batch or a constant."""

    def __init__(self, share, number):
        super().__init__()
        self.out, self.share, self.number = nn.Linear(cases.D, cases.CLASSES), share, number

    def forward(self, x):
        z = self.out(x)
        return z + self.share * z.mean(0), self.number(z)


def of_logits(outputs, targets):
    return F.cross_entropy(outputs[0], targets)


@pytest.mark.parametrize(("change", "coupled"), [(4e-3, True), (2e-4, False)])
def test_float32_tells_a_coupling_of_a_few_thousandths_from_rounding(change, coupled):
    """The losses of single examples move in proportion to a small share; rounding is 1e-7, the limit 1e-3."""
    _, batch = classes()
    torch.manual_seed(1)
    model = Coupled(1e-3, lambda z: None)
    with torch.no_grad():
        losses = [F.cross_entropy(model(batch.args[0])[0], batch.targets, reduction="none")]
        losses += [
            torch.stack(
                [of_logits(model(x[None]), y[None]) for x, y in zip(*batch.args, batch.targets, strict=True)]
            )
        ]
    model.share *= change / float((losses[0] - losses[1])[:3].abs().max() / losses[0].abs().max())
    if coupled:
        assert "examples influence each other" in refusal(model, of_logits, batch, Unsupported)
    else:
        ModelGradients(model, of_logits, [batch]).norms()


@pytest.mark.parametrize(("number", "blamed"), [(lambda z: z.mean(), True), (lambda z: torch.tensor(3.0), False)])
def test_only_a_number_that_differs_is_blamed_for_a_coupling(number, blamed):
    _, batch = classes()
    text = refusal(Coupled(1.0, number), of_logits, batch, Unsupported)
    assert ("hold a number of the whole batch" in text) == blamed


def test_batch_norm_without_running_statistics():
    model = nn.Sequential(nn.Conv1d(cases.D, 4, 1), nn.BatchNorm1d(4, track_running_stats=False), nn.Flatten())
    torch.manual_seed(0)
    batch = as_batch((torch.randn(6, cases.D, 2), torch.randint(8, (6,))))
    assert "examples influence each other" in refusal(model, F.cross_entropy, batch, Unsupported)


def test_randomness_that_evaluation_mode_does_not_stop():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(cases.D, cases.CLASSES)

        def forward(self, x):
            return self.out(F.dropout(x, 0.5, training=True))

    _, batch = classes()
    assert "draws random numbers" in refusal(Noisy(), F.cross_entropy, batch, Unsupported)


def test_rows_that_are_not_finite_are_named():
    model, batch = classes()
    x = batch.args[0].clone()
    x[1, 0], x[4, 2] = float("nan"), float("inf")
    text = refusal(model, F.cross_entropy, as_batch((x, batch.targets)), InvalidInput)
    assert "2 example(s)" in text and "rows 1 and 4" in text
    text = refusal(model, F.cross_entropy, as_batch((x, batch.targets)), InvalidInput, micro_batch=2)
    assert "rows 1" in text


def test_rows_of_later_batches_are_counted_from_the_start():
    model, batch = classes()
    x = batch.args[0].clone()
    x[5, 0] = float("nan")
    assert "rows 5" in refusal(model, F.cross_entropy, as_batch((x, batch.targets)), InvalidInput, micro_batch=2)


def test_embeddings_that_count_the_batch():
    model = nn.Sequential(nn.Embedding(9, 6, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 4))
    batch = as_batch((torch.randint(9, (5, 2)), torch.randint(4, (5,))))
    assert "scale_grad_by_freq" in refusal(model, F.cross_entropy, batch, Unsupported)


def test_embeddings_that_rewrite_themselves():
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=0.1), nn.Flatten(), nn.Linear(12, 4))
    batch = as_batch((torch.randint(9, (5, 2)), torch.randint(4, (5,))))
    assert "max_norm" in refusal(model, F.cross_entropy, batch, Unsupported)


def test_a_model_cut_off_from_its_parameters():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(cases.D, cases.CLASSES)

        def forward(self, x):
            return self.out(x).detach()

    _, batch = classes()
    assert "does not depend on any trainable parameter" in refusal(Detached(), F.cross_entropy, batch, Unsupported)


def test_reentrant_checkpoints():
    model = cases.Checkpointed(reentrant=True)
    _, batch = classes()
    assert "use_reentrant=False" in refusal(model, F.cross_entropy, batch, Unsupported)


def test_no_parameters_to_measure():
    model, batch = classes()
    with pytest.raises(InvalidInput, match="No trainable parameter was selected"):
        ModelGradients(model, F.cross_entropy, [batch], layers=lambda name: False)
    with pytest.raises(InvalidInput, match="has no shape yet"):
        ModelGradients(nn.LazyLinear(3), F.cross_entropy, [batch])
    model.requires_grad_(False)
    with pytest.raises(diag.errors.MissingQuantity, match="no trainable parameter"):
        ModelGradients(model, F.cross_entropy, [batch])


def test_outputs_without_a_batch():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (self.w * x).sum()

    batch = as_batch((torch.ones(3, 2), torch.ones(3)))
    assert "along its first axis" in refusal(Single(), lambda o, t: o, batch, Unsupported)


def test_directions_of_the_wrong_length():
    model, batch = classes()
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    with pytest.raises(InvalidInput, match=r"directions have the shape \(2, 3\)"):
        gradients.project(torch.ones(2, 3))


def test_matrices_that_are_none():
    with pytest.raises(InvalidInput, match="one row per example"):
        MatrixGradients(torch.ones(3))
    with pytest.raises(InvalidInput, match="3 columns together"):
        MatrixGradients(torch.ones(3, 4), {"a": 1, "b": 2})


def test_gradients_of_different_parameters_are_not_put_together():
    first, second = (MatrixGradients(torch.ones(2, 3), layers) for layers in ({"a": 3}, {"a": 1, "b": 2}))
    assert StackedGradients([first, first]).norms().tolist() == pytest.approx([3**0.5] * 4)
    for parts in ([], [first, second]):
        with pytest.raises(InvalidInput, match=r"not of the same parameters; give at least one"):
            StackedGradients(parts)


# What must not be refused.


def test_zero_gradients_are_zero():
    model, batch = classes()
    gradients = ModelGradients(model, lambda o, t: 0.0 * F.cross_entropy(o, t), [batch])
    assert float(gradients.norms().max()) == 0.0
    assert float(gradients.gram().abs().max()) == 0.0


def test_layers_that_look_dead_on_the_first_examples():
    """The first three examples leave a unit dead that the others use: the plan must not take it for unused."""
    model = nn.Sequential(nn.Linear(cases.D, 8), nn.ReLU(), nn.Linear(8, cases.CLASSES)).double()
    torch.manual_seed(0)
    x = torch.rand(8, cases.D).double() + 0.5
    x[:3] *= -1
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    batch = as_batch((x, torch.randint(cases.CLASSES, (8,))))
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    truth = cases.loop(model, F.cross_entropy, batch)
    assert float(truth[:3, : cases.D * 8].norm()) == 0 < float(truth[3:, : cases.D * 8].norm())
    torch.testing.assert_close(gradients.dense(), truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("alive", [1, 40])
def test_fitted_networks_where_most_gradients_vanish(alive):
    """Only the last rows of 300 move anything, and not by a large loss: no probe of the first rows shows it."""
    model = nn.Sequential(nn.Linear(cases.D, 8), nn.ReLU(), nn.Linear(8, cases.CLASSES)).double()
    torch.manual_seed(0)
    x = torch.rand(300, cases.D).double() + 0.5
    x[:-alive] *= -1
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
        model[2].bias.copy_(torch.tensor([4.0, 0, 0, 0]))
    y = torch.ones(300, dtype=torch.long)
    y[-alive:] = 0
    batch = as_batch((x, y))
    truth = cases.loop(model, F.cross_entropy, batch)
    gradients = ModelGradients(model, F.cross_entropy, [batch], micro_batch=150)
    torch.testing.assert_close(gradients.dense(), truth, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradients.norms(), truth.norm(dim=1), rtol=1e-10, atol=1e-14)


def test_models_that_overwrite_their_inputs():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(cases.D, cases.CLASSES)

        def forward(self, x):
            return self.out(x.mul_(2))

    _, batch = classes()
    before = batch.args[0].clone()
    ModelGradients(Doubling(), F.cross_entropy, [batch]).norms()
    assert torch.equal(batch.args[0], before)


@pytest.mark.parametrize(
    "name", ["linear, in-place ReLU", "attention", "conv2d, BatchNorm in eval", "custom autograd function"]
)
def test_measuring_leaves_no_trace(name):
    model, loss_fn, batch = cases.problem(name)
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with leaves_no_trace(model):
        ModelGradients(model, loss_fn, [batch]).norms()
        ModelGradients(model, loss_fn, [batch], micro_batch=2).gram()


def test_nothing_of_ours_is_saved_with_a_model():
    """Buffers that the forward pass returns or writes into carry no mark afterwards."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(cases.D))
            self.register_buffer("seen", torch.zeros(9, cases.D))
            self.out = nn.Linear(cases.D, cases.CLASSES)

        def forward(self, x):
            self.scale.add_(0.0)
            self.seen[: len(x)] = x
            return self.out(self.seen[: len(x)] * self.scale.contiguous())

    model, (_, batch) = Cached(), classes()
    truth = cases.loop(model, F.cross_entropy, batch)
    found = ModelGradients(model, F.cross_entropy, [batch])
    torch.testing.assert_close(found.dense().double(), truth, rtol=1e-5, atol=1e-7)
    held = [*model.buffers(), *model.parameters(), *batch.args]
    assert not [t for t in held if vars(t)]


def test_wrapped_models_are_measured_bare():
    model, batch = classes()
    truth = ModelGradients(model, F.cross_entropy, [batch]).norms()
    torch.testing.assert_close(ModelGradients(nn.DataParallel(model), F.cross_entropy, [batch]).norms(), truth)


def test_the_snapshot_gives_them():
    model, batch = classes()
    snapshot = diag.Snapshot(model, F.cross_entropy, (batch.args[0], batch.targets), micro_batch=4)
    gradients = snapshot.quantity("per_example_gradients")
    assert gradients.num_examples == 6
    truth = cases.loop(
        copy.deepcopy(model).double(), F.cross_entropy, as_batch((batch.args[0].double(), batch.targets))
    )
    assert float((gradients.norms() / truth.norm(dim=1) - 1).abs().max()) < 1e-5
