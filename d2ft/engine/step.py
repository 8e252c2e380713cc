"""A training step in parts, and in mixed precision on any device."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from torch.nn.parallel import DistributedDataParallel

from d2ft.config import who_set
from d2ft.data.stream import seed_generators
from d2ft.engine.model import named_losses, unwrapped
from d2ft.errors import UserError

Batch = list[dict[str, Any]]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_FOREGROUND, _BACKGROUND = "roi_head/num_fg_samples", "roi_head/num_bg_samples"


def build_step(cfg: CfgNode, step: SimpleTrainer) -> SimpleTrainer:
    """
    Return the step of a config: ``step`` itself if it asks for nothing that Detectron2 lacks.

    Args:
        cfg: SOLVER.ACCUMULATE, SOLVER.AMP and MODEL.DEVICE are read.
        step: of ``DefaultTrainer``; its model, loader and optimizer are taken.

    Raises:
        UserError: for float16 on the CPU.
    """
    amp = cfg.SOLVER.AMP
    if cfg.SOLVER.ACCUMULATE == 1 and not amp.ENABLED:
        return step
    if amp.ENABLED and amp.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise UserError(
            f"SOLVER.AMP.DTYPE is float16 ({who_set(cfg, 'SOLVER.AMP.DTYPE')}), but it runs on a "
            "GPU only; set SOLVER.AMP.DTYPE bfloat16 for MODEL.DEVICE cpu"
        )
    return FinetuneStep(
        step.model,
        step.data_loader,
        step.optimizer,
        parts=cfg.SOLVER.ACCUMULATE,
        dtype=_DTYPES[amp.DTYPE] if amp.ENABLED else None,
        device=cfg.MODEL.DEVICE,
    )


class FinetuneStep(SimpleTrainer):
    """
    Same as :class:`SimpleTrainer`, but with gradients from parts of the batch, and autocast.

    The gradients of the parts add up to those of the whole batch, up to rounding: Detectron2
    divides the losses of the RPN by images, of the boxes by sampled proposals and of the masks by
    foreground proposals, so each loss of a part is weighted by the part's share of these. The
    shares have to be known before the first backward pass; if the model has ROI heads a forward
    pass without gradients counts them, with the random numbers that the part has later. Those
    follow from what the generator was last seeded with, which is done for each step.

    Equal are the gradients for images of one size (others get the padding of their part), with
    norm layers that do not use statistics of the batch, and for the same sampled anchors and
    proposals: the random numbers of a part are others than in the whole batch. RetinaNet divides
    by a running mean of its foreground, which moves once for each part.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        parts: int = 1,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        """
        Take what a step needs.

        Args:
            model: as in the base class.
            data_loader: as in the base class.
            optimizer: as in the base class.
            parts: number that the batch of a process is split into.
            dtype: of autocast; None for none.
            device: of the model, such as "cuda".
        """
        super().__init__(model, data_loader, optimizer)
        self._parts, self._dtype = parts, dtype
        self._device = torch.device(device).type
        # bfloat16 has the range of float32: its gradients do not vanish.
        self.grad_scaler = torch.amp.GradScaler(self._device, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Load a batch, add up the gradients of its parts, and update the model."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses = self.backward(data)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def backward(self, data: Batch) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch to the parameters; return its losses."""
        if self._parts == 1:
            return self._forward_backward(data, {})
        seed = torch.initial_seed()
        size = len(data) // self._parts
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        shares = self._shares(parts, seed)
        total: dict[str, torch.Tensor] = {}
        scalars: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            seed_generators(seed, number)
            last = number == len(parts) - 1
            with EventStorage(self.iter) as storage, self._synchronised(last):
                losses = self._forward_backward(part, shares[number])
            scalars.append({name: value for name, (value, _) in storage.latest().items()})
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value
        for name in scalars[0]:
            values = [part[name] for part in scalars if name in part]
            get_event_storage().put_scalar(name, sum(values) / len(values))
        return total

    def _forward_backward(
        self, data: Batch, shares: Mapping[str, float]
    ) -> dict[str, torch.Tensor]:
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
            losses = named_losses(self.model(data))
        losses = {name: value * _weight(name, shares) for name, value in losses.items()}
        total: Any = sum(losses.values())
        self.grad_scaler.scale(total).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let processes exchange the gradients once, with those of the last part."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _shares(self, parts: Sequence[Batch], seed: int) -> list[dict[str, float]]:
        """Return for each part: kind of loss ("" for all others) -> its share of the batch."""
        images = [len(part) / sum(map(len, parts)) for part in parts]
        model = unwrapped(self.model)
        if not hasattr(model, "roi_heads"):
            return [{"": share} for share in images]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        foreground, proposals = [], []
        for number, part in enumerate(parts):
            seed_generators(seed, number)
            autocast = torch.autocast(self._device, self._dtype, enabled=self._dtype is not None)
            with EventStorage(self.iter) as storage, torch.no_grad(), autocast:
                model(part)
            # Detectron2 stores the mean over the images of the part.
            counts = {name: round(v * len(part)) for name, (v, _) in storage.latest().items()}
            foreground.append(counts.get(_FOREGROUND, 0))
            proposals.append(foreground[-1] + counts.get(_BACKGROUND, 0))
        for name, buffer in model.named_buffers():  # of norms that learn their statistics
            buffer.copy_(buffers[name])
        return [
            {"": share, "box": box, "mask": mask}
            for share, box, mask in zip(
                images, _fractions(proposals), _fractions(foreground), strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base class, and of the gradients' scale if there is one."""
        state: dict[str, Any] = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _fractions(counts: Sequence[int]) -> list[float]:
    return [count / max(1, sum(counts)) for count in counts]


def _weight(name: str, shares: Mapping[str, float]) -> float:
    if not shares:
        return 1.0
    if name.startswith("loss_mask") and "mask" in shares:
        return shares["mask"]
    if name.startswith(("loss_cls", "loss_box_reg")) and "box" in shares:
        return shares["box"]
    return shares[""]
