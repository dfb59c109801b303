"""Where the reference material lies that is not part of the project: fixtures, pictures, third-party weights.

Tests that need some of it carry `@needs_shared("data", "kodak")` and are skipped, with the reason, where it is absent.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: the folder beside the project, or the one that VTC_SHARED names; it need not exist
SHARED = Path(os.environ.get("VTC_SHARED") or ROOT.parent / "shared")


def needs_shared(*parts: str) -> pytest.MarkDecorator:
    """A mark that skips a test unless SHARED/part/part/... exists."""
    path = SHARED.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"needs {'/'.join(('shared', *parts))}; set VTC_SHARED")
