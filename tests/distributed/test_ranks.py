"""Several ranks watch one training: what they record together, what they compare, and how they part.

All trainings of two ranks run in one start of two processes (see `trainings`). The reference for norms and losses
is one process that trains on all the rows: with equal batches the mean of the ranks' gradients is its gradient.
"""

import importlib.util
import json
import math

import numpy
import pytest
import torch
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput
from diag.linalg.deadline import Deadline
from tests.distributed.starting import SCRIPT, start

SPEC = importlib.util.spec_from_file_location("trainings", SCRIPT)
trainings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trainings)

WAYS = ("as_ddp", "as_fsdp", "as_tensor_parallel")
FAULTS = {
    "start_apart": "replicas_differ",
    "drift": "replicas_differ",
    "past_the_wrapper": "gradients_not_reduced",
    "not_averaged": "gradients_not_reduced",
    "same_rows": "ranks_see_same_data",
    "uneven": "ranks_uneven",
    "other_rate": "rank_settings_differ",
    "other_buffer": "replicas_differ",
    "columns_apart": "ranks_read_apart",
    "copies_apart": "gradients_not_reduced",
}
PARTINGS = ("watched_alone", "closes_early", "breaks_inside", "raises")
MEASURED = ("measured_ddp", "measured_fsdp", "measured_columns")
NAMES = (
    *WAYS,
    *MEASURED,
    "as_sequence_parallel",
    "rows_spread",
    "rows_spread_watched_alone",
    "measured_norm",
    "measured_again",
    "out_of_memory",
    "as_fsdp1",
    "accumulated",
    "not_finite_ddp",
    "not_finite_shard",
    *FAULTS,
    *PARTINGS,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    return start(2, folder, [*NAMES, "curvature"])


@pytest.fixture(scope="module")
def alone(folder):
    """The history of one process that trains on all rows."""
    with trainings.reading_every_step():
        trainings.train(trainings.mlp(), trainings.rows(), watch=folder / "alone")
    return diag.load(folder / "alone").history


def findings(folder, name):
    run = diag.load(folder / name)
    return {f.verdict.cause: f.verdict for f in run.findings() if f.verdict.level.is_finding}


def notes(folder, name):
    return [e.text for e in diag.load(folder / name).events if e.kind == "note"]


@pytest.mark.parametrize("name", NAMES)
def test_training_is_bit_identical_on_every_rank_and_nothing_of_ours_breaks(ranks, folder, name):
    for found in ranks:
        unwatched, watched = found[name]
        assert unwatched == watched
    broken = [e.text for e in diag.load(folder / name).events if e.kind == "internal error"]
    assert not broken


@pytest.mark.parametrize("way", WAYS)
def test_the_ranks_record_what_one_process_would(ranks, alone, folder, way):
    """float32 gradients that are summed in another order differ by some 1e-7; the steps add these up."""
    check_history(diag.load(folder / way).history, alone)
    assert "the loss is the mean over ranks" in " ".join(e.text for e in diag.load(folder / way).events)


def check_history(history, alone):
    assert len(history) == len(alone) == trainings.STEPS
    numpy.testing.assert_allclose(history.loss, alone.loss, rtol=1e-6)
    # On a machine that has little time the norms of some steps are left out, and the record says so.
    left_out = any("recorded at some of the steps only" in note for note in history.notes)
    for name in ("gradient_norm", "parameter_norm", "update_norm", "distance", "applied_gradient_norm"):
        ours, theirs = getattr(history, name), getattr(alone, name)
        seen = numpy.isfinite(ours)
        assert seen[:3].all() and (seen.all() or left_out or name not in ("gradient_norm", "applied_gradient_norm"))
        seen &= numpy.isfinite(theirs)  # parameters are looked at as time allows
        numpy.testing.assert_allclose(ours[seen], theirs[seen], rtol=3e-6, err_msg=name)
    applied = history.applied_gradient_norm
    assert (applied[numpy.isfinite(applied)] < trainings.LIMIT * 1.001).all()
    assert history.gradient_finite.all() and history.loss_finite.all()


def test_flat_parameters_are_not_recorded_as_norms(ranks, folder):
    history = diag.load(folder / "as_fsdp1").history
    assert len(history) == trainings.STEPS and numpy.isfinite(history.loss).all()
    for name in ("gradient_norm", "parameter_norm", "applied_gradient_norm"):
        assert numpy.isnan(getattr(history, name)).all()
    assert any("FSDP1" in text for text in notes(folder, "as_fsdp1"))


@pytest.mark.parametrize("name", ["not_finite_ddp", "not_finite_shard"])
def test_what_is_not_finite_on_another_rank_is_seen_at_its_step(ranks, folder, name):
    history = diag.load(folder / name).history
    finite = history.gradient_finite.all(1)
    assert finite[:4].all() and not finite[4]
    if name == "not_finite_ddp":
        assert history.loss_finite[:4].all() and not history.loss_finite[4]


@pytest.mark.parametrize("name", FAULTS)
def test_what_only_several_ranks_get_wrong_is_named(ranks, folder, name):
    """What follows from it is told with it, and nothing else is said."""
    assert {story.finding.verdict.cause for story in diag.load(folder / name).stories()} == {FAULTS[name]}


def test_sentences_say_which_rank_since_when_and_where(ranks, folder):
    assert findings(folder, "start_apart")["replicas_differ"].sentence == (
        "Rank 1 has other parameters than rank 0 since step 1 at the latest, first in 0.weight (4 tensors now)."
    )
    drift = findings(folder, "drift")["replicas_differ"]
    assert "since step 10 at the latest" in drift.sentence and "first in 2.bias (1 tensor now)" in drift.sentence
    assert (
        "Each rank steps on its own gradient" in findings(folder, "not_averaged")["gradients_not_reduced"].sentence
    )
    assert "parts of one network (tensor parallelism) and are given different batches" in (
        findings(folder, "columns_apart")["ranks_read_apart"].sentence
    )
    assert "Rank 1 steps with lr 0.2 in parameter group 0, rank 0 with 0.1" in (
        findings(folder, "other_rate")["rank_settings_differ"].sentence
    )
    assert "Rank 1 has another constant buffer than rank 0: mix" in (
        findings(folder, "other_buffer")["replicas_differ"].sentence
    )


@pytest.mark.parametrize("name", [*WAYS, "as_sequence_parallel", "rows_spread", "as_fsdp1", "accumulated"])
def test_nothing_is_said_of_a_healthy_training(ranks, folder, name):
    """Batch normalisation's running means differ between ranks, under tensor parallelism all read one batch, and
    the step sums what sequence parallelism leaves in parts."""
    assert not findings(folder, name)


def test_tensor_parallel_ranks_are_not_asked_for_rows_of_their_own(ranks, folder):
    run = diag.load(folder / "as_tensor_parallel")
    (verdict,) = [f.verdict for f in run.findings() if f.instrument == "ranks_data"]
    assert str(verdict.level) == "not_applicable" and "tensor parallelism" in verdict.sentence


def test_rank_0_watched_alone_says_so_and_waits_for_nobody(ranks, folder):
    assert len(diag.load(folder / "watched_alone").history) == trainings.STEPS
    assert any(
        "only rank 0 is watched (rank 1 does not watch it)" in text for text in notes(folder, "watched_alone")
    )


@pytest.mark.parametrize(
    ("name", "reason", "from_step"),
    [("closes_early", "its watch was closed", 6), ("breaks_inside", "no room for the step", 4),
     ("raises", "its training ended by ZeroDivisionError at step 4", 5)],
)  # fmt: skip
def test_a_rank_that_leaves_is_told_and_nothing_else_stops(ranks, folder, name, reason, from_step):
    """Rank 0 keeps all steps; what it cannot know alone is left out from there on."""
    history = diag.load(folder / name).history
    assert len(history) == trainings.STEPS
    assert numpy.isfinite(history.loss[: from_step - 1]).all() and numpy.isnan(history.loss[from_step - 1 :]).all()
    assert numpy.isfinite(history.gradient_norm).all()
    (note,) = [text for text in notes(folder, name) if "not put together any more" in text]
    assert (f"From step {from_step} on" in note and f"rank 1: {reason}" in note) or reason in note


@pytest.fixture(scope="module")
def measured_alone(folder):
    """The spectra of one process that trains on all rows, by step."""
    torch.manual_seed(0)
    trainings.measured(trainings.mlp(), trainings.rows(), folder / "measured alone")
    return dict(diag.load(folder / "measured alone").series("hessian_spectrum"))


@pytest.mark.parametrize("name", MEASURED)
def test_a_watched_training_measures_all_the_ranks_data(ranks, folder, measured_alone, name):
    """The Hessian is float32, and the sums of the ranks' shares round in another order."""
    run = diag.load(folder / name)
    series = run.series("hessian_spectrum")
    assert series[-1][0] == trainings.MEASURED_STEPS and len(series) >= 4
    compared = [(found, measured_alone[step]) for step, found in series if step in measured_alone]
    assert len(compared) >= 3
    for found, alone in compared:
        assert found.provenance.num_examples == trainings.ROWS
        numpy.testing.assert_allclose(found.eigenvalues, alone.eigenvalues, rtol=1e-4)
        assert found.trace == pytest.approx(alone.trace, rel=1e-4)
    assert run.series("softmax_collapse") and run.series("neural_collapse")


def test_a_run_that_goes_on_is_measured_together_again(ranks, folder):
    run = diag.load(folder / "measured_again")
    assert len(run.history) == 2 * trainings.MEASURED_STEPS and not notes(folder, "measured_again")
    steps = [step for step, _ in run.series("hessian_spectrum")]
    assert steps[0] <= 3 and steps[-1] == 2 * trainings.MEASURED_STEPS


def test_running_means_are_those_of_rank_0(ranks, folder):
    run = diag.load(folder / "measured_norm")
    series = run.series("hessian_spectrum")
    assert len(series) >= 4 and not run.outcomes
    assert all(found.provenance.num_examples == trainings.ROWS for _, found in series)


def test_a_rank_without_memory_stops_one_measurement_and_says_why(ranks, folder):
    run = diag.load(folder / "out_of_memory")
    (reason,) = {outcome.reason for _, outcome in run.outcomes}
    assert "Rank 1 could not compute its share (MemoryError: no room)" in reason
    assert run.series("hessian_spectrum")


def check_curvature(found, name, loss_fn):
    """float64 sums over shares differ from those over all rows by their rounding."""
    kind = "mlp" if name == "weighted" else name.split()[0]
    model, data = trainings.networks()[kind], trainings.texts() if kind == "gpt" else trainings.rows()
    data = data if kind == "gpt" else (data[0].double(), data[1])
    alone = trainings.curvature_of(model, loss_fn, data)
    assert found["examples"] == len(data[0])
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert found["gradient"] == pytest.approx(alone["gradient"], rel=1e-10)
    assert found["eigenvalues"] == pytest.approx(alone["eigenvalues"], rel=1e-8)
    assert max(found["residuals"]) < 1e-3 * found["eigenvalues"][0]
    assert found["trace"] == pytest.approx(alone["trace"], rel=1e-8)
    assert len(found["half"]) == len(alone["half"])


CURVATURES = [("mlp", F.cross_entropy), ("conv", F.cross_entropy), ("weighted", trainings.weighted_loss)]
SHARDED = [(name, trainings.token_loss if "gpt" in name else F.cross_entropy) for name in trainings.SHARDED]


@pytest.mark.parametrize(("name", "loss_fn"), CURVATURES + SHARDED)
def test_curvature_over_ranks_is_that_of_all_the_data(ranks, name, loss_fn):
    """Shares of 40 and 24 rows; with class weights, what they count differs again. Under tensor parallelism all
    ranks read the same rows, which they share out."""
    assert ranks[0]["curvature"][name] == ranks[1]["curvature"][name]
    check_curvature(ranks[0]["curvature"][name], name, loss_fn)
    assert all(rank["curvature"][name].get("untouched", True) for rank in ranks)


def check_examples(found, name):
    """Sums over shares differ from those over all rows by float64 rounding, which ratios of small numbers raise."""
    x, y = trainings.rows()
    alone = trainings.examples_of(name, (x.double(), y))
    assert found.keys() == alone.keys() and len(found["mode_connectivity"]) > 10
    for instrument, numbers in alone.items():
        if instrument == "projected":
            numpy.testing.assert_allclose(found[instrument], numbers, rtol=1e-9, atol=1e-12)
            continue
        assert found[instrument].keys() == numbers.keys()
        for field, value in numbers.items():
            there, same = found[instrument][field], f"{instrument}.{field}"
            numpy.testing.assert_allclose(there, value, rtol=1e-7, atol=1e-10, err_msg=same)


@pytest.mark.parametrize("name", trainings.EXAMPLES)
def test_what_asks_for_examples_gets_those_of_all_ranks(ranks, name):
    """Shares of 40 and 24 rows; with class weights the examples of the two shares count differently."""
    first, last = (rank["curvature"]["examples"][name] for rank in ranks)
    assert json.dumps(first) == json.dumps(last)
    check_examples(first, name)


def test_each_rank_holds_its_part_of_the_basis(ranks):
    """Four vectors of work are whole on every rank, beside them each holds half of all others."""
    for found in ranks:
        held, alone = found["curvature"]["held"]
        assert held <= 1.1 * alone / 2


def test_what_has_no_right_number_over_ranks_is_refused_on_all_of_them(ranks):
    first, last = (rank["curvature"]["refused"] for rank in ranks)
    assert (
        "is not put together over ranks, of which each has a share" in first["activations"] == last["activations"]
    )
    assert "Targets are not permuted over ranks" in first["contrast"] == last["contrast"]
    assert first["repair"].startswith("REPAIR reads the data of one process") and first["repair"] == last["repair"]
    assert (
        first["align"].startswith("symmetries is not put together over ranks") and first["align"] == last["align"]
    )
    assert "without ranks=" in first["opposing"] == last["opposing"]
    assert "stay on the rank that has them" in first["single"] == last["single"]
    assert first["unlike"].startswith("The ranks' outputs are not of one kind")
    assert "give every rank examples of one shape" in first["unlike"] == last["unlike"]
    assert first["rows"].startswith("The outputs of all ranks are") and first["rows"] == last["rows"]
    assert "give fewer examples (max_examples=)" in first["rows"]
    assert first["no rows"].startswith("The outputs of all ranks are") and first["no rows"] == last["no rows"]
    assert first["sums"].startswith("The summed gradients of 2 groups of examples take")
    assert "measure a model of fewer parameters, or free memory" in first["sums"] == last["sums"]
    assert "0.weight has placement (Shard(dim=0),)" in first["alone"] == last["alone"]
    assert first["labels of one rank"].startswith("Rank 1 could not compute its share")
    assert "The ranks hold other values of 2.bias" in first["apart"] == last["apart"]
    assert (
        first["one rank"].startswith("Rank 1 could not compute its share")
        and "loss_fn cannot be called" in last["one rank"]
    )
    assert "FullyShardedDataParallel (FSDP1)" in first["flat"] == last["flat"]
    for name in ("coupled", "coupled and cut"):
        assert "compares the examples of a batch" in first[name] == last[name]
    assert "give different outputs" in first["heads"] and "give different outputs" in last["heads"]
    assert "fewer than" not in first["heads"]
    assert first["shares"][0].startswith("Each rank was given different data") and last["shares"] == ["", 0]
    assert first["shares"][1] == trainings.ROWS  # what asks for rows is measured on those of all ranks


def test_one_process_has_no_ranks_to_share_the_data_with():
    with pytest.raises(InvalidInput, match="There is one process"):
        diag.Snapshot(trainings.mlp(), F.cross_entropy, trainings.rows(), ranks=True)
    with pytest.raises(InvalidInput, match="takes no deadline="):
        diag.Snapshot(trainings.mlp(), ranks=True, deadline=Deadline())


@pytest.mark.slow
def test_four_ranks(tmp_path, alone):
    faults = ("start_apart", "past_the_wrapper", "same_rows")
    found = start(4, tmp_path, [*WAYS, "accumulated", *faults, *PARTINGS, "curvature"])
    curvature = [rank.pop("curvature") for rank in found]
    assert all(unwatched == watched for rank in found for unwatched, watched in rank.values())
    assert all(c["mlp"] == curvature[0]["mlp"] for c in curvature)
    for name, loss_fn in CURVATURES + SHARDED:
        check_curvature(curvature[0][name], name, loss_fn)
    for name in trainings.EXAMPLES:
        check_examples(curvature[0]["examples"][name], name)
    for way in WAYS:
        check_history(diag.load(tmp_path / way).history, alone)
        assert not findings(tmp_path, way)
    for name in faults:
        assert {story.finding.verdict.cause for story in diag.load(tmp_path / name).stories()} == {FAULTS[name]}
    assert math.isnan(diag.load(tmp_path / "raises").history.loss[-1])
