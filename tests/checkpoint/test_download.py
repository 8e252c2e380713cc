"""Downloads from a real server on this machine that does what servers and networks do."""

import email.utils
import hashlib
import http.server
import json
import re
import runpy
import shutil
import sys
import threading

import pytest
from detectron2.utils.file_io import PathManager

from d2ft.checkpoint import download
from d2ft.checkpoint.download import (
    cached_path,
    download_weights,
    published_digest,
    resolve_url,
)
from d2ft.checkpoint.weights import fetch_weights
from d2ft.config import load_cfg
from d2ft.errors import UserError
from tests.factories import PROJECT

CONTENT = bytes(range(256)) * 4096  # 1 MiB
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
MODIFIED = email.utils.formatdate(0, usegmt=True)


class Server(http.server.ThreadingHTTPServer):
    """
    Serves CONTENT under every name, in the way that its attributes say.

    Attributes:
        break_after: bytes after which each answer ends, None for all.
        ranges: understands Range.
        statuses: answered first, one a request, before anything else.
        requests: Range header of each request so far.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.content_type = CONTENT, "application/octet-stream"
        self.break_after, self.ranges, self.version = None, True, '"1"'
        self.states_length, self.statuses, self.requests = True, [], []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/zoo/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        content, start = server.content, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and server.ranges and self.headers.get("If-Range") == server.version:
            start = int(asked[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.states_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Type", server.content_type)
        if server.version:
            self.send_header("ETag", server.version)
        self.end_headers()
        end = None if server.break_after is None else start + server.break_after
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_file_lies_where_detectron2_looks_for_it_and_is_fetched_once(server):
    url = server.url("w.pth")

    path = download_weights(url)

    assert path.read_bytes() == CONTENT
    assert PathManager.get_local_path(url) == str(path)
    assert fetch_weights(url) == str(path)
    assert server.requests == [None]
    assert not list(path.parent.glob("*.part*"))


def test_broken_download_is_resumed_where_it_broke(server):
    server.break_after = 400_000

    assert download_weights(server.url("w.pth")).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=400000-", "bytes=800000-"]


def test_download_that_was_given_up_is_resumed_by_the_next_call(server):
    server.break_after = 300_000
    server.statuses = []
    url = server.url("w.pth")

    def give_up(seconds):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download.time, "sleep", give_up)
        with pytest.raises(KeyboardInterrupt):
            download_weights(url)
    assert not cached_path(url).exists()
    server.break_after = None

    assert download_weights(url).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-"]


def test_server_that_ignores_range_sends_the_file_again(server):
    server.ranges, server.break_after = False, 400_000
    url = server.url("w.pth")
    with pytest.raises(UserError, match=r"ended after 400000 of 1048576 bytes.*w\.pth\.part"):
        download_weights(url)
    assert len(server.requests) == download.ATTEMPTS + 1

    server.break_after = None
    assert download_weights(url).read_bytes() == CONTENT


@pytest.mark.parametrize("version", ['"2"', ""])
def test_file_that_changed_on_the_server_is_not_glued_to_the_old_beginning(server, version):
    server.break_after, server.statuses = 400_000, []
    url = server.url("w.pth")
    server.ranges = False
    with pytest.raises(UserError, match="ended after"):
        download_weights(url)
    server.ranges, server.break_after, server.version = True, None, version
    server.content = CONTENT[::-1]

    assert download_weights(url).read_bytes() == CONTENT[::-1]


def test_server_without_a_length_is_believed_when_the_name_has_a_hash(server):
    server.states_length = False

    assert download_weights(server.url(f"m-{SHA256[:8]}.pth")).read_bytes() == CONTENT


def test_passing_failures_of_the_server_are_waited_out(server):
    server.statuses = [503, 500, 429]

    assert download_weights(server.url("w.pth")).read_bytes() == CONTENT


def test_missing_file_is_said_at_once(server):
    server.statuses = [404]
    with pytest.raises(UserError, match=r"w\.pth cannot be downloaded: .*404"):
        download_weights(server.url("w.pth"))
    assert len(server.requests) == 1


def test_web_page_is_not_taken_for_weights(server):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="answers with a web page"):
        download_weights(server.url("w.pth"))
    assert not cached_path(server.url("w.pth")).exists()


def test_full_disk_is_said_before_the_download(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UserError, match=r"1048576 bytes.*1000 free.*FVCORE_CACHE"):
        download_weights(server.url("w.pth"))


@pytest.mark.parametrize(
    ("name", "algorithm", "digest"),
    [
        (f"model_final_{MD5[:6]}.pkl", "md5", MD5),
        (f"maskrcnn_resnet50_fpn_coco-{SHA256[:8]}.pth", "sha256", SHA256),
        (f"mask_rcnn_r50_fpn_1x_coco_20200205-{SHA256[:8]}.pth", "sha256", SHA256),
    ],
)
def test_wrong_bytes_are_refused_by_the_hash_in_the_name(server, name, algorithm, digest):
    url = server.url(name)
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(UserError, match=f"{algorithm} of .* begins with {digest[:6]}"):
        download_weights(url)
    assert not cached_path(url).exists()

    server.content = CONTENT
    assert download_weights(url).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("137849600/model_final_f10217.pkl", ("md5", "f10217")),
        ("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", ("sha256", "bf2d0c1e")),
        ("mask_rcnn_r50_caffe_fpn_x_coco_20200504_163245-42aa3d00.pth", ("sha256", "42aa3d00")),
        ("ImageNetPretrained/MSRA/R-50.pkl", None),
        ("model-20240131.pth", None),
        ("model_final.pth", None),
    ],
)
def test_names_that_state_a_hash(name, published):
    assert published_digest(f"https://example.org/{name}") == published


def test_file_that_changed_since_its_first_download_is_refused(server):
    path = download_weights(server.url("w.pth"))
    record = json.loads(path.with_name("w.pth.d2ft.json").read_text())
    assert record == {"url": server.url("w.pth"), "size": len(CONTENT), "sha256": SHA256}
    path.write_bytes(CONTENT[:-1])

    with pytest.raises(UserError, match=rf"w\.pth: is no longer the file .*first.*{SHA256}"):
        fetch_weights(server.url("w.pth"))


def test_file_that_detectron2_downloaded_is_checked_and_recorded(server):
    good, bad = server.url("w.pth"), server.url("model_final_000000.pkl")
    path = PathManager.get_local_path(good)
    PathManager.get_local_path(bad)

    assert str(download_weights(good)) == path
    with pytest.raises(UserError, match="not the published bytes"):
        download_weights(bad)
    assert (
        json.loads(cached_path(good).with_name("w.pth.d2ft.json").read_text())["sha256"] == SHA256
    )


def test_same_path_on_another_host_is_not_mistaken_for_the_file(server):
    download_weights(server.url("w.pth"))
    other = server.url("w.pth").replace("127.0.0.1", "localhost")

    with pytest.raises(UserError, match=r"holds the file of http://127\.0\.0\.1"):
        download_weights(other)


def test_nobody_at_the_address_is_a_clear_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"refused.*another machine, then put it to .*/a/w\.pth or"):
        download_weights("http://127.0.0.1:9/a/w.pth")


@pytest.mark.parametrize(
    ("weights", "url"),
    [
        ("detectron2://a/b.pkl", "https://dl.fbaipublicfiles.com/detectron2/a/b.pkl"),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
            "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/"
            "mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl",
        ),
        (
            "catalog://ImageNetPretrained/MSRA/R-50",
            "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl",
        ),
        ("https://example.org/w.pth?matching_heuristics=True", "https://example.org/w.pth"),
    ],
)
def test_addresses_are_resolved_as_detectron2_does(weights, url):
    assert resolve_url(weights) == url
    assert resolve_url(f"zoo://{weights}") == url if weights.endswith(".yaml") else True


@pytest.mark.parametrize("url", ["https://example.org/", "https://example.org/../../w.pth"])
def test_address_that_is_no_file_below_a_host_is_refused(url):
    with pytest.raises(UserError, match="does not end in the name of a file"):
        resolve_url(url)


def test_unknown_address_is_refused_with_what_would_do():
    with pytest.raises(UserError, match=r"mask_rcnn\.yaml is neither a URL nor in .*zoo"):
        resolve_url("mask_rcnn.yaml")


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["download_weights.py", *arguments])
    runpy.run_path(str(PROJECT / "tools/download_weights.py"), run_name="__main__")


def test_tool_tells_where_the_file_of_a_config_lies(server, tmp_path, monkeypatch, capsys):
    config = tmp_path / "a.yaml"
    url = server.url(f"model_final_{MD5[:6]}.pkl")
    config.write_text(f"MODEL:\n  WEIGHTS: {url}\nVERSION: 2\n")
    assert url == load_cfg(config).MODEL.WEIGHTS

    run_tool(monkeypatch, "--config-file", str(config))

    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        str(cached_path(url)),
        f"  1048576 bytes, SHA-256 {SHA256}",
        f"  md5 begins with {MD5[:6]}, as its name says",
    ]
    assert "1.05M" in shown.err


def test_tool_ends_with_one_line_when_it_fails(server, monkeypatch):
    server.statuses = [404]
    with pytest.raises(SystemExit, match=r"^error: .*404"):
        run_tool(monkeypatch, server.url("w.pth"))
