"""A model at one moment, with the loss and the data it is measured on.

Nothing is computed when a snapshot is made. Each quantity is computed when it is first asked for, once, and is
shared by all instruments. Measuring leaves the model as it was (see `preserve`). Once the model has been trained
further, what was not yet computed is refused: a snapshot never mixes two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diag.checkpoints.unwrap import bare_model
from diag.distributed.together import Together
from diag.door import class_at_the_door
from diag.errors import DiagError, InvalidInput, MissingQuantity
from diag.linalg.deadline import NEVER, Deadline
from diag.snapshot.batch import Batch, fingerprint
from diag.snapshot.cutting import Cutting
from diag.snapshot.explain import try_out
from diag.snapshot.glossary import HELD_OUT, Effort, lookup
from diag.snapshot.inside.listener import PassListener
from diag.snapshot.objective.own_loss import loss_of
from diag.snapshot.objective.shares import Counted
from diag.snapshot.reading.data import Cut, equally_many, read_batches, shared_out
from diag.snapshot.sharded.chosen_model import by_layer_of, device_of, model_to_measure
from diag.snapshot.sharded.quantities import refuse_shared
from diag.snapshot.sharded.whole import refuse_another_function, sharded_as
from diag.snapshot.state.hook_check import HookCheck
from diag.snapshot.state.hooks import is_silent
from diag.snapshot.state.host import on_host
from diag.snapshot.state.modes import unseen
from diag.snapshot.state.moment import MomentOfSnapshot
from diag.snapshot.state.python import StateLost
from diag.snapshot.state.tensors import is_checked
from diag.snapshot.state.unmade import refuse_unmade, refuse_unusual
from diag.snapshot.undisturbed import undisturbed
from diag.snapshot.validation import BY_LAYER, checked_arguments

WITHOUT_ROWS = (
    "The target is one number without an axis of examples, so that examples cannot be told apart; give batches: "
    "(inputs[None], target[None]) for one example."
)
_READING = {"data", "unpack", "seed", "device", "micro_batch", "max_examples"}  # arguments that reading depends on


@class_at_the_door(convert=False)
class Snapshot:
    """A model at one moment, and what it is measured on.

    model: the network; it stays on its device and is left exactly as it was.
    loss_fn: `loss_fn(outputs, targets)`, the mean over examples; None where the outputs carry `.loss`
        (Hugging Face models given labels) or no instrument needs a loss.
    data: a DataLoader, any iterable of batches, or one batch. A batch is `(inputs, targets)`, a dict with
        labels, or what `unpack(batch) -> (inputs, targets)` makes of it. It is read once and kept.
    held_out: data of the same kind that was not trained on. previous, other: an earlier state and another network:
        a state dict or a Snapshot. optimizer: the torch optimizer that trains the model. history, loop: the record
        of a watched run and the facts of its loop (or a function that gives them).
    carry: what earlier measurements of the same model left, to spare work (see `diag.curvature.carry`).
    seed: makes every estimate repeatable. device: where to measure; a copy of the model goes there if it is
        elsewhere. micro_batch: examples per pass, to bound memory. max_examples: use only the first ones (of data
        without a length, which may never end, the first 8,192 are used where this is not given, and a warning
        says so).
    ranks: with True the data are this rank's share, and every rank of torch.distributed makes the same snapshot on
        its own share (or all of them on the same data, which they then share out): loss, gradient, curvature and
        what has a row an example are those of all the data. Of a model that is sharded (fully_shard, tensor
        parallel) each rank takes a whole copy. Where that does not fit on some rank, or with "by_layer", the
        weights of one layer at a time are gathered, no rank ever holds all of them, and of vectors of their size
        each has its shards: for curvature, logits and losses of a model under fully_shard. What is not put
        together is refused.
    deadline: what measuring may take, asked between batches, products and examples (see `diag.linalg.deadline`).

    Raises InvalidInput where model, loss_fn or data are not of these kinds.
    """

    @unseen()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        *,
        held_out: Any = None,
        previous: Any = None,
        other: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        history: Any = None,
        loop: Any = None,
        carry: Any = None,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        micro_batch: int | None = None,
        max_examples: int | None = None,
        deadline: Deadline = NEVER,
        ranks: bool | str | Together = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        arguments |= checked_arguments(arguments)
        self.ranks = ranks if isinstance(ranks, Together) else Together(device_of(model)) if ranks else None
        self._placement = sharded_as(bare_model(model))
        self.layers = by_layer_of(arguments, self.ranks) if self._placement else None
        whole = self.ranks is not None and self._placement and self.layers is None
        self._sharded = bare_model(model) if whole else None
        self.model, self.optimizer = model_to_measure(bare_model(model), optimizer, device, self.ranks, self.layers)
        self.loss_fn = loss_fn
        self.previous, self.other, self.history = previous, other, history
        self.loop, self.carry, self.deadline = loop, carry, deadline
        self.seed, self.device = arguments["seed"], device
        self.micro_batch, self.max_examples = arguments["micro_batch"], arguments["max_examples"]
        self._arguments = arguments | self._made()
        self.cut = Cut()  # what of the data was read, and how it was cut
        self._computed: dict[str, Any] = {}
        self.listeners: dict[str, PassListener] = {}  # to the pass that gives the logits
        self._entered: bool | None = None  # a measurement is going on; whether it calls the model
        self._moment = MomentOfSnapshot(self.model, loss_fn)

    def _made(self) -> dict[str, Any]:
        """The arguments by which another snapshot shares what was made of them here."""
        if self.layers is not None:
            return {"ranks": BY_LAYER}
        return {"model": self.model, "optimizer": self.optimizer, "ranks": self.ranks or False}

    @property
    def cut_short(self) -> str:
        """In one sentence, where not all of the data was read."""
        return self.cut.short

    @property
    def limit(self) -> Deadline:
        """What measuring may take: of a snapshot over ranks, the deadline that they have in common."""
        return self.deadline if self.ranks is None else self.ranks.deadline

    @unseen()
    def quantity(self, name: str) -> Any:
        """The value of a glossary quantity; `held_out_` before a name asks for it on the held-out data.

        Raises MissingQuantity, in one sentence with what to give, where the snapshot cannot give it.
        """
        row = lookup(name)
        refuse_shared(name, self._placement, self.ranks is not None, self.layers is not None)
        self.deadline.check()
        if name not in self._computed:
            self.refuse_a_later_moment()
            source = self
            try:
                source = self.held_out if name.startswith(HELD_OUT) else self
                # Inside a measurement that has been entered, each pass puts back what it moves (see `preserve`).
                entered = is_checked(source.model)
                around = nullcontext() if entered else source.undisturbed(called=row.cost is not Effort.NONE)
                with on_host(), around:
                    self._computed[name] = row.function()(source)
            except MissingQuantity as error:
                raise MissingQuantity(f"{name} is missing: {error}") from None
            except DiagError:
                raise
            except Exception as error:
                source.explain(error)
                raise
        return self._computed[name]

    @contextmanager
    def undisturbed(self, called: bool = True) -> Iterator[None]:
        """What to measure inside of: the model and the loss are afterwards as they were (see `undisturbed`).

        called: whether the model is; then Unsupported is raised where its hooks change what it gives. Raises
        Unsupported, too, where a call of the model changes what cannot be put back.
        """
        if self._entered is not None and (self._entered or not called):
            yield  # inside of all this already; each pass puts back what it moves (see `preserve`)
            return
        if called:
            refuse_unmade(self.model)
        if called and self._arguments["data"] is not None and not is_silent(self.model):
            self.hook_check.refuse(self.model, lambda: self.batches)
        self._moment.measurement_begins()
        before, self._entered = self._entered, called
        try:
            with undisturbed(self.model, self.loss_fn):
                yield
        except StateLost as error:
            self.hook_check.lost = str(error)
            raise
        finally:
            self._entered = before

    @cached_property
    def hook_check(self) -> HookCheck:
        """Which of the model's hooks have been tried."""
        return HookCheck()

    def explain(self, error: Exception | None = None) -> None:
        """After something broke: raise InvalidInput if the model or the loss cannot be called on the data, and
        Unsupported where the model is of a kind that the error may come from."""
        try_out(self.model, self.batch_loss, self.batches)
        if error is not None:
            refuse_unusual(self.model, error)

    @cached_property
    def together(self) -> Together | None:
        """The ranks that the data are split over, once they are seen to hold one model; None for one process."""
        if self.ranks is not None:
            self.ranks.refuse_different({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})
        return self.ranks

    def all_rows(self, compute: Callable[[], Tensor], what: str) -> Tensor:
        """What `compute()` gives of this data, (n, ...): with ranks=, the rows of all of them, rank 0's first."""
        if self.together is None:
            return compute()
        _ = self.batches  # which the ranks agree on by themselves
        return self.together.rows(compute, what)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` gives, computed when it is first asked for under `name` and kept with the snapshot."""
        if name not in self._computed:
            self._computed[name] = make()
        return self._computed[name]

    def refuse_a_later_moment(self) -> None:
        """Raise InvalidInput where the model, the loss or the data have changed since the snapshot was made."""
        self._moment.refuse_later(self.__dict__.get("batches"))

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The data in micro-batches of the normal form, on the snapshot's device."""
        data, unpack = self._arguments["data"], self._arguments["unpack"]
        if data is None:
            raise MissingQuantity("the snapshot has no data; give data= with (inputs, targets).")
        whole = self.max_examples is None and self.micro_batch is None
        settled = self._named if whole else lambda batch: self.cuttable((batch,))[0]
        limits = (self.max_examples, self.micro_batch, self.device, self.seed)
        batches, self.cut = read_batches(data, unpack, *limits, settled, own_loss=self.loss_fn is None)
        if self._sharded is not None and self.ranks is not None:
            refuse_another_function(self._sharded, self.model, batches[0], self.ranks)
            self._sharded = None
        if self.ranks is not None:
            batches, self.cut = shared_out(batches, self.ranks, self.cut)
        if self.layers is not None and self.ranks is not None:
            batches = equally_many(batches, self.ranks)
        self._moment.read(batches)
        return batches

    @cached_property
    def cutting(self) -> Cutting:
        """How batches are cut into examples, once it has been tried."""
        return Cutting()

    def _named(self, batch: Batch) -> Batch:
        """The batch with the targets where a model that computes its own loss finds them."""
        return batch.with_targets(self.model) if self.loss_fn is None else batch

    def cuttable(self, batches: Iterable[Batch]) -> tuple[Batch, ...]:
        """The batches for what takes examples out of them: which inputs hold these is tried on the model.

        Raises InvalidInput where the examples lie along the second axis, or the target is one number without axes.
        """
        named = tuple(map(self._named, batches))
        if any(isinstance(b.targets, Tensor) and not b.targets.ndim for b in named):
            raise InvalidInput(WITHOUT_ROWS)
        if self.ranks is not None or self._placement:  # a call of the model would wait for the other ranks
            return named
        try:
            refuse_unmade(self.model)
            with self.undisturbed(called=False):
                return tuple(self.cutting.settled(self.model, batch) for batch in named)
        except InvalidInput:
            raise
        except DiagError:  # the model is refused where it is measured; its data can be looked at
            return named

    @property
    def num_examples(self) -> int:
        """The number of examples in the data."""
        return sum(batch.size for batch in self.batches)

    @cached_property
    def all_examples(self) -> int:
        """The same over all ranks that share the data."""
        return self.num_examples if self.ranks is None else round(self.ranks.total(self.num_examples))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the data, so that two measurements can be seen to be on the same examples."""
        return fingerprint(self.batches)

    def batch_loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss of a batch, by loss_fn or, without one, the outputs' own `.loss`.

        Raises InvalidInput where loss_fn cannot be called on them, MissingQuantity where there is no loss, Stopped
        where the deadline has passed: every pass over the data comes by here, and so does every example alone.
        """
        self.deadline.check()
        if isinstance(targets, Counted):
            return targets.share_of(self.batch_loss(targets.cut_off(outputs), targets.targets))
        return loss_of(self.loss_fn, outputs, targets)

    def provenance(self) -> dict[str, Any]:
        """What results record about where they come from."""
        if self._arguments["data"] is None:
            return {"seed": self.seed}
        return {"num_examples": self.all_examples, "data_fingerprint": self.fingerprint, "seed": self.seed}

    @property
    def arguments(self) -> dict[str, Any]:
        """What the snapshot was made with, by name: `Snapshot(**snapshot.arguments)` makes another like it."""
        return dict(self._arguments)

    @property
    def has_held_out(self) -> bool:
        """Whether there is held-out data."""
        return self._arguments["held_out"] is not None

    @cached_property
    def held_out(self) -> Snapshot:
        """The same model on the held-out data. Raises MissingQuantity where there is none."""
        if not self.has_held_out:
            raise MissingQuantity("the snapshot has no held-out data; give held_out= with (inputs, targets).")
        return self.with_data(self._arguments["held_out"])

    def replace(self, **changes: Any) -> Snapshot:
        """A snapshot with the same arguments except `changes`; data that was read is not read again.

        Raises InvalidInput for a name that `Snapshot` does not take.
        """
        if unknown := set(changes) - set(self._arguments):
            raise InvalidInput(f"A Snapshot has no {sorted(unknown)[0]!r}; it takes {', '.join(self._arguments)}.")
        other = Snapshot(**self._arguments | changes)
        if other.model is self.model:
            other.__dict__["cutting"] = self.cutting
        if "batches" in self.__dict__ and not set(changes) & _READING:
            other.__dict__["batches"] = self.batches
            other.cut = self.cut
            other._moment.data_from(self._moment)
        return other

    def with_data(self, data: Any, model: nn.Module | None = None) -> Snapshot:
        """The same model (or another) and the same loss on other data, without what belongs to this data's run."""
        alone = {"held_out": None, "previous": None, "other": None, "history": None, "loop": None, "carry": None}
        return self.replace(data=data, model=model or self.model, **alone)

    def __repr__(self) -> str:
        known = f", {self.num_examples:,} examples" if "batches" in self.__dict__ else ""
        return f"<Snapshot of {type(self.model).__name__}{known}>"
