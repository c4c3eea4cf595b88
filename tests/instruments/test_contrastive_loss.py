"""Losses that choose each row's partner among others: whether it can be found, and what keeps rows apart."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.result import OUR_CHOICE
from diag.snapshot.loop.contrast import ContrastFacts, ContrastLook
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.formula.parts import parts_of
from diag.watching.observe.loop.formula.sides.contrast import contrast_look, mean_likeness
from diag.watching.observe.loop.formula.sides.likeness import likenesses_of, product_behind

N, D = 120, 12
PARTNERS = torch.arange(2 * N).roll(N)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        return self.layers(x)


class Towers(nn.Module):
    """Two encoders, with a temperature that is learned."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Encoder(), Encoder()
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, x, y):
        return self.left(x), self.right(y)


def both(a, b):
    """Both views in one batch."""
    return F.normalize(torch.cat([a, b]), dim=1)


def by_cross_entropy(a, b, temperature=0.2, targets=PARTNERS, mask=-1e9):
    z = both(a, b)
    return F.cross_entropy((z @ z.T / temperature).masked_fill(torch.eye(2 * N, dtype=torch.bool), mask), targets)


def by_arithmetic(a, b, temperature=0.2, targets=PARTNERS, mask=1e9):
    z = both(a, b)
    s = z @ z.T / temperature - torch.eye(2 * N) * mask
    return -(s[torch.arange(2 * N), targets] - torch.logsumexp(s, 1)).mean()


def by_mask(a, b, temperature=0.2, targets=PARTNERS, mask=-math.inf):
    z = both(a, b)
    s = F.cosine_similarity(z[:, None], z[None], dim=-1) / temperature
    s = s.masked_fill(torch.eye(2 * N, dtype=torch.bool), mask)
    logs = torch.where(torch.eye(2 * N, dtype=torch.bool), 0.0, s.log_softmax(1))
    return -logs.gather(1, targets[:, None]).mean() if targets is not PARTNERS else F.cross_entropy(s, targets)


def across(a, b, temperature=0.2):
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    return (F.cross_entropy(logits, torch.arange(N)) + F.cross_entropy(logits.T, torch.arange(N))) / 2


def by_diagonal(a, b, temperature=0.2):
    return -(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature).log_softmax(1).diag().mean()


def views(how, n=N):
    x = torch.randn(n, D)
    if how == "equal":
        v = x + 0.3 * torch.randn(n, D)
        return v, v
    other = torch.randn(n, D) if how == "others" else x
    return x + 0.3 * torch.randn(n, D), other + 0.3 * torch.randn(n, D)


def told(loss, how="views", steps=8, one_call=False, checks=("contrastive_loss",)):
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with diag.watch(model, instruments=list(checks)) as watcher:
        for _ in range(steps):
            a, b = views(how)
            outputs = model(torch.cat([a, b])).chunk(2) if one_call else (model(a), model(b))
            optimizer.zero_grad()
            loss(*outputs).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


LOSSES = pytest.mark.parametrize("loss", [by_cross_entropy, by_arithmetic, by_mask, across, by_diagonal])
OF_ONE_SET = pytest.mark.parametrize("loss", [by_cross_entropy, by_arithmetic])


@LOSSES
@pytest.mark.parametrize("one_call", [True, False])
def test_a_loss_that_works_is_fine(loss, one_call):
    assert not told(loss, steps=120, one_call=one_call, checks=["contrastive_loss", "pairs_differ"])


@LOSSES
def test_partners_of_other_rows_are_named(loss):
    (finding,) = told(loss, "others", steps=300)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.PAIRS_UNRELATED)


@OF_ONE_SET
def test_equal_views_in_one_call_are_named(loss):
    (finding,) = told(loss, "equal", one_call=True, checks=["contrastive_loss", "pairs_differ"])
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.PAIR_IDENTICAL)
    assert finding.first_step <= 3


