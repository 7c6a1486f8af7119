"""Reads a pickle as data: nothing that it names is imported, called or built.

Numbers, texts, bytes, lists, tuples and dictionaries become what they are. An object of any other
kind becomes an `Opaque`, which remembers its class's name and, where it is filled like a
dictionary, its items. A caller may translate calls of a few names, as PyTorch's tensors are.

The opcodes are decoded by the standard library's `pickletools.genops`, which only reads them.
"""

import dataclasses
import io
import mmap
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Far above what a file of weights has; below what would take minutes or all memory to read.
MOST_OPERATIONS = 5_000_000


class Global(NamedTuple):
    """A class or function by its name, never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass
class Opaque:
    """An object that was not built: the name of what would build it, and items set on it."""

    kind: str
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)


Calls = Mapping[str, Callable[..., Any]]

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = ("PROTO", "FRAME", "STOP")


def load(
    stream: io.BufferedIOBase | mmap.mmap, calls: Calls, persistent: Callable[[Any], Any]
) -> Any:
    """The value of the next pickle of a stream, which is left behind its end.

    `calls` maps names such as "collections.OrderedDict" to what stands for a call of them;
    `persistent` turns persistent ids into values. ValueError, IndexError, KeyError, TypeError or
    another exception of `calls` where the pickle makes no sense.
    """
    machine = _Machine(calls, persistent)
    # It wants read, readline and tell, as both have.
    readable: Any = stream
    for count, (opcode, argument, _) in enumerate(pickletools.genops(readable)):
        if count >= MOST_OPERATIONS:
            raise ValueError(f"more than {MOST_OPERATIONS} operations")
        machine.execute(opcode.name, argument)
    (value,) = machine.stack
    return value


class _Machine:
    """The pickle machine, without what imports and calls."""

    def __init__(self, calls: Calls, persistent: Callable[[Any], Any]):
        self.stack: list[Any] = []
        self._calls, self._persistent = calls, persistent
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        """One operation; `argument` is what genops decoded of it."""
        stack = self.stack
        if name in _NOTHING:
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif hasattr(self, f"on_{name.lower()}"):
            getattr(self, f"on_{name.lower()}")()
        elif name == "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        elif name in ("INST", "EXT1", "EXT2", "EXT4"):
            if name == "INST":
                self._marked()
            stack.append(Opaque(str(argument)))
        elif argument is not None:
            # Numbers, texts and bytes: genops has decoded them.
            stack.append(argument)
        else:
            raise ValueError(f"the operation {name} has no place in a file")

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _marked(self) -> list[Any]:
        """Pops the values above the last mark."""
        return self._take(len(self.stack) - self._marks.pop())

    # One method for each opcode that has no argument, by its name.

    def on_mark(self) -> None:
        self._marks.append(len(self.stack))

    def on_pop(self) -> None:
        if self._marks and self._marks[-1] == len(self.stack):
            self._marks.pop()
        else:
            self._take(1)

    def on_pop_mark(self) -> None:
        self._marked()

    def on_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def on_list(self) -> None:
        self.stack.append(self._marked())

    def on_frozenset(self) -> None:
        self.on_list()

    def on_tuple(self) -> None:
        self.stack.append(tuple(self._marked()))

    def on_dict(self) -> None:
        items = self._marked()
        self.stack.append({})
        self._set(items)

    def on_append(self) -> None:
        self._extend(self._take(1))

    def on_appends(self) -> None:
        self._extend(self._marked())

    def on_additems(self) -> None:
        self._extend(self._marked())

    def _extend(self, values: Sequence[Any]) -> None:
        target = self.stack[-1]
        # Of any other object nothing but its items is kept.
        if isinstance(target, list):
            target.extend(values)

    def on_setitem(self) -> None:
        self._set(self._take(2))

    def on_setitems(self) -> None:
        self._set(self._marked())

    def _set(self, flat: Sequence[Any]) -> None:
        """Keys and values in turn, into the dictionary on top."""
        target = self.stack[-1]
        items = target.items if isinstance(target, Opaque) else target
        if not isinstance(items, dict) or len(flat) % 2:
            raise ValueError("items are set on what is no dictionary")
        items.update((_key(key), value) for key, value in zip(flat[::2], flat[1::2], strict=True))

    def on_stack_global(self) -> None:
        module, name = self._take(2)
        self.stack.append(Global(str(module), str(name)))

    def on_reduce(self) -> None:
        function, arguments = self._take(2)
        call = self._calls.get(str(function)) if isinstance(function, Global) else None
        self.stack.append(Opaque(_kind(function)) if call is None else call(*arguments))

    def on_newobj(self) -> None:
        self._opaque(2)

    def on_newobj_ex(self) -> None:
        self._opaque(3)

    def on_obj(self) -> None:
        kind, *_ = self._marked()
        self.stack.append(Opaque(_kind(kind)))

    def _opaque(self, count: int) -> None:
        kind, *_ = self._take(count)
        self.stack.append(Opaque(_kind(kind)))

    def on_build(self) -> None:
        # A state is what an object would do something with.
        self._take(1)

    def on_binpersid(self) -> None:
        (identity,) = self._take(1)
        self.stack.append(self._persistent(identity))


def _kind(function: Any) -> str:
    if isinstance(function, Global):
        return str(function)
    return function.kind if isinstance(function, Opaque) else type(function).__name__


def _key(key: Any) -> Any:
    """A key whose hash nobody can choose at will: long numbers and the like become texts."""
    if isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**60):
        return key
    return f"{type(key).__name__} {key!r}"[:100] if isinstance(key, float | bytes) else _kind(key)
