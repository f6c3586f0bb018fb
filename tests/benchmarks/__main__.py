"""`python tests/benchmarks`, or `python -m benchmarks` with tests/ on the path."""

import sys
from pathlib import Path

# Run as a folder this has no package, and the modules of this folder are no one's: name their parent.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import main

if __name__ == "__main__":
    main()
