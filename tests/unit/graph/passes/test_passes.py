"""Passes: the float function stays, and the graph or the layers have changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantlab.contracts.site import SiteKind
from quantlab.errors import CaptureError, ModelError
from quantlab.graph.capture import capture
from quantlab.graph.compare import module_outputs
from quantlab.graph.passes.fold import fold_into_norm
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.passes.smooth import smooth
from quantlab.graph.passes.taps import attach_taps
from quantlab.graph.run import runner
from quantlab.graph.serialize import from_json, to_json
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear


def weight_sites(case):
    return [name for name, site in case.sites.items() if site.weight_shape and site.kind is not SiteKind.EMBEDDING]


def quantized_copy(case, timestep="timestep"):
    model = copy.deepcopy(case.model)
    return model, insert_quantizers(model, case.captured, weight_sites(case), timestep)


@pytest.mark.parametrize("name", ["digits", "sdxl_tiny", "vit_tiny", "mobilenetv3"])
def test_quantized_layers_without_parts_change_nothing(cases, name):
    case = cases(name)
    model, graph = quantized_copy(case, "timestep" if name in ("digits", "sdxl_tiny") else None)
    names = weight_sites(case)
    assert all(isinstance(model.get_submodule(name), QuantizedLinear | QuantizedConv2d) for name in names)
    assert model.state_dict().keys() == case.model.state_dict().keys()
    with torch.no_grad():
        expected = runner(case.model, case.captured)(case.inputs(2))
        actual = runner(model, graph)(case.inputs(2))
        reloaded = runner(model, from_json(to_json(graph)))(case.inputs(2))
    assert torch.equal(expected[0], actual[0]) and torch.equal(expected[0], reloaded[0])


def test_every_layer_gets_the_timestep_and_the_given_graph_stays(cases):
    case = cases("digits")
    model, graph = quantized_copy(case)
    seen = {}
    for name in weight_sites(case):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _layer, args, _output, name=name: seen.update({name: args[1]}))
    with torch.no_grad():
        runner(model, graph)(case.inputs(3))
    assert seen.keys() == set(weight_sites(case))
    assert all(torch.equal(timestep, case.inputs(3)["timestep"]) for timestep in seen.values())
    assert all(len(node.args) == 1 for node in case.captured.graph.nodes if node.target == "conv_in")


def test_gradients_reach_every_weight(cases):
    case = cases("digits")
    model, graph = quantized_copy(case)
    model.requires_grad_(True)
    runner(model, graph)(case.inputs(2))[0].square().sum().backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in weight_sites(case))


def test_unknown_sites_and_timesteps_are_refused_before_anything_changes(cases):
    case = cases("digits")
    model = copy.deepcopy(case.model)
    with pytest.raises(CaptureError) as caught:
        insert_quantizers(model, case.captured, ["conv_in", "conv_ouut"], None)
    assert caught.value.next_step == 'did you mean "conv_out"?'
    assert type(model.conv_in) is nn.Conv2d
    with pytest.raises(CaptureError, match='no input "time"'):
        insert_quantizers(model, case.captured, ["conv_in"], "time")


class Shared(nn.Module):
    """One layer under two paths, called twice, once by its weight."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.other = self.one

    def forward(self, x):
        return self.other(self.one(x)) + F.linear(x, self.one.weight, self.one.bias)


def test_a_shared_layer_stays_shared():
    model = Shared().eval()
    captured = capture(model, {"x": torch.randn(3, 4)}, {})
    expected = model(torch.ones(2, 4))
    graph = insert_quantizers(model, captured, ["one"], None)
    assert model.one is model.other and isinstance(model.one, QuantizedLinear)
    assert sum(node.target == "one" for node in graph.graph.nodes) == 3
    assert torch.equal(runner(model, graph)({"x": torch.ones(2, 4)}), expected)


def test_taps_are_what_the_modules_return(cases):
    case = cases("digits")
    paths = ["up_blocks.2", "down_blocks.1", "mid_block.attentions.0", "time_embedding", "conv_in"]
    graph = attach_taps(case.captured, paths)
    with torch.no_grad():
        output, taps = runner(case.model, graph)(case.inputs(2))
        assert torch.equal(output[0], case.model(**case.inputs(2), return_dict=False)[0])
    expected = module_outputs(case.model, case.captured, case.inputs(2))
    assert list(taps) == paths
    assert all(torch.equal(taps[path], expected[path]) for path in paths)
    assert case.captured.taps == ()
    assert list(runner(case.model, from_json(to_json(graph)))(case.inputs(2))[1]) == paths


def test_taps_before_an_in_place_operation_are_not_overwritten(cases):
    case = cases("resnet18")  # its activations work in place
    path = "layer1.0.conv1"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).eval()
    x = torch.randn(3, 4)
    graph = attach_taps(capture(model, {"input": x}, {}), ["0"])
    assert torch.equal(runner(model, graph)({"input": x})[1]["0"], F.linear(x, model[0].weight, model[0].bias))
    assert path in case.captured.module_outputs


