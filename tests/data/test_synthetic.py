import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from d2ft.data.synthetic import (
    LabelledPolygon,
    make_street_scene,
    mini_cityscapes,
    write_mini_cityscapes,
    write_mini_coco,
)
from d2ft.data.synthetic.drawing import PATTERNS
from d2ft.data.synthetic.mini_cityscapes import draw_ids
from d2ft.data.synthetic.mini_coco import _polygons
from d2ft.data.synthetic.styles import COCO_STYLES, COLOURS, SHAPES, STREET_STYLES
from d2ft.errors import UserError
from d2ft.labels import COCO_CATEGORY_IDS, COCO_CLASSES

SIZE = (96, 192)


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def write_streets(root: Path, **changes) -> dict[str, bytes]:
    write_mini_cityscapes(
        root, **{"splits": {"train": 2, "val": 1}, "image_size": SIZE, "seed": 3, **changes}
    )
    return files_of(root)


def write_coco(root: Path, **changes) -> dict[str, bytes]:
    write_mini_coco(root, **{"num_train": 3, "num_val": 2, "seed": 3, **changes})
    return files_of(root)


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("streets") / "set"
    write_mini_cityscapes(root, splits={"train": 5, "val": 2}, image_size=SIZE, seed=0)
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("coco") / "set"
    write_mini_coco(root, num_train=80, num_val=4, image_size=(96, 112))
    return root


