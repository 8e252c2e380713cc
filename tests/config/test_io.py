import copy
import logging
import pickle
import random
import re
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.config.defaults import _C as detectron2_defaults

from d2ft.config import get_cfg, load_cfg, who_set
from d2ft.config.tree import read_tree
from d2ft.errors import UserError

CITYSCAPES_FT = Path(__file__).parents[2] / "configs" / "cityscapes_ft.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, so that messages name files relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def refusal(text, opts=()):
    """Return the message with which a file ``a.yaml`` of this text is refused."""
    with pytest.raises(UserError) as caught:
        load_cfg(write("a.yaml", text), opts)
    return str(caught.value)


# --- bases


def plain(tree):
    return {k: plain(e.value) if isinstance(e.value, dict) else e.value for k, e in tree.items()}


def random_tree(rng, depth=0):
    """A mapping whose names overlap with those of the next one, with values and groups mixed."""
    tree = {}
    for name in rng.sample("ABCDE", rng.randint(1, 4)):
        if depth < 2 and rng.random() < 0.5:
            tree[name] = random_tree(rng, depth + 1)
        else:
            tree[name] = rng.choice([1, 2.5, "x", True, None, [1, 2], [[3]], {}])
    return tree


@pytest.mark.parametrize("seed", range(40))
def test_bases_merge_as_in_fvcore(seed):
    # f0 inherits nothing, f4 whatever it drew: lists, single names, diamonds, other folders.
    rng = random.Random(seed)
    names = ["f0.yaml", "sub/f1.yaml", "f2.yaml", "sub/deep/f3.yaml", "f4.yaml"]
    for i, name in enumerate(names):
        tree = random_tree(rng)
        bases = [str(Path(n).resolve()) for n in rng.sample(names[:i], rng.randint(0, min(i, 3)))]
        if bases:
            tree["_BASE_"] = bases[0] if len(bases) == 1 and rng.random() < 0.5 else bases
        write(name, yaml.safe_dump(tree))
    try:
        expected = CfgNode.load_yaml_with_base("f4.yaml")
    except AssertionError:
        with pytest.raises(UserError, match="is a group of keys here, but a single value at"):
            read_tree("f4.yaml", ())
    else:
        assert plain(read_tree("f4.yaml", ())) == expected


def test_relative_bases_merge_as_in_fvcore():
    write("base/one.yaml", "A: {X: 1, Y: [1, 2]}\n_BASE_: deep/zero.yaml\n")
    write("base/deep/zero.yaml", "A: {X: 0, Z: 0}\nB: zero\n")
    write("base/two.yaml", "A: {Y: [3]}\nC: two\n")
    write("conf/a.yaml", "_BASE_: [../base/one.yaml, ../base/two.yaml]\nC: own\n")
    tree = plain(read_tree("conf/a.yaml", ()))
    assert tree == {"A": {"X": 1, "Y": [3], "Z": 0}, "B": "zero", "C": "own"}
    assert tree == CfgNode.load_yaml_with_base("conf/a.yaml")


def test_anchors_and_merge_keys_are_read_as_in_fvcore():
    write("a.yaml", "A: &a {X: 1, Y: 2}\nB:\n  <<: *a\n  Y: 3\nC: *a\nL: [&v 1, *v]\n")
    assert plain(read_tree("a.yaml", ())) == CfgNode.load_yaml_with_base("a.yaml")


