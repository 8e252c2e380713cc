import hashlib
import os
import stat

import pytest

from d2ft.files import atomic_write, fingerprint, sha256


def test_a_write_that_fails_keeps_the_old_content_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_write(path) as file:
        file.write("ne")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_written_file_has_the_mode_that_open_gives(tmp_path):
    with atomic_write(tmp_path / "a", "wb") as file:
        file.write(b"\x00")
    with open(tmp_path / "b", "wb") as file:
        file.write(b"\x00")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in "ab"]
    assert modes[0] == modes[1]


def test_sha256_is_that_of_the_content(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_fingerprint_changes_with_names_sizes_and_times(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("x")
    b.write_text("y")
    prints = {fingerprint([a]), fingerprint([b]), fingerprint([a, b]), fingerprint([])}
    os.utime(a, ns=(5, 5))
    prints.add(fingerprint([a]))
    a.write_text("xy")
    prints.add(fingerprint([a]))
    assert len(prints) == 6


def test_a_fingerprint_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        fingerprint([tmp_path / "missing"])
