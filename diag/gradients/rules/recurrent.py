"""LSTM, GRU and plain RNN written out step by step, for the time of a capture only.

The fused kernels hide how often a weight is used. Written as one `linear` per time step, each weight's
per-example gradient is a sum of outer products over time, like any linear layer's. The signatures are those
of `torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu` on padded input; gate order as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Timestep = Callable[[Tensor, tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, ...]]


def _lstm_step(gates_in: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    h, c = state
    w_hh, b_hh, w_hr = weights
    i, f, g, o = (gates_in + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _gru_step(gates_in: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (h,) = state
    w_hh, b_hh, _ = weights
    r_in, z_in, n_in = gates_in.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = (z_in + z_h).sigmoid()
    n = (n_in + (r_in + r_h).sigmoid() * n_h).tanh()
    return (n + z * (h - n),)


def _plain_step(activation: Callable[[Tensor], Tensor]) -> Timestep:
    def step(gates_in: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        w_hh, b_hh, _ = weights
        return (activation(gates_in + F.linear(state[0], w_hh, b_hh)),)

    return step


def _unrolled(step: Timestep) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        inputs: Tensor, hx: Any, flat: Sequence[Tensor], biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x = inputs.transpose(0, 1) if batch_first else inputs
        initial = hx if isinstance(hx, (tuple, list)) else (hx,)
        directions = 2 if bidirectional else 1
        per_cell = len(flat) // (num_layers * directions)
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                cell = layer * directions + direction
                w_ih, w_hh, b_ih, b_hh, w_hr = _weights(flat[cell * per_cell : (cell + 1) * per_cell], biases)
                gates = F.linear(x, w_ih, b_ih)  # every time step at once
                state = tuple(s[cell] for s in initial)
                hidden: list[Tensor] = []
                for t in range(x.shape[0]) if direction == 0 else reversed(range(x.shape[0])):
                    state = step(gates[t], state, (w_hh, b_hh, w_hr))
                    hidden.append(state[0])
                outputs.append(torch.stack(hidden if direction == 0 else hidden[::-1]))
                finals.append(state)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout)
        result = x.transpose(0, 1) if batch_first else x
        return (result, *(torch.stack(parts) for parts in zip(*finals, strict=True)))

    return run


def _weights(cell: Sequence[Tensor], biases: bool) -> tuple[Any, ...]:
    w_ih, w_hh, *rest = cell
    b_ih, b_hh = (rest[0], rest[1]) if biases else (None, None)
    rest = rest[2:] if biases else rest
    return w_ih, w_hh, b_ih, b_hh, (rest[0] if rest else None)


def _cell(step: Timestep) -> Callable[..., Any]:
    def run(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Any:
        several = isinstance(hx, (tuple, list))
        state = step(F.linear(x, w_ih, b_ih), tuple(hx) if several else (hx,), (w_hh, b_hh, None))  # type: ignore[arg-type]
        return state if several else state[0]

    return run


TIMESTEPS: dict[str, Timestep] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _plain_step(torch.tanh),
    "rnn_relu": _plain_step(torch.relu),
}
UNROLLED: dict[str, Callable[..., Any]] = {name: _unrolled(step) for name, step in TIMESTEPS.items()}
UNROLLED |= {f"{name}_cell": _cell(step) for name, step in TIMESTEPS.items()}


def is_padded_call(name: str, args: Sequence[Any]) -> bool:
    """True for a call that can be written out; packed sequences, which pass their batch sizes second, cannot."""
    if name.endswith("_cell"):
        return len(args) == 6
    return len(args) == 9 and isinstance(args[2], (tuple, list)) and isinstance(args[3], bool)
