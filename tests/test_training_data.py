"""Pictures for training: where they come from, in which order they are seen, and what becomes of broken ones."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vtc.errors import ConfigError, FileError, TrainingError
from vtc.training.data import RandomCrops, image_files
from vtc.training.sources import (
    FolderPictures,
    PackedPictures,
    ShardPictures,
    open_pictures,
    pack_pictures,
)


def png(value: int, width: int = 40, height: int = 30) -> bytes:
    """A picture whose pixels all have one value."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def test_training_sees_pictures_as_everything_else_does(tmp_path):
    """Upright, and 16 bits of grey as grey."""
    sideways = Image.new("RGB", (40, 30), (200, 0, 0))
    sideways.paste((0, 0, 200), (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    sideways.save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(np.full((30, 40), 32768, dtype=np.uint16)).save(tmp_path / "b.png")
    crops = [RandomCrops([tmp_path / name], 30, 0, min_scale=1) for name in ("a.jpg", "b.png")]
    turned = crops[0][0].float()
    assert turned[2, :8].mean() > 150 > 60 > turned[2, -8:].mean()  # blue above red, no longer beside it
    assert abs(crops[1][0].float().mean() - 128) < 2


@pytest.fixture
def photographs(tmp_path):
    """Four pictures of noise with an edge; one smaller than the crop."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(80, 100), (64, 64), (90, 70), (40, 60)]):
        pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        pixels[:, width // 2 :] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# ---- order ----------------------------------------------------------------------------------------------------------

def test_a_numbered_crop_is_always_the_same_and_every_epoch_shows_every_picture(photographs):
    crops = RandomCrops(image_files(photographs), 32, seed=3)
    first = crops[5]
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, RandomCrops(image_files(photographs), 32, seed=3)[5])
    assert not torch.equal(first, RandomCrops(image_files(photographs), 32, seed=4)[5])
    epochs = [[crops.numbering(4 * e + n)[2][crops.numbering(4 * e + n)[1]] for n in range(4)] for e in range(6)]
    assert all(sorted(e) == [0, 1, 2, 3] for e in epochs) and len(set(map(tuple, epochs))) > 1
    assert crops.numbering(9)[:2] == (2, 1)


def test_a_run_begins_anywhere_without_reading_what_came_before(tmp_path):
    class Counted(FolderPictures):
        def read(self, n):
            self.reads = [*getattr(self, "reads", []), n]
            return super().read(n)

    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    source = Counted(image_files(tmp_path))
    crops = RandomCrops(source, 16, seed=0)
    crops[10**12 + 3]
    assert len(source.reads) == 1


# ---- broken pictures ------------------------------------------------------------------------------------------------

def test_a_broken_picture_is_named_counted_and_replaced_by_the_next(tmp_path, caplog):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(10 * i))
    whole = png(99)
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    crops = RandomCrops(FolderPictures(image_files(tmp_path), tmp_path), 16, seed=1)
    order = crops.numbering(0)[2].tolist()
    place = order.index(2)
    assert crops[place].unique().tolist() == [10 * order[(place + 1) % 4]]
    assert "2.png is skipped: " in caplog.text
    [crops[n] for n in range(12)]
    assert crops.broken == 1 and len(caplog.records) == 1
    # workers count together; which of them meets the picture does not change the batch
    others = RandomCrops(FolderPictures(image_files(tmp_path), tmp_path), 16, seed=1)
    batches = list(DataLoader(others, batch_size=4, sampler=range(8), num_workers=1))
    assert torch.equal(torch.cat(batches), torch.stack([crops[n] for n in range(8)])) and others.broken == 1


def test_a_run_gives_up_where_no_picture_can_be_read(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"^3 pictures in a row cannot be read, the last one is .*\.jpg: look at"):
        RandomCrops(image_files(tmp_path), 16, seed=0)[0]
    with pytest.raises(ConfigError, match="no pictures to train on"):
        RandomCrops([], 16, seed=0)


# ---- sources --------------------------------------------------------------------------------------------------------

def test_a_folder_has_classes_where_it_has_class_folders(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "train/dog/deep/c.PNG", "val/cat/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    source = open_pictures(tmp_path, "train")
    assert source.classes == ("cat", "dog")
    assert [source.read(n)[:2] for n in range(len(source))] == [("cat/a.png", 0), ("dog/b.png", 1),
                                                                ("dog/deep/c.PNG", 1)]
    flat = open_pictures(tmp_path / "val" / "cat", "train")
    assert flat.classes == () and flat.read(0)[1] == -1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no pictures in"):
        open_pictures(tmp_path / "empty")
    with pytest.raises(ConfigError, match="give a folder"):
        open_pictures(tmp_path / "nowhere")


def test_a_pack_gives_files_and_labels_of_a_split(tmp_path):
    path = tmp_path / "p.npz"
    pack_pictures(path, {"train": [(png(1), 1), (png(2), 0)], "val": [(png(3), 1)]}, ["a", "b"])
    source = open_pictures(path, "train")
    assert len(source) == 2 and source.classes == ("a", "b")
    assert source.read(0) == ("p.npz/train/0", 1, png(1)) and source.read(1)[2] == png(2)
    assert PackedPictures(path, "val").read(0)[2] == png(3)
    assert RandomCrops(source, 16, seed=0)[0].unique().tolist() in ([1], [2])
    with pytest.raises(FileError, match="no pack of pictures with a split 'test'"):
        open_pictures(path, "test")
    arrays = dict(np.load(path))
    np.savez(tmp_path / "cut.npz", **{**arrays, "train_bytes": arrays["train_bytes"][:50]})
    with pytest.raises(FileError, match="damaged pack"):
        open_pictures(tmp_path / "cut.npz")


def test_shards_are_read_where_the_pictures_lie(tmp_path):
    shard(tmp_path / "s-00.tar", [("a.png", png(1)), ("a.cls", b"1"), ("a.json", b"{}"), ("b.cls", b" 0\n"),
                                  ("b.png", png(2)), ("../evil.png", png(9))])
    shard(tmp_path / "s-01.tar", [("a.jpg", png(3))])
    for where in (tmp_path, tmp_path / "s-{00..01}.tar", str(tmp_path / "s-*.tar")):
        source = open_pictures(where)
        assert [source.read(n) for n in range(len(source))] == [
            ("s-00.tar/a.png", 1, png(1)), ("s-00.tar/b.png", 0, png(2)), ("s-01.tar/a.jpg", -1, png(3))]
        assert source.classes == ("0", "1")
    assert len(open_pictures(tmp_path / "s-01.tar")) == 1
    with pytest.raises(FileError, match=r"1 of 2 shards are missing, the first is .*s-02\.tar"):
        open_pictures(str(tmp_path / "s-{01..02}.tar"))
    shard(tmp_path / "bad.tar", [("a.png", png(1)), ("a.cls", b"cat")])
    with pytest.raises(FileError, match=r"bad\.tar/a\.cls is no number of a class"):
        ShardPictures([tmp_path / "bad.tar"])
    data = (tmp_path / "s-01.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(data[:600])
    with pytest.raises(FileError, match="is cut"):
        ShardPictures([tmp_path / "bad.tar"])


def test_a_hugging_face_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
                                  "text": datasets.Value("string")})
    rows = {"img": [{"bytes": png(5), "path": None}, {"bytes": png(6), "path": None}], "label": [1, 0],
            "text": ["x", "y"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "d")
    source = open_pictures(tmp_path / "d")
    assert source.classes == ("a", "b")
    assert [source.read(n)[1:] for n in (0, 1)] == [(1, png(5)), (0, png(6))]
    assert open_pictures(tmp_path / "d", label_column="label").read(0)[1] == 1
    with pytest.raises(ConfigError, match="has the splits train, not 'test'"):
        open_pictures(tmp_path / "d", "test")
    with pytest.raises(ConfigError, match="has the picture columns img, not 'picture'"):
        open_pictures(tmp_path / "d", image_column="picture")
