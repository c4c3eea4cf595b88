"""Two networks of a game: whether they oppose each other, and whether the generator can reach the data."""

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.result import OUR_CHOICE
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.games import GameFacts, GameLook
from diag.watching.observe.loop.formula.sides.games import Games
from diag.watching.observe.loop.moment import Moment

N, Z, D = 64, 4, 2
ONE, ZERO = torch.ones(N, 1), torch.zeros(N, 1)
bce = F.binary_cross_entropy_with_logits


class Game(nn.Module):
    def __init__(self, last=()):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(Z, 16), nn.LeakyReLU(0.2), nn.Linear(16, D), *last)
        self.judge = nn.Sequential(nn.Linear(D, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def by_two_calls(judge, real, fake, swap):
    a, b = (ZERO, ONE) if swap else (ONE, ZERO)
    (bce(judge(real), a) + bce(judge(fake), b)).backward()


def by_one_batch(judge, real, fake, swap):
    labels = torch.cat([ZERO, ONE] if swap else [ONE, ZERO])
    bce(judge(torch.cat([real, fake])), labels).backward()


def by_two_passes(judge, real, fake, swap):
    a, b = (ZERO, ONE) if swap else (ONE, ZERO)
    bce(judge(real), a).backward()
    bce(judge(fake), b).backward()


def by_hinge(judge, real, fake, swap):
    sign = -1 if swap else 1
    (F.relu(1 - sign * judge(real)).mean() + F.relu(1 + sign * judge(fake)).mean()).backward()


def by_critic(judge, real, fake, swap):
    sign = -1 if swap else 1
    (sign * (judge(fake).mean() - judge(real).mean())).backward()


def wants_the_label(out):
    return bce(out, ONE)


def wants_more(out):
    return -out.mean()


def by_one_label(judge, real, fake, swap):
    (bce(judge(real), ONE) + bce(judge(fake), ONE)).backward()


def by_one_label_in_two_passes(judge, real, fake, swap):
    bce(judge(real), ONE).backward()
    bce(judge(fake), ONE).backward()


GAMES = pytest.mark.parametrize(
    "judging, wants",
    [(by_two_calls, wants_the_label), (by_one_batch, wants_the_label), (by_two_passes, wants_the_label),
     (by_hinge, wants_more), (by_critic, wants_more)],
)  # fmt: skip


def train(game, judging, wants, steps=12, scale=1.0, center=2.0, swap=False, shared=False):
    both, own = game.parameters(), game.generator.parameters()
    of_generator = torch.optim.Adam(both if shared else own, 1e-3, betas=(0.5, 0.9))
    of_judge = torch.optim.Adam(game.judge.parameters(), 1e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        real = scale * (center + 0.5 * torch.randn(N, D))
        of_judge.zero_grad()
        judging(game.judge, real, game.generator(torch.randn(N, Z)).detach(), swap)
        of_judge.step()
        of_generator.zero_grad()
        wants(game.judge(game.generator(torch.randn(N, Z)))).backward()
        of_generator.step()


def told(judging=by_two_calls, wants=wants_the_label, last=(), dead=False, **about):
    torch.manual_seed(0)
    game = Game(last)
    if dead:
        nn.init.zeros_(game.generator[2].weight)
        game.generator[2].weight.requires_grad_(False)
    with diag.watch(game, instruments=["adversarial_losses"]) as watcher:
        train(game, judging, wants, **about)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher


@GAMES
def test_a_game_is_fine(judging, wants):
    assert not told(judging, wants, steps=60).findings


@pytest.mark.parametrize("swap", [False, True])
def test_a_generator_that_makes_one_point_is_told_from_the_data(swap):
    findings = told(steps=60, dead=True, swap=swap).findings
    assert [f.verdict.cause for f in findings] == [Cause.NETWORKS_COOPERATE if swap else Cause.MODE_COLLAPSE]


@pytest.mark.parametrize("judging", [by_one_label, by_one_label_in_two_passes])
def test_a_judge_that_is_asked_for_one_answer_is_named(judging):
    (finding,) = told(judging).findings
    assert finding.verdict.cause == Cause.NETWORKS_COOPERATE
    assert "one answer whatever it sees" in finding.verdict.sentence


def test_rows_that_cannot_be_told_apart_and_a_hinge_that_is_met_have_no_one_answer():
    """Data like what the generator makes; a judge that asks nothing of the data any more."""
    assert not told(by_one_label, center=0.0).findings

    def on_generated_rows_alone(judge, real, fake, swap):
        (F.relu(-1e6 - judge(real)).mean() + F.relu(1e6 + judge(fake)).mean()).backward()

    assert not told(on_generated_rows_alone, wants_more).findings


@GAMES
def test_labels_that_make_the_two_cooperate_are_named(judging, wants):
    (finding,) = told(judging, wants, swap=True).findings
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.NETWORKS_COOPERATE)


def test_a_generator_that_helps_the_judge_is_named():
    (finding,) = told(wants=lambda out: bce(out, ZERO)).findings
    assert finding.verdict.cause == Cause.NETWORKS_COOPERATE


def test_an_optimizer_of_both_beside_one_of_the_judge_is_named():
    (finding,) = told(shared=True).findings
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.PARAMETER_IN_TWO_OPTIMIZERS)
    assert "holds 4 of the discriminator's parameters" in finding.verdict.sentence


def test_data_of_another_scale_are_named():
    (finding,) = told(scale=200.0, center=0.0).findings
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.INPUTS_NOT_NORMALIZED)


@pytest.mark.parametrize("last", [nn.Tanh, nn.Sigmoid])
def test_data_that_the_generator_cannot_reach_are_named(last):
    (finding,) = told(last=[last()]).findings
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.OUTPUT_RANGE)
    assert not told(last=[last()], scale=0.2, steps=30).findings


