"""What a fault is: one change to a program, and what counts as knowing it.

    @fault(Theme.LOOP, names=[Cause.GRADIENTS_NOT_ZEROED], follows=[Cause.TRAINING_DIVERGED])
    def gradients_never_zeroed(p):
        "zero_grad() was forgotten."
        p.zero_grad = lambda: None

`names` are the causes of which any counts as having named it. `follows` are causes that are true of such a run
besides (consequences, or the same thing told less precisely): a finding that carries one is no false statement, and
does not count as naming. Every other warning or alarm on the run, that the whole program does not draw too, is a
false statement.

The onset of a fault is the first step at which the loop does what a sound one would not, as far as that can be told
from all that happened: step 1 unless the fault marks a later one (`Program.mark`), such as the first evaluation for
what is done wrong in evaluations, or the second epoch for an order that never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from calibration.program import Program
from diag.instruments.causes import Cause, Theme

# True of nearly any training that goes badly: told, they do no harm and name nothing.
SYMPTOMS = frozenset(
    {
        Cause.LOSS_PLATEAU, Cause.UNDERFITTING, Cause.WORSE_THAN_TRIVIAL, Cause.LOSS_SPIKE, Cause.TRAINING_DIVERGED,
        Cause.NOT_FINITE, Cause.OVERFITTING, Cause.INPUT_IGNORED, Cause.OUTPUT_CONSTANT,
    }
)  # fmt: skip


# Measured states of a network: true of whatever it is said of, unless training looks fine.
STATES = frozenset(
    {
        Cause.UNITS_DEAD, Cause.UNITS_SATURATED, Cause.GRADIENTS_VANISH, Cause.GRADIENTS_EXPLODE,
        Cause.EMBEDDINGS_COLLAPSED, Cause.ATTENTION_ONE_HOT, Cause.ATTENTION_LOGITS_GROW,
    }
)  # fmt: skip
# Faults of these themes may do a program no harm (a learning rate that it bears); the others are there or not.
NEEDS_HARM = (Theme.OPTIMIZATION, Theme.NETWORK, Theme.OUTCOME)


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    needs: tags that a program must have; without: tags that it must not have. silent: the loss curve looks fine.
    unknowable: why it cannot be known from what a watch sees; empty where it can. held_out: the user gives held-out
    data to the watch.
    """

    name: str
    theme: Theme
    apply: Callable[[Program], None] = field(repr=False)
    names: frozenset[Cause]
    follows: frozenset[Cause]
    needs: frozenset[str]
    without: frozenset[str]
    silent: bool
    unknowable: str
    held_out: bool

    @property
    def text(self) -> str:
        """What its author did, in one sentence."""
        return (self.apply.__doc__ or "").strip()

    @property
    def needs_harm(self) -> bool:
        """Whether only runs on which it did harm count."""
        return self.theme in NEEDS_HARM and not self.silent

    def fits(self, program: type[Program]) -> bool:
        return self.needs <= program.tags and not self.without & program.tags


FAULTS: dict[str, Fault] = {}


def fault(
    theme: Theme,
    names: Iterable[Cause],
    follows: Iterable[Cause] = (),
    *,
    needs: str = "",
    without: str = "distributed",
    silent: bool = False,
    unknowable: str = "",
    held_out: bool = False,
    symptoms: bool = True,
) -> Callable[[Callable[[Program], None]], Callable[[Program], None]]:
    """Declare a kind of fault; `needs` and `without` are tags, separated by blanks. symptoms: SYMPTOMS follow."""

    def declare(apply: Callable[[Program], None]) -> Callable[[Program], None]:
        name = apply.__name__
        if name in FAULTS:
            raise ValueError(f"There are two faults {name}; give one of them another name.")
        general = (SYMPTOMS if symptoms else frozenset()) | (frozenset() if silent else STATES)
        true = (frozenset(follows) | general) - frozenset(names)
        FAULTS[name] = Fault(
            name, theme, apply, frozenset(names), true, frozenset(needs.split()), frozenset(without.split()),
            silent, unknowable, held_out,
        )  # fmt: skip
        return apply

    return declare
