"""Checks a job's spec against the facts of its model and data, and plans who reads which samples.

The same checks run at submission, for what is known by then, and again when the job is prepared,
for files that were still being inspected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.domain.budgets import MICRO, NEED_DATA, NEED_LABELS
from app.domain.jobs import JobSpec
from app.domain.recipes import InvalidRecipe, Variant, parse_variant
from app.domain.splits import Role, plan_splits
from app.domain.targets import PROFILES, fitted
from app.domain.work import DatasetFacts, ModelFacts, Preprocessing
from app.errors import FieldError, ServiceError, invalid
from app.tables import DatasetRow, ModelRow, Upload

DATASET_FIELDS = {
    "dataset": None,
    "calibration_dataset": Role.calibration,
    "training_dataset": Role.training,
    "evaluation_dataset": Role.evaluation,
}


@dataclass(frozen=True)
class Files:
    """The rows a spec names: the model, and the dataset of each field that is given."""

    model: ModelRow
    datasets: Mapping[str, DatasetRow]

    @property
    def inspecting(self) -> bool:
        rows: list[Upload] = [self.model, *self.datasets.values()]
        return any(row.status == "inspecting" for row in rows)


def parse_variants(spec: JobSpec) -> list[Variant]:
    """The requested variants, with the options that the target needs; none of "auto", which the
    advice is still to resolve.

    Raises ServiceError 422 `invalid_recipe` or `duplicate_variant`.
    """
    variants: list[Variant] = []
    for index, value in enumerate(spec.requested()):
        field = f"variants.{index}"
        try:
            variant = fitted(parse_variant(value, spec.training.options()), spec.target)
        except InvalidRecipe as error:
            raise invalid("invalid_recipe", field, str(error)) from None
        except ValidationError as error:
            errors = [
                FieldError(field=".".join((field, *map(str, e["loc"]))), message=e["msg"])
                for e in error.errors()
            ]
            detail = f"{field}: {errors[0].message} (at {errors[0].field})"
            hint = "GET /v1/techniques gives the options of each technique."
            raise ServiceError(422, "invalid_recipe", detail, hint, errors) from None
        if variant.name == "baseline" or variant.name in {v.name for v in variants}:
            raise invalid(
                "duplicate_variant",
                field,
                f"the name '{variant.name}' is taken",
                'Name it: {"name": "…", "recipe": […]}.',
            )
        variants.append(variant)
    return variants


def check(spec: JobSpec, variants: list[Variant], files: Files) -> None:
    """Everything that can be known before anything runs. Raises ServiceError 422."""
    check_usable("model", files.model)
    for field, row in files.datasets.items():
        check_usable(field, row)
    _check_trainable(variants, files.model)
    _check_data_is_there(spec, variants, files)
    _check_budgets(spec, variants, files)
    _check_engine(variants, files.model)
    if files.model.facts is None:
        return
    model = ModelFacts.model_validate(files.model.facts)
    _check_input_shapes(spec, model)
    with_labels = _fields_with_labels(spec, variants)
    for field, row in files.datasets.items():
        if row.facts is not None:
            facts = DatasetFacts.model_validate(row.facts)
            # Pictures are resized to the model's input when they are read.
            if row.format != "images":
                _check_shapes(field, model, facts, spec.preprocessing)
            if field in with_labels:
                _check_labels(field, model, facts)


def _fields_with_labels(spec: JobSpec, variants: list[Variant]) -> set[str]:
    """The datasets whose labels are read, if they have any."""
    fields: set[str] = set()
    if spec.evaluation.metric != "none":
        fields |= {"dataset", "evaluation_dataset"}
    if any(variant.needs_training for variant in variants):
        fields |= {"dataset", "training_dataset"}
    return fields


def check_usable(field: str, row: Upload) -> None:
    if row.status == "invalid":
        cause = (row.error or {}).get("message", "it could not be read")
        code = "model_invalid" if field == "model" else "dataset_invalid"
        raise invalid(code, field, f"'{row.id}' cannot be used: {cause}", "Upload a repaired file.")


def _check_trainable(variants: list[Variant], model: ModelRow) -> None:
    cause = why_not_trainable(model)
    for index, variant in enumerate(variants):
        if variant.needs_training and cause is not None:
            why, hint = cause
            raise invalid(
                "not_trainable",
                f"variants.{index}",
                f"'{variant.name}' trains the model, and this one cannot be trained: {why}",
                hint,
            )


def why_not_trainable(model: ModelRow) -> tuple[str, str] | None:
    """Why a model cannot be trained, and what to do; None where it can, or nobody knows yet."""
    leave_out = "or ask for float16, dynamic_range, int8 or int16x8, which do not train."
    if model.format == "tflite":
        why = "a .tflite file holds no layers to train"
        return why, f"Upload the .keras, .h5 or Keras SavedModel that it was made from, {leave_out}"
    if model.facts is None:
        return None
    facts = ModelFacts.model_validate(model.facts)
    if facts.trainable is False:
        why = (facts.not_trainable or "it holds no layers that Keras can rebuild").rstrip(".")
        return why, f"Upload it as .keras, .h5, or a SavedModel saved by Keras, {leave_out}"
    if facts.trainable is None and model.format == "saved_model":
        why = "it was inspected by an older version, which did not look whether it can"
        return why, "Upload the same file again: it is inspected anew."
    return None


def _facts(files: Files, field: str) -> DatasetFacts | None:
    row = files.datasets.get(field)
    return DatasetFacts.model_validate(row.facts) if row is not None and row.facts else None


def labelled(datasets: Mapping[str, DatasetRow], source: Mapping[str, Any]) -> bool:
    """Whether a planned part (see plan_sources) has labels."""
    row = next(row for row in datasets.values() if row.id == source["id"])
    facts = DatasetFacts.model_validate(row.facts)
    return facts.splits[source["part"]["split"]].labelled


def _check_data_is_there(spec: JobSpec, variants: list[Variant], files: Files) -> None:
    given = files.datasets.keys()
    for index, variant in enumerate(variants):
        field = f"variants.{index}"
        if variant.needs_training:
            _check_training_data(spec, variants, files, field, variant.name)
        # What a variant trains on can calibrate it as well.
        serving = {"dataset", "calibration_dataset"}
        if variant.needs_training:
            serving.add("training_dataset")
        if variant.needs_calibration and not serving & given:
            raise invalid(
                "missing_data",
                field,
                f"'{variant.name}' needs samples to calibrate with, and {_what_is_given(files)}",
                "Give 'dataset' or 'calibration_dataset' (unlabelled samples will do), or ask for"
                " float16 or dynamic_range, which need no data.",
            )


def _what_is_given(files: Files) -> str:
    given = sorted(files.datasets)
    return f"the job has only its {' and '.join(given)}" if given else "the job has no dataset"


def _check_training_data(
    spec: JobSpec, variants: list[Variant], files: Files, field: str, name: str
) -> None:
    serving = [f for f in ("training_dataset", "dataset") if f in files.datasets]
    if not serving:
        raise invalid(
            "missing_data",
            field,
            f"'{name}' needs samples to train on, and {_what_is_given(files)}",
            "Give 'dataset' or 'training_dataset' (without labels it learns from the model's own"
            " answers), or ask for float16 or dynamic_range, which need no data.",
        )
    if _facts(files, serving[0]) is None:
        return
    source = plan_sources(spec, files, variants)[0].get("training")
    if source is None:
        raise invalid(
            "missing_data",
            field,
            f"'{name}' needs samples to train on, and {serving[0]} leaves none for it",
            "Give more samples, or a 'training_dataset' of its own.",
        )
    if spec.training.distill == "off" and not labelled(files.datasets, source):
        raise invalid(
            "missing_data",
            field,
            f"'{name}' needs labels to train on: training.distill is 'off', and the part of"
            f" {serving[0]} that it trains on has none",
            "Add labels ('y'), or leave training.distill at 'auto': without labels it learns from"
            " the model's own answers.",
        )


def _check_budgets(spec: JobSpec, variants: list[Variant], files: Files) -> None:
    given = files.datasets.keys()
    for budget in MICRO:
        if getattr(spec.budgets, budget) is not None and spec.target != "microcontroller":
            raise invalid(
                "budget_not_measured",
                f"budgets.{budget}",
                f"is measured for microcontrollers only, and the target is '{spec.target}'",
                "Ask for the target 'microcontroller'; for others there is max_peak_memory_bytes.",
            )
    for budget in NEED_DATA:
        if getattr(spec.budgets, budget) is None:
            continue
        field = "evaluation_dataset" if "evaluation_dataset" in given else "dataset"
        if field not in given:
            raise invalid(
                "missing_data",
                f"budgets.{budget}",
                "cannot be judged without data to evaluate on",
                "Give 'dataset' or 'evaluation_dataset'.",
            )
        if budget not in NEED_LABELS or _facts(files, field) is None:
            continue
        source = plan_sources(spec, files, variants)[0].get("evaluation")
        if source is None or not labelled(files.datasets, source):
            raise invalid(
                "missing_data",
                f"budgets.{budget}",
                f"cannot be judged: {field} has no labels",
                "Add labels ('y'), or use the budget 'min_agreement'.",
            )


def _check_engine(variants: list[Variant], model: ModelRow) -> None:
    for index, variant in enumerate(variants):
        if variant.needs_tensorflow and model.format == "tflite":
            raise invalid(
                "impossible_recipe",
                f"variants.{index}",
                f"'{variant.name}' asks for engine 'converter', which cannot read a .tflite model",
                "Leave 'engine' away, or upload the model as .keras, .h5 or SavedModel.",
            )


def _check_input_shapes(spec: JobSpec, model: ModelFacts) -> None:
    known = {tensor.name: tensor.shape for tensor in model.inputs}
    for name, shape in spec.input_shapes.items():
        field = f"input_shapes.{name}"
        if name not in known:
            inputs = ", ".join(known)
            raise invalid("unknown_input", field, f"the model's inputs are: {inputs}")
        fits = len(shape) == len(known[name]) and all(
            own in (-1, new) for own, new in zip(known[name], shape, strict=True)
        )
        if not fits:
            raise invalid(
                "shape_mismatch", field, f"{shape} does not fit the model's {known[name]}"
            )
        if PROFILES[spec.target].fixed_batch and known[name][0] == -1 and shape[0] != 1:
            raise invalid(
                "shape_mismatch",
                field,
                f"target '{spec.target}' takes a batch of 1, not of {shape[0]}",
                "Give the shape with a batch of 1.",
            )


def _check_shapes(
    field: str, model: ModelFacts, data: DatasetFacts, preprocessing: Preprocessing | None
) -> None:
    """Shapes of a dataset against a model with one input; resized data is judged when read."""
    resized = preprocessing is not None and preprocessing.resize is not None
    if len(model.inputs) != 1 or len(data.features) != 1 or resized:
        return
    wanted, got = model.inputs[0].shape[1:], data.features[0].shape
    channelless = [*got, 1] if len(got) == len(wanted) - 1 else got
    fits = len(channelless) == len(wanted) and all(
        w in (-1, g) for w, g in zip(wanted, channelless, strict=True)
    )
    if not fits:
        raise invalid(
            "shape_mismatch",
            field,
            f"samples of '{data.features[0].name}' have the shape {got}, the model wants {wanted}",
            "Give data in the model's shape, or 'preprocessing.resize'.",
        )


def _check_labels(field: str, model: ModelFacts, data: DatasetFacts) -> None:
    """Integer labels against the classes of a model with one output [batch, classes]."""
    integer = (data.label_dtype or "").startswith(("int", "uint"))
    output = model.outputs[0].shape
    if len(model.outputs) != 1 or len(output) != 2 or output[1] < 2:
        return
    if not integer or data.label_shape != []:
        return
    low, high = data.label_min or 0, data.label_max or 0
    if low < 0 or high >= output[1]:
        raise invalid(
            "labels_out_of_range",
            field,
            f"labels run from {low:g} to {high:g}, the model has {output[1]} classes"
            f" (0 to {output[1] - 1})",
            "Number the classes as the model's outputs are, from 0.",
        )


def fixed_shapes(spec: JobSpec, files: Files) -> dict[str, list[int]]:
    """Shapes for inputs whose sizes (but the batch) are open: from the spec, else the dataset."""
    shapes = {name: list(shape) for name, shape in spec.input_shapes.items()}
    model = ModelFacts.model_validate(files.model.facts)
    field = next((f for f in DATASET_FIELDS if _facts(files, f) is not None), None)
    data = _facts(files, field) if field else None
    for tensor in model.inputs:
        if tensor.name in shapes or -1 not in tensor.shape[1:] or data is None:
            continue
        feature = next((f for f in data.features if f.name == tensor.name), data.features[0])
        got = list(feature.shape)
        if spec.preprocessing and spec.preprocessing.resize and len(got) >= 2:
            got[0:2] = spec.preprocessing.resize
        if len(got) == len(tensor.shape) - 2:
            got.append(1)
        if field and files.datasets[field].format == "images" and tensor.shape[-1] > 0:
            # Pictures are read with the channels that the model has.
            got[-1] = tensor.shape[-1]
        if len(got) == len(tensor.shape) - 1 and -1 not in got:
            shapes[tensor.name] = [1, *got]
    return shapes


def plan_sources(
    spec: JobSpec, files: Files, variants: list[Variant]
) -> tuple[dict[str, Any], str]:
    """Which part of which dataset serves each role, and how it was split, told for the report."""
    return sources_of(files.datasets, variants, spec.seed)


def sources_of(
    datasets: Mapping[str, DatasetRow], variants: list[Variant], seed: int
) -> tuple[dict[str, Any], str]:
    """What `plan_sources` says, of the datasets alone.

    A dataset that serves several roles, under whatever fields, is cut once: its parts are disjoint.
    Samples to train on are set aside only where a variant trains.
    """
    trains = any(variant.needs_training for variant in variants)
    own = {r for f, r in DATASET_FIELDS.items() if r and f in datasets}
    shared = {Role.calibration, Role.evaluation} | ({Role.training} if trains else set())
    wanted: dict[str, set[Role]] = {}
    fields: dict[str, str] = {}
    for field, role in DATASET_FIELDS.items():
        row = datasets.get(field)
        if row is None or row.facts is None or (role is Role.training and not trains):
            continue
        wanted.setdefault(row.id, set()).update({role} if role else shared - own)
        fields[row.id] = field
    sources: dict[str, Any] = {}
    told = []
    for id_, field in fields.items():
        row = datasets[field]
        facts = DatasetFacts.model_validate(row.facts)
        samples = {name: split.samples for name, split in facts.splits.items()}
        parts, text = plan_splits(samples, wanted[id_], seed)
        for found, part in parts.items():
            sources[found.value] = {
                "id": row.id,
                "sha256": row.sha256,
                "format": row.format,
                "part": part.model_dump(),
            }
        if parts:
            told.append(f"{row.name}: {text}")
    if "calibration" not in sources and any(
        v.needs_calibration and v.needs_training for v in variants
    ):
        told.append("calibration of the variants that train: the first of the training samples")
    return sources, "; ".join(told)
