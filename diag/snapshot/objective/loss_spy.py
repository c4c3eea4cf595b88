"""Observe a loss being computed: which loss function of torch is called on what, and what it returns.

The calls show what the user's own code compares with what, however it got there: which tensor enters the
loss, along which axis the classes lie, how labels were shifted, which are ignored and how they are weighed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOSSES = (
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "poisson_nll_loss",
    "soft_margin_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "hinge_embedding_loss",
)
# Of several tensors or of alignments: no other code asks which logits and labels these are of.
FURTHER_LOSSES = (
    "ctc_loss",
    "gaussian_nll_loss",
    "cosine_embedding_loss",
    "margin_ranking_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
)
OF_CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss")  # where the targets are integers
BY_BATCH = ("multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss")
MOST_CALLS = 64  # calls that are kept
LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)


def input_and_target(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a call of one of these compares with what; None for one that is not given."""
    values = args[0] if args else kwargs.get("input")
    return values, args[1] if len(args) > 1 else kwargs.get("target")


@dataclass(frozen=True)
class LossFunctionCall:
    """One call of a loss function of torch: what it was given, by name, and what it returned.

    logits: what `log_softmax` made the input of, where the loss was called on that.
    """

    name: str
    input: Tensor
    target: Any
    settings: dict[str, Any]
    value: Tensor
    logits: Tensor | None = None

    @property
    def is_of_classes(self) -> bool:
        """Whether it compares scores of classes with class numbers."""
        whole = isinstance(self.target, Tensor) and not self.target.is_floating_point()
        return self.name in OF_CLASSES and whole and not self.target.is_complex()

    @property
    def is_mean(self) -> bool:
        """Whether what it returned is a mean over what counts."""
        return self.settings.get("reduction", "mean") in ("mean", "batchmean")


class LossSpy(TorchFunctionMode):
    """Inside the context, `calls` has the calls of loss functions that code makes; those inside another not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossFunctionCall] = []
        self._normalised: list[tuple[Tensor, Tensor]] = []  # what log_softmax gave, and of what

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _NAMES.get(func)
        if name is not None and isinstance(result, Tensor) and len(self.calls) < MOST_CALLS:
            self._note(name, args, kwargs or {}, result)
        elif func in LOG_SOFTMAX and isinstance(result, Tensor) and len(self._normalised) < MOST_CALLS:
            self._normalised.append((result, args[0] if args else (kwargs or {})["input"]))
        return result

    def _note(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        bound = _SIGNATURES[name].bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        values, target = settings.pop("input"), settings.pop("target")
        for old in ("size_average", "reduce"):
            settings.pop(old, None)
        self.calls.append(
            LossFunctionCall(name, values, target, settings, result, self._before_log_softmax(name, values))
        )

    def _before_log_softmax(self, name: str, values: Tensor) -> Tensor | None:
        """What the input of nll_loss was made of, where it is log_softmax's result in another shape at most."""
        if name != "nll_loss":
            return None
        for result, logits in self._normalised:
            same = result.data_ptr() == values.data_ptr() and result.numel() == values.numel()
            if same and result.shape == values.shape:
                return logits
            if same and values.ndim == 2 and logits.shape[-1] == values.shape[1]:
                return logits.reshape(values.shape)
        return None


_NAMES = {function: name for name in LOSSES if (function := getattr(F, name, None)) is not None}
# Read once, at import: a watch exchanges the bodies of these functions, and with them what they seem to take.
_SIGNATURES = {name: inspect.signature(function) for function, name in _NAMES.items()}
