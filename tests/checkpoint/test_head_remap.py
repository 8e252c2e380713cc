import pytest
import torch

from d2ft.checkpoint.head_remap import (
    find_class_rows,
    find_misfit,
    find_sources,
    match_classes,
    remap_class_rows,
)
from d2ft.errors import UserError
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES, CLASS_ALIASES, COCO_CLASSES, fold_class_name

SCORES = "roi_heads.box_predictor.cls_score.weight"
STAGE = "roi_heads.box_predictor.2.cls_score.weight"
BOXES = "roi_heads.box_predictor.bbox_pred.weight"
MASKS = "roi_heads.mask_head.predictor.weight"
DENSE = "head.cls_score.weight"


def layout_of(name, shape, num_classes):
    return find_class_rows({name: shape}, {name: shape}, num_classes, num_classes)[name]


def rows_of(classes, per_class=1, channels=3):
    """Fill each class row with 100 * class + row, so that a row tells where it comes from."""
    values = torch.tensor([100.0 * k + r for k in range(classes) for r in range(per_class)])
    return values[:, None].expand(-1, channels).contiguous()


def test_cityscapes_meets_coco_in_seven_of_eight_classes():
    rows = match_classes(COCO_CLASSES, CITYSCAPES_INSTANCE_CLASSES)

    names = [None if row is None else COCO_CLASSES[row] for row in rows]
    assert names == ["person", None, "car", "truck", "bus", "train", "motorcycle", "bicycle"]


@pytest.mark.parametrize(
    ("spelling", "coco"),
    [
        ("Traffic_Light", "traffic light"),  # separators and case
        ("traffic-light", "traffic light"),
        ("pottedplant", "potted plant"),  # VOC
        ("motorbike", "motorcycle"),
        ("tvmonitor", "tv"),
        ("Pedestrian", "person"),  # KITTI
        ("car_(automobile)", "car"),  # LVIS
        ("wineglass", "wine glass"),
        ("Moniter/TV", "tv"),  # Objects365
        ("Hair Dryer", "hair drier"),
    ],
)
def test_spellings_of_a_class_meet_in_both_directions(spelling, coco):
    assert match_classes(COCO_CLASSES, [spelling]) == (COCO_CLASSES.index(coco),)
    assert match_classes([spelling], [coco]) == (0,)


def test_all_classes_of_pascal_voc_are_found_in_coco():
    voc = (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
        "train", "tvmonitor",
    )  # fmt: skip

    assert None not in match_classes(COCO_CLASSES, voc)


def test_aliases_lead_to_names_of_coco_and_are_needed():
    coco = {fold_class_name(name) for name in COCO_CLASSES}
    for spelling, name in CLASS_ALIASES.items():
        assert name in COCO_CLASSES
        assert fold_class_name(spelling) not in coco


def test_same_name_goes_before_an_alias():
    source = ("person", "pedestrian")

    assert match_classes(source, ("pedestrian", "person")) == (1, 0)


def test_class_map_goes_before_the_names_and_a_source_may_serve_twice():
    rows = match_classes(("person", "car"), ("rider", "Van", "car"), {"Rider": "Pedestrian"})
    assert rows == (0, None, 1)
    assert match_classes(("person", "car"), ("car",), {"car": "person"}) == (0,)


def test_name_of_two_sources_is_refused_with_both():
    source = ("sofa", "motorbike", "Motor Cycle", "motorcycle")

    with pytest.raises(
        UserError, match=r'"Pedestrian" .* any of 2 .*"person" \(row 0\), "PERSON" \(row 2\)'
    ):
        match_classes(("person", "sofa", "PERSON"), ("Pedestrian",))
    with pytest.raises(
        UserError, match=r'"motorcycle".*"Motor Cycle" \(row 2\), "motorcycle" \(row 3\).*CLASS_MAP'
    ):
        match_classes(source, ("motorcycle",))
    assert find_sources(source, ("motorcycle", "couch", "cat")) == ((2, 3), (0,), ())


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            {"rider": "perso"},
            r'maps "rider" to "perso", which is no class of the weights; did you mean "person"\? '
            r"Its classes: person, car\.",
        ),
        (
            {"rideer": "person"},
            r'"rideer" is no class of the training set; did you mean "rider"\? Its classes: rider',
        ),
        ({"rider": "xyz"}, r"no class of the weights\. Its classes: person, car\."),
    ],
)
def test_map_with_an_unknown_class_is_refused_with_the_known_ones(class_map, message):
    with pytest.raises(UserError, match=rf"FINETUNE\.CLASS_MAP.*{message}"):
        match_classes(("person", "car"), ("rider",), class_map)


