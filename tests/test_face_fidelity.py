"""Face fidelity: TokBench's annotations and buckets, the measures of each engine, and the engines themselves."""

import base64
import io
import json
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, FileError, ImageError, ModelError
from vtc.eval.engines.antelopev2 import SIDE, TEMPLATE, similarity
from vtc.eval.engines.base import EngineInfo, FaceEngine
from vtc.eval.engines.catalogue import FACE_ENGINES, load_face_engine
from vtc.eval.face_fidelity import (
    FaceRecord,
    annotate_faces,
    compare_faces,
    face_fidelity,
    original_faces,
    summarise_faces,
)
from vtc.eval.tokbench import Annotation, Face, face_ratio, read_annotations
from vtc.eval.tokbench_buckets import edges
from vtc.images import load_image

KEYPOINTS = ((40.0, 50.0), (70.0, 52.0), (54.0, 68.0), (42.0, 84.0), (66.0, 86.0))


class Means(FaceEngine):
    """A face is the mean colour of its box, in the original's place."""

    def __init__(self, measure) -> None:
        self.info = EngineInfo("means", "1", "none")
        self.measure = measure
        self.match_threshold = None if measure == "f_sim" else 30.0

    def detect(self, pixels):
        return [(0.0, 0.0, 4.0, 2.0), (5.0, 5.0, 6.0, 6.0)] if pixels.any() else []

    def align(self, original, face):
        return tuple(int(v) for v in face.box)

    def embed(self, pixels, alignment):
        x1, y1, x2, y2 = alignment
        return pixels[y1:y2, x1:x2].mean((0, 1)).astype(np.float64)


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    first, second = (draw.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(2))
    return first, second


FACES = Annotation("a.png", 40, 60, faces=(
    Face(0.15, (0, 0, 9, 9)), Face(0.25, (9, 9, 30, 30)), Face(0.4, (2, 5, 8, 9))))


# -- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("medium", "size", "expected"), [
    ("image", 256, (0.1, 0.2, 0.3, 1)), ("image", 512, (0.05, 0.1, 0.2, 1)), ("image", 1024, (0.02, 0.05, 0.1, 1)),
    ("video", 256, (0.05, 0.1, 0.2, 1)), ("video", 480, (0.02, 0.05, 0.1, 1))])
def test_edges_are_the_later_revisions(medium, size, expected):
    assert edges("face", size, medium) == expected


def test_f_sim_is_the_cosine_and_its_headline_the_mean_of_buckets():
    original, rebuilt = pair(0)
    result = face_fidelity([FACES], lambda _: original, lambda _: rebuilt, Means("f_sim"), 256)
    assert list(result.measures) == ["f_sim"] and result.mean is None
    cosines = []
    for face in FACES.faces:
        x1, y1, x2, y2 = face.box
        a, b = (p[y1:y2, x1:x2].reshape(-1, 3).mean(0) for p in (original, rebuilt))
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    means = result.measures["f_sim"]
    assert [b.mean for b in (means.small, means.medium, means.large)] == pytest.approx(cosines, abs=1e-12)
    assert means.mean_of_buckets == pytest.approx(np.mean(cosines), abs=1e-12)
    assert means.small.few and result.settings["faces"] == 3


def test_distance_engines_never_give_an_f_sim():
    original, rebuilt = pair(1)
    result = face_fidelity([FACES], lambda _: original, lambda _: rebuilt, Means("distance"), 256)
    assert list(result.measures) == ["face_distance", "face_match_rate", "face_centred_cosine"]
    first, second = (np.array([getattr(r, name) for r in result.records]) for name in ("original", "reconstruction"))
    distances = np.sqrt(np.square(first - second).sum(1))
    assert result.measures["face_distance"].micro == pytest.approx(distances.mean(), abs=1e-12)
    assert result.measures["face_match_rate"].micro == (distances < 30).mean()
    np.testing.assert_allclose(result.mean, first.mean(0), atol=1e-12)
    a, b = first - first.mean(0), second - first.mean(0)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result.measures["face_centred_cosine"].micro == pytest.approx(cosines.mean(), abs=1e-12)
    assert "f_sim" not in json.dumps(result.describe()).lower()
    assert json.loads(json.dumps(result.describe()))["mean"] == list(result.mean)


