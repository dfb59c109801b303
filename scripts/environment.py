"""The virtual environment that quickstart.py and run_tests.py work in: made on the first run, found on the next ones.

It lies in `.venv` at the repository root (VTC_VENV names another place) and holds vtc, editable, with the versions of
constraints.txt. A note inside it says what it was made of. Another Python, a changed pyproject.toml or constraints.txt,
a missing extra, or a run that was killed half-way: the next run makes good what is missing.

Standard library only: this runs on a Python that has nothing installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = Path(os.environ.get("VTC_VENV") or ROOT / ".venv").absolute()
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NOTE = ENVIRONMENT / "vtc-environment.json"


def continue_in_environment(extras: tuple[str, ...] = ()) -> None:
    """Returns where this process runs in the environment; elsewhere runs the script there and exits as it does."""
    inside = Path(sys.prefix) == ENVIRONMENT
    if not inside and sys.version_info < (3, 11):
        sys.exit(f"vtc needs Python 3.11 or newer, this is {sys.version.split()[0]}: run python3.11 {sys.argv[0]}")
    if not is_ready(extras):
        if inside:
            sys.exit(f"{ENVIRONMENT} is out of date: run this script with the Python that made it, not the one in it.")
        with lock():
            if not is_ready(extras):  # another process may have made it while this one waited
                make(extras)
    if not inside:
        arguments = [str(PYTHON), *sys.argv]
        if os.name == "nt":
            sys.exit(subprocess.call(arguments))
        os.execv(PYTHON, arguments)


def ingredients() -> str:
    """Changes when what is to be installed changes, or the place it is installed from."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def read_note() -> dict:
    """What the last run wrote; empty where there is no environment or it is not ours."""
    try:
        note = json.loads(NOTE.read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(**note: object) -> None:
    temporary = NOTE.with_suffix(".tmp")
    temporary.write_text(json.dumps(note))
    temporary.replace(NOTE)


def is_sound(note: dict) -> bool:
    """Whether the environment was finished and the Python that it links to is still the same one."""
    return bool(note.get("complete")) and note.get("python") == os.path.realpath(PYTHON) and os.access(PYTHON, os.X_OK)


def is_ready(extras: tuple[str, ...]) -> bool:
    note = read_note()
    return is_sound(note) and note.get("made_of") == ingredients() and set(extras) <= set(note.get("extras", ()))


def make(extras: tuple[str, ...]) -> None:
    """Makes the environment, or brings it up to date.

    One that a killed run left half-made is made anew, since packages may lie in it that pip believes complete.
    One that was there before and is not ours is never deleted, only added to.
    """
    note = read_note()
    own = note.get("own") is True or not ENVIRONMENT.exists() or not any(ENVIRONMENT.iterdir())
    sound = is_sound(note)
    extras = tuple(sorted({*extras, *note.get("extras", ())}))
    if own and not sound and ENVIRONMENT.exists():
        shutil.rmtree(ENVIRONMENT)

    say(f"Setting up {ENVIRONMENT}: a few minutes, once.")
    ENVIRONMENT.mkdir(parents=True, exist_ok=True)
    write_note(own=own, complete=False, extras=extras)
    if not sound:
        step("venv", str(ENVIRONMENT), failed="Python could not make a virtual environment. On Debian and Ubuntu its "
             "parts come separately: apt install python3-venv.")
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    step("pip", "install", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), "-e", target,
         python=PYTHON, failed="pip could not install vtc; its message is above. Run this again when that is mended.")
    write_note(own=own, complete=True, extras=extras, made_of=ingredients(), python=os.path.realpath(PYTHON))


def step(*module: str, failed: str, python: Path = Path(sys.executable)) -> None:
    """`python -m module ...`, its output on stderr, so that stdout belongs to the script itself."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    # Open files are passed on, and with them the lock: a pip that outlives its killed parent still holds it.
    done = subprocess.run([str(python), "-m", *module], stdout=sys.stderr.fileno(), env=variables, close_fds=False,
                          check=False)
    if done.returncode:
        sys.exit(failed)


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One process at a time; the operating system lets go of the lock when its holder ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two first runs at once are on their own
        yield
        return
    with open(ROOT / "pyproject.toml") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is setting the environment up; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        yield


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
