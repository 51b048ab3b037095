"""What a student costs, by the one accounting."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from quantlab.allocation.plan import Plan, SitePlan
from quantlab.allocation.student import QuantizedLayer, Student
from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.site import Site
from quantlab.quant.accounting import Accounting, FloatModel, SiteCost, account, zero_point_bytes


def student_cost(student: Student, bit_map: BitMap, float_model: FloatModel) -> Accounting:
    """Bytes and bit operations of a student with its quantizers in place.

    Args:
        student: the student.
        bit_map: its bits.
        float_model: of the float network.
    """
    quantized = student.layers()
    costs = []
    for entry in student.plan.sites:
        cost = site_cost(entry.site, bit_map)
        layer = quantized.get(entry.site.name)
        costs.append(cost if layer is None else _with_layer(cost, layer))
    return account(costs, float_model)


def planned_cost(
    plan: Plan, float_model: FloatModel, timesteps: int, smoothed: bool, zero_point_bytes: int = 1
) -> Accounting:
    """What the plan will cost, before anything is measured: a policy that mixes bits adds its index maps to it.

    Args:
        plan: bits of every site.
        float_model: of the float network.
        timesteps: entries of the activation tables, 1 for static scales.
        smoothed: the sites under the budget get smoothing scales.
        zero_point_bytes: what a zero point is taken to need; how wide it becomes is known after calibration.
    """
    bit_map = plan.nominal()
    costs = []
    for entry in plan.sites:
        cost = site_cost(entry.site, bit_map)
        if entry.budgeted:
            entries = timesteps if entry.site.has_samples_first else 1
            cost = replace(
                cost,
                weight_bits=_with_extra(cost.weight_bits, plan.budget.extra_bit_fraction),
                activation_entries=entries,
                per_timestep=entries > 1,
                smoothing_channels=_input_channels(entry) if smoothed else 0,
                weight_zero_point_bytes=zero_point_bytes,
                activation_zero_point_bytes=zero_point_bytes,
            )
        costs.append(cost)
    return account(costs, float_model)


def site_cost(site: Site, bit_map: BitMap) -> SiteCost:
    """The cost of a site that has only its bits."""
    return SiteCost(
        name=site.name,
        macs=site.macs,
        weights_per_channel=site.weight_count // max(1, site.out_channels),
        weight_bits=bit_map.weight_bits[site.name],
        activation_bits=bit_map.activation_bits[site.name, site.slots[0].name],
        input_elements=input_elements(site),
    )


def input_elements(site: Site) -> int:
    """Elements of all inputs of a site in one forward at batch 1."""
    return sum(math.prod(slot.shape) for slot in site.slots)


def _with_layer(cost: SiteCost, layer: QuantizedLayer) -> SiteCost:
    """The cost with what the quantized layer stores."""
    inputs = layer.input_quantizer.qparams() if layer.input_quantizer is not None else None
    return replace(
        cost,
        activation_entries=inputs.scale.numel() if inputs is not None else 1,
        per_timestep=inputs is not None and inputs.timesteps is not None,
        weight_zero_point_bytes=_zero_points(layer.weight_quantizer),
        activation_zero_point_bytes=_zero_points(layer.input_quantizer),
        smoothing_channels=layer.smoothing.numel() if layer.smoothing is not None else 0,
        adapter_bytes=sum(p.numel() * p.element_size() for p in layer.adapter.parameters()) if layer.adapter else 0,
    )


def _zero_points(quantizer: Quantizer | None) -> int:
    parameters = quantizer.qparams() if quantizer is not None else None
    if parameters is None:
        return 0
    return zero_point_bytes(parameters.zero_point, parameters.round_zero_point)


def _with_extra(bits: torch.Tensor, fraction: float) -> torch.Tensor:
    """One bit more for this share of the channels, rounded up."""
    more = bits.clone()
    more[: math.ceil(fraction * len(bits))] += 1
    return more


def _input_channels(entry: SitePlan) -> int:
    shape = entry.site.weight_shape
    return shape[1] * entry.site.groups if shape and entry.weight_bits != FLOAT_BITS else 0