def test_home_folder_is_expanded_in_a_base(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    write("home/base.yaml", "SEED: 3\n")
    assert load_cfg(write("a.yaml", "_BASE_: ~/base.yaml\n")).SEED == 3


def test_base_cycle_is_told_with_its_chain():
    write("b.yaml", "_BASE_: [c.yaml]\n")
    write("c.yaml", "SEED: 1\n_BASE_: ./a.yaml\n")
    message = refusal("_BASE_: b.yaml\n")
    assert message.startswith("c.yaml:2: _BASE_ leads back")
    assert message.endswith("a.yaml -> b.yaml -> c.yaml -> a.yaml")


def test_file_that_is_its_own_base_is_refused():
    assert refusal("_BASE_: a.yaml\n").endswith("a.yaml -> a.yaml")


def test_missing_base_is_told_with_the_path_that_was_tried():
    write("sub/b.yaml", "_BASE_: gone.yaml\n")
    message = refusal("_BASE_: sub/b.yaml\n")
    assert message.startswith("sub/b.yaml:1: _BASE_ names 'gone.yaml', but there is no file ")
    assert "no file sub/gone.yaml" in message


@pytest.mark.parametrize("bases", ['("b.yaml", "c.yaml")', "(b.yaml, c.yaml)"])
def test_bases_written_as_a_tuple_are_answered_with_a_yaml_list(bases):
    assert "write a YAML list: _BASE_: [b.yaml, c.yaml]" in refusal(f"_BASE_: {bases}\n")


@pytest.mark.parametrize("bases", ["3", "[a.yaml, 3]", "{a: b}", "''"])
def test_base_that_is_no_file_name_is_refused(bases):
    assert re.match(r"a\.yaml:1: _BASE_ is a file name or a YAML list", refusal(f"_BASE_: {bases}"))


def test_base_inside_a_group_is_refused():
    message = refusal("MODEL:\n  _BASE_: b.yaml\n")
    assert message.startswith("a.yaml:2: there is no config key MODEL._BASE_; _BASE_ is for files")


# --- YAML


@pytest.mark.parametrize("text", ["", "# a comment\n", "---\n", "\ufeffSEED: -1\n"])
def test_empty_file_gives_the_defaults(text):
    assert load_cfg(write("a.yaml", text)) == get_cfg()


@pytest.mark.parametrize("path", [None, ""])
def test_no_file_gives_defaults_and_overrides(path):
    assert load_cfg(path) == get_cfg()
    assert load_cfg(path, ["SEED", "3"]).SEED == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SEED: 1\nSOLVER: [1, 2\n", "a.yaml:3: not valid as a config: "),
        ("SEED: 1\n\tX: 2\n", "a.yaml:2: not valid as a config: "),
        ("SEED: 1\nX: \x07\n", "a.yaml:2: not valid as a config: special characters"),
        ("SEED: 1\n---\nSEED: 2\n", "a.yaml:2: not valid as a config: but found another document"),
        ("SEED: 1\nSOLVER: {}\nSEED: 2\n", "a.yaml:3: .*SEED was already given in line 1"),
        ("SOLVER: {GAMMA: 1, GAMMA: 1}\n", "a.yaml:1: .*GAMMA was already given in line 1"),
        ("- SEED\n", "a.yaml: a config consists of lines KEY: value"),
        ("SOLVER:\n  no: 1\n", "a.yaml:2: YAML reads the key as False; put it in quotes"),
        ("MODEL: &m\n  A: *m\n", "a.yaml: nests too deeply, or an anchor contains itself"),
        ("SEED: &s [*s]\n", "a.yaml:1: not valid as a config: found unconstructable recursive"),
        ("A: " + "[" * 500, "a.yaml: nests too deeply"),
    ],
)
def test_broken_yaml_is_one_error_with_the_line(text, message):
    assert re.match(message, refusal(text))


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.mkdir ["ran"]',
        '!!python/object/new:os.mkdir {args: ["ran"]}',
        "!!python/name:os.system",
        "!!python/tuple [1]",
        '[1, !!python/object/apply:eval ["1"]]',
    ],
)
def test_python_tag_is_refused_and_runs_nothing(value, folder):
    message = refusal(f"SEED: 1\nOUTPUT_DIR: {value}\n")
    assert re.match(r"a\.yaml:2: .*the tag \S*python/\S+ is refused", message)
    assert not (folder / "ran").exists()


