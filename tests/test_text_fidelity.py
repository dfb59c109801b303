"""T-ACC and T-NED against TokBench's published rows, its layout, canvas and buckets, and the engines that read."""

import json
import math
import os
import random
import shutil
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, FileError, ImageError, ModelError
from vtc.eval.engines.base import AdaptedTextEngine, EngineInfo, TextEngine
from vtc.eval.engines.catalogue import TEXT_ENGINES, load_text_engine
from vtc.eval.text_fidelity import (
    crop,
    levenshtein,
    read_words,
    readable,
    score_word,
    summarise_words,
    t_ned,
    text_fidelity,
)
from vtc.eval.text_lines import words_of_line
from vtc.eval.tokbench import (
    Annotation,
    Films,
    Word,
    annotation_file,
    film_file,
    find_picture,
    original_folder,
    read_annotations,
    read_frames,
    reconstruction_folder,
    text_ratio,
)
from vtc.eval.tokbench_buckets import bucket_means, edges
from vtc.eval.tokbench_canvas import image_canvas, reconstruct, video_canvas
from vtc.images import save_image


class Colours(TextEngine):
    """Reads a crop as the red of its first pixel, and keeps what it was asked."""

    info = EngineInfo("colours", "1", "none")

    def __init__(self) -> None:
        self.calls: list[tuple[list[tuple[int, ...]], list[str] | None]] = []

    def read(self, crops, truths=None):
        self.calls.append(([c.shape for c in crops], None if truths is None else list(truths)))
        return [str(c[0, 0, 0]) for c in crops]


def fixture() -> dict:
    return json.loads((SHARED / "fixtures" / "eval" / "tokbench_text.json").read_text())


# -- scores and buckets ----------------------------------------------------------------------------------------------


@needs_shared("fixtures", "eval")
def test_scores_are_upstreams_on_its_published_rows():
    facts = fixture()
    for row in facts["rows"]:
        record = score_word("a", 0, Word((0, 0, 1, 1), row["gt"], row["ratio"]), row["pred"])
        assert record.t_acc == row["acc"]
        assert levenshtein(row["gt"], row["pred"]) == row["edit"]
        assert record.t_ned == pytest.approx(row["t_ned"], abs=1e-12)
    assert len(facts["published_rows"]) == 40
    for row in facts["published_rows"]:
        record = score_word("a", 0, Word((0, 0, 1, 1), row["gt"], row["ratio"]), row["pred"])
        assert record.t_acc == row["accuracy"]
        assert record.t_ned == pytest.approx(row["ned"], abs=1e-12)


@needs_shared("fixtures", "eval")
def test_aggregates_are_upstreams():
    facts = fixture()
    records = [score_word("a", i, Word((0, 0, 1, 1), r["gt"], r["ratio"]), r["pred"])
               for i, r in enumerate(facts["rows"])]
    result = summarise_words(records, {}, 256)
    for measure, means in (("acc", result.t_acc), ("t_ned", result.t_ned)):
        expected = facts["aggregate"][measure]
        for bucket in ("small", "medium", "large"):
            assert getattr(means, bucket).mean == pytest.approx(expected[bucket], abs=1e-12)
        assert means.mean_of_buckets == pytest.approx(expected["mean_of_buckets"], abs=1e-12)
        assert means.micro == pytest.approx(expected["micro_all"], abs=1e-12)
    assert [list(b) for b in zip(edges("text", 256)[:-1], edges("text", 256)[1:], strict=True)] == facts["buckets_256"]


