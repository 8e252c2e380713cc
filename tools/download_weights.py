#!/usr/bin/env python
"""
Fetch weights ahead of time to where training looks for them, and check them.

    python tools/download_weights.py --config-file configs/cityscapes_ft.yaml
    python tools/download_weights.py COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml
    python tools/download_weights.py https://example.org/mask_rcnn-0a1b2c3d.pth

A download that broke off is resumed. The files go to Detectron2's cache, ~/.torch/iopath_cache or
FVCORE_CACHE. On a machine that has them already, the command only checks them.
"""

import argparse
import logging
import sys
from pathlib import Path

from d2ft.checkpoint.download import download_weights, published_digest, resolve_url
from d2ft.config import load_cfg
from d2ft.errors import UserError
from d2ft.files import sha256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", nargs="*", help="URL, or config of Detectron2's model zoo")
    parser.add_argument("--config-file", help="fetch its MODEL.WEIGHTS")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    wanted = list(args.weights)
    if args.config_file:
        wanted.append(load_cfg(args.config_file).MODEL.WEIGHTS)
    if not wanted:
        parser.error("give --config-file or the weights to fetch")
    for weights in wanted:
        if not weights:
            print(f"{args.config_file}: needs no weights")
            continue
        if Path(weights).is_file():
            print(f"{weights}: is a local file")
            continue
        url = resolve_url(weights)
        path = download_weights(url, progress=True)
        print(path)
        print(f"  {path.stat().st_size} bytes, SHA-256 {sha256(path)}")
        if published := published_digest(url):
            print("  {} begins with {}, as its name says".format(*published))
        else:
            print("  its name states no hash; the SHA-256 is recorded and checked from now on")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
