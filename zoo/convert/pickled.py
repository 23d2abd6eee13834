"""The tensors of a PyTorch file (`*.bin`, `*.pth`), without PyTorch and without running anything.

`torch.save` writes a zip archive: a pickle that describes the tensors, and one entry of raw bytes
per storage. A pickle is a program; here it is interpreted by a machine that knows the few
instructions that describe tensors, containers and plain values. Names are never imported: the ones
that a state dict needs are symbols, any other name is refused before anything has been built.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zoo.convert.tensor import Span, Tensor, fits
from zoo.models.core.errors import ZooError

_STORAGES = {
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
}
_DTYPES = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "int8": np.int8,
    "uint16": np.uint16,
    "int16": np.int16,
    "uint32": np.uint32,
    "int32": np.int32,
    "uint64": np.uint64,
    "int64": np.int64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


@dataclass(frozen=True)
class _Name:
    """A global name that a state dict may contain: a symbol, never the object itself."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Raw bytes in the archive, and the elements that its type says they are."""

    span: Span
    dtype: np.dtype | None


_KNOWN = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in (*_STORAGES, *_DTYPES)),
    }
)
_MARK = object()


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, unread.

    Raises:
      ZooError: the file is damaged, in the form of before PyTorch 1.6, or holds anything that is
        not a state dict of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            spans = _entries(file, archive)
            names = [name for name in spans if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise _bad(file, f"want one data.pkl in the archive, found {len(names)}")
            root = names[0].removesuffix("data.pkl")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in spans else b"little"
            if order != b"little":
                raise _bad(file, f"its byte order is {order!r}: want little")
            program = archive.read(names[0])  # the library checks its checksum
    except (OSError, zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        raise _bad(file, _not_an_archive(file, error)) from error
    state = _Machine(file, root, spans).run(program)
    if not isinstance(state, dict) or not state:
        raise _bad(file, f"want a state dict, {{name: tensor}}, found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _bad(file, f"{name!r} is {type(value).__name__}: want a tensor")
    return dict(state)


class _Machine:
    """Interprets the instructions of a pickle that describe a state dict."""

    def __init__(self, file: Path, root: str, spans: dict[str, Span]):
        self._file = file
        self._root = root
        self._spans = spans
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The object that `program` describes.

        All names in it are checked before its first instruction.
        """
        try:
            steps = [(code.name, argument) for code, argument, _ in pickletools.genops(program)]
            for name, argument in steps:
                if name not in _STEPS:
                    raise _bad(self._file, f"{name} is no instruction that describes tensors")
                if name == "GLOBAL":
                    self._symbol(argument.replace(" ", "."))
            for name, argument in steps:
                _STEPS[name](self, argument)
            (found,) = self._stack
        except ZooError:
            raise
        except Exception as error:  # a broken program fails in as many ways as it has steps
            raise _bad(
                self._file, f"its description of the tensors is damaged ({error})"
            ) from error
        return found

    def _symbol(self, text: str) -> _Name:
        if text not in _KNOWN:
            raise _bad(
                self._file,
                f"it contains {text}, which is not needed for weights and may run code when it is "
                "opened; nothing was run. Ask for the weights as safetensors",
            )
        return _Name(text)

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def named(self, argument: str) -> None:
        self.push(self._symbol(argument.replace(" ", ".")))

    def named_by_stack(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.push(self._symbol(f"{_want(module, str)}.{_want(name, str)}"))

    def pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1 - self._stack[::-1].index(_MARK)
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self.push(items)

    def put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def get(self, place: int) -> None:
        self.push(self._memo[place])

    def append(self, items: list[Any]) -> None:
        _want(self._stack[-1], list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        # The hash of a tuple of tuples of the same tuples, and so on, takes forever.
        for key in items[::2]:
            _want(key, (str, int))
        _want(self._stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))

    def build(self, _: None) -> None:
        """Attributes of a state dict, such as the versions of its modules: not needed."""
        self._stack.pop()
        _want(self._stack[-1], dict)

    def storage(self, _: None) -> None:
        kind, of, key, _, count = _want(self._stack.pop(), tuple)
        name = _want(of, _Name).text.removeprefix("torch.")
        span = self._spans.get(f"{self._root}data/{_want(key, str)}")
        if kind != "storage" or span is None:
            raise _bad(self._file, f"the storage {key!r} of a tensor is not in the archive")
        dtype = np.dtype(_STORAGES[name]) if name in _STORAGES else None
        need = count * (dtype.itemsize if dtype else 1)
        if type(count) is not int or need > span.length:
            raise _bad(self._file, f"storage {key!r} has {span.length:,} bytes instead of {need:,}")
        self.push(_Storage(span, dtype))

    def reduce(self, _: None) -> None:
        arguments, function = _want(self._stack.pop(), tuple), _want(self._stack.pop(), _Name).text
        match function.rpartition(".")[2]:
            case "OrderedDict" if not arguments:
                self.push({})
            case "_rebuild_parameter":
                self.push(_want(arguments[0], Tensor))
            case "_rebuild_tensor_v2":
                self.push(self._tensor(*arguments[:4], None))
            case "_rebuild_tensor_v3":
                dtype = _DTYPES[_want(arguments[6], _Name).text.removeprefix("torch.")]
                self.push(self._tensor(*arguments[:4], np.dtype(dtype)))
            case _:
                raise _bad(self._file, f"it calls {function}, which makes no tensor")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None
    ) -> Tensor:
        dtype = dtype or _want(storage, _Storage).dtype
        if dtype is None:
            raise _bad(self._file, "a tensor without a dtype")
        numbers = (offset, *_want(shape, tuple), *_want(strides, tuple))
        for number in numbers:
            _want(number, int)
        count = storage.span.length // dtype.itemsize
        good = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
        if not good or not fits(shape, strides, offset, count):
            raise _bad(
                self._file,
                f"a tensor of shape {shape}, strides {strides} and offset {offset} does not lie in "
                f"its storage of {count} elements",
            )
        rows = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        plain = strides == rows or 0 in shape
        return Tensor(shape, dtype, storage.span, offset, None if plain else strides)


Step = Callable[[_Machine, Any], None]

_STEPS: dict[str, Step] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "STOP": lambda m, a: None,
    "MARK": lambda m, a: m.push(_MARK),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "TUPLE": lambda m, a: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "APPEND": lambda m, a: m.append([m._stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "SETITEM": lambda m, a: m.set_items([m._stack.pop(), m._stack.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_by_stack,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "MEMOIZE": _Machine.put,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"),
        ),
        _Machine.push,
    ),
}


def _want(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        due = " or ".join(each.__name__.strip("_") for each in kinds)
        raise TypeError(f"{type(value).__name__} where {due} is due")
    return value


def _entries(file: Path, archive: zipfile.ZipFile) -> dict[str, Span]:
    """Where the bytes of every entry are; all are stored as they are, not compressed."""
    spans: dict[str, Span] = {}
    size = file.stat().st_size
    with open(file, "rb") as data:
        for entry in archive.infolist():
            if entry.filename in spans:
                raise _bad(file, f"{entry.filename} is twice in the archive")
            data.seek(entry.header_offset)
            header = data.read(30)
            name, extra = struct.unpack("<26xHH", header)
            start = entry.header_offset + 30 + name + extra
            stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
            if not stored or start + entry.file_size > size:
                raise _bad(file, f"{entry.filename} is compressed, encrypted or cut off")
            spans[entry.filename] = Span(file, start, entry.file_size, entry.CRC)
    return spans


def _not_an_archive(file: Path, error: Exception) -> str:
    try:
        with open(file, "rb") as data:
            first = data.read(2)
    except OSError as fault:
        return str(fault.strerror)
    if first[:1] == b"\x80":
        return (
            "it is a bare pickle, as PyTorch wrote before version 1.6, which cannot be opened "
            "without running what it says; load it with PyTorch where that is safe and save it "
            "again, best as safetensors"
        )
    if first == b"PK":
        return f"it is truncated or damaged ({error})"
    return "it is no PyTorch checkpoint"


def _bad(file: Path, why: str) -> ZooError:
    return ZooError(f"{file} cannot be used: {why}")
