"""The scores of every attention in a model, seen in a forward pass and reduced to a few numbers a head.

Recognised are `nn.MultiheadAttention`, `F.scaled_dot_product_attention` wherever it is called, and attention
written by hand: a softmax over the last axis whose result goes into a matrix product. The model's own call stays
as it is, so fused kernels stay in use; the scores are computed again for a few examples and queries. Not
recognised: attention inside a compiled kernel that is called by another name (flex_attention, flash-attn).
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diag.errors import MissingQuantity
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.forward import heard
from diag.snapshot.inside.listener import NamingListener, unheard
from diag.snapshot.inside.scores import product_norm, row_statistics
from diag.snapshot.snapshot import Snapshot

EXAMPLES_OF_A_CALL, QUERIES_OF_AN_EXAMPLE = 32, 64
ATTENTION_EXAMPLES = 64  # of the data are enough
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, F.dropout, torch.dropout}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}


@dataclass(frozen=True)
class AttentionCall:
    """One attention of the forward pass.

    layer: the module that made the call, with a number where it made several. dtype: of its queries. rows: the
    statistics of each head's rows, see `row_statistics`: (heads, rows, 7). weight_norms: |W_Q^T W_K| of each head,
    NaN where the projections are not known to be plain linear layers.
    """

    layer: str
    dtype: str
    rows: Tensor
    weight_norms: tuple[float, ...]


def attention_calls(snapshot: Snapshot) -> tuple[AttentionCall, ...]:
    """Every attention of the model, in the order of the forward pass, on the first batches that hold 64
    examples, and at most 32 examples of each.

    Raises MissingQuantity for a model that calls none that is recognised.
    """
    calls = heard(snapshot, "attention_calls", AttentionListener).calls
    if not calls:
        raise MissingQuantity(
            "the model calls no attention that is recognised (nn.MultiheadAttention, "
            "F.scaled_dot_product_attention, or a softmax whose result goes into a matrix product)."
        )
    return tuple(call.summary(name, number) for (name, number), call in calls.items())


class AttentionListener(NamingListener):
    """Recognises attention on the first batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: dict[tuple[str, int], _Call] = {}
        self._seen = 0

    def during(self, batch: Batch) -> _Hearing:
        """What intercepts the functions."""
        return _Hearing(self.calls, self.inside)

    def called(self, batch: Batch, outputs: Any) -> None:
        """One batch more."""
        self._seen += min(batch.size, EXAMPLES_OF_A_CALL)
        self.enough = self._seen >= ATTENTION_EXAMPLES


class _Call:
    """The rows of one place in the model, over the batches."""

    def __init__(self, dtype: torch.dtype, norms: tuple[float, ...]) -> None:
        self.dtype, self.norms = str(dtype).removeprefix("torch."), norms
        self.rows: list[Tensor] = []

    def summary(self, name: str, number: int) -> AttentionCall:
        rows = torch.cat(self.rows, 1)
        norms = self.norms if len(self.norms) == len(rows) else (math.nan,) * len(rows)
        return AttentionCall(f"{name or 'model'}{f' #{number + 1}' if number else ''}", self.dtype, rows, norms)


