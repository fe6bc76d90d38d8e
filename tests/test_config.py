"""Flags of train.py: names, types, presets, help, and how wrong input ends."""

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin

import pytest

import helpers
import train
from nanofp8.config import AutoBool, UserError, check_command_line, parse_flags, script_flags
from helpers import TRAIN, edited_copy, finish, make_cfg, one_process, start, train_here

pytestmark = pytest.mark.usefixtures("fresh")
FLAGS = script_flags(TRAIN)
CHOICES = {n: get_args(f.kind) for n, f in FLAGS.items() if get_origin(f.kind) is Literal}
TRISTATE = [n for n, f in FLAGS.items() if f.kind == AutoBool]
BOOLS = [n for n, f in FLAGS.items() if f.kind is bool]


def base(flag):
    """int, float or str for a flag of that type with or without a range; else None."""
    kind = get_args(flag.kind)[0] if get_origin(flag.kind) is Annotated else flag.kind
    return kind if kind in (int, float, str) else None


INTS = [n for n, f in FLAGS.items() if base(f) is int]
FLOATS = [n for n, f in FLAGS.items() if base(f) is float]


def parse(*argv, **options):
    return parse_flags(list(argv), TRAIN, **dict(presets=train.PRESETS, has_gpu=False) | options)


def refused(*argv, **options):
    """The one line with which parse_flags refuses argv."""
    with pytest.raises(UserError) as caught:
        parse(*argv, **options)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def good_value(name):
    """A value other than the default, as text and as parse_flags should give it."""
    default = FLAGS[name].default
    if name in CHOICES:
        value = next(v for v in reversed(CHOICES[name]) if v != default)
    elif name in TRISTATE:
        value = True
    elif name in BOOLS:
        value = not default
    elif name in INTS:
        value = default + 1
    elif name in FLOATS:
        value = default / 2 + 0.25
    else:
        value = f"other-{default}"
    return str(value), value


def bad_values(name):
    if name in CHOICES:
        return ["nonsense", ""]
    if name in TRISTATE or name in BOOLS:
        return ["maybe", "1", ""]
    if name in INTS:
        return ["many", "1.5", "1e3", "True", "", "[1]"]
    if name in FLOATS:
        return ["much", "False", "", "nan", "inf", "-1e999"]
    return []  # any text will do


# -----------------------------------------------------------------------------------------------------
# Names and values


def test_the_names_that_others_rely_on():
    names = """USE_FP8 USE_NVFP4 USE_FSDP2 USE_DDP USE_AC_LM_HEAD USE_WANDB total_batch_size batch_size block_size n_layer
        n_embd n_head vocab_size max_iters warmup_iters learning_rate FP8_RECIPE USE_COMPILE USE_AC_BLOCKS USE_AC_ATTENTION
        USE_8BIT_ADAM dataset data_dir out_dir run_name seed eval_interval eval_tokens preset""".split()
    assert set(names) <= set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_has_a_default_a_comment_and_a_group_and_is_a_constant_of_the_module(name):
    flag = FLAGS[name]
    assert flag.comment and flag.group and getattr(train, name) == flag.default


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_takes_a_good_value(name):
    text, value = good_value(name)
    cfg = parse(f"--{name}={text}")
    assert getattr(cfg, name) == value and type(getattr(cfg, name)) is type(value)
    assert name in cfg.explicit


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_refuses_bad_values_by_name(name):
    for text in bad_values(name):
        line = refused(f"--{name}={text}")
        assert name in line and f"'{text}'" in line


@pytest.mark.parametrize("name", FLOATS)
def test_a_whole_number_is_fine_for_a_float_flag(name):
    whole = next(n for n in (2, 0, 7) if FLAGS[name].kind is float or n in get_args(FLAGS[name].kind)[1])
    value = getattr(parse(f"--{name}={whole}"), name)
    assert value == whole and isinstance(value, float)


