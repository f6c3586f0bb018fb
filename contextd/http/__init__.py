"""The REST routes and the stream of signals, on Litestar."""
