"""Targets that stand at other places than what they belong to: tags of tokens, masks of images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import diag
from diag.instruments.causes import Cause
from diag.instruments.loss.places_match import places_match
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.places import SequenceFacts
from diag.watching.observe.loop.data.hidden_tokens import TokensAsked
from diag.watching.observe.loop.data.masks import Masks, fitting, related
from diag.watching.observe.loop.data.sequences import facts_of
from diag.watching.observe.loop.moment import Moment

TOKENS, TAGS = 24, 5


def rows(generator, n=24, longest=20):
    """Rows of tokens whose neighbours are often alike, so that tags a few places away say something too."""
    found = []
    for length in torch.randint(8, longest + 1, (n,), generator=generator).tolist():
        fresh = torch.randint(1, TOKENS, (length,), generator=generator)
        stays = torch.rand(length, generator=generator) < 0.75
        for i in range(1, length):
            if stays[i]:
                fresh[i] = fresh[i - 1]
        found.append(fresh)
    return found


def tags_of(tokens):
    return tokens % TAGS


def look(change, seed=0, **how):
    tokens = rows(torch.Generator().manual_seed(seed))
    tags = [change(tags_of(t)) for t in tokens]
    y = pad_sequence(tags, batch_first=True, padding_value=-100)
    x = pad_sequence(tokens, batch_first=True)
    if how.get("left"):
        x = pad_sequence([t.flip(0) for t in tokens], batch_first=True).flip(1)
    return TokensAsked(x, y, y != -100)


def verdict_of(change, **how):
    facts = facts_of([look(change, seed, **how) for seed in range(4)])
    return facts, places_match(Loop(step=10, sequences=facts)).verdict()


@pytest.mark.parametrize(
    ("change", "cause", "said"),
    [
        (lambda y: y.roll(3), Cause.TARGETS_SHIFTED, "3 places before"),
        (lambda y: y.roll(-2), Cause.TARGETS_SHIFTED, "2 places further on"),
        (lambda y: y.flip(0), Cause.TARGETS_MISPLACED, "other end of the row"),
    ],
)
def test_tags_that_are_shifted_or_reversed_are_told_with_the_place(change, cause, said):
    _, verdict = verdict_of(change)
    assert verdict.cause == cause
    assert said in verdict.sentence


@pytest.mark.parametrize("seed", range(3))
def test_tags_of_other_rows_share_by_chance_what_is_not_called_a_shift(seed):
    """Longer rows of many tokens share much with any tags over few places, most at those farthest away."""
    generator = torch.Generator().manual_seed(seed)
    looks = []
    for _ in range(3):
        x = torch.randint(1, 100, (24, 12), generator=generator).sort(1).values  # what comes late is a large number
        y = (x // 20).roll(5, 0)
        looks.append(TokensAsked(x, y, torch.ones_like(x, dtype=torch.bool)))
    facts = facts_of(looks)
    assert facts.best < 0.1 * facts.entropy
    assert places_match(Loop(step=10, sequences=facts)).verdict().level == "ok"


def test_padding_at_opposite_ends_is_an_alarm():
    facts, verdict = verdict_of(lambda y: y, left=True)
    assert facts.opposite == facts.padded > 60
    assert verdict.level == "alarm"
    assert "opposite ends" in verdict.sentence


def test_information_at_the_place_is_the_entropy_of_tags_that_follow_from_tokens():
    facts, verdict = verdict_of(lambda y: y)
    assert facts.here == pytest.approx(facts.entropy, rel=0.05)  # but for the correction of its bias
    assert facts.best < facts.here / 1.5
    assert verdict.level == "ok"


@pytest.mark.parametrize("delay", [1, 3])
def test_tasks_about_other_places_of_random_tokens_are_left_alone(delay):
    """To tell the token of some places before: what stands at the place says nothing by itself."""
    generator = torch.Generator().manual_seed(1)
    looks = []
    for _ in range(4):
        x = torch.randint(0, TOKENS, (24, 20), generator=generator)
        y = tags_of(x).roll(delay, 1)
        y[:, :delay] = 0
        looks.append(TokensAsked(x, y, torch.ones_like(y, dtype=torch.bool)))
    assert places_match(Loop(step=10, sequences=facts_of(looks))).verdict().level == "ok"


def test_masked_tokens_are_not_judged_as_tags():
    """A few places a row count: what is asked there is not what stands there."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, TOKENS, (64, 20), generator=generator)
    asked = torch.rand(x.shape, generator=generator) < 0.15
    facts = facts_of([TokensAsked(x.masked_fill(asked, 0), torch.where(asked, x, -100), asked)])
    assert facts == SequenceFacts()
    assert places_match(Loop(step=10, sequences=facts)).verdict().level == "not_applicable"


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(TOKENS, 16), nn.Linear(16, TAGS)

    def forward(self, x):
        return self.layer(self.embedding(x))


