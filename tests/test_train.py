"""train.py's presets, the checks of its flags, the choice of a wrapper, and train.py as a program."""

import json
import math
import re
import sys
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch

import helpers
import train
from helpers import TRAIN, edited_copy, finish, make_cfg, one_process, start, train_here
from nanofp8.config import UserError, flag_values, script_flags
from nanofp8.precision import FORMATS

FLAGS = script_flags(TRAIN)
CHOICES = {n: get_args(f.kind) for n, f in FLAGS.items() if get_origin(f.kind) is Literal}


def parse(*argv):
    return train.read_flags(argv, has_gpu=False)


def test_preset_d20_repeats_the_defaults_of_the_file():
    """parse_flags() recognises an edited flag by this table."""
    assert {name: FLAGS[name].default for name in train.PRESETS["d20"]} == train.PRESETS["d20"]


def test_the_flag_preset_lists_the_presets():
    assert CHOICES["preset"] == ("auto", *train.PRESETS)


def test_every_preset_sets_only_flags_of_d20():
    """An edit in the file could not protect a flag that is missing in d20 from the preset."""
    for values in train.PRESETS.values():
        assert set(values) <= set(train.PRESETS["d20"])


def test_the_shapes_of_every_preset_pass_the_checks():
    for name in train.PRESETS:
        train.check_flags(parse(f"--preset={name}"), 1)
        train.check_flags(parse(f"--preset={name}"), 1 if name == "tiny" else 8)


# -----------------------------------------------------------------------------------------------------
# Length and batch


def test_the_batch_follows_the_length_alone():
    sizes = [train.auto_batch(tokens) for tokens in (1, 10**6, 70 * 10**6, 400 * 10**6, 891289600, 10**10)]
    assert sizes == [2 ** round(math.log2(65536 * (tokens / 70e6) ** 0.383))
                     for tokens in (1, 10**6, 70 * 10**6, 400 * 10**6, 891289600, 10**10)]
    assert sizes == sorted(sizes) and sizes[2] == 65536 and sizes[4] == 131072


def test_train_tokens_sets_the_number_of_steps():
    cfg = parse("--preset=d20")
    assert (cfg.total_batch_size, cfg.max_iters) == (131072, 6800)
    cfg = parse("--preset=d20", "--train_tokens=70000000")
    assert (cfg.total_batch_size, cfg.max_iters) == (65536, 1068)
    cfg = parse("--preset=d20", "--total_batch_size=524288")
    assert (cfg.total_batch_size, cfg.max_iters) == (524288, 1700)
    cfg = parse("--preset=d20", "--max_iters=20")  # beats the preset's train_tokens
    assert (cfg.total_batch_size, cfg.max_iters) == (131072, 20)
    assert parse("--preset=classic").max_iters == 1700 and parse("--preset=tiny").max_iters == 60
    assert parse("--preset=tiny", "--train_tokens=4096").max_iters == 2


@pytest.mark.parametrize("arguments,words", [
    (["--preset=d20", "--train_tokens=1000000", "--max_iters=3"], ["train_tokens", "max_iters"]),
    (["--preset=d20", "--train_tokens=0"], ["total_batch_size=auto", "--train_tokens"]),
    (["--total_batch_size=0"], ["total_batch_size", "at least 1"]),
    (["--total_batch_size=many"], ["total_batch_size", "auto or an integer"]),
    (["--preset=d20", "--n_value_embed=-1"], ["n_value_embed"]), (["--window_pattern=SLX"], ["window_pattern", "SSSL"]),
])
def test_a_length_or_batch_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert caught.value.status == 2 and all(word in str(caught.value) for word in words)


def resumed(monkeypatch, saved, *argv):
    """The flags of a run that resumes a checkpoint with these flags."""
    monkeypatch.setattr(train.checkpoint, "read_checkpoint", lambda folder: dict(flags=saved))
    cfg = parse(*argv)
    train.resolve_length(cfg, train.checkpoint.adopt_flags("a", cfg, train.CLASSIC, one_process()))
    return cfg