def test_the_centre_may_be_given_and_one_face_alone_has_none():
    records = [FaceRecord("a", 0.5, (1.0, 2.0), (1.0, 3.0))]
    engine = Means("distance")
    alone = summarise_faces(records, engine, 256)
    assert "face_centred_cosine" not in alone.measures and alone.mean is None
    given = summarise_faces(records, engine, 256, mean=[1.0, 1.0])
    assert given.measures["face_centred_cosine"].large.mean == 1.0
    assert given.settings["centre"] == "given" and given.mean == (1.0, 1.0)
    equal = summarise_faces(records, engine, 256, mean=[1.0, 2.0])
    assert equal.measures["face_centred_cosine"].large.mean == 0.0  # a face that is the mean has no direction
    assert summarise_faces([], engine, 256).measures["face_distance"].micro is None
    engine.match_threshold = None
    with pytest.raises(ConfigError, match="has no threshold"):
        summarise_faces(records, engine, 256)


def test_an_unreadable_pair_is_told_and_the_others_are_compared():
    original, rebuilt = pair(2)
    other = Annotation("b.png", 40, 60, faces=FACES.faces)

    def reconstruction(annotation: Annotation) -> np.ndarray:
        if annotation is other:
            raise FileError("b.png is gone.")
        return rebuilt

    result = face_fidelity([other, FACES], lambda _: original, reconstruction, Means("f_sim"), 256)
    assert result.failures == ("b.png: b.png is gone.",) and len(result.records) == 3
    originals = original_faces(FACES, original, Means("f_sim"))
    with pytest.raises(ImageError, match="annotated as 60x40"):
        compare_faces(FACES, originals, rebuilt[:, 1:], Means("f_sim"))


def test_faces_are_annotated_largest_first():
    annotation = annotate_faces("a.png", np.ones((8, 10, 3), np.uint8), Means("distance"))
    assert annotation == Annotation("a.png", 8, 10, faces=(Face(0.4, (0.0, 0.0, 4.0, 2.0)),))
    everybody = annotate_faces("a.png", np.ones((8, 10, 3), np.uint8), Means("distance"), None)
    assert [f.ratio for f in everybody.faces] == [0.4, 0.1]
    assert annotate_faces("a.png", np.zeros((8, 10, 3), np.uint8), Means("distance")).faces == ()
    assert face_ratio((0, 0, 30, 50), 200, 100) == 0.25


# -- annotations -----------------------------------------------------------------------------------------------------


def test_faces_of_pictures_and_films_are_read_as_tokbench_writes_them(tmp_path):
    face = {"kps": [list(p) for p in KEYPOINTS], "box": [30, 30, 80, 95], "ratio": 0.3, "gt": 1}
    (tmp_path / "p.json").write_text(json.dumps([
        {"image_name": "a.jpg", "img_height": 120, "img_width": 100, "faces": [face]}]))
    (tmp_path / "f.json").write_text(json.dumps([
        {"video_name": "c.mp4", "video_height": 120, "video_width": 100,
         "frame_anns": [[], [{"kps": face["kps"], "ratio": 0.2}], [face, face]]}]))
    expected = Face(0.3, (30, 30, 80, 95), KEYPOINTS)
    assert read_annotations(tmp_path / "p.json", "face") == [Annotation("a.jpg", 120, 100, faces=(expected,))]
    first, second = read_annotations(tmp_path / "f.json", "face", "video")
    assert first == Annotation("c.mp4", 120, 100, faces=(Face(0.2, None, KEYPOINTS),), frame=1)
    assert second.frame == 2 and second.faces == (expected, expected)
    (tmp_path / "p.json").write_text(json.dumps([
        {"image_name": "a.jpg", "img_height": 120, "img_width": 100, "faces": [{**face, "kps": [[1, 2]]}]}]))
    with pytest.raises(FileError, match="1 keypoints, not 5"):
        read_annotations(tmp_path / "p.json", "face")


