"""scripts/shard_pictures.py: every picture once, small, in shards that training reads."""

from __future__ import annotations

import io
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from vtc.training.sources import open_pictures


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of two classes, each of a colour of its own, and a broken one."""
    for n in range(12):
        path = tmp_path / f"photos/class{n % 2}/{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40 + 10 * n, 200, 3), (20 * n, 100, 255 - 20 * n), dtype=np.uint8)).save(path)
    (tmp_path / "photos/class0/broken.png").write_bytes(b"not a picture")
    return tmp_path


def test_every_picture_once_with_its_label_and_no_larger_than_asked(folder, capsys):
    script = import_module("scripts.shard_pictures")

    def run(output: str) -> list[bytes]:
        assert script.main(["--train_data_dir", str(folder / "photos"), "--output_dir", str(folder / output), "--side",
                            "64", "--shard_bytes", "24000", "--quality", "95", "--quiet"]) == 0
        return [path.read_bytes() for path in sorted((folder / output).glob("*.tar"))]

    shards = run("a")
    assert "left out" in capsys.readouterr().err
    assert len(shards) > 1 and max(map(len, shards)) <= 24000
    assert shards == run("b")
    pictures = open_pictures(str(folder / "a/*.tar"))
    assert len(pictures) == 12
    seen = []
    for n in range(12):
        _, label, data = pictures.read(n)
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        number = round(np.asarray(image)[..., 0].mean() / 20)
        seen.append(number)
        assert label == number % 2 and min(image.size) == min(64, 40 + 10 * number)
    assert sorted(seen) == list(range(12)) and seen != list(range(12))


def test_mistakes_are_told_in_a_sentence(folder, capsys):
    script = import_module("scripts.shard_pictures")
    common = ["--train_data_dir", str(folder / "photos"), "--output_dir", str(folder / "x"), "--quiet"]
    assert script.main([*common, "--side", "3"]) == 1
    assert "--side of at least 16" in capsys.readouterr().err
    assert script.main(["--train_data_dir", str(folder / "none"), "--output_dir", str(folder / "x")]) == 1
    assert capsys.readouterr().err.startswith("shard_pictures: ")
