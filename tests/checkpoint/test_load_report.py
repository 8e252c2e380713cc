import json

import pytest

from d2ft.checkpoint.coverage import check_coverage
from d2ft.checkpoint.head_remap import ClassStart, find_class_rows
from d2ft.checkpoint.load_report import (
    LoadReport,
    SkippedTensor,
    compare_shapes,
    is_final_predictor,
)
from d2ft.errors import UserError

# A Mask R-CNN R50-FPN in miniature: one tensor or two for each of its parts.
BODY = {
    "backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7),
    "backbone.bottom_up.res2.0.conv1.weight": (64, 64, 1, 1),
    "backbone.fpn_lateral2.weight": (256, 256, 1, 1),
    "proposal_generator.rpn_head.conv.weight": (256, 256, 3, 3),
    "roi_heads.box_head.fc1.weight": (1024, 12544),
    "roi_heads.mask_head.mask_fcn1.weight": (256, 256, 3, 3),
}
PREDICTORS = (
    "roi_heads.box_predictor.cls_score.weight",
    "roi_heads.box_predictor.cls_score.bias",
    "roi_heads.box_predictor.bbox_pred.weight",
    "roi_heads.box_predictor.bbox_pred.bias",
    "roi_heads.mask_head.predictor.weight",
    "roi_heads.mask_head.predictor.bias",
)


def mask_rcnn(num_classes: int) -> dict[str, tuple[int, ...]]:
    k = num_classes
    shapes = ((k + 1, 1024), (k + 1,), (4 * k, 1024), (4 * k,), (k, 256, 1, 1), (k,))
    return {**BODY, **dict(zip(PREDICTORS, shapes, strict=True))}


def compare(model, file, **extra) -> LoadReport:
    return compare_shapes(model, file, source="model_final.pkl", **extra)


def without(shapes, *prefixes):
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefixes)}


def test_other_class_count_skips_exactly_the_six_final_predictors():
    report = compare(mask_rcnn(8), mask_rcnn(80))

    assert [tensor.name for tensor in report.skipped] == list(PREDICTORS)
    assert report.skipped[0] == SkippedTensor(PREDICTORS[0], (81, 1024), (9, 1024))
    assert report.loaded == tuple(BODY)
    assert (report.missing, report.unexpected, report.surprises) == ((), (), ())
    check_coverage(report, every_tensor=False)


def test_table_tells_a_person_that_new_predictors_are_expected():
    lines = compare(mask_rcnn(8), mask_rcnn(80)).format_table(num_classes=8).splitlines()

    assert lines[0] == "loaded 6 of 12 tensors from model_final.pkl"
    assert "the 6 final predictors were re-initialised for 8 classes: expected" in lines
    rows = {" ".join(line.split()) for line in lines}
    assert "part loaded skipped missing" in rows
    assert "backbone.bottom_up 2 0 0" in rows
    assert "final predictors 0 6 0" in rows
    assert "roi_heads.mask_head.predictor.bias (80,) (8,)" in rows
    assert not any("ATTENTION" in line for line in lines)


def test_tensor_that_is_no_predictor_and_was_not_loaded_is_pointed_out_by_name():
    file = without(mask_rcnn(80), "roi_heads.mask_head.mask_fcn1")
    report = compare(mask_rcnn(8), file)
    table = report.format_table(num_classes=8)

    assert report.surprises == ("roi_heads.mask_head.mask_fcn1.weight",)
    assert "ATTENTION: 1 tensors that are not final predictors were NOT loaded" in table
    assert "roi_heads.mask_head.mask_fcn1.weight" in table
    assert "classes: expected" not in table


def test_full_load_has_nothing_to_explain():
    table = compare(mask_rcnn(8), mask_rcnn(8)).format_table(num_classes=8)

    assert table.startswith("loaded 12 of 12 tensors")
    assert "re-initialised" not in table
    assert "not used" not in table


