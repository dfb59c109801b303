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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vtc.cli import shards
from vtc.cli.items import Item, Made, file_item
from vtc.cli.plan import Task
from vtc.cli.shards import Recipe
from vtc.errors import ConfigError, FileError, VtcError, first_sentence, sentence
from vtc.files import reason

if TYPE_CHECKING:
    from vtc.codecs.token_codec import TokenCodec
    from vtc.tokenizers.base import Tokenizer

#: exit codes; argparse ends usage errors with 2
DONE, FAILED, STOPPED = 0, 1, 1


def add_arguments(parser: argparse.ArgumentParser, output_help: str, model_help: str) -> None:
    """The arguments that both commands have."""
    import vtc

    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="files, folders, or WebDataset shards ending in .tar; '-' is stdin")
    parser.add_argument("-o", "--output", metavar="PATH", type=not_empty, help=output_help)
    parser.add_argument("-j", "--jobs", type=job_count, default=1, metavar="N",
                        help="files in work at the same time; 0: one a processor; default 1, which uses all processors")
    parser.add_argument("--resume", action="store_true",
                        help="leave outputs that exist alone, and go on inside the shard at which a run was stopped")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", type=not_empty, help=model_help)
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu (default), cuda, cuda:N, mps or xpu")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object a file on stdout, or on stderr where the output goes to stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but failures")
    parser.add_argument("--version", action="version", version=f"%(prog)s {vtc.__version__}")


def not_empty(text: str) -> str:
    """The type of names and paths."""
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


def jobs_for(tasks: Sequence[Task], jobs: int) -> int:
    """No more jobs than there are files to work at, where that is known."""
    return jobs if any(task.is_shard for task in tasks) else max(1, min(jobs, len(tasks)))


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
        # In one piece, so that lines of several processes do not mix.
        print(text.encode(encoding, "backslashreplace").decode(encoding) + "\n", end="", file=stream, flush=True)
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


def todo(tasks: Sequence[Task], part: Part, resume: bool) -> tuple[list[Task], list[Task]]:
    """This process's tasks: those to be done, and those whose output is there already, which `resume` leaves alone.

    The share comes first: what others finish in the meantime must not change it. Outputs get their name when they are
    complete, so one that exists is done.
    """
    left: list[Task] = []
    done: list[Task] = []
    for task in tasks[part.rank :: part.count]:
        is_done = resume and not task.problem and task.target != "-" and os.path.isfile(task.target)
        (done if is_done else left).append(task)
    return left, done


def run(prog: str, tasks: Sequence[Task], work: Callable[[Task], Made], jobs: int, args: argparse.Namespace,
        recipe: Recipe, part: Part, done: Sequence[Task] = ()) -> int:
    """Do all tasks, write what they made in their order, report, and list the failures at the end.

    `work` runs in `jobs` threads, which share the model; only this thread writes, so nothing partial can be left.
    recipe: what becomes of shards. done: tasks of which is only said that they are.
    """
    from tqdm import tqdm

    several = len(tasks) + len(done) > 1 or any(task.is_shard for task in tasks) or part.count > 1
    failures: list[str] = []
    no_report, as_json, count = "", args.json, 0
    report = sys.stderr if any(task.target == "-" for task in tasks) else sys.stdout
    total = None if any(task.is_shard for task in tasks) else len(tasks)
    bar = tqdm(total=total, unit="file", file=sys.stderr, disable=args.quiet or not several or part.rank > 0)

    def tell(text: str) -> None:
        if not args.quiet:
            bar.clear()
            say(text)

    def facts_of(facts: dict[str, Any]) -> None:
        nonlocal no_report, as_json
        if as_json:
            bar.clear()
            try:
                emit(json.dumps(facts | ({"rank": part.rank} if part.count > 1 else {})), report)
            except FileError as error:  # the files are still made, without a report
                no_report, as_json = f"{prog}: {error}", False

    with bar, stopping(prog, jobs):
        if done:
            tell(f"{prog}: {len(done)} of {len(done) + len(tasks)} outputs are there already.")
        for task in done:
            facts_of({"input": task.source, "output": task.target, "skipped": True})
        for item, outcome in _outcomes(_items(tasks, recipe), work, jobs):
            if item.dropped():
                continue
            facts: dict[str, Any] = {"input": item.source}
            try:
                made, seconds = outcome()
                start = time.perf_counter()
                stages = item.write(made)
                seconds += time.perf_counter() - start
            except BrokenPipeError:
                raise
            except Exception as error:
                failures.append(sentence(error, item.source))
                facts["error"] = failures[-1]
            else:
                if made is None:
                    continue
                bpp = 8 * made.coded_bytes / (made.width * made.height)
                facts |= {"output": item.target, "width": made.width, "height": made.height,
                          "bytes": made.coded_bytes, "bpp": bpp, "seconds": round(seconds, 4)}
                if stages:
                    facts["stages"] = stages
                if made.quality is not None:
                    facts["quality"] = made.quality
                if made.notes:
                    facts["notes"] = list(made.notes)
                    tell(f"{item.source}: {'; '.join(made.notes)}.")
                if not several and not args.json:
                    tell(f"{item.source} -> {item.target}: {made.width}x{made.height}, {made.coded_bytes} bytes, "
                         f"{bpp:.4f} bpp, {seconds:.2f} s")
            count += 1
            facts_of(facts)
            bar.update()
    if failures and (count > 1 or part.count > 1):
        say(f"{prog}: {len(failures)} of {count} files failed:")
    for failure in failures:
        say(failure)
    if no_report:
        say(no_report)
    return FAILED if failures or no_report else DONE