def test_an_actor_and_its_critic_are_no_game():
    """An actor that a critic of states and actions judges: the critic's errors have both signs."""
    torch.manual_seed(0)
    model = Game()
    critic = torch.optim.Adam(model.judge.parameters(), 1e-3)
    actor = torch.optim.Adam(model.generator.parameters(), 1e-3)
    with diag.watch(model, instruments=["adversarial_losses"]) as watcher:
        for _ in range(40):
            critic.zero_grad()
            F.mse_loss(model.judge(torch.randn(N, D)), torch.randn(N, 1)).backward()
            critic.step()
            actor.zero_grad()
            (-model.judge(model.generator(torch.randn(N, Z))).mean()).backward()
            actor.step()
    assert not watcher.findings


def test_the_weights_are_those_without_a_watch():
    games = []
    for watched in (True, False):
        torch.manual_seed(0)
        games.append(Game())
        if watched:
            with diag.watch(games[0], instruments=["adversarial_losses"]):
                train(games[0], by_one_batch, wants_the_label, steps=30)
        else:
            train(games[1], by_one_batch, wants_the_label, steps=30)
    assert all(torch.equal(a, b) for a, b in zip(*(g.parameters() for g in games), strict=True))


def seen(step, **about):
    usual = {"alike": "down", "asked_for": "up", "generated": 0.5, "others": 1.0, "slope": 0.5, "bounded": "",
             "outside": 0.0}  # fmt: skip
    return GameLook(step, **(usual | about))


def judged(*looks):
    return diag.adversarial_losses(loop=Loop(99, games=GameFacts(looks))).verdict()


def test_a_loss_that_is_flat_for_long_is_named_and_one_that_is_zero_is_not():
    flat = [seen(k, slope=1e-8) for k in range(10, 15)]
    assert judged(seen(1), *flat).cause == Cause.LOSS_FLAT and judged(*flat).level == "ok"
    assert judged(seen(1), *flat[:4], seen(20)).level == "ok"


def test_a_generator_that_starts_at_zero_is_told_of_data_far_larger():
    """A last layer that starts at zero makes rows of zeros."""
    verdict = judged(*(seen(k, generated=0.0, others=50.0) for k in (1, 2, 3)))
    assert verdict.cause == Cause.INPUTS_NOT_NORMALIZED and "50 and 0 at step 1" in verdict.sentence
    assert verdict.threshold_source == OUR_CHOICE


def test_a_generator_that_is_given_one_input_for_all_rows_is_named():
    one = [seen(k, one_row=True, alike="", asked_for="up") for k in range(1, 5)]
    assert judged(*one).cause == Cause.MODE_COLLAPSE and judged(*one[:2]).level == "ok"
    assert judged(seen(1), *one).level == "ok"  # it has made other rows at first


@pytest.mark.parametrize("noise", [True, False])
def test_one_input_for_all_rows_is_seen_in_a_game(noise):
    torch.manual_seed(0)
    game = nn.ModuleDict({"maker": nn.Linear(4, 2), "judge": nn.Linear(2, 1)})
    steps = {name: torch.optim.SGD(game[name].parameters(), 0.01) for name in game}
    with diag.watch(game, instruments=["adversarial_losses"]) as watcher:
        for _ in range(12):
            z = torch.randn(16, 4) if noise else torch.ones(1, 4).expand(16, 4)
            x = 2 + torch.randn(16, 2)
            for name in ("judge", "maker"):
                game.zero_grad()
                made = game["judge"](game["maker"](z) if name == "maker" else game["maker"](z).detach())
                loss = F.softplus(-made).mean()
                if name == "judge":
                    loss = F.softplus(made).mean() + F.softplus(-game["judge"](x)).mean()
                loss.backward()
                steps[name].step()
    causes = {f.verdict.cause for f in watcher.run.findings()}
    assert (Cause.MODE_COLLAPSE in causes) == (not noise)


def test_it_is_said_at_how_many_rounds_the_two_opposed_each_other():
    unclear = seen(3, alike="", others=math.nan)
    assert "oppose each other at 2 of 3 rounds" in judged(seen(1), seen(2), unclear).sentence


def test_no_batch_outlives_its_step():
    """Neither the judge's batches nor generated rows wait for the garbage collector, and none for the next
    round."""
    torch.manual_seed(0)
    game = Game()
    games = Games(Moment(), {id(p): n for n, p in game.named_parameters()})
    kept = []

    def descend(rows, labels):
        kept.append(rows.untyped_storage()._weak_ref())
        loss = bce(game.judge(rows), labels)
        games.backward_called(loss.grad_fn)
        loss.backward()

    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            descend(torch.cat([torch.randn(N, D) + 2, torch.randn(N, D)]), torch.cat([ONE, ZERO]))
            descend(game.generator(torch.randn(N, Z)), ONE)
        descend(torch.cat([torch.randn(N, D) + 2, torch.randn(N, D)]), torch.cat([ONE, ZERO]))
        assert len(games.looks) >= 4 and all(map(torch.UntypedStorage._expired, kept))
    finally:
        gc.enable()


def test_few_looks_and_rows_that_are_not_told_apart_are_no_finding():
    same = [seen(k, alike="up") for k in (1, 2, 3)]
    assert judged(*same).cause == Cause.NETWORKS_COOPERATE and judged(*same[:2]).level == "ok"
    assert judged(*same, seen(4)).level == "ok"
    assert judged(*(seen(k, alike="", others=math.nan) for k in (1, 2, 3))).level == "ok"
    assert judged().level == "not_applicable"
