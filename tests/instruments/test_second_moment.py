"""Adam's second moment, computed again from norms, against torch's own; stale where gradients grow and stay."""

import dataclasses

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.snapshot.history import empty_history


def history(norms, beta2=0.999, kind="Adam", tensors=4, loss=None):
    norms = numpy.asarray(norms, numpy.float32)
    table = numpy.tile(norms[:, None], (1, tensors))
    made = empty_history({f"{i}.weight": 100 for i in range(tensors)}, len(norms))
    return dataclasses.replace(
        made,
        gradient_norm=table,
        applied_gradient_norm=numpy.sqrt(numpy.nansum(table.astype(float) ** 2, 1)),
        optimizer={"kind": kind, "betas": (0.9, beta2)},
        loss=made.loss if loss is None else loss,
    )


def noisy(n, size=1.0, seed=0):
    return size * numpy.random.default_rng(seed).lognormal(0, 0.3, n)


@pytest.mark.parametrize(
    ("norms", "cause"),
    [
        (numpy.concatenate([noisy(100), noisy(50, 100.0)]), Cause.SECOND_MOMENT_STALE),
        (numpy.concatenate([noisy(100), noisy(1, 100.0), noisy(50)]), ""),  # one odd batch
        (numpy.concatenate([noisy(100), noisy(5, 100.0), noisy(50)]), ""),  # a stretch of odd ones
        (numpy.concatenate([noisy(100), noisy(200, 100.0) * numpy.geomspace(1, 0.01, 200)]), ""),  # a long spike
        (numpy.concatenate([noisy(100), noisy(50, 3.0)]), ""),
        (noisy(300), ""),
        (noisy(200) * numpy.geomspace(1, 100, 200), ""),  # grows slowly enough to be followed
        (numpy.concatenate([numpy.full(100, numpy.nan), noisy(100)]), ""),  # is trained from step 101 on
    ],
)
def test_gradients_that_grow_and_stay_large(norms, cause):
    verdict = diag.second_moment(history=history(norms)).verdict()
    assert verdict.cause == cause
    assert verdict.step == (101 if cause else None)


@pytest.mark.parametrize(("after", "cause"), [(0.5, ""), (2.0, Cause.SECOND_MOMENT_STALE)])
def test_gradients_that_grow_as_the_loss_falls_are_training_that_takes_off(after, cause):
    norms = numpy.concatenate([noisy(100), noisy(50, 100.0)])
    course = history(norms, loss=numpy.repeat([1.0, after], [100, 50]))
    assert diag.second_moment(history=course).verdict().cause == cause


def test_the_ratio_is_that_of_torchs_own_second_moment():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.Adam([p], betas=(0.9, 0.98))
    sizes, ratios = [], []
    for step in range(1, 41):
        p.grad = torch.full((100,), float(0.5 + step % 7 + 20 * (step > 30)))  # alike, so that entries are norms
        optimizer.step()
        second = optimizer.state[p]["exp_avg_sq"] / (1 - 0.98**step)
        sizes.append(float(p.grad.norm()))
        ratios.append(float(p.grad.norm() / second.sum().sqrt()))
    found = diag.second_moment(history=history(sizes, beta2=0.98, tensors=1))
    assert found.ratios == pytest.approx(ratios, rel=1e-5)  # torch's are float32


def test_clipped_gradients_count_as_clipped():
    norms = numpy.concatenate([noisy(100), noisy(50, 100.0)])
    clipped = dataclasses.replace(history(norms), applied_gradient_norm=numpy.full(150, 0.5))
    assert diag.second_moment(history=clipped).verdict().level == "ok"


@pytest.mark.parametrize("given", [history(noisy(100), kind="SGD"), history(noisy(10))])
def test_other_optimizers_and_short_records_are_not_judged(given):
    assert diag.second_moment(history=given).verdict().level == "not_applicable"
