"""What follows from a cause is told by it, and losses that measure no gain are not judged as if they did."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.network.ignored_inputs import IgnoredInputs
from diag.instruments.network.output_constant import OutputConstant
from diag.snapshot.history import empty_history
from diag.snapshot.inside.ignored import InputsTried, inputs_tried
from diag.snapshot.loop.arithmetic import PolicyFacts, PolicyLook
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.data import BatchFacts, RootFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.places import MaskFacts
from diag.snapshot.loop.steps import OptimizerFacts, OriginFacts, ParameterFacts, Pattern, ScalingFacts, Tally
from diag.watching.observe.loop.data.stream import Stream, out_of_order
from diag.watching.observe.loop.moment import Moment

_path = Path(__file__).with_name("optimization_histories.py")
_spec = importlib.util.spec_from_file_location("optimization_histories", _path)
histories = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(histories)
record, falling = histories.record, histories.falling


@pytest.mark.parametrize(("ratio", "level"), [(0.5, "alarm"), (0.02, "ok")])
def test_two_steps_are_enough_where_the_loss_is_lost_by_then(ratio, level):
    history = record(
        numpy.array([1.0, 1e6, numpy.nan, numpy.nan]), numpy.array([ratio, ratio, numpy.nan, numpy.nan])
    )
    history = dataclasses.replace(history, loss_finite=numpy.array([True, True, False, False]))
    verdict = diag.step_size(history=history).verdict()
    assert verdict.level == level and verdict.cause == (Cause.LEARNING_RATE_TOO_HIGH if level == "alarm" else "")
    if level == "alarm":
        assert verdict.step == 1 and "is no number now" in verdict.sentence
        lost = diag.finite_steps(history=history).verdict()
        assert verdict.cause in lost.explained_by and lost.step == 3
    # two steps of a training that goes on say nothing yet
    early = dataclasses.replace(record(numpy.array([1.0, 0.9]), ratio))
    assert diag.step_size(history=early).verdict().cause == ""


@pytest.mark.parametrize(
    ("kind", "rate", "may"), [("Adam", 1e-3, True), ("Adam", 0.1, False), ("Muon", 1e-3, False)]
)
def test_large_steps_at_a_usual_rate_may_follow_from_axes_taken_for_one_another(kind, rate, may):
    history = record(numpy.concatenate([numpy.ones(50), numpy.full(50, 20.0)]), 0.5)
    rates = numpy.full_like(history.learning_rate, rate)
    history = dataclasses.replace(history, optimizer=dict(history.optimizer) | {"kind": kind}, learning_rate=rates)
    verdict = diag.step_size(history=history).verdict()
    assert verdict.cause == Cause.LEARNING_RATE_TOO_HIGH
    assert (Cause.EXAMPLES_MIXED in verdict.explained_by) == may


@pytest.mark.parametrize(
    ("kind", "rate", "outputs_finite", "operation", "told"),
    [
        ("SGD", 0.1, True, "the logarithm of zero", False),
        ("SGD", 0.1, True, "", True),  # not known to have been lost in the loss's own computation
        ("SGD", 0.1, False, "", True),
        ("SGD", 0.8, True, "the logarithm of zero", True),  # a step of 0.7 of the weights: a shorter gradient
        ("SGD", 100.0, True, "the logarithm of zero", True),
        ("Adam", 1.0, True, "the logarithm of zero", True),  # a step of Adam has no size from its gradient
    ],
)
def test_a_loss_lost_to_a_logarithm_of_zero_is_not_put_down_to_the_rate(
    kind, rate, outputs_finite, operation, told
):
    nothing = numpy.full(39, numpy.nan)
    made = record(numpy.append(20.0, nothing), numpy.append(0.7, nothing), rates=rate, kind=kind)
    loop = Loop(step=40, origin=OriginFacts(2, True, outputs_finite, operation))
    steps = diag.step_size(history=made, loop=loop).verdict()
    assert (steps.cause == Cause.LEARNING_RATE_TOO_HIGH) == told
    lost = diag.finite_steps(history=made, loop=loop).verdict()
    assert lost.cause == Cause.NOT_FINITE and operation in lost.sentence


def test_a_loss_that_left_before_its_exponential_overflowed_is_put_down_to_the_rate():
    losses = numpy.append([7.0, 1e4, 4e4], numpy.full(37, numpy.nan))
    made = record(losses, numpy.append([0.7, 0.7, 0.7], numpy.full(37, numpy.nan)))
    loop = Loop(step=40, origin=OriginFacts(4, True, True, "an exponential that is too large"))
    assert diag.step_size(history=made, loop=loop).verdict().cause == Cause.LEARNING_RATE_TOO_HIGH


def logarithm_of_softmax(outputs, labels):
    return -(100 * outputs).softmax(1).gather(1, labels[:, None]).log().mean()


@pytest.mark.parametrize(
    ("loss", "rate", "first"),
    [(logarithm_of_softmax, 0.1, "finite_steps"), (nn.functional.cross_entropy, 100.0, "step_size")],
)
def test_what_takes_the_loss_is_told_first(tmp_path, loss, rate, first):
    """A gradient a hundred times too large, after whose first step a probability rounds to zero; and a rate a
    thousand times too high."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    labels = (x @ torch.randn(20, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with diag.watch(model, run=tmp_path / "run"):
        for _ in range(40):
            rows = torch.randint(512, (32,))
            optimizer.zero_grad()
            loss(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    stories = diag.load(tmp_path / "run").stories()
    assert [story.finding.instrument for story in stories] == [first]


def test_steps_of_what_began_at_zero_are_not_too_large_by_chance():
    """Of a factorisation whose factors stand still, the biases alone move: their steps are their size at first, and
    single batches of a noisy loss lie above the first."""
    losses = 1.5 + 0.4 * numpy.sin(numpy.arange(100))
    made = record(losses, 0.35)
    still = dataclasses.replace(made, distance=0.5 * made.parameter_norm)
    assert diag.step_size(history=still).verdict().cause == Cause.LEARNING_RATE_TOO_HIGH
    grown = dataclasses.replace(made, distance=made.parameter_norm)
    assert diag.step_size(history=grown).verdict().cause == ""
    lost = dataclasses.replace(grown, loss=numpy.concatenate([[1.0], numpy.full(99, 1e3)]))
    assert diag.step_size(history=lost).verdict().cause == Cause.LEARNING_RATE_TOO_HIGH


def test_ratios_far_above_the_usual_are_not_called_usual():
    found = diag.step_size(history=record(falling(), 0.18)).verdict()
    assert found.level != "ok" or "as in most trainings" not in found.sentence


def test_a_clip_below_the_epsilon_of_adam_is_named():
    made = record(numpy.full(100, 2.0), 2e-4)
    about = {"kind": "AdamW", "lr": 1e-3, "eps": 1e-4, "groups": ({"lr": 1e-3},)}
    size = numpy.sqrt(numpy.asarray(made.sizes, float))
    rate = numpy.full(100, 1e-3)
    history = dataclasses.replace(
        made,
        optimizer=about,
        learning_rate=rate,
        gradient_norm=numpy.tile(1e-2 * size, (100, 1)).astype(numpy.float32),
        update_norm=numpy.tile(1e-3 * 1e-3 * size, (100, 1)).astype(numpy.float32),
        applied_gradient_norm=numpy.full(100, 1e-6),
    )
    verdict = diag.step_size(history=history).verdict()
    assert verdict.cause == Cause.CLIPPING_TOO_TIGHT and "far below Adam's epsilon (0.0001)" in verdict.sentence
    unclipped = dataclasses.replace(
        history, applied_gradient_norm=numpy.full(100, 1e-2 * float(numpy.linalg.norm(size)))
    )
    assert diag.step_size(history=unclipped).verdict().cause != Cause.CLIPPING_TOO_TIGHT


def test_a_clip_of_a_loss_below_zero_has_not_fallen_by_undefined():
    made = record(-numpy.linspace(1, 2, 100), 1e-5)
    history = dataclasses.replace(
        made,
        gradient_norm=numpy.ones_like(made.gradient_norm),
        applied_gradient_norm=numpy.full(100, 1e-4),
        optimizer={"kind": "SGD", "lr": 0.1},
    )
    sentence = diag.step_size(history=history).verdict().sentence
    assert "Clipping" in sentence and "the loss has fallen in 100 steps" in sentence and "undefined" not in sentence


def test_a_loss_that_grows_with_the_values_it_is_asked_for_did_not_diverge():
    history = record(numpy.concatenate([numpy.full(10, 2e-4), numpy.full(90, 3e-3)]), 0.01)
    asked = AskedFacts("smooth_l1_loss", looked=9, spread_first=0.02, spread_last=0.25)
    moving = Loop(step=100, asked=(asked,))
    still = Loop(step=100, asked=(dataclasses.replace(asked, spread_last=0.021),))
    assert diag.divergence(history=history, loop=still).verdict().cause == Cause.TRAINING_DIVERGED
    verdict = diag.divergence(history=history, loop=moving).verdict()
    assert verdict.level == "unknown" and "a standard deviation of 0.25" in verdict.sentence
    # values that run away take the loss with them, to the size of their variance
    far = record(numpy.concatenate([numpy.full(10, 2e-4), numpy.full(90, 3e2)]), 0.01)
    away = Loop(step=100, asked=(dataclasses.replace(asked, spread_last=20.0),))
    assert diag.divergence(history=far, loop=away).verdict().cause == Cause.TRAINING_DIVERGED


def test_a_spike_of_a_loss_that_measures_no_gain_undoes_none():
    losses = 1.0 + numpy.geomspace(1, 0.01, 300)
    losses[200:206] = 2.0
    history = record(losses, 0.01)
    assert diag.loss_spikes(history=history, loop=Loop(step=300)).verdict().cause == Cause.LOSS_SPIKE
    look = PolicyLook(1, 1.0, 0.9, 0.01, True, True, 0.5, False)
    policy = Loop(step=300, policy=PolicyFacts((look,)))
    asked = AskedFacts("mse_loss", looked=9, spread_first=0.1, spread_last=1.0)
    for loop in (policy, Loop(step=300, asked=(asked,))):
        verdict = diag.loss_spikes(history=history, loop=loop).verdict()
        assert verdict.level == "not_applicable" and "policy" in verdict.sentence


class Hazard(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        nn.init.constant_(self.body[2].bias, bias)

    def forward(self, x):
        return torch.relu(self.body(x).squeeze(-1))


@pytest.mark.parametrize(("bias", "level"), [(-9.0, "alarm"), (3.0, "ok")])
def test_a_network_that_ends_in_a_dead_rectifier_is_told_so(bias, level):
    torch.manual_seed(0)
    data = [(torch.randn(32, 5), torch.randn(32))]
    snapshot = diag.Snapshot(Hazard(bias), nn.functional.mse_loss, data)
    result = diag.output_constant(snapshot)
    verdict = OutputConstant.trend([(12, result)])
    assert verdict.level == level
    assert ("it ends in a ReLU" in verdict.sentence) == (level == "alarm")


def test_an_input_is_not_said_to_be_ignored_where_no_output_moves_at_all():
    history = empty_history({"0.weight": 64}, 40)
    look = lambda names, ignored: diag.ignored_inputs(InputsTried(names, ignored, 16), history)  # noqa: E731
    assert look(("x",), ("x",)).verdict().level == "not_applicable"
    one = look(("x", "y"), ("y",))
    assert one.verdict().level == "warning" and one.verdict().step == 1
    used = look(("x", "y"), ())
    assert IgnoredInputs.trend([(10, used), (30, one)]).step == 11  # it was used at first
    assert IgnoredInputs.trend([(10, one), (30, one)]).step == 1


def test_a_network_of_nothing_but_nan_has_no_input_to_judge():
    model = nn.Bilinear(3, 4, 2)
    nn.init.constant_(model.weight, torch.nan)
    data = [((torch.randn(8, 3), torch.randn(8, 4)), torch.randn(8, 2))]
    snapshot = diag.Snapshot(model, nn.functional.mse_loss, data)
    with pytest.raises(diag.errors.MissingQuantity, match="finite number"):
        inputs_tried(snapshot)


def test_an_epsilon_that_float16_does_not_hold_is_named():
    history = record(numpy.array([1.0, numpy.nan, numpy.nan]), 0.01)
    history = dataclasses.replace(
        history,
        loss_finite=numpy.array([True, False, False]),
        optimizer={"kind": "AdamW", "eps": 1e-8, "lr": 1e-3},
    )
    weight = ParameterFacts("0.weight", (4, 4), "float16", True, optimizers=1)
    half = Loop(step=3, parameters=(weight,))
    verdict = diag.finite_steps(history=history, loop=half).verdict()
    assert verdict.cause == Cause.GRADIENT_UNDERFLOW and "its epsilon (1e-08) is zero" in verdict.sentence
    wide = Loop(step=3, parameters=(dataclasses.replace(weight, dtype="float32"),))
    assert diag.finite_steps(history=history, loop=wide).verdict().cause == Cause.NOT_FINITE
    large = dataclasses.replace(history, optimizer={"kind": "AdamW", "eps": 1e-4, "lr": 1e-3})
    assert diag.finite_steps(history=large, loop=half).verdict().cause == Cause.NOT_FINITE


def test_the_first_step_has_none_before_it():
    history = record(numpy.array([numpy.nan]), 0.01)
    first = dataclasses.replace(history, loss_finite=numpy.array([False]))
    assert "steps before" not in diag.finite_steps(history=first).verdict().sentence


def test_a_scale_that_is_still_huge_is_the_reason_for_steps_left_out():
    skipped = Tally(times=20, first=1, last=20, running=20, longest=20, since=1)
    scaling = ScalingFacts(scaled_losses=20, looked=3, autocast=3, scale=2.0**39, backoff=0.99, skipped=skipped)
    said = diag.mixed_precision(loop=Loop(step=20, scaling=scaling)).verdict().sentence
    assert "its scale is still 5.5e+11" in said and "0.99 of itself" in said
    usual = dataclasses.replace(scaling, scale=0.5, backoff=0.5)
    assert "not finite each time" in diag.mixed_precision(loop=Loop(step=20, scaling=usual)).verdict().sentence


@pytest.mark.parametrize("closure", [True, False])
def test_calls_of_a_closure_are_no_batches(closure):
    optimizer = OptimizerFacts("LBFGS", held=("w",), steps=9, looked=9, by_closure=closure, passes=13)
    order = (Pattern("(FB)13S", 1, 9, 9),)
    loop = Loop(step=9, optimizers=(optimizer,), order=order, roots=RootFacts(9, 9), backwards=117)
    assert (diag.gradient_accumulation(loop=loop).verdict().level == "ok") == closure


def test_few_different_batches_come_again_by_chance_and_in_no_order():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 6, generator=generator) for _ in range(20)]

    def share(order):
        stream, moment = Stream(Moment()), Moment()
        for step, number in enumerate(order, 1):
            stream.add(step, stream.key(step, batches[number]), fetched=False, step=step)
            moment.ended(step)
        return out_of_order(stream)

    assert share([*range(20)] * 4) == 0.0
    assert share(torch.randint(20, (200,), generator=generator).tolist()) > 0.5
    facts = BatchFacts(calls=90, lag=30, steps_apart=30, repeats=30, out_of_order=0.9)
    assert diag.batches_repeated(loop=Loop(step=90, batches=facts)).verdict().level == "ok"