def test_differences_that_detectron2_expects_are_ignored_with_their_reason():
    model = {**mask_rcnn(8), "pixel_mean": (3, 1, 1), "bn.num_batches_tracked": ()}
    file = {**mask_rcnn(8), "proposal_generator.anchor_generator.cell_anchors.0": (3, 4)}
    report = compare(model, file)

    assert (report.missing, report.unexpected) == ((), ())
    assert [tensor.name for tensor in report.ignored] == [
        "bn.num_batches_tracked",
        "pixel_mean",
        "proposal_generator.anchor_generator.cell_anchors.0",
    ]
    assert "ignored 1 (set from MODEL.PIXEL_MEAN and PIXEL_STD)" in report.format_table(8)
    check_coverage(report, every_tensor=True)


def test_unexpected_tensors_are_counted_and_the_first_named():
    file = {**mask_rcnn(8), **{f"extra.{number}": (1,) for number in range(12)}}
    table = compare(mask_rcnn(8), file).format_table(8)

    assert "12 tensors of the file are not used by the model: extra.0, extra.1" in table
    assert "extra.5 and 6 more" in table


def test_json_says_what_the_table_says(tmp_path):
    path = tmp_path / "output" / "load_report.json"
    report = compare(mask_rcnn(8), mask_rcnn(80), sha256="ab" * 32)
    report.write(path)

    content = json.loads(path.read_text(encoding="utf-8"))
    assert content == report.to_dict()
    assert content["sha256"] == "ab" * 32
    assert content["counts"] == {
        "model": 12, "loaded": 6, "remapped": 0, "skipped": 6, "missing": 0, "unexpected": 0, "ignored": 0,
    }  # fmt: skip
    assert content["skipped"][1] == {
        "name": "roi_heads.box_predictor.cls_score.bias",
        "file_shape": [81],
        "model_shape": [9],
    }


@pytest.mark.parametrize("change", ["missing", "skipped"])
def test_one_missing_tensor_of_the_backbone_is_refused(change):
    name = "backbone.bottom_up.res2.0.conv1.weight"
    file = without(mask_rcnn(80), name)
    if change == "skipped":
        file[name] = (256, 64, 1, 1)
    report = compare(mask_rcnn(8), file)

    with pytest.raises(UserError, match=rf"model_final\.pkl does not fit.*1 of.*{name}.*config"):
        check_coverage(report, every_tensor=False)


def test_refusal_shows_both_shapes():
    file = {**mask_rcnn(80), "backbone.bottom_up.stem.conv1.weight": (32, 3, 7, 7)}

    with pytest.raises(UserError, match=r"\(file \(32, 3, 7, 7\), model \(64, 3, 7, 7\)\)"):
        check_coverage(compare(mask_rcnn(8), file), every_tensor=False)


@pytest.mark.parametrize(("given", "refused"), [(1, True), (2, False)])
def test_model_without_bottom_up_needs_half_of_its_tensors(given, refused):
    model = {f"layer{number}.weight": (3,) for number in range(4)}
    report = compare(model, dict(list(model.items())[:given]))

    if refused:
        with pytest.raises(UserError, match=r"does not fit the model: 3 of .*layer1\.weight"):
            check_coverage(report, every_tensor=False)
    else:
        check_coverage(report, every_tensor=False)


def test_evaluation_needs_every_tensor_and_says_where_to_find_them():
    report = compare(mask_rcnn(8), mask_rcnn(80))

    with pytest.raises(
        UserError,
        match=r"6 tensors.*cls_score\.weight.*MODEL\.WEIGHTS <OUTPUT_DIR>/model_final\.pth.*--resume",
    ):
        check_coverage(report, every_tensor=True)


def test_imagenet_backbone_may_leave_all_heads_fresh():
    model = mask_rcnn(8)
    file = {name: shape for name, shape in model.items() if name.startswith("backbone.bottom")}
    report = compare(model, file, backbone_only=True)

    assert report.surprises == ()
    assert "backbone only: heads start fresh" in report.format_table(8)
    check_coverage(report, every_tensor=False)


