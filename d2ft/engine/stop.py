"""End a run before SOLVER.MAX_ITER as if it had reached it."""

from typing import Any


class StopTraining(BaseException):
    """
    Raised by :func:`stop_training`; :meth:`FinetuneTrainer.train` takes it for a normal end.

    Not an ``Exception``: Detectron2's loop logs those as failures of the run.
    """


def stop_training(trainer: Any, reason: str) -> None:
    """
    Leave the loop after this step, with ``model_final``, the last evaluation and the last metrics.

    To be called in ``after_step``, by all processes in the same iteration: the evaluation that
    follows waits for all of them.

    Args:
        trainer: the trainer of the hook that stops.
        reason: for the log.

    Raises:
        StopTraining: always.
    """
    trainer.checkpointer.save("model_final", iteration=trainer.iter)
    # Hooks take a run that reached max_iter for complete, and evaluate it.
    trainer.iter += 1
    trainer.max_iter = trainer.iter
    raise StopTraining(reason)
