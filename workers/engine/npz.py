"""Arrays of an .npz file, opened without reading them: headers are checked, data is mapped.

Pickles are never read. What an .npz stores plainly is mapped in place; what it stores deflated is
unpacked first, into memory where it is small and else into a scratch file.
"""

import re
import struct
import tempfile
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib import format as npy

from app.domain.problems import WorkError
from workers.engine.archives import BROKEN, Limits, corrupt, zip_members
from workers.engine.samples import Array

MAX_ARRAYS = 1000
IN_MEMORY_BYTES = 64 * 2**20
_SPLIT = re.compile(r"^(x|y)_(train|calibration|test)(?::(.+))?$")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class Split:
    """Arrays of one split: features by name ("x" where the file names no input), and labels."""

    features: dict[str, Array]
    labels: Array | None

    @property
    def samples(self) -> int:
        return len(next(iter(self.features.values())))


def open_arrays(path: Path, max_bytes: int) -> dict[str, Array]:
    """Name -> array of an .npz file, mapped where that is possible.

    Raises WorkError `corrupt_file`, `unsafe_archive`, `pickled_array` or `tensor_type`.
    """
    limits = Limits(members=MAX_ARRAYS, total_bytes=max_bytes)
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            zip_members(archive, path.stat().st_size, limits)
            return {
                info.filename.removesuffix(".npy"): _array(path, archive, raw, info)
                for info in archive.infolist()
                if not info.is_dir()
            }
    except BROKEN as error:
        raise corrupt(path.name, error) from None


def _array(path: Path, archive: zipfile.ZipFile, raw: IO[bytes], info: zipfile.ZipInfo) -> Array:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        shape, fortran, dtype = _header(member, name)
        header = member.tell()
    count = 1
    for size in shape:
        count *= size
    stored = info.compress_type == zipfile.ZIP_STORED
    if stored and info.compress_size != info.file_size:
        raise zipfile.BadZipFile("a stored member has two sizes")
    if count * dtype.itemsize + header != info.file_size:
        raise WorkError(
            "corrupt_file",
            f"the array '{name}' should hold {count * dtype.itemsize} bytes by its header,"
            f" and holds {info.file_size - header}",
            "Write the .npz file again.",
        )
    order: Literal["C", "F"] = "F" if fortran else "C"
    if not count:
        return np.empty(shape, dtype)
    if stored:
        start = _data_offset(raw, info) + header
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)
    with archive.open(info) as member:
        if info.file_size <= IN_MEMORY_BYTES:
            return np.asarray(npy.read_array(member, allow_pickle=False))
        return _spill(member, header, dtype, shape, order)


def _header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(member)
    except (SyntaxError, tokenize.TokenError, RecursionError, TypeError) as error:
        # The header is Python source; numpy tells of some damage to it as of source.
        raise ValueError(f"the header of '{name}' cannot be read: {error}") from None
    if dtype.hasobject:
        raise WorkError(
            "pickled_array",
            f"the array '{name}' holds pickled Python objects, which are never loaded",
            "Convert it to a numeric type, for example `np.stack(list).astype(np.float32)`.",
        )
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise WorkError(
            "tensor_type",
            f"the array '{name}' is of type {dtype}",
            "Use numbers: float, integer or bool; turn class names into indices 0, 1, 2 …",
        )
    return shape, fortran, dtype


def _data_offset(raw: IO[bytes], info: zipfile.ZipInfo) -> int:
    raw.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile("a member does not start where the directory says")
    return int(info.header_offset + _LOCAL_HEADER.size + name + extra)


def _spill(
    member: IO[bytes],
    skip: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: Literal["C", "F"],
) -> Array:
    """A deflated array in a scratch file that is gone when the array is."""
    member.read(skip)
    with tempfile.TemporaryFile() as scratch:
        while chunk := member.read(1 << 22):
            scratch.write(chunk)
        scratch.flush()
        return np.memmap(scratch, dtype=dtype, mode="r", shape=shape, order=order)


def splits_of(arrays: Mapping[str, Array]) -> dict[str, Split]:
    """Group arrays by the contract's names. Raises `unknown_array`, `shape_mismatch`,
    `empty_dataset` naming the array."""
    named = {name: match for name in arrays if (match := _SPLIT.match(name))}
    grouped: dict[str, dict[str, dict[str, Array]]] = {}
    if named:
        for name, array in arrays.items():
            match = named.get(name)
            if match is None or (match[1] == "y" and match[3]):
                raise _unknown(
                    name, "x_train, y_train, x_calibration, x_test, y_test or x_test:NAME"
                )
            split = grouped.setdefault(match[2], {"x": {}, "y": {}})
            split[match[1]][match[3] or match[1]] = array
    else:
        features = {name: array for name, array in arrays.items() if name != "y"}
        if "x" in features and len(features) > 1:
            other = next(name for name in features if name != "x")
            raise _unknown(other, "x and y, or one array per input name, or x_train, x_test …")
        labels = {"y": arrays["y"]} if "y" in arrays else {}
        grouped["all"] = {"x": features, "y": labels}
    splits = {}
    for name, group in grouped.items():
        labels_array = group["y"].get("y")
        _check_counts(name, group["x"], labels_array)
        splits[name] = Split(dict(sorted(group["x"].items())), labels_array)
    _check_alike(splits)
    return splits


def _unknown(name: str, known: str) -> WorkError:
    return WorkError(
        "unknown_array", f"the .npz file holds an array '{name}'", f"Name its arrays {known}."
    )


def _title(kind: str, split: str) -> str:
    return kind if split == "all" else f"{kind}_{split}"


def _check_counts(split: str, features: dict[str, Array], labels: Array | None) -> None:
    if not features:
        raise WorkError(
            "empty_dataset",
            f"the .npz file holds no feature array {_title('x', split)}",
            "Name the samples x, or x_train and x_test.",
        )
    counts = {}
    for name, array in {**features, **({} if labels is None else {"y": labels})}.items():
        if array.ndim == 0:
            raise WorkError(
                "shape_mismatch",
                f"the array '{name}' is a single number",
                "The first axis of each array counts samples.",
            )
        counts[_title(name, split)] = len(array)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"'{name}' has {count}" for name, count in counts.items())
        raise WorkError(
            "shape_mismatch",
            f"the arrays of one split have different numbers of samples: {told}",
            "The first axis counts samples and must agree.",
        )
    if not next(iter(counts.values())):
        raise WorkError(
            "empty_dataset",
            f"{_title('x', split)} holds no sample",
            "The first axis of each array counts samples; give at least one.",
        )


def _check_alike(splits: dict[str, Split]) -> None:
    first_name, first = next(iter(splits.items()))
    for name, split in splits.items():
        shapes = {key: array.shape[1:] for key, array in split.features.items()}
        expected = {key: array.shape[1:] for key, array in first.features.items()}
        if shapes != expected:
            raise WorkError(
                "shape_mismatch",
                f"the splits '{first_name}' and '{name}' differ in their features:"
                f" {expected} and {shapes}",
                "All splits need the same feature names and shapes.",
            )
