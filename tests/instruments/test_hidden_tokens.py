"""Masked language models whose answers stand in the input, stand beside the masks, or are mostly nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.data.hidden_tokens import TokensAsked
from diag.watching.observe.loop.data.sequences import facts_of

MASK, KINDS, LENGTH = 1, 30, 24


def masked(seed, change=None, kept=0.1, rate=0.15):
    """Tokens as BERT gets them: of the places asked for a tenth keep their token and a tenth have another one."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, KINDS, (32, LENGTH), generator=g)
    tokens[:, LENGTH - 4 :][torch.rand(32, generator=g) < 0.5] = 0  # padding
    asked = (torch.rand(tokens.shape, generator=g) < rate) & (tokens > 0)
    draw = torch.rand(tokens.shape, generator=g)
    x = tokens.clone()
    x[asked & (draw >= 0.1 + kept)] = MASK
    other = asked & (draw < 0.1)
    x[other] = torch.randint(2, KINDS, (int(other.sum()),), generator=g)
    y = torch.where(asked, tokens, -100)
    return change(x, y, tokens) if change else (x, y)


def verdict_of(change=None, outputs=KINDS, **how):
    looks = []
    for seed in range(6):
        x, y = masked(seed, change, **how)
        looks.append(TokensAsked(x, y, y != -100, outputs))
    return diag.token_targets(loop=Loop(step=10, sequences=facts_of(looks))).verdict()


FAULTS = {
    "not masked": (lambda x, y, t: (t, y), Cause.ANSWER_IN_INPUT, "100 %"),
    "labels rolled": (lambda x, y, t: (x, y.roll(1, 1)), Cause.TARGETS_SHIFTED, "one place before"),
    "inputs rolled": (lambda x, y, t: (x.roll(2, 1), y), Cause.TARGETS_SHIFTED, "2 places after"),
    "no index is ignored": (lambda x, y, t: (x, y.clamp(min=0)), Cause.IGNORED_LABELS_COUNTED, "ignore_index=0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_the_places_asked_for_is_told(fault):
    change, cause, said = FAULTS[fault]
    verdict = verdict_of(change)
    assert verdict.level == "warning"
    assert verdict.cause == cause
    assert said in verdict.sentence + verdict.advice


def test_copying_nearly_all_places_is_told_and_an_autoencoder_of_noisy_tokens_is_not():
    assert verdict_of(lambda x, y, t: (x, t), rate=0.01, kept=-0.1).cause == Cause.ANSWER_IN_INPUT

    def corrected(x, y, tokens):
        wrong = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.02
        return torch.where(wrong, torch.randint(2, KINDS, tokens.shape), tokens), tokens

    assert verdict_of(corrected).level == "ok"


HEALTHY = {
    "BERT": {},
    "a third of the tokens are kept": {"kept": 0.33},
    "all places, and many are hidden": {"change": lambda x, y, t: (x, t)},
    "next tokens": {"change": lambda x, y, t: (t, t.roll(-1, 1))},
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_masked_models_that_are_as_meant_are_left_alone(kind):
    assert verdict_of(**HEALTHY[kind]).level == "ok"


def test_classes_that_are_no_tokens_and_losses_that_weigh_places_are_not_judged():
    def tags(x, y, tokens):
        return tokens, torch.where(tokens == MASK, 3, tokens % 4)

    assert verdict_of(tags, outputs=4).level == "not_applicable"
    assert verdict_of(FAULTS["no index is ignored"][0], outputs=0).level == "not_applicable"


@pytest.mark.parametrize("hides", [True, False])
def test_a_watch_sees_it_while_training(hides):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(KINDS, 8), nn.Linear(8, KINDS))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["token_targets"]) as watcher:
        for step in range(8):
            x, y = masked(step, None if hides else FAULTS["not masked"][0])
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watcher.run.findings()[0].verdict.level == ("ok" if hides else "warning")
