"""
Download weights to where Detectron2 looks for them, and tell whether they are what they should be.

A broken download is resumed. A file is checked against what its source publishes: the size that
the server states, and the digits of a hash in its name. The SHA-256 of what was downloaded first
is kept beside the file, and whoever uses the file later compares it.
"""

import email.message
import functools
import http.client
import json
import logging
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from detectron2.checkpoint.catalog import ModelCatalog
from filelock import FileLock
from iopath.common.file_io import get_cache_dir
from tqdm import tqdm

from d2ft.errors import UserError
from d2ft.files import atomic_write, file_digest, sha256
from d2ft.host import bridge_detectron2

logger = logging.getLogger(__name__)

# Attempts in a row that bring nothing new, and the seconds before the second of them; each further
# pause is twice as long.
ATTEMPTS = 5
PAUSE = 1.0
_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 20
# No such host, or nobody who listens there: waiting seconds will not change it.
_OFFLINE = (socket.gaierror, ConnectionRefusedError)
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}

# Detectron2: "any model on this page contains its md5 prefix in its file name",
# https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md
_MD5_NAME = re.compile(r"model_final_([0-9a-f]{6})\.pkl")
# torchvision, the rule of torch.hub: https://pytorch.org/docs/stable/hub.html; and MMDetection,
# https://github.com/open-mmlab/mmdetection/blob/main/tools/model_converters/publish_model.py
_SHA256_NAME = re.compile(r".*-([0-9a-f]{8})\.pth")
_DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])")


class _BrokenError(Exception):
    """The connection ended early; another attempt may get further."""


def resolve_url(weights: str) -> str:
    """
    Return the http(s) address that a value of MODEL.WEIGHTS or a name of the zoo stands for.

    Args:
        weights: a URL, ``detectron2://...``, ``catalog://...``, or a config of Detectron2's zoo
            such as ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml``, also with ``zoo://``.

    Raises:
        UserError: if it is none of these.
    """
    address = urlparse(weights)._replace(query="").geturl()
    if address.startswith(("http://", "https://")):
        parts = urlparse(address).path.split("/")
        if not parts[-1] or ".." in parts:
            raise UserError(f"{weights} does not end in the name of a file below its host.")
        return address
    if address.startswith("detectron2://"):
        from detectron2.utils.file_io import Detectron2Handler

        return Detectron2Handler.S3_DETECTRON2_PREFIX + address.removeprefix("detectron2://")
    bridge_detectron2()
    from detectron2 import model_zoo

    try:
        if address.startswith("catalog://"):
            return ModelCatalog.get(address.removeprefix("catalog://"))
        return model_zoo.get_checkpoint_url(address.removeprefix("zoo://"))
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{weights} is neither a URL nor in Detectron2's model zoo. Give https://, "
            "detectron2://, catalog:// or a config of the zoo such as "
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml."
        ) from error


def cached_path(url: str) -> Path:
    """Return where Detectron2's PathManager looks for the file of an http(s) URL."""
    # The rule of HTTPURLHandler: the path of the URL below the cache, without the host.
    # https://github.com/facebookresearch/iopath/blob/main/iopath/common/file_io.py
    folder = os.path.dirname(urlparse(url).path.lstrip("/"))
    return Path(get_cache_dir(), folder, url.rsplit("/", 1)[-1])


def published_digest(url: str) -> tuple[str, str] | None:
    """Return ("md5" or "sha256", its first digits) if the file name of the URL states them."""
    name = url.rsplit("/", 1)[-1]
    if found := _MD5_NAME.fullmatch(name):
        return "md5", found[1]
    found = _SHA256_NAME.fullmatch(name)
    if found and not _DATE.fullmatch(found[1]):
        return "sha256", found[1]
    return None


def download_weights(url: str, *, progress: bool = False) -> Path:
    """
    Return the local file of an http(s) URL, downloaded if need be and checked in any case.

    Processes that ask for the same file at the same time wait for the one that downloads.

    Args:
        url: from :func:`resolve_url`.
        progress: show a bar on standard error.

    Raises:
        UserError: if the file cannot be had, is not what its name or its server says, or is no
            longer what was downloaded first.
    """
    path = cached_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.d2ft.lock"):
        if not path.is_file():
            _download(url, path, progress=progress)
        _check(url, path)
    return path


def _record_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.d2ft.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check(url: str, path: Path) -> None:
    record = _read_json(_record_file(path))
    status = path.stat()
    digest = _digest(path, status.st_size, status.st_mtime_ns)
    if not record:
        _check_name(url, path)
        _write_record(url, path, digest)
        return
    if digest != record.get("sha256"):
        raise UserError(
            f"{path}: is no longer the file that was downloaded from {record.get('url')}: its "
            f"SHA-256 is {digest}, at the first download it was {record.get('sha256')}. Delete it "
            f"and {_record_file(path).name}, and download it again."
        )
    if url == record.get("url"):
        return
    if published_digest(url) is None:
        raise UserError(
            f"{path}: is the place for {url}, but holds the file of {record.get('url')}: "
            "Detectron2's cache leaves out the host. Delete it, or give one of the two as a local "
            "path."
        )
    _check_name(url, path)


