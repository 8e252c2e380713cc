"""Random numbers of a training step as a function of seed, iteration and process."""

from detectron2.engine import HookBase
from detectron2.utils import comm

from d2ft.data.stream import seed_generators


class StepSeed(HookBase):
    """
    Seed all generators before each step from (``trainer.seed``, iteration, rank).

    What a step draws, such as the sampling of proposals, then needs no saved state: a resumed run
    draws the same as one that was never stopped.
    """

    def before_step(self) -> None:
        """Seed ``random``, NumPy and PyTorch on all devices."""
        seed_generators(self.trainer.seed, self.trainer.iter, comm.get_rank())
