"""Target profiles: which recipes they take, and what they set."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from app.domain.budgets import Budgets, judge
from app.domain.ethos_u import Accelerator
from app.domain.jobs import JobSpec
from app.domain.metrics import Metrics
from app.domain.recipes import STEP_TYPES, InvalidRecipe, all_recipes, parse_variant
from app.domain.target_text import target_texts
from app.domain.targets import PROFILES, TargetId, fitted, target_notes


def test_profiles_name_recipes_and_options_that_there_are() -> None:
    assert list(PROFILES) == list(get_args(TargetId))
    assert set(get_args(Accelerator)) <= set(PROFILES)
    for profile in PROFILES.values():
        assert profile.recipes
        assert set(profile.recipes) <= set(all_recipes())
        for technique, options in profile.options.items():
            assert technique in STEP_TYPES
            parse_variant([{"technique": technique, **options}])
    assert set(PROFILES["cpu"].recipes) == set(all_recipes())
    assert "int16x8" not in PROFILES["gpu"].recipes
    assert PROFILES["edgetpu"].recipes[:2] == ["int8", "qat"]
    assert PROFILES["ethos-u65-512"].title == "Arm Ethos-U65 NPU with 512 MACs a cycle"
    assert "timeout_s" in PROFILES["edgetpu"].target_options["properties"]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_target_takes_its_own_recipes_and_no_others(profile: Any) -> None:
    for recipe in all_recipes():
        variant = parse_variant(recipe)
        if recipe in profile.recipes or profile.id == "gpu":
            made = fitted(variant, profile.id)
            assert made.techniques == variant.techniques
            for step in made.recipe:
                for name, value in profile.options.get(step.technique, {}).items():
                    assert getattr(step, name) == value
        else:
            with pytest.raises(InvalidRecipe, match=f"'{profile.id}'.*does not run"):
                fitted(variant, profile.id)


@pytest.mark.parametrize(
    ("target", "step", "told"),
    [
        ("edgetpu", {"technique": "int8", "integer_only": False}, "integer_only True"),
        ("edgetpu", {"technique": "int8", "dense_granularity": "per_channel"}, "per_tensor"),
        ("edgetpu", {"technique": "qat", "input_type": "float32"}, "input_type"),
        ("microcontroller", {"technique": "int8", "output_type": "float32"}, "output_type"),
        ("ethos-u55-64", {"technique": "int16x8", "input_type": "float32"}, "integers only"),
    ],
)
def test_an_option_that_the_target_rules_out(target: Any, step: Any, told: str) -> None:
    with pytest.raises(InvalidRecipe, match=told):
        fitted(parse_variant([step]), target)


def test_options_that_agree_with_the_target_are_kept() -> None:
    step = {"technique": "int8", "integer_only": True, "input_type": "uint8"}
    (made,) = fitted(parse_variant([step]), "edgetpu").recipe
    assert made.model_dump().items() >= {**step, "dense_granularity": "per_tensor"}.items()
    (cpu,) = fitted(parse_variant("int8"), "cpu").recipe
    assert cpu == parse_variant("int8").recipe[0]


@pytest.mark.parametrize(
    ("recipe", "noted"),
    [("int16x8", True), ("dynamic_range", True), ("prune", True), ("float16", False)],
)
def test_what_a_gpu_makes_of_a_recipe(recipe: str, noted: bool) -> None:
    assert bool(target_notes(parse_variant(recipe), "gpu")) == noted
    assert target_notes(parse_variant(recipe), "cpu") == []


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("edgetpu", {"num_segments": 99}, "num_segments"),
        ("edgetpu", {"optimise": "size"}, "optimise"),
        ("ethos-u55-32", {"memory_mode": "None"}, "memory_mode"),
        ("ethos-u55-32", {"system_config": "Ethos_U65_Embedded"}, "is not one for"),
        ("ethos-u55-32", {"memory_mode": "Dedicated_Sram"}, "Shared_Sram"),
        ("edgetpu", {"delegate_search_step": 2}, "search_delegate"),
        ("microcontroller", {"timeout_s": 1}, "has no options"),
        ("cpu", {"x": 1}, "has no options"),
    ],
)
def test_options_of_the_compiler(target: str, options: Any, told: str) -> None:
    spec = {"model": "m", "variants": ["int8"], "target": target, "target_options": options}
    with pytest.raises(ValidationError, match=told) as error:
        JobSpec.model_validate(spec)
    assert error.value.errors()[0]["loc"] == ("target_options",)


def test_a_job_is_told_of_the_targets_that_there_are() -> None:
    with pytest.raises(ValidationError, match="'edgetpu'"):
        JobSpec.model_validate({"model": "m", "variants": ["int8"], "target": "tpu"})


def test_budgets_of_arena_and_flash() -> None:
    metrics = Metrics(size_bytes=9, gzip_size_bytes=9, arena_bytes=100, flash_bytes=16)
    limits = Budgets(max_arena_bytes=99, max_flash_bytes=16)
    checks = {c.budget: c.passed for c in judge(limits, [("int8", True, metrics)]).checks}
    assert checks == {"succeeded": True, "max_arena_bytes": False, "max_flash_bytes": True}
    unmeasured = Metrics(size_bytes=9, gzip_size_bytes=9, flash_bytes=16)
    assert judge(limits, [("int8", True, unmeasured)]).verdict == "fail"


def test_figures_of_a_target_as_sentences() -> None:
    assert list(target_texts({})) == []
    predicted = {"mapped": 3, "cpu": 1, "measured_by": "prediction",
        "analysis": {"memory": {"on_chip_bytes": 2048, "off_chip_bytes": 0}}}  # fmt: skip
    assert list(target_texts({"edgetpu": predicted})) == [
        ("Edge TPU", "3 of 4 operators on the Edge TPU, 2 KiB of parameters on the chip:"
        " predicted, not compiled.")
    ]  # fmt: skip
    (micro,) = target_texts({"flash_bytes": 16, "arena_bytes": 8, "micro": {"tflm_version": "1"}})
    assert micro[1].startswith("16 bytes of flash for the model, 8 bytes of tensor arena")