def test_levenshtein_against_its_recursive_definition():
    @cache
    def definition(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(definition(a[1:], b) + 1, definition(a, b[1:]) + 1, definition(a[1:], b[1:]) + (a[0] != b[0]))

    draw = random.Random(0)
    for _ in range(200):
        a, b = ("".join(draw.choices("abcé", k=draw.randrange(7))) for _ in range(2))
        assert levenshtein(a, b) == levenshtein(b, a) == definition(a, b)


def test_scores_respect_case_and_accents_and_two_empty_words_are_equal():
    assert t_ned("", "") == 1
    assert t_ned("a", "") == t_ned("", "a") == 0
    assert score_word("", 0, Word((0, 0, 1, 1), "café", 0.1), "cafe").t_acc == 0


def test_buckets_are_half_open_and_ratio_one_is_in_none():
    low, middle, high, top = bounds = edges("text", 256)
    ratios = [math.nextafter(low, 0), low, math.nextafter(middle, 0), middle, high, math.nextafter(top, 0), top]
    means = bucket_means([64, 1, 2, 4, 8, 16, 32], ratios, bounds)
    assert (means.small.n, means.medium.n, means.large.n, means.n, means.n_outside) == (2, 1, 2, 7, 2)
    assert (means.small.mean, means.medium.mean, means.large.mean) == (1.5, 4, 12)
    assert means.mean_of_buckets == 17.5 / 3
    assert means.micro == 127 / 7


def test_few_are_marked_and_an_empty_bucket_leaves_no_headline():
    bounds = edges("face", 512)
    means = bucket_means([1.0] * 99, [0.06] * 49 + [0.3] * 50, bounds)
    assert means.small.few and not means.large.few
    assert means.medium.mean is None and means.medium.few
    assert means.mean_of_buckets is None
    assert json.dumps(means.describe()).count("null") == 2
    with pytest.raises(ConfigError, match="1 values have 2 ratios"):
        bucket_means([1], [0.1, 0.2], bounds)


@pytest.mark.parametrize(("kind", "medium", "size", "expected"), [
    ("text", "image", 256, (0.02, 0.03, 0.04, 1)), ("text", "image", 512, (0.01, 0.02, 0.03, 1)),
    ("text", "image", 1024, (0.005, 0.01, 0.02, 1)), ("text", "video", 256, (0.01, 0.02, 0.03, 1)),
    ("text", "video", 480, (0.005, 0.01, 0.02, 1))])
def test_edges_of_text(kind, medium, size, expected):
    assert edges(kind, size, medium) == expected


def test_a_size_that_was_not_published_is_refused():
    with pytest.raises(ConfigError, match="256, 480, not 512"):
        edges("text", 512, "video")


# -- layout ----------------------------------------------------------------------------------------------------------


def test_pictures_and_frames_are_read_as_tokbench_writes_them(tmp_path):
    picture = {"file_name": "x.jpg", "height": 50, "width": 100,
               "annotations": [{"bbox": [1, 2, 31.9, 14], "rec": "word", "ratio": 0.0775}]}
    frame = {**picture, "file_name": "clip-frame12.jpg", "video_name": "clip"}
    empty = {**frame, "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps([picture]))
    (tmp_path / "b.json").write_text(json.dumps([frame, empty]))
    word = Word((1, 2, 31.9, 14), "word", 0.0775)
    assert read_annotations(tmp_path / "a.json", "text") == [Annotation("x.jpg", 50, 100, (word,))]
    (found,) = read_annotations(tmp_path / "b.json", "text", "video")
    assert found == Annotation("clip.mp4", 50, 100, (word,), frame=11)
    assert found.key == "clip.mp4#11"


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "is not JSON"), ("{}", "holds no list"), ('[{"file_name": "a"}]', "entry 0 cannot be read"),
    ('[{"file_name": "a", "height": 1, "width": 1, "annotations": [{"bbox": [1], "rec": "", "ratio": 1}]}]', "entry 0"),
])
def test_a_file_of_another_form_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=sentence):
        read_annotations(tmp_path / "a.json", "text")


def test_where_the_files_lie(tmp_path):
    assert annotation_file("T", "text", "ic13").parts == ("T", "annotations", "text_ic13.json")
    assert annotation_file("T", "text", "ds", "video").parts == ("T", "video_annotations", "text_ds.json")
    assert annotation_file("T", "face", "wflw").parts == ("T", "annotations", "face_meta.json")
    assert annotation_file("T", "face", "face_clip_3s", "video").name == "videoface_meta.json"
    assert original_folder("T", "face", "face_clip_3s", "video").parts == ("T", "videos", "face_data", "face_clip_3s")
    assert reconstruction_folder("R", "text", "ic13", 512).parts == ("R", "text_data", "ic13_512")
    with pytest.raises(ConfigError, match="ic13, ic15"):
        original_folder("T", "text", "wflw")


