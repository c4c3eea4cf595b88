"""The self-test itself: what it says, where it runs in float32, and that it sees what is small or hidden."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diag.curvature.matrices import GaussNewton, Hessian
from diag.curvature.record import SelfTest
from diag.curvature.selftest import FALLBACK_STEPS
from diag.errors import Unsupported
from diag.snapshot.reading.forms import as_batches

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


class Float32Only(torch.autograd.Function):
    """The identity, as a kernel that exists in float32 alone."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class StoredDerivative(torch.autograd.Function):
    """x^3 / 3 with a backward that takes its stored derivative for a constant: silently wrong twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.derivative = x.detach() ** 2
        return x**3 / 3

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative


def wide_relu(middle):
    """Enough units that a float32 step along a random direction crosses some kink."""
    parts = {"first": nn.Linear(6, 40), "second": nn.Linear(40, 40), "head": nn.Linear(40, 3)}
    return cases.Composed(lambda self, x: self.head(middle(self.second(self.first(x).relu())).relu()), **parts)


def batches():
    torch.manual_seed(5)
    return cases.ragged(torch.randn(64, 6), torch.randint(3, (64,)))


def test_kinks_do_not_fail_a_right_product():
    operator = Hessian(cases.build(lambda: wide_relu(lambda h: h)), F.cross_entropy, batches())
    assert operator.self_test.level == "ok" and operator.self_test.precision == "float64"
    assert max(operator.self_test.errors.values()) < 3e-3


def test_a_model_for_float32_alone_is_tested_in_float32():
    model = cases.build(lambda: wide_relu(Float32Only.apply))
    plain = cases.build(lambda: wide_relu(lambda h: h))
    for kind in (Hessian, GaussNewton):
        operator = kind(model, F.cross_entropy, batches())
        record = operator.self_test
        assert record.precision == "float32" and record.method == "double backward"
        assert set(record.errors) == {"gradient", "top"}  # smooth directions only
        assert max(record.errors.values()) < 0.3
        v = cases.directions(operator.size)[0]
        assert cases.relative(operator @ v, kind(plain, F.cross_entropy, batches()) @ v) < 2e-6


def test_a_wrong_construct_is_found_in_float32_too():
    """Its finite difference stands in where it is good enough, and is as good as it says."""
    build = lambda: cases.Composed(  # noqa: E731
        lambda self, x: self.head(StoredDerivative.apply(Float32Only.apply(self.first(x).tanh()))),
        first=nn.Linear(6, 8),
        head=nn.Linear(8, 3),
    )
    model = cases.build(build)
    operator = Hessian(model, F.cross_entropy, batches())
    record = operator.self_test
    assert record.precision == "float32" and record.method == "finite difference"
    exact = cases.build(build)
    exact.function = lambda self, x: self.head(self.first(x).tanh() ** 3 / 3)
    truth = Hessian(exact, F.cross_entropy, batches())
    v = cases.directions(operator.size)[0]
    error = cases.relative(operator @ v, truth @ v)
    assert 1e-6 < error < 0.03 and error < 10 * max(record.errors.values())


class StoredGradient(torch.autograd.Function):
    """The identity, whose backward pass has no graph: a double backward pass gives zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.detach()


def test_of_a_quadratic_the_largest_two_steps_are_the_best():
    """Differences are exact at any step; what rounding adds to them shrinks as the step grows."""
    model = cases.build(lambda: cases.Composed(lambda self, x: StoredGradient.apply(self.a(x)), a=nn.Linear(6, 3)))
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    record = Hessian(model, F.mse_loss, list(as_batches((x, torch.zeros(12, 3))))).self_test
    assert record.method == "finite difference"
    assert record.step == FALLBACK_STEPS[record.precision][-2]


def test_steps_of_finite_differences_are_each_ten_times_the_one_before():
    for steps in FALLBACK_STEPS.values():
        assert [b / a for a, b in itertools.pairwise(steps)] == pytest.approx([10.0] * (len(steps) - 1))


