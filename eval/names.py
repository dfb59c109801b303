"""What the suite can measure, without importing torch: short names for the command line, long ones for results.

A result's key is long and lower_snake; a table's heading is short; `better` says which way is up, `digits` how much of
a number is worth reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Quantity:
    """How one result is shown.

    name: its key in results. title: heading of its column. unit: after the title; may be empty.
    better: "" where neither way is. digits: behind the point.
    """

    name: str
    title: str
    unit: str = ""
    better: Better = ""
    digits: int = 4


_LPIPS = "learned_perceptual_image_patch_similarity"

QUANTITIES = {q.name: q for q in (
    Quantity("bits_per_pixel", "bpp", "bit/px", "lower"),
    Quantity("bits_per_pixel_pooled", "bpp, pooled", "bit/px", "lower"),
    Quantity("nominal_bits_per_pixel", "nominal bpp", "bit/px", "lower"),
    Quantity("peak_signal_noise_ratio", "PSNR", "dB", "higher", 2),
    Quantity("peak_signal_noise_ratio_pooled", "PSNR, pooled", "dB", "higher", 2),
    Quantity("structural_similarity", "SSIM", "", "higher"),
    Quantity("padded_structural_similarity", "SSIM, padded", "", "higher"),
    Quantity("multiscale_structural_similarity", "MS-SSIM", "", "higher"),
    Quantity(f"{_LPIPS}_alex", "LPIPS", "", "lower"),
    Quantity(f"{_LPIPS}_squeeze", "LPIPS, SqueezeNet", "", "lower"),
    Quantity(f"{_LPIPS}_vgg", "LPIPS, VGG", "", "lower"),
    Quantity("deep_image_structure_and_texture_similarity", "DISTS", "", "lower"),
    Quantity("frechet_inception_distance", "FID", "", "lower", 3),
    Quantity("patch_frechet_inception_distance", "patch FID", "", "lower", 3),
    Quantity("kernel_inception_distance", "KID", "", "lower", 5),
    Quantity("frechet_distance_alexnet_features_pool", "FD AlexNet", "", "lower", 3),
    Quantity("frechet_distance_squeezenet1_1_features_pool", "FD SqueezeNet", "", "lower", 3),
    Quantity("patch_frechet_distance_alexnet_features_pool", "patch FD AlexNet", "", "lower", 3),
    Quantity("glcm_score", "GLCM score", "", "", 4),
    Quantity("glcm_score_of_references", "GLCM, originals", "", "", 4),
    Quantity("glcm_entropy", "GLCM entropy", "bit", "", 3),
    Quantity("glcm_entropy_of_references", "GLCM entropy, originals", "bit", "", 3),
    Quantity("compression_ratio", "compression ratio", "", "", 2),
    Quantity("compression_ratio_of_references", "compression ratio, originals", "", "", 2),
    Quantity("stride_lattice_ratio", "lattice", "", "lower", 2),
    Quantity("shift_down", "shift down", "px", "", 3),
    Quantity("shift_right", "shift right", "px", "", 3),
    Quantity("codebook_usage", "words used", "", "higher", 3),
    Quantity("codebook_entropy", "entropy", "bit", "higher", 2),
    Quantity("codebook_entropy_corrected", "entropy, corrected", "bit", "higher", 2),
    Quantity("codebook_perplexity", "perplexity", "", "higher", 0),
    Quantity("codebook_tokens", "tokens", "", "", 0),
    Quantity("encode_seconds", "encode", "s", "lower", 3),
    Quantity("decode_seconds", "decode", "s", "lower", 3),
)}

#: short name -> what it is; the order is that of tables. Other names that are understood stand in SYNONYMS.
MEASURES = {
    "bpp": "bits per pixel of the whole files, mean of images",
    "bpp_pooled": "all bits over all pixels",
    "psnr": "PSNR, mean of the images' decibels",
    "psnr_pooled": "PSNR of the mean squared error",
    "ssim": "SSIM, windows inside the picture",
    "ssim_padded": "SSIM as torchmetrics pads it",
    "ms_ssim": "MS-SSIM; pictures from 161 pixels on",
    "lpips_alex": "LPIPS with AlexNet",
    "lpips_squeeze": "LPIPS with SqueezeNet",
    "lpips_vgg": "LPIPS with VGG-16",
    "dists": "DISTS",
    "fid": "Frechet distance over FID's Inception; for reconstructions, rFID",
    "patch_fid": "the same over 256x256 patches",
    "kid": "kernel distance over FID's Inception",
    "precision_recall": "precision and recall over FID's Inception",
    "fd_alexnet": "Frechet distance over AlexNet's last features",
    "fd_squeezenet": "Frechet distance over SqueezeNet's last features",
    "patch_fd_alexnet": "the same as fd_alexnet over 256x256 patches",
    "kd_alexnet": "kernel distance over AlexNet's last features",
    "precision_recall_alexnet": "precision and recall over AlexNet's last features",
    "glcm": "GLCM score of Diffusion-4K, reconstructions and originals",
    "glcm_entropy": "textbook entropy of the same matrices",
    "compression_ratio": "raw bytes over bytes of JPEG 95, as in Diffusion-4K",
    "lattice": "peaks of the error's spectrum at the network's stride",
    "bands": "energy of the error in Haar bands, relative to the original's",
    "shift": "by how much the reconstruction is displaced",
    "codebook": "usage, entropy and perplexity of the tokens",
    "seconds": "time to encode and to decode; with one job only",
}

SYNONYMS = {"lpips": "lpips_alex", "rfid": "fid", "ms-ssim": "ms_ssim", "rate": "bpp"}

#: what is measured unless --metrics says otherwise
DEFAULT = ("bpp", "psnr", "ssim", "ms_ssim", "lpips_alex", "codebook")


#: results of engines, whose names end in the engine's
ENGINE_RESULTS: tuple[tuple[str, str, Better], ...] = (
    ("text_accuracy_", "words read", "higher"), ("text_edit_similarity_", "edit similarity", "higher"),
    ("face_distance_", "face distance", "lower"), ("face_match_rate_", "faces matched", "higher"),
    ("face_centred_cosine_", "face cosine, centred", "higher"), ("f_sim_", "F-Sim", "higher"),
)


def quantity(name: str) -> Quantity:
    """How to show the result `name`; a name that is not in the table stands for itself.

    >>> quantity("peak_signal_noise_ratio").title
    'PSNR'
    >>> quantity("wavelet_error_low").title
    'wavelet error low'
    """
    if name in QUANTITIES:
        return QUANTITIES[name]
    for start, title, better in ENGINE_RESULTS:
        if name.startswith(start):
            return Quantity(name, f"{title}, {name.removeprefix(start)}", "", better, 3)
    return Quantity(name, name.replace("_", " "))


def shown(name: str, value: float | None) -> str:
    """A result as a table shows it.

    >>> shown("peak_signal_noise_ratio", 22.1849)
    '22.18'
    >>> shown("peak_signal_noise_ratio", None)
    '-'
    """
    if value is None or value != value:
        return "-"
    return f"{value:,.{quantity(name).digits}f}"
