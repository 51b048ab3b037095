"""torch.export as a source of graphs over the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantlab.errors import CaptureError
from quantlab.graph.compare import confirmed_outputs, largest_difference
from quantlab.graph.exported import capture_exported
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.run import runner
from quantlab.graph.serialize import from_json, to_json
from quantlab.graph.sites import find_sites
from quantlab.quant.layers import QuantizedConv2d


def test_an_exported_graph_has_the_models_layers(cases):
    case = cases("resnet18")
    captured = capture_exported(case.model, case.inputs(3), {}, ("why",))
    assert largest_difference(case.model, captured, case.inputs(2)) == 0.0
    assert largest_difference(case.model, from_json(to_json(captured)), case.inputs(2, 64)) == 0.0
    sites = {site.name: site for site in find_sites(case.model, captured)}
    assert {name: site.macs for name, site in sites.items()} == {n: s.macs for n, s in case.sites.items()}
    assert captured.notes == ("why",)
    confirmed = confirmed_outputs(case.model, captured, case.inputs(3))
    assert {"layer1.0", "layer4", "fc"} <= set(confirmed)
    model = copy.deepcopy(case.model)
    quantized = insert_quantizers(model, captured, list(sites), None)
    assert isinstance(model.conv1, QuantizedConv2d)
    assert "conv1" in {node.target for node in quantized.graph.nodes}
    with torch.no_grad():
        assert torch.equal(runner(model, quantized)(case.inputs(2)), case.model(**case.inputs(2)))


def test_what_cannot_be_exported_is_told():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"torch\.export failed"):
        capture_exported(Branches(), {"x": torch.ones(3)}, {}, ())
