"""
Print which requirements of d2ft the Python that runs this does not meet, one a line.

It runs before anything is installed, so it reads setup.py as text and takes the version rules
from the copy of `packaging` inside pip.

Usage: python missing_requirements.py [EXTRA ...]
"""

import ast
import importlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

SETUP_FILE = Path(__file__).resolve().parent.parent / "setup.py"


def read_requirements(extras: Iterable[str], setup_file: Path = SETUP_FILE) -> list[str]:
    """
    Return the lines of ``INSTALL_REQUIRES``, then those of each extra, from the text of setup.py.

    Raises:
        KeyError: if setup.py has no extra of that name.
    """
    tables = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(setup_file.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    requirements = list(tables["INSTALL_REQUIRES"])
    for extra in extras:
        requirements += tables["EXTRAS_REQUIRE"][extra]
    return requirements


def is_met(requirement: str) -> bool:
    """
    Tell whether an installed distribution satisfies ``requirement``.

    Any build whose cv2 can be imported counts as opencv-python: the headless and contrib builds
    put their files in the same folder, and a second build on top would break the first.
    """
    wanted = Requirement(requirement)
    if wanted.name == "opencv-python":
        return _can_import("cv2")
    try:
        installed = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return wanted.specifier.contains(installed, prereleases=True)


def _can_import(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    for line in read_requirements(sys.argv[1:]):
        if not is_met(line):
            print(line)
