"""The decision tree: what is recommended, what is out and why, and what would help."""

from itertools import product
from typing import Any, get_args

import pytest

from app.domain.advise import Advice, Goal, Limits, Situation, advise
from app.domain.expectations import expected
from app.domain.recipes import STEP_TYPES, all_recipes, number_format, parse_variant
from app.domain.targets import PROFILES, TargetId

GOALS = get_args(Goal)
NOTHING: dict[str, Any] = {"no_calibration": "no samples", "no_training": "no samples to train on"}
SAMPLES: dict[str, Any] = {"no_training": "too few to train on"}
TFLITE: dict[str, Any] = {"no_trainable_model": "a .tflite holds no layers"}


def recommended(**situation: Any) -> list[str]:
    return [one.recipe for one in advise(Situation(**situation)).recommended]


def why_not(recipe: str, **situation: Any) -> str:
    advice = advise(Situation(**situation))
    return "; ".join(one.why_not[0] for one in advice.rejected if one.recipe == recipe)


def missing(advice: Advice) -> dict[str, list[str]]:
    return {one.what: one.would_allow for one in advice.missing}


@pytest.mark.parametrize(
    ("situation", "first"),
    [
        ({**NOTHING}, ["dynamic_range", "float16"]),
        ({**NOTHING, "goal": "size"}, ["dynamic_range", "float16"]),
        ({**NOTHING, "goal": "latency"}, ["dynamic_range"]),
        ({**NOTHING, "goal": "accuracy"}, ["float16", "dynamic_range"]),
        ({**NOTHING, "target": "gpu"}, ["float16", "dynamic_range"]),
        ({**NOTHING, "target": "gpu", "goal": "latency"}, ["float16"]),
        ({**SAMPLES, "depthwise": False}, ["int8", "dynamic_range", "float16"]),
        ({**SAMPLES, "goal": "latency"}, ["int8", "dynamic_range"]),
        ({**SAMPLES, "goal": "accuracy", "depthwise": True}, ["float16", "int16x8", "int8"]),
        ({"depthwise": True}, ["int8", "qat", "prune+qat"]),
        ({"depthwise": False}, ["int8", "qat", "prune+int8"]),
        ({"goal": "size", "depthwise": False}, ["prune+int8", "int8"]),
        ({"goal": "size", "depthwise": True}, ["prune+qat", "prune+int8"]),
        ({"goal": "latency", "depthwise": True}, ["int8", "qat", "prune+qat"]),
        ({"goal": "accuracy"}, ["float16", "qat"]),
        ({"goal": "latency", "target": "gpu"}, ["float16"]),
        ({"goal": "latency", "target": "edgetpu", **SAMPLES}, ["int8"]),
        ({"target": "ethos-u55-128", **SAMPLES}, ["int8", "int16x8"]),
        ({"target": "microcontroller", **SAMPLES}, ["int8", "int16x8"]),
        ({**TFLITE}, ["int8", "dynamic_range", "float16", "int16x8"]),
        ({"training_samples": 99}, ["int8", "dynamic_range", "float16", "int16x8"]),
    ],
)
def test_the_first_choices(situation: dict[str, Any], first: list[str]) -> None:
    assert recommended(**situation)[: len(first)] == first


@pytest.mark.parametrize(
    ("recipe", "situation", "told"),
    [
        ("int8", NOTHING, "no samples"),
        ("qat", NOTHING, "no samples to train on"),
        ("qat", TFLITE, "holds no layers"),
        ("prune", {"training_samples": 42}, "only 42 samples"),
        ("float16", {"target": "edgetpu"}, "runs no float16 models; it takes int8, qat"),
        ("int16x8", {"target": "edgetpu"}, "runs no int16x8 models"),
        ("int16x8", {"target": "gpu"}, "runs no int16x8 models"),
        ("prune", {"target": "ethos-u85-256"}, "runs no float32 models"),
        ("dynamic_range", {"target": "microcontroller"}, "runs no dynamic_range models"),
        ("float16", {"goal": "latency"}, "the goal is latency"),
        ("prune", {"goal": "latency"}, "only the download gets smaller"),
        ("int16x8", {"goal": "latency"}, "slow reference kernels"),
        ("dynamic_range", {"goal": "latency", "target": "gpu"}, "only the file gets smaller"),
        ("float16", {"limits": Limits(max_size_ratio=0.3)}, "max_size_ratio is 0.3"),
        ("int16x8", {"limits": Limits(max_latency_ratio=1)}, "10 to 50 is to be expected"),
        ("int8", {"limits": Limits(max_size_bytes=2000), "parameters": 10_000}, "10400 to 20800"),
        (
            "int8",
            {"limits": Limits(max_gzip_size_bytes=100), "parameters": 1000},
            "max_gzip_size_bytes is 100",
        ),
        ("int8", {"limits": Limits(max_accuracy_drop=-0.1)}, "max_accuracy_drop is -0.1"),
    ],
)
def test_what_speaks_against_a_recipe(recipe: str, situation: dict[str, Any], told: str) -> None:
    assert recipe not in recommended(**situation)
    assert told in why_not(recipe, **situation)