@OF_ONE_SET
def test_answers_that_are_masked_are_named(loss):
    (finding,) = told(lambda a, b: loss(a, b, targets=torch.arange(2 * N)))
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.ANSWER_MASKED)
    assert finding.first_step <= 3 and "100 % of the rows" in finding.verdict.sentence


@OF_ONE_SET
def test_a_row_that_is_its_own_answer_is_named(loss):
    (finding,) = told(lambda a, b: loss(a, b, targets=torch.arange(2 * N), mask=0))
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.PAIR_IDENTICAL)


def test_rows_among_their_wrong_answers_are_named():
    (finding,) = told(lambda a, b: by_arithmetic(a, b, mask=0))
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.ANSWER_MASKED)


@LOSSES
@pytest.mark.parametrize("temperature", [30.0, 5e-4])
def test_temperatures_that_leave_nothing_to_choose_are_named(loss, temperature):
    (finding,) = told(lambda a, b: loss(a, b, temperature))
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.TEMPERATURE_WRONG)


def cosine(a, b):
    return 1 - F.cosine_similarity(a, b).mean()


def halves(a, b):
    z = both(a, b)
    return 1 - (z[:N] * z[N:]).sum(1).mean()


def squares(a, b):
    return (a - b).square().sum(1).mean()


def distance(a, b):
    return F.pairwise_distance(a, b).mean()


ATTRACTIONS = [cosine, halves, squares, F.mse_loss, distance]


@pytest.mark.parametrize("loss", ATTRACTIONS)
@pytest.mark.parametrize("one_call", [True, False])
def test_a_loss_that_only_draws_together_is_named(loss, one_call):
    (finding,) = told(loss, one_call=one_call)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.NOTHING_KEEPS_APART)
    assert finding.first_step <= 3


def test_how_alike_different_rows_are_is_said_where_the_graph_keeps_them():
    torch.manual_seed(0)
    a, b = Encoder()(torch.randn(N, D)), Encoder()(torch.randn(N, D))
    unit = F.normalize(a.detach(), dim=1)
    mean = float(((unit @ unit.T).sum() - N) / (N * (N - 1)))
    for loss in (cosine, F.mse_loss):
        assert mean_likeness(parts_of(loss(a, b))) == pytest.approx(mean, abs=1e-5)
    assert math.isnan(mean_likeness(parts_of(squares(a, b))))


def detached(a, b):
    return 1 - F.cosine_similarity(a, b.detach()).mean()


def variance(a, b):
    spread = F.relu(1 - a.std(0)).mean() + F.relu(1 - b.std(0)).mean()
    return F.mse_loss(a, b) + spread


def decorrelated(a, b):
    a, b = (a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)
    return (a.T @ b / N - torch.eye(8)).square().sum()


def margin(a, b):
    return F.triplet_margin_loss(a, b, a.roll(1, 0))


def beside_a_known_difference(a, b):
    return (a - b - 1).square().mean()


@pytest.mark.parametrize("loss", [detached, variance, decorrelated, margin, beside_a_known_difference])
def test_losses_that_something_keeps_apart_are_fine(loss):
    assert not told(loss)


def test_an_agreement_beside_another_loss_with_a_backward_pass_of_its_own_is_fine():
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with diag.watch(model, instruments=["contrastive_loss"]) as watcher:
        for _ in range(12):
            a, b = views("views")
            optimizer.zero_grad()
            F.cross_entropy(model(a), a[:, :8].argmax(1)).backward()
            squares(model(a), model(b)).backward()
            optimizer.step()
    assert not watcher.findings


def test_two_towers_that_begin_at_chance_are_given_time():
    torch.manual_seed(0)
    model = Towers()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    with diag.watch(model, instruments=["contrastive_loss"]) as watcher:
        for _ in range(150):
            a, b = views("views")
            u, v = (F.normalize(t, dim=1) for t in model(a, b))
            optimizer.zero_grad()
            F.cross_entropy(model.scale.exp() * u @ v.T, torch.arange(N)).backward()
            optimizer.step()
    assert not watcher.findings


