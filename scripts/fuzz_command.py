"""Hostile files for vtc-decode, in this process: what it says, writes and opens. Part of scripts/fuzz_bitstream.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from vtc import hub
from vtc.cli import decode
from vtc.codecs import chunks
from vtc.errors import BitstreamError
from vtc.tokenizers.local_vq import LocalVQ

LOW_LIMIT = 2**16  # pixels of an image that is drawn


class Watch:
    """Files that are opened and network that is used while it is on: an audit hook, which stays."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed, self.on, self.seen = allowed, False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.split(".")[0] in ("socket", "urllib", "subprocess", "ftplib", "http") or event == "os.system":
            self.seen.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed):
                self.seen.append(f"open {path}")

    def __enter__(self) -> Watch:
        self.on, self.seen = True, []
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False


class Command:
    """Runs vtc-decode on streams, as files in `folder`, with the model that made them, another one or none."""

    def __init__(self, folder: Path, model: LocalVQ) -> None:
        self.folder, self.model = Path(os.path.realpath(folder)), folder / "model"
        model.save_pretrained(self.model)
        code = {sys.prefix, sys.base_prefix, *filter(None, sys.path), str(hub.BUNDLED), str(Path(hub.__file__).parent)}
        self.watch = Watch((str(self.folder), *(os.path.realpath(path) for path in code),
                            "/dev/", "/proc/", "/sys/", "/etc/", "/usr/lib/", "/usr/share/"))

    def __call__(self, streams: list[bytes], rng: random.Random) -> list[str]:
        """The outcome of each; AssertionError where the command does what it must not."""
        for old in (*self.folder.glob("*.vtc"), *self.folder.glob("out/*")):
            old.unlink()
        (self.folder / "out").mkdir(exist_ok=True)
        names = []
        for number, stream in enumerate(streams):
            names.append(self.folder / f"{number:03d}.vtc")
            names[-1].write_bytes(stream)
        said = self._run(["--info", "--json", *map(str, names)])
        small = [name for name, facts in zip(names, said, strict=True)
                 if "error" in facts or facts["width"] * facts["height"] <= LOW_LIMIT]
        if not small:
            return ["large"] * len(names)
        options = rng.choice((["--model", str(self.model)], ["--model", str(self.model), "--strict"], []))
        said = self._run([*options, "--json", "-o", f"{self.folder / 'out'}/", *map(str, small)])
        outputs = {Path(facts["output"]).name for facts in said if "error" not in facts}
        if (written := set(os.listdir(self.folder / "out"))) != outputs:
            raise AssertionError(f"{sorted(written ^ outputs)} were written or are missing")
        for facts in said:
            if "--strict" in options and "error" not in facts and facts.get("notes"):
                raise AssertionError("--strict made a picture of a stream of which something is lost")
        return ["command: failed" if "error" in facts else "command: decoded" for facts in said] + (
            ["large"] * (len(names) - len(small)))

    def _run(self, arguments: list[str]) -> list[dict[str, Any]]:
        """What --json says of each file."""
        files = [name for name in arguments if name.endswith(".vtc")]
        stdout, stderr = io.StringIO(), io.StringIO()
        with self.watch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = decode.main([*arguments, "--quiet"])
        if self.watch.seen:
            raise AssertionError(f"vtc-decode reached for {self.watch.seen[0]}")
        said = [json.loads(line) for line in stdout.getvalue().splitlines()]
        if [facts["input"] for facts in said] != files:
            raise AssertionError(f"vtc-decode spoke of {len(said)} of {len(files)} files: {stderr.getvalue()!r}")
        errors = [facts["error"] for facts in said if "error" in facts]
        if code != bool(errors):
            raise AssertionError(f"vtc-decode ended with {code}, and {len(errors)} files failed")
        for error in errors:
            if "\n" in error or "unexpected" in error or error not in stderr.getvalue().splitlines():
                raise AssertionError(f"vtc-decode does not say one clear sentence: {error!r}, {stderr.getvalue()!r}")
        for facts in said:
            if "error" not in facts and "--info" in arguments:
                self._check_facts(facts)
        return said

    @staticmethod
    def _check_facts(facts: dict[str, Any]) -> None:
        stream = Path(facts["input"]).read_bytes()
        try:
            header = chunks.read(stream)
        except BitstreamError as error:
            raise AssertionError("--info describes a stream that cannot be read") from error
        if (facts["width"], facts["height"], facts["bytes"]) != (header.width, header.height, len(stream)):
            raise AssertionError("--info says something else than the header")