def test_imagenet_backbone_that_lacks_a_part_of_a_plain_backbone_is_refused():
    model = {"backbone.stem.weight": (1,), "backbone.res2.weight": (1,), "roi_heads.x": (1,)}
    report = compare(model, {"backbone.stem.weight": (1,)}, backbone_only=True)

    with pytest.raises(UserError, match=r"1 of the tensors.*backbone\.res2\.weight"):
        check_coverage(report, every_tensor=False)


@pytest.mark.parametrize(
    ("name", "final"),
    [
        *((name, True) for name in PREDICTORS),
        ("roi_heads.box_predictor.2.cls_score.bias", True),
        ("head.cls_score.weight", True),
        ("head.bbox_pred.weight", False),
        ("head.cls_subnet.0.weight", False),
        ("roi_heads.mask_head.deconv.weight", False),
        ("proposal_generator.rpn_head.objectness_logits.weight", False),
    ],
)
def test_final_predictors_are_those_with_rows_per_class(name, final):
    assert is_final_predictor(name) is final


def test_classes_meet_by_position_only_where_score_rows_are_loaded():
    agnostic = {"roi_heads.box_predictor.bbox_pred.weight": (4, 1024)}

    assert compare(mask_rcnn(8), mask_rcnn(8)).matches_classes_by_position
    assert not compare(mask_rcnn(8), mask_rcnn(80)).matches_classes_by_position
    assert not compare(
        {**mask_rcnn(8), **agnostic}, {**mask_rcnn(80), **agnostic}
    ).matches_classes_by_position


def test_a_file_without_statistics_of_norm_layers_is_complete():
    model = {"backbone.bottom_up.conv.weight": (1,), "backbone.bottom_up.norm.running_var": (1,)}
    file = {"backbone.bottom_up.conv.weight": (1,)}
    report = compare_shapes(model, file, source="R-50.pkl")
    assert report.missing == ()
    assert [tensor.name for tensor in report.ignored] == ["backbone.bottom_up.norm.running_var"]
    check_coverage(report, every_tensor=False)


def remapped_report() -> LoadReport:
    starts = [ClassStart("car", "Car", 2, "copied"), ClassStart("rider", None, None, "fresh")]
    model, file = mask_rcnn(2), mask_rcnn(80)
    return compare(model, file, class_rows=find_class_rows(file, model, 80, 2), classes=starts)


def test_remapped_tensors_are_neither_loaded_nor_skipped():
    report = remapped_report()

    assert tuple(tensor.name for tensor in report.remapped) == PREDICTORS
    assert report.loaded == tuple(BODY)
    assert (report.skipped, report.not_loaded) == ((), ())
    assert report.model_size == 12
    assert not report.matches_classes_by_position
    check_coverage(report, every_tensor=False)


def test_table_and_json_say_where_each_class_comes_from():
    report = remapped_report()
    rows = {" ".join(line.split()) for line in report.format_table(2).splitlines()}

    assert "part loaded remapped skipped missing" in rows
    assert "final predictors 0 6 0 0" in rows
    assert "the 6 final predictors below start from the file's rows of 1 of 2 classes:" in rows
    assert "car Car (row 2)" in rows
    assert "rider none: fresh" in rows
    assert "roi_heads.box_predictor.bbox_pred.bias: (320,) -> (8,)" in rows
    content = report.to_dict()
    assert content["counts"]["remapped"] == 6
    assert content["classes"] == [
        {"name": "car", "source": "Car", "source_row": 2, "start": "copied"},
        {"name": "rider", "source": None, "source_row": None, "start": "fresh"},
    ]
    assert content["remapped"][1] == {
        "name": "roi_heads.box_predictor.cls_score.bias",
        "file_shape": [81],
        "model_shape": [3],
    }
