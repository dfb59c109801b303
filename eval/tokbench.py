"""TokBench's data as it lies on disk: annotations of words and faces, in pictures and films, and where the files are.

    TokBench/images/text_data/<set>/...          TokBench/annotations/text_<set>.json
    TokBench/images/face_data/wflw/...           TokBench/annotations/face_meta.json
    TokBench/videos/text_data/<set>/...          TokBench/video_annotations/text_<set>.json
    TokBench/videos/face_data/face_clip_3s/...   TokBench/video_annotations/videoface_meta.json
    <reconstructions>/{text,face}_data/<set>_<size>/<the same names>

Source: TokBench (Wu et al., 2505.18142), revision 855802d. Boxes and keypoints are pixels of the original picture,
always: a reconstruction is brought back to the original's size before anything is read from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vtc.errors import ConfigError, FileError, ImageError
from vtc.files import read_file
from vtc.images import load_image

Kind = Literal["text", "face"]
Medium = Literal["image", "video"]
Box = tuple[float, float, float, float]

#: the sets of each kind and medium, by the names of their folders
SETS: dict[tuple[Kind, Medium], tuple[str, ...]] = {
    ("text", "image"): ("ic13", "ic15", "tt", "textocr", "cord", "sroie", "infograph", "docvqa"),
    ("text", "video"): ("ch3", "ds"),
    ("face", "image"): ("wflw",),
    ("face", "video"): ("face_clip_3s",),
}


@dataclass(frozen=True)
class Word:
    """box: x1, y1, x2, y2 in pixels. truth: what is written there. ratio: the size of a character, see `text_ratio`."""

    box: Box
    truth: str
    ratio: float


@dataclass(frozen=True)
class Face:
    """ratio: the size of the face, see `face_ratio`. box: x1, y1, x2, y2 in pixels.

    keypoints: both eyes, nose, both corners of the mouth, left in the picture first, x and y in pixels; or None.
    """

    ratio: float
    box: Box | None = None
    keypoints: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Annotation:
    """A picture with its words or faces, or one frame (counted from 0) of the film `file_name`."""

    file_name: str
    height: int
    width: int
    words: tuple[Word, ...] = ()
    faces: tuple[Face, ...] = ()
    frame: int | None = None

    @property
    def key(self) -> str:
        """The name in results."""
        return self.file_name if self.frame is None else f"{self.file_name}#{self.frame}"

    def check(self, pixels: np.ndarray) -> None:
        """Refuse a picture of another size; `pixels` uint8 (H, W, 3)."""
        if pixels.dtype != np.uint8 or pixels.shape != (self.height, self.width, 3):
            raise ImageError(f"{self.key} is annotated as {self.width}x{self.height}, and the picture is "
                             f"{pixels.dtype} {pixels.shape}; bring it back to the original's size first.")


def text_ratio(box: Box, truth: str, height: int, width: int) -> float:
    """Longer side of the box per character over the longer side of the picture.

    TokBench's files carry their ratios; the published numbers have this form, though which side of the box was taken
    cannot be told from them. For a word of several characters both are its width.

    >>> text_ratio((0, 0, 60, 20), "abc", 500, 1000)
    0.02
    """
    return max(box[2] - box[0], box[3] - box[1]) / len(truth) / max(height, width)


def face_ratio(box: Box, height: int, width: int) -> float:
    """Longer side of the box over the longer side of the picture. TokBench does not publish its definition."""
    return max(box[2] - box[0], box[3] - box[1]) / max(height, width)


def read_annotations(path: str | Path, kind: Kind, medium: Medium = "image") -> list[Annotation]:
    """The annotations of one file of TokBench; FileError where it cannot be read or has another form."""
    entries = _json_list(path)
    parse = {("text", "image"): _words_of_picture, ("text", "video"): _words_of_frame,
             ("face", "image"): _faces_of_picture, ("face", "video"): _faces_of_film}.get((kind, medium))
    if parse is None:
        raise ConfigError(f"Annotations are of text or face, in image or video, not {kind!r} in {medium!r}.")
    found: list[Annotation] = []
    for number, entry in enumerate(entries):
        try:
            found.extend(parse(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{path} is no {kind} annotation of TokBench: its entry {number} cannot be read "
                            f"({type(error).__name__}: {error}).") from error
    return found


def annotation_file(root: str | Path, kind: Kind, dataset: str, medium: Medium = "image") -> Path:
    """Where TokBench keeps the annotations of a set."""
    _check_set(kind, dataset, medium)
    if medium == "image":
        name = f"text_{dataset}.json" if kind == "text" else "face_meta.json"
        return Path(root) / "annotations" / name
    name = f"text_{dataset}.json" if kind == "text" else "videoface_meta.json"
    return Path(root) / "video_annotations" / name


def original_folder(root: str | Path, kind: Kind, dataset: str, medium: Medium = "image") -> Path:
    """Where TokBench keeps the originals of a set."""
    _check_set(kind, dataset, medium)
    return Path(root) / f"{medium}s" / f"{kind}_data" / dataset


def reconstruction_folder(root: str | Path, kind: Kind, dataset: str, size: int, medium: Medium = "image") -> Path:
    """Where the reconstructions of a set at one size are looked for."""
    _check_set(kind, dataset, medium)
    return Path(root) / f"{kind}_data" / f"{dataset}_{size}"


def find_picture(folder: str | Path, file_name: str, compat: bool = False) -> Path:
    """The reconstruction of `file_name` in `folder`: the same name with a lossless suffix.

    compat: take the very same name, JPEG included, as TokBench does; its losses are then part of every score.
    Raises FileError where there is none, saying which names were looked for.
    """
    exact = Path(folder) / file_name
    if compat:
        if exact.is_file():
            return exact
        raise FileError(f"There is no reconstruction {exact}.")
    for suffix in (".png", ".tif", ".tiff", ".bmp", ".ppm"):
        if (candidate := exact.with_suffix(suffix)).is_file():
            return candidate
    if exact.is_file():
        raise FileError(f"{exact} may have lost something when it was saved, which would be counted as the "
                        "tokenizer's loss; save reconstructions as PNG, or ask for TokBench's own way with compat.")
    raise FileError(f"There is no reconstruction {exact.with_suffix('.png')}.")


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a film, uint8 (H, W, 3), one at a time: a folder of numbered PNGs, or a file that OpenCV decodes.

    A folder is lossless; TokBench writes .mp4, whose losses are then part of every score.
    Raises FileError and, where OpenCV is not installed, ConfigError.
    """
    path = Path(path)
    if path.is_dir():
        frames = sorted(path.glob("*.png"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)])
        if not frames:
            raise FileError(f"The folder {path} holds no frames (*.png).")
        yield from (load_image(frame).pixels for frame in frames)
        return
    if not path.is_file():
        raise FileError(f"There is no film {path}.")
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(f"{path} needs a film decoder: pip install opencv-python-headless, or give a folder of PNG "
                          "frames.") from error
    film = cv2.VideoCapture(str(path))
    try:
        ok, frame = film.read()
        if not ok:
            raise FileError(f"{path} is no film that can be decoded.")
        while ok:
            yield np.ascontiguousarray(frame[:, :, ::-1])  # OpenCV has blue first
            ok, frame = film.read()
    finally:
        film.release()


