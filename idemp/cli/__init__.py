"""The command line: ``idemp COMMAND``.  A module for each command or family of commands.

What goes wrong is one sentence on stderr and exit code 2; a question answered with no is 1.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import NoReturn

import click

from idemp import __version__
from idemp.cli.advise import advise_
from idemp.cli.audit import audit
from idemp.cli.consume import consume
from idemp.cli.dead import dead
from idemp.cli.deeds import deeds
from idemp.cli.demo import demo
from idemp.cli.doctor import doctor
from idemp.cli.events import events, flow, trace
from idemp.cli.explain import explain
from idemp.cli.forget import forget
from idemp.cli.init import init
from idemp.cli.keys import doubt, get, ls, stats
from idemp.cli.options import only_unicode
from idemp.cli.publish import publish
from idemp.cli.relay import relay
from idemp.cli.replay import replay
from idemp.cli.resolve import resolve
from idemp.cli.top import top
from idemp.cli.track import track
from idemp.cli.watch import watch
from idemp.errors import IdempError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Nothing but the output is written to a file here, other than by databases, which have their own errors."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--verbose", is_flag=True, help="Log what is done, message by message.")
@click.version_option(__version__, prog_name="idemp")
def cli(verbose: bool) -> None:
    """A message handler takes effect once, or the message it cannot be sure of is named.

    Keys are printed and read with backslash escapes: \\n, \\x00, and \\\\ for a backslash.
    """
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    if not verbose:
        # What the driver logs of a lost connection, idemp says in one sentence.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        # That it remembers for longer than a look wishes, is what a look wants.
        logging.getLogger("idemp.stores").setLevel(logging.ERROR)


for command in (
    publish,
    consume,
    ls,
    get,
    doubt,
    resolve,
    forget,
    dead,
    deeds,
    stats,
    doctor,
    explain,
    audit,
    top,
    trace,
    flow,
    events,
    replay,
    advise_,
    watch,
    track,
    demo,
    init,
    relay,
):
    cli.add_command(command)
only_unicode(cli)


def main() -> NoReturn:
    """Run the command in ``sys.argv`` and exit with its code."""
    if sys.stdout is None:
        _fail("there is no standard output; send it somewhere, like >/dev/null")
    try:
        code = cli.main(prog_name="idemp", standalone_mode=False)
    except IdempError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "idemp"
        _fail(f"{error.format_message()} See '{where} --help'.")
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        sys.exit(130)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _not_printed(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        _not_printed(error)
    sys.exit(code or 0)


def _not_printed(error: OSError) -> None:
    """Say so, unless whoever read has gone, which is no error."""
    # The interpreter must not find out again at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        _fail(f"what it prints cannot be written: {error.strerror}; send it elsewhere")


def _fail(sentence: str) -> NoReturn:
    print(f"idemp: {sentence}", file=sys.stderr)
    sys.exit(2)
