"""The chain of fallbacks: every model gets a graph that is the model, and a reason for each step down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.graph.captured import CaptureMethod
from quantlab.graph.compare import largest_difference
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.passes.taps import attach_taps
from quantlab.graph.run import runner
from quantlab.graph.serialize import from_json, to_json
from quantlab.graph.sites import find_sites
from quantlab.graph.verify import capture_verified
from quantlab.quant.layers import QuantizedLinear


class Body(nn.Module):
    """Two layers around an awkward function."""

    def __init__(self, awkward):
        super().__init__()
        self.before, self.after, self.awkward = nn.Linear(4, 4), nn.Linear(4, 4), awkward

    def forward(self, x, t):
        return self.after(self.awkward(self.before(x)) * t[:, None])


class Model(nn.Module):
    def __init__(self, awkward, depth):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.body = Body(awkward if depth else lambda x: x)
        self.awkward = (lambda x: x) if depth else awkward

    def forward(self, x, timestep):
        return self.head(self.awkward(self.body(self.stem(x), timestep)))


def inputs(batch):
    rng = torch.Generator().manual_seed(batch)
    return {"x": torch.randn(batch, 4, generator=rng), "timestep": torch.rand(batch, generator=rng)}


def in_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x @ x.T @ x).float()


def batch_in_a_loop(x):
    return torch.stack([x[i] * i for i in range(x.shape[0])])


def steered_by_data(x):
    return x * 2 if x.sum() > 0 else x - 1


def through_numpy(x):
    return x + torch.from_numpy(x.detach().numpy() * 2)


AWKWARD = [in_autocast, batch_in_a_loop, through_numpy]


def captured_model(awkward, depth):
    torch.manual_seed(0)
    model = Model(awkward, depth).eval()
    return model, capture_verified(model, inputs, {})


@pytest.mark.parametrize("awkward", AWKWARD, ids=lambda function: function.__name__)
def test_the_awkward_module_is_called_as_it_is(awkward):
    model, captured = captured_model(awkward, depth=1)
    assert captured.method is CaptureMethod.LEAF_MODULES
    assert "body is called as it is" in captured.notes[0] and "value trace:" in captured.notes[0]
    assert largest_difference(model, captured, inputs(5)) == 0.0
    assert largest_difference(model, from_json(to_json(captured)), inputs(5)) == 0.0


@pytest.mark.parametrize("awkward", AWKWARD, ids=lambda function: function.__name__)
def test_a_model_that_is_awkward_itself_still_gets_a_graph(awkward):
    model, captured = captured_model(awkward, depth=0)
    assert captured.method in (CaptureMethod.EXPORT, CaptureMethod.WHOLE_MODULE)
    assert any("torch.export is tried" in note for note in captured.notes)
    assert largest_difference(model, captured, inputs(5)) == 0.0
    assert [site.name for site in find_sites(model, captured)] == ["stem", "body.before", "body.after", "head"]


def test_a_branch_on_data_that_the_examples_take_both_ways_is_caught():
    torch.manual_seed(0)
    model = Model(steered_by_data, depth=1).eval()
    for layer in (model.stem, model.body.before):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)

    def both(batch):
        return {"x": torch.full((batch, 4), 2.0 if batch == 3 else -2.0), "timestep": torch.ones(batch)}

    captured = capture_verified(model, both, {})
    assert captured.method is CaptureMethod.LEAF_MODULES
    assert "differs from the model" in captured.notes[0]


def never(x):
    return x + torch.from_numpy((x.detach() * 0).numpy()).add(x.tolist()[0][0])


@pytest.mark.parametrize(("awkward", "depth"), [(through_numpy, 1), (never, 0)])
def test_layers_inside_what_is_called_as_it_is(awkward, depth):
    """They are sites, can be tapped, become quantized layers, and get the timestep."""
    model, captured = captured_model(awkward, depth)
    expected = model(**inputs(2))
    names = [site.name for site in find_sites(model, captured)]
    assert names == ["stem", "body.before", "body.after", "head"]
    graph = attach_taps(insert_quantizers(model, captured, names, "timestep"), ["body.before", "body.after", "head"])
    seen = {}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        layer.register_forward_hook(lambda _layer, args, _output, name=name: seen.update({name: args}))
    output, taps = runner(model, graph)(inputs(2))
    assert torch.equal(output, expected) and torch.equal(taps["head"], expected)
    assert taps["body.before"].shape == (2, 4)
    assert all(torch.equal(args[1], inputs(2)["timestep"]) for args in seen.values()) and len(seen) == 4
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_the_last_resort_carries_every_reason():
    model, captured = captured_model(never, depth=0)
    assert captured.method is CaptureMethod.WHOLE_MODULE
    assert len(captured.notes) == 2
    assert captured.notes[0].startswith("value trace:") and captured.notes[1].startswith("torch.export:")
    assert largest_difference(model, from_json(to_json(captured)), inputs(4)) == 0.0


def test_a_model_that_fails_by_itself_says_so():
    def broken(x):
        raise ZeroDivisionError("the model's own")

    with pytest.raises(ZeroDivisionError):
        captured_model(broken, depth=1)


def test_other_sizes_are_compared_when_asked(cases):
    case = cases("resnet18")
    captured = capture_verified(case.model, case.inputs, case.static, more_inputs=[case.inputs(2, 48)])
    assert captured.method is CaptureMethod.VALUE_TRACE and captured.notes == ()
