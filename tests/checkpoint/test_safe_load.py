import io
import os
import pickle
import pickletools
import re
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from d2ft.checkpoint.safe_load import load_checkpoint_file
from d2ft.checkpoint.safe_pickle import Inert
from d2ft.errors import UserError
from tests.factories import write_mmengine_file

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
ZOO = {"model": {"fc.weight": WEIGHT}, "__author__": "Detectron2 Model Zoo"}


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("the_pickle_was_run",)


def write_pickle(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_torch(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_zoo_pickle_of_every_protocol_gives_its_arrays_as_tensors(tmp_path, protocol):
    path = write_pickle(tmp_path / "model_final.pkl", ZOO, protocol)

    checkpoint = load_checkpoint_file(path)

    assert torch.equal(checkpoint["model"]["fc.weight"], torch.from_numpy(WEIGHT))
    assert checkpoint["__author__"] == "Detectron2 Model Zoo"
    assert not checkpoint.get("matching_heuristics", False)


def test_pickle_written_by_python_2_and_old_numpy_is_read(tmp_path):
    # What cPickle of Python 2.7 writes for {'w': numpy.array([1.0], 'f4')}: raw data in a str.
    old = (
        b"\x80\x02}q\x01U\x01wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87R"
        b"q\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x00\x00\x80?tbs."
    )
    pickletools.dis(old, out=io.StringIO())
    path = tmp_path / "R-50.pkl"
    path.write_bytes(old)

    assert load_checkpoint_file(path)["model"]["w"].tolist() == [1.0]


def test_scalars_and_the_other_byte_order_are_read(tmp_path):
    content = {"model": {"w": WEIGHT.astype(">f4")}, "iteration": np.int64(7)}
    checkpoint = load_checkpoint_file(write_pickle(tmp_path / "a.pkl", content))

    assert torch.equal(checkpoint["model"]["w"], torch.from_numpy(WEIGHT))
    assert checkpoint["iteration"] == 7
    assert np.dtype("f4").isnative


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["model_final.pth", "model_final.pkl"])
def test_torch_file_is_known_by_its_content_whatever_its_name(tmp_path, legacy, name):
    path = write_torch(
        tmp_path / name, {"model": {"w": torch.ones(2)}, "iteration": 3}, legacy=legacy
    )

    checkpoint = load_checkpoint_file(path)

    assert checkpoint["model"]["w"].tolist() == [1.0, 1.0]
    assert checkpoint["iteration"] == 3


def test_bare_state_dict_becomes_the_model_and_keeps_its_version_metadata(tmp_path):
    path = write_torch(tmp_path / "bare.pth", torch.nn.BatchNorm2d(2).state_dict())

    checkpoint = load_checkpoint_file(path)

    assert "running_mean" in checkpoint["model"]
    assert checkpoint["model"]._metadata[""] == {"version": 2}


def test_prefix_of_data_parallel_wrappers_is_removed(tmp_path):
    state = OrderedDict({"module.w": torch.ones(1), "module.b": torch.ones(1)})
    checkpoint = load_checkpoint_file(write_torch(tmp_path / "ddp.pth", {"model": state}))

    assert list(checkpoint["model"]) == ["w", "b"]


def test_caffe2_blobs_are_marked_for_name_matching_without_their_momentum(tmp_path):
    content = {"blobs": {"conv1_w": WEIGHT, "conv1_w_momentum": WEIGHT}, "cfg": "MODEL: ..."}
    checkpoint = load_checkpoint_file(write_pickle(tmp_path / "model_final.pkl", content))

    assert list(checkpoint["model"]) == ["conv1_w"]
    assert checkpoint["__author__"] == "Caffe2"
    assert checkpoint["matching_heuristics"] is True


def test_pycls_file_is_marked_for_name_matching_without_its_counters(tmp_path):
    state = {"stem.w": torch.ones(1), "stem.bn.num_batches_tracked": torch.tensor(5)}
    checkpoint = load_checkpoint_file(
        write_torch(tmp_path / "RegNetX.pyth", {"model_state": state})
    )

    assert list(checkpoint["model"]) == ["stem.w"]
    assert checkpoint["__author__"] == "pycls"
    assert checkpoint["matching_heuristics"] is True


def save_with_code(path: Path, kind: str) -> Path:
    content = {"model": {"w": torch.ones(1) if kind != "pickle" else WEIGHT}, "x": RunsCode()}
    if kind == "pickle":
        return write_pickle(path, content)
    return write_torch(path, content, legacy=kind == "legacy torch")


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy torch"])
def test_foreign_global_is_refused_by_name_and_nothing_is_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = save_with_code(tmp_path / "hostile.pth", kind)

    with pytest.raises(UserError, match=r"hostile\.pth.*(posix|nt)\.mkdir.*[Nn]othing.*was run"):
        load_checkpoint_file(path)

    assert not Path("the_pickle_was_run").exists()


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (b"cos\nsystem\n(S'touch x'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0ccore.records\x93.", "numpy.core.records"),
        (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
        (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
    ],
)
def test_hand_written_pickle_that_reaches_for_a_function_is_refused(tmp_path, program, name):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(program)

    with pytest.raises(UserError, match=f"asks for '{name}'"):
        load_checkpoint_file(path)


def test_pickle_cannot_change_the_number_types_that_all_of_numpy_shares(tmp_path):
    path = tmp_path / "hostile.pkl"
    # dtype('f4', copy=False) with an item size of 2.
    path.write_bytes(
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x89\x87R(K\x03X\x01\x00\x00\x00<NNNK\x02"
        b"K\x02K\x00tb."
    )

    with pytest.raises(UserError, match="a number type with the state"):
        load_checkpoint_file(path)

    assert np.dtype("f4").itemsize == 4


def test_array_of_objects_is_refused(tmp_path):
    content = {"model": {"w": np.array([{}], dtype=object)}}
    path = write_pickle(tmp_path / "objects.pkl", content)

    with pytest.raises(UserError, match=r"objects\.pkl.*'O8', which is not a number type"):
        load_checkpoint_file(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth: there is no such file"):
        load_checkpoint_file(tmp_path / "gone.pth")


def test_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_checkpoint_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"the file is empty"),
        (b"<!DOCTYPE html>\n<html>404</html>", r"a web page \('<!DOCTYPE html>'\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid 1", r"a text file \('version https"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)), r"in no format that is known here"),
        (b"PK\x03\x04" + bytes(40), r"most likely it is truncated"),
    ],
)
def test_file_that_is_no_checkpoint_is_refused_with_what_it_is(tmp_path, content, reason):
    path = tmp_path / "model.pth"
    path.write_bytes(content)

    with pytest.raises(UserError, match=rf"model\.pth: .*{reason}"):
        load_checkpoint_file(path)


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy torch"])
def test_truncated_file_is_refused(tmp_path, kind):
    big = np.zeros(5000, dtype=np.float32)
    path = tmp_path / "half.pth"
    if kind == "pickle":
        write_pickle(path, {"model": {"w": big}})
    else:
        write_torch(path, {"model": {"w": torch.from_numpy(big)}}, legacy=kind != "torch")
    path.write_bytes(path.read_bytes()[:8000])

    with pytest.raises(UserError, match=r"half\.pth: .*truncated or damaged"):
        load_checkpoint_file(path)


