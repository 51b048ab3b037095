"""Scores of sites: what quantizing one of them alone costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab.allocation.plan import SitePlan
from quantlab.allocation.student import QuantizerChoices, Student, install_quantizers
from quantlab.calibration.collect import CalibrationBatch
from quantlab.calibration.parts import in_parts
from quantlab.calibration.sensitivity import (
    divergence,
    fisher_diagonal,
    hessian_traces,
    noise_to_signal,
    sampled_loss,
)
from quantlab.calibration.stats import SiteRecord
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.model import Progress
from quantlab.contracts.scores import Operand, Score, ScoreRequest
from quantlab.errors import RecipeError

Cost = Callable[[SitePlan, int], float]
"""What a site at a width costs."""


@dataclass(frozen=True)
class ScoreMeter:
    """Measures scores on a student whose sites are smoothed and have no quantizers yet, so that it computes in float.

    Attributes:
        student: the student.
        records: the tensors of its sites.
        choices: how the method quantizes, which is how a score does.
        batch: what the network runs on.
        rows: of it in one forward without gradient; None: all that a score is measured on.
    """

    student: Student
    records: Mapping[str, SiteRecord]
    choices: QuantizerChoices
    batch: CalibrationBatch
    rows: int | None = None

    @property
    def entries(self) -> tuple[SitePlan, ...]:
        """The sites that policies may allocate, those with a weight."""
        return tuple(e for e in self.student.plan.quantized if e.budgeted and e.site.weight_shape)

    def measure(self, request: ScoreRequest, rng: torch.Generator, progress: Progress) -> dict[str, Tensor]:
        """The score of every site under the budget, float64 [len(widths)].

        Raises:
            RecipeError: a score of weights is asked for inputs.
        """
        if request.operand is Operand.INPUT and request.score.of_weights_only:
            raise RecipeError(
                "this score is made of derivatives with respect to weights and says nothing about inputs",
                where=f'score "{request.score}"',
                allowed=", ".join(score for score in Score if not score.of_weights_only),
            )
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            cost = self._cost(request, rng)
            found = {}
            with torch.no_grad():
                for done, entry in enumerate(self.entries, 1):
                    values = [cost(entry, width) for width in request.widths]
                    found[entry.site.name] = torch.tensor(values, dtype=torch.float64)
                    progress(done, len(self.entries))
        return found

    def _cost(self, request: ScoreRequest, rng: torch.Generator) -> Cost:
        match request.score:
            case Score.WEIGHT_MSE if request.operand is Operand.WEIGHT:
                return lambda entry, width: self._weight_error(entry, width).square().mean().item()
            case Score.WEIGHT_MSE:
                return self._input_error
            case Score.OUTPUT_MSE | Score.OUTPUT_SQNR:
                return lambda entry, width: self._site_output(entry, width, request)
            case Score.NETWORK_SQNR | Score.OUTPUT_KL:
                return self._network_output(request)
            case Score.FISHER:
                information = self._fisher(request, rng)
                return lambda entry, width: (
                    _weighted(information[entry.site.name], self._weight_error(entry, width)) / 2
                )
            case Score.HESSIAN_TRACE:
                means = self._hessian_means(request, rng)
                return lambda entry, width: _weighted(means[entry.site.name], self._weight_error(entry, width))

    def _quantized_weight(self, entry: SitePlan, width: int) -> Tensor:
        weight = self.records[entry.site.name].smoothed_weight()
        bits = torch.full((len(weight),), width, dtype=torch.int8)
        quantizer = self.choices.weight_quantizer(bits, entry.split).to(weight.device)
        quantizer.observe(weight)
        quantizer.freeze()
        return quantizer(weight).detach()

    def _weight_error(self, entry: SitePlan, width: int) -> Tensor:
        return self._quantized_weight(entry, width) - self.records[entry.site.name].smoothed_weight()

    @contextmanager
    def _quantized(self, entry: SitePlan, width: int, operand: Operand) -> Iterator[None]:
        """Let one layer compute with a quantized weight or input."""
        layer = self.student.layer(entry.site.name)
        if operand is Operand.WEIGHT:
            layer.use_weight(self._quantized_weight(entry, width).to(layer.weight.dtype))
        else:
            slots = {(entry.site.name, slot.name): width for slot in entry.site.slots}
            install_quantizers(layer, entry, BitMap(self.student.plan.nominal().weight_bits, slots), self.choices)
            layer.weight_quantizer = None
            assert layer.input_quantizer is not None
            for x in self.records[entry.site.name].smoothed_inputs():
                layer.input_quantizer.observe(x, self.batch.timestep)
            layer.input_quantizer.freeze()
        try:
            yield
        finally:
            layer.thaw()
            layer.input_quantizer = None

    def _quantized_inputs(self, entry: SitePlan, width: int) -> list[Tensor]:
        layer = self.student.layer(entry.site.name)
        with self._quantized(entry, width, Operand.INPUT):
            assert layer.input_quantizer is not None
            inputs = self.records[entry.site.name].smoothed_inputs()
            return [layer.input_quantizer(x, self.batch.timestep) for x in inputs]

    def _input_error(self, entry: SitePlan, width: int) -> float:
        exact = torch.cat([x.flatten() for x in self.records[entry.site.name].smoothed_inputs()])
        quantized = torch.cat([x.flatten() for x in self._quantized_inputs(entry, width)])
        return (quantized - exact).square().mean().item()

    def _site_output(self, entry: SitePlan, width: int, request: ScoreRequest) -> float:
        record = self.records[entry.site.name]
        inputs, weight = list(record.smoothed_inputs()), record.smoothed_weight()
        exact = torch.cat([record.compute(x, weight).flatten() for x in inputs])
        if request.operand is Operand.WEIGHT:
            weight = self._quantized_weight(entry, width)
        else:
            inputs = self._quantized_inputs(entry, width)
        output = torch.cat([record.compute(x, weight).flatten() for x in inputs])
        if request.score is Score.OUTPUT_MSE:
            return (output - exact).square().mean().item()
        return noise_to_signal(output, exact)

    def _network_output(self, request: ScoreRequest) -> Cost:
        inputs, run = self._rows(request.rows), in_parts(self.student.run, self.rows)
        with torch.no_grad():
            exact = run(inputs).double()

        def cost(entry: SitePlan, width: int) -> float:
            with self._quantized(entry, width, request.operand):
                output = run(inputs).double()
            if request.score is Score.OUTPUT_KL:
                return divergence(output, exact, request.output).item()
            return noise_to_signal(output, exact)

        return cost

    def _rows(self, count: int) -> dict[str, Tensor]:
        """Rows spread evenly over the batch, and so over the steps that it joins."""
        total = len(next(iter(self.batch.inputs.values())))
        index = torch.linspace(0, total - 1, min(count, total)).round().long()
        return {name: value[index.to(value.device)] for name, value in self.batch.inputs.items()}

    @contextmanager
    def _differentiable(self) -> Iterator[list[Tensor]]:
        """The weights that all layers compute with, as leaves of the graph."""
        leaves = []
        for entry in self.entries:
            layer = self.student.layer(entry.site.name)
            weight = self.records[entry.site.name].smoothed_weight().to(layer.weight.dtype)
            leaves.append(weight.detach().clone().requires_grad_())
            layer.use_weight(leaves[-1])
        try:
            with torch.enable_grad():
                yield leaves
        finally:
            for entry in self.entries:
                self.student.layer(entry.site.name).thaw()

    def _fisher(self, request: ScoreRequest, rng: torch.Generator) -> dict[str, Tensor]:
        inputs = self._rows(request.rows)
        count = len(next(iter(inputs.values())))

        def losses() -> Iterator[Tensor]:
            for row in range(count):
                output = self.student.run({name: value[row : row + 1] for name, value in inputs.items()})
                yield sampled_loss(output, request.output, rng)

        with self._differentiable() as weights:
            found = fisher_diagonal(losses(), weights)
        return {entry.site.name: each for entry, each in zip(self.entries, found, strict=True)}

    def _hessian_means(self, request: ScoreRequest, rng: torch.Generator) -> dict[str, Tensor]:
        with self._differentiable() as weights:
            output = self.student.run(self._rows(request.rows))
            loss = divergence(output, output.detach(), request.output)
            traces = hessian_traces(loss, weights, request.probes, rng)
        return {e.site.name: trace / e.site.weight_count for e, trace in zip(self.entries, traces, strict=True)}


def _weighted(information: Tensor, error: Tensor) -> float:
    return (information.double() * error.double().square()).sum().item()
