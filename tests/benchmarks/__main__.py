"""`python tests/benchmarks`, or `python -m benchmarks` with tests/ on the path."""

import sys
from pathlib import Path

# Run as a folder this has no package, and the modules of this folder are no one's: name their parent,
# and the contextd beside it, so that what is measured is this one.
TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))
sys.path.insert(0, str(TESTS))

from benchmarks.command import main  # noqa: E402 - found by the paths above

if __name__ == "__main__":
    main()
