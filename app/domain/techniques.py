"""What is known of each technique: data it needs, what it saves, what it costs, where it runs.

Sources: the LiteRT and TensorFlow Model Optimization documentation,
https://ai.google.dev/edge/litert/models/post_training_quantization and
https://www.tensorflow.org/model_optimization/guide.
"""

from typing import Any

from pydantic import BaseModel

from app.domain.recipes import STEP_TYPES
from app.domain.targets import PROFILES, family

POST_TRAINING = "https://ai.google.dev/edge/litert/models/post_training_quantization"
TOOLKIT = "https://www.tensorflow.org/model_optimization/guide"
TRAINING_DATA = (
    "training samples, and a Keras model; labels are not needed: without them it learns from the"
    " model's own answers"
)


class Technique(BaseModel):
    """One technique; `options` is the JSON Schema of its step in a recipe."""

    id: str
    title: str
    available: bool
    data_required: str
    size_reduction: str
    accuracy: str
    latency: str
    hardware: list[str]
    notes: list[str] = []
    source: str
    options: dict[str, Any]


def _technique(id_: str, **facts: Any) -> Technique:
    schema = STEP_TYPES[id_].model_json_schema()
    return Technique(id=id_, options=schema, hardware=_hardware(id_), **facts)


def _hardware(technique: str) -> list[str]:
    """The kinds of hardware of which a target takes recipes with the technique."""
    kinds = {
        family(profile.id): None
        for profile in PROFILES.values()
        if any(technique in recipe.split("+") for recipe in profile.recipes)
    }
    return list(kinds)


TECHNIQUES: tuple[Technique, ...] = (
    _technique(
        "float16",
        title="float16 quantization",
        available=True,
        data_required="none",
        size_reduction="50 %",
        accuracy="no loss that matters",
        latency="about that of float32 on a CPU; faster on a GPU",
        source=POST_TRAINING,
    ),
    _technique(
        "dynamic_range",
        title="dynamic range quantization",
        available=True,
        data_required="none",
        size_reduction="up to 75 %",
        accuracy="small loss",
        latency="faster on ARM CPUs; on x86 it can be slower than float32: measure it",
        source=POST_TRAINING,
    ),
    _technique(
        "int8",
        title="full integer quantization",
        available=True,
        data_required="about 100 unlabelled representative samples",
        size_reduction="up to 75 %",
        accuracy="small loss; sequential bias correction wins some of it back",
        latency="2 to 3 times faster on a CPU",
        source=POST_TRAINING,
    ),
    _technique(
        "int16x8",
        title="int8 weights with int16 activations",
        available=True,
        data_required="about 100 unlabelled representative samples",
        size_reduction="up to 75 %",
        accuracy="close to float32 where int8 activations lose too much",
        latency="slow: reference kernels on most hardware",
        source=POST_TRAINING,
    ),
    _technique(
        "prune",
        title="magnitude pruning",
        available=True,
        data_required=TRAINING_DATA,
        size_reduction="of the download (gzip), by the zeros; of the file with sparse_encoding",
        accuracy="small loss up to about 50 to 80 % zeros",
        latency="unchanged without a sparse kernel",
        notes=[
            "By itself it makes neither the file smaller nor the model faster: what it saves shows"
            " when the file is compressed.",
            "The steps after it keep its zeros; a file that lost them fails its variant.",
        ],
        source=TOOLKIT + "/pruning",
    ),
    _technique(
        "cluster",
        title="weight clustering",
        available=True,
        data_required=TRAINING_DATA,
        size_reduction="of the download (gzip), by the repeated weights; not of the file",
        accuracy="small loss at 16 clusters or more",
        latency="unchanged",
        notes=[
            "After prune, one of the clusters is zero: the zeros stay.",
            "With int8 or qat after it, each output channel of a kernel has at most so many"
            " distinct weights.",
        ],
        source=TOOLKIT + "/clustering",
    ),
    _technique(
        "qat",
        title="quantization-aware training",
        available=True,
        data_required=TRAINING_DATA
        + "; ranges that it does not learn come from about 100 calibration samples, without such"
        " from the training samples",
        size_reduction="up to 75 %",
        accuracy="smallest loss of the 8-bit techniques",
        latency="2 to 3 times faster on a CPU",
        notes=[
            "Layers that it cannot train quantized are quantized after training, or stay float;"
            " the variant's notes name them.",
            "prune+qat keeps the zeros (PQAT), cluster+qat the clusters (CQAT), prune+cluster+qat"
            " both (PCQAT).",
        ],
        source=TOOLKIT + "/quantization/training",
    ),
)
