"""What a pickle would make, found without making it, so that its sizes are known before anything is read.

The unpickler of torch (`weights_only`) lets no code run, and it does what a file says of sizes: a few bytes can ask
for gigabytes, for tensors beyond their storage (which then hold whatever lies in memory), or for keys that take for
ever to hash. Here the opcodes are followed on stand-ins (see `stand_ins`): numbers and texts are themselves,
everything else is a `PickledCall`, a `Global` or a `Stored`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from diag.checkpoints.stand_ins import (
    Global,
    Opaque,
    Pack,
    PickledCall,
    Refused,
    Stored,
    check_view,
    hashed_keys,
    hashing_weight,
    plain_text,
    refuse_heavy,
    stored_named,
)

MAKERS = {"torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.Tensor", "torch._C._TensorBase"}
HASHING = {"collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.dict", "builtins.frozenset"}
REBUILT = {"torch._utils." + name for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_qtensor")}
REBUILT_UNTYPED = "torch._utils._rebuild_tensor_v3"
SCALARS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"} | {
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class Readable(Protocol):
    """A file in memory: reading more than there is gives what there is."""

    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes, fewer at the end."""

    def readline(self) -> bytes:
        """The bytes up to the next line feed, included."""

    def tell(self) -> int:
        """How many bytes have been read."""


class Scan(NamedTuple):
    """What the pickle holds at its top, the storages it names, and how many bytes its byte arrays ask for."""

    value: Any
    stored: list[Stored]
    bytes_made: int


def scan(source: Readable) -> Scan:
    """Follow the pickle that begins where `source` stands, to its end.

    Raises Refused where it asks for memory that its file does not fill, or is not a whole pickle.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(source):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
    except Refused:
        raise
    except Exception as error:
        text = str(error).splitlines() or [type(error).__name__]
        raise Refused(f"is damaged ({text[0][:120]})") from None
    return Scan(machine.stack[-1] if machine.stack else None, machine.stored, machine.bytes_made)


class _Machine:
    """The stack machine of pickle on stand-ins."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.stored: list[Stored] = []
        self.bytes_made = self.steps = 0

    def step(self, name: str, argument: Any) -> None:
        self.steps += 1
        if name in SCALARS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        else:
            handler = HANDLERS.get(name)
            if handler is None:
                raise Refused(f"holds a pickle that could run code (Unsupported opcode {name})")
            handler(self, argument)

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def pack(self, items: Iterable[Any]) -> None:
        made = Pack(items)
        made.weight = min(1 + sum(map(hashing_weight, made)), 1 << 40)
        self.stack.append(made)

    def put(self, at: int) -> None:
        # A pickler numbers what it remembers; a reader in C makes room for every number up to this one.
        if at > self.steps:
            raise Refused("holds a pickle that asks for more memory than its file can fill (a memo entry)")
        self.memo[at] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        for key in items[::2]:
            refuse_heavy(key)

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, Global) else ""
        if isinstance(arguments, Pack):
            self.check_call(name, arguments)
        self.stack.append(PickledCall(name, arguments, 1 + hashing_weight(arguments)))

    def check_call(self, name: str, arguments: Pack) -> None:
        if name == "builtins.bytearray" and arguments and isinstance(arguments[0], int):
            self.bytes_made += max(arguments[0], 0)
        elif name in HASHING:
            for key in hashed_keys(arguments):
                refuse_heavy(key)
        elif arguments and (name in MAKERS or (name.startswith("torch.") and name.endswith(("Tensor", "Storage")))):
            raise Refused(f"makes a {name} of its own, whose memory nothing has written")
        elif name in REBUILT:
            check_view(arguments[0], arguments[1:4], None)
        elif name == REBUILT_UNTYPED:
            check_view(arguments[0], arguments[1:4], arguments[6])

    def persistent(self, _: Any) -> None:
        found = stored_named(self.stack.pop())
        self.stored.append(found)
        self.stack.append(found)


def _append_all(machine: _Machine, items: list[Any]) -> None:
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].extend(items)


def _named(machine: _Machine, argument: str) -> None:
    machine.stack.append(Global(argument.replace(" ", ".", 1).replace("__builtin__.", "builtins.")))


def _stack_named(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Global(f"{plain_text(module)}.{plain_text(name)}"))


def _pairs(machine: _Machine, _: Any) -> None:
    machine.set_items(machine.since_mark())


def _one_pair(machine: _Machine, _: Any) -> None:
    _, key = machine.stack.pop(), machine.stack.pop()
    refuse_heavy(key)


def _dict(machine: _Machine, _: Any) -> None:
    machine.set_items(machine.since_mark())
    machine.stack.append(Opaque())


def _set_of(machine: _Machine, _: Any) -> None:
    for key in machine.since_mark():
        refuse_heavy(key)


def _frozen(machine: _Machine, _: Any) -> None:
    _set_of(machine, _)
    machine.stack.append(Opaque())


def _last(number: int) -> Callable[[_Machine, Any], None]:
    def handler(machine: _Machine, _: Any) -> None:
        items, machine.stack[len(machine.stack) - number :] = machine.stack[-number:], []
        machine.pack(items)

    return handler


def _drop(machine: _Machine, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _called_by_name(machine: _Machine, _: Any) -> None:
    machine.stack.pop()  # the arguments by name
    machine.call(_)


HANDLERS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "STOP": lambda m, a: None,
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "POP": _drop,
    "POP_MARK": lambda m, a: m.since_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "EMPTY_TUPLE": lambda m, a: m.pack(()),
    "TUPLE": lambda m, a: m.pack(m.since_mark()),
    "TUPLE1": _last(1),
    "TUPLE2": _last(2),
    "TUPLE3": _last(3),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "LIST": lambda m, a: m.stack.append(m.since_mark()),
    "APPEND": lambda m, a: _append_all(m, [m.stack.pop()]),
    "APPENDS": lambda m, a: _append_all(m, m.since_mark()),
    "EMPTY_DICT": lambda m, a: m.stack.append(Opaque()),
    "DICT": _dict,
    "SETITEM": _one_pair,
    "SETITEMS": _pairs,
    "EMPTY_SET": lambda m, a: m.stack.append(Opaque()),
    "ADDITEMS": _set_of,
    "FROZENSET": _frozen,
    "GLOBAL": _named,
    "STACK_GLOBAL": _stack_named,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _called_by_name,
    "BUILD": lambda m, a: m.stack.pop(),
    "BINPERSID": _Machine.persistent,
    "PUT": lambda m, a: m.put(a),
    "BINPUT": lambda m, a: m.put(a),
    "LONG_BINPUT": lambda m, a: m.put(a),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "GET": lambda m, a: m.stack.append(m.memo[a]),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
}