def test_a_finite_difference_that_is_not_good_enough_is_refused():
    """float32 alone, a wrong double backward and a fast oscillation: no step is both small and large enough."""
    model = cases.build(lambda: wide_relu(lambda h: StoredDerivative.apply(Float32Only.apply((1000 * h).sin()))))
    with pytest.raises(
        Unsupported,
        match=r"No correct curvature product is available: double backward differs .* no better .* replace that",
    ):
        Hessian(model, F.cross_entropy, batches()).self_test.sentence()


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_a_wrong_small_part_is_found_and_named(share):
    """A wrong branch whose part of the product is small beside the rest."""
    model = cases.Composed(
        lambda self, x: self.main(x) + share * StoredDerivative.apply(self.branch(x)),
        main=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        branch=nn.Linear(6, 3),
    )
    operator = Hessian(cases.build(lambda: model), F.cross_entropy, batches())
    record = operator.self_test
    assert record.method == "finite difference"
    assert "most in branch." in record.reason and "double backward differs" in record.reason


class ScaledSecond(torch.autograd.Function):
    """The derivative of a cube, whose own derivative is (1 - wrong) of what it should be."""

    @staticmethod
    def forward(ctx, x, wrong):
        ctx.save_for_backward(x)
        ctx.wrong = wrong
        return 3 * x**2

    @staticmethod
    def backward(ctx, grad):
        return (1 - ctx.wrong) * 6 * ctx.saved_tensors[0] * grad, None


class Cube(torch.autograd.Function):
    """x^3 with a right gradient, and a second derivative that is too small by the share `wrong`."""

    @staticmethod
    def forward(ctx, x, wrong):
        ctx.save_for_backward(x)
        ctx.wrong = wrong
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return ScaledSecond.apply(ctx.saved_tensors[0], ctx.wrong) * grad, None


def mean_output(outputs, targets):
    return outputs.mean()


def cubic(wrong, share, only_float32=False):
    """Two parameters that do not meet: the mean of (1 - share) a^3 + share b^3, b's second derivative wrong."""
    narrow = Float32Only.apply if only_float32 else (lambda x: x)
    return cases.Composed(
        lambda self, x: (1 - share) * Cube.apply(self.a(narrow(x)), 0.0) + share * Cube.apply(self.b(x), wrong),
        a=nn.Linear(6, 1, bias=False),
        b=nn.Linear(6, 1, bias=False),
    )


def self_test(model):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.b.weight.copy_(model.a.weight)
    return Hessian(model, mean_output, cases.ragged(x, torch.zeros(64))).self_test


@pytest.mark.parametrize(
    ("precision", "wrong", "passes"),
    [("float64", 0.02, True), ("float64", 0.05, False), ("float32", 0.2, True), ("float32", 0.5, False)],
)
def test_how_wrong_a_product_may_be(precision, wrong, passes):
    """3 % in float64, 30 % in float32, where kinks make the finite difference worse."""
    record = self_test(cases.build(lambda: cubic(wrong, share=0.99, only_float32=precision == "float32")))
    assert record.precision == precision and record.level == "warning"
    assert record.method == ("double backward" if passes else "finite difference")
    if passes:
        assert max(record.errors.values()) == pytest.approx(wrong, rel=0.02)
    else:
        assert f"differs from a finite difference by {wrong:.0%}, most in b.weight" in record.reason


@pytest.mark.parametrize(("share", "passes"), [(0.02, False), (5e-5, True)])
def test_each_parameter_is_judged_by_itself_down_to_a_hundredth_of_the_product(share, passes):
    """A parameter whose part of the product is wholly wrong: hidden from a comparison of the whole vectors where
    it is 2 % of it, and not worth a failure where it is a hundredth of that."""
    record = self_test(cases.build(lambda: cubic(wrong=1.0, share=share)))
    assert record.method == ("double backward" if passes else "finite difference")
    if passes:
        part = 0.01 * max(record.errors.values())  # of the product; one direction is mostly along b
        assert share < part < 8 * share
    else:
        assert "by 100%, most in b.weight" in record.reason


