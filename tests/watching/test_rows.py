"""Rows followed through training's batches: their margins, who they are, in bounded memory, and training
unchanged."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import diag
from diag.snapshot.batch import Batch
from diag.watching.observe.loop.data.same import same_rows
from diag.watching.observe.loop.rows.course import MarginCourse
from diag.watching.observe.loop.rows.identity import Hashes, Places, hashes_of
from diag.watching.observe.loop.rows.scores import scores_of


def data(n=96, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(classes, (n,), generator=generator)


def margins_of(logits, labels):
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def trained(batches, watched=True, out=4, loss=F.cross_entropy, steps=None, **watch):
    """(facts of the rows, margins as the loop itself sees them, final weights); `batches()` gives an epoch of
    (places, inputs, labels)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, out))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def run():
        for _ in range(3):
            for places, x, y in batches():
                optimizer.zero_grad()
                outputs = model(x)
                loss(outputs, y).backward()
                optimizer.step()
                if places is not None and outputs.ndim == 2 and y.dtype == torch.long:
                    seen.append((places, margins_of(outputs.detach(), y)))

    if not watched:
        run()
        return None, seen, [p.detach().clone() for p in model.parameters()]
    with diag.watch(model, instruments=["row_labels"], **watch) as watcher:
        run()
    assert not watcher.clock.broken
    return watcher._loop.facts().rows, seen, [p.detach().clone() for p in model.parameters()]


def own_batches(x, y, size=16):
    generator = torch.Generator().manual_seed(1)
    return lambda: ((rows, x[rows], y[rows]) for rows in torch.randperm(len(x), generator=generator).split(size))


def loaded(dataset, **settings):
    order = torch.Generator().manual_seed(2)
    loader = DataLoader(dataset, batch_size=16, shuffle=True, generator=order, **settings)
    return lambda: ((None, x, y) for x, y in loader)


