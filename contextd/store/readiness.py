"""The reasons why this server is not ready (§12). Each part of the server sets and clears its own."""

import structlog

log = structlog.get_logger(__name__)

WRITES = "writes"  # the last write failed, for a reason that is the database's
DISK = "disk"  # less than a reserve is left


class Readiness:
    """The server is ready while no part lacks anything. For use on the event loop only."""

    def __init__(self) -> None:
        self._lacks: dict[str, str] = {}

    @property
    def reason(self) -> str | None:
        """The oldest reason, as a sentence for the operator; None when the server is ready.

        Anybody may read it, so it has no address, no path and no chat text.
        """
        return next(iter(self._lacks.values()), None)

    def lacks(self, part: str) -> bool:
        """Whether `part` lacks something."""
        return part in self._lacks

    def lack(self, part: str, reason: str) -> None:
        """Set the reason of `part`; it holds until `regain`."""
        if self._lacks.get(part) != reason:
            log.warning("not ready", part=part, reason=reason)
        self._lacks[part] = reason

    def regain(self, part: str) -> None:
        """Clear the reason of `part`, if it has one."""
        if self._lacks.pop(part, None) is not None:
            log.warning("regained", part=part, ready=not self._lacks)
