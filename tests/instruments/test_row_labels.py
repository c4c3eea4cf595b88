"""Labels of training's own rows: precision on three data sets with a tenth of the labels moved, against ranking by
the last loss; right labels that are hard; what is refused; the same words whatever the time."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.rows import Moved, RowFacts
from diag.watching.observe.loop.moment import Moment
from diag.watching.observe.loop.rows.rows import RowObserver

DATA = {"digits": datasets.load_digits, "wine": datasets.load_wine, "breast cancer": datasets.load_breast_cancer}


def table(name):
    data = DATA[name]()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-3), torch.tensor(data.target)


def moved(y, share):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(y), generator=generator)[: int(share * len(y))]
    classes = int(y.max()) + 1
    new = y.clone()
    new[rows] = (y[rows] + torch.randint(1, classes, (len(rows),), generator=generator)) % classes
    return new, torch.zeros(len(y), dtype=torch.bool).index_fill(0, rows, True)


def train(
    x, y, epochs=20, lr=0.05, loader=True, width=64, loss=F.cross_entropy, change=lambda x, y: (x, y), **watch
):
    """(watch, losses at the end)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, int(y.max()) + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    batches = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=order)
    with diag.watch(model, instruments=["row_labels"], **watch) as watcher:
        for _ in range(epochs):
            own = ((x[r], y[r]) for r in torch.randperm(len(x), generator=order).split(32))
            for inputs, labels in batches if loader else own:
                optimizer.zero_grad()
                inputs, labels = change(inputs, labels)
                loss(model(inputs), labels).backward()
                optimizer.step()
    with torch.no_grad():
        return watcher, F.cross_entropy(model(x), y, reduction="none")


def last(watcher):
    return watcher.run.series("row_labels")[-1][1]


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "own batches"])
def test_a_tenth_of_wrong_labels_is_named_by_row(loader):
    x, y = table("digits")
    y, wrong = moved(y, 0.1)
    watcher, losses = train(x, y, loader=loader, probe=None if loader else (x, y))
    (finding,) = watcher.findings
    result, verdict = last(watcher), last(watcher).verdict()
    assert finding.verdict.cause == verdict.cause == Cause.LABELS_WRONG
    assert result.counted_in == ("data set" if loader else "probe set")
    named = torch.tensor(result.named.tolist())
    precision = float(wrong[named].float().mean())
    by_loss = float(wrong[losses.argsort(descending=True)[: len(named)]].float().mean())
    assert precision >= 0.9 and precision >= by_loss and int(wrong[named].sum()) >= 0.85 * int(wrong.sum())
    assert f"rows of the {result.counted_in} {result.where[0]}, {result.where[1]}" in verdict.sentence
    assert verdict.examples == tuple(result.named[:200].tolist())
    assert (verdict.value, verdict.unit) == (result.count / result.rows, "share")


@pytest.mark.parametrize("given", ["loader", "probe", "neither"])
def test_the_named_rows_are_shown_where_their_inputs_are_at_hand(given):
    x, right = table("digits")
    y, _ = moved(right, 0.1)
    watcher, _ = train(x, y, loader=given == "loader", **({"probe": (x, y)} if given == "probe" else {}))
    result = last(watcher)
    if given == "neither":
        assert len(result.row_inputs) == 0 and "features" not in next(result.examples())
    else:
        numpy.testing.assert_array_equal(result.row_inputs, x[result.named[:12].tolist()].numpy())
        numpy.testing.assert_array_equal(next(result.examples())["features"], x[int(result.named[0])].numpy())


def test_inputs_are_found_in_several_parts():
    parts = torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 15.0).reshape(3, 3)
    facts = RowFacts(inputs=parts)
    found = facts.inputs_at(numpy.array([4, 0, 2]))
    torch.testing.assert_close(found, torch.cat(parts)[[4, 0, 2]])
    assert facts.inputs_at(numpy.array([5])) is None and facts.inputs_at(numpy.array([-1])) is None


