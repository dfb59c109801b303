"""Store a tokenizer's weights as int8, half the bytes, and measure what that costs.

    python scripts/quantize_weights.py --model localvq-f16-8192-r3 --output runs/int8 --images ../shared/data/holdout
    python scripts/quantize_weights.py --model runs/localvq/model --output runs/int8 --layers decoder.

The new folder loads as any other. With --images, the model is measured before and after: LPIPS (AlexNet) and PSNR of
what is decoded, and how many tokens are others. The decoder's numbers change, so its fingerprint and streams are those
of another model: family, prior and concealer are to be made anew. `train_tokenizer.py --int8` trains with the rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from vtc.errors import FileError
from vtc.script import run_script


def main(arguments: list[str] | None = None) -> int:
    """Parse, quantize, measure, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)
    return run_script(lambda: quantized_model(args), "quantize_weights")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, folder, or repository on the Hub")
    parser.add_argument("--output", required=True, type=Path, help="folder of the new model")
    parser.add_argument("--layers", nargs="+", default=[""], metavar="PREFIX",
                        help="only layers whose names begin so, such as decoder.; default: all convolutions and linear "
                             "layers")
    parser.add_argument("--images", type=Path, help="folder of pictures to measure on")
    parser.add_argument("--limit", type=int, default=0, help="the first so many pictures; 0: all")
    parser.add_argument("--lpips_weights", type=Path, help="folder of AlexNet's features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON on stdout")
    return parser.parse_args(arguments)


def quantized_model(args: argparse.Namespace) -> None:
    """The whole job."""
    from vtc.hub import WEIGHTS, fetch
    from vtc.int8 import quantize_weights
    from vtc.models import load_tokenizer

    model = load_tokenizer(args.model)
    quantized = deepcopy(model)
    names = quantize_weights(cast(Any, quantized), tuple(args.layers))
    try:
        cast(Any, quantized).save_pretrained(args.output)
    except OSError as error:
        raise FileError(f"The model cannot be written to {args.output}: {error.strerror or error}.") from error
    facts: dict[str, Any] = {
        "layers": len(names), "weights": sum(cast(Any, quantized).get_parameter(name).numel() for name in names),
        "bytes": [fetch(args.model, WEIGHTS).stat().st_size, (args.output / WEIGHTS).stat().st_size],
        "fingerprint": [model.fingerprint().hex(), quantized.fingerprint().hex()]}
    if args.images is not None:
        facts |= measured([model, load_tokenizer(args.output)], args)
    if args.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name}: " + (" -> ".join(map(str, value)) if isinstance(value, list) else str(value)))


def measured(models: Sequence[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Means of the two models over the pictures, and their share of tokens that differ."""
    from vtc.tokenizers.lpips import LPIPS
    from vtc.training.data import validation_pictures
    from vtc.training.tokenizer import evaluate

    pictures = validation_pictures(args.images, "val", args.limit)
    judge = LPIPS("alex", args.lpips_weights)
    results = [evaluate(model, pictures, judge) for model in models]
    tokens = [[model.encode(picture[None]).indices for picture in pictures] for model in models]
    differing = sum(int((a != b).sum()) for a, b in zip(*tokens, strict=True))
    return {"pictures": len(pictures), "tokens": sum(t.numel() for t in tokens[0]), "tokens_that_differ": differing,
            **{name: [result[name] for result in results] for name in results[0]}}


if __name__ == "__main__":
    sys.exit(main())