def test_class_rows_are_found_in_every_kind_of_head():
    def shapes(k):
        return {SCORES: (k + 1, 8), STAGE: (k + 1, 8), BOXES: (4 * k, 8), MASKS: (k, 8, 1, 1),
                DENSE: (9 * k, 8, 3, 3), "backbone.fpn_output2.weight": (k, 8)}  # fmt: skip

    assert list(find_class_rows(shapes(80), shapes(8), 80, 8)) == [
        SCORES, STAGE, BOXES, MASKS, DENSE
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "model"),
    [
        (BOXES, (4, 8), (4, 8)),  # the same boxes for all classes
        (BOXES, (4, 8), (16, 8)),
        ("roi_heads.box_predictor.0.bbox_pred.weight", (4, 8), (4, 8)),
        (MASKS, (1, 8, 1, 1), (1, 8, 1, 1)),  # the same mask for all classes
        (SCORES, (5, 8), (5, 16)),  # another width of the layer below
        (DENSE, (36, 8, 3, 3), (12, 8, 3, 3)),  # 9 and 3 anchors
        (SCORES, (81, 8), (5, 8)),  # 80 classes, not 4
        ("head.bbox_pred.weight", (36, 8), (36, 8)),
    ],
)
def test_layer_without_the_same_rows_per_class_is_left_alone(name, file, model):
    assert find_class_rows({name: file}, {name: model}, 4, 4) == {}


def test_scores_of_another_number_of_classes_are_found():
    assert find_misfit({BOXES: (7, 8), SCORES: (81, 8)}, 8) == SCORES
    assert find_misfit({DENSE: (721, 8)}, 80) == DENSE
    assert find_misfit({SCORES: (81, 8), DENSE: (720, 8)}, 80) == ""


def test_scores_follow_their_classes_and_the_background_stays_last():
    rows = rows_of(4)  # three classes and the background
    init = torch.full((3, 3), -1.0)

    result = remap_class_rows(
        rows, (2, None), num_source=3, init=init, layout=layout_of(SCORES, (4, 3), 3)
    )

    assert result[:, 0].tolist() == [200, -1, 300]
    assert torch.equal(init, torch.full((3, 3), -1.0))


def test_four_box_rows_move_together():
    result = remap_class_rows(
        rows_of(3, per_class=4),
        (1, None, 0),
        num_source=3,
        init=torch.full((12, 3), -1.0),
        layout=layout_of(BOXES, (12, 3), 3),
    )

    expected = [100, 101, 102, 103, -1, -1, -1, -1, 0, 1, 2, 3]
    assert result[:, 2].tolist() == expected


def test_rows_of_retinanet_move_within_each_anchor():
    # Row a * K + k: two anchors of three classes.
    bias = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])

    result = remap_class_rows(
        bias,
        (2, None),
        num_source=3,
        init=torch.full((4,), -1.0),
        layout=layout_of("head.cls_score.bias", (6,), 3),
    )

    assert result.tolist() == [2, -1, 12, -1]


def test_unmatched_rows_get_mean_and_deviation_of_the_class_rows():
    layout = layout_of(SCORES, (51, 400), 50)
    rows = 3 + 2 * torch.randn(51, 400)
    rows[-1] = 1000  # the background is no class

    def remap(seed):
        return remap_class_rows(
            rows,
            (None,) * 50,
            num_source=50,
            init=torch.zeros(51, 400),
            layout=layout,
            unmatched="matched",
            generator=torch.Generator().manual_seed(seed),
        )

    result = remap(1)
    # 20,000 draws: five standard errors.
    assert result[:-1].mean().item() == pytest.approx(rows[:-1].mean().item(), abs=0.07)
    assert result[:-1].std().item() == pytest.approx(rows[:-1].std().item(), abs=0.05)
    assert (result[-1] == 1000).all()
    assert torch.equal(result, remap(1))
    assert not torch.equal(result, remap(2))


def test_result_has_the_type_of_the_model():
    result = remap_class_rows(
        torch.arange(3, dtype=torch.float64).requires_grad_(),
        (1,),
        num_source=2,
        init=torch.zeros(2, dtype=torch.float16, requires_grad=True),
        layout=layout_of("roi_heads.box_predictor.cls_score.bias", (3,), 2),
        unmatched="matched",
    )

    assert result.dtype == torch.float16
    assert not result.requires_grad
    assert result.tolist() == [1, 2]
