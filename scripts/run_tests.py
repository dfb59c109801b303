"""Runs the tests: `python3 scripts/run_tests.py [pytest arguments]`, from anywhere, with any Python from 3.11.

The first run makes `.venv` and installs there what the tests need; later ones start at once.
"""

import os
import sys

from environment import ROOT, continue_in_environment


def main() -> None:
    continue_in_environment(extras=("dev", "compressai"))
    os.chdir(ROOT)
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
