"""What is checked before a run."""

from d2ft.preflight.run import already_checked, check_config_and_data, run_preflight

__all__ = ["already_checked", "check_config_and_data", "run_preflight"]
