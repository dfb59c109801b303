"""Builds the wheel and uses it as a stranger would: `python3 scripts/check_wheel.py`.

The source archive is built first and the wheel from it, the wheel's content is compared with the repository, then it is
installed alone into an empty environment in a temporary folder, and there the installed commands encode and decode.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from environment import ROOT, continue_in_environment

ROOMS = ("codecs", "tokenizers", "generators", "eval")

#: run by the empty environment's Python: the installed vtc is used, and the picture resembles the original
JUDGE = """
import sys
from pathlib import Path
import vtc
assert Path(vtc.__file__).is_relative_to(sys.prefix), vtc.__file__
a, b = vtc.load_image("coffee.png").tensor(), vtc.load_image("back.png").tensor()
assert a.shape == b.shape, (a.shape, b.shape)
psnr = -10 * (a - b).pow(2).mean().log10().item()
print(f"{Path('coffee.vtc').stat().st_size} bytes, PSNR {psnr:.2f} dB, vtc {vtc.__version__}")
assert psnr > 15, "the decoded picture is not the original"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the wheel, looks inside, installs it elsewhere, and uses it.")
    parser.add_argument("--content-only", action="store_true", help="build and compare, do not install")
    arguments = parser.parse_args()
    continue_in_environment(extras=("dev", "compressai"))

    with tempfile.TemporaryDirectory(prefix="vtc-wheel-") as name:
        folder = Path(name)
        wheel = build(folder / "dist")
        check_content(wheel)
        if not arguments.content_only:
            use(wheel, folder)
    print("The wheel is whole." if arguments.content_only else "The wheel is whole and works on its own.")


def build(folder: Path) -> Path:
    """The wheel, built from the source archive, as an index would serve it."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    return wheel


def expected_files() -> set[str]:
    """What git tracks of the package, by the names it has when installed."""
    tracked = subprocess.run(["git", "ls-files", "vtc", *ROOMS], cwd=ROOT, check=True, capture_output=True, text=True)
    links = {f"vtc/{room}" for room in ROOMS}
    return {path if path.startswith("vtc/") else f"vtc/{path}" for path in tracked.stdout.splitlines()} - links


def check_content(wheel: Path) -> None:
    """Every tracked file of the package and both licences are in the wheel, and nothing that is not vtc."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    problems = [f"missing: {name}" for name in sorted(expected_files() - names)]
    problems += [f"stray: {name}" for name in sorted(names) if not name.startswith(("vtc/", "vtc-"))]
    for needed in ("vtc/codecs/", "vtc/tokenizers/", "vtc/pretrained/"):
        if not any(name.startswith(needed) for name in names):
            problems.append(f"nothing in {needed}")
    if not any(name.startswith("vtc/pretrained/") and name.endswith(".safetensors") for name in names):
        problems.append("no weights")
    for licence in ("LICENSE", "LICENSE-WEIGHTS.md"):
        if not any(name.endswith(f".dist-info/licenses/{licence}") for name in names):
            problems.append(f"missing: {licence}")
    if problems:
        sys.exit("\n".join(["The wheel is not as it should be:", *problems]))
    print(f"{len(names)} files, all that git tracks of the package among them")


def use(wheel: Path, folder: Path) -> None:
    """Installs the wheel alone, outside the repository, and sends a photograph there and back."""
    run(sys.executable, "-m", "venv", folder / "empty")
    programs = folder / "empty" / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "-c", ROOT / "constraints.txt", wheel)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "coffee.png").write_bytes((ROOT / "docs/images/coffee.png").read_bytes())
    run(programs / "vtc-encode", "coffee.png", "-o", "coffee.vtc", cwd=elsewhere)
    run(programs / "vtc-decode", "coffee.vtc", "-o", "back.png", cwd=elsewhere)
    run(programs / "python", "-c", JUDGE, cwd=elsewhere)


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Runs a command without the caller's PYTHONPATH; ends the script where it fails."""
    shown = " ".join(str(c) if "\n" not in str(c) else "..." for c in command)
    print(f"$ {shown}", flush=True)
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    code = subprocess.run([str(c) for c in command], cwd=cwd, env=variables, check=False).returncode
    if code:
        sys.exit(f"Failed with exit status {code}: {shown}")


if __name__ == "__main__":
    main()
