"""Token shards: what is stored, a kill -9 in the middle, several processes, views, the tokenizer that is refused."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_tokenizers import TinyGrid, TinyGroups, TinyScales
from vtc.errors import ConfigError, FileError, ModelError, TrainingError
from vtc.images import load_image
from vtc.models import load_tokenizer
from vtc.training.sources import NO_LABEL, pack_pictures
from vtc.training.token_shards import (
    Sample,
    ShardWriter,
    TokenSet,
    TokenShards,
    TrainingTokens,
    encoding_fingerprint,
    member_key,
)
from vtc.training.tokenizing import DatasetTokenizer, center_square, views_of


class Memory:
    """Pictures in memory: key, label, the bytes of a PNG."""

    def __init__(self, pictures: list[tuple[str, int, bytes]]) -> None:
        self.pictures, self.reads = pictures, list[int]()

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, n: int) -> tuple[str, int, bytes]:
        self.reads.append(n)
        return self.pictures[n]


def png(seed: int, height: int = 40, width: int = 56) -> bytes:
    stream = io.BytesIO()
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(stream, "PNG")
    return stream.getvalue()


def source(count: int = 11, broken: tuple[int, ...] = ()) -> Memory:
    return Memory([(f"class{n % 3}/{n}.png", n % 3, b"no picture" if n in broken else png(n)) for n in range(count)])


def maker(folder: Path, pictures: Memory, tokenizer=None, **settings) -> DatasetTokenizer:
    settings = {"resolution": 32, "shard_size": 4, "batch_size": 3, **settings}
    return DatasetTokenizer(pictures, tokenizer or TinyGrid(), folder, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("storage", ["safetensors", "webdataset"])
@pytest.mark.parametrize("tokenizer", [TinyGrid(), TinyGroups(), TinyScales()], ids=lambda t: type(t).__name__)
def test_a_stored_picture_has_the_tokens_of_the_tokenizer(tmp_path, tokenizer, storage):
    pictures = source()
    done = maker(tmp_path, pictures, tokenizer, views="flip", storage=storage).run(quiet=True)
    assert (done.pictures, done.shards, done.kept, done.problems) == (11, 3, 0, {})
    tokens = TokenShards(tmp_path, tokenizer, labels=True)
    assert len(tokens) == 11 and tokens.labels.tolist() == [n % 3 for n in range(11)]
    for n in (0, 3, 4, 10):
        image = torch.from_numpy(center_square(load_image(pictures.pictures[n][2]).pixels, 32)).permute(2, 0, 1) / 255
        for view, seen in enumerate((image, image.flip(-1))):
            indices, label = tokens.sample(n, view)
            expected = tokenizer.encode(seen[None])
            assert label == n % 3 and indices.dtype == torch.int64
            assert torch.equal(indices, expected.indices[0]), (n, view)
    assert tokens.facts.layout == expected.layout
    assert tokenizer.decode(tokens.tokens(torch.stack([tokens[0][0], tokens[7][0]]))).shape == (2, 3, 32, 32)
    assert Path(tokens.key(5)).stem == "5"
    with pytest.raises(IndexError):
        tokens[11]


def test_tar_shards_are_webdatasets_with_a_description_that_its_readers_pass_over(tmp_path):
    maker(tmp_path, source(), storage="webdataset").run(quiet=True)
    with tarfile.open(tmp_path / "tokens-00002-of-00003.tar") as tar:
        names = tar.getnames()
        assert names == ["__vtc__/about.json", "class2/8.tokens.npy", "class2/8.cls", "class0/9.tokens.npy",
                         "class0/9.cls", "class1/10.tokens.npy", "class1/10.cls"]
        array = np.load(io.BytesIO(tar.extractfile("class0/9.tokens.npy").read()))
        assert array.shape == (1, 4, 1) and array.dtype == np.uint8  # 64 words
    assert member_key("a.b/c.d.png") == "a.b/c_d"


def test_pictures_of_one_name_but_for_the_suffix_stay_apart(tmp_path):
    pictures = Memory([("a.png", 0, png(0)), ("a.jpg", 1, png(1)), ("a.webp", 2, png(2))])
    maker(tmp_path, pictures, storage="webdataset").run(quiet=True)
    tokens = TokenShards(tmp_path)
    assert [tokens.key(n) for n in range(3)] == ["a", "a-1", "a-2"] and tokens.labels.tolist() == [0, 1, 2]


class Killed(TinyGrid):
    """After so many batches its process is no more; no handler and no `finally` runs."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def encode(self, images):
        if not self.calls:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls -= 1
        return super().encode(images)