def tagged(change, filled_tag=-100, steps=8):
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["places_match"]) as watcher:
        for step in range(steps):
            tokens = rows(torch.Generator().manual_seed(step))
            y = pad_sequence([change(tags_of(t)) for t in tokens], batch_first=True, padding_value=filled_tag)
            z = model(F.pad(pad_sequence(tokens, batch_first=True), (0, 10)))
            y = F.pad(y, (0, 10), value=filled_tag)
            optimizer.zero_grad()
            F.cross_entropy(z.reshape(-1, TAGS), y.reshape(-1)).backward()
            optimizer.step()
    return watcher.run.findings()[0].verdict


def test_in_a_watched_loop_with_the_places_put_in_one_row():
    assert tagged(lambda y: y).level == "ok"
    assert tagged(lambda y: y.roll(2)).cause == Cause.TARGETS_SHIFTED


def test_padding_that_counts_with_a_class_that_stands_elsewhere_too():
    verdict = tagged(lambda y: y, filled_tag=0)
    assert verdict.cause == Cause.IGNORED_LABELS_COUNTED
    assert "Padding counts" in verdict.sentence


# Masks


def pictures(n=16, side=24, seed=0):
    """Noisy images of a bright ellipse away from the middle, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(side).float()
    centre = 4 + (side - 8) * torch.rand(n, 2, generator=generator)
    size = 2 + 3 * torch.rand(n, 2, generator=generator)
    y, x = ((at - centre[:, i, None]) / size[:, i, None] for i in (0, 1))
    masks = (y[:, :, None] ** 2 + x[:, None, :] ** 2 < 1).float()[:, None]
    return masks + 0.3 * torch.randn(masks.shape, generator=generator), masks


@pytest.mark.parametrize(
    ("turn", "name", "shift"),
    [
        (lambda m: m.flip(-1), "left to right", (0, 0)),
        (lambda m: m.transpose(-1, -2), "rows for columns", (0, 0)),
        (lambda m: m.roll(5, -1), "", (0, -5)),
    ],
)
def test_masks_turned_or_moved_against_images_are_found_without_a_network(turn, name, shift):
    images, masks = pictures()
    found = related(images, turn(masks))
    assert (found.turned, found.shift) == (name, shift)
    assert found.best > 2 * max(found.related, found.unrelated)
    whole = related(images, masks)
    assert (whole.turned, whole.shift) == ("", (0, 0))
    assert whole.best == whole.related


def test_answers_that_fit_the_masks_of_half_of_the_rows_turned():
    images, masks = pictures(24)
    part = torch.arange(24) % 2 == 0
    asked = torch.where(part[:, None, None, None], masks.flip(-1), masks)
    found = fitting(images, asked)
    assert found.turned["left to right"] >= 0.3 * found.rows
    assert found.as_given >= 0.3 * found.rows
    assert sum(fitting(images, masks).turned.values()) == 0
    noise = fitting(torch.randn(24, 1, 24, 24, generator=torch.Generator().manual_seed(0)), asked)
    assert noise.turned["left to right"] <= 3


def segmented(augment, channels=1, steps=200, own=lambda m: m, dropout=0.0):
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, channels, 3, padding=1)
    model = nn.Sequential(*parts)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    with diag.watch(model, instruments=["places_match"]) as watcher:
        for step in range(steps):
            x, y = augment(*pictures(seed=step % 20), step)
            y = own(y)
            z = model(x)
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(z, y) if channels == 1 else F.cross_entropy(z, y[:, 0].long())
            (loss + 0.1 * (1 - (z.sigmoid()[:, -1:] * y).sum() / (y.sum() + 1))).backward()
            optimizer.step()
    return watcher.run.findings()[0].verdict


def flipped_together(x, y, step):
    return (x.flip(-1), y.flip(-1)) if step % 2 else (x, y)


def flipped_alone(x, y, step):
    part = torch.rand(len(x), 1, 1, 1, generator=torch.Generator().manual_seed(step)) < 0.5
    return torch.where(part, x.flip(-1), x), y


@pytest.mark.parametrize("channels", [1, 2])
def test_a_flip_of_the_images_alone_is_told_in_a_watched_loop(channels):
    assert segmented(flipped_together, channels).level == "ok"
    verdict = segmented(flipped_alone, channels)
    assert verdict.cause == Cause.TARGETS_MISPLACED
    assert "turned left to right" in verdict.sentence


def test_masks_of_other_images_and_masks_that_are_moved():
    others = segmented(lambda x, y, step: (x, y), own=lambda m: m.roll(1, 0))
    assert others.cause == Cause.LABELS_SHUFFLED
    moved = segmented(lambda x, y, step: (x, y), own=lambda m: m.roll(6, -2), steps=20)
    assert moved.cause == Cause.TARGETS_MISPLACED
    assert "moved by 6 pixels up" in moved.sentence


ONE_PICTURE = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "alike",
    [
        lambda x, at: torch.full_like(x, 0.3),
        lambda x, at: (200 * torch.rand(len(x), 1, 1, 1, generator=at)).expand_as(x),  # each of one grey
        lambda x, at: ONE_PICTURE.expand_as(x),
    ],
)
def test_images_that_are_all_alike_say_nothing_of_their_masks(alike):
    """Dropout makes the answers differ, which then are like no mask more than like another."""
    at = torch.Generator().manual_seed(1)
    verdict = segmented(lambda x, y, step: (alike(x, at), y), dropout=0.5)
    assert verdict.level == "not_applicable"
    assert "images that differ" in verdict.sentence


@pytest.mark.parametrize(("n", "side", "block"), [(48, 24, 1), (8, 150, 4)])
@pytest.mark.parametrize("classes", [1, 2])
def test_many_rows_and_large_images_are_compared_too(n, side, block, classes):
    images, masks = pictures(n, side)
    function = "binary_cross_entropy_with_logits" if classes == 1 else "cross_entropy"
    for moved, level in ((0, "ok"), (6 * block, "warning")):
        followed, asked = Masks(Moment()), masks.roll(-moved, -2)
        for _ in range(3):
            followed.training_call((images,), {})
            answers = images if classes == 1 else torch.cat([-images, images], 1)
            followed.loss_called(function, (answers, asked if classes == 1 else asked[:, 0].long()), {})
        facts = followed.facts()
        assert (facts.images, facts.block, facts.best_shift) == (3, block, (moved // block, 0))
        verdict = places_match(Loop(step=10, masks=facts)).verdict()
        assert verdict.level == level
        by = f"moved by {'about ' if block > 1 else ''}{moved} pixels down, a mask"
        assert not moved or by in verdict.sentence


def test_masks_are_compared_with_the_image_that_differs_of_several():
    images, masks = pictures()
    followed = Masks(Moment())
    for _ in range(2):
        followed.training_call((torch.full_like(images, 0.3), images), {})
        followed.loss_called("binary_cross_entropy_with_logits", (images, masks), {})
    facts = followed.facts()
    assert facts.images == 2
    assert facts.related == pytest.approx(related(images, masks).related) and facts.related > 0.5


def test_inputs_and_targets_of_neither_kind_are_refused():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["places_match"]) as watcher:
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
    verdict = watcher.run.findings()[0].verdict
    assert verdict.level == "not_applicable"
    assert "neither tags of tokens nor masks" in verdict.sentence
