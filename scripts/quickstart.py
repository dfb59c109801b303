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

#: gets the weights that LPIPS needs, into the folder where torch keeps its downloads
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
    from vtc import load_codec, load_image, save_image

    image = load_image(picture).tensor()
    codec = load_codec()
    [stream] = codec.compress(image[None])
    [decoded] = codec.decompress([stream])

    folder.mkdir(parents=True, exist_ok=True)
    encoded_to, decoded_to, both_to = (folder / f"{picture.stem}{end}" for end in
                                       (".vtc", ".decoded.png", ".side_by_side.png"))
    encoded_to.write_bytes(stream)
    save_image(decoded, decoded_to)

    height, width = image.shape[-2:]
    decoded = load_image(decoded_to).tensor()  # judged is what the PNG holds
    psnr = -10 * (image - decoded).pow(2).mean().log10().item()
    rate = 8 * len(stream) / (height * width)
    print(f"{picture.name}: {width}x{height} pixels, {picture.stat().st_size:,} bytes as a file")
    print(f"bytes  {len(stream):,}  {encoded_to}")
    print(f"bpp    {rate:.4f}")
    print(f"PSNR   {psnr:.2f} dB  {decoded_to}")
    print(f"LPIPS  {lpips(image, decoded)}")
    side_by_side([(f"original: {picture.stat().st_size:,} bytes", image),
                  (f"vtc: {len(stream):,} bytes, {rate:.3f} bpp, {psnr:.1f} dB", decoded)]).save(both_to)
    print(f"Side by side: {both_to}")


def lpips(image: Tensor, decoded: Tensor) -> str:
    """The distance by AlexNet, or where its weights are missing, how to get them."""
    from vtc import LPIPS, ModelError

    shared = ROOT.parent / "shared" / "weights"
    beside = shared if "VTC_LPIPS_WEIGHTS" not in os.environ and shared.is_dir() else None
    if min(image.shape[-2:]) < 64:
        return "is for pictures of at least 64 pixels a side"
    try:
        network = LPIPS("alex", weights=beside)
    except ModelError:
        return f"needs AlexNet's ImageNet weights (233 MB); in the environment, run: {DOWNLOAD}"
    return f"{network(image[None], decoded[None]).item():.3f} (AlexNet)"


def side_by_side(panels: list[tuple[str, Tensor]]) -> Image.Image:
    """Pictures (3, H, W) at their own size in a row, each under a line that says what it is."""
    from PIL import Image, ImageDraw, ImageFont

    from vtc.images import to_uint8

    pictures = [(text, Image.fromarray(to_uint8(pixels))) for text, pixels in panels]
    font, gap = ImageFont.load_default(size=16), 8
    strip = 16 + 2 * gap
    widths = [max(p.width, int(font.getlength(text)) + 2 * gap) for text, p in pictures]
    sheet = Image.new("RGB", (sum(widths) + gap, strip + pictures[0][1].height), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for (text, panel), width in zip(pictures, widths, strict=True):
        draw.text((x + gap, gap), text, fill="black", font=font)
        sheet.paste(panel, (x, strip))
        x += width + gap
    return sheet


if __name__ == "__main__":
    main()
