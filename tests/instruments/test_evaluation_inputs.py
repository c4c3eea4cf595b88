"""Inputs of evaluation beside those of training: features prepared otherwise, columns that stand, ids that are new,
another vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.evaluation import column_order
from diag.watching.observe.loop.evaluation.column_order import columns_moved

ROWS, FEATURES, VOCABULARY = 256, 8, 60


class Bag(nn.Module):
    """A classifier of sequences or of ids."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 2)

    def forward(self, tokens):
        found = self.embedding(tokens)
        return self.out(found.mean(1) if tokens.ndim == 2 else found)


def told(inputs, evaluated, model=None):
    """The verdict on a training on these inputs, evaluated on others at the end of each epoch."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    labels = torch.arange(len(inputs)) % 2
    with diag.watch(model, instruments=["evaluation_inputs"]) as watcher:
        for _ in range(2):
            model.train()
            for rows in torch.randperm(len(inputs)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for part in evaluated.split(64):
                    model(part)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.run.findings()[0].verdict


def without_modes(evaluated, batch=32, every=8, train=None):
    """The verdict on a training of a model without dropout or batch norm, on which eval() is never called."""
    torch.manual_seed(0)
    train = torch.randn(ROWS, FEATURES) if train is None else train
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with diag.watch(model, instruments=["evaluation_inputs"]) as watcher:
        for step in range(24):
            rows = torch.randint(0, ROWS, (batch,))
            optimizer.zero_grad()
            F.mse_loss(model(train[rows]), train[rows, :1]).backward()
            optimizer.step()
            if step % every == every - 1:
                with torch.no_grad():
                    model(evaluated)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.run.findings()[0].verdict


def test_evaluations_of_a_model_without_modes_count_though_eval_is_never_called():
    filled = torch.randn(ROWS, FEATURES)
    filled[:, 3] = 0
    verdict = without_modes(filled)
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "Feature 3 is the same in all" in verdict.sentence
    assert without_modes(10 * torch.randn(ROWS, FEATURES)).cause == Cause.HELD_OUT_DIFFERS
    assert without_modes(torch.randn(ROWS, FEATURES)).level == "ok"


@pytest.mark.parametrize("rows, every", [(16, 8), (32, 8), (ROWS, 1)], ids=["acting", "a batch", "each step"])
def test_calls_in_training_mode_that_may_be_no_evaluation_do_not_count(rows, every):
    assert without_modes(10 * torch.randn(rows, FEATURES), every=every).level == "not_applicable"


def table(seed, n=ROWS):
    """Features of sizes far apart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, FEATURES, generator=generator) * torch.logspace(-2, 2, FEATURES) + torch.logspace(
        0, 2, FEATURES
    )


def standardised(x, like):
    return (x - like.mean(0)) / like.std(0)


def test_features_standardised_along_the_wrong_axis_are_told_though_all_entries_agree():
    train, test = table(0), table(1)
    wrong = (test - test.mean(1, keepdim=True)) / test.std(1, keepdim=True)
    verdict = told(standardised(train, train), wrong)
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "features have another mean or scale" in verdict.sentence


@pytest.mark.parametrize("shape", [(FEATURES,), (5, FEATURES), (FEATURES, 3, 3)], ids=["table", "series", "images"])
def test_quiet_where_both_are_prepared_alike(shape):
    train, test = (torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert told(train, test).level == "ok"


def test_channels_of_images_and_features_of_series_are_compared():
    most = torch.tensor([1.9, 0.2, 0.2, 0.2])  # of one size over all entries
    train = torch.randn(ROWS, 4, 6, 6)
    assert told(train, torch.randn(ROWS, 4, 6, 6) * most[:, None, None]).cause == Cause.HELD_OUT_DIFFERS
    assert told(torch.randn(ROWS, 6, 4), torch.randn(ROWS, 6, 4) * most).cause == Cause.HELD_OUT_DIFFERS
    one = torch.tensor([0.2, 1.0, 1.0, 1.0])
    assert told(train, torch.randn(ROWS, 4, 6, 6) * one[:, None, None]).level == "ok"


def test_a_column_that_stands_still_in_evaluation_is_told_by_its_number():
    train, test = torch.randn(ROWS, FEATURES), torch.randn(ROWS, FEATURES)
    test[:, 3] = 0.25
    verdict = told(train, test)
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "Feature 3 is the same in all 384 rows" in verdict.sentence
    rare = train.clone()
    rare[:, 3] = (torch.arange(ROWS) % 50 == 0).float()
    test[:, 3] = 0.0
    assert told(rare, test).level == "ok"


def test_ids_that_training_never_had_are_told_and_known_ones_are_quiet():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 40, (1024,), generator=generator)
    verdict = told(train, torch.randint(40, 60, (256,), generator=generator), Bag())
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "ids of input 1" in verdict.sentence
    assert told(train, torch.randint(0, 42, (256,), generator=generator), Bag()).level == "ok"


