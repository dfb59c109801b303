"""scripts/environment.py: when an environment is made, mended, or left alone. venv and pip are stand-ins here."""

import importlib.util
import json
import os
import sys
from typing import Any

import pytest

from tests.shared import ROOT


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Any:
    """The module, with a small project and an environment folder of its own; `steps` lists what it ran."""
    (tmp_path / "project").mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / "project" / name).write_text(name)
    monkeypatch.setenv("VTC_VENV", str(tmp_path / "venv"))
    spec = importlib.util.spec_from_file_location("environment_under_test", ROOT / "scripts/environment.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path / "project")
    module.steps = []
    module.started = []

    def step(*command, failed, python=None):
        module.steps.append(command[0])
        if command[0] == "venv":
            module.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            if not module.PYTHON.exists():
                module.PYTHON.symlink_to(sys.executable)
        else:
            module.steps[-1] = command[-1].removeprefix(str(module.ROOT))
            if module.killed_in_pip:
                raise KeyboardInterrupt

    module.killed_in_pip = False
    monkeypatch.setattr(module, "step", step)
    monkeypatch.setattr(os, "execv", lambda program, arguments: module.started.append(arguments))
    return module


def test_made_once_then_started_at_once(environment):
    environment.continue_in_environment()
    assert environment.steps == ["venv", ""]
    environment.continue_in_environment()
    assert environment.steps == ["venv", ""]
    assert environment.started == [[str(environment.PYTHON), *sys.argv]] * 2


def test_extras_add_up(environment):
    environment.continue_in_environment(("dev",))
    environment.continue_in_environment()
    assert environment.steps == ["venv", "[dev]"]
    environment.continue_in_environment(("compressai",))
    assert environment.steps == ["venv", "[dev]", "[compressai,dev]"]
    assert environment.is_ready(("compressai", "dev"))


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_ingredient_installs_again(environment, name):
    environment.continue_in_environment(("dev",))
    (environment.ROOT / name).write_text("changed")
    environment.continue_in_environment()
    assert environment.steps == ["venv", "[dev]", "[dev]"]


def test_a_half_made_environment_is_made_anew(environment):
    environment.killed_in_pip = True
    with pytest.raises(KeyboardInterrupt):
        environment.continue_in_environment()
    (environment.ENVIRONMENT / "half a package").write_text("")
    assert not environment.is_ready(())
    environment.killed_in_pip = False
    environment.continue_in_environment()
    assert environment.is_ready(())
    assert not (environment.ENVIRONMENT / "half a package").exists()


def test_another_python_behind_the_link_makes_anew(environment, tmp_path):
    environment.continue_in_environment()
    other = tmp_path / "python3.99"
    other.write_text("#!")
    other.chmod(0o755)
    environment.PYTHON.unlink()
    environment.PYTHON.symlink_to(other)
    environment.continue_in_environment()
    assert environment.steps == ["venv", ""] * 2
    assert os.path.realpath(environment.PYTHON) == os.path.realpath(sys.executable)


def test_an_environment_that_is_not_ours_is_only_added_to(environment):
    environment.ENVIRONMENT.mkdir()
    (environment.ENVIRONMENT / "precious").write_text("")
    environment.killed_in_pip = True
    with pytest.raises(KeyboardInterrupt):
        environment.continue_in_environment()
    environment.killed_in_pip = False
    environment.continue_in_environment()
    assert (environment.ENVIRONMENT / "precious").exists()
    assert environment.is_ready(())


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"complete": True})])
def test_a_damaged_note_is_no_note(environment, text):
    environment.continue_in_environment()
    environment.NOTE.write_text(text)
    assert not environment.is_ready(())


def test_an_old_python_is_told_so(environment, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11"):
        environment.continue_in_environment()
    assert environment.steps == []
