"""Whatever a recipe holds: a plan, or one message for a person; never a traceback.

``QUANTLAB_FUZZ=2000 pytest -n0 tests/e2e/test_fuzzed_recipes.py`` draws that many recipes, others each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab.errors import QuantlabError
from quantlab.plugins import Kind, Registry, load_registry
from quantlab.quant.accounting import FloatModel
from quantlab.recipe.choices import LISTS, SINGLES
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.recipe.schema import Recipe
from quantlab.run import check_budgets
from quantlab.stages import prepare
from quantlab.testing.toy import toy

ASKED = int(os.environ.get("QUANTLAB_FUZZ", "0"))
EXAMPLES = settings(
    max_examples=ASKED or 40,
    deadline=None,
    derandomize=not ASKED,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
REGISTRY = load_registry()
PLACES = {path: kind for kind, path in (*LISTS, *SINGLES)}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**62, 2**63, -1, 10**30])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(
        ["", "*", "[", "conv*", "blocks.*", "float", "teacher", "mse", "1e400", ".nan", "..", "~", "null"]
    )
    | st.text(max_size=8)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def of_schema(schema: dict, definitions: dict) -> st.SearchStrategy:
    """Values that a JSON schema allows, more or less."""
    if "$ref" in schema:
        return of_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return st.one_of([of_schema(part, definitions) for part in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    match schema.get("type"):
        case "integer":
            return st.integers(int(low or 0), int(high if high is not None else (low or 0) + 9))
        case "number":
            return st.floats(low if low is not None else -1.0, high if high is not None else 9.0)
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(of_schema(schema.get("items") or {}, definitions), max_size=3)
        case "object":
            return section(schema, definitions)
        case "string":
            return st.sampled_from(["", "blocks.0", "mid_block", "conv_in", "x"])
    return SCALARS


def section(schema: dict, definitions: dict) -> st.SearchStrategy:
    """Some of the keys of a section; those that must be there most of the time."""
    known = {key: of_schema(child, definitions) for key, child in schema.get("properties", {}).items()}
    return st.fixed_dictionaries({}, optional=known)


def choice(kind: Kind) -> st.SearchStrategy:
    """A plugin of a kind with some of its options, or something else."""
    names = st.sampled_from(sorted(REGISTRY.entries(kind)))

    def configured(name: str) -> st.SearchStrategy:
        schema = REGISTRY.entries(kind)[name].value.Config.model_json_schema()
        return section(schema, schema.get("$defs", {})).map(lambda options: {name: options})

    return names | names.flatmap(configured) | st.sampled_from([{}, {"a": 1, "b": 2}, [], 3, "nothing", {"mse": None}])


def recipes() -> st.SearchStrategy:
    """Recipes that are right in most places, with a few values replaced by anything at all."""
    schema = Recipe.model_json_schema()
    parts = {key: of_schema(child, schema["$defs"]) for key, child in schema["properties"].items()}
    for (top, *below), kind in PLACES.items():
        many = st.lists(choice(kind), max_size=3) if (kind, (top, *below)) in LISTS else choice(kind) | st.none()
        parts[top] = with_key(parts[top], below[0], many) if below else many
    method = st.sampled_from(sorted(REGISTRY.entries(Kind.METHOD)))
    good = {
        "version": st.just(1),
        "model": st.just({"source": "builtin", "name": "digits"}),
        "method": method,
        "budget": st.fixed_dictionaries(
            {"weight_bits": st.integers(1, 8), "activation_bits": st.integers(2, 8)},
            optional={"size_mb": st.floats(1e-4, 1.0), "bit_operations": st.floats(1e-6, 1.0)},
        ),
    }
    parts = {key: value for key, value in parts.items() if key not in good}
    parts |= {"keep": keep(), "baselines": st.lists(method, max_size=2), "profiles": ANYTHING, "extends": ANYTHING}
    whole = st.fixed_dictionaries(good, optional=parts)
    spoilt = st.tuples(whole, st.sampled_from([*good, *parts, "unknown"]), ANYTHING)
    return whole | whole | spoilt.map(lambda parts: {**parts[0], parts[1]: parts[2]})


def with_key(sections: st.SearchStrategy, key: str, values: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(sections, values).map(
        lambda both: {**both[0], key: both[1]} if isinstance(both[0], dict) else both[1]
    )


def keep() -> st.SearchStrategy:
    globs = st.sampled_from(["conv_in", "blocks.*", "*", "[", "time", "nothing", "?", "*.mix"])
    bits = st.integers(0, 9) | st.just("float")
    rule = st.fixed_dictionaries({"match": globs, "bits": bits}, optional={"optional": st.booleans()})
    return st.lists(rule, max_size=3)


def plan(path: Path, registry: Registry) -> LoadedRecipe:
    """What ``quantlab run --dry-run`` does before anything is measured, on the toy in the place of the model."""
    loaded = load_recipe(path, (), registry)
    sites, network = toy().sites, toy().task.network
    prepare.plan(sites, loaded.recipe, loaded.origin)
    check_budgets(loaded, toy().task, sites, FloatModel.of(network))
    return loaded


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


def test_a_fuzzed_recipe_gives_a_plan_or_a_message(file: Path) -> None:
    outcomes = {"plan": 0, "message": 0}

    @EXAMPLES
    @given(recipes())
    def holds(content: dict) -> None:
        file.write_text(json.dumps(content))  # JSON is YAML
        try:
            plan(file, REGISTRY)
            outcomes["plan"] += 1
        except QuantlabError as error:
            assert error.what.strip() and not error.what.startswith(("KeyError", "TypeError"))
            outcomes["message"] += 1

    holds()
    assert outcomes["plan"] > 2 and outcomes["message"] > 2
    print(outcomes)


@EXAMPLES
@given(st.text(alphabet=st.sampled_from("version: 1\n-[]{}&*!|>'\"%@`#,?\tabc\\\x00é"), max_size=80))
def test_any_text_gives_a_message(file: Path, text: str) -> None:
    file.write_text(f"version: 1\n{text}", encoding="utf-8")
    with pytest.raises(QuantlabError):
        plan(file, REGISTRY)


@EXAMPLES
@given(st.lists(st.text(alphabet="abcdefghijklmnopqrstuvwxyz.=0123456789[]{}:-_", max_size=24), min_size=1, max_size=3))
def test_any_override_gives_a_recipe_or_a_message(overrides: list[str]) -> None:
    try:
        load_recipe("digits/mpq-dm-w2a4", overrides, REGISTRY)
    except QuantlabError as error:
        assert error.what
