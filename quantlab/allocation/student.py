"""The quantized copy of a network."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.allocation.plan import Plan, SitePlan
from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.model import Inputs, Run, Task
from quantlab.contracts.quant import PerChannel, PerTensor, QuantSpec
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import Activations, Weights
from quantlab.contracts.site import Site, SiteKind
from quantlab.contracts.tuning import AdapterSpec, TappedRun
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.passes.replace_attention import attention_path, replace_attention
from quantlab.graph.passes.replace_products import replace_products
from quantlab.graph.passes.taps import attach_taps
from quantlab.graph.run import runner
from quantlab.quant.accounting import FloatModel
from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operands import QuantizedOperands
from quantlab.quant.split import SplitQuantizer


@dataclass(frozen=True)
class QuantizerChoice:
    """How weights or activations are quantized: a quantizer class with its options and the recipe's section."""

    quantizer: type[Quantizer]
    settings: Weights

    def build(self, spec: QuantSpec, bits: int | Tensor, split: Sequence[int] = (), dim: int = 1) -> Quantizer:
        """A quantizer without a range yet; of ``split`` sizes along ``dim``, one for each part."""
        config = self.quantizer.Config.model_validate(self.settings.quantizer.options)
        if split:
            return SplitQuantizer([self.quantizer.from_spec(spec, bits, config) for _ in split], split, dim)
        return self.quantizer.from_spec(spec, bits, config)


@dataclass(frozen=True)
class QuantizerChoices:
    """The choices for the two tensors of a layer."""

    weights: QuantizerChoice
    activations: QuantizerChoice

    def weight_quantizer(self, bits: Tensor, split: Sequence[int] = ()) -> Quantizer:
        """A quantizer of a weight with int8 [out] bits, without a range yet; one for each part of a ``split``."""
        settings = self.weights.settings
        spec = QuantSpec(PerChannel(0), settings.observer, round_zero_point=settings.round_zero_point)
        return self.weights.build(spec, bits, split)


@dataclass(frozen=True)
class Student:
    """A copy of the network whose planned sites are quantized layers.

    Attributes:
        network: the copy.
        graph: its graph, with the timestep threaded to the layers.
        plan: what each site is meant to be.
        run: the quantized forward.
        float_model: what the float network stores.
        shared: parameters may lie in memory of the float network or in a mapped file: they are replaced, not written,
            when a state is loaded, and nothing may write to them before.
    """

    network: nn.Module
    graph: CapturedGraph
    plan: Plan
    run: Run
    float_model: FloatModel
    shared: bool = False

    def layer(self, site: str) -> QuantizedLayer:
        """The quantized layer at a site."""
        return self.network.get_submodule(site)  # type: ignore[return-value]

    def layers(self) -> Mapping[str, QuantizedLayer]:
        """All quantized layers, in the graph's order."""
        return {entry.site.name: self.layer(entry.site.name) for entry in self.plan.layers}

    def products(self) -> Mapping[str, QuantizedOperands]:
        """All quantized products of activations, attentions included, in the graph's order."""
        paths = {entry.site.name: _path_of(entry.site) for entry in self.plan.products}
        return {name: self.network.get_submodule(path) for name, path in paths.items()}  # type: ignore[misc]

    def trained_layers(self) -> Mapping[str, QuantizedLayer]:
        """The layers under the budget: those that tuning may change."""
        return {site.name: self.layer(site.name) for site in self.plan.budgeted}


