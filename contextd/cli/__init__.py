"""The command line (§12). Every command but `serve` and `demo` is only another HTTP client."""

from collections.abc import Sequence

import rich_click as click

from contextd import __version__
from contextd.cli import terminal
from contextd.cli.decide import decide
from contextd.cli.demo import demo
from contextd.cli.inspect import cancel, ls, show
from contextd.cli.send import send
from contextd.cli.serve import serve
from contextd.cli.tail import tail
from contextd.client import ClientError, UnreachableError
from contextd.settings import SettingsError


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="contextd %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """contextd keeps conversations. Its stream carries signals; text is pulled, exactly."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (serve, send, tail, ls, show, decide, cancel, demo):
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's); returns the exit code.

    An error is one line on standard error: 2 for bad usage and settings, 130 for Ctrl-C, else 1.
    """
    terminal.tolerate_any_encoding()
    try:
        code = cli.main(argv, prog_name="contextd", standalone_mode=False)
    except click.Abort:
        return terminal.INTERRUPTED
    except click.ClickException as error:
        terminal.complain(f"{error.format_message()} {_where_to_look(error)}")
        return error.exit_code
    except UnicodeEncodeError:
        terminal.complain("an argument is not UTF-8")
        return 2
    except SettingsError as error:
        terminal.complain(str(error))
        return 2
    except UnreachableError as error:
        terminal.complain(f"{error}; start it with `contextd serve`")
        return 1
    except ClientError as error:
        terminal.complain(str(error))
        return 1
    return code if isinstance(code, int) else 0


def _where_to_look(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"(see {context.command_path} --help)" if context else ""
