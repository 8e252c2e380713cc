#!/usr/bin/env python
"""
Keep of a checkpoint what another training can start from: weights and class names.

    python tools/strip_checkpoint.py output/quickstart_pretrain/model_final.pth \
        configs/quickstart_weights.pth --half

The optimizer and the place in the data are left out. With --half the weights are stored in 16 bits,
which halves the file; they are loaded into a model of 32 bits all the same.
"""

import argparse
import sys
from pathlib import Path

import torch

from d2ft.checkpoint.safe_load import METADATA_KEY, load_checkpoint_file
from d2ft.errors import UserError
from d2ft.files import atomic_write, sha256


def strip(source: Path, target: Path, *, half: bool) -> None:
    checkpoint = load_checkpoint_file(source)
    # The counter of BatchNorm has no use in the FrozenBN that fine-tuning puts in its place.
    model = {
        name: tensor.half() if half and tensor.is_floating_point() else tensor
        for name, tensor in checkpoint["model"].items()
        if not name.endswith("num_batches_tracked")
    }
    overflown = [name for name, tensor in model.items() if not torch.isfinite(tensor).all()]
    if overflown:
        raise UserError(
            f"{source}: {overflown[0]} has values that 16 bits cannot hold: drop --half"
        )
    content = {"model": model}
    if METADATA_KEY in checkpoint:
        content[METADATA_KEY] = checkpoint[METADATA_KEY]
    with atomic_write(target, "wb") as file:
        torch.save(content, file)
    size = target.stat().st_size / 1e6
    print(f"{target}: {len(model)} tensors, {size:.1f} MB, SHA-256 {sha256(target)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--half", action="store_true", help="store the weights in 16 bits")
    args = parser.parse_args()
    strip(args.source, args.target, half=args.half)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
