"""
Read a config: safe YAML with inherited bases, then the ``KEY VALUE`` words of a command line.

Same as ``CfgNode.merge_from_file`` and ``merge_from_list`` of detectron2, but no YAML can run
code, every mistake names its file, line and key, and the config remembers who set each key.

A file is read into a *tree*, a dict of name -> :class:`_Entry`, where an entry holds a value or
the tree below it, and where that was written. Bases, file and command line are merged tree into
tree, and only the result is written into the config.
"""

import ast
import contextlib
import copy
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from d2ft.config.defaults import get_cfg, get_value, skip_or_refuse
from d2ft.errors import UserError

_BASE_KEY = "_BASE_"
_COMMAND_LINE = "command line"
# Where a config keeps {key: (origin, value)}: an instance attribute of the root, as yacs does for
# its own state, so that copies and pickles carry it and dump() and comparison do not see it.
_ORIGINS = "__d2ft_origins__"

# The types a value may have, besides None.
_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "a tuple",
    list: "a list",
}


@dataclass(frozen=True)
class _Entry:
    """A value, or the tree below a key; ``origin`` is "<file>:<line>" or "command line"."""

    value: Any
    origin: str


_Tree = dict[str, _Entry]
_ListOrTuple = list[Any] | tuple[Any, ...]


def load_cfg(path: str | os.PathLike[str] | None, opts: Sequence[Any] = ()) -> CfgNode:
    """
    Read a YAML config and overrides on top of the defaults of Detectron2 and d2ft.

    ``_BASE_`` names one file or a list of files, relative to the file that says so. Mappings are
    merged, later bases win, the file itself wins over its bases and ``opts`` over all; other
    values, lists included, are replaced whole. As in Detectron2 a string that is a Python literal
    is read as one ("(1, 2)", "1e-3"); further than there, an int will do where a float is
    expected, and a number where a string is. A file without VERSION is one of version 2.

    Args:
        path: the YAML file; None or "" for the defaults alone.
        opts: KEY, VALUE, KEY, VALUE, ... as on the command line.

    Returns:
        The config, not frozen; :func:`who_set` tells where a value comes from.

    Raises:
        UserError: for what is wrong in a file or in ``opts``, with file, line and key.
    """
    tree = _read_with_bases(os.path.expanduser(path), chain=()) if path else {}
    return _cfg_of_tree(_merged(tree, _tree_of_opts(opts)))


def load_cfg_text(text: str, origin: str, opts: Sequence[Any] = ()) -> CfgNode:
    """
    Same as :func:`load_cfg`, but reads the YAML from a string, which names no bases.

    Args:
        text: the YAML, as ``CfgNode.dump`` writes it.
        origin: what messages call it, such as the file that holds it.
        opts: as in :func:`load_cfg`.
    """
    return _cfg_of_tree(_merged(_parse(text, origin), _tree_of_opts(opts)))


def _cfg_of_tree(tree: _Tree) -> CfgNode:
    cfg = get_cfg()
    if "VERSION" in tree and _decode(tree["VERSION"].value) != cfg.VERSION:
        raise UserError(
            f"{tree['VERSION'].origin}: VERSION is {tree['VERSION'].value!r}, but only {cfg.VERSION} "
            "is read; detectron2.config.upgrade_config converts older configs"
        )
    origins: dict[str, tuple[str, Any]] = {}
    _write(tree, cfg, cfg, "", origins)
    cfg.__dict__[_ORIGINS] = origins
    return cfg


def who_set(cfg: CfgNode, key: str) -> str:
    """
    Tell where the value of a key comes from.

    Args:
        cfg: a config of :func:`load_cfg`, or a copy of one.
        key: full name of a value, such as "SOLVER.BASE_LR".

    Returns:
        "<file>:<line>" (relative to the working directory if the file is below it),
        "command line" or "default"; "set in Python" if the value is no longer the one read.

    Raises:
        KeyError: if the config has no such key.
    """
    value = get_value(cfg, key)
    origins = cfg.__dict__.get(_ORIGINS, {})
    if key in origins:
        origin, recorded = origins[key]
        return origin if value == recorded else "set in Python"
    with contextlib.suppress(KeyError):  # a key that the defaults lack was added in Python
        if value == get_value(get_cfg(), key):
            return "default"
    return "set in Python"


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


