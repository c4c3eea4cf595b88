"""What diag replaces in the process for a time, and which private names of others it touches: one table of each.

Nothing here does anything: the tables are for readers, and a test holds the code to them: each name still exists,
and no other is reached, as an attribute or by its name in a text. `since` is a version of the library, torch's
where no other is named, in which the name should be there already: a hint for anyone who wants to support an
earlier one than diag does (2.11), and not tested. Tested is that all are there in the version that is installed
(2.13).
"""

from __future__ import annotations

from typing import NamedTuple


class Replaced(NamedTuple):
    """What is exchanged while something is watched or measured, and put back afterwards.

    where: owner and name. how: "body" (the code of a plain function), "attribute" or "flag". while_: "watching" or
    "measuring". why: what it is for, and why nothing gentler does.
    """

    where: str
    how: str
    while_: str
    since: str
    why: str


class Private(NamedTuple):
    """A private name of others. of: the module that has it, or the kind of object (a maker in the test)."""

    name: str
    of: str
    since: str
    why: str


# Exchanging `__code__` sees a call of the function under every name that it was ever imported by, as by
# `from torch.nn.functional import cross_entropy` at the top of a library. Nothing gentler sees the same calls: an
# attribute of the module misses those names; a TorchFunctionMode costs 5 % of a step and breaks compiled graphs;
# and the graph behind the root of backward() does not tell them, as many losses are several nodes there (label
# smoothing, kl_div, l1_loss) that keep neither the settings nor, always, the targets.
_BODY = "the loss, its arguments and its targets, by whatever name the function was imported"

