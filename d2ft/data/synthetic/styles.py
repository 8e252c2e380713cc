"""What each class of the embedded sets looks like: silhouettes, colours and pattern, as tables."""

from typing import NamedTuple

from d2ft.data.synthetic.indoor_shapes import INDOOR_SHAPES
from d2ft.data.synthetic.outdoor_shapes import OUTDOOR_SHAPES
from d2ft.data.synthetic.road_shapes import ROAD_SHAPES
from d2ft.data.synthetic.shapes import Shape

SHAPES: dict[str, Shape] = {**ROAD_SHAPES, **OUTDOOR_SHAPES, **INDOOR_SHAPES}


class Colour(NamedTuple):
    """A family of colours as ranges: hue in degrees, saturation and value in [0, 1]."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


class Style(NamedTuple):
    """
    How the instances of one class are drawn.

    Attributes:
        shapes: keys of :data:`SHAPES`, one of which an instance gets.
        body: keys of :data:`COLOURS` for the parts painted ``body``.
        trim: the same for the parts painted ``trim`` and for the pattern.
        pattern: key of :data:`~d2ft.data.synthetic.drawing.PATTERNS`, laid over the body.
    """

    shapes: tuple[str, ...]
    body: tuple[str, ...]
    trim: tuple[str, ...]
    pattern: str = "plain"


# fmt: off
COLOURS: dict[str, Colour] = {
    "red": Colour((-8, 8), (.75, .95), (.60, .90)),
    "orange": Colour((20, 32), (.80, .95), (.85, 1)),
    "yellow": Colour((46, 56), (.75, .95), (.85, 1)),
    "lime": Colour((75, 95), (.60, .85), (.70, .90)),
    "green": Colour((115, 145), (.55, .80), (.35, .65)),
    "teal": Colour((168, 186), (.55, .80), (.50, .80)),
    "blue": Colour((208, 230), (.65, .90), (.55, .90)),
    "navy": Colour((215, 235), (.50, .80), (.20, .40)),
    "violet": Colour((262, 285), (.45, .75), (.45, .80)),
    "pink": Colour((322, 342), (.35, .60), (.85, 1)),
    "brown": Colour((18, 30), (.50, .70), (.28, .48)),
    "wood": Colour((26, 36), (.50, .65), (.50, .68)),
    "tan": Colour((30, 42), (.28, .45), (.65, .85)),
    "cream": Colour((42, 54), (.12, .25), (.88, 1)),
    "white": Colour((0, 360), (0, .06), (.88, 1)),
    "silver": Colour((0, 360), (0, .08), (.62, .80)),
    "grey": Colour((0, 360), (0, .08), (.36, .52)),
    "black": Colour((0, 360), (0, .20), (.06, .16)),
    "glass": Colour((198, 216), (.30, .50), (.28, .46)),
    "skin": Colour((16, 28), (.30, .60), (.45, .95)),
    "hair": Colour((20, 36), (.30, .70), (.10, .40)),
    "helmet": Colour((0, 360), (.50, .90), (.50, .90)),
    "lamp": Colour((48, 58), (.30, .50), (.95, 1)),
    "tail": Colour((-5, 5), (.85, 1), (.60, .85)),
}

_CAR_BODIES = ("red", "blue", "silver", "white", "navy", "green", "grey")
_SHIRTS = ("red", "blue", "yellow", "white", "green", "violet", "orange", "teal", "grey")
_TROUSERS = ("navy", "black", "brown", "grey", "tan")

ROAD_STYLES: dict[str, Style] = {
    "person": Style(("person_standing", "person_walking"), _SHIRTS, _TROUSERS),
    "bicycle": Style(("bicycle_side",), ("red", "teal", "lime", "blue", "orange", "black"), ("grey",)),
    "car": Style(("sedan_side", "hatchback_side", "car_rear", "car_front"), _CAR_BODIES, ("grey",)),
    "motorcycle": Style(("motorcycle_side",), ("red", "blue", "black", "orange", "green"), ("silver",)),
    "bus": Style(("bus_side", "bus_side", "bus_front"), ("yellow", "orange", "red", "cream"), ("white", "navy", "red")),
    "train": Style(("train_side", "train_side", "train_front"), ("teal", "green", "lime", "white"), ("violet", "orange", "red")),
    "truck": Style(("box_truck_side", "tipper_side", "truck_rear"), ("blue", "red", "green", "violet"), ("white", "cream", "tan", "silver")),
}

# Labels of Cityscapes that COCO does not have.
STREET_STYLES: dict[str, Style] = {
    "rider": Style(("rider_sitting",), _SHIRTS, _TROUSERS),
    "caravan": Style(("caravan_side",), ("white", "cream"), ("tan", "teal")),
    "trailer": Style(("trailer_side",), ("grey", "brown"), ("silver", "tan")),
}

COCO_STYLES: dict[str, Style] = {
    **ROAD_STYLES,
    "airplane": Style(("airplane",), ("white", "silver"), ("blue", "navy")),
    "boat": Style(("boat",), ("brown", "navy"), ("white", "cream")),
    "traffic light": Style(("traffic_light",), ("black",), ("grey",)),
    "fire hydrant": Style(("hydrant",), ("red",), ("yellow",)),
    "stop sign": Style(("stop_sign",), ("red",), ("white",)),
    "parking meter": Style(("parking_meter",), ("grey", "navy"), ("yellow",)),
    "bench": Style(("bench",), ("wood", "brown"), ("black",), "bands"),
    "bird": Style(("bird",), ("blue", "yellow", "white"), ("navy", "grey")),
    "cat": Style(("cat",), ("orange", "tan"), ("brown", "white"), "bands"),
    "dog": Style(("dog",), ("brown", "tan"), ("black",)),
    "horse": Style(("horse",), ("brown", "wood"), ("black",)),
    "sheep": Style(("sheep",), ("white", "cream"), ("silver",), "speckle"),
    "cow": Style(("cow",), ("white",), ("black", "brown"), "patches"),
    "elephant": Style(("elephant",), ("grey", "silver"), ("grey",)),
    "bear": Style(("bear",), ("brown", "black"), ("tan",)),
    "zebra": Style(("horse",), ("white",), ("black",), "stripes"),
    "giraffe": Style(("giraffe",), ("yellow", "tan"), ("brown",), "patches"),
    "backpack": Style(("backpack",), ("blue", "green", "violet"), ("orange", "grey")),
    "umbrella": Style(("umbrella",), ("red", "violet", "teal"), ("yellow", "white")),
    "handbag": Style(("handbag",), ("pink", "red", "tan"), ("brown", "black")),
    "tie": Style(("tie",), ("navy", "red", "green"), ("yellow", "white"), "diagonals"),
    "suitcase": Style(("suitcase",), ("teal", "orange", "grey"), ("black",)),
    "frisbee": Style(("disc",), ("orange", "lime", "pink"), ("white",)),
    "skis": Style(("skis",), ("blue", "red"), ("white",)),
    "snowboard": Style(("long_board",), ("violet", "teal"), ("black",), "checks"),
    "sports ball": Style(("ball",), ("white", "orange"), ("black",)),
    "kite": Style(("kite",), ("yellow", "red"), ("blue", "violet")),
    "baseball bat": Style(("bat",), ("wood", "tan"), ("navy",)),
    "baseball glove": Style(("glove",), ("brown",), ("tan",)),
    "skateboard": Style(("skateboard",), ("pink", "lime"), ("black",), "diagonals"),
    "surfboard": Style(("upright_board",), ("cream", "yellow"), ("red", "blue")),
    "tennis racket": Style(("racket",), ("red", "lime"), ("white",)),
    "bottle": Style(("bottle",), ("green", "brown"), ("yellow", "red")),
    "wine glass": Style(("wine_glass",), ("silver",), ("red", "violet")),
    "cup": Style(("cup",), ("white", "teal"), ("red", "blue")),
    "fork": Style(("fork",), ("silver",), ("silver",)),
    "knife": Style(("knife",), ("silver",), ("black", "wood")),
    "spoon": Style(("spoon",), ("silver",), ("grey",)),
    "bowl": Style(("bowl",), ("blue", "white"), ("orange", "tan"), "bands"),
    "banana": Style(("banana",), ("yellow",), ("brown",)),
    "apple": Style(("apple",), ("red", "lime"), ("yellow",)),
    "sandwich": Style(("sandwich",), ("tan", "wood"), ("yellow",)),
    "orange": Style(("fruit",), ("orange",), ("green",)),
    "broccoli": Style(("broccoli",), ("green",), ("lime",), "speckle"),
    "carrot": Style(("carrot",), ("orange",), ("brown",), "bands"),
    "hot dog": Style(("hot_dog",), ("tan",), ("red", "brown")),
    "pizza": Style(("pizza",), ("yellow",), ("wood",), "speckle"),
    "donut": Style(("donut",), ("wood", "tan"), ("pink", "brown")),
    "cake": Style(("cake",), ("pink", "brown"), ("cream", "violet")),
    "chair": Style(("chair",), ("wood", "red"), ("tan", "navy")),
    "couch": Style(("couch",), ("violet", "green", "grey"), ("cream", "tan")),
    "potted plant": Style(("potted_plant",), ("orange", "brown"), ("brown",)),
    "bed": Style(("bed",), ("blue", "pink"), ("white",), "checks"),
    "dining table": Style(("dining_table",), ("wood", "brown"), ("brown",), "stripes"),
    "toilet": Style(("toilet",), ("white",), ("silver",)),
    "tv": Style(("tv",), ("blue", "teal"), ("white", "lime")),
    "laptop": Style(("laptop",), ("navy", "violet"), ("black",)),
    "mouse": Style(("mouse",), ("white", "black"), ("grey",)),
    "remote": Style(("remote",), ("black", "navy"), ("silver",)),
    "keyboard": Style(("keyboard",), ("grey", "black"), ("white", "silver")),
    "cell phone": Style(("cell_phone",), ("teal", "violet"), ("orange", "white")),
    "microwave": Style(("microwave",), ("white", "silver"), ("grey",)),
    "oven": Style(("oven",), ("silver", "white"), ("black",)),
    "toaster": Style(("toaster",), ("silver", "red"), ("black",)),
    "sink": Style(("sink",), ("white",), ("teal", "blue")),
    "refrigerator": Style(("refrigerator",), ("white", "silver", "teal"), ("grey",)),
    "book": Style(("book",), ("red", "green", "navy"), ("yellow", "cream")),
    "clock": Style(("clock",), ("white", "cream"), ("red", "navy", "wood")),
    "vase": Style(("vase",), ("blue", "teal", "red"), ("white", "yellow"), "bands"),
    "scissors": Style(("scissors",), ("red", "orange", "blue"), ("silver",)),
    "teddy bear": Style(("teddy_bear",), ("wood", "tan"), ("cream",)),
    "hair drier": Style(("hair_drier",), ("pink", "violet"), ("black", "grey")),
    "toothbrush": Style(("toothbrush",), ("teal", "pink", "lime"), ("white",)),
}
# fmt: on
