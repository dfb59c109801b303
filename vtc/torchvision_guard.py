"""A torchvision that cannot be imported beside this torch no longer stops what merely imports it.

The torchvision on the package index is built for CUDA. Beside a CPU build of torch its library of operators does not
load, which torchvision itself tolerates; but a few lines later it describes the operator `torchvision::nms` to torch,
and that raises "operator torchvision::nms does not exist". With it fall `import lpips`, `import compressai` and
`import torchmetrics`, none of which calls the operator.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library

#: what torchvision's own library declares; names and types must be the same, or describing them fails again
SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_MISSING = "operator torchvision::nms does not exist"
_declared: list[Library] = []  # torch forgets the declarations when this object goes


def ensure_torchvision_imports() -> bool:
    """Call this before importing lpips, compressai or torchmetrics. Returns whether anything was mended.

    It acts in one case only: torchvision is installed, and importing it fails with "operator torchvision::nms does not
    exist". Then the operators `nms` and `qnms` are declared to torch without an implementation, torchvision is imported
    again, and a RuntimeWarning says so; its transforms, models and datasets work, and calling an operator raises
    torchvision's own error about its missing library. A torchvision that imports is left alone, a missing one stays
    missing, and any other error passes through.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return False
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    else:
        return False

    from torch.library import Library

    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the half that was imported before the error
    library = Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)
    importlib.import_module("torchvision")
    warnings.warn("The installed torchvision does not match this torch build; vtc declared its operators nms and qnms "
                  "so that it can be imported. Install the torchvision build of your torch to use operators.",
                  RuntimeWarning, stacklevel=2)
    return True
