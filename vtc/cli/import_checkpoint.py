"""vtc-import: a published checkpoint to a folder of vtc."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.cli.common import guarded, say
from vtc.errors import FileError
from vtc.tokenizers.classes import FAMILIES

if TYPE_CHECKING:
    from vtc.generators.pretrained import LoadedGenerator


def make_parser() -> argparse.ArgumentParser:
    """The arguments of vtc-import."""
    import vtc

    parser = argparse.ArgumentParser(
        prog="vtc-import",
        description="Turn a tokenizer's checkpoint, as its authors published it, into a folder of config.json and "
                    "model.safetensors that every command takes as --model. VQGAN (taming, VQGAN-compression), IBQ, "
                    "LlamaGen, WeTok, Open-MAGVIT2, VAR, Infinity; diffusers' VQModel, and its AutoencoderKL and "
                    "AutoencoderDC and SC-VAE, which give no tokens. With --tokenizer a generator's, of VAR, Infinity "
                    "or LlamaGen, into a folder for vtc-generate. Nothing in it is executed.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage. Examples: vtc-import wetok.ckpt wetok-f16 --set groups=4; "
               "vtc-import var_d16.pth var-d16 --tokenizer vae_ch160v4096z32.pth")
    parser.add_argument("source", metavar="SOURCE", help=".ckpt, .pt, .pth, .bin, .safetensors, or diffusers' folder")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist yet, or be empty")
    parser.add_argument("--tokenizer", metavar="PATH",
                        help="SOURCE is a generator, and this its tokenizer: a published file too, or a folder of vtc")
    parser.add_argument("--family", choices=FAMILIES, metavar="NAME",
                        help=f"say outright what it is, where the keys leave it open: {', '.join(FAMILIES)}")
    parser.add_argument("--set", dest="settings", metavar="NAME=VALUE", type=_setting, action="append", default=[],
                        help="a setting that the file does not tell, as JSON: sides=[1,2,3], groups=4; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32",
                        help="float32 (default) keeps every weight as it is, and as float16 what that holds exactly; "
                             "float16 rounds: half the size, and some tokens in a thousand differ")
    parser.add_argument("--json", action="store_true", help="what was made, as JSON on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but failures")
    parser.add_argument("--version", action="version", version=f"%(prog)s {vtc.__version__}")
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value of {name} is not JSON: {value!r}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileError(f"{out} exists already; name a folder that does not.")
        model: Any
        if args.tokenizer:
            model = generator = _generator(args)
        else:
            from vtc.tokenizers.upstream import load_checkpoint

            model, generator = load_checkpoint(args.source, args.family, **dict(args.settings)), None
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            for part in (model,) if generator is None else (generator.model, generator.tokenizer):
                part.exact_weights = args.dtype == "float32"
            if generator is None:
                model.save_pretrained(temporary)
            else:
                generator.save(temporary)
                model = generator.model
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            if out.is_dir():  # and empty
                for part in temporary.iterdir():
                    os.replace(part, out / part.name)
            else:
                os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        parameters = sum(p.numel() for p in model.parameters())
        about = ({"downsample": model.downsample} if generator is None else
                 {"tokenizer": type(generator.tokenizer).__name__, "downsample": generator.tokenizer.downsample})
        if args.json:
            print(json.dumps({"input": args.source, "output": str(out), "class": type(model).__name__,
                              "parameters": parameters, **about}), file=sys.stdout)
        if not args.quiet:
            say(f"{args.source} -> {out}: {type(model).__name__}, {parameters / 1e6:.1f} M parameters")
        return 0

    return guarded(parser, command)


def _generator(args: argparse.Namespace) -> LoadedGenerator:
    """Of a published generator's file and its tokenizer's. VtcError, and where the two do not fit."""
    from vtc.generators.pretrained import LoadedGenerator
    from vtc.generators.upstream import load_generator_checkpoint
    from vtc.generators.var import VAR
    from vtc.models import load_tokenizer
    from vtc.tokenizers.upstream import load_checkpoint

    model = load_generator_checkpoint(args.source, args.family, **dict(args.settings))
    path = Path(args.tokenizer)
    tokenizer: Any
    if path.is_file():
        # VAR's tokenizer has the same weights for any sides; these are the ones that the generator draws.
        settings: dict[str, Any] = {"sides": list(model.sides)} if isinstance(model, VAR) else {}
        tokenizer = load_checkpoint(path, **settings)
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    return LoadedGenerator(model, tokenizer)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main())
