"""Call a module, into which quantizers can be put, where a model multiplies two activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from quantlab.errors import CaptureError, nearest
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.passes.replace_attention import with_timestep
from quantlab.graph.products import find_products
from quantlab.quant.operands import QuantizedProduct


def replace_products(
    model: nn.Module, captured: CapturedGraph, sites: Sequence[str], timestep_input: str | None
) -> CapturedGraph:
    """Put a ``QuantizedProduct`` without quantizers at each of the product sites ``sites``.

    The float function stays: without quantizers the module multiplies.

    Args:
        model: changed in place: the module of each site gets a child.
        captured: of this model or of one like it.
        sites: names as ``find_products`` gives them.
        timestep_input: the input that goes to every such module besides, where it has a value for each sample.

    Raises:
        CaptureError: the forward has no such product, or the model has something else at its path.
    """
    captured = captured.copy()
    calls = {call.site: call for call in find_products(captured)}
    timestep = next((n for n in captured.graph.find_nodes(op="placeholder") if n.target == timestep_input), None)
    for site in sites:
        parent, _, name = site.rpartition(".")
        if site not in calls:
            raise CaptureError("the forward has no such product", where=site, next_step=nearest(site, calls))
        if hasattr(model.get_submodule(parent), name):
            raise CaptureError("the model has something of its own where the product is to stand", where=site)
        call = calls[site]
        _call_module(call.node, site, call.left, call.right, timestep)
        model.get_submodule(parent).add_module(name, QuantizedProduct())
    captured.graph.lint()
    return captured


def _call_module(node: fx.Node, path: str, left: fx.Node, right: fx.Node, timestep: fx.Node | None) -> None:
    """Have a node call the module; it keeps its name and its place."""
    node.op, node.target, node.args = "call_module", path, (left, right)
    node.kwargs = with_timestep({}, left, timestep)
