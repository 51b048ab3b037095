"""The method fragments: what each paper chose, as data."""

from __future__ import annotations

import pytest

from quantlab.plugins import Kind, load_registry
from quantlab.recipe.load import for_method, load_recipe

LORA = ["efficientdm", "mpq-dm", "mpq-dm-plus", "mpq-dm-released", "mpq-dm-smooth", "mpq-dm-omq", "mpq-dm-trd"]
CONTROLS = ["mpq-dm-random", "mpq-dm-head", "mpq-dm-tail", "mpq-dm-features"]
V2 = ["mpq-dm-v2", "mpq-dm-v2-residual", "mpq-dm-v2-start", "mpq-dm-v2-memory"]


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
    settings = {name: for_method(loaded, name).tune for name in LORA + CONTROLS + V2}
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


def test_a_control_differs_from_the_method_in_one_choice(loaded) -> None:
    method = for_method(loaded, "mpq-dm")
    for ranking in ("random", "head", "tail"):
        control = for_method(loaded, f"mpq-dm-{ranking}")
        assert control.allocate[1].options == {**method.allocate[1].options, "ranking": ranking}
        assert control.model_copy(update={"allocate": method.allocate, "method": "mpq-dm"}) == method
    control = for_method(loaded, "mpq-dm-features")
    assert [loss.name for loss in control.tune.losses] == ["mse", "features"]
    tune = control.tune.model_copy(update={"losses": method.tune.losses})
    assert control.model_copy(update={"tune": tune, "method": "mpq-dm"}) == method


def test_the_parts_of_v2_are_added_one_by_one(loaded) -> None:
    def parts(name: str) -> tuple[str, str, str]:
        recipe = for_method(loaded, name)
        tuner = recipe.tune.tuners[0].options
        return recipe.weights.quantizer.name, tuner["start"], recipe.tune.losses[1].name

    assert parts("mpq-dm") == ("affine", "random", "relation")
    assert parts("mpq-dm-v2-residual") == ("residual", "random", "relation")
    assert parts("mpq-dm-v2-start") == ("affine", "quantization_error", "relation")
    assert parts("mpq-dm-v2-memory") == ("affine", "random", "memory-relation")
    assert parts("mpq-dm-v2") == ("residual", "quantization_error", "memory-relation")


def test_ptq_has_no_tuner(loaded) -> None:
    for name in ("min-max", "mse"):
        assert for_method(loaded, name).tune.tuners == ()


RECONSTRUCTING = ("adaround", "brecq", "qdrop", "q-diffusion", "ptqd", "tfmq-dm", "eda-dm", "ptq4dm", "quest")


def test_reconstruction_settings(loaded) -> None:
    """What tells the methods apart that reconstruct blocks; each block has as many steps as other methods have."""

    def options(name: str) -> dict:
        return for_method(loaded, name).tune.tuners[0].options

    names = RECONSTRUCTING
    assert {options(name)["share"] for name in names} == {1.0}
    assert [name for name in names if options(name)["grouping"] == "layer"] == ["adaround"]
    assert [name for name in names if options(name)["activations"] == "joint"] == ["qdrop", "eda-dm", "ptq4dm"]
    assert [name for name in names if options(name)["temporal_first"]] == ["tfmq-dm"]
    assert [name for name in names if options(name)["inner_weight"]] == ["eda-dm"]
    assert {options(name)["drop"] for name in ("qdrop", "eda-dm", "ptq4dm")} == {0.5}
    assert options("ptq4dm") == options("qdrop") and options("q-diffusion") == options("brecq")
    assert options("ptqd") == {**options("brecq"), "activation_share": 0.5}
    assert for_method(loaded, "tfmq-dm").activations.per_timestep
    quest, base = for_method(loaded, "quest"), for_method(loaded, "q-diffusion")
    assert [choice.name for choice in quest.tune.tuners] == ["reconstruct", "selective"]
    tune = quest.tune.model_copy(update={"tuners": quest.tune.tuners[:1]})
    assert quest.model_copy(update={"tune": tune, "method": "q-diffusion"}) == base


def test_calibration_split_and_corrections_of_those_that_reconstruct(loaded) -> None:
    recipes = {name: for_method(loaded, name) for name in RECONSTRUCTING}
    samplers = {name: recipe.calibrate.sampler.name for name, recipe in recipes.items() if recipe.calibrate.sampler}
    assert samplers == {
        "q-diffusion": "uniform-timesteps",
        "quest": "uniform-timesteps",
        "eda-dm": "density-variety",
        "ptq4dm": "normal-timesteps",
    }
    assert [name for name in recipes if recipes[name].split_skip] == ["q-diffusion", "tfmq-dm", "quest"]
    assert [name for name in recipes if recipes[name].corrections] == ["ptqd"]


@pytest.mark.parametrize("name", ["q-diffusion", "eda-dm", "ptqd", "ptq4dm"])
def test_the_variant_without_reconstruction_differs_in_nothing_else(loaded, name: str) -> None:
    whole, plain = for_method(loaded, name), for_method(loaded, f"{name}-ptq")
    assert plain.tune.tuners == ()
    assert plain.model_copy(update={"tune": whole.tune, "method": name}) == whole
