"""From plan and calibration set to a student with bits and scales.

Every step is a function of one site: measure, smooth, allocate, find scales. What differs is what a site sees:
``teacher`` shows every site the float network's tensors, all at once, so that policies can weigh sites against each
other; ``quantized_upstream`` goes through one forward site by site, each seeing what the quantized sites before it
produce, as the released MPQ-DM does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from quantlab.allocation.budgets import open_limits, require_within
from quantlab.allocation.cost import student_cost
from quantlab.allocation.plan import SitePlan, mean_weight_bits
from quantlab.allocation.student import (
    QuantizerChoices,
    Student,
    install_operand_quantizers,
    install_quantizers,
)
from quantlab.calibration.collect import Operands, SpilledInputs, collect_inputs, collect_operands, watch_inputs
from quantlab.calibration.spill import Streaming
from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy, Resource
from quantlab.contracts.check import check_bit_map, check_quantized, check_scales, plugin_call
from quantlab.contracts.model import CalibrationBatch, Progress
from quantlab.contracts.passes import SmoothingPass
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.scores import ScoreRequest
from quantlab.contracts.sections import AS_IT_IS, FreeZeroPoints, InputsFrom, Pack
from quantlab.errors import QuantlabError
from quantlab.graph.passes.smooth import smooth
from quantlab.quant.layers import QuantizedLayer


@dataclass(frozen=True)
class AssignMethod:
    """What a method says about assignment, as objects.

    Attributes:
        smoothing: passes that scale input channels, in order; their scales multiply.
        policies: bit policies, each given what the one before returned.
        choices: how weights and activations are quantized.
        inputs_from: what a site sees.
        stored: how the parameters of quantizers will be stored, which a budget of the size counts.
    """

    smoothing: Sequence[SmoothingPass]
    policies: Sequence[BitPolicy]
    choices: QuantizerChoices
    inputs_from: InputsFrom
    stored: Pack = AS_IT_IS


Scores = Mapping[ScoreRequest, Mapping[str, Tensor]]
"""Scores that policies declared: request -> site -> [len(widths)]."""


def assign(
    student: Student,
    method: AssignMethod,
    batch: CalibrationBatch,
    rng: torch.Generator,
    progress: Progress,
    scores: Scores | None = None,
    streaming: Streaming | None = None,
) -> BitMap:
    """Give every planned site its bits and scales, in place; returns the bits.

    Args:
        student: without quantizers.
        method: what is done.
        batch: what the network runs on.
        rng: of the policies.
        progress: by site.
        scores: that the policies declared.
        streaming: forwards of parts of the batch, with what sites see on disk; None: one forward, all in memory. With
            ``quantized_upstream`` the layers see one forward all the same, each in its turn.

    Raises:
        QuantlabError: a site was not reached, or the policies missed the budget.
    """
    limits = _limits(student, method, batch.timestep)
    assigner = _Assigner(student, method, batch.timestep, rng, scores or {}, limits, one_site=streaming is not None)
    names = [entry.site.name for entry in student.plan.layers]
    bit_map = student.plan.nominal()
    with torch.no_grad():
        match method.inputs_from:
            case InputsFrom.TEACHER:
                attended = collect_operands(student.products(), student.run, batch.inputs, streaming)
                records = smoothed_records(student, method, batch, streaming)
                bit_map = assigner.allocate(bit_map, records)
                for done, (name, record) in enumerate(records.items(), 1):
                    assigner.quantize(assigner.entries[name], record, bit_map)
                    progress(done, len(names))
            case InputsFrom.QUANTIZED_UPSTREAM:
                assigned: dict[str, BitMap] = {}

                def assign_site(name: str, x: Tensor) -> None:
                    nonlocal bit_map
                    if name in assigned:
                        return
                    record = _smoothed(student, method, assigner.entries[name], (x,))
                    bit_map = assigner.allocate(bit_map, {name: record})
                    assigner.quantize(assigner.entries[name], record, bit_map)
                    assigned[name] = bit_map
                    progress(len(assigned), len(names))

                watch_inputs(student.network, names, assign_site, lambda: student.run(batch.inputs))
                _require_all(names, assigned)
                attended = collect_operands(student.products(), student.run, batch.inputs, streaming)
        assigner.quantize_products(attended, bit_map)
    _require_budget(student, bit_map, method.policies, method.stored)
    return bit_map


def smoothed_records(
    student: Student, method: AssignMethod, batch: CalibrationBatch, streaming: Streaming | None = None
) -> Mapping[str, SiteRecord]:
    """The tensors of every quantized site in the float network, smoothed in place as the method says.

    With ``streaming`` a site's record is made when it is asked for, and its inputs lie in the streaming's folder.
    """
    entries = {entry.site.name: entry for entry in student.plan.layers}
    with torch.no_grad():
        if streaming is None:
            inputs = collect_inputs(student.network, list(entries), lambda: student.run(batch.inputs))
            return {name: _smoothed(student, method, entry, inputs[name]) for name, entry in entries.items()}
        sites = [entry.site for entry in entries.values()]
        spilled = SpilledInputs(student.network, sites, student.run, batch.inputs, streaming)
        smoothing = {name: _smoothed(student, method, each, spilled[name]).smoothing for name, each in entries.items()}
        return _SpilledRecords(student, spilled, smoothing)


class _SpilledRecords(Mapping[str, SiteRecord]):
    """Records of sites whose inputs are on disk, each made when it is asked for."""

    def __init__(self, student: Student, inputs: SpilledInputs, smoothing: Mapping[str, Tensor | None]) -> None:
        self._student, self._inputs, self._smoothing = student, inputs, smoothing

    def __getitem__(self, name: str) -> SiteRecord:
        record = SiteRecord.of_layer(self._student.layer(name), self._inputs[name])
        return replace(record, smoothing=self._smoothing[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._smoothing)

    def __len__(self) -> int:
        return len(self._smoothing)


def _smoothed(student: Student, method: AssignMethod, entry: SitePlan, inputs: tuple[Tensor, ...]) -> SiteRecord:
    """Measure a site and set its smoothing scales; only sites under the budget are smoothed."""
    layer = student.layer(entry.site.name)
    record = SiteRecord.of_layer(layer, inputs)
    if not entry.budgeted:
        return record
    for smoothing in method.smoothing:
        weight_absmax, input_absmax = record.weight_absmax(), record.input_absmax()
        with plugin_call("pass", smoothing, "scales", entry.site.name):
            scales = smoothing.scales(weight_absmax, input_absmax)
        check_scales(smoothing, scales, len(input_absmax), entry.site.name)
        before = record.smoothing
        record = replace(record, smoothing=scales if before is None else before * scales)
    if record.smoothing is not None:
        smooth(student.network, {entry.site.name: record.smoothing})
    return record


def _limits(student: Student, method: AssignMethod, timestep: Tensor | None) -> dict[Resource, float]:
    """What the bits of the sites under the budget may cost, of the resources that the budget limits."""
    activations = method.choices.activations.settings
    per_timestep = timestep is not None and getattr(activations, "per_timestep", False)
    return open_limits(
        student.plan,
        student.float_model,
        timesteps=len(timestep.unique()) if timestep is not None and per_timestep else 1,
        smoothed=bool(method.smoothing),
        rounded=method.stored.free_zero_points is FreeZeroPoints.ROUND
        or (method.choices.weights.settings.round_zero_point and activations.round_zero_point),
        mixed=any(policy.mixes for policy in method.policies),
        scale_bytes=method.stored.scales.itemsize,
    )


@dataclass(frozen=True)
class _Assigner:
    """The per-site steps."""

    student: Student
    method: AssignMethod
    timestep: Tensor | None
    rng: torch.Generator
    scores: Scores
    limits: Mapping[Resource, float]
    one_site: bool

    @property
    def entries(self) -> dict[str, SitePlan]:
        return {entry.site.name: entry for entry in self.student.plan.layers}

    def allocate(self, bit_map: BitMap, records: Mapping[str, SiteRecord]) -> BitMap:
        """Ask each policy about the budgeted sites among ``records``."""
        sites = [self.entries[name].site for name in records if self.entries[name].budgeted]
        if not sites:
            return bit_map
        data = TensorSiteData(records, self.scores, one_site=self.one_site)
        for policy in self.method.policies:
            problem = AllocationProblem(sites, data, self.student.plan.budget, bit_map, self.rng, self.limits)
            with plugin_call("policy", policy, "allocate", sites[0].name if len(sites) == 1 else ""):
                bit_map = policy.allocate(problem)
            check_bit_map(policy, problem, bit_map)
        return bit_map

    def quantize(self, entry: SitePlan, record: SiteRecord, bit_map: BitMap) -> None:
        """Install the quantizers of a site and find their scales."""
        layer = self.student.layer(entry.site.name)
        install_quantizers(layer, entry, bit_map, self.method.choices)
        site = entry.site.name
        if layer.weight_quantizer is not None:
            find_scales(layer.weight_quantizer, [layer.float_weight()], None, site)
        if layer.input_quantizer is not None:
            find_scales(layer.input_quantizer, list(record.smoothed_inputs()), self.timestep, site)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                with plugin_call("quantizer", quantizer, "choose", site):
                    quantizer.choose(lambda: self.output_error(layer, record))

    def output_error(self, layer: QuantizedLayer, record: SiteRecord) -> float:
        """Mean squared error of a layer's output on its calibration inputs against the float one."""
        # Not a call of the module: its hooks are the ones that assign it.
        pairs = (
            (layer.forward(x.to(layer.weight.dtype) if x.is_floating_point() else x, self.timestep), x)
            for x in record.inputs
        )
        squared = [(output.float() - record.compute(x, record.weight)).square() for output, x in pairs]
        return sum(part.double().sum().item() for part in squared) / sum(part.numel() for part in squared)

    def quantize_products(self, attended: Operands, bit_map: BitMap) -> None:
        """Install the quantizers of every product of activations and find their scales."""
        for entry in self.student.plan.products:
            product = self.student.products()[entry.site.name]
            install_operand_quantizers(product, entry, bit_map, self.method.choices)
            for slot, quantizer in product.quantizers.items():
                x = attended[entry.site.name, slot]
                quantizer.to(x.device)
                find_scales(cast(Quantizer, quantizer), [x], self.timestep, entry.site.name)


