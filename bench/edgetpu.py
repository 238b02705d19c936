"""`python -m bench.edgetpu FOLDER`: the Edge TPU analysis against what the compiler really did.

FOLDER, with all folders below it, holds pairs `X.tflite` + `X_edgetpu.tflite`, or `X.tflite` +
`X.log` and the like (bench/edgetpu_truth.py tells which names count). A text that tells the
release of the compiler is predicted for that one, a model that was compiled into several parts
for the option for multiple subgraphs, and one that failed to compile must be predicted to fail.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from app.domain.edgetpu import DEFAULT_COMPILER, EdgeTpuAnalysis
from app.domain.problems import WorkError
from bench import edgetpu_truth
from bench.edgetpu_truth import Truth
from workers.engine import inspect_tflite
from workers.engine.targets.edgetpu import analyze


@dataclass(frozen=True)
class Score:
    """Of one model; memory in bytes, None where it is not known.

    `ops` is 0 for a model that the compiler refused: only its split counts, right where the
    refusal was foreseen.
    """

    name: str
    truth: str
    ops: int
    right: int
    wrong: list[str]
    split_right: bool
    estimated: int | None = None
    actual: int | None = None
    error: str | None = None


def score(source: Path, other: Path, compiler: str | None = None) -> Score:
    """How far the prediction for `source` agrees with its compiled file, log or output.

    `compiler`: the release to predict for, in place of the one that the text tells.
    """
    content = source.read_bytes()
    try:
        truth = _truth(source, other, content)
        return _scored(source.stem, other.name, content, truth, compiler)
    except (WorkError, ValueError) as error:
        told = f"{error.code}: {error.message}" if isinstance(error, WorkError) else str(error)
        return Score(source.stem, other.name, _operators(content), 0, [], False, error=told)


def pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every model under a folder with the most telling file about it."""
    for source in edgetpu_truth.models(folder):
        for best in edgetpu_truth.truths(source)[:1]:
            yield source, best


def _truth(source: Path, other: Path, content: bytes) -> Truth:
    if other.suffix == ".tflite":
        return edgetpu_truth.compiled(other, content)
    truth = edgetpu_truth.logged(other, source)
    if truth is None:
        raise ValueError(f"{other.name} holds nothing that the compiler prints")
    if truth.detail == "count":
        return truth
    # The .log has the table, what was printed beside it the number of parts and the sizes.
    texts = [path for path in edgetpu_truth.truths(source) if path.suffix != ".tflite"]
    printed = [edgetpu_truth.logged(path, source) for path in texts]
    parts = max([truth.parts, *(each.parts for each in printed if each is not None)])
    sizes = [each.parameter_bytes for each in (truth, *printed) if each is not None]
    size = next((size for size in sizes if size is not None), None)
    return replace(truth, parts=parts, parameter_bytes=size)


def _scored(name: str, other: str, content: bytes, truth: Truth, compiler: str | None) -> Score:
    release = compiler or truth.compiler or DEFAULT_COMPILER
    try:
        told = analyze(content, release, multiple_subgraphs=truth.parts > 1)
    except WorkError as error:
        if not truth.failed:
            raise
        return Score(name, other, 0, 0, [], error.code == "not_quantized")
    if truth.failed:
        return Score(name, other, 0, 0, [], told.failure is not None)
    wrong = list(_wrong(told, truth))
    estimated = told.memory.parameter_bytes if truth.parameter_bytes is not None else None
    return Score(
        name=name,
        truth=other,
        ops=len(told.ops),
        right=max(0, len(told.ops) - len(wrong)),
        wrong=wrong,
        split_right=not wrong,
        estimated=estimated,
        actual=truth.parameter_bytes,
    )


def _wrong(told: EdgeTpuAnalysis, truth: Truth) -> Iterator[str]:
    """Operators predicted on the wrong side. Equal names are told apart by their order only."""
    left = truth.on_cpu.copy()
    by_layer = truth.detail == "layer"
    for op in told.ops:
        # A text counts: those that are predicted for the CPU take its places first.
        if not by_layer and op.maps:
            continue
        name = op.name if by_layer else edgetpu_truth.kind(op.name)
        key = ("" if truth.detail == "count" else name, op.layer if by_layer else "")
        on_cpu = left[key] > 0
        left[key] -= on_cpu
        if on_cpu == op.maps:
            yield f"{op.index} {op.name} '{op.layer}': predicted {op.reason} ({op.message})"
    for (name, layer), count in left.items():
        yield from [f"{name or 'any'} '{layer}': on the CPU, predicted mapped"] * count


def _operators(content: bytes) -> int:
    try:
        return len(inspect_tflite.parse(content).main.ops)
    except WorkError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.edgetpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compiler", help="predict for this release, whatever the texts tell")
    arguments = parser.parse_args()
    found = list(pairs(arguments.folder))
    alone = {*edgetpu_truth.models(arguments.folder)} - {source for source, _ in found}
    scores = [score(*pair, arguments.compiler) for pair in found]
    for each in scores:
        print(_line(each))
        for text in each.wrong:
            print(f"    {text}")
    for source in sorted(alone):
        print(f"{source.stem}: not scored, nothing tells what the compiler made of it")
    if not scores:
        print(f"no pairs in {arguments.folder}; see the head of bench/edgetpu_truth.py")
        return 2
    ops, right = sum(each.ops for each in scores), sum(each.right for each in scores)
    splits = sum(each.split_right for each in scores)
    off = [abs(s.estimated / s.actual - 1) for s in scores if s.estimated and s.actual]
    print(f"operators right: {right} of {ops} ({right / max(1, ops):.2%})")
    print(f"CPU/TPU split right: {splits} of {len(scores)} models")
    if off:
        print(f"parameter memory: off by {sum(off) / len(off):.1%} on average, {max(off):.1%} most")
    return 0


def _line(each: Score) -> str:
    if each.error:
        return f"{each.name} ({each.truth}): {each.error}"
    split = "right" if each.split_right else "WRONG"
    line = f"{each.name} ({each.truth}): {each.right}/{each.ops} operators, split {split}"
    if each.estimated is not None and each.actual is not None:
        line += f", parameters {each.estimated:,} bytes estimated, {each.actual:,} actual"
    return line


if __name__ == "__main__":
    raise SystemExit(main())
