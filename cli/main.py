"""The command line: `tu-diffuse COMMAND`. Every error is caught here, once, and becomes one sentence on stderr and an exit code."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..allocator import keep_freed_memory
from ..errors import TuDiffuseError, out_of_memory
from .average import average
from .batch import batch
from .doctor import doctor
from .experts import app as experts
from .finetune import finetune
from .generate import generate
from .info import info
from .models import app as models
from .options import EXIT_CODES
from .replay import replay
from .shards import app as shards

UNASKED = ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops")  # loggers that warn whenever torchao or bitsandbytes is imported
NEEDS_LESS = {  # memory, by command
    "generate": "ask for smaller pictures, or a smaller --count",
    "finetune": "lower --batch-size, or add --gradient-checkpointing",
}
LONGEST_MESSAGE = 4000  # names and values that came with a file may be of any length

app = typer.Typer(
    name="tu-diffuse",
    help="Text to pictures, offline, on any machine.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EXIT_CODES)(generate)
app.command(epilog=EXIT_CODES)(batch)
app.command(epilog=EXIT_CODES)(finetune)
app.command(epilog=EXIT_CODES)(average)
app.command(epilog=EXIT_CODES)(info)
app.command(epilog=EXIT_CODES)(replay)
app.command(epilog=EXIT_CODES)(doctor)
app.add_typer(experts, name="experts")
app.add_typer(models, name="models")
app.add_typer(shards, name="shards")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network, as with HF_HUB_OFFLINE=1.")] = False,
) -> None:
    """Text to pictures, offline, on any machine."""
    del version  # its callback has printed it
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise _Terminated


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: what follows `tu-diffuse`.

    Returns:
        The exit code; see `EXIT_CODES`.
    """
    try:
        app(list(arguments), prog_name="tu-diffuse")
    except SystemExit as stop:
        if stop.code == 130:  # typer's, for KeyboardInterrupt
            return _interrupted(arguments)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except TuDiffuseError as error:
        return _fail(str(error), error.exit_code, arguments)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except _Terminated:
        return _fail("terminated; what was finished is kept.", 143, arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads; keep the flush at exit quiet
        return 1
    except Exception as error:
        if out_of_memory(error):
            less = NEEDS_LESS.get(arguments[0], "free some, then run the command again")
            return _fail(f"there is not enough memory; {less}.", 1, arguments)
        return _fail(f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it prints.", 1, arguments)
    return 0


def main() -> NoReturn:
    """Entry point of the console script.

    Ends the process at once after flushing, because tearing down torch's modules one by one takes a noticeable part of a second.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for name in UNASKED:
        logging.getLogger(name).setLevel(logging.ERROR)
    keep_freed_memory()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 1
    os._exit(code)


def _interrupted(arguments: Sequence[str]) -> int:
    return _fail("interrupted; what was finished is kept.", 130, arguments)


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    shown = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + " …"
    print(f"tu-diffuse: {_printable(shown)}", file=sys.stderr)
    return code


def _printable(text: str) -> str:
    """Keep control characters that came with a file or an argument off the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
