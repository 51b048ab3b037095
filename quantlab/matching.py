"""The one matcher: globs over site names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from quantlab.errors import RecipeError, nearest


class Rule(Protocol):
    """Something that holds for the sites its pattern matches."""

    @property
    def match(self) -> str:
        """A glob: ``*`` any text, dots included, ``?`` one character, ``[ab]`` one of these; case matters."""
        ...

    @property
    def optional(self) -> bool:
        """Matching nothing is no error."""
        ...


AnyRule = TypeVar("AnyRule", bound=Rule)


def match_sites(
    rules: Sequence[AnyRule], names: Iterable[str], *, key: str = "keep", origin: Mapping[str, str] | None = None
) -> dict[str, AnyRule]:
    """Which rule holds for which site; where several match, the last one wins.

    Args:
        rules: patterns with what they mean.
        names: the names of all sites.
        key: where the rules stand in the recipe, for the message.
        origin: dotted key of the recipe -> file and line, for the message.

    Returns:
        site name -> rule, in the order of ``names``, without the sites that no rule matches.

    Raises:
        RecipeError: a pattern matches nothing and is not optional.
    """
    known = list(names)
    for index, rule in enumerate(rules):
        if not rule.optional and not any(fnmatchcase(name, rule.match) for name in known):
            dotted = f"{key}.{index}.match"
            close = nearest(rule.match, known)
            listing = "list them: quantlab show sites RECIPE"
            raise RecipeError(
                f'{dotted} "{rule.match}" matches no site',
                where=(origin or {}).get(dotted),
                allowed="a glob over site names, or optional: true beside it",
                next_step=f"{close} {listing}" if close else listing,
            )
    found: dict[str, AnyRule] = {}
    for name in known:
        fitting = [rule for rule in rules if fnmatchcase(name, rule.match)]
        if fitting:
            found[name] = fitting[-1]
    return found
