"""Which quantities there are of data, or of a model, that several processes share."""

from __future__ import annotations

from diag.errors import MissingQuantity, Unsupported
from diag.snapshot.glossary import HELD_OUT, Effort, lookup

OVER_RANKS = {  # what is the same on all ranks, or put together: as one row an example, or as a sum
    *("params", "optimizer", "module_graph", "classifier", "other", "other_params", "ancestor"),
    *("labels", "targets", "logits", "losses", "logit_gradients", "features"),
    *("loss_at", "losses_at", "gradient", "hessian", "gauss_newton", "per_example_gradients", "interpolation"),
}
# What can be had while no rank holds all weights.
WITHOUT_WEIGHTS = {"hessian", "gauss_newton", "labels", "targets", "logits", "losses", "logit_gradients"}
NOT_BY_LAYER = (
    "{} is not measured where the weights of one layer at a time are gathered, as no rank holds all of them; give "
    "more memory, so that each rank can take a whole copy (ranks=True)."
)
NOT_OVER_RANKS = (
    "{} is not put together over ranks, of which each has a share of the data{}; measure it in one process "
    "on all the data, without ranks=."
)
SHARDED = (
    "The parameters are sharded over processes ({}), so that no process alone has the network; make the "
    "snapshot with ranks=True on every rank, or load a full state dict into an unsharded copy of the model."
)


def refuse_shared(name: str, placement: str, over_ranks: bool, by_layer: bool) -> None:
    """Raise where a quantity is not had in several processes.

    placement: how the parameters are sharded ("" where they are not). over_ranks: the snapshot is made on every
    rank. by_layer: the weights of one layer at a time are gathered. Raises MissingQuantity for what is not put
    together, Unsupported where one process alone would have to call a sharded model.
    """
    alone = name.removeprefix(HELD_OUT)
    if by_layer and alone not in WITHOUT_WEIGHTS:
        raise MissingQuantity(NOT_BY_LAYER.format(name))
    if over_ranks and alone not in OVER_RANKS:
        lies = f" (and whose parameters are sharded: {placement})" if placement else ""
        raise MissingQuantity(NOT_OVER_RANKS.format(name, lies))
    if not over_ranks and placement and lookup(name).cost is not Effort.NONE:
        raise Unsupported(SHARDED.format(placement))  # a forward pass would wait for the other ranks
