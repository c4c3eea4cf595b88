"""Checkpoints of tensors that a model does not have, folders of other files than they name, and damaged files.

The generators yield the name of a file and its bytes; of a folder its name and its files.
"""

import json
import pickle
import random
import struct
import warnings

import torch
from torch import nn

from tests.checkpoints.opcodes import SHAPE, saved


def tensors():
    """Kinds of tensors and numbers that a model does not have."""
    weight = torch.arange(12.0).reshape(SHAPE)
    for name, value in {
        "sparse": lambda: weight.to_sparse(),
        "sparse rows": lambda: weight.to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "quantised channels": lambda: torch.quantize_per_channel(
            weight, torch.ones(3), torch.zeros(3), 0, torch.qint8
        ),
        "nested": lambda: torch.nested.nested_tensor([weight[0], weight[1, :2]]),
        "meta": lambda: weight.to("meta"),
        "complex": lambda: weight + 1j,
        "codes": lambda: weight.to(torch.uint8),
        "flags": lambda: weight > 3,
        "too large": lambda: weight.double() * 1e300,
        "one number": lambda: torch.tensor(1.0),
        "no number": lambda: torch.empty(0, 4),
        "repeated": lambda: torch.zeros(1).expand(1 << 40, 1 << 20),
        "another shape": lambda: torch.zeros(1, 3, 4),
        "half": lambda: weight.half(),
        "eighth": lambda: weight.to(torch.float8_e4m3fn),
        "transposed": lambda: weight.T,
        "a parameter": lambda: nn.Parameter(weight),
        "uninitialised": lambda: nn.parameter.UninitializedParameter(),
        "a list": lambda: weight.tolist(),
        "text": lambda: "weight",
        "NaN": lambda: weight * float("nan"),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield f"{name}.pt", saved({"weight": value()})
            yield f"{name} as a buffer.pt", saved({"weight": weight, "count": value()})


def folders():
    """Hugging Face folders with other files than they name; each a dict of files."""
    good = saved({"weight": torch.zeros(SHAPE)})
    header = json.dumps({"weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    safe = struct.pack("<Q", len(header)) + header + bytes(48)
    for name, index in {
        "deep": '{"weight_map": ' + "[" * 100_000,
        "no map": "{}",
        "a list": "[1]",
        "numbers": '{"weight_map": {"a": 1}}',
        "lists": '{"weight_map": {"a": ["x"]}}',
        "outside": '{"weight_map": {"a": "../../secret.pt"}}',
        "absolute": '{"weight_map": {"a": "/etc/passwd"}}',
        "itself": '{"weight_map": {"a": "model.index.json"}}',
        "a folder": '{"weight_map": {"a": "."}}',
        "1e400": '{"weight_map": 1e400}',
        "empty": "",
        "null": '{"weight_map": null}',
    }.items():
        yield f"index {name}", {"model.index.json": index.encode(), "a.bin": good}
    for name, shard in {
        "torch": good,
        "a pickle": pickle.dumps({"weight": 1}),
        "a tensor": saved(torch.zeros(3)),
        "a list": saved([1]),
        "nothing": b"",
        "safe": safe,
    }.items():
        yield (
            f"shard {name} called safetensors",
            {"model.index.json": b'{"weight_map": {"weight": "a.safetensors"}}', "a.safetensors": shard},
        )
        yield (
            f"shard {name} called bin",
            {"model.index.json": b'{"weight_map": {"weight": "a.bin"}}', "a.bin": shard},
        )
        yield f"weights {name}", {"model.safetensors": shard}
    for step in (
        "1e400",
        '{"global_step": 1e400}',
        '{"global_step": ' + "[" * 100_000,
        '{"global_step": "x"}',
        '{"global_step": %s}' % ("9" * 5000),
    ):
        yield f"trainer {step[:20]}", {"model.safetensors": safe, "trainer_state.json": step.encode()}


def damaged():
    """Good files in which a few bytes were changed."""
    model = nn.Linear(4, 3)
    kinds = {
        "torch file.pt": saved({"model": model.state_dict(), "step": 3}),
        "legacy file.pt": saved({"model": model.state_dict()}, _use_new_zipfile_serialization=False),
    }
    for kind, data in kinds.items():
        for seed in range(40):
            draw, changed = random.Random(seed), bytearray(data)
            for _ in range(draw.choice([1, 2, 8])):
                # most in the description, the rest anywhere
                at = draw.randrange(min(len(changed), 900) if draw.random() < 0.7 else len(changed))
                changed[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
            yield f"damaged {seed} {kind}", bytes(changed)
