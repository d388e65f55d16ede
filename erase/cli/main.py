"""The command ``erase-concept``. Results go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any

import typer

from erase_concept.cli import (
    apply,
    compare,
    concept,
    demo,
    erase,
    evaluate,
    export,
    mask,
    mask_info,
    report,
    sample,
    unlearn,
    verify,
)
from erase_concept.cli import list as listing
from erase_concept.cli.flags import REPLACED, in_flags
from erase_concept.errors import EraseError, RequestError, one_line
from erase_concept.pipelines.processes import (
    first_of_machine,
    launched_alone,
    lost_process,
    main_process,
    process_count,
)
from erase_concept.pipelines.signals import say, terminable

app = typer.Typer(
    name="erase-concept",
    help="Remove a concept from a Stable Diffusion model, and prove that it is gone and the rest is still there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Each command's name, function, examples, and panel of the help.
for _name, _command, _epilog, _panel in (
    ("demo", demo.demo, demo.EXAMPLES, "Erase"),
    ("erase", erase.erase, erase.EXAMPLES, "Erase"),
    ("mask", mask.mask, mask.EXAMPLES, "Erase"),
    ("train", unlearn.train, unlearn.TRAIN_EXAMPLES, "Classifiers"),
    ("unlearn", unlearn.unlearn, unlearn.UNLEARN_EXAMPLES, "Classifiers"),
    ("eval-classifier", unlearn.eval_classifier, unlearn.EVAL_EXAMPLES, "Classifiers"),
    ("eval", evaluate.evaluate, evaluate.EXAMPLES, "Measure"),
    ("report", report.report, report.EXAMPLES, "Measure"),
    ("compare", compare.compare, compare.EXAMPLES, "Measure"),
    ("verify", verify.verify, verify.EXAMPLES, "Measure"),
    ("export", export.export, export.EXAMPLES, "Use"),
    ("apply", apply.apply, apply.EXAMPLES, "Use"),
    ("sample", sample.sample, sample.EXAMPLES, "Use"),
    ("concept", concept.concept, concept.EXAMPLES, "Look up"),
    ("list", listing.list_, listing.EXAMPLES, "Look up"),
    ("mask-info", mask_info.mask_info, mask_info.EXAMPLES, "Look up"),
):
    app.command(_name, epilog=_epilog, rich_help_panel=_panel)(_command)


SHARED = ("erase", "eval", "mask", "sample", "train", "unlearn")  # the commands whose work several processes share

ENDED = {130: "interrupted", 143: "terminated", 129: "the terminal is gone"}  # by exit codes


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from erase_concept.version import __version__

        typer.echo(f"erase-concept {__version__}")
        raise typer.Exit
    command, count = context.invoked_subcommand, process_count()
    if count > 1 and command not in (None, *SHARED):
        raise RequestError("processes", count, f"{command} works in one process; several share {', '.join(SHARED)}")


def main() -> None:
    """Run the command; a wrong request ends with 2, failed work with 1, each with one line on stderr.

    A file that cannot be read or written is the request's. Ctrl-C ends with 130, SIGTERM with 143, SIGHUP with 129.
    """
    try:
        if process_count() > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported; see training/shared.py
        if launched_alone():
            say("accelerate launch has started one process alone, as it does on CPUs; torchrun starts several")
        if not main_process():
            logging.getLogger("erase_concept").setLevel(logging.ERROR)  # the main process gives the same warnings
        with terminable(), nullcontext() if main_process() else redirect_stdout(io.StringIO()):
            code = app(prog_name="erase-concept", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as end:
        code = _signalled(end) or end.code
    except RequestError as problem:
        _fail(problem, in_flags(problem), 2, of_all=True)
    except EraseError as problem:
        _fail(problem, str(problem), 1, of_all=problem.of_all)
    except OSError as problem:  # a full disk, a folder that may not be written, a file that is gone
        named = f"{problem.filename}: {problem.strerror}" if problem.filename and problem.strerror else str(problem)
        code = _signalled(problem) or _fail(problem, named or type(problem).__name__, 2)
    except Exception as problem:
        # The command line parser's own errors, whose class depends on the version of typer.
        if hasattr(problem, "format_message"):
            old = getattr(problem, "option_name", None)
            now = f"{old}: is now {REPLACED[old]}" if old in REPLACED else problem.format_message()
            _fail(problem, now, 2, of_all=True)
        from erase_concept.errors import out_of_memory

        if process_count() > 1 and (lost := lost_process(problem)):
            _fail(problem, lost, 1)
        if not out_of_memory(problem):
            raise
        advice = "a lower --memory or smaller batches may help, and 'erase --dry-run' tells what to expect"
        _fail(problem, f"there is too little memory: {advice}", 1)
    if code in ENDED and main_process():
        say(f"{ENDED[code]}; the same command goes on from here")
    sys.exit(code if isinstance(code, int) else 0)


def _signalled(problem: BaseException | None) -> int:
    """Return the exit code of the signal that ended the work, if one did; 0 where none did.

    What tidies up may fail after it, such as a progress bar whose terminal is gone.
    """
    while problem is not None:
        if isinstance(problem, KeyboardInterrupt):
            return 130
        if isinstance(problem, SystemExit) and problem.code in ENDED:
            return int(problem.code or 0)
        problem = problem.__context__
    return 0


def _fail(problem: BaseException, line: str, code: int, *, of_all: bool = False) -> Any:
    if "--debug" in sys.argv:
        raise problem
    # Called without arguments, the parser has shown its help and has nothing to add. What all processes of a machine
    # raise alike, such as a wrong request, the first of them says; another machine may have other files.
    if line and (first_of_machine() or not of_all):
        say(one_line(line))
    sys.exit(code)


if __name__ == "__main__":
    main()
