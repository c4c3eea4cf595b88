"""Find the permutation groups of a model, and check that they leave its function alone.

`find_symmetries(model, example)` traces one forward pass, solves for the groups, and then tries a random
element of them: the outputs must stay what they were, at the model's own weights and at perturbed ones (fresh
weights hold constants, such as a norm's ones, that would hide a mistake).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.connectivity.symmetries.axes import Labels, Symbol
from diag.connectivity.symmetries.groups import Symmetries, UnitActivation, UnitBlock, UnitGroup
from diag.connectivity.symmetries.rules import GENERAL_LINEAR
from diag.connectivity.symmetries.solve import Solution, used_symbols
from diag.connectivity.symmetries.tracing import AxisTrace, main_outputs, trace_model, unfused
from diag.errors import Unsupported
from diag.snapshot.batch import Batch
from diag.snapshot.call_at import call_at
from diag.snapshot.preserve import preserved
from diag.snapshot.reading.forms import as_batch

SAME_FUNCTION_WITHIN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# Operations whose outputs are pre-activations.
CARRIERS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "embedding")
UNUSED = "not used on the example given"


def find_symmetries(
    model: nn.Module, example: Any, *, check: bool = True, seed: int = 0, max_examples: int | None = 2
) -> Symmetries:
    """The permutation groups of `model`.

    example: one batch, `(inputs, targets)` or a dict; its first `max_examples` are used (all of it where the
    model runs on nothing less). check: prove them. Groups that change the outputs by more than a relative 1e-4
    (float32) or 1e-10 (float64 throughout) are dropped, with the reason in `frozen`. Raises Unsupported where
    the forward pass fails, or where the outputs are not floating or not finite.
    """
    example = on_device(model, as_batch(example))
    with preserved(model):
        few = example.slice(0, min(example.size, max_examples or example.size))
        try:
            trace, labels = trace_model(model, few)
            example = few
        except Unsupported:  # a model may be written for one batch size
            trace, labels = trace_model(model, example)
        found = _build(trace, labels, model)
        return _checked(found, model, example, seed) if check else found


def on_device(model: nn.Module, example: Batch) -> Batch:
    """The example where the model's parameters are."""
    tensor = next(model.parameters(), None)
    return example.to(tensor.device if tensor is not None else None)


# ---- from labels to groups


def _build(trace: AxisTrace, labels: dict[str, Labels], model: nn.Module) -> Symmetries:
    algebra = trace.algebra
    solution = Solution(algebra, trace.occurrences, labels.values())
    used = used_symbols(algebra, trace.used)
    parts = {name: list(solution.blocks(axes)) for name, axes in labels.items()}
    names, places = _name_symbols(parts)
    for symbol in names:
        if symbol not in used:
            algebra.freeze((symbol,), UNUSED)
    free = {s for s in names if s.frozen is None and s.size > 1}
    groups = {names[s]: _group(s, names, places, solution) for s in names if s in free}
    blocks = {n: tuple(_block(p, names) for p in ps) for n, ps in parts.items()}
    moved = {n: bs for n, bs in blocks.items() if any(name in groups for b in bs for name in b.names)}
    state = model.state_dict(keep_vars=True)
    return Symmetries(
        groups=groups,
        blocks=moved,
        frozen={name: s.frozen for s, name in names.items() if s.frozen},
        unknown=dict(trace.unknown),
        shapes={n: tuple(t.shape) for n, t in state.items() if isinstance(t, Tensor)},
        parameters=tuple(n for n, t in state.items() if isinstance(t, nn.Parameter)),
        captures=tuple(_captures(trace, solution, names, groups)),
        tied=_tied(state),
        layout=blocks,
        contracted={
            n: _group(s, names, places, solution)
            for s, n in names.items()
            if s.frozen == GENERAL_LINEAR and s.size > 1
        },
        tolerance=max((SAME_FUNCTION_WITHIN.get(d, 1e-4) for d in trace.dtypes), default=1e-4),
    )


def _name_symbols(parts: dict[str, list[Any]]) -> tuple[dict[Symbol, str], dict[Symbol, list[tuple[str, int]]]]:
    """A name for each atom, after the entry and axis where it is met first, and all places of it."""
    names: dict[Symbol, str] = {}
    places: dict[Symbol, list[tuple[str, int]]] = {}
    taken: set[str] = set()
    for entry, blocks in parts.items():
        for block in blocks:
            for axis, (_, atoms) in enumerate(block):
                for atom in atoms:
                    if atom not in names:
                        name, k = f"{entry}[{axis}]", 1
                        while name in taken:
                            name, k = f"{entry}[{axis}].{k}", k + 1
                        names[atom] = name
                        taken.add(name)
                    if (entry, axis) not in places.setdefault(atom, []):
                        places[atom].append((entry, axis))
    return names, places