@functools.lru_cache(maxsize=8)
def _digest(path: Path, size: int, modified: int) -> str:
    # Preflight and loading ask for the same file within one run.
    return sha256(path)


def _check_name(url: str, path: Path) -> None:
    published = published_digest(url)
    if published is None:
        return
    algorithm, prefix = published
    digest = file_digest(path, algorithm)
    if not digest.startswith(prefix):
        raise UserError(
            f"{path}: by its name the {algorithm} of {url} begins with {prefix}, but that of the "
            f"file is {digest}: these are not the published bytes. Delete the file and download it "
            "again; if the digits in the name mean something else, download it by hand and give "
            "the local path."
        )


def _write_record(url: str, path: Path, digest: str) -> None:
    with atomic_write(_record_file(path)) as file:
        json.dump({"url": url, "size": path.stat().st_size, "sha256": digest}, file, indent=2)


def _download(url: str, path: Path, *, progress: bool) -> None:
    part = path.with_name(f"{path.name}.part")
    furthest, failures = 0, 0
    while True:
        try:
            _attempt(url, part, progress=progress)
            break
        except urllib.error.HTTPError as error:
            if error.code not in _TRANSIENT_STATUS:
                raise UserError(
                    f"{url} cannot be downloaded: the server answers {error}."
                ) from error
            reason: Exception = error
        # URLError and TimeoutError are kinds of OSError.
        except (OSError, http.client.HTTPException, _BrokenError) as error:
            if isinstance(error, OSError) and error.filename:
                raise  # of the local disk
            reason = error
        size = part.stat().st_size if part.exists() else 0
        failures = 0 if size > furthest else failures + 1
        furthest = max(furthest, size)
        offline = isinstance(getattr(reason, "reason", None), _OFFLINE)
        if failures >= ATTEMPTS or offline:
            kept = f" The next attempt goes on after the {size} bytes of {part}." if size else ""
            raise UserError(
                f"{url} cannot be downloaded ({reason}).{kept} Without a connection, download it "
                f"on another machine, then put it to {path} or set MODEL.WEIGHTS to the local file."
            ) from reason
        logger.warning("%s: %s; trying again from byte %d", url, reason, size)
        time.sleep(PAUSE * 2 ** max(failures - 1, 0))
    try:
        _check_name(url, part)
    except UserError:
        # Going on from wrong bytes cannot make them right.
        _forget(part)
        raise
    os.replace(part, path)
    _forget(part)
    digest = sha256(path)
    _write_record(url, path, digest)
    logger.info("Downloaded %s to %s, SHA-256 %s", url, path, digest)


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_file(part).unlink(missing_ok=True)


def _attempt(url: str, part: Path, *, progress: bool) -> None:
    """Bring ``part`` to its full length, from where it stands."""
    state = _read_json(_state_file(part))
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "d2ft"}
    if have and state.get("url") == url and state.get("version"):
        # If the file on the server is another one by now, it sends that one whole.
        headers |= {"Range": f"bytes={have}-", "If-Range": state["version"]}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            _forget(part)
            raise _BrokenError("the server does not have the rest of what was begun") from error
        raise
    with response:
        start, total = _span(response.status, response.headers, have)
        version = _version(response.headers)
        if start and version != state["version"]:
            _forget(part)
            raise _BrokenError("the file on the server is another one than what was begun")
        if response.headers.get_content_type() == "text/html":
            raise UserError(
                f"{url}: the server answers with a web page, not with a file of weights."
            )
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise UserError(
                f"{url} has {total} bytes, but the disk of {part.parent} has {free} free. Make "
                "room, or set FVCORE_CACHE to a folder elsewhere."
            )
        with atomic_write(_state_file(part)) as file:
            json.dump({"url": url, "version": version}, file)
        with part.open("ab") as file:
            file.truncate(start)
            _copy(response, file, start, total, bar=part.stem if progress else "")
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            _forget(part)
        raise _BrokenError(f"the connection ended after {size} of {total} bytes")


def _span(status: int, headers: Mapping[str, str], have: int) -> tuple[int, int | None]:
    """Return the byte that the answer begins with and the size of the file, None if not stated."""
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if found is None or int(found[1]) != have:
            raise _BrokenError(f"an answer for {headers.get('Content-Range')!r}, not byte {have}")
        return have, None if found[2] == "*" else int(found[2])
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _version(headers: email.message.Message) -> str:
    # A weak ETag does not promise equal bytes.
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _copy(
    response: http.client.HTTPResponse, file: IO[bytes], start: int, total: int | None, *, bar: str
) -> None:
    with tqdm(
        total=total, initial=start, desc=bar, unit="B", unit_scale=True, disable=not bar
    ) as shown:
        while block := response.read(_BLOCK):
            file.write(block)
            shown.update(len(block))
