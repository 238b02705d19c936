"""Seeded damage to sound files of every format, and the run that meets it in a confined child."""

import io
import json
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import hostile

# Inspects each file of in/ as the real child does, several in one process, so that a thousand of
# them take minutes. Tells before each which comes, so that a crash has a name.
BATCH = """
import shutil, tempfile, traceback
import numpy as np
from app.domain.formats import DatasetFormat, ModelFormat
from app.domain.problems import WorkError
from app.domain.work import InspectDatasetWork, InspectModelWork, ModelSource
from workers.engine import pipeline
from ai_edge_litert.interpreter import Interpreter

def runs(content):
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.invoke()

def inspect(path, home):
    kind = path.name.split("-")[0]
    (home / "in").mkdir(parents=True)
    (home / "in" / "file").write_bytes(path.read_bytes())
    if kind in ("npz", "images"):
        work = InspectDatasetWork(file="in/file", format=DatasetFormat(kind))
        return pipeline.run(work, home, lambda *_: None).facts.model_dump_json()
    source = ModelSource(file="in/file", format=ModelFormat(kind))
    result = pipeline.run(InspectModelWork(model=source), home, lambda *_: None)
    if result.float_model:
        runs((home / result.float_model).read_bytes())
    return result.model_dump_json()

told = open("out/told", "a", buffering=1)
for path in sorted(Path("in").iterdir()):
    told.write(f"{path.name}\\n")
    home = Path(tempfile.mkdtemp())
    try:
        inspect(path, home)
        outcome = "works"
    except WorkError as error:
        outcome = error.code
    except Exception as error:
        traceback.print_exc()
        outcome = f"raised {type(error).__name__}: {error}"[:200].replace("\\n", " ")
    told.write(f"={outcome}\\n")
    shutil.rmtree(home)
result({})
"""


def damaged(content: bytes, random: Random) -> bytes:
    """One to three changes: bits, bytes, wild 32-bit words, parts cut out, doubled or moved."""
    made = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(made))
        match random.randrange(7):
            case 0:
                made[place] ^= 1 << random.randrange(8)
            case 1:
                made[place] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 2:
                wild = random.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(made)))
                made[place : place + 4] = wild.to_bytes(4, "little")
            case 3:
                del made[place:]
            case 4:
                del made[place : place + random.randrange(1, 64)]
            case 5:
                made[place:place] = made[place : place + random.randrange(1, 64)]
            case _:
                part = made[place : place + random.randrange(1, 64)]
                other = random.randrange(len(made))
                made[other : other + len(part)] = part
        made = made or bytearray(b"\0")
    return bytes(made)


def mutation(kind: str, content: bytes, random: Random) -> bytes:
    """Damage to a file; to what an archive holds as often as to the archive."""
    if kind in ("tflite", "h5") or random.random() < 0.4:
        return damaged(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(sorted(name for name, held in members.items() if held))
    if name.endswith(".json") and random.random() < 0.5:
        members[name] = json.dumps(_changed(json.loads(members[name]), random)).encode()
    else:
        members[name] = damaged(members[name], random)
    return hostile.zipped(members)


def _changed(value: Any, random: Random) -> Any:
    """The same JSON with one value somewhere replaced by one of another type or size."""
    strange: list[Any] = [None, -1, 0, 2**31, 1e308, "", "x" * 1000, [], {}, [[]], True]
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        return value | {key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        place = random.randrange(len(value))
        return [*value[:place], _changed(value[place], random), *value[place + 1 :]]
    return random.choice(strange)


def write(folder: Path, kind: str, content: bytes, count: int, seed: int) -> None:
    for number in range(count):
        random = Random(f"{kind}-{seed}-{number}")
        (folder / f"{kind}-{number:04}").write_bytes(mutation(kind, content, random))
