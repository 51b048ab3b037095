"""What a student costs, by the one accounting."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from quantlab.allocation.plan import Plan, SitePlan
from quantlab.allocation.student import Student
from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.quant import QParams
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import AS_IT_IS, Pack
from quantlab.contracts.site import Site, SiteKind
from quantlab.quant.accounting import (
    SCALE_BYTES,
    TIMESTEP_BYTES,
    Accounting,
    FloatModel,
    Product,
    SiteCost,
    account,
    table_bytes,
    zero_point_bytes,
)
from quantlab.quant.attention import KEY, PROBABILITIES, QUERY, VALUE
from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operands import QuantizedOperands


def student_cost(
    student: Student,
    bit_map: BitMap,
    float_model: FloatModel,
    corrections: Sequence[FittedCorrection] = (),
    stored: Pack = AS_IT_IS,
) -> Accounting:
    """Bytes and bit operations of a student with its quantizers in place.

    Args:
        student: the student.
        bit_map: its bits.
        float_model: of the float network.
        corrections: of the sampler.
        stored: how the parameters of the quantizers will be stored; their own values are left as they are.

    Raises:
        NonFiniteError: a scale does not fit into the type it is to be stored as.
    """
    quantized, products = student.layers(), student.products()
    costs = []
    for entry in student.plan.sites:
        cost = site_cost(entry.site, bit_map)
        layer, product = quantized.get(entry.site.name), products.get(entry.site.name)
        cost = cost if layer is None else _with_layer(cost, layer, stored)
        costs.append(cost if product is None else replace(cost, operand_bytes=_operand_bytes(product, stored)))
    return replace(
        account(costs, float_model),
        correction_bytes=sum(map(_correction_bytes, corrections)),
        other_macs=_other_macs(student.plan),
    )


def _other_macs(plan: Plan) -> int:
    return sum(left.macs for left in plan.uncovered)


def _correction_bytes(fitted: FittedCorrection) -> int:
    tables = sum(value.numel() * value.element_size() for value in fitted.tensors.values())
    return tables + TIMESTEP_BYTES * len(fitted.timesteps)


def planned_cost(
    plan: Plan,
    float_model: FloatModel,
    timesteps: int,
    smoothed: bool,
    zero_point_bytes: int = 1,
    scale_bytes: int = SCALE_BYTES,
) -> Accounting:
    """What the plan will cost, before anything is measured: a policy that mixes bits adds its index maps to it.

    Args:
        plan: bits of every site.
        float_model: of the float network.
        timesteps: entries of the activation tables, 1 for static scales.
        smoothed: the sites under the budget get smoothing scales.
        zero_point_bytes: what a zero point is taken to need; how wide it becomes is known after calibration.
        scale_bytes: of one scale as it will be stored.
    """
    bit_map = plan.nominal()
    costs = []
    for entry in plan.sites:
        cost = replace(
            site_cost(entry.site, bit_map), weight_scale_bytes=scale_bytes, activation_scale_bytes=scale_bytes
        )
        entries = timesteps if entry.site.has_samples_first else 1
        if cost.products:
            cost = replace(
                cost, operand_bytes=len(entry.site.slots) * table_bytes(entries, 1, entries > 1, scale_bytes)
            )
        if entry.budgeted:
            parts = max(1, len(entry.split))
            cost = replace(
                cost,
                weight_scales_per_channel=parts,
                weight_bits=_with_extra(cost.weight_bits, plan.budget.extra_bit_fraction),
                activation_entries=entries * parts,
                per_timestep=entries > 1,
                smoothing_channels=_input_channels(entry) if smoothed else 0,
                weight_zero_point_bytes=zero_point_bytes,
                activation_zero_point_bytes=zero_point_bytes,
            )
        costs.append(cost)
    return replace(account(costs, float_model), other_macs=_other_macs(plan))


def site_cost(site: Site, bit_map: BitMap) -> SiteCost:
    """The cost of a site that has only its bits."""
    return SiteCost(
        name=site.name,
        macs=site.macs,
        weights_per_channel=site.weight_count // max(1, site.out_channels),
        weight_bits=bit_map.weight_bits[site.name],
        activation_bits=bit_map.activation_bits[site.name, site.slots[0].name],
        products=_products(site, bit_map),
        input_elements=input_elements(site),
    )


def input_elements(site: Site) -> int:
    """Elements of all inputs of a site in one forward at batch 1."""
    return sum(math.prod(slot.shape) for slot in site.slots)


def _products(site: Site, bit_map: BitMap) -> tuple[Product, ...]:
    """The products of activations of a site that the bit map quantizes, each with the bits of its operands.

    Of an attention these are query times key and probabilities times value.
    """
    if site.kind is SiteKind.MATMUL:
        left, right = (bit_map.activation_bits[site.name, slot.name] for slot in site.slots)
        return (Product(site.macs, (left, right)),)
    shapes = {slot.name: slot.shape for slot in site.slots}
    if PROBABILITIES not in shapes:
        return ()
    bits = {slot: bit_map.activation_bits[site.name, slot] for slot in shapes}
    pairs = math.prod(shapes[PROBABILITIES])
    return (
        Product(pairs * shapes[QUERY][-1], (bits[QUERY], bits[KEY])),
        Product(pairs * shapes[VALUE][-1], (bits[PROBABILITIES], bits[VALUE])),
    )


def _stored_parameters(quantizer: Quantizer | None, stored: Pack) -> QParams | None:
    """What a quantizer will have in the file; None for a format of its own."""
    if quantizer is None:
        return None
    if stored != AS_IT_IS:
        quantizer = copy.deepcopy(quantizer)
        quantizer.store_as(stored)
    return quantizer.qparams()


def _operand_bytes(product: QuantizedOperands, stored: Pack) -> int:
    """Tables of the quantizers of a product's operands."""
    total = 0
    for quantizer in product.quantizers.values():
        found = _stored_parameters(cast(Quantizer, quantizer), stored)
        if found is not None:
            width = zero_point_bytes(found.zero_point, found.round_zero_point)
            total += table_bytes(found.scale.numel(), width, found.timesteps is not None, found.scale_bytes)
    return total


def _with_layer(cost: SiteCost, layer: QuantizedLayer, stored: Pack) -> SiteCost:
    """The cost with what the quantized layer stores."""
    weight = _stored_parameters(layer.weight_quantizer, stored)
    inputs = _stored_parameters(layer.input_quantizer, stored)
    return replace(
        cost,
        activation_entries=inputs.scale.numel() if inputs is not None else 1,
        per_timestep=inputs is not None and inputs.timesteps is not None,
        weight_zero_point_bytes=_zero_points(weight),
        weight_scales_per_channel=max(1, len(weight.split)) if weight is not None else 1,
        activation_zero_point_bytes=_zero_points(inputs),
        weight_scale_bytes=weight.scale_bytes if weight is not None else SCALE_BYTES,
        activation_scale_bytes=inputs.scale_bytes if inputs is not None else SCALE_BYTES,
        smoothing_channels=layer.smoothing.numel() if layer.smoothing is not None else 0,
        adapter_bytes=sum(p.numel() * p.element_size() for p in layer.adapter.parameters()) if layer.adapter else 0,
        extra_bytes=sum(q.extra_bytes() for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None),
        branch_values=sum(p.numel() for p in layer.branch.parameters()) if layer.branch else 0,
    )


def _zero_points(parameters: QParams | None) -> int:
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
