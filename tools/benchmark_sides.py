"""Two ways of computing in a process each, for what a process cannot take back: its allocator."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Without weights from a file FrozenBN is the identity, and each residual block doubles the
# variance of its input.
_DAMPING = 0.2


class Side:
    """A process that keeps what it has built, and computes only while it is asked."""

    def __init__(self, build: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        """
        Start the process.

        Args:
            build: a function of a module; what it returns for the arguments answers the calls.
            arguments: of ``build``.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def __call__(self, *request: Any) -> tuple[Any, float]:
        """Return the answer, and how many seconds it took."""
        self._connection.send(request)
        return self._connection.recv()

    def close(self) -> float:
        """End the process; return the most memory that it had, in MiB."""
        self._connection.send(None)
        peak = self._connection.recv()
        self._process.join()
        return peak


def _serve(
    connection: Connection, build: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]
) -> None:
    answer = build(*arguments)
    while (request := connection.recv()) is not None:
        start = time.perf_counter()
        found = answer(*request)
        connection.send((found, time.perf_counter() - start))
    connection.send(peak_memory())


def peak_memory() -> float:
    """Return the most resident memory that this process has had, in MiB; needs Linux."""
    # Not getrusage: a process starts with the value of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def build_seeded(cfg: Any, build_model: Callable[[Any], torch.nn.Module]) -> torch.nn.Module:
    """
    Build a model with random weights, the same in every process and with any builder.

    Args:
        cfg: the config.
        build_model: Detectron2's, or ``FinetuneTrainer.build_model``.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("conv3.norm.weight"):
                tensor.mul_(_DAMPING)
    return model