def walks(seed, renamed=None):
    """Sequences in which a token is followed by one of three."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, VOCABULARY, (ROWS,), generator=generator)]
    for _ in range(14):
        tokens.append((7 * tokens[-1] + torch.randint(0, 3, (ROWS,), generator=generator)) % VOCABULARY)
    found = torch.stack(tokens, 1)
    return found if renamed is None else renamed[found]


def test_another_vocabulary_in_evaluation_is_told_by_its_pairs():
    renamed = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))
    verdict = told(walks(0), walks(1, renamed), Bag())
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "one vocabulary" in verdict.advice
    assert told(walks(0), walks(1), Bag()).level == "ok"


def drawings(seed, n=512):
    """Images of which a part above and to the right is brighter, more or less."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 10, 10, generator=generator)
    x[:, :, :4, 5:9] += 2 * torch.rand(n, 1, 1, 1, generator=generator) + 1
    return x


MIRRORS = {
    "left to right": lambda x: x.flip(3),
    "upside down": lambda x: x.flip(2),
    "rows for columns": lambda x: x.transpose(2, 3),
    "left to right and upside down": lambda x: x.flip(2, 3),
}


@pytest.mark.parametrize("way", MIRRORS)
def test_images_that_are_all_turned_in_one_of_the_two_are_told(way):
    verdict = told(drawings(0), MIRRORS[way](drawings(1)))
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and way in verdict.sentence


def test_a_mirror_that_is_always_drawn_is_told_beside_one_that_is_drawn_half_of_the_time():
    half = torch.rand(512, 1, 1, 1, generator=torch.Generator().manual_seed(2)) < 0.5
    x = drawings(0).flip(3)
    verdict = told(torch.where(half, x.flip(2), x), drawings(1))
    assert "(left to right)" in verdict.sentence


@pytest.mark.parametrize("axes", [(3,), (2,), (2, 3)])
def test_augmentation_by_flips_of_half_of_the_rows_is_quiet(axes):
    half = torch.rand(512, 1, 1, 1, generator=torch.Generator().manual_seed(2)) < 0.5
    x = drawings(0)
    assert told(torch.where(half, x.flip(axes), x), drawings(1)).level == "ok"


def test_images_of_a_few_rows_that_come_again_are_quiet():
    few = torch.randn(40, 1, 10, 10, generator=torch.Generator().manual_seed(5))
    assert told(few.repeat(6, 1, 1, 1), torch.randn(40, 1, 10, 10).repeat(4, 1, 1, 1)).level == "ok"


def courses(seed, n=ROWS, length=24):
    """Sequences of two features, each a walk that comes back."""
    x = torch.randn(n, length, 2, generator=torch.Generator().manual_seed(seed))
    for i in range(1, length):
        x[:, i] = 0.8 * x[:, i - 1] + 0.6 * x[:, i]
    return x


def shuffled(x):
    order = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)).argsort(1)
    return x.gather(1, order[:, :, None].expand_as(x))