def test_unreadable_files_are_named(folder):
    with pytest.raises(UserError, match=r"^gone\.yaml: cannot read the config: No such file"):
        load_cfg("gone.yaml")
    with pytest.raises(UserError, match="cannot read the config: Is a directory"):
        load_cfg(folder)
    Path("a.yaml").write_bytes(b"SEED: \xff\xfe")
    with pytest.raises(UserError, match=r"^a\.yaml: a config is UTF-8 text"):
        load_cfg("a.yaml")


# --- values


def _assert_holds(ours, theirs):
    for key, value in theirs.items():
        if isinstance(value, CfgNode):
            _assert_holds(ours[key], value)
        else:
            assert ours[key] == value, key


def test_values_are_read_as_in_detectron2():
    text = (
        "VERSION: 2\n"
        "MODEL: {PIXEL_MEAN: '(1.0, 2, 3)', MASK_ON: 'True', WEIGHTS: 'a/b.pkl', RPN: {CONV_DIMS: [7]}}\n"
        "SOLVER: {BASE_LR: 1e-3, STEPS: [1, 2], WEIGHT_DECAY_BIAS: 0.5, MAX_ITER: '70'}\n"
        "INPUT: {MIN_SIZE_TRAIN: '(1, 2)'}\n"
        "TEST: {EXPECTED_RESULTS: [['bbox', 'AP', 38.5, 0.2]]}\n"
        "OUTPUT_DIR: 'runs/1'\n"
    )
    cfg = get_detectron2_cfg()
    cfg.merge_from_file(write("a.yaml", text), allow_unsafe=False)
    opts = ["SOLVER.BASE_LR", "0.5", "INPUT.MIN_SIZE_TRAIN", "(3,)", "MODEL.WEIGHTS", "''"]
    cfg.merge_from_list(opts)
    ours = load_cfg("a.yaml", opts)
    # d2ft adds keys to these groups, and changes none.
    for group in ("MODEL", "INPUT", "SOLVER", "TEST"):
        _assert_holds(ours[group], cfg[group])
    assert ours.OUTPUT_DIR == cfg.OUTPUT_DIR
    assert [type(ours.INPUT.MIN_SIZE_TRAIN), type(ours.MODEL.PIXEL_MEAN)] == [tuple, list]


def test_int_is_converted_where_a_float_is_expected():
    cfg = load_cfg(write("a.yaml", "SOLVER: {BASE_LR: 1}\n"), ["SOLVER.GAMMA", "2"])
    assert [type(cfg.SOLVER.BASE_LR), type(cfg.SOLVER.GAMMA)] == [float, float]


def test_folder_may_be_named_by_digits():
    assert load_cfg(None, ["OUTPUT_DIR", "2026"]).OUTPUT_DIR == "2026"


