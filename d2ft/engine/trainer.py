"""Train and evaluate: where data, weights, schedule and metrics meet."""

import logging
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch.utils.data import DataLoader

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.describe import describe_run
from d2ft.checkpoint.weights import build_head_init
from d2ft.config import who_set
from d2ft.data import (
    build_test_loader,
    build_train_loader,
    check_same_records,
    class_names,
    describe_columns,
    epoch_samples,
    register_declared_datasets,
    resolve_from_data,
    training_records,
)
from d2ft.data.bad_images import BadImages
from d2ft.data.cache import loaded_once
from d2ft.data.record_store import columns_of
from d2ft.data.stream import SampleStream, seed_generators
from d2ft.engine.hooks.build import build_hooks, make_interruptible
from d2ft.engine.interrupt import Interruption
from d2ft.engine.model import prepare_model
from d2ft.engine.resume import ResumeInStep, warn_of_other_order
from d2ft.engine.run_folder import (
    check_output_dir,
    is_complete,
    mark_complete,
    run_lock,
    write_description,
)
from d2ft.engine.setup import inference_cfg, resolve_cfg
from d2ft.engine.step import build_step
from d2ft.engine.stop import StopTraining
from d2ft.errors import UserError
from d2ft.evaluation import build_run_evaluator
from d2ft.evaluation.predictions import results_json
from d2ft.files import atomic_write
from d2ft.preflight import check_config_and_data
from d2ft.solver import (
    build_lr_scheduler,
    build_optimizer,
    describe_parameters,
    describe_schedule,
    resolve_schedule,
)
from d2ft.solver.schedule import iterations_per_epoch

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"


