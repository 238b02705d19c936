"""A test double of edgetpu_compiler: replays outputs in its grammar, and compiles nothing.

What it does is told by the file `scenario` beside the copy of this script that a test makes.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

VERSION = "16.0.384591198"
SCENARIO = Path(__file__).with_name("scenario").read_text().strip()
CALLS = Path(__file__).with_name("calls")

SUCCESS = """Edge TPU Compiler version {version}
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 12 ms.

Input model: {model}
Input size: 1.50KiB
Output model: {stem}_edgetpu.tflite
Output size: 56.03KiB
On-chip memory used for caching model parameters: 3.00KiB
On-chip memory remaining for caching model parameters: 7.67MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: 3
Operation log: {stem}_edgetpu.log

Model successfully compiled but not all operations are supported by the Edge TPU.
Number of operations that will run on Edge TPU: 2
Number of operations that will run on CPU: 1

Operator                       Count      Status

LEAKY_RELU                     1          Operation not supported
Compilation child process completed within timeout period.
Compilation succeeded!
"""
LOG = """Edge TPU Compiler version {version}
Input: {model}
Output: {stem}_edgetpu.tflite

Operator                       Count      Status

LEAKY_RELU                     1          Operation not supported
CONV_2D                        2          Mapped to Edge TPU
"""
FAILURES = {
    "not_quantized": "Invalid model: model.tflite\nModel not quantized\n",
    "dynamic": "ERROR: Attempting to use a delegate that only supports static-sized tensors with"
    " a graph that has dynamic-sized tensors.\nCompilation failed: Model failed in Tflite"
    " interpreter. Please ensure model can be loaded/run in Tflite interpreter.\n"
    "Compilation failed!\n",
    "op_version": "ERROR: Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'. An"
    " older version of this builtin might be supported.\n\nERROR: Registration failed.\n\n"
    "Invalid model: model.tflite\nModel could not be parsed\n",
    "custom_op": "ERROR: Encountered unresolved custom op: MyDecoder.\nInvalid model:"
    " model.tflite\nModel could not be parsed\n",
    "activations": "Compilation failed: Compilation failed due to large activation tensors in"
    " model.\nCompilation failed!\n",
    "internal": "Internal compiler error. Aborting!\n",
    "bare": "Compilation child process completed within timeout period.\nCompilation failed!\n",
}


def note(name, text):
    """For the test to read; nothing where a sandbox is around this process."""
    with contextlib.suppress(PermissionError), Path(__file__).with_name(name).open("a") as file:
        file.write(text)


def main():
    if "--version" in sys.argv:
        if SCENARIO == "other_program":
            print("usage: something else")
        else:
            version = "15.0.340273435" if SCENARIO == "release_15" else VERSION
            print(f"Edge TPU Compiler version {version}")
        return 0
    note("calls", " ".join(sys.argv[1:]) + "\n")
    out, model = Path(sys.argv[sys.argv.index("-o") + 1]), Path(sys.argv[-1])
    if SCENARIO in FAILURES:
        print(f"Edge TPU Compiler version {VERSION}\n{FAILURES[SCENARIO]}")
        return 1
    if SCENARIO == "internal_once" and len(CALLS.read_text().splitlines()) == 1:
        print(f"Edge TPU Compiler version {VERSION}\n{FAILURES['internal']}")
        return 1
    if SCENARIO == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note("child", str(child.pid))
        time.sleep(600)
    if SCENARIO == "print_forever":
        while True:
            sys.stdout.write("x" * 100_000 + "\n")
    if SCENARIO == "fill_disk":
        with (out / "large").open("wb") as file:
            while True:
                file.write(b"\0" * 1_000_000)
                file.flush()
    if SCENARIO == "garbage":
        os.write(1, bytes(range(256)))
        return 0
    if SCENARIO == "crash":
        os.abort()
    count = int(sys.argv[sys.argv.index("-n") + 1]) if "-n" in sys.argv else 1
    for index in range(count):
        stem = model.stem if count == 1 else f"{model.stem}_segment_{index}_of_{count}"
        print(SUCCESS.format(version=VERSION, model=model, stem=stem))
        if SCENARIO == "no_output":
            continue
        content = b"no model" if SCENARIO == "broken_output" else model.read_bytes()
        (out / f"{stem}_edgetpu.tflite").write_bytes(content)
        log = LOG.format(version=VERSION, model=model, stem=stem)
        (out / f"{stem}_edgetpu.log").write_text(log)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
