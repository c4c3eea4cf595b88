"""Padding of sequences: a mask that says which tokens count, the embedding's padding index, or one number that
fills the ends of rows and stands nowhere else."""

from __future__ import annotations

from torch import Tensor, nn

from diag.snapshot.batch import Batch, arguments_of, tensors_in

MASKS = ("attention_mask", "padding_mask", "key_padding_mask", "src_key_padding_mask")
MASKS_OF_PADDING = ("padding_mask", "key_padding_mask", "src_key_padding_mask")  # True where a token is none


def tokens_that_count(model: nn.Module, batch: Batch) -> Tensor | None:
    """(examples, tokens), True where a token is none of padding; None where nothing says so, or all tokens count.

    Said by an argument of the model with the name of a mask, else by the padding index of an embedding that the
    batch's only integer tensor can be looked up in. Examples that have no token at all count with all.
    """
    counted = _masked(model, batch)
    if counted is None:
        counted = _padded(model, batch)
    if counted is None or bool(counted.all()):
        return None
    return counted | ~counted.any(1, keepdim=True)


def _masked(model: nn.Module, batch: Batch) -> Tensor | None:
    named = dict(zip(arguments_of(model), batch.args, strict=False)) | batch.kwargs
    named |= batch.args[0] if batch.args and isinstance(batch.args[0], dict) else {}
    for name in MASKS:
        mask = named.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == batch.size:
            if mask.dtype.is_floating_point and bool((mask < 0).any()):  # added to scores
                return mask == 0
            return mask == 0 if name in MASKS_OF_PADDING else mask != 0
    return None


def _padded(model: nn.Module, batch: Batch) -> Tensor | None:
    tensors = tensors_in((batch.args, batch.kwargs))
    tokens = [t for t in tensors if not t.is_floating_point() and t.ndim == 2 and len(t) == batch.size]
    indices = {m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    return tokens[0] != indices.pop() if len(tokens) == 1 and len(indices) == 1 else None


def padding_of(rows: Tensor) -> tuple[int, float] | None:
    """The number that fills the ends of the sequences `rows` (n, length), to different lengths, and stands nowhere
    else; and the share of all that it is. None where there is none, at the ends or the beginnings."""
    return _filling(rows) or _filling(rows.flip(1))


def _filling(rows: Tensor) -> tuple[int, float] | None:
    value = rows[:, -1].mode().values
    alike = rows == value
    lengths = alike.flip(1).long().cumprod(1).sum(1)
    filled = int(lengths.sum())
    long_enough = int((lengths >= 2).sum()) * 4 >= len(rows)
    if filled != int(alike.sum()) or not long_enough or len(lengths.unique()) < 2:
        return None
    return int(value), filled / rows.numel()
