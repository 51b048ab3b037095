"""YAML with a memory: every value knows the file and line, the method or the option it came from."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import RecipeError

if TYPE_CHECKING:
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import Node as YamlNode

Scalar = str | int | float | bool | None
KeyPath = tuple[str | int, ...]

CHOICES: Collection[KeyPath] = (("weights", "quantizer"), ("activations", "quantizer"), ("calibrate", "sampler"))
"""Where one plugin is chosen: naming another one there drops the options of the first."""

MAX_DEPTH = 32
"""No recipe comes near; deeper nesting would only exhaust the parser."""


@dataclass(frozen=True)
class Node:
    """A value of a recipe with where it came from."""

    value: Scalar | Mapping[str, Node] | Sequence[Node]
    origin: str

    @property
    def plain(self) -> object:
        """The value without origins: scalars, dicts and lists."""
        match self.value:
            case Mapping():
                return {key: child.plain for key, child in self.value.items()}
            case list() | tuple():
                return [child.plain for child in self.value]
            case _:
                return self.value

    def reach(self, path: KeyPath) -> tuple[Node, KeyPath]:
        """The deepest node on the way along ``path``, and the part of the path that led there."""
        node = self
        for depth, key in enumerate(path):
            child = node._child(key)
            if child is None:
                return node, path[:depth]
            node = child
        return node, path

    def _child(self, key: str | int) -> Node | None:
        match self.value:
            case Mapping():
                return self.value.get(str(key))
            case list() | tuple() if isinstance(key, int) and key < len(self.value):
                return self.value[key]
        return None


def node_of(value: object, origin: str) -> Node:
    """Plain data as a node, everything from the same origin."""
    match value:
        case Mapping():
            return Node({str(key): node_of(child, origin) for key, child in value.items()}, origin)
        case list() | tuple():
            return Node([node_of(child, origin) for child in value], origin)
        case str() | int() | float() | None:
            return Node(value, origin)
        case _:
            raise RecipeError("a recipe holds text, numbers, lists and mappings only", where=origin, got=repr(value))


def merge(base: Node, over: Node, path: KeyPath = ()) -> Node:
    """``over`` laid on ``base``: mappings are merged key by key, anything else is replaced, lists as a whole."""
    if not (isinstance(base.value, Mapping) and isinstance(over.value, Mapping)):
        return over
    if path in CHOICES and base.value.keys() != over.value.keys():
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child, (*path, key)) if key in merged else child
    return Node(merged, over.origin)


def without(node: Node, path: KeyPath) -> Node:
    """The same tree without the key at ``path``."""
    if not isinstance(node.value, Mapping) or path[0] not in node.value:
        return node
    children = dict(node.value)
    key = str(path[0])
    if len(path) == 1:
        del children[key]
    else:
        children[key] = without(children[key], path[1:])
    return Node(children, node.origin)


def replace(node: Node, path: Sequence[str], new: Node, above: KeyPath = ()) -> Node:
    """The same tree with ``new`` laid on what is at ``path``, by the rule of ``merge``.

    A list is entered by index, and its length as an index appends; ``above`` is where ``node`` itself lies.
    """
    if not path:
        return merge(node, new, above)
    key, rest, here = path[0], path[1:], (*above, path[0])
    match node.value:
        case list() | tuple() as items:
            if not (key.isascii() and key.isdecimal()) or int(key) > len(items):
                raise RecipeError(
                    f'"{key}" is no index of this list', where=new.origin, allowed=f"0 to {len(items)} (appends)"
                )
            children = [*items, Node(None, new.origin)] if int(key) == len(items) else list(items)
            children[int(key)] = replace(children[int(key)], rest, new, here)
            return Node(children, node.origin)
        case Mapping() as items:
            below = items.get(key, Node(None, new.origin))
            return Node({**items, key: replace(below, rest, new, here)}, node.origin)
        case _:
            return Node({key: replace(Node(None, new.origin), rest, new, here)}, new.origin)


def read_yaml(path: Path) -> tuple[Node, str]:
    """Read a YAML file whose top is a mapping; returns its tree and its text.

    Raises:
        RecipeError: the file is missing, not text, not YAML, empty, or uses tags, anchors or duplicate keys.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            "this is not a text file in UTF-8", where=f"{path}:{line}", next_step="give a YAML file"
        ) from error
    node = parse_yaml(text, str(path))
    if not isinstance(node.value, Mapping):
        kind = "empty" if node.value is None else "not a mapping of keys to values"
        raise RecipeError(f"the file is {kind}", where=str(path), next_step="see quantlab show digits/mpq-dm-w2a4")
    return node, text


