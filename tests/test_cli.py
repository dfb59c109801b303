"""vtc-encode and vtc-decode: what they write, what they say, how they fail. A tiny random model stands in."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import ROOT
from tests.test_models import tiny
from vtc import hub
from vtc.cli import decode, encode
from vtc.codecs.token_codec import TokenCodec
from vtc.models import DEFAULT_MODEL, FINGERPRINTS, MODEL_IDS, load_tokenizer

Say = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of bundled models: the default name, tiny and random. `models / "other"` is another model."""
    folder = tmp_path_factory.mktemp("models")
    tiny(0).save_pretrained(folder / "bundled" / DEFAULT_MODEL)
    tiny(1).save_pretrained(folder / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "BUNDLED", folder / "bundled")
        yield folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the picture a.png in it."""
    monkeypatch.chdir(tmp_path)
    picture("a.png")
    return tmp_path


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Say:
    """Run a command in this process: run("encode", "a.png", stdin=b"") -> code, out (bytes), err (text)."""

    def call(command: str, *argv: str | Path, stdin: bytes = b"") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        main = {"encode": encode.main, "decode": decode.main}[command]
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            assert stop.code in (0, 2)
            code = stop.code
        out, err = capfdbinary.readouterr()
        assert b"Traceback" not in err and b"Warning" not in err
        return SimpleNamespace(code=code, out=out, err=err.decode(), lines=err.decode().splitlines())

    return call


def picture(path: str | Path, width: int = 40, height: int = 24, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def failed(result: SimpleNamespace, *words: str) -> None:
    """Exit code 1, and one sentence on stderr that has all of `words`."""
    assert result.code == 1 and result.out == b""
    assert len(result.lines) == 1 and result.err.endswith(".\n"), result.err
    for word in words:
        assert word in result.err


# ---- one file -------------------------------------------------------------------------------------------------------

def test_one_picture_there_and_back(here: Path, run: Say) -> None:
    encoded = run("encode", "a.png")
    assert (encoded.code, encoded.out) == (0, b"") and "a.png -> a.vtc: 40x24, " in encoded.err
    codec = TokenCodec(load_tokenizer())
    pixels = torch.from_numpy(np.array(Image.open("a.png"))).permute(2, 0, 1)[None] / 255
    (stream,) = codec.compress(pixels)
    assert Path("a.vtc").read_bytes() == stream
    assert run("decode", "a.vtc", "-o", "b.png", "--quiet").err == ""
    expected = np.rint(codec.decompress([stream])[0].permute(1, 2, 0).numpy() * 255)
    np.testing.assert_array_equal(np.asarray(Image.open("b.png")), expected)
    assert tree(here) == ["a.png", "a.vtc", "b.png"]


def test_a_pipe_from_end_to_end(here: Path, run: Say) -> None:
    for argv in (("-",), ("-", "-o", "-")):
        encoded = run("encode", *argv, stdin=Path("a.png").read_bytes())
        assert encoded.code == 0 and encoded.out.startswith(b"\xf5\x56") and len(encoded.lines) == 1
        decoded = run("decode", *argv, "--format", "webp", stdin=encoded.out)
        with Image.open(io.BytesIO(decoded.out)) as image:
            assert (image.format, image.size) == ("WEBP", (40, 24))
    run("encode", "a.png")
    assert run("decode", "a.vtc", "-o", "-").out.startswith(b"\x89PNG")
    assert tree(here) == ["a.png", "a.vtc"]


def test_json_facts(here: Path, run: Say) -> None:
    facts = json.loads(run("encode", "a.png", "--json").out)
    size = os.path.getsize("a.vtc")
    assert facts.pop("seconds") > 0
    assert facts == {"input": "a.png", "output": "a.vtc", "width": 40, "height": 24, "bytes": size,
                     "bpp": 8 * size / 960}
    decoded = run("decode", "a.vtc", "-o", "b.jpg", "--json")
    assert json.loads(decoded.out) | {"seconds": 0} == facts | {"input": "a.vtc", "output": "b.jpg", "seconds": 0}
    assert decoded.err == ""
    to_stdout = run("encode", "a.png", "-o", "-", "--json")
    assert to_stdout.out == Path("a.vtc").read_bytes() and json.loads(to_stdout.err)["output"] == "-"
    failure = run("encode", "none.png", "--json")
    assert json.loads(failure.out) == {"input": "none.png", "error": "none.png does not exist."}
    assert failure.code == 1 and failure.err == "none.png does not exist.\n"


def test_what_was_done_to_the_picture_is_said(here: Path, run: Say) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 90)).save("b.png")
    result = run("encode", "b.png", "--json")
    assert result.err == "b.png: composited transparency on white.\n"
    assert json.loads(result.out)["notes"] == ["composited transparency on white"]
    assert run("encode", "b.png", "--quiet").err == ""


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (17, 33)])
def test_any_size(size: tuple[int, int], here: Path, run: Say) -> None:
    picture("b.png", *size)
    assert run("encode", "b.png").code == 0
    assert run("decode", "b.vtc").code == 0
    assert Image.open("b.decoded.png").size == size


@pytest.mark.parametrize(("name", "format"),
                         [("b.jpg", "JPEG"), ("b.JPEG", "JPEG"), ("b.webp", "WEBP"), ("b.png", "PNG")])
def test_format_by_suffix(name: str, format: str, here: Path, run: Say) -> None:
    run("encode", "a.png")
    assert run("decode", "a.vtc", "-o", name).code == 0
    assert Image.open(name).format == format


def test_info_needs_no_model(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    run("encode", "a.png")
    run("encode", "a.png", "--model", hub.BUNDLED.parent / "other", "-o", "b.vtc")
    monkeypatch.setattr(hub, "BUNDLED", here / "nothing")
    facts = json.loads(run("decode", "--info", "a.vtc", "--json").out)
    assert (facts["width"], facts["height"], facts["model"]) == (40, 24, DEFAULT_MODEL)
    assert facts["model_id"] == MODEL_IDS[DEFAULT_MODEL]
    assert facts["fingerprint"] == tiny(0).fingerprint().hex() and facts["scales"] == [[2, 3]]
    assert facts["bytes"] == os.path.getsize("a.vtc")
    result = run("decode", "--info", "b.vtc", "none.vtc")
    assert result.code == 1 and result.err == "none.vtc cannot be read: no such file or directory.\n"
    assert "model:          not bundled" in result.out.decode()
    assert tree(here) == ["a.png", "a.vtc", "b.vtc"]


def test_continuous_latents_are_described_but_not_drawn(here: Path, run: Say) -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "latents_v1.json").read_text())
    Path("l.vtc").write_bytes(bytes.fromhex(golden[0]["stream"]))
    assert json.loads(run("decode", "--info", "l.vtc", "--json").out)["coder"] == "latents"
    failed(run("decode", "l.vtc"), "l.vtc: The stream holds continuous latents", "vtc.LatentCodec")
    assert tree(here) == ["a.png", "l.vtc"]


def test_a_folder_as_model(here: Path, run: Say, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("encode", "a.png", "--model", models / "other").code == 0
    failed(run("decode", "a.vtc"), "a.vtc: The stream was made with a model of its own", "--model")
    failed(run("decode", "a.vtc", "--model", DEFAULT_MODEL), "fingerprint")
    assert run("decode", "a.vtc", "--model", models / "other").code == 0
    # What a copy of the bundled model made is recognised by its fingerprint.
    monkeypatch.setitem(FINGERPRINTS.single, DEFAULT_MODEL, tiny(0).fingerprint().hex())
    assert run("encode", "a.png", "--model", models / "bundled" / DEFAULT_MODEL).code == 0
    assert Path("a.vtc").read_bytes()[4] == 0
    assert run("decode", "a.vtc").code == 0
    # A copy of the bundled model decodes what the bundled model made.
    run("encode", "a.png")
    assert run("decode", "a.vtc", "--model", models / "bundled" / DEFAULT_MODEL).code == 0


# ---- batches --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("jobs", ["1", "3"])
def test_folders_keep_their_names_and_order(jobs: str, here: Path, run: Say) -> None:
    for number, name in enumerate(("p/z.png", "p/sub/b.jpg", "p/sub/deep/c.tif", "p/y.PNG", "p/notes.txt")):
        if name.endswith("txt"):
            Path(name).write_text("no picture")
        else:
            picture(name, seed=number)
    encoded = run("encode", "p", "a.png", "-o", "out", "--json", "-j", jobs)
    assert encoded.code == 0 and "5/5" in encoded.err
    facts = [json.loads(line) for line in encoded.out.splitlines()]
    assert [f["input"] for f in facts] == ["p/y.PNG", "p/z.png", "p/sub/b.jpg", "p/sub/deep/c.tif", "a.png"]
    assert tree(here / "out") == ["a.vtc", "sub/b.vtc", "sub/deep/c.vtc", "y.vtc", "z.vtc"]
    for fact in facts:  # each has its own picture's stream
        alone = run("encode", fact["input"], "-o", "-").out
        assert Path(fact["output"]).read_bytes() == alone
    assert run("decode", "out", "-o", "back/", "--format", "jpeg", "--quiet", "-j", jobs).err == ""
    assert tree(here / "back") == ["a.jpg", "sub/b.jpg", "sub/deep/c.jpg", "y.jpg", "z.jpg"]


def test_a_batch_goes_on_and_ends_with_its_failures(here: Path, run: Say) -> None:
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:600])
    Path("text.png").write_text("hello")
    result = run("encode", "cut.png", "a.png", "none.png", "text.png", "-o", "out", "-j", "2")
    assert result.code == 1 and tree(here / "out") == ["a.vtc"]
    assert result.lines[-4] == "vtc-encode: 3 of 4 files failed:"
    assert [line.split(" ")[0] for line in result.lines[-3:]] == ["cut.png", "none.png", "text.png"]


def test_two_inputs_never_share_an_output(here: Path, run: Say) -> None:
    picture("a.jpg", seed=1)
    result = run("encode", "a.png", "a.jpg", "--quiet")
    assert result.code == 1
    assert result.lines[-1].startswith("a.jpg would overwrite a.vtc, which a.png becomes; ")
    assert Path("a.vtc").read_bytes() == run("encode", "a.png", "-o", "-").out
    Path("other").mkdir()
    picture("other/a.png")
    assert run("encode", "a.png", "other/a.png", "-o", "out").code == 1
    assert run("encode", "a.png", "./a.png", "-o", "out2").code == 0  # the same file twice is no conflict


def test_an_input_is_never_overwritten(here: Path, run: Say) -> None:
    before = Path("a.png").read_bytes()
    failed(run("encode", "a.png", "-o", "./a.png"), "written onto the input")
    Path("link.vtc").symlink_to("a.png")
    failed(run("encode", "a.png", "-o", "link.vtc"), "written onto the input")
    Path("b.vtc").write_bytes(before)  # a picture under a wrong name, beside one whose output it would be
    picture("b.png", seed=1)
    result = run("encode", "b.png", "b.vtc")
    assert result.code == 1 and Path("b.vtc").read_bytes() == before == Path("a.png").read_bytes()


def test_the_original_beside_a_stream_is_never_overwritten(here: Path, run: Say) -> None:
    picture("p/b.jpg")
    before = {name: Path(name).read_bytes() for name in ("a.png", "p/b.jpg")}
    assert run("encode", "a.png", "p").code == 0
    assert run("decode", "a.vtc").code == run("decode", "p", "--format", "jpeg").code == 0
    assert {name: Path(name).read_bytes() for name in before} == before
    assert tree(here) == ["a.decoded.png", "a.png", "a.vtc", "p/b.decoded.jpg", "p/b.jpg", "p/b.vtc"]


def test_an_existing_output_is_replaced(here: Path, run: Say) -> None:
    Path("a.vtc").write_bytes(b"old")
    assert run("encode", "a.png").code == 0
    assert Path("a.vtc").read_bytes()[:2] == b"\xf5\x56"


# ---- usage ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "argv"), [
    ("encode", ()), ("encode", ("a.png", "--speed", "3")), ("encode", ("a.png", "-j", "many")),
    ("encode", ("a.png", "-j", "-1")), ("encode", ("a.png", "--device", "toaster")), ("encode", ("a.png", "-o", "")),
    ("encode", ("-", "a.png")), ("encode", ("a.png", "a.png", "-o", "-")), ("encode", (".", "-o", "-")),
    ("encode", ("-", "-o", "./")), ("decode", ("a.vtc", "-o", "a.gif")), ("decode", ("a.vtc", "-o", "a")),
    ("decode", ("a.vtc", "-o", "a.png", "--format", "webp")), ("decode", ("a.vtc", "--format", "bmp")),
    ("decode", ("a.vtc", "--info", "-o", "a.png")), ("decode", ("a.vtc", "--progressive", "-o", "-")),
    ("encode", ("a.png", "--resilience", "0")), ("encode", ("a.png", "--resilience", "5000")),
    ("encode", ("a.png", "--resilience", "8", "--progressive")),
])
def test_usage_errors(command: str, argv: tuple[str, ...], here: Path, run: Say) -> None:
    result = run(command, *argv)
    assert result.code == 2 and result.err.startswith(f"usage: vtc-{command}")
    assert result.lines[-1].startswith(f"vtc-{command}: error: ")
    assert tree(here) == ["a.png"]


@pytest.mark.parametrize("command", ["encode", "decode"])
@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["a", "--nonsense"], ["--info", "a.vtc"]])
def test_arguments_are_parsed_before_torch_is_imported(command: str, argv: list[str], tmp_path: Path) -> None:
    if argv[0] == "--info" and command == "encode":
        argv = ["none.png"]
    code = (f"import sys\nfrom vtc.cli.{command} import main\ntry: main()\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# ---- failures -------------------------------------------------------------------------------------------------------

def test_inputs_that_are_not_pictures(here: Path, run: Say) -> None:
    data = Path("a.png").read_bytes()
    bomb = bytearray(data)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    for name, content, words in (("empty.png", b"", "is empty"), ("text.png", b"hello", "is not a picture"),
                                 ("cut.png", data[:500], "damaged or cut"),
                                 ("bomb.png", bytes(bomb), "too many pixels")):
        Path(name).write_bytes(content)
        failed(run("encode", name), name, words)
        failed(run("encode", "-", "-o", "b.vtc", stdin=content), "stdin", words)
        Path(name).unlink()
    failed(run("encode", "none.png"), "none.png does not exist")
    Path("folder").mkdir()
    failed(run("encode", "folder"), "folder has no files")
    assert tree(here) == ["a.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(here: Path, run: Say) -> None:
    os.chmod("a.png", 0)
    failed(run("encode", "a.png"), "permission denied")


def test_streams_that_are_damaged(here: Path, run: Say) -> None:
    run("encode", "a.png")
    stream = Path("a.vtc").read_bytes()

    def signed(body: bytes) -> bytes:
        return body + zlib.crc32(body).to_bytes(4, "little")

    flipped = stream[:20] + bytes((stream[20] ^ 4,)) + stream[21:]
    for content, words in ((b"", "is empty"), (Path("a.png").read_bytes(), "not a vtc stream"),
                           (flipped, "checksum"), (stream[:9], "cut"), (stream[:-3], "cut"),
                           (stream + b"x", "followed"),
                           (signed(stream[:2] + b"\x03" + stream[3:-4]), "version 3"),
                           (signed(stream[:4] + b"\x63" + stream[5:-4]), "model number 99"),
                           (signed(stream[:5] + bytes(8) + stream[13:-4]), "fingerprint")):
        Path("b.vtc").write_bytes(content)
        failed(run("decode", "b.vtc", "-o", "b.png"), "b.vtc", words)
    assert tree(here) == ["a.png", "a.vtc", "b.vtc"]


def test_a_stream_cannot_name_a_huge_picture(here: Path, run: Say) -> None:
    run("encode", "a.png")
    stream = Path("a.vtc").read_bytes()
    assert stream[13:15] == bytes((40, 24))
    body = stream[:13] + b"\x80\x80\x04\x80\x80\x04" + stream[15:-4]  # 65536 x 65536
    Path("b.vtc").write_bytes(body + zlib.crc32(body).to_bytes(4, "little"))
    failed(run("decode", "b.vtc"), "65536x65536")


def test_outputs_that_cannot_be_written(here: Path, run: Say) -> None:
    failed(run("encode", "a.png", "-o", "none/a.vtc"), "none does not exist")
    failed(run("encode", "a.png", "-o", "none/deep/"), "none does not exist")
    failed(run("encode", "a.png", "a.png", "-o", "a.png"), "a.png is a file")
    if os.path.exists("/dev/full"):
        failed(run("encode", "a.png", "-o", "/dev/full"), "/dev/full", "no space left")
    if os.path.isdir("/sys/kernel"):
        failed(run("encode", "a.png", "-o", "/sys/kernel/a.vtc"), "cannot be written")
    assert tree(here) == ["a.png"]


def test_a_full_disk_leaves_nothing(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    failed(run("encode", "a.png"), "a.vtc cannot be written: no space left on device")
    picture("b.png")
    result = run("encode", "a.png", "b.png", "-o", "out/", "--quiet")
    assert result.code == 1 and len(result.lines) == 3
    assert tree(here) == ["a.png", "b.png"]


def test_models_and_devices_that_are_not_there(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(run("encode", "a.png", "--model", "someone/model"), "No model 'someone/model'")
    failed(run("encode", "a.png", "--model", here), "config.json")
    failed(run("encode", "a.png", "--device", "cuda:99"), "The device cuda:99 is not available")
    monkeypatch.setattr(hub, "BUNDLED", here / "nothing")
    failed(run("encode", "a.png"), "missing from this installation")
    assert tree(here) == ["a.png"]


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory(error: Exception, here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(self: TokenCodec, *args: object) -> bytes:
        raise error

    monkeypatch.setattr(TokenCodec, "compress_picture", compress)
    failed(run("encode", "a.png"), "a.png: there is not enough memory for it")


def test_a_bug_is_one_sentence_too(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenCodec, "compress_picture", lambda self, *args: 1 // 0)
    failed(run("encode", "a.png"), "a.png: unexpected ZeroDivisionError at test_cli.py:", "by zero.")


def command_line(models: Path, command: str, *argv: str) -> list[str]:
    """A process of its own that sees the tiny model as the bundled one."""
    code = ("import sys, pathlib\nfrom vtc import hub\nhub.BUNDLED = pathlib.Path(sys.argv.pop(1))\n"
            f"from vtc.cli.{command} import main\nsys.exit(main())")
    return [sys.executable, "-c", code, str(models / "bundled"), *argv]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def _hear_interrupts() -> None:
    """A test run in the background of a shell ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(("number", "argv"), [(signal.SIGINT, ["pipe", "-o", "b.vtc"]),
                                              (signal.SIGTERM, ["pipe", "a.png", "-o", "out", "-j", "2"])])