def test_taps_carry_gradients(cases):
    case = cases("digits")
    model, graph = quantized_copy(case)
    model.requires_grad_(True)
    _, taps = runner(model, attach_taps(graph, ["up_blocks.2"]))(case.inputs(2))
    taps["up_blocks.2"].sum().backward()
    assert model.conv_in.weight.grad.abs().max() > 0 and model.conv_out.weight.grad is None


def test_unknown_taps_are_refused_with_the_nearest_name(cases):
    with pytest.raises(CaptureError, match=r"up_blocks\.9") as caught:
        attach_taps(cases("digits").captured, ["up_blocks.9"])
    assert "did you mean" in caught.value.next_step


def random_scales(channels):
    return torch.rand(channels, generator=torch.Generator().manual_seed(0)) + 0.5


def channels_of(layer):
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def test_smoothing_keeps_the_float_function(cases):
    case = cases("mobilenetv3")  # depthwise convolutions included
    model, graph = quantized_copy(case, None)
    scales = {name: random_scales(channels_of(model.get_submodule(name))) for name in weight_sites(case)}
    smooth(model, scales)
    with torch.no_grad():
        expected, actual = case.model(**case.inputs(2)), runner(model, graph)(case.inputs(2))
    # Each layer multiplies and divides by s: a few float32 roundings a layer, over 54 layers.
    assert not torch.equal(expected, actual)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), "one scale for each"),
        (torch.tensor([1.0, 0, 1, 1]), "positive"),
        (torch.full((4,), torch.inf), "finite"),
    ],
)
def test_bad_scales_are_refused_before_anything_changes(scale, message):
    model = Shared().eval()
    captured = capture(model, {"x": torch.randn(3, 4)}, {})
    insert_quantizers(model, captured, ["one"], None)
    with pytest.raises(ModelError, match=message):
        smooth(model, {"one": scale})
    assert model.one.smoothing is None
    with pytest.raises(ModelError, match="only a quantized layer that multiplies"):
        smooth(nn.Sequential(nn.Linear(4, 4)), {"0": torch.ones(4)})


class Folds(nn.Module):
    """Norms in front of layers, in the ways that fold and that do not."""

    def __init__(self):
        super().__init__()
        self.tokens, self.query, self.key = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.group, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        self.turned, self.linear = nn.GroupNorm(2, 4), nn.Linear(4, 4)
        self.functional, self.last = nn.LayerNorm(4), nn.Linear(4, 4)
        self.active, self.after = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        for norm in (self.tokens, self.group, self.turned, self.functional, self.active):
            nn.init.normal_(norm.weight, 1.0)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        h = self.conv(self.group(x))
        h = self.after(F.silu(self.active(h)))
        flat = self.linear(self.turned(h.flatten(2)).transpose(1, 2))
        normed = self.tokens(flat)
        both = self.query(normed) + self.key(normed)
        norm = self.functional
        return self.last(F.layer_norm(both, (4,), norm.weight, norm.bias))


@pytest.fixture
def folds():
    torch.manual_seed(0)
    model = Folds().eval().requires_grad_(False)
    captured = capture(model, {"x": torch.randn(3, 4, 4, 4)}, {})
    names = ["conv", "after", "linear", "query", "key", "last"]
    return model, insert_quantizers(model, captured, names, None)


@pytest.mark.parametrize(
    ("site", "together"),
    [("conv", ("conv",)), ("linear", ("linear",)), ("query", ("query", "key")), ("last", ("last",))],
)
def test_folding_keeps_the_float_function(folds, site, together):
    model, graph = folds
    x = {"x": torch.randn(2, 4, 5, 5)}
    expected = runner(model, graph)(x)
    before = model.get_submodule(site).weight.clone()
    smooth(model, dict.fromkeys(together, random_scales(4)))
    assert fold_into_norm(model, graph, site) == together
    assert all(model.get_submodule(name).smoothing is None for name in together)
    assert not torch.equal(model.get_submodule(site).weight, before)
    torch.testing.assert_close(runner(model, graph)(x), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_folded_stays(folds):
    model, graph = folds
    state = copy.deepcopy(model.state_dict())
    assert fold_into_norm(model, graph, "conv") == ()  # no smoothing
    smooth(model, {"after": random_scales(4), "query": random_scales(4), "key": random_scales(4) + 1})
    assert fold_into_norm(model, graph, "after") == ()  # an activation between
    assert fold_into_norm(model, graph, "query") == ()  # the key has other scales
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    smooth(model, {"conv": random_scales(4)})
    assert fold_into_norm(model, attach_taps(graph, ["group"]), "conv") == ()  # the norm's output is also tapped
