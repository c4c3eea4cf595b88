"""`preflight`: what of a training will not work, found before it begins, in about a minute.

One batch is trained on with a copy of the model, watched; then the copies are asked what their answers depend on,
and what else there is to measure is measured as far as the time allows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.checkpoints.unwrap import bare_model
from diag.display import format_seconds
from diag.door import at_the_door
from diag.errors import InvalidInput, first_line, type_of
from diag.linalg.deadline import Deadline
from diag.ranges import Count, Positive
from diag.registry import BeforeTraining, Instrument, Kind, attempt, instruments
from diag.result import Result, Skipped
from diag.run.entries import Event, Record
from diag.run.run import Run
from diag.snapshot.batch import Batch
from diag.snapshot.external.trial import Attempt, Trial
from diag.snapshot.inside import apart
from diag.snapshot.preserve import random_states
from diag.snapshot.snapshot import Snapshot
from diag.trial import controls
from diag.trial.overfit import fit, twin_of
from diag.watching.watcher import watch

FITTED_EXAMPLES = 64  # of the batch that is fitted
MEASURED = 256  # examples that the instruments are tried on
RATES = (1e-3, 1e-2, 1e-4)  # of Adam, where there is no optimizer or the given one does not get the loss down
ENOUGH_FALL = 0.5  # of the first loss gone: the batch can be learned
ONLY_IN_A_RUN = frozenset(
    {"history", "loop", "loss_record", "update", "other", "interpolation", "ancestor", "previous_losses"}
)
SHARE_OF_AN_ATTEMPT = 0.25  # of the time, for one attempt
NO_TIME = "It would take about {}, which the {} of a preflight did not leave; in a watch it waits for its turn."

StageProgress = Callable[[str], None]


@at_the_door
def preflight(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    optimizer: Optimizer | None = None,
    *,
    steps: Count = 200,
    seconds: Positive = 60.0,
    unpack: Callable[[Any], tuple[Any, Any]] | None = None,
    progress: StageProgress = lambda text: None,
) -> Run:
    """Try out a training before it begins: `run = diag.preflight(model, loss_fn, loader, optimizer)`.

    model: as it will be trained; only copies of it are. loss_fn, data, unpack: as for `Snapshot`; the first batch
    (at most 64 examples of it) is fitted, and instruments are tried on up to 256 examples. optimizer: the one that
    will train; without it Adam is used, and nothing is said of learning rates. steps: at most so many in an
    attempt. seconds: about what all of it may take. progress(text): called with what comes next.

    Gives a run in memory: `run.findings()`, `run.stories()`, `diag.report(run, "preflight.html")`. Its steps are
    those of the first attempt; each instrument's outcome says whether it will run on this model, or why not.

    Raises InvalidInput where the model, the loss and the data do not go together or the model cannot be copied.
    """
    began = time.perf_counter()
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise InvalidInput(f"optimizer is {type_of(optimizer)}; expected a torch.optim.Optimizer.")
    snapshot = Snapshot(
        bare_model(model),
        loss_fn,
        data,
        optimizer=optimizer,
        unpack=unpack,
        max_examples=MEASURED,
        deadline=Deadline(),
    )
    _refuse_without_parameters(snapshot.model)
    with random_states():
        snapshot.explain()
        batch = _batch(snapshot)
        progress("Fitting one batch")
        trial, run = _tried(snapshot, batch, optimizer, steps, SHARE_OF_AN_ATTEMPT * seconds)
        forward = _forward_seconds(snapshot)
        records = _judged(snapshot, trial, run.last_step, forward, SHARE_OF_AN_ATTEMPT * seconds)
        progress("Trying the instruments")
        others, ready = _measured(snapshot, run.last_step, forward, seconds, began)
    return _finished(run, [*records, *others], ready, snapshot.model, time.perf_counter() - began)


def _refuse_without_parameters(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInput(
            f"{type(model).__name__} has no trainable parameter; preflight needs one that is trained."
        )


def _batch(snapshot: Snapshot) -> Batch:
    """The first examples of the data; the whole first batch where a part of it gives another answer."""
    whole = replace(snapshot.batches[0], coupled=False, why="")  # that examples see each other is found out
    if whole.size <= FITTED_EXAMPLES:
        return whole
    part = whole.slice(0, FITTED_EXAMPLES)
    try:
        with apart.in_mode(snapshot.model, "eval"):
            snapshot.batch_loss(part.forward(snapshot.model), part.targets)
    except Exception:  # one example's inputs are not rows of the batch, as in a graph
        return whole
    return part


def _tried(
    snapshot: Snapshot, batch: Batch, optimizer: Optimizer | None, steps: int, seconds: float
) -> tuple[Trial, Run]:
    """Attempts with the user's optimizer, then with Adam until one gets the loss down."""
    plans: list[Optimizer | float] = [optimizer, *RATES] if optimizer is not None else [*RATES]
    attempts: list[Attempt] = []
    models: list[nn.Module] = []
    run = Run()
    for plan in plans:
        model, with_, name = _prepared(snapshot.model, plan)
        if attempts:
            made = fit(model, batch, snapshot.batch_loss, with_, name, steps, seconds / 2)
        else:
            watcher = watch(
                model, loss_fn=snapshot.loss_fn, probe=[batch], budget=math.inf, instruments=_checks(plan)
            )
            with watcher:
                made = fit(model, batch, snapshot.batch_loss, with_, name, steps, seconds)
            run = watcher.run
        attempts.append(made)
        models.append(model)
        if made.fall >= ENOUGH_FALL:
            break
    trial = Trial(examples=batch.size, attempts=tuple(attempts), own=optimizer is not None)
    return replace(trial, **_controls(snapshot, batch, models[attempts.index(trial.best)])), run


