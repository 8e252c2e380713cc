import pickle

import numpy as np
import pytest
import torch

from d2ft.checkpoint.class_names import check_class_names, known_classes
from d2ft.checkpoint.head_remap import HeadInit
from d2ft.checkpoint.load_report import compare_shapes
from d2ft.checkpoint.weights import (
    build_head_init,
    build_load_report,
    fetch_weights,
    read_weights,
)
from d2ft.config import load_cfg
from d2ft.errors import UserError
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES, COCO_CLASSES

SCORES = {"roi_heads.box_predictor.cls_score.weight": (3, 4)}
TWO_CLASSES = compare_shapes(SCORES, SCORES, source="weights.pth")


def test_missing_weights_are_named_with_their_key():
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS gone/model\.pth does not exist"):
        fetch_weights("gone/model.pth")


def test_folder_as_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"MODEL\.WEIGHTS {tmp_path} is a folder"):
        fetch_weights(str(tmp_path))


def test_failed_download_names_the_url_and_the_way_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    url = "http://127.0.0.1:9/model_final.pkl"

    with pytest.raises(UserError, match=rf"{url} cannot be downloaded.*refused.*local file"):
        fetch_weights(url)

    assert not list(tmp_path.rglob("*.pkl"))


def test_zoo_address_without_network_is_named_as_the_user_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))

    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS detectron2://COCO-D/x\.pkl: .* cannot be"):
        fetch_weights("detectron2://COCO-D/x.pkl")


def test_unknown_catalog_entry_and_scheme_are_refused():
    with pytest.raises(UserError, match=r"catalog://nothing is neither a URL nor in Detectron2"):
        fetch_weights("catalog://nothing")
    with pytest.raises(UserError, match=r"no downloader is known for zoo://"):
        fetch_weights("zoo://model.pkl")


def test_query_asks_for_name_matching(tmp_path):
    path = tmp_path / "r50.pth"
    torch.save({"stem.weight": torch.ones(2, 3)}, path)
    source = f"{path}?matching_heuristics=True"
    model = {"backbone.bottom_up.stem.weight": (2, 3), "backbone.fpn_output2.weight": (1,)}

    report = build_load_report(model, read_weights(source), source)

    assert report.loaded == ("backbone.bottom_up.stem.weight",)
    assert report.missing == ("backbone.fpn_output2.weight",)


def test_unknown_query_is_refused(tmp_path):
    path = tmp_path / "r50.pth"
    torch.save({"w": torch.ones(1)}, path)

    with pytest.raises(UserError, match=r"unknown query colour.*\?matching_heuristics=True"):
        read_weights(f"{path}?colour=red")


def test_caffe2_names_and_background_row_are_converted_as_detectron2_does(tmp_path):
    path = tmp_path / "e2e_mask_rcnn.pkl"
    blobs = {"conv1_w": np.ones((4, 3)), "cls_score_w": np.ones((3, 4)), "fc1000_w": np.ones(2)}
    path.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    model = {"backbone.bottom_up.stem.conv1.weight": (4, 3), **SCORES}

    report = build_load_report(model, read_weights(str(path)), str(path))

    assert report.loaded == tuple(model)
    assert report.unexpected == ("fc1000.weight",)


def test_ambiguous_foreign_names_are_refused_with_the_file():
    checkpoint = {"model": {"w": torch.ones(1)}, "matching_heuristics": True}

    with pytest.raises(UserError, match=r"odd\.pkl: its names cannot be matched"):
        build_load_report({"a.w": (1,), "b.w": (1,)}, checkpoint, "odd.pkl")


def test_class_names_come_from_the_file_then_the_zoo_then_the_user():
    own = {"d2ft": {"format": 1, "thing_classes": ["car", "bus"]}}
    zoo = "detectron2://COCO-Detection/x/1/model_final.pkl"

    assert known_classes(own, zoo, ("cat",)) == ("car", "bus")
    assert known_classes({}, zoo, ("cat",)) == COCO_CLASSES
    assert known_classes({}, "x.pkl", ("cat",)) == ("cat",)
    assert known_classes({}, "x.pkl") is None
    assert known_classes({"d2ft": "something else"}, "x.pkl") is None


def test_rows_of_the_same_classes_load_whatever_the_spelling():
    assert (
        check_class_names(
            TWO_CLASSES, ("Traffic_Light", "stop-sign"), ("traffic light", "stop sign")
        )
        == ""
    )


@pytest.mark.parametrize(
    ("in_file", "first_pair"),
    [
        (("bus", "car"), 'row 0: "bus" in the file, "car" in the training set'),
        (("car", "truck"), 'row 1: "truck" in the file, "bus" in the training set'),
        (("car",), 'row 1: no class in the file, "bus" in the training set'),
    ],
)
def test_rows_of_other_classes_are_refused_with_the_first_pair(in_file, first_pair):
    with pytest.raises(UserError, match=rf"weights\.pth.*{first_pair}.*HEAD_INIT remap.*SOURCE_"):
        check_class_names(TWO_CLASSES, in_file, ("car", "bus"))


