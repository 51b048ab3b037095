"""What a traced forward may do, one small module each; every graph is run on other inputs than it was traced with."""

from __future__ import annotations

import copy
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantlab.errors import CaptureError
from quantlab.graph.capture import capture
from quantlab.graph.compare import largest_difference
from quantlab.graph.run import runner
from quantlab.graph.serialize import from_json, to_json


class Net(nn.Module):
    """A linear layer and a forward given as a function."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function
        self.dropout, self.identity, self.norm = nn.Dropout(0.5), nn.Identity(), nn.BatchNorm1d(4)
        self.register_buffer("offset", torch.arange(4.0))
        self.plain = torch.linspace(0, 1, 4)
        self.eval()

    def forward(self, x, y=None, **options):
        return self.function(self, x) if y is None else self.function(self, x, y)


def x_of(batch, width=4):
    return {"x": torch.randn(batch, width, generator=torch.Generator().manual_seed(batch))}


def targets(captured):
    return [node.target for node in captured.graph.nodes]


def in_place_method(net, x):
    h = net.linear(x)
    h.mul_(2)
    return h


def in_place_operator(net, x):
    h = net.linear(x)
    before = h
    h += 1
    return before * h


def set_item(net, x):
    h = net.linear(x)
    h[:, 1] = 0.5
    h[:, 2:].add_(3)
    return h


def out_argument(net, x):
    h, result = net.linear(x), torch.empty_like(x)
    torch.add(h, 1, out=result)
    return result


def in_place_functional(net, x):
    h = net.linear(x)
    F.relu(h, inplace=True)
    return h


def factories(net, x):
    positions = torch.arange(x.shape[0], device=x.device, dtype=x.dtype)
    return net.linear(x) * positions[:, None] + torch.ones(x.shape[0], 1) + torch.zeros_like(x)


def sizes_in_views(net, x):
    batch, width = x.shape
    return net.linear(x).reshape(batch, 2, width // 2).transpose(1, 2).reshape(x.size(0), -1) / math.sqrt(4)


def numel_and_negative_size(net, x):
    return net.linear(x) * x.numel() / x.size(-1) + (-x.shape[0])


def several_outputs(net, x):
    first, second = net.linear(x).chunk(2, dim=-1)
    values, indices = first.max(dim=1)
    return {"values": values, "rest": (second, [indices])}


def iteration(net, x):
    return sum(net.linear(column[:, None].expand(-1, 4)) for column in x.unbind(1))


def functional_parameter(net, x):
    return F.linear(x + net.offset, net.linear.weight.t().contiguous(), net.linear.bias)


def long_way(net, x):
    return torch.einsum("bi,oi->bo", x, net.linear.weight).clamp(min=-1).T.mT.softmax(-1)[..., :3]


def reversed_operators(net, x):
    h = net.linear(x)
    return 2 - h + (1 / (h.abs() + 1)) + 2**h + (h @ h.T) @ h + (~(h > 0)).to(h.dtype)


FORWARDS = [
    in_place_method, in_place_operator, set_item, out_argument, in_place_functional, factories, sizes_in_views,
    numel_and_negative_size, several_outputs, iteration, functional_parameter, long_way, reversed_operators,
]  # fmt: skip


@pytest.mark.parametrize("function", FORWARDS, ids=lambda function: function.__name__)
def test_the_graph_does_what_the_forward_does(function):
    net = Net(function)
    captured = capture(net, x_of(3), {})
    for batch in (1, 3, 6):
        assert largest_difference(net, captured, x_of(batch)) == 0.0
        assert largest_difference(net, from_json(to_json(captured)), x_of(batch)) == 0.0


@pytest.mark.parametrize("function", FORWARDS, ids=lambda function: function.__name__)
def test_the_graph_follows_dtype(function):
    net = Net(function)
    captured = capture(net, x_of(3), {})
    double = {"x": x_of(2)["x"].double()}
    assert not any("dtypes are fixed" in note for note in captured.notes)
    assert largest_difference(copy.deepcopy(net).double(), captured, double) == 0.0


def test_a_literal_dtype_that_is_the_models_own_follows_it_and_a_true_upcast_stays():
    net = Net(lambda net, x: net.linear(x.to(net.linear.weight.dtype)) + x.to(torch.float64).sum().to(torch.int64))
    captured = capture(net, x_of(3), {})
    half = {"x": x_of(2)["x"].half()}
    assert runner(copy.deepcopy(net).half(), captured)(half).dtype == torch.float16
    literals = [arg for node in captured.graph.nodes for arg in node.args if isinstance(arg, torch.dtype)]
    assert torch.int64 in literals and torch.float32 not in literals


@pytest.mark.parametrize("name", ["dropout", "identity"])
def test_a_module_that_returns_its_input_does_not_take_over_its_uses(name):
    net = Net(lambda net, x: (getattr(net, name)(x), net.linear(x)))
    captured = capture(net, x_of(3), {})
    (linear,) = [node for node in captured.graph.nodes if node.target == "linear"]
    assert linear.args[0].op == "placeholder"
    net.train()  # dropout now changes its input, but not that of the linear layer
    assert torch.equal(runner(net, captured)(x_of(3))[1], net.linear(x_of(3)["x"]))


def test_a_cast_to_the_same_dtype_does_not_take_over_the_uses_of_its_input():
    net = Net(lambda net, x: (x.to(x.dtype), net.linear(x)))
    captured = capture(net, x_of(3), {})
    (linear,) = [node for node in captured.graph.nodes if node.target == "linear"]
    assert linear.args[0].op == "placeholder"


def test_one_tensor_given_twice_is_two_inputs():
    net = Net(lambda net, x, y: net.linear(x) - y)
    x = x_of(3)["x"]
    captured = capture(net, {"x": x, "y": x}, {})
    assert captured.input_names == ("x", "y")
    assert largest_difference(net, captured, {"x": x, "y": x + 1}) == 0.0


def test_a_shared_module_has_a_call_index_for_each_call():
    net = Net(lambda net, x: net.linear(net.linear(x)))
    captured = capture(net, x_of(3), {})
    calls = [node for node in captured.graph.nodes if node.target == "linear"]
    assert [node.meta["call_index"] for node in calls] == [0, 1]
    assert captured.module_outputs["linear"] == calls[1].name


def test_the_example_is_left_as_it_was():
    net = Net(lambda net, x: x.add_(1))
    example = x_of(3)
    capture(net, example, {})
    assert torch.equal(example["x"], x_of(3)["x"])


def test_plain_tensors_become_constants_and_are_told():
    net = Net(lambda net, x: net.linear(x) + net.plain + torch.from_numpy(np.float32([1, 2, 3, 4])))
    captured = capture(net, x_of(3), {})
    assert torch.equal(captured.constants["constant_0"], net.plain)
    assert sum("became a constant" in note for note in captured.notes) == 1
    loaded = from_json(to_json(captured))
    assert largest_difference(net, loaded, x_of(2)) == 0.0
    assert largest_difference(copy.deepcopy(net), captured, x_of(2)) == 0.0


def test_plain_tensors_are_refused_without_values():
    net = Net(lambda net, x: net.linear(x) + net.plain.to(x.device)).to("meta")
    net.plain = net.plain.to("meta")
    with pytest.raises(CaptureError, match=r"plain tensor attribute of shape \[4\]") as caught:
        capture(net, {"x": x_of(3)["x"].to("meta")}, {})
    assert "buffer" in caught.value.next_step


def data_branch(net, x):
    return net.linear(x) if x.sum() > 1e9 else x * 2


def data_value(net, x):
    return x * x.abs().max().item()


@pytest.mark.parametrize(("function", "word"), [(data_branch, "bool()"), (data_value, "item()")])
def test_values_that_steer_the_forward_are_told(function, word):
    captured = capture(Net(function), x_of(3), {})
    assert any("data-dependent" in note and word in note for note in captured.notes)


def test_values_of_buffers_and_sizes_do_not_count_as_data():
    net = Net(lambda net, x: net.linear(x) if x.dim() == 2 and len(x.shape) == 2 and x.is_floating_point() else x)
    captured = capture(net, x_of(3), {})
    assert captured.notes == () and captured.guards == ()


class Halve(torch.autograd.Function):
    """Halves, with a gradient that no derivative rule would give."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 7