class _Hearing(TorchFunctionMode):
    """Recognises attention in the functions that the model calls, for one batch."""

    def __init__(self, heard: dict[tuple[str, int], _Call], inside: Callable[[], str]) -> None:
        super().__init__()
        self._heard, self._inside = heard, inside
        self._numbers: dict[str, int] = {}
        # Kept alive so that their memory is not given to another tensor while it is compared.
        self._weights: deque[tuple[Tensor, Tensor]] = deque(maxlen=4)  # softmax output, scores
        self._projections: deque[tuple[Tensor, Tensor]] = deque(maxlen=4)  # linear output, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = _bound(SDPA, args, kwargs)["query"], _bound(SDPA, args, kwargs)["key"]
            with unheard(*args, *kwargs.values()):
                self._take(_sdpa_scores(*args, **kwargs), q.dtype, self._norms(q, k))
        elif func is F.multi_head_attention_forward:
            arguments = _bound(MHA, args, kwargs)
            with unheard(*arguments.values()):
                self._take(_mha_scores(arguments), arguments["query"].dtype, _mha_norms(arguments))
        value = func(*args, **kwargs)
        if isinstance(value, Tensor):
            self._follow(func, args, kwargs, value)
        return value

    def _follow(self, func: Any, args: Any, kwargs: Any, value: Tensor) -> None:
        if func in SOFTMAX and value.ndim >= 3 and _over_last(args, kwargs, value.ndim):
            self._weights.append((value, args[0] if args else kwargs["input"]))
        elif func in CASTS and args and (scores := self._scores_of(args[0])) is not None:
            self._weights.append((value, scores))
        elif func in PRODUCTS:
            found = [s for t in tensors_in([args, kwargs]) if (s := self._scores_of(t)) is not None]
            if found:
                with unheard(*found):
                    self._take(found[0].reshape(-1, *_four(found[0])), found[0].dtype, ())
        elif func is F.linear and len(args) > 1:
            self._projections.append((value, args[1]))
        elif func is torch.addmm and len(args) > 2:
            self._projections.append((value, args[2].T))

    def _scores_of(self, tensor: Any) -> Tensor | None:
        if isinstance(tensor, Tensor):
            for weights, scores in self._weights:
                if weights.data_ptr() == tensor.data_ptr() and weights.numel() == tensor.numel():
                    return scores
        return None

    def _norms(self, q: Tensor, k: Tensor) -> tuple[float, ...]:
        """|W_Q^T W_K| a head, where queries and keys are views of the outputs of linear layers."""
        if q.ndim != 4 or k.ndim != 4:
            return ()
        group = max(q.shape[1] // k.shape[1], 1)
        pairs = [(self._rows_of(q, h), self._rows_of(k, h // group)) for h in range(q.shape[1])]
        return tuple(product_norm(*pair) for pair in pairs)

    def _rows_of(self, x: Tensor, head: int) -> Tensor | None:
        """The rows of the weight that made head `head` of x (examples, heads, positions, size)."""
        for out, weight in self._projections:
            if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and out.is_contiguous():
                begin = (x[:, head].storage_offset() - out.storage_offset()) % out.shape[-1]
                if x.stride(-1) == 1 and begin + x.shape[-1] <= len(weight):
                    return weight[begin : begin + x.shape[-1]]
        return None

    def _take(self, scores: Tensor, dtype: torch.dtype, norms: tuple[float, ...]) -> None:
        name = self._inside()
        number = self._numbers[name] = self._numbers.get(name, -1) + 1
        call = self._heard.setdefault((name, number), _Call(dtype, norms))
        rows = row_statistics(_few(scores[:EXAMPLES_OF_A_CALL], scores.shape[-2]))
        if not call.rows or len(call.rows[0]) == len(rows):
            call.rows.append(rows)


SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
MHA = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _bound(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs


def _over_last(args: Any, kwargs: Any, ndim: int) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, ndim - 1)


def _four(scores: Tensor) -> tuple[int, ...]:
    """heads, queries, keys of scores with three axes or more; without an axis for heads there is one."""
    return tuple(scores.shape[-3:]) if scores.ndim > 3 else (1, *scores.shape[-2:])


def _chosen(queries: int) -> list[int]:
    """Positions of at most QUERIES_OF_AN_EXAMPLE queries, evenly spaced, the last one among them."""
    step = max(1, math.ceil(queries / QUERIES_OF_AN_EXAMPLE))
    return list(range(queries - 1, -1, -step))[::-1]


def _few(scores: Tensor, queries: int) -> Tensor:
    return scores[..., _chosen(queries), :]


def _sdpa_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The scores (examples, heads, queries, keys) of a call, for the first examples and some of the queries."""
    rows, keys = _chosen(query.shape[-2]), key.shape[-2]
    q = query.reshape(-1, *_four(query))[:EXAMPLES_OF_A_CALL, :, rows].float()
    k = key.reshape(-1, *_four(key))[:EXAMPLES_OF_A_CALL].float()
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.arange(keys, device=q.device) <= torch.tensor(rows, device=q.device)[:, None]
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        mask = attn_mask.expand(*query.shape[:-1], keys).reshape(-1, *_four(query)[:-1], keys)[
            :EXAMPLES_OF_A_CALL, :, rows
        ]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores


class _SoftmaxInputs(TorchDispatchMode):
    """Keeps what the softmax is given, below the functions that torch's own attention calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_softmax":
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def _mha_scores(arguments: dict[str, Any]) -> Tensor:
    """The scores (examples, heads, queries, keys) of F.multi_head_attention_forward, for the first examples.

    It is called again with the weights asked for, which it computes by a softmax that can be intercepted.
    """
    few = dict(arguments) | {"need_weights": True, "average_attn_weights": False}
    heads, mask = arguments["num_heads"], arguments.get("attn_mask")
    if arguments["query"].ndim == 3:  # (positions, examples, width)
        few |= {name: arguments[name][:, :EXAMPLES_OF_A_CALL] for name in ("query", "key", "value")}
        if arguments.get("key_padding_mask") is not None:
            few["key_padding_mask"] = arguments["key_padding_mask"][:EXAMPLES_OF_A_CALL]
        if mask is not None and mask.ndim == 3:
            few["attn_mask"] = mask[: EXAMPLES_OF_A_CALL * heads]
    with _SoftmaxInputs() as heard:
        F.multi_head_attention_forward(**few)
    scores = heard.inputs[-1]
    return scores.reshape(-1, heads, *scores.shape[-2:])


def _mha_norms(arguments: dict[str, Any]) -> tuple[float, ...]:
    if arguments.get("use_separate_proj_weight"):
        query, key = arguments["q_proj_weight"], arguments["k_proj_weight"]
    else:
        query, key, _ = arguments["in_proj_weight"].chunk(3)
    if query.shape != key.shape:
        return ()
    heads = arguments["num_heads"]
    return tuple(product_norm(a, b) for a, b in zip(query.chunk(heads), key.chunk(heads), strict=True))
