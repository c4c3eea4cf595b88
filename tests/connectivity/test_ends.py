"""A path begins and ends at the two networks: their own losses are those at its ends, or there is no path."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput, Unsupported
from diag.result import Level
from diag.testing import is_one_sentence

CE = nn.CrossEntropyLoss()


def data():
    x = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


class Coded(nn.Module):
    """Weights of the last layer as whole numbers and a scale."""

    def __init__(self, kind=torch.int8):
        super().__init__()
        self.body = nn.Linear(6, 16)
        low, high = (-100, 100) if kind is torch.int8 else (0, 255)
        self.register_buffer("codes", torch.randint(low, high, (3, 16), dtype=kind))

    def forward(self, x):
        return F.linear(self.body(x).tanh(), 0.02 * (self.codes.float() - self.codes.float().mean()))


class Masked(nn.Module):
    """A mask of minus infinity, as attention has it, and one of truth values."""

    def __init__(self, keep=True):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("ruled_out", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
        self.register_buffer("keep", torch.tensor([True, keep, True, True, True, True]))

    def forward(self, x):
        return self.head(x * self.keep) + self.ruled_out


class Hidden(nn.Module):
    """What it multiplies by is in no state dict, or in it as a number."""

    def __init__(self, scale, extra=False):
        super().__init__()
        self.head, self.scale, self.extra = nn.Linear(6, 3), scale, extra

    def forward(self, x):
        return self.head(self.scale * x)

    def get_extra_state(self):
        return self.scale if self.extra else 0

    def set_extra_state(self, state):
        self.scale = state if self.extra else self.scale


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64)), nn.Linear(3, 3)

    def forward(self, x):
        return self.head((x.to(torch.complex64) @ self.weight).abs())


def trained(make, seed=0, steps=60):
    torch.manual_seed(seed)
    model, (x, y) = make().train(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return model.eval()


def plain():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def normed():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def between(first, second, **settings):
    return diag.mode_connectivity(diag.Snapshot(first, CE, data(), other=second), **settings)


def own(model):
    x, y = data()
    with torch.no_grad():
        return float(CE(model(x), y))


ELSEWHERE = {
    "int8": (lambda: Coded(), lambda: Coded(), r"cannot be blended \(codes\)"),
    "uint8": (lambda: Coded(torch.uint8), lambda: Coded(torch.uint8), r"cannot be blended \(codes\)"),
    "bool": (lambda: Masked(), lambda: Masked(False), r"cannot be blended \(keep\)"),
    "attribute": (lambda: Hidden(1.0), lambda: Hidden(-2.0), "what their state dicts do not hold"),
    "extra state": (lambda: Hidden(1.0, True), lambda: Hidden(-2.0, True), "what their state dicts do not hold"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_a_line_cannot_reach_is_no_end_of_it(name):
    make, make_other, said = ELSEWHERE[name]
    first, second = trained(make), trained(make_other, 1)
    given = second.state_dict() if name not in ("attribute",) else second
    with pytest.raises(Unsupported, match=said) as found:
        between(first, given)
    assert is_one_sentence(str(found.value)) and f"{own(second):.4g} is the network's own" in str(found.value)


@pytest.mark.parametrize("make", [plain, Complex, Masked])
@pytest.mark.parametrize("as_state", [True, False])
def test_the_ends_are_the_networks_own_losses(make, as_state):
    first, second = trained(make), trained(make, 1)
    result = between(first, second.state_dict() if as_state else second)
    assert numpy.isfinite(result.losses).all()
    assert [result.losses[0], result.losses[-1]] == pytest.approx([own(first), own(second)], rel=1e-5)
    assert result.own_losses.tolist() == pytest.approx([own(first), own(second)], rel=1e-5)


def test_whole_numbers_that_change_nothing_do_not_matter():
    first, second = trained(plain), trained(plain, 1)
    for model, count in ((first, 3), (second, 90)):
        model.register_buffer("updates", torch.tensor(count))
    assert between(first, second).losses[-1] == pytest.approx(own(second), rel=1e-5)


def test_another_networks_numbers_are_not_made_others():
    first, state = trained(plain), trained(plain, 1).state_dict()
    changed = {
        "is uint8 in the other network and float32": lambda t: (10 * t).to(torch.uint8),
        "is complex64 in the other network and float32": lambda t: t.to(torch.complex64),
        "holds numbers in float64 that float32": lambda t: t.double() + 1e300,
    }
    for said, change in changed.items():
        with pytest.raises(InvalidInput, match=said) as found:
            between(first, state | {"0.weight": change(state["0.weight"])})
        assert is_one_sentence(str(found.value))
    half = between(first, {n: t.half() for n, t in state.items()})
    assert half.losses[-1] == pytest.approx(between(first, state).losses[-1], rel=1e-2)
    nan = between(first, state | {"0.bias": torch.full((16,), torch.nan)})
    assert nan.losses[0] == pytest.approx(own(first), rel=1e-5) and numpy.isnan(nan.losses[-1])
    assert nan.verdict().sentence == "No verdict: the loss of the second network is not finite."


def test_tied_names_with_two_values_are_refused():
    class Tied(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(self.a(x).tanh()).tanh())

    first = trained(Tied)
    with pytest.raises(InvalidInput, match=r"'b.weight' and 'a.weight' are one tensor in the model and two in the"):
        between(first, trained(lambda: Tied(False), 1))
    assert between(first, trained(Tied, 1)).losses[-1] > 0


def test_statistics_that_are_measured_again_are_told_and_do_not_pass_for_the_networks_own():
    first, second = trained(normed), trained(normed, 1)
    quiet = between(first, second)
    assert quiet.unmet() is None and "measured again" not in quiet.verdict().sentence
    moved = copy.deepcopy(first)
    moved[1].running_var.mul_(2)  # the loss moves, and hardly an answer
    told = between(moved, second)
    assert told.own_losses.tolist() == pytest.approx([own(moved), own(second)], rel=1e-5)
    assert told.reset_shift == pytest.approx(abs(own(moved) - told.losses[0]), rel=1e-3)
    if told.unmet() is None:
        assert "BatchNorm statistics measured again" in told.verdict().sentence
    second[1].running_mean.add_(1)  # another network
    refused = between(first, second)
    assert refused.verdict().level is Level.NOT_APPLICABLE
    assert "measuring BatchNorm statistics again makes other networks" in refused.verdict().sentence
    with_own = between(first, second, norm_stats="lerp")
    assert with_own.losses[-1] == pytest.approx(own(second), rel=1e-5)


def test_a_curve_and_an_aligned_line_have_the_same_ends():
    first, second = trained(plain), trained(plain, 1)
    result = between(first, second, align="weights", path="bezier", bezier_steps=5)
    for curve in result.curves.values():
        assert curve[1, [0, -1]].tolist() == pytest.approx([own(first), own(second)], rel=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.module.", "net."])
def test_names_with_a_wrappers_prefix_are_read_as_those_of_a_file(prefix):
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))
    plain = other.state_dict()
    named = {prefix + name: value for name, value in plain.items()}
    expected = diag.mode_connectivity(diag.Snapshot(model, CE, data(), other=plain))
    for given in (named, {"state_dict": named}, {"model_state_dict": plain}):
        found = diag.mode_connectivity(diag.Snapshot(model, CE, data(), other=given))
        numpy.testing.assert_array_equal(found.losses, expected.losses)
    before = diag.Snapshot(model, CE, data(), previous=named).quantity("update")
    for name, value in before.items():
        torch.testing.assert_close(value, (model.state_dict()[name] - plain[name]).to(value))
