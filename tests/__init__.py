"""The test suite; a package, so that `from tests.shared import ...` means this one whatever else is installed."""