def parse_yaml(text: str, where: str, *, numbered: bool = True) -> Node:
    """Parse YAML 1.2 text; origins are ``where:line``, or ``where`` alone when not ``numbered``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    yaml = YAML(typ="safe", pure=True)
    try:
        _refuse_features(yaml, text, where, numbered)
        root = yaml.compose(text)
        return Node(None, where) if root is None else _from_yaml(yaml, root, where, numbered)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        tab = "\\t" in (error.problem or "")
        raise RecipeError(
            f"this is not YAML: {error.problem}",
            where=f"{where}:{line}" if numbered else where,
            next_step="indent with spaces, not tabs" if tab else None,
        ) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"this is not YAML: the character {text[error.position]!r} is not allowed",
            where=f"{where}:{line}" if numbered else where,
        ) from error
    except YAMLError as error:
        raise RecipeError("this is not YAML text", where=where) from error


def _refuse_features(yaml: YAML, text: str, where: str, numbered: bool) -> None:
    """Refuse tags, which could stand for code, anchors, for which recipes have ``extends``, and endless nesting."""
    from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

    depth = 0
    for event in yaml.parse(text):
        mark = f"{where}:{event.start_mark.line + 1}" if numbered else where
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"values are nested more than {MAX_DEPTH} deep", where=mark)
        if getattr(event, "tag", None) is not None:
            raise RecipeError("a recipe has no YAML tags", where=mark, got=event.tag, next_step="write the plain value")
        if getattr(event, "anchor", None) is not None:
            raise RecipeError(
                "a recipe has no YAML anchors", where=mark, got=event.anchor, next_step="share values with extends"
            )


def _from_yaml(yaml: YAML, node: YamlNode, where: str, numbered: bool) -> Node:
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    origin = f"{where}:{node.start_mark.line + 1}" if numbered else where
    if isinstance(node, MappingNode):
        return Node(_mapping(yaml, node, where, numbered), origin)
    if isinstance(node, SequenceNode):
        return Node([_from_yaml(yaml, child, where, numbered) for child in node.value], origin)
    kind = node.tag.rpartition(":")[2]
    try:
        value = yaml.constructor.construct_object(node) if kind in ("int", "float", "bool", "null") else node.value
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise RecipeError("this number cannot be read", where=origin, got=f"{node.value[:20]}...") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError("a number must be finite", where=origin, got=node.value)
    return Node(value, origin)


def _mapping(yaml: YAML, node: YamlNode, where: str, numbered: bool) -> dict[str, Node]:
    children: dict[str, Node] = {}
    for key, child in node.value:
        line = f"{where}:{key.start_mark.line + 1}" if numbered else where
        if not isinstance(key.value, str) or not key.tag.endswith(":str"):
            raise RecipeError("a key must be a word", where=line, got=key.value if isinstance(key.value, str) else "?")
        if key.value in children:
            first = children[key.value].origin
            raise RecipeError(f'the key "{key.value}" stands twice', where=line, next_step=f"the first is at {first}")
        value = _from_yaml(yaml, child, where, numbered)
        # A mapping or list begins a line below its key; the key's line is what a person looks for.
        children[key.value] = Node(value.value, line)
    return children
