"""All that is read of what a loss is made of, in one place: what the loop's observer hands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.formula.arithmetic import Arithmetic
from diag.watching.observe.loop.formula.domains import Domains
from diag.watching.observe.loop.formula.latents import Latents
from diag.watching.observe.loop.formula.oddities import Oddities
from diag.watching.observe.loop.formula.parts import parts_of
from diag.watching.observe.loop.formula.rewards.actions import Actions
from diag.watching.observe.loop.formula.rewards.next_values import NextValues
from diag.watching.observe.loop.formula.rewards.policy import Policies
from diag.watching.observe.loop.formula.rewards.rollout import Rollout
from diag.watching.observe.loop.formula.sides.contrast import Contrasts
from diag.watching.observe.loop.formula.sides.games import Games
from diag.watching.observe.loop.moment import Moment


class Formula:
    """Hands events on to those who read the graph of the loss. `names`: of the model's parameters, by id.
    `copies`: the copies of the model that are known by now."""

    def __init__(
        self, moment: Moment, names: Mapping[int, str], copies: Callable[[], Sequence[nn.Module | None]]
    ) -> None:
        self._arithmetic = Arithmetic(moment)
        self._rollout = Rollout()
        self._latents, self._policies = Latents(moment), Policies(moment, self._rollout)
        self._next = NextValues(copies)
        self._actions = Actions(moment, self._rollout, self._next)
        self._contrasts, self._games = Contrasts(moment), Games(moment, names)
        self._domains, self._oddities = Domains(moment), Oddities(moment)

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        self._arithmetic.training_call(outputs)
        if self._latents.looking:
            self._latents.training_call(args, kwargs)
        if self._follows_rollout:
            self._rollout.training_call(args, kwargs, outputs)
        self._oddities.training_call(args, kwargs, outputs)

    def evaluated(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called without gradients."""
        if self._follows_rollout:
            self._rollout.quiet_call(args, kwargs)
            self._next.called(outputs)

    @property
    def _follows_rollout(self) -> bool:
        """Whether the next backward pass is one at which the calls before it matter."""
        return self._policies.looking or self._actions.looking

    def loss_called(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        self._domains.called(function, args, kwargs)
        self._oddities.loss_called(function.__name__, *input_and_target(args, kwargs))

    def own_loss(self, function: str, output: Tensor, targets: Tensor) -> None:
        """The loop's own arithmetic amounts to this function of torch."""
        self._oddities.loss_called(function, output, targets)

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        self._arithmetic.backward_called(roots)
        if isinstance(roots, Tensor) and roots.numel() == 1 and roots.grad_fn is not None:
            reading = [r for r in (self._latents, self._policies, self._contrasts, self._actions) if r.begins()]
            looking = self._oddities.begins()
            parts = parts_of(roots) if reading or looking else []
            for reader in reading:
                reader.read(parts)
            if looking:
                self._oddities.read(roots, parts)
            self._games.backward_called(roots.grad_fn)
        self._rollout.forget()
        self._next.forget()

    def close(self) -> None:
        """Nothing is left on what the loop calls."""
        self._next.close()

    def facts(self) -> dict[str, Any]:
        """As fields of the facts of the loop."""
        return {
            "arithmetic": self._arithmetic.facts(),
            "latents": self._latents.facts(),
            "policy": self._policies.facts(),
            "actions": self._actions.facts(),
            "games": self._games.facts(),
            "contrast": self._contrasts.facts(),
            "formula": self._oddities.facts(),
            "domains": self._domains.facts(),
        }
