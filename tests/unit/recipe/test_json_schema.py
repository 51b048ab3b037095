"""The schema accepts what loading accepts, and refuses misspelt keys, names and options."""

from __future__ import annotations

import json

import pytest

from quantlab.plugins import Kind, load_registry
from quantlab.recipe.find import find_recipe, packaged_folder, packaged_recipes
from quantlab.recipe.json_schema import recipe_schema
from quantlab.recipe.layers import parse_yaml, read_yaml

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema(load_registry())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_every_recipe_that_ships_fits(validator):
    files = [*map(find_recipe, packaged_recipes()), *(packaged_folder() / "base").glob("*.yaml")]
    for path in files:
        validator.validate(read_yaml(path)[0].plain)


def test_every_method_fits(validator):
    for name, entry in load_registry().entries(Kind.METHOD).items():
        fragment = json.loads(json.dumps(entry.value.fragment))
        validator.validate({"version": 1, "method": name, **fragment})


@pytest.mark.parametrize(
    "wrong",
    [
        "buget: {weight_bits: 2}",
        "budget: {weight_bits: 9}",
        "method: mpqdm",
        "allocate: [kurtosi]",
        "allocate: [{kurtosis: {grops: 1}}]",
        "allocate: [{kurtosis: {extra: many}}]",
        "weights: {quantizer: afine}",
        "weights: {observer: best}",
        "model: {source: builtin, name: digit}",
        "model: {source: builtin, name: digits, shards: 2}",
        "tune: {losses: [{mse: {schedule: {inital: 0}}}]}",
        "profiles: {smoke: {tune: {iterashuns: 1}}}",
        "version: 2",
    ],
)
def test_what_is_wrong_is_refused(validator, wrong):
    content = {"version": 1, "extends": "base/digits", **parse_yaml(wrong, "test").plain}  # type: ignore[dict-item]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(content)


def test_the_schema_is_plain_json_without_dangling_references():
    schema = json.loads(json.dumps(recipe_schema(load_registry())))
    text = json.dumps(schema)
    references = {part.partition('"')[0] for part in text.split('"$ref": "#/$defs/')[1:]}
    assert references <= set(schema["$defs"])