def _read(path: str) -> _Tree:
    shown = _shown(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{shown}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: a config is UTF-8 text, and this file is not") from error
    return _parse(text, shown)


def _parse(text: str, shown: str) -> _Tree:
    try:
        loader = _Loader(text)
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


def _tree_of_node(loader: _Loader, node: yaml.MappingNode, shown: str) -> _Tree:
    loader.flatten_mapping(node)
    tree: _Tree = {}
    for key_node, value_node in node.value:
        origin = f"{shown}:{key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{origin}: YAML reads the key as {key!r}; put it in quotes")
        if isinstance(value_node, yaml.MappingNode) and value_node.tag.endswith(":map"):
            tree[key] = _Entry(_tree_of_node(loader, value_node, shown), origin)
        else:
            tree[key] = _Entry(loader.construct_object(value_node, deep=True), origin)
    return tree


def _read_with_bases(path: str, chain: tuple[str, ...]) -> _Tree:
    tree = _read(path)
    bases = tree.pop(_BASE_KEY, None)
    if bases is None:
        return tree
    chain = (*chain, path)
    merged: _Tree = {}
    for name in _base_names(bases):
        base = os.path.join(os.path.dirname(path), os.path.expanduser(name))
        if os.path.realpath(base) in map(os.path.realpath, chain):
            circle = " -> ".join(_shown(file) for file in (*chain, base))
            raise UserError(f"{bases.origin}: {_BASE_KEY} leads back to where it began: {circle}")
        if not os.path.isfile(base):
            message = f"{_BASE_KEY} names {name!r}, but there is no file {_shown(base)}"
            raise UserError(
                f"{bases.origin}: {message}; give it relative to the file that names it"
            )
        merged = _merged(merged, _read_with_bases(base, chain))
    return _merged(merged, tree)


def _base_names(bases: _Entry) -> list[str]:
    names = [bases.value] if isinstance(bases.value, str) else bases.value
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise UserError(f"{bases.origin}: {_BASE_KEY} is a file name or a YAML list of file names")
    if isinstance(bases.value, str) and bases.value.startswith(("(", "[")):
        # Elsewhere in these files ("a", "b") is a tuple, because the config decodes it.
        files = ", ".join(_words(bases.value))
        raise UserError(
            f"{bases.origin}: {_BASE_KEY} reads {bases.value} as one file name; "
            f"write a YAML list: {_BASE_KEY}: [{files}]"
        )
    return names


def _tree_of_opts(opts: Sequence[Any]) -> _Tree:
    if len(opts) % 2:
        raise UserError(
            f"{_COMMAND_LINE}: overrides are KEY VALUE with a space between them, "
            f"but {opts[-1]} is left without a value"
        )
    tree: _Tree = {}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        entry = _Entry(value, _COMMAND_LINE)
        for name in reversed(key.split(".")):
            entry = _Entry({name: entry}, _COMMAND_LINE)
        tree = _merged(tree, entry.value)
    return tree


def _merged(base: _Tree, tree: _Tree, prefix: str = "") -> _Tree:
    """Same rule as fvcore: mappings are merged, anything else of ``tree`` replaces the base's."""
    merged = dict(base)
    for name, entry in tree.items():
        old = base.get(name)
        if old is None or not isinstance(entry.value, dict):
            merged[name] = entry
        elif isinstance(old.value, dict):
            value = _merged(old.value, entry.value, f"{prefix}{name}.")
            merged[name] = _Entry(value, entry.origin)
        else:
            raise UserError(
                f"{entry.origin}: {prefix}{name} is a group of keys here, "
                f"but a single value at {old.origin}"
            )
    return merged


def _shown(path: str) -> str:
    relative = os.path.relpath(path)
    return os.path.normpath(path) if relative.startswith(os.pardir) else relative


