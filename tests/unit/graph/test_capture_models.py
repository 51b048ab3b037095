"""Real models: the graph is the model, at other batches, sizes and dtypes than the captured ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from quantlab.errors import CaptureError
from quantlab.graph.capture import capture
from quantlab.graph.captured import CaptureMethod
from quantlab.graph.compare import largest_difference
from quantlab.graph.relative import align
from quantlab.graph.run import runner
from quantlab.graph.serialize import from_json, to_json

DIFFUSION = ["digits", "unet2d_tiny", "unet2d_class", "unet2dcond_tiny", "sdxl_tiny"]
ALL = [*DIFFUSION, "resnet18", "vit_tiny", "mobilenetv3"]


@pytest.mark.parametrize("name", ALL)
def test_the_graph_is_the_model_at_another_batch_and_after_a_round_trip(cases, name):
    case = cases(name)
    assert case.captured.method is CaptureMethod.VALUE_TRACE
    loaded = from_json(to_json(case.captured))
    assert largest_difference(case.model, case.captured, case.inputs(2)) == 0.0
    assert largest_difference(case.model, loaded, case.inputs(5)) == 0.0


@pytest.mark.parametrize("name", [name for name in ALL if name != "vit_tiny"])
def test_height_and_width_stay_open(cases, name):
    case = cases(name)
    assert largest_difference(case.model, case.captured, case.inputs(2, 2 * case.size)) == 0.0


@pytest.mark.parametrize("name", ALL)
def test_every_layer_of_the_model_is_a_site(cases, name):
    case = cases(name)
    layers = {path for path, m in case.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    assert {site.name for site in case.sites.values() if site.weight_shape} == layers


@pytest.mark.parametrize("name", ["digits", "unet2dcond_tiny", "vit_tiny"])
def test_the_graph_follows_the_models_dtype(cases, name):
    case = cases(name)
    half = copy.deepcopy(case.model).bfloat16()
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, case.inputs(2))
    assert runner(half, case.captured)(inputs)[0].dtype == torch.bfloat16
    assert largest_difference(half, case.captured, inputs) == 0.0


def test_the_graph_follows_the_models_device(cases):
    case = cases("digits")
    elsewhere = copy.deepcopy(case.model).to("meta")
    inputs = {name: value.to("meta") for name, value in case.inputs(2).items()}
    assert runner(elsewhere, case.captured)(inputs)[0].device.type == "meta"


def test_a_large_batch_takes_the_branch_for_large_batches(cases):
    # Upsampling makes tensors of 64 and more samples contiguous, which changes the last bits of what follows.
    case = cases("digits")
    assert largest_difference(case.model, case.captured, case.inputs(70)) == 0.0
    assert not any(">= 64" in guard.condition for guard in case.captured.guards)


def test_a_model_on_the_meta_device_gives_the_same_graph(cases):
    case = cases("unet2d_tiny")
    meta = copy.deepcopy(case.model).to("meta")
    inputs = {name: value.to("meta") for name, value in case.inputs(3).items()}
    assert align(capture(meta, inputs, case.static).graph, case.captured.graph) is not None


def test_fake_tensors_give_the_same_graph(cases):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from quantlab.graph.relative import fake_copy

    case = cases("unet2d_tiny")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = {name: mode.from_tensor(value) for name, value in case.inputs(3).items()}
    captured = capture(fake_copy(case.model, mode, None), inputs, case.static)
    assert align(captured.graph, case.captured.graph) is not None


def test_a_size_that_takes_another_branch_is_refused_with_its_condition(cases):
    case = cases("unet2dcond_tiny")  # an odd size makes its upsampling ask for the target size
    with pytest.raises(CaptureError) as caught:
        runner(case.model, case.captured)(case.inputs(2, 17))
    assert "(sample.shape[2] % 2) != 0 is False" in caught.value.what
    assert caught.value.got == "1 != 0"
    assert "again" in caught.value.next_step


def test_deepcopy_of_model_and_graph(cases):
    case = cases("digits")
    assert largest_difference(copy.deepcopy(case.model), copy.deepcopy(case.captured), case.inputs(2)) == 0.0