@pytest.mark.parametrize("text,value", [("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False)])
def test_spellings_of_true_and_false(text, value):
    assert parse(f"--USE_FP8={text}").USE_FP8 is value
    assert parse(f"--USE_DDP={text}").USE_DDP is value


def test_auto_is_kept():
    assert all(getattr(parse(f"--{name}=auto"), name) == "auto" for name in TRISTATE)


def test_text_stays_text():
    """A run name may look like a number, hold '=' or be Python."""
    for text in ("007", "1e3", "a=b", "None", "[1]", "true"):
        assert parse(f"--run_name={text}").run_name == text


@pytest.mark.parametrize("given,nearest", [
    ("batchsize", "batch_size"), ("use_fp8", "USE_FP8"), ("learning-rate", "learning_rate"), ("n_layers", "n_layer"),
    ("USE_FSDP", "USE_FSDP2"), ("max_iter", "max_iters"), ("Total_Batch_Size", "total_batch_size"),
])
def test_an_unknown_flag_names_the_nearest(given, nearest):
    assert f"--{nearest}?" in refused(f"--{given}=1")


@pytest.mark.parametrize("arg", ["--seed", "seed=1", "-seed=1", "--", "", "train", "--=1", "--seed 1"])
def test_what_is_no_flag_is_shown_with_the_right_form(arg):
    line = refused(arg)
    assert "=value" in line and f"'{arg}'" in line


def test_the_last_of_two_values_counts():
    assert parse("--seed=1", "--seed=2").seed == 2


@pytest.mark.parametrize("text", ["{[]}", "{{}: 1}", "(" * 400])
def test_values_that_trip_the_parser_are_refused_like_others(text):
    """literal_eval raises TypeError for an unhashable member and MemoryError or RecursionError for deep nesting."""
    assert "seed" in refused(f"--seed={text}")


# -----------------------------------------------------------------------------------------------------
# Presets


def test_preset_d20_repeats_the_defaults_of_the_file():
    """An edited flag is told from an untouched one by this table."""
    assert {name: FLAGS[name].default for name in train.PRESETS["d20"]} == train.PRESETS["d20"]


def test_the_flag_preset_lists_the_presets():
    assert CHOICES["preset"] == ("auto", *train.PRESETS)


def test_every_preset_sets_only_flags_of_d20():
    """A flag missing in d20 could not be protected from the preset by an edit in the file."""
    for values in train.PRESETS.values():
        assert set(values) <= set(train.PRESETS["d20"])


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_fills_its_flags_and_leaves_the_rest(name):
    cfg = parse(f"--preset={name}")
    assert cfg.preset == name
    for flag in FLAGS.values():
        if flag.name != "preset":
            assert getattr(cfg, flag.name) == train.PRESETS[name].get(flag.name, flag.default)
            assert type(getattr(cfg, flag.name)) is type(flag.default)


@pytest.mark.parametrize("has_gpu,name", [(True, "d20"), (False, "tiny")])
def test_auto_goes_by_the_gpu(has_gpu, name):
    assert parse(has_gpu=has_gpu).preset == name
    assert parse("--preset=auto", has_gpu=has_gpu).n_layer == train.PRESETS[name]["n_layer"]


def test_a_given_flag_beats_the_preset_even_with_the_default_value():
    cfg = parse("--n_layer=20", "--preset=tiny", "--block_size=64")
    assert (cfg.n_layer, cfg.block_size, cfg.n_embd) == (20, 64, 128)


def test_the_shapes_of_every_preset_pass_the_checks():
    for name in train.PRESETS:
        train.check_flags(parse(f"--preset={name}"), 1)
        train.check_flags(parse(f"--preset={name}"), 1 if name == "tiny" else 8)


def test_a_flag_edited_in_the_file_beats_the_preset_and_a_given_one_beats_both(tmp_path):
    module, path = edited_copy(tmp_path, n_layer="7", dataset='"mine"', learning_rate="0.5", preset='"tiny"')
    cfg = module.read_flags([], has_gpu=True)
    assert (cfg.preset, cfg.n_layer, cfg.dataset, cfg.learning_rate, cfg.n_embd) == ("tiny", 7, "mine", 0.5, 128)
    cfg = module.read_flags(["--preset=d12", "--n_layer=3"], has_gpu=False)
    assert (cfg.preset, cfg.n_layer, cfg.dataset, cfg.n_embd) == ("d12", 3, "mine", 768)


# The annotation keeps a flag's type, whatever value is written into the file


def test_a_float_flag_edited_to_a_whole_number_still_takes_any_number(tmp_path):
    module, path = edited_copy(tmp_path, weight_decay="0", grad_clip="1")
    cfg = module.read_flags(["--weight_decay=0.1", "--grad_clip=0.5"], has_gpu=False)
    assert (cfg.weight_decay, cfg.grad_clip) == (0.1, 0.5)


def test_an_auto_flag_edited_to_true_can_be_set_back_to_auto(tmp_path):
    module, path = edited_copy(tmp_path, USE_COMPILE="True")
    assert module.read_flags(["--USE_COMPILE=auto"], has_gpu=False).USE_COMPILE == "auto"


def test_a_flag_that_somebody_adds(tmp_path):
    added = '1337\nmy_count: Positive = 3  # a\nmy_share: Fraction = 0.5  # b\nmy_text: str = "x"  # c\nmy_switch: bool = False '
    module, path = edited_copy(tmp_path, seed=added)
    cfg = module.read_flags([], has_gpu=False)
    assert (cfg.my_count, cfg.my_share, cfg.my_text, cfg.my_switch) == (3, 0.5, "x", False) and type(cfg.my_count) is int
    cfg = module.read_flags(["--my_count=4", "--my_share=0", "--my_text=7", "--my_switch=true"], has_gpu=False)
    assert (cfg.my_count, cfg.my_share, cfg.my_text, cfg.my_switch) == (4, 0.0, "7", True)
    for argument, words in (("--my_switch=3", "True or False"), ("--my_share=1", "below 1"), ("--my_count=0", "at least 1")):
        with pytest.raises(module.UserError, match=f"{argument.split('=')[0]}.*{words}"):
            module.read_flags([argument], has_gpu=False)


@pytest.mark.parametrize("line,words", [
    ("my_flag = 3  # no type", ["line 4", "my_flag", "name: type = value"]),
    ("my_flag: Natural = 3  # of no type that there is", ["line 4", "my_flag", "'Natural'", "nanofp8/config.py"]),
    ("my_flag: Positive = 0  # out of range", ["line 4", "my_flag", "at least 1", "got 0"]),
    ("my_flag: int = open('x')  # no constant", ["line 4", "my_flag", "open('x')"]),
    ("my_flag: int = 2 ** 1000  # too large", ["line 4", "my_flag"]),
    ("my_flag: bool = 1  # of another type", ["line 4", "my_flag", "True or False"]),
    ("print('hello')", ["line 4", "# Flags"]),
])
def test_a_flag_line_that_cannot_be_read(tmp_path, line, words):
    """One line that names the script's line, the flag and what it should be; nothing of the script is run."""
    path = tmp_path / "script.py"
    path.write_text(f'"""A script."""\n# Flags\n# The run\n{line}\n# End of flags\n')
    with pytest.raises(UserError) as caught:
        script_flags(path)
    assert caught.value.status == 2 and all(word in str(caught.value) for word in ["script.py", *words]), caught.value


def test_values_may_be_arithmetic(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("# Flags\na: Positive = 2**19\nb: float = -1 / 4  # c\nc: int = 9 * 10**8 // 2048\n# End of flags\nd = 1\n")
    flags = script_flags(path)
    assert [(f.name, f.default, f.comment) for f in flags.values()] == [("a", 524288, ""), ("b", -0.25, "c"), ("c", 439453, "")]


def test_torchrun_ranks_are_silent(monkeypatch, capsys):
    """Rank 0 alone answers --help and wrong flags; the others exit alike."""
    for rank, says in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for argv, code in ((["--help"], 0), (["--n_layer=0"], 2)):
            with pytest.raises(SystemExit) as caught:
                check_command_line(TRAIN, argv)
            out, err = capsys.readouterr()
            assert caught.value.code == code and bool(out + err) == says


def test_flags_are_answered_without_torch(tmp_path):
    """config.py needs the standard library alone, in every Python that this machine has."""
    script = tmp_path / "script.py"
    script.write_text("from nanofp8.config import *\nfrom nanofp8.config import check_command_line\n"
                      "if __name__ == '__main__':\n    check_command_line(__file__)\n"
                      "# Flags\n# Model\nn_layer: Positive = 2  # blocks\nUSE_DDP: AutoBool = 'auto'  # wrap\n# End of flags\n"
                      "import sys\nassert not {'torch', 'numpy'} & set(sys.modules)\n")
    pythons = {shutil.which(f"python3.{minor}") for minor in range(10, 15)} - {None} | {sys.executable}
    tried = 0
    for python in pythons:
        if subprocess.run([python, "-c", "pass"], capture_output=True).returncode:
            continue  # a launcher of a version that is not installed
        for argument, code, word in (("--help", 0, "--n_layer=2"), ("--n_layer=3", 0, ""), ("--USE_DDP=maybe", 2, "True or False")):
            result = subprocess.run([python, str(script), argument], capture_output=True, text=True, env={"PYTHONPATH": str(helpers.ROOT)})
            assert (result.returncode, word in result.stdout + result.stderr) == (code, True), (python, argument, result)
        tried += 1
    assert tried


@pytest.mark.parametrize("edit", [dict(max_iters="2 * 1700"), dict(weight_decay='"much"'), dict(USE_FP8="true"), dict(n_layer='"six"')])
def test_an_edit_that_cannot_work_is_one_line_that_names_the_flag(tmp_path, edit):
    """An expression counts as cannot-work only if it is refused: evaluating it would be fine too."""
    try:
        module, path = edited_copy(tmp_path, **edit)
    except NameError:
        return  # `true` fails when Python reads the file: clear enough, and before our code runs
    try:
        cfg = module.read_flags(["--preset=d20"], has_gpu=False)
        module.check_flags(cfg, 1)
    except module.UserError as error:
        assert next(iter(edit)) in str(error)
    else:
        assert edit == dict(max_iters="2 * 1700") and cfg.max_iters == 3400


# -----------------------------------------------------------------------------------------------------
# Values that cannot work together


@pytest.mark.parametrize("changes,words", [
    (dict(batch_size=0), "batch_size"), (dict(n_layer=-1), "n_layer"), (dict(learning_rate=-0.1), "learning_rate"),
    (dict(rank_timeout=1.0), "rank_timeout"), (dict(FP8_CALIBRATION_STEPS=0), "FP8_CALIBRATION_STEPS"),
    (dict(warmup_iters=-1), "warmup_iters"), (dict(muon_momentum=1.0), "muon_momentum"), (dict(adam_beta2=1.0), "adam_beta2"),
    (dict(n_head=3), "--n_head="), (dict(n_embd=66, n_head=2), "head size"), (dict(run_name="a/b"), "run_name"),
    (dict(run_name=""), "run_name"), (dict(run_name=".."), "run_name"), (dict(log_interval=0), "log_interval"),
    (dict(eval_tokens=0), "eval_tokens"), (dict(max_iters=0), "max_iters"), (dict(norm_eps=0), "norm_eps"),
    (dict(adam_eps=0.0), "adam_eps"),  # 0 / 0 for every embedding row that has had no gradient
    (dict(adam_eps=-1.0), "adam_eps"), (dict(seed=-1), "seed"),  # numpy takes 0 to 2^32 - 1
])
def test_impossible_values_are_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        train.check_flags(make_cfg(**changes), 1)
    assert caught.value.status == 2


@pytest.mark.parametrize("total,batch,world", [(300, 2, 1), (1000, 3, 2), (63, 1, 3), (1, 4, 2), (99999, 2, 8), (160, 2, 2)])
def test_a_total_batch_that_does_not_divide_names_a_nearest_that_does(total, batch, world):
    micro = batch * 32 * world
    with pytest.raises(UserError) as caught:
        train.check_flags(make_cfg(total_batch_size=total, batch_size=batch), world)
    nearest = int(re.search(r"--total_batch_size=(\d+)", str(caught.value))[1])
    assert nearest > 0 and nearest % micro == 0
    assert nearest == micro or abs(nearest - total) <= micro / 2
    train.check_flags(make_cfg(total_batch_size=nearest, batch_size=batch), world)


@pytest.mark.parametrize("fsdp2,ddp,world,expected", [
    ("auto", "auto", 1, "none"), (False, False, 1, "none"), (True, "auto", 1, "fsdp2"), ("auto", True, 1, "ddp"),
    ("auto", "auto", 2, "ddp"), (False, "auto", 2, "ddp"), ("auto", False, 2, "fsdp2"), (True, False, 2, "fsdp2"),
    (False, True, 2, "ddp"),
])
def test_the_wrapper_and_its_reason(fsdp2, ddp, world, expected):
    cfg = make_cfg(USE_FSDP2=fsdp2, USE_DDP=ddp)
    wrapper, reason = train.choose_wrapper(cfg, one_process(world_size=world), 1000)
    assert wrapper == expected and reason


@pytest.mark.parametrize("fsdp2,ddp,world", [(True, True, 1), (True, True, 2), (False, False, 2)])
def test_wrappers_that_contradict(fsdp2, ddp, world):
    with pytest.raises(UserError, match="USE_FSDP2.*USE_DDP") as caught:
        train.choose_wrapper(make_cfg(USE_FSDP2=fsdp2, USE_DDP=ddp), one_process(world_size=world), 1000)
    assert caught.value.status == 2


@pytest.mark.parametrize("changes", [
    dict(FP8_RECIPE="block"), dict(FP8_RECIPE="mxfp8", n_embd=80), dict(USE_NVFP4=True),
    dict(n_embd=72), dict(batch_size=1, block_size=8, total_batch_size=8),
])
def test_shapes_that_the_format_cannot_take(changes):
    """Each format names its multiple; bf16 takes them all."""
    with pytest.raises(UserError, match="divisible by"):
        train.select_precision(make_cfg(**changes), helpers.CPU)
    train.select_precision(make_cfg(**changes | dict(USE_FP8=False, USE_NVFP4=False)), helpers.CPU)


# -----------------------------------------------------------------------------------------------------
# As a program


@pytest.mark.parametrize("code,changes,words", [
    (2, dict(total_batch_size=300), ["--total_batch_size=256"]),
    (2, dict(preset="big"), ["preset", "d20", "tiny", "'big'"]),
    (2, dict(USE_FSDP2=True, USE_DDP=True), ["USE_FSDP2", "USE_DDP"]),
    (2, dict(USE_8BIT_ADAM=True), ["USE_8BIT_ADAM", "GPU"]),
    (2, dict(USE_EMULATION=False), ["USE_EMULATION"]),
    (2, dict(n_embd=66, n_head=3), ["divisible by 16", "--USE_FP8=False"]),
    (2, dict(seed=-1), ["seed"]),
    (1, dict(dataset="nowhere"), ["nowhere", "data/nowhere/prepare.py"]),
    (1, dict(muon_impl="dion"), ["dion"]),
    (1, dict(out_dir="/proc/nowhere"), ["/proc/nowhere", "--out_dir"]),
])
def test_wrong_input_ends_main_with_one_line(tmp_path, shards, capsys, monkeypatch, code, changes, words):
    monkeypatch.setitem(sys.modules, "dion", None)  # as if not installed
    with pytest.raises(SystemExit) as caught:
        train.main(helpers.flag_args(**dict(data_dir=shards, out_dir=tmp_path) | changes))
    result = SimpleNamespace(code=caught.value.code, err=capsys.readouterr().err)
    helpers.assert_one_error_line(result, code, *words)
    assert not list(tmp_path.iterdir())  # no run folder of a run that could not start


def test_as_a_script(tmp_path, shards):
    """--help, wrong input and a bare import, each in a python of its own: exit status, output, and nothing left behind."""
    small = helpers.flag_args(data_dir=shards)
    bare_import = ("import sys, threading; import train, torch.distributed as dist; "
                   "assert not dist.is_initialized() and threading.active_count() == 1; "
                   "assert 'nanofp8.te_emulation' not in sys.modules and 'dion' not in sys.modules")
    processes = dict(
        help=start(TRAIN, "--help", "--preset=tiny", cwd=tmp_path),
        unknown=start(TRAIN, "--batchsize=4", cwd=tmp_path),
        data=start(TRAIN, *small, "--dataset=nowhere", cwd=tmp_path),
        bare=start("-c", bare_import, "--nonsense", cwd=tmp_path, PYTHONPATH=str(helpers.ROOT)),
    )
    results = {name: finish(process) for name, process in processes.items()}

    text = results["help"]
    assert text.code == 0 and not text.err
    for flag in FLAGS.values():
        (line,) = [x for x in text.out.splitlines() if x.startswith(f"  --{flag.name}=")]
        assert line.startswith(f"  --{flag.name}={flag.default}") and flag.comment in line
        assert flag.group in text.out
        assert all(str(choice) in line for choice in CHOICES.get(flag.name, ()))
    assert train.__doc__.strip().splitlines()[0] in text.out

    helpers.assert_one_error_line(results["unknown"], 2, "--batchsize", "--batch_size")
    helpers.assert_one_error_line(results["data"], 1, "nowhere", "prepare.py", "--data_dir")
    assert (results["bare"].code, results["bare"].out, results["bare"].err) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_flags_without_effect_are_named(fresh, shards, tmp_path, capsys):
    """Set for another format than this run's: said in the table at the start."""
    train_here(tmp_path, shards, max_iters=1, warmup_iters=1, FP8_RECIPE="current", FP8_MARGIN=1, NVFP4_HADAMARD=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert {"FP8_MARGIN=1", "NVFP4_HADAMARD=False"} <= set(line.replace(",", "").split()) and "FP8_RECIPE" not in line
    cfg = make_cfg(USE_FP8=False, FP8_RECIPE="block")
    assert train.select_precision(cfg, helpers.CPU).flags_without_effect(cfg)[0] == "FP8_RECIPE=block"
    train_here(tmp_path, shards, max_iters=1, warmup_iters=1, FP8_MARGIN=1)
    assert "without effect" not in capsys.readouterr().out
