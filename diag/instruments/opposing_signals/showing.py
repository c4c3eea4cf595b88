"""What a result keeps of the rows that it names, so that a report can show them without the data."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import LARGEST_INPUT_SHOWN, displayed
from diag.errors import InvalidInput
from diag.instruments.opposing_signals.measuring import Groups

ROWS_OF_A_GROUP = 12  # rows of each group whose inputs are kept


def kept(groups: Groups, losses: Tensor, inputs: Any, labels: Tensor | None) -> dict[str, Any]:
    """The fields of a result that name the rows of two groups and show the first of them."""
    n, a, b = len(losses), groups.a, groups.b
    names = labels.tolist() if labels is not None and labels.shape == (n,) else []
    row_inputs, difference = torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.float32)
    if isinstance(inputs, Tensor) and len(inputs) == n and inputs[0].numel() <= LARGEST_INPUT_SHOWN:
        inputs = inputs.detach().cpu()
        row_inputs = inputs[torch.cat([a[:ROWS_OF_A_GROUP], b[:ROWS_OF_A_GROUP]])]
        if inputs.is_floating_point():
            x = inputs.double()
            x = (x - x.mean(0)) / x.std(0).clamp_min(1e-12)
            difference = x[a].mean(0) - x[b].mean(0)
            row_inputs = (
                row_inputs if inputs.ndim > 2 else x[torch.cat([a[:ROWS_OF_A_GROUP], b[:ROWS_OF_A_GROUP]])]
            )  # features: standardised
    return {
        "group_a": a.numpy(),
        "group_b": b.numpy(),
        "labels_a": tuple(names[i] for i in a.tolist()) if names else (),
        "labels_b": tuple(names[i] for i in b.tolist()) if names else (),
        "losses_a": losses[a].numpy(),
        "losses_b": losses[b].numpy(),
        "row_inputs": row_inputs.numpy(),
        "difference": difference.numpy(),
    }


def two_groups(result: Any, describe: Callable[[Any], str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of A and of B with label, loss and input, and the difference of their means, for display.

    result: has the fields that `kept` gives. describe: makes text of one input; else it is shown as it is.
    """
    at = 0
    for group, rows, labels, losses in (
        ("A: the loss rises", result.group_a, result.labels_a, result.losses_a),
        ("B: the loss falls", result.group_b, result.labels_b, result.losses_b),
    ):
        for i, row in enumerate(rows[:ROWS_OF_A_GROUP]):
            item: dict[str, Any] = {"row": int(row), "group": group, "loss": float(losses[i])}
            if labels:
                item["label"] = labels[i]
            if len(result.row_inputs):
                item |= displayed(result.row_inputs[at], describe)
                at += 1
            yield item
    if result.difference.size:
        yield {"row": None, "group": "mean of A less mean of B"} | displayed(result.difference, None)


def draw_groups(ax: Any, steps: Sequence[int], trace: NDArray[numpy.float64]) -> None:
    """The mean loss of A, of B and of the rest, (T + 1, 3), at T + 1 steps."""
    for column, (name, style) in enumerate((("A", "-"), ("B", "-"), ("rest", ":"))):
        ax.plot(steps, trace[:, column], marker="o", markersize=3, linestyle=style, label=name)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    ax.set(xlabel="step", ylabel="mean loss of the group")


def imported(name: str) -> Callable[[Any], str]:
    """The function that "module:function" names. Raises InvalidInput where there is none."""
    module, _, function = name.partition(":")
    try:
        found: Callable[[Any], str] = getattr(importlib.import_module(module), function)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(
            f"describe is {name!r}, which cannot be imported ({error}); give 'module:function'."
        ) from error
