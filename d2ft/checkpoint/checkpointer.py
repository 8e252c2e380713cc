"""Load weights with a report of what was loaded, and save files that describe themselves."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm

from d2ft.checkpoint.class_names import check_class_names, known_classes
from d2ft.checkpoint.convert.build import check_required_config
from d2ft.checkpoint.coverage import check_coverage
from d2ft.checkpoint.head_remap import HeadInit, remap_class_rows
from d2ft.checkpoint.last_checkpoint import find_whole_checkpoint
from d2ft.checkpoint.load_report import LoadReport
from d2ft.checkpoint.safe_load import METADATA_KEY, load_checkpoint_file
from d2ft.checkpoint.weights import (
    apply_query,
    build_load_report,
    fetch_weights,
    match_names,
)
from d2ft.errors import UserError
from d2ft.files import atomic_write, sha256

logger = logging.getLogger(__name__)

METADATA_FORMAT = 1


class FinetuneCheckpointer(DetectionCheckpointer):
    """
    Same as :class:`DetectionCheckpointer`, but for weights of another dataset:

    1. files are read without running what is in them (:mod:`d2ft.checkpoint.safe_load`);
    2. what was loaded is reported, and a file that leaves the backbone random, or gives the rows
       of one class to another, is refused before the model is touched;
    3. on demand the rows of each class of the file become those of the class of the same name;
    4. what it saves holds plain data only, carries the class names, and appears on the disk whole
       or not at all; ``model_best`` does not become the checkpoint to resume from.

    Checkpoints are saved to local folders.

    Args:
        model, save_dir, save_to_disk, checkpointables: as in the base class.
        thing_classes: class names in the row order of the model's heads; empty if unknown.
        source_classes: class names in the row order of a MODEL.WEIGHTS file that neither says
            them itself nor is of the zoo (``FINETUNE.SOURCE_CLASSES``).
        head_init: what becomes of the file's class rows. With ``every_tensor``, and for a
            checkpoint that is resumed, they are loaded as they are.
        every_tensor: refuse a file that lacks a tensor of the model, as for evaluation.
        report_dir: folder for ``load_report.json``; empty to write none.
        cfg: of the model. Converted weights that need other settings are then refused.
        metadata: plain data that every saved file carries beside the class names.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        thing_classes: Sequence[str] = (),
        source_classes: Sequence[str] = (),
        head_init: HeadInit = HeadInit(),  # noqa: B008, it is immutable
        every_tensor: bool = False,
        report_dir: str = "",
        cfg: CfgNode | None = None,
        metadata: Mapping[str, Any] | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.thing_classes = tuple(thing_classes)
        self.source_classes = tuple(source_classes)
        self.head_init = head_init
        self.every_tensor = every_tensor
        self.report_dir = report_dir
        self.cfg = cfg
        self.metadata = dict(metadata or {})
        self._source = ""
        self._local_file = ""
        self._resuming = False
        #: Whether what was resumed is the checkpoint of a last iteration.
        self.resumed_final = False

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        Same as in the base class, but a resumed checkpoint has to give every tensor.

        A last checkpoint that is damaged is passed over in favour of the one before.

        Raises:
            UserError: as :meth:`load`; also if ``last_checkpoint`` names a file that is gone, or
                no checkpoint can be read.
        """
        last = find_whole_checkpoint(self.save_dir) if resume else ""
        self._resuming = bool(last)
        self.resumed_final = os.path.basename(last) == "model_final.pth"
        try:
            return self.load(last) if last else self.load(path, checkpointables=[])
        finally:
            self._resuming = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Same as in the base class, but reports what was loaded and refuses what does not fit.

        Raises:
            UserError: if the file cannot be had or read, is refused by
                :func:`~d2ft.checkpoint.coverage.check_coverage`, by its class names or because
                it needs another config. The model is then as it was.
        """
        if not path:
            if self.every_tensor:
                raise UserError(
                    "MODEL.WEIGHTS is empty, so there is nothing to evaluate. Set MODEL.WEIGHTS "
                    "<OUTPUT_DIR>/model_final.pth or give --resume."
                )
            logger.info("MODEL.WEIGHTS is empty: training starts from scratch.")
            return {}
        self._source, self._local_file = path, fetch_weights(path)
        try:
            return super().load(path, checkpointables)
        finally:
            # The base class forgets it only when all went well, and asserts at the next load.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        return apply_query(load_checkpoint_file(filename), self._source)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self.cfg is not None:
            check_required_config(self.cfg, checkpoint, self._source)
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        checkpoint["model"] = match_names(shapes, checkpoint, self._source)
        checkpoint.pop("matching_heuristics", None)
        # A resumed run keeps the report of the weights it once started from.
        writes = bool(self.report_dir) and not self._resuming and comm.is_main_process()
        digest = sha256(self._local_file) if writes else ""
        self._remember_source(checkpoint, digest)
        # Neither what the user says of MODEL.WEIGHTS nor the warning is about our own checkpoint.
        given = () if self._resuming else self.source_classes
        file_classes = known_classes(checkpoint, self._source, given)
        as_it_is = self.every_tensor or self._resuming
        head_init = HeadInit() if as_it_is else self.head_init
        report = build_load_report(
            shapes,
            checkpoint,
            self._source,
            thing_classes=self.thing_classes,
            file_classes=file_classes,
            head_init=head_init,
            sha256=digest,
        )
        check_coverage(report, every_tensor=as_it_is)
        warning = check_class_names(
            report,
            file_classes,
            self.thing_classes,
            class_map=head_init.class_map,
            every_tensor=as_it_is,
        )
        if report.remapped:
            self._remap(checkpoint, report, len(file_classes or ()))
        incompatible = super()._load_model(checkpoint)
        logger.log(
            logging.WARNING if report.surprises else logging.INFO,
            report.format_table(len(self.thing_classes)),
        )
        if warning and not self._resuming:
            logger.warning(warning)
        if writes:
            report.write(Path(self.report_dir) / "load_report.json")
        return incompatible

    def _remap(self, checkpoint: dict[str, Any], report: LoadReport, num_source: int) -> None:
        own = self.model.state_dict()
        generator = torch.Generator().manual_seed(self.head_init.seed)
        remapped = {
            tensor.name: remap_class_rows(
                checkpoint["model"][tensor.name],
                [start.source_row for start in report.classes],
                num_source=num_source,
                init=own[tensor.name],
                layout=tensor.layout,
                unmatched=self.head_init.unmatched,
                generator=generator,
            )
            for tensor in report.remapped
        }
        checkpoint["model"] = {**checkpoint["model"], **remapped}

    def _remember_source(self, checkpoint: Mapping[str, Any], digest: str) -> None:
        """Keep what the run started from for the files it saves; a resumed run keeps the first."""
        if self._resuming:
            description = checkpoint.get(METADATA_KEY)
            source = description.get("source") if isinstance(description, dict) else None
            self.metadata["source"] = source if isinstance(source, dict) else None
        elif digest:
            self.metadata["source"] = {"weights": self._source, "sha256": digest}

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Say nothing: the report has said it already, with what it means."""

    def save(self, name: str, *, tag: bool = True, with_state: bool = True, **extra: Any) -> None:
        """
        Same as in the base class, but atomic, and with plain data only.

        Args:
            name: of the file, without ``.pth``.
            tag: ``--resume`` goes on from this file. ``model_best`` never is the one: it may be
                far older than the last checkpoint of the training sequence.
            with_state: keep the state of the trainer as well, which a file to resume from needs.
            extra: entries of the file, made of tensors, str, int, float, bool, None, list, tuple
                and dict. NumPy scalars and subclasses of the containers are made plain.

        Raises:
            TypeError: if there is anything else in what is to be saved, naming where.
            UserError: if the file cannot be written; the checkpoints before are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        # The state dict is an OrderedDict whose _metadata tells the version of each module.
        model = self.model.state_dict()
        for key in model:
            model[key] = make_plain(model[key], f"model.{key}")
        kept = self.checkpointables if with_state else {}
        entries = {key: obj.state_dict() for key, obj in kept.items()} | extra
        entries[METADATA_KEY] = {
            **self.metadata,
            "format": METADATA_FORMAT,
            "thing_classes": list(self.thing_classes),
        }
        content = {key: make_plain(value, key) for key, value in entries.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_write(path, "wb") as file:
                torch.save({"model": model, **content}, file)
        except (OSError, RuntimeError) as error:  # the second is torch's, for a write that failed
            raise UserError(
                f"cannot save {path} ({_first_os_error(error)}). What was saved before is "
                f"untouched, last {self.get_checkpoint_file() or 'nothing'}; make room and go on "
                "with --resume"
            ) from error
        if tag and not name.startswith("model_best"):
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Same as in the base class, but atomic."""
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)


def _first_os_error(error: BaseException) -> BaseException:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def make_plain(value: Any, where: str) -> Any:
    """
    Return ``value`` made only of what ``torch.load(weights_only=True)`` admits.

    Args:
        value: a tree of containers.
        where: path of ``value`` for the message, such as ``trainer.hooks``.

    Raises:
        TypeError: if there is a value of another type; the message has its path.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, torch.Tensor) and type(value.detach()) is torch.Tensor:
        return value.detach()  # of a Parameter the values
    if isinstance(value, dict):
        return {
            make_plain(key, f"{where}, key {key!r}"): make_plain(item, f"{where}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [make_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: only tensors, str, "
        "int, float, bool, None, list, tuple and dict load without running code"
    )