Killed.__name__ = "TinyGrid"


def test_runs_that_are_killed_go_on_behind_their_last_batch_and_make_the_same_bytes(tmp_path):
    maker(tmp_path / "whole", source(broken=(5,)), batch_size=2).run(quiet=True)
    parts = tmp_path / "parts"
    for calls in (1, 2, 0, 1):  # of six batches
        process = multiprocessing.get_context("fork").Process(
            target=maker(parts, source(broken=(5,)), Killed(calls), batch_size=2).run, kwargs={"quiet": True})
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    done = maker(parts, source(broken=(5,)), batch_size=2).run(quiet=True)
    assert (done.kept, done.pictures) == (8, 3)
    assert contents(parts) == contents(tmp_path / "whole")
    assert TokenShards(parts).left_out.keys() == {"class2/5.png"}


def test_a_journal_that_was_cut_or_changed_is_used_up_to_there(tmp_path):
    facts = TokenSet.of(TinyGrid(), 32, 1, 4, 4, {})
    indices = np.arange(4, dtype=np.uint8).reshape(1, 4, 1)
    samples = [Sample(f"{n}", n, indices + n) if n != 2 else Sample("2", 2, None, "is broken") for n in range(4)]
    writer = ShardWriter(facts, tmp_path, 0, "safetensors")
    writer.append(samples)
    writer._file.close()
    whole = writer.journal.read_bytes()

    def left(data: bytes, facts: TokenSet = facts) -> list[Sample]:
        writer.journal.write_bytes(data)
        again = ShardWriter(facts, tmp_path, 0, "safetensors")
        again._file.close()
        return again.samples

    for found, sample in zip(left(whole), samples, strict=True):
        assert (found.key, found.label, found.problem) == (sample.key, sample.label, sample.problem)
        assert (found.indices is None) == (sample.indices is None)
        assert found.indices is None or np.array_equal(found.indices, sample.indices)
    lengths = [len(left(whole[:end])) for end in [*range(0, len(whole), 37), len(whole) - 1, len(whole)]]
    assert lengths == sorted(lengths) and lengths[-1] == 4 and lengths[-2] == 3
    middle = len(whole) // 2 + 60
    assert len(left(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])) < 4
    assert left(whole, TokenSet.of(TinyGrid(), 48, 1, 4, 4, {})) == []


def test_two_writers_of_one_shard_are_refused(tmp_path):
    facts = TokenSet.of(TinyGrid(), 32, 1, 4, 4, {})
    first = ShardWriter(facts, tmp_path, 0, "safetensors")
    with pytest.raises(FileError, match="another process"):
        ShardWriter(facts, tmp_path, 0, "safetensors")
    first._file.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux does")
def test_many_shards_need_no_more_open_files_than_one(tmp_path):
    class Counting(TinyGrid):
        most = 0

        def encode(self, images):
            Counting.most = max(Counting.most, len(os.listdir("/proc/self/fd")))
            return super().encode(images)

    before = len(os.listdir("/proc/self/fd"))
    maker(tmp_path, source(30), Counting(), shard_size=1).run(quiet=True)
    assert before < Counting.most <= before + 3


