import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2ft.config import load_cfg
from d2ft.layers.partial_labels import PartiallyLabelledOutputLayers, mask_unlabelled_classes
from tests.factories import PROJECT, TINY_MODEL, seeded_model

K = 3


@pytest.fixture(autouse=True)
def _storage():
    with EventStorage():
        yield


def _layers(cls, **kwargs):
    torch.manual_seed(0)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    return cls(ShapeSpec(channels=4), box2box_transform=transform, num_classes=K, **kwargs)


def _proposals(*images):
    proposals = []
    for classes in images:
        image = Instances((64, 64))
        boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]]).repeat(len(classes), 1)
        image.proposal_boxes, image.gt_boxes = Boxes(boxes), Boxes(boxes + 1)
        image.gt_classes = torch.tensor(classes)
        proposals.append(image)
    return proposals


def _losses_and_gradient(layers, proposals):
    torch.manual_seed(1)
    logits = torch.randn(sum(map(len, proposals)), K + 1, requires_grad=True)
    losses = layers.losses((logits, torch.zeros(len(logits), 4 * K)), proposals)
    losses["loss_cls"].backward()
    return losses, logits.grad


@pytest.mark.parametrize("sigmoid", [False, True])
def test_background_does_not_push_unlabelled_classes_down(sigmoid):
    layers = _layers(PartiallyLabelledOutputLayers, use_sigmoid_ce=sigmoid)
    layers.labelled_classes = [[0, 2], None]
    # Two images: foreground and background of a set without class 1, then one with all classes.
    losses, gradient = _losses_and_gradient(layers, _proposals([0, K], [K]))
    assert torch.isfinite(losses["loss_cls"])
    zero = gradient == 0
    zero[:, K] = False  # with sigmoid there is no logit of the background
    assert zero.nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("labelled", [[None, None], [[0, 1, 2], None]])
def test_with_all_classes_labelled_losses_and_gradients_are_those_of_detectron2(sigmoid, labelled):
    proposals = _proposals([0, 1, K], [K, 2])
    stock = _losses_and_gradient(_layers(FastRCNNOutputLayers, use_sigmoid_ce=sigmoid), proposals)
    layers = _layers(PartiallyLabelledOutputLayers, use_sigmoid_ce=sigmoid)
    layers.labelled_classes = labelled
    losses, gradient = _losses_and_gradient(layers, proposals)
    assert losses == stock[0]
    assert torch.equal(gradient, stock[1])


def test_foreground_roi_losses_are_those_of_detectron2():
    proposals = _proposals([0, 2, 1])
    layers = _layers(PartiallyLabelledOutputLayers)
    layers.labelled_classes = [[0]]
    stock = _losses_and_gradient(_layers(FastRCNNOutputLayers), proposals)
    losses, gradient = _losses_and_gradient(layers, proposals)
    assert losses == stock[0]
    assert torch.equal(gradient, stock[1])


@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads"])
def test_a_model_keeps_its_parameters_and_reads_the_classes_of_each_image(name):
    cascade = name == "CascadeROIHeads"
    options = [*TINY_MODEL, "MODEL.ROI_HEADS.NAME", name, "MODEL.MASK_ON", "False"]
    options += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str(cascade)]
    model = seeded_model(load_cfg(PROJECT / "configs/cityscapes_ft.yaml", options)).train()
    before = list(model.state_dict())
    assert mask_unlabelled_classes(model) == (3 if cascade else 1)
    assert list(model.state_dict()) == before

    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    empty = Instances((64, 96), gt_boxes=Boxes(torch.zeros(0, 4)))
    empty.gt_classes = torch.zeros(0, dtype=torch.int64)
    sample = {"image": image, "height": 64, "width": 96, "instances": empty}
    losses = model([{**sample, "labelled_classes": [2, 3]}, {**sample, "labelled_classes": [0, 3]}])
    sum(losses.values()).backward()
    for predictor in (m for m in model.modules() if type(m) is PartiallyLabelledOutputLayers):
        gradient = predictor.cls_score.weight.grad.abs().sum(dim=1)
        # Eight classes and the background; both images are background only.
        assert gradient.nonzero().flatten().tolist() == [0, 2, 3, 8]