def test_a_resumed_run_keeps_the_batch_that_was_chosen_for_it(monkeypatch):
    saved = vars(parse("--preset=d20", "--train_tokens=70000000"))
    cfg = resumed(monkeypatch, saved, "--preset=d20", "--train_tokens=891289600")
    assert (cfg.total_batch_size, cfg.max_iters) == (65536, 13600)
    cfg = resumed(monkeypatch, saved, "--preset=d20", "--total_batch_size=131072")
    assert cfg.total_batch_size == 131072
    with pytest.raises(UserError, match="total_batch_size=65536, which cannot change to 131072; set --total_batch_"):
        train.checkpoint.check_fixed_flags("a", cfg)


def test_only_classic_keeps_tables_and_order_when_tokens_are_read_again():
    for preset, decay, shuffle in (("d20", "auto", True), ("speedrun", "auto", True), ("classic", 0.0, False)):
        cfg = parse(f"--preset={preset}")
        assert (cfg.weight_decay_embed, cfg.weight_decay_head, cfg.USE_SHUFFLE) == (decay, decay, shuffle)


def test_a_run_from_before_the_shuffle_keeps_its_order(monkeypatch):
    """Else it would read some sequences of its present pass twice and others never."""
    saved = vars(parse("--preset=d20"))
    assert resumed(monkeypatch, saved, "--preset=d20").USE_SHUFFLE is True
    del saved["USE_SHUFFLE"]
    assert resumed(monkeypatch, saved, "--preset=d20").USE_SHUFFLE is False
    assert resumed(monkeypatch, saved, "--preset=d20", "--USE_SHUFFLE=True").USE_SHUFFLE is True


def test_flags_that_cannot_change_come_from_the_checkpoint(monkeypatch, capsys):
    """Where they are neither on the command line nor edited; a preset does not count. One line lists those that
    differ. Other flags come from the script."""
    saved = {name: value for name, value in vars(parse("--preset=tiny", "--n_layer=3", "--USE_X0=True")).items()}
    cfg = resumed(monkeypatch, saved, "--preset=d20", "--learning_rate=0.5", "--n_layer=3")
    fixed = {name: saved[name] for name in train.checkpoint.FIXED_FLAGS}
    assert {name: getattr(cfg, name) for name in fixed} == fixed and cfg.batch_size == 16
    assert cfg.learning_rate == 0.5 and cfg.max_iters == round(891289600 / 2048)
    assert capsys.readouterr().out == (
        "resume: taken from the checkpoint, because they cannot change: n_embd=128, n_head=2, vocab_size=50304, "
        "block_size=128, USE_X0=True, dataset=shakespeare, total_batch_size=2048\n")
    train.checkpoint.check_fixed_flags("a", cfg)
    resumed(monkeypatch, saved, "--preset=tiny", "--n_layer=3", "--USE_X0=True")
    assert capsys.readouterr().out == ""


def test_flags_of_the_recipe_that_were_not_given_come_from_the_checkpoint(monkeypatch, capsys):
    """So a forgotten flag changes neither the length nor the rates of a run. One that is given counts, and so does
    another preset."""
    saved = vars(parse("--preset=d12", "--train_tokens=70000000", "--learning_rate=0.031", "--USE_AC_BLOCKS=True"))
    saved |= dict(total_batch_size=65536, batch_ramp="", max_iters=1068, preset="d20")
    for arguments in (["--preset=d20"], []):
        cfg = parse(*arguments)
        cfg.auto = cfg.auto if arguments else ["preset"]  # as with a GPU
        monkeypatch.setattr(train.checkpoint, "read_checkpoint", lambda folder: dict(flags=saved))
        train.resolve_length(cfg, train.checkpoint.adopt_flags("a", cfg, train.CLASSIC, one_process()))
        assert (cfg.train_tokens, cfg.max_iters, cfg.learning_rate) == (70000000, 1068, 0.031)
        assert cfg.weight_decay == saved["weight_decay"] and not cfg.USE_AC_BLOCKS
        said = capsys.readouterr().out
        assert "learning_rate=0.031, " in said and "train_tokens=70000000" in said and "max_iters" not in said
    assert cfg.preset == "d20"  # the checkpoint's, though none was given
    cfg = resumed(monkeypatch, saved, "--preset=d20", "--train_tokens=0", "--resume=auto")
    assert (cfg.train_tokens, cfg.max_iters) == (0, 1068)
    cfg = resumed(monkeypatch, saved | dict(learning_rate_value=0.9, keep_checkpoints=7), "--preset=d20")
    assert (cfg.learning_rate_value, cfg.keep_checkpoints) == (0.9, 7)
    cfg = resumed(monkeypatch, saved, "--preset=d20", "--train_tokens=140000000", "--learning_rate=0.02")
    assert (cfg.train_tokens, cfg.max_iters, cfg.learning_rate) == (140000000, 2136, 0.02)
    assert resumed(monkeypatch, saved, "--preset=d20", "--max_iters=2000").max_iters == 2000
    cfg = resumed(monkeypatch, saved, "--preset=speedrun")
    assert cfg.learning_rate == 0.04 and cfg.max_iters == 13600
    saved["max_iters"] = 500  # given at the first start, beside the preset's train_tokens
    capsys.readouterr()
    assert resumed(monkeypatch, saved, "--preset=d20").max_iters == 500
    assert "max_iters=500" in capsys.readouterr().out
    saved["learning_rate"] = "fast"
    with pytest.raises(UserError, match="its flag learning_rate is 'fast', but must be a number"):
        resumed(monkeypatch, saved, "--preset=d20")