def test_reconstructions_are_lossless_unless_asked_otherwise(tmp_path):
    with pytest.raises(FileError, match=r"no reconstruction .*x\.png"):
        find_picture(tmp_path, "x.jpg")
    with pytest.raises(FileError, match=r"no reconstruction .*x\.jpg"):
        find_picture(tmp_path, "x.jpg", compat=True)
    (tmp_path / "x.jpg").write_bytes(b"j")
    with pytest.raises(FileError, match="save reconstructions as PNG"):
        find_picture(tmp_path, "x.jpg")
    assert find_picture(tmp_path, "x.jpg", compat=True).name == "x.jpg"
    (tmp_path / "x.png").write_bytes(b"p")
    assert find_picture(tmp_path, "x.jpg").name == "x.png"
    with pytest.raises(FileError, match="frames as PNG"):
        film_file(tmp_path, "clip.mp4")
    (tmp_path / "clip").mkdir()
    assert film_file(tmp_path, "clip.mp4") == tmp_path / "clip"
    assert film_file(tmp_path, "clip.mp4", compat=True) == tmp_path / "clip.mp4"


def test_frames_are_given_in_order_and_a_short_film_is_told(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(11):  # by number: 10 comes after 9
        save_image(np.full((4, 6, 3), 20 * number, np.uint8), tmp_path / "clip" / f"{number}.png")
    films = Films(lambda name: film_file(tmp_path, name))
    frames = [Annotation("clip.mp4", 4, 6, frame=n) for n in (1, 1, 9, 10, 0, 11)]
    assert [int(films(frame)[0, 0, 0]) for frame in frames[:5]] == [20, 20, 180, 200, 0]
    with pytest.raises(FileError, match="has 11 frames, and frame 11"):
        films(frames[5])
    with pytest.raises(FileError, match="holds no frames"):
        next(read_frames(tmp_path))
    with pytest.raises(FileError, match="no film"):
        next(read_frames(tmp_path / "other.mp4"))


def test_a_film_file_is_decoded_in_rgb(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for level in (60, 160):
        writer.write(np.full((48, 64, 3), (10, 100, level), np.uint8))  # blue, green, red
    writer.release()
    frames = list(read_frames(path))
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
    for frame, red in zip(frames, (60, 160), strict=True):
        assert np.abs(frame.astype(int) - (red, 100, 10)).max() <= 6  # JPEG's own rounding
    (tmp_path / "b.avi").write_bytes(b"no film")
    with pytest.raises(FileError, match="no film that can be decoded"):
        list(read_frames(tmp_path / "b.avi"))


# -- canvas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(37, 91, 64), (91, 37, 64), (64, 64, 64), (720, 1280, 256),
                                                       (100, 30, 256)])
def test_the_picture_lies_in_the_middle_of_a_black_canvas(height, width, size):
    canvas = image_canvas(height, width, size)
    pixels = np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8)
    placed = canvas.place(pixels)
    scale = min(size / width, size / height)
    small = (math.ceil(width * scale), math.ceil(height * scale))
    left, top = (size - small[0]) // 2, (size - small[1]) // 2
    expected = np.zeros((size, size, 3), np.uint8)
    expected[top : top + small[1], left : left + small[0]] = np.array(
        Image.fromarray(pixels).resize(small, Image.Resampling.LANCZOS))
    assert np.array_equal(placed, expected)
    back = Image.fromarray(expected[top : top + small[1], left : left + small[0]])
    assert np.array_equal(canvas.restore(placed), np.array(back.resize((width, height), Image.Resampling.LANCZOS)))


