"""What a student costs, by the one accounting."""

from __future__ import annotations

from quantlab.allocation.plan import Plan
from quantlab.allocation.student import QuantizedLayer, Student
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.site import Site
from quantlab.quant.accounting import Accounting, SiteCost, account


def student_cost(student: Student, bit_map: BitMap, values: int) -> Accounting:
    """Bytes and bit operations of a student with its quantizers in place.

    Args:
        student: the student.
        bit_map: its bits.
        values: parameters of the float network.
    """
    quantized = student.layers()
    return account([site_cost(e.site, bit_map, quantized.get(e.site.name)) for e in student.plan.sites], values)


def planned_cost(plan: Plan, values: int, timesteps: int) -> Accounting:
    """What the plan will cost, before anything is measured.

    Args:
        plan: bits of every site.
        values: parameters of the float network.
        timesteps: entries of the activation tables, 1 for static scales.
    """
    bit_map = plan.nominal()
    costs = [site_cost(entry.site, bit_map, None, timesteps if entry.budgeted else 1) for entry in plan.sites]
    return account(costs, values)


def site_cost(site: Site, bit_map: BitMap, layer: QuantizedLayer | None, entries: int = 1) -> SiteCost:
    """The cost of one site; ``layer`` is its quantized layer when there is one."""
    parameters = layer.input_quantizer.qparams() if layer is not None and layer.input_quantizer is not None else None
    table = parameters is not None and parameters.timesteps is not None
    weights = layer.weight_quantizer.qparams() if layer is not None and layer.weight_quantizer is not None else None
    rounded = weights is None or bool((weights.zero_point == weights.zero_point.round()).all())
    return SiteCost(
        macs=site.macs,
        weights_per_channel=site.weight_count // max(1, site.out_channels),
        weight_bits=bit_map.weight_bits[site.name],
        activation_bits=bit_map.activation_bits[site.name, site.slots[0].name],
        activation_entries=parameters.scale.numel() if parameters is not None else entries,
        per_timestep=table or entries > 1,
        round_zero_point=rounded,
        smoothing_channels=layer.smoothing.numel() if layer is not None and layer.smoothing is not None else 0,
        adapter_values=sum(p.numel() for p in layer.adapter.parameters()) if layer is not None and layer.adapter else 0,
    )
