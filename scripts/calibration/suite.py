"""The cases: which kind on which program with which seed.

Each kind is tried on some of the programs that it fits, chosen so that all programs are used about equally, and on
more of the scoring half than of the choosing half. The choice depends on the lists alone, so that two versions of
the package are tried on the same cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from calibration.fault import Fault
from calibration.healthy import Healthy
from calibration.kinds import faults, healthy_kinds
from calibration.programs import programs
from calibration.split import CHOOSE, SCORE, side_of

# How many programs a kind is tried on, by side, and with how many seeds.
FAULT_PROGRAMS, FAULT_SEEDS = {CHOOSE: 2, SCORE: 3}, 1
HEALTHY_PROGRAMS, HEALTHY_SEEDS = {CHOOSE: 2, SCORE: 2}, 1
PLAIN_SEEDS = 2
SHORT = (
    ("plain", "mlp", 0), ("plain", "regression_friedman", 0), ("plain", "lora", 0), ("plain", "mlp_wide", 0),
    ("resumed_well", "lora", 0), ("gradients_never_zeroed", "mlp", 0), ("head_in_no_optimizer", "mlp", 0),
    ("learning_rate_high", "regression_friedman", 0), ("softmax_twice", "lora", 0),
    ("group_without_learning_rate", "mlp", 0), ("one_row_not_finite", "lora", 0),
    ("evaluated_in_training_mode", "mlp_wide", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: a kind on a program with a seed."""

    kind: str
    program: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.program}/{self.seed}"

    @property
    def side(self) -> str:
        return side_of(self.program)

    @property
    def fault(self) -> bool:
        return self.kind in faults()

    @property
    def what(self) -> Fault | Healthy:
        """The fault or the healthy kind."""
        return faults().get(self.kind) or healthy_kinds()[self.kind]


def cases() -> list[Case]:
    """All cases: the programs as they are, the healthy kinds, the faults."""
    others = [kind for name, kind in healthy_kinds().items() if name != "plain"]
    return [
        *(Case("plain", name, seed) for name in programs() for seed in range(PLAIN_SEEDS)),
        *_spread(others, HEALTHY_PROGRAMS, HEALTHY_SEEDS),
        *_spread(faults().values(), FAULT_PROGRAMS, FAULT_SEEDS),
    ]


def short_cases() -> list[Case]:
    """A cut that takes seconds."""
    return [Case(*case) for case in SHORT]


def _spread(kinds: Iterable[Fault | Healthy], wanted: dict[str, int], seeds: int) -> Iterator[Case]:
    used: Counter[str] = Counter()
    for kind in kinds:
        for side, number in wanted.items():
            fitting = [n for n, p in programs().items() if kind.fits(p) and side_of(n) == side]
            chosen = sorted(fitting, key=lambda n: (used[n], _mixed(kind.name + n)))[:number]
            used.update(chosen)
            yield from (Case(kind.name, name, seed) for name in chosen for seed in range(seeds))


def _mixed(text: str) -> int:
    """A number that depends on the text alone and looks random."""
    value = 0
    for letter in text:
        value = (value * 1_000_003 + ord(letter)) % 2_147_483_647
    return value


def matching(found: Iterable[Case], only: str | None, side: str | None) -> list[Case]:
    """The cases of a side whose name begins with `only` (kind, kind/program or kind/program/seed), or of a program
    if `only` is one."""

    def wanted(case: Case) -> bool:
        named = only is None or case.program == only or (case.name + "/").startswith(only.rstrip("/") + "/")
        return named and (side is None or case.side == side)

    return [case for case in found if wanted(case)]
