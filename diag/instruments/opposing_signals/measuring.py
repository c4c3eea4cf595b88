"""Move the parameters, watch every example's loss, and name the two groups at the ends of the movement.

For `diag.opposing_signals`: kicks along sharp directions, a replay of descent, and what the gradients say of
the groups. Source: Rosenfeld and Risteski, ICLR 2024, arXiv:2311.04163.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.curvature.examples import curvature_shares
from diag.curvature.neighbourhood.losses_at import LossesAt
from diag.curvature.operators import CurvatureOperator
from diag.display import format_number
from diag.errors import DiagError, InvalidInput, MissingQuantity, Unsupported
from diag.gradients import PerExampleGradients
from diag.instruments.opposing_signals.loss_record import EDGE, LEAST_STEPS, LossRecord
from diag.instruments.opposing_signals.movement import (
    correlation,
    ends,
    lag_one,
    leading_mode,
    rank_auc,
    share,
    swap_and_persistence,
)

KICK = 0.3  # over the root of the curvature: a step of 0.045 in the mean loss, small against most losses
REPLAY_STEP = 2.5  # over the curvature: beyond 2 the sharpest direction oscillates and grows
REPLAY_STEPS, REPLAY_WINDOW = 40, 15


@dataclass(frozen=True)
class Groups:
    """Rows a (losses rise most) and b (fall most), and the numbers of their movement, by result field.

    `direction`: index of the direction that separates them, 0 the sharpest.
    """

    a: Tensor
    b: Tensor
    direction: int
    numbers: dict[str, Any]

    @property
    def rows(self) -> Tensor:
        """The rows of A, then those of B."""
        return torch.cat([self.a, self.b])

    def members(self, n: int) -> Tensor:
        """(n,) bool: the rows that are in either group."""
        return torch.zeros(n, dtype=torch.bool).index_fill_(0, self.rows, True)


def group_size(k: int, n: int) -> int:
    """The size of each of the two groups; `k` 0 for the default of 2 % of n, at least 10.

    Raises InvalidInput for a k that does not fit, Unsupported where n is too small for the default.
    """
    if k < 0 or 2 * k > n:
        raise InvalidInput(f"k is {k} for {n} examples; expected 0 (2 % of them, at least 10) up to half of them.")
    k = k or max(10, round(0.02 * n))
    if n < 4 * k:
        raise Unsupported(f"{n} examples are too few for two groups of {k}; give at least {4 * k}, or a smaller k.")
    return k


def kick(losses_at: LossesAt, direction: Tensor, curvature: float) -> Tensor:
    """(n,): l(w + e u) - l(w - e u), where e = 0.3 / sqrt(curvature) and u is the unit vector `direction` (P,)."""
    step = KICK / math.sqrt(curvature) * direction.to(losses_at.center)
    return losses_at(losses_at.center + step) - losses_at(losses_at.center - step)


def static_groups(losses_at: LossesAt, vectors: Tensor, values: Tensor, k: int) -> Groups:
    """Kick both ways along each unit row of `vectors` with positive curvature `values`; of all, keep the groups
    of k that carry the largest share of the movement."""
    losses, found = losses_at(losses_at.center), []
    for i in (values > 0).nonzero().flatten().tolist():
        change = kick(losses_at, vectors[i], float(values[i]))
        a, b = ends(change, k)
        numbers = {
            "share": share(change, torch.cat([a, b])),
            "changes": group_means(change[None], a, b),
            "loss_correlation": correlation(change.abs(), losses),
        }
        found.append(Groups(a, b, i, numbers))
    best = max(found, key=lambda groups: groups.numbers["share"])
    shares = torch.full((len(values),), math.nan, dtype=torch.float64)
    shares[[g.direction for g in found]] = torch.tensor([g.numbers["share"] for g in found], dtype=torch.float64)
    unseen = dict.fromkeys(("swap", "persist", "antiphase", "lag_one", "spike"), math.nan)
    untraced = {"shares": shares, "trace": torch.zeros(0, 3, dtype=torch.float32)}
    return Groups(best.a, best.b, best.direction, best.numbers | unseen | untraced)


def check_request(mode: str, window: int, record: LossRecord | None, n: int) -> None:
    """Raise InvalidInput for another mode or window or a record of other than n examples, MissingQuantity where
    the mode needs a record and there is none."""
    if mode not in ("auto", "static", "replay", "online"):
        raise InvalidInput(f"mode is {mode!r}; expected 'auto', 'static', 'replay' or 'online'.")
    if window != 0 and window < LEAST_STEPS:
        raise InvalidInput(f"window is {window}; expected at least {LEAST_STEPS} steps, or 0 for none.")
    if mode == "online" and record is None:
        raise MissingQuantity(
            "loss_record is missing, which mode='online' judges; measure inside diag.watch, or pass loss_record=."
        )
    if record is not None and record.num_examples != n:
        raise InvalidInput(
            f"The record is of {record.num_examples} examples and the data of {n}; give the "
            "record of the same examples."
        )


def chosen_record(
    mode: str, record: LossRecord | None, k: int, swap_limit: float
) -> tuple[LossRecord | None, tuple[str, ...]]:
    """The record that is to be judged in this mode, if any, and in a note why another is not."""
    if record is None or mode == "online":
        return record, ()
    why_not = _unjudged(record, k, swap_limit) if mode == "auto" else ""
    return (record, ()) if mode == "auto" and not why_not else (None, (why_not,) if why_not else ())


def _unjudged(record: LossRecord, k: int, swap_limit: float) -> str:
    """In a sentence, what a record showed on which nothing can be said, and why; empty where it can be judged.

    It can where its preconditions hold and the ends trade places: before they do, a kick along the sharpest
    directions shows more.
    """
    seen = groups_of_record(record.losses, k).numbers
    unmet = next((p.detail for p in record.preconditions() if not p.holds), "")
    if not unmet and seen["swap"] >= swap_limit:
        return ""
    swap, persist, antiphase = (format_number(seen[name]) for name in ("swap", "persist", "antiphase"))
    return (
        f"Recorded from step {record.steps[0]:,} to {record.steps[-1]:,}: swap {swap}, persist {persist}, "
        f"antiphase {antiphase}; a kick is judged instead, because {unmet or 'no oscillation shows in that yet.'}"
    )


def about_record(record: LossRecord | None, groups: Groups, edge: tuple[float, float] = EDGE) -> dict[str, Any]:
    """The fields of a result that a record gives, and for a replay or a kick what stands in their place."""
    if record is None:
        steps = tuple(range(len(groups.numbers["trace"])))
        return {"steps": steps, "edge_first": math.nan, "edge_last": math.nan}
    return {
        "steps": record.steps,
        "edge_first": record.ratios[0],
        "edge_last": record.ratios[1],
        "preconditions": record.preconditions(edge),
    }


def replayed_groups(losses_at: LossesAt, vectors: Tensor, values: Tensor, k: int) -> Groups:
    """Groups and their behaviour over the last 15 steps of a replay (see `replay`)."""
    record = replay(losses_at, float(values[0]))
    if len(record) < 6:
        raise Unsupported(
            f"The replay's mean loss doubled after {len(record)} steps, before a pattern could show; use the "
            "static mode here."
        )
    found = groups_of_record(record[-REPLAY_WINDOW - 1 :], k)
    return Groups(found.a, found.b, 0, found.numbers)


def replay(losses_at: LossesAt, curvature: float) -> Tensor:
    """(T + 1, n): losses along full-batch descent from here at 2.5 / curvature, on a copy of the parameters.

    Ends after 40 steps, or when the mean loss has doubled or is not finite.
    """
    point = losses_at.center.clone()
    record: list[Tensor] = []
    for _ in range(REPLAY_STEPS + 1):
        losses, gradient = losses_at.step(point)
        if record and not float(losses.mean()) <= 2 * float(record[0].mean()):
            break
        record.append(losses)
        point -= (REPLAY_STEP / curvature) * gradient
    return torch.stack(record)


def groups_of_record(record: Tensor, k: int) -> Groups:
    """The two ends of the leading mode of the changes, from losses (T + 1, n) at consecutive steps."""
    changes = record.diff(dim=0)
    a, b = ends(leading_mode(changes), k)
    swap, persist = swap_and_persistence(changes, k)
    means, mean = group_means(changes, a, b), record.mean(1)
    carried = share(changes, torch.cat([a, b]))
    numbers = {
        "share": carried,
        "shares": torch.tensor([carried], dtype=torch.float64),
        "swap": swap,
        "persist": persist,
        "antiphase": correlation(means[:, 0], means[:, 1]),
        "lag_one": lag_one(means[:, 0]),
        "spike": float((mean[1:] / mean[:-1]).max()) if len(record) > 1 else math.nan,
        "changes": means,
        "trace": group_means(record, a, b),
        "loss_correlation": correlation(changes.abs().mean(0), record.mean(0)),
    }
    return Groups(a, b, -1, numbers)


def group_means(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(T, 3): the means of (T, n) over A, over B and over the rest."""
    rest = torch.ones(values.shape[1], dtype=torch.bool).index_fill_(0, torch.cat([a, b]), False)
    return torch.stack([values[:, a].mean(1), values[:, b].mean(1), values[:, rest].mean(1)], 1)


