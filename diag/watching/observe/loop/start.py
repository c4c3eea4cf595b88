"""The weights that training begins with: how large they are, and whether a tensor holds one number everywhere; and
what the model's shape allows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diag.snapshot.loop.network import ShapeFacts, StartingWeight
from diag.snapshot.state.fresh import DRAWN, ENOUGH_TO_TELL, looks_fresh

WEIGHTS_LOOKED_AT = 4  # weights that are looked at for whether they were ever trained
FEWEST_ENTRIES = 16  # entries; smaller tensors are left out
# Modules that multiply by these weights as they are. What computes its weight first says nothing by its parameter.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS_WITH_WEIGHTS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("weight",)),
    *((kind, ("weight",)) for kind in CONVOLUTIONS),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.RNN, ("weight",)),
    (nn.LSTM, ("weight",)),
    (nn.GRU, ("weight",)),
)


def starting_weights(model: nn.Module) -> tuple[StartingWeight, ...]:
    """Of each weight of a linear, convolutional, recurrent or attention layer of torch, as it is now.

    Left out are tensors that are an embedding's too, that a parametrization or a hook makes, of fewer than
    `FEWEST_ENTRIES` entries, and of which this process holds a part only.
    """
    found = list(_weights(model))
    if not found:
        return ()
    with torch.no_grad():
        numbers = torch.stack([_numbers(p).cpu() for _, p in found]).tolist()
        large = [(name, p) for name, p in found if p.numel() >= ENOUGH_TO_TELL and p.requires_grad][
            :WEIGHTS_LOOKED_AT
        ]
        modules = dict(model.named_modules())
        fresh = {name: looks_fresh(modules[name.rpartition(".")[0]], p) in DRAWN for name, p in large}
    return tuple(
        StartingWeight(
            name=name,
            gain=rms * math.sqrt(p[0].numel()),
            constant=low == high,
            value=low,
            trainable=p.requires_grad,
            fresh=fresh.get(name),
        )
        for (name, p), (rms, low, high) in zip(found, numbers, strict=True)
    )


def shape_of(model: nn.Module) -> ShapeFacts:
    """The last linear layer and the dropout modules, as they are now."""
    modules = list(model.named_modules())
    head, layer = next(((n, m) for n, m in reversed(modules) if isinstance(m, nn.Linear)), ("", None))
    dropouts = tuple((n, float(m.p)) for n, m in modules if isinstance(m, DROPOUTS))
    return ShapeFacts(head, layer.in_features if layer else 0, layer.out_features if layer else 0, dropouts)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for path, module in model.named_modules():
        for name in _names(module):
            p = module._parameters.get(name)
            if p is None or id(p) in seen or not _is_plain(p):
                continue
            seen.add(id(p))
            yield f"{path}.{name}".lstrip("."), p


def _names(module: nn.Module) -> list[str]:
    """The names of the module's weights that it multiplies by as they are."""
    own = getattr(type(module), "forward", None)  # of TorchScript there is none
    starts = next((names for kind, names in LAYERS_WITH_WEIGHTS if own is kind.forward), ())
    if not starts or module._forward_pre_hooks:  # the old weight_norm and spectral_norm make the weight in a hook
        return []
    return [name for name in module._parameters if name.startswith(starts)]


def _is_plain(p: Tensor) -> bool:
    whole = not nn.parameter.is_lazy(p) and not hasattr(p, "to_local") and p.device.type != "meta"
    return (
        whole
        and p.is_floating_point()
        and p.ndim >= 2
        and p.numel() >= FEWEST_ENTRIES
        and p.layout is torch.strided
    )


def _numbers(p: Tensor) -> Tensor:
    """Root mean square, smallest and largest entry."""
    low, high = torch.aminmax(p.detach())
    norm = torch.linalg.vector_norm(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32))
    return torch.stack([norm.double() / math.sqrt(p.numel()), low.double(), high.double()])
