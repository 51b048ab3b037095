from __future__ import annotations

import pytest

from quantlab.contracts.sections import Keep
from quantlab.errors import RecipeError
from quantlab.matching import match_sites

NAMES = ("conv_in", "down.0.resnets.0.conv1", "down.0.resnets.0.conv_shortcut", "time_embedding.linear_1", "conv_out")


def bits(*rules: Keep) -> dict[str, int | str]:
    return {name: rule.bits for name, rule in match_sites(rules, NAMES).items()}


def test_a_star_crosses_dots_and_a_plain_name_is_itself():
    assert bits(Keep(match="conv_in", bits=8)) == {"conv_in": 8}
    assert bits(Keep(match="*.conv*", bits=4)) == {NAMES[1]: 4, NAMES[2]: 4}
    assert bits(Keep(match="*", bits=4)) == dict.fromkeys(NAMES, 4)
    assert bits(Keep(match="conv_??", bits=4)) == {"conv_in": 4}


def test_the_last_rule_wins():
    assert bits(Keep(match="conv_*", bits=4), Keep(match="conv_in", bits="float")) == {
        "conv_in": "float",
        "conv_out": 4,
    }


def test_a_pattern_that_matches_nothing_is_told_with_its_line_and_the_nearest_site():
    rules = [Keep(match="conv_in", bits=8), Keep(match="conv_inn", bits=8)]
    with pytest.raises(RecipeError) as caught:
        match_sites(rules, NAMES, origin={"keep.1.match": "a.yaml:14"})
    message = str(caught.value)
    assert message.startswith('a.yaml:14: keep.1.match "conv_inn" matches no site')
    assert 'did you mean "conv_in"' in message
    assert "quantlab show sites RECIPE" in message


def test_case_matters():
    with pytest.raises(RecipeError):
        bits(Keep(match="CONV_IN", bits=8))


def test_an_optional_pattern_may_match_nothing():
    assert bits(Keep(match="nothing", bits=8, optional=True)) == {}
