"""Loss functions of special form on what they are made for, and on what they are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.loss.loss_domain import DOMAIN_RULES
from diag.snapshot.loop.arithmetic import DomainFacts
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.formula.domains import DOMAIN_MEASURES

N, D, T, C = 12, 6, 8, 5


def told(loss, outputs=C, inside=False, steps=4):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, outputs)

        def forward(self, x):
            return loss(self.layer(x)) if inside else self.layer(x)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with diag.watch(model, instruments=["loss_domain"]) as watcher:
        for _ in range(steps):
            out = model(torch.randn(N, D))
            optimizer.zero_grad()
            (out if inside else loss(out)).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return [(f.verdict.cause, f.verdict.sentence) for f in watcher.findings]


def ctc(make=lambda z: z.log_softmax(-1), symbols=(1, 2, 3), frames=T, lengths=None, flat=False):
    def loss(out):
        logs = make(out.view(N, T, C).transpose(0, 1))
        targets = torch.tensor([symbols] * N)
        wanted = torch.full((N,), len(symbols) if lengths is None else lengths)
        targets = targets.reshape(-1) if flat else targets
        return F.ctc_loss(logs, targets, torch.full((N,), frames), wanted, zero_infinity=True)

    return loss


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (ctc(lambda z: z), Cause.LOGITS_INTO_PROBABILITY_LOSS),
        (ctc(lambda z: z.log_softmax(0)), Cause.WRONG_CLASS_AXIS),
        (ctc(symbols=(0, 1, 2)), Cause.TARGETS_OUT_OF_RANGE),
        (ctc(frames=2), Cause.INPUT_TOO_SHORT),
        (ctc(symbols=(1, 1, 1), frames=4), Cause.INPUT_TOO_SHORT),  # two blanks are needed between
        (ctc(symbols=(1, 1, 1), frames=4, flat=True), Cause.INPUT_TOO_SHORT),
    ],
    ids=["logits", "time", "blank", "short", "repeats", "flat"],
)
def test_ctc_on_what_it_is_not_made_for(loss, cause, inside):
    ((found, sentence),) = told(loss, T * C, inside)
    assert found == cause and sentence.startswith("ctc_loss ")


@pytest.mark.parametrize(
    "loss",
    [
        ctc(),
        ctc(flat=True),
        ctc(symbols=(1, 2, 0, 0), lengths=2),  # zeros fill the ends, and do not count
        ctc(symbols=(1, 1, 1), frames=5),
    ],
    ids=["usual", "flat", "padded", "repeats"],
)
def test_ctc_on_what_it_is_made_for(loss):
    assert told(loss, T * C) == []


def soft():
    return torch.randn(N, C).softmax(1)


def signs(zeros):
    labels = (torch.arange(N) % 2).float()
    return labels if zeros else 2 * labels - 1


def several(rows):
    return torch.tensor(rows).repeat(N // len(rows), 1)


WRONG_AND_RIGHT = {
    "kl: logits": (
        lambda z: F.kl_div(z, soft(), reduction="batchmean"),
        lambda z: F.kl_div(z.log_softmax(1), soft(), reduction="batchmean"),
        Cause.LOGITS_INTO_PROBABILITY_LOSS,
    ),
    "kl: target's logarithm": (
        lambda z: F.kl_div(z.log_softmax(1), soft(), reduction="batchmean", log_target=True),
        lambda z: F.kl_div(z.log_softmax(1), soft().log(), reduction="batchmean", log_target=True),
        Cause.LOGITS_INTO_PROBABILITY_LOSS,
    ),
    "gaussian: variances at the floor": (
        lambda z: F.gaussian_nll_loss(z[:, 0], torch.randn(N), z[:, 1].relu()),
        lambda z: F.gaussian_nll_loss(z[:, 0], torch.randn(N), F.softplus(z[:, 1])),
        Cause.LOSS_UNBOUNDED,
    ),
    "gaussian: shapes": (
        lambda z: F.gaussian_nll_loss(z[:, :1], torch.randn(N), F.softplus(z[:, 1:2])),
        lambda z: F.gaussian_nll_loss(z[:, 0], torch.randn(N), F.softplus(z[:, 1])),
        Cause.TARGETS_BROADCAST,
    ),
    "poisson: standardised": (
        lambda z: F.poisson_nll_loss(z[:, 0], torch.randn(N)),
        lambda z: F.poisson_nll_loss(z[:, 0], torch.randint(0, 5, (N,)).float()),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "poisson: exponential twice": (
        lambda z: F.poisson_nll_loss(z[:, 0].exp(), torch.randint(0, 5, (N,)).float()),
        lambda z: F.poisson_nll_loss(z[:, 0].exp(), torch.randint(0, 5, (N,)).float(), log_input=False),
        Cause.LOGITS_INTO_PROBABILITY_LOSS,
    ),
    "cosine": (
        lambda z: F.cosine_embedding_loss(z[:, :2], z[:, 2:4], signs(True)),
        lambda z: F.cosine_embedding_loss(z[:, :2], z[:, 2:4], signs(False)),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "hinge": (
        lambda z: F.hinge_embedding_loss(z[:, 0].abs(), signs(True)),
        lambda z: F.hinge_embedding_loss(z[:, 0].abs(), signs(False)),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "ranking": (
        lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], signs(True)),
        lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], signs(False)),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "ranking: shapes": (
        lambda z: F.margin_ranking_loss(z[:, :1], z[:, 1:2], signs(False)[None]),
        lambda z: F.margin_ranking_loss(z[:, :1], z[:, 1:2], signs(False)[:, None]),
        Cause.TARGETS_BROADCAST,
    ),
    "soft margin": (
        lambda z: F.soft_margin_loss(z[:, 0], signs(True)),
        lambda z: F.soft_margin_loss(z[:, 0], signs(False)),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "soft margin: sigmoid": (
        lambda z: F.soft_margin_loss(z[:, 0].sigmoid(), signs(False)),
        lambda z: F.soft_margin_loss(z[:, 0], signs(False)),
        Cause.DOUBLE_SIGMOID,
    ),
    "several, soft": (
        lambda z: F.multilabel_soft_margin_loss(z, signs(False)[:, None].expand(N, C)),
        lambda z: F.multilabel_soft_margin_loss(z, signs(True)[:, None].expand(N, C)),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "several": (
        lambda z: F.multilabel_margin_loss(z, several([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0]])),
        lambda z: F.multilabel_margin_loss(z, several([[1, 2, -1, 0, 0], [0, 3, -1, 0, 0]])),
        Cause.TARGETS_OUT_OF_RANGE,
    ),
    "margin": (
        lambda z: F.multi_margin_loss(z.softmax(1), torch.arange(N) % C),
        lambda z: F.multi_margin_loss(z, torch.arange(N) % C),
        Cause.OUTPUT_RANGE,
    ),
    "triplet": (
        lambda z: F.triplet_margin_loss(z, z, z.roll(1, 0)),
        lambda z: F.triplet_margin_loss(z, z + 0.1 * torch.randn(N, C), z.roll(1, 0)),
        Cause.PAIR_IDENTICAL,
    ),
}


@pytest.mark.parametrize("case", WRONG_AND_RIGHT)
def test_what_it_is_not_made_for_is_found_and_the_rest_left_alone(case):
    wrong, right, cause = WRONG_AND_RIGHT[case]
    ((found, _),) = told(wrong)
    assert found == cause and told(right) == []


def test_a_module_of_torch_is_seen_as_its_function():
    criterion = nn.CosineEmbeddingLoss()
    ((cause, sentence),) = told(lambda z: criterion(z[:, :2], z[:, 2:4], signs(True)))
    assert cause == Cause.TARGETS_OUT_OF_RANGE and "50 % of them" in sentence


def test_the_two_tables_name_the_same_functions_all_of_torch():
    assert set(DOMAIN_RULES) == set(DOMAIN_MEASURES) and all(hasattr(F, name) for name in DOMAIN_RULES)


def test_three_calls_are_needed():
    def verdict(looked):
        facts = (DomainFacts("ctc_loss", looked, 1, {"blank": 0.1}, {"blank": 0.2}),)
        return diag.loss_domain(loop=Loop(step=9, domains=facts)).verdict()

    assert verdict(3).level == "alarm" and "20 % of the symbols" in verdict(3).sentence
    assert verdict(2).level == "ok"


def test_several_findings_come_in_the_order_of_the_table():
    shares = {"exponential twice": 1.0, "negative counts": 0.5, "broadcast": 1.0}
    facts = (DomainFacts("poisson_nll_loss", 3, 1, shares, shares),)
    found = diag.loss_domain(loop=Loop(step=9, domains=facts)).found
    said = [
        DOMAIN_RULES["poisson_nll_loss"][n].advice for n in ("broadcast", "negative counts", "exponential twice")
    ]
    assert [f["advice"] for f in found] == said


def test_without_such_a_function_nothing_is_said():
    assert diag.loss_domain(loop=Loop(step=9)).verdict().level == "not_applicable"
