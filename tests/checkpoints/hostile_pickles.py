"""Checkpoints that run code, ask for memory that they do not hold, or take forever to look at.

Each generator yields the name of a file and its bytes.
"""

import json
import struct

from tests.checkpoints.opcodes import (
    NUMEL,
    archive,
    call,
    g,
    items,
    legacy,
    num,
    pkl,
    state,
    storage,
    tensor,
    text,
    tup,
)

RUNS = {
    "os.system": lambda trace: call(g("posix", "system"), text(f"touch {trace}")),
    "eval": lambda trace: call(g("builtins", "eval"), text(f"open({str(trace)!r}, 'w')")),
    "old eval": lambda trace: call(g("__builtin__", "eval"), text(f"open({str(trace)!r}, 'w')")),
    "exec": lambda trace: call(g("builtins", "exec"), text(f"open({str(trace)!r}, 'w')")),
    "open": lambda trace: call(g("builtins", "open"), text(str(trace)), text("w")),
    "Popen": lambda trace: call(g("subprocess", "Popen"), b"](" + text("touch") + text(str(trace)) + b"e"),
    "touch": lambda trace: call(g("pathlib", "Path.touch"), call(g("pathlib", "PosixPath"), text(str(trace)))),
    "getattr": lambda trace: call(
        call(g("builtins", "getattr"), call(g("pathlib", "PosixPath"), text(str(trace))), text("touch"))
    ),
    "runpy": lambda trace: call(g("runpy", "run_path"), text(str(trace))),
    "INST": lambda trace: b"(" + text(f"touch {trace}") + b"iposix\nsystem\n",
    "OBJ": lambda trace: b"(" + g("posix", "system") + text(f"touch {trace}") + b"o",
    "torch.load": lambda trace: call(g("torch.serialization", "load"), text(str(trace))),
    "numpy.load": lambda trace: call(g("numpy", "load"), text(str(trace)), b"N", b"\x88"),
    "BUILD": lambda trace: g("torch.nn.modules.linear", "Linear") + b")\x81" + items((text("a"), num(1))) + b"b",
    "NEWOBJ": lambda trace: g("io", "FileIO") + tup(text(str(trace)), text("w")) + b"\x81",
    "EXT": lambda trace: b"\x82\x01",
}


def running(trace):
    """Pickles that run code, in every kind of file that holds a pickle."""
    for name, make in RUNS.items():
        body = make(trace)
        beside = items((text("weight"), tensor()), (text("extra"), body))
        yield f"{name} in a torch file.pt", archive(pkl(beside))
        yield f"{name} as a torch file.pt", archive(pkl(body))
        old = items((text("weight"), tensor(of=storage(legacy=True))), (text("extra"), body))
        yield f"{name} in a legacy file.pt", legacy(old)
        yield f"{name} as a pickle.pt", pkl(body)
        yield f"{name} in DCP/.metadata", pkl(body)
        yield f"{name} in HF/pytorch_model.bin", archive(pkl(beside))