def test_a_side_that_rounding_makes_too_long_is_treated_as_pillow_does():
    """29 * (480 / 29) is above 480 in floating point, so it is scaled to 481 and pasted at -1."""
    side = 29
    assert side * (480 / side) > 480
    canvas = image_canvas(side, side, 480)
    assert canvas.scaled == (481, 481) and canvas.left == -1
    pixels = np.full((side, side, 3), 200, np.uint8)
    placed = canvas.place(pixels)
    assert (placed == 200).all()
    assert canvas.restore(placed).shape == pixels.shape


def test_a_picture_of_the_canvas_size_comes_back_as_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(reconstruct(pixels, image_canvas(64, 64, 64), None), pixels)
    inverted = reconstruct(pixels, image_canvas(64, 64, 64), lambda canvas: 255 - canvas)
    assert np.array_equal(inverted, 255 - pixels)


@pytest.mark.parametrize(("height", "width", "size", "scaled", "whole"), [
    (720, 1280, 256, (256, 455), (256, 480)), (1280, 720, 480, (853, 480), (864, 480)),
    (300, 300, 256, (256, 256), (256, 256))])
def test_films_keep_their_shape_and_are_padded_to_32(height, width, size, scaled, whole):
    canvas = video_canvas(height, width, size)
    assert (canvas.scaled, canvas.size) == (scaled, whole)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    placed = canvas.place(pixels)
    small = np.array(Image.fromarray(pixels).resize(scaled[::-1], Image.Resampling.BILINEAR))
    top, left = (whole[0] - scaled[0]) // 2, (whole[1] - scaled[1]) // 2
    assert np.array_equal(placed[top : top + scaled[0], left : left + scaled[1]], small)
    assert placed.sum(dtype=np.int64) == small.sum(dtype=np.int64)  # all else is black
    back = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    assert np.array_equal(canvas.restore(placed), np.array(back))


def test_a_reconstruction_of_another_size_is_refused():
    canvas = image_canvas(30, 40, 64)
    with pytest.raises(ImageError, match="was made for"):
        canvas.place(np.zeros((40, 30, 3), np.uint8))
    with pytest.raises(ImageError, match="was expected"):
        canvas.restore(np.zeros((32, 64, 3), np.uint8))


# -- words -----------------------------------------------------------------------------------------------------------


def picture_of(values: list[int]) -> tuple[Annotation, np.ndarray]:
    """A word each 10 columns, whose crop begins with `value`, and whose truth is that number."""
    pixels = np.zeros((20, 10 * len(values), 3), np.uint8)
    words = []
    for i, value in enumerate(values):
        pixels[5, 10 * i + 2] = value
        words.append(Word((10 * i + 2.9, 5.9, 10 * i + 8.9, 11.2), str(value), 0.025))
    return Annotation("p.png", 20, 10 * len(values), tuple(words)), pixels


def test_the_crop_is_the_box_cut_to_whole_pixels():
    annotation, pixels = picture_of([7, 9])
    engine = Colours()
    records = read_words(annotation, pixels, engine)
    assert engine.calls == [([(6, 6, 3), (6, 6, 3)], None)]
    assert [(r.number, r.truth, r.answer, r.t_acc) for r in records] == [(0, "7", "7", 1), (1, "9", "9", 1)]
    beyond = crop(annotation, Word((-3, -3, 4, 4), "x", 0.1), pixels)
    assert beyond.shape == (4, 4, 3)
    with pytest.raises(ImageError, match="holds no pixels"):
        crop(annotation, Word((4, 4, 4.5, 9), "x", 0.1), pixels)


def test_a_data_set_is_read_picture_by_picture_and_failures_are_told():
    first, pixels = picture_of([1, 2, 3])
    second = Annotation("q.png", 20, 30, first.words)
    third = Annotation("r.png", 20, 31, first.words)

    def reconstruction(annotation: Annotation) -> np.ndarray:
        if annotation.file_name == "q.png":
            raise FileError("q.png is gone.")
        return pixels

    engine = Colours()
    result = text_fidelity([first, second, third], reconstruction, engine, 256)
    assert [r.answer for r in result.records] == ["1", "2", "3"]
    assert len(result.failures) == 2 and "q.png is gone" in result.failures[0] and "31x20" in result.failures[1]
    assert result.t_acc.small.mean == 1 and result.t_acc.small.n == 3
    assert result.settings["words"] == 3 and result.engine["name"] == "colours"
    assert json.loads(json.dumps(result.describe()))["t_ned"]["small"]["few"] is True