@pytest.mark.parametrize(
    ("recipe", "situation", "told"),
    [
        ("float16", {}, "needs no data"),
        ("float16", {"target": "gpu"}, "computes in float16"),
        ("dynamic_range", {}, "slower than float32"),
        ("int8", {}, "integers are the fastest on: CPU"),
        ("int8", {"target": "gpu"}, "makes floats of it"),
        ("int8", {"depthwise": True}, "bias correction"),
        ("int8", {"calibration_samples": 20}, "only 20 samples calibrate it"),
        ("int16x8", {}, "reference kernels"),
        ("qat", {}, "the least of the 8-bit techniques"),
        ("prune", {}, "from the model's own answers"),
        ("prune+qat", {"labelled": True}, "from the model's own answers"),
        ("prune", {"training_samples": 500}, "500 samples are few"),
        ("prune+int8", {"target": "ethos-u55-128"}, "packs the zeros"),
        ("prune+cluster+qat", {}, "it trains 3 times"),
        ("int8", {"limits": Limits(max_accuracy_drop=0.001)}, "may break max_accuracy_drop"),
    ],
)
def test_what_speaks_for_a_recipe(recipe: str, situation: dict[str, Any], told: str) -> None:
    found = {one.recipe: one for one in advise(Situation(**situation)).recommended}
    assert told in "; ".join(found[recipe].reasons)


def test_what_is_sure_to_hold_a_limit_comes_before_what_may_break_it() -> None:
    assert recommended(depthwise=False)[0] == "int8"
    assert recommended(depthwise=False, limits=Limits(max_accuracy_drop=0.006))[0] == "float16"


def test_what_is_missing_and_what_it_would_allow() -> None:
    nothing = missing(advise(Situation(**NOTHING)))
    assert nothing.keys() == {"calibration_data", "training_data", "labels"}
    assert nothing["calibration_data"] == ["int8", "int16x8"]
    assert "prune+qat" in nothing["training_data"]
    assert "int8" not in nothing["training_data"]
    # Each alone would help nothing.
    advice = advise(Situation(**TFLITE, **SAMPLES))
    assert missing(advice).keys() == {"training_data", "trainable_model", "labels"}
    assert "Only together with: trainable_model." in advice.missing[0].message
    assert missing(advise(Situation(labelled=True))) == {}
    # What the target does not run no data makes possible.
    edge = missing(advise(Situation(target="edgetpu", **NOTHING)))
    assert edge["calibration_data"] == ["int8"]


def test_what_could_not_be_weighed_is_told() -> None:
    limits = Limits(max_accuracy_drop=0.01, max_size_bytes=1000)
    notes = " ".join(advise(Situation(target="edgetpu", limits=limits)).notes)
    for told in ("without labels", "the model's size is not known"):
        assert told in notes
    assert "none is measured here" in advise(Situation(target="gpu")).notes[0]


def test_what_is_recommended_is_what_the_target_takes() -> None:
    advice = advise(Situation(target="edgetpu"))
    assert {one.variant for one in advice.recommended} == set(PROFILES["edgetpu"].recipes)
    assert {one.variant for one in advise(Situation()).recommended} == set(all_recipes())


FACTS: list[dict[str, Any]] = [{}, NOTHING, SAMPLES, TFLITE, {**TFLITE, **NOTHING}]


@pytest.mark.parametrize("target", get_args(TargetId))
@pytest.mark.parametrize("facts", FACTS)
def test_every_recipe_is_recommended_or_rejected(target: TargetId, facts: dict[str, Any]) -> None:
    for goal, depthwise, parameters in product(GOALS, (None, True, False), (None, 10**5, 10**7)):
        situation = Situation(
            target=target, goal=goal, depthwise=depthwise, parameters=parameters, **facts
        )
        advice = advise(situation)
        assert advice == advise(situation)
        inside = [one.recipe for one in advice.recommended]
        outside = [one.recipe for one in advice.rejected]
        assert sorted(inside + outside) == sorted(all_recipes())
        assert all(one.why_not for one in advice.rejected)
        assert [one.rank for one in advice.recommended] == [*range(1, len(inside) + 1)]
        scores = [one.score for one in advice.recommended]
        assert scores == sorted(scores, reverse=True)
        for one in advice.recommended:
            variant = parse_variant(one.variant)
            assert number_format(one.recipe) in PROFILES[target].number_formats
            assert one.reasons
            assert not (variant.needs_training and {"no_trainable_model", "no_training"} & {*facts})
            assert bool(one.needs) == (variant.needs_training or variant.needs_calibration)


def test_all_recipes_are_all_that_the_grammar_allows() -> None:
    names = ["", *STEP_TYPES]
    legal = set()
    for steps in product(names, repeat=3):
        recipe = "+".join(filter(None, steps))
        try:
            legal.add("+".join(parse_variant(recipe).techniques))
        except ValueError:
            continue
    assert set(all_recipes()) == legal
    assert len(all_recipes()) == len(legal)


@pytest.mark.parametrize("recipe", all_recipes())
def test_expected_figures_are_ranges_with_a_source(recipe: str) -> None:
    for parameters, depthwise in product((None, 10**5, 10**7), (None, True, False)):
        found = expected(recipe, "cpu", parameters, depthwise)
        assert found.latency_ratio is not None
        for low, high in (
            found.size_ratio, found.gzip_size_ratio, found.accuracy_drop, found.latency_ratio,
        ):  # fmt: skip
            assert low <= high
        assert "docs/benchmarks.md" in found.source
    assert expected(recipe, "edgetpu").latency_ratio is None
    known, unknown = expected(recipe, "cpu", 10**7), expected(recipe)
    assert unknown.size_ratio[0] <= known.size_ratio[0]
    assert known.size_ratio[1] <= unknown.size_ratio[1]
