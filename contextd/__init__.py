"""contextd keeps conversations; its stream carries signals, and text is pulled (see docs/protocol.md)."""

__version__ = "0.1.0"
