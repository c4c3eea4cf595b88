"""A language model that can see the next token is told, a causal one is not, and nothing else is judged."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause


class Reader(nn.Module):
    """A recurrent reader of tokens, one way (causal) or both."""

    def __init__(self, both_ways, tokens=11):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tokens, 16)
        self.gru = nn.GRU(16, 16, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(32 if both_ways else 16, tokens)

    def forward(self, tokens):
        return self.head(self.gru(self.embedding(tokens))[0])


def findings(model, shift=1, flat=True, steps=12):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with diag.watch(model, instruments=["answers_seen"]) as watcher:
        for _ in range(steps):
            text = torch.randint(11, (12, 20))
            x, y = text[:, : 20 - shift], text[:, shift:]
            z = model(x)
            loss = F.cross_entropy(z.flatten(0, 1), y.flatten()) if flat else F.cross_entropy(z.transpose(1, 2), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [f.verdict for f in watcher.findings], watcher.run.series("answers_seen")


@pytest.mark.parametrize("flat", [True, False])
def test_a_model_that_sees_later_tokens_is_told_at_the_first_step(flat):
    (verdict,), _ = findings(Reader(both_ways=True), flat=flat)
    assert verdict.cause == Cause.ANSWER_IN_INPUT and verdict.level == "alarm" and verdict.step == 1


def test_a_causal_model_is_fine():
    told, series = findings(Reader(both_ways=False))
    assert not told and series[-1][1].change == 0.0


class Speaker(Reader):
    """Computes its loss itself, from labels that it is given besides."""

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("both_ways", [True, False])
def test_labels_beside_the_tokens_are_not_taken_for_them(both_ways):
    model = Speaker(both_ways)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with diag.watch(model, instruments=["answers_seen"]) as watcher:
        for _ in range(12):
            text = torch.randint(11, (12, 20))
            optimizer.zero_grad()
            model(input_ids=text, labels=text)["loss"].backward()
            optimizer.step()
    assert [f.verdict.cause for f in watcher.findings] == [Cause.ANSWER_IN_INPUT] * both_ways


def test_other_targets_are_not_judged():
    told, series = findings(Reader(both_ways=True), shift=3)
    assert not told and series[-1][1].verdict().level == "not_applicable"


def test_a_model_without_tokens_is_refused():
    snapshot = diag.Snapshot(nn.Linear(4, 3), F.cross_entropy, (torch.randn(6, 4), torch.zeros(6).long()))
    with pytest.raises(diag.errors.MissingQuantity, match="reads no sequences"):
        snapshot.quantity("later_tokens")


class Masked(Reader):
    """Some positions may look at nothing, so that their outputs are not numbers; all of them: none is."""

    def __init__(self, every=False):
        super().__init__(both_ways=True)
        self.every = every

    def forward(self, tokens):
        out = super().forward(tokens)
        return torch.where(torch.arange(tokens.shape[1])[:, None] < (99 if self.every else 3), torch.nan, out)


def test_outputs_that_are_no_numbers_are_left_out():
    batch = (torch.randint(11, (8, 20)), torch.zeros(8, 20, dtype=torch.int64))
    snapshots = [diag.Snapshot(Masked(every), lambda out, y: out.nansum(), batch) for every in (False, True)]
    assert snapshots[0].quantity("later_tokens").change > 0.1
    with pytest.raises(diag.errors.MissingQuantity, match="not finite"):
        snapshots[1].quantity("later_tokens")


class Attentive(nn.Module):
    """One layer of attention with dropout, whose causal mask is made in these modes."""

    def __init__(self, masked_in_training, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.dropout, self.masked_in_training, self.norm = nn.Dropout(0.2), masked_in_training, norm

    def forward(self, tokens):
        x = self.dropout(self.embedding(tokens))
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        masked = self.masked_in_training or not self.training
        x = x + self.attention(x, x, x, attn_mask=mask if masked else None)[0]
        return self.head(x if self.norm is None else self.norm(x.transpose(1, 2)).transpose(1, 2))


def test_a_mask_that_training_goes_without_is_told():
    (verdict,), _ = findings(Attentive(masked_in_training=False))
    assert verdict.cause == Cause.ANSWER_IN_INPUT and "in training alone" in verdict.sentence


def test_a_mask_in_both_modes_is_fine_under_dropout():
    told, series = findings(Attentive(masked_in_training=True))
    assert not told and series[-1][1].in_training < 1e-5


def test_rows_that_see_each_other_in_training_are_not_judged_there():
    told, series = findings(Attentive(masked_in_training=True, norm=nn.BatchNorm1d(16)))
    assert not told and series[-1][1].in_training != series[-1][1].in_training
