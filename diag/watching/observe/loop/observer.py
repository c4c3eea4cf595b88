"""Gathers the facts of the loop from what the listener hears: one method an event, each of a few microseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import RootFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.ranks import RankFacts
from diag.snapshot.loop.steps import WrapperFacts
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.answers.compared import comparisons_behind
from diag.watching.observe.loop.answers.pairing import Pairing
from diag.watching.observe.loop.batches import Batches
from diag.watching.observe.loop.chance import Chance
from diag.watching.observe.loop.data.asked import Demands
from diag.watching.observe.loop.data.axes import Axes
from diag.watching.observe.loop.data.contents import Contents
from diag.watching.observe.loop.data.drawn import NONE, Drawn
from diag.watching.observe.loop.data.evaluated import EvaluatedData
from diag.watching.observe.loop.data.evaluations import Evaluations
from diag.watching.observe.loop.data.inputs import Inputs
from diag.watching.observe.loop.data.masks import Masks
from diag.watching.observe.loop.data.own import ModelOutputs, difference_behind
from diag.watching.observe.loop.data.pairs import PairedCalls
from diag.watching.observe.loop.data.sequences import Sequences
from diag.watching.observe.loop.data.stored import StoredData
from diag.watching.observe.loop.data.targets import Targets
from diag.watching.observe.loop.data.tokens import Tokens
from diag.watching.observe.loop.evaluation.columns import FeatureColumns
from diag.watching.observe.loop.evaluation.copies import Copies
from diag.watching.observe.loop.evaluation.evaluated_targets import EvaluatedTargets
from diag.watching.observe.loop.evaluation.novelty import Novelty
from diag.watching.observe.loop.formula.depth import Depth
from diag.watching.observe.loop.formula.formula import Formula
from diag.watching.observe.loop.layers import Layers
from diag.watching.observe.loop.losses import Losses
from diag.watching.observe.loop.modes import Modes
from diag.watching.observe.loop.moment import Moment, next_look
from diag.watching.observe.loop.optimizers import Optimizers
from diag.watching.observe.loop.order import Order
from diag.watching.observe.loop.origin import Origin
from diag.watching.observe.loop.parameters import Parameters
from diag.watching.observe.loop.penalty import Penalty
from diag.watching.observe.loop.rows.rows import RowObserver
from diag.watching.observe.loop.scaling import Clipping, Scaling
from diag.watching.observe.loop.schedulers import Schedulers
from diag.watching.observe.loop.start import shape_of, starting_weights
from diag.watching.observe.loop.strangers import Strangers
from diag.watching.observe.loop.weights import Weights
from diag.watching.observe.loop.zeroing import Gradients

SEARCHED_AT = 3  # steps after which schedulers are searched that never stepped
AFTERWARDS = 4  # steps after an evaluation that are looked at closely
DATA_PARALLEL = "DistributedDataParallel"
UNSTEPPED = (5, 50)  # backward passes without any step that are news


def processes() -> int:
    """How many processes train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