def test_type_is_that_of_the_default_not_of_an_earlier_value():
    write("a.yaml", "SOLVER: {WEIGHT_DECAY_BIAS: 0}\n")
    cfg = load_cfg("a.yaml", ["SOLVER.WEIGHT_DECAY_BIAS", "0.5"])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.5
    with pytest.raises(UserError, match=r"SOLVER\.BASE_LR must be a number"):
        load_cfg("a.yaml", ["SOLVER.BASE_LR", "fast"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "DATASETS:\n  TRAIN: my_set\n",
            'a.yaml:2: DATASETS.TRAIN must be a tuple, but is the str "my_set"; '
            'write TRAIN: ("my_set",)',
        ),
        ("MODEL:\n  WEIGHTS:\n", "a.yaml:2: MODEL.WEIGHTS must be a string, but is empty"),
        ("SEED:\n", "a.yaml:1: SEED must be a whole number, but is empty"),
        ('DATASETS:\n  TRAIN: ("my_set")\n', 'write TRAIN: ("my_set",)'),
        ("DATASETS:\n  TRAIN: (my_set,)\n", 'write TRAIN: ("my_set",)'),
        ("DATASETS:\n  TRAIN: a, b\n", 'write TRAIN: ("a", "b")'),
        ("SOLVER:\n  STEPS: 20755\n", "write STEPS: (20755,)"),
        ("MODEL:\n  PIXEL_MEAN: 1.5\n", "must be a list, but is the float 1.5; write PIXEL_MEAN: [1.5]"),
        ("SOLVER:\n  MAX_ITER: 1e3\n", "must be a whole number, but is the float 1000.0; write MAX_ITER: 1000"),
        ("SOLVER:\n  MAX_ITER: 1.5\n", "must be a whole number, but is the float 1.5"),
        ("SOLVER:\n  BASE_LR: fast\n", 'must be a number, but is the str "fast"'),
        ("MODEL:\n  MASK_ON: 1\n", "must be True or False, but is the int 1"),
        ("OUTPUT_DIR: 2026\n", 'must be a string, but is the int 2026; write OUTPUT_DIR: "2026"'),
        ("OUTPUT_DIR: 2026-01-31\n", "must be a string, but is the date datetime.date(2026, 1, 31)"),
        ("SOLVER: 3\n", "a.yaml:1: SOLVER is a group of keys such as SOLVER.ACCUMULATE, not a value as 3"),
        ("SOLVER:\n", "a.yaml:1: SOLVER is a group of keys"),
        ("SEED:\n  X: 3\n", "a.yaml:1: SEED is a single value such as -1, not a group of keys"),
    ],
)  # fmt: skip
def test_value_of_the_wrong_type_is_told_with_what_would_fit(text, message):
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("typed", "unknown", "nearest"),
    [
        ("SOLVER.BASE_LRR", "SOLVER.BASE_LRR", "SOLVER.BASE_LR"),
        ("SOLVER.base_lr", "SOLVER.base_lr", "SOLVER.BASE_LR"),
        ("SLOVER.BASE_LR", "SLOVER", "SOLVER"),
        ("MODEL.NUM_CLASSES", "MODEL.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("MODEL.ROI_HEAD.NUM_CLASSES", "MODEL.ROI_HEAD", "MODEL.ROI_HEADS"),
        ("BASE_LR", "BASE_LR", "SOLVER.BASE_LR"),
        ("LOG_PERIODS", "LOG_PERIODS", "LOG_PERIOD"),
    ],
)
def test_mistyped_key_is_answered_with_the_nearest(typed, unknown, nearest):
    with pytest.raises(UserError) as caught:
        load_cfg(None, [typed, "1"])
    assert str(caught.value) == (
        f"command line: there is no config key {unknown}; did you mean {nearest}?"
    )


def test_mistyped_key_is_told_with_the_line_of_the_base_that_has_it():
    write("b.yaml", "SEED: 1\nSOLVER:\n  GAMMA: 0.1\n  MAXITER: 3\n")
    assert refusal("_BASE_: b.yaml\n") == (
        "b.yaml:4: there is no config key SOLVER.MAXITER; did you mean SOLVER.MAX_ITER?"
    )


def test_key_like_nothing_known_gets_no_guess():
    assert "defaults.py" in refusal("QQQQ: 1\n")


def test_dotted_key_in_yaml_is_told_to_be_nested():
    assert "without dots" in refusal("SOLVER.BASE_LR: 0.1\n")


def test_group_that_replaces_a_value_of_its_base_is_refused():
    write("b.yaml", "\nOUTPUT_DIR: x\n")
    assert refusal("_BASE_: b.yaml\nOUTPUT_DIR: {A: 1}\n") == (
        "a.yaml:2: OUTPUT_DIR is a group of keys here, but a single value at b.yaml:2"
    )


@pytest.mark.parametrize("version", ["1", "3", "two"])
def test_other_version_is_refused(version):
    assert refusal(f"SEED: 1\nVERSION: {version}\nOLD: 1\n").startswith("a.yaml:2: VERSION is ")


