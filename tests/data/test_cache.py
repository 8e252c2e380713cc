import gc
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from detectron2.structures import BoxMode

from d2ft.data.cache import cache_dir, cached_records, forget_loaded, loaded_once, open_cached
from d2ft.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("D2FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("a")
    return path


class _Parser:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        annotation = {"bbox": [0.0, 0.0, 1.0, 1.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        return [{"file_name": "é 1.png", "annotations": [annotation]}]


def _cache_files():
    return list((cache_dir() / "datasets").glob("*.records"))


def test_the_second_call_reads_what_the_first_parsed(source):
    parse = _Parser()
    first = cached_records("set", [source], parse, version=1)
    second = cached_records("set", [source], parse, version=1)
    assert first == second == parse()
    assert parse.calls == 2  # once by the cache, once by the line above
    assert isinstance(second[0]["annotations"][0]["bbox_mode"], BoxMode)


def test_a_changed_file_is_parsed_again(source):
    parse = _Parser()
    cached_records("set", [source], parse, version=1)
    source.write_text("ab")
    cached_records("set", [source], parse, version=1)
    assert parse.calls == 2


def test_a_file_of_the_same_size_but_another_time_is_parsed_again(source):
    parse = _Parser()
    cached_records("set", [source], parse, version=1)
    os.utime(source, ns=(1, 1))
    cached_records("set", [source], parse, version=1)
    assert parse.calls == 2


def test_a_new_version_of_the_parser_parses_again(source):
    parse = _Parser()
    cached_records("set", [source], parse, version=1)
    cached_records("set", [source], parse, version=2)
    assert parse.calls == 2


def _tail(contents):
    return contents + struct.pack("<Q", len(contents)) + b"d2ftrec1"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00\xff" * 100,
        _tail(b""),
        _tail(b"[]"),
        _tail(b'{"about": {"key": "set"}, "sections": {}}'),
        _tail(b'{"about": [], "sections": {"ends": [0, 0, "<i8"]}}'),
        _tail(b'{"about": {"key": "other"}, "sections": {"ends": [0, 0, "<i8"]}}'),
        _tail(b'{"about": {"key": "set"}, "sections": {"ends": [0, 999, "<i8"]}}'),
        struct.pack("<Q", 2**60) + b"d2ftrec1",
    ],
)
def test_an_unreadable_cache_is_rebuilt(source, content, caplog):
    parse = _Parser()
    cached_records("set", [source], parse, version=1)
    (path,) = _cache_files()
    path.write_bytes(content)
    assert cached_records("set", [source], parse, version=1) == parse()
    assert "cannot be read" in caplog.text
    caplog.clear()
    assert cached_records("set", [source], parse, version=1) == parse()
    assert not caplog.text


def test_a_cache_that_was_cut_off_anywhere_is_rebuilt(source):
    parse = _Parser()
    cached_records("set", [source], parse, version=1)
    (path,) = _cache_files()
    content = path.read_bytes()
    for kept in range(0, len(content), 7):
        path.write_bytes(content[:kept])
        assert cached_records("set", [source], parse, version=1) == parse()


def test_what_the_parser_found_out_is_kept_with_the_records(source):
    def parse():
        return [], {"classes": ["a", "é"]}

    for _ in range(2):
        stored = open_cached("set", [source], parse, version=1)
        assert stored.about["facts"] == {"classes": ["a", "é"]}
        assert len(stored) == 0


def test_of_several_callers_one_builds_and_the_others_wait(source):
    parse = _Parser()
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda _: cached_records("set", [source], parse, version=1), range(8))
        )
    assert parse.calls == 1
    assert all(result == results[0] for result in results)


def test_a_parser_that_fails_leaves_no_cache(source):
    def fail():
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        cached_records("set", [source], fail, version=1)
    assert _cache_files() == []


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D2FT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set the environment variable D2FT_CACHE"):
        cache_dir()


def test_inside_of_the_block_a_set_is_read_once_unless_its_files_change(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("1")

    def read():
        return cached_records("kept", [file], lambda: [{"file_name": file.read_text()}], version=1)

    assert read()[0] is not read()[0]
    with loaded_once():
        first = read()
        with loaded_once():
            assert read()[0] is first[0]
        first.append({})  # the list is the caller's own
        assert read() == [{"file_name": "1"}]
        assert read()[0] is first[0]
        file.write_text("22")
        assert read() == [{"file_name": "22"}]
        forget_loaded()
        assert read()[0] is not read()[0]
    assert read() == [{"file_name": "22"}]


@pytest.mark.parametrize("collects", [True, False])
def test_reading_leaves_the_garbage_collector_as_it_was(source, collects):
    cached_records("set", [source], _Parser(), version=1)
    try:
        if not collects:
            gc.disable()
        cached_records("set", [source], _Parser(), version=1)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
