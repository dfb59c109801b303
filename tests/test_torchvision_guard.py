"""The torchvision guard, each case in a fresh process, with stand-ins for torchvision and with the installed one."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.shared import ROOT

GUARD = """
import warnings
warnings.simplefilter("error")
from vtc.torchvision_guard import ensure_torchvision_imports
"""

#: what torchvision's `_meta_registrations` does: describe an operator that its library should have declared
BROKEN = """
import torch
from torchvision import half
@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets.new_empty(0)
@torch.library.register_fake("torchvision::qnms")
def meta_qnms(dets, scores, iou_threshold):
    return dets.new_empty(0)
whole = True
"""


def run(code, tmp_path, torchvision=None):
    """What `code` prints in a new process, where torchvision is the text given, or (None) the installed one."""
    if torchvision is not None:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(torchvision)
        (package / "half.py").write_text("")
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
    command = [sys.executable, "-c", path + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_mends_the_known_error_and_says_so(tmp_path):
    code = GUARD + """
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    print(ensure_torchvision_imports(), ensure_torchvision_imports())
import torch, torchvision
print(torchvision.whole, [w.category.__name__ for w in caught], torch.ops.torchvision.nms.default._schema)
"""
    out = " ".join(run(code, tmp_path, BROKEN))
    assert out == ("True False True ['RuntimeWarning'] "
                   "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def test_leaves_a_torchvision_that_imports_alone(tmp_path):
    code = GUARD + """
print(ensure_torchvision_imports())
import sys
print("torch" in sys.modules)
"""
    assert run(code, tmp_path, "whole = True") == ["False", "False"]


def test_a_missing_torchvision_stays_missing(tmp_path):
    code = "import sys; sys.modules['torchvision'] = None\n" + GUARD + "print(ensure_torchvision_imports())"
    assert run(code, tmp_path) == ["False"]


@pytest.mark.parametrize(("broken", "error"), [
    ("raise RuntimeError('operator torchvision::roi_align does not exist')", "RuntimeError"),
    ("raise OSError('disk')", "OSError"),
    ("import a_package_that_is_not_there", "ModuleNotFoundError"),
])
def test_other_errors_pass_through(tmp_path, broken, error):
    code = GUARD + f"""
try:
    ensure_torchvision_imports()
except {error} as error:
    print(type(error).__name__)
"""
    assert run(code, tmp_path, broken) == [error]


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_what_needs_torchvision_imports_with_the_installed_one(tmp_path):
    code = """
import warnings; warnings.simplefilter("ignore")
from vtc.torchvision_guard import ensure_torchvision_imports
ensure_torchvision_imports()
import lpips, torch, torchmetrics, torchvision
print(torchvision.transforms.CenterCrop(2)(torch.zeros(3, 4, 4)).shape[-1])
"""
    assert run(code, tmp_path) == ["2"]
