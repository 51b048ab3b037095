"""Going through a network layer by layer in one forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.tuning.visit import visit_layers


def test_a_layer_sees_what_the_changed_layers_before_it_give() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).requires_grad_(False)
    for layer in network:
        layer.weight.copy_(torch.eye(2))
    layers = {"0": network[0], "1": network[1]}
    seen = {}

    def visit(name: str, x: torch.Tensor, timestep: torch.Tensor | None) -> None:
        seen[name] = x.clone()
        layers[name].weight.mul_(3)
        assert timestep is None

    visit_layers(layers, lambda: network(torch.ones(1, 2)), visit)
    assert seen["0"].tolist() == [[1, 1]] and seen["1"].tolist() == [[3, 3]]
    assert not network[0]._forward_pre_hooks, "nothing stays behind"


def test_a_layer_that_computes_twice_is_visited_once() -> None:
    layer = nn.Linear(2, 2)
    visits = []
    visit_layers({"a": layer}, lambda: layer(layer(torch.ones(1, 2))), lambda name, x, t: visits.append(name))
    assert visits == ["a"]


def test_bad_inputs_and_silent_layers_are_errors() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(QuantlabError, match="site b: a site was never reached"):
        visit_layers({"a": one, "b": other}, lambda: one(torch.ones(1, 2)), lambda *seen: None)
    with pytest.raises(NonFiniteError, match="site a"):
        visit_layers({"a": one}, lambda: one(torch.full((1, 2), torch.nan)), lambda *seen: None)