def _write(
    tree: _Tree, node: CfgNode, root: CfgNode, prefix: str, origins: dict[str, tuple[str, Any]]
) -> None:
    """Write ``tree`` into ``node``, the part of the default config ``root`` under ``prefix``."""
    for name, entry in tree.items():
        key = prefix + name
        new = name not in node
        if new and not node.is_new_allowed():
            skip_or_refuse(key, _decode(entry.value), entry.origin, root)
        elif isinstance(entry.value, dict):
            if new:
                node[name] = CfgNode(new_allowed=True)
            elif not isinstance(node[name], CfgNode):
                value = f"a single value such as {node[name]!r}"
                raise UserError(f"{entry.origin}: {key} is {value}, not a group of keys")
            _write(entry.value, node[name], root, f"{key}.", origins)
        else:
            node[name] = _new_value(key, entry) if new else _fit(key, entry, node[name])
            origins[key] = (entry.origin, copy.deepcopy(node[name]))


def _decode(value: Any) -> Any:
    """Read a string that is a Python literal as one, as yacs does."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # What literal_eval documents for text that is not a literal.
        return value


def _fit(key: str, entry: _Entry, default: Any) -> Any:
    """Return the entry's value in the type of ``default``, or raise what would have fitted."""
    if default is None:
        return _new_value(key, entry)
    if isinstance(default, CfgNode):
        group = f"a group of keys such as {key}.{min(default, default='X')}"
        raise UserError(f"{entry.origin}: {key} is {group}, not a value as {entry.value!r}")
    value = _decode(entry.value)
    actual, expected = type(value), type(default)
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return _sequence(value, default)
    if actual is expected or value is None:  # yacs takes None for everything
        return value
    if actual is int and expected is float:
        return float(value)
    if actual in (int, float) and expected is str and isinstance(entry.value, str):
        return entry.value  # OUTPUT_DIR 2026: else no folder could be named by digits
    shown = json.dumps(value, ensure_ascii=False) if actual is str else repr(value)
    raise UserError(
        f"{entry.origin}: {key} must be {_EXPECTED[expected]}, but is the {actual.__name__} {shown}"
        + _remedy(key, entry, value, expected)
    )


def _remedy(key: str, entry: _Entry, value: Any, expected: type) -> str:
    if expected in (tuple, list) and isinstance(value, (str, int, float)):
        items = _words(value) if isinstance(value, str) else [value]
        inside = json.dumps(items, ensure_ascii=False)[1:-1]
        comma = "," if len(items) == 1 else ""
        fitting = f"[{inside}]" if expected is list else f"({inside}{comma})"
    elif expected is int and isinstance(value, float) and value.is_integer():
        fitting = str(int(value))
    elif expected is str and isinstance(value, (int, float)):
        fitting = f'"{value}"'
    else:
        return ""
    if entry.origin == _COMMAND_LINE:
        return f"; write {key} {shlex.quote(fitting)}"
    return f"; write {key.rpartition('.')[2]}: {fitting}"


def _words(text: str) -> list[str]:
    """Take apart what was meant as a tuple: "a, b", "(a,)" and "('a', 'b')" alike."""
    return [word.strip(" '\"") for word in text.strip("()[] ").split(",") if word.strip()]


def _new_value(key: str, entry: _Entry) -> Any:
    value = _decode(entry.value)
    if value is not None and type(value) not in _EXPECTED:
        raise UserError(f"{entry.origin}: {key} cannot hold the {type(value).__name__} {value!r}")
    return _sequence(value, []) if isinstance(value, (list, tuple)) else value


def _sequence(value: _ListOrTuple, like: _ListOrTuple) -> _ListOrTuple:
    """
    Return ``value`` as list or tuple as ``like`` is, what is nested in it likewise, or as a list.

    A dumped config holds lists only, so this is what makes it come back equal.
    """
    inner = like[0] if like and isinstance(like[0], (list, tuple)) else []
    return type(like)(_sequence(v, inner) if isinstance(v, (list, tuple)) else v for v in value)
