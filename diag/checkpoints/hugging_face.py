"""A checkpoint of a Hugging Face model, read by the model's own class.

transformers knows its old names, merges and splits weights, and leaves out what a model does not have (a pooler, a
mask that was saved). Its class is given the tensors, never a file; nothing is taken of which a weight is missing.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diag.checkpoints.values import plain_tensor
from diag.errors import named


def read_by_its_class(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The state as `model` has it, and a note; None where it is not a model of transformers or lacks a weight."""
    if not any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        return None
    tensors = {name: plain_tensor(name, value) for name, value in state.items() if isinstance(value, Tensor)}
    try:
        with _quiet(), torch.random.fork_rng():
            made, about = type(model).from_pretrained(  # type: ignore[attr-defined]
                None, config=model.config, state_dict=tensors, output_loading_info=True
            )
    except Exception:  # another version, a model that cannot be made from its configuration alone
        return None
    if about["missing_keys"] or about["mismatched_keys"] or about.get("error_msgs"):
        return None
    unexpected = sorted(map(str, about["unexpected_keys"]))
    left = f"; entries that it has no place for were left out: {named(unexpected)}" if unexpected else ""
    return made.state_dict(), f"The names were read as {type(model).__name__} of transformers reads them{left}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and bars of transformers."""
    logging = getattr(getattr(sys.modules.get("transformers"), "utils", None), "logging", None)
    bar = logging is not None and logging.is_progress_bar_enabled()
    level = logging.get_verbosity() if logging is not None else None
    try:
        if logging is not None:
            logging.disable_progress_bar()
            logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if logging is not None:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()