def test_zip_of_another_program_is_refused(tmp_path):
    path = tmp_path / "arrays.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"123")

    with pytest.raises(UserError, match=r"arrays\.pth: PyTorch cannot read the file"):
        load_checkpoint_file(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(1)], r"holds a list where a checkpoint holds a dictionary"),
        ({"network": {"w": torch.ones(1)}, "meta": {}}, r"no tensors.*'network', 'meta'"),
        ({"model": {}}, r"no tensors by name. Its keys: none"),
        ({"model": {"w": torch.ones(1), "epoch": 3}}, r"'epoch' is a int where a model holds"),
        ({"model": {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}}, r"'b' holds NaN"),
        ({"model": {"w": torch.tensor(float("inf"))}}, r"'w' holds NaN or infinite"),
    ],
)
def test_content_that_is_no_model_is_refused_with_the_reason(tmp_path, content, reason):
    path = write_torch(tmp_path / "odd.pth", content)

    with pytest.raises(UserError, match=rf"odd\.pth: .*{reason}"):
        load_checkpoint_file(path)


def test_state_dict_of_mmdetection_becomes_the_model_and_keeps_its_meta(tmp_path):
    content = {"meta": {"CLASSES": ("car",)}, "state_dict": {"neck.w": torch.ones(1)}}
    checkpoint = load_checkpoint_file(write_torch(tmp_path / "epoch_12.pth", content))

    assert list(checkpoint["model"]) == ["neck.w"]
    assert checkpoint["meta"] == {"CLASSES": ("car",)}


@pytest.mark.parametrize("legacy", [False, True])
def test_training_history_of_mmengine_is_left_out_and_the_weights_are_read(tmp_path, legacy):
    path = write_mmengine_file(tmp_path / "epoch_1.pth", legacy=legacy)

    checkpoint = load_checkpoint_file(path)

    assert checkpoint["model"]["neck.w"].tolist() == [1.0, 1.0]
    history = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, Inert)
    assert vars(history) == {}


def test_arrays_beside_a_training_history_do_not_pass_for_weights(tmp_path):
    path = write_mmengine_file(tmp_path / "epoch_1.pth", weight=WEIGHT)

    with pytest.raises(UserError, match=r"epoch_1\.pth: asks for 'numpy"):
        load_checkpoint_file(path)


