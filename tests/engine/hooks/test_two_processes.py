"""Decisions on metrics that only the main process knows, taken by two processes."""

import json
import types

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from d2ft.engine.hooks.best_checkpointer import BestCheckpointer
from d2ft.engine.hooks.early_stopping import EarlyStopping
from d2ft.engine.stop import StopTraining


def _run(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    saved = []
    checkpointer = types.SimpleNamespace(save=lambda name, **_: saved.append(name))
    trainer = types.SimpleNamespace(iter=0, max_iter=9, checkpointer=checkpointer)
    best = BestCheckpointer(1, "segm/AP")
    stopping = EarlyStopping(1, "segm/AP", "max", patience=2)
    best.trainer = stopping.trainer = trainer
    with EventStorage() as trainer.storage:
        try:
            for trainer.iter, value in enumerate([1.0, 3.0, 2.0, 3.0, 9.0]):
                trainer.storage.iter = trainer.iter
                if comm.is_main_process():
                    trainer.storage.put_scalar("segm/AP", value, smoothing_hint=False)
                best.after_step()
                stopping.after_step()
        except StopTraining as stop:
            saved.append(str(stop))
    torch.distributed.barrier()  # neither leaves while the other still talks to it
    torch.distributed.destroy_process_group()
    decisions = [saved, best.iteration, trainer.iter, trainer.max_iter]
    (folder / f"{rank}.json").write_text(json.dumps(decisions))


def test_two_processes_keep_the_same_best_and_stop_together(tmp_path):
    torch.multiprocessing.spawn(_run, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    reason = "segm/AP has not been better than 3.0000 for 2 evaluations"
    assert first == [["model_best", "model_best", "model_final", reason], 1, 4, 4]
