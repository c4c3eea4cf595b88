"""BatchNorm statistics of an interpolated network: neither end's are its own, so they are measured again.

Source: Jordan et al. 2023 (arXiv:2211.08403, section 3, "reset").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from diag.distributed.together import Together
from diag.snapshot.batch import Batch
from diag.snapshot.state.python import kept_state

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def norm_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict that are statistics of BatchNorm."""
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return {n: t for n, t in state.items() if n.rsplit(".", 1)[-1] in ends}


def reset_norm_statistics(model: nn.Module, batches: Sequence[Batch], together: Together | None = None) -> None:
    """Measure BatchNorm statistics again: the plain average over the batches in train mode (REPAIR, section 3).

    Only BatchNorm modules are put into train mode: dropout stays off. Batches of one example are left out,
    for they have no variance. together: the average is over the batches of all ranks.
    """

    def pass_over() -> None:
        _own_norm_statistics(model, batches)

    if together is None:
        pass_over()
    else:
        together.all_succeed(pass_over)
        _average(model, sum(batch.size > 1 for batch in batches), together)


def _own_norm_statistics(model: nn.Module, batches: Sequence[Batch]) -> None:
    with norm_layers_in_training(model):
        for batch in batches:
            if batch.size > 1:
                batch.forward(model)


def _average(model: nn.Module, batches: int, together: Together) -> None:
    """The ranks' statistics averaged, each counted as often as it has batches."""
    share = batches / max(together.total(batches), 1.0)
    for module in _tracking(model):
        for statistic in (module.running_mean, module.running_var):
            assert statistic is not None
            statistic.copy_(together.totals(share * statistic))


def _tracking(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]


@contextmanager
def norm_layers_in_training(model: nn.Module) -> Iterator[None]:
    """BatchNorm modules average the statistics of every batch seen inside, starting from nothing."""
    norms = _tracking(model)
    momenta = [m.momentum for m in norms]
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None
            module.train()
        with kept_state(model, again=True):
            yield
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
            module.eval()
