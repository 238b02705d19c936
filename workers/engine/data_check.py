"""The data check: ranges of features and findings that a user should know before optimizing.

Arrays are read in blocks of rows, so memory stays flat whatever the size of the dataset.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from app.domain.problems import Note
from workers.engine.samples import Array

BLOCK_BYTES = 32 * 2**20
MAX_CLASSES = 10_000
# Duplicates are looked for among so many samples of each split; hashing costs 1 s per GB.
MAX_HASHED = 100_000
MAX_HASHED_BYTES = 4 * 2**30
NAMED = 5


def blocks(array: Array) -> Iterator[Array]:
    """Consecutive rows of an array, about BLOCK_BYTES at a time."""
    row = max(1, array.nbytes // max(1, len(array)))
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, len(array), step):
        yield array[start : start + step]


@dataclass
class Summary:
    """Running figures of one feature over blocks; `low`/`high` per value where samples are flat,
    else per channel (the last axis)."""

    count: int = 0
    total: float = 0.0
    bad: int = 0
    low: Array | None = None
    high: Array | None = None

    def add(self, block: Array) -> None:
        if not block.size:
            return
        # Samples that are plain numbers have one column.
        rows = block.reshape(-1, block.shape[-1]) if block.ndim > 1 else block.reshape(-1, 1)
        values = rows
        if rows.dtype.kind == "f":
            finite = np.isfinite(rows)
            wrong = rows.size - int(np.count_nonzero(finite))
            self.bad += wrong
            if wrong:
                values = np.where(finite, rows, np.nan)
        with np.errstate(all="ignore"):
            low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
            self.total += float(np.nansum(values, dtype=np.float64))
        self.count += int(rows.size)
        self.low = low if self.low is None else np.fmin(self.low, low)
        self.high = high if self.high is None else np.fmax(self.high, high)

    def range(self) -> tuple[float | None, float | None, float | None]:
        """(min, max, mean) of the finite values; None where there is none."""
        finite = self.count - self.bad
        if finite <= 0 or self.low is None or self.high is None:
            return None, None, None
        low, high = float(np.nanmin(self.low)), float(np.nanmax(self.high))
        return low, high, self.total / finite

    def constant_columns(self) -> list[int]:
        if self.low is None or self.high is None:
            return []
        return [int(index) for index in np.flatnonzero(self.low == self.high)]


def summarize(arrays: Sequence[Array]) -> Summary:
    summary = Summary()
    for array in arrays:
        for block in blocks(array):
            summary.add(block)
    return summary


def feature_warnings(name: str, dtype: np.dtype[np.generic], summary: Summary) -> list[Note]:
    """Findings on one feature array."""
    notes = []
    if summary.bad:
        notes.append(
            Note(
                code="nan_or_inf",
                message=f"The feature '{name}' holds {summary.bad} NaN or infinite values.",
            )
        )
    low, high, _ = summary.range()
    constant = summary.constant_columns()
    if low is not None and low == high:
        notes.append(
            Note(
                code="constant_feature",
                message=f"The feature '{name}' has the same value, {low:g}, in all samples.",
            )
        )
    elif constant:
        shown = ", ".join(str(column) for column in constant[:NAMED])
        more = f" and {len(constant) - NAMED} more" if len(constant) > NAMED else ""
        notes.append(
            Note(
                code="constant_feature",
                message=f"In the feature '{name}' the columns (last axis) {shown}{more} have the"
                " same value in all samples.",
            )
        )
    looks_like_bytes = low is not None and high is not None and low >= 0 and 100 < high <= 255
    if dtype.kind == "f" and looks_like_bytes:
        notes.append(
            Note(
                code="unscaled_values",
                message=f"The values of '{name}' run from {low:g} to {high:g} and look like raw"
                " pixels; if the model was trained on scaled ones, give `preprocessing`, for"
                ' example {"scale": 0.00392157}.',
            )
        )
    return notes


@dataclass
class Labels:
    """What the labels of all splits say; `indices` holds classes by split, where they are."""

    classes: list[str] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    indices: dict[str, Array] = field(default_factory=dict)
    bad: int = 0


def read_labels(labels: Mapping[str, Array]) -> Labels:
    """Tell classes (integers, one-hot rows, or whole floats 0, 1, 2 …) from other targets."""
    result = Labels()
    if not labels:
        return result
    summary = summarize(list(labels.values()))
    result.low, result.high, _ = summary.range()
    result.bad = summary.bad
    if result.low is None or result.high is None or summary.bad:
        return result
    first = next(iter(labels.values()))
    width = int(np.prod(first.shape[1:], dtype=np.int64))
    if width > 1:
        if first.ndim == 2 and all(_is_one_hot(array) for array in labels.values()):
            result.classes = [str(index) for index in range(width)]
            result.indices = {name: array.argmax(axis=1) for name, array in labels.items()}
        return result
    flat = {name: np.asarray(array).reshape(-1) for name, array in labels.items()}
    values = np.unique(np.concatenate([np.unique(array) for array in flat.values()]))
    if len(values) > MAX_CLASSES:
        return result
    whole = first.dtype.kind in "biu" or np.array_equal(values, np.arange(len(values)))
    if whole and len(values) > 1:
        result.classes = [str(int(value)) for value in values]
        result.indices = {name: np.searchsorted(values, array) for name, array in flat.items()}
    return result


def _is_one_hot(array: Array) -> bool:
    return all(
        bool(np.isin(block, (0, 1)).all()) and bool((block.sum(axis=1) == 1).all())
        for block in blocks(array)
    )


def class_warnings(classes: Sequence[str], indices: Mapping[str, Array]) -> list[Note]:
    """Findings on how classes are spread over samples and splits."""
    if not classes or not indices:
        return []
    notes = []
    counts = {
        name: np.bincount(array, minlength=len(classes))
        for name, array in indices.items()
        if array.size
    }
    for name, count in counts.items():
        missing = [classes[index] for index in np.flatnonzero(count == 0).tolist()]
        if missing:
            notes.append(_missing(name, missing))
    numbers = [int(text) for text in classes if text.lstrip("-").isdigit()]
    if len(numbers) == len(classes):
        highest, held = max(numbers), {number for number in numbers if number >= 0}
        # Counted before they are listed: a single label may be as high as an integer goes.
        if 0 < highest + 1 - len(held) <= highest // 2:
            gaps = sorted(set(range(highest + 1)) - held)
            notes.append(_missing("all", [str(number) for number in gaps]))
    total = sum(counts.values(), np.zeros(len(classes), np.int64))
    top = int(total.argmax())
    share = float(total[top] / max(1, total.sum()))
    if share > (0.8 if len(classes) == 2 else 0.5):
        notes.append(
            Note(
                code="class_imbalance",
                message=f"Class '{classes[top]}' makes {share:.0%} of the labels, so a model that"
                " always answers it would look good.",
            )
        )
    return notes


def _missing(split: str, missing: Sequence[str]) -> Note:
    shown = ", ".join(f"'{name}'" for name in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    where = "The dataset" if split == "all" else f"The split '{split}'"
    return Note(code="missing_class", message=f"{where} has no sample of class {shown}{more}.")


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def row_digests(arrays: Sequence[Array]) -> set[bytes]:
    """Digests of whole samples (all features together) of one split, at most MAX_HASHED."""
    count = min(len(arrays[0]), MAX_HASHED)
    row = sum(array.nbytes // max(1, len(array)) for array in arrays)
    count = min(count, MAX_HASHED_BYTES // max(1, row))
    found = set()
    for index in range(count):
        parts = [np.ascontiguousarray(array[index]).tobytes() for array in arrays]
        found.add(digest(b"".join(parts)))
    return found


def duplicate_warnings(digests: Mapping[str, set[bytes]]) -> list[Note]:
    """Samples that stand in two splits, so that an evaluation would see what training saw."""
    names = list(digests)
    notes = []
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            shared = len(digests[first] & digests[second])
            if shared:
                notes.append(
                    Note(
                        code="duplicates_across_splits",
                        message=f"{shared} different samples of split '{first}' also stand in"
                        f" split '{second}'.",
                    )
                )
    return notes
