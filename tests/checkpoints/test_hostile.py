"""Hostile checkpoints: none runs code, none takes memory that its bytes do not fill, each is one sentence."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from diag.checkpoints import load_into, load_state
from diag.errors import CheckpointError
from tests.checkpoints import hostile

GIGABYTE = 1 << 30
# Nothing is wrong with these that makes another number of the weights.
HARMLESS = ("as a key beside", "a step that is", "trainer", "safe", "shard torch", "weights torch", "two pickles")
HARMLESS += ("metadata", "holds itself beside", "half", "eighth", "a parameter", "a list as", "text as", "NaN.pt")


def opened(folder, every):
    """What came of opening all hostile files, in a process of its own whose memory is watched."""
    command = [sys.executable, "-m", "tests.checkpoints.hostile", str(folder), str(every)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=550, check=True)
    return json.loads(shown.stdout)


def check(found, least):
    assert len(found["outcomes"]) >= least and not found["ran"], "a checkpoint ran code"
    assert found["virtual"] < GIGABYTE and found["resident"] < GIGABYTE, found["greedy"]
    for name, outcome in found["outcomes"].items():
        if outcome == "loaded":
            assert any(part in name for part in HARMLESS), f"{name} was loaded"
            continue
        assert "Traceback" not in outcome, f"{name}: {outcome}"
        assert outcome.endswith((".", ")")) and "\n" not in outcome and len(outcome) < 700, f"{name}: {outcome}"


def test_some_hostile_checkpoints(tmp_path):
    check(opened(tmp_path, 6), 50)


@pytest.mark.slow
def test_all_hostile_checkpoints(tmp_path):
    check(opened(tmp_path, 1), 200)


# What each kind is told


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bytearray in a torch file.pt", "asks for more memory than its file can fill"),
        (
            "FloatTensor in a torch file.pt",
            "makes a torch.FloatTensor of its own, whose memory nothing has written",
        ),
        ("storage one too long in a torch file.pt", "says that its storage 0 has 52 bytes, and 48 lie there"),
        ("view behind in a torch file.pt", "describes a tensor that reaches beyond its storage"),
        ("memo in a torch file.pt", "asks for more memory than its file can fill (a memo entry)"),
        ("legacy storage of 2 GB.pt", "asks for more memory than its file can fill"),
        ("legacy storage not written.pt", "names storages that do not lie in it"),
        ("deflated pickle.pt", "is a zip archive with compressed entries, which torch never writes"),
        ("entries over one another.pt", "is a zip archive whose entries overlap"),
        ("a comment.pt", "is damaged or was not written to its end"),
    ],
)
def test_a_file_that_asks_for_too_much(name, text, tmp_path):
    (tmp_path / "a.pt").write_bytes(dict(hostile.memory())[name])
    with pytest.raises(CheckpointError) as error:
        load_state(tmp_path / "a.pt")
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("holds itself.pt", "holds no state dict (its entries are a)"),
        ("nested 3000 deep.pt", "a.pt holds dicts nested more than 60 deep"),
        ("a key of 2^60 parts.pt", "holds a dict whose keys would take forever to read"),
        ("a set of 2^60 parts.pt", "holds a dict whose keys would take forever to read"),
        ("dicts that double sixty times.pt", "holds no state dict"),
    ],
)
def test_a_file_that_takes_for_ever(name, text, tmp_path):
    (tmp_path / "a.pt").write_bytes(dict(hostile.structures())[name])
    with pytest.raises(CheckpointError) as error:
        load_state(tmp_path / "a.pt")
    assert text in str(error.value), error.value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sparse", "weight is a tensor of the layout sparse_coo in the checkpoint; save it as a plain tensor"),
        ("quantised", "weight is a quantised tensor in the checkpoint"),
        ("nested", "weight is a nested tensor in the checkpoint"),
        ("meta", "weight is a tensor without values (of the device meta)"),
        ("complex", "weight holds complex64 values in the checkpoint that would lose their imaginary part"),
        ("codes", "weight holds uint8 values in the checkpoint that may be the codes of a quantised model"),
        (
            "too large",
            "weight holds float64 values in the checkpoint that are too large for it as the model's float32",
        ),
        ("repeated", "weight has shape (1099511627776, 1048576) in the checkpoint and (3, 4) in the model"),
        ("uninitialised", "was saved before its lazy layers had seen a batch"),
    ],
)
def test_a_tensor_that_is_no_weight(name, text, tmp_path):
    (tmp_path / "a.pt").write_bytes(dict(hostile.tensors())[f"{name}.pt"])
    model = hostile.Victim()
    with pytest.raises(CheckpointError) as error:
        load_into(model, load_state(tmp_path / "a.pt"))
    assert text in str(error.value) and bool((model.weight == 7).all())


def test_a_changed_byte_of_a_weight_is_noticed(tmp_path):
    """torch reads past the checksum of an entry; a file that was told to have none is read as it is."""
    weights = torch.arange(1000.0)
    data = bytearray(hostile.saved({"weight": weights}))
    at = data.index(weights.numpy().tobytes())
    data[at + 1002] ^= 64
    (tmp_path / "a.pt").write_bytes(data)
    assert not torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["weight"], weights)
    with pytest.raises(CheckpointError, match=r"is damaged \(the checksum of its entry .*data/0 does not fit\)"):
        load_state(tmp_path / "a.pt")
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"weight": weights, "nothing": torch.empty(0)}, tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_state(tmp_path / "b.pt").state["weight"], weights)


@pytest.mark.parametrize("old", [False, True])
def test_every_dtype_and_view_that_torch_writes_is_read(old, tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
    kinds += [] if old else [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
    base = torch.arange(24).reshape(4, 6)
    state = {str(k): base.to(k) for k in kinds}
    state |= {"transposed": base.T, "every other": base[::2, 1::2], "repeated": base[0, 0].expand(5, 5)}
    state |= {"empty": torch.empty(0, 3), "one": torch.tensor(3.0), "parameter": nn.Parameter(torch.ones(3))}
    state |= {"same": state["transposed"], "bits": base.bool().T, "end": base[3:, 5:]}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    read = load_state(tmp_path / "a.pt").state
    for name, value in state.items():
        assert read[name].dtype is value.dtype and torch.equal(read[name].double(), value.double()), name