def test_compat_reads_in_batches_of_64_across_pictures_with_the_truths():
    annotation, pixels = picture_of(list(range(40)))
    engine = Colours()
    text_fidelity([annotation, annotation], lambda _: pixels, engine, 256, compat=True)
    truths = [str(n) for n in range(40)] * 2
    assert [call[1] for call in engine.calls] == [truths[:64], truths[64:]]
    text_fidelity([annotation], lambda _: pixels, engine, 256)
    assert engine.calls[-1][1] is None


def test_compat_leaves_out_crops_of_one_pixel_in_films():
    pixels = np.zeros((20, 20, 3), np.uint8)
    words = (Word((1, 1, 2, 9), "a", 0.015), Word((1, 1, 9, 9), "0", 0.015))
    film = Annotation("f.mp4", 20, 20, words, frame=0)
    assert text_fidelity([film], lambda _: pixels, Colours(), 256, "video").settings["words"] == 2
    result = text_fidelity([film], lambda _: pixels, Colours(), 256, "video", compat=True)
    assert [r.number for r in result.records] == [1]


def test_only_words_that_were_read_in_the_original_are_kept():
    annotation, pixels = picture_of([1, 2, 3])
    pixels[5, 12] = 99
    records = read_words(annotation, pixels, Colours())
    (kept,) = readable([annotation], records)
    assert [w.truth for w in kept.words] == ["1", "3"]
    assert readable([Annotation("other.png", 20, 30, annotation.words)], records) == []


def test_adapted_answers_say_so():
    engine = AdaptedTextEngine(Colours(), lambda answer: answer.zfill(3), "three digits")
    assert engine.read([np.full((1, 1, 3), 7, np.uint8)]) == ["007"]
    assert engine.info.settings == {"adapted": "three digits"} and Colours.info.settings == {}


def test_text_ratio_is_the_longer_side_a_character():
    assert text_ratio((10, 10, 70, 30), "abc", 500, 1000) == 0.02
    assert text_ratio((10, 10, 20, 40), "i", 1000, 500) == 0.03


# -- words from lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["TOTAL 12.50 RM", "WIDE iii MMMM", "A B C D", "No. 3-1 Illinois"])
def test_a_line_is_cut_at_its_blanks(text):
    """Drawn in a proportional font, every word's ink lies in its own box and no other word's does."""
    font = ImageFont.load_default(24)
    left = 15
    size = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((left, 10), text, font=font)
    words, spans, start = text.split(" "), [], 0
    for word in words:
        before = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text[:start], font=font)
        spans.append((left + before, left + before + font.getlength(word)))
        start += len(word) + 1
    image = Image.new("RGB", (int(size[2]) + 20, 60), (230, 225, 220))
    ImageDraw.Draw(image).text((left, 10), text, (30, 30, 40), font=font)
    pixels = np.array(image)
    found = words_of_line(pixels, (size[0] - 1, size[1] - 2, size[2] + 1, size[3] + 2), text)
    assert [w.truth for w in found] == words
    for word, (begin, end) in zip(found, spans, strict=True):
        assert word.box[0] <= begin + 2 and word.box[2] >= end - 2  # two pixels of side bearing
        others = [s for s in spans if s != (begin, end)]
        assert all(word.box[2] <= s[0] + 2 or word.box[0] >= s[1] - 2 for s in others)


def test_a_single_word_keeps_its_box_and_a_tiny_box_is_refused():
    pixels = np.zeros((20, 40, 3), np.uint8)
    assert words_of_line(pixels, (1, 2, 33, 14), "word")[0].box == (1, 2, 33, 14)
    assert words_of_line(pixels, (1, 2, 33, 14), "  ") == []
    with pytest.raises(ImageError, match="too small"):
        words_of_line(pixels, (1, 2, 5, 14), "two words")


