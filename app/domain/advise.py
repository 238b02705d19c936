"""Which recipes to try: a decision tree over the data at hand, the target, the goal, the limits and
what is known of the model. Pure rules: what is asked for, looked up and written is elsewhere.
"""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.domain.expectations import Expected, Range, expected
from app.domain.recipes import CALIBRATED, TRAINED, all_recipes, number_format
from app.domain.targets import PROFILES, TargetId

Goal = Literal["size", "latency", "accuracy", "balanced"]
Cause = Literal["calibration_data", "training_data", "trainable_model", "target", "goal", "limit"]
# What the user can bring, in the order in which it is asked for.
GIVEN: tuple[Cause, ...] = ("calibration_data", "training_data", "trainable_model")

ENOUGH_TO_CALIBRATE = 100
TOO_FEW_TO_TRAIN = 100
FEW_TO_TRAIN = 1000


class Limits(BaseModel):
    """Limits that must hold, as in a job's budgets; None is no limit."""

    model_config = ConfigDict(extra="forbid")

    max_accuracy_drop: float | None = None
    max_size_bytes: int | None = None
    max_gzip_size_bytes: int | None = None
    max_size_ratio: float | None = None
    max_latency_ratio: float | None = None
    max_flash_bytes: int | None = None


class Situation(BaseModel):
    """What is known. `no_…` says why something cannot be had, and is None where it can.

    `training_samples`, `calibration_samples`, `parameters`, `depthwise` are None where unknown.
    `labelled` is of what evaluates, `trains_on_labels` of what trains.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: TargetId = "cpu"
    goal: Goal = "balanced"
    limits: Limits = Limits()
    no_calibration: str | None = None
    calibration_samples: int | None = None
    no_training: str | None = None
    training_samples: int | None = None
    no_trainable_model: str | None = None
    labelled: bool = False
    trains_on_labels: bool = False
    parameters: int | None = None
    depthwise: bool | None = None


class Recommended(BaseModel):
    """`variant` is what to put into a job's `variants`: a job sets the options that its target
    needs. The score orders the recipes of one answer and means nothing beside that."""

    recipe: str
    name: str
    variant: str
    rank: int
    score: float
    reasons: list[str]
    expected: Expected
    needs: list[str]


class Rejected(BaseModel):
    recipe: str
    why_not: list[str]


class Missing(BaseModel):
    """Something that is not at hand, and what it would make possible."""

    what: str
    message: str
    would_allow: list[str]


class Advice(BaseModel):
    recommended: list[Recommended]
    rejected: list[Rejected]
    missing: list[Missing]
    notes: list[str]


class Reason(BaseModel):
    cause: Cause
    text: str


def advise(situation: Situation) -> Advice:
    """Every legal recipe, recommended best first or rejected with the reasons."""
    against = {recipe: _against(recipe, situation) for recipe in all_recipes()}
    return Advice(
        recommended=_ranked([r for r, reasons in against.items() if not reasons], situation),
        rejected=[
            Rejected(recipe=recipe, why_not=[reason.text for reason in reasons])
            for recipe, reasons in against.items()
            if reasons
        ],
        missing=_missing(against, situation),
        notes=_notes(situation),
    )


def _against(recipe: str, situation: Situation) -> list[Reason]:
    """Everything that speaks against a recipe; one reason is enough to reject it."""
    return [
        *_target_against(recipe, situation),
        *_data_against(recipe, situation),
        *_goal_against(recipe, situation),
        *_limits_against(recipe, situation),
    ]


def _target_against(recipe: str, situation: Situation) -> Iterable[Reason]:
    profile = PROFILES[situation.target]
    if (numbers := number_format(recipe)) not in profile.number_formats:
        formats = ", ".join(profile.number_formats)
        text = f"{profile.title} runs no {numbers} models; it takes {formats}"
        yield Reason(cause="target", text=text)


def _data_against(recipe: str, situation: Situation) -> Iterable[Reason]:
    techniques = set(recipe.split("+"))
    trains = bool(techniques & TRAINED)
    if trains and situation.no_trainable_model is not None:
        yield Reason(cause="trainable_model", text=situation.no_trainable_model)
    if trains:
        yield from _training_against(situation)
    # What a recipe trains on calibrates it as well.
    calibrates = bool(techniques & CALIBRATED) and not (trains and situation.no_training is None)
    if calibrates and situation.no_calibration is not None:
        yield Reason(cause="calibration_data", text=situation.no_calibration)


def _training_against(situation: Situation) -> Iterable[Reason]:
    samples = situation.training_samples
    if situation.no_training is not None:
        yield Reason(cause="training_data", text=situation.no_training)
    elif samples is not None and samples < TOO_FEW_TO_TRAIN:
        text = (
            f"only {samples} samples are there to train on; with less than {TOO_FEW_TO_TRAIN} a"
            " network learns them by heart"
        )
        yield Reason(cause="training_data", text=text)


def _goal_against(recipe: str, situation: Situation) -> Iterable[Reason]:
    numbers = number_format(recipe)
    if situation.goal != "latency" or numbers not in PROFILES[situation.target].number_formats:
        return
    speed = _SPEED[_kind(situation.target)].get(numbers, 0.0)
    if speed <= 0.0:
        text = f"the goal is latency, and {_SLOW[numbers]}"
        yield Reason(cause="goal", text=text)


def _limits_against(recipe: str, situation: Situation) -> Iterable[Reason]:
    for name, limit, (low, high) in _limited(recipe, situation):
        if low > limit:
            text = f"{name} is {limit:g}, and {_range((low, high))} is to be expected"
            yield Reason(cause="limit", text=text)


def _limited(recipe: str, situation: Situation) -> Iterable[tuple[str, float, Range]]:
    """Each limit that is given and can be judged, with the range that the recipe will come to."""
    figures = _expected(recipe, situation)
    ranges: dict[str, Range | None] = {
        "max_accuracy_drop": figures.accuracy_drop,
        "max_size_ratio": figures.size_ratio,
        "max_latency_ratio": figures.latency_ratio,
    }
    if situation.parameters is not None:
        # The float32 file is its weights and little else; the download some 8 % less.
        size = 4 * situation.parameters
        ranges["max_size_bytes"] = _times(size, figures.size_ratio)
        # As a C array, the file is what lies in flash.
        ranges["max_flash_bytes"] = ranges["max_size_bytes"]
        ranges["max_gzip_size_bytes"] = _times(0.92 * size, figures.gzip_size_ratio)
    for name, limit in situation.limits.model_dump(exclude_none=True).items():
        if (found := ranges.get(name)) is not None:
            yield name, limit, found


def _times(factor: float, range_: Range) -> Range:
    return round(factor * range_[0]), round(factor * range_[1])


def _expected(recipe: str, situation: Situation) -> Expected:
    return expected(recipe, situation.target, situation.parameters, situation.depthwise)


# How much a number format speeds a target up, to order them by: no figures. CPU: ratios of
# docs/benchmarks.md. GPU: float16 is what it computes in. NPUs: 8-bit is what they are made for.
_SPEED: dict[str, dict[str, float]] = {
    "cpu": {"float16": 0.0, "dynamic_range": 0.35, "int8": 0.6, "qat": 0.6, "int16x8": -1.0},
    "gpu": {"float16": 0.6, "int8": 0.3, "qat": 0.3},
    "npu": {"int8": 1.0, "qat": 1.0, "int16x8": 0.5},
    "microcontroller": {"int8": 0.8, "qat": 0.8, "int16x8": 0.4},
}
_INTEGER_GPU = "the file is small; the GPU makes floats of it when it is loaded"
_SLOW = {
    "float16": "float16 files are computed in float32 there",
    "dynamic_range": "the weights are made float again there: only the file gets smaller",
    "int16x8": "int16 activations run on slow reference kernels there",
    "float32": "the numbers stay float32: only the download gets smaller",
}


def _kind(target: str) -> str:
    return "npu" if target.startswith(("edgetpu", "ethos")) else target


def _ranked(recipes: list[str], situation: Situation) -> list[Recommended]:
    scores = {recipe: _score(recipe, situation) for recipe in recipes}
    order = all_recipes()
    best_first = sorted(recipes, key=lambda recipe: (-scores[recipe], order.index(recipe)))
    return [
        Recommended(
            recipe=recipe,
            name=recipe,
            variant=recipe,
            rank=rank,
            score=scores[recipe],
            reasons=list(_reasons(recipe, situation)),
            expected=_expected(recipe, situation),
            needs=list(_needs(recipe)),
        )
        for rank, recipe in enumerate(best_first, 1)
    ]


def _score(recipe: str, situation: Situation) -> float:
    """Savings by what the goal values, less the accuracy at risk and the cost of training."""
    figures = _expected(recipe, situation)
    file = 1 - sum(figures.size_ratio) / 2
    download = 1 - sum(figures.gzip_size_ratio) / 2
    speed = _SPEED[_kind(situation.target)].get(number_format(recipe), 0.0)
    risk = figures.accuracy_drop[1]
    trainings = len(set(recipe.split("+")) & TRAINED)
    match situation.goal:
        case "size":
            score = 0.5 * file + 0.5 * download + 0.05 * speed - risk - 0.01 * trainings
        case "latency":
            score = speed + 0.2 * file - 3 * risk - 0.05 * trainings
        case "accuracy":
            score = 0.2 * file + 0.1 * speed - 20 * risk
        case "balanced":
            score = 0.35 * file + 0.15 * download + 0.4 * speed - 5 * risk - 0.05 * trainings
    may_break = [name for name, limit, (_, high) in _limited(recipe, situation) if high > limit]
    samples = situation.training_samples
    few = trainings > 0 and samples is not None and samples < FEW_TO_TRAIN
    return round(score - 0.3 * len(may_break) - 0.1 * few, 3)


def _reasons(recipe: str, situation: Situation) -> Iterable[str]:
    techniques = recipe.split("+")
    figures = _expected(recipe, situation)
    if figures.size_ratio[1] < 1:
        yield f"the file shrinks to {_range(figures.size_ratio)} of float32"
    if "prune" in techniques or "cluster" in techniques:
        yield f"the download (gzip) shrinks to {_range(figures.gzip_size_ratio)} of float32"
    yield from _number_reasons(number_format(recipe), situation)
    yield from _training_reasons(techniques, situation)
    for name, limit, (low, high) in _limited(recipe, situation):
        if high > limit:
            yield f"it may break {name} {limit:g}: {_range((low, high))} is to be expected"


def _number_reasons(numbers: str, situation: Situation) -> Iterable[str]:
    title = PROFILES[situation.target].title
    if numbers == "float16":
        yield "it needs no data, and loses no accuracy that matters"
        if situation.target == "gpu":
            yield "the GPU computes in float16"
    if numbers == "dynamic_range":
        yield "it needs no data; depthwise weights stay float, for accuracy"
        if situation.target == "cpu":
            yield "faster on ARM; on x86 it can be slower than float32: see the measured latency"
    if numbers in ("int8", "qat"):
        yield _INTEGER_GPU if situation.target == "gpu" else f"integers are the fastest on: {title}"
    if numbers == "int8" and situation.depthwise:
        yield "depthwise layers lose more than others in int8; bias correction wins some of it back"
    if numbers == "qat":
        yield "training with quantization in it loses the least of the 8-bit techniques"
    if numbers == "int16x8":
        yield "16-bit activations stay close to float32 where 8 bits lose too much"
        if situation.target == "cpu":
            yield "slow on a CPU: reference kernels"
    few = situation.calibration_samples
    if numbers in CALIBRATED and few is not None and few < ENOUGH_TO_CALIBRATE:
        yield f"only {few} samples calibrate it; {ENOUGH_TO_CALIBRATE} are recommended"


def _training_reasons(techniques: list[str], situation: Situation) -> Iterable[str]:
    trained = [technique for technique in techniques if technique in TRAINED]
    if not trained:
        return
    if "prune" in trained and situation.target.startswith("ethos"):
        yield "the compiler packs the zeros: less memory and bandwidth on the device"
    if not situation.trains_on_labels:
        yield "without labels it learns from the model's own answers"
    samples = situation.training_samples
    if samples is not None and samples < FEW_TO_TRAIN:
        yield f"{samples} samples are few to train on: watch the accuracy"
    times = f"{len(trained)} times" if len(trained) > 1 else "once"
    yield f"it trains {times}: minutes to hours"


def _needs(recipe: str) -> Iterable[str]:
    techniques = set(recipe.split("+"))
    if techniques & TRAINED:
        yield "a Keras model (.keras, .h5, or a SavedModel saved by Keras)"
        yield f"samples to train on: {FEW_TO_TRAIN} or more; labels are not needed, but help"
    elif techniques & CALIBRATED:
        yield f"about {ENOUGH_TO_CALIBRATE} unlabelled samples to calibrate with"


_ASKED_FOR: dict[Cause, str] = {
    "calibration_data": f"About {ENOUGH_TO_CALIBRATE} representative samples, labels not needed.",
    "training_data": f"Samples to train on, {FEW_TO_TRAIN} or more; labels help.",
    "trainable_model": "The model as .keras, .h5, or a SavedModel saved by Keras.",
}

_BROUGHT: dict[Cause, dict[str, None]] = {
    "calibration_data": {"no_calibration": None, "calibration_samples": None},
    "training_data": {"no_training": None, "training_samples": None},
    "trainable_model": {"no_trainable_model": None},
}


def _missing(against: dict[str, list[Reason]], situation: Situation) -> list[Missing]:
    """What would allow more recipes: by itself, or where nothing does, with what else is needed."""
    found = []
    for what in GIVEN:
        brought = situation.model_copy(update=_BROUGHT[what])
        alone = [r for r, reasons in against.items() if reasons and not _against(r, brought)]
        together = {
            recipe: causes
            for recipe, reasons in against.items()
            if what in (causes := {reason.cause for reason in reasons}) and causes <= set(GIVEN)
        }
        if alone:
            found.append(Missing(what=what, message=_ASKED_FOR[what], would_allow=alone))
        elif together:
            others = sorted(set().union(*together.values()) - {what})
            message = f"{_ASKED_FOR[what]} Only together with: {', '.join(others)}."
            found.append(Missing(what=what, message=message, would_allow=list(together)))
    if not situation.labelled:
        found.append(
            Missing(
                what="labels",
                message="Labels in the dataset ('y').",
                would_allow=["accuracy in the report", "budgets max_accuracy_drop, min_accuracy"],
            )
        )
    return found


def _notes(situation: Situation) -> list[str]:
    notes = []
    if situation.target == "gpu":
        notes.append("No latency is told for a GPU: none is measured here.")
    if situation.limits.max_accuracy_drop is not None and not situation.labelled:
        notes.append(
            "max_accuracy_drop cannot be judged without labels; the budget min_agreement can."
        )
    limits = situation.limits
    asked = (limits.max_size_bytes, limits.max_gzip_size_bytes, limits.max_flash_bytes)
    if any(asked) and situation.parameters is None:
        notes.append("Limits in bytes were not weighed: the model's size is not known.")
    return notes


def _range(range_: Range) -> str:
    low, high = (f"{value:g}" for value in range_)
    return low if low == high else f"{low} to {high}"
