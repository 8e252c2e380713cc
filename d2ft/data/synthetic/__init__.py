"""
Seeded generators of the embedded data sets.

Everything in them is drawn by this package: they stand in for COCO and Cityscapes where nothing
can be downloaded, in the same layouts and with the same names and ids, and say nothing about
how well a model does on photographs.
"""

from d2ft.data.synthetic.mini_cityscapes import write_mini_cityscapes
from d2ft.data.synthetic.mini_coco import write_mini_coco
from d2ft.data.synthetic.street import LabelledPolygon, StreetScene, make_street_scene

__all__ = [
    "LabelledPolygon",
    "StreetScene",
    "make_street_scene",
    "write_mini_cityscapes",
    "write_mini_coco",
]