# -- engines ---------------------------------------------------------------------------------------------------------


def drawn(word: str, size: int = 28) -> np.ndarray:
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (int(font.getlength(word)) + 16, 2 * size), "white")
    ImageDraw.Draw(image).text((8, size // 2 - 4), word, "black", font=font)
    return np.array(image)


def test_rapidocr_reads_and_crops_do_not_change_their_neighbours():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    engine = load_text_engine()
    words = ["Hello", "12.50", "tokenizer"]
    crops = [drawn(word) for word in words]
    assert engine.read(crops) == words
    assert engine.read([crops[0], np.tile(crops[2], (1, 6, 1))])[0] == "Hello"
    assert engine.read([np.zeros((1, 1, 3), np.uint8)]) == [""]
    assert engine.info.name == "rapidocr" and engine.info.version.startswith("rapidocr ")
    assert [len(digest) for digest in engine.info.weights.values()] == [64]
    with pytest.raises(ImageError, match="uint8 RGB"):
        engine.read([np.zeros((4, 4, 3), np.float32)])


def test_rapidocr_refuses_weights_that_are_none(tmp_path):
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ModelError, match="finds no weights"):
        load_text_engine("rapidocr", tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot use"):
        load_text_engine("rapidocr", tmp_path / "bad.onnx")


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")
def test_tesseract_reads_a_list_in_order():
    engine = load_text_engine("tesseract")
    white = np.full((30, 60, 3), 255, np.uint8)  # whatever it sees there, the others keep their places
    answers = engine.read([drawn("Hello"), white, drawn("Receipt"), drawn("two words")])
    assert len(answers) == 4
    assert [answers[0], *answers[2:]] == ["Hello", "Receipt", "twowords"]
    assert engine.read([]) == []
    assert engine.info.version.startswith("tesseract ") and engine.info.settings["psm"] == 8


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")
def test_tesseract_without_its_data_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"eng|Tesseract failed"):
        load_text_engine("tesseract", tmp_path)


def test_tesseract_that_is_not_there_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="apt install tesseract-ocr"):
        load_text_engine("tesseract")


def test_tesseracts_table_is_read_by_page():
    from vtc.eval.engines.tesseract import _answers

    head = "level page_num block_num par_num line_num word_num left top width height conf text".replace(" ", "\t")
    page, word = "1\t{}" + "\t0" * 8 + "\t-1", "5\t{}" + "\t1" * 8 + "\t90\t{}"
    rows = [page.format(1) + "\t", word.format(1, "a b"), page.format(2), page.format(3), word.format(3, "x"),
            word.format(3, "y")]
    assert _answers("\n".join([head, *rows]), 3) == ["ab", "", "xy"]
    with pytest.raises(ModelError, match="answered 3 crops of 4"):
        _answers("\n".join([head, *rows]), 4)


def test_parseq_says_where_its_weights_are_to_be_had(tmp_path):
    with pytest.raises(ModelError, match=r"parseq-56125471\.pt.*doctr-static"):
        load_text_engine("parseq")
    with pytest.raises(ModelError, match="finds no weights at"):
        load_text_engine("parseq", tmp_path)


@pytest.mark.parametrize("shape", [(20, 100), (40, 30), (8, 32), (3, 200), (100, 2)])
def test_parseqs_crop_fits_the_input_and_the_rest_is_black(shape):
    from vtc.eval.engines.parseq import MEAN, STD, _prepared

    height, width = shape
    prepared = _prepared(np.full((height, width, 3), 255, np.uint8)).numpy()
    white, black = ((np.array(v) - MEAN) / STD for v in ((1, 1, 1), (0, 0, 0)))
    rows = 32 if height / width > 0.25 else max(1, int(128 * (height / width)))
    columns = 128 if height / width <= 0.25 else max(1, int(32 / (height / width)))
    assert prepared.shape == (3, 32, 128)
    np.testing.assert_allclose(prepared[:, :rows, :columns], np.broadcast_to(white[:, None, None], (3, rows, columns)),
                               atol=1e-5)
    outside = np.ones((32, 128), bool)
    outside[:rows, :columns] = False
    np.testing.assert_allclose(prepared[:, outside], np.repeat(black[:, None], outside.sum(), 1), atol=1e-5)


