"""Fused attention replaced by a module that quantizers can be put into."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantlab.contracts.site import SiteKind
from quantlab.errors import CaptureError
from quantlab.graph.passes.replace_attention import attention_path, replace_attention
from quantlab.graph.run import runner


class Unchanged(nn.Module):
    """A quantizer that changes nothing; it makes the attention compute written out."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor | None) -> torch.Tensor:
        return x


def first(output: object) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]  # type: ignore[index,attr-defined]
    return output


@pytest.mark.parametrize("name", ["digits", "unet2dcond_tiny", "vit_tiny"])
def test_the_float_function_stays_written_out_or_not(cases, name: str) -> None:
    """Written out, an attention differs by float32 rounding, which the layers after it carry on."""
    case = cases(name)
    sites = [site.name for site in case.sites.values() if site.kind is SiteKind.ATTENTION]
    model = copy.deepcopy(case.model)
    timestep = "timestep" if "timestep" in case.captured.input_names else None
    graph = replace_attention(model, case.captured, sites, timestep)
    inputs = case.inputs(2)
    with torch.no_grad():
        exact = first(runner(case.model, case.captured)(inputs))
        assert torch.equal(first(runner(model, graph)(inputs)), exact)
        for site in sites:
            model.get_submodule(attention_path(site)).quantizers["query"] = Unchanged()
        written = first(runner(model, graph)(inputs))
    assert len(sites) >= 4
    assert (written - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_a_site_without_attention_is_told(cases) -> None:
    case = cases("digits")
    with pytest.raises(CaptureError, match="exactly once"):
        replace_attention(copy.deepcopy(case.model), case.captured, ["conv_in"], None)
