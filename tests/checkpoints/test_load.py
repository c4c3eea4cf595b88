"""Every kind of checkpoint gives the state back bit by bit; every other is refused in one sentence, unopened."""

import argparse
import io
import json
import pathlib
import pickle
import re
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diag.checkpoints import load_into, load_state
from diag.checkpoints.formats import read
from diag.checkpoints.numbers import Dtype, scalar
from diag.errors import CheckpointError


def as_safetensors(state):
    """safetensors refuses shared memory, so a tied weight is stored once, as Hugging Face does."""
    return {n: t.clone() for n, t in state.items() if n != "head.weight"}


def write_pt(net, folder):
    torch.save(net.state_dict(), folder / "net.pt")
    return folder / "net.pt"


def write_legacy(net, folder):
    torch.save(net.state_dict(), folder / "net.pth", _use_new_zipfile_serialization=False)
    return folder / "net.pth"


def write_safetensors(net, folder):
    save_file(as_safetensors(net.state_dict()), folder / "net.safetensors")
    return folder / "net.safetensors"


def write_lightning(net, folder):
    """The shape of a Lightning .ckpt: a LightningModule holds the network as `model` and a metric beside it."""
    state = {f"model.{n}": t for n, t in net.state_dict().items()} | {"metric.total": torch.zeros(())}
    hyper = argparse.Namespace(lr=0.1, folder=pathlib.Path("/data"))
    contents = {"epoch": 3, "global_step": 1200, "pytorch-lightning_version": "2.6.6", "state_dict": state}
    torch.save(contents | {"optimizer_states": [], "hyper_parameters": hyper}, folder / "last.ckpt")
    return folder / "last.ckpt"


