"""The pure heart: types, the state machine and the errors. No async, no clock, no I/O."""
