"""The types of `diag`, written by scripts/stub from the registry of instruments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

from diag.registry import Instrument, Measurable

from diag import datasets as datasets
from diag import errors as errors
from diag import integrations as integrations
from diag import testing as testing
from diag.instruments.loss.action_values import ActionValues as ActionValues
from diag.instruments.loss.adversarial_losses import AdversarialLosses as AdversarialLosses
from diag.instruments.loss.answers_seen import AnswersSeen as AnswersSeen
from diag.instruments.attention import Attention as Attention
from diag.instruments.network.attention_heads import AttentionHeads as AttentionHeads
from diag.instruments.network.axes_kept import AxesKept as AxesKept
from diag.instruments.barrier_prediction import BarrierPrediction as BarrierPrediction
from diag.instruments.data.batch_rows import BatchRows as BatchRows
from diag.instruments.loop.batches_repeated import BatchesRepeated as BatchesRepeated
from diag.instruments.boundary_tilting import BoundaryTilting as BoundaryTilting
from diag.instruments.network.capacity import Capacity as Capacity
from diag.instruments.data.class_counts import ClassCounts as ClassCounts
from diag.instruments.loss.class_weights import ClassWeights as ClassWeights
from diag.instruments.data.classes_asked import ClassesAsked as ClassesAsked
from diag.instruments.data.classes_mixed import ClassesMixed as ClassesMixed
from diag.instruments.loop.clipping_order import ClippingOrder as ClippingOrder
from diag.instruments.collapse_by_layer import CollapseByLayer as CollapseByLayer
from diag.result import Confidence as Confidence
from diag.instruments.outcome.constant_answer import ConstantAnswer as ConstantAnswer
from diag.instruments.loss.contrastive_loss import ContrastiveLoss as ContrastiveLoss
from diag.instruments.data.data_kept import DataKept as DataKept
from diag.instruments.network.dead_units import DeadUnits as DeadUnits
from diag.instruments.denoising import Denoising as Denoising
from diag.instruments.depth_use import DepthUse as DepthUse
from diag.instruments.optimization.descent import Descent as Descent
from diag.instruments.optimization.divergence import Divergence as Divergence
from diag.instruments.edge_of_stability.instrument import EdgeOfStability as EdgeOfStability
from diag.instruments.data.evaluation_inputs import EvaluationInputs as EvaluationInputs
from diag.instruments.outcome.evaluation_targets import EvaluationTargets as EvaluationTargets
from diag.instruments.network.examples_mixed import ExamplesMixed as ExamplesMixed
from diag.result import Failed as Failed
from diag.instruments.outcome.finite_evaluation import FiniteEvaluation as FiniteEvaluation
from diag.instruments.network.finite import FiniteForward as FiniteForward
from diag.instruments.optimization.finite_steps import FiniteSteps as FiniteSteps
from diag.instruments.outcome.generalization import Generalization as Generalization
from diag.instruments.loop.gradient_accumulation import GradientAccumulation as GradientAccumulation
from diag.instruments.gradient_coherence import GradientCoherence as GradientCoherence
from diag.instruments.gradient_conflict.instrument import GradientConflict as GradientConflict
from diag.instruments.network.gradient_depth import GradientDepth as GradientDepth
from diag.instruments.gradient_flow.instrument import GradientFlow as GradientFlow
from diag.instruments.optimization.gradient_underflow import GradientUnderflow as GradientUnderflow
from diag.instruments.loop.gradient_zeroing import GradientZeroing as GradientZeroing
from diag.instruments.loop.gradients_reach import GradientsReach as GradientsReach
from diag.instruments.data.held_out_copies import HeldOutCopies as HeldOutCopies
from diag.instruments.data.held_out_inputs import HeldOutInputs as HeldOutInputs
from diag.instruments.data.held_out_labels import HeldOutLabels as HeldOutLabels
from diag.instruments.data.held_out_rows import HeldOutRows as HeldOutRows
from diag.instruments.hessian_spectrum.instrument import HessianSpectrum as HessianSpectrum
from diag.instruments.network.ignored_inputs import IgnoredInputs as IgnoredInputs
from diag.instruments.loss.initial_loss import InitialLoss as InitialLoss
from diag.instruments.network.initial_scale import InitialScale as InitialScale
from diag.instruments.network.initial_weights import InitialWeights as InitialWeights
from diag.instruments.initialization import Initialization as Initialization
from diag.instruments.input_magnitude import InputMagnitude as InputMagnitude
from diag.instruments.data.input_scale import InputScale as InputScale
from diag.instruments.trial.input_used import InputUsed as InputUsed
from diag.instruments.data.label_audit import LabelAudit as LabelAudit
from diag.instruments.data.labels_belong import LabelsBelong as LabelsBelong
from diag.instruments.data.labels_kept import LabelsKept as LabelsKept
from diag.instruments.loss.latent_code import LatentCode as LatentCode
from diag.instruments.loop.layers_shared import LayersShared as LayersShared
from diag.instruments.loop.schedule.instrument import LearningRateSchedule as LearningRateSchedule
from diag.result import Level as Level
from diag.instruments.linear_freedom import LinearFreedom as LinearFreedom
from diag.instruments.loop.loss_call import LossCall as LossCall
from diag.instruments.loss.loss_domain import LossDomain as LossDomain
from diag.instruments.loss.loss_formula import LossFormula as LossFormula
from diag.instruments.optimization.loss_spikes import LossSpikes as LossSpikes
from diag.instruments.loss.loss_terms import LossTerms as LossTerms
from diag.instruments.loop.mixed_precision import MixedPrecision as MixedPrecision
from diag.instruments.mode_connectivity.instrument import ModeConnectivity as ModeConnectivity
from diag.instruments.trial.modes_agree import ModesAgree as ModesAgree
from diag.instruments.loop.module_modes import ModuleModes as ModuleModes
from diag.instruments.naive_loss_minimization import NaiveLossMinimization as NaiveLossMinimization
from diag.instruments.neural_collapse.instrument import NeuralCollapse as NeuralCollapse
from diag.instruments.network.normalization_statistics import NormalizationStatistics as NormalizationStatistics
from diag.instruments.trial.one_batch import OneBatch as OneBatch
from diag.instruments.opposing_signals.instrument import OpposingSignals as OpposingSignals
from diag.instruments.loop.optimizer_kept import OptimizerKept as OptimizerKept
from diag.instruments.network.output_constant import OutputConstant as OutputConstant
from diag.instruments.loss.output_range import OutputRange as OutputRange
from diag.instruments.loop.outside_changes import OutsideChanges as OutsideChanges
from diag.instruments.loss.pairs_differ import PairsDiffer as PairsDiffer
from diag.instruments.loop.parameters_held import ParametersHeld as ParametersHeld
from diag.instruments.loss.places_match import PlacesMatch as PlacesMatch
from diag.instruments.loss.policy_loss import PolicyLoss as PolicyLoss
from diag.result import Precondition as Precondition
from diag.instruments.quantization import Quantization as Quantization
from diag.instruments.distributed.ranks_data import RanksData as RanksData
from diag.instruments.loop.repeated_chance import RepeatedChance as RepeatedChance
from diag.instruments.distributed.replicas_equal import ReplicasEqual as ReplicasEqual
from diag.instruments.representation import Representation as Representation
from diag.result import Result as Result
from diag.instruments.data.row_labels import RowLabels as RowLabels
from diag.instruments.rows.rows_aligned import RowsAligned as RowsAligned
from diag.instruments.loop.rows_drawn import RowsDrawn as RowsDrawn
from diag.run.run import Run as Run
from diag.instruments.network.saturation import Saturation as Saturation
from diag.instruments.saved.changes import SavedChanges as SavedChanges
from diag.instruments.saved.finite import SavedFinite as SavedFinite
from diag.instruments.saved.optimizer import SavedOptimizer as SavedOptimizer
from diag.instruments.saved.rows import SavedRows as SavedRows
from diag.instruments.saved.ties import SavedTies as SavedTies
from diag.instruments.saved.weights import SavedWeights as SavedWeights
from diag.instruments.optimization.second_moment import SecondMoment as SecondMoment
from diag.instruments.sharpness import Sharpness as Sharpness
from diag.instruments.sigmoid_collapse import SigmoidCollapse as SigmoidCollapse
from diag.result import Skipped as Skipped
from diag.snapshot.snapshot import Snapshot as Snapshot
from diag.instruments.softmax_collapse.instrument import SoftmaxCollapse as SoftmaxCollapse
from diag.instruments.loop.step_order import StepOrder as StepOrder
from diag.instruments.optimization.step_size.instrument import StepSize as StepSize
from diag.instruments.symmetry_groups import SymmetryGroups as SymmetryGroups
from diag.instruments.data.target_scale import TargetScale as TargetScale
from diag.instruments.data.target_values import TargetValues as TargetValues
from diag.instruments.loss.token_targets import TokenTargets as TokenTargets
from diag.instruments.data.tokens_differ import TokensDiffer as TokensDiffer
from diag.instruments.trajectory import Trajectory as Trajectory
from diag.instruments.outcome.trivial import TrivialPredictor as TrivialPredictor
from diag.instruments.trust_radius import TrustRadius as TrustRadius
from diag.instruments.network.unit_copies import UnitCopies as UnitCopies
from diag.result import Verdict as Verdict
from diag.watching.watcher import Watcher as Watcher
from diag.instruments.optimization.weight_decay import WeightDecay as WeightDecay
from diag.instruments.loop.weights_move import WeightsMove as WeightsMove
from diag.instruments.loop.wrapper_called import WrapperCalled as WrapperCalled
from diag.connectivity.connection import align as align
from diag.reporting import compare as compare
from diag.connectivity.connection_map import connect as connect
from diag.trial.coordinates import coordinate_check as coordinate_check
from diag.connectivity.connection_map import fork_stability as fork_stability
from diag.gradients.layer_rules import gradient_rule as gradient_rule
from diag.registry import instrument as instrument
from diag.run.saved import load as load
from diag.instruments.gradient_conflict.instrument import loss_conflict as loss_conflict
from diag.registry import measure as measure
from diag.registry import measure_all as measure_all
from diag.result import measured as measured
from diag.remedies import perp_grad as perp_grad
from diag.trial.preflight import preflight as preflight
from diag.reporting import report as report
from diag.remedies import stable_binary_cross_entropy as stable_binary_cross_entropy
from diag.remedies import stable_cross_entropy as stable_cross_entropy
from diag.remedies import stablemax as stablemax
from diag.remedies import stablemax_cross_entropy as stablemax_cross_entropy
from diag.watching.watcher import watch as watch

__version__: str
__all__: list[str]

class _ActionValuesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ActionValues: ...
    @overload
    def __call__(self, loop: Any) -> ActionValues: ...

action_values: _ActionValuesInstrument

class _AdversarialLossesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., times: float = ..., out_of_reach: float = ...) -> AdversarialLosses: ...
    @overload
    def __call__(self, loop: Any, *, times: float = ..., out_of_reach: float = ...) -> AdversarialLosses: ...

adversarial_losses: _AdversarialLossesInstrument

class _AnswersSeenInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, later_tokens: Any = ..., loop: Any = ...) -> AnswersSeen: ...
    @overload
    def __call__(self, later_tokens: Any, loop: Any) -> AnswersSeen: ...

answers_seen: _AnswersSeenInstrument

class _AttentionInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, attention_calls: Any = ..., one_hot: float = ..., uniform: float = ...) -> Attention: ...
    @overload
    def __call__(self, attention_calls: Any, *, one_hot: float = ..., uniform: float = ...) -> Attention: ...

attention: _AttentionInstrument

class _AttentionHeadsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, attention_calls: Any = ..., history: Any = ..., sharp: float = ..., even: float = ...) -> AttentionHeads: ...
    @overload
    def __call__(self, attention_calls: Any, history: Any = None, *, sharp: float = ..., even: float = ...) -> AttentionHeads: ...

attention_heads: _AttentionHeadsInstrument

class _AxesKeptInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> AxesKept: ...
    @overload
    def __call__(self, loop: Any) -> AxesKept: ...

axes_kept: _AxesKeptInstrument

class _BarrierPredictionInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, interpolation: Any = ..., other: Any = ..., points: int = ..., layers: bool = ...) -> BarrierPrediction: ...
    @overload
    def __call__(self, interpolation: Any, other: Any, *, points: int = ..., layers: bool = ...) -> BarrierPrediction: ...

barrier_prediction: _BarrierPredictionInstrument

class _BatchRowsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> BatchRows: ...
    @overload
    def __call__(self, loop: Any) -> BatchRows: ...

batch_rows: _BatchRowsInstrument

class _BatchesRepeatedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> BatchesRepeated: ...
    @overload
    def __call__(self, loop: Any) -> BatchesRepeated: ...

batches_repeated: _BatchesRepeatedInstrument

class _BoundaryTiltingInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, features: Any = ..., labels: Any = ..., classifier: Any = ...) -> BoundaryTilting: ...
    @overload
    def __call__(self, features: Any, labels: Any, classifier: Any) -> BoundaryTilting: ...

boundary_tilting: _BoundaryTiltingInstrument

class _CapacityInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., dropped: float = ...) -> Capacity: ...
    @overload
    def __call__(self, loop: Any, *, dropped: float = ...) -> Capacity: ...

capacity: _CapacityInstrument

class _ClassCountsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, logits: Any = ..., labels: Any = ..., inputs: Any = ..., loop: Any = ..., ratio: float = ...) -> ClassCounts: ...
    @overload
    def __call__(self, logits: Any, labels: Any, inputs: Any, loop: Any = None, *, ratio: float = ...) -> ClassCounts: ...

class_counts: _ClassCountsInstrument

class _ClassWeightsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., nothing: float = ...) -> ClassWeights: ...
    @overload
    def __call__(self, loop: Any, *, nothing: float = ...) -> ClassWeights: ...

class_weights: _ClassWeightsInstrument

class _ClassesAskedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ClassesAsked: ...
    @overload
    def __call__(self, loop: Any) -> ClassesAsked: ...

classes_asked: _ClassesAskedInstrument

class _ClassesMixedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ClassesMixed: ...
    @overload
    def __call__(self, loop: Any) -> ClassesMixed: ...

classes_mixed: _ClassesMixedInstrument

class _ClippingOrderInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ClippingOrder: ...
    @overload
    def __call__(self, loop: Any) -> ClippingOrder: ...

clipping_order: _ClippingOrderInstrument

class _CollapseByLayerInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, layer_outputs: Any = ..., labels: Any = ..., held_out_layer_outputs: Any = ..., held_out_labels: Any = ..., separated: float = ...) -> CollapseByLayer: ...
    @overload
    def __call__(self, layer_outputs: Any, labels: Any, held_out_layer_outputs: Any = None, held_out_labels: Any = None, *, separated: float = ...) -> CollapseByLayer: ...

collapse_by_layer: _CollapseByLayerInstrument

class _ConstantAnswerInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ...) -> ConstantAnswer: ...
    @overload
    def __call__(self, history: Any, loop: Any) -> ConstantAnswer: ...

constant_answer: _ConstantAnswerInstrument

class _ContrastiveLossInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., needed: float = ..., usable: float = ...) -> ContrastiveLoss: ...
    @overload
    def __call__(self, loop: Any, *, needed: float = ..., usable: float = ...) -> ContrastiveLoss: ...

contrastive_loss: _ContrastiveLossInstrument

class _DataKeptInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> DataKept: ...
    @overload
    def __call__(self, loop: Any) -> DataKept: ...

data_kept: _DataKeptInstrument

class _DeadUnitsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, activations: Any = ..., inputs: Any = ..., alarm_at: float = ...) -> DeadUnits: ...
    @overload
    def __call__(self, activations: Any, inputs: Any = None, *, alarm_at: float = ...) -> DeadUnits: ...

dead_units: _DeadUnitsInstrument

class _DenoisingInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, denoiser: Any = ..., sigma: float = ..., probes: int = ..., eigenvectors: int = ..., seed: int = ...) -> Denoising: ...
    @overload
    def __call__(self, denoiser: Any, *, sigma: float = ..., probes: int = ..., eigenvectors: int = ..., seed: int = ...) -> Denoising: ...

denoising: _DenoisingInstrument

class _DepthUseInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, residual_stack: Any = ...) -> DepthUse: ...
    @overload
    def __call__(self, residual_stack: Any) -> DepthUse: ...

depth_use: _DepthUseInstrument

class _DescentInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., alarm_above: float = ...) -> Descent: ...
    @overload
    def __call__(self, history: Any, loop: Any, *, alarm_above: float = ...) -> Descent: ...

descent: _DescentInstrument

class _DivergenceInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., times: float = ...) -> Divergence: ...
    @overload
    def __call__(self, history: Any, loop: Any = None, *, times: float = ...) -> Divergence: ...

divergence: _DivergenceInstrument

class _EdgeOfStabilityInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, hessian: Any = ..., optimizer: Any = ..., loop: Any = ..., batch_size: int | None = ..., trace_probes: int = ..., tolerance: float = ..., max_products: int = ..., edge_begins: float = ..., edge_ends: float = ..., seed: int = ...) -> EdgeOfStability: ...
    @overload
    def __call__(self, hessian: Any, optimizer: Any, loop: Any = None, *, batch_size: int | None = ..., trace_probes: int = ..., tolerance: float = ..., max_products: int = ..., edge_begins: float = ..., edge_ends: float = ..., seed: int = ...) -> EdgeOfStability: ...

edge_of_stability: _EdgeOfStabilityInstrument

class _EvaluationInputsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> EvaluationInputs: ...
    @overload
    def __call__(self, loop: Any) -> EvaluationInputs: ...

evaluation_inputs: _EvaluationInputsInstrument

class _EvaluationTargetsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> EvaluationTargets: ...
    @overload
    def __call__(self, loop: Any) -> EvaluationTargets: ...

evaluation_targets: _EvaluationTargetsInstrument

class _ExamplesMixedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, other_examples: Any = ...) -> ExamplesMixed: ...
    @overload
    def __call__(self, other_examples: Any) -> ExamplesMixed: ...

examples_mixed: _ExamplesMixedInstrument

class _FiniteEvaluationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> FiniteEvaluation: ...
    @overload
    def __call__(self, loop: Any) -> FiniteEvaluation: ...

finite_evaluation: _FiniteEvaluationInstrument

class _FiniteForwardInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, activations: Any = ...) -> FiniteForward: ...
    @overload
    def __call__(self, activations: Any) -> FiniteForward: ...

finite_forward: _FiniteForwardInstrument

class _FiniteStepsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ...) -> FiniteSteps: ...
    @overload
    def __call__(self, history: Any, loop: Any = None) -> FiniteSteps: ...

finite_steps: _FiniteStepsInstrument

class _GeneralizationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, losses: Any = ..., held_out_losses: Any = ..., logits: Any = ..., labels: Any = ..., held_out_logits: Any = ..., held_out_labels: Any = ..., targets: Any = ..., held_out_targets: Any = ..., loop: Any = ...) -> Generalization: ...
    @overload
    def __call__(self, losses: Any, held_out_losses: Any, logits: Any = None, labels: Any = None, held_out_logits: Any = None, held_out_labels: Any = None, targets: Any = None, held_out_targets: Any = None, loop: Any = None) -> Generalization: ...

generalization: _GeneralizationInstrument

class _GradientAccumulationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> GradientAccumulation: ...
    @overload
    def __call__(self, loop: Any) -> GradientAccumulation: ...

gradient_accumulation: _GradientAccumulationInstrument

class _GradientCoherenceInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, per_example_gradients: Any = ..., labels: Any = ..., contrast: bool = ..., fit_below: float = ..., seed: int = ...) -> GradientCoherence: ...
    @overload
    def __call__(self, per_example_gradients: Any, labels: Any = None, *, contrast: bool = ..., fit_below: float = ..., seed: int = ...) -> GradientCoherence: ...

gradient_coherence: _GradientCoherenceInstrument

class _GradientConflictInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, per_example_gradients: Any = ..., labels: Any = ..., seed: int = ...) -> GradientConflict: ...
    @overload
    def __call__(self, per_example_gradients: Any, labels: Any, *, seed: int = ...) -> GradientConflict: ...

gradient_conflict: _GradientConflictInstrument

class _GradientDepthInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., factor: float = ...) -> GradientDepth: ...
    @overload
    def __call__(self, history: Any, loop: Any = None, *, factor: float = ...) -> GradientDepth: ...

gradient_depth: _GradientDepthInstrument

class _GradientFlowInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., plain_network: bool = ..., depth_factor: float = ..., skipped_share: float = ...) -> GradientFlow: ...
    @overload
    def __call__(self, history: Any, *, plain_network: bool = ..., depth_factor: float = ..., skipped_share: float = ...) -> GradientFlow: ...

gradient_flow: _GradientFlowInstrument

class _GradientUnderflowInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., tiny: float = ...) -> GradientUnderflow: ...
    @overload
    def __call__(self, history: Any, loop: Any, *, tiny: float = ...) -> GradientUnderflow: ...

gradient_underflow: _GradientUnderflowInstrument

class _GradientZeroingInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> GradientZeroing: ...
    @overload
    def __call__(self, loop: Any) -> GradientZeroing: ...

gradient_zeroing: _GradientZeroingInstrument

class _GradientsReachInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> GradientsReach: ...
    @overload
    def __call__(self, loop: Any) -> GradientsReach: ...

gradients_reach: _GradientsReachInstrument

class _HeldOutCopiesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, inputs: Any = ..., held_out_inputs: Any = ..., loop: Any = ..., times: float = ...) -> HeldOutCopies: ...
    @overload
    def __call__(self, inputs: Any, held_out_inputs: Any, loop: Any = None, *, times: float = ...) -> HeldOutCopies: ...

held_out_copies: _HeldOutCopiesInstrument

class _HeldOutInputsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, inputs: Any = ..., held_out_inputs: Any = ..., ratio: float = ...) -> HeldOutInputs: ...
    @overload
    def __call__(self, inputs: Any, held_out_inputs: Any, *, ratio: float = ...) -> HeldOutInputs: ...

held_out_inputs_alike: _HeldOutInputsInstrument

class _HeldOutLabelsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, inputs: Any = ..., logits: Any = ..., labels: Any = ..., held_out_inputs: Any = ..., held_out_logits: Any = ..., held_out_labels: Any = ...) -> HeldOutLabels: ...
    @overload
    def __call__(self, inputs: Any, logits: Any, labels: Any, held_out_inputs: Any, held_out_logits: Any, held_out_labels: Any) -> HeldOutLabels: ...

held_out_labels: _HeldOutLabelsInstrument

class _HeldOutRowsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> HeldOutRows: ...
    @overload
    def __call__(self, loop: Any) -> HeldOutRows: ...

held_out_rows: _HeldOutRowsInstrument

class _HessianSpectrumInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, hessian: Any = ..., class_directions: Any = ..., num_eigenvalues: int = ..., steps: int = ..., max_products: int = ..., num_probes: int = ..., trace_probes: int = ..., tolerance: float = ..., half_split: bool = ..., weight_decay: float = ..., keep_eigenvectors: bool = ..., overlap_above: float = ..., negative_above: float = ..., memory: int | None = ..., checkpoint: str = ..., seed: int = ...) -> HessianSpectrum: ...
    @overload
    def __call__(self, hessian: Any, class_directions: Any = None, *, num_eigenvalues: int = ..., steps: int = ..., max_products: int = ..., num_probes: int = ..., trace_probes: int = ..., tolerance: float = ..., half_split: bool = ..., weight_decay: float = ..., keep_eigenvectors: bool = ..., overlap_above: float = ..., negative_above: float = ..., memory: int | None = ..., checkpoint: str = ..., seed: int = ...) -> HessianSpectrum: ...

hessian_spectrum: _HessianSpectrumInstrument

class _IgnoredInputsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, inputs_tried: Any = ..., history: Any = ...) -> IgnoredInputs: ...
    @overload
    def __call__(self, inputs_tried: Any, history: Any) -> IgnoredInputs: ...

ignored_inputs: _IgnoredInputsInstrument

class _InitialLossInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., logits: Any = ..., labels: Any = ..., losses: Any = ..., loop: Any = ..., times: float = ...) -> InitialLoss: ...
    @overload
    def __call__(self, history: Any, logits: Any, labels: Any, losses: Any, loop: Any = None, *, times: float = ...) -> InitialLoss: ...

initial_loss: _InitialLossInstrument

class _InitialScaleInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, activations: Any = ..., history: Any = ..., large: float = ..., small: float = ...) -> InitialScale: ...
    @overload
    def __call__(self, activations: Any, history: Any = None, *, large: float = ..., small: float = ...) -> InitialScale: ...

initial_scale: _InitialScaleInstrument

class _InitialWeightsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., large: float = ..., small: float = ...) -> InitialWeights: ...
    @overload
    def __call__(self, loop: Any, *, large: float = ..., small: float = ...) -> InitialWeights: ...

initial_weights: _InitialWeightsInstrument

class _InitializationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, layer_chain: Any = ..., trial: Any = ..., factor: float = ...) -> Initialization: ...
    @overload
    def __call__(self, layer_chain: Any, trial: Any = None, *, factor: float = ...) -> Initialization: ...

initialization: _InitializationInstrument

class _InputMagnitudeInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, per_example_gradients: Any = ..., inputs: Any = ..., layer: str = ...) -> InputMagnitude: ...
    @overload
    def __call__(self, per_example_gradients: Any, inputs: Any, *, layer: str = ...) -> InputMagnitude: ...

input_magnitude: _InputMagnitudeInstrument

class _InputScaleInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, inputs: Any = ..., large: float = ..., small: float = ..., ratio: float = ..., constant: float = ...) -> InputScale: ...
    @overload
    def __call__(self, inputs: Any, *, large: float = ..., small: float = ..., ratio: float = ..., constant: float = ...) -> InputScale: ...

input_scale: _InputScaleInstrument

class _InputUsedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, trial: Any = ...) -> InputUsed: ...
    @overload
    def __call__(self, trial: Any) -> InputUsed: ...

input_used: _InputUsedInstrument

class _LabelAuditInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, logits: Any = ..., labels: Any = ..., inputs: Any = ..., warn_at: float = ...) -> LabelAudit: ...
    @overload
    def __call__(self, logits: Any, labels: Any, inputs: Any = None, *, warn_at: float = ...) -> LabelAudit: ...

label_audit: _LabelAuditInstrument

class _LabelsBelongInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., inputs: Any = ..., losses: Any = ..., logits: Any = ..., labels: Any = ..., targets: Any = ..., held_out_losses: Any = ..., held_out_logits: Any = ..., held_out_labels: Any = ..., held_out_targets: Any = ..., loop: Any = ..., independent: float = ...) -> LabelsBelong: ...
    @overload
    def __call__(self, history: Any, inputs: Any, losses: Any, logits: Any = None, labels: Any = None, targets: Any = None, held_out_losses: Any = None, held_out_logits: Any = None, held_out_labels: Any = None, held_out_targets: Any = None, loop: Any = None, *, independent: float = ...) -> LabelsBelong: ...

labels_belong: _LabelsBelongInstrument

class _LabelsKeptInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> LabelsKept: ...
    @overload
    def __call__(self, loop: Any) -> LabelsKept: ...

labels_kept: _LabelsKeptInstrument

class _LatentCodeInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., nothing: float = ...) -> LatentCode: ...
    @overload
    def __call__(self, loop: Any, *, nothing: float = ...) -> LatentCode: ...

latent_code: _LatentCodeInstrument

class _LayersSharedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> LayersShared: ...
    @overload
    def __call__(self, loop: Any) -> LayersShared: ...

layers_shared: _LayersSharedInstrument

class _LearningRateScheduleInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ...) -> LearningRateSchedule: ...
    @overload
    def __call__(self, history: Any, loop: Any) -> LearningRateSchedule: ...

learning_rate_schedule: _LearningRateScheduleInstrument

class _LinearFreedomInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, linear_symmetries: Any = ...) -> LinearFreedom: ...
    @overload
    def __call__(self, linear_symmetries: Any) -> LinearFreedom: ...

linear_freedom: _LinearFreedomInstrument

class _LossCallInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> LossCall: ...
    @overload
    def __call__(self, loop: Any) -> LossCall: ...

loss_call: _LossCallInstrument

class _LossDomainInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> LossDomain: ...
    @overload
    def __call__(self, loop: Any) -> LossDomain: ...

loss_domain: _LossDomainInstrument

class _LossFormulaInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> LossFormula: ...
    @overload
    def __call__(self, loop: Any) -> LossFormula: ...

loss_formula: _LossFormulaInstrument

class _LossSpikesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., warn_above: float = ...) -> LossSpikes: ...
    @overload
    def __call__(self, history: Any, loop: Any = None, *, warn_above: float = ...) -> LossSpikes: ...

loss_spikes: _LossSpikesInstrument

class _LossTermsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., times: float = ...) -> LossTerms: ...
    @overload
    def __call__(self, history: Any, loop: Any, *, times: float = ...) -> LossTerms: ...

loss_terms: _LossTermsInstrument

class _MixedPrecisionInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> MixedPrecision: ...
    @overload
    def __call__(self, loop: Any) -> MixedPrecision: ...

mixed_precision: _MixedPrecisionInstrument

class _ModeConnectivityInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, interpolation: Any = ..., other: Any = ..., ancestor: Any = ..., points: int = ..., refine: int = ..., align: str | None = ..., norm_stats: str = ..., repair: bool = ..., layers: bool = ..., path: str = ..., bezier_steps: int = ..., bezier_learning_rate: float = ..., orders: int | None = ..., beyond_permutations: bool = ..., connected_below: float = ..., separated_above: float = ...) -> ModeConnectivity: ...
    @overload
    def __call__(self, interpolation: Any, other: Any, ancestor: Any = None, *, points: int = ..., refine: int = ..., align: str | None = ..., norm_stats: str = ..., repair: bool = ..., layers: bool = ..., path: str = ..., bezier_steps: int = ..., bezier_learning_rate: float = ..., orders: int | None = ..., beyond_permutations: bool = ..., connected_below: float = ..., separated_above: float = ...) -> ModeConnectivity: ...

mode_connectivity: _ModeConnectivityInstrument

class _ModesAgreeInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, trial: Any = ...) -> ModesAgree: ...
    @overload
    def __call__(self, trial: Any) -> ModesAgree: ...

modes_agree: _ModesAgreeInstrument

class _ModuleModesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ModuleModes: ...
    @overload
    def __call__(self, loop: Any) -> ModuleModes: ...

module_modes: _ModuleModesInstrument

class _NaiveLossMinimizationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, params: Any = ..., gradient: Any = ..., logits: Any = ..., previous_logits: Any = ...) -> NaiveLossMinimization: ...
    @overload
    def __call__(self, params: Any, gradient: Any, logits: Any = None, previous_logits: Any = None) -> NaiveLossMinimization: ...

naive_loss_minimization: _NaiveLossMinimizationInstrument

class _NeuralCollapseInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, features: Any = ..., labels: Any = ..., classifier: Any = ..., held_out_features: Any = ..., held_out_labels: Any = ..., logits: Any = ..., terminal_accuracy: float = ..., nc1_collapsed: float = ..., nc2_collapsed: float = ..., nc2_unusual: float = ..., nc4_unusual: float = ...) -> NeuralCollapse: ...
    @overload
    def __call__(self, features: Any, labels: Any, classifier: Any = None, held_out_features: Any = None, held_out_labels: Any = None, logits: Any = None, *, terminal_accuracy: float = ..., nc1_collapsed: float = ..., nc2_collapsed: float = ..., nc2_unusual: float = ..., nc4_unusual: float = ...) -> NeuralCollapse: ...

neural_collapse: _NeuralCollapseInstrument

class _NormalizationStatisticsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, running_statistics: Any = ..., factor: float = ...) -> NormalizationStatistics: ...
    @overload
    def __call__(self, running_statistics: Any, *, factor: float = ...) -> NormalizationStatistics: ...

normalization_statistics: _NormalizationStatisticsInstrument

class _OneBatchInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, trial: Any = ...) -> OneBatch: ...
    @overload
    def __call__(self, trial: Any) -> OneBatch: ...

one_batch: _OneBatchInstrument

class _OpposingSignalsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, hessian: Any = ..., losses_at: Any = ..., per_example_gradients: Any = ..., inputs: Any = ..., labels: Any = ..., loss_record: Any = ..., mode: str = ..., k: int = ..., window: int = ..., share_limit: float = ..., swap_limit: float = ..., describe: str = ..., seed: int = ...) -> OpposingSignals: ...
    @overload
    def __call__(self, hessian: Any, losses_at: Any, per_example_gradients: Any, inputs: Any = None, labels: Any = None, loss_record: Any = None, *, mode: str = ..., k: int = ..., window: int = ..., share_limit: float = ..., swap_limit: float = ..., describe: str = ..., seed: int = ...) -> OpposingSignals: ...

opposing_signals: _OpposingSignalsInstrument

class _OptimizerKeptInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> OptimizerKept: ...
    @overload
    def __call__(self, loop: Any) -> OptimizerKept: ...

optimizer_kept: _OptimizerKeptInstrument

class _OutputConstantInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, activations: Any = ..., inputs: Any = ..., targets: Any = ..., alarm_below: float = ...) -> OutputConstant: ...
    @overload
    def __call__(self, activations: Any, inputs: Any = None, targets: Any = None, *, alarm_below: float = ...) -> OutputConstant: ...

output_constant: _OutputConstantInstrument

class _OutputRangeInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> OutputRange: ...
    @overload
    def __call__(self, loop: Any) -> OutputRange: ...

output_range: _OutputRangeInstrument

class _OutsideChangesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> OutsideChanges: ...
    @overload
    def __call__(self, loop: Any) -> OutsideChanges: ...

outside_changes: _OutsideChangesInstrument

class _PairsDifferInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> PairsDiffer: ...
    @overload
    def __call__(self, loop: Any) -> PairsDiffer: ...

pairs_differ: _PairsDifferInstrument

class _ParametersHeldInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ParametersHeld: ...
    @overload
    def __call__(self, loop: Any) -> ParametersHeld: ...

parameters_held: _ParametersHeldInstrument

class _PlacesMatchInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> PlacesMatch: ...
    @overload
    def __call__(self, loop: Any) -> PlacesMatch: ...

places_match: _PlacesMatchInstrument

class _PolicyLossInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., times: float = ...) -> PolicyLoss: ...
    @overload
    def __call__(self, loop: Any, *, times: float = ...) -> PolicyLoss: ...

policy_loss: _PolicyLossInstrument

class _QuantizationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, quantised_weights: Any = ..., clip: float = ..., inner: float = ...) -> Quantization: ...
    @overload
    def __call__(self, quantised_weights: Any, *, clip: float = ..., inner: float = ...) -> Quantization: ...

quantization: _QuantizationInstrument

class _RanksDataInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> RanksData: ...
    @overload
    def __call__(self, loop: Any) -> RanksData: ...

ranks_data: _RanksDataInstrument

class _RepeatedChanceInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> RepeatedChance: ...
    @overload
    def __call__(self, loop: Any) -> RepeatedChance: ...

repeated_chance: _RepeatedChanceInstrument

class _ReplicasEqualInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> ReplicasEqual: ...
    @overload
    def __call__(self, loop: Any) -> ReplicasEqual: ...

replicas_equal: _ReplicasEqualInstrument

class _RepresentationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, layer_outputs: Any = ..., previous_layer_outputs: Any = ..., noise: float = ..., compared: int = ...) -> Representation: ...
    @overload
    def __call__(self, layer_outputs: Any, previous_layer_outputs: Any = None, *, noise: float = ..., compared: int = ...) -> Representation: ...

representation: _RepresentationInstrument

class _RowLabelsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., warn_at: float = ...) -> RowLabels: ...
    @overload
    def __call__(self, loop: Any, *, warn_at: float = ...) -> RowLabels: ...

row_labels: _RowLabelsInstrument

class _RowsAlignedInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> RowsAligned: ...
    @overload
    def __call__(self, loop: Any) -> RowsAligned: ...

rows_aligned: _RowsAlignedInstrument

class _RowsDrawnInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> RowsDrawn: ...
    @overload
    def __call__(self, loop: Any) -> RowsDrawn: ...

rows_drawn: _RowsDrawnInstrument

class _SaturationInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, activations: Any = ..., alarm_at: float = ...) -> Saturation: ...
    @overload
    def __call__(self, activations: Any, *, alarm_at: float = ...) -> Saturation: ...

saturation: _SaturationInstrument

class _SavedChangesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, saved: Any = ...) -> SavedChanges: ...
    @overload
    def __call__(self, saved: Any) -> SavedChanges: ...

saved_changes: _SavedChangesInstrument

class _SavedFiniteInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, saved: Any = ...) -> SavedFinite: ...
    @overload
    def __call__(self, saved: Any) -> SavedFinite: ...

saved_finite: _SavedFiniteInstrument

class _SavedOptimizerInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, saved: Any = ...) -> SavedOptimizer: ...
    @overload
    def __call__(self, saved: Any) -> SavedOptimizer: ...

saved_optimizer: _SavedOptimizerInstrument

class _SavedRowsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, saved: Any = ...) -> SavedRows: ...
    @overload
    def __call__(self, saved: Any) -> SavedRows: ...

saved_rows: _SavedRowsInstrument

class _SavedTiesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, saved: Any = ...) -> SavedTies: ...
    @overload
    def __call__(self, saved: Any) -> SavedTies: ...

saved_ties: _SavedTiesInstrument

class _SavedWeightsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, saved: Any = ...) -> SavedWeights: ...
    @overload
    def __call__(self, saved: Any) -> SavedWeights: ...

saved_weights: _SavedWeightsInstrument

class _SecondMomentInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., stale: float = ...) -> SecondMoment: ...
    @overload
    def __call__(self, history: Any, loop: Any = None, *, stale: float = ...) -> SecondMoment: ...

second_moment: _SecondMomentInstrument

class _SharpnessInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, losses_at: Any = ..., hessian: Any = ..., fisher: Any = ..., divergence_at: Any = ..., rho: float = ..., sigma: float | None = ..., norm: str = ..., m: int = ..., steps: int = ..., num_draws: int = ..., tolerance: float = ..., seed: int = ...) -> Sharpness: ...
    @overload
    def __call__(self, losses_at: Any, hessian: Any, fisher: Any = None, divergence_at: Any = None, *, rho: float = ..., sigma: float | None = ..., norm: str = ..., m: int = ..., steps: int = ..., num_draws: int = ..., tolerance: float = ..., seed: int = ...) -> Sharpness: ...

sharpness: _SharpnessInstrument

class _SigmoidCollapseInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, binary_decisions: Any = ...) -> SigmoidCollapse: ...
    @overload
    def __call__(self, binary_decisions: Any) -> SigmoidCollapse: ...

sigmoid_collapse: _SigmoidCollapseInstrument

class _SoftmaxCollapseInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, logits: Any = ..., labels: Any = ..., logit_gradients: Any = ..., held_out_logits: Any = ..., held_out_labels: Any = ..., alarm_at: float = ..., near_nats: float = ..., near_residual: float = ...) -> SoftmaxCollapse: ...
    @overload
    def __call__(self, logits: Any, labels: Any, logit_gradients: Any = None, held_out_logits: Any = None, held_out_labels: Any = None, *, alarm_at: float = ..., near_nats: float = ..., near_residual: float = ...) -> SoftmaxCollapse: ...

softmax_collapse: _SoftmaxCollapseInstrument

class _StepOrderInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> StepOrder: ...
    @overload
    def __call__(self, loop: Any) -> StepOrder: ...

step_order: _StepOrderInstrument

class _StepSizeInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ..., too_high: float = ..., too_low: float = ...) -> StepSize: ...
    @overload
    def __call__(self, history: Any, loop: Any = None, *, too_high: float = ..., too_low: float = ...) -> StepSize: ...

step_size: _StepSizeInstrument

class _SymmetryGroupsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, symmetries: Any = ..., module_graph: Any = ...) -> SymmetryGroups: ...
    @overload
    def __call__(self, symmetries: Any, module_graph: Any) -> SymmetryGroups: ...

symmetry_groups: _SymmetryGroupsInstrument

class _TargetScaleInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ..., large: float = ...) -> TargetScale: ...
    @overload
    def __call__(self, loop: Any, *, large: float = ...) -> TargetScale: ...

target_scale: _TargetScaleInstrument

class _TargetValuesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> TargetValues: ...
    @overload
    def __call__(self, loop: Any) -> TargetValues: ...

target_values: _TargetValuesInstrument

class _TokenTargetsInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> TokenTargets: ...
    @overload
    def __call__(self, loop: Any) -> TokenTargets: ...

token_targets: _TokenTargetsInstrument

class _TokensDifferInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> TokensDiffer: ...
    @overload
    def __call__(self, loop: Any) -> TokensDiffer: ...

tokens_differ: _TokensDifferInstrument

class _TrajectoryInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, logits: Any = ..., previous_logits: Any = ..., temperature: float = ..., back: int = ...) -> Trajectory: ...
    @overload
    def __call__(self, logits: Any, previous_logits: Any = None, *, temperature: float = ..., back: int = ...) -> Trajectory: ...

trajectory: _TrajectoryInstrument

class _TrivialPredictorInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, logits: Any = ..., labels: Any = ..., losses: Any = ...) -> TrivialPredictor: ...
    @overload
    def __call__(self, logits: Any, labels: Any, losses: Any) -> TrivialPredictor: ...

trivial_predictor: _TrivialPredictorInstrument

class _TrustRadiusInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, losses_at: Any = ..., hessian: Any = ..., update: Any = ..., newton_products: int = ...) -> TrustRadius: ...
    @overload
    def __call__(self, losses_at: Any, hessian: Any, update: Any = None, *, newton_products: int = ...) -> TrustRadius: ...

trust_radius: _TrustRadiusInstrument

class _UnitCopiesInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, params: Any = ..., history: Any = ...) -> UnitCopies: ...
    @overload
    def __call__(self, params: Any, history: Any = None) -> UnitCopies: ...

unit_copies: _UnitCopiesInstrument

class _WeightDecayInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., shrunk: float = ...) -> WeightDecay: ...
    @overload
    def __call__(self, history: Any, *, shrunk: float = ...) -> WeightDecay: ...

weight_decay: _WeightDecayInstrument

class _WeightsMoveInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, history: Any = ..., loop: Any = ...) -> WeightsMove: ...
    @overload
    def __call__(self, history: Any, loop: Any) -> WeightsMove: ...

weights_move: _WeightsMoveInstrument

class _WrapperCalledInstrument(Instrument):
    @overload
    def __call__(self, snapshot: Measurable, *, loop: Any = ...) -> WrapperCalled: ...
    @overload
    def __call__(self, loop: Any) -> WrapperCalled: ...

wrapper_called: _WrapperCalledInstrument