@pytest.mark.parametrize(("training", "turn"), [(True, False), (False, False), (True, True)])
def test_sequences_that_are_shuffled_within_rows_in_one_of_the_two_are_told(training, turn):
    x, y = (shuffled(courses(0)), courses(1)) if training else (courses(0), shuffled(courses(1)))
    x, y = (x.transpose(1, 2), y.transpose(1, 2)) if turn else (x, y)
    verdict = told(x.contiguous(), y.contiguous())
    assert verdict.cause == Cause.HELD_OUT_DIFFERS
    assert f"random in {'training' if training else 'evaluation'} alone" in verdict.sentence


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x + 0.5 * torch.randn(x.shape), shuffled])
def test_sequences_in_one_order_are_quiet_with_noise_too(change):
    assert told(change(courses(0)), courses(1) if change is not shuffled else shuffled(courses(1))).level == "ok"


def test_nothing_is_said_without_an_evaluation():
    assert told(torch.randn(ROWS, FEATURES), torch.randn(4, FEATURES)).level == "not_applicable"


def trained_on(model, inputs, labels, instrument, steps=40, rows=None):
    """The verdict of one check on a training on parts of these, or on all of them with the loss at some rows."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with diag.watch(model, instruments=[instrument]) as watcher:
        for step in range(steps):
            at = slice(None) if rows is not None else torch.arange(32 * step, 32 * step + 32) % len(inputs)
            chosen = slice(None) if rows is None else rows
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[at])[chosen], labels[at][chosen]).backward()
            optimizer.step()
    return watcher.run.findings()[0].verdict


def padded(tokens):
    """Sequences of unequal lengths, filled up with 0."""
    lengths = 6 + torch.arange(len(tokens)) % 9
    return tokens * (torch.arange(tokens.shape[1]) < lengths[:, None])


def test_tokens_that_are_mostly_the_unknown_one_are_told():
    labels, words = (
        torch.arange(ROWS) % 2,
        torch.randint(2, 400, (ROWS, 15), generator=torch.Generator().manual_seed(0)),
    )
    few = torch.where(torch.rand(ROWS, 15, generator=torch.Generator().manual_seed(1)) < 0.95, 1, 2 + words % 5)
    model = Bag()
    model.embedding = nn.Embedding(400, 8)
    verdict = trained_on(model, padded(few), labels, "tokens_differ")
    assert verdict.cause == Cause.INPUTS_CONSTANT and "are 1, of " in verdict.sentence
    assert trained_on(model, padded(words), labels, "tokens_differ").level == "ok"
    pixels = torch.where(few == 1, 0, words)  # mostly background, and all shades
    assert trained_on(model, pixels, labels, "tokens_differ").level == "ok"


def test_classes_missing_from_a_full_batch_are_told_though_only_some_rows_are_asked_for():
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(300, 6, generator=generator), torch.arange(300) * 3 // 300
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    verdict = trained_on(network, inputs, labels, "classes_asked", rows=torch.arange(100))
    assert verdict.cause == Cause.CLASS_MISSING and "2 of the 3 classes" in verdict.sentence
    drawn = torch.randperm(300, generator=generator)[:100]
    assert trained_on(network, inputs, labels, "classes_asked", rows=drawn).level == "ok"


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (diag.evaluation_inputs, "floating inputs of one shape were seen in training and in evaluation mode"),
        (diag.tokens_differ, "the model is not called with whole numbers"),
        (diag.target_values, "no targets of a loss were seen"),
    ],
)
def test_refused_with_the_reason_where_nothing_of_the_kind_was_seen(check, reason):
    verdict = check(loop=Loop(step=100)).verdict()
    assert verdict.level is Level.NOT_APPLICABLE and reason in verdict.sentence


# Columns in another order


def mixed(seed, n=ROWS):
    """Standardised features that differ in how they go together and are distributed, (n, 6)."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(n, generator=generator) for _ in range(3))
    x = torch.stack([a, a + 0.5 * b, b, b - c, c.exp(), torch.rand(n, generator=generator)], 1)
    return (x - x.mean(0)) / x.std(0)


@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5, 0], [5, 1, 2, 3, 4, 0], [0, 1, 4, 3, 2, 5]])
def test_columns_in_another_order_are_told(order):
    verdict = told(mixed(0), mixed(1)[:, order])
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "another order" in verdict.sentence
    first = next(place for place, other in enumerate(order) if place != other)
    assert f"column {first} is like training's {order[first]}" in verdict.sentence


