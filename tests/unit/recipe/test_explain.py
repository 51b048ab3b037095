from __future__ import annotations

from quantlab.recipe.explain import explain, resolved_yaml
from quantlab.recipe.load import load_recipe


def test_the_resolved_recipe_loads_to_itself(registry, write):
    loaded = load_recipe(write(), ["keep=[{match: a, bits: float}]", "seed=4"], registry)
    again = load_recipe(write(resolved_yaml(loaded.recipe), "resolved.yaml"), (), registry)
    assert again.recipe == loaded.recipe


def test_every_value_stands_in_one_line_with_its_origin(registry, write):
    path = write()
    lines = {line.split()[0]: line for line in explain(load_recipe(path, ["seed=4"], registry)).splitlines()}
    assert lines["seed"].endswith("# --set seed=4")
    assert lines["method"].endswith(f"# {path}:3")
    assert lines["allocate.1.kurtosis.groups"].endswith("# method mixed")
    assert lines["sampling.steps"].endswith("# default")
    assert "passes" in lines, "an empty list is a value too"