def test_a_resumed_run_keeps_the_scaling_that_was_the_default(monkeypatch):
    """Its rates must not jump; a scaling that is given counts, and so does that of another preset."""
    saved = vars(parse("--preset=d20", "--train_tokens=70000000", "--lr_scaling=sqrt"))
    assert resumed(monkeypatch, saved, "--preset=d20", "--train_tokens=70000000").lr_scaling == "sqrt"
    assert resumed(monkeypatch, saved, "--preset=d20", "--lr_scaling=length").lr_scaling == "length"
    assert resumed(monkeypatch, saved, "--preset=classic").lr_scaling == "none"


def test_a_checkpoint_that_lacks_a_flag_of_the_recipe_continues_as_before_that_flag(monkeypatch, capsys):
    saved = vars(parse("--preset=d20"))
    del saved["USE_CAUTIOUS_WD"], saved["weight_decay_head"]
    cfg = resumed(monkeypatch, saved, "--preset=d20")
    assert (cfg.USE_CAUTIOUS_WD, cfg.weight_decay_head) == (False, 0.0)
    assert "USE_CAUTIOUS_WD=False" in capsys.readouterr().out
    assert resumed(monkeypatch, saved, "--preset=d20", "--USE_CAUTIOUS_WD=True").USE_CAUTIOUS_WD is True


@pytest.mark.parametrize("given,followed", [
    ([], True), (["--preset=d12"], True), (["--grad_clip=0"], True), (["--USE_NVFP4=False"], False),
    (["--FP8_RECIPE=current"], False)])
def test_a_resumed_run_keeps_its_number_format(monkeypatch, given, followed):
    """Unless a flag of the format is given; then the others are the defaults."""
    saved = vars(parse("--preset=d20", "--USE_NVFP4=True", "--NVFP4_HADAMARD=False", "--FP8_MARGIN=3"))
    cfg = resumed(monkeypatch, saved, *given)
    assert cfg.USE_NVFP4 == followed and cfg.NVFP4_HADAMARD == (not followed) and cfg.FP8_MARGIN == 3 * followed


def test_an_edited_number_format_counts_as_given(tmp_path, monkeypatch):
    module, _ = edited_copy(tmp_path, USE_FP8="False")
    monkeypatch.setattr(train.checkpoint, "read_checkpoint", lambda folder: dict(flags=vars(parse("--preset=d20"))))
    cfg = module.read_flags([], has_gpu=False)
    train.checkpoint.adopt_flags("a", cfg, train.CLASSIC, one_process())
    assert cfg.USE_FP8 is False


EDITS = dict(preset='"d12"', learning_rate="0.05", n_embd="512", max_iters="9", warmup_iters="7", USE_FP8="False")


