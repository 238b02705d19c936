"""What is known of each target: the recipes it takes, with which options, and what is measured.

`GET /v1/targets` shows it; a job names one of them.
"""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from app.domain.edgetpu import CompileOptions
from app.domain.ethos_u import EthosUOptions, platform
from app.domain.problems import Note, WorkError
from app.domain.recipes import InvalidRecipe, Step, Variant, all_recipes, number_format

TargetId = Literal[
    "cpu",
    "gpu",
    "edgetpu",
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
    "microcontroller",
]
TARGET_NOTE = "target_gpu"

# https://ai.google.dev/edge/litert/performance/gpu: float16 and float32 natively, 8-bit by
# converting on the fly; 16-bit integer activations are left to the CPU.
_GPU_NOTES = {
    "int16x8": "the GPU delegate runs no int16 activations: this file runs on the CPU there",
    "dynamic_range": "the GPU delegate computes in float: only the file gets smaller there",
    "float32": "the GPU computes in float16: end the recipe in float16 for half the file and the"
    " same speed there",
}


def target_notes(variant: Variant, target: TargetId) -> list[Note]:
    """What the target makes of the variant, where that is not what the recipe suggests."""
    numbers = number_format("+".join(variant.techniques))
    if target != "gpu" or numbers not in _GPU_NOTES:
        return []
    return [Note(code=TARGET_NOTE, message=_GPU_NOTES[numbers])]


class Compiler(BaseModel):
    """The program that makes a target's own file of the .tflite, or runs it as the target would.
    `installed` and `version` are those of the workers that are seen."""

    name: str
    installed: bool = False
    version: str | None = None


class TargetProfile(BaseModel):
    """One target. `number_formats` are those that it runs, `recipes` all that end in one of them;
    `options` are set on the techniques named, for this hardware takes them no other way; with
    `fixed_batch` open batch sizes become 1. `target_options` is the JSON Schema of what a job may
    set for the compiler, `artifacts` what a variant gets beside its .tflite."""

    id: TargetId
    title: str
    number_formats: list[str]
    recipes: list[str]
    options: dict[str, dict[str, Any]] = {}
    fixed_batch: bool = False
    target_options: dict[str, Any] = {}
    artifacts: list[str] = []
    metrics: list[str]
    compiler: Compiler | None = None
    notes: list[str] = []
    source: str


_MEASURED = [
    "size_bytes",
    "gzip_size_bytes",
    "accuracy",
    "agreement",
    "sqnr_db",
    "peak_memory_bytes",
    "macs",
    "ops",
    "integer_only",
]
_INTEGER = {"integer_only": True}
# Of the Edge TPU's compiler: dense layers with weights per channel are too new for it.
_EDGETPU = _INTEGER | {"dense_granularity": "per_tensor"}


def _recipes(formats: list[str]) -> list[str]:
    return [recipe for recipe in all_recipes() if number_format(recipe) in formats]


def _profile(id_: TargetId, number_formats: list[str], **facts: Any) -> TargetProfile:
    options = OPTIONS.get(family(id_))
    return TargetProfile(
        id=id_,
        number_formats=number_formats,
        recipes=_recipes(number_formats),
        metrics=_MEASURED + facts.pop("more_metrics", []),
        target_options=options.model_json_schema() if options else {},
        **facts,
    )


def family(target: str) -> str:
    """The kind of hardware: "ethos-u" for all of these, else the target itself."""
    return "ethos-u" if target.startswith("ethos-u") else target


# Kind of hardware -> the options of its compiler.
OPTIONS: dict[str, type[CompileOptions | EthosUOptions]] = {
    "edgetpu": CompileOptions,
    "ethos-u": EthosUOptions,
}


def _ethos_u(id_: TargetId) -> TargetProfile:
    series, macs = id_.removeprefix("ethos-").rsplit("-", 1)
    return _profile(
        id_,
        ["int8", "int16x8", "qat"],
        title=f"Arm Ethos-{series.upper()} NPU with {macs} MACs a cycle",
        options={"int8": _INTEGER, "int16x8": _INTEGER, "qat": _INTEGER},
        fixed_batch=True,
        artifacts=["ethos_u_tflite", "compiler_log"],
        more_metrics=["ethos_u"],
        compiler=Compiler(name="ethos-u-vela"),
        notes=[
            "Operators that the NPU lacks run on the Cortex-M or Cortex-A beside it.",
            "The compiler packs zeros and repeated weights: prune and cluster save memory and"
            " bandwidth there.",
            "Cycles, times and memory are the compiler's estimates; accuracy and latency_ms are"
            " measured on the .tflite, on the worker's CPU.",
        ],
        source="https://pypi.org/project/ethos-u-vela/",
    )


