"""Config: the keys d2ft adds, reading YAML and overrides, and what can be checked in them alone."""

from d2ft.config.check import check_cfg
from d2ft.config.defaults import add_d2ft_config, get_cfg
from d2ft.config.io import load_cfg, load_cfg_text, who_set

__all__ = ["add_d2ft_config", "check_cfg", "get_cfg", "load_cfg", "load_cfg_text", "who_set"]
