"""Options that several commands share."""

import rich_click as click

from contextd.client import DEFAULT_URL

context_id = click.argument("context_id", metavar="ID")
url = click.option(
    "--url",
    envvar="CONTEXTD_URL",
    default=DEFAULT_URL,
    show_default=True,
    help="The server; also CONTEXTD_URL in the environment.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
