"""The training loop with a model of forty weights: resuming to the bit, processes, precision, what goes wrong."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.shared import ROOT
from vtc.errors import ConfigError, ModelError, TrainingError
from vtc.script import run_script
from vtc.training import checkpoints
from vtc.training import loop as loop_module
from vtc.training.loop import Average, Loop, Numbered, Recipe, Stopped, Task, make_accelerator, picture_grid
from vtc.training.recipe import add_recipe_flags, flag, parse_recipe_args, read_config, recipe_from


class Numbers(Dataset[Tensor]):
    """Sample n is four numbers drawn from n."""

    def __getitem__(self, n: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(n))


class Wrong(Numbers):
    """The same, until something happens at sample `at`."""

    def __init__(self, at: int, what: str) -> None:
        self.at, self.what = at, what

    def __getitem__(self, n: int) -> Tensor:
        if n == self.at and self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if n == self.at and self.what == "is broken":
            raise TrainingError("A hundred pictures in a row cannot be read.")
        return super().__getitem__(n) * (math.nan if n == self.at and self.what == "is no number" else 1)


class Reverse(Task):
    """A linear layer learns to reverse four numbers, with noise and a discriminator of one layer."""

    def __init__(self, noise: float = 0.1, critic: bool = True) -> None:
        torch.manual_seed(7)
        players: dict[str, nn.Module] = {"model": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))}
        if not noise:
            players["model"] = nn.Sequential(nn.Linear(4, 4))
        if critic:
            players["critic"] = nn.Linear(4, 1)
        super().__init__(players)
        self.noise, self.seen, self.usage = noise, 0, 1.0
        self.output = torch.zeros(0)

    def losses(self, player: str, batch: Tensor, step: int) -> dict[str, Tensor]:
        if player == "critic":
            return {"critic": (self.players["critic"](self.output) - self.players["critic"](batch)).tanh().mean()}
        self.seen += len(batch)
        output = self.players["model"](batch)
        self.output = output.detach()
        terms = {"error": (output - batch.flip(1) * (1 + self.noise * torch.randn(()))).square().mean()}
        if "critic" in self.players:
            terms["opinion"] = 0.1 * self.players["critic"](output).tanh().mean()
        return terms

    def report(self, step: int) -> dict[str, float]:
        return {"codebook_usage": self.usage}

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        assert not average.training
        return {"noise": torch.rand(()).item()}

    def samples(self, average: nn.Module, step: int) -> Tensor:
        return torch.rand(3, 3, 4, 4)

    def save(self, average: nn.Module, directory: Path) -> None:
        directory.mkdir()
        torch.save(average.state_dict(), directory / "weights.pt")

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def recipe(**changes) -> Recipe:
    values = dict(max_train_steps=20, train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-2,
                  checkpointing_steps=5, validation_steps=10, logging_steps=5, lr_warmup_steps=4, ema_decay=0.9,
                  dataloader_num_workers=0, report_to="none")
    return Recipe(**{**values, **changes})


def loop_in(folder: Path, data: Dataset[Tensor] | None = None, task: Task | None = None, **changes) -> Loop:
    return Loop(task or Reverse(), recipe(**changes), Accelerator(cpu=True), data or Numbers(), folder)


def tensors(folder: Path, step: int = 20) -> dict[str, Tensor]:
    return {f"{file.stem}.{name}": tensor for file in (folder / f"checkpoint-{step}").glob("*.safetensors")
            for name, tensor in load_file(file).items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 5
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# ---- resuming -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of twenty steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    loop_in(folder).run()
    return folder


def test_a_run_leaves_logs_checkpoints_samples_and_the_model(whole):
    log = [json.loads(line) for line in (whole / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [5, 10, 15, 20]
    assert {"model/error", "model/opinion", "critic/critic", "model/grad_norm", "learning_rate",
            "samples_per_second", "codebook_usage"} <= log[0].keys()
    assert log[-1]["model/error"] < log[0]["model/error"]
    assert [json.loads(line)["step"] for line in (whole / "validation.jsonl").read_text().splitlines()] == [10, 20]
    assert sorted(p.name for p in whole.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]
    assert sorted(p.name for p in (whole / "checkpoint-20").iterdir()) == [
        "average.safetensors", "critic.safetensors", "model.safetensors", "state.json", "training.pt"]
    assert len(list((whole / "samples").glob("*.png"))) == 2
    assert read_config(whole / "recipe.json")["seed"] == 0
    assert json.loads((whole / "versions.json").read_text())["torch"] == torch.__version__
    saved = torch.load(whole / "model" / "weights.pt", weights_only=True)
    average = load_file(whole / "checkpoint-20" / "average.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in saved)


def test_twenty_steps_are_ten_a_kill_and_ten_to_the_bit(whole, tmp_path, capsys):
    """Another process dies by SIGKILL in the middle of step 13; this one goes on from checkpoint 10."""
    code = ("import os, signal, sys\nfrom pathlib import Path\nimport torch\n"
            "from tests.test_training_loop import Reverse, loop_in\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"  # a bias before BatchNorm learns from rounding alone
            "class Killed(Reverse):\n    def before_step(self, step):\n"
            "        step == 13 and os.kill(os.getpid(), signal.SIGKILL)\n"
            "loop_in(Path(sys.argv[1]), task=Killed()).run('latest')\n")
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True,
                            text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "There is no checkpoint" in killed.stderr
    torch.manual_seed(99)  # a resumed run must not depend on how its process was seeded
    loop_in(tmp_path).run("latest")
    assert "Going on from checkpoint-10." in capsys.readouterr().err
    assert_equal(tensors(whole), tensors(tmp_path))
    validated = [[json.loads(line)["noise"] for line in (f / "validation.jsonl").read_text().splitlines()]
                 for f in (whole, tmp_path)]
    assert validated[0] == validated[1]


def test_sigterm_and_ctrl_c_write_a_checkpoint_first(whole, tmp_path, request):
    def unused(*_: object) -> None:
        raise AssertionError("the loop's handler comes first")

    for number in (signal.SIGTERM, signal.SIGINT):
        request.addfinalizer(partial(signal.signal, number, signal.signal(number, unused)))
    for number, step in ((signal.SIGTERM, 7), (signal.SIGINT, 12)):
        class Told(Reverse):
            def before_step(self, now: int, at: int = step, number: int = number) -> None:
                if now == at - 1:
                    os.kill(os.getpid(), number)

        loop = loop_in(tmp_path, task=Told())
        loop.resume("latest")
        with pytest.raises(Stopped, match=f"stopped at step {step} of 20, with a checkpoint") as stopped:
            loop.train()
        assert stopped.value.signal == number and signal.getsignal(number) is unused
    loop = loop_in(tmp_path)
    loop.resume("latest")
    assert loop.step == 12
    loop.run()
    assert_equal(tensors(whole), tensors(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_readers_alive(tmp_path, number):
    """As `timeout` sends it: the step is ended with what they read, and a checkpoint is there."""
    code = ("import os, signal, sys, time\nfrom pathlib import Path\nimport torch\n"
            "from tests.test_training_loop import Reverse, loop_in\nfrom vtc.script import run_script\n"
            "torch.set_num_threads(1)\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "class Told(Reverse):\n    def before_step(self, step):\n"
            f"        step == 12 and (os.killpg(0, {int(number)}), time.sleep(1))\n"
            "loop = loop_in(Path(sys.argv[1]), task=Told(), dataloader_num_workers=2)\n"
            "sys.exit(run_script(lambda: loop.run(None), 'x'))\n")
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True,
                           text=True, start_new_session=True)
    assert ended.returncode == 128 + number, ended.stderr
    assert "stopped at step 13 of 20, with a checkpoint" in ended.stderr
    assert (tmp_path / "checkpoint-13").is_dir()


def test_a_resumed_run_follows_the_settings_that_changed(tmp_path):
    loop_in(tmp_path).train(stop_at=8)
    loop = loop_in(tmp_path, weight_decay=0.5, adam_beta2=0.7)
    loop.resume("latest")
    groups = [group for optimizer in loop.optimizers.values() for group in optimizer.param_groups]
    assert all(group["betas"][1] == 0.7 for group in groups) and any(group["weight_decay"] == 0.5 for group in groups)


def test_a_run_that_starts_anew_forgets_the_lines_of_one_that_was_killed(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"step": 4}\n{"st')
    loop = loop_in(tmp_path)
    assert not loop.resume("latest")
    loop.train()
    steps = [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def test_workers_change_nothing(whole, tmp_path):
    loop_in(tmp_path, dataloader_num_workers=2).train()
    assert_equal(tensors(whole), tensors(tmp_path))


def test_a_run_may_pause_and_another_path_be_resumed(whole, tmp_path):
    loop_in(tmp_path / "a").train(stop_at=8)
    loop = loop_in(tmp_path / "b")
    loop.resume(tmp_path / "a" / "checkpoint-8")
    loop.train()
    assert_equal(tensors(whole), tensors(tmp_path / "b"))
    assert loop.task.seen == 20 * 2 * 3


def test_what_changed_since_the_checkpoint_is_told(tmp_path, capsys):
    loop_in(tmp_path).train(stop_at=5)
    again = loop_in(tmp_path, train_batch_size=6, learning_rate=0.02)
    assert again.resume("latest") and again.position == 5 * 2 * 3
    assert "train_batch_size 3 -> 6" in capsys.readouterr().err
    with pytest.raises(TrainingError, match=r"nowhere is no checkpoint; .* has checkpoint-5"):
        again.resume("nowhere")
    with pytest.raises(ModelError, match="checkpoint-5/model is of another model"):
        loop_in(tmp_path, task=Reverse(noise=0.0)).resume("latest")
    without = Reverse()
    without.players["new"] = nn.Linear(1, 1)
    without.losses = lambda player, batch, step: {}
    loop_in(tmp_path, task=without).resume("latest")
    assert "no 'new': it starts anew" in capsys.readouterr().err


# ---- processes ------------------------------------------------------------------------------------------------------

def test_processes_share_out_the_numbers_of_a_batch():
    both = [list(Numbered(12, 2, 3, rank, 2)) for rank in (0, 1)]
    assert both == [[[12, 13, 14], [18, 19, 20]], [[15, 16, 17], [21, 22, 23]]]
    assert list(Numbered(5, 3, None, 1, 2)) == [6, 8, 10]


# ---- what goes wrong ------------------------------------------------------------------------------------------------

def test_a_loss_that_is_no_number_stops_the_run_before_a_checkpoint_is_written(tmp_path):
    loop = loop_in(tmp_path, Wrong(5 * 6 + 2, "is no number"))
    with pytest.raises(TrainingError, match=r"Step 6 has no finite loss or gradient: model/error is nan\. Go on from"):
        loop.train()
    assert [p.name for p in checkpoints.all_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert all(t.isfinite().all() for t in tensors(tmp_path, 5).values() if t.is_floating_point())


def test_a_dead_worker_is_named(tmp_path):
    reason = "(DataLoader worker .*pid|.*onnection|it closed)"  # as far as its last batch has come
    with pytest.raises(TrainingError, match=r"A process that reads data died near sample \d+: " + reason):
        loop_in(tmp_path, Wrong(20, "dies"), dataloader_num_workers=1).train()


@pytest.mark.parametrize("workers", (0, 1))
def test_what_a_worker_says_arrives_as_one_sentence(tmp_path, workers):
    with pytest.raises(TrainingError, match=r"^A hundred pictures in a row cannot be read\.$"):
        loop_in(tmp_path, Wrong(20, "is broken"), dataloader_num_workers=workers).train()


def test_data_that_end_are_told(tmp_path):
    loop = Loop(Reverse(), recipe(), Accelerator(cpu=True), lambda first, count: iter([torch.ones(3, 4)] * 3), tmp_path)
    with pytest.raises(TrainingError, match="The data ended at sample 9"):
        loop.train()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    """The second checkpoint's optimizers find no room; what was written of it is taken away."""
    loop = loop_in(tmp_path)
    loop.train(stop_at=5)

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "save", full)
        with pytest.raises(TrainingError, match=r"^The checkpoint of step 10 could not be written to .*: the disk is "
                                                r"full; checkpoint-5 is whole\. Make room, then go on with --resume"):
            loop.train()
    assert sorted(p.name for p in tmp_path.iterdir() if "checkpoint" in p.name) == ["checkpoint-5"]
    again = loop_in(tmp_path)
    again.resume("latest")
    again.train(stop_at=10)
    assert (tmp_path / "checkpoint-10" / "state.json").is_file()


