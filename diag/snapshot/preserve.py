"""Measure a model without leaving a trace in it, in its gradients or in any random state.

Everything that measures enters `preserved(model)` first. Inside it the model is in evaluation mode, autocast and
TF32 are off, hooks and modes of others are silent and diag's own are paused; on the way out, also when an exception
passes through, the modes, buffers, `requires_grad` flags, `.grad` fields, random states, backend flags and what the
model keeps in Python are what they were. Dropping any one of these changes the training that follows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from diag.checkpoints.unwrap import own_forward
from diag.snapshot import pause
from diag.snapshot.state.hooks import silent
from diag.snapshot.state.modes import unseen
from diag.snapshot.state.python import restoring
from diag.snapshot.state.tensors import own_tensors, same_bits


@contextmanager
def preserved(*models: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Inside the context each model is in `mode` ("eval", "train" or "keep"); afterwards all is restored."""
    with ExitStack() as stack:
        stack.enter_context(unseen())
        stack.enter_context(random_states())
        stack.enter_context(exact_arithmetic())
        stack.enter_context(pause.measuring())
        for model in models:
            stack.enter_context(_model_state(model))
            stack.enter_context(own_tensors(model))
            stack.enter_context(silent(model))
            stack.enter_context(restoring(model))
            stack.enter_context(own_forward(model))
        for model in models:
            if mode != "keep":
                model.train(mode == "train")
        yield


@contextmanager
def random_states() -> Iterator[None]:
    """Restore the random states of torch (CPU and every CUDA device in use), NumPy and Python afterwards."""
    import numpy

    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    numpy_state, python_state = numpy.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        numpy.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_generators(seed: int) -> None:
    """Seed what `random_states` restores of torch.

    `torch.manual_seed` would also have every device that is not in use yet seeded once it is: another state than
    training would find there, and one more call, with the stack it came from, kept for each time.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No autocast and no TF32: TF32 alone puts noise of 1e-3 into curvature products."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = (matmul.allow_tf32, cudnn.allow_tf32)
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = flags


@contextmanager
def _model_state(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    parameters = list(model.parameters())
    flags, gradients = [p.requires_grad for p in parameters], [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None  # so that a backward pass inside cannot add to the training's own gradients
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            if module.training is not training:  # setting an attribute takes long where there are thousands
                module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                _restore(buffer, saved)
        for parameter, requires_grad, grad in zip(parameters, flags, gradients, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _restore(buffer: Any, saved: Any) -> None:
    # Writing raises the version counter, which can invalidate a graph that the training loop still holds;
    # so only a buffer that did change is written back.
    if not same_bits(buffer, saved):
        buffer.copy_(saved)


@contextmanager
def generator_states(data: Any) -> Iterator[None]:
    """Restore the generators that a DataLoader and its samplers hold, as iterating advances them."""
    samplers = (
        data,
        getattr(data, "sampler", None),
        getattr(getattr(data, "batch_sampler", None), "sampler", None),
    )
    found = {id(g): g for s in samplers if isinstance(g := getattr(s, "generator", None), torch.Generator)}
    states = [(g, g.get_state()) for g in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
