"""Training and evaluation of a config."""

from d2ft.host import bridge_detectron2

# Before anything imports what of Detectron2 does not run on today's stack as it is.
bridge_detectron2()

from d2ft.engine.command_line import check_and_launch, run_train_net  # noqa: E402
from d2ft.engine.setup import default_setup, inference_cfg, resolve_cfg  # noqa: E402
from d2ft.engine.trainer import FinetuneTrainer  # noqa: E402

__all__ = [
    "FinetuneTrainer",
    "check_and_launch",
    "default_setup",
    "inference_cfg",
    "resolve_cfg",
    "run_train_net",
]