def test_processes_share_the_shards_and_their_number_changes_nothing(tmp_path):
    maker(tmp_path / "one", source()).run(quiet=True)
    made = [maker(tmp_path / "two", source()).run(rank, 2, quiet=True).shards for rank in (1, 0)]
    assert made == [1, 2] and contents(tmp_path / "one") == contents(tmp_path / "two")


def test_workers_read_the_same_pictures(tmp_path):
    maker(tmp_path / "none", source()).run(quiet=True)
    maker(tmp_path / "two", source(), num_workers=2).run(quiet=True)
    assert contents(tmp_path / "none") == contents(tmp_path / "two")


def test_ten_crops_are_four_corners_the_middle_and_their_mirror_images():
    pixels = np.arange(20 * 20, dtype=np.uint8).reshape(20, 20, 1).repeat(3, 2)
    views = views_of(pixels, 16, "ten_crop", crop_range=1.25)
    assert views.shape == (10, 3, 16, 16)
    for view, (y, x) in zip(views, [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)], strict=False):
        assert np.array_equal(view, pixels[y : y + 16, x : x + 16].transpose(2, 0, 1))
    assert np.array_equal(views[5:], views[:5, ..., ::-1])


def test_the_square_in_the_middle_is_that_of_the_resized_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    assert np.array_equal(center_square(pixels, 20), pixels[:, 20:40])
    small = np.array(Image.fromarray(pixels).resize((30, 10), Image.Resampling.LANCZOS))
    assert np.abs(center_square(pixels, 10).astype(int) - small[:, 10:20]).max() <= 1


def test_training_sees_every_picture_once_an_epoch_in_either_view(tmp_path):
    maker(tmp_path, source(), views="flip").run(quiet=True)
    shards = TokenShards(tmp_path)
    tokens = TrainingTokens(shards, seed=3)
    for epoch in range(2):
        labels = [tokens[11 * epoch + n][1] for n in range(11)]
        assert sorted(labels) == sorted(shards.labels.tolist())
    assert torch.equal(tokens[5][0], TrainingTokens(shards, seed=3)[5][0])
    both = {tuple(shards.sample(4, view)[0].flatten().tolist()) for view in (0, 1)}
    where = next(n for n in range(11) if tuple(tokens[n][0].flatten().tolist()) in both)
    seen = {tuple(tokens[n][0].flatten().tolist()) for n in range(1100)}
    assert len(both) == 2 and both <= seen and where < 11


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    maker(tmp_path, source()).run(quiet=True)
    other = TinyGrid()
    other.get_buffer("codebook")[0, 0] += 0.25
    with pytest.raises(ModelError, match="were made by a TinyGrid with the fingerprint"):
        TokenShards(tmp_path, other)
    with pytest.raises(ConfigError, match="another encoding"):
        maker(tmp_path, source(), other).run(quiet=True)
    with pytest.raises(ConfigError, match="another views"):
        maker(tmp_path, source(), views="flip").run(quiet=True)
    with pytest.raises(ConfigError, match="another settings"):
        maker(tmp_path, Memory([("other", 0, png(1))] * 11)).run(quiet=True)


def test_a_decoder_that_was_trained_on_keeps_the_tokens():
    from vtc.tokenizers.vqgan import VQGAN

    torch.manual_seed(0)
    model = VQGAN(codebook_size=8, embed_dim=4, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=4,
                  attention_levels=())
    before = encoding_fingerprint(model)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    assert encoding_fingerprint(model) == before
    with torch.no_grad():
        next(model.quantizer.parameters()).add_(1)
    assert encoding_fingerprint(model) != before
    changed = encoding_fingerprint(model)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    assert encoding_fingerprint(model) != changed


