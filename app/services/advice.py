"""Advice on a request or on a job of "auto": what is known of the rows, put to the rules."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app.domain import advise as rules
from app.domain.advise import TOO_FEW_TO_TRAIN, Advice, Goal, Limits, Recommended, Situation
from app.domain.jobs import JobSpec
from app.domain.recipes import parse_variant
from app.domain.splits import Role
from app.domain.targets import TargetId
from app.domain.work import ModelFacts, Preprocessing
from app.errors import invalid
from app.services import planning
from app.services.planning import Files
from app.tables import DatasetRow, ModelRow

AUTO_VARIANTS = 3
# What else there may be in a request, such as NUL, a database may not take.
_ID = re.compile(r"[a-z]{3}_[0-9a-z]{1,40}")
_NO_DATA = "there are no samples to {use}"
_UNKNOWN = "not known yet: {what} is still being inspected"


class AdviseRequest(BaseModel):
    """What to advise on. A dataset that is named says by itself what data is at hand; without one
    the flags do. Limits are those of a job's budgets."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, description="Id; without one the advice is general.")
    dataset: str | None = None
    has_labels: bool | None = Field(default=None, description="Labelled data to train on.")
    has_representative_data: bool | None = Field(
        default=None, description="Unlabelled samples of what the model will see."
    )
    samples: int | None = Field(
        default=None, ge=0, description="How many samples, where no dataset is named."
    )
    target: TargetId = "cpu"
    goal: Goal = "balanced"
    max_accuracy_drop: float | None = Field(default=None, ge=-1, le=1)
    max_size_bytes: int | None = Field(default=None, ge=1)
    max_gzip_size_bytes: int | None = Field(default=None, ge=1)
    max_size_ratio: float | None = Field(default=None, gt=0)
    max_latency_ratio: float | None = Field(default=None, gt=0)
    max_flash_bytes: int | None = Field(default=None, ge=1)
    preprocessing: Preprocessing | None = None


def advise(session: Session, tenant_id: str, request: AdviseRequest) -> Advice:
    """Advice on a request. ServiceError 422 where a file it names is unknown or unusable."""
    model = _model(session, tenant_id, request.model)
    datasets = _datasets(session, tenant_id, request.dataset)
    if model is not None:
        # What no recipe could be made with is refused here, in the words of the job.
        spec = JobSpec(
            model=model.id,
            dataset=request.dataset,
            variants=["float16"],
            preprocessing=request.preprocessing,
        )
        planning.check(spec, planning.parse_variants(spec), Files(model, datasets))
    elif datasets:
        planning.check_usable("dataset", datasets["dataset"])
    data = _data_of(datasets) if datasets else _data_told(request)
    limits = Limits(**request.model_dump(include=set(Limits.model_fields)))
    situation = Situation(
        target=request.target, goal=request.goal, limits=limits, **data, **_model_known(model)
    )
    advice = rules.advise(situation)
    advice.notes = [*_unknown(model, datasets), *advice.notes]
    return advice


def resolve(spec: JobSpec, files: Files) -> list[Recommended]:
    """The recipes that "auto" stands for in a job. ServiceError 422 `nothing_fits`."""
    planning.check(spec, [], files)
    advice = rules.advise(situation_of_job(spec, files))
    if not advice.recommended:
        causes = "; ".join(f"{r.recipe}: {r.why_not[0]}" for r in advice.rejected[:3])
        raise invalid(
            "nothing_fits",
            "variants",
            f"no recipe fits what is asked: {causes}",
            "Loosen the budgets or the goal, bring data, or name the variants yourself;"
            " POST /v1/advise tells why each recipe is out.",
        )
    return advice.recommended[:AUTO_VARIANTS]


def situation_of_job(spec: JobSpec, files: Files) -> Situation:
    """What is known for a job; what still is being inspected is taken to allow no training."""
    return Situation(
        target=spec.target,
        goal=spec.goal or "balanced",
        limits=Limits(**spec.budgets.model_dump(include=set(Limits.model_fields))),
        **_data_of(files.datasets, spec),
        **_model_known(files.model),
    )


def _model(session: Session, tenant_id: str, id_: str | None) -> ModelRow | None:
    if id_ is None:
        return None
    row = session.get(ModelRow, id_) if _ID.fullmatch(id_) else None
    if row is None or row.tenant_id != tenant_id:
        raise invalid("unknown_model", "model", f"there is no model '{id_[:80]}'")
    return row


