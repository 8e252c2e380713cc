"""setup.py, and the parts of the set-up that need no installation."""

import ast
import base64
import csv
import hashlib
import importlib.metadata
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pip._vendor.packaging.requirements import Requirement

import d2ft

ROOT = Path(__file__).resolve().parent.parent
REPACK = runpy.run_path(str(ROOT / "tools" / "repack_detectron2.py"))["repack"]
MISSING = runpy.run_path(str(ROOT / "tools" / "missing_requirements.py"))

# Where the module is not called like its distribution, in lower case and with "-" for "_".
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "yaml": "pyyaml",
    "pkg_resources": "setuptools",
}


def _name(requirement):
    return Requirement(requirement).name.lower()


def _third_party_imports(folder):
    own = {"d2ft", "tests", "detectron2", "pip"}
    # It runs in the environment of the other framework.
    if folder == "tests":
        own |= {"mmcv", "mmdet", "mmengine"}
    # A script finds those beside it.
    own |= {path.stem for path in (ROOT / folder).glob("*.py")}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in own and top not in sys.stdlib_module_names:
                    yield top, path.relative_to(ROOT)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("d2ft", ["augmentation", "hotcoco", "imagecodecs", "safetensors", "scipy"]),
        ("projects", ["detectron2-deps"]),
        ("tools", []),
        ("tests", ["dev"]),
    ],
)
def test_every_import_is_a_requirement_that_setup_names(folder, extras):
    named = {_name(line) for line in MISSING["read_requirements"](extras)}
    unnamed = {
        (module, str(path))
        for module, path in _third_party_imports(folder)
        if DISTRIBUTION_OF.get(module, module.lower().replace("_", "-")) not in named
    }
    assert unnamed == set()


def test_every_requirement_of_the_installed_detectron2_is_named_by_setup():
    distributions = importlib.metadata.packages_distributions().get("detectron2", [])
    if not distributions:
        pytest.skip("detectron2 is a source tree here and states no requirements")
    left_out = {"black", "numpy"}  # see tools/repack_detectron2.py
    wanted = {
        _name(line)
        for line in importlib.metadata.requires(distributions[0]) or []
        if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": ""})
    }
    named = {_name(line) for line in MISSING["read_requirements"](["detectron2-deps"])}
    assert wanted - left_out <= named


def test_setup_states_the_version_of_the_package():
    command = [sys.executable, "setup.py", "--version"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == d2ft.__version__


def test_a_requirement_is_met_only_by_a_version_in_its_bounds():
    installed = importlib.metadata.version("pytest")
    assert MISSING["is_met"]("pytest")
    assert MISSING["is_met"](f"pytest=={installed}")
    assert not MISSING["is_met"](f"pytest>{installed}")
    assert not MISSING["is_met"]("a-distribution-that-nobody-installs")


def test_an_extra_that_setup_does_not_have_is_an_error():
    with pytest.raises(KeyError, match="fast"):
        MISSING["read_requirements"](["fast"])


def _write_published_wheel(folder):
    info = "sal_detectron2-0.7.2.dist-info"
    contents = {
        "detectron2/__init__.py": "",
        "detectron2/model_zoo/configs/a.yaml": "VERSION: 2\n",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "built for a PyTorch of long ago",
        "tools/__init__.py": "",
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n"
            "Requires-Dist: numpy<2\nRequires-Dist: black\nRequires-Dist: yacs>=0.1.8\n"
            'Requires-Dist: black==23.3.0; extra == "dev"\n'
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
        f"{info}/top_level.txt": "detectron2\ntools\n",
        f"{info}/RECORD": "tools/__init__.py,,\n",
    }
    path = folder / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def repacked(tmp_path):
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(REPACK(_write_published_wheel(tmp_path), tmp_path / "out")) as archive:
        yield archive


def test_the_repacked_wheel_holds_the_python_code_of_detectron2_alone(repacked):
    packages = {name for name in repacked.namelist() if ".dist-info/" not in name}
    assert packages == {"detectron2/__init__.py", "detectron2/model_zoo/configs/a.yaml"}
    assert Path(repacked.filename).name == "sal_detectron2-0.7.2-py3-none-any.whl"
    assert b"Tag: py3-none-any\n" in repacked.read("sal_detectron2-0.7.2.dist-info/WHEEL")


def test_the_repacked_wheel_no_longer_asks_for_an_old_numpy_or_for_black(repacked):
    metadata = repacked.read("sal_detectron2-0.7.2.dist-info/METADATA").decode()
    assert re.findall("Requires-Dist: (.+)", metadata) == [
        "yacs>=0.1.8",
        'black==23.3.0; extra == "dev"',
    ]


def test_the_record_of_the_repacked_wheel_lists_every_file_with_its_hash(repacked):
    record = "sal_detectron2-0.7.2.dist-info/RECORD"
    rows = list(csv.reader(io.StringIO(repacked.read(record).decode())))
    assert [row[0] for row in rows] == repacked.namelist()
    assert rows.pop() == [record, "", ""]
    for path, digest, size in rows:
        content = repacked.read(path)
        encoded = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
        assert (digest, int(size)) == ("sha256=" + encoded.rstrip("="), len(content))


def test_a_wheel_without_detectron2_is_not_repacked(tmp_path):
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    zipfile.ZipFile(wheel, "w").close()
    with pytest.raises(ValueError, match=r"other-1\.0.*does not contain the package detectron2"):
        REPACK(wheel, tmp_path)


def _set_up(project, **environment):
    (project / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "setup_env.sh", project / "tools")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", str(project / "tools" / "setup_env.sh")],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_set_up_refuses_a_python_that_does_not_run(tmp_path):
    done = _set_up(tmp_path / "a project", D2FT_PYTHON="/no/such/python")
    assert done.returncode == 1
    assert "D2FT_PYTHON=/no/such/python does not run" in done.stderr
    assert done.stdout == ""


def test_set_up_leaves_an_environment_alone_that_it_did_not_make(tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    theirs = tmp_path / "project" / ".venv" / "pyvenv.cfg"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("home = elsewhere\n")

    done = _set_up(tmp_path / "project", D2FT_PYTHON=str(bare / "bin" / "python"))

    assert done.returncode == 1
    assert "was not made by this set-up" in done.stderr
    assert theirs.read_text() == "home = elsewhere\n"
    assert list(theirs.parent.iterdir()) == [theirs]


@pytest.mark.parametrize("script", ["tools/setup_env.sh", "tools/run_tests.sh", ".ci/run"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
