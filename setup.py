"""Package d2ft; `tools/setup_env.sh` also installs what no package index can say."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Both tables are literals because tools/missing_requirements.py reads them without running this
# file. A version is bounded from above only where a newer one is known to break.

# Detectron2 itself is not listed: it has no release under its own name, so pip cannot find it.
# d2ft/host.py answers its absence with the command that installs it.
INSTALL_REQUIRES = [
    "torch",  # models, optimizers, data loading
    "torchvision",  # RoIAlign and NMS of Detectron2; must be the one built for this torch
    "iopath>=0.1.7,<0.1.10",  # the cache of downloads; Detectron2 has the same bound
    "fvcore>=0.1.5,<0.1.6",  # checkpoints, configs, schedules; Detectron2 has the same bound
    "numpy",  # masks, boxes and metrics as arrays
    "Pillow",  # reads images and the 16-bit PNGs of instance ids
    "opencv-python",  # drawing; tools/setup_env.sh may put the headless build in its place
    "pycocotools",  # run-length masks and COCO AP
    "cityscapesscripts",  # the official Cityscapes instance AP, and instance ids from polygons
    "PyYAML",  # config files
    "tabulate",  # the load report and the AP tables
    "tqdm",  # progress while a dataset is parsed
    "filelock",  # one process parses a dataset, the others wait for its cache
]

EXTRAS_REQUIRE = {
    # What Detectron2 requires and d2ft does not: for a Detectron2 that was installed without its
    # own dependencies, as tools/setup_env.sh does. Its `black` is only needed to export a
    # LazyConfig as Python source, and is left out.
    "detectron2-deps": [
        "omegaconf>=2.1,<2.4",  # lazy configs; bounded by Detectron2
        "hydra-core>=1.1",  # lazy configs
        "yacs>=0.1.8",  # configs
        "termcolor>=1.1",  # coloured log
        "cloudpickle",  # datasets handed to data loader workers
        "tensorboard",  # the event file that DefaultTrainer writes
        "matplotlib",  # the visualizer
        "packaging",  # version checks
        "setuptools<81",  # pkg_resources for the model zoo: deprecated, gone from setuptools 82
    ],
    "augmentation": [
        "albumentations==2.0.8",  # further augmentations; later versions are under another licence
        "shapely",  # cuts polygons off at the edge of a crop
    ],
    "imagecodecs": ["imagecodecs"],  # decodes PNG to the same pixels in less time
    "safetensors": ["safetensors"],  # reads weights in that format
    "hotcoco": ["hotcoco>=1.3,<2"],  # COCO AP with the digits of pycocotools, many times faster
    "scipy": ["scipy"],  # reads WIDER FACE's official lists of easy, medium and hard faces
    "dev": [
        "safetensors",  # its files are among those that the tests read
        "hotcoco>=1.3,<2",  # tested to give the digits of pycocotools
        "scipy",  # the tests read WIDER FACE's lists
        "pytest",  # runs tests/
        "pytest-xdist",  # on all cores
        "hypothesis",  # generated cases
        "ruff",  # lint and format; configured in pyproject.toml
        "mypy",  # types; configured in pyproject.toml
        "types-PyYAML",  # stubs for mypy, as the three below
        "types-setuptools",
        "types-tabulate",
        "types-tqdm",
    ],
}


def read_version() -> str:
    """Return the version that d2ft/__init__.py states, without importing d2ft and so torch."""
    source = Path(__file__).with_name("d2ft").joinpath("__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if match is None:
        raise ValueError('d2ft/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


setup(
    name="d2ft",
    version=read_version(),
    description="Fine-tune COCO-pretrained Detectron2 detectors on other datasets",
    license="Apache-2.0",
    packages=find_packages(include=["d2ft", "d2ft.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