@pytest.mark.parametrize("first, again, expected", [
    ([], [], dict(learning_rate=0.05, max_iters=9, n_embd=512, USE_FP8=False, warmup_ratio=0.0, preset="d12")),
    (["--learning_rate=0.01", "--train_tokens=1310720", "--n_embd=256", "--USE_FP8=True", "--warmup_ratio=0.1"], [],
     dict(learning_rate=0.01, max_iters=20, n_embd=256, USE_FP8=True, warmup_ratio=0.1, preset="d12")),
    (["--learning_rate=0.01"], ["--learning_rate=0.02"], dict(learning_rate=0.02, max_iters=9)),
    (["--preset=speedrun", "--n_embd=256"], [], dict(preset="speedrun", n_embd=256, n_layer=20, learning_rate=0.05)),
    (["--learning_rate=0.01"], ["--preset=speedrun"], dict(learning_rate=0.05, n_layer=12)),
])
def test_an_edit_from_before_the_checkpoint_is_not_a_change(tmp_path, monkeypatch, first, again, expected):
    """The first start may have given another value, which a resumed run keeps. Only newer edits count."""
    module, _ = edited_copy(tmp_path, total_batch_size="65536", batch_size="8", **EDITS)
    then = module.read_flags(first, has_gpu=True)
    meta = dict(flags=flag_values(then), in_file=then.in_file)
    monkeypatch.setattr(train.checkpoint, "read_checkpoint", lambda folder: json.loads(json.dumps(meta)))

    def resume(module):
        cfg = module.read_flags([*again, "--resume=auto"], has_gpu=True)
        module.resolve_length(cfg, train.checkpoint.adopt_flags("a", cfg, train.CLASSIC, one_process()))
        return cfg

    cfg = resume(module)
    assert {name: getattr(cfg, name) for name in expected} == expected
    module, _ = edited_copy(tmp_path, total_batch_size="65536", batch_size="8", **EDITS | dict(learning_rate="0.06"))
    if "--learning_rate=0.02" not in again:
        assert resume(module).learning_rate == 0.06


def test_the_number_of_calibration_passes_chooses_no_format(monkeypatch):
    saved = vars(parse("--preset=d20", "--USE_FP8=False"))
    assert resumed(monkeypatch, saved, "--preset=d20", "--FP8_CALIBRATION_STEPS=3").USE_FP8 is False
    assert resumed(monkeypatch, saved, "--preset=d20", "--FP8_MARGIN=0").USE_FP8 is True


def test_the_defaults_of_the_number_format_are_those_of_the_script():
    cfg = parse()
    assert {name: getattr(cfg, name) for name in train.checkpoint.FORMAT_FLAGS} == train.checkpoint.FORMAT_FLAGS
    # The number of calibration passes chooses no format; a resumed run takes it over with the recipe
    assert {"FP8_CALIBRATION_STEPS", "skip_loss_zscore", "zscore_window"} <= train.CLASSIC.keys()
    of_formats = {name for known in FORMATS.values() for name in known.flags} - {"FP8_CALIBRATION_STEPS"}
    assert {*train.checkpoint.FORMAT_FLAGS} == of_formats | {"USE_FP8", "USE_NVFP4", "HIGH_PRECISION_LAYERS"}


def test_auto_batch_of_a_resumed_run_needs_no_length(monkeypatch):
    """Without a checkpoint to resume, it does."""
    cfg = parse("--preset=d20", "--train_tokens=0", "--max_iters=20", "--resume=auto")
    saved = vars(parse("--preset=d20", "--total_batch_size=4096"))
    monkeypatch.setattr(train.checkpoint, "read_checkpoint", lambda folder: dict(flags=saved))
    with pytest.raises(UserError, match="--train_tokens"):
        train.resolve_length(cfg, {})
    train.resolve_length(cfg, train.checkpoint.adopt_flags("a", cfg, train.CLASSIC, one_process()))
    assert (cfg.total_batch_size, cfg.max_iters) == (4096, 20)


