"""Graphs as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from quantlab.errors import ArtefactError, CaptureError
from quantlab.graph.capture import capture
from quantlab.graph.serialize import from_json, to_json


def test_everything_comes_back(cases):
    captured = cases("unet2dcond_tiny").captured
    loaded = from_json(to_json(captured))
    for field in ("input_names", "static", "guards", "notes", "method", "module_outputs", "output_type", "taps"):
        assert getattr(loaded, field) == getattr(captured, field), field
    for node, twin in zip(captured.graph.nodes, loaded.graph.nodes, strict=True):
        assert (node.name, node.op, node.target) == (twin.name, twin.op, twin.target)
        assert (str(node.args), str(node.kwargs)) == (str(twin.args), str(twin.kwargs))
        for key in ("fqn", "impure", "shape", "dtype", "call_index", "scalar"):
            assert node.meta.get(key) == twin.meta.get(key), (node.name, key)
    assert to_json(loaded) == to_json(captured)


def test_odd_values_survive():
    class Odd(nn.Module):
        def forward(self, x):
            y = x.masked_fill(x > 0, float("-inf")).to(torch.device("cpu"), torch.float64)
            y = y.nan_to_num(neginf=-1.5).contiguous(memory_format=torch.contiguous_format)
            return y[..., 1:, None], torch.full((2,), float("inf"), layout=torch.strided)

    model = Odd().eval()
    loaded = from_json(to_json(capture(model, {"x": torch.randn(3, 4)}, {})))
    kinds = {type(arg) for node in loaded.graph.nodes for arg in [*node.args, *node.kwargs.values()]}
    assert torch.device in kinds and torch.memory_format in kinds


def test_a_function_without_a_name_to_import_is_refused():
    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    class Uses(nn.Module):
        def forward(self, x):
            return Local.apply(x)

    with pytest.raises(CaptureError, match="cannot be imported by name"):
        to_json(capture(Uses().eval(), {"x": torch.ones(3)}, {}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("nodes"), "not a captured graph"),
        (lambda data: data.update(format=99), "newer version"),
        (lambda data: data["nodes"][3].update(target="torch:no_such_function", op="call_function"), "not a captured"),
        (lambda data: data.update(nodes=data["nodes"][:2] * 2), "not a captured"),
    ],
)
def test_a_damaged_file_is_told(cases, damage, message):
    data = json.loads(to_json(cases("digits").captured))
    damage(data)
    with pytest.raises(ArtefactError, match=message):
        from_json(json.dumps(data))
    with pytest.raises(ArtefactError):
        from_json("{")