class LoopObserver:
    """Follows one model's training loop. `resumed`: the last step of the run that is continued, else 0;
    `rates`: the first and the last learning rate of that run."""

    def __init__(self, model: nn.Module, resumed: int = 0, rates: tuple[float, ...] = ()) -> None:
        self.moment = Moment(resumed)
        self._resumed, self._rates = resumed, rates
        self._order = Order(self.moment)
        self._parameters = Parameters(model, self.moment)
        trained = list(model.parameters())
        self._gradients = Gradients(trained)
        names = self._parameters.names
        self._optimizers = Optimizers(self.moment, self._gradients, names, resumed > 0)
        self._schedulers = Schedulers(self.moment, self._optimizers)
        self._modes, self._batches = Modes(model, self.moment), Batches(model, self.moment)
        self.evaluated_data = EvaluatedData()
        self._contents, self._drawn = Contents(self.moment), Drawn(self.moment)
        self.rows = RowObserver(self.moment)
        # Of the call just made: the places of its rows and their data set; None inside an optimizer's step.
        self.drawn: tuple[Any, Any] | None = None
        self._chance = Chance(model, self.moment)
        self._losses, self._targets = Losses(model, self.moment), Targets(self.moment)
        self._asked, self._inputs = Demands(self.moment), Inputs(self.moment)
        self._tokens, self._stored = Tokens(self.moment), StoredData(self.moment)
        self._scaling, self._clipping = Scaling(model, self.moment), Clipping(self.moment)
        self._weights = Weights(trained, names, self.moment)
        self._strangers = Strangers(names, self.moment)
        self._layers, self._copies = Layers(model, self.moment), Copies(model)
        self._axes, self._evaluations = Axes(self.moment), Evaluations(self.moment)
        self._outputs, self._origin = ModelOutputs(), Origin(self.moment)
        self._columns, self._novelty = FeatureColumns(self.moment), Novelty(model, self.moment)
        self._pairing, self._evaluated_targets = Pairing(self.moment), EvaluatedTargets(self.moment)
        self._sequences, self._masks = Sequences(self.moment), Masks(self.moment)
        self._penalty, self._pairs = Penalty(self.moment), PairedCalls(self.moment)
        self._formula, self._depth = Formula(self.moment, names, self._copies.modules), Depth(names)
        self._shape = shape_of(model)
        self._start = () if resumed else starting_weights(model)
        self._calls = self._backwards = self._unstepped = self._zeroed = 0
        self._any_step = False
        self._before: list[Tensor] = []  # how the parameters began at the last backward pass, before any step
        self._wrapper, self._wrapped = "", 0
        self.ranks: Callable[[], RankFacts] = RankFacts
        self.directions: Callable[[], tuple[float, ...]] = tuple

    def step_ended(self, step: int, rate: Any = None) -> None:
        """The step with this number is over; rate: its learning rate, where that is on the host."""
        if type(rate) is float:
            self._schedulers.rate(rate)
        if self.moment.ended(step):
            self._begin()
        if not self.moment.attentive and self._optimizers.unusual:
            self.moment.attentive = True

    def _begin(self) -> None:
        """Attention begins: what was under way when it ended is over."""
        for part in (self._optimizers, self._scaling, self._clipping):
            part.begin()

    # The model and its loss

    def forward_called(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        self._calls, places = self._calls + 1, NONE
        self.drawn = None
        # A closure calls the model several times on one batch, at other parameters.
        if not self._optimizers.inside:
            self._weights.training_call()
            self._batches.training_call(args, kwargs)
            places = self._drawn.training_call()
            self.drawn = places, self._drawn.dataset
        self._parameters.called()
        self._origin.training_call(args, kwargs, outputs)
        if not self.moment.attentive:
            return
        self._order.add("F")
        self.evaluated_data.training_call()
        self._chance.training_call(args)
        self._optimizers.forward_called()
        if any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self._optimizers.adversarial = True
        self._modes.training_call(args, kwargs)
        self._targets.training_call(args, kwargs)
        self._asked.training_call(args, kwargs)
        self._inputs.training_call(args, kwargs, places)
        self._tokens.training_call(args, kwargs)
        self._stored.training_call(args, kwargs)
        self._contents.training_call(args, kwargs, places)
        self._scaling.training_call(outputs)
        self._strangers.training_call(args, kwargs, outputs)
        self._penalty.training_call(outputs)
        self._pairs.training_call(args, kwargs, outputs)
        self._outputs.training_call(outputs)
        self._columns.training_call(args, kwargs)
        self._novelty.training_call(args, kwargs)
        self._pairing.training_call(args, kwargs, outputs, places)
        self._formula.training_call(args, kwargs, outputs)
        self._sequences.training_call(args, kwargs)
        self._masks.training_call(args, kwargs)
        self._evaluated_targets.training_call(outputs)

    def wrapped_by(self, models: tuple[nn.Module, ...]) -> None:
        """The watch was given these, the bare model last."""
        self._wrapper = next((type(m).__name__ for m in models if type(m).__name__ == DATA_PARALLEL), "")

    def wrapper_called(self, module: Any) -> None:
        """A wrapper of the model was called in training."""
        self._wrapped += type(module).__name__ == DATA_PARALLEL

    def seeded(self, seed: Any) -> None:
        """torch.manual_seed was called."""
        self._chance.seeded(seed)

    def evaluated(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called without gradients."""
        self._evaluated_targets.quiet_call(outputs)
        if self.moment.attend(AFTERWARDS):
            self._begin()
        self._order.add("E")
        untrained = self._drawn.evaluated()
        self.evaluated_data.evaluated(args, kwargs, untrained)
        self._modes.quiet_call(args, kwargs, untrained, self._batches.loader_batches == 1)
        training = not self._modes.evaluates(args, kwargs)
        self._inputs.evaluated(args, kwargs, training)
        self._columns.evaluated(args, kwargs, training)
        self._novelty.evaluated(args, kwargs)
        self._chance.evaluated(args, kwargs)
        self._formula.evaluated(args, kwargs, outputs)
        self._batches.fetched = False
        self._weights.evaluated()
        self._parameters.evaluated()

    def loss_called(self, function: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
        """A loss function returned a value that has a graph."""
        self._chance.loss_called(args, kwargs)
        self._losses.called(function, args, kwargs, value)
        self.evaluated_data.loss_called(args, kwargs)
        self._targets.loss_called(function.__name__, args, kwargs)
        self._evaluated_targets.loss_called(function.__name__, args, kwargs)
        self._asked.loss_called(function.__name__, args, kwargs)
        self._sequences.loss_called(function.__name__, args, kwargs)
        self._masks.loss_called(function.__name__, args, kwargs)
        self._pairing.loss_called(function.__name__, args, kwargs)
        self._formula.loss_called(function, args, kwargs)
        self._penalty.loss_called(value)
        self._batches.targets(input_and_target(args, kwargs)[1])

    def further_loss_called(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """A loss function of several tensors or of alignments returned a value that has a graph."""
        self._formula.loss_called(function, args, kwargs)

    def loss_evaluated(self, function: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
        """A loss function returned a value without a graph."""
        self._evaluated_targets.evaluated(function.__name__, args, kwargs)
        self._modes.quiet_loss()
        self._evaluations.loss(value)

    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        self._losses.scaled(losses, scaled)
        self._scaling.loss_scaled(losses, scaled)
        self._penalty.loss_scaled(losses, scaled)

    # Backward passes

    def root_seen(self, roots: Any) -> None:
        """A backward pass is about to begin, at any step."""
        self._origin.backward_called(roots)

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        for w in self._gradients.watched:
            w.look()
        self._optimizers.backward_called()
        self._own_loss(roots)
        self._losses.backward_called(roots)
        self._axes.backward_called(roots)
        self._penalty.backward_called(roots)
        self._pairs.backward_called(roots)
        self._formula.backward_called(roots)
        self._depth.backward_called(roots)
        self._scaling.backward_called(roots)

    def _own_loss(self, roots: Any) -> None:
        """A loss that is the loop's own arithmetic asks for targets as one of torch's does."""
        outputs = self._outputs.before_backward()
        compared = comparisons_behind(roots, outputs)
        for one in compared:
            self._pairing.compared("", one.output, one.targets, one.node)
        if self._losses.any_called:
            return
        found = difference_behind(roots, outputs)
        self._losses.own_difference(found)
        if found is not None and not found.expanded:
            arguments = (found.output, found.targets)
            self._targets.loss_called(found.function, arguments, {})
            self._asked.loss_called(found.function, arguments, {"reduction": "mean"})
            self._formula.own_loss(found.function, *arguments)
        elif found is None and compared:  # a weighted error, or one of several terms
            nearest = compared[0]
            self._targets.loss_called(nearest.function, (nearest.output, nearest.targets), {})
            self._formula.own_loss(nearest.function, nearest.output, nearest.targets)

    def backward_done(self) -> None:
        """It has ended."""
        reached = False
        for w in self._gradients.watched:
            reached |= w.passed()
        self._order.add("B" if reached else "b")
        self._parameters.look_for_gradients()  # the loop may take some away before the step
        if reached and not self._any_step:
            self._before = self._gradients.glance()
        if reached:
            self._backwards += 1
            self._unstepped += 1
            self._modes.backward()
            self._pairing.backward_done()
            self._batches.backward()
            self._clipping.backward()

    def clipping(self, parameters: Any, limit: Any) -> None:
        """Gradients are about to be clipped."""
        if self._clipping.clipped(parameters, limit, self._parameters.names, self._unstepped > 0):
            self._order.add("C")
            self._scaling.clipping()

    def zeroed(self, owner: Any) -> None:
        """`zero_grad` of an optimizer or a module has returned."""
        record = self._optimizers.record(owner) if isinstance(owner, Optimizer) else None
        if record is not None and not record.held:
            return
        self._order.add("Z")
        self._optimizers.zeroed()
        before = sum(w.fresh for w in self._gradients.watched)
        for w in self._gradients.watched:
            w.look(zeroing=True)
        if before and not any(w.fresh for w in self._gradients.watched):
            self._scaling.zeroed()
            if self._unstepped and not self._moved_by_hand():
                self._zeroed += 1
                if self._unstepped in UNSTEPPED and not self._any_step:
                    self.moment.news(("no step", self._unstepped))

    def _moved_by_hand(self) -> bool:
        """Whether the parameters have changed since the backward pass, in a loop without an optimizer's steps."""
        return not self._any_step and not self._gradients.same(self._before)

    # Steps

    def unscaling(self, optimizer: Any, scaler: Any) -> None:
        """A GradScaler divides an optimizer's gradients."""
        self._order.add("U")
        self._scaling.unscaling(optimizer, scaler)

    def scaler_stepping(self, optimizer: Any) -> None:
        """A GradScaler is about to step an optimizer."""
        self._scaling.scaler_stepping(optimizer)

    def scaler_stepped(self, optimizer: Any) -> None:
        """It has done so, or left the step out."""
        if self._scaling.scaler_stepped(optimizer):
            self._order.add("s")
            self._used()

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to step."""
        record = self._optimizers.record(optimizer)
        if record is not None and not self._optimizers.inside and record.steps + 1 >= record.due:
            record.due, record.swept = next_look(record.steps + 1), True
            self._parameters.sweep(record, self._optimizers)
            if record.held:
                self._layers.sweep()
                self._strangers.sweep(self._optimizers)
                self._copies.look()
        else:
            self._parameters.look_for_gradients()
        self._scaling.before_step(optimizer, self._optimizers.before_step(optimizer, closure))

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""
        self._scaling.stepped()
        record = self._optimizers.after_step(optimizer)
        if record is None or not record.held:
            return
        self._weights.stepped()
        if not self.moment.attentive:
            self._unstepped = self._zeroed = 0
            return
        self._order.add("S")
        self._clipping.stepped()
        self._used()
        self._any_step = True
        if record.steps == SEARCHED_AT:
            self._schedulers.search(record)
            self._copies.search()
        if record.steps <= SEARCHED_AT or record.just_swept:
            self._parameters.look_closer()

    def _used(self) -> None:
        self._optimizers.used()
        self._unstepped = self._zeroed = 0

    def scheduler_stepped(self, scheduler: Any) -> None:
        """A learning-rate scheduler has stepped."""
        if self._schedulers.stepped(scheduler, self._backwards):
            self._order.add("L")

    # Data

    def loader_started(self, loader: Any) -> None:
        """An epoch of a DataLoader begins."""
        if self.moment.attend(AFTERWARDS):
            self._begin()
        self._batches.loader_started(loader, self._drawn.data_of(loader))
        self._drawn.epoch_begins()
        self._stored.loader_started(getattr(loader, "dataset", None))

    def indices_drawn(self, iterator: Any, indices: Any) -> None:
        """A DataLoader has drawn the places of a batch."""
        self._drawn.indices_drawn(iterator, indices)

    def drawn_fetched(self, iterator: Any) -> None:
        """The places that were drawn are those of the batch now given."""
        self._drawn.fetched(iterator)

    def batch_fetched(self, batch: Any) -> None:
        """A DataLoader gave a batch."""
        self._order.add("D")
        self._contents.fetched(batch)
        self._asked.fetched(batch)
        self.evaluated_data.fetched(batch)
        self._chance.fetched(batch, id(self._drawn.dataset))
        self._batches.batch_fetched(batch)
        if self._calls < 4:
            self._losses.raw = tuple(t for t in tensors_in(batch) if t.is_floating_point() and t.is_cpu)
        else:
            self._losses.raw = ()

    def close(self) -> None:
        """Listen no more."""
        self._formula.close()

    # Facts

    def facts(self, ended: bool = False) -> Loop:
        """All of them, as plain data; what is on a device is waited for."""
        found = self._collected(ended)
        # What is read from a device only now may be news, too: the same set is looked at by who asked.
        self.moment.changed = set()
        return found

    def _collected(self, ended: bool) -> Loop:
        outside = self._weights.facts()
        return Loop(
            step=self.moment.step - 1,
            ended=ended,
            resumed=self._resumed,
            rates_before=self._rates,
            calls=self._calls,
            backwards=self._backwards,
            unstepped=self._unstepped,
            zeroed_without_step=self._zeroed,
            order=self._order.facts(),
            optimizers=self._optimizers.facts(),
            strangers=self._strangers.facts(),
            parameters=self._parameters.facts(self._optimizers, ended),
            schedulers=self._schedulers.facts(),
            modes=self._modes.facts(ended),
            chance=self._chance.facts(),
            losses=self._losses.facts(),
            wrapper=WrapperFacts(self._wrapper, self._wrapped, processes()),
            evaluation=self._evaluations.facts(),
            reshaped=self._axes.facts(),
            roots=RootFacts(self._losses.roots.looked, self._losses.roots.undivided),
            scaling=self._scaling.facts(),
            clipping=self._clipping.facts(),
            outside=outside,
            outside_times=self._weights.times,
            taken_back=self._weights.taken_back,
            layers=self._layers.facts(),
            start=self._start,
            shape=self._shape,
            depth=self._depth.facts(),
            copies=self._copies.facts(ended),
            origin=self._origin.found,
            directions=self.directions(),
            ranks=self.ranks(),
            **self._of_data(),
        )

    def _of_data(self) -> dict[str, Any]:
        return {
            "batches": self._batches.facts(),
            "targets": self._targets.facts(),
            "asked": self._asked.facts(),
            "inputs": self._inputs.facts(),
            "stored": self._stored.facts(),
            "tokens": self._tokens.facts(),
            "contents": self._contents.facts(),
            "drawn": self._drawn.facts(),
            "penalty": self._penalty.facts(),
            "pairs": self._pairs.facts(),
            "paired": self._pairing.facts(),
            "columns": self._columns.facts(),
            "novelty": self._novelty.facts(),
            "asked_in_evaluation": self._evaluated_targets.facts(),
            **self._formula.facts(),
            "sequences": self._sequences.facts(),
            "masks": self._masks.facts(),
            "rows": self.rows.facts(),
        }