def test_columns_that_nothing_tells_apart_are_quiet_in_any_order():
    train, test = (torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert told(train, test[:, [3, 4, 5, 0, 1, 2]]).level == "ok"


@pytest.mark.parametrize("seed", range(5))
def test_no_order_is_told_of_two_samples_of_one_source(seed):
    heavy = mixed(2 * seed).sinh(), mixed(2 * seed + 1).sinh()
    assert columns_moved(mixed(2 * seed), mixed(2 * seed + 1)) == columns_moved(*heavy) == ()


def test_columns_that_changed_and_fit_no_other_have_no_other_order():
    other = mixed(1)
    other[:, 1] = torch.randn(ROWS).pow(3)
    assert columns_moved(mixed(0), other) == columns_moved(mixed(0)[:20], mixed(1)[:, [1, 0, 2, 3, 4, 5]]) == ()


# Words that are unknown, sequences that are cut


def sentences(seed, n=ROWS, length=12, shortest=8):
    """Tokens from 2 on, filled up with 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (n, length), generator=generator)
    ends = torch.randint(shortest, length + 1, (n, 1), generator=generator)
    return tokens.where(torch.arange(length) < ends, 0)


def test_unknown_words_in_evaluation_are_told():
    text = sentences(1)
    unknown = torch.where((torch.rand(text.shape) < 0.4) & (text > 0), 1, text)
    verdict = told(sentences(0), unknown, Bag())
    assert verdict.cause == Cause.HELD_OUT_DIFFERS and "are 1, which was in none" in verdict.sentence


def test_sequences_that_are_cut_in_evaluation_are_told():
    cut = sentences(1)
    cut[:, 4:] = 0
    verdict = told(sentences(0), cut, Bag())
    assert "cut shorter" in verdict.sentence and "more than 4 tokens" in verdict.sentence


@pytest.mark.parametrize("shortest", [8, 1])
def test_sequences_that_differ_in_length_as_training_does_are_quiet(shortest):
    assert told(sentences(0, shortest=shortest), sentences(1, shortest=8), Bag()).level == "ok"


def test_the_distance_of_each_column_from_that_at_its_place_is_one_of_all_distances():
    rows = torch.Generator().manual_seed(0)
    own, other = (torch.randn(n, 7, generator=rows, dtype=torch.float64) for n in (100, 90))
    every = column_order._distances(own, other)
    assert torch.equal(column_order._distances_at_place(own, other), every.diagonal())


def lopsided(seed, *shape):
    """Light strokes on a dark ground, of rows that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    strokes = (torch.rand(ROWS, *shape, generator=generator) < 0.2).float()
    rows = 0.5 + 0.5 * torch.rand(ROWS, *(1 for _ in shape), generator=generator)
    return strokes * rows + 0.1 * torch.randn(ROWS, *shape, generator=generator)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 6, 6), (40, 2)], ids=["grey", "colours", "series"])
def test_inputs_that_are_turned_over_in_evaluation_are_told(shape):
    train, test = lopsided(0, *shape), lopsided(1, *shape)
    for reverse in (1 - test, -test):
        verdict = told(train, reverse)
        assert verdict.cause == Cause.HELD_OUT_DIFFERS and "turned over" in verdict.sentence
    standardised_test = (1 - test - train.mean()) / train.std()
    assert "turned over" in told((train - train.mean()) / train.std(), standardised_test).sentence


def test_quiet_on_inputs_that_are_not_turned_over():
    train, test = lopsided(0, 1, 9, 9), lopsided(1, 1, 9, 9)
    assert told(train, test).level == "ok"
    assert told(train, test + 0.3).level == "ok"  # another brightness
    normal = torch.randn(ROWS, 1, 9, 9)
    assert told(normal, -torch.randn(ROWS, 1, 9, 9)).level == "ok"  # symmetric: the reverse looks the same
    one = torch.cat([train, torch.randn(ROWS, 1, 9, 9)], 1)
    other = torch.cat([1 - test, torch.randn(ROWS, 1, 9, 9)], 1)
    assert told(one, other).level == "ok"  # one channel alone
