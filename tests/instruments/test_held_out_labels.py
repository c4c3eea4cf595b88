"""Held-out labels that are numbered otherwise or belong to other inputs; labels of several inputs."""

import math

import pytest
import torch
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.dependence import independence_p_value, tensors_by_row
from diag.instruments.data.held_out_labels import HeldOutLabels


def data(n, seed, classes=4):
    """Inputs (n, 6) around a mean for each class, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    means = 3 * torch.eye(classes, 6)
    return means[labels] + torch.randn(n, 6, generator=generator), labels


def logits_of(labels, seed=0, classes=4):
    """Answers of which one in twenty is another class."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < 0.05
    return 5 * torch.nn.functional.one_hot((labels + wrong) % classes, classes).float()


def judged(change, train_change=lambda y: y, answers=logits_of):
    """The check's result where held-out labels are `change` of the right ones, and training's of theirs."""
    (x, y), (u, v) = data(200, 0), data(150, 1)
    return diag.held_out_labels(
        inputs=x,
        logits=logits_of(train_change(y)),
        labels=train_change(y),
        held_out_inputs=u,
        held_out_logits=answers(v),
        held_out_labels=change(v),
    )


def test_labels_that_fit_are_quiet():
    result = judged(lambda v: v)
    assert result.verdict().level == "ok"
    assert math.isnan(result.p_value)  # not needed


@pytest.mark.parametrize("order", [[1, 2, 3, 0], [3, 2, 1, 0]])
def test_other_numbers_are_told(order):
    verdict = judged(lambda v: torch.tensor(order)[v]).verdict()
    assert (verdict.level, verdict.cause) == ("warning", Cause.HELD_OUT_LABELS_DIFFER)
    assert f"0 is {order[0]}" in verdict.sentence


def test_the_share_after_renumbering_is_that_of_the_best_numbers():
    result = judged(lambda v: (v + 1) % 4)
    _, v = data(150, 1)
    assert result.renumbered == pytest.approx(float((logits_of(v).argmax(1) == v).double().mean()))


def test_shuffled_held_out_labels_are_told():
    shuffled = lambda v: v[torch.randperm(len(v), generator=torch.Generator().manual_seed(2))]  # noqa: E731
    verdict = judged(shuffled).verdict()
    assert verdict.level == "warning" and "do not seem to belong" in verdict.sentence


def test_memory_of_shuffled_training_labels_is_another_matter():
    """Training labels that belong to no input are learned by heart, and held-out answers are at chance."""
    shuffle = lambda y: y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]  # noqa: E731
    answers = lambda v: logits_of(torch.randint(4, v.shape, generator=torch.Generator().manual_seed(4)))  # noqa: E731
    assert judged(lambda v: v, train_change=shuffle, answers=answers).verdict().level == "ok"


def test_a_network_that_only_answers_badly_is_another_matter():
    answers = lambda v: logits_of(torch.randint(4, v.shape, generator=torch.Generator().manual_seed(4)))  # noqa: E731
    assert judged(lambda v: v, answers=answers).verdict().level == "ok"


@pytest.mark.parametrize("others", [0, 2])
def test_held_out_labels_that_hardly_vary_say_nothing(others):
    """The first rows of a held-out set that is sorted by class, half of them answered right."""
    x, y = data(200, 0)
    u, v = data(900, 1)
    first = v.argsort(stable=True)[: int((v == 0).sum()) + others]
    v, generator = v[first], torch.Generator().manual_seed(4)
    wrong = 1 + torch.randint(3, v.shape, generator=generator)
    answered = (v + wrong * (torch.rand(v.shape, generator=generator) < 0.55)) % 4
    result = diag.held_out_labels(
        inputs=x,
        logits=logits_of(y),
        labels=y,
        held_out_inputs=u[first],
        held_out_logits=torch.nn.functional.one_hot(answered, 4).float(),
        held_out_labels=v,
    )
    assert 0.2 < result.held_out_accuracy < 0.5 and result.chance > 0.98
    assert result.verdict().level == "ok"