def test_code_beside_a_training_history_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_mmengine_file(tmp_path / "epoch_1.pth", extra=RunsCode())

    with pytest.raises(UserError, match=r"(posix|nt)\.mkdir.*Nothing in the file was run"):
        load_checkpoint_file(path)

    assert not Path("the_pickle_was_run").exists()


def test_safetensors_are_read(tmp_path):
    save_file({"fc.weight": torch.from_numpy(WEIGHT)}, tmp_path / "model.safetensors")

    checkpoint = load_checkpoint_file(tmp_path / "model.safetensors")

    assert torch.equal(checkpoint["model"]["fc.weight"], torch.from_numpy(WEIGHT))


def test_safetensors_without_the_package_say_how_to_get_it(tmp_path, monkeypatch):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)

    with pytest.raises(UserError, match=r"model\.safetensors: .*pip install safetensors"):
        load_checkpoint_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_truncated_safetensors_are_refused(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    save_file({f"layer{i}.w": torch.ones(2) for i in range(20)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])

    with pytest.raises(UserError, match=r"model\.safetensors: .*(damaged|no format)"):
        load_checkpoint_file(path)


def peak_memory(function) -> int:
    """Return the bytes that Python's allocator hands out at most while ``function`` runs."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(path.name)}: .*{reason}"):
        load_checkpoint_file(path)


def rewrite_archive(path: Path, change, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = write_torch(tmp_path / "bomb.pth", {"model": {"w": torch.zeros(8_000_000)}})
    rewrite_archive(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000

    assert peak_memory(lambda: refuse(path, "unpacks to 32.*nothing was unpacked")) < 1_000_000


@pytest.mark.parametrize("legacy", [False, True])
def test_storage_that_states_more_than_the_file_holds_is_refused(tmp_path, legacy):
    path = write_torch(tmp_path / "big.pth", {"model": {"w": torch.ones(300)}}, legacy=legacy)

    def enlarge(name: str, content: bytes) -> bytes:
        return (
            content.replace(b"M\x2c\x01", b"J\xff\xff\xff\x7f") if "data.pkl" in name else content
        )

    if legacy:
        path.write_bytes(enlarge("data.pkl", path.read_bytes()))
    else:
        rewrite_archive(path, enlarge)
    refuse(path, r"states a storage '\d+' of 8589934588 bytes.*Nothing was loaded")


def test_record_that_is_shorter_than_its_storage_is_refused(tmp_path):
    # PyTorch itself reads on behind the record.
    path = write_torch(tmp_path / "short.pth", {"model": {"w": torch.ones(300)}})
    rewrite_archive(path, lambda name, content: b"" if "/data/" in name else content)

    refuse(path, "storage '0' of 1200 bytes")


def test_small_storage_that_is_repeated_to_an_absurd_size_is_refused(tmp_path):
    path = write_torch(tmp_path / "a.pth", {"model": {"w": torch.ones(1).expand(1 << 40)}})

    refuse(path, r"'w' claims the shape \(1099511627776,\)")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.empty(1 << 40, device="meta"),
        torch.ones(2).to(torch.float8_e4m3fn),
    ],
    ids=["sparse", "meta", "float8"],
)
def test_tensor_without_dense_values_is_refused(tmp_path, tensor):
    refuse(write_torch(tmp_path / "a.pth", {"model": {"w": tensor}}), "'w' is not a plain tensor")


@pytest.mark.parametrize(
    "program",
    [
        # ndarray((2**30,)), _reconstruct(ndarray, (2**30,), 'b'), and 2**40 bytes that are not there
        b"\x80\x02cnumpy\nndarray\nJ\x00\x00\x00\x40\x85\x85R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\x00\x00\x00\x40\x85"
        b"U\x01b\x87R.",
        b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    ],
)
def test_small_pickle_cannot_reserve_much_memory(tmp_path, program):
    path = tmp_path / "big.pkl"
    path.write_bytes(program)

    assert peak_memory(lambda: refuse(path, "")) < 1_000_000


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_key_whose_hash_would_take_years_is_refused(tmp_path, kind):
    nested = ()
    for _ in range(60):
        nested = (nested, nested)
    # pickle needs the hash itself to write such a dictionary, so the key is put in afterwards.
    program = pickle.dumps(nested, 2)[2:-1]
    program = b"\x80\x02}" + program + b"K\x01s."
    path = tmp_path / "slow.pth"
    if kind == "pickle":
        path.write_bytes(program)
    else:
        write_torch(path, {"model": {"w": torch.ones(1)}})
        rewrite_archive(path, lambda name, old: program if name.endswith("data.pkl") else old)

    refuse(path, "a tuple as the key of a dictionary")
