"""What sites see is the same on disk as in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import Skipping, ToyDenoiser, make_toy

from quantlab.calibration.collect import SpilledInputs, calibration_batch, collect_inputs
from quantlab.calibration.parts import batch_parts, in_parts, row_parts
from quantlab.calibration.spill import Spill, Streaming, streaming_in
from quantlab.errors import NonFiniteError, QuantlabError

CPU = torch.device("cpu")


def test_a_tensor_grows_and_is_read_back(tmp_path: Path) -> None:
    spill: Spill[str] = Spill(tmp_path, CPU)
    value = torch.arange(24, dtype=torch.bfloat16).view(6, 4)
    spill.append("a", value[:4].t().contiguous().t())
    spill.append("b", torch.zeros(0, 3))
    spill.append("a", value[4:])
    assert torch.equal(spill["a"], value) and spill["b"].shape == (0, 3)
    assert list(spill) == ["a", "b"] and len(spill) == 2
    spill["a"].zero_()
    assert torch.equal(spill["a"], value), "what is read is the reader's own"
    with pytest.raises(QuantlabError, match="differ in more than their rows"):
        spill.append("a", torch.zeros(2, 5, dtype=torch.bfloat16))


def test_temporary_files_go_with_their_context(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), streaming_in(tmp_path, 2) as streaming:
        assert streaming is not None
        Spill(streaming.folder, CPU).append("a", torch.ones(3))
        assert any(path.is_file() for path in tmp_path.rglob("*"))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with streaming_in(tmp_path, None) as streaming:
        assert streaming is None


def test_parts_are_the_batch() -> None:
    toy = make_toy()
    batch = calibration_batch(toy.task, toy.calibration, 5)
    parts = list(batch_parts(batch, 7))
    assert [len(part.inputs["sample"]) for part in parts] == [7, 7, 6]
    assert torch.equal(torch.cat([part.timestep for part in parts]), batch.timestep)
    assert next(iter(row_parts(batch.inputs, None))) is batch.inputs
    seen = in_parts(lambda inputs: inputs["sample"] * inputs["timestep"].view(-1, 1, 1, 1), 3)(batch.inputs)
    assert torch.equal(seen, batch.inputs["sample"] * batch.timestep.view(-1, 1, 1, 1))


@pytest.mark.parametrize("network", [ToyDenoiser, Skipping])
def test_spilled_inputs_are_the_collected_ones(network: type, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        toy = make_toy(network())
    batch = calibration_batch(toy.task, toy.calibration, 5)
    net, sites = toy.task.network, [site for site in toy.sites if site.weight_shape]
    held = collect_inputs(net, [site.name for site in sites], lambda: net(**batch.inputs))
    for rows, exact in ((20, True), (7, False)):
        spilled = SpilledInputs(net, sites, lambda inputs: net(**inputs), batch.inputs, Streaming(rows, tmp_path))
        assert spilled.keys() == held.keys() and len(spilled) == len(sites)
        for name, inputs in held.items():
            for found, expected in zip(spilled[name], inputs, strict=True):
                if exact:
                    assert torch.equal(found, expected)
                torch.testing.assert_close(found, expected)


class RowsSecond(torch.nn.Module):
    """A linear layer, called twice, that sees [L, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(6, 6)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.mix(self.mix(sample[:, 0].movedim(0, 1))).movedim(0, 1)[:, None]


def test_rows_that_are_not_first_are_seen_one_after_another(tmp_path: Path) -> None:
    toy = make_toy(RowsSecond())
    (site,) = toy.sites
    assert not site.has_samples_first
    batch, net = calibration_batch(toy.task, toy.calibration, 5), toy.task.network
    held = collect_inputs(net, [site.name], lambda: net(**batch.inputs))[site.name]
    streaming = Streaming(7, tmp_path)
    spilled = SpilledInputs(net, [site], lambda inputs: net(**inputs), batch.inputs, streaming)[site.name]
    for found, expected in zip(spilled, held, strict=True):
        assert found.shape == (6 * 20, 6)
        sums = found.double().sum(0), expected.double().sum((0, 1))
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_or_not_reached_is_named(tmp_path: Path) -> None:
    toy = make_toy()
    batch = calibration_batch(toy.task, toy.calibration, 5)
    net, streaming = toy.task.network, Streaming(7, tmp_path)
    with pytest.raises(QuantlabError, match="never reached"):
        SpilledInputs(net, toy.sites[:1], lambda inputs: inputs["sample"], batch.inputs, streaming)
    bad = {**batch.inputs, "sample": batch.inputs["sample"].clone()}
    bad["sample"][13] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        SpilledInputs(net, toy.sites, lambda inputs: net(**inputs), bad, streaming)
