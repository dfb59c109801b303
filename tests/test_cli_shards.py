"""Shards in, shards out; what a kill leaves and --resume makes of it; runs of several processes; hostile shards."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.shared import ROOT
from tests.test_cli import ENVIRONMENT, Say, command_line, failed, here, models, picture, run, tree
from vtc.cli import common, shards
from vtc.cli.common import Part
from vtc.cli.shards import Shard, coded_members
from vtc.errors import ConfigError, FileError

__all__ = ["here", "models", "run"]  # fixtures


def png(seed: int, width: int = 24, height: int = 16) -> bytes:
    picture("scratch.png", width, height, seed)
    data = Path("scratch.png").read_bytes()
    os.unlink("scratch.png")
    return data


def tar(path: str, *members: tuple[str, bytes] | tarfile.TarInfo) -> None:
    """A .tar of (name, bytes), or of bare headers."""
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size, info.mtime, info.mode, info.uname = len(member[1]), 1_500_000_000, 0o640, "someone"
            file.addfile(info, io.BytesIO(member[1]))


def contents(path: str | Path) -> dict[str, bytes]:
    with tarfile.open(path) as file:
        return {member.name: opened.read() for member in file if (opened := file.extractfile(member))}


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [member for n in range(first, first + count)
            for member in ((f"{n:04}.png", png(n)), (f"{n:04}.cls", b"%d" % n), (f"{n:04}.json", b'{"n": %d}' % n))]


# ---- in and out -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_shard_there_and_back(jobs: str, here: Path, run: Say) -> None:
    tar("a.tar", *samples(5), ("dir/x.JPG", Path("a.png").read_bytes()))
    encoded = run("encode", "a.tar", "-o", "b.tar", "--json", "-j", jobs)
    assert encoded.code == 0
    made, given = contents("b.tar"), contents("a.tar")
    assert list(made) == [name.replace(".png", ".vtc").replace(".JPG", ".vtc") for name in given]
    for name in made:  # what is no picture is the same; a picture has the stream that it has as a file
        if name.endswith(".vtc"):
            Path("x.png").write_bytes(given[name.replace(".vtc", ".png")] if "dir" not in name else given["dir/x.JPG"])
            assert made[name] == run("encode", "x.png", "-o", "-").out
        else:
            assert made[name] == given[name]
    facts = [json.loads(line) for line in encoded.out.splitlines()]
    assert [f["input"] for f in facts] == [*(f"a.tar/{n:04}.png" for n in range(5)), "a.tar/dir/x.JPG"]
    assert facts[0]["output"] == "b.tar/0000.vtc" and facts[0]["bytes"] == len(made["0000.vtc"])
    with tarfile.open("b.tar") as file:
        kept = file.getmember("0003.vtc"), file.getmember("0003.cls")
        assert [(m.mtime, m.mode, m.uname) for m in kept] == [(1_500_000_000, 0o640, "someone")] * 2

    assert run("decode", "b.tar", "-j", jobs).code == 0  # beside it
    back = contents("b.decoded.tar")
    assert list(back) == [*(name for name in given if "dir" not in name), "dir/x.png"]
    Path("c.vtc").write_bytes(made["0002.vtc"])
    assert back["0002.png"] == run("decode", "c.vtc", "-o", "-").out
    assert Image.open(io.BytesIO(back["0002.png"])).size == (24, 16)
    info = run("decode", "--info", "b.tar", "--json")
    assert [json.loads(line)["input"] for line in info.out.splitlines()][:2] == ["b.tar/0000.vtc", "b.tar/0001.vtc"]


def test_folders_of_shards_and_files(here: Path, run: Say) -> None:
    os.makedirs("in/deep")
    tar("in/a.tar", *samples(2))
    tar("in/deep/b.tar", *samples(1, 7))
    picture("in/c.png")
    assert run("encode", "in", "-o", "out", "--quiet").code == 0
    assert tree(here / "out") == ["a.tar", "c.vtc", "deep/b.tar"]
    assert run("encode", "in", "--quiet").code == run("encode", "in", "--quiet").code == 0  # results are no inputs
    assert tree(here / "in") == ["a.tar", "a.vtc.tar", "c.png", "c.vtc", "deep/b.tar", "deep/b.vtc.tar"]
    assert Path("in/a.vtc.tar").read_bytes() == Path("out/a.tar").read_bytes()
    assert run("decode", "out", "-o", "back", "--format", "webp", "--quiet").code == 0
    assert list(contents("back/deep/b.tar")) == ["0007.webp", "0007.cls", "0007.json"]


@pytest.mark.parametrize("argv", [("a.tar", "-o", "a.vtc"), ("a.tar", "-o", "-"), ("a.png", "-o", "b.tar"),
                                  ("a.png", "a.tar", "-o", "b.tar")])
def test_a_shard_becomes_a_shard(argv: tuple[str, ...], here: Path, run: Say) -> None:
    tar("a.tar", *samples(1))
    result = run("encode", *argv)
    assert result.code == 2 and tree(here) == ["a.png", "a.tar"]


def test_a_member_that_fails_is_left_out_and_told(here: Path, run: Say) -> None:
    good = samples(2)
    tar("a.tar", good[0], ("bad.png", b"no picture"), ("empty.png", b""), *good[1:], ("0001.jpg", png(9)))
    result = run("encode", "a.tar", "-o", "b.tar", "--quiet")
    assert result.code == 1 and list(contents("b.tar")) == [n.replace("png", "vtc") for n, _ in good]
    assert result.lines[0] == "vtc-encode: 3 of 5 files failed:"
    assert "a.tar/bad.png" in result.lines[1] and "empty" in result.lines[2] and "two members" in result.lines[3]


# ---- hostile shards -------------------------------------------------------------------------------------------------

def header(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_members_that_lead_out_are_left_out(here: Path, run: Say) -> None:
    bad: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("/etc/x.png", png(1)), ("../x.cls", b"1"), ("a/../../x.png", png(1)), ("..\\x.png", png(2)),
        ("C:/x.png", png(2)), header("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        header("hard.png", tarfile.LNKTYPE, "/etc/passwd"), header("pipe", tarfile.FIFOTYPE),
        header("disk", tarfile.BLKTYPE)]
    tar("a.tar", header("folder", tarfile.DIRTYPE), *samples(1), *bad, ("./1.png", png(3)))
    result = run("encode", "a.tar", "-o", "b.tar", "--quiet")
    assert result.code == 1 and list(contents("b.tar")) == ["0000.vtc", "0000.cls", "0000.json", "./1.vtc"]
    told = [line for line in result.lines if " is left out: " in line]
    assert len(told) == len(bad) and all(line.startswith("a.tar/") for line in told)
    assert tree(here) == ["a.png", "a.tar", "b.tar"]


def test_shards_that_are_damaged_leave_nothing(here: Path, run: Say) -> None:
    tar("a.tar", *samples(3))
    whole = Path("a.tar").read_bytes()
    with tarfile.open("a.tar") as file:
        second = file.getmembers()[1].offset
    huge = header("huge.png")
    huge.size = 2**40
    long = header("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**45
    negative = bytearray(header("x.png").tobuf())
    negative[124:136] = b"\xff" * 12  # -1 in base 256
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:512]))
    cases = {"empty": b"", "text": b"hello" * 1000, "cut": whole[:1100], "no end": whole.rstrip(b"\0") + bytes(100),
             "header": whole[: second + 5] + b"\xff" * 30 + whole[second + 35 :], "huge": huge.tobuf() + bytes(1024),
             "long name": long.tobuf() + bytes(1024), "zip": b"\x1f\x8b" + whole,
             "negative": whole[:second] + bytes(negative) + whole[second:]}
    for name, data in cases.items():
        Path("b.tar").write_bytes(data)
        result = run("encode", "b.tar", "-o", "c.tar", "--quiet")
        assert result.code == 1 and "b.tar" in result.lines[-1], name
        assert " Error at " not in result.lines[-1] and ".py:" not in result.lines[-1], result.lines
        assert tree(here) == ["a.png", "a.tar", "b.tar"], name
    failed(run("encode", "none.tar", "-o", "c.tar", "--quiet"), "none.tar does not exist")


def test_mutated_shards_raise_typed_errors(here: Path) -> None:
    tar("a.tar", *samples(2), ("n" * 150 + ".png", png(3)), header("link", tarfile.SYMTYPE, "a"))
    whole, rng = Path("a.tar").read_bytes(), random.Random(0)
    outcomes: set[type] = set()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(12) * 512 + rng.randrange(160)
                 if rng.random() < 0.9 else 0] = rng.choice((0, 0x30, 0x78, 0x4C, 0x53, 0x80, 0xFF))
        Path("m.tar").write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            outcomes.add(type([read() for _, read in coded_members("m.tar", (".png",))]))
        except FileError as error:
            assert "m.tar" in str(error)
            outcomes.add(FileError)
    assert outcomes == {list, FileError}


# ---- stopped and resumed --------------------------------------------------------------------------------------------

def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is worked on from now on."""
    from vtc.cli import encode

    names: list[str] = []
    original = encode._encoder

    def counting(args: object, jobs: int) -> tuple:
        work, settings = original(args, jobs)  # type: ignore[arg-type]

        def noted(task: common.Task) -> common.Made:
            names.append(task.source)
            return work(task)

        return noted, settings

    monkeypatch.setattr(encode, "_encoder", counting)
    return names


