"""What torch's loss functions of special form are given, against what each is made for: one table of all of them.

Each entry measures shares of a call's entries that the function is not made for; what a share means is told by the
check. Cross-entropy and its relatives, squared and absolute errors have files of their own. A few calls of each
function are looked at; what lies on a device is reduced there and read when the facts are asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import kind_of, made_last
from diag.snapshot.loop.arithmetic import DomainFacts
from diag.watching.observe.loop.data.bounds import bounded_by
from diag.watching.observe.loop.losses import expands_both, made_by
from diag.watching.observe.loop.moment import Moment, due

DomainShares = dict[str, Any]  # a share of the entries each: a number, or a tensor of one
CALLS_THAT_TELL = (1, 3, 10)
PLAINLY_NOT_ONE = 0.05  # nats that a logarithm of a sum of probabilities may be away from zero
ENTRIES_READ = 1 << 18  # of one tensor
PROBABILITY_SLACK = 1e-3


class Domains:
    """Follows the calls of the functions in the table: the first three of each, the 10th, the 30th, ..."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._shares: dict[str, list[DomainShares]] = {}

    def called(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        name = function.__name__
        rule = DOMAIN_MEASURES.get(name)
        if rule is None:
            return
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        if not due(calls):
            return
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        self._first.setdefault(name, self._moment.step)
        found = self._shares.setdefault(name, [])
        found.append({k: _read(v) for k, v in rule(bound.arguments).items()})
        if len(found) in CALLS_THAT_TELL:
            self._moment.news(("domain", name, len(found)), "domains")

    def facts(self) -> tuple[DomainFacts, ...]:
        """As plain data; what is on a device is read now."""
        return tuple(
            DomainFacts(name, len(looks), self._first[name], _extreme(min, looks), _extreme(max, looks))
            for name, looks in self._shares.items()
        )


def _read(share: Any) -> Any:
    on_device = isinstance(share, Tensor) and not share.is_cpu
    return share.detach() if on_device else float(share)


def _extreme(of: Callable[[Iterable[float]], float], looks: list[DomainShares]) -> Mapping[str, float]:
    """The smallest, or the largest, share of each name at these looks."""
    names = set[str]().union(*looks)
    return {n: of(float(look.get(n, 0.0)) for look in looks) for n in sorted(names)}


def _share(which: Tensor) -> Tensor:
    return which.reshape(-1)[:ENTRIES_READ].float().mean() if which.numel() else torch.zeros(())


def _not_normalised(logs: Tensor, axis: int) -> Tensor:
    """The share of rows along an axis whose exponentials do not add up to one."""
    return _share(logs.detach().float().logsumexp(axis).abs() > PLAINLY_NOT_ONE)


# One function each


def _ctc(a: Mapping[str, Any]) -> DomainShares:
    logs, blank = a["log_probs"], a["blank"]
    frames, lengths = torch.as_tensor(a["input_lengths"]).cpu(), torch.as_tensor(a["target_lengths"]).cpu()
    targets, counted, repeats = _transcripts(a["targets"].detach(), lengths)
    found: DomainShares = {
        "no log-probabilities": _not_normalised(logs, -1),
        "blank": ((targets == blank) & counted).sum() / counted.sum().clamp_min(1),
        "too short": _share(frames.reshape(-1) < lengths.reshape(-1) + repeats),
    }
    if logs.ndim == 3:
        found["over time"] = 1 - _not_normalised(logs, 0)
    return found


def _transcripts(targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets (rows, longest), which of their places count, and in each row how often a symbol comes twice in a
    row: between these a blank must stand."""
    targets, lengths = targets.cpu(), lengths.reshape(-1)
    if targets.ndim == 1:
        targets = torch.nn.utils.rnn.pad_sequence(list(targets.split(lengths.tolist())), batch_first=True)
    counted = torch.arange(targets.shape[1]) < lengths[:, None]
    twice = (targets[:, 1:] == targets[:, :-1]) & counted[:, 1:]
    return targets, counted, twice.sum(1)


def _kl(a: Mapping[str, Any]) -> DomainShares:
    prediction, target = a["input"].detach(), a["target"].detach()
    of_any_axis = [_not_normalised(prediction, axis) for axis in range(prediction.ndim)]
    found: DomainShares = {"no log-probabilities": torch.stack(of_any_axis).min() if of_any_axis else 0.0}
    if a["log_target"]:
        inside = ((target >= 0) & (target <= 1)).all()
        found["target is no logarithm"] = (
            inside & ((target.float().sum(-1) - 1).abs() < PROBABILITY_SLACK).all() if target.ndim else 0.0
        )
    else:
        found["target is a logarithm"] = _share(target < 0)
    return found


def _gaussian(a: Mapping[str, Any]) -> DomainShares:
    var = a["var"]
    floor = _share(var.detach() <= a["eps"]) if isinstance(var, Tensor) else 0.0
    return {"at the floor": floor, "broadcast": float(expands_both(a["input"], a["target"]))}


def _poisson(a: Mapping[str, Any]) -> DomainShares:
    prediction, target = a["input"], a["target"].detach()
    made = bounded_by(prediction)[1] >= 0 or _made_by_exponential(prediction)
    return {
        "negative counts": _share(target < 0),
        "exponential twice": float(bool(a["log_input"]) and made),
        "negative rates": 0.0 if a["log_input"] else _share(prediction.detach() < 0),
        "broadcast": float(expands_both(prediction, target)),
    }


def _made_by_exponential(prediction: Tensor) -> bool:
    """Whether an exponential made the tensor."""
    node = made_last(prediction.grad_fn)
    return node is not None and kind_of(node) == "Exp"


def _signs(target: Tensor) -> DomainShares:
    target = target.detach()
    return {"no signs": _share(target.abs() != 1), "zeros": _share(target == 0)}


def _of_signs(a: Mapping[str, Any]) -> DomainShares:
    return _signs(a["target"])


def _ranking(a: Mapping[str, Any]) -> DomainShares:
    both = expands_both(a["input1"], a["input2"]) or expands_both(a["input1"], a["target"])
    return _signs(a["target"]) | {"broadcast": float(both)}


def _soft_margin(a: Mapping[str, Any]) -> DomainShares:
    return _signs(a["target"]) | {"sigmoid": float(made_by(a["input"])[0] in ("sigmoid", "softmax"))}


def _several_soft(a: Mapping[str, Any]) -> DomainShares:
    target = a["target"].detach()
    return {
        "outside": _share((target < 0) | (target > 1)),
        "sigmoid": float(made_by(a["input"])[0] in ("sigmoid", "softmax")),
    }


def _several_margin(a: Mapping[str, Any]) -> DomainShares:
    """Rows of class numbers that end at -1 have no number twice; rows of zeros and ones have."""
    target = a["target"].detach()
    flags = ((target == 0) | (target == 1)).all() & (target.shape[-1] > 2)
    return {"zeros and ones": flags.float()}


def _margin(a: Mapping[str, Any]) -> DomainShares:
    return {"probabilities": float(made_by(a["input"])[0] == "softmax" and a["margin"] >= 1)}


def _triplets(a: Mapping[str, Any]) -> DomainShares:
    anchor, positive, negative = (a[k].detach() for k in ("anchor", "positive", "negative"))
    return {
        "anchor is positive": _equal_rows(anchor, positive),
        "negative is positive": _equal_rows(negative, positive),
        "negative is anchor": _equal_rows(negative, anchor),
    }


def _equal_rows(a: Tensor, b: Tensor) -> Any:
    return _share((a == b).reshape(len(a), -1).all(1)) if a.shape == b.shape and a.ndim > 1 else 0.0


DOMAIN_MEASURES: dict[str, Callable[[Mapping[str, Any]], DomainShares]] = {
    "ctc_loss": _ctc,
    "kl_div": _kl,
    "gaussian_nll_loss": _gaussian,
    "poisson_nll_loss": _poisson,
    "cosine_embedding_loss": _of_signs,
    "hinge_embedding_loss": _of_signs,
    "margin_ranking_loss": _ranking,
    "soft_margin_loss": _soft_margin,
    "multilabel_soft_margin_loss": _several_soft,
    "multilabel_margin_loss": _several_margin,
    "multi_margin_loss": _margin,
    "triplet_margin_loss": _triplets,
    "triplet_margin_with_distance_loss": _triplets,
}