def test_a_new_run_in_an_old_folder_is_the_one_that_is_resumed(tmp_path, capsys):
    loop_in(tmp_path).train(stop_at=15)
    loop_in(tmp_path).train(stop_at=5)
    assert "has checkpoints of an earlier run" in capsys.readouterr().err
    assert [p.name for p in checkpoints.all_checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-5"]
    again = loop_in(tmp_path)
    assert again.resume("latest") and again.step == 5
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [5, 5]
    again.train(stop_at=10)
    assert [p.name for p in checkpoints.all_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    loop_in(tmp_path).train(stop_at=5)
    file = tmp_path / "checkpoint-5" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"checkpoint-5 cannot be read: .*; delete it and resume from"):
        loop_in(tmp_path).resume("latest")


def test_a_collapsed_codebook_is_told_once_or_stops_the_run(tmp_path, capsys):
    task = Reverse()
    task.usage = 0.001
    loop_in(tmp_path / "a", task=task).train()
    assert capsys.readouterr().err.count("Codebook collapse at step 5: codebook_usage is 0.10%") == 1
    with pytest.raises(TrainingError, match="Codebook collapse at step 5"):
        loop_in(tmp_path / "b", task=task, stop_on_collapse=True).train()


def test_scripts_end_with_a_sentence_and_a_number(capsys):
    def fail(error: Exception) -> None:
        raise error

    assert run_script(lambda: None, "x") == 0
    assert run_script(lambda: fail(TrainingError("No.")), "x") == 1
    assert run_script(lambda: fail(Stopped("Stopped.", signal.SIGTERM)), "x") == 143
    assert capsys.readouterr().err == "x: No.\nx: Stopped.\n"


# ---- options --------------------------------------------------------------------------------------------------------

def test_players_take_turns_and_only_the_one_whose_turn_it_is_learns(tmp_path):
    class Watched(Reverse):
        def losses(self, player: str, batch: Tensor, step: int) -> dict[str, Tensor]:
            for name, module in self.players.items():
                assert all(p.requires_grad == (name == player) for p in module.parameters())
            return {} if player == "critic" and step < 3 else super().losses(player, batch, step)

    loop = loop_in(tmp_path, task=Watched())
    start = {n: p.detach().clone() for n, p in loop.task.players["critic"].named_parameters()}
    loop.train(stop_at=3)
    assert all(torch.equal(p, start[n]) for n, p in loop.task.players["critic"].named_parameters())
    loop.train(stop_at=4)
    assert not all(torch.equal(p, start[n]) for n, p in loop.task.players["critic"].named_parameters())


def test_one_step_equals_the_arithmetic_by_hand(tmp_path):
    """Two parts of three samples, AdamW's first step, clipping and weight decay written out; to 1e-7."""
    task = Reverse(noise=0.0, critic=False)
    linear = task.model[0]
    weight, bias = (p.detach().double().clone().requires_grad_() for p in linear.parameters())
    loop = loop_in(tmp_path, task=task, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.9, lr_warmup_steps=0)
    loop.train(stop_at=1)
    x = torch.stack([Numbers()[n] for n in range(6)]).double()
    gradients = torch.autograd.grad((x @ weight.T + bias - x.flip(1)).square().mean(), (weight, bias))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norm > 0.5
    for p, g, decay, mine in zip((weight, bias), gradients, (0.1, 0.0), linear.parameters(), strict=True):
        g = g * 0.5 / (norm + 1e-6)
        expected = p * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(mine.double(), expected, atol=1e-7, rtol=0)
    average, now = (next(iter(m.parameters())).double() for m in (loop.averaged, linear))
    torch.testing.assert_close(average, weight * 0.1 + now * 0.9, atol=1e-7, rtol=0)  # decay min(0.9, 1/10) at first


def test_mixed_precision_computes_in_bfloat16(tmp_path):
    class Typed(Reverse):
        def losses(self, player: str, batch: Tensor, step: int) -> dict[str, Tensor]:
            assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            return super().losses(player, batch, step)

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loop = Loop(Typed(), recipe(max_train_steps=2, mixed_precision="bf16"), accelerator, Numbers(), tmp_path)
    loop.train()
    AcceleratorState._reset_state()
    assert next(loop.task.model.parameters()).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    class Blocks(Reverse):
        blocks = (nn.Linear,)

    loop_in(tmp_path / "plain", task=Blocks()).train()
    loop_in(tmp_path / "again", task=Blocks(), gradient_checkpointing=True).train()
    assert_equal(tensors(tmp_path / "plain"), tensors(tmp_path / "again"))
    with pytest.raises(ConfigError, match="Sequential has no gradient checkpointing"):
        loop_in(tmp_path, gradient_checkpointing=True)


class Line(nn.Linear):
    """torch.compile passes over modules whose forward pass is torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Lines(Reverse):
    def __init__(self) -> None:
        super().__init__(noise=0.0)
        self.players = {"model": Line(4, 4), "critic": Line(4, 1)}


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")


@needs_compiler
def test_compiled_players_learn_the_same_and_keep_their_names(tmp_path):
    """Weights after two steps to 1e-6: kernels add in another order. Names in checkpoints and models stay."""
    torch._dynamo.utils.counters.clear()
    for name, compiled in (("eager", False), ("compiled", True)):
        loop_in(tmp_path / name, task=Lines(), max_train_steps=2, compile=compiled).run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # the model's and the critic's
    eager, compiled = (tensors(tmp_path / name, 2) for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys() and not any("_orig_mod" in name for name in compiled)
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-6, rtol=0, msg=name)
    finished = torch.load(tmp_path / "compiled" / "model" / "weights.pt", weights_only=True)
    assert finished.keys() == {"weight", "bias"}
    logs = [json.loads((tmp_path / name / "train.jsonl").read_text()) for name in ("eager", "compiled")]
    assert logs[0]["model/error"] == pytest.approx(logs[1]["model/error"], abs=1e-5)


def test_a_compiler_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(TrainingError, match=r"^torch\.compile failed: .*; leave --compile out\.$"):
        loop_in(tmp_path, task=Lines(), compile=True).train()


# ---- float16 --------------------------------------------------------------------------------------------------------

class Overflowing(Reverse):
    """Its loss is beyond float32 times any loss scale above 2^`limit`, as float16's is beyond 65504."""

    def __init__(self, limit: int) -> None:
        super().__init__(noise=0.0, critic=False)
        self.limit = limit

    def losses(self, player: str, batch: Tensor, step: int) -> dict[str, Tensor]:
        error = super().losses(player, batch, step)["error"]
        return {"error": error, "large": error * 0 + _Gate.apply(error, 2.0**self.limit)}


class _Gate(torch.autograd.Function):
    """Nothing forward; backward, a gradient above the limit becomes infinite."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x * 0

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(gradient.abs() > ctx.limit, torch.inf, 0.0) + gradient * 0, None


def scaled(folder: Path, limit: int, **changes) -> Loop:
    """A loop whose scaler works as on a GPU; numbers are float32, for there is no float16 autocast here."""
    made = dict(mixed_precision="fp16", logging_steps=1, gradient_accumulation_steps=1, lr_scheduler="constant",
                lr_warmup_steps=0, weight_decay=0.0)
    loop = Loop(Overflowing(limit), recipe(**{**made, **changes}), Accelerator(cpu=True), Numbers(), folder)
    assert loop.scaler is not None and loop.scaler.get_scale() == 2.0**16
    return loop


def test_float16_steps_beyond_its_range_are_skipped_and_counted(tmp_path):
    """Three halvings until the scale fits; then every step is what it is without a scale, to 1e-6."""
    loop = scaled(tmp_path / "a", limit=13, max_train_steps=8)
    start = {name: p.detach().clone() for name, p in loop.task.model.named_parameters()}
    loop.train(stop_at=3)
    assert all(torch.equal(p, start[name]) for name, p in loop.task.model.named_parameters())
    loop.train(stop_at=5)
    again = scaled(tmp_path / "a", limit=13, max_train_steps=8)  # the scale is in the checkpoint
    again.resume("latest")
    assert again.scaler is not None and again.scaler.get_scale() == 2.0**13
    again.train()
    log = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "a" / "train.jsonl").open()]
    assert [line["model/skipped_steps" if "model/skipped_steps" in line else "skipped_steps"] for line in log] == [
        1, 1, 1, 0, 0, 0, 0, 0]
    assert [line["loss_scale"] for line in log] == [2.0**15, 2.0**14, 2.0**13] + [2.0**13] * 5
    assert all("model/grad_norm" in line for line in log[3:])

    class Later(Numbers):
        def __getitem__(self, n: int) -> Tensor:
            return super().__getitem__(n + 3 * 3)  # without the samples of the three steps

    plain = Loop(Overflowing(99), recipe(max_train_steps=5, gradient_accumulation_steps=1, lr_scheduler="constant",
                                         lr_warmup_steps=0), Accelerator(cpu=True), Later(), tmp_path / "b")
    plain.train()
    for mine, its in zip(again.task.model.parameters(), plain.task.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=0)


def test_float16_that_never_fits_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"Step 21 has no finite loss or gradient: model/grad_norm is"):
        scaled(tmp_path, limit=-99, max_train_steps=40, checkpointing_steps=100).train()


def test_float16_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"^--mixed_precision fp16 needs a GPU: here, take bf16 or no\.$"):
        make_accelerator(recipe(mixed_precision="fp16"), tmp_path)


# ---- trackers -------------------------------------------------------------------------------------------------------

def test_tensorboard_gets_numbers_grids_and_hyper_parameters(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = recipe(report_to="tensorboard", max_train_steps=10)
    Loop(Reverse(), chosen, make_accelerator(chosen, tmp_path), Numbers(), tmp_path).train()
    events = EventAccumulator(str(tmp_path / "logs" / "vtc")).Reload()
    assert {"model/error", "critic/critic", "model/grad_norm", "learning_rate", "codebook_usage",
            "validation/noise"} <= set(events.Tags()["scalars"])
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("learning_rate")] == [
        (step, chosen.learning_rate_at(step - 1)) for step in (5, 10)]
    (grid,) = events.Images("samples")
    assert (grid.step, grid.width, grid.height) == (10, 8, 8)  # three pictures of four pixels, two by two
    (parameters,) = (tmp_path / "logs" / "vtc").glob("*/hparams.yml")
    assert read_config(parameters)["max_train_steps"] == 10


def test_wandb_gets_them_when_it_is_asked_for(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged: list[tuple[dict, int]] = []
    asked: dict = {}
    told: dict = {}
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)),
                          finish=lambda: logged.append(({}, -1)))
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings) or run)
    monkeypatch.setattr(wandb, "config", SimpleNamespace(update=lambda values, **_: told.update(values)))
    chosen = recipe(report_to="wandb", max_train_steps=10, tracker_project_name="reverse")
    Loop(Reverse(), chosen, make_accelerator(chosen, tmp_path / "run-3"), Numbers(), tmp_path / "run-3").train()
    assert asked == {"project": "reverse", "name": "run-3", "dir": str(tmp_path / "run-3")}
    assert [step for values, step in logged if "learning_rate" in values] == [5, 10]
    assert {name for values, step in logged if step == 10 for name in values} >= {"validation/noise", "samples"}
    assert told["max_train_steps"] == 10 and logged[-1] == ({}, -1)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "is_wandb_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^--report_to wandb needs the package wandb, which is not installed: pip"):
        make_accelerator(recipe(report_to="wandb"), tmp_path)


def test_weights_that_do_not_learn_are_kept_to_the_sign_of_their_zeros():
    """Fingerprints are of bytes: a frozen encoder's tokens would count as those of another."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False).weight.fill_(-0.0)
    average = Average(model, 0.9)
    with torch.no_grad():
        model[1].weight.add_(1)
    average.update(model)
    assert average.module[0].weight.signbit().all()
    assert (average.module[1].weight < model[1].weight).all()


def test_without_an_average_the_model_itself_is_saved(tmp_path):
    loop = loop_in(tmp_path, ema_decay=0.0)
    assert loop.train() is loop.task.model
    assert not (tmp_path / "checkpoint-20" / "average.safetensors").exists()


def test_data_may_be_whole_batches_or_a_function(tmp_path):
    class Batches(Dataset[Tensor]):
        whole_batches = True

        def __getitem__(self, n: int) -> Tensor:
            return torch.stack([Numbers()[3 * n + i] for i in range(3)])

    loop_in(tmp_path / "samples").train()
    loop_in(tmp_path / "batches", Batches()).train()

    def function(first: int, count: int):
        return (torch.stack([Numbers()[first + 3 * b + i] for i in range(3)]) for b in range(count))

    Loop(Reverse(), recipe(), Accelerator(cpu=True), function, tmp_path / "function").train()
    assert_equal(tensors(tmp_path / "samples"), tensors(tmp_path / "batches"))
    assert_equal(tensors(tmp_path / "samples"), tensors(tmp_path / "function"))


def test_a_grid_of_pictures():
    pictures = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2) / 10
    grid = picture_grid(pictures)
    assert grid.shape == (3, 4, 6)
    torch.testing.assert_close(grid[0, ::2, ::2], torch.tensor([[0, 0.1, 0.2], [0.3, 0.4, 1.0]]))


