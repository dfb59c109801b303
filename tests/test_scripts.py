"""Every script in scripts/ explains itself: `--help` prints its documentation and all flags."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from tests.shared import ROOT

#: these make an environment of their own first
OWN_ENVIRONMENT = {"quickstart", "run_tests"}
NAMES = sorted(path.stem for path in (ROOT / "scripts").glob("*.py")
               if "\ndef main(" in path.read_text() and path.stem not in OWN_ENVIRONMENT)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # what a script that is started by its path sees
    script = import_module(f"scripts.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out
