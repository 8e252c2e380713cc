"""What is checked before a run."""

from d2ft.preflight.run import check_config_and_data, run_preflight

__all__ = ["check_config_and_data", "run_preflight"]