def find_scales(quantizer: Quantizer, values: Sequence[Tensor], timestep: Tensor | None, site: str) -> None:
    """Show a quantizer what passes at its place, let it decide, and check what it then returns.

    Raises:
        PluginError: it fails, or returns another shape or dtype.
    """
    with plugin_call("quantizer", quantizer, "observe", site):
        for x in values:
            quantizer.observe(x, timestep)
    with plugin_call("quantizer", quantizer, "freeze", site):
        quantizer.freeze()
    # One sample tells; a weight has no timestep, and all its channels are one sample.
    x = values[0] if timestep is None else values[0][:1]
    with plugin_call("quantizer", quantizer, "forward", site):
        quantized = quantizer(x, None if timestep is None else timestep[:1])
    check_quantized(quantizer, x, quantized, site)


def _require_all(names: Sequence[str], assigned: dict[str, BitMap]) -> None:
    missing = [name for name in names if name not in assigned]
    if missing:
        raise QuantlabError(
            "a site was never reached during calibration", where=f"site {missing[0]}", next_step='keep it "float"'
        )


def _require_budget(student: Student, bit_map: BitMap, policies: Sequence[BitPolicy], stored: Pack) -> None:
    """The mean bits may exceed the budget by the extra bits that it grants, and by nothing else; all others hold."""
    budget = student.plan.budget
    # A site grants its extra bits in whole channels.
    allowed = sum(
        (budget.weight_bits + -(-budget.extra_bit_fraction * site.out_channels // 1) / site.out_channels)
        * site.weight_count
        for site in student.plan.budgeted
    ) / sum(site.weight_count for site in student.plan.budgeted)
    mean = mean_weight_bits(bit_map, student.plan.budgeted)
    if mean > allowed + 1e-6:
        raise QuantlabError(
            "the policies spent more than the budget",
            where=f"assign, allocate: {', '.join(policy.name for policy in policies)}",
            got=f"{mean:.4f} bits a weight",
            allowed=f"at most {allowed:.4f}",
            next_step="a policy that gives bits takes as many away, or the recipe grants them: "
            "budget.weight_bits, budget.extra_bit_fraction",
        )
    require_within(budget, student_cost(student, bit_map, student.float_model, stored=stored))
