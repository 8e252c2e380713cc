import multiprocessing

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm

from d2ft.data.cache import cache_dir
from d2ft.data.shared_list import SharedList
from d2ft.engine.setup import leave_process_group

RECORDS = [{"file_name": f"{'x' * i}.png", "annotations": [{"bbox": [i, 1.5]}]} for i in range(5)]


def test_it_holds_the_records_and_leaves_no_file():
    shared = SharedList(RECORDS)
    assert list(map(shared.__getitem__, range(len(shared)))) == RECORDS
    assert not list(cache_dir().glob("records_*"))
    shared[0]["annotations"].clear()
    assert shared[0] == RECORDS[0]  # each access is a copy


def _read_last(shared, connection):
    connection.send(shared[len(shared) - 1])


def test_a_spawned_worker_reads_it_though_the_file_has_no_name():
    shared = SharedList(RECORDS)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_read_last, args=(shared, theirs))
    worker.start()
    assert ours.poll(60)
    assert ours.recv() == RECORDS[-1]
    worker.join()


def test_a_full_disk_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("d2ft.data.shared_list._write", _refuse)
    with pytest.raises(OSError, match="cannot be shared by the processes: No space"):
        SharedList(RECORDS)


def _refuse(records):
    raise OSError("No space left on device")


def _share(folder):
    # What the second process holds itself must not matter: it maps the first one's.
    shared = SharedList(RECORDS if comm.get_rank() == 0 else RECORDS[:1])
    found = [shared[i] for i in range(len(shared))]
    comm.synchronize()  # both have read
    if comm.get_rank() == 0:
        shared._bytes[0] = 0
    comm.synchronize()
    torch.save((found, int(shared._bytes[0])), folder / str(comm.get_rank()))
    leave_process_group()


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_map_the_same_bytes(tmp_path):
    launch(_share, 2, dist_url="auto", args=(tmp_path,))
    assert [torch.load(tmp_path / rank) for rank in "01"] == [(RECORDS, 0)] * 2
