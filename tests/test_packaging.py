"""The layout: who may import whom, what `import vtc` costs, what the wheel will hold."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

import vtc
from tests.shared import ROOT

ROOMS = ("codecs", "tokenizers", "generators", "eval")

#: room -> rooms that it may import; everything may import the ground floor, which are the modules directly in vtc/
MAY_IMPORT = {
    "ground": set(),
    "tokenizers": {"tokenizers"},
    "codecs": {"codecs", "tokenizers"},
    "generators": {"generators", "tokenizers"},
    "eval": {"eval", "tokenizers"},
    "front": {"tokenizers", "codecs", "generators", "eval", "front"},
}

#: in vtc/, but not on the ground floor: the front door may know every room
FRONT = ("__init__", "cli", "models", "training")


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tracked_files() -> list[str]:
    """What git tracks, or skips where this is not a clone (an unpacked source archive)."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git clone")
    return done.stdout.splitlines()


def floor_of(path: Path) -> str:
    """The room, or "ground" or "front" for what lies in vtc/."""
    room = path.relative_to(ROOT).parts[0]
    if room != "vtc":
        return room
    return "front" if path.relative_to(ROOT / "vtc").parts[0].removesuffix(".py") in FRONT else "ground"


def modules() -> list[Path]:
    vtc_files = [p for p in (ROOT / "vtc").rglob("*.py") if p.relative_to(ROOT / "vtc").parts[0] not in ROOMS]
    return sorted(vtc_files + [p for room in ROOMS for p in (ROOT / room).rglob("*.py")])


def imported_names(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, at its top or inside functions, type-checking blocks included."""
    here = [floor_of(path)] if path.relative_to(ROOT).parts[0] != "vtc" else []
    package = ["vtc", *here, *path.relative_to(ROOT).parts[1:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


# Names and imports


def test_rooms_have_no_init():
    assert [room for room in ROOMS if (ROOT / room / "__init__.py").exists()] == []


def test_rooms_shadow_nothing_at_the_repository_root(tmp_path):
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("marker = 'another package'")
    code = "import codecs; print(codecs.lookup('utf8').name)"
    assert run_python(code, cwd=ROOT) == "utf-8"
    # sys.path[0] is the repository root; the stand-in comes last, where site-packages are
    code = (f"import sys; sys.path = ['', *(p for p in sys.path if 'site-packages' not in p), {str(tmp_path)!r}]\n"
            "import tokenizers; print(tokenizers.marker)")
    assert run_python(code, cwd=ROOT) == "another package"


def test_hugging_face_tokenizers_import_from_the_repository_root():
    try:
        version = metadata.version("tokenizers")
    except metadata.PackageNotFoundError:
        pytest.skip("the package tokenizers is not installed")
    assert run_python("import tokenizers; print(tokenizers.Tokenizer and tokenizers.__version__)", cwd=ROOT) == version


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    """A room imports only the rooms below it; the ground floor imports none, and no room imports the front door."""
    allowed = MAY_IMPORT[floor_of(path)]
    for name in imported_names(path):
        first, _, rest = name.partition(".")
        if first != "vtc":
            assert first not in ("generators", "eval"), f"{name} is imported as vtc.{name}"
            continue
        second = rest.partition(".")[0]
        floor = second if second in ROOMS else "front" if second in FRONT or second in vtc._MODULE_OF else "ground"
        assert floor == "ground" or floor in allowed, f"{floor_of(path)} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_importers_of_torchvision_call_the_guard(path):
    """Or import vtc.eval.metric, which does; see vtc/torchvision_guard.py."""
    names = imported_names(path)
    if {n.partition(".")[0] for n in names} & {"compressai", "lpips", "torchmetrics", "torchvision"}:
        assert any(n.startswith(("vtc.torchvision_guard", "vtc.eval.metric")) for n in names)


def test_import_vtc_is_light():
    heavy = ("torch", "numpy", "PIL", "diffusers", "torchmetrics", "huggingface_hub", "lpips", "accelerate")
    code = f"import sys, vtc; dir(vtc); print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code, cwd=ROOT) == "[]"


def test_a_checkout_without_symlinks_imports(tmp_path):
    """Git on Windows writes a link as a text file that holds its target."""
    (tmp_path / "vtc").mkdir()
    (tmp_path / "vtc" / "__init__.py").write_text((ROOT / "vtc" / "__init__.py").read_text())
    for room in ROOMS:
        (tmp_path / "vtc" / room).write_text(f"../{room}")
        (tmp_path / room).mkdir()
        (tmp_path / room / "probe.py").write_text(f"name = {room!r}")
    code = "from vtc.codecs import probe as a; from vtc.eval import probe as b; print(a.name, b.name, a.__name__)"
    assert run_python(code, cwd=tmp_path) == "codecs eval vtc.codecs.probe"


# The public API


@pytest.mark.parametrize("name", sorted(vtc._MODULE_OF))
def test_public_name(name):
    module = importlib.import_module(vtc._MODULE_OF[name])
    value = getattr(vtc, name)
    assert value is getattr(module, name)
    if not isinstance(value, tuple):  # a constant does not know where it stands
        assert value.__module__ == vtc._MODULE_OF[name], "the table names the module that defines it"
    assert value.__doc__
    assert name in dir(vtc)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "vtc/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == vtc._MODULE_OF


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LocalVq'"):
        getattr(vtc, "LocalVq")  # noqa: B009 - spelled plainly, mypy finds the mistake


# What is shipped


def test_version_has_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vtc.__version__"}
    assert re.search(rf"^## {re.escape(vtc.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_wheel_will_hold_the_rooms_and_the_models():
    """setuptools' own finder and the project's patterns; scripts/check_wheel.py builds the real one."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_namespace_packages(str(ROOT), **settings["packages"]["find"])
    assert {f"vtc.{path.relative_to(ROOT).parts[0]}" for path in modules() if floor_of(path) in ROOMS} <= set(packages)
    patterns = settings["package-data"]["*"]
    carried = {file for package in packages for pattern in patterns
               for file in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert ROOT / "vtc/py.typed" in carried
    assert {p for p in (ROOT / "vtc/pretrained").rglob("*") if p.is_file()} <= carried
    assert not [p for p in packages if p.split(".")[0] != "vtc"]


def test_links_are_relative_links_in_git():
    if "vtc/codecs" not in tracked_files():
        pytest.fail("vtc/codecs is not tracked as a link")
    for room in ROOMS:
        link = ROOT / "vtc" / room
        text = str(link.readlink()) if link.is_symlink() else link.read_text()  # the latter: git on Windows
        assert text == f"../{room}"


def test_tracked_files_name_no_machine():
    """No absolute path of a machine that the project was made on, and no package index: both differ elsewhere."""
    parts = (("/wo", "rk/"), ("/tmp", "/w/"), ("/ro", "ot/"), ("/ho", "me/"), ("/o", "pt/"), ("py", "pi.org"),
             ("pythonhost", "ed.org"), ("index", "-url"))
    forbidden = re.compile("|".join(re.escape(a + b) for a, b in parts))
    found = []
    for name in tracked_files():
        path = ROOT / name
        if path.is_file() and path.suffix in ("", ".md", ".py", ".toml", ".txt", ".yaml", ".json", ".csv", ".cfg"):
            found += [f"{name}:{number}: {line.strip()}" for number, line in
                      enumerate(path.read_text(errors="replace").splitlines(), 1) if forbidden.search(line)]
    assert found == []
