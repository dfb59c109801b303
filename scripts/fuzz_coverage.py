"""Attack the bitstream, guided by coverage: atheris looks for bytes that take new paths through vtc.codecs.

    pip install 'vtc[fuzz]'
    python scripts/fuzz_coverage.py --minutes 10

It starts from the valid streams of scripts/fuzz_bitstream.py, of every kind, and its mutator sets checksums right, so
that the code behind them is reached. What is allowed is the same as there; the first violation ends the run with a
traceback, a status that is not 0 and the stream in --artifacts.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODULES = ("container", "chunks", "entropy", "resilience", "prior", "concealer", "hyperprior", "latent_codec",
           "token_codec")


class Fuzz:
    """The entry point. A stream goes to the codec whose fingerprint it has, or else to any."""

    def __init__(self) -> None:
        self.cases: Any = import_module("scripts.fuzz_bitstream")
        self.chunks: Any = import_module("vtc.codecs.chunks")
        found = self.cases.corpus(set(self.cases.KINDS) - {"commands"})
        sources = [source for kind in found.values() for source in kind]
        self.seeds: list[bytes] = [source.stream for source in sources]
        self.targets = {self.chunks.read(source.stream).fingerprint: source.target for source in sources}

    def __call__(self, data: bytes) -> None:
        """Raises whatever is not allowed."""
        header = []
        self.cases.attempt(lambda: header.append(self.chunks.read(data)))
        target = next(iter(self.targets.values()))
        if header:
            target = self.targets.get(header[0].fingerprint, target)
            self.cases.case(self.cases.Mutated(data, True, ()), target)

    def mutate(self, blind: Callable[[bytes, int], bytes], data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the cases by `blind`, which is atheris's own; the others by ours. Most get right checksums."""
        rng = random.Random(seed)
        if rng.random() < 0.5:
            out = bytes(blind(data, max_size))
        else:
            try:
                out = rng.choice(self.cases.HOSTILE)(self.cases.Parts.of(data), rng).to_bytes()
            except self.cases.BitstreamError:  # cannot be taken apart any more
                out = rng.choice(self.cases.BLIND)(data or b"\0", rng)
        return (self.cases.seal(out) if len(out) > 4 and rng.random() < 0.7 else out)[:max_size]

    def write_seeds(self, folder: Path) -> int:
        """The valid streams as files; how many."""
        for number, seed in enumerate(self.seeds):
            (folder / f"{number:04d}").write_bytes(seed)
        return len(self.seeds)


def main(arguments: list[str] | None = None) -> int:
    """Attack until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=-1, help="cases, at most; default: as many as the time allows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=100, help="that one case may take")
    parser.add_argument("--mebibytes", type=int, default=4096, help="of memory in all")
    parser.add_argument("--artifacts", type=Path, default=Path("."), help="folder for a stream that breaks something")
    args = parser.parse_args(arguments)
    try:
        import atheris
    except ModuleNotFoundError:
        print("Coverage-guided fuzzing needs atheris: pip install 'vtc[fuzz]'.", file=sys.stderr)
        return 1

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["vtc.codecs"], enable_loader_override=False):
        for name in MODULES:
            import_module(f"vtc.codecs.{name}")
    fuzz = Fuzz()
    seeds = Path(tempfile.mkdtemp(prefix="vtc-fuzz-"))  # libFuzzer ends the process, so nothing could remove it
    print(f"{fuzz.write_seeds(seeds)} seeds in {seeds}, where what takes new paths is added", flush=True)
    atheris.Setup([sys.argv[0], f"-max_total_time={args.minutes * 60:.0f}", f"-runs={args.runs}", f"-seed={args.seed}",
                   f"-timeout={args.seconds}", f"-rss_limit_mb={args.mebibytes}", "-max_len=2000",
                   f"-artifact_prefix={args.artifacts}/", "-print_final_stats=1", str(seeds)], fuzz,
                  custom_mutator=lambda data, size, seed: fuzz.mutate(atheris.Mutate, data, size, seed))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
