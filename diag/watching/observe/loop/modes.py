"""The modes of modules that act differently in training and evaluation, seen at the model's calls."""

from __future__ import annotations

import weakref
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from diag.distributed.placement import is_spread
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.network import ModeFacts
from diag.watching.observe.loop.evaluation.quiet import PlainEvaluations, QuietCalls
from diag.watching.observe.loop.moment import Counter, Moment

MODULES_A_CALL = 6  # modules at a call where no evaluation came before it
RUN = 2  # calls without gradients in a row that make an evaluation


class Modes:
    """Follows dropout, batch norm and the model's own mode."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._model, self._moment = model, moment
        self._named = [(n, m) for n, m in model.named_modules() if is_noisy(m)]
        self._at = 0
        self._pending: list[int] | None = None
        self._was_training: set[int] = set()
        self._in_eval: list[int] = []
        self._eval_steps = Counter()
        self._left_by = 0
        self._root_in_eval = self._root_was_training = False
        self._quiet_calls = self._evaluations = self._held_out_calls = 0
        self._only_batch = self._sampled = False
        self._quiet_inputs: Any = None
        self._evaluated_since = True
        self._train_in_evaluation, self._with_loss, self._held_out = Counter(), Counter(), Counter()
        self._noisy_call = False
        self._inputs: Any = None  # of the last training call, while somebody else holds them
        self._descended = False
        self._same_inputs = Counter()
        self._quiet, self._alone, self._afterwards = QuietCalls(), Counter(), 0
        self._plain = PlainEvaluations()

    # Training calls

    def training_call(self, args: Any = (), kwargs: Any = MappingProxyType({})) -> None:
        """The model was called in training; the call counts once a backward pass comes of it."""
        if self._quiet_calls:
            self._evaluation_over()
        self._noisy_call = self._descended = False
        self._inputs = _reference(args, kwargs)
        if not self._named:
            self._plain.training_call(first_tensor(args, kwargs))
            return
        self._quiet.training_call(first_tensor(args, kwargs))
        if self._evaluated_since or self._eval_steps.running or self._calls_all():
            looked = range(len(self._named))
        else:
            looked = range(self._at, min(self._at + MODULES_A_CALL, len(self._named)))
            self._at = looked.stop if looked.stop < len(self._named) else 0
        self._pending = [i for i in looked if not self._named[i][1].training]
        self._pending_root = not self._model.training
        self._pending_all = len(looked) == len(self._named)

    def _calls_all(self) -> bool:
        return len(self._named) <= MODULES_A_CALL

    def backward(self) -> None:
        """A backward pass reached the model: what was seen at its call was training."""
        self._descended = True
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step = self._moment.step
        if pending:
            self._found(pending, step)
        elif self._pending_all or self._eval_steps.running:
            self._eval_steps.miss()
            self._in_eval = []
        if self._pending_all:
            self._was_training |= set(range(len(self._named))) - set(pending)
            self._evaluated_since = False
        self._root_was_training |= not self._pending_root

    def _found(self, pending: list[int], step: int) -> None:
        if self._eval_steps.last != step or not self._eval_steps.times:
            running = self._eval_steps.hit(step)
            if running == 1 and any(i in self._was_training for i in pending):
                self._left_by = step
            if running <= 3:
                self._moment.news(("eval in training", running), "modes")
        self._in_eval = sorted(set(self._in_eval) | set(pending))
        self._root_in_eval = self._pending_root

    # Calls without gradients

    def quiet_call(
        self,
        args: Any = (),
        kwargs: Any = MappingProxyType({}),
        untrained: bool = False,
        only_batch: bool = False,
    ) -> None:
        """The model was called without gradients; untrained: on a new batch of a DataLoader whose rows training
        does not use; only_batch: that loader has no other."""
        self._evaluated_since = True
        self._quiet_calls += 1
        self._noisy_call = bool(self._named) and self._model.training and any(m.training for _, m in self._named)
        self._held_out_calls += untrained and self._noisy_call
        self._only_batch = only_batch
        now = first_tensor(args, kwargs)
        if self._named:
            self._quiet.quiet_call(now, self._noisy_call and not self._taken_again())
        again = now is not None and self._quiet_inputs is not None and self._quiet_inputs() is now
        self._sampled = again or (self._sampled and self._quiet_calls > 1)
        self._quiet_inputs = None if now is None else weakref.ref(now)
        if self._noisy_call and self._quiet_calls == 1 and self._descended and self._is_same(args, kwargs):
            # Nothing is learned of a batch after its backward pass: this asks how well it is answered.
            self._hit(self._same_inputs, "train mode, same inputs")
        if self._quiet_calls == RUN:
            self._evaluations += 1
            if self._noisy_call:
                self._hit(self._train_in_evaluation, "train mode in evaluation")

    def evaluates(self, args: Any, kwargs: Any) -> bool:
        """Whether this call without gradients is one of evaluation: in that mode, or where the mode changes nothing
        by what it is given."""
        if self._named or not self._model.training:
            return not self._model.training
        tensors = tensors_in((args, dict(kwargs)))  # what comes with a time, or with another input, may be sampling
        return self._plain.quiet_call(tensors[0] if len(tensors) == 1 else None, self._moment.step)

    def _evaluation_over(self) -> None:
        """Training goes on. A batch that was called several times (dropout left on to sample answers), or one of
        many that came alone (pseudo-labels for a step), is no evaluation."""
        calls, self._quiet_calls = self._quiet_calls, 0
        held_out, self._held_out_calls = self._held_out_calls, 0
        if held_out and not self._sampled and (calls >= RUN or self._only_batch):
            self._hit(self._held_out, "train mode on held-out rows")
        if self._quiet.over(self._moment.step) == 1 and not self._any_norms:
            self._hit(self._alone, "train mode, one call")

    @property
    def _any_norms(self) -> bool:
        return any(isinstance(m, _BatchNorm) for _, m in self._named)

    def _taken_again(self) -> bool:
        """Whether batch statistics are gathered as a plain mean, which is no evaluation."""
        return any(isinstance(m, _BatchNorm) and m.momentum is None for _, m in self._named)

    def _is_same(self, args: Any, kwargs: Any) -> bool:
        now = first_tensor(args, kwargs)
        return now is not None and self._inputs is not None and self._inputs() is now

    def quiet_loss(self) -> None:
        """A loss without gradients was computed."""
        if self._quiet_calls and self._noisy_call:
            self._noisy_call = False
            self._hit(self._with_loss, "train mode in evaluation, with loss")
            if self._quiet_calls < RUN:
                self._quiet_calls = RUN
                self._evaluations += 1

    def _hit(self, counter: Counter, kind: str) -> None:
        if counter.last != self._moment.step or not counter.times:
            counter.hit(self._moment.step)
        self._moment.news((kind, min(counter.times, 3)), "modes")

    # Facts

    def facts(self, ended: bool = False) -> ModeFacts:
        """As plain data; ended: what is under way is the end of the training."""
        if ended and self._was_training:
            calls = self._quiet.over(self._moment.step)
            self._afterwards = self._afterwards or (calls if calls >= RUN or not self._any_norms else 0)
        names = [self._named[i][0] for i in self._in_eval]
        norms = [(n, m) for n, m in (self._named[i] for i in self._in_eval) if isinstance(m, _BatchNorm)]
        parents = dict(self._model.named_modules())
        return ModeFacts(
            noisy=tuple(n for n, _ in self._named),
            eval_in_training=tuple(names),
            eval_steps=self._eval_steps.tally(),
            left_by_evaluation=self._left_by,
            root=self._root_in_eval,
            trained_parts=tuple(n for n in names if is_trained(n, parents)),
            untracked=tuple(n for n, m in norms if _is_untracked(m)),
            norms=tuple(n for n, _ in norms),
            evaluations=self._evaluations,
            train_in_evaluation=self._train_in_evaluation.tally(),
            with_loss=self._with_loss.tally(),
            held_out=self._held_out.tally(),
            same_inputs=self._same_inputs.tally(),
            alone=self._alone.tally(),
            afterwards=self._afterwards,
            moving_statistics=any(isinstance(m, _BatchNorm) and m.track_running_stats for _, m in self._named),
        )


def first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """The first tensor that the model is given."""
    return next((t for t in tensors_in((args, dict(kwargs)))), None)


def is_dense(t: Tensor) -> bool:
    """Whether its numbers lie in memory one beside the other, so that they can be read as rows: on this process all
    of them, as reading a distributed tensor would wait for processes that may not be watched."""
    return t.layout is torch.strided and not t.is_nested and not is_spread(t)


def _reference(args: Any, kwargs: Any) -> Any:
    tensor = first_tensor(args, kwargs)
    return None if tensor is None else weakref.ref(tensor)


def is_noisy(module: nn.Module) -> bool:
    """Whether the module's mode changes what it does."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _BatchNorm):
        return bool(module.track_running_stats)
    rate = getattr(module, "dropout", None)
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and isinstance(rate, float) and rate > 0


def is_trained(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the smallest module around `name` that has parameters has a trainable one."""
    while True:
        parameters = list(modules[name].parameters()) if name in modules else []
        if parameters:
            return any(p.requires_grad for p in parameters)
        if not name:
            return False
        name = name.rpartition(".")[0]


def _is_untracked(norm: _BatchNorm) -> bool:
    seen = norm.num_batches_tracked
    return seen is not None and seen.device.type == "cpu" and int(seen) == 0
