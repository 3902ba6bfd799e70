"""Files of `torch.save` as plain objects and numpy arrays, without torch and without trust.

Such a file is a zip: `data.pkl` says which objects there are and names the storages of tensors, one
entry each, raw. A pickle may call whatever it names, so this one may name only what a dump of
SGLang's recorder needs (numbers, text, lists, dicts, tensors of integers); the rest is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

#: Storage class of torch -> its numbers, as numpy names them.
_STORAGES: Final = {
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "i2",
    "IntStorage": "i4",
    "LongStorage": "i8",
}


def load(path: Path) -> object:
    """What was given to `torch.save`, tensors as read-only arrays.

    Tensors of a GPU are read like any other; where they were does not matter.

    Args:
        path: A file in torch's zip format (the default since torch 1.6).

    Raises:
        PredictorsError: It is no such file, is damaged, or holds anything else than numbers, text,
            lists, dicts and tensors of integers.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _Unpickler(path, archive, name.removesuffix("data.pkl")).load()
    except (PredictorsError, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise PredictorsError(
            f"{path} is no whole zip file ({error}); allowed: what torch.save writes. Was it "
            "copied before it was complete?"
        ) from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises nearly anything
        raise PredictorsError(
            f"{path} is damaged or no file of torch.save ({type(error).__name__}: {error}); "
            "allowed: what torch.save writes. Copy or record it again"
        ) from None


class _Unpickler(pickle.Unpickler):
    """Builds arrays instead of tensors, and refuses every other name."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(_entry(archive, folder + "data.pkl")))
        self._path, self._archive, self._folder = path, archive, folder
        self._storages: dict[str, NDArray[Any]] = {}
        self._order = "<"
        if folder + "byteorder" in archive.namelist():  # older files lack it; all were little
            self._order = {b"little": "<", b"big": ">"}[_entry(archive, folder + "byteorder")]

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Stand-ins for the few names that a file of tensors needs.

        None of them does more than build a view or a dict, whatever a pickle calls it with.
        """
        name = f"{module_name}.{global_name}"
        if name == "torch._utils._rebuild_tensor_v2":
            return self.tensor
        if name == "collections.OrderedDict":  # of a tensor's hooks, always empty
            return dict
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        raise PredictorsError(
            f"{self._path} names {name}, which reading it would run or build; allowed: tensors of "
            "integers, lists, dicts, numbers and text. Use only dumps of SGLang's expert "
            "distribution recorder from a source that you trust"
        )

    def persistent_load(self, pid: Any) -> NDArray[Any]:  # noqa: ANN401 - whatever the file says
        """The storage that `pid` names, a flat array."""
        _, kind, key, _, count = pid
        if key not in self._storages:
            raw = _entry(self._archive, f"{self._folder}data/{key}")
            storage = np.frombuffer(raw, dtype=self._order + kind)
            if len(storage) != count:
                raise ValueError(f"storage {key} has {len(storage)} numbers instead of {count}")
            self._storages[key] = storage
        return self._storages[key]

    def tensor(
        self,
        storage: NDArray[Any],
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: object,
    ) -> NDArray[Any]:
        """A view of a storage; what stands behind the strides (gradients, hooks) is left out."""
        if storage.ndim != 1 or not storage.flags.c_contiguous:
            raise ValueError("a tensor of a tensor")  # its end would not be where len() says
        if min((offset, *shape, *strides)) < 0:
            raise ValueError(f"a tensor has offset {offset}, shape {shape}, strides {strides}")
        steps = list(zip(shape, strides, strict=True))
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in steps)
        # views stay inside their storage; one that repeats numbers could fill the memory later
        if count and (last >= len(storage) or count > len(storage)):
            raise ValueError(f"a tensor of shape {shape} does not fit {len(storage)} numbers")
        return np.lib.stride_tricks.as_strided(
            storage[offset:] if count else storage[:0],
            shape,
            [step * storage.itemsize for step in strides],
            writeable=False,
        )


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    # torch never compresses; so an entry takes no more memory than the file has bytes
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(info)
