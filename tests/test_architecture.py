"""The import rules of the rooms, read from the source text."""

import ast
from pathlib import Path

import pytest

from tests.conftest import PROJECT

PACKAGE = PROJECT / "d2ft"

# A room may import the rooms named here, and itself.
ROOTS = {"labels", "files", "errors", "host", "progress", "rle"}
LAYERS = {"layers", "structures"}
SIBLINGS = {"data", "checkpoint", "solver", "evaluation"}
MAY_IMPORT = {
    **{room: set() for room in ROOTS | LAYERS},
    "config": ROOTS,
    **{room: ROOTS | LAYERS | {"config"} for room in SIBLINGS},
    "preflight": ROOTS | {"config"} | SIBLINGS,
    "engine": ROOTS | LAYERS | {"config", "preflight"} | SIBLINGS,
}

# What computes numbers or names is plain: it can be tested against anything without Detectron2.
FREE_OF_DETECTRON2 = [
    "labels.py",
    "files.py",
    "errors.py",
    "checkpoint/load_report.py",
    "checkpoint/coverage.py",
    "checkpoint/head_remap.py",
    "solver/param_depth.py",
    "solver/schedule.py",
]
FREE_OF_DETECTRON2 += ["preflight/findings.py"]
FREE_OF_DETECTRON2 += [
    f"checkpoint/convert/{name}.py" for name in ("imagenet", "key_table", "mmdet", "torchvision")
]
FREE_OF_DETECTRON2 += [f"evaluation/{name}.py" for name in ("cityscapes_ap", "masks")]
FREE_OF_DETECTRON2 += [
    f"evaluation/{name}_ap.py" for name in ("coco", "kitti", "pascal_voc", "wider_face")
]
FREE_OF_DETECTRON2 += [
    str(path.relative_to(PACKAGE)) for path in sorted((PACKAGE / "data/synthetic").glob("*.py"))
]

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _imports(path):
    """Return every module that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _room(module):
    return module.split(".")[1] if module.startswith("d2ft.") else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert not [name for name in _imports(path) if name.startswith("d2ft")]
        return
    rooms = {_room(name) for name in _imports(path)} - {None, room}
    assert rooms <= MAY_IMPORT[room], f"{room} imports {sorted(rooms - MAY_IMPORT[room])}"


@pytest.mark.parametrize("name", FREE_OF_DETECTRON2)
def test_plain_modules_do_not_import_detectron2(name):
    assert not [module for module in _imports(PACKAGE / name) if module.startswith("detectron2")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_tools_or_projects_or_the_broken_cityscapes_modules(path):
    for module in _imports(path):
        assert module.split(".")[0] not in {"tools", "projects", "tests"}
        assert "detectron2.data.datasets.cityscapes" not in module
        assert "detectron2.evaluation.cityscapes_evaluation" not in module


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_only_the_catalog_writes_to_detectron2s_catalogs():
    writers = [
        path.relative_to(PACKAGE)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in {"register", "remove"}
        and isinstance(node.value, ast.Name)
        and node.value.id in {"DatasetCatalog", "MetadataCatalog"}
    ]
    assert set(writers) == {Path("data/catalog.py")}
