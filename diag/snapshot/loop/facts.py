"""Facts of a training loop: what a watch saw the loop do, as plain data that checks judge.

Nothing here is a judgement and nothing needs a pass of the model: which parameters each optimizer holds, what was
zeroed and when, in which order things happen, the modes of modules, the loss function's calls, the batches.
`diag.watching` gathers them; the checks in `diag/instruments/loop/` read them. Steps are counted from 1 as in the
record of the run. A name that starts with a module's path is a parameter or a module of the watched model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diag.errors import InvalidInput, MissingQuantity, type_of
from diag.snapshot.loop.arithmetic import (
    ActionFacts,
    ArithmeticFacts,
    DomainFacts,
    FormulaFacts,
    LatentFacts,
    PolicyFacts,
)
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.contrast import ContrastFacts
from diag.snapshot.loop.data import (
    BatchFacts,
    ContentFacts,
    DrawFacts,
    LossFacts,
    PairFacts,
    PenaltyFacts,
    RootFacts,
    TargetFacts,
)
from diag.snapshot.loop.evaluated import AskedInEvaluation, ColumnFacts, NoveltyFacts
from diag.snapshot.loop.games import GameFacts
from diag.snapshot.loop.inputs import EvaluationFacts, InputFacts, StoredFacts, TokenFacts
from diag.snapshot.loop.network import (
    ChanceFacts,
    CopyFacts,
    DepthFacts,
    LayerFacts,
    ModeFacts,
    ShapeFacts,
    StartingWeight,
)
from diag.snapshot.loop.paired import PairedFacts
from diag.snapshot.loop.places import MaskFacts, SequenceFacts
from diag.snapshot.loop.ranks import RankFacts
from diag.snapshot.loop.rows import RowFacts
from diag.snapshot.loop.steps import (
    ClippingFacts,
    OptimizerFacts,
    OriginFacts,
    OutsideChange,
    ParameterFacts,
    Pattern,
    ScalingFacts,
    SchedulerFacts,
    WrapperFacts,
)
from diag.snapshot.snapshot import Snapshot

PASSES_OF_OTHERS = 1.05  # backward passes of a step over one optimizer's own; a critic may take five steps to one
SAME_BATCH_AGAIN = 2  # repetitions of a batch (our choice) from which on it is taken to be the only one


@dataclass(frozen=True)
class Loop:
    """All that is known of the loop after `step` steps.

    calls: of the model in training; backwards: backward passes that reached the model; unstepped: those since the
    last step of an optimizer that holds its parameters, and zeroed_without_step how many of them were zeroed away.
    strangers: the shapes of parameters that the model uses and does not know, and no optimizer holds.
    reshaped: shapes before and after reshapes, in the graph of a loss, that gave axes each other's lengths.
    start: weights of layers when the watch began; empty where a run was resumed. origin: of the first loss
    that was not finite, where it could be read without waiting.
    directions: cosines of the last steps that were measured with the gradient that they were taken on.
    taken_back: for the last steps after which weights were changed from outside and that were looked at closely,
    the share of the step that this took back; none where a weight came back to exactly what it was.
    ended: the watch is closing. resumed: the step that the run went on from, 0 if it did not; rates_before: the
    first and the last learning rate of what came before."""

    step: int
    ended: bool = False
    resumed: int = 0
    rates_before: tuple[float, ...] = ()
    calls: int = 0
    backwards: int = 0
    unstepped: int = 0
    zeroed_without_step: int = 0
    order: tuple[Pattern, ...] = ()
    optimizers: tuple[OptimizerFacts, ...] = ()
    parameters: tuple[ParameterFacts, ...] = ()
    strangers: tuple[tuple[int, ...], ...] = ()
    schedulers: tuple[SchedulerFacts, ...] = ()
    modes: ModeFacts = field(default_factory=ModeFacts)
    chance: ChanceFacts = field(default_factory=ChanceFacts)
    batches: BatchFacts = field(default_factory=BatchFacts)
    contents: ContentFacts = field(default_factory=ContentFacts)
    drawn: DrawFacts = field(default_factory=DrawFacts)
    losses: tuple[LossFacts, ...] = ()
    roots: RootFacts = field(default_factory=RootFacts)
    wrapper: WrapperFacts = field(default_factory=WrapperFacts)
    targets: TargetFacts = field(default_factory=TargetFacts)
    asked: tuple[AskedFacts, ...] = ()
    inputs: InputFacts = field(default_factory=InputFacts)
    stored: StoredFacts = field(default_factory=StoredFacts)
    tokens: TokenFacts = field(default_factory=TokenFacts)
    evaluation: EvaluationFacts = field(default_factory=EvaluationFacts)
    reshaped: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    scaling: ScalingFacts = field(default_factory=ScalingFacts)
    clipping: ClippingFacts = field(default_factory=ClippingFacts)
    outside: tuple[OutsideChange, ...] = ()
    outside_times: int = 0
    taken_back: tuple[float, ...] = ()
    layers: LayerFacts = field(default_factory=LayerFacts)
    start: tuple[StartingWeight, ...] = ()
    origin: OriginFacts | None = None
    directions: tuple[float, ...] = ()
    ranks: RankFacts = field(default_factory=RankFacts)
    penalty: PenaltyFacts = field(default_factory=PenaltyFacts)
    pairs: PairFacts = field(default_factory=PairFacts)
    arithmetic: ArithmeticFacts = field(default_factory=ArithmeticFacts)
    latents: LatentFacts = field(default_factory=LatentFacts)
    policy: PolicyFacts = field(default_factory=PolicyFacts)
    games: GameFacts = field(default_factory=GameFacts)
    actions: ActionFacts = field(default_factory=ActionFacts)
    contrast: ContrastFacts = field(default_factory=ContrastFacts)
    formula: FormulaFacts = field(default_factory=FormulaFacts)
    domains: tuple[DomainFacts, ...] = ()
    shape: ShapeFacts = field(default_factory=ShapeFacts)
    depth: DepthFacts = field(default_factory=DepthFacts)
    copies: tuple[CopyFacts, ...] = ()
    sequences: SequenceFacts = field(default_factory=SequenceFacts)
    masks: MaskFacts = field(default_factory=MaskFacts)
    rows: RowFacts = field(default_factory=RowFacts)
    paired: tuple[PairedFacts, ...] = ()
    columns: ColumnFacts = field(default_factory=ColumnFacts)
    novelty: tuple[NoveltyFacts, ...] = ()
    asked_in_evaluation: AskedInEvaluation = field(default_factory=AskedInEvaluation)

    @property
    def full_batch(self) -> bool:
        """Whether every step so far used the same examples: one batch, or the same batches in each step."""
        batches, steps = self.batches, max(self.step - self.resumed, 1)
        a_step = round(self.calls / steps)
        whole = batches.lag > 0 and a_step > 0 and a_step % batches.lag == 0 and self.calls == a_step * steps
        return (
            (whole or batches.lag == 1)  # a closure may be called any number of times in a step
            and batches.repeats >= max(SAME_BATCH_AGAIN, batches.lag)
            and batches.repeats == batches.calls - batches.lag
        )

    @property
    def from_scratch(self) -> bool:
        """Whether the weights that were looked at for it began as an initialisation draws them."""
        looked = [w for w in self.start if w.fresh is not None]
        return bool(looked) and all(w.fresh for w in looked) and not self.resumed

    @property
    def training(self) -> tuple[OptimizerFacts, ...]:
        """The optimizers that step parameters of the model on their own."""
        return tuple(o for o in self.optimizers if o.held and o.steps and not o.nested)

    @property
    def looked(self) -> int:
        """Steps of the model's optimizers that were looked at closely: events are counted in these."""
        return max((o.looked for o in self.training), default=0)

    @property
    def losses_in_turn(self) -> int:
        """How many loss functions backward() is called on where each step descends one of them, as in stages or for
        tasks in turn: 0 where it is one, or where a step adds several up."""
        functions = {f.function for f in self.losses if f.root or (not f.function and f.calls)}
        one_each = all(o.passes <= 1 for o in self.training)
        return len(functions) if len(functions) > 1 and one_each else 0

    @property
    def sides(self) -> tuple[frozenset[str], ...]:
        """The model's parameters in each of several optimizers that descend losses of their own, as the two sides
        of a game do; empty where there is one loss. An optimizer of another network in the same loop holds none.

        Optimizers of one model have losses of their own where a step has more backward passes than the gradient of
        any one of them is made of.
        """
        holders = [o for o in self.optimizers if o.held and not o.nested and (o.steps or o.idle)]
        held = [frozenset(o.held) for o in holders]
        others = [frozenset[str]() for o in self.optimizers if o.foreign and o.steps and not (o.held or o.stale)]
        if held and others:
            return (*held, *others)
        apart = len(held) > 1 and len(frozenset.union(*held)) == sum(map(len, held))
        each = self.backwards / max([1, *(o.looked for o in holders)])  # both are counted in the same steps
        own = [o.passes for o in holders if o.steps]
        return tuple(held) if apart and own and each > PASSES_OF_OTHERS * max(own) else ()


def loop(snapshot: Snapshot) -> Loop:
    """The facts of the loop that trains the model, seen by a watch.

    Raises MissingQuantity for a snapshot that no watch made.
    """
    found = snapshot.loop() if callable(snapshot.loop) else snapshot.loop
    if found is None:
        raise MissingQuantity("measure inside diag.watch.")
    if not isinstance(found, Loop):
        raise InvalidInput(f"loop is {type_of(found)}; expected the facts of a watched loop.")
    return found