def test_missing_cut_and_doubled_shards_are_named(tmp_path):
    maker(tmp_path, source()).run(quiet=True)
    path = tmp_path / "tokens-00001-of-00003.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(ModelError, match=r"00001-of-00003\.safetensors cannot be read"):
        TokenShards(tmp_path)
    path.unlink()
    with pytest.raises(FileError, match="lacks 1 of 3 shards"):
        TokenShards(tmp_path)
    with pytest.raises(FileError, match="no token shards"):
        TokenShards(tmp_path / "nowhere")
    path.write_bytes(data)
    maker(tmp_path, source(), storage="webdataset").run(quiet=True)
    with pytest.raises(FileError, match="twice"):
        TokenShards(tmp_path)


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(TrainingError, match=r"None of 2 pictures could be read; class0/0\.png"):
        maker(tmp_path / "none", source(2, broken=(0, 1))).run(quiet=True)
    done = maker(tmp_path / "some", source(5, broken=(0, 4))).run(quiet=True)
    assert done.problems.keys() == {"class0/0.png", "class1/4.png"}
    tokens = TokenShards(tmp_path / "some")
    assert [tokens.key(n) for n in range(3)] == ["class1/1.png", "class2/2.png", "class0/3.png"]
    maker(tmp_path / "plain", Memory([("a", NO_LABEL, png(0))])).run(quiet=True)
    with pytest.raises(ConfigError, match="have no label"):
        TokenShards(tmp_path / "plain", labels=True)


# ---- the script -----------------------------------------------------------------------------------------------------

def folder_of(path: Path, count: int) -> Path:
    for n in range(count):
        file = path / f"class{n % 2}" / f"{n:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(n, 64, 64))
    return path


def command(pictures: Path, out: Path, *more: str) -> list[str]:
    return ["--tokenizer", "localvq-f16-8192-r3", "--train_data_dir", str(pictures), "--output_dir", str(out),
            "--resolution", "64", "--shard_size", "2", "--batch_size", "4", "--num_workers", "0", "--quiet", *more]


def test_two_processes_of_the_script_make_what_one_makes_and_a_second_run_makes_nothing(tmp_path, capsys):
    pictures = folder_of(tmp_path / "pictures", 6)
    one, two = tmp_path / "one", tmp_path / "two"
    script = import_module("scripts.tokenize_dataset")
    for _ in range(2):
        script.main([part for part in command(pictures, one) if part != "--quiet"])
    said = capsys.readouterr().err
    assert "6 pictures in 3 shards" in said and "0 pictures in 0 shards" in said and "6 were there already" in said
    for rank in ("0", "1"):
        script.main(command(pictures, two, "--rank", rank, "--world_size", "2"))
    assert contents(one) == contents(two)
    tokens = TokenShards(one, load_tokenizer(), labels=True)
    assert tokens.labels.tolist() == [0] * 3 + [1] * 3 and tokens.facts.layout.scales == ((4, 4),)


def test_the_script_reads_packs_and_webdataset_shards_alike(tmp_path):
    items = [(png(n, 32, 32), n % 2) for n in range(4)]
    pack_pictures(tmp_path / "pack.npz", {"train": items}, ["even", "odd"])
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        for n, (data, label) in enumerate(items):
            for suffix, content in (("png", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    found = []
    for where in ("pack.npz", "shards"):
        import_module("scripts.tokenize_dataset").main(command(tmp_path / where, tmp_path / f"out-{where}"))
        tokens = TokenShards(tmp_path / f"out-{where}", labels=True)
        found.append([(indices.flatten().tolist(), label) for indices, label in (tokens[n] for n in range(4))])
    assert found[0] == found[1] and [label for _, label in found[0]] == [0, 1, 0, 1]


def test_mistakes_of_the_script_are_usage_errors(tmp_path, capsys):
    script = import_module("scripts.tokenize_dataset")
    for arguments in (["--rank", "1"], ["--rank", "2", "--world_size", "2"], ["--views", "all"], ["--device", "tpu"]):
        with pytest.raises(SystemExit, match="2"):
            script.main(command(tmp_path, tmp_path, *arguments))
    with pytest.raises(ConfigError, match="no pictures"):
        script.main(command(tmp_path, tmp_path / "out"))
    assert "usage" in capsys.readouterr().err
