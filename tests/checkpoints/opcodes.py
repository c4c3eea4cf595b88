"""Pickles and torch files written opcode by opcode, as no pickler would write them."""

import io
import pickle
import struct
import warnings
import zipfile

import torch

SHAPE, NUMEL = (3, 4), 12
LEGACY = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}})


# Pickles, opcode by opcode


def g(module, name):
    return f"c{module}\n{name}\n".encode()


def num(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data)) + data


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def tup(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(function, *arguments):
    return function + tup(*arguments) + b"R"


def items(*pairs):
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def pkl(body):
    return b"\x80\x02" + body + b"."


def storage(numel=NUMEL, key="0", kind="FloatStorage", location="cpu", legacy=False):
    more = (b"N",) if legacy else ()
    return tup(text("storage"), g("torch", kind), text(key), text(location), num(numel), *more) + b"Q"


def tensor(size=SHAPE, stride=None, offset=0, of=None):
    stride = [NUMEL // SHAPE[0], 1][-len(size) :] if stride is None else stride
    hooks = call(g("collections", "OrderedDict"))
    sizes = (tup(*map(num, size)), tup(*map(num, stride)))
    return call(g("torch._utils", "_rebuild_tensor_v2"), of or storage(), num(offset), *sizes, b"\x89", hooks)


def state(**more):
    return items((text("weight"), tensor()), *((text(k), v) for k, v in more.items()))


# Files


def archive(pickled, storages=None, compress=False, names=("data.pkl",)):
    """A torch file with this pickle and these storages (by default the one of `tensor`)."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            file.writestr(f"archive/{name}", pickled)
        file.writestr("archive/version", "3\n")
        for key, data in ({"0": bytes(4 * NUMEL)} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", data)
    return out.getvalue()


def legacy(body, keys=("0",), storages=None):
    """A file as torch wrote it before version 1.6."""
    listed = b"](" + b"".join(map(text, keys)) + b"e"
    data = b"".join(pickle.dumps(part, 2) for part in LEGACY) + pkl(body) + pkl(listed)
    return data + (struct.pack("<q", NUMEL) + bytes(4 * NUMEL) if storages is None else storages)


def saved(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()
