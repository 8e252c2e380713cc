import multiprocessing
import os

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft.data.columns import build_columns
from d2ft.data.record_store import RecordFile, StoredRecords, columns_of, write_record_file
from d2ft.errors import UserError

annotations = st.builds(
    lambda box, mode, category, extra: {
        "bbox": box, "bbox_mode": mode, "category_id": category, **extra,
    },
    st.lists(st.floats(-5, 300), min_size=4, max_size=4),
    st.sampled_from([BoxMode.XYXY_ABS, BoxMode.XYWH_ABS]),
    st.integers(0, 9),
    st.sampled_from(
        [
            {}, {"iscrowd": 1, "segmentation": {"size": [2, 3], "counts": "06"}}, {"ignore": 1},
            {"iscrowd": 0, "segmentation": [[0.1, 0.2, 0.3, 4.0, 5.0, 6.0]]},
            {"segmentation": []}, {"keypoints": [1.5, 2.5, 2]},
        ]
    ),
)  # fmt: skip
records_of_any_kind = st.lists(
    st.builds(
        lambda name, size, found, extra: {"file_name": name, **size, **found, **extra},
        st.sampled_from(["a.png", "é/b c.jpg", "\udcff.png", ""]),
        st.sampled_from([{}, {"height": 3, "width": 4}, {"height": 3, "width": None}]),
        st.builds(lambda a: {"annotations": a}, st.lists(annotations, max_size=4)) | st.just({}),
        st.sampled_from([{}, {"image_id": 7}, {"image_id": "x", "note": [1, "two", None]}]),
    ),
    max_size=6,
)


def _stored(folder, records, name="set.records"):
    with open(folder / name, "wb") as file:
        write_record_file(file, records, {"key": name})
    return StoredRecords([RecordFile(folder / name)])


def _record(number, annotations=1, category=0, crowd=0):
    box = {"bbox": [0.0, 0.0, 2.0, 2.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
    return {
        "file_name": f"{number}.png",
        "height": 4,
        "width": 3 + number,
        "annotations": [{**box, "iscrowd": crowd} for _ in range(annotations)],
    }


def _assert_same_columns(found, expected):
    for name, values in vars(expected).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
            assert getattr(found, name).dtype == values.dtype, name
        else:
            assert getattr(found, name) == values, name


@settings(max_examples=100, deadline=None)
@given(records=records_of_any_kind)
def test_a_file_gives_the_dicts_and_columns_that_were_written(tmp_path_factory, records):
    stored = _stored(tmp_path_factory.mktemp("store"), records)
    assert list(stored) == records
    assert [stored[i] for i in range(-len(records), 0)] == records
    assert stored[1:4] == records[1:4]
    assert all(
        isinstance(annotation["bbox_mode"], BoxMode)
        for record in stored
        for annotation in record.get("annotations", ())
    )
    _assert_same_columns(columns_of(stored), build_columns(records))
    with pytest.raises(IndexError):
        stored[len(records)]


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(records_of_any_kind, min_size=1, max_size=3), data=st.data())
def test_parts_and_choices_of_them_are_those_of_lists(tmp_path_factory, parts, data):
    folder = tmp_path_factory.mktemp("store")
    stored, lists = [], []
    for number, records in enumerate(parts):
        keep = data.draw(st.lists(st.booleans(), min_size=len(records), max_size=len(records)))
        part = _stored(folder, records, f"{number}.records")
        if data.draw(st.booleans()):
            part = part.where(np.array(keep, dtype=bool))
            records = [record for record, kept in zip(records, keep, strict=True) if kept]
        stored.append(part)
        lists += records
    joined = StoredRecords.join(stored)
    assert list(joined) == lists
    _assert_same_columns(columns_of(joined), build_columns(lists))
    again = data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists)))
    chosen = joined.where(np.array(again, dtype=bool))
    expected = [record for record, kept in zip(lists, again, strict=True) if kept]
    assert list(chosen) == expected
    _assert_same_columns(columns_of(chosen), build_columns(expected))


def test_each_access_gives_a_dict_of_its_own(tmp_path):
    stored = _stored(tmp_path, [_record(0)])
    stored[0]["annotations"].clear()
    assert stored[0] == _record(0)


def _send_last(records, connection):
    connection.send((records[-1], records.about))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_file_although_its_name_is_gone(tmp_path, method):
    stored = _stored(tmp_path, [_record(number) for number in range(4)])
    stored = stored.where(np.array([True, False, True, False]))
    os.unlink(tmp_path / "set.records")
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_last, args=(stored, theirs))
    process.start()
    assert ours.recv() == (_record(2), {"key": "set.records"})
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -20])
def test_a_file_that_was_cut_off_is_no_such_file(tmp_path, kept):
    _stored(tmp_path, [_record(number) for number in range(4)])
    path = tmp_path / "set.records"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"it has \d+ bytes|not whole"):
        RecordFile(path)


@pytest.mark.parametrize("damage", [b"\x00", b"]", b"9"])
def test_a_damaged_record_is_named_with_its_file(tmp_path, damage):
    _stored(tmp_path, [_record(0), _record(1)])
    path = tmp_path / "set.records"
    content = path.read_bytes()
    at = content.index(b'"bbox_mode": 0', 150) + len(b'"bbox_mode": ')
    path.write_bytes(content[:at] + damage + content[at + 1 :])
    stored = StoredRecords([RecordFile(path)])
    assert stored[0] == _record(0)
    with pytest.raises(UserError, match=r"set\.records is damaged at record 1 .*remove it"):
        stored[1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"height": 3}, "record 1 has no file_name"),
        ({**_record(7), "annotations": [{"bbox": [1, 2, 3, 4]}]}, "7.png has an annotation"),
        ({**_record(7), "annotations": [{"bbox": [1, 2, 3]}]}, "a bbox of four numbers"),
    ],
)
def test_records_without_what_columns_need_are_refused(tmp_path, record, message):
    for make in (build_columns, lambda records: _stored(tmp_path, records)):
        with pytest.raises(UserError, match=message):
            make([_record(0), record])
