"""
The one place that knows which Detectron2 is installed, and makes it usable on today's stack.

Detectron2 is tested upstream against older releases of its own dependencies. Whatever has to be
bridged for setuptools, PyTorch, NumPy or Pillow is here and nowhere else, so that it can be
deleted here when upstream no longer needs it. NumPy and Pillow themselves are never patched for
longer than the call that needs it.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALL_COMMAND = (
    "python -m pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git'"
)


@dataclass(frozen=True)
class Host:
    """
    The Detectron2 that Python imports.

    Attributes:
        path: folder of the package.
        distribution: name and version of what pip installed there, or "source tree".
        compiled_ops: whether its own C++ operators can be imported. Mask, Faster, Cascade R-CNN
            and RetinaNet work without them; deformable and rotated operators do not.
    """

    path: Path
    distribution: str
    compiled_ops: bool

    def __str__(self) -> str:
        ops = "with" if self.compiled_ops else "without"
        return f"detectron2 from {self.path} ({self.distribution}), {ops} compiled operators"


def require_detectron2() -> None:
    """
    Check that there is a Detectron2, without importing it.

    Raises:
        ModuleNotFoundError: if there is none; the message has the command that installs it.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ModuleNotFoundError(
            "d2ft extends Detectron2, which is not installed and has no release for pip to find "
            f"by itself. Install it with: {INSTALL_COMMAND}\n"
            "or let `bash tools/run_tests.sh` make a complete environment in .venv.",
            name="detectron2",
        )


def find_host() -> Host:
    """
    Tell which Detectron2 is installed.

    ``detectron2.__version__`` is not consulted: builds that differ by two years carry the same.

    Raises:
        ModuleNotFoundError: as :func:`require_detectron2`.
    """
    require_detectron2()
    import detectron2

    path = Path(next(iter(detectron2.__path__))).resolve()
    return Host(path, _distribution_at(path), _can_import_compiled_ops())


def _distribution_at(package: Path) -> str:
    for distribution in importlib.metadata.distributions():
        # Not packages_distributions(), which parses what every distribution says of itself.
        declared = (distribution.read_text("top_level.txt") or "").split()
        files = distribution.read_text("RECORD") or ""
        if "detectron2" not in declared and "\ndetectron2/__init__.py," not in f"\n{files}":
            continue
        # A checkout put on PYTHONPATH hides an installed distribution without removing it.
        if Path(str(distribution.locate_file("detectron2"))).resolve() == package:
            return f"{distribution.metadata['Name']} {distribution.version}"
    return "source tree"


def _can_import_compiled_ops() -> bool:
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def bridge_detectron2() -> Host:
    """
    Make the installed Detectron2 importable and usable as a whole; the first call does the work.

    Returns:
        The Detectron2 that was found.

    Raises:
        ModuleNotFoundError: if Detectron2 is not installed.
    """
    host = find_host()
    if importlib.util.find_spec("pkg_resources") is None:
        _import_model_zoo_without_pkg_resources()

    import detectron2.engine.defaults

    detectron2.engine.defaults.create_ddp_model = _create_ddp_model
    return host


def _import_model_zoo_without_pkg_resources() -> None:
    # detectron2.model_zoo imports pkg_resources, which setuptools 82 removed, for one function.
    # It keeps the reference, so the stand-in need not stay where other packages would find it.
    def resource_filename(package: str, resource: str) -> str:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"no package {package}", name=package)
        return os.path.join(spec.submodule_search_locations[0], resource)

    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_filename = resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        import detectron2.model_zoo  # noqa: F401
    finally:
        del sys.modules["pkg_resources"]


def _create_ddp_model(model: Any, *, fp16_compression: bool = False, **kwargs: Any) -> Any:
    """
    Same as ``detectron2.engine.defaults.create_ddp_model``, but also for modules on the CPU.

    Detectron2 always passes ``device_ids``, which DistributedDataParallel refuses there.
    """
    from detectron2.engine import create_ddp_model

    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        kwargs.setdefault("device_ids", None)
    return create_ddp_model(model, fp16_compression=fp16_compression, **kwargs)


@contextlib.contextmanager
def cityscapesscripts_bridge() -> Iterator[None]:
    """
    Let cityscapesscripts 2.3.0 run on NumPy 2.4 and keep its files out of the working directory.

    For the length of the block ``np.in1d``, removed in NumPy 2.4, is ``np.isin``; the JSON writer
    of its instance evaluation accepts NumPy integers; and the working directory is a temporary
    folder, because the evaluation leaves a ``matches.json`` there. All three are undone at the
    end. The working directory belongs to the whole process: open nothing by relative path in the
    block.
    """
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as evaluation
    import numpy as np

    def write_json(content: Any, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, default=lambda scalar: scalar.item())

    removed = not hasattr(np, "in1d")
    stock_writer = evaluation.writeDict2JSON
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="d2ft_cityscapesscripts_") as folder:
        if removed:
            np.in1d = np.isin  # type: ignore[attr-defined]
        evaluation.writeDict2JSON = write_json
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            evaluation.writeDict2JSON = stock_writer
            if removed:
                del np.in1d  # type: ignore[attr-defined]
