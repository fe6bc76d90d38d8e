"""Reading the flags of a script, and UserError."""

import argparse
import ast
import difflib
import math
import os
import re
from types import SimpleNamespace
from typing import Any, NoReturn

import torch


class UserError(Exception):
    """Wrong input: command_line() prints its one line and exits with `status`, without a traceback."""

    def __init__(self, message, status=1, one_rank=False):
        super().__init__(message)
        self.status, self.one_rank = status, one_rank  # one_rank: the other ranks may not have met it


WHOLE_NUMBERS = set("""seed n_layer n_embd n_head vocab_size block_size total_batch_size batch_size max_iters warmup_iters
    muon_momentum_iters FP8_MARGIN FP8_AMAX_HISTORY FP8_CALIBRATION_STEPS FP8_STATS_INTERVAL loss_chunk_size eval_interval eval_tokens
    log_interval ckpt_interval keep_checkpoints max_bad_steps zscore_window""".split())


TEXTS = set("preset run_name out_dir resume dataset data_dir muon_impl FP8_RECIPE EVAL_PRECISION HIGH_PRECISION_LAYERS wandb_project".split())


OR_AUTO = set("USE_FSDP2 USE_DDP USE_COMPILE USE_EMULATION".split())


SWITCHES = re.compile(r"USE_|FSDP2_|REDUCE_|NVFP4_")  # True or False; the other flags of this file take any number


def read_flag_table(path):
    """The flags of a script: {name: (default, comment, group)}, read from its source text.

    A flag is a line `name = value  # comment` between the headings "# Flags" and "# End of flags";
    a comment line on its own opens a group. Raises UserError if a value is none.
    """
    table, group, inside = {}, "", False
    for line in open(path, encoding="utf-8"):
        if line.startswith("# End of flags"):
            break
        if line.startswith("# Flags"):
            inside = True
        elif inside and (m := re.match(r"(\w+) = (.+?)(?:\s+# (.*))?$", line)):
            try:
                value = eval(m[2], {"__builtins__": {}})  # this file's own text: 2**19 or 2 * 1700 may stand there
            except Exception:
                raise UserError(f"{os.path.basename(path)}: the value of flag {m[1]} cannot be read: {m[2]}", 2)
            table[m[1]] = (parse_value(m[1], repr(value) if not isinstance(value, str) else value, value), m[3] or "", group)
        elif inside and (m := re.match(r"# (\w.*)", line)):
            group = m[1]
    return table


def parse_value(name, text, default):
    """Turn the text of --name=text into a value of the flag's type; raises UserError.

    The type goes by the name, since defaults are edited (USE_FSDP2 = True still takes "auto"); that of a flag which is in none of
    the lists above goes by its default.
    """
    try:
        value = ast.literal_eval(text)
        float(value) if isinstance(value, int) else 0  # a number of 400 digits is none
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name in OR_AUTO:
        kind, ok = "auto, True or False", value == "auto" or isinstance(value, bool)
    elif name in TEXTS or isinstance(default, str) and not (SWITCHES.match(name) or name in WHOLE_NUMBERS):
        kind, ok, value = "text", True, text
    elif SWITCHES.match(name) or isinstance(default, bool):
        kind, ok = "True or False", isinstance(value, bool)
    elif name in WHOLE_NUMBERS:
        kind, ok = "a whole number", number and isinstance(value, int)
    else:
        kind, ok, value = "a number", number, float(value) if number and isinstance(default, float) else value
    if not ok:
        raise UserError(f"--{name} takes {kind}, not '{text}'", 2)
    return value


def parse_flags(argv, path, presets, choices, has_gpu=None):
    """Resolve defaults, preset and command line into one namespace of flags.

    Args:
        argv: command line without the program name, `--name=value` each.
        path: script whose flag section holds names, defaults and comments.
        presets: {preset: {flag: value}}; a flag set on the command line or edited in the file beats it.
        choices: {flag: allowed values}.
        has_gpu: what preset "auto" goes by (default: torch.cuda.is_available()).
    Returns: SimpleNamespace with one attribute per flag, and `explicit`, the names that were given.
    Raises: UserError (status 2) naming the nearest flag, or what the value should be.
    """
    table = read_flag_table(path)
    if any(a in ("--help", "-h") for a in argv):
        print(format_help(path, table))
        raise SystemExit(0)
    given = {}
    for arg in argv:
        m = re.fullmatch(r"--([\w-]+)=(.*)", arg, re.S)
        if not m:
            hint = f"--{arg.lstrip('-').split('=')[0]}=value" if arg.startswith("-") else "--name=value"
            raise UserError(f"'{arg}' is no flag; flags are written {hint} (--help lists them)", 2)
        name, text = m.groups()
        if name not in table:
            by_lower = {n.lower(): n for n in table}
            near = difflib.get_close_matches(name.lower().replace("-", "_"), by_lower, 1, 0.0)[0]
            raise UserError(f"no flag --{name}; the nearest is --{by_lower[near]} (--help lists all)", 2)
        given[name] = parse_value(name, text, table[name][0])
    flags = {name: default for name, (default, _, _) in table.items()}
    if presets:
        chosen = given.get("preset", flags["preset"])
        if chosen == "auto":
            has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
            chosen = "d20" if has_gpu else "tiny"
        if chosen not in presets:
            raise UserError(f"--preset is one of {', '.join(choices['preset'])}, not '{chosen}'", 2)
        edited = {name for name, released in presets["d20"].items() if flags[name] != released}
        flags.update({k: v for k, v in presets[chosen].items() if k not in edited})
        flags["preset"] = given["preset"] = chosen
    flags.update(given)
    for name, allowed in choices.items():
        if name in flags and flags[name] not in allowed:
            raise UserError(f"--{name} is one of {', '.join(map(str, allowed))}, not '{flags[name]}'", 2)
    return SimpleNamespace(**flags, explicit=sorted(given))


def format_help(path, table):
    """The text of --help: the script's docstring, then every flag with default and comment."""
    lines = [ast.get_docstring(ast.parse(open(path, encoding="utf-8").read())), ""]
    last = None
    for name, (default, comment, group) in table.items():
        if group != last:
            lines += ["", group]
            last = group
        lines.append(f"  {f'--{name}={default}':<34} {comment}")
    return "\n".join(lines)


def last_line(error):
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class OneLineParser(argparse.ArgumentParser):
    """argparse for the smaller scripts: the description is printed as it stands, and an error is one line."""

    def __init__(self, **options: Any):
        super().__init__(**dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False) | options)

    def error(self, message: str) -> NoReturn:
        """Raise UserError (status 2) where argparse would print its usage and exit."""
        raise UserError(f"{message} (see --help)", 2)
