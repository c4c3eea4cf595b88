"""Which module of a model is running, for an observer that intercepts the call of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def module_names(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Inside the context the model's modules keep track of which of them runs; gives the name of the innermost."""
    stack: list[str] = [""]
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda m, a, o: (stack.pop(), None)[1], always_call=True))
    try:
        yield lambda: stack[-1]
    finally:
        for hook in hooks:
            hook.remove()
