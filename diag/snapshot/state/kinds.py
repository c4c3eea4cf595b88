"""How each kind of Python object is kept and put back, in place: the object stays the same, its contents return.

`Kept(value)` reads what is in `value`; `same()` says whether that is still in it, `put_back()` puts it in again.
`items()` are the objects inside by place, and `put(place, item)` replaces one of them for a while.
"""

from __future__ import annotations

import array
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, MutableMapping
from operator import is_
from typing import Any


class Kept:
    """One object and what was in it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.saved = self.read()

    def read(self) -> Any:
        """What is in the object now."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Make it hold again what it held."""
        raise NotImplementedError

    def same(self) -> bool:
        """Whether the same objects are in the same places."""
        now = self.read()
        return len(now) == len(self.saved) and all(map(is_, now, self.saved))

    def looks_the_same(self) -> bool:
        """The same as far as a quick look tells."""
        return self.same()

    def items(self) -> Iterable[tuple[Any, Any]]:
        """(place, object) of all that is inside."""
        return enumerate(self.saved)

    def put(self, place: Any, item: Any) -> bool:
        """Put another object in a place; False where that cannot be done."""
        return False


class Items(Kept):
    """A list and its items."""

    def read(self) -> Any:
        return list(self.value)

    def put_back(self) -> None:
        list.__setitem__(self.value, slice(None), self.saved)

    def put(self, place: Any, item: Any) -> bool:
        list.__setitem__(self.value, place, item)
        return True


class Queue(Kept):
    """A deque and its items."""

    def read(self) -> Any:
        return list(self.value)

    def put_back(self) -> None:
        self.value.clear()
        self.value.extend(self.saved)

    def put(self, place: Any, item: Any) -> bool:
        self.value[place] = item
        return True


class Fixed(Kept):
    """What cannot change but may hold what can: a tuple, a frozen set."""

    def read(self) -> Any:
        return tuple(self.value)

    def put_back(self) -> None:
        pass

    def same(self) -> bool:
        return True


class Members(Kept):
    """A set and its members."""

    def read(self) -> Any:
        return set(self.value)

    def same(self) -> bool:
        return {id(x) for x in self.value} == {id(x) for x in self.saved}

    def put_back(self) -> None:
        self.value.clear()
        self.value.update(self.saved)


class Entries(Kept):
    """A dict, in its order. `skip`: keys that are left alone."""

    skip: frozenset[Any] = frozenset()

    def read(self) -> Any:
        if type(self.value) is dict and not self.skip:
            return self.value.copy()
        # A subclass may make something else of its entries when it is asked for them.
        kind = OrderedDict if isinstance(self.value, OrderedDict) else dict
        return {k: v for k, v in kind.items(self.value) if k not in self.skip}

    def same(self) -> bool:
        now = self.read()
        values = map(is_, now.values(), self.saved.values())
        return len(now) == len(self.saved) and all(map(is_, now, self.saved)) and all(values)

    def put_back(self) -> None:
        kind = OrderedDict if isinstance(self.value, OrderedDict) else dict
        others = [(k, v) for k, v in dict.items(self.value) if k in self.skip] if self.skip else []
        kind.clear(self.value)
        for key, item in (*others, *self.saved.items()):
            kind.__setitem__(self.value, key, item)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self.saved.items()

    def put(self, place: Any, item: Any) -> bool:
        dict.__setitem__(self.value, place, item)
        return True


EMPTIED = (dict, OrderedDict, list, set)


class Empty(Kept):
    """Lists, dicts and sets that hold nothing, of which a network of many modules has many."""

    def read(self) -> Any:
        return [value for value in self.value if value]

    def same(self) -> bool:
        return not any(self.value)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ()

    def put_back(self) -> None:
        for value in self.value:
            value.clear()


class Attributes(Entries):
    """The attributes of an object, its `__dict__` given; those of `skip` are left alone.

    Attributes that are there before and after stay in the dict, so that nothing sees an object without them.
    """

    def __init__(self, value: dict[str, Any], skip: frozenset[str] = frozenset()) -> None:
        self.skip = skip
        super().__init__(value)

    def put_back(self) -> None:
        for name in self.read():
            if name not in self.saved:
                del self.value[name]
        self.value.update(self.saved)


class Names(Kept):
    """Some names of a namespace: the globals that a function uses, the attributes of a class."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__(owner)

    def _space(self) -> Mapping[str, Any]:
        return self.value if isinstance(self.value, dict) else vars(self.value)

    def read(self) -> Any:
        space = self._space()
        return [space.get(name, _GONE) for name in self.names]

    def put_back(self) -> None:
        for name, item in zip(self.names, self.saved, strict=True):
            if self._space().get(name, _GONE) is not item:
                self.put(name, item)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ((n, v) for n, v in zip(self.names, self.saved, strict=True) if v is not _GONE)

    def put(self, place: Any, item: Any) -> bool:
        if isinstance(self.value, MutableMapping):
            self.value[place] = item
        else:
            setattr(self.value, place, item)
        return True


_GONE = object()


class Slots(Kept):
    """The attributes of an object that are in `__slots__`."""

    def __init__(self, value: Any, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__(value)

    def read(self) -> Any:
        return [getattr(self.value, name, _GONE) for name in self.names]

    def put_back(self) -> None:
        for name, item in zip(self.names, self.saved, strict=True):
            if item is not _GONE:
                object.__setattr__(self.value, name, item)
            elif hasattr(self.value, name):
                object.__delattr__(self.value, name)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ((n, v) for n, v in zip(self.names, self.saved, strict=True) if v is not _GONE)

    def put(self, place: Any, item: Any) -> bool:
        object.__setattr__(self.value, place, item)
        return True


class Cell(Kept):
    """A variable that a function has from around it."""

    def read(self) -> Any:
        try:
            return [self.value.cell_contents]
        except ValueError:  # not bound yet
            return []

    def put_back(self) -> None:
        if self.saved:
            self.value.cell_contents = self.saved[0]
        else:
            del self.value.cell_contents

    def put(self, place: Any, item: Any) -> bool:
        self.value.cell_contents = item
        return True


class Plain(Kept):
    """An object that refers to no others: bytes, numbers, the state of a random number generator."""

    def same(self) -> bool:
        return bool(self.read() == self.saved)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ()


class Raw(Plain):
    """A bytearray or array.array."""

    def read(self) -> Any:
        return self.value[:]

    def put_back(self) -> None:
        self.value[:] = self.saved


CONTENTS: tuple[tuple[type | tuple[type, ...], type[Kept]], ...] = (
    (list, Items),
    (dict, Entries),
    (set, Members),
    (deque, Queue),
    ((tuple, frozenset), Fixed),
    ((bytearray, array.array), Raw),
    (types.CellType, Cell),
)
