"""A graph in the place of a forward: what callers of the model see."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from quantlab.errors import CaptureError, ModelError
from quantlab.graph.bind import bind, unbind


@pytest.fixture
def bound(cases):
    case = cases("unet2d_tiny")
    model = copy.deepcopy(case.model)
    return bind(model, case.captured, "timestep")


def runs_the_graph(model):
    return "bind" in type(model).forward.__code__.co_filename


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_any_form_of_the_timestep(cases, bound, timestep):
    case = cases("unet2d_tiny")
    sample = case.inputs(2)["sample"]
    with torch.no_grad():
        assert torch.equal(bound(sample, timestep).sample, case.model(sample, timestep).sample)


def test_the_output_is_wrapped_as_the_model_wraps_it(cases, bound):
    case = cases("unet2d_tiny")
    with torch.no_grad():
        assert type(bound(**case.inputs(2))) is type(case.model(**case.inputs(2)))
        plain = bound(**case.inputs(2), return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1


def test_class_config_and_state_stay(cases, bound, tmp_path):
    original = cases("unet2d_tiny").model
    assert runs_the_graph(bound) and isinstance(bound, type(original))
    assert bound.state_dict().keys() == original.state_dict().keys()
    assert bound.config == original.config and bound.dtype == torch.float32
    bound.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"


def test_a_copy_runs_with_its_own_parameters(cases, bound):
    inputs = cases("unet2d_tiny").inputs(2)
    other = copy.deepcopy(bound)
    with torch.no_grad():
        other.conv_out.bias.add_(1)
        assert torch.allclose(other(**inputs).sample, bound(**inputs).sample + 1, atol=1e-6)


def test_unbind_restores(cases, bound):
    assert unbind(bound) is bound
    assert type(bound) is type(cases("unet2d_tiny").model) and not runs_the_graph(bound)
    with pytest.raises(ModelError, match="no graph is bound"):
        unbind(bound)


def test_binding_twice_is_refused(cases, bound):
    with pytest.raises(ModelError, match="already"):
        bind(bound, cases("unet2d_tiny").captured, "timestep")


def test_a_forward_of_the_object_itself_is_refused(cases):
    case = cases("unet2d_tiny")
    model = copy.deepcopy(case.model)
    model.forward = model.forward  # what accelerate's hooks do
    with pytest.raises(ModelError, match="hide the graph"):
        bind(model, case.captured, "timestep")


def test_another_non_tensor_argument_is_refused(cases):
    case = cases("unet2dcond_tiny")
    model = bind(copy.deepcopy(case.model), case.captured, "timestep")
    with torch.no_grad():
        assert model(**case.inputs(2), cross_attention_kwargs=None) is not None
    with pytest.raises(CaptureError, match="cross_attention_kwargs__scale") as caught:
        model(**case.inputs(2), cross_attention_kwargs={"scale": 0.5})
    assert caught.value.got == "0.5" and caught.value.allowed == "not given"


def test_an_unknown_or_missing_tensor_is_refused(cases):
    case = cases("unet2dcond_tiny")
    model = bind(copy.deepcopy(case.model), case.captured, "timestep")
    with pytest.raises(CaptureError, match='no input "mid_block_additional_residual"'):
        model(**case.inputs(2), mid_block_additional_residual=torch.zeros(2, 64, 8, 8))
    inputs = case.inputs(2)
    del inputs["encoder_hidden_states"]
    with pytest.raises(CaptureError, match='"encoder_hidden_states" is missing'):
        model(**inputs, encoder_hidden_states=None)


def test_nested_inputs(cases):
    case = cases("sdxl_tiny")
    model = bind(copy.deepcopy(case.model), case.captured, "timestep")
    with torch.no_grad():
        assert torch.equal(model(**case.inputs(2)).sample, case.model(**case.inputs(2)).sample)


def test_an_argument_that_the_forward_does_not_have_is_pythons_own_error(bound, cases):
    with pytest.raises(TypeError, match="unexpected keyword"):
        bound(**cases("unet2d_tiny").inputs(2), guidance=1.0)


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_an_unmodified_pipeline_makes_the_same_images(cases, name):
    import diffusers

    case = cases("unet2d_tiny")

    def images(model):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        pipeline = getattr(diffusers, f"{name}Pipeline")(model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        return pipeline(batch_size=2, generator=rng, num_inference_steps=3, output_type="np").images

    model = bind(copy.deepcopy(case.model), case.captured, "timestep")
    assert runs_the_graph(model)
    assert (images(model) == images(case.model)).all()
