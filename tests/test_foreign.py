"""The private names of torch (and of others) that diag uses: one table, and each is still there.

A name that is not in the table may not be used (test_layers); one that a release has taken away fails here first,
with what needs it. All were looked up in torch 2.13.0.
"""

import importlib.util
import os
import threading
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from torch import nn

SPEC = importlib.util.spec_from_file_location("layers", Path(__file__).with_name("test_layers.py"))
layers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(layers)


def node(function):
    """The node of the graph that a function of a (2, 3) tensor leaves."""
    return function(torch.ones(2, 3, requires_grad=True)).grad_fn


MODULE, TENSOR = nn.Linear(2, 2), torch.ones(2)
# name: (where it is looked up, what it is needed for)
FOREIGN = {
    "_version": (TENSOR, "whether a tensor was written to in place"),
    "_base": (TENSOR, "of which tensor a tensor is a view"),
    "_is_view": (TENSOR, "of which tensor a tensor is a view"),
    "_cdata": (TENSOR.untyped_storage(), "tensors that share memory"),
    "_C": (torch, "the names of torch._C below"),
    "_current_graph_task_id": (torch._C, "which backward pass is going on"),
    "_top_saved_tensors_default_hooks": (torch._C._autograd, "the user's hooks on saved tensors"),
    "_pop_saved_tensors_default_hooks": (torch._C._autograd, "the user's hooks on saved tensors"),
    "_push_saved_tensors_default_hooks": (torch._C._autograd, "the user's hooks on saved tensors"),
    "_len_torch_function_stack": (torch._C, "whether the program may have tensors made elsewhere than on the host"),
    "_get_function_stack_at": (torch._C, "modes of the program, which see nothing of ours"),
    "_pop_torch_function_stack": (torch._C, "modes of the program, which see nothing of ours"),
    "_push_on_torch_function_stack": (torch._C, "modes of the program, which see nothing of ours"),
    "_len_torch_dispatch_stack": (torch._C, "modes of the program, which see nothing of ours"),
    "_get_dispatch_stack_at": (torch._C, "modes of the program, which see nothing of ours"),
    "_pop_torch_dispatch_stack": (torch._C, "modes of the program, which see nothing of ours"),
    "_push_on_torch_dispatch_stack": (torch._C, "modes of the program, which see nothing of ours"),
    "_get_mkldnn_enabled": (torch._C, "kernels that hide the axes that they work on"),
    "_set_mkldnn_enabled": (torch._C, "kernels that hide the axes that they work on"),
    "_functorch": (torch._C, "whether a torch.func transform is going on"),
    "_autograd": (torch._C, "whether the user's hooks on saved tensors are in the way"),
    "_foreach_norm": (torch, "norms of all gradients in few kernels"),
    "_BatchNorm": (nn.modules.batchnorm, "batch norms of every kind"),
    "_buffers": (MODULE, "to exchange buffers and put them back"),
    "_parameters": (MODULE, "to exchange parameters and put them back"),
    "_modules": (MODULE, "a module that hangs in more than one place"),
    "_forward_hooks": (MODULE, "whether hooks were added or left behind"),
    "_forward_pre_hooks": (MODULE, "whether hooks were added or left behind"),
    "_compiled_call_impl": (MODULE, "models compiled in place"),
    "_exit": (os, "a rank of the command line ends before the threads of gloo can abort it; documented"),
    "_schema": (torch.ops.aten.relu.default, "the names of an operation's arguments"),
    "_scale": (torch.amp.GradScaler("cpu"), "the scale of the gradients, without synchronising"),
    "_sequence_nr": (node(torch.exp), "the order in which a graph was made"),
    "_input_metadata": (node(torch.exp), "whether each output of a wrapper's node is one of its inputs"),
    "_saved_dim": (node(lambda t: t.select(0, 1)), "which rows of an output a loss used"),
    "_saved_index": (node(lambda t: t.select(0, 1)), "which rows of an output a loss used"),
    "_saved_start": (node(lambda t: t[:1]), "which rows of an output a loss used"),
    "_saved_end": (node(lambda t: t[:1]), "which rows of an output a loss used"),
    "_saved_step": (node(lambda t: t[:1]), "which rows of an output a loss used"),
    "_saved_self_sym_sizes": (node(lambda t: t[:1]), "which rows of an output a loss used"),
    "_saved_alpha": (node(lambda t: t + t), "the factors of the terms that a loss is a sum of"),
    "_saved_other": (node(lambda t: t * t), "the factors of the terms that a loss is a sum of"),
    "_saved_exponent": (node(lambda t: t**3), "whether a difference is squared"),
    "_saved_self": (node(lambda t: t * t), "the factors of the terms that a loss is a sum of"),
    "_saved_dims": (node(lambda t: t.permute(1, 0)), "how an output was laid out again"),
    "_saved_dim0": (node(lambda t: t.transpose(0, 1)), "how an output was laid out again"),
    "_saved_dim1": (node(lambda t: t.transpose(0, 1)), "how an output was laid out again"),
    "_saved_result": (node(lambda t: t.softmax(1)), "the probabilities of a softmax"),
    "_saved_result1": (node(lambda t: torch.native_layer_norm(t, [3], None, None, 1e-5)[0]), "a norm's statistics"),
    "_saved_result2": (node(lambda t: torch.native_layer_norm(t, [3], None, None, 1e-5)[0]), "a norm's statistics"),
    "_get_renderer": (matplotlib.figure.Figure(), "the size of a drawing's texts"),
    "_get_backend": (torch.distributed.ProcessGroup, "the timeout of the training's process group"),
    "_device_types": (torch.distributed.ProcessGroup, "the timeout of the training's process group"),
    "_timeout": (torch.distributed.ProcessGroupGloo._Options, "the timeout of the training's process group"),
    "_DummyThread": (threading, "whether a thread is one of autograd's"),
}


def test_every_row_of_the_table_is_needed():
    assert set(FOREIGN) == {a for name in layers.MODULES for a in layers.private_attributes(name)}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_name_is_still_there(name):
    owner, why = FOREIGN[name]
    assert hasattr(owner, name), f"{name} is gone, which diag needs for: {why}"


def test_modules_that_are_imported_from_private_places():
    from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack  # noqa: F401
    from torch.distributed.distributed_c10d import _get_default_group, _get_default_store  # noqa: F401
    from torch.utils import _pytree  # noqa: F401
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401

    assert torch._weight_norm is not None and hasattr(torch._C, "DisableTorchFunction")