def test_a_custom_autograd_function_keeps_its_backward():
    net = Net(lambda net, x: Halve.apply(net.linear(x)))
    captured = from_json(to_json(capture(net, x_of(3), {})))
    assert largest_difference(net, captured, x_of(2)) == 0.0
    runner(net, captured)(x_of(2)).sum().backward()
    assert torch.equal(net.linear.bias.grad, torch.full((4,), 14.0))
    assert torch.autograd.Function.apply.__module__.startswith("torch")


@torch.jit.script
def scripted(x):
    return x * 2 + torch.relu(x)


def test_operators_of_a_scripted_function_become_nodes():
    net = Net(lambda net, x: scripted(net.linear(x)))
    captured = capture(net, x_of(3), {})
    assert torch.ops.aten.relu.default in targets(captured)
    assert any("aten.relu" in note for note in captured.notes) and not captured.constants
    assert largest_difference(net, from_json(to_json(captured)), x_of(5)) == 0.0


def test_an_argument_that_no_graph_can_hold_names_the_module():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.bernoulli(x.sigmoid(), generator=torch.Generator().manual_seed(0))

    with pytest.raises(CaptureError, match="Generator") as caught:
        capture(nn.Sequential(nn.Linear(4, 4), Inner()).eval(), {"input": x_of(3)["x"]}, {})
    assert caught.value.where == "1"


