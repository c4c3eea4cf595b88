"""A comparison in one sentence: which run is worse and from what cause, or how many of a sweep have a finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from diag.reporting.document import NEEDS_ATTENTION
from diag.reporting.plain import count_in_words, listed
from diag.result import Level

LONGEST_NAME = 24  # characters: a run of a longer name is called by its letter
MOST_NAMED = 4  # runs whose causes a headline lists
CHANGES = {"worse": "worse", "better": "better", "mixed": "better in some and worse in others", "same": "the same"}


def headline(checks: Sequence[Mapping[str, Any]], sides: Sequence[Mapping[str, Any]]) -> str:
    """What a reader asks first; `checks` and `sides` are those of the comparison's document."""
    if not checks:
        return "Nothing was measured"
    return _of_two(checks, *sides) if len(sides) == 2 else _of_many(sides)


def _of_two(checks: Sequence[Mapping[str, Any]], first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    changes = {check["change"] for check in checks}
    a, b = _name(first), _name(other)
    if {"worse", "better"} <= changes:
        return f"{b} is worse than {a} by some checks and better by others"
    if "worse" in changes:
        return f"{b} is worse than {a}: {_reason(checks, other)}"
    if "better" in changes:
        only = f" in {first['name']} only" if other["level"] not in NEEDS_ATTENTION else ""
        return f"{b} is better than {a}: {_reason(checks, first)}{only}"
    return f"No check tells {a} and {b} apart" if "same" in changes else f"Nothing was judged in both {a} and {b}"


def _reason(checks: Sequence[Mapping[str, Any]], worse: Mapping[str, Any]) -> str:
    """The cause of the worse run where its check is one that changed; else what the first of those is called."""
    changed = [check["name"] for check in checks if check["change"] in ("worse", "better")]
    return str(worse["cause"]) if worse["verdict"]["name"] in changed else changed[0].lower()


def _name(side: Mapping[str, Any]) -> str:
    """The run's name with its letter where the name is short."""
    return f"{side['name']} ({side['title']})" if len(side["title"]) <= LONGEST_NAME else side["name"]


def _of_many(sides: Sequence[Mapping[str, Any]]) -> str:
    found = [side for side in sides if side["level"] in NEEDS_ATTENTION]
    if not found:
        judged = any(side["level"] == str(Level.OK) for side in sides)
        return f"Nothing wrong was found in the {len(sides)} runs" if judged else "Nothing could be judged"
    start = f"{len(found)} of {len(sides)} runs have" if len(found) > 1 else f"One of {len(sides)} runs has"
    if len(found) <= MOST_NAMED:
        named = [f"{side['name']} ({side['cause']})" for side in found]
        return f"{start} a finding: {listed(named)}"
    (cause, times), *_ = Counter(side["cause"] for side in found).most_common(1)
    return f"{start} a finding, most often ({times}): {cause}"


def change_counts(checks: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """How many checks are worse, better or the same in the other runs than in the first, in a sentence."""
    changes = [check["change"] for check in checks]
    parts = [f"{count_in_words(changes.count(k), 'check')} {word}" for k, word in CHANGES.items() if k in changes]
    unlike = changes.count("")
    parts += [f"{unlike} not judged in {'both' if len(keys) == 2 else 'all'}"] if unlike else []
    others = keys[1] if len(keys) == 2 else f"{keys[1]} to {keys[-1]}"
    return f"{others} against {keys[0]}: {listed(parts)}." if parts else ""
