"""scripts/evaluate_fidelity.py, whole: on a made-up TokBench, and with a tiny random model on made-up pictures."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from tests.shared import ROOT
from vtc.eval.engines.base import EngineInfo, FaceEngine, TextEngine
from vtc.images import save_image
from vtc.tokenizers.local_vq import LocalVQ

_spec = importlib.util.spec_from_file_location("evaluate_fidelity", ROOT / "scripts" / "evaluate_fidelity.py")
assert _spec is not None and _spec.loader is not None
evaluate_fidelity = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(evaluate_fidelity)


class Brightness(TextEngine):
    """Reads "bright" or "dark"."""

    info = EngineInfo("rapidocr", "stand-in", "none")

    def read(self, crops, truths=None):
        return ["bright" if crop.mean() > 127 else "dark" for crop in crops]


class Colour(FaceEngine):
    """A face is its mean colour; every picture has one, in its upper left quarter."""

    info = EngineInfo("dlib", "stand-in", "none")
    measure = "distance"
    match_threshold = 40.0

    def detect(self, pixels):
        return [(0.0, 0.0, pixels.shape[1] / 2, pixels.shape[0] / 2)]

    def align(self, original, face):
        return face.box or (0, 0, *face.keypoints[4])

    def embed(self, pixels, alignment):
        x1, y1, x2, y2 = (int(v) for v in alignment)
        return pixels[y1:y2, x1:x2].mean((0, 1)).astype(np.float64)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(evaluate_fidelity, "load_text_engine", lambda name, weights=None: Brightness())
    monkeypatch.setattr(evaluate_fidelity, "load_face_engine", lambda name, weights=None: Colour())


def half_bright() -> np.ndarray:
    """60 rows, 100 columns, the left half bright."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :50] = 220
    return pixels


