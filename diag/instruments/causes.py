"""What can be wrong with a training run: the closed list of causes that findings name, in plain words.

A verdict carries the name of a cause where it says *why*; whatever counts, folds or compares findings goes by it,
never by the text of a sentence. A check that can tell two causes apart names the one; a check that cannot names the
wider one (`TRAINING_DIVERGED`, `WEIGHTS_UNCHANGED`, `GRADIENT_ABSENT`, ...). Nothing of ours is imported here.
"""

from __future__ import annotations

import enum


class Theme(enum.StrEnum):
    """Where in the training the cause lies."""

    LOOP = "loop"
    LOSS = "loss"
    DATA = "data"
    OPTIMIZATION = "optimization"
    NETWORK = "network"
    OUTCOME = "outcome"
    NUMERICS = "numerics"
    DISTRIBUTED = "distributed"


class Cause(enum.StrEnum):
    """What happened; `theme` says where it lies and `meaning` what it is, in one sentence."""

    theme: Theme
    meaning: str

    def __new__(cls, value: str, theme: Theme, meaning: str) -> Cause:
        member = str.__new__(cls, value)
        member._value_, member.theme, member.meaning = value, theme, meaning
        return member

    # fmt: off
    # ruff: noqa: E501
    # Loop: which parameters are trained
    PARAMETER_IN_NO_OPTIMIZER = "parameter_in_no_optimizer", Theme.LOOP, "A trainable parameter gets gradients and no optimizer holds it."
    PARAMETER_IN_TWO_OPTIMIZERS = "parameter_in_two_optimizers", Theme.LOOP, "Two optimizers, or two groups of one, update the same parameter."
    OPTIMIZER_HOLDS_STALE_PARAMETERS = "optimizer_holds_stale_parameters", Theme.LOOP, "The optimizer updates tensors that the model no longer uses: the model was rebuilt or replaced after it was made."
    PARAMETER_FROZEN = "parameter_frozen", Theme.LOOP, "A layer between trained ones has requires_grad=False, or one that was never trained is not trained here either."
    GRAPH_CUT = "graph_cut", Theme.LOOP, "A module runs in the forward pass and no gradient comes back to it: detach, no_grad, .item(), argmax."
    MODULE_UNUSED = "module_unused", Theme.LOOP, "A module with trainable parameters is never called in training, or the loss does not use its output."
    GRADIENT_ABSENT = "gradient_absent", Theme.LOOP, "A trainable parameter never gets a gradient; which of the reasons is not known."
    VECTOR_UNTRAINED = "vector_untrained", Theme.LOOP, "A parameter of one axis (a bias, a temperature) never gets a gradient, while weights of layers do: it can explain little."
    WEIGHTS_UNCHANGED = "weights_unchanged", Theme.LOOP, "A parameter has a gradient, a learning rate and a step, and does not move; why is not known."
    WEIGHTS_CHANGED_OUTSIDE = "weights_changed_outside", Theme.LOOP, "Weights change between steps by something other than the optimizer: reloaded, re-initialised, overwritten."
    AVERAGED_WEIGHTS_LEFT = "averaged_weights_left", Theme.LOOP, "Averaged weights (EMA, SWA) were put in for an evaluation and training went on from them."
    COPY_NOT_FOLLOWING = "copy_not_following", Theme.LOOP, "An average of the weights that is never updated, a target network that is never synchronised, or a copy that follows them so slowly that it is still what they began with."
    LAYERS_SHARED = "layers_shared", Theme.LOOP, "Layers meant to be separate are one module ([layer] * n)."
    LAYERS_UNTIED = "layers_untied", Theme.LOOP, "Weights meant to be tied are two tensors that drift apart."
    LAYERS_START_EQUAL = "layers_start_equal", Theme.LOOP, "Layers meant to be independent start with the same numbers: copies of one module."

    # Loop: gradients and steps
    GRADIENTS_NOT_ZEROED = "gradients_not_zeroed", Theme.LOOP, "Gradients are never zeroed: every step uses the sum of all earlier ones."
    GRADIENTS_ZEROED_BEFORE_STEP = "gradients_zeroed_before_step", Theme.LOOP, "Gradients are zeroed between backward and step, so the step has nothing to use."
    STALE_GRADIENT = "stale_gradient", Theme.LOOP, "Some parameters' gradients are left over from earlier steps while the others' are zeroed."
    ACCUMULATION_NOT_DIVIDED = "accumulation_not_divided", Theme.LOOP, "Gradients of several micro-batches are summed where their mean was meant."
    ACCUMULATION_LOST = "accumulation_lost", Theme.LOOP, "Gradients are zeroed at every micro-batch, so only the last one counts."
    STEP_BEFORE_BACKWARD = "step_before_backward", Theme.LOOP, "optimizer.step() runs before backward(): it uses the last batch's gradient, or none."
    STEP_MISSING = "step_missing", Theme.LOOP, "backward() runs and optimizer.step() does not."
    STEP_REPEATED = "step_repeated", Theme.LOOP, "optimizer.step() runs more than once on the same gradient."
    OPTIMIZER_RECREATED = "optimizer_recreated", Theme.LOOP, "The optimizer is made again in the loop, so that its moments start from zero each time."
    OPTIMIZER_STATE_NOT_RESTORED = "optimizer_state_not_restored", Theme.LOOP, "Training was resumed with the model's state and without the optimizer's."
    CLIPPING_BEFORE_UNSCALING = "clipping_before_unscaling", Theme.LOOP, "Gradients are clipped while they still carry the loss scale."
    CLIPPING_BEFORE_BACKWARD = "clipping_before_backward", Theme.LOOP, "Gradients are clipped before backward() or after step(), where it does nothing."
    GRADIENTS_STILL_SCALED = "gradients_still_scaled", Theme.LOOP, "The optimizer steps on gradients that carry the loss scale: scaler.step() was bypassed."
    AUTOCAST_OFF = "autocast_off", Theme.LOOP, "A gradient scaler is used and the forward pass does not run under autocast."

    # Loop: schedule
    LEARNING_RATE_ZERO = "learning_rate_zero", Theme.LOOP, "A group's learning rate is zero or next to it from the start."
    SCHEDULE_ENDED_EARLY = "schedule_ended_early", Theme.LOOP, "The schedule had brought the learning rate to nothing long before training ended."
    SCHEDULE_TOO_FAST = "schedule_too_fast", Theme.LOOP, "The scheduler steps more often than its settings mean: twice a step, or each batch instead of each epoch."
    SCHEDULE_TOO_SLOW = "schedule_too_slow", Theme.LOOP, "The scheduler steps less often than its settings mean: each epoch instead of each batch."
    SCHEDULER_NEVER_STEPPED = "scheduler_never_stepped", Theme.LOOP, "A scheduler exists and is never stepped."
    SCHEDULER_BEFORE_OPTIMIZER = "scheduler_before_optimizer", Theme.LOOP, "scheduler.step() runs before optimizer.step(): the first value of the schedule is skipped."
    SCHEDULER_OF_ANOTHER_OPTIMIZER = "scheduler_of_another_optimizer", Theme.LOOP, "The scheduler changes an optimizer that does not train."
    SETTING_WITHOUT_EFFECT = "setting_without_effect", Theme.LOOP, "A learning rate is set where the optimizer does not read it: on the optimizer, not in its param_groups."
    SCHEDULE_JUMPED = "schedule_jumped", Theme.LOOP, "The learning rate jumps where training was resumed, or the schedule starts over."

    # Loop: modes, batches, evaluation
    TRAINING_IN_EVAL_MODE = "training_in_eval_mode", Theme.LOOP, "Training runs with modules in eval mode: dropout is off, running statistics stand still."
    EVALUATION_IN_TRAIN_MODE = "evaluation_in_train_mode", Theme.LOOP, "Evaluation runs in train mode: dropout is on, running statistics move."
    DROPOUT_ALWAYS_ON = "dropout_always_on", Theme.LOOP, "Dropout (or other noise of the model) acts in eval mode too."
    AUGMENTATION_IN_EVALUATION = "augmentation_in_evaluation", Theme.LOOP, "The held-out rows are augmented at random: the same row differs between evaluations."
    BATCH_REPEATED = "batch_repeated", Theme.LOOP, "Every step sees the same batch."
    EPOCHS_NOT_RESHUFFLED = "epochs_not_reshuffled", Theme.LOOP, "Every epoch has the same batches in the same order."
    AUGMENTATION_REPEATED = "augmentation_repeated", Theme.LOOP, "Workers or epochs draw the same random numbers, so augmentation repeats itself."
    EVALUATED_MODEL_IS_ANOTHER = "evaluated_model_is_another", Theme.LOOP, "The model that is evaluated is not the one that is trained."

    # Loss
    DOUBLE_SOFTMAX = "double_softmax", Theme.LOSS, "Probabilities or log-probabilities go into a loss that applies softmax itself."
    DOUBLE_SIGMOID = "double_sigmoid", Theme.LOSS, "Probabilities go into a loss that applies the sigmoid itself."
    LOGITS_INTO_PROBABILITY_LOSS = "logits_into_probability_loss", Theme.LOSS, "Raw outputs go into a loss that expects probabilities or log-probabilities."
    LOSS_SUMMED = "loss_summed", Theme.LOSS, "The loss is a sum over examples where a mean was meant: its gradient grows with the batch."
    WRONG_CLASS_AXIS = "wrong_class_axis", Theme.LOSS, "Softmax or the loss runs over another axis than the classes."
    TARGETS_SHIFTED = "targets_shifted", Theme.LOSS, "Targets are shifted against the inputs: by one position, or class numbers off by one."
    ANSWER_IN_INPUT = "answer_in_input", Theme.LOSS, "The target can be read from the input: unshifted targets, no causal mask, a label among the features."
    TARGETS_OUT_OF_RANGE = "targets_out_of_range", Theme.LOSS, "Targets lie outside of what the loss is made for: above one in binary cross-entropy, several classes at once in a softmax."
    IGNORED_LABELS_COUNTED = "ignored_labels_counted", Theme.LOSS, "Padding or unlabelled positions count in the loss."
    TARGETS_BROADCAST = "targets_broadcast", Theme.LOSS, "Outputs and targets differ in shape and broadcast against each other: (N, 1) with (N,)."
    TARGETS_CAST = "targets_cast", Theme.LOSS, "Targets lose their values in a conversion: truncated to integers, or rounded."
    LOSS_ASCENDED = "loss_ascended", Theme.LOSS, "Training goes up the loss: a sign is wrong."
    LOSS_TERM_DOMINATES = "loss_term_dominates", Theme.LOSS, "One term of the loss outweighs the others so far that they do not count."
    PAIR_IDENTICAL = "pair_identical", Theme.LOSS, "The two sides of a pair that the loss compares are the same example: two equal views, an anchor that is its own positive."
    ANSWER_MASKED = "answer_masked", Theme.LOSS, "A mask over a softmax covers the answers that are asked for, or leaves in what is no answer."
    TEMPERATURE_WRONG = "temperature_wrong", Theme.LOSS, "The temperature of a softmax leaves it even or makes it a hard choice, whatever the network does."
    NOTHING_KEEPS_APART = "nothing_keeps_apart", Theme.LOSS, "The loss is smallest where every input gives the same output: outputs are drawn together and nothing keeps them apart."
    ACTION_NOT_TAKEN = "action_not_taken", Theme.LOSS, "What an action brought is put down to another one: freshly drawn actions, the best instead of the taken."
    BOOTSTRAP_WRONG = "bootstrap_wrong", Theme.LOSS, "What values of actions are compared with is not made of those of the next states as it should be: they hardly enter, more than once, or with a gradient."
    NETWORKS_COOPERATE = "networks_cooperate", Theme.LOSS, "Two networks that should train against each other ask for the same: the generator for the answer that its rows get anyway."
    LOSS_FLAT = "loss_flat", Theme.LOSS, "A loss has no slope where its argument lies, so that next to nothing is learned from it."
    OUTPUT_RANGE = "output_range", Theme.LOSS, "The function after the last layer keeps the outputs in a range in which the targets do not lie."
    LOSS_UNBOUNDED = "loss_unbounded", Theme.LOSS, "The loss can be lowered without end by a scale alone: a term that pays for it is missing, has the wrong sign, or has no gradient."
    ERRORS_CANCEL = "errors_cancel", Theme.LOSS, "The loss asks for less than it is meant to: errors cancel in a mean, a mask leaves out what would be wrong, or nothing is compared with a given number."
    DERIVATIVE_ZERO = "derivative_zero", Theme.LOSS, "A derivative that the loss is made of is zero everywhere."
    INPUT_TOO_SHORT = "input_too_short", Theme.LOSS, "The outputs are shorter than the sequences that they are to be aligned with."
    NOISE_MISPLACED = "noise_misplaced", Theme.LOSS, "A code is drawn with another spread than the loss takes it to have, or not drawn at all."
    INITIAL_LOSS_HIGH = "initial_loss_high", Theme.LOSS, "The first loss is far above that of guessing evenly: the network starts sure and wrong."

    CLASS_WEIGHTS_WRONG = "class_weights_wrong", Theme.LOSS, "The loss's class weights leave some classes next to nothing, or weigh up the frequent ones."

    # Data
    LABELS_SHUFFLED = "labels_shuffled", Theme.DATA, "Labels do not belong to their inputs: one of the two was shuffled alone."
    PAIRS_UNRELATED = "pairs_unrelated", Theme.DATA, "Pairs that should belong together have nothing in common: other examples, or views of which nothing is left."
    BATCH_TOO_SMALL = "batch_too_small", Theme.DATA, "A batch holds too few examples for what its loss compares."
    TARGETS_MISPLACED = "targets_misplaced", Theme.DATA, "Targets stand at other places than what they belong to: mirrored, moved, in reverse order, filled up at the other end."
    LABELS_WRONG = "labels_wrong", Theme.DATA, "A part of the labels is wrong."
    CLASSES_SORTED = "classes_sorted", Theme.DATA, "Batches hold one or few classes each: the data is sorted and not shuffled."
    CLASS_MISSING = "class_missing", Theme.DATA, "A class that the network can output never occurs in training."
    TARGETS_ALL_EQUAL = "targets_all_equal", Theme.DATA, "All examples have the same target."
    CLASS_IMBALANCE = "class_imbalance", Theme.DATA, "Classes differ in number so much that the rare ones are not learned."
    INPUTS_NOT_NORMALIZED = "inputs_not_normalized", Theme.DATA, "Inputs are far from zero mean and unit scale, or features differ in scale by orders of magnitude."
    INPUTS_TOO_SMALL = "inputs_too_small", Theme.DATA, "Inputs hardly vary: normalised twice, or divided once too often."
    INPUTS_CONSTANT = "inputs_constant", Theme.DATA, "Inputs, or most of their features, are the same for all examples."
    TARGETS_NOT_NORMALIZED = "targets_not_normalized", Theme.DATA, "Targets of a regression are far from unit scale."
    MISSING_VALUES_FILLED = "missing_values_filled", Theme.DATA, "A code for missing values, such as -999, stands among the numbers of a feature."
    HELD_OUT_IN_TRAINING = "held_out_in_training", Theme.DATA, "Rows of the held-out set are in the training set."
    HELD_OUT_DIFFERS = "held_out_differs", Theme.DATA, "Held-out inputs are prepared differently from training inputs."
    BATCHES_POISONED = "batches_poisoned", Theme.DATA, "A few batches are corrupt: outliers, wrong scale, wrong labels."
    HELD_OUT_LABELS_DIFFER = "held_out_labels_differ", Theme.DATA, "Held-out labels give the classes other numbers than training's, are of another scale, or do not belong to their inputs."
    DATA_NOT_FINITE = "data_not_finite", Theme.DATA, "Inputs or targets hold NaN or infinity."
    DATA_OVERWRITTEN = "data_overwritten", Theme.DATA, "Training changes the stored data in place: an augmentation or noise that adds up."
    LOADER_EMPTY = "loader_empty", Theme.DATA, "A DataLoader gives no batch at all: fewer rows than one batch, and drop_last."
    ROWS_DUPLICATED = "rows_duplicated", Theme.DATA, "The same rows are drawn again and again, and others never."

    # Optimization
    LEARNING_RATE_TOO_HIGH = "learning_rate_too_high", Theme.OPTIMIZATION, "Steps are too large: the loss diverges, oscillates, or units die in the first steps."
    LEARNING_RATE_TOO_LOW = "learning_rate_too_low", Theme.OPTIMIZATION, "Steps are so small that the weights hardly move in the time given."
    TRAINING_DIVERGED = "training_diverged", Theme.OPTIMIZATION, "The loss left for good; why is not known."
    WARMUP_MISSING = "warmup_missing", Theme.OPTIMIZATION, "The first steps at the full learning rate do damage that a warm-up would avoid."
    WEIGHT_DECAY_TOO_STRONG = "weight_decay_too_strong", Theme.OPTIMIZATION, "Weight decay shrinks the weights faster than gradients rebuild them."
    CLIPPING_TOO_TIGHT = "clipping_too_tight", Theme.OPTIMIZATION, "Nearly every gradient is cut to a small fraction of its norm."
    MOMENTUM_TOO_HIGH = "momentum_too_high", Theme.OPTIMIZATION, "Momentum carries steps far past where the gradient points."
    ADAM_EPSILON_TOO_LARGE = "adam_epsilon_too_large", Theme.OPTIMIZATION, "Adam's epsilon exceeds the gradients' size, so that steps are far smaller than the learning rate."
    SECOND_MOMENT_STALE = "second_moment_stale", Theme.OPTIMIZATION, "Adam's second moment is far below the current squared gradient: steps are too large for a while."
    LOSS_SPIKE = "loss_spike", Theme.OPTIMIZATION, "The loss rose far above its course for some steps and came back; why is not known."
    LOSS_PLATEAU = "loss_plateau", Theme.OPTIMIZATION, "The loss has not fallen for a long time, or never did; why is not known."
    GRADIENT_NOISE = "gradient_noise", Theme.OPTIMIZATION, "Batches disagree so much that steps cancel: the batch is too small for this learning rate."

    # Network
    GRADIENTS_VANISH = "gradients_vanish", Theme.NETWORK, "Gradients shrink by orders of magnitude over the depth."
    GRADIENTS_EXPLODE = "gradients_explode", Theme.NETWORK, "Gradients grow by orders of magnitude over the depth or over time."
    UNITS_DEAD = "units_dead", Theme.NETWORK, "Many units are zero on every example and get no gradient."
    UNITS_SATURATED = "units_saturated", Theme.NETWORK, "Many units sit at the flat ends of their activation function."
    INITIALIZATION_CONSTANT = "initialization_constant", Theme.NETWORK, "Weights start at zero or all alike, so that units stay copies of one another."
    INITIALIZATION_SCALE = "initialization_scale", Theme.NETWORK, "Weights start far too large or too small: signals grow or shrink from layer to layer."
    OUTPUT_CONSTANT = "output_constant", Theme.NETWORK, "The output is the same whatever the input."
    EMBEDDINGS_COLLAPSED = "embeddings_collapsed", Theme.NETWORK, "Embeddings fall onto one point or a few directions."
    ATTENTION_UNIFORM = "attention_uniform", Theme.NETWORK, "Attention spreads evenly over all keys: the heads select nothing."
    ATTENTION_ONE_HOT = "attention_one_hot", Theme.NETWORK, "Attention sits on one key with no gradient left."
    ATTENTION_LOGITS_GROW = "attention_logits_grow", Theme.NETWORK, "Attention logits grow without bound."
    NORMALIZATION_MISSING = "normalization_missing", Theme.NETWORK, "A deep network without normalisation has signals that grow or shrink over depth."
    NORMALIZATION_STATISTICS_BAD = "normalization_statistics_bad", Theme.NETWORK, "Running statistics do not fit the data: train and eval mode disagree."
    AXES_MIXED = "axes_mixed", Theme.NETWORK, "Axes are taken for one another, as by a reshape where a transpose was meant: numbers of different examples, positions or channels are mixed."
    EXAMPLES_MIXED = "examples_mixed", Theme.NETWORK, "The answer to an example depends on the others of its batch: a reshape or an axis mixes them."
    MODE_COLLAPSE = "mode_collapse", Theme.NETWORK, "A generator or a policy gives the same output whatever its input."

    # Outcome
    OVERFITTING = "overfitting", Theme.OUTCOME, "The training loss still falls and held-out data gets worse: the best step is past."
    UNDERFITTING = "underfitting", Theme.OUTCOME, "The network does not even fit its training data: it is too small or too constrained."
    WORSE_THAN_TRIVIAL = "worse_than_trivial", Theme.OUTCOME, "The result is no better than predicting the class frequencies or the mean."
    INPUT_IGNORED = "input_ignored", Theme.OUTCOME, "Predictions are as good without the input as with it."
    BATCH_NOT_LEARNED = "batch_not_learned", Theme.OUTCOME, "Not even one batch can be learned by heart; why is not known."

    # Numerics
    NOT_FINITE = "not_finite", Theme.NUMERICS, "A loss, gradient, weight or activation is NaN or infinite."
    UPDATES_ROUND_TO_NOTHING = "updates_round_to_nothing", Theme.NUMERICS, "Updates are smaller than the spacing of the weights' numbers, so that weights do not change."
    GRADIENT_UNDERFLOW = "gradient_underflow", Theme.NUMERICS, "Gradients are too small for their number format and become zero."
    SCALER_SKIPS_FOREVER = "scaler_skips_forever", Theme.NUMERICS, "The gradient scaler finds an overflow at every step, so that no step is taken."
    SOFTMAX_ROUNDING = "softmax_rounding", Theme.NUMERICS, "The softmax loses its small terms to rounding, and examples their gradient."

    # Distributed
    REPLICAS_DIFFER = "replicas_differ", Theme.DISTRIBUTED, "Parameters or buffers that should be equal on all ranks differ."
    GRADIENTS_NOT_REDUCED = "gradients_not_reduced", Theme.DISTRIBUTED, "Ranks step on their own gradients: nothing averages them."
    RANKS_SEE_SAME_DATA = "ranks_see_same_data", Theme.DISTRIBUTED, "All ranks train on the same batches."
    RANKS_READ_APART = "ranks_read_apart", Theme.DISTRIBUTED, "Ranks that hold parts of one network are given different batches."
    RANKS_UNEVEN = "ranks_uneven", Theme.DISTRIBUTED, "Ranks train on batches of different sizes, and their gradients count alike."
    RANK_SETTINGS_DIFFER = "rank_settings_differ", Theme.DISTRIBUTED, "Ranks step with different hyperparameters."
    SAMPLER_EPOCH_NOT_SET = "sampler_epoch_not_set", Theme.DISTRIBUTED, "The distributed sampler's epoch is never set, so that every epoch has the same order."
    # fmt: on


# What several checks name as what they may follow from: steps that are too large, other than by the rate, and a
# loss that is lost.
MAKES_STEPS_TOO_LARGE = (
    Cause.GRADIENTS_NOT_ZEROED, Cause.LOSS_SUMMED, Cause.LOSS_ASCENDED, Cause.LOSS_UNBOUNDED,
    Cause.INPUTS_NOT_NORMALIZED, Cause.MISSING_VALUES_FILLED, Cause.INITIALIZATION_SCALE, Cause.MOMENTUM_TOO_HIGH,
)  # fmt: skip
LOSES_THE_LOSS = (
    Cause.BOOTSTRAP_WRONG,
    *MAKES_STEPS_TOO_LARGE, Cause.LEARNING_RATE_TOO_HIGH, Cause.DATA_NOT_FINITE, Cause.GRADIENTS_STILL_SCALED,
    Cause.LOGITS_INTO_PROBABILITY_LOSS,
)  # fmt: skip