@pytest.mark.parametrize(
    ("order", "told"), [([0, 2, 1, 3], "1 is 2, 2 is 1"), ([0, 2, 3, 1], "1 is 2, 2 is 3, 3 is 1")]
)
def test_classes_that_changed_places_are_named(order, told):
    verdict = judged(lambda v: torch.tensor(order)[v]).verdict()
    assert (verdict.level, verdict.cause) == ("warning", Cause.HELD_OUT_LABELS_DIFFER)
    assert f"exchanged ({told})" in verdict.sentence


def test_two_classes_that_are_answered_for_one_another_in_part_are_no_exchange():
    def confused(v):
        generator = torch.Generator().manual_seed(5)
        other = torch.tensor([0, 2, 1, 3])[v]
        return logits_of(torch.where(torch.rand(v.shape, generator=generator) < 0.5, other, v))

    assert judged(lambda v: v, answers=confused).verdict().level == "ok"


@pytest.mark.parametrize(("rows", "told"), [(5, False), (40, True)])
def test_few_answers_of_classes_that_cannot_be_told_apart_are_no_exchange(rows, told):
    """Three in five of either have the other's label, as one time in four by chance; of many, four in five."""
    like = torch.arange(5) < (4 if told else 3)
    answers = torch.tensor([0] * 60 + [1] * rows + [2] * rows)
    theirs = torch.where(like.repeat(rows // 5 * 2), 3 - answers[60:], answers[60:])
    (x, y), inputs = data(300, 0, 3), torch.randn(len(answers), 6)
    result = diag.held_out_labels(
        inputs=x, logits=logits_of(y, classes=3), labels=y, held_out_inputs=inputs,
        held_out_logits=5 * F.one_hot(answers, 3).float(), held_out_labels=torch.cat([answers[:60], theirs]),
    )  # fmt: skip
    assert result.exchanged == (((1, 2), (2, 1)) if told else ())


def test_classes_that_training_exchanges_too_are_no_exchange():
    """A network that has not learned the two, on labels that are the same in both sets."""
    other = lambda v: logits_of(torch.tensor([0, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11])[v], classes=12)  # noqa: E731
    (x, y), (u, v) = data(600, 0, 6), data(400, 1, 6)
    result = diag.held_out_labels(
        inputs=x, logits=torch.where((y < 4)[:, None], other(y), logits_of(y, classes=12)), labels=y,
        held_out_inputs=u, held_out_logits=other(v), held_out_labels=v,
    )  # fmt: skip
    assert result.exchanged == () and result.verdict().level == "ok"


def test_only_classes_of_another_number_are_shown():
    swapped = HeldOutLabels(
        accuracy=0.9, held_out_accuracy=0.1, renumbered=0.9, chance=0.3, p_value=math.nan,
        held_out_p_value=math.nan, numbers=((0, 1), (1, 0), (2, 2)), held_out=100,
    )  # fmt: skip
    assert "renumbered (0 is 1, 1 is 0), and" in swapped.verdict().sentence


def test_few_labels_are_refused():
    x, y = data(20, 0)
    z = logits_of(y)
    result = diag.held_out_labels(
        inputs=x, logits=z, labels=y, held_out_inputs=x, held_out_logits=z, held_out_labels=y
    )
    assert result.verdict().level == "not_applicable"


# Several inputs


def test_several_inputs_are_put_together_over_batches():
    a, b = torch.randn(10, 3), torch.arange(10)
    batches = (((a[:4],), {"b": b[:4]}), ((a[4:],), {"b": b[4:]}))
    assert [t.tolist() for t in tensors_by_row(batches)] == [a.tolist(), b.tolist()]
    assert (
        tensors_by_row(
            ((a[:4],), {}),
        )
        == ()
    )
    assert tensors_by_row((((torch.randn(4, 3),), {}), ((torch.randn(4, 5),), {}))) == ()


def test_dependence_on_one_of_several_inputs_is_found():
    generator = torch.Generator().manual_seed(0)
    classes, noise = torch.randint(5, (200, 2), generator=generator), torch.randn(200, 3, generator=generator)
    answers = classes[:, 0] % 3
    assert independence_p_value([classes, noise], answers) == 1 / 100
    assert independence_p_value([classes, noise], answers[torch.randperm(200, generator=generator)]) > 0.02