@pytest.mark.parametrize("edit, given, steps", [
    (dict(train_tokens="100000"), [], 49), (dict(train_tokens="100000"), ["--max_iters=7"], 7),
    (dict(max_iters="9"), [], 9), (dict(max_iters="9"), ["--train_tokens=100000"], 49),
    (dict(max_iters="9", train_tokens="100000"), ["--max_iters=7"], 7),
])
def test_a_length_that_is_given_beats_one_that_was_edited(tmp_path, edit, given, steps):
    module, _ = edited_copy(tmp_path, preset='"tiny"', **edit)
    assert module.read_flags(given, has_gpu=False).max_iters == steps


def test_two_lengths_of_the_same_rank_are_refused(tmp_path):
    module, _ = edited_copy(tmp_path, preset='"tiny"', max_iters="9", train_tokens="100000")
    with pytest.raises(UserError, match="train_tokens and max_iters.*only one"):
        module.read_flags([], has_gpu=False)
    assert module.read_flags(["--max_iters=7", "--train_tokens=0"], has_gpu=False).max_iters == 7


def test_a_warm_up_that_is_given_in_steps_beats_an_edited_fraction(tmp_path):
    module, _ = edited_copy(tmp_path, preset='"tiny"', warmup_ratio="0.5")
    assert module.read_flags([], has_gpu=False).warmup_ratio == 0.5
    assert module.read_flags(["--warmup_iters=7"], has_gpu=False).warmup_ratio == 0.0


@pytest.mark.parametrize("ranks", [3, 5, 6, 7, 48])
@pytest.mark.parametrize("given", [[], ["--train_tokens=70000000"], ["--preset=d12", "--train_tokens=50000000"],
                                   ["--preset=classic"], ["--preset=tiny"], ["--batch_size=4"],
                                   ["--preset=d12", "--train_tokens=50000000", "--batch_size=4"]])
def test_the_remedy_for_other_numbers_of_ranks_works_and_is_near(ranks, given):
    given = ["--preset=d20", *given] if not any("preset" in flag for flag in given) else given
    cfg = parse(*given)
    with pytest.raises(UserError, match="; use --total_batch_size=") as caught:
        train.check_flags(cfg, ranks)
    for remedy in str(caught.value).split("; use ")[1].split(", or "):
        flags = remedy.split(" for ")[0].split()
        now = parse(*given, *flags)
        train.check_flags(now, ranks)
        if "--batch_size=4" not in given and cfg.total_batch_size >= 4 * ranks * cfg.block_size * 4:
            assert 0.8 < now.total_batch_size / cfg.total_batch_size < 1.25
        assert bool(now.batch_ramp) == ("--batch_ramp=0.25,0.6" in flags)


@pytest.mark.parametrize("given, ranks", [
    (["--preset=d12", "--batch_size=16"], 8), (["--preset=d12", "--batch_size=32"], 4), (["--batch_size=12"], 1)])
def test_each_remedy_for_a_given_micro_batch_works(given, ranks):
    with pytest.raises(UserError, match="; use --total_batch_size=.*, or --batch_size=auto$") as caught:
        train.check_flags(parse("--preset=d20", *given), ranks)
    for remedy in str(caught.value).split("; use ")[1].split(", or "):
        train.check_flags(parse("--preset=d20", *given, *remedy.split(" for ")[0].split()), ranks)


@pytest.mark.parametrize("name,value", [("n_layer", "3"), ("window_size", "64"), ("USE_8BIT_ADAM", "True"),
                                        ("muon_variant", '"muon"'), ("dataset", '"other"'), ("block_size", "64")])
def test_an_edited_flag_that_cannot_change_is_refused(tmp_path, monkeypatch, name, value):
    module, _ = edited_copy(tmp_path, **{name: value})
    saved = vars(parse("--preset=d20"))
    monkeypatch.setattr(train.checkpoint, "read_checkpoint", lambda folder: dict(flags=saved))
    cfg = module.read_flags(["--preset=d20"], has_gpu=False)
    assert name in cfg.explicit
    train.checkpoint.adopt_flags("a", cfg, train.CLASSIC, one_process())
    with pytest.raises(UserError, match=f"a was trained with {name}={saved[name]}, which cannot change to .*; "
                                        f"set --{name}={saved[name]}"):
        train.checkpoint.check_fixed_flags("a", cfg)


