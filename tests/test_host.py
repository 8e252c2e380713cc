import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from d2ft import host


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_host_is_the_package_that_python_imports():
    import detectron2

    found = host.find_host()
    assert str(found.path) == os.path.realpath(os.path.dirname(detectron2.__file__))
    assert str(found.path) in str(found)
    assert found.distribution


def test_without_detectron2_the_message_has_the_command_that_installs_it():
    result = _python(
        """
        import sys
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name == "detectron2":
                    raise ModuleNotFoundError(name)
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda n, p=None: None if n == "detectron2" else find_spec(n, p)
        from d2ft import host
        host.find_host()
        """
    )
    assert result.returncode != 0
    assert "pip install" in result.stderr
    assert "facebookresearch/detectron2" in result.stderr


def test_the_model_zoo_can_be_imported_without_pkg_resources():
    result = _python(
        """
        import importlib.abc, sys
        class NoPkgResources(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "pkg_resources":
                    raise ModuleNotFoundError(name)
        for name in [n for n in sys.modules if n.startswith("pkg_resources")]:
            del sys.modules[name]
        sys.meta_path.insert(0, NoPkgResources())
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda n, p=None: None if n == "pkg_resources" else find_spec(n, p)
        from d2ft import host
        host.bridge_detectron2()
        from detectron2 import model_zoo
        assert "pkg_resources" not in sys.modules
        try:
            model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
        except RuntimeError as error:  # a source tree without its configs
            assert "not available in Model Zoo" in str(error), error
        """
    )
    assert result.returncode == 0, result.stderr


def test_bridging_twice_does_the_work_once():
    assert host.bridge_detectron2() is host.bridge_detectron2()


def test_numpy_and_the_working_directory_are_as_before_after_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    had = hasattr(np, "in1d")
    with pytest.raises(RuntimeError, match="inside"), host.cityscapesscripts_bridge():
        assert np.in1d([[1, 2]], [2]).ravel().tolist() == [False, True]
        assert os.getcwd() != str(tmp_path)
        raise RuntimeError("inside")
    assert hasattr(np, "in1d") == had
    assert os.getcwd() == str(tmp_path)


def test_a_module_on_the_cpu_is_left_alone_in_a_single_process():
    model = torch.nn.Linear(1, 1)
    assert host._create_ddp_model(model, broadcast_buffers=False) is model