# ---- recipes --------------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    @dataclass
    class Mine(Recipe):
        weight: float = flag(1.5, "of a term")
        sides: tuple[int, ...] = flag((1, 2), "of grids")

    made = argparse.ArgumentParser(prog="x")
    made.add_argument("--data", required=True)
    add_recipe_flags(made, Mine)
    made.set_defaults(kind=Mine)
    return made


def test_flags_come_from_the_file_and_the_command_line_overrides_it(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-3\nweight: 2\nsides: [1, 4]\ndata: there\ncompile: true\nseed: 5\n")
    args = parse_recipe_args(parser(), ["--config", str(file), "--seed", "6"])
    made = recipe_from(args.kind, args)
    assert (made.learning_rate, made.weight, made.sides, made.compile, made.seed) == (1e-3, 2.0, (1, 4), True, 6)
    assert args.data == "there"
    args = parse_recipe_args(parser(), ["--data", "x", "--sides", "3", "5", "--no-compile"])
    assert recipe_from(args.kind, args).sides == (3, 5)
    for text, message in (("leaning_rate: 1", "'leaning_rate', which this script does not have"),
                          ("seed: five", "sets seed to 'five'"), ("lr_scheduler: round", "it is one of cosine, linear"),
                          ("compile: 1", "it is true or false"), ("- 1", "no list of 'name: value'")):
        file.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            parse_recipe_args(parser(), ["--config", str(file), "--data", "x"])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_learning_rate_warms_up_and_ends_at_its_floor():
    made = Recipe(max_train_steps=100, lr_warmup_steps=10, learning_rate=1e-3, final_learning_rate=1e-5)
    assert made.learning_rate_at(0) == pytest.approx(1e-4)
    assert made.learning_rate_at(9) == made.learning_rate_at(10) == pytest.approx(1e-3)
    assert made.learning_rate_at(55) == pytest.approx((1e-3 + 1e-5) / 2)
    assert made.learning_rate_at(100) == pytest.approx(1e-5)
    assert Recipe(lr_scheduler="constant").learning_rate_at(9999) == 1e-4
    line = Recipe(max_train_steps=100, lr_scheduler="linear", learning_rate=1.0)
    assert line.learning_rate_at(25) == pytest.approx(0.75)


@pytest.mark.parametrize(("name", "value"), [("max_train_steps", 0), ("ema_decay", 1.0), ("seed", -1),
                                             ("learning_rate", math.nan), ("report_to", "paper")])
def test_recipes_that_cannot_be_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"--{name} "):
        Recipe(**{name: value})