@pytest.fixture
def parseq(tmp_path):
    """docTR's PARSeq with random weights."""
    import torch

    from vtc.torchvision_guard import ensure_torchvision_imports

    ensure_torchvision_imports()
    recognition = pytest.importorskip("doctr.models.recognition")
    from doctr.datasets import VOCABS

    torch.manual_seed(0)
    model = recognition.parseq(pretrained=False, vocab=VOCABS["french"], input_shape=(3, 32, 128)).eval()
    torch.save(model.state_dict(), tmp_path / "parseq-56125471.pt")
    return model, tmp_path


def test_parseq_is_doctrs_own(parseq):
    """Crops prepared as docTR's Resize and Normalize do, answers of the model itself, with truths and without."""
    import torch
    from doctr.transforms import Resize
    from torchvision.transforms import Normalize
    from torchvision.transforms.functional import to_tensor

    from vtc.eval.engines.parseq import MEAN, STD, _prepared

    model, folder = parseq
    draw = np.random.default_rng(0)
    crops = [draw.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((20, 70), (33, 40), (8, 32), (50, 9))]
    resize, normalise = Resize((32, 128), preserve_aspect_ratio=True), Normalize(MEAN, STD)
    batch = []
    for pixels in crops:
        try:
            resized = resize(to_tensor(pixels))
        except AttributeError:  # from 1.1 on docTR's transforms take a Sample
            from doctr.utils import Sample

            resized = resize(Sample(image=to_tensor(pixels))).image
        batch.append(normalise(resized))
        torch.testing.assert_close(_prepared(pixels), batch[-1], atol=1e-5, rtol=0)
    engine = load_text_engine("parseq", folder)
    with torch.inference_mode():
        free = [word for word, _ in model(torch.stack(batch), return_preds=True)["preds"]]
        bounded = [word for word, _ in model(torch.stack(batch), ["ab", "c", "d", "efg"], return_preds=True)["preds"]]
    assert engine.read(crops) == free
    assert engine.read(crops, ["ab", "c", "d", "€€€"]) == bounded  # a character outside the vocabulary is no matter
    assert max(map(len, bounded)) <= 4 < max(map(len, free))
    assert engine.info.version.startswith("python-doctr") and len(engine.info.weights) == 1


def test_parseq_refuses_other_weights(parseq):
    import torch

    _, folder = parseq
    torch.save({"a": torch.zeros(1)}, folder / "other.pt")
    with pytest.raises(ModelError, match="does not hold the weights"):
        load_text_engine("parseq", folder / "other.pt")


@pytest.mark.parametrize("name", list(TEXT_ENGINES))
def test_an_engine_whose_package_is_absent_says_how_to_install_it(name, monkeypatch, tmp_path):
    (tmp_path / "parseq-56125471.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "doctr", None)
    monkeypatch.setitem(sys.modules, "doctr.models.recognition", None)
    monkeypatch.setattr("vtc.eval.engines.base.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ModelError, match=r"pip install|apt install"):
        load_text_engine(name, tmp_path if name == "parseq" else None)


def test_an_unknown_engine_is_a_sentence():
    with pytest.raises(ConfigError, match="rapidocr, tesseract, parseq, not 'easyocr'"):
        load_text_engine("easyocr")


def test_the_catalogue_imports_no_engine():
    import subprocess

    code = ("import sys; import vtc.eval.engines.catalogue, vtc.eval.text_fidelity, vtc.eval.face_fidelity;"
            "heavy = {'rapidocr', 'onnxruntime', 'cv2', 'dlib', 'doctr', 'torchvision'} & set(sys.modules);"
            "print(heavy); sys.exit(len(heavy))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
