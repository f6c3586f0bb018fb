"""Why this server is not ready (§12), in one place: each part says what it lacks, and takes it back."""

import structlog

log = structlog.get_logger(__name__)

WRITES = "writes"  # the last write failed, for a reason that is the database's


class Readiness:
    """The server is ready while no part of it lacks anything. Used on the loop only."""

    def __init__(self) -> None:
        self._lacks: dict[str, str] = {}

    @property
    def reason(self) -> str | None:
        """What has been lacking for longest, as a sentence for the operator; None: ready.

        It is shown to everybody, so it names no address, no path and nothing of a chat.
        """
        return next(iter(self._lacks.values()), None)

    def lacks(self, part: str) -> bool:
        """Whether `part` lacks something."""
        return part in self._lacks

    def lack(self, part: str, reason: str) -> None:
        """`part` lacks something until it is `regain`ed; the newest reason counts."""
        if self._lacks.get(part) != reason:
            log.warning("not ready", part=part, reason=reason)
        self._lacks[part] = reason

    def regain(self, part: str) -> None:
        """`part` lacks nothing any more."""
        if self._lacks.pop(part, None) is not None:
            log.warning("regained", part=part, ready=not self._lacks)
