"""What every class of a plugin keeps, whatever its kind."""

from __future__ import annotations

import re

from pydantic import BaseModel

from quantlab.contracts.config import Strict
from quantlab.testing.contract import Subject


def has_a_name(subject: Subject) -> None:
    """Recipes call it by a word in lower case, with digits and dashes."""
    name = getattr(subject.plugin, "name", None)
    holds = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", name) is not None
    subject.require(holds, "`name` is a word in lower case, with digits and dashes", repr(name))


def says_what_it_is(subject: Subject) -> None:
    """Its docstring, its paper and its version say what it is."""
    line = (subject.plugin.__doc__ or "").strip().partition("\n")[0]
    subject.require(bool(line), "the first line of its docstring says what it does", repr(line))
    version = getattr(subject.plugin, "version", None)
    subject.require(type(version) is int and version > 0, "`version` is a whole number from 1", repr(version))
    paper = getattr(subject.plugin, "paper", None)
    subject.require(isinstance(paper, str | None), "`paper` is a text, or None", repr(paper))


def explains_its_options(subject: Subject) -> None:
    """Its Config refuses unknown keys, and describes every option."""
    config = getattr(subject.plugin, "Config", None)
    holds = isinstance(config, type) and issubclass(config, Strict)
    subject.require(holds, "`Config` is a subclass of quantlab.Strict", repr(config))
    assert isinstance(config, type) and issubclass(config, BaseModel)
    silent = [name for name, option in config.model_fields.items() if not option.description]
    subject.require(not silent, "every option has a description", ", ".join(silent))


def is_built_from_its_options(subject: Subject) -> None:
    """Its options have defaults that work, or the ones that the test gives do."""
    config = subject.call(subject.config, "its Config accepts the options of the test (its defaults, without any)")
    again = subject.plugin.Config.model_validate(config.model_dump(mode="json"))
    subject.require(again == config, "its options survive JSON, as stored recipes need", str(again))


CHECKS = (has_a_name, says_what_it_is, explains_its_options, is_built_from_its_options)
