"""Runs a .tflite file in the TFLite Micro interpreter; a script, started in a process of its own.

`micro_probe.py MODEL INPUTS RESULT`: INPUTS is an .npz with arrays "INPUT_SAMPLE" ("0_0", "1_0",
...). What was found goes to RESULT (JSON) after each stage, so that a crash of the next one takes
nothing away; what the interpreter says goes to standard error. It imports nothing of ours, so that
it can be started by its path alone.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tflite_micro import runtime

_ARENA_BYTES = 2**30  # to begin with: memory is taken only as it is written to
_ALIGNMENT = 16
_SECONDS = 10.0  # samples are compared until this is over


def main(model: Path, inputs: Path, result: Path) -> None:
    content = model.read_bytes()
    with np.load(inputs, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    places = 1 + max((int(name.split("_")[0]) for name in arrays), default=-1)
    samples = 1 + max((int(name.split("_")[1]) for name in arrays), default=-1)
    found: dict[str, Any] = {}

    def tell(**more: Any) -> None:
        found.update(more)
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(result)

    interpreter = _interpreter(content, _ARENA_BYTES)
    first = [arrays[f"{place}_0"] for place in range(places)]
    _run(interpreter, first)
    parts = _allocations(interpreter)
    tell(arena=_least_arena(content, first, parts["total"]), **parts)

    distances = _Distances(content)
    begun = time.monotonic()
    for sample in range(samples):
        given = [arrays[f"{place}_{sample}"] for place in range(places)]
        interpreter.reset()
        distances.add(given, _run(interpreter, given, len(distances.steps)))
        tell(compared=sample + 1, apart=distances.largest)
        if time.monotonic() - begun > _SECONDS:
            break


def _interpreter(content: bytes, arena: int) -> Any:
    return runtime.Interpreter.from_bytes(content, arena_size=arena)


def _run(interpreter: Any, given: list[Any], outputs: int = 0) -> list[Any]:
    for place, array in enumerate(given):
        interpreter.set_input(array, place)
    interpreter.invoke()
    return [interpreter.get_output(place) for place in range(outputs)]


def _allocations(interpreter: Any) -> dict[str, int]:
    """Bytes of the arena, of its head (not persistent) and of its tail (persistent), from the
    lines "[RecordingMicroAllocator] Arena allocation total 1008 bytes" on standard error."""
    with tempfile.TemporaryFile() as file:
        with _error_output_to(file.fileno()):
            interpreter.print_allocations()
        file.seek(0)
        text = file.read().decode("utf-8", "replace")
    found = re.findall(r"Arena allocation (total|head|tail) (\d+) bytes", text)
    return {name: int(size) for name, size in found}


@contextlib.contextmanager
def _error_output_to(target: int) -> Iterator[None]:
    kept = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _least_arena(content: bytes, first: list[Any], recorded: int) -> int:
    """The smallest arena that was seen to do: the recorded total, or a little more where planning
    needs room that it gives back."""
    arena = -(-recorded // _ALIGNMENT) * _ALIGNMENT
    while not _is_enough(content, first, arena):
        arena += max(_ALIGNMENT, arena // 64 // _ALIGNMENT * _ALIGNMENT)
        if arena > 2 * recorded + 2**16:
            raise RuntimeError(f"it runs in no arena of up to {arena} bytes")
    return arena


def _is_enough(content: bytes, first: list[Any], arena: int) -> bool:
    """Whether it runs in that arena. Tried in a copy of this process: where the last bytes are
    missing, some kernels crash instead of saying so."""
    sys.stderr.flush()
    copy = os.fork()
    if copy:
        return os.waitpid(copy, 0)[1] == 0
    try:
        _run(_interpreter(content, arena), first)
    except RuntimeError:
        os._exit(1)
    os._exit(0)


class _Distances:
    """How far outputs are from those of LiteRT's reference kernels, in quantization steps.

    The reference kernels are the same arithmetic as TFLM's; the optimized ones of a desktop round
    differently, by a step or two. `steps`: the size of one for each output.
    """

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.largest = 0.0
        self._interpreter = Interpreter(
            model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
        )
        self._interpreter.allocate_tensors()
        self.steps = [self._step(d) for d in self._interpreter.get_output_details()]

    def add(self, given: list[Any], outputs: list[Any]) -> None:
        interpreter = self._interpreter
        interpreter.reset_all_variables()
        details = interpreter.get_input_details()
        for detail, array in zip(details, given, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        for detail, found, step in zip(
            interpreter.get_output_details(), outputs, self.steps, strict=True
        ):
            wanted = interpreter.get_tensor(detail["index"]).astype(np.float64)
            unit = step or 1e-4 * max(1.0, float(np.abs(wanted).max(initial=0.0)))
            apart = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0)) / unit
            self.largest = max(self.largest, apart if np.isfinite(apart) else 1e9)

    def _step(self, detail: Any) -> float:
        """1 for integers; a real value is dequantized in steps of its source's scale, if that is
        what makes it, and else has none (0)."""
        if np.issubdtype(detail["dtype"], np.integer) or detail["dtype"] == np.bool_:
            return 1.0
        tensors = {d["index"]: d for d in self._interpreter.get_tensor_details()}
        for op in self._interpreter._get_ops_details():
            if op["op_name"] == "DEQUANTIZE" and detail["index"] in op["outputs"]:
                return float(tensors[op["inputs"][0]]["quantization"][0])
        return 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
