"""The figures that contextd promises, each measured against a physical limit in the same run.

A figure is a ratio wherever it can be: machines differ, and so does one machine from minute to minute,
but a bare loop, a bare server or a bare read that takes its turns with contextd sees the same weather.
Each module measures one figure: `measure` runs in the parent, which only starts and ends processes;
what is run as `python -m benchmarks.<module>` is a process of its own. See docs/benchmarks.md.
"""
