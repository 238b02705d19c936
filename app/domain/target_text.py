"""What a target made of a variant, as sentences for tables and reports.

Takes metrics as the plain JSON of the API, and is lenient: what is not there is not told.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]


def target_texts(metrics: Json) -> Iterator[tuple[str, str]]:
    """(subject, sentence) for each target that the variant was compiled or measured for."""
    if edgetpu := metrics.get("edgetpu"):
        yield "Edge TPU", _edgetpu(edgetpu)
    if ethos_u := metrics.get("ethos_u"):
        yield "Ethos-U", _ethos_u(ethos_u)
    if (flash := metrics.get("flash_bytes")) is not None:
        yield "microcontroller", _micro(flash, metrics.get("arena_bytes"), metrics.get("micro"))


def _edgetpu(found: Json) -> str:
    mapped, on_cpu = found.get("mapped"), found.get("cpu")
    if mapped is None or on_cpu is None:
        return "Compiled; the compiler did not tell what it mapped."
    report = found.get("compiler") or {}
    memory = report or (found.get("analysis") or {}).get("memory") or {}
    text = f"{mapped} of {mapped + on_cpu} operators on the Edge TPU"
    for key, where in (("on_chip_bytes", "on the chip"), ("off_chip_bytes", "streamed")):
        if size := memory.get(key):
            text += f", {_kib(size)} of parameters {where}"
    if found.get("measured_by") == "compiler":
        return f"{text}, by edgetpu_compiler {report.get('version')}."
    return f"{text}: predicted, not compiled."


def _ethos_u(report: Json) -> str:
    text = (
        f"{100 * report['npu_share']:.0f} % of the operators on {report['accelerator']}; about"
        f" {report['inference_ms']:.3g} ms and {report['cycles']} cycles an inference,"
        f" {_kib(report['sram_bytes'])} of SRAM"
    )
    flash = report["on_chip_flash_bytes"] + report["off_chip_flash_bytes"]
    if flash:
        text += f", {_kib(flash)} of flash"
    if report["dram_bytes"]:
        text += f", {_kib(report['dram_bytes'])} of DRAM"
    return f"{text}: estimated by Vela {report['vela_version']} for {report['system_config']}."


def _micro(flash: int, arena: int | None, report: Json | None) -> str:
    text = f"{flash} bytes of flash for the model"
    if arena is not None:
        text += f", {arena} bytes of tensor arena"
    version = (report or {}).get("tflm_version")
    return f"{text}, under TensorFlow Lite Micro {version}." if version else f"{text}."


def _kib(size: int) -> str:
    return f"{size / 1024:.4g} KiB"