def first_tensor(output: object) -> Tensor:
    """The tensor a network returned, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[return-value]


def tapped_run(network: nn.Module, graph: CapturedGraph, taps: Sequence[str]) -> TappedRun:
    """A forward of ``network`` that returns its first tensor and the outputs of the modules ``taps``."""
    if not taps:
        plain = runner(network, graph)
        return lambda inputs: (first_tensor(plain(inputs)), {})
    tapped = runner(network, attach_taps(graph, taps))

    def run(inputs: Inputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        output, features = tapped(inputs)
        return first_tensor(output), features

    return run


def build_student(task: Task, captured: CapturedGraph, plan: Plan, *, share: bool = False) -> Student:
    """Copy the network and make its planned sites quantized layers, still without quantizers.

    Args:
        task: holds the network.
        captured: its graph.
        plan: what each site is meant to be.
        share: leave the parameters' values where the float network has them, as ``Student.shared`` says.
    """
    parameters = task.network.parameters() if share else ()
    own = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in parameters}
    network = copy.deepcopy(task.network, memo=own)  # copies all but these
    names = [entry.site.name for entry in plan.layers]
    graph = insert_quantizers(network, captured, names, task.timestep_input)
    names_of = {kind: [e.site.name for e in plan.products if e.site.kind is kind] for kind in SiteKind}
    graph = replace_products(network, graph, names_of[SiteKind.MATMUL], task.timestep_input)
    graph = replace_attention(network, graph, names_of[SiteKind.ATTENTION], task.timestep_input)
    _untie(network, names)
    run = tapped_run(network, graph, ())
    float_model = FloatModel.of(task.network)
    return Student(network.requires_grad_(False), graph, plan, lambda inputs: run(inputs)[0], float_model, share)


def _untie(network: nn.Module, layers: Sequence[str]) -> None:
    """Give every quantized layer tensors of its own: what tuning does to one must not reach those that shared it."""
    users = Counter(id(value) for value in network.state_dict(keep_vars=True).values())
    for name in layers:
        layer = network.get_submodule(name)
        for part in ("weight", "bias"):
            value = getattr(layer, part)
            if value is not None and users[id(value)] > 1:
                setattr(layer, part, nn.Parameter(value.detach().clone(), requires_grad=False))


def install_quantizers(layer: QuantizedLayer, entry: SitePlan, bit_map: BitMap, choices: QuantizerChoices) -> None:
    """Give a layer quantizers without a range, with the bits of the bit map.

    Sites outside the budget get static activation scales whatever the method, so that they are the same for all; so do
    sites whose input has not the batch first, since no timestep belongs to their rows.
    """
    if entry.weight_bits != FLOAT_BITS:
        bits = bit_map.weight_bits[entry.site.name]
        layer.weight_quantizer = choices.weight_quantizer(bits, entry.split)
    input_bits = bit_map.activation_bits[entry.site.name, entry.site.slots[0].name]
    if input_bits != FLOAT_BITS:
        spec = _input_spec(choices.activations, entry.budgeted and entry.site.has_samples_first)
        layer.input_quantizer = choices.activations.build(spec, input_bits, entry.split, layer.channel_dim)
    layer.to(layer.weight.device)


def _path_of(site: Site) -> str:
    """The path of the module that a product of activations has become."""
    return attention_path(site.name) if site.kind is SiteKind.ATTENTION else site.name


def install_operand_quantizers(
    product: QuantizedOperands, entry: SitePlan, bit_map: BitMap, choices: QuantizerChoices
) -> None:
    """Give a product of activations quantizers without a range, by timestep where the recipe says so."""
    spec = _input_spec(choices.activations, entry.site.has_samples_first)
    for slot in entry.site.slots:
        bits = bit_map.activation_bits[entry.site.name, slot.name]
        if bits != FLOAT_BITS:
            product.quantizers[slot.name] = choices.activations.build(spec, bits)


def _input_spec(choice: QuantizerChoice, may_depend_on_timestep: bool) -> QuantSpec:
    """What the recipe asks of the quantizer of an input."""
    activations = choice.settings
    assert isinstance(activations, Activations)
    return QuantSpec(
        PerTensor(),
        activations.observer,
        per_timestep=activations.per_timestep and may_depend_on_timestep,
        share_start=activations.share_start,
        round_zero_point=activations.round_zero_point,
    )


def restore(student: Student, bit_map: BitMap, choices: QuantizerChoices, state: Mapping[str, Tensor]) -> Student:
    """Fill a new student with quantizers of ``bit_map`` and the parameters ``state``."""
    device = next(student.network.parameters()).device
    for entry, product in zip(student.plan.products, student.products().values(), strict=True):
        install_operand_quantizers(product, entry, bit_map, choices)
        product.to(device)
    for entry in student.plan.layers:
        install_quantizers(student.layer(entry.site.name), entry, bit_map, choices)
    fill(student, state)
    return student


def fill(student: Student, state: Mapping[str, Tensor]) -> None:
    """Load parameters and buffers, making the smoothing scales and branches that ``state`` has before."""
    for name, layer in student.layers().items():
        smoothing, factor = state.get(f"{name}.smoothing"), state.get(f"{name}.branch.B")
        layer.smoothing = None if smoothing is None else torch.empty_like(smoothing, device=layer.weight.device)
        layer.branch = None
        if factor is not None:
            layer.add_branch(factor.shape[1])
    device = next(student.network.parameters()).device
    state = {name: value.to(device) for name, value in state.items()} if student.shared else dict(state)
    student.network.load_state_dict(state, assign=student.shared)


def add_adapters(student: Student, spec: AdapterSpec, seed: int) -> None:
    """Put a low-rank adapter into every layer that tuning may change, each start found in the graph's order."""
    rng = torch.Generator().manual_seed(seed)
    for layer in student.trained_layers().values():
        layer.add_adapter(spec, rng)