def write_hf(net, folder):
    save_file(as_safetensors(net.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    return folder


def write_hf_bin(net, folder):
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    return folder


def write_hf_shards(net, folder):
    state = as_safetensors(net.state_dict())
    names = list(state)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for shard, inside in shards.items():
        save_file({n: state[n] for n in inside}, folder / shard)
    index = {"weight_map": {n: shard for shard, inside in shards.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


WRITERS = {
    "torch file": write_pt,
    "torch file (legacy)": write_legacy,
    "safetensors": write_safetensors,
    "Lightning checkpoint": write_lightning,
    "Hugging Face folder": write_hf,
    "Hugging Face folder, bin": write_hf_bin,
    "Hugging Face folder, shards": write_hf_shards,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_state_comes_back_bit_by_bit(kind, net, other, tmp_path, same):
    checkpoint = load_state(WRITERS[kind](net, tmp_path))
    assert checkpoint.format == kind.split(",")[0]
    load_into(other, checkpoint)
    same(net, other)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights"])
def test_common_wrappers_are_unwrapped(key, net, other, tmp_path, same):
    torch.save({key: net.state_dict(), "optimizer": {"state": {}}, "epoch": 4}, tmp_path / "a.pt")
    checkpoint = load_state(tmp_path / "a.pt")
    load_into(other, checkpoint)
    same(net, other)
    assert (checkpoint.step, checkpoint.step_source) == (4, "epoch")


def test_wrappers_in_wrappers_and_prefixes_of_ddp_and_compile(net, other, tmp_path, same):
    state = {f"module._orig_mod.{n.replace('conv.', 'conv._orig_mod.')}": t for n, t in net.state_dict().items()}
    torch.save({"model": {"state_dict": state}}, tmp_path / "a.pt")
    checkpoint = load_state(tmp_path / "a.pt")
    assert set(checkpoint.state) == set(net.state_dict()) and len(checkpoint.notes) == 3
    load_into(other, checkpoint)
    same(net, other)


def test_a_compiled_and_wrapped_model_takes_a_plain_state(net, other, tmp_path, same):
    load_into(nn.DataParallel(torch.compile(other, backend="eager")), load_state(write_pt(net, tmp_path)))
    same(net, other)


def test_averaged_weights_are_mentioned_and_can_be_chosen(net, other, tmp_path, same):
    average = {n: t * 0 for n, t in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "model_ema": average}, tmp_path / "a.pt")
    checkpoint = load_state(tmp_path / "a.pt")
    assert checkpoint.notes == ("It also holds model_ema, an average of the weights: key='model_ema' loads that.",)
    load_into(other, load_state(tmp_path / "a.pt", key="model_ema"))
    assert not any(p.any() for p in other.parameters())


def test_numpy_numbers_beside_the_state(net, other, tmp_path, same):
    """As training scripts write them: torch's own weights_only list has none of these."""
    about = {
        "best": numpy.float64(0.5),
        "loss": numpy.float32(0.25),
        "done": numpy.bool_(True),
        "step": numpy.int64(7),
    }
    torch.save({"model": net.state_dict(), **about}, tmp_path / "a.pt")
    checkpoint = load_state(tmp_path / "a.pt")
    load_into(other, checkpoint)
    same(net, other)
    assert (checkpoint.step, checkpoint.step_source) == (7, "step")
    contents, _ = read(tmp_path / "a.pt")
    assert [contents[name] for name in about] == [0.5, 0.25, True, 7]
    assert [type(contents[name]) for name in about] == [float, float, bool, int]


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        (Dtype("O8"), b"\x01" * 8),
        (Dtype("V8"), b"\x01" * 8),
        (Dtype("f8"), b"\x01" * 4),
        (Dtype("f8,O"), b"\x01" * 16),
        (numpy.dtype("f8"), b"\x01" * 8),
        (Dtype("f8"), "text"),
    ],
)
def test_only_plain_numbers_are_made_of_a_pickle(dtype, data):
    assert scalar(dtype, data) is None


def test_numbers_of_the_other_byte_order():
    big = Dtype("f8", False, True)
    big.__setstate__((3, ">", None, None, None, -1, -1, 0))
    assert scalar(big, numpy.array(1.5, ">f8").tobytes()) == 1.5


def test_several_states_ask_for_a_key(net, tmp_path):
    torch.save({"gan": {"generator": net.state_dict(), "critic": net.state_dict()}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds several states \(gan.generator and gan.critic\); say which"):
        load_state(tmp_path / "a.pt")
    assert set(load_state(tmp_path / "a.pt", key="gan.critic").state) == set(net.state_dict())
    with pytest.raises(CheckpointError, match=r"has no entry 'gna'; there are gan"):
        load_state(tmp_path / "a.pt", key="gna")
    with pytest.raises(CheckpointError, match=r"'gan' of .* is not a state dict; .* holds several states"):
        load_state(tmp_path / "a.pt", key="gan")


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        ({"epoch": 3}, r"holds no state dict \(its entries are epoch\)"),
        ({}, r"holds no state dict \(its entries are nothing\)"),
        (torch.ones(3), "holds a Tensor; expected a state dict"),
        ([1, 2], "holds a list; expected a state dict"),
    ],
)
def test_a_file_without_a_state(contents, text, tmp_path):
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=text):
        load_state(tmp_path / "a.pt")


# The step


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("a.pt", {"global_step": 7, "step": 3, "epoch": 1}, (7, "global_step")),
        ("a9.pt", {"step": torch.tensor(5)}, (5, "step")),
        ("a9.pt", {"step": True, "epoch": -1}, (9, "file name")),
        ("epoch=03-step=1200.pt", {}, (1200, "file name")),
        ("resnet18_epoch12.pt", {}, (12, "file name")),
        ("resnet18_ep5_best2.pt", {}, (5, "file name")),
        ("checkpoint-500.pt", {}, (500, "file name")),
        ("net_0040.pt", {}, (40, "file name")),
        ("best.pt", {}, (None, "")),
    ],
)
def test_the_step_is_read_from_the_contents_else_from_the_name(name, contents, expected, tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, **contents}, tmp_path / name)
    checkpoint = load_state(tmp_path / name)
    assert (checkpoint.step, checkpoint.step_source) == expected


