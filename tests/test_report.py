"""The report: what a browser would need is in the page, and a browser shows it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.shared import ROOT
from vtc.eval.charts import Series, line_chart
from vtc.eval.measures import build
from vtc.eval.pairs import find_items, match
from vtc.eval.report import Picture, choose_images, compared, page, write_report
from vtc.eval.results import MethodResult, Result
from vtc.eval.suite import Files, Suite
from vtc.images import load_image, save_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
PSNR, SSIM = "peak_signal_noise_ratio", "structural_similarity"


def method(name: str, rate: float, psnr: list[float], family: str = "", **conditions) -> MethodResult:
    """A row that could have been measured: bpp and PSNR of images a, b, ..."""
    images = [chr(97 + n) for n in range(len(psnr))]
    results = {"bits_per_pixel": Result(rate, len(psnr), "mean_of_images", (rate * 0.9, rate * 1.1)),
               PSNR: Result(float(np.mean(psnr)), len(psnr), "mean_of_images", (min(psnr), max(psnr)))}
    return MethodResult(name, family or name, "codec", {"vocab": [8]}, {
        "reference_set": "set", "images_sha256": "0", "n": len(psnr), "size": None, "device": "cpu", "packages": {},
        "protocol": {"name": "native", "resize": "none", "crop": "none", "pixel_rounding": "nearest"},
        "metrics": {"bpp": {}, "psnr": {}}, **conditions}, results, {}, images,
        {"bits_per_pixel": np.full(len(psnr), rate), PSNR: np.array(psnr, dtype=np.float64)})


ABOUT = {"provenance": {"command": ["vtc-eval", "<x>"], "packages": {"torch": "2"}, "processor": "p", "threads": 1},
         "bootstrap": {"resamples": 2000}, "problems": ["a & b is <not> a picture."]}


class Parsed(html.parser.HTMLParser):
    """Tags in order, their attributes, and whether every element is closed where it should be."""

    VOID = ("meta", "link", "br", "img", "input", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two folders of reconstructions of three pictures."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((320, 200), Image.Resampling.BICUBIC))
        for folder in ("ref", "fine", "coarse"):
            (root / folder).mkdir(exist_ok=True)
        save_image(pixels, root / "ref" / f"{number}.png")
        for folder, quality in (("fine", 80), ("coarse", 8)):
            Image.fromarray(pixels).save(root / folder / f"{number}.jpg", quality=quality - number)
    items, _ = find_items(root / "ref")
    methods = [Files(name, match(items, root / name, name)[0], rate=True) for name in ("coarse", "fine")]
    for one in methods:
        one.family = "jpeg"
    suite = Suite(methods, [build(name) for name in ("bpp", "psnr", "ssim", "ms_ssim")], reference_set="ref")
    results, problems = suite.run(items)
    assert problems == []
    write_report(root / "out", results, suite, items, {**ABOUT, "title": "A <test> & more", "problems": []})
    return root / "out"


def test_the_page_holds_all_it_needs_and_is_well_formed(report):
    text = (report / "index.html").read_text()
    parsed = Parsed(text)
    for tag, attributes in parsed.found:
        for name in ("src", "href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("data:", "#")), f"{tag} refers to {target[:80]}"
    assert not re.search(r"@import|url\(\s*['\"]?https?:|fetch\(|XMLHttpRequest|import\(", text)
    ids = {attributes["id"] for _, attributes in parsed.found if "id" in attributes}
    assert {a["href"][1:] for a in parsed.all("a")} <= ids
    assert "A <test> & more" in parsed.text and "<test>" not in text
    assert [len(entry) for entry in (parsed.all("article"), parsed.all("select"), parsed.all("svg"))] == [3, 2, 3]
    for image in parsed.all("img"):
        assert image["alt"]
    for slider in parsed.all("input"):
        assert slider["type"] == "range" and slider["aria-label"]
    assert (report / "results.csv").read_text().count("\n") == 1 + 2 * 3
    assert json.loads((report / "results.json").read_text())["methods"][0]["name"] == "coarse"


def test_the_pictures_are_the_pictures(report):
    """Decoded from their URIs: the original's copy is close to it, and the reconstruction's to the reconstruction."""
    import base64

    parsed = Parsed((report / "index.html").read_text())
    by_alt = {image["alt"]: image["src"] for image in parsed.all("img")}
    for alt, path in (("0, original", "ref/0.png"), ("0, coarse", "coarse/0.jpg"), ("2, fine", "fine/2.jpg")):
        shown = load_image(base64.b64decode(by_alt[alt].partition(",")[2])).pixels.astype(float)
        true = load_image(report.parent / path).pixels.astype(float)
        assert shown.shape == true.shape
        assert np.square(shown - true).mean() < 30, alt  # copies are compressed again: some 35 dB


def test_the_worst_picture_comes_first(report):
    parsed = Parsed((report / "index.html").read_text())
    order = [article["data-name"] for article in parsed.all("article")]
    rows = [line.split(",") for line in (report / "results.csv").read_text().splitlines()]
    column = rows[0].index("multiscale_structural_similarity")
    worst_first = [row[0] for row in sorted((r for r in rows if r[1] == "coarse"), key=lambda r: float(r[column]))]
    assert order == worst_first


def test_tables_have_marks_best_values_and_escape():
    methods = [method("ours", 0.1, [20.0, 30.0]), method("<peer>", 0.1, [21.0, 33.0]),
               method("old", 0.1, [50.0], images_sha256="1")]
    methods[2].origin = "old.json"
    text = page(methods, ABOUT, [])
    parsed = Parsed(text)
    assert "<peer>" in parsed.text and "<peer>" not in text
    assert re.search(r'<td class="best">27\.00', text)  # not 50, which was measured on other pictures
    assert "[a] Made differently from the first row: other pictures (1 of set against 2 of set)." in parsed.text
    assert parsed.text.count("Made differently") == 1
    assert "a & b is <not> a picture." in parsed.text and "vtc-eval <x>" in parsed.text


def test_a_page_of_one_picture_and_one_method():
    parsed = Parsed(page([method("only", 0.1, [20.0])], {}, [Picture("a", 4, 4, "data:,", {"only": "data:,"})]))
    assert len(parsed.all("article")) == 1


def test_tokens_are_shown_as_a_language():
    """Four curves with the shuffled tokens dashed beside, and the table; a method without tokens has neither."""
    from vtc.eval.token_statistics import token_statistics

    grids = [np.random.default_rng(seed).integers(8, size=(6, 5)) for seed in range(4)]
    methods = [method("tokens", 0.1, [20.0]), method("peer", 0.1, [21.0])]
    methods[0].results["codebook_usage"] = Result(1.0, 4, "set")
    methods[0].extra["token_statistics"] = token_statistics(grids, 8).to_json()
    text = page(methods, ABOUT, [])
    parsed = Parsed(text)
    assert len(parsed.all("svg")) == 1 + 4  # PSNR over the rate, and the tokens'
    assert text.count('class="line dashed"') == 4
    assert "120" in parsed.text and "entropy, Grassberger" in parsed.text and "Heaps exponent (R2)" in parsed.text
    del methods[0].extra["token_statistics"]
    assert "as a language" not in Parsed(page(methods, ABOUT, [])).text


def test_curves_and_savings_of_families():
    rates = (0.1, 0.2, 0.4)
    methods = [method(f"{family} at {rate}", rate * scale, [20 + 10 * np.log10(rate * 10)] * 2, family)
               for family, scale in (("ours", 1.0), ("peer", 2.0)) for rate in rates]
    parsed = Parsed(page(methods, ABOUT, []))
    assert "+100.0 %" in parsed.text  # twice the bytes at equal quality
    lines = parsed.all("polyline")
    assert [line["points"].count(",") for line in lines] == [3, 3]
    # A rate that the finest file does not fill gives the same point again.
    methods.insert(3, method("ours at 0.8", 0.4, [20 + 10 * np.log10(4)] * 2, "ours"))
    assert "+100.0 %" in Parsed(page(methods, ABOUT, [])).text


def test_chart_places_points_in_proportion():
    """Equal steps of a logarithmic axis are equal steps on the paper; higher values stand higher."""
    text = line_chart([Series("s", [(1, 10.0), (10, 20.0), (100, 30.0)], 0)], "x", "y", log_x=True)
    circles = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    steps = np.diff(np.array(circles), axis=0)
    assert steps[0] == pytest.approx(steps[1], abs=0.11)
    assert steps[0][0] > 0 > steps[0][1]
    assert line_chart([Series("s", [], 0)], "x", "y") == ""


def test_images_and_methods_are_chosen():
    many = method("many", 0.1, [float(20 + (7 * n) % 50) for n in range(50)])
    chosen = choose_images(many, 10)
    worst, best = (many.images[place(many.columns[PSNR])] for place in (np.argmin, np.argmax))
    assert len(chosen) == 10 and {worst, best} <= set(chosen)
    assert choose_images(many, 50) == many.images
    row = [method(f"{family}{rate}", rate, [1.0], family) for family in "abcdefgh" for rate in (0.05, 0.11, 0.3)]
    assert [m.name for m in compared([row[1], *row[3:]])] == ["a0.11", "b0.11", "c0.11", "d0.11", "e0.11", "f0.11"]


# In a browser


def chromium(page_path, tmp_path, *options: str) -> str:
    """What headless Chromium prints; the network is cut off by a proxy that does not exist."""
    done = subprocess.run([str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                           "--hide-scrollbars", "--proxy-server=127.0.0.1:1", "--virtual-time-budget=3000",
                           f"--user-data-dir={tmp_path / 'profile'}", *options, page_path.as_uri()],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_chromium
def test_a_browser_runs_the_page(report, tmp_path):
    """Its script changes the method and the order; nothing overflows a narrow window; no error is raised."""
    probe = """<script>
      const errors = [];
      window.addEventListener("error", (e) => errors.push(String(e.message)));
      window.addEventListener("load", () => {
        const names = () => [...document.querySelectorAll(".gallery article")].map((a) => a.dataset.name);
        const box = document.querySelector(".compare"), range = box.querySelector("input");
        range.value = 25; range.dispatchEvent(new Event("input"));
        const before = names(), order = document.querySelector("#order"), select = document.querySelector("#method");
        order.value = "peak_signal_noise_ratio|down"; order.dispatchEvent(new Event("change"));
        select.value = "fine"; select.dispatchEvent(new Event("change"));
        const result = {before, after: names(), edge: getComputedStyle(box).getPropertyValue("--x"),
          shown: [...document.querySelectorAll("img.rec:not([hidden])")].map((i) => i.alt),
          loaded: [...document.images].every((i) => i.naturalWidth > 0),
          overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth, errors,
          dark: matchMedia("(prefers-color-scheme: dark)").matches};
        document.body.dataset.probe = JSON.stringify(result);
      });
    </script></body>"""
    text = (report / "index.html").read_text()
    path = tmp_path / "probed.html"
    path.write_text(text.replace("</body>", probe))
    dom = chromium(path, tmp_path, "--dump-dom", "--window-size=500,900")
    body = next(attributes for tag, attributes in Dom(dom).found if tag == "body")
    result = json.loads(body["data-probe"])
    assert result["errors"] == [] and result["loaded"]
    assert result["edge"] == "25%"
    assert sorted(result["before"]) == sorted(result["after"]) == ["0", "1", "2"]
    rows = [line.split(",") for line in (report / "results.csv").read_text().splitlines()]
    column = rows[0].index(PSNR)
    best_first = [r[0] for r in sorted((r for r in rows if r[1] == "fine"), key=lambda r: -float(r[column]))]
    assert result["after"] == best_first
    assert [alt.partition(", ")[2] for alt in result["shown"]] == ["fine"] * 3
    assert result["overflow"] <= 0


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_is_light_or_dark_and_shows_the_pictures(report, tmp_path, dark):
    shot = tmp_path / "shot.png"
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ("--blink-settings=preferredColorScheme=1",)
    chromium(report / "index.html", tmp_path, f"--screenshot={shot}", "--window-size=1280,2400", *scheme)
    pixels = load_image(shot).pixels
    assert pixels.shape == (2400, 1280, 3)
    corner = pixels[:20, :20].mean()
    assert corner < 60 if dark else corner > 220
    saturation = pixels.max(-1).astype(int) - pixels.min(-1)
    assert (saturation > 80).mean() > 0.05  # the coloured test pictures


class Dom(Parsed):
    """A browser's serialisation, which closes what it likes."""

    def handle_endtag(self, tag):
        pass

    def __init__(self, text: str) -> None:
        html.parser.HTMLParser.__init__(self)
        self.open, self.found, self.text = [], [], ""
        self.feed(text)


def test_the_template_ships():
    assert '"*.html"' in (ROOT / "pyproject.toml").read_text()
