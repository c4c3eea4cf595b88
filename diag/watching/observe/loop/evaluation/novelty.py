"""Tokens and pairs of tokens in evaluation that training never had: another vocabulary, or ids that were left out.

What is new in evaluation is compared with what was new in training's own batches: the tokens of later ones, and of
pairs, which are many, those of rows that came for the first time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.evaluated import NoveltyFacts
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment

INPUTS_FOLLOWED = 4
LARGEST_TOKEN, PAIRS_MARKED, MOST_MARKED = 1 << 22, 1 << 22, 1 << 18  # few are marked, so that few fall together
TOKENS_READ, ROWS_OF_TOKENS = 1 << 14, 256  # of a call
LATER_CALLS, EVALUATIONS_READ = 4, 8
FEWEST_TOKENS_OF_ROW = 5  # of a sequence, for its pairs to be read
ROWS_TOLD_APART = 1 << 14
ROWS_MEASURED, SHORTEST_TENTH = 512, 0.1  # rows whose lengths are kept


class _Seen:
    """What one of the inputs has held in training, and how much of it was new."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(1024, dtype=torch.bool)
        self.pairs = torch.zeros(0, dtype=torch.bool)  # made with the first sequences
        self.marked = 0
        self.rows: set[bytes] = set()
        self.new: deque[float] = deque(maxlen=LATER_CALLS)
        self.known_pairs: deque[tuple[int, int]] = deque(maxlen=LATER_CALLS)
        self.counts = torch.zeros(0, dtype=torch.int64)  # of the tokens of sequences, without what fills their ends
        self.told = [0, 0, 0, 0]  # evaluation: tokens, new ones, pairs, known ones
        self.known_then = math.nan
        self.lengths, self.evaluated_lengths = deque[int](maxlen=ROWS_MEASURED), deque[int](maxlen=ROWS_MEASURED)
        self.evaluated_counts = torch.zeros(0, dtype=torch.int64)

    def add(self, t: Tensor) -> None:
        """A call of training."""
        if (most := int(t.max())) >= len(self.tokens):
            more = torch.zeros(min(2 * most, LARGEST_TOKEN) - len(self.tokens) + 1, dtype=torch.bool)
            self.tokens = torch.cat([self.tokens, more])
        self.new.append(float((~self.tokens[t]).double().mean()))
        self.tokens[t.reshape(-1)] = True
        if t.ndim == 2 and t.shape[1] >= FEWEST_TOKENS_OF_ROW:
            self.counts = _counted(t, self.counts)
            self.lengths.extend(_lengths(t))
            self._add_pairs(t)

    def _add_pairs(self, t: Tensor) -> None:
        marks = [row.numpy().tobytes().rstrip(b"\0") for row in t]
        fresh = [i for i, mark in enumerate(marks) if mark not in self.rows]
        if not fresh or len(self.rows) > ROWS_TOLD_APART or self.marked > MOST_MARKED:
            return
        if not len(self.pairs):
            self.pairs = torch.zeros(PAIRS_MARKED, dtype=torch.bool)
        self.rows.update(marks[i] for i in fresh)
        found = pairs_in(t[fresh])
        known = int(self.pairs[found].sum())
        self.known_pairs.append((known, len(found)))
        self.marked += len(found) - known
        self.pairs[found] = True

    def evaluated(self, t: Tensor) -> None:
        """A call of an evaluation."""
        inside = t[t < len(self.tokens)]
        known = int(self.tokens[inside].sum())
        self.told[0] += t.numel()
        self.told[1] += t.numel() - known
        if t.ndim == 2 and t.shape[1] >= FEWEST_TOKENS_OF_ROW:
            self.evaluated_counts = _counted(t, self.evaluated_counts)
            self.evaluated_lengths.extend(_lengths(t))
        if t.ndim == 2 and t.shape[1] >= FEWEST_TOKENS_OF_ROW and self.known_pairs:
            found = pairs_in(t)
            self.told[2] += len(found)
            self.told[3] += int(self.pairs[found].sum())
            known_, all_ = (sum(n) for n in zip(*self.known_pairs, strict=True))
            self.known_then = known_ / all_ if all_ else math.nan

    def one_new(self) -> tuple[int, float]:
        """The most frequent token of evaluation that training never had, and its share; -1 where there is none."""
        counts = self.evaluated_counts.clone()
        known = self.tokens[: len(counts)]
        counts[: len(known)][known] = 0
        if not counts.any():
            return -1, math.nan
        return int(counts.argmax()), float(counts.max() / self.evaluated_counts.sum())