@pytest.mark.parametrize("write", [write_streets, write_coco])
class TestBothSets:
    def test_one_seed_gives_equal_bytes_and_another_seed_other_pictures(self, write, tmp_path):
        first = write(tmp_path / "a")
        assert write(tmp_path / "b") == first
        other = write(tmp_path / "c", seed=4)
        assert other.keys() == first.keys()
        assert not [name for name in first if other[name] == first[name]]

    def test_a_set_that_is_there_is_not_written_again(self, write, tmp_path):
        write(tmp_path)  # an empty folder is as good as none
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        write(tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_another_set_in_the_folder_is_refused_by_name(self, write, tmp_path):
        root = tmp_path / "set"
        before = write(root)
        with pytest.raises(UserError, match=r'set holds another data set.*"seed": 3.*"seed": 9'):
            write(root, seed=9)
        assert files_of(root) == before

    def test_a_folder_with_foreign_files_is_refused(self, write, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match=r"without a readable dataset\.json"):
            write(tmp_path)
        assert files_of(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_street_does_not_depend_on_how_many_there_are(tmp_path):
    few = write_streets(tmp_path / "few", splits={"train": 1})
    many = write_streets(tmp_path / "many", splits={"train": 3, "val": 1})
    del few["dataset.json"]
    assert few.items() <= many.items()


def test_a_picture_of_coco_does_not_depend_on_how_many_there_are(tmp_path):
    few = write_coco(tmp_path / "few", num_train=1, num_val=1)
    many = write_coco(tmp_path / "many", num_train=3, num_val=2)
    pictures = {name: data for name, data in few.items() if name.endswith(".jpg")}
    assert len(pictures) == 2
    assert pictures.items() <= many.items()


def test_a_run_that_stops_half_way_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def interrupted(*arguments):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return make_street_scene(*arguments)

    monkeypatch.setattr(mini_cityscapes, "make_street_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_streets(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_every_class_of_coco_has_a_drawing_of_its_own():
    assert set(COCO_STYLES) == set(COCO_CLASSES)
    assert len(set(COCO_STYLES.values())) == len(COCO_CLASSES)
    for style in [*COCO_STYLES.values(), *STREET_STYLES.values()]:
        assert set(style.shapes) <= set(SHAPES)
        assert {*style.body, *style.trim} <= set(COLOURS)
        assert style.pattern in {"plain", *PATTERNS}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_stands_on_the_ground_inside_its_box_and_has_known_paints(name):
    shape = SHAPES[name]
    assert {part.paint for part in shape.parts} <= {"body", "trim", "hole", *COLOURS}
    corners = np.concatenate([part.points for part in shape.parts])
    low, high = corners.min(axis=0), corners.max(axis=0)
    assert (low >= -0.06).all()
    assert (high <= (shape.width + 0.06, 1.06)).all()
    assert high[1] >= 0.9
    assert (high - low >= 0.8 * np.array([shape.width, 1])).all()


class TestMiniCityscapes:
    def frames(self, root: Path) -> list[Path]:
        return sorted(root.glob("gtFine/*/*/*_polygons.json"))

    def test_files_lie_where_cityscapes_has_them(self, streets):
        names = {str(path.relative_to(streets)) for path in streets.rglob("*.png")}
        assert len(names) == 7 * 3
        frame = "train/kleinburg/kleinburg_000001_000019"
        assert f"leftImg8bit/{frame}_leftImg8bit.png" in names
        assert f"gtFine/{frame}_gtFine_instanceIds.png" in names
        assert f"gtFine/{frame}_gtFine_labelIds.png" in names

    def test_pictures_have_the_modes_of_cityscapes(self, streets):
        for suffix, mode in (
            ("leftImg8bit", "RGB"),
            ("instanceIds", "I;16"),
            ("labelIds", "L"),
        ):
            for path in streets.rglob(f"*_{suffix}.png"):
                with Image.open(path) as image:
                    assert (image.mode, image.size) == (mode, SIZE[::-1])

    @pytest.mark.parity
    def test_ids_equal_what_the_official_tools_draw(self, streets):
        annotation = pytest.importorskip("cityscapesscripts.helpers.annotation")
        instances = pytest.importorskip("cityscapesscripts.preparation.json2instanceImg")
        labels = pytest.importorskip("cityscapesscripts.preparation.json2labelImg")
        for path in self.frames(streets):
            official = annotation.Annotation()
            official.fromJsonFile(str(path))
            prefix = str(path).removesuffix("polygons.json")
            for kind, image in (
                ("instanceIds", instances.createInstanceImage(official, "ids")),
                ("labelIds", labels.createLabelImage(official, "ids")),
            ):
                with Image.open(f"{prefix}{kind}.png") as ours:
                    np.testing.assert_array_equal(np.asarray(ours), np.asarray(image))

    def test_every_pixel_has_a_label_and_every_instance_can_be_seen(self, streets):
        for path in self.frames(streets):
            annotation = json.loads(path.read_text())
            objects = tuple(
                LabelledPolygon(entry["label"], entry["polygon"]) for entry in annotation["objects"]
            )
            corners = np.concatenate([entry.polygon for entry in objects])
            assert corners.min() >= 0
            assert (corners.max(axis=0) < SIZE[::-1]).all()
            instance_ids, label_ids = draw_ids(objects, SIZE)
            assert label_ids.min() > 0
            classes = {"person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}
            wanted = sum(entry.label in {*classes, "caravan", "trailer"} for entry in objects)
            ids, sizes = np.unique(instance_ids[instance_ids >= 1000], return_counts=True)
            assert len(ids) == wanted
            assert sizes.min() >= 20

    def test_ids_count_instances_by_class_and_leave_groups_and_plates_alone(self):
        def square(x: int) -> tuple[tuple[int, int], ...]:
            return ((x, 0), (x + 3, 0), (x + 3, 3), (x, 3))

        names = ["road", "car", "person", "car", "cargroup", "license plate"]
        objects = tuple(LabelledPolygon(name, square(8 * i)) for i, name in enumerate(names))
        instance_ids, label_ids = draw_ids(objects, (8, 48))
        assert instance_ids[1, 1::8].tolist() == [7, 26000, 24000, 26001, 26, 0]
        assert label_ids[1, 1::8].tolist() == [7, 26, 24, 26, 26, 0]
        assert (instance_ids.dtype, label_ids.dtype) == (np.uint16, np.uint8)

    def test_a_street_has_the_size_and_at_most_the_objects_asked_for(self):
        rng = np.random.default_rng(0)
        scene = make_street_scene(rng, (128, 320), 6)
        assert (scene.image.shape, scene.image.dtype) == ((128, 320, 3), np.uint8)
        instances, groups = draw_ids(scene.objects, (128, 320))[0], ("persongroup", "cargroup")
        count = len(np.unique(instances[instances >= 1000]))
        count += sum(entry.label in groups for entry in scene.objects)
        assert 4 <= count <= 6

    def test_all_eight_classes_riders_on_wheels_and_groups_occur(self):
        labels = [
            {entry.label for entry in make_street_scene(np.random.default_rng(k), SIZE).objects}
            for k in range(25)
        ]
        everything = set().union(*labels)
        assert everything >= {"person", "rider", "car", "truck", "bus", "train"}
        assert everything >= {"motorcycle", "bicycle", "cargroup", "persongroup"}
        assert everything >= {"sky", "building", "road", "sidewalk", "vegetation", "pole"}
        assert all(scene & {"motorcycle", "bicycle"} for scene in labels if "rider" in scene)


class TestMiniCoco:
    @pytest.fixture(scope="class")
    def index(self, coco) -> COCO:
        return COCO(str(coco / "annotations" / "instances_train2017.json"))

    def test_categories_are_those_of_coco(self, index):
        found = [(entry["id"], entry["name"]) for entry in index.dataset["categories"]]
        assert found == list(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))

    def test_pictures_are_where_the_annotations_say(self, index, coco):
        assert len(index.imgs) == 80
        for entry in index.imgs.values():
            with Image.open(coco / "train2017" / entry["file_name"]) as image:
                assert image.size == (entry["width"], entry["height"]) == (112, 96)

    def test_boxes_and_areas_are_those_of_the_masks(self, index):
        assert index.anns
        for entry in index.anns.values():
            encoded = index.annToRLE(entry)
            assert entry["bbox"] == mask_utils.toBbox(encoded).tolist()
            assert entry["area"] == mask_utils.area(encoded) >= 30

    def test_crowds_and_pictures_without_objects_occur(self, index):
        crowds = [entry for entry in index.anns.values() if entry["iscrowd"]]
        assert crowds
        assert all(isinstance(entry["segmentation"]["counts"], list) for entry in crowds)
        assert {entry["image_id"] for entry in index.anns.values()} < set(index.imgs)

    def test_half_of_the_instances_are_road_objects(self, index):
        road = ("person", "bicycle", "car", "motorcycle", "bus", "train", "truck")
        ids = set(index.getCatIds(list(road)))
        share = np.mean([entry["category_id"] in ids for entry in index.anns.values()])
        assert 0.4 < share < 0.6

    def test_polygons_cover_the_mask_that_they_were_made_of(self):
        y, x = np.mgrid[0:60, 0:80]
        mask = ((x - 30) / 22) ** 2 + ((y - 28) / 15) ** 2 < 1
        mask &= abs(x - 34) > 2  # two pieces
        polygons = _polygons(mask)
        assert len(polygons) == 2
        drawn = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, 60, 80)))
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.97
