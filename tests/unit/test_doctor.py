"""What the doctor says about a model, and what it exits with."""

from __future__ import annotations

import json

import pytest
from diffusers_models import save_dit
from torch import Tensor
from torch.nn import functional as F
from toys import Kinds, ToyTask
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.doctor import LowCoverage, diagnose, diagnose_task, named_model, require_coverage
from quantlab.errors import RecipeError
from quantlab.plugins import load_registry


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def diagnosis(dit):
    return diagnose(f"diffusers:{dit}", load_registry())


def test_sites_coverage_and_limits(diagnosis):
    assert diagnosis.network == "DiTTransformer2DModel" and diagnosis.method == "value trace"
    kinds = {line.kind: line for line in diagnosis.kinds}
    assert {kind: line.count for kind, line in kinds.items()} == {
        "conv": 1, "linear": 20, "embedding": 2, "attention": 2,
    }  # fmt: skip
    assert kinds["attention"].macs == 2 * 2 * 16 * 16 * 32  # two blocks, two products of 16 tokens by 32 channels
    assert diagnosis.coverage == pytest.approx(1 - kinds["attention"].macs / diagnosis.macs)
    assert any("hidden_states.shape[2]" in guard for guard in diagnosis.guards)
    assert diagnosis.inputs["hidden_states"] == (1, 4, 8, 8)
    assert 0 < diagnosis.quantized_bytes < diagnosis.weight_bytes


def test_protected_sites_are_found_by_their_roles(diagnosis):
    protected = {line.rule: line.sites for line in diagnosis.protected}
    assert protected["protected: first"] == ("pos_embed.proj",)
    assert protected["protected: last"] == ("proj_out_2",)
    assert protected["protected: modulation"] == (
        "transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear", "proj_out_1",
    )  # fmt: skip
    assert all("timestep_embedder" in name for name in protected["protected: time_embed"])


def test_recipes_overrule_the_protected_sites(dit, tmp_path):
    recipe = tmp_path / "dit.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{source: diffusers, name: {dit}}}\nmethod: min-max\n"
        "budget: {weight_bits: 4, activation_bits: 8}\nkeep: [{match: pos_embed.proj, bits: float}]\n"
        "protect: {first: 8, last: 6}\n"
    )
    protected = {line.rule: (line.bits, line.sites) for line in diagnose(str(recipe), load_registry()).protected}
    assert protected == {"keep": ("float", ("pos_embed.proj",)), "protected: last": ("6", ("proj_out_2",))}
    with pytest.raises(RecipeError, match="no site has such a tag") as caught:
        diagnose(str(recipe), load_registry(), ["protect.frist=8"])
    assert caught.value.next_step == 'did you mean "first"?'


def test_too_little_coverage_has_an_exit_code_of_its_own(dit, diagnosis):
    result = CliRunner().invoke(app, ["doctor", f"diffusers:{dit}", "--json", "--min-coverage", "0.99"])
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["coverage"] == pytest.approx(diagnosis.coverage) and found["macs"] == diagnosis.macs
    with pytest.raises(LowCoverage, match="too little"):
        require_coverage(diagnosis, 0.99)
    require_coverage(diagnosis, 0.9)


class Mixing(Kinds):
    """Mixes channels by a weight that is normalized first."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        weight = F.normalize(self.mix.weight)
        return super().forward(F.linear(F.pad(sample, (0, 6)), weight)[..., :6], timestep)


def test_what_stays_float_is_named_with_its_reason():
    task = ToyTask(Mixing().eval().requires_grad_(False))
    found = diagnose_task("toy", task, named_model("builtin", "digits", load_registry()))
    kinds = {line.kind: line for line in found.kinds}
    assert (kinds["conv"].count, kinds["conv_transpose"].count, kinds["matmul"].count) == (6, 3, 2)
    assert kinds["matmul"].reason == "with the key products; float otherwise" and not kinds["matmul"].covered
    assert kinds["embedding"].macs == 0 and "embeddings" in kinds["embedding"].reason
    # Rows of 12 values by a weight [12, 12].
    name = next(name for name in kinds if name.startswith("linear") and not kinds[name].covered)
    assert kinds[name].macs == 6 * 12 * 12 and kinds[name].reason == "no site: its weight is computed in the forward"
    left = kinds["matmul"].macs + kinds[name].macs
    assert found.coverage == pytest.approx(1 - left / found.macs)
    assert "its weight is computed" in found.to_text(120)


def test_the_text_fits_a_terminal(diagnosis):
    text = diagnosis.to_text(80)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("value trace", "attention", "protected: first", "memory:", "conditions on sizes"):
        assert part in text


def test_a_model_of_the_zoo_has_nothing_protected():
    found = diagnose("builtin:digits", load_registry())
    assert found.protected == () and found.coverage > 0.99
