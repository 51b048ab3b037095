"""Call a module, into which quantizers can be put, where a model calls fused attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.fx.node import Argument

from quantlab.errors import CaptureError
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import ATTENTION
from quantlab.quant.attention import QuantizedAttention

CHILD = "quantized_attention"
"""The name of the new module inside the one that computes the attention."""


def attention_path(site: str) -> str:
    """The path of the new module of an attention site."""
    return f"{site}.{CHILD}"


def replace_attention(
    model: nn.Module, captured: CapturedGraph, sites: Sequence[str], timestep_input: str | None
) -> CapturedGraph:
    """Put a ``QuantizedAttention`` without quantizers at each of the attention sites ``sites``.

    The float function stays: without quantizers the module calls the fused attention with the same arguments.

    Args:
        model: changed in place: each site's module gets a child.
        captured: of this model or of one like it.
        sites: paths of modules that call fused attention once.
        timestep_input: the input that goes to every such module besides, where it has a value for each sample.

    Raises:
        CaptureError: a site calls no fused attention, or calls it more than once.
    """
    captured = captured.copy()
    nodes: dict[str, list[fx.Node]] = {site: [] for site in sites}
    timestep = None
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.target == timestep_input:
            timestep = node
        if node.target in ATTENTION and node.meta["fqn"] in nodes:
            nodes[node.meta["fqn"]].append(node)
    for site, calls in nodes.items():
        if len(calls) != 1:
            raise CaptureError("an attention site calls fused attention exactly once", where=site, got=len(calls))
        _call_module(calls[0], attention_path(site), timestep)
        model.get_submodule(site).add_module(CHILD, QuantizedAttention())
    captured.graph.lint()
    return captured


def _call_module(node: fx.Node, path: str, timestep: fx.Node | None) -> None:
    """Have a node call the module; it keeps its arguments, its name and its place."""
    query = node.args[0] if node.args else node.kwargs["query"]
    assert isinstance(query, fx.Node)
    node.kwargs = with_timestep(node.kwargs, query, timestep)
    node.op, node.target = "call_module", path


def with_timestep(keywords: Mapping[str, Argument], x: fx.Node, timestep: fx.Node | None) -> dict[str, Argument]:
    """The keywords of a call and the timestep, where it has a value for each entry of x's first dimension."""
    given = timestep is not None and x.meta["shape"][:1] == timestep.meta["shape"][:1]
    return {**keywords, "timestep": timestep} if given else {**keywords}
