"""What every test starts from: clean catalogs, fixed seeds, its own cache, no network."""

import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.data import catalog

PROJECT = Path(__file__).resolve().parents[1]
REAL_DATA = PROJECT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _clean_process(tmp_path_factory, monkeypatch, request):
    """Restore what lives as long as the process, so that no test sees another's leavings."""
    datasets, metadata = dict(DatasetCatalog), dict(MetadataCatalog)
    own = dict(catalog._OWN)
    working_directory = os.getcwd()
    cache = tmp_path_factory.getbasetemp() / "d2ft_cache"
    monkeypatch.setenv("D2FT_CACHE", str(cache))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    if "network" not in request.keywords:
        _refuse_network(monkeypatch)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    os.chdir(working_directory)
    for live, before in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
        live.clear()
        live.update(before)
    catalog._OWN.clear()
    catalog._OWN.update(own)


def _refuse_network(monkeypatch):
    connect = socket.socket.connect

    def connect_here(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests do not use the network; this one asked for {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture
def real_data():
    """Return the folder of real data, which is not part of the project."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real data is not beside this checkout (../shared/data)")
    return REAL_DATA
