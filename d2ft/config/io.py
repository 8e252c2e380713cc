"""
Read a config: safe YAML with inherited bases, then the ``KEY VALUE`` words of a command line.

Same as ``CfgNode.merge_from_file`` and ``merge_from_list`` of detectron2, but no YAML can run
code, every mistake names its file, line and key, and the config remembers who set each key.

Bases, file and command line are merged as trees (:mod:`d2ft.config.tree`), and only the result is
written into the config.
"""

import contextlib
import copy
import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from d2ft.config.defaults import get_cfg, get_value, skip_or_refuse
from d2ft.config.tree import (
    COMMAND_LINE,
    Entry,
    Tree,
    decode_literal,
    merge_trees,
    parse_tree,
    read_tree,
    split_words,
    tree_of_opts,
)
from d2ft.errors import UserError

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
    tree = read_tree(os.path.expanduser(path), chain=()) if path else {}
    return _cfg_of_tree(merge_trees(tree, tree_of_opts(opts)))


def load_cfg_text(text: str, origin: str, opts: Sequence[Any] = ()) -> CfgNode:
    """
    Same as :func:`load_cfg`, but reads the YAML from a string, which names no bases.

    Args:
        text: the YAML, as ``CfgNode.dump`` writes it.
        origin: what messages call it, such as the file that holds it.
        opts: as in :func:`load_cfg`.
    """
    return _cfg_of_tree(merge_trees(parse_tree(text, origin), tree_of_opts(opts)))


def _cfg_of_tree(tree: Tree) -> CfgNode:
    cfg = get_cfg()
    if "VERSION" in tree and decode_literal(tree["VERSION"].value) != cfg.VERSION:
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


def set_value(cfg: CfgNode, key: str, value: Any, *, origin: str) -> None:
    """
    Set a key by its full name, and what :func:`who_set` will tell of it.

    Raises:
        KeyError: if the config has no such key.
    """
    get_value(cfg, key)
    *groups, name = key.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[name] = value
    origins = dict(cfg.__dict__.get(_ORIGINS, {}))  # a copy: clones share the mapping
    cfg.__dict__[_ORIGINS] = {**origins, key: (origin, copy.deepcopy(value))}


def _write(
    tree: Tree, node: CfgNode, root: CfgNode, prefix: str, origins: dict[str, tuple[str, Any]]
) -> None:
    """Write ``tree`` into ``node``, the part of the default config ``root`` under ``prefix``."""
    for name, entry in tree.items():
        key = prefix + name
        new = name not in node
        if new and not node.is_new_allowed():
            skip_or_refuse(key, decode_literal(entry.value), entry.origin, root)
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


def _fit(key: str, entry: Entry, default: Any) -> Any:
    """Return the entry's value in the type of ``default``, or raise what would have fitted."""
    if default is None:
        return _new_value(key, entry)
    if isinstance(default, CfgNode):
        group = f"a group of keys such as {key}.{min(default, default='X')}"
        raise UserError(f"{entry.origin}: {key} is {group}, not a value as {entry.value!r}")
    value = decode_literal(entry.value)
    actual, expected = type(value), type(default)
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return _sequence(value, default)
    if actual is expected:
        return value
    if actual is int and expected is float:
        return float(value)
    if actual in (int, float) and expected is str and isinstance(entry.value, str):
        return entry.value  # OUTPUT_DIR 2026: else no folder could be named by digits
    text = json.dumps(value, ensure_ascii=False) if actual is str else repr(value)
    shown = "empty" if value is None else f"the {actual.__name__} {text}"  # a blank line
    raise UserError(
        f"{entry.origin}: {key} must be {_EXPECTED[expected]}, but is {shown}"
        + _remedy(key, entry, value, expected)
    )


def _remedy(key: str, entry: Entry, value: Any, expected: type) -> str:
    if expected in (tuple, list) and isinstance(value, (str, int, float)):
        items = split_words(value) if isinstance(value, str) else [value]
        inside = json.dumps(items, ensure_ascii=False)[1:-1]
        comma = "," if len(items) == 1 else ""
        fitting = f"[{inside}]" if expected is list else f"({inside}{comma})"
    elif expected is int and isinstance(value, float) and value.is_integer():
        fitting = str(int(value))
    elif expected is str and isinstance(value, (int, float)):
        fitting = f'"{value}"'
    else:
        return ""
    if entry.origin == COMMAND_LINE:
        return f"; write {key} {shlex.quote(fitting)}"
    return f"; write {key.rpartition('.')[2]}: {fitting}"


def _new_value(key: str, entry: Entry) -> Any:
    value = decode_literal(entry.value)
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
