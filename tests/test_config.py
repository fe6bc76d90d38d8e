"""config.py: names, types, presets and help of flags, and errors of wrong input."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
from typing import Annotated, Literal, get_args, get_origin
from unittest import mock

import pytest

import helpers
import train
from helpers import TRAIN, edited_copy
from nanofp8.config import (
    AutoBool,
    UserError,
    check_command_line,
    parse_arguments,
    parse_flags,
    script_flags,
    start_script,
)

pytestmark = pytest.mark.usefixtures("fresh")
FLAGS = script_flags(TRAIN)
CHOICES = {n: get_args(f.kind) for n, f in FLAGS.items() if get_origin(f.kind) is Literal}
TRISTATE = [n for n, f in FLAGS.items() if f.kind == AutoBool]
BOOLS = [n for n, f in FLAGS.items() if f.kind is bool]


def base(flag):
    """Return int, float or str for a flag of that type with or without a range; else None."""
    kind = get_args(flag.kind)[0] if get_origin(flag.kind) is Annotated else flag.kind
    return kind if kind in (int, float, str) else None


INTS = [n for n, f in FLAGS.items() if base(f) is int]
FLOATS = [n for n, f in FLAGS.items() if base(f) is float]


def parse(*argv, **options):
    return parse_flags(list(argv), TRAIN, **dict(presets=train.PRESETS, has_gpu=False) | options)


def refused(*argv, **options):
    """Return the one line with which parse_flags() refuses argv."""
    with pytest.raises(UserError) as caught:
        parse(*argv, **options)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def good_value(name):
    """Return a value other than the default, as text and as parse_flags() should give it."""
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
    elif name == "window_pattern":
        value = "SSSL"
    elif name == "batch_ramp":
        value = "0.25,.6"
    elif name in ("total_batch_size", "batch_size"):
        value = 4096
    elif name in ("skip_grad_zscore", "weight_decay_embed", "weight_decay_head"):
        value = 2.5
    else:
        value = f"other-{default}"
    return str(value), value


def bad_values(name):
    if name == "FP8_MARGIN":
        return ["2000", "-2000", "1.5"]
    if name in CHOICES:
        return ["nonsense", ""]
    if name in TRISTATE or name in BOOLS:
        return ["maybe", "1", ""]
    if name in INTS:
        return ["many", "1.5", "1e3", "True", "", "[1]"]
    if name in FLOATS:
        return ["much", "False", "", "nan", "inf", "-1e999", "1e300", "1e-320"]
    if name in ("skip_grad_zscore", "weight_decay_embed", "weight_decay_head"):
        return ["automatic", "-1", "", "nan", "True"]
    if name in ("total_batch_size", "batch_size"):
        return ["automatic", "0", "-1", "", "1.5", "True"]
    if name == "batch_ramp":
        return ["0.6,0.25", "0.5,0.5", "0", "1", "0.5,", ",0.5", "0.5 0.6", "half", "1.5", "-0.5", "0.5,1.0", "0.0"]
    return []  # any text will do


# -----------------------------------------------------------------------------------------------------
# Names and values


def test_the_names_that_others_rely_on():
    names = """USE_FP8 USE_NVFP4 USE_FSDP2 USE_DDP USE_AC_LM_HEAD USE_WANDB total_batch_size batch_size block_size
        n_layer n_embd n_head vocab_size max_iters warmup_iters learning_rate FP8_RECIPE USE_COMPILE USE_AC_BLOCKS
        USE_AC_ATTENTION USE_8BIT_ADAM dataset data_dir out_dir run_name seed eval_interval eval_tokens
        preset""".split()
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
        with pytest.raises(UserError) as caught:
            parse_arguments([f"--{name}={text}"], FLAGS)
        line = str(caught.value)
        assert name in line and f"'{text}'" in line and "\n" not in line and caught.value.status == 2


@pytest.mark.parametrize("name", FLOATS)
def test_a_whole_number_is_fine_for_a_float_flag(name):
    whole = next(n for n in (2, 0, 7) if FLAGS[name].kind is float or n in get_args(FLAGS[name].kind)[1])
    value = getattr(parse(f"--{name}={whole}"), name)
    assert value == whole and isinstance(value, float)


@pytest.mark.parametrize("text,value",
                         [("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False)])
def test_spellings_of_true_and_false(text, value):
    assert parse(f"--USE_FP8={text}").USE_FP8 is value
    assert parse(f"--USE_DDP={text}").USE_DDP is value


def test_auto_is_kept():
    assert all(getattr(parse(f"--{name}=auto"), name) == "auto" for name in TRISTATE)


def test_text_stays_text():
    """A run name may look like a number, hold '=' or be Python."""
    for text in ("007", "1e3", "a=b", "None", "[1]", "true"):
        assert parse(f"--run_name={text}").run_name == text


def test_a_path_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert parse("--out_dir=~/runs").out_dir == "/home/ada/runs"


@pytest.mark.parametrize("given,nearest", [
    ("batchsize", "batch_size"), ("use_fp8", "USE_FP8"), ("learning-rate", "learning_rate"), ("n_layers", "n_layer"),
    ("USE_FSDP", "USE_FSDP2"), ("max_iter", "max_iters"), ("Total_Batch_Size", "total_batch_size"),
])
def test_an_unknown_flag_names_the_nearest(given, nearest):
    assert f"--{nearest}?" in refused(f"--{given}=1")


@pytest.mark.parametrize("given", ["foo", "x", "gpus", "lr", "doctor_who"])
def test_a_flag_like_no_other_is_not_guessed(given):
    line = refused(f"--{given}=1")
    assert f"--{given}" in line and "did you mean" not in line and "--help" in line


def test_switches_take_no_value(capsys):
    for argument in ("--doctor=1", "--help=1"):
        with pytest.raises(SystemExit) as caught:
            check_command_line(TRAIN, [argument], doctor="nanofp8.doctor")
        err = capsys.readouterr().err
        name = argument[:-2]
        assert caught.value.code == 2 and err.count("\n") == 1 and f"{name} has no value; write {name}\n" in err


@pytest.mark.parametrize("name", ["", " ", "\t", "a\nb", "a\x1b[2J", "a\x7f", "a\u2028b", "a\x85b", ".a", "a/b"])
def test_a_run_name_is_one_visible_line(name):
    line = refused(f"--run_name={name}")
    assert "--run_name" in line and len(line.splitlines()) == 1 and line.isprintable()


@pytest.mark.parametrize("name", ["a b", " a", "лес", "a.b", "-", "a\u00a0b"])
def test_other_run_names_are_taken(name):
    assert parse(f"--run_name={name}").run_name == name


@pytest.mark.parametrize("name", ["out_dir", "dataset", "data_dir"])
@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_folders_are_not_blank(name, text):
    flags = script_flags(helpers.ROOT / "train_orig.py")
    with pytest.raises(UserError, match=f"--{name} must be text that is not blank") as caught:
        parse_arguments([f"--{name}={text}"], flags)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    assert parse_arguments([f"--{name}=../a\nb"], flags) == {name: "../a\nb"}


@pytest.mark.parametrize("arg", ["--seed", "seed=1", "-seed=1", "--", "", "train", "--=1", "--seed 1"])
def test_an_argument_that_is_no_flag_is_shown_with_the_right_form(arg):
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


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_fills_its_flags_and_leaves_the_rest(name):
    cfg = parse(f"--preset={name}")
    assert cfg.preset == name
    for flag in FLAGS.values():
        if flag.name != "preset":
            assert getattr(cfg, flag.name) == train.PRESETS[name].get(flag.name, flag.default)
            assert type(getattr(cfg, flag.name)) is type(flag.default) or flag.default == "auto"


def test_a_preset_that_somebody_adds_or_edits(tmp_path):
    presets = train.PRESETS | {"tiny": train.PRESETS["tiny"] | dict(n_layr=3)}
    with pytest.raises(UserError, match="preset tiny sets n_layr, which is no flag; did you mean n_layer"):
        parse("--preset=tiny", presets=presets)
    with pytest.raises(UserError, match="preset=d12 has no entry in PRESETS"):
        parse("--preset=d12", presets={name: flags for name, flags in train.PRESETS.items() if name != "d12"})


@pytest.mark.parametrize("has_gpu,name", [(True, "d20"), (False, "tiny")])
def test_auto_goes_by_the_gpu(has_gpu, name):
    assert parse(has_gpu=has_gpu).preset == name
    assert parse("--preset=auto", has_gpu=has_gpu).n_layer == train.PRESETS[name]["n_layer"]


def test_a_given_flag_beats_the_preset_even_with_the_default_value():
    cfg = parse("--n_layer=20", "--preset=tiny", "--block_size=64")
    assert (cfg.n_layer, cfg.block_size, cfg.n_embd) == (20, 64, 128)


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
    added = ('1337\nmy_count: Positive = 3  # a\nmy_share: Fraction = 0.5  # b\nmy_text: str = "x"  # c\n'
             'my_switch: bool = False ')
    module, path = edited_copy(tmp_path, seed=added)
    cfg = module.read_flags([], has_gpu=False)
    assert (cfg.my_count, cfg.my_share, cfg.my_text, cfg.my_switch) == (3, 0.5, "x", False)
    assert type(cfg.my_count) is int
    cfg = module.read_flags(["--my_count=4", "--my_share=0", "--my_text=7", "--my_switch=true"], has_gpu=False)
    assert (cfg.my_count, cfg.my_share, cfg.my_text, cfg.my_switch) == (4, 0.0, "7", True)
    for argument, words in (("--my_switch=3", "True or False"), ("--my_share=1", "below 1"),
                            ("--my_count=0", "at least 1")):
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
    path.write_text("# Flags\na: Positive = 2**19\nb: float = -1 / 4  # c\nc: int = 9 * 10**8 // 2048\n"
                    "# End of flags\nd = 1\n")
    flags = script_flags(path)
    assert [(f.name, f.default, f.comment) for f in flags.values()] == [("a", 524288, ""), ("b", -0.25, "c"),
                                                                        ("c", 439453, "")]


def test_line_ends_that_python_does_not_count_and_a_byte_order_mark(tmp_path):
    """A form feed or U+2028 in a comment, a BOM from an editor: flags, comments and groups are read all the same."""
    path = tmp_path / "script.py"
    text = ('"""A."""\n\x0c\x0c\x0c\n# Flags\n\n# Model\na: Positive = 2  # one\u2028two\n# End of flags\nb = 1\n')
    path.write_text(text, encoding="utf-8-sig")
    (flag,) = script_flags(path).values()
    assert (flag.name, flag.default, flag.comment, flag.group) == ("a", 2, "one\u2028two", "Model")


def test_torchrun_ranks_are_silent(monkeypatch, capsys):
    """Rank 0 alone answers --help and wrong flags; the others exit alike."""
    for rank, says in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for argv, code in ((["--help"], 0), (["--n_layer=0"], 2)):
            with pytest.raises(SystemExit) as caught:
                check_command_line(TRAIN, argv)
            out, err = capsys.readouterr()
            assert caught.value.code == code and bool(out + err) == says


@pytest.mark.slow
def test_flags_are_answered_without_torch(tmp_path):
    """config.py needs only the standard library, in every Python on this machine."""
    script = tmp_path / "script.py"
    script.write_text("from nanofp8.config import *\nfrom nanofp8.config import check_command_line\n"
                      "if __name__ == '__main__':\n    check_command_line(__file__)\n"
                      "# Flags\n# Model\nn_layer: Positive = 2  # blocks\nUSE_DDP: AutoBool = 'auto'  # wrap\n"
                      "# End of flags\n"
                      "import sys\nassert not {'torch', 'numpy'} & set(sys.modules)\n")
    pythons = {shutil.which(f"python3.{minor}") for minor in range(10, 15)} - {None} | {sys.executable}
    tried = 0
    for python in pythons:
        if subprocess.run([python, "-c", "pass"], capture_output=True).returncode:
            continue  # a launcher of a version that is not installed
        for argument, code, word in (("--help", 0, "--n_layer=2"), ("--n_layer=3", 0, ""),
                                     ("--USE_DDP=maybe", 2, "True or False")):
            result = subprocess.run([python, str(script), argument], capture_output=True, text=True,
                                    env={"PYTHONPATH": str(helpers.ROOT)})
            assert (result.returncode,
                    word in result.stdout + result.stderr) == (code, True), (python, argument, result)
        tried += 1
    assert tried


@pytest.mark.parametrize("edit",
                         [dict(max_iters="2 * 1700"), dict(weight_decay='"much"'), dict(USE_FP8="true"),
                          dict(n_layer='"six"')])
def test_an_edit_that_cannot_work_is_one_line_that_names_the_flag(tmp_path, edit):
    """An expression need not be refused: it may be evaluated."""
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


@pytest.mark.parametrize("error", [KeyError("uid not found: 4321"), OSError("No username set in the environment")])
def test_a_user_without_a_name_gets_one(monkeypatch, error):
    """docker --user: a number that no passwd file lists. torch 2.11 asks getpass.getuser() for caches."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    monkeypatch.setenv("USER", "somebody")
    start_script(TRAIN)
    assert os.environ["USER"] == "somebody"
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=error))
    start_script(TRAIN)
    assert getpass.getuser() == "uid4321"


def test_ctrl_c_during_imports_is_one_line(capsys, monkeypatch):
    """start_script() is called before torch is imported. Any other exception keeps its traceback."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    start_script(TRAIN)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "train.py: interrupted\n"
    sys.excepthook(RuntimeError, RuntimeError("no"), None)
    assert "RuntimeError: no" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("code", [
    f"check_command_line({str(TRAIN)!r}, ['--help'])", "print_answer('x' * 100_000)",
    "OneLineParser(description='x' * 100_000).parse_args(['--help'])"])
def test_help_that_cannot_be_written(code):
    """A reader that has left: nothing is said. A full disk: one line. Python adds none of its own at exit."""
    program = (f"from nanofp8.config import *\ntry: {code}\n"
               f"except UserError as error: sys.exit(f'error: {{error}}')")
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, open(write, "w") as closed:
        for stream, lines in ((full, 1), (closed, 0)):
            result = subprocess.run([sys.executable, "-c", program], stdout=stream, stderr=subprocess.PIPE, text=True,
                                    cwd=helpers.ROOT)
            assert result.returncode == 1 and result.stderr.count("\n") == lines, result.stderr
            assert ("error: cannot write" in result.stderr and "No space left" in result.stderr) == bool(lines)