@pytest.mark.parametrize("ranks,arguments,remedy", [
    (3, [], "continue on 2 rank"), (7, [], "continue on 4 rank"), (2, ["--batch_size=5"], "use --batch_size=auto"),
    (32, [], "continue on 16 rank")])
def test_remedies_of_a_resumed_run_name_what_can_change(ranks, arguments, remedy):
    cfg = parse("--preset=tiny", *arguments)  # 2,048 tokens, 128 each
    with pytest.raises(UserError, match=remedy) as caught:
        train.check_flags(cfg, ranks, resumed=True)
    assert "--total_batch_size=" not in str(caught.value)
    with pytest.raises(UserError, match="--total_batch_size="):
        train.check_flags(cfg, ranks)


def test_a_checkpoint_without_the_new_flags_continues_with_the_recipe_that_it_had(monkeypatch):
    saved = dict(total_batch_size=524288, learning_rate=0.03, max_iters=1700, n_layer=20, vocab_size=65536)
    cfg = resumed(monkeypatch, saved, "--preset=d20", "--learning_rate_head=0.007")
    assert vars(cfg) | dict(given=0, explicit=0, auto=0, preset=0) == vars(parse("--preset=classic")) | dict(
        learning_rate=0.03, learning_rate_head=0.007, given=0, explicit=0, auto=0, preset=0)
    assert resumed(monkeypatch, saved, "--preset=d20", "--max_iters=2000").max_iters == 2000


@pytest.mark.parametrize("ranks,batch", [(1, 16), (2, 16), (4, 16), (8, 8), (16, 4), (64, 1)])
def test_a_batch_size_that_was_not_given_is_lowered_for_many_ranks(ranks, batch):
    cfg = parse("--preset=d20")
    train.check_flags(cfg, ranks)
    assert cfg.batch_size == batch and cfg.total_batch_size == 131072
    cfg = parse("--preset=d20", "--batch_size=16")
    if ranks > 4:
        with pytest.raises(UserError, match="--total_batch_size="):
            train.check_flags(cfg, ranks)


@pytest.mark.parametrize("changes,words", [
    (dict(batch_size=0), "batch_size"), (dict(n_layer=-1), "n_layer"), (dict(learning_rate=-0.1), "learning_rate"),
    (dict(rank_timeout=1.0), "rank_timeout"), (dict(FP8_CALIBRATION_STEPS=0), "FP8_CALIBRATION_STEPS"),
    (dict(warmup_iters=-1), "warmup_iters"), (dict(muon_momentum=1.0), "muon_momentum"),
    (dict(adam_beta2=1.0), "adam_beta2"), (dict(logit_softcap=44.0), "logit_softcap"),
    (dict(n_head=3), "--n_head="), (dict(n_embd=66, n_head=2), "head size"), (dict(run_name="a/b"), "run_name"),
    (dict(run_name=""), "run_name"), (dict(run_name=".."), "run_name"),
    (dict(run_name=".gpt"), "leading dot"), (dict(log_interval=0), "log_interval"),
    (dict(eval_tokens=0), "eval_tokens"), (dict(max_iters=0), "max_iters"), (dict(norm_eps=0), "norm_eps"),
    (dict(adam_eps=0.0), "adam_eps"),  # 0 / 0 for every embedding row that has had no gradient
    (dict(adam_eps=-1.0), "adam_eps"), (dict(seed=-1), "seed"),  # numpy takes 0 to 2^32 - 1
])
def test_impossible_values_are_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        train.check_flags(make_cfg(**changes), 1)
    assert caught.value.status == 2


@pytest.mark.parametrize("name", train.PRESETS)
def test_every_preset_saves_before_its_end(name):
    """Else a run that is killed late would lose all of it."""
    cfg = parse(f"--preset={name}")
    assert 0 < cfg.ckpt_interval < cfg.max_iters and cfg.keep_checkpoints > 0


def test_a_block_of_one_token(fresh, shards, tmp_path, capsys):
    """It trains. FP8 needs micro-batches of a multiple of 16 tokens; else one line says so."""
    flags = dict(block_size=1, batch_size=16, total_batch_size=32, max_iters=3, warmup_iters=1)
    folder = train_here(tmp_path, shards, **flags)
    assert len(helpers.losses(folder)) == 3 and all(map(math.isfinite, helpers.losses(folder)))
    with pytest.raises(UserError, match="batch_size x block_size divisible by 16, got 64 and 2"):
        train.select_precision(make_cfg(**flags | dict(batch_size=2)), helpers.CPU)