def look_at(loss):
    (found,) = [contrast_look(1, s, p) for s in likenesses_of(parts_of(loss)) if (p := product_behind(s))][:1]
    return found


@LOSSES
def test_what_is_read_is_what_the_loss_is_computed_from(loss):
    torch.manual_seed(0)
    model = Encoder().double()
    a, b = (model(v.double()) for v in views("views"))
    look = look_at(loss(a, b))
    one_set = loss in (by_cross_entropy, by_arithmetic, by_mask)
    assert look.rows == look.answers == (2 * N if one_set else N) and look.unit and look.shared
    assert look.factor == pytest.approx(5, rel=1e-6) and look.own == one_set and not look.equal
    # What is read holds for the first direction of a loss in two.
    whole = by_diagonal(a, b) if loss is across else loss(a, b)
    assert look.loss == pytest.approx(whole.item(), rel=1e-6) and look.free == (2 * N - 1 if one_set else N)


def test_the_rank_is_that_of_the_right_answer():
    """Against a count by hand of the wrong answers that are less like the row."""
    torch.manual_seed(1)
    a, b = Encoder()(torch.randn(N, D)), Encoder()(torch.randn(N, D))
    s = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    below = [sum(s[i, j] < s[i, i] for j in range(N) if j != i) / (N - 1) for i in range(N)]
    assert look_at(by_diagonal(a, b)).rank == pytest.approx(float(sum(below)) / N, abs=1e-6)


def test_weights_of_classes_are_no_embeddings():
    h, weight = Encoder()(torch.randn(N, D)), nn.Parameter(torch.randn(5, 8))
    labels = torch.randint(5, (N,))
    for w in (weight, F.normalize(weight, dim=1)):
        (scores,) = likenesses_of(parts_of(F.cross_entropy(F.normalize(h, dim=1) @ w.T, labels)))
        assert product_behind(scores) is None


def judged(*looks, step=2000):
    return diag.contrastive_loss(loop=Loop(step, contrast=ContrastFacts(looks))).verdict()


def seen(step, **about):
    usual = {"rows": 200, "answers": 200, "own": False, "shared": True, "unit": True, "factor": 5.0, "masked": 0.0,
             "itself": 0.0, "among": 0.0, "free": 200.0, "equal": False, "rank": 0.9, "loss": 3.0}  # fmt: skip
    return ContrastLook(step, **(usual | about))


def test_scores_that_are_multiplied_by_zero_are_named_and_one_look_claims_nothing():
    verdict = judged(*(seen(k, factor=0.0) for k in (1, 2, 3)))
    assert verdict.cause == Cause.TEMPERATURE_WRONG and "logits that span 0 at most" in verdict.sentence
    assert verdict.threshold_source == OUR_CHOICE
    early = judged(seen(1, rank=0.5))
    assert early.level == "ok" and "Nothing wrong was seen" in early.sentence


def test_few_answers_few_looks_and_chance_at_the_start_alone():
    few = [seen(k, rows=4, answers=4, own=True, free=3.0) for k in (1, 2, 3)]
    assert judged(*few).cause == Cause.BATCH_TOO_SMALL and judged(*few[:2]).level == "ok"
    begin, end = [seen(k, rank=0.5) for k in (1, 2, 3)], [seen(k, rank=0.5) for k in (200, 300, 400)]
    assert judged(*begin, *end).cause == Cause.PAIRS_UNRELATED
    assert judged(*begin, *(seen(k) for k in (200, 300, 400))).level == "ok"
    apart = [seen(k, rank=0.5, shared=False) for k in (1, 2, 3, 200, 300, 400)]
    assert judged(*apart).level == "ok" and judged(*apart, seen(1000, rank=0.5, shared=False)).level == "warning"
    assert judged().level == "not_applicable"