def test_checkpoint_to_be_evaluated_is_not_said_to_be_remapped():
    with pytest.raises(UserError) as refusal:
        check_class_names(TWO_CLASSES, ("bus", "car"), ("car", "bus"), every_tensor=True)

    assert "remap" not in str(refusal.value)


def test_rows_that_alias_or_map_say_are_the_same_class_load_by_position():
    in_file, in_set = ("motorcycle", "person"), ("motorbike", "rider")

    assert check_class_names(TWO_CLASSES, in_file, in_set, class_map={"rider": "person"}) == ""


def test_rows_without_known_names_load_with_a_warning():
    warning = check_class_names(TWO_CLASSES, None, ("car", "bus"))

    assert "its 2 class rows were matched by position" in warning
    assert "FINETUNE.SOURCE_CLASSES" in warning


def test_names_do_not_matter_where_no_rows_are_loaded():
    skipped = compare_shapes(
        {"roi_heads.box_predictor.cls_score.weight": (9, 4)}, SCORES, source="weights.pth"
    )

    assert check_class_names(skipped, ("dog", "cat"), ("car", "bus")) == ""


BODY = {"backbone.bottom_up.stem.weight": (2, 3)}


def scores(num_classes):
    return {**BODY, "roi_heads.box_predictor.cls_score.weight": (num_classes + 1, 4)}


def report_of(file, model, file_classes, thing_classes, **head_init):
    checkpoint = {"model": {name: torch.empty(shape) for name, shape in file.items()}}
    return build_load_report(
        model,
        checkpoint,
        "weights.pth",
        thing_classes=thing_classes,
        file_classes=file_classes,
        head_init=HeadInit(**head_init),
    )


def test_skipped_rows_whose_names_are_known_come_with_what_remap_would_keep():
    report = report_of(scores(80), scores(8), COCO_CLASSES, CITYSCAPES_INSTANCE_CLASSES)

    assert report.notes == ("7 of 8 classes have COCO rows: FINETUNE.HEAD_INIT remap keeps them.",)
    assert report.format_table(8).endswith(report.notes[0])
    assert report.to_dict()["notes"] == list(report.notes)


def test_skipped_rows_of_other_classes_are_not_called_coco():
    report = report_of(scores(3), scores(2), ("a", "b", "c"), ("c", "d"))
    assert report.notes[0].startswith("1 of 2 classes have rows in the file")

    assert report_of(scores(3), scores(2), ("a", "b", "c"), ("d", "e")).notes == ()
    assert report_of(scores(3), scores(2), COCO_CLASSES, ("car", "bus")).notes == ()


@pytest.mark.parametrize("remap", [False, True])
def test_skipped_rows_without_names_come_with_the_way_to_give_them(remap):
    report = report_of(scores(80), scores(8), None, CITYSCAPES_INSTANCE_CLASSES, remap=remap)

    assert [tensor.name for tensor in report.skipped] == [
        "roi_heads.box_predictor.cls_score.weight"
    ]
    assert (report.remapped, report.classes) == ((), ())
    assert "FINETUNE.SOURCE_CLASSES can give them" in report.notes[0]


def test_equal_shapes_of_other_classes_are_remapped_by_name():
    report = report_of(scores(2), scores(2), ("bus", "car"), ("car", "bus"), remap=True)

    assert [start.source_row for start in report.classes] == [1, 0]
    assert report.loaded == tuple(BODY)
    assert check_class_names(report, ("bus", "car"), ("car", "bus")) == ""


def test_remap_that_cannot_keep_rows_says_why():
    narrow = {**BODY, "roi_heads.box_predictor.cls_score.weight": (3, 2)}
    report = report_of(scores(2), narrow, ("car", "bus"), ("car", "bus"), remap=True)

    assert report.classes == ()
    assert "differ in more than the number of classes" in report.notes[0]


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        (
            80,
            2,
            r"weights\.pth is known to have 3 classes \(a, b, c\).*is \(81, 4\).*SOURCE_CLASSES",
        ),
        (3, 5, r"the training set has 2 classes \(a, d\).*is \(6, 4\).*under MODEL"),
    ],
)
def test_names_that_do_not_fit_the_number_of_rows_are_refused(file, model, message):
    with pytest.raises(UserError, match=message):
        report_of(scores(file), scores(model), ("a", "b", "c"), ("a", "d"), remap=True)


def test_head_init_is_what_the_config_says():
    assert build_head_init(load_cfg(None)) == HeadInit(seed=-1)
    options = ["FINETUNE.HEAD_INIT", "remap", "FINETUNE.UNMATCHED", "matched", "SEED", "3",
               "FINETUNE.CLASS_MAP.traffic light", "stop sign", "FINETUNE.CLASS_MAP.one", "1"]  # fmt: skip
    assert build_head_init(load_cfg(None, options)) == HeadInit(
        remap=True,
        class_map={"traffic light": "stop sign", "one": "1"},
        unmatched="matched",
        seed=3,
    )
