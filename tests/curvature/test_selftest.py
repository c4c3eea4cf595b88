"""The self-test itself: what it says, where it runs in float32, and that it sees what is small or hidden."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diag.curvature.operators import GaussNewton, Hessian
from diag.curvature.record import SelfTest
from diag.errors import Unsupported
from diag.snapshot.batch import as_batches

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


def test_a_finite_difference_that_is_not_good_enough_is_refused():
    """float32 alone, a wrong double backward and a fast oscillation: no step is both small and large enough."""
    model = cases.build(lambda: wide_relu(lambda h: StoredDerivative.apply(Float32Only.apply((1000 * h).sin()))))
    with pytest.raises(
        Unsupported,
        match=r"No right curvature product can be had: double backward differs .* no better than .* replace that",
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
