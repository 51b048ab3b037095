"""Smoothing folded into adaptive and functional norms, in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers_models import MODELS, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.contracts.sections import Sampling
from quantlab.graph.capture import capture
from quantlab.graph.inputs import nested
from quantlab.graph.passes.fold import fold_into_norm
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.passes.smooth import smooth
from quantlab.graph.run import runner
from quantlab.models.conditions import Conditions
from quantlab.models.denoiser import Denoiser, DenoiserTask
from quantlab.models.diffusers_families import family_of
from quantlab.sampling import Schedule


class Adaptive(nn.Module):
    """Adaptive norms as models write them, and a norm on parameters of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.modulation, self.last_modulation = nn.Linear(3, 24), nn.Linear(3, 8)
        self.query, self.key, self.feed, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.weight, self.bias, self.own = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        x = x + gate.unsqueeze(1) * (self.query(h) + self.key(h))
        h = torch.addcmul(shift_2[:, None], self.norm(x), 1 + scale_2[:, None]) + 0 * gate_2[:, None]
        x = x + self.feed(h)
        scale, shift = torch.chunk(self.last_modulation(condition), 2, dim=1)
        x = self.own(F.layer_norm(x, (4,), self.weight, self.bias))
        return self.last(shift.unsqueeze(1) + scale.unsqueeze(1) * F.layer_norm(x, (4,)))


def made():
    torch.manual_seed(0)
    model = Adaptive().eval().double().requires_grad_(False)
    inputs = {"x": torch.randn(3, 5, 4).double(), "condition": torch.randn(3, 3).double()}
    graph = capture(model, inputs, {})
    return model, insert_quantizers(model, graph, ["query", "key", "feed", "last", "own", "modulation"], None), inputs


@pytest.mark.parametrize(
    ("site", "together"), [("query", ("query", "key")), ("last", ("last",)), ("own", ("own",)), ("feed", ())]
)
def test_the_function_stays(site: str, together: tuple[str, ...]) -> None:
    model, graph, inputs = made()
    expected = runner(model, graph)(inputs)
    scale = torch.rand(4).double() + 0.5
    smooth(model, dict.fromkeys(together or (site,), scale))
    before = model.get_submodule(site).weight.clone()
    assert fold_into_norm(model, graph, site) == together
    if together:
        torch.testing.assert_close(model.get_submodule(site).weight, before * scale)
        assert all(model.get_submodule(path).smoothing is None for path in together)
    torch.testing.assert_close(runner(model, graph)(inputs), expected, rtol=1e-12, atol=1e-12)


def test_rows_of_the_modulation_by_hand() -> None:
    model, graph, _ = made()
    scale = torch.tensor([0.5, 2.0, 1.0, 4.0]).double()
    weight, bias = model.modulation.weight.clone(), model.modulation.bias.clone()
    smooth(model, {"query": scale, "key": scale})
    fold_into_norm(model, graph, "query")
    shift, factor = slice(0, 4), slice(4, 8)
    torch.testing.assert_close(model.modulation.weight[shift], weight[shift] / scale[:, None])
    torch.testing.assert_close(model.modulation.bias[shift], bias[shift] / scale)
    torch.testing.assert_close(model.modulation.weight[factor], weight[factor] / scale[:, None])
    torch.testing.assert_close(1 + model.modulation.bias[factor], (1 + bias[factor]) / scale)
    assert torch.equal(model.modulation.weight[8:], weight[8:]) and torch.equal(model.modulation.bias[8:], bias[8:])


def test_what_cannot_be_folded_stays() -> None:
    model, graph, _ = made()
    scale = torch.rand(4).double() + 0.5
    smooth(model, {"query": scale, "key": scale + 1})
    assert fold_into_norm(model, graph, "query") == ()  # other scales
    smooth(model, {"key": scale})
    model.modulation.weight_quantizer = nn.Identity()  # its scales are found already
    assert fold_into_norm(model, graph, "query") == ()


CASES = {
    "dit": ("transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.0.proj", "proj_out_2"),
    "sd3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj", "proj_out"),
    "flux": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "proj_out"),
    "pixart-sigma": ("transformer_blocks.0.attn1.to_q",),
}


@pytest.mark.parametrize("name", CASES)
def test_denoisers_of_diffusers(name: str) -> None:
    model = seeded(MODELS[name]).double().requires_grad_(False)
    inputs, static = example(model, name)
    graph = capture(model, nested(inputs), static)
    names = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    graph = insert_quantizers(model, graph, [path for path in names if path in called], None)
    (expected, *_) = runner(model, graph)(inputs)
    for site in CASES[name]:
        layer = model.get_submodule(site)
        scale = torch.rand(layer.input_channels).double() + 0.5
        parent = site.rpartition(".")[0]
        readers = {
            "to_q": [f"{parent}.{part}" for part in ("to_q", "to_k", "to_v")],
            "add_q_proj": [f"{parent}.add_{part}_proj" for part in "qkv"],
        }.get(site.rpartition(".")[2], [site])
        if site.startswith("single"):
            readers += [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]
        smooth(model, dict.fromkeys(readers, scale))
        assert set(fold_into_norm(model, graph, site)) == (set() if name == "pixart-sigma" else set(readers)), site
        (found, *_) = runner(model, graph)(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def example(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Inputs in float64, flat, and the keywords beside them."""
    family = family_of(model, 8 if name == "flux" else None, 8)

    def nothing() -> Schedule:
        raise NotImplementedError

    call, shape, inputs = family.call, family.noise_shape, family.example_inputs
    denoiser = Denoiser(model, call, shape, inputs, Conditions, nothing, lambda x: x)
    task = DenoiserTask(denoiser, Sampling(), torch.device("cpu"), torch.float64)
    given = task.example_inputs(3).items()
    return {key: value.double() if value.is_floating_point() else value for key, value in given}, dict(task.static)
