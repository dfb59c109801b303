"""What vtc-encode and vtc-decode share: arguments, one sentence for each failure, processors, and running a batch."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vtc.cli.plan import Task
from vtc.errors import ConfigError, FileError, VtcError, first_sentence, sentence
from vtc.files import reason, write_file

if TYPE_CHECKING:
    from vtc.codecs.token_codec import TokenCodec
    from vtc.tokenizers.base import Tokenizer

#: exit codes; argparse ends usage errors with 2
DONE, FAILED, STOPPED = 0, 1, 1


def add_arguments(parser: argparse.ArgumentParser, output_help: str, model_help: str) -> None:
    """The arguments that both commands have."""
    import vtc

    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders; '-' is stdin")
    parser.add_argument("-o", "--output", metavar="PATH", type=_not_empty, help=output_help)
    parser.add_argument("-j", "--jobs", type=job_count, default=1, metavar="N",
                        help="files in work at the same time; 0: one a processor; default 1, which uses all processors")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", type=_not_empty, help=model_help)
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu (default), cuda, cuda:N, mps or xpu")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object a file on stdout, or on stderr where the output goes to stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but failures")
    parser.add_argument("--version", action="version", version=f"%(prog)s {vtc.__version__}")


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def job_count(text: str) -> int:
    """The type of -j."""
    if not re.fullmatch(r"\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of jobs")
    return int(text) or usable_cpus()


def device_name(text: str) -> str:
    """The type of --device."""
    if not re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d{1,3})?)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N, mps, xpu")
    return text


def usable_cpus() -> int:
    """Processors that this process may use: by its affinity, and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2, or a quota of "max"
        return count


def share_cpus(jobs: int) -> None:
    """Make torch use in each job the part of the processors that `jobs` leave it. Call it once, in the main thread."""
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cpus()) // jobs))


def _use_threads(count: int) -> None:
    """In a new thread: the number of the main thread, which not every library below torch hands on."""
    if count:
        import torch

        torch.set_num_threads(count)


def load_model(name_or_path: str, device: str, size: int | None = None) -> Tokenizer:
    """A tokenizer, or the member of its family with `size` words, on its device; no download.

    Raises ModelError, and ConfigError where there is no such device.
    """
    from vtc.models import load_tokenizer

    tokenizer = load_tokenizer(name_or_path, allow_download=False, size=size)
    try:
        return tokenizer.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device} is not available: {first_sentence(error)}.") from error


def load_codec(name_or_path: str, device: str, size: int | None = None, max_pixels: int = 2**28) -> TokenCodec:
    """The codec of a model, or of the member of its family with `size` words, with its prior and its concealer."""
    from vtc.codecs.token_codec import TokenCodec
    from vtc.models import companions

    tokenizer = load_model(name_or_path, device, size)
    prior, concealer = companions(name_or_path, device)
    return TokenCodec(tokenizer, prior, concealer, max_pixels)


