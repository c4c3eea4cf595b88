"""Which queries a caller asks of per-example gradients, found out before there are any gradients.

    queries = queries_of(lambda g: diag.gradient_coherence(per_example_gradients=g), step)

A dry run on gradients that are all zero costs no pass. With its result the hooks of a training step can answer
whatever an instrument asks while the step runs, and the step's activations need not be held for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from diag.gradients.per_example import Consumer, Coverage, PerExampleGradients
from diag.gradients.queries import Query


def queries_of(asks: Callable[[PerExampleGradients], Any], about: PerExampleGradients) -> list[Query]:
    """What `asks` wants to know of gradients shaped like `about`, as far as it does not depend on the answers."""
    zeros = _ZeroGradients(about)
    # It may refuse gradients that vanish, or ask what cannot be answered; on the real step it will say so itself.
    with suppress(Exception):
        asks(zeros)
    return list(zeros.asked)


class _ZeroGradients(PerExampleGradients):
    """No parameter is moved by any example; records the queries."""

    def __init__(self, about: PerExampleGradients) -> None:
        super().__init__(about.shapes, about.num_examples)
        self.asked: dict[Query, None] = {}

    @property
    def coverage(self) -> Coverage:
        return Coverage(1.0, 1.0, {})

    def stream(self, consume: Consumer) -> None:
        """There is no block."""

    def ask(self, *queries: Query) -> tuple[Any, ...]:
        self.asked |= dict.fromkeys(queries)
        return super().ask(*queries)
