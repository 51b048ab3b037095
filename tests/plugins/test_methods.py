"""The method fragments: what each paper chose, as data."""

from __future__ import annotations

import pytest

from quantlab.plugins import Kind, load_registry
from quantlab.recipe.load import for_method, load_recipe

LORA = ["efficientdm", "mpq-dm", "mpq-dm-plus", "mpq-dm-released", "mpq-dm-smooth", "mpq-dm-omq", "mpq-dm-trd"]


@pytest.fixture(scope="module")
def loaded():
    return load_recipe("digits/mpq-dm-w2a4")


def test_every_method_resolves(loaded) -> None:
    for name in load_registry().entries(Kind.METHOD):
        assert for_method(loaded, name).method == name


def test_all_that_train_share_iterations_and_rates(loaded) -> None:
    shared = (
        "iterations",
        "batch",
        "rank",
        "adapter_learning_rate",
        "weight_learning_rate",
        "activation_learning_rate",
    )
    settings = {name: for_method(loaded, name).tune for name in LORA}
    for field in shared:
        assert len({getattr(tune, field) for tune in settings.values()}) == 1, field


def test_released_takes_the_second_column(loaded) -> None:
    recipe = for_method(loaded, "mpq-dm-released")
    policy = recipe.allocate[1].options
    assert recipe.inputs_from == "quantized_upstream"
    assert (policy["groups"], policy["search_observer"], policy["quantize_inputs"]) == (1, "min_max", False)
    assert not recipe.weights.round_zero_point and not recipe.activations.round_zero_point
    assert recipe.activations.share_start
    (tuner,) = recipe.tune.tuners
    assert tuner.options["conv"] == "per_tap" and tuner.options["scale_offset"] == 0.01
    relation = recipe.tune.losses[1].options
    assert (relation["gradient"], relation["window"], relation["weight"]) == (False, 2, 100)


def test_default_takes_the_first_column(loaded) -> None:
    recipe = for_method(loaded, "mpq-dm")
    policy = recipe.allocate[1].options
    assert recipe.inputs_from == "teacher"
    assert (policy["groups"], policy["search_observer"], policy["quantize_inputs"]) == (5, "mse", True)
    assert recipe.weights.round_zero_point and recipe.tune.losses[1].options["gradient"]


def test_ptq_has_no_tuner(loaded) -> None:
    for name in ("min-max", "mse"):
        assert for_method(loaded, name).tune.tuners == ()