def test_stopping_leaves_no_partial_file(number: int, argv: list[str], here: Path, models: Path) -> None:
    os.mkfifo("pipe")
    process = subprocess.Popen(command_line(models, "encode", *argv, "--quiet"), stderr=subprocess.PIPE,
                               env=ENVIRONMENT, preexec_fn=_hear_interrupts)
    writer = None
    while writer is None and process.poll() is None:
        try:
            writer = os.open("pipe", os.O_WRONLY | os.O_NONBLOCK)  # possible once the command reads
        except OSError:
            time.sleep(0.02)
    assert writer is not None, process.communicate()
    time.sleep(0.5)  # a signal just between Python's last look for one and the read would only be seen after the read
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    os.close(writer)
    assert process.returncode == 1
    assert err.decode() == "vtc-encode: stopped; no partial file is left.\n"
    assert [name for name in tree(here) if name not in ("out/a.vtc",)] == ["a.png"]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_closed_and_full_standard_streams(here: Path, run: Say, models: Path) -> None:
    run("encode", "a.png", "-o", "b.vtc")

    def shell(redirection: str, command: str, *argv: str) -> SimpleNamespace:
        line = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command_line(models, command, *argv)]
        done = subprocess.run(line, capture_output=True, env=ENVIRONMENT, check=False)
        return SimpleNamespace(code=done.returncode, out=done.stdout, lines=done.stderr.decode().splitlines(),
                               err=done.stderr.decode())

    failed(shell("<&-", "encode", "-", "-o", "c.vtc"), "stdin is closed")
    failed(shell(">&-", "encode", "a.png", "-o", "-"), "stdout is closed")
    silent = shell("2>&-", "encode", "a.png", "-o", "-")
    assert (silent.code, silent.out) == (0, Path("b.vtc").read_bytes())
    if os.path.exists("/dev/full"):
        failed(shell(">/dev/full", "encode", "a.png", "--json"), "stdout cannot be written: no space left")
        assert Path("a.vtc").read_bytes() == Path("b.vtc").read_bytes()
        failed(shell(">/dev/full", "decode", "--info", "a.vtc"), "stdout cannot be written: no space left")


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_a_file_name_that_is_no_text(here: Path, run: Say) -> None:
    name = os.fsdecode(b"\xff.png")
    os.rename("a.png", name)
    assert json.loads(run("encode", name, "--json").out)["input"] == name
    result = run("decode", "--info", os.fsdecode(b"\xff.vtc"))
    assert result.code == 0 and b"\\udcff.vtc" in result.out


def test_a_folder_that_cannot_be_read(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("p/b.png")
    picture("p/locked/c.png")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = run("encode", "p", "--quiet")
    assert result.code == 1 and Path("p/b.vtc").exists()
    assert result.lines[-1] == "The folder p/locked cannot be read: permission denied."


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")
def test_a_reader_that_went_away_and_a_file_size_limit(here: Path, models: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command_line(models, "encode", "a.png", "-o", "-", "--quiet"), stdout=write_end,
                          stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"vtc-encode: the reader of stdout closed it before the end.\n")

    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    command = command_line(models, "encode", "a.png", "--quiet")
    command[2] = limited + command[2]
    done = subprocess.run(command, capture_output=True, env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"},
                          check=False)
    assert (done.returncode, done.stderr) == (1, b"a.png: a.vtc cannot be written: file too large.\n")
    assert tree(here) == ["a.png"]
