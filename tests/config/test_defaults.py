from detectron2.config import get_cfg as get_detectron2_cfg

from d2ft.config import add_d2ft_config, get_cfg


def test_all_keys_of_detectron2_keep_their_defaults():
    ours, theirs = get_cfg(), get_detectron2_cfg()
    for key in ("LOG_PERIOD", "FINETUNE"):
        del ours[key]
    del ours.DATALOADER["RANDOM_SUBSET_RATIO"], ours.SOLVER["OPTIMIZER"], ours.MODEL["FAST_CPU"]
    assert ours == theirs


def test_adding_the_keys_twice_keeps_what_was_set_between():
    cfg = get_cfg()
    cfg.LOG_PERIOD = 7
    cfg.FINETUNE.SOURCE_CLASSES = ("car",)
    add_d2ft_config(cfg)
    assert cfg.LOG_PERIOD == 7
    assert cfg.FINETUNE.SOURCE_CLASSES == ("car",)


def test_two_configs_share_nothing():
    first, second = get_cfg(), get_cfg()
    first.FINETUNE.SOURCE_CLASSES = ("car",)
    assert second.FINETUNE.SOURCE_CLASSES == ()


def test_a_plain_detectron2_script_reads_our_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        'VERSION: 2\nLOG_PERIOD: 5\nFINETUNE: {SOURCE_CLASSES: ["car"]}\n'
        'SOLVER: {OPTIMIZER: "AdamW"}\nDATALOADER: {RANDOM_SUBSET_RATIO: 0.5}\n'
    )
    cfg = get_detectron2_cfg()
    add_d2ft_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    assert cfg.FINETUNE.SOURCE_CLASSES == ("car",)
    assert (cfg.LOG_PERIOD, cfg.SOLVER.OPTIMIZER) == (5, "AdamW")
