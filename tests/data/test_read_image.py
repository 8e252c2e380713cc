import io
import struct
import zlib

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import ExifTags, Image, PngImagePlugin

from d2ft.data import read_image as reader
from d2ft.data.read_image import READ_ERRORS, is_plain_png, read_image
from tests.conftest import REAL_DATA

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)

# Chunks that go between IHDR and IDAT, with a valid content.
PLAIN_CHUNKS = {
    "gAMA": struct.pack(">I", 100000),
    "cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    "sRGB": b"\0",
    "iCCP": b"icc\0\0" + zlib.compress(b"\0" * 128),
    "sBIT": b"\5\6\5",
    "bKGD": struct.pack(">3H", 255, 0, 255),
    "pHYs": struct.pack(">2IB", 72, 72, 0),
    "tIME": struct.pack(">H5B", 2015, 12, 2, 13, 50, 29),
    "tEXt": b"date:create\x002015-12-02T13:50:29+01:00",
}


@pytest.fixture(params=["imagecodecs", "opencv"])
def _decoder(request, monkeypatch):
    """Read with either decoder, whatever is installed."""
    if request.param == "imagecodecs":
        monkeypatch.setattr(reader, "imagecodecs", pytest.importorskip("imagecodecs"))
    else:
        monkeypatch.setattr(reader, "imagecodecs", None)


def _png(image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, "PNG", **options)
    return file.getvalue()


def _with_chunk(kind, content):
    data = _png()
    body = kind.encode() + content
    chunk = struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def _assert_read_as_detectron2(path):
    for image_format in ("RGB", "BGR", "L", "YUV-BT.601"):
        found = read_image(str(path), image_format)
        assert found.flags.c_contiguous
        expected = detection_utils.read_image(str(path), image_format)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("chunk", PLAIN_CHUNKS)
@pytest.mark.usefixtures("_decoder")
def test_a_png_with_a_plain_chunk_is_read_fast_to_the_same_pixels(tmp_path, chunk):
    data = _with_chunk(chunk, PLAIN_CHUNKS[chunk])
    assert is_plain_png(data)
    (tmp_path / "a.png").write_bytes(data)
    _assert_read_as_detectron2(tmp_path / "a.png")


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 4), (64, 127)])
def test_a_png_of_any_size_is_read_to_the_same_pixels(tmp_path, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert is_plain_png((tmp_path / "a.png").read_bytes())
    _assert_read_as_detectron2(tmp_path / "a.png")


def _turned(name):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    if name == "eXIf":
        return _png(exif=exif)
    text = PngImagePlugin.PngInfo()
    if name == "raw profile":
        content = exif.tobytes()
        text.add_text("Raw profile type exif", f"\nexif\n{len(content)}\n{content.hex()}\n")
    else:
        text.add_itxt(
            "XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
        )
    return _png(pnginfo=text)


@pytest.mark.parametrize("where", ["eXIf", "raw profile", "xmp"])
@pytest.mark.usefixtures("_decoder")
def test_a_turned_png_is_turned_as_in_detectron2(tmp_path, where):
    data = _turned(where)
    assert not is_plain_png(data)
    (tmp_path / "a.png").write_bytes(data)
    _assert_read_as_detectron2(tmp_path / "a.png")


@pytest.mark.parametrize(
    "data",
    [
        _png(Image.fromarray(PIXELS).convert("RGBA")),
        _png(Image.fromarray(PIXELS).convert("L")),
        _png(Image.fromarray(PIXELS).convert("P")),
        _png(transparency=(1, 2, 3)),
        _png()[:-1],
        _png()[:200],
        _png() [:8],
        b"",
        b"no image",
    ],
    ids=["alpha", "grey", "palette", "transparent colour", "one byte short", "half", "head",
         "empty", "text"],
)  # fmt: skip
def test_what_is_no_plain_rgb_is_left_to_pillow(data):
    assert not is_plain_png(data)


def test_a_png_of_too_many_pixels_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert not is_plain_png(_png())


@pytest.mark.usefixtures("_decoder")
def test_a_damaged_png_is_read_as_by_pillow_or_not_at_all(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    for _ in range(150):
        data = bytearray(_png())
        data[rng.integers(33, len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            expected = detection_utils.read_image(str(path), "BGR")
        except READ_ERRORS:
            with pytest.raises(READ_ERRORS):
                read_image(str(path), "BGR")
        else:
            assert np.array_equal(read_image(str(path), "BGR"), expected)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not beside this checkout")
def test_frames_of_cityscapes_and_kitti_are_read_fast():
    for pattern in ("cityscapes/leftImg8bit/train/*/*.png", "kitti/training/image_2/*.png"):
        path = sorted(REAL_DATA.glob(pattern))[0]
        assert is_plain_png(path.read_bytes())
        assert np.array_equal(
            read_image(str(path), "BGR"), detection_utils.read_image(str(path), "BGR")
        )