def _prepared(model: nn.Module, plan: Optimizer | float) -> tuple[nn.Module, Optimizer, str]:
    """A copy of the model, the optimizer that trains it, and the optimizer's name in a sentence."""
    twin, held = twin_of(model, plan if isinstance(plan, Optimizer) else None)
    if held is not None:
        return twin, held, f"the given {type(held).__name__}"
    trained = [p for p in twin.parameters() if p.requires_grad]
    return twin, torch.optim.Adam(trained, lr=cast(float, plan)), f"Adam at a learning rate of {plan:g}"


def _checks(plan: Optimizer | float) -> list[str]:
    """The checks that say something of one batch; of the optimizer only where it is the user's."""
    known = [i for i in instruments().values() if i.before_training is not BeforeTraining.NEVER]
    own = isinstance(plan, Optimizer)
    return [i.name for i in known if own or i.before_training is not BeforeTraining.WITH_OPTIMIZER]


def _controls(snapshot: Snapshot, batch: Batch, fitted: nn.Module) -> dict[str, Any]:
    """What the outputs depend on, before and after the best attempt; what is unavailable stays NaN, with why."""
    model, loss = snapshot.model, snapshot.batch_loss
    found: dict[str, Any] = {}
    unsure: dict[str, str] = {}
    for name, measure in {
        "exchanged_loss": lambda: controls.exchanged_loss(model, batch, loss),
        "fitted_exchanged_loss": lambda: controls.exchanged_loss(fitted, batch, loss),
        "input_change": lambda: controls.input_change(model, batch),
        "fitted_input_change": lambda: controls.input_change(fitted, batch),
        "modes": lambda: controls.both_modes(fitted, batch, loss),
    }.items():
        try:
            found[name] = measure()
        except Exception as error:
            unsure[name] = first_line(error)
    train, evaluated = found.pop("modes", (math.nan, math.nan))
    return found | {"train_loss": train, "eval_loss": evaluated, "unsure": unsure}


def _judged(snapshot: Snapshot, trial: Trial, step: int, forward: float, seconds: float) -> list[Record]:
    """What asks for the trial, on the model as it will be trained: copies of it were."""
    asking = [i for i in instruments().values() if any(n.name == "trial" for n in i.needs)]
    records = []
    for i in asking:
        snapshot.deadline.restart(seconds, why=f"what {format_seconds(seconds)} leave for it")
        expected = _passes(i) * forward
        outcome = attempt(snapshot, i, trial=trial) if expected <= seconds else _no_time(i, expected, seconds)
        records.append(Record(step, i.name, outcome))
    return records


def _no_time(i: Instrument, expected: float, seconds: float) -> Skipped:
    return Skipped(i.name, NO_TIME.format(format_seconds(expected), format_seconds(seconds)))


def _measured(
    snapshot: Snapshot, step: int, forward: float, seconds: float, began: float
) -> tuple[list[Record], Event]:
    """Which measurements run on this model, the cheapest first, as far as the time allows.

    Of an untrained network they judge nothing, so what is kept is that they run and what that takes, or why not.
    """
    known = [i for i in instruments().values() if i.kind is Kind.MEASUREMENT and not _asks_for_a_run(i)]
    records, runs = [], []
    for expected, i in sorted(((_passes(i) * forward, i) for i in known), key=lambda pair: pair[0]):
        left = seconds - (time.perf_counter() - began)
        snapshot.deadline.restart(max(left, 0.0), why=f"what {format_seconds(seconds)} leave for it")
        outcome = attempt(snapshot, i) if expected <= left else _no_time(i, expected, seconds)
        if isinstance(outcome, Result):
            runs.append(f"{i.name} ({format_seconds(outcome.provenance.seconds or 0.0)})")
        else:
            records.append(Record(step, i.name, outcome))
    text = f"On this model, {snapshot.num_examples} examples and this machine run: {', '.join(runs) or 'none'}."
    return records, Event(step, "info", text)


def _asks_for_a_run(i: Instrument) -> bool:
    """Whether it needs what only a training has: its steps, an earlier state, another network."""
    return bool({n.quantity.name for n in i.needs if not n.optional} & ONLY_IN_A_RUN)


def _passes(i: Instrument) -> float:
    expected = i.expected_passes({})
    return sum(cost.passes for cost in i.costs) if expected is None else expected


def _forward_seconds(snapshot: Snapshot) -> float:
    began = time.perf_counter()
    with apart.in_mode(snapshot.model, "eval"):
        for batch in snapshot.batches:
            batch.forward(snapshot.model)
    return time.perf_counter() - began


def _finished(run: Run, records: list[Record], ready: Event, model: nn.Module, seconds: float) -> Run:
    """The run of the watched attempt with what was tried besides."""
    about = dict(run.metadata) | {"name": f"preflight of {type(model).__name__}", "checked": "before training"}
    summary = Event(
        run.last_step, "info", f"Preflight took {format_seconds(seconds)}; copies of the model were trained."
    )
    return replace(run, metadata=about, records=[*run.records, *records], events=[*run.events, ready, summary])
