"""
Unpicklers that build data and run nothing.

A pickle is a program. The one here for arrays executes the part of the language that builds
numbers, text, plain containers and numeric arrays; the one for storages builds nothing at all and
only looks at how much memory the tensors of a PyTorch file would ask for.
"""

import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar

import numpy as np

_SCALARS = (str, bytes, int, float, type(None))
_NUMERIC_DTYPE = "?bBhHiIlLqQefdFD"


class ForeignGlobalError(pickle.UnpicklingError):
    """The pickle asks for a global that is not admitted; its argument is the name."""


class AbsurdSizeError(pickle.UnpicklingError):
    """The pickle asks for more memory than its file has bytes; its argument says for what."""


class Inert:
    """
    What stands for an object that is not needed: takes all state and items, and keeps none.

    Attributes:
        full_name: module and name of what it stands for.
    """

    full_name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _StrictUnpickler(pickle._Unpickler):
    """
    Same as :class:`pickle.Unpickler`, but without what makes a small file slow or large.

    It is the implementation in Python, not the one in C: that one reserves memory for any memo
    index a damaged file may name, and a few thousand opcodes per file need no speed.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch}

    def _check_build(self, target: Any, state: Any) -> bool:
        """Return whether ``target`` shall take ``state``; raise if it must not."""
        raise NotImplementedError

    def _build(self) -> None:
        if self._check_build(*self.stack[-2:]):
            _UNRESTRICTED[pickle.BUILD](self)
        else:
            self.stack.pop()

    def _bytearray(self) -> None:
        # The base class reserves the memory before it looks whether the file has as much.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        _UNRESTRICTED[pickle.SETITEM](self)

    def _setitems(self) -> None:
        items = self.pop_mark()
        _check_keys(items[::2])
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        _check_keys(items[::2])
        self.append(dict(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = _setitems
    dispatch[pickle.DICT[0]] = _dict


_UNRESTRICTED: dict[bytes, Callable[[Any], None]] = {
    code: pickle._Unpickler.dispatch[code[0]] for code in (pickle.BUILD, pickle.SETITEM)
}


def _check_keys(keys: Sequence[Any]) -> None:
    # Forty nested pairs of the same pair are a small file whose hash takes years.
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, _SCALARS) for part in parts):
            raise pickle.UnpicklingError(f"a {type(key).__name__} as the key of a dictionary")


class _ArrayType:
    """Stands for ``numpy.ndarray``, which called with a shape would reserve that much memory."""


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Protocol 2 has no bytes; Python 3 writes them as a call of this. Other codecs are not data.
    if encoding not in {"latin1", "latin-1"}:
        raise pickle.UnpicklingError(f"text encoded as {reprlib.repr(encoding)}")
    return text.encode("latin1")


def _numeric_dtype(name: str, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    # Arrays of objects or of structures are not weights, and NumPy trusts what fills them.
    text = name if isinstance(name, str) else ""
    digits = text.lstrip("<>=|")
    if not (text in set(_NUMERIC_DTYPE) or (digits[:1] in set("biufc") and digits[1:].isdigit())):
        raise pickle.UnpicklingError(
            f"an array of {reprlib.repr(name)}, which is not a number type"
        )
    # The pickle sets the byte order afterwards: never on the dtype that all of NumPy shares.
    return np.dtype(text, copy=True)


def _empty_array(kind: Any, shape: Any, typecode: Any) -> np.ndarray[Any, Any]:
    # NumPy always writes the shape (0,) here; the real one comes with the data.
    if kind is not _ArrayType or shape != (0,):
        raise pickle.UnpicklingError("an array that is made without its data")
    return np.ndarray((0,), "b")


_SCALAR = np.float32(0).__reduce__()[0]
_ARRAY_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_ADMITTED_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): _numeric_dtype,
    ("numpy", "ndarray"): _ArrayType,
} | {
    (f"numpy.{core}.{module}", name): builder
    for core in ("core", "_core")  # NumPy 2 renamed it
    for module, name, builder in (
        ("multiarray", "_reconstruct", _empty_array),
        ("multiarray", "scalar", _SCALAR),
        ("numeric", "_frombuffer", _ARRAY_FROM_BUFFER),
    )
}


class ArrayUnpickler(_StrictUnpickler):
    """Same as :class:`pickle.Unpickler`, but builds numeric arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the builder of an admitted global; raise :class:`ForeignGlobalError` for others."""
        try:
            return _ADMITTED_GLOBALS[module, name]
        except KeyError:
            raise ForeignGlobalError(f"{module}.{name}") from None

    def _check_build(self, target: Any, state: Any) -> bool:
        if isinstance(target, OrderedDict):
            return False  # attributes could hide its methods, and hold no weights
        if isinstance(target, np.dtype):
            _, byte_order, *rest = state
            if byte_order not in ("<", ">", "|", "=") or rest != [None, None, None, -1, -1, 0]:
                raise pickle.UnpicklingError(f"a number type with the state {reprlib.repr(state)}")
        elif not isinstance(target, np.ndarray):
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")
        return True


# Bytes of an element by the name of its storage class.
_ITEM_SIZES = {
    "torch.storage.UntypedStorage": 1,
    "torch.UntypedStorage": 1,
    **{
        f"torch.{name}Storage": size
        for size, names in {
            1: "Byte Char Bool QInt8 QUInt8 QUInt4x2 QUInt2x4",
            2: "Half BFloat16 Short",
            4: "Float Int QInt32",
            8: "Double Long ComplexFloat",
            16: "ComplexDouble",
        }.items()
        for name in names.split()
    },
}


class StorageScan(_StrictUnpickler):
    """
    Go through a pickle of PyTorch and refuse it if its tensors need more than the file holds.

    Nothing is built: globals become :class:`Inert`. PyTorch believes the element counts that are
    written there, reserves the memory, and reads beyond what it has.

    Args:
        file: positioned at the pickle.
        available: bytes that the file holds for a storage, by the storage's key.

    Attributes:
        claimed: bytes that the pickle asks for, by the storage's key.
    """

    def __init__(self, file: IO[bytes], available: Callable[[str], int]) -> None:
        super().__init__(file, encoding="latin1")
        self._available = available
        self.claimed: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return OrderedDict, or a class without any effect."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type("Inert", (Inert,), {"full_name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Check the size of a storage."""
        _, kind, key, _, count = pid[:5]
        size = _ITEM_SIZES.get(getattr(kind, "full_name", ""))
        if size is None or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage of unknown type or size")
        if count * size > self._available(str(key)):
            raise AbsurdSizeError(f"storage {reprlib.repr(key)} of {count * size} bytes")
        self.claimed[str(key)] = count * size
        return Inert()

    def _check_build(self, target: Any, state: Any) -> bool:
        # The versions of the modules are kept there; other attributes would hide its methods.
        if isinstance(target, OrderedDict) and set(state) - {"_metadata"}:
            raise pickle.UnpicklingError("attributes on a dictionary of tensors")
        return False
