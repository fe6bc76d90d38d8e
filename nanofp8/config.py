"""Typed flags of a script: read them, check them, list them. Standard library alone.

A flag is one line of the script, between the comments "# Flags" and "# End of flags":

    n_layer: Layers = 20  # transformer blocks

The annotation is the flag's type, range or choices, and nothing else lists them. The trailing comment is its help text.
A comment on a line of its own names the group of the flags below it. The lines are read from the script's source, so
that --help and wrong flags are answered without importing the script (and torch with it).

Annotations use only names that this module defines or imports: int, float, bool, str, Literal[...], and those below.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import getpass
import importlib
import math
import operator
import os
import re
import signal
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import (
    Annotated,
    Any,
    Iterable,
    Literal,
    Mapping,
    NoReturn,
    Sequence,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

GPU_PRESET, CPU_PRESET = "d20", "tiny"  # what preset "auto" stands for, with and without a GPU


class UserError(Exception):
    """Wrong input or a failure that a user can remedy: reported as one line, without a traceback.

    Args:
        message: what is wrong, then what to do.
        status: exit status of the script, 1 or 2 (2: wrong flags).
        one_rank: other ranks may not have met this error, so the rank that raises it prints it and exits at once.
    """

    def __init__(self, message: str, status: int = 1, one_rank: bool = False):
        super().__init__(message)
        self.status, self.one_rank = status, one_rank


# ----------------------------------------------------------------------------------------------------------------------
# Types of flags


@dataclass(frozen=True)
class Bounds:
    """Range of a number: low <= value <= high, or `<` where that end is open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low}"
        return low if self.high == math.inf else f"{low} and {'below' if self.open_high else 'at most'} {self.high}"


@dataclass(frozen=True)
class Pattern:
    """Texts that match a regular expression as a whole; `meaning` says which these are."""

    regex: str
    meaning: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.regex, value) is not None

    def __str__(self) -> str:
        return self.meaning


class Ascending:
    """Texts that list fractions between 0 and 1, each larger than the one before, such as "0.25,0.6"; or no text."""

    def __contains__(self, value: str) -> bool:
        if re.fullmatch(r"(0?\.\d{1,9}(,(?=.)|$))*", value) is None:
            return False
        points = [0.0, *(float(point) for point in value.split(",") if point)]
        return all(a < b for a, b in zip(points, points[1:], strict=False))

    def __str__(self) -> str:
        return "ascending fractions between 0 and 1, such as 0.25,0.6, or empty"