def film_file(folder: str | Path, file_name: str, compat: bool = False) -> Path:
    """The reconstruction of a film: the folder of PNG frames named as it without suffix; under compat the .mp4."""
    path = Path(folder) / file_name
    if compat:
        return path
    if path.with_suffix("").is_dir():
        return path.with_suffix("")
    raise FileError(f"There is no folder {path.with_suffix('')} with the frames as PNG; a compressed film would add "
                    "its own losses (compat takes it nevertheless).")


class Films:
    """The frames that annotations name, film after film and in ascending order, so that one frame is held at a time.

    open_film: the path of a film by its name, a file or a folder as for `read_frames`.
    """

    def __init__(self, open_film: Callable[[str], Path]) -> None:
        self._open_film = open_film
        self._name = ""
        self._next = 0
        self._frames: Iterator[np.ndarray] = iter(())
        self._frame: np.ndarray | None = None

    def __call__(self, annotation: Annotation) -> np.ndarray:
        """uint8 (H, W, 3); FileError where the film is shorter."""
        if annotation.frame is None:
            raise ConfigError(f"The annotation of {annotation.file_name} names no frame.")
        if annotation.file_name != self._name or annotation.frame < self._next - 1:
            self._name, self._next, self._frame = annotation.file_name, 0, None
            self._frames = read_frames(self._open_film(annotation.file_name))
        while self._next <= annotation.frame:
            self._frame = next(self._frames, None)
            if self._frame is None:
                raise FileError(f"{annotation.file_name} has {self._next} frames, and frame {annotation.frame} is "
                                "annotated.")
            self._next += 1
        assert self._frame is not None
        return self._frame


def _json_list(path: str | Path) -> list[Any]:
    try:
        entries = json.loads(read_file(path))
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(entries, list):
        raise FileError(f"{path} is no annotation of TokBench: it holds no list.")
    return entries


def _words_of_picture(entry: Any) -> Iterator[Annotation]:
    yield Annotation(entry["file_name"], int(entry["height"]), int(entry["width"]), _words(entry))


def _words_of_frame(entry: Any) -> Iterator[Annotation]:
    """`file_name` ends in -frameN, N from 1; the film is `video_name`.mp4."""
    frame = re.search(r"-frame(\d+)(?:\.\w+)?$", entry["file_name"])
    if frame is None:
        raise ValueError(f"{entry['file_name']!r} does not end in -frame and a number")
    if entry["annotations"]:
        yield Annotation(entry["video_name"] + ".mp4", int(entry["height"]), int(entry["width"]), _words(entry),
                         frame=int(frame[1]) - 1)


def _words(entry: Any) -> tuple[Word, ...]:
    return tuple(Word(_box(w["bbox"]), str(w["rec"]), float(w["ratio"])) for w in entry["annotations"])


def _faces_of_picture(entry: Any) -> Iterator[Annotation]:
    yield Annotation(entry["image_name"], int(entry["img_height"]), int(entry["img_width"]),
                     faces=tuple(_face(face) for face in entry["faces"]))


def _faces_of_film(entry: Any) -> Iterator[Annotation]:
    for number, faces in enumerate(entry["frame_anns"]):
        if faces:
            yield Annotation(entry["video_name"], int(entry["video_height"]), int(entry["video_width"]),
                             faces=tuple(_face(face) for face in faces), frame=number)


def _face(face: Any) -> Face:
    points = tuple((float(x), float(y)) for x, y in face["kps"])
    if len(points) != 5:
        raise ValueError(f"a face has {len(points)} keypoints, not 5")
    return Face(float(face["ratio"]), _box(face["box"]) if face.get("box") else None, points)


def _box(values: Any) -> Box:
    x1, y1, x2, y2 = (float(v) for v in values)
    return x1, y1, x2, y2


def _check_set(kind: Kind, dataset: str, medium: Medium) -> None:
    if dataset not in SETS.get((kind, medium), ()):
        raise ConfigError(f"TokBench's {kind} sets of {medium}s are {', '.join(SETS.get((kind, medium), ())) or 'none'}"
                          f", not {dataset!r}.")
