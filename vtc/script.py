"""How the scripts in `scripts/` end: with an exit code, and one sentence on stderr where they fail."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from vtc.errors import VtcError


def run_script(main: Callable[[], int | None], name: str) -> int:
    """Run a script's `main`: its own exit code (None is 0); that of a VtcError, whose sentence is printed."""
    try:
        return main() or 0
    except VtcError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if "torch.distributed" in sys.modules:
            _leave_process_group()


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