def _datasets(session: Session, tenant_id: str, id_: str | None) -> dict[str, DatasetRow]:
    if id_ is None:
        return {}
    row = session.get(DatasetRow, id_) if _ID.fullmatch(id_) else None
    if row is None or row.tenant_id != tenant_id:
        raise invalid("unknown_dataset", "dataset", f"there is no dataset '{id_[:80]}'")
    return {"dataset": row}


def _model_known(model: ModelRow | None) -> dict[str, Any]:
    """What the situation takes from the model. Without one it is taken for a Keras model."""
    if model is None:
        return {}
    facts = ModelFacts.model_validate(model.facts) if model.facts else None
    why_not = planning.why_not_trainable(model)
    no_trainable: str | None = None
    if why_not is not None:
        no_trainable = f"the model cannot be trained: {why_not[0]}"
    elif facts is None:
        no_trainable = _UNKNOWN.format(what="the model")
    return {
        "no_trainable_model": no_trainable,
        "parameters": facts.parameters if facts else None,
        "depthwise": facts.depthwise if facts else None,
    }


def _data_told(request: AdviseRequest) -> dict[str, Any]:
    """What data is at hand by the request's own words: labelled data trains, samples without
    labels calibrate, and train where they are told to be enough."""
    has_any = bool(request.has_labels or request.has_representative_data)
    trains = request.has_labels or (has_any and (request.samples or 0) >= TOO_FEW_TO_TRAIN)
    no_training = None
    if not trains:
        no_training = _NO_DATA.format(use="train on")
        if has_any:
            no_training = (
                "representative samples calibrate; to train on them say how many there are"
                f" ('samples', {TOO_FEW_TO_TRAIN} at least)"
            )
    return {
        "no_calibration": None if has_any else _NO_DATA.format(use="calibrate with"),
        "calibration_samples": request.samples if has_any else None,
        "no_training": no_training,
        "training_samples": request.samples if trains else None,
        "labelled": bool(request.has_labels),
        "trains_on_labels": bool(request.has_labels),
    }


def _data_of(datasets: Mapping[str, DatasetRow], spec: JobSpec | None = None) -> dict[str, Any]:
    """What data is at hand by the datasets, cut as a job that trains would cut them."""
    if any(row.facts is None for row in datasets.values()):
        serves = {"dataset", "calibration_dataset"} & datasets.keys()
        unknown = _UNKNOWN.format(what="a dataset")
        return {
            "no_calibration": None if serves else _NO_DATA.format(use="calibrate with"),
            "no_training": unknown if datasets else _NO_DATA.format(use="train on"),
        }
    seed = spec.seed if spec else 0
    sources = planning.sources_of(datasets, [parse_variant("qat")], seed)[0]
    samples = {role: source["part"]["stop"] - source["part"]["start"]
               for role, source in sources.items()}  # fmt: skip
    no_training = None
    training = sources.get(Role.training)
    if training is None:
        no_training = _NO_DATA.format(use="train on")
    elif spec and spec.training.distill == "off" and not planning.labelled(datasets, training):
        no_training = "training.distill is 'off', and the samples to train on have no labels"
    evaluation = sources.get(Role.evaluation)
    calibrates = {"dataset", "calibration_dataset"} & datasets.keys()
    return {
        "no_calibration": None if calibrates else _NO_DATA.format(use="calibrate with"),
        "calibration_samples": samples.get(Role.calibration),
        "no_training": no_training,
        "training_samples": samples.get(Role.training),
        "labelled": evaluation is not None and planning.labelled(datasets, evaluation),
        "trains_on_labels": training is not None and planning.labelled(datasets, training),
    }


def _unknown(model: ModelRow | None, datasets: Mapping[str, DatasetRow]) -> list[str]:
    """What the advice had to do without, told first."""
    notes = []
    if model is None:
        notes.append("General advice: no model was named; a Keras model is assumed.")
    elif model.facts is None:
        notes.append(f"Model '{model.id}' is still being inspected: ask again for more.")
    notes += [
        f"Dataset '{row.id}' is still being inspected: it is taken to calibrate, not to train."
        for row in datasets.values()
        if row.facts is None
    ]
    return notes