REPLACED_FUNCTIONS = (
    Replaced("torch.nn.functional.cross_entropy", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.nll_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.mse_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.l1_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.smooth_l1_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.huber_loss", "body", "watching", "1.9", _BODY),
    Replaced("torch.nn.functional.binary_cross_entropy", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.binary_cross_entropy_with_logits", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.kl_div", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.ctc_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.gaussian_nll_loss", "body", "watching", "1.8", _BODY),
    Replaced("torch.nn.functional.cosine_embedding_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.margin_ranking_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.triplet_margin_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.triplet_margin_with_distance_loss", "body", "watching", "1.7", _BODY),
    Replaced("torch.nn.functional.poisson_nll_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.soft_margin_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.multi_margin_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.multilabel_margin_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.multilabel_soft_margin_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.nn.functional.hinge_embedding_loss", "body", "watching", "1.0", _BODY),
    Replaced("torch.autograd.backward", "attribute", "watching", "1.0", "which number training descends"),
    Replaced("torch.optim.Optimizer.zero_grad", "attribute", "watching", "1.0", "when gradients are thrown away"),
    Replaced("torch.nn.Module.zero_grad", "attribute", "watching", "1.0", "when gradients are thrown away"),
    *(
        Replaced(f"torch.optim.lr_scheduler.{name}.step", "attribute", "watching", since, "when schedules step")
        for name, since in (
            ("LRScheduler", "2.0"),
            ("SequentialLR", "1.10"),
            ("ChainedScheduler", "1.10"),
            ("ReduceLROnPlateau", "1.0"),
            ("CosineAnnealingWarmRestarts", "1.1"),
        )
    ),
    Replaced("torch.manual_seed", "attribute", "watching", "1.0", "whether one seed is set again and again"),
    Replaced("torch.random.manual_seed", "attribute", "watching", "1.0", "the same function by its other name"),
    Replaced("torch.utils.data.DataLoader.__iter__", "attribute", "watching", "1.0", "where an epoch begins"),
    Replaced(
        "torch.utils.data.dataloader._BaseDataLoaderIter.__next__",
        "attribute",
        "watching",
        "1.2",
        "which batch comes when",
    ),
    Replaced(
        "torch.utils.data.dataloader._BaseDataLoaderIter._next_index",
        "attribute",
        "watching",
        "1.2",
        "which rows of the data set a batch holds",
    ),
    Replaced(
        "torch.nn.utils.clip_grad._clip_grads_with_norm_", "attribute", "watching", "2.6", "gradients before a clip"
    ),
    Replaced("torch.nn.utils.clip_grads_with_norm_", "attribute", "watching", "2.6", "gradients before a clip"),
    Replaced(
        "torch.nn.utils.clip_grad.clip_grad_value_", "attribute", "watching", "1.0", "gradients before a clip"
    ),
    Replaced("torch.nn.utils.clip_grad_value_", "attribute", "watching", "1.0", "gradients before a clip"),
    Replaced("torch.amp.GradScaler.scale", "attribute", "watching", "2.3", "the loss before it is scaled"),
    Replaced("torch.amp.GradScaler.unscale_", "attribute", "watching", "2.3", "whether a clip came before it"),
    Replaced("torch.amp.GradScaler.step", "attribute", "watching", "2.3", "steps that the scaler leaves out"),
    Replaced(
        "torch.utils.checkpoint.CheckpointFunction",
        "attribute",
        "measuring",
        "1.0",
        "a reentrant checkpoint forbids autograd.grad",
    ),
    Replaced(
        "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
        "attribute",
        "measuring",
        "2.1",
        "it runs again with the module's own parameters instead of those that it is called at",
    ),
    Replaced("torch.backends.cuda.matmul.allow_tf32", "flag", "measuring", "1.7", "TF32 is noise of 1e-3"),
    Replaced("torch.backends.cudnn.allow_tf32", "flag", "measuring", "1.7", "TF32 is noise of 1e-3"),
    Replaced(
        "torch.backends.cudnn.enabled", "flag", "measuring", "1.0", "its recurrent layers have no second derivative"
    ),
    Replaced("torch.backends.mha.get_fastpath_enabled", "flag", "measuring", "2.1", "nor has its attention"),
    Replaced("torch.compiler.set_stance", "flag", "measuring", "2.6", "compiled code runs eagerly"),
    Replaced("torch._C._set_mkldnn_enabled", "flag", "measuring", "2.0", "traced operations are the plain ones"),
    Replaced("torch.set_rng_state", "flag", "measuring", "1.0", "random states are those from before"),
)

_OF_OTHERS = "entries that a checkpoint may have or lack"
_OPERATIONS = """
    _addmm_activation _batch_norm_no_update _batch_norm_with_update _conj _embedding_bag _embedding_bag_forward_only
    _fused_rms_norm _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _prelu_kernel
    _reshape_alias _safe_softmax _softmax _to_copy _unsafe_view _weight_norm_interface
"""
_REBUILT = "_rebuild_qtensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3"
_OF_ALL = "_global_forward_hooks _global_forward_pre_hooks _global_backward_hooks _global_backward_pre_hooks"
_HOOK_STATE = """
    _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks_with_kwargs _state_dict_hooks
    _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
"""


def _each(of: str, since: str, why: str, names: str) -> tuple[Private, ...]:
    """A row for each of several names of one kind."""
    return tuple(Private(name, of, since, why) for name in names.split())


PRIVATE = (
    Private("_get_default_store", "torch.distributed.distributed_c10d", "1.7", "where the ranks' watches meet"),
    Private(
        "_get_default_group", "torch.distributed.distributed_c10d", "1.7", "the timeout of the training's group"
    ),
    Private("_utils", "torch.distributed.tensor", "2.5", "which part of a tensor a rank holds"),
    Private("_get_backend", "torch.distributed.ProcessGroup", "2.0", "the timeout of the training's group"),
    Private("_device_types", "torch.distributed.ProcessGroup", "2.1", "the timeout of the training's group"),
    Private("_version", "tensor", "1.0", "whether something was written to a tensor"),
    Private("_base", "view", "1.0", "what a view is of"),
    Private("_is_view", "tensor", "1.9", "whether a tensor is a view"),
    Private("_make_wrapper_subclass", "tensor", "1.9", "a tensor whose values are still in a file"),
    Private("_cdata", "storage", "1.0", "whether two tensors share their memory"),
    Private("_sequence_nr", "node", "2.1", "which node of the graph a tensor came from, without holding the graph"),
    Private("_input_metadata", "node", "2.1", "whether each output of a wrapper's node is one of its inputs"),
    Private("_saved_dim", "LogSoftmax", "1.9", "repeating a log_softmax on other outputs"),
    Private("_saved_result", "LogSoftmax", "1.9", "repeating a log_softmax on other outputs"),
    Private("_saved_indices", "Index", "1.9", "which entries of likenesses a loss asks for"),
    Private("_saved_offset", "Diagonal", "1.9", "which entries of likenesses a loss asks for"),
    Private("_saved_dim0", "Transpose", "1.9", "repeating a transposition"),
    Private("_saved_dim1", "Transpose", "1.9", "repeating a transposition"),
    Private("_saved_dims", "Permute", "1.9", "repeating a permutation"),
    Private("_saved_split_size", "Split", "1.9", "repeating a split"),
    Private("_saved_dim", "Select", "1.9", "repeating a selection"),
    Private("_saved_index", "Select", "1.9", "repeating a selection"),
    Private("_saved_dim", "Slice", "1.9", "repeating a slice"),
    Private("_saved_start", "Slice", "1.9", "repeating a slice"),
    Private("_saved_end", "Slice", "1.9", "repeating a slice"),
    Private("_saved_step", "Slice", "1.9", "repeating a slice"),
    Private("_saved_self_sym_sizes", "Slice", "2.0", "how long the sliced axis was"),
    Private("_saved_self_sym_sizes", "Mean", "2.0", "over how many numbers a mean was taken"),
    Private("_saved_alpha", "Add", "1.9", "the factor of a term"),
    Private("_saved_other", "Mul", "1.9", "the factor of a term"),
    Private("_saved_exponent", "Pow", "1.9", "whether a difference is squared"),
    Private("_saved_self", "Mul", "1.9", "the factor of a term"),
    Private("_saved_mat1", "Addmm", "1.9", "the values that meet in a linear layer"),
    Private("_saved_mat2", "Addmm", "1.9", "the values that meet in a linear layer"),
    Private("_saved_input", "Convolution", "1.9", "the values that a convolution sees"),
    Private("_saved_weight", "Convolution", "1.9", "the values that a convolution sees"),
    Private("_saved_query", "Attention", "2.0", "the queries of a fused attention"),
    Private("_saved_result1", "LayerNorm", "1.9", "the mean that a norm has computed"),
    Private("_saved_result2", "LayerNorm", "1.9", "the scale that a norm has computed"),
    Private("_current_graph_task_id", "torch._C", "2.1", "whether a backward pass is going on in this thread"),
    Private("_functorch", "torch._C", "2.0", "whether torch.func is at work"),
    Private("is_functorch_wrapped_tensor", "torch._C._functorch", "2.0", "whether a tensor is one of torch.func's"),
    Private("peek_interpreter_stack", "torch._C._functorch", "2.0", "whether torch.func is at work"),
    Private("DisableTorchFunction", "torch._C", "1.7", "arithmetic of ours inside a step that is read"),
    Private("_autograd", "torch._C", "1.0", "the holder of the next"),
    Private("_top_saved_tensors_default_hooks", "torch._C._autograd", "2.1", "whether saved tensors are elsewhere"),
    Private("_pop_saved_tensors_default_hooks", "torch._C._autograd", "2.1", "saved tensors stay where they are"),
    Private(
        "_push_saved_tensors_default_hooks", "torch._C._autograd", "2.1", "see _pop_saved_tensors_default_hooks"
    ),
    Private("_len_torch_function_stack", "torch._C", "2.0", "whether a default device may be set"),
    Private("_get_function_stack_at", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_pop_torch_function_stack", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_push_on_torch_function_stack", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_len_torch_dispatch_stack", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_get_dispatch_stack_at", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_pop_torch_dispatch_stack", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_push_on_torch_dispatch_stack", "torch._C", "2.0", "modes of others, which see nothing of ours"),
    Private("_device", "torch.utils", "2.0", "the class of the mode that is a default device"),
    Private("_get_mkldnn_enabled", "torch._C", "2.0", "see _set_mkldnn_enabled"),
    Private("_set_mkldnn_enabled", "torch._C", "2.0", "traced operations are the plain ones"),
    Private("_foreach_norm", "torch", "1.13", "many norms on a GPU in one call"),
    Private("_foreach_mul_", "torch", "1.13", "many gradients scaled in one call"),
    Private("_weight_norm", "torch", "1.0", "what is replaced by its plain form"),
    Private("_compiled_call_impl", "module", "2.2", "a model that is compiled in place"),
    Private("_modules", "module", "1.0", "a module's children, by name"),
    Private("_parameters", "module", "1.0", "where a module keeps its parameters"),
    Private("_buffers", "module", "1.0", "where a module keeps its buffers"),
    Private("_forward_hooks", "module", "1.0", "hooks of others, which are silent while measuring"),
    Private("_forward_pre_hooks", "module", "1.0", "hooks of others, which are silent while measuring"),
    Private("_backward_hooks", "module", "1.0", "hooks of others, which are silent while measuring"),
    Private("_backward_pre_hooks", "module", "2.0", "hooks of others, which are silent while measuring"),
    Private("_post_accumulate_grad_hooks", "tensor", "2.1", "hooks of others, which are silent while measuring"),
    Private("_schema", "operation", "1.8", "the arguments of a traced operation, by name"),
    Private("_python_dispatch", "torch.utils", "1.12", "TorchDispatchMode, which traces a forward pass"),
    Private("_pytree", "torch.utils", "1.8", "the tensors in a model's outputs"),
    Private("_BatchNorm", "torch.nn.modules.batchnorm", "1.0", "the class of all batch norms"),
    Private("_DropoutNd", "torch.nn.modules.dropout", "1.0", "the class of all dropouts"),
    Private("_BaseDataLoaderIter", "torch.utils.data.dataloader", "1.2", "which batch comes when"),
    Private("_backoff_factor", "scaler", "1.6", "by what a scale is lowered after an overflow"),
    Private("_scale", "scaler", "2.3", "the scale of a loss whose gradients were clipped with it"),
    *_each("torch.ops.aten", "2.1", "operations that a traced forward pass is made of", _OPERATIONS),
    *_each("torch._utils", "2.3", "what a checkpoint may call when it is read", _REBUILT),
    *_each("torch.nn.modules.module", "1.8", "hooks of all modules, which are silent while measuring", _OF_ALL),
    *_each("module", "2.0", "state of a module that measuring must leave as it was", _HOOK_STATE),
    Private("_C", "torch", "1.0", "the holder of the names of torch._C"),
    Private("_mode_key", "mode", "2.1", "which modes are torch's own"),
    Private(
        "_timeout", "torch.distributed.ProcessGroupGloo._Options", "2.1", "the timeout of the training's group"
    ),
    Private("_dynamo", "torch", "2.0", "whether anything was compiled"),
    Private("_TensorBase", "torch._C", "2.1", "a name in the pickles of checkpoints"),
    Private("_utils", "torch", "1.0", "a name in the pickles of checkpoints"),
    Private("_shard", "torch.distributed", "1.10", "a name in the pickles of distributed checkpoints"),
    Private("_MEM_FORMAT_ENCODING", "torch.distributed.checkpoint.metadata", "2.1", "the same"),
    Private("_StorageInfo", "torch.distributed.checkpoint.filesystem", "2.0", "the same"),
    Private("_get_layout", "torch.serialization", "1.0", "the same"),
    Private("_local", "pathlib", "Python 3.13", "the same; earlier versions have no such module"),
    Private("_core", "numpy", "numpy 2.0", "a name in the pickles of NumPy's numbers; 1.26 has numpy.core"),
    Private("_bit_generator", "numpy.random.RandomState", "numpy 1.17", "the state of a random generator"),
    Private("_tools", "torch.distributed", "2.0", "hooks that only look on"),
    Private("_get_fsdp_state", "torch.distributed.fsdp.FSDPModule", "2.6", "whether a module is sharded"),
    Private("_ddp_params_and_buffers_to_ignore", "replicated", "1.8", "which parameters the ranks do not share"),
    Private("_DDPSink", "torch.nn.parallel.distributed", "1.9", "the node that hands on a wrapper's outputs"),
    Private("_orig_mod", "compiled", "2.0", "the model in a compiled one"),
    Private("_extra_state", "key of a state dict", "1.10", "entries of a state dict that may be no tensors"),
    Private("_initialize_hook", "lazy", "1.8", "a lazy layer that is given its shape by a checkpoint"),
    Private("_load_hook", "lazy", "1.8", "a lazy layer that is given its shape by a checkpoint"),
    Private("_is_initial", "scheduler", "2.8", "the step that a scheduler takes when it is made"),
    Private("_schedulers", "schedulers", "1.10", "the parts of a schedule"),
    Private("_milestones", "schedulers", "1.10", "where the parts of a schedule begin"),
    Private(
        "_wrapped_by_lr_sched", "optimizer step", "2.5", "whether a scheduler has wrapped the optimizer's step"
    ),
    Private("_dataset", "loader", "1.2", "the data set that a batch is from"),
    Private("_saved_reduction", "MSELoss", "1.9", "whether a loss is a mean"),
    Private("_saved_target", "MSELoss", "1.9", "what a critic is asked for"),
    Private("_saved_beta", "SmoothL1Loss", "1.9", "from where on a critic's loss is linear"),
    Private("_saved_delta", "HuberLoss", "1.9", "from where on a critic's loss is linear"),
    Private("_saved_total_weight", "NllLoss", "1.9", "over how many class numbers a mean was taken"),
    Private("_saved_min", "Clamp", "1.9", "between which numbers an output was cut off"),
    Private("_saved_max", "Clamp", "1.9", "between which numbers an output was cut off"),
    Private("_saved_min_val", "Hardtanh", "1.9", "between which numbers an output was cut off"),
    Private("_saved_max_val", "Hardtanh", "1.9", "between which numbers an output was cut off"),
    Private("_hf_hook", "offloaded", "accelerate 0.12", "whether a module's weights are elsewhere"),
    Private("_original_forward", "accelerate.accelerator", "accelerate 0.12", "a model's own forward"),
    Private("_keys_to_ignore_on_load_missing", "transformers.PreTrainedModel", "transformers 4.0", _OF_OTHERS),
    Private("_keys_to_ignore_on_load_unexpected", "transformers.PreTrainedModel", "transformers 4.0", _OF_OTHERS),
    Private("_is_protocol", "typing.SupportsInt", "Python 3.8", "whether an annotation is a protocol"),
    Private("_exit", "os", "Python 3.0", "a rank that ends without waiting for threads of gloo"),
    Private("_DummyThread", "threading", "Python 3.0", "whether a thread is one of autograd's"),
    Private("_thread", "sys.modules", "Python 3.0", "objects that are never looked into"),
    Private("_value_", "enum member", "Python 3.4", "the value of an enum's member"),
    Private("_get_renderer", "figure", "matplotlib 3.6", "the size of a drawing's texts"),
)