def test_file_without_version_is_read_as_version_2_without_a_warning(caplog):
    assert load_cfg(write("a.yaml", "MODEL: {MASK_ON: True}\n")).VERSION == 2
    assert not caplog.records


# --- command line


def test_name_without_its_comma_on_the_command_line_is_answered():
    with pytest.raises(UserError) as caught:
        load_cfg(None, ["DATASETS.TRAIN", '("my_set")'])
    assert str(caught.value) == (
        'command line: DATASETS.TRAIN must be a tuple, but is the str "my_set"; '
        "write DATASETS.TRAIN '(\"my_set\",)'"
    )


@pytest.mark.parametrize("opts", [["SEED"], ["SEED=3"], ["SEED", "1", "OUTPUT_DIR"]])
def test_key_without_value_is_refused(opts):
    with pytest.raises(UserError, match=rf"KEY VALUE .* but {opts[-1]} is left without a value"):
        load_cfg(None, opts)


def test_base_on_the_command_line_is_refused():
    with pytest.raises(UserError, match="_BASE_ is for files"):
        load_cfg(None, ["_BASE_", "a.yaml"])


# --- keys of other origin


@pytest.fixture
def open_group(monkeypatch):
    monkeypatch.setitem(detectron2_defaults.DATASETS, "CUSTOM", CfgNode(new_allowed=True))


@pytest.mark.usefixtures("open_group")
def test_open_group_takes_new_keys_from_files_and_command_line():
    write("b.yaml", 'DATASETS: {CUSTOM: {a: {ROOT: x, CLASSES: \'("car", ("bus", 1))\'}}}\n')
    write("a.yaml", "_BASE_: b.yaml\nDATASETS: {CUSTOM: {a: {ROOT: y}, b: {ROOT: z}}}\n")
    opts = ["DATASETS.CUSTOM.a.FORMAT", "coco", "DATASETS.CUSTOM.c.ROOT", "w"]
    cfg = load_cfg("a.yaml", opts)
    assert cfg.DATASETS.CUSTOM == {
        "a": {"ROOT": "y", "CLASSES": ["car", ["bus", 1]], "FORMAT": "coco"},
        "b": {"ROOT": "z"},
        "c": {"ROOT": "w"},
    }
    assert who_set(cfg, "DATASETS.CUSTOM.a.CLASSES") == "b.yaml:1"
    assert who_set(cfg, "DATASETS.CUSTOM.c.ROOT") == "command line"
    assert load_cfg(write("dump.yaml", cfg.dump())) == cfg


@pytest.mark.usefixtures("open_group")
def test_open_group_refuses_what_a_config_cannot_hold():
    assert "cannot hold the date" in refusal("DATASETS: {CUSTOM: {a: {B: 2026-01-31}}}\n")


def test_deprecated_key_is_skipped_and_renamed_key_refused_as_in_detectron2(monkeypatch, caplog):
    monkeypatch.setitem(detectron2_defaults.__dict__, CfgNode.DEPRECATED_KEYS, {"SOLVER.OLD"})
    monkeypatch.setitem(detectron2_defaults.__dict__, CfgNode.RENAMED_KEYS, {"SEEDS": "SEED"})
    assert load_cfg(write("a.yaml", "SOLVER: {OLD: 3}\n"), ["SOLVER.OLD", "4"]) == get_cfg()
    assert "Deprecated config key (ignoring): SOLVER.OLD" in caplog.text
    assert refusal("SEEDS: 3\n").startswith("a.yaml:1: Key SEEDS was renamed to SEED;")


@pytest.fixture
def newer_host(monkeypatch):
    monkeypatch.setitem(detectron2_defaults, "FLOAT32_PRECISION", "")


@pytest.fixture
def older_host(monkeypatch):
    monkeypatch.delitem(detectron2_defaults, "FLOAT32_PRECISION", raising=False)


