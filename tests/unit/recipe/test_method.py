from __future__ import annotations

import pytest

from quantlab.errors import PluginError
from quantlab.recipe.method import method_from_yaml


def test_a_method_is_read_from_yaml(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("summary: quick\npaper: A 2024\ndata_free: true\nweights: {observer: mse}\nallocate: [uniform]\n")
    method = method_from_yaml(path)
    assert (method.name, method.summary, method.paper, method.data_free) == ("fast", "quick", "A 2024", True)
    assert method.fragment == {"weights": {"observer": "mse"}, "allocate": ["uniform"]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("summary: a\nmodel: {name: digits}\n", r'fast\.yaml:2: a method has no key "model"'),
        ("summary: a\nweigths: {}\n", 'did you mean "weights"'),
        ("weights: {}\n", "needs a summary"),
        ("summary: [a]\n", "needs a summary"),
        ("summary: a\ndata_free: maybe\n", "true or false"),
        ("summary: a\nsummary: b\n", "stands twice"),
        ("", "empty"),
    ],
)
def test_a_bad_method_is_its_plugins_error(tmp_path, text, told):
    path = tmp_path / "fast.yaml"
    path.write_text(text)
    with pytest.raises(PluginError, match=told):
        method_from_yaml(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(PluginError, match="No such file"):
        method_from_yaml(tmp_path / "none.yaml")
