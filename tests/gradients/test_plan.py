"""What decides between the methods of per-example gradients: where the examples lie, and the plan's own test."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diag.gradients import ModelGradients
from diag.gradients.plan import probe_of
from diag.gradients.rules import closed_forms
from diag.gradients.rules.blocks import Outer
from diag.gradients.rules.layout import ExampleLayout, find_layout
from diag.snapshot.batch import Batch
from diag.snapshot.picking import picked
from diag.snapshot.reading.forms import as_batch

PATH = Path(__file__).with_name("per_example_cases.py")
cases = importlib.util.module_from_spec(importlib.util.spec_from_file_location("per_example_cases", PATH))
cases.__spec__.loader.exec_module(cases)

WEIGHTS = 1.0 + 0.618 * torch.arange(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "shared", "apart"),
    [
        (torch.float64, 3e-4, True),
        (torch.float64, 3e-3, False),
        (torch.float32, 3e-4, True),
        (torch.float32, 3e-3, False),
        (torch.bfloat16, 1e-2, True),
        (torch.bfloat16, 1e-1, False),
    ],
)
def test_elements_that_examples_share_by_more_than_rounding_belong_to_none(dtype, shared, apart):
    """`shared` of each example's gradient comes from the loss of the next one."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    others = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    gradient = own + shared * others
    weighted = WEIGHTS[:, None] * own + shared * WEIGHTS.roll(1)[:, None] * others
    # The weights differ by 0.6 or 1.2, so what shows of it is 0.6 to 1.2 times `shared`.
    found = find_layout(gradient.to(dtype), weighted.to(dtype), WEIGHTS)
    assert found == (ExampleLayout(0) if apart else None)


def test_half_of_a_larger_probe_are_the_examples_with_the_largest_losses():
    batch = as_batch((torch.arange(40.0)[:, None], torch.zeros(40)))
    losses = torch.zeros(40)
    losses[[5, 17, 29, 33]] = 1.0
    first = probe_of(batch, 3, lambda: losses).args[0].flatten()
    assert first.tolist() == [0, 1, 2]
    larger = probe_of(batch, 8, lambda: losses).args[0].flatten().tolist()
    assert {5, 17, 29, 33} < set(larger) and {0, 39} < set(larger) and len(larger) <= 8


def truth_of(model, batch):
    return cases.loop(model, F.cross_entropy, batch)


def check(model, batch, name):
    """Right, and `name` by the method that needs no closed form."""
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    torch.testing.assert_close(gradients.dense(), truth_of(model, batch), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradients.norms(), truth_of(model, batch).norm(dim=1), rtol=1e-10, atol=1e-14)
    method = gradients.coverage.methods[name]
    assert method == "through the whole graph, one example at a time"


class WrongNorms(Outer):
    """Right gradients, with norms that are one in a hundred off."""

    def squared_norms(self):
        return 1.01 * super().squared_norms()


class WrongProducts(Outer):
    """Right gradients and norms, with inner products that are not."""

    def gram(self, other):
        return super().gram(other).triu()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda block: Outer(block.a, 1.01 * block.b, block.shape),
        lambda block: Outer(block.a.flip(0), block.b, block.shape),
        lambda block: WrongNorms(block.a, block.b, block.shape),
        lambda block: WrongProducts(block.a, block.b, block.shape),
    ],
    ids=["scale", "order of the examples", "norms", "products"],
)
def test_a_closed_form_that_is_wrong_is_not_used(wrong, monkeypatch):
    model, _, batch = cases.problem("linear over time, LayerNorm")
    right = closed_forms.FORMS["linear"]

    def form(call, place):
        block = right(call, place)
        return wrong(block) if isinstance(block, Outer) else block

    monkeypatch.setitem(closed_forms.FORMS, "linear", form)
    check(model, batch, "layers.0.weight")


def test_a_replay_that_takes_a_constant_for_the_examples_is_not_used():
    """A square constant with as many rows as there are examples looks like something that is cut along them."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(cases.D, 3)), nn.Linear(3, cases.CLASSES)
            self.register_buffer("fixed", torch.randn(3, 3))

        def forward(self, x):
            return self.out(torch.einsum("nd,de,ef->nf", x, self.w, self.fixed))

    torch.manual_seed(0)
    batch = as_batch((cases.flat(3).double(), torch.randint(cases.CLASSES, (3,))))
    check(Mixed().double(), batch, "w")


def test_a_table_that_is_read_by_constant_numbers():
    """Through F.embedding, and through torch.embedding with nothing but the table and the numbers."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(4, cases.D)) for _ in range(2))
            self.out = nn.Linear(cases.D, cases.CLASSES)
            self.register_buffer("places", torch.tensor([2, 0, 2]))

        def forward(self, x):
            moved = x.unsqueeze(1) * F.embedding(self.places, self.first) + torch.embedding(
                self.second, self.places
            )
            return self.out(moved.tanh().mean(1))

    torch.manual_seed(0)
    model, batch = Placed().double(), as_batch((cases.flat().double(), torch.randint(cases.CLASSES, (cases.N,))))
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    torch.testing.assert_close(gradients.dense(), truth_of(model, batch), rtol=1e-10, atol=1e-14)
    assert {gradients.coverage.methods[name] for name in ("first", "second")} == {"mul", "add"}


def test_a_tensor_that_all_examples_share_is_the_same_for_one_of_them():
    mask = torch.randn(2, 2)
    x, y = torch.randn(5, 2), torch.arange(5)
    batch = Batch((x, mask), {}, y, 5)
    for rows in ([3], [3, 1]):
        (found,) = picked([batch], rows)
        assert torch.equal(found.args[0], x[rows]) and torch.equal(found.args[1], mask)
        assert torch.equal(found.targets, y[rows]) and found.size == len(rows)


def test_a_parameter_that_the_loss_does_not_reach_has_gradients_of_zero():
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    model.spare = nn.Linear(2, 3).double()
    gradients = ModelGradients(model, loss_fn, [batch])
    torch.testing.assert_close(gradients.norms(), truth_of(model, batch).norm(dim=1), rtol=1e-10, atol=1e-14)
    assert gradients.coverage.methods["spare.weight"] == "no example moves it"
    assert float(gradients.by_layer()["spare"].norms().max()) == 0


@pytest.mark.parametrize("slopes", [1, 4])
def test_slopes_of_a_leaky_unit_have_a_closed_form(slopes):
    model = nn.Sequential(nn.Linear(5, 4), nn.PReLU(slopes), nn.Linear(4, 3)).double()
    batch = as_batch((torch.randn(8, 5).double(), torch.arange(8) % 3))
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    torch.testing.assert_close(gradients.dense(), truth_of(model, batch), rtol=1e-10, atol=1e-14)
    assert gradients.coverage.methods["1.weight"] == "prelu"
