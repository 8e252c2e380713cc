"""Anchors as torchvision lays them out, for weights that were trained on them."""

import torch
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """
    Same as :class:`DefaultAnchorGenerator`, but with torchvision's two roundings.

    1. Half the width and half the height of an anchor are whole pixels: 46x22, not 45.25x22.63.
    2. Anchors of a level are apart by the padded image size over the size of the feature map,
       rounded down, separately for x and y. On P6 and P7 that is less than the stride where the
       map was rounded up: 53 instead of 64 pixels for an image 160 pixels high.

    Selected by ``MODEL.ANCHOR_GENERATOR.NAME``; ``OFFSET`` has to be 0. Both rules are those of
    https://github.com/pytorch/vision/blob/v0.20.0/torchvision/models/detection/anchor_utils.py
    """

    def generate_cell_anchors(
        self,
        sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
        aspect_ratios: tuple[float, ...] = (0.5, 1, 2),
    ) -> torch.Tensor:
        """Same as in the base class, rounded to whole pixels (a half to the even one)."""
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[torch.Tensor]:
        # The first map is never rounded up: images are padded to multiples of 32.
        height, width = (length * self.strides[0] for length in grid_sizes[0])
        anchors = []
        for (rows, columns), cell_anchors in zip(grid_sizes, self.cell_anchors, strict=True):
            y = torch.arange(rows, device=cell_anchors.device) * (height // rows)
            x = torch.arange(columns, device=cell_anchors.device) * (width // columns)
            y, x = (shift.reshape(-1) for shift in torch.meshgrid(y, x, indexing="ij"))
            shifts = torch.stack((x, y, x, y), dim=1)
            anchors.append((shifts[:, None] + cell_anchors[None]).reshape(-1, 4))
        return anchors