class Turned(torch.autograd.Function):
    """The identity on vectors of two, whose derivative turns by `angle` as well."""

    @staticmethod
    def forward(ctx, w, angle):
        ctx.angle = angle
        return w.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.angle * torch.stack([-grad[1], grad[0]]), None


class Parabola(torch.autograd.Function):
    """|w|^2 / 2, with the gradient w, and I + angle (a quarter turn) for its second derivative."""

    @staticmethod
    def forward(ctx, w, angle):
        ctx.save_for_backward(w)
        ctx.angle = angle
        return w.square().sum() / 2

    @staticmethod
    def backward(ctx, grad):
        return grad * Turned.apply(ctx.saved_tensors[0], ctx.angle), None


@pytest.mark.parametrize(("angle", "passes"), [(0.01, True), (0.025, False)])
def test_a_product_that_is_not_symmetric_fails_though_every_difference_is_small(angle, passes):
    """Along two directions at right angles each product is off by the angle, and the asymmetry is twice that."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return Parabola.apply(self.w, angle).expand(len(x))

    model, batches = Model(), cases.ragged(torch.randn(6, 1), torch.zeros(6))
    drawn = torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # the second direction
    with torch.no_grad():
        model.w.copy_(torch.stack([-drawn[1], drawn[0]]))  # the gradient, and so the first
    record = Hessian(model, mean_output, batches).self_test
    if passes:
        assert record.method == "double backward"
        assert record.asymmetry == pytest.approx(2 * angle, rel=1e-3)
        assert max(record.errors.values()) == pytest.approx(angle, rel=1e-3)
    else:
        assert record.method == "finite difference" and record.asymmetry < 1e-6
        assert record.reason == "the double-backward product is not symmetric (5%)"


def test_the_record_repeats_and_is_reused():
    model, loss_fn, parts = cases.build(cases.conv_batchnorm)
    first, second = Hessian(model, loss_fn, parts), Hessian(model, loss_fn, parts)
    assert first.self_test == second.self_test
    reused = Hessian(model, loss_fn, parts, checked=first.self_test)
    assert reused.self_test is first.self_test
    with pytest.raises(AttributeError):
        first.self_test.method = "hope"


def test_a_minimum_passes_although_its_gradient_is_all_rounding():
    model = nn.Linear(3, 1, bias=False)
    x = torch.randn(8, 3)
    with torch.no_grad():
        targets = model(x)
    operator = Hessian(model, F.mse_loss, list(as_batches((x, targets))))
    assert operator.self_test.level == "ok"
    assert cases.relative(operator.to_dense(), 2 * x.T @ x / 8) < 2e-6


def record(**changes):
    fields = {
        "method": "double backward", "precision": "float64", "num_examples": 4, "errors": {"gradient": 1e-6},
        "gradient_error": 1e-6, "repeatability": 0.0, "asymmetry": 1e-9, "rounding_error": 1e-7,
    }  # fmt: skip
    return SelfTest(**(fields | changes))


def test_the_record_says_how_sure_it_is():
    assert record().level == "ok"
    assert record().sentence() == (
        "Products agree with finite differences to 1.0e-06, and rounding changes them by 1.0e-07 (tested in "
        "float64 on 4 examples)."
    )
    for doubtful in (
        {"errors": {"random": 0.01}},
        {"gradient_error": 0.01},
        {"asymmetry": 0.01},
        {"rounding_error": 0.05},
        {"method": "finite difference", "reason": "of x"},
    ):
        assert record(**doubtful).level == "warning"
    assert record(precision="float32", errors={"top": 0.02}).level == "ok"
    assert record(precision="float32", errors={"top": 0.04}).level == "warning"
    assert "Products are finite differences, because of x; two steps agree to" in record(
        method="finite difference", reason="of x"
    ).sentence().replace("  ", " ")