@pytest.mark.parametrize("name", DATA)
def test_the_rows_with_the_lowest_margins_are_the_wrong_ones(name):
    x, y = table(name)
    y, wrong = moved(y, 0.1)
    watcher, losses = train(x, y, epochs=12)
    facts = watcher._loop.facts().rows
    k = int(wrong.sum())
    lowest = torch.from_numpy(numpy.nanmean(facts.margins[:, 2:], 1)).argsort()[:k]
    precision = float(wrong[lowest].float().mean())
    assert precision >= float(wrong[losses.argsort(descending=True)[:k]].float().mean())
    assert precision >= 0.84


@pytest.mark.parametrize("epochs", [1, 3, 30])
@pytest.mark.parametrize("name", DATA)
def test_right_labels_are_left_in_peace(name, epochs):
    watcher, _ = train(*table(name), epochs=epochs)
    assert not watcher.findings


def overlapping(n=900, classes=4, apart=0.6, rare=1.0):
    generator = torch.Generator().manual_seed(3)
    shares = torch.tensor([rare**c for c in range(classes)])
    y = torch.multinomial(shares / shares.sum(), n, True, generator=generator)
    centres = apart * torch.randn(classes, 8, generator=generator)
    return centres[y] + torch.randn(n, 8, generator=generator), y


@pytest.mark.parametrize(
    "about",
    [{}, {"rare": 0.4}, {"n": 60}, {"apart": 0.3}, {"classes": 2, "rare": 0.08}],
    ids=["overlap", "rare classes", "few", "hardly apart", "rare of two"],
)
@pytest.mark.parametrize("lr", [0.02, 0.2])
def test_hard_data_with_right_labels_is_left_in_peace(about, lr):
    watcher, _ = train(*overlapping(**about), epochs=20, lr=lr)
    assert not watcher.findings


def test_what_is_said_does_not_depend_on_the_budget_or_on_the_watch():
    x, y = table("digits")
    y, _ = moved(y[:600], 0.1)
    said = [last(train(x[:600], y, epochs=8, budget=budget)[0]) for budget in (0.0, 0.05, float("inf"))]
    assert said[0].verdict().cause == Cause.LABELS_WRONG
    assert said[0] == said[1] == said[2]


def test_what_is_seen_once_is_not_taken_back_when_the_labels_are_known_by_heart():
    x, y = table("digits")
    x, y = x[:600], y[:600]
    y, _ = moved(y, 0.1)
    watcher, losses = train(x, y, epochs=60, width=256)
    assert float(losses.max()) < 0.1
    assert last(watcher).verdict().cause == Cause.LABELS_WRONG


def refused(**about):
    watcher, _ = train(*table("wine"), epochs=5, **about)
    verdict = last(watcher).verdict()
    assert verdict.level == "not_applicable" and not watcher.findings
    return verdict.sentence


def test_inputs_that_change_at_random_are_no_rows_without_a_loader():
    assert "no row of the inputs came a second time" in refused(
        loader=False, change=lambda x, y: (x + torch.randn_like(x), y)
    )


def test_rows_of_a_loader_are_known_again_whatever_is_done_to_the_inputs():
    x, y = table("digits")
    y, wrong = moved(y, 0.1)
    watcher, _ = train(x, y, change=lambda x, y: (x + 0.3 * torch.randn_like(x), y))
    assert wrong[torch.tensor(last(watcher).named.tolist())].float().mean() > 0.85


def test_mixed_rows_have_no_label():
    def mixed(outputs, labels):
        return 0.7 * F.cross_entropy(outputs, labels) + 0.3 * F.cross_entropy(outputs, labels.flip(0))

    assert "two targets" in refused(loss=mixed)
    soft = lambda x, y: (x, F.one_hot(y, 3).float())  # noqa: E731
    assert "no loss of training was seen with one target a row" in refused(change=soft)