@pytest.mark.parametrize("total,batch,world",
                         [(300, 2, 1), (1000, 3, 2), (63, 1, 3), (1, 4, 2), (99999, 2, 8), (160, 2, 2)])
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


@pytest.mark.parametrize("flag", ["warmup", "muon_momentum"])
def test_a_warm_up_given_in_steps_beats_the_presets_fraction(flag):
    assert getattr(parse("--preset=d20"), f"{flag}_ratio") > 0
    steps = parse("--preset=d20", f"--{flag}_iters=500")
    assert (getattr(steps, f"{flag}_iters"), getattr(steps, f"{flag}_ratio")) == (500, 0)
    both = parse("--preset=d20", f"--{flag}_iters=500", f"--{flag}_ratio=0.1")
    assert getattr(both, f"{flag}_ratio") == 0.1


@pytest.mark.parametrize("memory,expected", [((80e9, 80e9), "ddp"), ((34e9, 25e9), "fsdp2"), ((25e9, 34e9), "fsdp2")])
def test_the_smallest_gpu_decides_the_wrapper(monkeypatch, memory, expected):
    """All ranks choose the same one: 561M parameters take 6.7 GB on two."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory[0]))
    procs = SimpleNamespace(world_size=2, device=torch.device("cuda", 0), gather=lambda own: [own, memory[1]])
    assert train.choose_wrapper(make_cfg(), procs, 561_040_640)[0] == expected


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
    """The error names the format's multiple, and the flags that lead to bf16, which takes every shape."""
    with pytest.raises(UserError, match="divisible by") as error:
        train.select_precision(make_cfg(**changes), helpers.CPU)
    remedy = dict.fromkeys(re.findall(r"--(\w+)=False", str(error.value)), False)
    assert train.select_precision(make_cfg(**changes | remedy), helpers.CPU).name == "bf16"


@pytest.mark.parametrize("code,changes,words", [
    (2, dict(total_batch_size=300), ["--total_batch_size=256"]),
    (2, dict(preset="big"), ["preset", "d20", "tiny", "'big'"]),
    (2, dict(USE_FSDP2=True, USE_DDP=True), ["USE_FSDP2", "USE_DDP"]),
    (2, dict(USE_8BIT_ADAM=True), ["USE_8BIT_ADAM", "GPU"]),
    (2, dict(USE_EMULATION=False), ["USE_EMULATION"]),
    (2, dict(n_embd=66, n_head=3), ["divisible by 16", "--USE_FP8=False"]),
    (2, dict(seed=-1), ["seed"]),
    (1, dict(dataset="nowhere"), ["nowhere", "data/README.md", "--dataset"]),
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


@pytest.mark.slow
def test_as_a_script(tmp_path, shards):
    """--help, wrong input and a bare import, each in its own process: exit status, output, and no files."""
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
    helpers.assert_one_error_line(results["data"], 1, "nowhere", "data/README.md", "--data_dir")
    assert (results["bare"].code, results["bare"].out, results["bare"].err) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_flags_without_effect_are_named(fresh, shards, tmp_path, capsys):
    """The start-up table lists flags that were set for another format than the run's."""
    train_here(tmp_path, shards, max_iters=1, warmup_iters=1, FP8_RECIPE="current", FP8_MARGIN=1, NVFP4_HADAMARD=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert {"FP8_MARGIN=1", "NVFP4_HADAMARD=False"} <= set(line.replace(",", "").split()) and "FP8_RECIPE" not in line
    cfg = make_cfg(USE_FP8=False, FP8_RECIPE="block")
    assert train.select_precision(cfg, helpers.CPU).flags_without_effect(cfg)[0] == "FP8_RECIPE=block"
    train_here(tmp_path, shards, max_iters=1, warmup_iters=1, FP8_MARGIN=1)
    assert "without effect" not in capsys.readouterr().out