class Novelty:
    """Follows the whole numbers that the model is called with."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        sizes = [len(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        self._largest, self._moment = max(sizes, default=0), moment
        self._seen: dict[int, _Seen] = {}
        self._evaluations = 0

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        if self._largest:
            for number, t in _whole(args, kwargs):
                self._seen.setdefault(number, _Seen()).add(t)

    def evaluated(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called without gradients."""
        if not self._seen or self._evaluations >= EVALUATIONS_READ:
            return
        self._evaluations += 1
        for number, t in _whole(args, kwargs):
            if number in self._seen:
                self._seen[number].evaluated(t)
        self._moment.news(("novelty", self._evaluations), "novelty")

    def facts(self) -> tuple[NoveltyFacts, ...]:
        """As plain data."""
        return tuple(self._told(number, s) for number, s in self._seen.items())

    def _told(self, number: int, s: _Seen) -> NoveltyFacts:
        tokens, new, pairs, known = s.told
        one_new, one_share = s.one_new()
        return NoveltyFacts(
            number,
            tokens,
            new / tokens if tokens else math.nan,
            max(s.new, default=math.nan),
            self._largest,
            pairs,
            known / pairs if pairs else math.nan,
            s.known_then,
            counted=int(s.counts.sum()),
            distinct=int((s.counts > 0).sum()),
            common=int(s.counts.argmax()) if len(s.counts) else -1,
            share=float(s.counts.max() / s.counts.sum()) if s.counts.any() else math.nan,
            one_new=one_new,
            one_share=one_share,
            rows=len(s.lengths),
            evaluated_rows=len(s.evaluated_lengths),
            short=sorted(s.lengths)[int(SHORTEST_TENTH * len(s.lengths))] if s.lengths else 0,
            longest=max(s.evaluated_lengths, default=0),
        )


def _whole(args: Any, kwargs: Mapping[str, Any]) -> list[tuple[int, Tensor]]:
    """The tensors of whole numbers from zero on, with which of the call's tensors they are."""
    found = []
    for number, t in enumerate(tensors_in((args, dict(kwargs)))[:INPUTS_FOLLOWED], 1):
        whole = t.is_cpu and is_dense(t) and t.dtype in (torch.int64, torch.int32) and t.ndim in (1, 2)
        if not whole or not t.numel():
            continue
        t = (
            t.detach()[:TOKENS_READ]
            if t.ndim == 1
            else t.detach()[:ROWS_OF_TOKENS, : TOKENS_READ // ROWS_OF_TOKENS * 4]
        )
        if int(t.min()) >= 0 and int(t.max()) < LARGEST_TOKEN:
            found.append((number, t.long().contiguous()))
    return found


def _inside(t: Tensor) -> Tensor:
    """Which tokens of rows (n, length) are no last one, nor one like it that fills the end of its row."""
    return ~(t == t[:, -1:]).flip(1).long().cumprod(1).bool().flip(1)


def _counted(t: Tensor, before: Tensor) -> Tensor:
    """How often each token occurs in rows, without what fills their ends, added to what was counted before."""
    counts = torch.bincount(t[_inside(t)], minlength=len(before))
    counts[: len(before)] += before
    return counts


def _lengths(t: Tensor) -> list[int]:
    """The length of each row without what fills its end, which is one token twice or more."""
    inside = _inside(t).sum(1)
    return torch.where(inside == t.shape[1] - 1, t.shape[1], inside).tolist()


def pairs_in(t: Tensor) -> Tensor:
    """Where the pairs of neighbouring, different tokens (rows, length) are marked."""
    first, second = t[:, :-1], t[:, 1:]
    found = (first * 1000003 + second * 7919) % PAIRS_MARKED
    return found[first != second]