@pytest.fixture
def tokbench(tmp_path):
    """Two sets of one picture with two words each, one rebuilt in the negative, and a film of three frames."""
    words = [{"bbox": [5, 5, 45, 30], "rec": "bright", "ratio": 0.025},
             {"bbox": [55, 5, 95, 30], "rec": "dark", "ratio": 0.5}]
    data, rebuilt = tmp_path / "TokBench", tmp_path / "rec"
    (data / "annotations").mkdir(parents=True)
    (data / "video_annotations").mkdir()
    for name, pixels in (("ic13", half_bright()), ("tt", 255 - half_bright())):
        (data / "annotations" / f"text_{name}.json").write_text(json.dumps([
            {"file_name": "a.jpg", "height": 60, "width": 100, "annotations": words}]))
        (rebuilt / "text_data" / f"{name}_256").mkdir(parents=True)
        save_image(pixels, rebuilt / "text_data" / f"{name}_256" / "a.png")
    face = {"kps": [[1, 1], [2, 1], [1, 2], [1, 3], [40, 50]], "ratio": 0.3}
    (data / "video_annotations" / "videoface_meta.json").write_text(json.dumps([
        {"video_name": "c.mp4", "video_height": 60, "video_width": 100, "frame_anns": [[face], [], [face]]}]))
    for folder in (data / "videos" / "face_data" / "face_clip_3s" / "c.mp4",
                   rebuilt / "face_data" / "face_clip_3s_256" / "c"):
        folder.mkdir(parents=True)
        for number in range(3):
            save_image(half_bright() // (number + 1), folder / f"{number}.png")
    return data, rebuilt


def run_tokbench(capsys, data, rebuilt, *more) -> tuple[int, dict, str]:
    code = evaluate_fidelity.main(["tokbench", "--data", str(data), "--reconstructions", str(rebuilt), "--size", "256",
                                   *more])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


def test_tokbenchs_sets_are_pooled(tokbench, capsys):
    code, result, _ = run_tokbench(capsys, *tokbench, "--kind", "text")
    assert code == 0 and result["sets"] == ["ic13", "tt"]
    assert result["t_acc"]["micro"] == 0.5 and result["t_acc"]["n"] == 4
    assert (result["t_acc"]["small"]["n"], result["t_acc"]["large"]["n"]) == (2, 2)
    assert result["engine"]["version"] == "stand-in" and result["settings"]["size"] == 256
    assert "packages" in result["provenance"]


def test_a_film_is_compared_frame_by_frame(tokbench, capsys):
    code, result, _ = run_tokbench(capsys, *tokbench, "--kind", "face", "--medium", "video")
    assert code == 0
    assert result["face_distance"]["large"] == {"low": 0.2, "high": 1, "n": 2, "mean": 0.0, "few": True}
    assert result["settings"]["images"] == 2


def test_a_missing_reconstruction_is_told_and_the_rest_is_judged(tokbench, capsys):
    (tokbench[1] / "text_data" / "tt_256" / "a.png").unlink()
    code, result, errors = run_tokbench(capsys, *tokbench, "--kind", "text")
    assert code == 1 and result["t_acc"]["micro"] == 1.0 and len(result["failures"]) == 1
    assert "not judged: a.jpg: There is no reconstruction" in errors


@pytest.mark.parametrize(("more", "sentence"), [
    (("--kind", "text", "--sets", "ic13", "cord"), "no annotations text_cord.json"),
    (("--kind", "face"), "no annotations face_meta.json"), (("--kind", "text", "--size", "300"), "not 300")])
def test_what_cannot_be_judged_is_one_sentence(tokbench, capsys, more, sentence):
    code, result, errors = run_tokbench(capsys, *tokbench, *more)
    assert code == 1 and not result and sentence in errors and len(errors.splitlines()) == 1


def test_codecs_are_judged_on_ones_own_pictures(tmp_path, capsys):
    torch.manual_seed(0)
    LocalVQ(codebook_size=32, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(0, 0, 1), decoder_widths=(4, 4, 4, 4),
            decoder_depths=(0, 0, 0, 1), thin=4).save_pretrained(tmp_path / "model")
    for folder in ("text", "faces"):
        (tmp_path / folder).mkdir()
        save_image(half_bright(), tmp_path / folder / "a.png")
    (tmp_path / "faces" / "b.png").write_bytes(b"no picture")
    lines = [{"text": "bright", "polygon": [5, 5, 45, 5, 45, 30, 5, 30], "ignore": False},
             {"text": "light", "polygon": [5, 35, 45, 35, 45, 55, 5, 55], "ignore": False},
             {"text": None, "polygon": [55, 5, 95, 5, 95, 30, 55, 30], "ignore": True}]
    (tmp_path / "text" / "annotations.jsonl").write_text(json.dumps({"image": "a.png", "kind": "scene",
                                                                     "words": lines}) + "\n")
    code = evaluate_fidelity.main(["codecs", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"),
                                   "--faces", str(tmp_path / "faces"), "--output", str(tmp_path / "out"), "--quiet",
                                   "--text_sizes", "256", "--face_sizes", "256"])
    assert code == 1 and "b.png is not a picture" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["text"]["originals"]["rapidocr"]["scene"]["words"] == 2
    rows = {row["codec"]: row for row in report["text"]["rows"]}
    # The word that was misread in the original is not asked for again.
    assert rows["resize"]["t_acc"]["large"] == {"low": 0.04, "high": 1, "n": 1, "mean": 1.0, "few": True}
    assert rows["resize"]["bpp"] is None and rows["ours"]["bpp"] == 8 * rows["ours"]["bytes"] / 256**2
    faces = {row["codec"]: row for row in report["faces"]["rows"]}
    assert faces["resize"]["face_distance"]["micro"] < 3 and faces["ours"]["face_distance"]["n"] == 1
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| 256 | resize | - | -† (0) | -† (0) | 100.0† (1) | - |" in text and "stand-in" in text
    assert str(tmp_path) not in text + (tmp_path / "out" / "results.json").read_text()


def test_nothing_to_judge_is_a_sentence(tmp_path, capsys):
    torch.manual_seed(0)
    LocalVQ(codebook_size=32, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(0, 0, 1), decoder_widths=(4, 4, 4, 4),
            decoder_depths=(0, 0, 0, 1), thin=4).save_pretrained(tmp_path / "model")
    start = ["codecs", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    for more, sentence in (((), "nothing to judge"), (("--text", str(tmp_path)), "annotations.jsonl"),
                           (("--faces", str(tmp_path)), "holds no pictures")):
        assert evaluate_fidelity.main([*start, *more]) == 1
        assert sentence in capsys.readouterr().err


def test_a_codec_with_too_few_faces_has_a_dash_for_what_needs_more():
    bucket = {"mean": 0.5, "few": True, "n": 1}
    measured = {"small": bucket, "medium": bucket, "large": bucket, "mean_of_buckets": 0.5}
    rows = [{"size": 256, "codec": "a", "pictures": 9, "bpp": None, "distance": measured, "cosine": measured},
            {"size": 256, "codec": "b", "pictures": 1, "bpp": 0.04, "distance": measured}]
    form = "{:.1f}".format
    lines = evaluate_fidelity.table(rows, {"distance": ("d", form), "cosine": ("c", form)})
    assert lines[2].count("0.5") == 8
    assert lines[3] == ("| 256 | b (1 of 9 pictures: not comparable) | 0.0400 | 0.5† (1) | 0.5† (1) | 0.5† (1) | 0.5 "
                        "| - | - | - | - |")