def killed_in_a_shard(models: Path, count: int) -> str:
    """A process that encodes a.tar to out/a.tar is killed when it has written `count` members; what it left."""
    slow = ("import time\nfrom vtc.cli import shards\nput = shards.Shard.add\n"
            "def add(self, like, name, *rest):\n"
            f"    put(self, like, name, *rest)\n    while len(self.names) >= {count}: time.sleep(1)\n"
            "shards.Shard.add = add\n")
    command = command_line(models, "encode", "in", "-o", "out/", "--quiet")
    command[2] = slow + command[2]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        part = next(Path("out").glob(".vtc-*.part"), None) if Path("out").is_dir() else None
        if part is not None:
            with open(part, "rb") as file:
                if sum(1 for _ in shards._whole_members(file)) == count:
                    break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = Path("out").glob(".vtc-*.part")
    return str(part)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_run_is_resumed_inside_its_shard(here: Path, models: Path, run: Say,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs("in")
    tar("in/a.tar", *samples(4), ("bad.png", b"x"), *samples(2, 10))
    tar("in/b.tar", *samples(1, 20))
    picture("in/c.png")
    assert run("encode", "in", "-o", "whole", "--quiet").code == 1  # bad.png
    part = killed_in_a_shard(models, 13)  # four samples and 0010.vtc
    with open(part, "ab") as file:
        file.write(b"half a member")
    assert tree(here / "out") == [os.path.basename(part)]
    names = counted(monkeypatch)
    again = run("encode", "in", "-o", "out", "--resume", "--quiet")
    # The member that failed is tried again, behind it goes on what was not done, and all bytes are as without the kill.
    assert names == ["in/a.tar/bad.png", "in/a.tar/0011.png", "in/b.tar/0020.png", "in/c.png"]
    assert again.code == 1 and "bad.png" in again.err
    assert tree(here / "out") == tree(here / "whole") == ["a.tar", "b.tar", "c.vtc"]
    for name in tree(here / "out"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()
    names.clear()
    third = run("encode", "in", "-o", "out", "--resume", "--json")
    assert third.code == 0 and names == []
    assert [json.loads(line)["skipped"] for line in third.out.splitlines()] == [True] * 3
    assert "3 of 3 outputs are there already" in third.err


@pytest.mark.parametrize("change", ["quality", "source", "no resume"])
def test_what_is_left_of_another_run_is_not_used(change: str, here: Path, run: Say,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    tar("a.tar", *samples(2))
    run("encode", "a.tar", "-o", "whole.tar", "--quiet")

    def stop(self: Shard) -> None:
        raise KeyboardInterrupt

    stopped = []
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "finish", stop)
        patch.setattr(os, "_exit", lambda code: stopped.append(code))
        patch.setitem(shards.__dict__, "unfinished", {})
        result = run("encode", "a.tar", "-o", "b.tar", "--quiet")
        for shard in shards.unfinished.values():
            shard._file.close()
    assert stopped == [1] and "b.tar is not finished, and --resume goes on with it" in result.err
    (left,) = here.glob(".vtc-*.part")
    names = counted(monkeypatch)
    argv = ["--resume"] if change != "no resume" else []
    if change == "quality":
        argv += ["--resilience", "4"]
    if change == "source":
        os.utime("a.tar", ns=(0, 10**18))
    assert run("encode", "a.tar", "-o", "b.tar", "--quiet", *argv).code == 0
    assert len(names) == 2 and tree(here) == ["a.png", "a.tar", "b.tar", "whole.tar"]
    assert not left.exists()
    assert (Path("b.tar").read_bytes() == Path("whole.tar").read_bytes()) == (change != "quality")


def test_a_full_disk_leaves_nothing_of_a_shard(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    tar("a.tar", *samples(3))

    def full(self: tarfile.TarFile, *args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    result = run("encode", "a.tar", "-o", "b.tar", "--quiet", "-j", "2")
    assert result.code == 1 and result.lines[-1].endswith("b.tar cannot be written: no space left on device.")
    assert tree(here) == ["a.png", "a.tar"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_processes_do_not_write_one_shard(here: Path) -> None:
    one = Shard("b.tar", "key", resume=True)
    for key in ("key", "other"):
        with pytest.raises(FileError, match="by another process"):
            Shard("b.tar", key, resume=True)
    one.finish()
    assert contents("b.tar") == {}


# ---- several processes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("environment", "part"), [
    ({}, Part()), ({"RANK": "1", "WORLD_SIZE": "4"}, Part(1, 4)), ({"RANK": "x", "WORLD_SIZE": "4"}, Part()),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Part(0, 2)), ({"RANK": "1"}, Part())])
def test_a_process_learns_its_part(environment: dict[str, str], part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Part.of_launch() == part
    monkeypatch.setenv("LOCAL_RANK", "3")
    several = part.count > 1
    assert [part.device(d) for d in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda:3" if several else "cuda", "cuda:0"]
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="contradict"):
        Part.of_launch()


def test_parts_cover_everything_once_whatever_is_done(here: Path) -> None:
    tasks = [common.Task(f"{n}.png", f"{n}.vtc") for n in range(7)]
    Path("2.vtc").write_bytes(b"x")
    shares = [common.todo(tasks, Part(rank, 3), resume=True) for rank in range(3)]
    assert [[t.source[0] for t in left] for left, _ in shares] == [["0", "3", "6"], ["1", "4"], ["5"]]
    assert [[t.source[0] for t in done] for _, done in shares] == [[], [], ["2"]]
    assert common.todo(tasks, Part(), resume=False) == (tasks, [])


def test_two_launched_processes_share_the_files(here: Path, models: Path) -> None:
    """As torchrun and `accelerate launch` start them: one fails soon and waits for the other."""
    os.makedirs("in")
    Path("in/a.png").write_bytes(b"no picture")
    for n, name in enumerate("bcd"):
        picture(f"in/{name}.png", seed=n)
    command = command_line(models, "encode", "in", "-o", "out", "--json")
    command[2] = command[2].replace("main())", "main(part=Part.of_launch()))").replace(
        "\nsys.exit", "\nfrom vtc.cli.common import Part\nsys.exit")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    by_rank = [sorted(f["input"] for f in facts if f["rank"] == rank) for rank in (0, 1)]
    assert by_rank == [["in/a.png", "in/c.png"], ["in/b.png", "in/d.png"]], done.stderr
    assert tree(here / "out") == ["b.vtc", "c.vtc", "d.vtc"]
    assert done.returncode == 1 and "vtc-encode (process 1 of 2): 1 of 2 files failed:" in done.stderr


def test_the_module_runs_as_the_command_does(here: Path) -> None:
    for name in ("encode", "decode"):
        done = subprocess.run([sys.executable, "-m", f"vtc.cli.{name}", "none", "-o", "x.png"], capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        assert (done.returncode, done.stderr) == (1, "none does not exist.\n"), SimpleNamespace(**vars(done))
