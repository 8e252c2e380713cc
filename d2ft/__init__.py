"""Fine-tune COCO-pretrained Detectron2 detectors on other datasets."""

__version__ = "0.1.0"