class FinetuneTrainer(DefaultTrainer):
    """
    Same as :class:`DefaultTrainer`, but made to fine-tune a pretrained detector.

    1. Config and datasets are checked before anything is built or written; a command line
       (:func:`d2ft.engine.run_train_net`) checks the weights then as well.
    2. Weights are loaded safely; what is missing or does not fit is reported or refused.
    3. Data order, augmentation and random numbers of a step depend on SEED and iteration only, so
       that ``--resume`` goes on as if the run had not been stopped.
    4. Each dataset is evaluated by its own metrics, and OUTPUT_DIR gets ``results.json``.

    Attributes:
        seed: of data order, augmentation and steps: SEED, or on resume that of the checkpoint.
    """

    _trainer: SimpleTrainer

    @loaded_once()
    def __init__(self, cfg: CfgNode) -> None:
        """
        Check and build everything that ``cfg`` describes.

        Args:
            cfg: with d2ft's keys, from :func:`d2ft.config.load_cfg` or ``get_cfg``.

        Raises:
            UserError: for what the checks before a run find.
        """
        cfg = resolve_cfg(cfg)
        register_declared_datasets(cfg)
        cfg = resolve_from_data(cfg)
        self._preflight = check_config_and_data(cfg, world_size=comm.get_world_size())
        columns = columns_of(training_records(cfg, say=False))
        samples = epoch_samples(cfg, columns)
        self._per_epoch = iterations_per_epoch(samples, cfg.SOLVER.IMS_PER_BATCH)
        cfg = resolve_schedule(cfg, samples)
        images = len(set(columns.file_names))
        self._preflight["schedule"] = describe_schedule(cfg, num_images=images, num_samples=samples)
        self._data = describe_columns(columns)
        if not logging.getLogger("d2ft").isEnabledFor(logging.INFO):
            setup_logger(distributed_rank=comm.get_rank(), name="d2ft")
        self.seed: int = cfg.SEED
        # New heads start from the same values in every run with this seed.
        seed_generators(self.seed)
        super().__init__(cfg)
        logger.info("What learns:\n%s", describe_parameters(self.model, self.optimizer))
        logger.info("Schedule:\n%s", tabulate(self._preflight["schedule"].items()))

    def build_hooks(self) -> list[HookBase]:
        """Return Detectron2's hooks and those of :func:`d2ft.engine.hooks.build.build_hooks`."""
        # DefaultTrainer has just made its own checkpointer, which its hooks would keep.
        self.checkpointer = self.build_checkpointer(
            self.cfg,
            self.model,
            self.cfg.DATASETS.TRAIN[0],
            report_dir=self.cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
        )
        self._trainer = build_step(self.cfg, self._trainer)
        stock = super().build_hooks()
        built = build_hooks(
            self.cfg, stock, self.test, self.model, iterations_per_epoch=self._per_epoch
        )
        self._interruption = Interruption(self.checkpointer)
        self._resume = ResumeInStep(self.checkpointer, self.cfg.OUTPUT_DIR)
        return make_interruptible(built, self._interruption, self._resume)

    def train(self) -> dict[str, Any] | None:
        """
        Train from where the weights or the checkpoint stand; return the last evaluation.

        Raises:
            UserError: if the checkpoint has more iterations than SOLVER.MAX_ITER, or OUTPUT_DIR
                holds another run or is in use by one.
            RunInterrupted: with the exit code, after a signal; the run can be resumed.
        """
        if self.start_iter > self.max_iter:
            raise UserError(
                f"SOLVER.MAX_ITER is {self.max_iter} ({who_set(self.cfg, 'SOLVER.MAX_ITER')}), but "
                f"the checkpoint in {self.cfg.OUTPUT_DIR} has {self.start_iter} iterations; raise "
                "it to train further"
            )
        check_output_dir(self.cfg.OUTPUT_DIR, resume=self.start_iter > 0)
        is_main = comm.is_main_process()
        with run_lock(self.cfg.OUTPUT_DIR) if is_main else nullcontext():
            if is_main:
                write_description(self.cfg, self.seed, self._preflight)
            if self._nothing_is_left():
                return None
            with self._interruption.listen():
                self._train()
            if is_main:
                mark_complete(self.cfg.OUTPUT_DIR, self.max_iter)
        return getattr(self, "_last_eval_results", None)

    def _train(self) -> None:
        stream = getattr(self.data_loader, "dataset", None)
        if isinstance(stream, SampleStream):
            stream.seed, stream.start_iter = self.seed, self.start_iter
        elif self.start_iter > 0:
            logger.warning(
                "build_train_loader gives a loader without SampleStream: this resumed run does "
                "not continue the data order of the stopped one"
            )
        try:
            super().train()
        except StopTraining as stop:
            logger.info("Training stopped after %d iterations: %s", self.iter, stop)
        finally:
            # Ends the loader's workers, also where an exception keeps the trainer alive.
            self._trainer._data_loader_iter_obj = None
        if comm.is_main_process() and (bad_images := BadImages.of(self.cfg)):
            bad_images.log_all()

    def before_train(self) -> None:
        """Same as in the base class; a resumed run then ends the step of its checkpoint."""
        super().before_train()
        self._resume.end_step()

    def _nothing_is_left(self) -> bool:
        """Tell on all processes whether the run is complete, its last evaluation included."""
        if self.start_iter < self.max_iter:
            return False
        logger.info(
            "The run in %s is complete: %d of %d iterations. Nothing is left to train.",
            self.cfg.OUTPUT_DIR,
            self.start_iter,
            self.max_iter,
        )
        folder = Path(self.cfg.OUTPUT_DIR)
        complete = self.checkpointer.resumed_final and is_complete(folder, self.max_iter)
        if self.cfg.DATASETS.TEST:
            complete = complete and (folder / RESULTS_FILE).is_file()
        complete = comm.all_gather(complete)[0]  # what the main process sees
        if not complete:
            logger.info("Its last evaluation did not end: evaluating again.")
        return complete

    def state_dict(self) -> dict[str, Any]:
        """Return DefaultTrainer's state and what the order of the data depends on."""
        return {**super().state_dict(), **self._order(), "data": self._data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a run to be resumed; its seed replaces that of the config."""
        check_same_records(state_dict.get("data"), self._data, self.cfg.DATASETS.TRAIN)
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        warn_of_other_order(state_dict, self._order())

    def _order(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "ims_per_batch": self.cfg.SOLVER.IMS_PER_BATCH,
            "world_size": comm.get_world_size(),
        }

    @classmethod
    def build_checkpointer(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        dataset_name: str,
        *,
        every_tensor: bool = False,
        report_dir: str = "",
        **checkpointables: Any,
    ) -> FinetuneCheckpointer:
        """
        Return the checkpointer of OUTPUT_DIR.

        Args:
            cfg: the resolved config.
            model: whose weights are loaded and saved.
            dataset_name: the model has its classes.
            every_tensor: refuse a file that leaves any tensor at its initial value.
            report_dir: where ``load_report.json`` goes; none is written if empty.
            checkpointables: saved and resumed with the model.
        """
        return FinetuneCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            thing_classes=class_names(dataset_name),
            source_classes=cfg.FINETUNE.SOURCE_CLASSES,
            head_init=build_head_init(cfg),
            every_tensor=every_tensor,
            report_dir=report_dir,
            cfg=cfg,
            metadata=describe_run(cfg),
            **checkpointables,
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Same as :meth:`DefaultTrainer.build_model`, then :func:`prepare_model`."""
        return prepare_model(cfg, super().build_model(cfg))

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Call :func:`d2ft.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Call :func:`d2ft.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> "DataLoader[list[dict[str, Any]]]":
        """Call :func:`d2ft.data.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(
        cls, cfg: CfgNode, dataset_name: str
    ) -> "DataLoader[list[dict[str, Any]]]":
        """Call :func:`d2ft.data.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Call :func:`d2ft.evaluation.build_run_evaluator`."""
        return build_run_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: torch.nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """
        Same as :meth:`DefaultTrainer.test`, but OUTPUT_DIR gets results and predictions as well.

        In ``results.json`` a metric that could not be computed is null. The predictions on each
        test set are in ``predictions/<dataset>.json``.

        Returns:
            task -> metric -> percent; with several test sets dataset -> task -> metric. On
            processes other than the main one without the tasks.
        """
        path = Path(cfg.OUTPUT_DIR) / RESULTS_FILE
        if comm.is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            with atomic_write(path) as file:
                file.write(results_json(results))
        return results

    @classmethod
    def evaluate(cls, cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
        """
        Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR.

        Every tensor of the model must come from the file. What is written goes to
        ``OUTPUT_DIR/inference``, beside what training wrote.

        Args:
            cfg: the resolved config; its training sets are not needed.
            resume: as ``--resume``.

        Returns:
            As :meth:`test`.

        Raises:
            UserError: if the weights do not fill the whole model.
        """
        model = cls.build_model(cfg)
        output = inference_cfg(cfg)
        checkpointer = cls.build_checkpointer(
            cfg, model, cfg.DATASETS.TEST[0], every_tensor=True, report_dir=output.OUTPUT_DIR
        )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        results = cls.test(output, model)
        if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
        return results