def test_labels_that_are_drawn_again_say_nothing_of_a_row():
    assert "another label at another time" in refused(change=lambda x, y: (x, torch.randint_like(y, 3)))


def test_wrong_labels_that_lie_together_in_the_data_are_told_so():
    x, y = table("digits")
    wrong = y.clone()
    wrong[300:420], _ = moved(y[300:420], 1.0)
    watcher, _ = train(x, wrong)
    result = last(watcher)
    first, end, count = result.run
    assert 300 <= first <= 310 and 410 <= end < 420 and count >= 90
    assert f"{count} of them lie together in rows {first} to {end}." in result.verdict().sentence


def facts(margins, labels, **about):
    margins = numpy.asarray(margins, numpy.float32)
    n = len(margins)
    numbers = numpy.arange(n, dtype=numpy.int32)
    given = {
        "counted_in": "data set", "reason": "", "margins": margins,
        "looks": numpy.isfinite(margins).sum(1).astype(numpy.int32), "labels": numpy.asarray(labels, numpy.int32),
        "answers": numbers * 0, "number": numbers, "first_step": numbers, "first_place": numbers,
    }  # fmt: skip
    return Loop(step=9, rows=RowFacts(**given | about))


def test_the_rows_are_those_below_minus_a_quarter_of_the_usual_margin():
    # 40 rows at 2 and 10 at -2 (five of either class), for three sights: S = 2, deep 10 >= 3 * 0 + 6.
    margins = numpy.full((50, 3), 2.0)
    margins[:10] = -2.0
    result = diag.row_labels(loop=facts(margins, numpy.arange(50) % 2))
    assert (result.sure, result.deep, result.shallow, result.looks) == (2.0, 10, 0, 3)
    assert sorted(result.named) == list(range(10)) and result.verdict().value == 0.2
    # As many rows a little below zero as would make a tail: 10 < 3 * 2 + 6.
    margins[10:12] = -0.5
    assert not diag.row_labels(loop=facts(margins, numpy.arange(50) % 2)).found
    # All of them of one class, which so is not learned.
    margins[10:12] = 2.0
    assert not diag.row_labels(loop=facts(margins, (numpy.arange(50) >= 10).astype(int))).found
    # A network that is not sure of anything.
    assert not diag.row_labels(loop=facts(margins / 2.1, numpy.arange(50) % 2)).found


def test_stretches_of_other_labels_are_not_held_against_the_rows():
    margins = numpy.full((50, 3), 2.0)
    about = {"compared": 100, "changed": 20}
    assert diag.row_labels(loop=facts(margins, numpy.arange(50) % 2, **about)).unmet().name == "labels"
    about["moved"] = (Moved(5, 6, 20),)
    assert diag.row_labels(loop=facts(margins, numpy.arange(50) % 2, **about)).unmet() is None


def test_in_a_long_training_a_part_of_the_steps_is_followed_and_no_row_is_forgotten():
    moment, size, batch = Moment(), 96, 24  # four batches a round, always in this order
    rows, dataset = RowObserver(moment), TensorDataset(torch.zeros(96, 1))
    labels, followed = torch.arange(batch) % 3, []
    for step in range(1, 4097):
        places = numpy.arange(batch) + batch * (step % 4)
        rows.training_call((torch.zeros(batch, 1),), {}, places, dataset)
        followed.append(rows._now is not None)
        rows.loss_called("cross_entropy", (torch.randn(batch, 3), labels), {})
        rows.step_ended()
        moment.ended(step)
    assert all(followed[:1024]) and not all(followed[1024:1400])
    late = numpy.array(followed[1400:])
    assert abs(late.mean() - 1 / 4) < 0.01
    looks = rows.facts().looks
    assert len(looks) == size and looks.min() > 256 + 128 and looks.max() < 1.1 * looks.min()  # alike for all