# -- dlib ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dlib_engine():
    pytest.importorskip("dlib")
    try:
        return load_face_engine()
    except ModelError as error:
        pytest.skip(str(error))


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.array(Image.open(stream))


@needs_shared("data", "faces")
def test_dlib_tells_people_apart_and_a_coarser_jpeg_is_farther_off(dlib_engine):
    """Two pictures of one person, one of another; thresholds are dlib's usual 0.6."""
    names = ("df_img1.jpg", "df_img2.jpg", "df_img8.jpg")
    pictures = [load_image(SHARED / "data" / "faces" / name).pixels for name in names]
    vectors = []
    for name, pixels in zip(names, pictures, strict=True):
        annotation = annotate_faces(name, pixels, dlib_engine)
        ((alignment, vector),) = original_faces(annotation, pixels, dlib_engine)
        assert vector.shape == (128,) and vector.dtype == np.float64
        vectors.append((annotation, alignment, vector))
    assert np.linalg.norm(vectors[0][2] - vectors[1][2]) < 0.6 < np.linalg.norm(vectors[0][2] - vectors[2][2])
    annotation, alignment, vector = vectors[0]
    distances = [compare_faces(annotation, [(alignment, vector)], picture, dlib_engine)[0].distance
                 for picture in (pictures[0], jpeg(pictures[0], 20), jpeg(pictures[0], 3))]
    assert distances[0] == 0 and 0 < distances[1] < distances[2]
    assert dlib_engine.info.version.startswith("dlib") and len(dlib_engine.info.weights) == 3


@needs_shared("data", "faces")
def test_dlib_takes_tokbenchs_keypoints(dlib_engine):
    """Landmarks started from five keypoints and from dlib's own box agree: the same face, 0.2 apart at most."""
    pixels = load_image(SHARED / "data" / "faces" / "df_img2.jpg").pixels
    box = dlib_engine.detect(pixels)[0]
    by_box = dlib_engine.align(pixels, Face(0.3, box))
    corners = np.array([(p.x, p.y) for p in by_box.parts()], float)  # right eye, left eye as seen, then under the nose
    eyes = sorted([corners[:2].mean(0), corners[2:4].mean(0)], key=lambda p: p[0])
    gap = eyes[1] - eyes[0]
    down = np.array([-gap[1], gap[0]])
    middle = (eyes[0] + eyes[1]) / 2
    points = (eyes[0], eyes[1], middle + 0.6 * down, middle + down - 0.4 * gap, middle + down + 0.4 * gap)
    by_points = dlib_engine.align(pixels, Face(0.3, None, tuple((float(x), float(y)) for x, y in points)))
    first, second = (dlib_engine.embed(pixels, alignment) for alignment in (by_box, by_points))
    assert np.linalg.norm(first - second) < 0.2
    with pytest.raises(ConfigError, match="box or its keypoints"):
        dlib_engine.align(pixels, Face(0.3))


def test_dlib_finds_nobody_in_an_empty_picture(dlib_engine):
    assert dlib_engine.detect(np.full((40, 40, 3), 128, np.uint8)) == []


def test_dlib_without_weights_says_where_they_are(tmp_path):
    with pytest.raises(ModelError, match="face_recognition_models brings it along"):
        load_face_engine("dlib", tmp_path)
    pytest.importorskip("dlib")
    for name in ("dlib_face_recognition_resnet_model_v1", "shape_predictor_5_face_landmarks",
                 "mmod_human_face_detector"):
        (tmp_path / f"{name}.dat").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot read its weights"):
        load_face_engine("dlib", tmp_path)


# -- antelopev2 ------------------------------------------------------------------------------------------------------

