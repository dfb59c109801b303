"""Whole-process times and peak memory of the command lines, next to `python -c "import torch"` in the same run.

    python scripts/bench_cli.py                                   # a made 768x512 picture, the bundled model
    python scripts/bench_cli.py --image photo.png --runs 9 --json docs/results/bench_cli.json
    python scripts/bench_cli.py --width 10000 --height 10000 --runs 1 --cold    # 100 megapixels: look at the memory

Each command is run once to warm the disk's cache, then `--runs` times, the commands taking turns, so that a change of
the machine's load meets all of them; on a busy machine the processor seconds say more. The bars of time hold for
768x512 on two processors: encoding takes at most 1.0 s more than importing torch, decoding 1.5 s more, `--help` and a
usage error 0.3 s in all. That of memory holds for any size: 4 GiB. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vtc.cli.common import usable_cpus

#: command -> (seconds, whether the time of `import torch` is added to them)
BARS = {"encode": (1.0, True), "decode": (1.5, True), "help": (0.3, False), "usage error": (0.3, False)}
#: MiB that no command may take, whatever the picture; and the pixels up to which the bars of time are judged
MEMORY_BAR, TIMED_PIXELS = 4096, 768 * 512


@dataclass
class Measured:
    """Whole-process wall-clock seconds, processor seconds, and the peak resident memory of one command."""

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    peak_mib: float = 0.0

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


def entry(command: str, *argv: str | Path) -> list[str]:
    """What the installed script `vtc-COMMAND` does."""
    return [sys.executable, "-c", f"import sys; from vtc.cli.{command} import main; sys.exit(main())", *map(str, argv)]


def made_picture(width: int, height: int) -> Image.Image:
    """A smooth picture with noise, for where no photograph is at hand."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8))


def once(argv: list[str], expected_code: int) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak MiB) of one process; raises RuntimeError where its exit code is another."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != expected_code:
            errors.seek(0)
            raise RuntimeError(f"{argv} ended with {process.returncode}: {errors.read().decode(errors='replace')}")
    scale = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / scale


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a picture; default: one is made")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="no run before those that count")
    parser.add_argument("--model", help="bundled name or folder; default: as the command lines")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []

    with tempfile.TemporaryDirectory() as folder:
        picture, stream, back = args.image, Path(folder, "a.vtc"), Path(folder, "back.png")
        if picture is None:
            picture = Path(folder, "a.png")
            made_picture(args.width, args.height).save(picture)
        with Image.open(picture) as image:
            width, height = image.size
        commands = {"import torch": ([sys.executable, "-c", "import torch"], 0),
                    "encode": (entry("encode", picture, "-o", stream, *model), 0),
                    "decode": (entry("decode", stream, "-o", back, *model), 0),
                    "help": (entry("encode", "--help"), 0),
                    "usage error": (entry("decode"), 2)}
        rows = {name: Measured(name, [], []) for name in commands}
        for run in range(args.cold, args.runs + 1):
            for name, (argv, code) in commands.items():
                seconds, cpu, peak = once(argv, code)
                if run > 0:
                    rows[name].seconds.append(seconds)
                    rows[name].cpu_seconds.append(cpu)
                rows[name].peak_mib = max(rows[name].peak_mib, peak)
        size = stream.stat().st_size

    where = (f"{width}x{height}, {size} bytes ({8 * size / (width * height):.4f} bpp), {usable_cpus()} processors, "
             f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, load {os.getloadavg()[0]:.1f}, "
             f"Python {platform.python_version()}, median of {args.runs}")
    print(where)
    print(f"{'command':<14}{'seconds':>9}{'least':>9}{'bar':>9}{'cpu':>9}{'peak MiB':>10}")
    verdicts = {}
    for name, row in rows.items():
        bar = None
        verdicts[f"{name}, memory"] = row.peak_mib <= MEMORY_BAR
        if name in BARS and width * height <= TIMED_PIXELS:
            limit, on_top = BARS[name]
            bar = limit + rows["import torch"].median * on_top
            verdicts[name] = row.median <= bar
        shown = f"{'':>9}" if bar is None else f"{bar:>9.2f}"
        verdict = "" if bar is None else "  pass" if verdicts[name] else "  FAIL"
        print(f"{name:<14}{row.median:>9.2f}{min(row.seconds):>9.2f}{shown}{statistics.median(row.cpu_seconds):>9.2f}"
              f"{row.peak_mib:>10.0f}{verdict}" + ("" if verdicts[f"{name}, memory"] else "  FAIL: memory"))
    if args.json:
        facts = {"where": where, "width": width, "height": height, "bytes": size, "processors": usable_cpus(),
                 "load": os.getloadavg()[0], "passed": verdicts,
                 "commands": {name: asdict(row) | {"median": row.median} for name, row in rows.items()}}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
