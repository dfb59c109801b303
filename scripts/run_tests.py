"""Runs the tests: `python3 scripts/run_tests.py [pytest arguments]`, from anywhere, with any Python from 3.11.

The first run makes `.venv` and installs there what the tests need; later ones start at once.
"""

import subprocess
import sys

from environment import ROOT, continue_in_environment


def main() -> None:
    continue_in_environment(extras=("dev", "compressai"))
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", *sys.argv[1:]], cwd=ROOT))


if __name__ == "__main__":
    main()
