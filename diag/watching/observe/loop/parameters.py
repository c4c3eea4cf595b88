"""Every parameter of the model, swept at an optimizer's steps 1, 2, 3, 10, 30, ...: who holds it, whether a
gradient comes to it, whether it is trainable, and whether it is still the tensor that it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.loop.steps import ParameterFacts
from diag.snapshot.state.fresh import looks_fresh
from diag.snapshot.state.modes import unseen
from diag.watching.guard import shielded
from diag.watching.hooks.model_hook import frames_compiled
from diag.watching.observe.loop.data.source import is_forgotten
from diag.watching.observe.loop.moment import Moment
from diag.watching.observe.loop.optimizers import OptimizerRecord, Optimizers, plain_number

CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)  # that nobody calls
STEPS_WITHOUT_HOLDER = 30  # by which an optimizer that holds a parameter will have stepped
STEPS_BEFORE_FRESH = 300  # what is frozen for a while, to be trained later, is not yet left untrained
LOOKS_BEFORE_CLOSER = 3  # looks in a row without a gradient before a module is looked at closely


@dataclass
class Seen:
    """What is known of one parameter."""

    parameter: nn.Parameter
    trainable: bool
    since: int = 0
    gradient: int = 0
    missing: int = 0
    replaced: int = 0
    without_optimizer: int = 0
    called: bool | None = None
    with_graph: bool | None = None
    forgotten: bool = False
    left_out: bool = False
    fresh: str = ""
    told: tuple[tuple[Any, ...], ParameterFacts] | None = None  # what the facts were made from last, and these


class Parameters:
    """Sweeps the parameters of `model`. `names`: by id, kept as the model is now."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._model, self._moment = model, moment
        self.names: dict[int, str] = {}
        self.seen: dict[str, Seen] = {}
        self._closer: CloseLook | None = None
        self._looked_at: set[str] = set()
        self._ended = False
        self._silent: list[Seen] = []  # those that no gradient has come to
        self.refresh()

    def refresh(self) -> None:
        """Read the model's parameters as they are now."""
        step, started = self._moment.step, bool(self.seen)
        for name, p in self._model.named_parameters():
            known = self.seen.get(name)
            if known is None:
                self.seen[name] = Seen(p, p.requires_grad, replaced=step if started else 0)
            elif known.parameter is not p:
                # One that is made again in each call never gets older; what is known of its place is kept.
                again = known.without_optimizer
                self.seen[name] = Seen(p, p.requires_grad, known.since, replaced=step, without_optimizer=again)
                self._moment.news(("replaced", name.rpartition(".")[0]), "parameters")
        # The ids of tensors that are gone must not be taken for the model's.
        self.names.clear()
        self.names |= {id(s.parameter): name for name, s in self.seen.items()}

    def sweep(self, record: OptimizerRecord, optimizers: Optimizers) -> None:
        """An optimizer is about to take one of the steps at which everything is looked at."""
        self.refresh()
        optimizer = record.reference()
        if optimizer is not None:
            optimizers.refresh(record, optimizer)
        held = {id(p) for p in record.held}
        anywhere = {id(p) for r in optimizers.records if r.reference() is not None for p in r.held}
        if any(s.parameter.grad is not None and id(s.parameter) not in anywhere for s in self.seen.values()):
            # One of those that exist may hold it and not have stepped yet, as the other half's of a GAN.
            optimizers.search()
            anywhere = {id(p) for r in optimizers.records if r.reference() is not None for p in r.held}
        for name, s in self.seen.items():
            self._look(s, name, id(s.parameter) in held, id(s.parameter) in anywhere)
            unheld = id(s.parameter) not in anywhere and record.steps + 1 >= STEPS_WITHOUT_HOLDER
            s.left_out = not s.trainable or unheld
        record.stale = self._stale(record, anywhere)
        if record.steps + 1 >= STEPS_BEFORE_FRESH:
            self._look_at_untrained(anywhere, waiting=False)
        self._silent = [s for s in self.seen.values() if s.missing and not s.gradient]

    def look_for_gradients(self) -> None:
        """After a backward pass, and before a step between two sweeps: has a gradient come where none had? Chance
        may leave layers out, and the loop may set the gradients of some to None, as to hold them for a while."""
        for s in self._silent:
            if s.parameter.grad is not None:
                s.gradient, s.missing = s.gradient or self._moment.step, 0

    def _look(self, s: Seen, name: str, held: bool, anywhere: bool) -> None:
        p, step = s.parameter, self._moment.step
        if p.requires_grad != s.trainable and (held or not anywhere):
            s.trainable, s.since = p.requires_grad, step
            self._moment.news(("trainable", name.rpartition(".")[0], p.requires_grad), "parameters")
        if p.grad is not None:
            s.gradient, s.missing = s.gradient or step, 0
        elif held and p.requires_grad:
            s.missing += 1
            if s.missing == LOOKS_BEFORE_CLOSER:
                self._moment.news(("no gradient", name.rpartition(".")[0]), "parameters")
        s.without_optimizer = s.without_optimizer + 1 if p.grad is not None and not anywhere else 0
        if s.without_optimizer in (1, 2):
            self._moment.news(("no optimizer", s.without_optimizer), "parameters")

    def _stale(self, record: OptimizerRecord, anywhere: set[int]) -> tuple[str, ...]:
        """Parameters outside all optimizers that have the shape of a tensor here which gets no gradient."""
        idle = {tuple(p.shape) for p in record.foreign if p.grad is None}
        if not idle:
            return ()
        return tuple(
            name
            for name, s in self.seen.items()
            if tuple(s.parameter.shape) in idle and id(s.parameter) not in anywhere and s.trainable
        )

    def _look_at_untrained(self, anywhere: set[int], waiting: bool) -> None:
        """Do parameters that nothing trains still hold what they were initialised with?"""
        for name, s in self.seen.items():
            trained = s.gradient or (s.trainable and id(s.parameter) in anywhere)
            if trained or s.replaced or s.since or not (waiting or s.parameter.is_cpu):
                s.fresh = ""
                continue
            with unseen(), torch.no_grad():
                s.fresh = looks_fresh(self._model.get_submodule(name.rpartition(".")[0]), s.parameter)
            if s.fresh:
                self._moment.news("fresh", "parameters")

    # A closer look at modules whose parameters get no gradient

    def look_closer(self) -> None:
        """Between two steps: follow, in the next training call, the modules that got no gradient so far."""
        silent = [
            n
            for n, s in self.seen.items()
            if not s.gradient and s.called is None and (s.missing or (s.left_out and not s.since))
        ]
        owners = {self._owner(n) for n in silent} - self._looked_at
        # A hook on a compiled model's module would have it compiled again.
        if owners and self._closer is None and not frames_compiled():
            self._closer = CloseLook(self._model, owners)

    def evaluated(self) -> None:
        """A call without gradients was made: what ran in it does not count."""
        if self._closer is not None:
            self._closer.called.clear()

    def called(self) -> None:
        """A training call was made."""
        if self._closer is None:
            return
        closer, self._closer = self._closer, None
        closer.remove()
        self._looked_at |= closer.owners
        for name, s in self.seen.items():
            owner = self._owner(name)
            if owner and owner in closer.owners:
                s.called, s.with_graph = owner in closer.called, closer.called.get(owner)
                s.forgotten = not s.called and is_forgotten(self._model, owner)

    def _owner(self, name: str) -> str:
        """The module that uses the parameter when it is called; nobody calls a list or dict of parameters."""
        owner = name.rpartition(".")[0]
        while owner and isinstance(self._model.get_submodule(owner), CONTAINERS):
            owner = owner.rpartition(".")[0]
        return owner

    # Facts

    def facts(self, optimizers: Optimizers, ended: bool = False) -> tuple[ParameterFacts, ...]:
        """Each parameter as plain data."""
        if ended and not self._ended:
            self._ended = True
            held = (r.held for r in optimizers.records if r.reference() is not None)
            self._look_at_untrained({id(p) for some in held for p in some}, waiting=True)
        holders: dict[int, int] = {}
        rates: dict[int, float] = {}
        for r in optimizers.records:
            if r.steps and not r.nested:
                for key in {id(p) for p in r.held}:
                    holders[key] = holders.get(key, 0) + 1
            if (optimizer := r.reference()) is not None and r.steps:
                rates |= _rates(optimizer)
        return tuple(self._facts(name, s, holders, rates) for name, s in self.seen.items())

    def _facts(self, name: str, s: Seen, holders: dict[int, int], rates: dict[int, float]) -> ParameterFacts:
        p = s.parameter
        now: tuple[Any, ...] = (p.requires_grad, s.since, holders.get(id(p), 0), rates.get(id(p)))
        state = (*now, s.gradient, s.missing, s.replaced, s.called, s.with_graph, s.forgotten, s.without_optimizer)
        state = (*state, s.fresh, p.shape, p.dtype)
        if s.told is None or s.told[0] != state:  # with ten thousand of them, making all again takes long
            shape, dtype = tuple(p.shape), str(p.dtype).removeprefix("torch.")
            s.told = state, ParameterFacts(name, shape, dtype, *state[:-2])
        return s.told[1]


class CloseLook:
    """Forward hooks on a few modules for one call of the model."""

    def __init__(self, model: nn.Module, owners: set[str]) -> None:
        self.owners = owners
        self.called: dict[str, bool] = {}
        modules = dict(model.named_modules())
        self._handles = [
            modules[name].register_forward_hook(shielded(self._hook(name)))
            for name in owners
            if name and name in modules
        ]

    def _hook(self, name: str) -> Any:
        def called(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            with unseen():
                graph = isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled()
            self.called[name] = self.called.get(name, False) or graph

        return called

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _rates(optimizer: Any) -> dict[int, float]:
    found: dict[int, float] = {}
    for group in optimizer.param_groups:
        rate = plain_number(group.get("lr"))
        if isinstance(rate, (int, float)):
            found |= {id(p): float(rate) for p in group["params"]}
    return found