def test_the_step_of_a_hugging_face_trainer_and_of_safetensors(net, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    folder = write_hf(net, tmp_path / "checkpoint-500")
    assert load_state(folder).step == 500
    (folder / "trainer_state.json").write_text('{"global_step": 501, "log_history": []}')
    assert (load_state(folder).step, load_state(folder).step_source) == (501, "global_step")
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors", metadata={"step": "40", "format": "pt"})
    assert load_state(tmp_path / "b.safetensors").step == 40


# What could run code is refused unopened; the `bomb` fixture checks that nothing went off.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.safetensors"])
def test_a_torch_file_with_a_malicious_pickle(name, legacy, net, bomb, tmp_path):
    contents = {"state_dict": net.state_dict(), "callbacks": bomb, "pytorch-lightning_version": "2"}
    torch.save(contents, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"holds objects of .*(Path|getattr).*, which could run code"):
        load_state(tmp_path / name)


def test_no_environment_variable_opens_the_door(net, bomb, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": net.state_dict(), "x": bomb}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_state(tmp_path / "a.pt")


def test_a_hugging_face_folder_with_a_malicious_pickle(net, bomb, tmp_path):
    torch.save(net.state_dict() | {"x": bomb}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .*could run code"):
        load_state(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "part.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "part.bin"}}')
    with pytest.raises(CheckpointError, match=r"part\.bin .*could run code"):
        load_state(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_raw_pickle(protocol, bomb, tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(
        CheckpointError, match=r"is a raw Python pickle, which can run any code .*; if you trust it"
    ):
        load_state(tmp_path / "a.pt")


def test_a_pickled_model(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.pt")
    text = (
        r"is a whole pickled model \(it names torch.nn.modules.*torch.save\(torch.load\(path, weights_only=False\)"
    )
    with pytest.raises(CheckpointError, match=text):
        load_state(tmp_path / "a.pt")


def test_objects_of_unknown_classes_are_named(net, tmp_path):
    torch.save({"model": net.state_dict(), "x": numpy.random.default_rng(0)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds objects of numpy.* and \d+ more, which could run code"):
        load_state(tmp_path / "a.pt")


def test_a_torchscript_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:  # its layout; torch.jit.save itself is deprecated
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")
        archive.writestr("net/code/__torch__.py", b"")
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive, .*torch.jit.load\(path\).state_dict"):
        load_state(tmp_path / "a.pt")


def bytes_of(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty; save the checkpoint again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer and not the checkpoint itself"),
        (b"GGUF\x03\x00", "is a GGUF file of quantised weights"),
        (b"\x89HDF\r\n", "is an HDF5 file"),
        (b"hello world, this is text", "is no checkpoint that diag knows"),
        (b"PK\x03\x04 and then nothing", "is damaged or was not written to its end"),
        (bytes_of(lambda b: numpy.savez(b, a=numpy.ones(2))), "is a zip archive without a state dict"),
        (
            bytes_of(lambda b: torch.save({"w": torch.ones(9)}, b))[:-200],
            "is damaged or was not written to its end",
        ),
        ((30).to_bytes(8, "little") + b'{"w": 3' + b" " * 50, "is a damaged safetensors file"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_no_checkpoint(data, text, tmp_path):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_state(tmp_path / "a.pt")
    assert str(caught.value).startswith(str(tmp_path / "a.pt")) and str(caught.value).endswith(".")


def test_a_path_that_is_not_there_and_folders_that_hold_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*nowhere\.pt; give a file or a folder"):
        load_state(tmp_path / "nowhere.pt")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that diag knows \(found notes\.txt\)"):
        load_state(tmp_path)
    (tmp_path / "zero_to_fp32.py").write_text("raise SystemExit")
    with pytest.raises(CheckpointError, match=r"is a DeepSpeed checkpoint in shards; join them with"):
        load_state(tmp_path)


def test_a_folder_whose_shards_are_missing_or_elsewhere(net, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_hf_shards(net, folder)
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002.safetensors of the 2 shards"):
        load_state(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match=re.escape("lacks ../elsewhere.safetensors")):
        load_state(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        load_state(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_protocol_that_the_safe_unpickler_does_not_read(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"holds a pickle that could run code \(Unsupported operand \d+\)"):
        load_state(tmp_path / "a.pt")