def test_the_margins_are_those_of_the_loops_own_outputs():
    x, y = data()
    facts, seen, _ = trained(own_batches(x, y), probe=(x, y))
    assert (facts.counted_in, facts.n, facts.reason) == ("probe set", 96, "")
    assert (facts.looks == 3).all() and facts.margins.shape == (96, 3)
    expected = torch.full((96, 3), torch.nan)
    for k, (rows, margins) in enumerate(seen):
        expected[rows, k // 6] = margins
    assert facts.number.tolist() == list(range(96)) and facts.labels.tolist() == y.tolist()
    # float32 of the same subtraction
    numpy.testing.assert_array_equal(facts.margins, expected.numpy())


@pytest.mark.parametrize("kind", ["own", "loader"])
def test_what_is_read_from_a_device_is_the_same(kind, monkeypatch):
    from diag.watching.observe.loop.rows import scores

    x, y = data()
    make = {"own": lambda: own_batches(x, y), "loader": lambda: loaded(TensorDataset(x, y))}[kind]
    here, _, _ = trained(make())
    # The tensors of a device are read late and together, as these are.
    away = lambda z, y: scores._on_device(z, y, scores._some(*z.shape))  # noqa: E731
    monkeypatch.setattr(scores, "_of_classes", away)
    there, _, _ = trained(make())
    assert there.n == 96
    for name in ("margins", "looks", "labels", "answers", "number", "first_step", "first_place"):
        numpy.testing.assert_array_equal(getattr(here, name), getattr(there, name))


def test_rows_of_a_loader_are_named_by_their_place_in_its_data_set():
    x, y = data()
    facts, _, _ = trained(loaded(Subset(ConcatDataset([TensorDataset(x, y)]), range(90, 10, -1))))
    assert (facts.counted_in, facts.n) == ("data set", 80)
    assert facts.labels.tolist() == y[torch.arange(90, 10, -1)].tolist() and facts.name(7) == "7"


def made_each_epoch(make):
    """A loop that makes its data set and its loader again in each epoch."""
    order = torch.Generator().manual_seed(2)
    return lambda: ((None, x, y) for x, y in DataLoader(make(), batch_size=16, shuffle=True, generator=order))


@pytest.mark.parametrize(
    "wrap",
    [lambda rows: rows, lambda rows: Subset(rows, list(range(96))), lambda rows: TensorDataset(*rows.tensors)],
)
@pytest.mark.parametrize("copied", [False, True])
def test_a_data_set_that_is_made_again_each_epoch_is_one(wrap, copied):
    x, y = data()
    facts, _, weights = trained(
        made_each_epoch(lambda: wrap(TensorDataset(*((x.clone(), y.clone()) if copied else (x, y)))))
    )
    once, _, same = trained(loaded(TensorDataset(x, y)))
    assert (facts.looks == 3).all() and facts.counted_in == "data set"
    numpy.testing.assert_array_equal(facts.margins, once.margins)
    assert all(map(torch.equal, weights, same))


def test_a_data_set_of_other_rows_or_of_none_is_another():
    x, y = data()
    orders = iter([torch.arange(96), *(torch.randperm(96) for _ in range(3))])
    facts, _, _ = trained(
        made_each_epoch(lambda: TensorDataset(*(t[order] for order in [next(orders)] for t in (x, y))))
    )
    assert (facts.looks == 1).all()

    class Drawn(Dataset):
        def __len__(self):
            return 9

    assert not same_rows(Drawn(), Drawn()) and not same_rows(TensorDataset(x), TensorDataset(x[:90]))
    assert not same_rows(Subset(TensorDataset(x), range(9)), Subset(TensorDataset(x), range(1, 10)))
    assert same_rows(TensorDataset(x), TensorDataset(x[:]))


class Centred(Dataset):
    """Its attribute before the rows is a number in a tensor."""

    def __init__(self, mean, rows):
        self.mean, self.rows = torch.tensor(mean), rows

    def __len__(self):
        return len(self.rows)


def test_numbers_beside_the_rows_of_a_data_set_are_compared_as_they_are():
    x, _ = data()
    assert same_rows(Centred(0.5, x), Centred(0.5, x.clone()))
    assert not same_rows(Centred(0.5, x), Centred(0.6, x.clone()))


def kind_of_training(kind):
    """(an epoch's batches, the loss) of a kind of loop, newly made."""
    x, y = data()
    if kind == "loader":
        return loaded(TensorDataset(x, y)), F.cross_entropy
    if kind == "regression":
        return own_batches(x, x[:, :4].cos()), F.mse_loss
    if kind == "augmented":
        return lambda: ((r, a + torch.randn_like(a), b) for r, a, b in own_batches(x, y)()), F.cross_entropy
    return own_batches(x, y), F.cross_entropy


@pytest.mark.parametrize("budget", [0.0, float("inf")])
@pytest.mark.parametrize("kind", ["own", "loader", "regression", "augmented"])
def test_training_is_bit_identical_and_random_numbers_are_left_alone(kind, budget):
    batches, loss = kind_of_training(kind)
    _, _, plain = trained(batches, watched=False, loss=loss)
    batches, loss = kind_of_training(kind)
    _, _, watched = trained(batches, budget=budget, loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_several_losses_and_one_a_pixel_are_no_rows():
    x, y = data()
    both = lambda o, t: F.cross_entropy(o, t) + F.cross_entropy(o, t.flip(0))  # noqa: E731
    facts, _, _ = trained(own_batches(x, y), loss=both)
    assert "two targets" in facts.reason and facts.n == 0
    pixels = lambda o, t: F.cross_entropy(o.reshape(16, 2, 2), torch.stack([t % 2, t // 2], 1))  # noqa: E731
    facts, _, _ = trained(own_batches(x, y), loss=pixels)
    assert "no loss of training" in facts.reason


def test_labels_that_move_for_some_steps_are_told_with_their_steps():
    x, y = data()
    step = iter(range(18))
    shifted = lambda labels: (labels + 1) % 4 if next(step) in (9, 10) else labels  # noqa: E731
    facts, _, _ = trained(lambda: ((r, a, shifted(b)) for r, a, b in own_batches(x, y)()))
    (moved,) = facts.moved
    assert (moved.first, moved.last, moved.rows) == (10, 11, 32)
    assert facts.changed == 32 and facts.compared == 192
    assert sorted(set(facts.looks)) == [2, 3] and facts.labels.tolist().count(-1) == 0


# Scores


def test_margins_of_classes_and_of_two():
    z = torch.tensor([[2.0, 0.0, -1.0], [0.5, 3.0, 1.0], [1.0, 1.0, 4.0], [0.0, 0.0, 0.0]])
    y = torch.tensor([0, 2, 2, -100])
    for name in ("cross_entropy", "nll_loss"):
        found = scores_of(name, (z, y), {}, 4).scores()
        assert found.margin[:3].tolist() == [2.0, -2.0, 3.0] and numpy.isnan(found.margin[3])
        assert found.answer[:3].tolist() == [1, 1, 0]
    logits, ones = torch.tensor([[1.0], [-2.0]]), torch.ones(2, 1)
    two = scores_of("binary_cross_entropy_with_logits", (logits,), {"target": ones}, 2)
    assert two.margin.tolist() == [1.0, -2.0] and two.label.tolist() == [1, 1] and two.answer.tolist() == [0, 0]
    soft = scores_of("binary_cross_entropy_with_logits", (logits, ones / 3), {}, 2)
    assert numpy.isnan(soft.margin).all()
    for target in (z.softmax(1), y[:3], torch.zeros(4, 2, dtype=torch.long)):
        assert scores_of("cross_entropy", (z, target), {}, 4) is None
    assert scores_of("mse_loss", (z, z), {}, 4) is None


def test_margins_are_cut_alike_on_the_host_and_on_a_device():
    from diag.watching.observe.loop.rows import scores

    z = torch.tensor([[1e6, 0.0], [1e6, 0.0], [3e38, -3e38], [torch.inf, 0.0], [2.0, 0.0], [torch.nan, 0.0]])
    y = torch.tensor([0, 1, 0, 0, 0, 0])
    here = scores_of("cross_entropy", (z, y), {}, 6).scores()
    there = scores._on_device(z, y, here.rows)
    for margin in (here.margin, there.margin.numpy()):
        numpy.testing.assert_array_equal(margin, [1e4, -1e4, 1e4, 1e4, 2.0, numpy.nan])


def test_sights_of_a_cut_margin_count_and_those_without_a_label_do_not():
    x, y = data()
    some = lambda o, t: 1e-9 * F.cross_entropy(1e6 * o, torch.where(t == 3, -100, t))  # noqa: E731
    facts, _, _ = trained(own_batches(x, y), probe=(x, y), loss=some)
    seen = facts.looks >= 2  # what is told is as old as the last full round
    assert seen.tolist() == (y != 3).tolist() and not facts.looks[~seen].any()
    # Means of three numbers of at most 1e4, in float32.
    assert numpy.nanmax(numpy.abs(facts.margins)) == pytest.approx(1e4, rel=1e-6)


def test_of_a_wide_output_some_rows_are_looked_at():
    found = scores_of("cross_entropy", (torch.zeros(64, 4096), torch.zeros(64, dtype=torch.long)), {}, 64).scores()
    assert found.rows.step == 4 and len(found.margin) == 16


# Who a row is


def test_a_row_has_one_hash_wherever_it_stands():
    x = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hashes_of((x,), {}, 40)[order], hashes_of((x[order],), {}, 40))
    assert len(set(hashes_of((x,), {}, 40).tolist())) == 40
    near = x.clone()
    near[:, 0, 0] = torch.nextafter(near[:, 0, 0], torch.tensor(9.0))
    assert not (hashes_of((near,), {}, 40) == hashes_of((x,), {}, 40)).any()
    both = hashes_of((x, order), {}, 40)
    assert (both == hashes_of((x,), {}, 40)).sum() == 1  # where the second tensor is zero
    assert hashes_of((x.bfloat16(),), {}, 40) is not None and hashes_of((torch.zeros(3),), {}, 40) is None


def test_rows_that_are_alike_are_not_told_apart():
    who = Hashes()
    who.look(hashes_of((torch.zeros(16, 2),), {}, 16).numpy())
    assert "same inputs" in who.reason


def test_known_rows_come_first_and_others_after_them():
    x, y = data(8)
    who = Hashes([Batch((x[:5],), {}, y[:5], 5)])
    assert who.rows(hashes_of((x[[7, 3, 0]],), {}, 3).numpy()).tolist() == [5, 3, 0]
    assert who.counted_in == "probe set" and who.numbers(6).tolist() == [0, 1, 2, 3, 4, -1]


def test_of_a_data_set_of_millions_every_fourth_row_is_followed(monkeypatch):
    from diag.watching.observe.loop.rows import identity

    monkeypatch.setattr(identity, "ROWS", 30)
    who = Places(object(), 100)
    assert who.every == 4 and who.capacity == 25
    assert who.rows(numpy.array([0, 5, 8, 99])).tolist() == [0, -1, 2, -1]


# The course


def test_the_course_keeps_means_of_two_of_four_of_eight_sights_and_is_bounded():
    course = MarginCourse(3)
    values = numpy.random.default_rng(0).normal(size=(150, 3))
    rows, labels, course_of = numpy.arange(3), numpy.array([2, 0, 1]), [[], [], []]
    course.make_room(3)
    for k, row in enumerate(values):
        some = rows if k % 3 else rows[:2]  # the third is met less often
        before, others = course.meet(some, row[some], labels[some], labels[some], k, some)
        assert others == 0 and before == (len(some) if k > 1 else 2 * k)
        for r in some:
            course_of[r].append(row[r])
    facts = course.facts()
    assert facts.width == 4 and facts.margins.shape[1] <= 64 and facts.looks.tolist() == [150, 150, 100]
    for r, all_of in enumerate(course_of):
        means = [numpy.mean(all_of[k : k + 4]) for k in range(0, len(all_of), 4)]
        # float32 sums of four numbers of size one
        numpy.testing.assert_allclose(facts.margins[r, : len(means)], means, atol=1e-6)
        assert numpy.isnan(facts.margins[r, len(means) :]).all()


def test_a_sight_with_another_label_does_not_count_for_the_row():
    course, rows = MarginCourse(4), numpy.arange(4)
    course.make_room(4)
    labels = numpy.array([0, 1, 2, 0])
    course.meet(rows, numpy.ones(4), labels, labels, 1, rows)
    others = numpy.array([0, 2, 2, 1])  # of the second row and of the last
    assert course.meet(rows, -numpy.ones(4), others, labels + 5, 2, rows) == (4, 2)
    facts = course.facts()
    assert facts.looks.tolist() == [2, 1, 2, 1] and facts.labels.tolist() == labels.tolist()
    assert facts.answers.tolist() == [5, -1, 7, -1] and facts.first_step.tolist() == [1] * 4


def test_a_million_rows_have_eight_columns():
    course = MarginCourse(1 << 20)
    course.make_room(1)
    assert course.margins.nbytes < 1 << 16
    course.make_room(1 << 20)
    assert course.margins.nbytes == 32 << 20