@pytest.mark.usefixtures("older_host")
def test_dump_of_a_newer_detectron2_loads_on_an_older_one(caplog):
    caplog.set_level(logging.INFO)
    cfg = load_cfg(write("a.yaml", get_cfg().dump() + "FLOAT32_PRECISION: ''\n"))
    assert cfg == get_cfg()
    assert "left out FLOAT32_PRECISION, which the installed Detectron2 lacks" in caplog.text


@pytest.mark.usefixtures("older_host")
def test_host_only_key_with_another_value_is_refused_by_a_host_without_it():
    message = refusal("FLOAT32_PRECISION: high\n")
    assert message.startswith("a.yaml:1: FLOAT32_PRECISION is 'high', but the installed Detectron2")


@pytest.mark.usefixtures("newer_host")
def test_dump_of_an_older_detectron2_loads_on_a_newer_one():
    text = "".join(
        line for line in get_cfg().dump().splitlines(True) if "FLOAT32_PRECISION" not in line
    )
    assert load_cfg(write("a.yaml", text)) == get_cfg()
    assert load_cfg(None, ["FLOAT32_PRECISION", "high"]).FLOAT32_PRECISION == "high"


def test_dumped_config_loads_to_an_equal_one():
    cfg = load_cfg(CITYSCAPES_FT, ["OUTPUT_DIR", "2026", "SOLVER.BASE_LR", "1e-5"])
    assert load_cfg(write("dump.yaml", cfg.dump())) == cfg


# --- who set it


def test_who_set_tells_file_and_line_command_line_and_default(folder, monkeypatch):
    write("sub/b.yaml", "SOLVER:\n  GAMMA: 0.5\n  BASE_LR: 0.1\n")
    write("a.yaml", "_BASE_: sub/b.yaml\nSOLVER: {BASE_LR: 0.2}\nSEED: 1\n")
    cfg = load_cfg("a.yaml", ["SEED", "2"])
    assert who_set(cfg, "SOLVER.GAMMA") == "sub/b.yaml:2"
    assert who_set(cfg, "SOLVER.BASE_LR") == "a.yaml:2"
    assert who_set(cfg, "SEED") == "command line"
    assert who_set(cfg, "SOLVER.MAX_ITER") == "default"
    assert who_set(load_cfg(folder / "a.yaml"), "SEED") == "a.yaml:3"
    monkeypatch.chdir(folder / "sub")
    assert who_set(load_cfg("../a.yaml"), "SEED") == "../a.yaml:3"


def test_who_set_survives_copies_and_leaves_no_trace_in_the_config():
    cfg = load_cfg(write("a.yaml", "SEED: 1\n"))
    frozen = cfg.clone()
    frozen.freeze()
    for copied in (frozen, frozen.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(frozen))):
        assert who_set(copied, "SEED") == "a.yaml:1"
        assert copied == cfg
    plain_cfg = get_cfg()
    plain_cfg.SEED = 1
    assert cfg == plain_cfg
    assert cfg.dump() == plain_cfg.dump()


def test_value_changed_in_python_is_told():
    cfg = load_cfg(write("a.yaml", "SEED: 1\nMODEL: {PIXEL_STD: [1.0]}\nLOG_PERIOD: 4\n"))
    cfg.SEED = 2
    cfg.MODEL.PIXEL_STD.append(3.0)
    cfg.SOLVER.MAX_ITER = 5
    cfg.LOG_PERIOD = 4
    cfg.MY_PROJECT = CfgNode({"X": 1})
    for key in ("SEED", "MODEL.PIXEL_STD", "SOLVER.MAX_ITER", "MY_PROJECT.X"):
        assert who_set(cfg, key) == "set in Python"
    assert who_set(cfg, "LOG_PERIOD") == "a.yaml:3"
    assert who_set(get_cfg(), "SEED") == "default"


def test_who_set_does_not_know_a_key_that_is_not_there():
    with pytest.raises(KeyError, match=r"SOLVER\.NONE"):
        who_set(get_cfg(), "SOLVER.NONE")
