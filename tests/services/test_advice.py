"""Advice on rows, without a service: it recommends nothing that a job would be refused."""

from itertools import product
from typing import Any, get_args

import pytest
from test_planning import dataset, model, spec

from app.db import Database
from app.domain.advise import Goal
from app.domain.jobs import JobSpec
from app.domain.targets import TargetId
from app.errors import ServiceError
from app.services import advice, planning
from app.services.advice import AdviseRequest
from app.services.planning import Files
from app.tables import DatasetRow, ModelRow


def auto(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "mdl_1", "variants": "auto"} | fields)


def inspecting(row: Any) -> Any:
    row.facts, row.status = None, "inspecting"
    return row


def models() -> dict[str, ModelRow]:
    return {
        "keras": model(),
        "depthwise": model(depthwise=True),
        "older inspection": model("h5", trainable=None),
        "lambda": model(trainable=False, not_trainable="it has a Lambda."),
        "saved_model": model("saved_model"),
        "older saved_model": model("saved_model", trainable=None),
        "tflite": model("tflite", trainable=False),
        "inspecting": inspecting(model()),
        "inspecting tflite": inspecting(model("tflite")),
    }


def datasets() -> dict[str, dict[str, DatasetRow]]:
    return {
        "none": {},
        "unsplit": {"dataset": dataset("d", all=5000)},
        "unlabelled": {"dataset": dataset("d", labelled=False, all=5000)},
        "small": {"dataset": dataset("d", all=40)},
        "one sample": {"dataset": dataset("d", all=1)},
        "test alone": {"dataset": dataset("d", test=500)},
        "train and test": {"dataset": dataset("d", train=1000, test=100)},
        "inspecting": {"dataset": inspecting(dataset("d", all=1))},
        "calibration": {"calibration_dataset": dataset("c", all=50)},
        "training": {"training_dataset": dataset("t", all=2000)},
        "evaluation": {"evaluation_dataset": dataset("e", all=200)},
        "each": {
            "calibration_dataset": dataset("c", all=50),
            "training_dataset": dataset("t", all=2000),
            "evaluation_dataset": dataset("e", all=200),
        },
    }


@pytest.mark.parametrize("data", datasets())
@pytest.mark.parametrize("kind", models())
def test_auto_resolves_to_what_a_job_accepts(kind: str, data: str) -> None:
    files = Files(models()[kind], datasets()[data])
    checked = set()
    for target, goal, distill in product(get_args(TargetId), get_args(Goal), ("auto", "off")):
        fields = {"target": target, "training": {"distill": distill}}
        asked = auto(goal=goal, **fields)
        advised = advice.rules.advise(advice.situation_of_job(asked, files)).recommended
        # The target changes nothing of what a job accepts.
        for one in advised:
            if (one.recipe, distill) not in checked:
                checked.add((one.recipe, distill))
                job = spec(one.variant, **fields)
                planning.check(job, planning.parse_variants(job), files)
        if not advised:
            # Such as on NPUs, which run integers only, where there is nothing to calibrate with.
            with pytest.raises(ServiceError, match="no recipe fits"):
                advice.resolve(asked, files)
            continue
        chosen = advice.resolve(asked, files)
        assert chosen == advised[:3]
        together = spec(*(one.variant for one in chosen), **fields)
        planning.check(together, planning.parse_variants(together), files)


def test_auto_that_nothing_fits_is_refused() -> None:
    asked = auto(budgets={"max_size_bytes": 1})
    with pytest.raises(ServiceError) as caught:
        advice.resolve(asked, Files(model(), {}))
    assert (caught.value.status, caught.value.code) == (422, "nothing_fits")
    assert caught.value.errors[0].field == "variants"
    assert "max_size_bytes" in caught.value.detail
    assert "/v1/advise" in (caught.value.hint or "")


def advise(database: Database, **request: Any) -> tuple[list[str], str]:
    """The recipes recommended, and all notes in one."""
    with database.write() as session:
        for row in (
            model(parameters=10**6),
            dataset("d", all=5000),
            dataset("u", labelled=False, all=50),
            inspecting(dataset("i", all=1)),
            dataset("odd", all=9),
        ):
            row.tenant_id, row.size_bytes = "default", 1
            if row.id == "dat_odd":
                row.facts["features"][0]["shape"] = [9]
            session.merge(row)
        bare = inspecting(model())
        bare.id, bare.sha256, bare.tenant_id, bare.size_bytes = "mdl_2", "cd", "default", 1
        session.merge(bare)
        stranger = model()
        stranger.id, stranger.tenant_id, stranger.size_bytes = "mdl_3", "other", 1
        session.merge(stranger)
        session.flush()
        found = advice.advise(session, "default", AdviseRequest(**request))
        return [one.recipe for one in found.recommended], " ".join(found.notes)


def test_what_is_at_hand_is_read_from_the_rows_or_the_request(database: Database) -> None:
    bare, notes = advise(database)
    assert bare == ["dynamic_range", "float16"]
    assert "no model was named" in notes
    assert advise(database, has_representative_data=True)[0][0] == "int8"
    assert "qat" not in advise(database, has_representative_data=True)[0]
    assert "qat" in advise(database, has_representative_data=True, samples=100)[0]
    assert "qat" in advise(database, has_labels=True)[0]
    assert "qat" not in advise(database, has_labels=True, samples=99)[0]
    assert "int8" not in advise(database, has_labels=False, has_representative_data=False)[0]
    known, notes = advise(database, model="mdl_1", dataset="dat_d")
    assert {"int8", "qat", "prune+qat"} <= set(known)
    assert notes == ""
    # The dataset knows better than the flags.
    assert "qat" not in advise(database, model="mdl_1", dataset="dat_u", has_labels=True)[0]
    unknown, notes = advise(database, model="mdl_2", dataset="dat_i")
    assert "int8" in unknown
    assert not any("qat" in recipe or "prune" in recipe for recipe in unknown)
    assert "'mdl_2' is still being inspected" in notes
    assert "'dat_i' is still being inspected" in notes
    assert advise(database, model="mdl_1", max_size_bytes=100)[0] == []


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        ({"model": "mdl_0"}, "unknown_model", "model"),
        ({"model": "mdl_3"}, "unknown_model", "model"),
        ({"model": "a\0b"}, "unknown_model", "model"),
        ({"dataset": "dat_0"}, "unknown_dataset", "dataset"),
        ({"dataset": "mdl_1'; --"}, "unknown_dataset", "dataset"),
        ({"model": "mdl_1", "dataset": "dat_odd"}, "shape_mismatch", "dataset"),
    ],
)
def test_files_that_cannot_be_had_are_refused_as_in_a_job(
    database: Database, request_: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        advise(database, **request_)
    assert (caught.value.status, caught.value.code) == (422, code)
    assert caught.value.errors[0].field == field
