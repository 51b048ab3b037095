"""A method: a fragment of a recipe."""

from __future__ import annotations

from pathlib import Path

from quantlab import method_from_yaml

METHOD = method_from_yaml(Path(__file__).with_name("methods") / "outside-method.yaml")
"""Everything that it is stands in the YAML file."""
