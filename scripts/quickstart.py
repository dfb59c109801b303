"""A photograph there and back: `python3 scripts/quickstart.py [picture] [-o folder]`, with any Python from 3.11.

Encodes it with the bundled model, decodes it, says what it cost and what was lost, and shows both side by side.
The first run makes `.venv` and installs vtc there; later ones start at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from environment import ROOT, continue_in_environment

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

#: prints one line a number; the last tells how to get the weights that LPIPS needs
DOWNLOAD = ("python -c \"from vtc.torchvision_guard import ensure_torchvision_imports as mend; mend(); "
            "import torchvision; torchvision.models.alexnet(weights='DEFAULT')\"")


def main() -> None:
    parser = argparse.ArgumentParser(description="Encodes and decodes a picture with vtc's bundled model.")
    parser.add_argument("picture", nargs="?", type=Path, default=ROOT / "docs/images/coffee.png",
                        help="default: a photograph of a cup of coffee")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "out", help="folder for the results (default: out)")
    arguments = parser.parse_args()
    continue_in_environment()

    from vtc.errors import VtcError

    try:
        there_and_back(arguments.picture, arguments.output)
    except (VtcError, OSError) as error:
        parser.exit(1, f"{error}\n")


def there_and_back(picture: Path, folder: Path) -> None:
    import torch

    from vtc import TokenCodec, load_image, load_tokenizer, save_image

    image = load_image(picture)
    codec = TokenCodec(load_tokenizer())
    with torch.inference_mode():
        stream = codec.compress(image)
        decoded = codec.decompress(stream)

    folder.mkdir(parents=True, exist_ok=True)
    encoded_to, decoded_to, both_to = (folder / f"{picture.stem}{end}" for end in
                                       (".vtc", ".decoded.png", ".side_by_side.png"))
    encoded_to.write_bytes(stream)
    save_image(decoded, decoded_to)

    height, width = image.shape[-2:]
    decoded = (decoded * 255).round() / 255  # what the PNG holds
    psnr = -10 * torch.log10((image - decoded).pow(2).mean()).item()
    rate = 8 * len(stream) / (height * width)
    print(f"{picture.name}: {width}x{height} pixels, {picture.stat().st_size:,} bytes as a file")
    print(f"bytes  {len(stream):,}  {encoded_to}")
    print(f"bpp    {rate:.4f}")
    print(f"PSNR   {psnr:.2f} dB  {decoded_to}")
    print(f"LPIPS  {lpips(image, decoded)}")
    side_by_side(picture, decoded_to, f"vtc: {len(stream):,} bytes, {rate:.3f} bpp, {psnr:.1f} dB").save(both_to)
    print(f"Side by side: {both_to}")


def lpips(image: Tensor, decoded: Tensor) -> str:
    """The distance by AlexNet, or where its weights are missing, how to get them."""
    from vtc import LPIPS, ModelError

    shared = ROOT.parent / "shared" / "weights"
    beside = shared if "VTC_LPIPS_WEIGHTS" not in os.environ and shared.is_dir() else None
    try:
        network = LPIPS("alex", weights=beside)
    except ModelError:
        return f"needs AlexNet's ImageNet weights (233 MB); in the environment, run: {DOWNLOAD}"
    return f"{network(image, decoded).item():.3f} (AlexNet)"


def side_by_side(original: Path, decoded: Path, label: str) -> Image.Image:
    """Both pictures at their own size, each under a line that says what it is."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    with Image.open(original) as left, Image.open(decoded) as right:
        panels = [(f"original: {original.stat().st_size:,} bytes", ImageOps.exif_transpose(left).convert("RGB")),
                  (label, right.convert("RGB"))]
    font, gap = ImageFont.load_default(size=16), 8
    strip = 16 + 2 * gap
    widths = [max(p.width, int(font.getlength(text)) + 2 * gap) for text, p in panels]
    sheet = Image.new("RGB", (sum(widths) + gap, strip + panels[0][1].height), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for (text, panel), width in zip(panels, widths, strict=True):
        draw.text((x + gap, gap), text, fill="black", font=font)
        sheet.paste(panel, (x, strip))
        x += width + gap
    return sheet


if __name__ == "__main__":
    main()
