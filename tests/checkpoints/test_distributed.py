"""Folders of torch.distributed.checkpoint: read whole, in one process, and never unpickled by torch."""

import collections
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from diag.checkpoints import load_into, load_state
from diag.checkpoints.stored import block_at
from diag.errors import CheckpointError


@pytest.fixture
def folder(net, tmp_path):
    """A checkpoint with an optimizer, whose state must not be needed, and a step."""
    optimizer = torch.optim.Adam(net.parameters())
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optim": optimizer.state_dict(), "step": 7, "mixed": [torch.ones(2), 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def metadata(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def place_of(about, name):
    return next(place for index, place in about.storage_data.items() if index.fqn == name)


def replace(folder, data):
    (folder / ".metadata").write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))


def test_the_state_comes_back_bit_by_bit(folder, net, other, same):
    checkpoint = load_state(folder)
    assert (checkpoint.format, checkpoint.step) == ("torch.distributed checkpoint", 7)
    load_into(other, checkpoint)
    same(net, other)


def test_a_tensor_in_several_shards_is_put_together(folder):
    """The rows of one matrix, written as two pieces in two files, as two ranks would."""
    whole = torch.arange(12.0).reshape(4, 3)
    about, pieces = metadata(folder), {0: whole[:1].clone(), 1: whole[1:].clone()}
    entry = about.state_dict_metadata["model.conv.weight"]
    index = next(i for i in about.storage_data if i.fqn == "model.conv.weight")
    place = about.storage_data.pop(index)
    entry.size, entry.chunks = whole.shape, []
    for rank, piece in pieces.items():
        start = torch.Size([rank, 0])
        torch.save(piece, folder / f"__{rank + 1}_0.distcp")
        entry.chunks.append(ChunkStorageMetadata(start, piece.shape))
        size = (folder / f"__{rank + 1}_0.distcp").stat().st_size
        about.storage_data[type(index)("model.conv.weight", start)] = type(place)(f"__{rank + 1}_0.distcp", 0, size)
    replace(folder, about)
    assert torch.equal(load_state(folder).state["conv.weight"], whole)
    (folder / "__2_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard __2_0\.distcp; copy the whole folder"):
        load_state(folder)
    del entry.chunks[0]
    replace(folder, about)
    with pytest.raises(CheckpointError, match=r"the shards of model\.conv\.weight have 9 of 12 elements"):
        load_state(folder)


def test_a_state_without_nesting(net, other, tmp_path, same):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(net.state_dict(), checkpoint_id=tmp_path / "step_40")
    checkpoint = load_state(tmp_path / "step_40")
    load_into(other, checkpoint)
    same(net, other)
    assert (checkpoint.step, checkpoint.step_source) == (40, "file name")


# What could run code


def test_a_malicious_metadata_is_not_run(folder, bomb):
    about = metadata(folder)
    about.planner_data = bomb
    replace(folder, about)
    with pytest.raises(
        CheckpointError, match=r"\.metadata names pathlib.*, which no checkpoint needs and which could run"
    ):
        load_state(folder)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch.serialization", "pickle_load"),
    ],
)
def test_no_name_but_the_known_ones_is_looked_up(module, name, folder):
    def text(value):
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    call = text(module) + text(name) + pickle.STACK_GLOBAL + text("touch it-ran") + pickle.TUPLE1 + pickle.REDUCE
    replace(folder, pickle.PROTO + b"\x04" + call + pickle.STOP)
    with pytest.raises(
        CheckpointError, match="which no checkpoint needs and which could run code; it is not opened"
    ):
        load_state(folder)


def test_known_names_do_nothing_when_called(folder):
    """A stand-in takes any arguments and holds them; Path.touch or the real classes cannot be reached."""
    replace(folder, pickle.dumps(collections.OrderedDict(a=1)))
    with pytest.raises(CheckpointError, match=r"is not the metadata of torch\.distributed\.checkpoint"):
        load_state(folder)


