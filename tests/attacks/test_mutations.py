"""Damaged files of every format: each is refused with a code, or truly still works."""

import io
import shutil
from collections import Counter
from pathlib import Path

import mutating
import numpy as np
import pytest
from attacking import TENSORFLOW, Attacks, snapshot
from PIL import Image
from running import Files

from app.domain.problems import WorkError
from workers import runner
from workers.runner import Limits

SEED = 20261123
LIGHT, HEAVY = ("tflite", "npz", "images"), ("keras", "h5", "saved_model")
SHORT = {"tflite": 30, "npz": 20, "images": 10, "keras": 5, "h5": 5, "saved_model": 5}
LONG = {"tflite": 150, "npz": 90, "images": 60, "keras": 70, "h5": 70, "saved_model": 60}
LIMITS = Limits(deadline_s=240, memory_bytes=3 * 2**30, disk_bytes=2**30)
# What a child's end is told as, where it does not tell itself.
ENDED = {"child_crashed", "out_of_memory", "deadline_exceeded", "too_many_processes"}


@pytest.fixture(scope="session")
def originals(files: Files, models: Path) -> dict[str, bytes]:
    pictures = {}
    for number in range(4):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures[f"{number % 2}/{number}.png"] = buffer.getvalue()
    rows = np.load(files.npz)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=rows["x_train"][:20], y=rows["y_train"][:20])
    return {
        "tflite": files.tflite.read_bytes(),
        "npz": buffer.getvalue(),
        "images": mutating.hostile.zipped(pictures),
        "keras": (models / "model.keras").read_bytes(),
        "h5": (models / "model.h5").read_bytes(),
        "saved_model": (models / "model.zip").read_bytes(),
    }


def outcomes(attacks: Attacks, folder: Path, preload: str) -> dict[str, str]:
    """File -> how it ended. Where one takes its process with it, another goes on."""
    found: dict[str, str] = {}
    while left := sorted(path for path in folder.iterdir() if path.name not in found):
        with attacks.child(mutating.BATCH + "\nos._exit(0)", preload) as child:
            for path in left:
                shutil.copyfile(path, child.inputs / path.name)
            ended = "works"
            try:
                runner.run(child, LIMITS, lambda event: None, lambda: False)
            except WorkError as error:
                ended = error.code
            told = (child.directory / "out" / "told").read_text().splitlines()
            for name, outcome in zip(told, [*told[1:], f"={ended}"], strict=True):
                if outcome.startswith("="):
                    found[name] = outcome[1:]
    return found


def check(attacks: Attacks, tmp_path: Path, originals: dict[str, bytes], kinds: dict[str, int]):  # type: ignore[no-untyped-def]
    for group, preload in ((LIGHT, ""), (HEAVY, TENSORFLOW)):
        folder = tmp_path / group[0]
        folder.mkdir()
        for kind in group:
            (folder / f"{kind}-sound").write_bytes(originals[kind])
            mutating.write(folder, kind, originals[kind], kinds[kind], SEED)
        before = snapshot(folder)
        found = outcomes(attacks, folder, preload)
        assert snapshot(folder) == before
        assert list(attacks.site.work_dir.iterdir()) == []
        for kind in group:
            assert found.pop(f"{kind}-sound") == "works"
            counts = Counter(told for name, told in found.items() if name.startswith(kind))
            print(kind, sum(counts.values()), dict(counts))
            assert sum(counts.values()) == kinds[kind]
        unforeseen = {name: told for name, told in found.items() if told.startswith("raised")}
        assert not unforeseen
        assert not set(found.values()) & {"child_failed", "internal_error"}


def test_some_damaged_files(attacks: Attacks, tmp_path: Path, originals: dict[str, bytes]) -> None:
    check(attacks, tmp_path, originals, SHORT)


@pytest.mark.chaos
def test_five_hundred_damaged_files(
    attacks: Attacks, tmp_path: Path, originals: dict[str, bytes]
) -> None:
    assert sum(LONG.values()) == 500
    check(attacks, tmp_path, originals, LONG)
