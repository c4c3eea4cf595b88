"""Are dropout and batch norm in the mode that belongs to what is done: training or evaluation?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, layers_called, of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, TWICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import ModeFacts


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleModes(LoopCheck):
    """Modules that train in eval mode, or evaluate in train mode."""


@instrument(
    source=SOURCE,
    title="Train and eval mode",
    kind="check",
    why="With dropout on or batch statistics in use, an evaluation is noisy and too low; with them off, "
    "training lacks the regularisation that was meant.",
)
def module_modes(loop: Loop) -> ModuleModes:
    """Whether modules that act differently in training and evaluation (dropout, batch norm) are in the right mode.

    A training call is one that a backward pass comes of; an evaluation is a loss without gradients, or several
    calls of the model without them: the first where a DataLoader gave them rows that training does not use, else
    the second. Modules in frozen parts may be in eval mode, and so may batch norms alone that
    have statistics from before (fine-tuning). A single call without gradients and without a loss (samples of a
    generator, an agent that acts) is no evaluation, but for one on the inputs of the training call just made, and
    with dropout alone for one on more rows than a batch has, none of them training's, at least twice or after the
    last step. Calls after the last step are judged when the watch is closed.

    Raises nothing of its own.
    """
    m = loop.modes
    noisy = Precondition("dropout or batch norm", bool(m.noisy), "no module of the model depends on the mode.")
    return judged(ModuleModes, loop.step, list(_findings(m, loop.step)), _fine(m, loop), preconditions=(noisy,))


def _fine(m: ModeFacts, loop: Loop) -> str:
    if m.eval_steps:
        steps = of_the_steps(m.eval_steps.times, loop.looked, loop.step)
        return f"Training ran with {layers_called(m.eval_in_training)} in eval mode at {steps}, which may be meant."
    return f"{counted(len(m.noisy), 'module')} with dropout or batch norm trained in train mode."


def _findings(m: ModeFacts, step: int) -> Iterator[LoopFinding]:
    if m.eval_steps.running >= TWICE and m.trained_parts:
        finding = _training(m)
        if finding is not None:
            yield finding
    if m.with_loss.times:
        yield _evaluation(m, Level.ALARM, m.with_loss.first, "a loss was computed")
    elif m.held_out.times:
        yield _evaluation(m, Level.WARNING, m.held_out.first, "held-out rows were given to the model")
    elif m.train_in_evaluation.times >= TWICE:
        yield _evaluation(m, Level.WARNING, m.train_in_evaluation.first, "the model was called several times")
    elif m.same_inputs.times >= TWICE:
        how = "the model was called again on what it had just been trained on,"
        yield _evaluation(m, Level.WARNING, m.same_inputs.first, how)
    elif m.alone.times >= TWICE:
        how = "the model was called on rows that were in no training batch that was looked at,"
        yield _evaluation(m, Level.WARNING, m.alone.first, how)
    elif m.afterwards:
        yield _evaluation(m, Level.WARNING, step, "", m.afterwards)


def _training(m: ModeFacts) -> LoopFinding | None:
    since, names = m.eval_steps.since, m.trained_parts
    if m.left_by_evaluation:
        since = m.left_by_evaluation
        return _in_eval(m, since, f"since the evaluation before step {since:,}", Level.ALARM)
    if m.root:
        return _in_eval(m, since, f"from step {since:,} on", Level.ALARM)
    untracked = [n for n in names if n in m.untracked]
    if untracked:
        return LoopFinding(
            Level.ALARM,
            Cause.TRAINING_IN_EVAL_MODE,
            f"Training runs with {layers_called(untracked)} in eval mode, which never saw a batch: what it "
            "normalises with is the mean 0 and the variance 1 that it was made with.",
            "Call model.train() before training; batch norms need statistics from pretraining to be in eval mode.",
            "num_batches_tracked above zero.",
            step=since,
            layers=tuple(untracked),
        )
    return None


def _in_eval(m: ModeFacts, since: int, when: str, level: Level) -> LoopFinding:
    names = m.trained_parts
    norms = set(names) & set(m.norms)
    what = ["dropout is off there"] if set(names) - norms else []
    what += ["batch norm uses running statistics that stand still"] if norms else []
    return LoopFinding(
        level,
        Cause.TRAINING_IN_EVAL_MODE,
        f"Training runs with {layers_called(names)} in eval mode {when}: {', and '.join(what)}.",
        "Call model.train() before the training batches, after each evaluation.",
        f"{names[0]}.training is True in a training call.",
        step=since,
        layers=names,
    )


def _evaluation(m: ModeFacts, level: Level, step: int, how: str, afterwards: int = 0) -> LoopFinding:
    if afterwards:
        times = "once" if afterwards == 1 else f"{afterwards:,} times"
        how = f"after the last step, {step:,}, the model was called {times}"
        how += " on rows that were in no training batch that was looked at,"
    else:
        how = f"before step {step:,} {how}"
    moving = " Its running statistics move with the held-out data." if m.moving_statistics else ""
    return LoopFinding(
        level,
        Cause.EVALUATION_IN_TRAIN_MODE,
        f"The model is evaluated in train mode: {how} without gradients while "
        f"{layers_called(m.noisy)} {'were' if len(m.noisy) > 1 else 'was'} in train mode.",
        f"Call model.eval() before an evaluation and model.train() after it.{moving}",
        "model.training is False in the calls under no_grad.",
        step=step,
        layers=m.noisy,
    )