def _group(symbol: Symbol, names: dict[Symbol, str], places: dict[Any, Any], solution: Solution) -> UnitGroup:
    rank = {s: i for i, s in enumerate(names)}
    together = solution.together
    parents = [
        p for p in names
        if p in together[symbol] and (symbol not in together[p] or rank[p] < rank[symbol])
    ]  # fmt: skip
    parents.sort(key=lambda p: (len(together[p]), rank[p]))
    return UnitGroup(
        names[symbol], symbol.size, tuple(names[p] for p in parents), tuple(p.size for p in parents),
        tuple(places[symbol]),
    )  # fmt: skip


def _block(parts: tuple[Any, ...], names: dict[Symbol, str]) -> UnitBlock:
    atoms = [(atom, axis) for axis, (_, atoms) in enumerate(parts) for atom in atoms]
    return UnitBlock(
        positions=tuple(torch.from_numpy(p.reshape(-1).copy()) for p, _ in parts),
        names=tuple(names.get(a, "") for a, _ in atoms),
        sizes=tuple(a.size for a, _ in atoms),
        axis_of=tuple(axis for _, axis in atoms),
    )


def _captures(
    trace: AxisTrace, solution: Solution, names: dict[Symbol, str], groups: dict[str, Any]
) -> Iterable[UnitActivation]:
    for index, (operation, outputs) in enumerate(trace.operations):
        if operation in CARRIERS:
            for block in solution.blocks(outputs[0]):
                made = _block(block, names)
                if any(n in groups for n in made.names):
                    yield UnitActivation(index, operation, 0, made)


def _tied(state: dict[str, Any]) -> dict[str, str]:
    """Later names of a shared tensor -> its first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


# ---- the check


def verify(symmetries: Symmetries, model: nn.Module, example: Any, *, seed: int = 0) -> float:
    """Largest relative change of the outputs under one random element, at the model's and perturbed weights.

    max |f(x) - f_moved(x)| / max |f(x)| over all outputs. Raises Unsupported where outputs are not finite.
    """
    example = on_device(model, as_batch(example))
    with preserved(model):
        return _deviation(symmetries, model, example, seed)


def _deviation(symmetries: Symmetries, model: nn.Module, example: Batch, seed: int) -> float:
    state = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    element = symmetries.random(seed)
    return max(_change(symmetries, element, model, example, s) for s in (state, perturbed(state, seed)))


def _change(
    symmetries: Symmetries, element: dict[str, Any], model: nn.Module, example: Batch, state: dict[str, Any]
) -> float:
    moved = symmetries.apply(element, _with_tied(symmetries, state))
    return change_of_outputs(outputs_at(model, example, state), outputs_at(model, example, moved))


def change_of_outputs(before: list[Tensor], after: list[Tensor]) -> float:
    """max |before - after| / max |before| over all outputs. Raises Unsupported where `before` is not finite."""
    worst = 0.0
    for x, y in zip(before, after, strict=True):
        scale, change = float(x.abs().max()), float((x - y).abs().max())
        if not scale < float("inf"):
            raise Unsupported(
                "The model's outputs on the example are not finite, so no symmetry can be checked on them; "
                "give an example on which they are."
            )
        worst = max(worst, (change / scale if scale else change) if change == change else float("inf"))
    return worst


def _with_tied(symmetries: Symmetries, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, **{n: state[f] for n, f in symmetries.tied.items() if f in state}}


def outputs_at(model: nn.Module, example: Batch, state: dict[str, Tensor]) -> list[Tensor]:
    """The model's floating outputs on the example with the tensors of `state` in place of its own, as float64."""
    own = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    values = {n: t for n, t in state.items() if n in own}
    with torch.inference_mode(False), torch.no_grad(), unfused():
        outputs = call_at(model, values, example.args, example.kwargs)
    return [t.double() for t in main_outputs(outputs) if not t.dtype.is_complex]


def perturbed(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every weight moved by up to half its size, so that no two units are alike by initialisation."""
    generator = torch.Generator().manual_seed(seed + 1)
    out = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
            noise = noise.to(tensor.device, tensor.dtype)
            tensor = tensor * noise if bool(tensor.any()) else (noise - 1) * 0.2
        out[name] = tensor
    return out


def _checked(found: Symmetries, model: nn.Module, example: Batch, seed: int) -> Symmetries:
    tolerance = found.tolerance
    if not found.groups:
        return replace(found, deviation=0.0)
    deviation = _deviation(found, model, example, seed)
    if deviation > tolerance:
        wrong = [n for n in found.groups if _deviation(_only(found, n), model, example, seed) > tolerance]
        reason = f"moving these units changed the outputs (relative change {deviation:.1e})"
        found = without(found, wrong or list(found.groups), reason)
        deviation = _deviation(found, model, example, seed) if found.groups else 0.0
        if deviation > tolerance:
            found, deviation = without(found, list(found.groups), reason), 0.0
    return replace(found, deviation=deviation)


def _only(found: Symmetries, name: str) -> Symmetries:
    """The subgroup that moves one group: all others stay where they are."""
    return without(found, [n for n in found.groups if n != name], "")


def without(found: Symmetries, names: list[str], reason: str) -> Symmetries:
    """`found` less the groups `names`."""
    groups = {n: g for n, g in found.groups.items() if n not in names}
    return replace(found, groups=groups, frozen={**found.frozen, **dict.fromkeys(names, reason)})