def memory():
    """Files that ask for memory that they do not hold, or for memory that nothing has written."""
    huge = 1 << 31
    for name, body in {
        "bytearray": call(g("builtins", "bytearray"), num(huge - 1)),
        "two bytearrays": call(g("builtins", "bytearray"), num(huge // 2)) * 2 + b"\x86",
        "Tensor": call(g("torch", "Tensor"), num(huge // 4)),
        "FloatTensor": call(g("torch", "FloatTensor"), num(huge // 4)),
        "Tensor of a size": call(g("torch", "Tensor"), num(30000), num(30000)),
        "UntypedStorage": call(g("torch.storage", "UntypedStorage"), num(huge)),
        "TypedStorage": call(g("torch.storage", "TypedStorage"), num(huge)),
        "NEWOBJ of Tensor": g("torch", "Tensor") + tup(num(huge // 4)) + b"\x81",
        "storage of 2^50": tensor(of=storage(1 << 50)),
        "storage one too long": tensor(of=storage(NUMEL + 1)),
        "storage one too short": tensor(of=storage(NUMEL - 1)),
        "storage of -1": tensor(of=storage(-1)),
        "storage that is not there": tensor(of=storage(key="7")),
        "storage of no kind": tensor(of=storage(kind="Linear")),
        "storage of another size": tensor(of=storage(kind="DoubleStorage")),
        "view beyond": tensor((3, 5), (5, 1)),
        "view behind": tensor(offset=1),
        "view of 2^50": tensor((1 << 50, 1 << 50), (1, 1)),
        "view of negative stride": tensor((3, 4), (-4, 1)),
        "view of negative size": tensor((-3, 4), (4, 1)),
        "view of one stride": tensor((3, 4), (4,)),
        "view by floats": tensor((3, 4)).replace(num(3), b"G" + struct.pack(">d", 3.0)),
        "quantised beyond": call(
            g("torch._utils", "_rebuild_qtensor"),
            storage(NUMEL, kind="QInt8Storage"),
            num(0),
            tup(num(huge), num(4)),
            tup(num(4), num(1)),
            tup(g("torch", "per_tensor_affine"), num(1), num(0)),
            b"\x89",
            b"}",
        ),
        "memo": text("a") + b"r" + struct.pack("<I", 1 << 28),
        "text of 4 GB": b"X" + struct.pack("<I", 0xFFFFFFFF) + b"short",
        "long of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1",
        "mark missing": b"t",
        "nothing": b"",
    }.items():
        beside = items((text("weight"), body or b"N"), (text("bias"), tensor((4,), (1,))))
        yield f"{name} in a torch file.pt", archive(pkl(beside))
        yield f"{name} as a torch file.pt", archive(pkl(body) if body else b"")
    weight = storage(legacy=True)
    good = items((text("weight"), tensor(of=weight)))
    yield "legacy storage of 2 GB.pt", legacy(items((text("weight"), tensor(of=storage(huge // 4, legacy=True)))))
    yield "legacy storage of 2^50.pt", legacy(items((text("weight"), tensor(of=storage(1 << 50, legacy=True)))))
    yield "legacy storage not written.pt", legacy(good, keys=())
    yield "legacy storage cut.pt", legacy(good, storages=struct.pack("<q", NUMEL) + bytes(5))
    yield (
        "legacy storage of another length.pt",
        legacy(good, storages=struct.pack("<q", 1 << 40) + bytes(4 * NUMEL)),
    )
    yield "legacy view beyond.pt", legacy(items((text("weight"), tensor((30, 40), (40, 1), of=weight))))
    yield "legacy keys are no list.pt", legacy(good).replace(pkl(b"](" + text("0") + b"e"), pkl(num(3)))
    yield "twice the same entry.pt", archive(pkl(state()), names=("data.pkl", "data.pkl"))
    yield "two pickles.pt", archive(pkl(state()), names=("data.pkl", "sub/data.pkl"))
    yield "a comment.pt", archive(pkl(state()))[:-2] + struct.pack("<H", 4) + b"more"
    yield (
        "entries over one another.pt",
        overlapping(archive(pkl(state()), {"0": bytes(4 * NUMEL), "1": bytes(10_000)})),
    )
    yield "header of 2^40.safetensors", struct.pack("<Q", 1 << 40) + b"{}" + bytes(100)
    for name, header in {
        "offsets beyond": {"weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 1 << 40]}},
        "shape of 2^60": {"weight": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 48]}},
        "overlap": {n: {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]} for n in ("weight", "bias")},
        "negative": {"weight": {"dtype": "F32", "shape": [-3, 4], "data_offsets": [0, 48]}},
        "no dtype": {"weight": {"dtype": "X9", "shape": [3, 4], "data_offsets": [0, 48]}},
        "metadata": {
            "__metadata__": {"step": "9" * 5000},
            "weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        },
        "deep": json.loads("[" * 500 + "]" * 500),
    }.items():
        data = json.dumps(header).encode()
        yield f"{name}.safetensors", struct.pack("<Q", len(data)) + data + bytes(48)
    zeros = 1 << 28
    described = pkl(items((text("weight"), tensor(of=storage(zeros // 4)))))
    yield "deflated zeros.pt", archive(described, {"0": bytes(zeros)}, compress=True)
    yield "deflated pickle.pt", archive(pkl(b"N0" * (1 << 22) + state()), compress=True)


def overlapping(data):
    """The archive with the local entry of one storage listed a hundred times."""
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    directory = data[at:end]
    last = directory[directory.rindex(b"PK\x01\x02") :]
    more = b"".join(last.replace(b"data/1", f"d{i:05}".encode()) for i in range(100))
    tail = bytearray(data[end:])
    count = struct.unpack_from("<H", tail, 8)[0] + 100
    struct.pack_into("<HHI", tail, 8, count, count, len(directory) + len(more))
    return data[:at] + directory + more + bytes(tail)


def structures():
    """Files that hold themselves, or what takes forever to look at."""
    nested = b"".join(b"}" + text("a") for _ in range(3000)) + b"N" + b"s" * 3000
    tower = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    dicts = b"}q\x00" + b"".join(
        b"}q" + bytes([i]) + b"(" + text("a") + b"h" + bytes([i - 1]) + text("b") + b"h" + bytes([i - 1]) + b"u"
        for i in range(1, 60)
    )
    yield "holds itself.pt", archive(pkl(b"}q\x00" + text("a") + b"h\x00s"))
    yield "holds itself beside.pt", archive(pkl(b"}q\x00(" + text("weight") + tensor() + text("a") + b"h\x00u"))
    yield (
        "two that hold each other.pt",
        archive(pkl(b"}q\x00}q\x01" + text("a") + b"h\x00s0" + text("b") + b"h\x01s")),
    )
    yield "a list that holds itself.pt", archive(pkl(b"]q\x00h\x00a"))
    yield "nested 3000 deep.pt", archive(pkl(nested))
    yield "a key of 2^60 parts.pt", archive(pkl(b"}" + tower + tensor() + b"s"))
    yield "a set of 2^60 parts.pt", archive(pkl(call(g("builtins", "set"), b"]" + tower + b"a")))
    yield "a value of 2^60 parts.pt", archive(pkl(b"}" + text("a") + tower + b"s"))
    yield "a counter of 2^60 parts.pt", archive(pkl(call(g("collections", "Counter"), b"]" + tower + b"a")))
    yield "dicts that double sixty times.pt", archive(pkl(dicts))
    yield "dicts that double beside.pt", archive(pkl(b"}(" + text("weight") + tensor() + text("a") + dicts + b"u"))
    for name, key in {
        "None": b"N",
        "a tuple": tup(num(1), text("a")),
        "a number": num(3),
        "half a character": text("\ud800"),
        "an escape": text("\x1b[2J"),
        "a very long name": text("x" * 100_000),
        "bytes": b"N",
        "a huge number": num(10**5000),
    }.items():
        yield f"{name} as a key.pt", archive(pkl(b"}" + key + tensor() + b"s"))
        yield f"{name} as a key beside.pt", archive(pkl(b"}(" + text("weight") + tensor() + key + num(1) + b"u"))
    for name, step in {
        "huge": num(10**5000),
        "negative": num(-1),
        "2^80": num(1 << 80),
        "NaN": b"G" + struct.pack(">d", float("nan")),
        "text": text("x" * 1000),
        "a dict": b"}",
        "a tensor": tensor(),
        "a tensor of one": tensor((1,), (1,)),
    }.items():
        yield f"a step that is {name}.pt", archive(pkl(items((text("step"), step), (text("model"), state()))))
