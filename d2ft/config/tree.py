"""
Read configs into trees: safe YAML with its inherited bases, and the words of a command line.

A *tree* is a dict of name -> :class:`Entry`, where an entry holds a value or the tree below it, and
where that was written.
"""

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from d2ft.config.zoo_configs import PREFIX, zoo_config_file, zoo_name, zoo_weights
from d2ft.errors import UserError

COMMAND_LINE = "command line"
_BASE_KEY = "_BASE_"


@dataclass(frozen=True)
class Entry:
    """A value, or the tree below a key; ``origin`` is "<file>:<line>" or "command line"."""

    value: Any
    origin: str


Tree = dict[str, Entry]


class _Loader(yaml.SafeLoader):
    """Same as :class:`yaml.SafeLoader`, but a key that comes twice in a mapping is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            first = seen.setdefault(str(key.value), key)
            if first is not key:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} was already given in line {first.start_mark.line + 1}",
                    problem_mark=key.start_mark,
                )
        return node

    def refuse_tag(self, node: yaml.Node) -> None:
        raise yaml.MarkedYAMLError(
            problem=f"the tag {node.tag} is refused: only plain YAML is read, which runs no code",
            problem_mark=node.start_mark,
        )


_Loader.add_constructor(None, _Loader.refuse_tag)


# The one piece of code in the configs of Detectron2's zoo, and what it comes to.
_ZOO_CODE = {
    "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]": [
        [size, size * 2 ** (1.0 / 3), size * 2 ** (2.0 / 3)] for size in (32, 64, 128, 256, 512)
    ]
}


class _ZooLoader(_Loader):
    """Same as :class:`_Loader`, but it knows the value of the anchor sizes in Base-RetinaNet.yaml."""

    def read_known_code(self, node: yaml.Node) -> Any:
        code = [part.value for part in node.value] if isinstance(node.value, list) else []
        if len(code) != 1 or code[0] not in _ZOO_CODE:
            self.refuse_tag(node)
        return _ZOO_CODE[code[0]]


_ZooLoader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _ZooLoader.read_known_code)


def _read(path: str) -> Tree:
    shown = _shown(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{shown}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: a config is UTF-8 text, and this file is not") from error
    return parse_tree(text, shown, _ZooLoader if shown.startswith(PREFIX) else _Loader)


def parse_tree(text: str, shown: str, loader_class: type[_Loader] = _Loader) -> Tree:
    """Read YAML text, without its bases; ``shown`` is its name in messages."""
    try:
        loader = loader_class(text)
        root = loader.get_single_node()
        if root is None or root.tag.endswith(":null"):
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{shown}: a config consists of lines KEY: value; these are not")
        return _tree_of_node(loader, root, shown)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{shown}:{line}: not valid as a config: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{shown}:{line}: not valid as a config: {error.reason}") from error
    except RecursionError as error:
        raise UserError(f"{shown}: nests too deeply, or an anchor contains itself") from error


def _tree_of_node(loader: _Loader, node: yaml.MappingNode, shown: str) -> Tree:
    loader.flatten_mapping(node)
    tree: Tree = {}
    for key_node, value_node in node.value:
        origin = f"{shown}:{key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{origin}: YAML reads the key as {key!r}; put it in quotes")
        if isinstance(value_node, yaml.MappingNode) and value_node.tag.endswith(":map"):
            tree[key] = Entry(_tree_of_node(loader, value_node, shown), origin)
        else:
            tree[key] = Entry(loader.construct_object(value_node, deep=True), origin)
    return tree


def read_tree(path: str, chain: tuple[str, ...] = ()) -> Tree:
    """
    Read a file and its bases; ``chain`` holds the files that led to it.

    Raises:
        UserError: for what is wrong in one of the files, with file and line.
    """
    tree = _read(path)
    bases = tree.pop(_BASE_KEY, None)
    if bases is None:
        return tree
    chain = (*chain, path)
    merged: Tree = {}
    for name in _base_names(bases):
        if name.startswith(PREFIX):
            merged = merge_trees(merged, _read_zoo(name, bases.origin, chain))
            continue
        base = os.path.join(os.path.dirname(path), os.path.expanduser(name))
        if os.path.realpath(base) in map(os.path.realpath, chain):
            circle = " -> ".join(_shown(file) for file in (*chain, base))
            raise UserError(f"{bases.origin}: {_BASE_KEY} leads back to where it began: {circle}")
        if not os.path.isfile(base):
            message = f"{_BASE_KEY} names {name!r}, but there is no file {_shown(base)}"
            raise UserError(
                f"{bases.origin}: {message}; give it relative to the file that names it"
            )
        merged = merge_trees(merged, read_tree(base, chain))
    return merge_trees(merged, tree)


def _read_zoo(name: str, origin: str, chain: tuple[str, ...]) -> Tree:
    """Read a config of the zoo with the weights that were trained by it, not those it began with."""
    try:
        tree = read_tree(zoo_config_file(name), chain)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    weights = zoo_weights(name)
    if weights is None:
        return tree
    model = {"WEIGHTS": Entry(weights, name)}
    return merge_trees(tree, {"MODEL": Entry(model, name)})


def _base_names(bases: Entry) -> list[str]:
    names = [bases.value] if isinstance(bases.value, str) else bases.value
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise UserError(f"{bases.origin}: {_BASE_KEY} is a file name or a YAML list of file names")
    if isinstance(bases.value, str) and bases.value.startswith(("(", "[")):
        # Elsewhere in these files ("a", "b") is a tuple, because the config decodes it.
        files = ", ".join(split_words(bases.value))
        raise UserError(
            f"{bases.origin}: {_BASE_KEY} reads {bases.value} as one file name; "
            f"write a YAML list: {_BASE_KEY}: [{files}]"
        )
    return names


def tree_of_opts(opts: Sequence[Any]) -> Tree:
    """Read KEY, VALUE, KEY, VALUE, ... as a tree; keys are full names with dots."""
    if len(opts) % 2:
        raise UserError(
            f"{COMMAND_LINE}: overrides are KEY VALUE with a space between them, "
            f"but {opts[-1]} is left without a value"
        )
    tree: Tree = {}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        entry = Entry(value, COMMAND_LINE)
        for name in reversed(key.split(".")):
            entry = Entry({name: entry}, COMMAND_LINE)
        tree = merge_trees(tree, entry.value)
    return tree


def merge_trees(base: Tree, tree: Tree, prefix: str = "") -> Tree:
    """Same rule as fvcore: mappings are merged, anything else of ``tree`` replaces the base's."""
    merged = dict(base)
    for name, entry in tree.items():
        old = base.get(name)
        if old is None or not isinstance(entry.value, dict):
            merged[name] = entry
        elif isinstance(old.value, dict):
            value = merge_trees(old.value, entry.value, f"{prefix}{name}.")
            merged[name] = Entry(value, entry.origin)
        else:
            raise UserError(
                f"{entry.origin}: {prefix}{name} is a group of keys here, "
                f"but a single value at {old.origin}"
            )
    return merged


def _shown(path: str) -> str:
    in_zoo = zoo_name(path)
    if in_zoo:
        return in_zoo
    relative = os.path.relpath(path)
    return os.path.normpath(path) if relative.startswith(os.pardir) else relative


def decode_literal(value: Any) -> Any:
    """Read a string that is a Python literal as one, as yacs does."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # What literal_eval documents for text that is not a literal.
        return value


def split_words(text: str) -> list[str]:
    """Take apart what was meant as a tuple: "a, b", "(a,)" and "('a', 'b')" alike."""
    return [word.strip(" '\"") for word in text.strip("()[] ").split(",") if word.strip()]