def test_autocast_inside_the_forward_is_refused():
    def mixed(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.linear(x)

    with pytest.raises(CaptureError, match="autocast"):
        capture(Net(mixed), x_of(3), {})


def test_gradient_switches_training_flags_and_hooks_are_told():
    def notable(net, x):
        with torch.no_grad():
            h = net.linear(x)
        return F.dropout(h, 0.3, training=net.training)

    notes = capture(Net(notable), x_of(3), {}).notes
    assert any("gradients are switched" in note for note in notes)
    assert any("training flag of dropout is fixed to False" in note for note in notes)
    outer = nn.Sequential(nn.Sequential(nn.Linear(4, 4))).eval()
    outer[0].register_forward_hook(lambda module, args, output: None)
    assert any(note.startswith("0: forward hooks") for note in capture(outer, {"input": x_of(3)["x"]}, {}).notes)


def test_norm_and_dropout_modules_follow_train_and_eval():
    net = Net(lambda net, x: net.norm(net.linear(x)))
    captured = capture(net, x_of(3), {})
    net.train()
    seen = net.norm.num_batches_tracked.item()
    runner(net, captured)(x_of(5))
    assert net.norm.num_batches_tracked.item() == seen + 1


def test_multihead_attention_is_told_to_be_opaque():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x, need_weights=False)[0]

    model = Attention().train()  # in evaluation mode torch takes a fused path that no capture sees into
    captured = capture(model, {"x": torch.randn(3, 5, 4)}, {})
    assert any("MultiheadAttention is one opaque call" in note for note in captured.notes)
    assert largest_difference(model, captured, {"x": torch.randn(2, 6, 4)}) == 0.0


def test_everything_is_put_back_after_an_error():
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]

    def fails(net, x):
        net.linear(x)
        raise ValueError("no such luck")

    with pytest.raises(CaptureError, match="failed while it was captured") as caught:
        capture(Net(fails), x_of(3), {})
    assert "no such luck" in str(caught.value)
    assert nn.Module.__call__ is call and torch.autograd.Function.__dict__["apply"] is apply


def test_other_threads_run_their_models_undisturbed_during_a_capture():
    other, seen = nn.Linear(4, 4), []

    def meanwhile(net, x):
        thread = threading.Thread(target=lambda: seen.append(other(x.detach())))
        thread.start()
        thread.join()
        return net.linear(x)

    captured = capture(Net(meanwhile), x_of(3), {})
    assert all(output.shape == (3, 4) for output in seen) and seen
    assert [t for t in targets(captured) if t == "linear"] == ["linear"]


def test_unknown_and_missing_inputs_are_refused():
    net = Net(in_place_method)
    run = runner(net, capture(net, x_of(3), {}))
    with pytest.raises(CaptureError, match='no input "xx"') as caught:
        run({"xx": x_of(3)["x"]})
    assert "did you mean" in caught.value.next_step
    with pytest.raises(CaptureError, match='"x" is missing'):
        run({})


def test_a_forward_without_tensor_layers_of_its_own_is_entered():
    class Scaled(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight * 2, self.bias)

    net = nn.Sequential(Scaled(4, 4)).eval()
    captured = capture(net, {"input": x_of(3)["x"]}, {})
    assert "0" not in targets(captured) and "0.weight" in targets(captured)
    assert largest_difference(net, captured, {"input": x_of(2)["x"]}) == 0.0