def say(text: str) -> None:
    """A line on stderr; a stderr that was closed is no reason to fail."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def emit(text: str, stream: TextIO | None) -> None:
    """Lines on stdout, or on another stream; characters that it cannot hold are escaped.

    Raises FileError where it is closed or cannot be written, and BrokenPipeError where its reader went away.
    """
    if stream is None:
        raise FileError("stdout is closed.")
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in its buffer is flushed once more at the end; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise FileError(f"stdout cannot be written: {reason(error)}.") from error


def guarded(parser: argparse.ArgumentParser, command: Callable[[], int]) -> int:
    """Run a command's body and turn whatever it raises into a sentence and an exit code.

    SIGTERM (`timeout`, `kill`) is treated like Ctrl-C, so that it too leaves no temporary file.
    """
    # Notes of torch's C++ side about the processor are not for the user's eyes.
    if sys.stderr is None:  # closed by the caller; messages go nowhere, and never into a file opened later
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    on_main = threading.current_thread() is threading.main_thread()
    old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler) if on_main else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return command()
    except KeyboardInterrupt:
        say(stopped(parser.prog))
        return STOPPED
    except BrokenPipeError:
        # Python flushes stdout once more at its end; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say(f"{parser.prog}: the reader of stdout closed it before the end.")
        return FAILED
    except Exception as error:
        say(sentence(error, parser.prog))
        return FAILED
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, old_handler)


@dataclass(frozen=True)
class Made:
    """What became of one file: its new bytes, facts for --json, and what was done to it on the way.

    loading: seconds of the work that went into loading a model, or waiting for it; they are not the file's.
    quality: that an encoder chose or was told, where its model has several.
    stages: coarser pictures of a decoder, coarse to fine, which are written beside the file.
    """

    data: bytes
    width: int
    height: int
    coded_bytes: int
    notes: Sequence[str] = field(default=())
    loading: float = 0.0
    quality: int | None = None
    stages: Sequence[bytes] = field(default=())


def run(prog: str, tasks: Sequence[Task], work: Callable[[Task], Made], jobs: int, as_json: bool, quiet: bool) -> int:
    """Do all tasks, write what they made in their order, report, and list the failures at the end.

    `work` runs in `jobs` threads, which share the model; only this thread writes, so nothing partial can be left.
    """
    from tqdm import tqdm

    several = len(tasks) > 1
    failures: list[str] = []
    no_report = ""
    report = sys.stderr if any(task.target == "-" for task in tasks) else sys.stdout
    bar = tqdm(total=len(tasks), unit="file", file=sys.stderr, disable=quiet or not several)

    def tell(text: str) -> None:
        if not quiet:
            bar.clear()
            say(text)

    with bar, stopping(prog, jobs):
        for task, outcome in _outcomes(tasks, work, jobs):
            facts: dict[str, Any] = {"input": task.source}
            try:
                made, seconds = outcome()
                start = time.perf_counter()
                if task.make_folder:
                    make_folder(task.target)
                stages = [stage_name(task.target, number) for number in range(1, len(made.stages) + 1)]
                for name, data in zip(stages, made.stages, strict=True):
                    write_file(name, data)
                write_file(task.target, made.data)
                seconds += time.perf_counter() - start
            except BrokenPipeError:
                raise
            except Exception as error:
                failures.append(sentence(error, task.source))
                facts["error"] = failures[-1]
            else:
                bpp = 8 * made.coded_bytes / (made.width * made.height)
                facts |= {"output": task.target, "width": made.width, "height": made.height,
                          "bytes": made.coded_bytes, "bpp": bpp, "seconds": round(seconds, 4)}
                if stages:
                    facts["stages"] = stages
                if made.quality is not None:
                    facts["quality"] = made.quality
                if made.notes:
                    facts["notes"] = list(made.notes)
                    tell(f"{task.source}: {'; '.join(made.notes)}.")
                if not several and not as_json:
                    tell(f"{task.source} -> {task.target}: {made.width}x{made.height}, {made.coded_bytes} bytes, "
                         f"{bpp:.4f} bpp, {seconds:.2f} s")
            if as_json:
                bar.clear()
                try:
                    emit(json.dumps(facts), report)
                except FileError as error:  # the files are still made, without a report
                    no_report = f"{prog}: {error}"
                    as_json = False
            bar.update()
    if several and failures:
        say(f"{prog}: {len(failures)} of {len(tasks)} files failed:")
    for failure in failures:
        say(failure)
    if no_report:
        say(no_report)
    return FAILED if failures or no_report else DONE


def stage_name(target: str, number: int) -> str:
    """Where a coarser picture goes: beside the final one.

    >>> stage_name("a.decoded.png", 1)
    'a.decoded.stage1.png'
    """
    root, suffix = os.path.splitext(target)
    return f"{root}.stage{number}{suffix}"


def not_called(task: Task) -> Made:
    """Work for a batch whose tasks all have a problem: no model is loaded for them."""
    raise AssertionError(task)


@contextmanager
def stopping(prog: str, jobs: int) -> Iterator[None]:
    """Exit at once on Ctrl-C: a thread amid a picture cannot be stopped, and Python would wait for it."""
    try:
        yield
    except KeyboardInterrupt:
        if jobs == 1:
            raise
        say(stopped(prog))
        os._exit(STOPPED)


def stopped(prog: str) -> str:
    """What is said after Ctrl-C."""
    return f"{prog}: stopped; no partial file is left."


def make_folder(target: str) -> None:
    """Create the folder that `target` lies in. Raises FileError."""
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise FileError(f"The output folder {folder} cannot be created: {reason(error)}.") from error


#: gives a task's result and the seconds it took, or raises what it raised
Outcome = Callable[[], tuple[Made, float]]


def _outcomes(tasks: Sequence[Task], work: Callable[[Task], Made], jobs: int) -> Iterator[tuple[Task, Outcome]]:
    """Each task with its outcome, in their order; at most `2 * jobs` are in work or wait for their turn in memory."""
    def timed(task: Task) -> tuple[Made, float]:
        if task.problem:
            raise VtcError(task.problem)
        start = time.perf_counter()
        made = work(task)
        return made, time.perf_counter() - start - made.loading

    if jobs == 1:
        for task in tasks:
            yield task, partial(timed, task)
        return
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    pool = ThreadPoolExecutor(jobs, initializer=_use_threads, initargs=(threads,))
    try:
        waiting: deque[tuple[Task, Future[tuple[Made, float]]]] = deque()
        for task in tasks:
            waiting.append((task, pool.submit(timed, task)))
            if len(waiting) == 2 * jobs:
                first, future = waiting.popleft()
                yield first, future.result
        for first, future in waiting:
            yield first, future.result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
