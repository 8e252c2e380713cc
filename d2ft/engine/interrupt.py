"""End a run early on a signal, with everything saved and an exit code that says so."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer

logger = logging.getLogger(__name__)

# Schedulers announce a preemption by SIGTERM or, as Slurm's --signal, by SIGUSR1. 75 is sysexits.h's
# EX_TEMPFAIL, "try again later"; 130 is what shells report for Ctrl-C.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class RunInterrupted(SystemExit):
    """
    The run was asked to stop and has saved where it stands.

    As a SystemExit it passes Detectron2's logging of failures and becomes the exit code of the
    process, 75 or 130.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(EXIT_CODES[signal.Signals(signum)])


class Interruption(HookBase):
    """
    On SIGTERM, SIGUSR1 or Ctrl-C save a checkpoint after the current step and end the run.

    All processes end after the same step, whichever of them got the signal. In an evaluation, which
    may take longer than a scheduler waits, each process stops where it is; the checkpoint then has
    its evaluation pending. After the last step the final checkpoint is saved already, and the run
    goes on into its final evaluation.

    Stands right behind the periodic checkpointer, so that a resumed run finds the same hooks
    still to be run for the saved iteration, whichever of the two saved it.
    """

    def __init__(self, checkpointer: FinetuneCheckpointer) -> None:
        """Take the checkpointer that the run resumes from."""
        self._checkpointer = checkpointer
        self._signum = 0
        self._stops_at_once = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take the signals over for the block. Outside of the main thread Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._receive) for signum in EXIT_CODES}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self._signum = self._signum or signum
        if self._stops_at_once:
            self._stops_at_once = False
            raise RunInterrupted(self._signum)

    def after_step(self) -> None:
        """Save and end the run if any process has got a signal."""
        # By gloo, as Detectron2 gathers the losses of each step.
        signum = max(comm.all_gather(self._signum))
        if signum and self.trainer.iter + 1 < self.trainer.max_iter:
            self._save(signum)
            # The launcher kills the others as soon as the first has left.
            comm.synchronize()
            raise RunInterrupted(signum)

    def guard(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``evaluate`` as a function that a signal ends at once, with a checkpoint."""

        def evaluate_unless_interrupted() -> Any:
            if self.trainer.iter == self.trainer.max_iter - 1:
                # Detectron2 calls this after a failure in the last step as well.
                return None
            self._stops_at_once = True
            try:
                if self._signum:
                    raise RunInterrupted(self._signum)
                return evaluate()
            except (RunInterrupted, RuntimeError) as error:
                self._stops_at_once = False
                # A signal to the whole process group ends the loader's workers as well, of which
                # this process may hear first.
                if not self._signum:
                    raise
                self._save(self._signum)
                raise RunInterrupted(self._signum) from error
            finally:
                self._stops_at_once = False

        return evaluate_unless_interrupted

    def _save(self, signum: int) -> None:
        logger.warning(
            "%s: this run ends after iteration %d; go on with --resume",
            signal.Signals(signum).name,
            self.trainer.iter,
        )
        name = f"model_{self.trainer.iter:07d}"
        saved = os.path.basename(self._checkpointer.get_checkpoint_file())
        is_final = self.trainer.iter >= self.trainer.max_iter
        if not is_final and saved != f"{name}.pth":
            self._checkpointer.save(name, iteration=self.trainer.iter)


@contextmanager
def pass_signals_on() -> Iterator[None]:
    """
    Pass the signals to the processes that are started in the block, and exit with their code.

    Raises:
        RunInterrupted: if a signal came and the block failed because its processes ended.
    """
    received: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signum)

    before = {signum: signal.signal(signum, forward) for signum in EXIT_CODES}
    try:
        yield
    except Exception as error:
        if not received:
            raise
        # What a process says once another has left is not the reason of the end.
        logger.info("The processes have ended: %s", str(error).strip().splitlines()[-1])
        raise RunInterrupted(received[0]) from error
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