def null_share(losses_at: LossesAt, curvature: float, k: int, count: int, seed: int) -> float:
    """The largest share of top and bottom k after `count` kicks of the same length in random directions."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        direction = torch.randn(len(losses_at.center), generator=generator, dtype=torch.float64)
        change = kick(losses_at, direction / torch.linalg.vector_norm(direction), curvature)
        found.append(share(change, torch.cat(ends(change, k))))
    return max(found)


def about_gradients(gradients: PerExampleGradients, u: Tensor, groups: Groups, losses: Tensor) -> dict[str, Any]:
    """Slopes along the direction u, the groups' own gradients, and how well size alone names the members."""
    n, members = len(losses), groups.members(len(losses))
    slopes = gradients.project(u)[:, 0]
    parts = [groups.a, groups.b, (~members).nonzero().flatten()]
    gram = torch.stack(list(gradients.group_gram_by_layer(parts).values())).sum(0)
    norms = gram.diag().clamp_min(0).sqrt()
    products = gradients.select(groups.rows.tolist()).gram()
    lengths = products.diag().clamp_min(0).sqrt()
    smallest = torch.finfo(torch.float64).tiny  # a zero gradient has cosine 0 with every other
    a, b = float(slopes[groups.a].mean()), float(slopes[groups.b].mean())
    return {
        "slope_a": a,
        "slope_b": b,
        "same_side": a * b > 0,
        "slope_auc": rank_auc(slopes.abs(), members),
        "norm_auc": rank_auc(gradients.norms(), members),
        "loss_auc": rank_auc(losses, members),
        "cosine": float(gram[0, 1] / (norms[0] * norms[1]).clamp_min(smallest)),
        "norm_a": float(norms[0] / len(groups.a)),
        "norm_b": float(norms[1] / len(groups.b)),
        "norm_rest": float(norms[2] / max(n - len(groups.rows), 1)),
        "cosines": products / (lengths[:, None] * lengths[None, :]).clamp_min(smallest),
    }


def curvature_share(operator: CurvatureOperator, u: Tensor, rows: Tensor) -> tuple[float, tuple[str, ...]]:
    """The rows' part of u^T G u, with G the Gauss-Newton matrix; NaN and a note that says why where none is had."""
    try:
        shares = curvature_shares(operator, u).cpu()
    except DiagError as error:
        return math.nan, (f"The curvature's share is not known: {error}",)
    total = float(shares.sum())
    return (float(shares[rows].sum()) / total if total > 0 else math.nan), ()
