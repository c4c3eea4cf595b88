"""What a loop showed of the network, as parts of its facts (see `facts`): modes, layers, starting weights, chance.

Steps are counted from 1 as in the record of the run; names are those of parameters and modules of the watched
model."""

from __future__ import annotations

from dataclasses import dataclass

from diag.snapshot.loop.steps import NOT_ONCE, Tally


@dataclass(frozen=True)
class ModeFacts:
    """Modes of the modules that act differently in training and evaluation (dropout with p > 0, batch norm).

    noisy: their names. eval_in_training: those that were in eval mode in a training call, with the tally of these
    calls' steps; the same from the start, or since an evaluation (`left_by_evaluation`, the step). root: the model
    itself was in eval mode. Of eval_in_training: trained_parts, those in a part with trainable parameters; norms,
    the batch norms; untracked, the batch norms that have never seen a batch. evaluations: runs of calls without
    gradients; train_in_evaluation: those with noisy modules in train mode, with_loss: of them followed by a loss
    without gradients, held_out: of them those on several batches, or the only one, of a DataLoader whose rows
    training does not use, each batch called once; same_inputs: single calls on the very tensor of the training call
    before, after its backward pass; alone: single calls, with dropout and no batch norm, on more rows than a
    batch of training has, which training does not use; afterwards: calls on such rows, all with noisy modules in
    train mode, that came after the last training call."""

    noisy: tuple[str, ...] = ()
    eval_in_training: tuple[str, ...] = ()
    eval_steps: Tally = NOT_ONCE
    left_by_evaluation: int = 0
    root: bool = False
    trained_parts: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    evaluations: int = 0
    train_in_evaluation: Tally = NOT_ONCE
    with_loss: Tally = NOT_ONCE
    held_out: Tally = NOT_ONCE
    same_inputs: Tally = NOT_ONCE
    alone: Tally = NOT_ONCE
    afterwards: int = 0
    moving_statistics: bool = False


@dataclass(frozen=True)
class LayerFacts:
    """Layers that are one, or were: shared: names of one module with parameters that stands at several places of
    one container; tied: names of one parameter under several names; untied: pairs that were tied at the start and
    are not now, or that the model's configuration says are tied and are not; start_equal: pairs of separate trained
    parameters that had equal random numbers at the start; still_equal: those of them that are equal after steps;
    embedding_pairs: those of them that are an embedding and a linear layer. looks: sweeps of the model so far."""

    shared: tuple[tuple[str, ...], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    untied: tuple[tuple[str, str], ...] = ()
    start_equal: tuple[tuple[str, str], ...] = ()
    still_equal: tuple[tuple[str, str], ...] = ()
    embedding_pairs: tuple[tuple[str, str], ...] = ()
    looks: int = 0


@dataclass(frozen=True)
class ShapeFacts:
    """The model's last linear layer when the watch began (its name, inputs and outputs; zero where it has none),
    and its dropout modules with their rates."""

    head: str = ""
    head_inputs: int = 0
    head_outputs: int = 0
    dropouts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class CopyFacts:
    """A copy of the network in the same process, when the watch closed. kind: "AveragedModel", or "copy" of the
    network's own class; updates: how often an average was updated, None where that is not counted. moved: how far
    it is from where the network began, over how far the network is; changes: at how many of `looks` it was another
    than at the look before. number: its place among all copies that were found."""

    kind: str
    updates: int | None
    moved: float
    changes: int
    looks: int
    number: int = 0


@dataclass(frozen=True)
class DepthFacts:
    """Which weights stand one behind the other in the graph of the loss. chains: for each weight that no other
    comes after, the longest way to it from weight to weight, the longest way first; placed: the weights of which
    it is known after which others they come. linear: the weights of a network that is nothing but linear layers one
    behind the other, without an activation function, in each backward pass that was read; the last layer first."""

    chains: tuple[tuple[str, ...], ...] = ()
    placed: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()


@dataclass(frozen=True)
class StartingWeight:
    """One weight of a layer when the watch began. gain: root mean square times the root of the number of inputs of
    a unit: what the layer makes of inputs of size one that vary independently. constant: all its entries are one
    number, `value` (else the smallest). fresh: whether its numbers look as drawn by an initialisation, None
    where that was not looked at."""

    name: str
    gain: float
    constant: bool
    value: float
    trainable: bool
    fresh: bool | None = None


@dataclass(frozen=True)
class ChanceFacts:
    """drawn: evaluation calls in eval mode in which random numbers were drawn; always_dropping: modules whose
    forward calls dropout whatever the mode, looked for where numbers were drawn. differing: evaluations whose first
    batch had the labels of an earlier one and other inputs. seeded: steps at which torch.manual_seed set the same
    seed again."""

    drawn: Tally = NOT_ONCE
    always_dropping: tuple[str, ...] = ()
    differing: Tally = NOT_ONCE
    seeded: Tally = NOT_ONCE
