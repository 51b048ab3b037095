"""Sites, their shapes, costs and roles."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantlab.contracts.site import SiteKind
from quantlab.graph.capture import capture
from quantlab.graph.sites import find_sites


def tagged(sites, tag):
    return [name for name, site in sites.items() if tag in site.tags]


def test_sites_of_the_digits_unet(cases):
    sites = cases("digits").sites
    assert tagged(sites, "first") == ["conv_in"] and tagged(sites, "last") == ["conv_out"]
    assert tagged(sites, "time_embed") == ["time_embedding.linear_1", "time_embedding.linear_2"]
    assert tagged(sites, "skip") == [
        f"up_blocks.{block}.resnets.{resnet}.{layer}"
        for block in range(3)
        for resnet in range(2)
        for layer in ("conv1", "conv_shortcut")
    ]
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    for role, projection in zip(("query", "key", "value", "out"), projections, strict=True):
        assert {name.rpartition("attentions")[2][3:] for name in tagged(sites, f"attention.{role}")} == {projection}
        assert len(tagged(sites, f"attention.{role}")) == 4


def test_blocks_of_the_digits_unet(cases):
    blocks = {site.block for site in cases("digits").sites.values()}
    lists = {f"{kind}_blocks.{index}" for kind in ("down", "up") for index in range(3)}
    assert blocks == lists | {"conv_in", "conv_out", "mid_block", "time_embedding", "class_embedding"}


def test_costs_and_shapes_are_those_of_batch_1(cases):
    sites = cases("digits").sites
    conv = sites["down_blocks.0.resnets.0.conv1"]
    assert conv.kind is SiteKind.CONV and conv.weight_shape == (32, 32, 3, 3)
    assert conv.macs == 8 * 8 * 32 * 32 * 9
    assert conv.slots[0].shape == (1, 32, 8, 8) and conv.slots[0].name == "input"
    linear = sites["mid_block.attentions.0.to_q"]
    assert linear.kind is SiteKind.LINEAR and linear.macs == 4 * 64 * 64
    attention = sites["mid_block.attentions.0"]  # 4 heads of 16 channels over 4 places
    assert attention.kind is SiteKind.ATTENTION and attention.weight_shape is None
    assert attention.macs == 2 * 4 * 4 * 4 * 16
    assert [slot.name for slot in attention.slots] == ["query", "key", "value"]


def test_costs_match_an_independent_count(cases):
    case = cases("resnet18")
    counted = {}

    def count(name):
        def hook(module, args, output):
            taps = module.weight[0].numel()
            counted[name] = output.numel() // 3 * taps

        return hook

    layers = [(n, m) for n, m in case.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [module.register_forward_hook(count(name)) for name, module in layers]
    with torch.no_grad():
        case.model(**case.inputs(3))
    for handle in handles:
        handle.remove()
    assert {name: site.macs for name, site in case.sites.items()} == counted


@pytest.mark.parametrize(
    ("name", "first", "last", "blocks"),
    [
        ("resnet18", "conv1", "fc", {"layer1.0", "layer4.1", "conv1", "fc"}),
        ("vit_tiny", "patch_embed.proj", "head", {"blocks.0", "blocks.11", "patch_embed.proj", "head"}),
        ("mobilenetv3", "conv_stem", "classifier", {"blocks.0", "conv_head"}),
        ("sdxl_tiny", "conv_in", "conv_out", {"down_blocks.1", "mid_block", "add_embedding"}),
    ],
)
def test_ends_and_blocks(cases, name, first, last, blocks):
    sites = cases(name).sites
    assert tagged(sites, "first") == [first] and tagged(sites, "last") == [last]
    assert blocks <= {site.block for site in sites.values()}


def test_a_fused_projection_has_all_three_roles(cases):
    sites = cases("vit_tiny").sites
    assert sites["blocks.0.attn.qkv"].tags >= {"attention.query", "attention.key", "attention.value"}
    assert sites["blocks.0.attn.proj"].tags == {"attention.out"}


def test_cross_attention_takes_key_and_value_from_the_context(cases):
    sites = cases("unet2dcond_tiny").sites
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert sites[f"{path}.to_k"].tags == {"attention.key"} and sites[f"{path}.to_k"].slots[0].shape == (1, 7, 32)
    assert sites[f"{path}.to_q"].tags == {"attention.query"}


class Plain(nn.Module):
    """An attention written out, a layer used twice, one used by its weight, a channel concatenation, a depthwise."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.query, self.key, self.value, self.project = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.joined = nn.LayerNorm(16), nn.Linear(16, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, t):
        h = self.embed(x)
        scores = self.query(h) @ self.key(h).transpose(-1, -2) / 8**0.5
        mixed = self.project(torch.bmm(scores.softmax(-1), self.value(h)))
        mixed = self.project(mixed) + t[:, None, None]
        joined = F.linear(F.silu(self.norm(torch.cat([h, mixed], dim=-1))), self.joined.weight, self.joined.bias)
        grid = joined.transpose(1, 2)[..., None]
        return F.conv2d(grid, self.depthwise.weight, self.depthwise.bias, padding=1, groups=8)


def test_roles_without_fused_attention():
    model = Plain().eval()
    captured = capture(model, {"x": torch.randn(3, 5, 4), "t": torch.rand(3)}, {})
    sites = {site.name: site for site in find_sites(model, captured)}
    layers = ["embed", "query", "key", "value", "project", "joined", "depthwise"]
    assert [name for name, site in sites.items() if site.weight_shape] == layers
    for role in ("query", "key", "value"):
        assert f"attention.{role}" in sites[role].tags
    assert "attention.out" in sites["project"].tags
    assert sites["joined"].tags == {"skip"}
    assert sites["embed"].tags == {"first"} and sites["depthwise"].tags == {"last"}
    assert [slot.call_index for slot in sites["project"].slots] == [0, 1]
    assert sites["project"].macs == 2 * 5 * 8 * 8
    assert sites["depthwise"].groups == 8 and sites["depthwise"].macs == 5 * 8 * 9


def test_layers_used_by_their_weight_with_other_settings_are_no_sites():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2)

    model = Other().eval()
    assert find_sites(model, capture(model, {"x": torch.randn(3, 2, 8, 8)}, {})) == ()


def test_the_timestep_input_may_have_any_name():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.main = nn.Linear(1, 4), nn.Linear(4, 4)

        def forward(self, x, sigma):
            return self.main(x + self.embed(sigma[:, None]))

    model = Timed().eval()
    captured = capture(model, {"x": torch.randn(3, 4), "sigma": torch.rand(3)}, {})
    tags = {site.name: site.tags for site in find_sites(model, captured, "sigma")}
    assert tags == {"embed": {"time_embed"}, "main": {"first", "last"}}
