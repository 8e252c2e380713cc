#!/usr/bin/env python
"""
Fine-tune or evaluate the model of a config, with Detectron2's own arguments.

    python tools/train_net.py --config-file configs/cityscapes_ft.yaml
    python tools/train_net.py --config-file configs/cityscapes_ft.yaml --eval-only \
        MODEL.WEIGHTS output/cityscapes_ft/model_final.pth
"""

from d2ft.engine import run_train_net

if __name__ == "__main__":
    run_train_net()