#: an ONNX model with antelopev2's input, (N, 3, 112, 112): means of blocks of 28x28, flattened to (N, 48)
STAND_IN = base64.b64decode(
    "CAc6kAEKPwoEZGF0YRIBcCILQXZlcmFnZVBvb2wqFQoMa2VybmVsX3NoYXBlQBxAHKABByoQCgdzdHJpZGVzQBxAHKABBwoRCgFwEgNmYzEiB0Zs"
    "YXR0ZW4SAWdaHwoEZGF0YRIXChUIARIRCgMSAU4KAggDCgIIcAoCCHBiFgoDZmMxEg8KDQgBEgkKAxIBTgoCCDBCBAoAEA0=")


@pytest.fixture
def antelope(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("cv2")
    (tmp_path / "glintr100.onnx").write_bytes(STAND_IN)
    return load_face_engine("antelopev2", tmp_path)


def test_the_alignment_is_scikit_images():
    transform = pytest.importorskip("skimage.transform")
    draw = np.random.default_rng(0)
    for _ in range(20):
        points = TEMPLATE * draw.uniform(0.3, 4) + draw.normal(0, 3, (5, 2)) + draw.uniform(-50, 300, 2)
        expected = transform.SimilarityTransform()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # scikit-image renames `estimate`
            assert expected.estimate(points, TEMPLATE)
        np.testing.assert_allclose(similarity(points, TEMPLATE), expected.params[:2], atol=1e-9)
    with pytest.raises(ConfigError, match="all in one place"):
        similarity(np.ones((5, 2)), TEMPLATE)


def test_antelopev2_sees_the_face_upright_in_rgb(antelope):
    """A face that lies as the template does is cut out unchanged, from -1 to 1, red first."""
    pixels = np.random.default_rng(0).integers(0, 256, (130, 140, 3), dtype=np.uint8)
    shifted = Face(0.5, None, tuple((float(x) + 5, float(y) + 9) for x, y in TEMPLATE))
    vector = antelope.embed(pixels, antelope.align(pixels, shifted))
    crop = pixels[9 : 9 + SIDE, 5 : 5 + SIDE].astype(np.float64)
    expected = (crop.reshape(4, 28, 4, 28, 3).mean((1, 3)).transpose(2, 0, 1) - 127.5) / 127.5
    np.testing.assert_allclose(vector, expected.reshape(-1), atol=0.02)  # OpenCV warps with 5 bits of a pixel
    assert antelope.measure == "f_sim" and list(antelope.info.weights) == ["glintr100.onnx"]


def test_antelopev2_is_insightfaces_recogniser(antelope, tmp_path):
    """The same vector, to a rounding of float32, from insightface's own class with the same weights."""
    arcface = pytest.importorskip("insightface.model_zoo.arcface_onnx")
    from insightface.app.common import Face as InsightFace

    theirs = arcface.ArcFaceONNX(str(tmp_path / "glintr100.onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    expected = theirs.get(np.ascontiguousarray(pixels[:, :, ::-1]), InsightFace(kps=np.array(KEYPOINTS)))
    vector = antelope.embed(pixels, antelope.align(pixels, Face(0.3, None, KEYPOINTS)))
    np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_antelopev2_asks_for_weights_and_keypoints(antelope, tmp_path):
    with pytest.raises(ModelError, match=r"glintr100\.onnx.*antelopev2\.zip"):
        load_face_engine("antelopev2")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is not antelopev2's recogniser"):
        load_face_engine("antelopev2", tmp_path / "bad.onnx")
    with pytest.raises(ConfigError, match="five keypoints"):
        antelope.align(np.zeros((9, 9, 3), np.uint8), Face(0.3, (0, 0, 9, 9)))
    with pytest.raises(ModelError, match="searches for no faces"):
        antelope.detect(np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize("name", list(FACE_ENGINES))
def test_an_engine_whose_package_is_absent_says_how_to_install_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr("vtc.eval.engines.base.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "glintr100.onnx").write_bytes(STAND_IN)
    with pytest.raises(ModelError, match="install it with: pip install"):
        load_face_engine(name, tmp_path if name == "antelopev2" else None)


def test_an_unknown_engine_is_a_sentence():
    with pytest.raises(ConfigError, match="dlib, antelopev2, not 'facenet'"):
        load_face_engine("facenet")