def test_a_malicious_item_in_a_shard_is_not_run(folder, bomb):
    about = metadata(folder)
    torch.save(bomb, folder / "evil.distcp")
    place = place_of(about, "step")
    place.relative_path, place.offset, place.length = "evil.distcp", 0, (folder / "evil.distcp").stat().st_size
    replace(folder, about)
    with pytest.raises(
        CheckpointError, match=r"evil\.distcp holds an item at byte 0 that is damaged or could run code"
    ):
        load_state(folder)


def test_a_shard_outside_the_folder_is_not_read(folder, net):
    about = metadata(folder)
    torch.save(net.state_dict(), folder.parent / "secret.pt")
    place_of(about, "model.conv.bias").relative_path = "../secret.pt"
    replace(folder, about)
    with pytest.raises(CheckpointError, match=r"lacks the shard \.\./secret\.pt"):
        load_state(folder)


def test_damaged_metadata(folder):
    replace(folder, (folder / ".metadata").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged \(.*\); copy the folder again"):
        load_state(folder)


def test_metadata_that_does_not_describe_the_folder(folder):
    about = metadata(folder)
    about.storage_data = {}
    replace(folder, about)
    with pytest.raises(CheckpointError, match=r"does not describe the folder \(KeyError"):
        load_state(folder)


def test_a_compressed_shard_is_refused(folder):
    about = metadata(folder)
    place_of(about, "model.conv.bias").transform_descriptors = ["zstd"]
    replace(folder, about)
    with pytest.raises(CheckpointError, match=r"stored with \['zstd'\], which is not read here"):
        load_state(folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_distributed_tensors_in_a_torch_file(ranks, tmp_path):
    """What one rank of `ranks` saves: all of the tensor, or a shard of it that must not pass for the whole."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = torch.arange(8.0).reshape(4, 2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        torch.save({"weight": distribute_tensor(whole, mesh, [Shard(0)])}, tmp_path / "a.pt")
    finally:
        dist.destroy_process_group()
    model = torch.nn.Linear(2, 4, bias=False)
    if ranks == 1:
        load_into(model, load_state(tmp_path / "a.pt"))
        assert torch.equal(model.weight, whole)
    else:
        with pytest.raises(
            CheckpointError, match=r"weight is one shard of a distributed tensor; save the whole state"
        ):
            load_into(model, load_state(tmp_path / "a.pt"))


WEIGHTS = {"weight": torch.arange(35.0).reshape(7, 5), "bias": torch.arange(7.0)}


@pytest.fixture
def as_rank():
    """Calls something as one of so many ranks, that none of the others is there to be sent anything."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def call(rank, world, function):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            return function()
        finally:
            dist.destroy_process_group()

    return call


def lying(placements, shape):
    """The weights, spread over a mesh of this shape."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", shape)
    found = {
        name: distribute_tensor(whole, mesh, placements, src_data_rank=None) for name, whole in WEIGHTS.items()
    }
    return {**found, "count": torch.tensor(3)}


def files_of_ranks(folder, as_rank, placements, shape, name="model_rank_{}.pt"):
    folder.mkdir()
    for rank in range(torch.Size(shape).numel()):
        state = as_rank(rank, torch.Size(shape).numel(), lambda: lying(placements, shape))
        torch.save({"model": state, "step": 40}, folder / name.format(rank, 9 - rank))
    return folder


class Layer(torch.nn.Linear):
    def __init__(self):
        super().__init__(5, 7)
        self.register_buffer("count", torch.tensor(0))


# By name, along which axis the ranks of each axis of a mesh split (None: they do not), and the mesh's shape.
SPLITS = {
    "three ranks": ([0], (3,)),
    "more ranks than rows": ([0], (9,)),
    "copies": ([0, None], (2, 2)),
    "one axis twice": ([0, 0], (2, 2)),
    "single rows, split again": ([0, 0], (7, 2)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_files_of_all_ranks_are_put_together(name, as_rank, tmp_path):
    from torch.distributed.tensor import Replicate, Shard

    axes, shape = SPLITS[name]
    placements = [Replicate() if axis is None else Shard(axis) for axis in axes]
    checkpoint = load_state(files_of_ranks(tmp_path / "ranks", as_rank, placements, shape))
    assert checkpoint.step == 40 and checkpoint.format == "torch files of all ranks"
    layer = Layer()
    load_into(layer, checkpoint)
    assert layer.count == 3 and all(torch.equal(getattr(layer, n), whole) for n, whole in WEIGHTS.items())


@pytest.mark.parametrize("name", ["step10_rank{}.pt", "{1}_rank{0}.ckpt", "node_rank_{1}.Rank-{0}.bin"])
def test_the_number_behind_the_word_rank_is_the_rank(name, as_rank, tmp_path):
    from torch.distributed.tensor import Shard

    layer = Layer()
    load_into(layer, load_state(files_of_ranks(tmp_path / "ranks", as_rank, [Shard(0)], (3,), name)))
    assert all(torch.equal(getattr(layer, n), whole) for n, whole in WEIGHTS.items())


def test_files_of_ranks_that_do_not_say_how_their_tensors_lie_are_refused(tmp_path):
    for rank, part in enumerate(WEIGHTS["weight"].chunk(2)):
        torch.save({"model": {"weight": part.clone()}}, tmp_path / f"mp_rank_0{rank}.pt")
    with pytest.raises(CheckpointError, match=r"files of 2 ranks, and no tensor in them says how it lies"):
        load_state(tmp_path)


def noted(read, chunk):
    read.append(chunk.block)
    return chunk.read()


@pytest.mark.parametrize("world", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", ["files of ranks", "dcp"])
def test_each_rank_reads_the_parts_that_it_needs(kind, world, as_rank, tmp_path):
    """Bit for bit, whatever number of ranks saved; of four files, those that hold something of the own part."""
    from torch.distributed.tensor import Shard

    folder = tmp_path / "saved"
    if kind == "dcp":
        dcp.save({"model": WEIGHTS}, checkpoint_id=folder)
    else:
        files_of_ranks(folder, as_rank, [Shard(0)], (4,))
    state = load_state(folder, in_parts=True).state
    for name, whole in WEIGHTS.items():
        stored, read = state[name], []
        stored.chunks = [c._replace(read=partial(noted, read, c)) for c in stored.chunks]
        blocks = [block_at(whole.shape, (world,), (rank,), [Shard(0)]) for rank in range(world)]
        assert torch.equal(torch.cat([stored.part(block) for block in blocks]), whole)
        read.clear()
        stored.part(blocks[0])
        needed = [c.block for c in stored.chunks if c.block[0].start < blocks[0][0].stop]
        assert read == needed
        assert torch.equal(stored + 1, whole + 1) and stored.shape == whole.shape and repr(stored)


def test_files_of_other_ranks_than_there_were_are_refused(as_rank, tmp_path):
    from torch.distributed.tensor import Shard

    folder = files_of_ranks(tmp_path / "ranks", as_rank, [Shard(0)], (3,))
    (folder / "model_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has the files of 2 ranks, and model.weight was split over 3"):
        load_state(folder)
    torch.save({"model": {"weight": WEIGHTS["weight"]}}, folder / "model_rank_2.pt")
    with pytest.raises(CheckpointError, match=r"model_rank_2.pt does not have model.weight as"):
        load_state(folder)


def test_a_sum_that_the_ranks_have_in_parts_is_refused(as_rank, tmp_path):
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    for rank in range(2):
        part = as_rank(
            rank, 2, lambda: DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()])
        )
        torch.save({"weight": part}, tmp_path / f"rank{rank}.pt")
    with pytest.raises(CheckpointError, match=r"weight lies in .*rank0.pt in a way that is not read here"):
        load_state(tmp_path)


def test_a_part_that_cannot_be_read_says_so_on_loading(folder, net):
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_into(net, load_state(folder, in_parts=True))


def in_pieces(folder, whole, boxes, size=None):
    """Write `whole` as these boxes (first corner, sizes), a file each, into the checkpoint."""
    about = metadata(folder)
    entry = about.state_dict_metadata["model.conv.weight"]
    index = next(i for i in about.storage_data if i.fqn == "model.conv.weight")
    place = about.storage_data.pop(index)
    entry.size, entry.chunks = torch.Size(size or whole.shape), []
    for rank, (start, sizes) in enumerate(boxes):
        piece = torch.zeros(sizes)
        inside = whole[tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))]
        if inside.shape == piece.shape:
            piece = inside.clone()
        name = f"__{rank + 1}_0.distcp"
        torch.save(piece, folder / name)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)))
        where = type(index)("model.conv.weight", torch.Size(start))
        about.storage_data[where] = type(place)(name, 0, (folder / name).stat().st_size)
    replace(folder, about)


WHOLE = torch.arange(24.0).reshape(4, 6)
QUARTERS = [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]


UNEVEN = [((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))]
WITH_AN_EMPTY_ONE = [((0, 0), (4, 6)), ((4, 0), (0, 6))]


@pytest.mark.parametrize("boxes", [QUARTERS, QUARTERS[::-1], UNEVEN, WITH_AN_EMPTY_ONE])
def test_boxes_that_fill_a_tensor_give_it(boxes, folder):
    in_pieces(folder, WHOLE, boxes)
    assert torch.equal(load_state(folder).state["conv.weight"], WHOLE)


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        # As many elements as the tensor has, and some of it is never written.
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "shards of model.conv.weight overlap, so others are missing"),
        ([((0, 0), (4, 3)), ((0, 2), (4, 3))], "shards of model.conv.weight overlap, so others are missing"),
        ([*QUARTERS[:3], ((1, 2), (2, 3))], "shards of model.conv.weight overlap, so others are missing"),
        ([*QUARTERS[:3], ((2, 4), (2, 3))], "a shard of model.conv.weight reaches beyond it"),
        (QUARTERS[:3], "the shards of model.conv.weight have 18 of 24 elements"),
        ([*QUARTERS, QUARTERS[0]], "the shards of model.conv.weight have 24 of 24 elements"),
    ],
)
def test_shards_that_do_not_fill_a_tensor_are_refused(boxes, text, folder):
    in_pieces(folder, WHOLE, boxes)
    with pytest.raises(CheckpointError) as error:
        load_state(folder)
    assert text in str(error.value)


def test_sizes_that_no_shard_fills_are_refused_before_there_is_memory_for_them(folder):
    about = metadata(folder)
    entry = about.state_dict_metadata["model.conv.weight"]
    for size in (torch.Size([1 << 20, 1 << 14]), torch.Size([1 << 50])):
        entry.size = entry.chunks[0].sizes = size
        entry.chunks[0].offsets = torch.Size([0] * len(size))
        index = next(i for i in about.storage_data if i.fqn == "model.conv.weight")
        about.storage_data[type(index)("model.conv.weight", entry.chunks[0].offsets)] = about.storage_data[index]
        replace(folder, about)
        with pytest.raises(CheckpointError, match=r"more than its [\d,]+ bytes can hold"):
            load_state(folder)


@pytest.mark.parametrize("what", ["offset", "length"])
@pytest.mark.parametrize("value", [-1, 1 << 60, "1", 1.5, None])
def test_places_that_are_none_are_refused(what, value, folder):
    about = metadata(folder)
    for place in about.storage_data.values():
        setattr(place, what, value)
    replace(folder, about)
    with pytest.raises(CheckpointError):
        load_state(folder)


def test_metadata_that_ask_for_memory_are_refused(folder):
    for body, text in (
        (b"\x80\x02Nr" + (1 << 28).to_bytes(4, "little") + b".", "asks for more memory than its file can fill"),
        (b"\x80\x04\x8e" + (1 << 50).to_bytes(8, "little") + b"short.", "is damaged"),
        (b"\x80\x02}" + b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.", "take forever"),
    ):
        (folder / ".metadata").write_bytes(body)
        with pytest.raises(CheckpointError, match=text):
            load_state(folder)