PROFILES: dict[str, TargetProfile] = {
    profile.id: profile
    for profile in (
        _profile(
            "cpu",
            ["float32", "float16", "dynamic_range", "int8", "int16x8", "qat"],
            title="CPU by the LiteRT interpreter (XNNPACK)",
            more_metrics=["latency_ms", "latency_ratio"],
            notes=["Latency is measured on the worker's processor."],
            source="https://ai.google.dev/edge/litert/models/post_training_quantization",
        ),
        _profile(
            "gpu",
            ["float32", "float16", "dynamic_range", "int8", "qat"],
            title="Mobile GPU by the LiteRT GPU delegate",
            more_metrics=["latency_ms", "latency_ratio"],
            notes=[
                "float16 is what it computes in; 8-bit weights are converted when it loads them.",
                "int16x8 is made for a job of this target too, with a note: it runs on the CPU.",
                "Latency is measured on the worker's CPU, and says nothing of the GPU.",
            ],
            source="https://ai.google.dev/edge/litert/performance/gpu",
        ),
        _profile(
            "edgetpu",
            ["int8", "qat"],
            title="Coral Edge TPU",
            options={"int8": _EDGETPU, "qat": _EDGETPU},
            fixed_batch=True,
            artifacts=["edgetpu_tflite", "compiler_log"],
            more_metrics=["edgetpu"],
            compiler=Compiler(name="edgetpu_compiler"),
            notes=[
                "Where no worker has the compiler, the mapping is predicted, and the .tflite is"
                " what there is.",
                "Only the part before the first operator that it lacks is mapped; the rest runs"
                " on the CPU.",
                "Accuracy and latency_ms are measured on the .tflite, on the worker's CPU.",
            ],
            source="https://coral.ai/docs/edgetpu/models-intro/",
        ),
        *(_ethos_u(id_) for id_ in get_args(TargetId) if id_.startswith("ethos-")),
        _profile(
            "microcontroller",
            ["float32", "int8", "int16x8", "qat"],
            title="Microcontroller by TensorFlow Lite Micro",
            options={"int8": _INTEGER, "int16x8": _INTEGER, "qat": _INTEGER},
            fixed_batch=True,
            artifacts=["c_array"],
            more_metrics=["arena_bytes", "flash_bytes", "micro"],
            compiler=Compiler(name="tflite-micro"),
            notes=[
                "Its kernels take float32 or integer operators, not a mix in one operator.",
                "latency_ms is measured on the worker's CPU, and says nothing of the device.",
            ],
            source="https://ai.google.dev/edge/litert/microcontrollers/overview",
        ),
    )
}


def fitted(variant: Variant, target: TargetId) -> Variant:
    """The variant with the options that the target needs set.

    Raises InvalidRecipe where the target does not run what the recipe makes, or an option that was
    given rules out one that it needs.
    """
    profile = PROFILES[target]
    recipe = "+".join(variant.techniques)
    # A file that a GPU does not run, its delegate leaves to the CPU: noted, not refused.
    if target != "gpu" and number_format(recipe) not in profile.number_formats:
        formats = ", ".join(profile.number_formats)
        raise InvalidRecipe(
            f"target '{target}' ({profile.title}) does not run what '{recipe}' makes; it takes"
            f" recipes that end in one of: {formats}. GET /v1/targets lists them"
        )
    steps = [_fitted_step(step, profile) for step in variant.recipe]
    return variant.model_copy(update={"recipe": steps})


def _fitted_step(step: Step, profile: TargetProfile) -> Step:
    options = profile.options.get(step.technique, {})
    for name, needed in options.items():
        if name in step.model_fields_set and getattr(step, name) != needed:
            raise InvalidRecipe(
                f"target '{profile.id}' needs {step.technique} with {name} {needed!r}; leave"
                f" {name} away"
            )
    for name in ("input_type", "output_type"):
        if options.get("integer_only") and getattr(step, name) == "float32":
            raise InvalidRecipe(
                f"target '{profile.id}' takes integers only, so {name} cannot be 'float32'"
            )
    return step.model_copy(update=options)


def options_of(target: TargetId, given: dict[str, Any]) -> CompileOptions | EthosUOptions | None:
    """A job's options of the target's compiler; None where it has none. Raises ValueError."""
    options = OPTIONS.get(family(target))
    if options is None:
        if given:
            raise ValueError(f"target '{target}' has no options")
        return None
    try:
        found = options.model_validate(given)
        if isinstance(found, EthosUOptions):
            platform(target, found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    except WorkError as error:
        raise ValueError(f"{error.message} {error.hint}") from None
    return found
