"""
Damaged checkpoints: each is refused by name, or loads as tensors that can be used.

By hand with more of them: D2FT_FUZZ_FILES=2000 python -m pytest -m slow tests/checkpoint/test_fuzz.py
"""

import os
import pickle
import random
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from d2ft.checkpoint.safe_load import load_checkpoint_file
from d2ft.errors import UserError
from tests.factories import write_mmengine_file

FILES = int(os.environ.get("D2FT_FUZZ_FILES", "100"))
SECONDS = 5.0  # for one file of a few kB


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("the_pickle_was_run",)


def _write_originals(folder):
    tensors = {f"layer{i}.weight": torch.full((3, 4), float(i)) for i in range(4)}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    content = {"model": tensors, "optimizer": {"state": {0: {"step": 3}}}, "iteration": 7}
    for protocol in (2, 4, 5):
        zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo", "n": np.float64(3)}
        (folder / f"zoo{protocol}.pkl").write_bytes(pickle.dumps(zoo, protocol))
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({**content, "x": _RunsCode()}, folder / "hostile.pth")
    (folder / "hostile.pkl").write_bytes(pickle.dumps({"model": arrays, "x": _RunsCode()}))
    save_file(tensors, folder / "plain.safetensors")
    write_mmengine_file(folder / "mmengine.pth")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _mutate(content, source):
    """Return the bytes with one to four changes of the kinds that disks, networks and people make."""
    data = bytearray(content)
    for _ in range(source.randint(1, 4)):
        start = source.randrange(len(data))
        length = source.choice((1, 2, 4, 8, 64))
        kind = source.randrange(6)
        if kind == 0:
            data[start] = source.randrange(256)
        elif kind == 1:
            data[start : start + length] = source.choice((b"\x00", b"\xff", b"\x7f")) * length
        elif kind == 2:
            data[start : start + length] = b""
        elif kind == 3:
            data[start:start] = source.randbytes(length)
        elif kind == 4:
            other = source.randrange(len(data))
            data[start : start + length] = data[other : other + length]
        else:
            data = data[: max(start, 16)]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_a_clean_error_or_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "originals").mkdir()
    originals = _write_originals(tmp_path / "originals")
    source = random.Random(0)
    path = tmp_path / "damaged.pth"
    loaded = 0
    for number in range(FILES):
        path.write_bytes(_mutate(originals[number % len(originals)], source))
        start = time.monotonic()
        try:
            checkpoint = load_checkpoint_file(path)
        except UserError as error:
            assert "damaged.pth" in str(error)  # noqa: PT017 (some damage does no harm)
        else:
            loaded += 1
            for value in checkpoint["model"].values():
                assert type(value) is torch.Tensor
                assert not value.is_floating_point() or torch.isfinite(value.clone()).all()
        assert time.monotonic() - start < SECONDS, f"file {number} took too long"
    assert 0 < loaded < FILES
    assert not (tmp_path / "the_pickle_was_run").exists()