def test_masks_that_are_all_turned_are_not_turned_in_a_part():
    masks = MaskFacts(calls=12, rows=108, as_given=3, turned={"rows for columns": 33, "upside down": 2}, images=3,
                      related=0.19, unrelated=0.21)  # fmt: skip
    verdict = diag.places_match(loop=Loop(step=300, masks=masks)).verdict()
    assert verdict.cause == Cause.TARGETS_MISPLACED and "in a part" not in verdict.sentence
    nothing = dataclasses.replace(masks, turned={"rows for columns": 3})
    assert diag.places_match(loop=Loop(step=300, masks=nothing)).verdict().cause == Cause.LABELS_SHUFFLED


def test_a_gradient_of_zero_at_all_steps_at_which_it_was_read_is_told_with_their_number():
    norms = numpy.ones((60, 3), numpy.float32)
    norms[:, 1] = 0
    norms[1::2] = numpy.nan  # read at every other step
    made = empty_history({f"{i}.weight": 256 for i in range(3)}, 60)
    history = dataclasses.replace(made, gradient_norm=norms, loss=numpy.ones(60))
    said = diag.gradient_flow(history=history).verdict().sentence
    assert "1 of 3 parameter tensors was exactly zero at all 30 steps that were looked at: 1.weight" in said
    norms[:, 1] = numpy.nan  # never read, so that nothing is known
    unread = dataclasses.replace(history, gradient_norm=norms)
    assert "exactly zero" not in diag.gradient_flow(history=unread).verdict().sentence


@pytest.mark.parametrize(("filled", "rate", "first"), [
    (True, 0.02, Cause.MISSING_VALUES_FILLED), (False, 20.0, Cause.LEARNING_RATE_TOO_HIGH), (True, 1e-14, "")
])  # fmt: skip
def test_steps_that_a_code_for_missing_values_makes_large_follow_from_it(filled, rate, first):
    torch.manual_seed(0)
    rows = torch.randn(300, 6)
    targets = rows[:, :1].clone()
    if filled:
        for feature in (2, 5):
            rows[torch.rand(300) < 0.4, feature] = -9999.0
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with diag.watch(model, instruments=["input_scale", "step_size"]) as watcher:
        for _ in range(40):
            batch = torch.randint(0, 300, (32,))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(rows[batch]), targets[batch]).backward()
            optimizer.step()
    told = watcher.run.stories()
    assert told[0].finding.verdict.cause == (first or Cause.MISSING_VALUES_FILLED)
    too_high = [c.verdict.cause for c in told[0].consequences]
    assert too_high == ([Cause.LEARNING_RATE_TOO_HIGH] if filled and first else [])
