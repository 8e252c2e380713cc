"""Config: the keys d2ft adds, reading YAML and overrides, and what can be checked in them alone."""

from d2ft.host import require_detectron2

require_detectron2()

from d2ft.config.check import check_cfg  # noqa: E402
from d2ft.config.defaults import add_d2ft_config, get_cfg, get_value  # noqa: E402
from d2ft.config.io import load_cfg, load_cfg_text, set_value, who_set  # noqa: E402

__all__ = [
    "add_d2ft_config",
    "check_cfg",
    "get_cfg",
    "get_value",
    "load_cfg",
    "load_cfg_text",
    "set_value",
    "who_set",
]