def _items(tasks: Sequence[Task], recipe: Recipe) -> Iterator[Item]:
    for task in tasks:
        if task.is_shard and not task.problem:
            yield from shards.items(task, recipe)
        else:
            yield file_item(task)


def not_called(task: Task) -> Made:
    """Work for a batch whose tasks all have a problem: no model is loaded for them."""
    raise AssertionError(task)


@contextmanager
def stopping(prog: str, jobs: int) -> Iterator[None]:
    """Exit at once on Ctrl-C: a thread amid a picture cannot be stopped, and Python would wait for it."""
    try:
        yield
    except KeyboardInterrupt:
        left = [shard.target for shard in shards.unfinished.values() if not shard.failed]
        if jobs == 1 and not left:
            raise
        say(f"{prog}: stopped; {', '.join(left)} is not finished, and --resume goes on with it." if left else
            stopped(prog))
        os._exit(STOPPED)


def stopped(prog: str) -> str:
    """What is said after Ctrl-C."""
    return f"{prog}: stopped; no partial file is left."


# ---- several processes ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """The share of a process in a run of several: number `rank` of `count`, which takes every `count`-th task."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls) -> Part:
        """What `accelerate launch`, `torchrun` or `mpirun` say in the environment. Raises ConfigError."""
        def number(*names: str) -> int | None:
            return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), None)

        rank = number("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
        count = number("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
        if rank is None or count is None:
            return cls()
        if not rank < count:
            raise ConfigError(f"RANK={rank} and WORLD_SIZE={count} contradict each other; unset both, or launch again.")
        return cls(rank, count)

    def name(self, prog: str) -> str:
        """The command as messages call it."""
        return prog if self.count == 1 else f"{prog} (process {self.rank + 1} of {self.count})"

    def device(self, wanted: str) -> str:
        """'cuda' or 'xpu' without a number is, of several processes on a machine, each one's own."""
        local = os.environ.get("LOCAL_RANK", "")
        return f"{wanted}:{local}" if self.count > 1 and wanted in ("cuda", "xpu") and local.isdecimal() else wanted

    def wait(self) -> None:
        """Until all processes of the run are here: a launcher ends the others when one ends with failures."""
        if self.count == 1 or not os.environ.get("MASTER_ADDR"):
            return
        from datetime import timedelta

        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=30), rank=self.rank, world_size=self.count)
        distributed.barrier()
        distributed.destroy_process_group()


#: gives what was made and the seconds it took, or raises what it raised; None of an item with nothing to make
Outcome = Callable[[], tuple[Made | None, float]]


def _outcomes(items: Iterator[Item], work: Callable[[Task], Made], jobs: int) -> Iterator[tuple[Item, Outcome]]:
    """Each item with its outcome, in their order; at most `2 * jobs` are in work or wait for their turn in memory."""
    def timed(task: Task) -> tuple[Made, float]:
        if task.problem:
            raise VtcError(task.problem)
        start = time.perf_counter()
        made = work(task)
        return made, time.perf_counter() - start - made.loading

    def nothing() -> tuple[None, float]:
        return None, 0.0

    if jobs == 1:
        for item in items:
            yield item, partial(timed, item.task) if item.task else nothing
        return
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    pool = ThreadPoolExecutor(jobs, initializer=_use_threads, initargs=(threads,))
    try:
        waiting: deque[tuple[Item, Future[tuple[Made, float]] | None]] = deque()
        in_work = 0
        for item in items:
            waiting.append((item, pool.submit(timed, item.task) if item.task else None))
            in_work += item.task is not None
            # What needs no work goes on as soon as it is its turn, and takes nobody's place.
            while waiting and (in_work == 2 * jobs or waiting[0][1] is None):
                first, future = waiting.popleft()
                in_work -= future is not None
                yield first, future.result if future else nothing
        for first, future in waiting:
            yield first, future.result if future else nothing
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