SMALLEST, LARGEST = 1.2e-38, 1e38  # size of a fractional number that is not 0: what fp32 holds
Positive = Annotated[int, Bounds(1)]
NonNegative = Annotated[int, Bounds(0)]
Layers = Annotated[int, Bounds(1, 10_000)]     # of a model
PositiveFloat = Annotated[float, Bounds(0, open_low=True)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Softcap = Annotated[float, Bounds(0, 43)]      # on a GPU exp(-88) is 0, and sums reach down to exp(-2 * softcap)
Fraction = Annotated[float, Bounds(0, 1, open_high=True)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
Exponent = Annotated[int, Bounds(-64, 64)]     # of a power of two that fits fp32 with room to spare
Window = Annotated[int, Bounds(1, 1_000_000)]  # steps or micro-batches that are kept in memory
Timeout = Annotated[float, Bounds(5)]          # seconds; heartbeats come every second
# The codes from \x00 on are control characters; \u2028 and \u2029 end lines, too
FolderName = Annotated[str, Pattern(r"(?!\.)(?!\s*$)[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029]+",
                                    "a folder name, not blank, without slashes, control characters or a leading dot")]
NonEmpty = Annotated[str, Pattern(r"(?s).*\S.*", "text that is not blank")]
Letters = Annotated[str, Pattern(r"[SL]+", "one or more of the letters S and L, such as SSSL")]
Ramp = Annotated[str, Ascending()]
AutoPositive = Union[Literal["auto"], Positive]
AutoBool = Union[Literal["auto"], bool]
AutoNonNegativeFloat = Union[Literal["auto"], NonNegativeFloat]


def describe(kind: Any) -> str:
    """Return what a flag of this type takes, without its range, as error messages and --help say it."""
    origin = get_origin(kind)
    if origin is Annotated:
        return describe(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in get_args(kind)).replace("auto or True", "auto, True")
    if origin is Literal:
        return ("one of " if len(get_args(kind)) > 2 else "") + _list([str(choice) for choice in get_args(kind)])
    return {int: "an integer", float: "a number", bool: "True or False", str: "text"}[kind]


def _list(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else ", ".join(words)


def convert(kind: Any, value: Any) -> Any:
    """Return a value as a flag's type: `value` is the text of --name=text, or the value written in the script.

    Raises: ValueError that says what the value must be, if it is not of the type or out of its range.
    """
    origin, wrong = get_origin(kind), ValueError(describe(kind))
    if origin is Annotated:
        base, limit = get_args(kind)
        value = convert(base, value)
        if value not in limit:
            raise ValueError(str(limit))
        return value
    if origin in (Union, types.UnionType):
        for part in get_args(kind):
            try:
                return convert(part, value)
            except ValueError as error:
                if get_origin(part) is Annotated and str(error) != describe(part):  # a number that is out of range
                    raise
        raise wrong
    if origin is Literal:
        for choice in get_args(kind):
            if value == choice and type(value) is type(choice) or _same_switch(value, choice):
                return choice
        raise wrong
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return expand_home(value)
    if kind is bool:
        for choice in (True, False):
            if value is choice or _same_switch(value, choice):
                return choice
        raise wrong
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise wrong from None
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise wrong
    if kind is int and not -2**63 <= value < 2**63:
        raise ValueError("an integer of 64 bits")
    if kind is float and value and not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"a number of size {SMALLEST:g} to {LARGEST:g}, or 0")
    return kind(value)


def expand_home(path: str) -> str:
    """Return a path with the home folder in place of a leading ~; any other text as it is.

    No shell expands --out_dir=~/runs, and a folder called ~ is dangerous to delete.
    """
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def _same_switch(text: Any, choice: Any) -> bool:
    """Whether a text is True or False, in any case, and this choice is that."""
    return isinstance(choice, bool) and isinstance(text, str) and text.strip().lower() == str(choice).lower()


# ----------------------------------------------------------------------------------------------------------------------
# Reading a script


@dataclass(frozen=True)
class Flag:
    """One flag of a script."""

    name: str
    kind: Any      # resolved annotation
    default: Any   # value in the script's source
    comment: str   # help text
    group: str     # heading that it stands under


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def _value(node: ast.expr) -> Any:
    """Evaluate a constant or arithmetic on constants, such as 2**19 or 9 * 10**8 // 2048. Raises ValueError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        huge = isinstance(node.op, ast.Pow) and not (isinstance(right, (int, float)) and right <= 100)
        if not isinstance(left, str) and not isinstance(right, str) and not huge:
            return OPERATORS[type(node.op)](left, right)
    raise ValueError


def script_flags(path: str | os.PathLike) -> dict[str, Flag]:
    """Read the flags of a script from its source, in order, without importing it.

    Returns: {name: Flag}.
    Raises: UserError (status 2) naming the line of a flag without a type, of an unknown type or of a wrong value.
    """
    with open(path, encoding="utf-8-sig") as f:  # an editor may have put a byte order mark there
        return dict(_flags_of(f.read(), os.path.basename(path)))


@functools.lru_cache(maxsize=8)  # it takes 0.1 s, and a process may ask for each of its runs
def _flags_of(text: str, script: str) -> dict[str, Flag]:
    """Read the flags of script_flags() from the text of the script of this name."""
    lines = text.split("\n")  # as ast counts them; splitlines() knows more line ends
    starts = {word: next((i for i, line in enumerate(lines, 1) if line.startswith(word)), len(lines))
              for word in ("# Flags", "# End of flags")}
    groups = {i: line[2:] for i, line in enumerate(lines, 1)
              if i > starts["# Flags"] and re.match(r"# \w", line) and not lines[i - 2].startswith("#")}
    flags = {}
    for node in ast.parse(text).body:
        if not starts["# Flags"] < node.lineno < starts["# End of flags"]:
            continue
        where = f"{script}, line {node.lineno}"
        if isinstance(node, ast.Assign):
            raise UserError(f"{where}: flag {ast.unparse(node.targets[0])} has no type; "
                            f"write it as `name: type = value  # comment`", 2)
        if not isinstance(node, ast.AnnAssign) or node.value is None or not isinstance(node.target, ast.Name):
            raise UserError(f"{where}: only flags may stand between '# Flags' and '# End of flags'", 2)
        name, annotation = node.target.id, ast.unparse(node.annotation)
        try:
            holder = type("Flags", (), {"__annotations__": {name: annotation}})
            kind = get_type_hints(holder, globalns=globals(), include_extras=True)[name]
            describe(kind)
        except (NameError, TypeError, KeyError, SyntaxError):
            raise UserError(f"{where}: flag {name} has an unknown type '{annotation}'; "
                            f"nanofp8/config.py lists the types", 2) from None
        try:
            value = _value(node.value)
        except (ValueError, ArithmeticError):
            raise UserError(f"{where}: the value of {name} must be a number, a string, True or False, "
                            f"got {ast.unparse(node.value)}", 2) from None
        try:
            default = convert(kind, value)
        except ValueError as error:
            raise UserError(f"{where}: {name} must be {error}, got {ast.unparse(node.value)}", 2) from None
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
        group = groups.get(max((i for i in groups if i < node.lineno), default=0), "")
        flags[name] = Flag(name, kind, default, rest.strip().removeprefix("#").strip(), group)
    return flags


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def nearest(name: str, flags: Iterable[str]) -> str:
    """Return the flag whose name is most like this one; "" if none is similar."""
    by_lower = {known.lower(): known for known in flags}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), by_lower, 1)
    return by_lower[found[0]] if found else ""


def quoted(text: str) -> str:
    """Return a text in quotes, as a part of one line: characters that cannot be printed as escapes."""
    return f"'{text}'" if text.isprintable() else repr(text)


def parse_arguments(argv: Sequence[str], flags: Mapping[str, Flag],
                    switches: Sequence[str] = ("help",)) -> dict[str, Any]:
    """Return {name: value} of arguments --name=value.

    switches: arguments that are answered elsewhere, which have no value.
    Raises: UserError (status 2) naming the flag that is meant, or what the flag takes.
    """
    given = {}
    for argument in argv:
        match = re.fullmatch(r"--([\w-]+)=(.*)", argument, re.S)
        if not match:
            raise UserError(f"unknown argument {quoted(argument)}; write flags as --name=value (see --help)", 2)
        name, text = match.groups()
        if name in switches:
            raise UserError(f"--{name} has no value; write --{name}", 2)
        if name not in flags:
            meant = nearest(name, flags)
            raise UserError(f"unknown flag --{name}; did you mean --{meant}? (see --help)" if meant else
                            f"unknown flag --{name}; --help lists all flags", 2)
        try:
            given[name] = convert(flags[name].kind, text)
        except ValueError as error:
            raise UserError(f"--{name} must be {error}, got {quoted(text)}", 2) from None
    return given


def parse_flags(argv: Sequence[str], path: str | os.PathLike, presets: Mapping[str, Mapping[str, Any]],
                has_gpu: bool) -> SimpleNamespace:
    """Resolve a script's defaults, a preset and the command line. A flag that was edited or given beats the preset.

    Args:
        argv: arguments, --name=value each.
        path: the script.
        presets: {preset: {flag: value}}. An entry of GPU_PRESET repeats the script's released defaults: a flag whose
            default differs from it was edited.
        has_gpu: whether preset "auto" stands for GPU_PRESET or for CPU_PRESET.
    Returns: one attribute per flag; `given`: sorted names of the flags in `argv`; `explicit`: these, the edited ones
        and "preset"; `auto`: those whose value is "auto"; `in_file`: {flag: its value in the script}.
    Raises: UserError (status 2).
    """
    flags = script_flags(path)
    given = parse_arguments(argv, flags)
    values = {name: flag.default for name, flag in flags.items()}
    preset = given.get("preset", values["preset"])
    auto = ["preset"] if preset == "auto" else []
    if auto:
        preset = GPU_PRESET if has_gpu else CPU_PRESET
    if preset not in presets:
        raise UserError(f"preset={preset} has no entry in PRESETS; add one, or choose {', '.join(presets)}", 2)
    if unknown := sorted(presets[preset].keys() - flags.keys()):
        meant = nearest(unknown[0], flags)
        raise UserError(f"preset {preset} sets {unknown[0]}, which is no flag; "
                        f"{f'did you mean {meant}?' if meant else 'remove it'}", 2)
    edited = {name for name, released in presets[GPU_PRESET].items() if values[name] != released}
    values |= {name: value for name, value in presets[preset].items() if name not in edited}
    values |= given | {"preset": preset}
    auto = sorted(auto + [name for name, value in values.items() if value == "auto"])
    return SimpleNamespace(**values, given=sorted(given), explicit=sorted({*given, *edited, "preset"}), auto=auto,
                           in_file={name: flag.default for name, flag in flags.items()})


def flag_values(cfg: SimpleNamespace) -> dict[str, Any]:
    """Return all flags as a dict, for config.json and meta.json."""
    notes = ("given", "explicit", "auto", "in_file", "batch_starts")
    return {name: value for name, value in vars(cfg).items() if name not in notes}


def may_choose(cfg: SimpleNamespace, name: str) -> bool:
    """Whether the script may choose a flag's value: it was neither given nor edited, or is "auto"."""
    return name in cfg.auto or name not in cfg.explicit


def precedence(cfg: SimpleNamespace, name: str) -> int:
    """Return which of two flags for one thing counts, the higher: 2, given as an argument; 1, edited; 0, neither."""
    return (name in cfg.explicit) + (name in cfg.given)


def check_command_line(path: str, argv: Sequence[str] | None = None, doctor: str = "") -> None:
    """Answer --help, --doctor and wrong flags of a script that is being started: print and exit, or return if all is
    well.

    A script calls this before it imports torch. Under torchrun rank 0 answers alone. Checks that need the preset, the
    GPU or the number of ranks come later, in the script. Until raise_on_ctrl_c(), Ctrl-C ends the script at once.

    Args:
        argv: of a test; None: the program's own.
        doctor: module that answers --doctor: run(path, other arguments) prints a report and returns the exit status.
    """
    if argv is None:
        argv = sys.argv[1:]
        start_script(path)
        print_any_text()
    try:
        flags = script_flags(path)
        if "--help" in argv or "-h" in argv:
            if _is_main():
                print_answer(format_help(path, flags))
            raise SystemExit(0)
        given = [argument for argument in argv if argument != "--doctor" or not doctor]
        parse_arguments(given, flags, ("help", "doctor") if doctor else ("help",))
        if len(given) < len(argv):
            raise SystemExit(importlib.import_module(doctor).run(path, given) if _is_main() else 0)
    except UserError as error:
        exit_with(error, os.path.basename(path))


PACKAGES = ("torch", "numpy", "matplotlib")
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of train.py
OWN_ENVIRONMENT = os.path.join(PROJECT, ".venv")  # run.sh's


def environment_remedy() -> str:
    """Return how to get a Python that can train, if this one cannot."""
    installed = os.path.join(OWN_ENVIRONMENT, "installed")  # run.sh writes it; it rebuilds no others
    if os.path.realpath(sys.prefix) == os.path.realpath(OWN_ENVIRONMENT) and os.path.exists(installed):
        return f"delete {OWN_ENVIRONMENT} and start with bash run.sh, which makes it again"
    return ("start with bash run.sh, which makes an environment, or use that environment's Python "
            "(.venv/bin/python)")


def being_imported(trace: Any) -> str:
    """Return which of PACKAGES was being imported where a traceback was made, the innermost of them, or ""."""
    found = ""
    while trace:
        frame, trace = trace.tb_frame, trace.tb_next
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") in PACKAGES:
            found = frame.f_globals["__name__"]
    return found


def report_early_error(script: str, kind: type, error: BaseException, trace: Any) -> None:
    """Serve as sys.excepthook: print one line for Ctrl-C, which nothing else catches while torch is imported, and for a
    UserError, as of a torch that is too old, and for a Python without torch, NumPy or Matplotlib, or with one that
    cannot be imported; any other exception as Python does. The exit status is 130 or 1."""
    line = ""
    if issubclass(kind, KeyboardInterrupt):
        line = "interrupted"
    elif issubclass(kind, UserError):
        line = f"error: {error}"
    elif issubclass(kind, ModuleNotFoundError) and error.name in PACKAGES:
        line = f"error: {sys.executable} has no {error.name}; {environment_remedy()}"
    elif issubclass(kind, (ImportError, OSError)) and (broken := being_imported(trace)):  # a library is missing, say
        why = (str(error).strip().splitlines() or [kind.__name__])[-1]
        libraries = "unset LD_LIBRARY_PATH, which may bring other libraries, or " * ("LD_LIBRARY_PATH" in os.environ)
        line = f"error: {sys.executable} cannot import {broken} ({why}); {libraries}{environment_remedy()}"
    if line and _is_main():
        print(f"{script}: {line}", file=sys.stderr, flush=True)
    elif not line:
        sys.__excepthook__(kind, error, trace)


def explain_early_errors(path: str) -> None:
    """From now on, let this script end with one line where Python has no torch, and at Ctrl-C that nothing catches."""
    sys.excepthook = functools.partial(report_early_error, os.path.basename(path))


def name_user() -> None:
    """Give a user without a name one, as in a container that runs under any number (docker --user, OpenShift).

    torch.compile and QuACK name folders of caches by the user; without a name, those of torch 2.11 raise an exception.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # OSError: from Python 3.13 on
        os.environ["USER"] = f"uid{os.getuid()}"


def print_any_text() -> None:
    """Print characters that the console cannot show as escapes: a path in another alphabet must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")


def print_answer(text: str) -> None:
    """Print the text of --help. A reader that leaves early, as `head` does, ends the script quietly, with status 1.

    Raises: UserError if it cannot be written for another reason.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail at exit
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise UserError(f"cannot write to stdout ({error.strerror}); let it go to a file or terminal that can be "
                        f"written") from None


def start_script(path: str) -> None:
    """Do what comes before a script imports torch: let it end with one line at errors until then and at Ctrl-C, check
    what torch needs of the machine, and give a user without a name one."""
    explain_early_errors(path)
    check_folders(os.path.basename(path))
    name_user()
    exit_on_ctrl_c(path)


def check_folders(script: str) -> None:
    """Exit with one line if there is no current or no temporary folder: torch could not be imported."""
    for find, fault in ((os.getcwd, "the current folder no longer exists; cd to one that does"),
                        (tempfile.gettempdir, "no temporary folder can be written; set TMPDIR to one that can")):
        try:
            find()
        except OSError:
            exit_with(UserError(fault), script)


def exit_on_ctrl_c(path: str) -> None:
    """From now on, let Ctrl-C end this script with one line, status 130: while it imports torch, which takes seconds.
    Where Ctrl-C is ignored or handled already, that stays."""
    def stop(*_: object) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            if _is_main():
                print(f"{os.path.basename(path)}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def raise_on_ctrl_c() -> None:
    """Undo exit_on_ctrl_c(): Ctrl-C raises KeyboardInterrupt again, which the script catches."""
    if getattr(signal.getsignal(signal.SIGINT), "__qualname__", "").startswith(exit_on_ctrl_c.__name__):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_with(error: UserError, script: str) -> NoReturn:
    """Print a UserError as the script's one line of error on stderr, and exit with its status."""
    if _is_main() or error.one_rank:
        print(f"{script}: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # torchrun stops all ranks as soon as one has failed: rank 0 must have printed by then
    raise SystemExit(error.status)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def format_help(path: str, flags: Mapping[str, Flag]) -> str:
    """Return the text of --help: the script's docstring, then every flag with its default, comment and choices."""
    with open(path, encoding="utf-8-sig") as f:
        lines = [ast.get_docstring(ast.parse(f.read())) or ""]
    group = None
    for flag in flags.values():
        if flag.group != group:
            group = flag.group
            lines += ["", group]
        choices = "" if get_origin(flag.kind) in (None, Annotated) else f" [{describe(flag.kind)}]"
        lines.append(f"  {f'--{flag.name}={flag.default}':<34} {flag.comment}{choices}")
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """argparse for the smaller scripts: the description is printed as it stands, and an error is one line."""

    def __init__(self, **options: Any):
        super().__init__(**dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False) | options)

    def error(self, message: str) -> NoReturn:
        """Raise UserError (status 2) where argparse would print its usage and exit."""
        raise UserError(f"{message} (see --help)", 2)

    def print_help(self, file: Any = None) -> None:
        """Print as print_answer() does. Raises: UserError."""
        if file is None:
            print_answer(self.format_help().rstrip("\n"))
        else:
            super().print_help(file)
