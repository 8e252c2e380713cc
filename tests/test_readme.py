"""What README.md and tools/README.md show is there, and is what the code reads."""

import ast
import re
import shlex

import pytest
import yaml

from d2ft.config import load_cfg
from tests.factories import PROJECT

DOCUMENTS = [PROJECT / folder / "README.md" for folder in (".", "configs", "tools")]


def _blocks(language):
    for document in DOCUMENTS:
        for block in re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S):
            yield pytest.param(document, block, id=f"{document.name}: {block.splitlines()[0][:60]}")


def _commands():
    for parameter in _blocks("bash"):
        document, block = parameter.values
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield pytest.param(line, id=f"{document.parent.name}: {line[:70]}")


@pytest.mark.parametrize("command", _commands())
def test_what_a_command_names_is_in_the_project(command):
    words = [word for word in shlex.split(command, comments=True) if "=" not in word]
    assert words[0] in {"python", "bash", "source"}, command
    made_by_commands = ("output/", ".venv/", "my_")
    for word in words[1:]:
        if "/" in word and not word.startswith(made_by_commands):
            assert (PROJECT / word).exists(), f"{command}: there is no {word}"


@pytest.mark.parametrize("command", [c for c in _commands() if "--config-file" in c.values[0]])
def test_the_overrides_of_a_command_are_keys_of_its_config(command):
    words = shlex.split(command, comments=True)
    words = words[words.index("--config-file") + 1 :]
    config, options = words[0], words[1:]
    while options and options[0].startswith("--"):
        options = options[2 if options[0] == "--num-gpus" else 1 :]
    load_cfg(PROJECT / config, options)


@pytest.mark.parametrize(("document", "block"), _blocks("python"))
def test_python_parses(document, block):
    ast.parse(block)


@pytest.mark.parametrize(("document", "block"), _blocks("yaml"))
def test_yaml_is_a_config(document, block, tmp_path):
    tree = yaml.safe_load(block)
    if "_BASE_" in tree:
        tree["_BASE_"] = [str(PROJECT / "configs" / base) for base in tree["_BASE_"]]
    (tmp_path / "block.yaml").write_text(yaml.safe_dump(tree))
    load_cfg(tmp_path / "block.yaml")


def test_the_five_parts_of_the_readme_are_those_of_the_config():
    shown = {}
    for parameter in _blocks("yaml"):
        document, block = parameter.values
        if document.parent == PROJECT and "CUSTOM" not in block:
            for key, value in yaml.safe_load(block).items():
                shown.setdefault(key, {}).update(value if isinstance(value, dict) else {"": value})
    cfg = load_cfg(PROJECT / "configs" / "cityscapes_ft.yaml")
    assert shown["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert shown["MODEL"]["WEIGHTS"] == cfg.MODEL.WEIGHTS
    assert ast.literal_eval(shown["DATASETS"]["TRAIN"]) == cfg.DATASETS.TRAIN
    for key, value in shown["SOLVER"].items():
        assert (ast.literal_eval(value) if isinstance(value, str) else value) == cfg.SOLVER[key]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d.parent.name}/{d.name}")
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_room_is_named():
    text = (PROJECT / "README.md").read_text()
    rooms = [path.parent.name for path in (PROJECT / "d2ft").glob("*/__init__.py")]
    assert all(f"`d2ft/{room}`" in text for room in rooms)


def test_every_tool_is_named():
    text = (PROJECT / "tools" / "README.md").read_text()
    tools = [path.name for path in (PROJECT / "tools").iterdir() if path.suffix in {".py", ".sh"}]
    assert [name for name in tools if f"`{name}`" not in text] == []


def test_every_config_is_named():
    text = (PROJECT / "configs" / "README.md").read_text()
    configs = [str(p.relative_to(PROJECT / "configs")) for p in PROJECT.glob("configs/**/*.yaml")]
    assert [name for name in configs if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d.parent.name}/{d.name}")
def test_nothing_is_left_to_be_filled_in(document):
    assert re.findall(r"^@\w+@|TODO|FIXME|XXX", document.read_text(), re.M) == []
