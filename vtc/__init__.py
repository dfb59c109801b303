"""vtc: images as discrete tokens, compressed, generated and judged.

Public names come flat and lazily: `from vtc import LocalVQ` imports torch and the one module behind `LocalVQ`,
`import vtc` alone imports neither torch nor numpy, so that a command line answers `--help` at once.

To add a name: a line in `_MODULE_OF` below, and the same name under TYPE_CHECKING, where type checkers and editors read
it. A test holds the two together.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the one place: pyproject.toml reads it from here

# The rooms are git symlinks to folders at the repository root. A checkout without symlinks (git on Windows) has small
# text files in their place; the rooms are then found at the root itself.
if not (Path(__file__).parent / "codecs").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

#: public name -> module that defines it, floor by floor
_MODULE_OF = {
    # errors
    "VtcError": "vtc.errors",
    "ImageError": "vtc.errors",
    "BitstreamError": "vtc.errors",
    "ModelError": "vtc.errors",
    "ConfigError": "vtc.errors",
    "FileError": "vtc.errors",
    "TrainingError": "vtc.errors",
    # images and models
    "LoadedImage": "vtc.images",
    "load_image": "vtc.images",
    "save_image": "vtc.images",
    "load_codec": "vtc.models",
    "load_generator": "vtc.models",
    "load_tokenizer": "vtc.models",
    # tokenizers
    "CodebookFamily": "vtc.tokenizers.codebook_clustering",
    "CodebookFinetuning": "vtc.tokenizers.codebook_finetuning",
    "LPIPS": "vtc.tokenizers.lpips",
    "LocalVQ": "vtc.tokenizers.local_vq",
    "Quantized": "vtc.tokenizers.base",
    "TokenLayout": "vtc.tokenizers.base",
    "Tokenizer": "vtc.tokenizers.base",
    "Tokens": "vtc.tokenizers.base",
    "VectorQuantizer": "vtc.tokenizers.vector_quantizer",
    "WaveletLoss": "vtc.tokenizers.wavelet_loss",
    "WaveletTransform": "vtc.tokenizers.wavelets",
    "cluster_codebook": "vtc.tokenizers.codebook_clustering",
    "kmeans": "vtc.tokenizers.kmeans",
    "TokenizerFamily": "vtc.tokenizers.tokenizer_family",
    "with_codebook": "vtc.tokenizers.codebook_clustering",
    # quantizers
    "BinarySphericalQuantizer": "vtc.tokenizers.binary_spherical",
    "CodebookStatistics": "vtc.tokenizers.codebook_stats",
    "FiniteScalarQuantizer": "vtc.tokenizers.finite_scalar",
    "GradientVectorQuantizer": "vtc.tokenizers.vector_quantizer",
    "GroupLFQ": "vtc.tokenizers.lookup_free",
    "IndexBackpropQuantizer": "vtc.tokenizers.index_backprop",
    "LFQ": "vtc.tokenizers.lookup_free",
    "MultiScaleBinaryQuantizer": "vtc.tokenizers.multi_scale_binary",
    "MultiScaleResidualQuantizer": "vtc.tokenizers.multi_scale_residual",
    "ProductQuantizer": "vtc.tokenizers.product_quantizer",
    "Quantizer": "vtc.tokenizers.quantizer",
    "ResidualQuantizer": "vtc.tokenizers.residual_quantizer",
    # networks, checkpoints and what they train with
    "adaptive_weight": "vtc.tokenizers.losses",
    "annealed_entropy_weight": "vtc.tokenizers.lookup_free",
    "BlurPatchGAN": "vtc.tokenizers.discriminators",
    "decode_tiled": "vtc.tokenizers.tiling",
    "DecodedWithFeatures": "vtc.tokenizers.scale_consistent_vae",
    "DiffusersAutoencoder": "vtc.tokenizers.diffusers_adapters",
    "DiffusersVQ": "vtc.tokenizers.diffusers_adapters",
    "discriminator_loss": "vtc.tokenizers.losses",
    "draw_transform": "vtc.tokenizers.equivariance",
    "doubled_conv": "vtc.tokenizers.scale_consistent_vae",
    "encode_tiled": "vtc.tokenizers.tiling",
    "estimate_clean": "vtc.tokenizers.wavelet_loss",
    "generator_loss": "vtc.tokenizers.losses",
    "gradient_penalty": "vtc.tokenizers.losses",
    "hinge_discriminator_loss": "vtc.tokenizers.losses",
    "hinge_generator_loss": "vtc.tokenizers.losses",
    "ComposedPyramid": "vtc.tokenizers.composed",
    "ComposedTokenizer": "vtc.tokenizers.composed",
    "compose": "vtc.tokenizers.composed",
    "IBQ": "vtc.tokenizers.ibq",
    "import_checkpoint": "vtc.tokenizers.upstream",
    "INFINITY_1M": "vtc.tokenizers.multi_scale_binary",
    "InfinityVAE": "vtc.tokenizers.infinity_vae",
    "Latents": "vtc.tokenizers.base",
    "LeCAM": "vtc.tokenizers.losses",
    "LlamaGenVQ": "vtc.tokenizers.llamagen_vq",
    "load_checkpoint": "vtc.tokenizers.upstream",
    "non_saturating_generator_loss": "vtc.tokenizers.losses",
    "OpenMAGVIT2": "vtc.tokenizers.open_magvit2",
    "patch_mse": "vtc.tokenizers.losses",
    "PatchGAN": "vtc.tokenizers.discriminators",
    "PatchVAE": "vtc.tokenizers.patch_vae",
    "scale_and_turn": "vtc.tokenizers.equivariance",
    "scale_consistency_loss": "vtc.tokenizers.losses",
    "ScaleConsistentVAE": "vtc.tokenizers.scale_consistent_vae",
    "SpectralDiscriminator": "vtc.tokenizers.discriminators",
    "vanilla_discriminator_loss": "vtc.tokenizers.losses",
    "VAR_256": "vtc.tokenizers.multi_scale_residual",
    "VAR_512": "vtc.tokenizers.multi_scale_residual",
    "VARVQVAE": "vtc.tokenizers.var_vqvae",
    "PyramidVQ": "vtc.tokenizers.pyramid_vq",
    "VQGAN": "vtc.tokenizers.vqgan",
    "warm_up": "vtc.tokenizers.losses",
    "WaveletBands": "vtc.tokenizers.wavelets",
    "WeTok": "vtc.tokenizers.wetok",
    # codecs
    "Hyperprior": "vtc.codecs.hyperprior",
    "LatentCodec": "vtc.codecs.latent_codec",
    "RateControl": "vtc.codecs.rates",
    "CompressAIForm": "vtc.codecs.compressai_form",
    "Received": "vtc.codecs.token_codec",
    "TokenCodec": "vtc.codecs.token_codec",
    "TokenPrior": "vtc.codecs.prior",
    # metrics and the suite behind vtc-eval: classes, and functional twins in lower case
    "band_energies": "vtc.eval.wavelet_bands",
    "bd_quality": "vtc.eval.bd_rate",
    "bd_rate": "vtc.eval.bd_rate",
    "bits_per_pixel": "vtc.eval.bits",
    "BitsPerPixel": "vtc.eval.bits",
    "BjontegaardDelta": "vtc.eval.bd_rate",
    "bootstrap_interval": "vtc.eval.bootstrap",
    "codebook_usage": "vtc.eval.codebook",
    "CodebookUsage": "vtc.eval.codebook",
    "CodebookUsageMetric": "vtc.eval.codebook",
    "compression_ratio": "vtc.eval.glcm",
    "CompressionRatio": "vtc.eval.glcm",
    "deep_image_structure_and_texture_similarity": "vtc.eval.dists",
    "DeepImageStructureAndTextureSimilarity": "vtc.eval.dists",
    "DISTS": "vtc.eval.dists",
    "error_spectrum": "vtc.eval.lattice",
    "estimate_shift": "vtc.eval.scale_consistency",
    "export_samples": "vtc.eval.protocols",
    "face_fidelity": "vtc.eval.face_fidelity",
    "FaceFidelity": "vtc.eval.face_fidelity",
    "feature_statistics": "vtc.eval.frechet",
    "FeatureStatistics": "vtc.eval.frechet",
    "frechet_distance": "vtc.eval.frechet",
    "FrechetDistance": "vtc.eval.frechet",
    "glcm_score": "vtc.eval.glcm",
    "GLCMScore": "vtc.eval.glcm",
    "haar_bands": "vtc.eval.wavelet_bands",
    "Inception": "vtc.eval.features",
    "kernel_distance": "vtc.eval.kid",
    "KernelInceptionDistance": "vtc.eval.kid",
    "lattice_ratio": "vtc.eval.lattice",
    "LatticeRatio": "vtc.eval.lattice",
    "learned_perceptual_image_patch_similarity": "vtc.eval.lpips",
    "LearnedPerceptualImagePatchSimilarity": "vtc.eval.lpips",
    "load_face_engine": "vtc.eval.engines.catalogue",
    "load_statistics": "vtc.eval.frechet",
    "load_text_engine": "vtc.eval.engines.catalogue",
    "mean_squared_error": "vtc.eval.psnr",
    "multiscale_structural_similarity": "vtc.eval.ssim",
    "MultiscaleStructuralSimilarity": "vtc.eval.ssim",
    "padded_structural_similarity": "vtc.eval.ssim",
    "PaddedStructuralSimilarity": "vtc.eval.ssim",
    "patch_frechet_distance": "vtc.eval.patch_frechet",
    "PatchFrechetDistance": "vtc.eval.patch_frechet",
    "peak_signal_noise_ratio": "vtc.eval.psnr",
    "PeakSignalNoiseRatio": "vtc.eval.psnr",
    "polynomial_mmd": "vtc.eval.kid",
    "PooledFeatures": "vtc.eval.features",
    "precision_recall": "vtc.eval.precision_recall",
    "PrecisionRecallMetric": "vtc.eval.precision_recall",
    "Protocol": "vtc.eval.protocols",
    "protocol": "vtc.eval.protocols",
    "save_statistics": "vtc.eval.frechet",
    "scale_consistency": "vtc.eval.scale_consistency",
    "ScaleConsistencyProbe": "vtc.eval.scale_consistency",
    "structural_similarity": "vtc.eval.ssim",
    "StructuralSimilarity": "vtc.eval.ssim",
    "Suite": "vtc.eval.suite",
    "text_fidelity": "vtc.eval.text_fidelity",
    "TextFidelity": "vtc.eval.text_fidelity",
    "tiling_error": "vtc.eval.scale_consistency",
    "token_statistics": "vtc.eval.token_statistics",
    "TokenStatistics": "vtc.eval.token_statistics",
    "WaveletBandEnergies": "vtc.eval.wavelet_bands",
    # generators
    "AdaptiveHeads": "vtc.generators.kv_cache.wrappers",
    "AtIntervals": "vtc.generators.kv_cache.wrappers",
    "budget_from_ratio": "vtc.generators.kv_cache.policy",
    "calibrate": "vtc.generators.calibrate",
    "Calibration": "vtc.generators.kv_cache.calibration",
    "estimate_memory": "vtc.generators.memory",
    "Full": "vtc.generators.kv_cache.full",
    "generate_speculatively": "vtc.generators.speculative",
    "GenerationConfig": "vtc.generators.pretrained",
    "Guidance": "vtc.generators.sampling",
    "H2O": "vtc.generators.kv_cache.h2o",
    "HACK": "vtc.generators.kv_cache.hack",
    "HeatKV": "vtc.generators.kv_cache.heatkv",
    "Infinity": "vtc.generators.infinity",
    "KVCache": "vtc.generators.kv_cache.cache",
    "KVPolicy": "vtc.generators.kv_cache.policy",
    "LlamaGen": "vtc.generators.llamagen",
    "load_generator_checkpoint": "vtc.generators.upstream",
    "LoadedGenerator": "vtc.generators.pretrained",
    "MixedPrecision": "vtc.generators.kv_cache.storage",
    "parse_policy": "vtc.generators.kv_cache.specs",
    "PerLayer": "vtc.generators.kv_cache.wrappers",
    "PyramidKV": "vtc.generators.kv_cache.snapkv",
    "Recorder": "vtc.generators.kv_cache.calibration",
    "Sampling": "vtc.generators.sampling",
    "ScaleKV": "vtc.generators.kv_cache.scalekv",
    "scales_for": "vtc.generators.infinity",
    "Schedule": "vtc.generators.kv_cache.schedule",
    "seeded": "vtc.generators.sampling",
    "SlidingScales": "vtc.generators.kv_cache.sliding",
    "SnapKV": "vtc.generators.kv_cache.snapkv",
    "StreamingLLM": "vtc.generators.kv_cache.sliding",
    "VAR": "vtc.generators.var",
    # training: the tokens of a data set
    "TokenShards": "vtc.training.token_shards",
    "TrainingTokens": "vtc.training.token_shards",
}

if TYPE_CHECKING:
    from vtc.codecs.compressai_form import CompressAIForm as CompressAIForm
    from vtc.codecs.hyperprior import Hyperprior as Hyperprior
    from vtc.codecs.latent_codec import LatentCodec as LatentCodec
    from vtc.codecs.prior import TokenPrior as TokenPrior
    from vtc.codecs.rates import RateControl as RateControl
    from vtc.codecs.token_codec import Received as Received
    from vtc.codecs.token_codec import TokenCodec as TokenCodec
    from vtc.errors import BitstreamError as BitstreamError
    from vtc.errors import ConfigError as ConfigError
    from vtc.errors import FileError as FileError
    from vtc.errors import ImageError as ImageError
    from vtc.errors import ModelError as ModelError
    from vtc.errors import TrainingError as TrainingError
    from vtc.errors import VtcError as VtcError
    from vtc.eval.bd_rate import BjontegaardDelta as BjontegaardDelta
    from vtc.eval.bd_rate import bd_quality as bd_quality
    from vtc.eval.bd_rate import bd_rate as bd_rate
    from vtc.eval.bits import BitsPerPixel as BitsPerPixel
    from vtc.eval.bits import bits_per_pixel as bits_per_pixel
    from vtc.eval.bootstrap import bootstrap_interval as bootstrap_interval
    from vtc.eval.codebook import CodebookUsage as CodebookUsage
    from vtc.eval.codebook import CodebookUsageMetric as CodebookUsageMetric
    from vtc.eval.codebook import codebook_usage as codebook_usage
    from vtc.eval.dists import DISTS as DISTS
    from vtc.eval.dists import DeepImageStructureAndTextureSimilarity as DeepImageStructureAndTextureSimilarity
    from vtc.eval.dists import (
        deep_image_structure_and_texture_similarity as deep_image_structure_and_texture_similarity,
    )
    from vtc.eval.engines.catalogue import load_face_engine as load_face_engine
    from vtc.eval.engines.catalogue import load_text_engine as load_text_engine
    from vtc.eval.face_fidelity import FaceFidelity as FaceFidelity
    from vtc.eval.face_fidelity import face_fidelity as face_fidelity
    from vtc.eval.features import Inception as Inception
    from vtc.eval.features import PooledFeatures as PooledFeatures
    from vtc.eval.frechet import FeatureStatistics as FeatureStatistics
    from vtc.eval.frechet import FrechetDistance as FrechetDistance
    from vtc.eval.frechet import feature_statistics as feature_statistics
    from vtc.eval.frechet import frechet_distance as frechet_distance
    from vtc.eval.frechet import load_statistics as load_statistics
    from vtc.eval.frechet import save_statistics as save_statistics
    from vtc.eval.glcm import CompressionRatio as CompressionRatio
    from vtc.eval.glcm import GLCMScore as GLCMScore
    from vtc.eval.glcm import compression_ratio as compression_ratio
    from vtc.eval.glcm import glcm_score as glcm_score
    from vtc.eval.kid import KernelInceptionDistance as KernelInceptionDistance
    from vtc.eval.kid import kernel_distance as kernel_distance
    from vtc.eval.kid import polynomial_mmd as polynomial_mmd
    from vtc.eval.lattice import LatticeRatio as LatticeRatio
    from vtc.eval.lattice import error_spectrum as error_spectrum
    from vtc.eval.lattice import lattice_ratio as lattice_ratio
    from vtc.eval.lpips import LearnedPerceptualImagePatchSimilarity as LearnedPerceptualImagePatchSimilarity
    from vtc.eval.lpips import learned_perceptual_image_patch_similarity as learned_perceptual_image_patch_similarity
    from vtc.eval.patch_frechet import PatchFrechetDistance as PatchFrechetDistance
    from vtc.eval.patch_frechet import patch_frechet_distance as patch_frechet_distance
    from vtc.eval.precision_recall import PrecisionRecallMetric as PrecisionRecallMetric
    from vtc.eval.precision_recall import precision_recall as precision_recall
    from vtc.eval.protocols import Protocol as Protocol
    from vtc.eval.protocols import export_samples as export_samples
    from vtc.eval.protocols import protocol as protocol
    from vtc.eval.psnr import PeakSignalNoiseRatio as PeakSignalNoiseRatio
    from vtc.eval.psnr import mean_squared_error as mean_squared_error
    from vtc.eval.psnr import peak_signal_noise_ratio as peak_signal_noise_ratio
    from vtc.eval.scale_consistency import ScaleConsistencyProbe as ScaleConsistencyProbe
    from vtc.eval.scale_consistency import estimate_shift as estimate_shift
    from vtc.eval.scale_consistency import scale_consistency as scale_consistency
    from vtc.eval.scale_consistency import tiling_error as tiling_error
    from vtc.eval.ssim import MultiscaleStructuralSimilarity as MultiscaleStructuralSimilarity
    from vtc.eval.ssim import PaddedStructuralSimilarity as PaddedStructuralSimilarity
    from vtc.eval.ssim import StructuralSimilarity as StructuralSimilarity
    from vtc.eval.ssim import multiscale_structural_similarity as multiscale_structural_similarity
    from vtc.eval.ssim import padded_structural_similarity as padded_structural_similarity
    from vtc.eval.ssim import structural_similarity as structural_similarity
    from vtc.eval.suite import Suite as Suite
    from vtc.eval.text_fidelity import TextFidelity as TextFidelity
    from vtc.eval.text_fidelity import text_fidelity as text_fidelity
    from vtc.eval.token_statistics import TokenStatistics as TokenStatistics
    from vtc.eval.token_statistics import token_statistics as token_statistics
    from vtc.eval.wavelet_bands import WaveletBandEnergies as WaveletBandEnergies
    from vtc.eval.wavelet_bands import band_energies as band_energies
    from vtc.eval.wavelet_bands import haar_bands as haar_bands
    from vtc.generators.calibrate import calibrate as calibrate
    from vtc.generators.infinity import Infinity as Infinity
    from vtc.generators.infinity import scales_for as scales_for
    from vtc.generators.kv_cache.cache import KVCache as KVCache
    from vtc.generators.kv_cache.calibration import Calibration as Calibration
    from vtc.generators.kv_cache.calibration import Recorder as Recorder
    from vtc.generators.kv_cache.full import Full as Full
    from vtc.generators.kv_cache.h2o import H2O as H2O
    from vtc.generators.kv_cache.hack import HACK as HACK
    from vtc.generators.kv_cache.heatkv import HeatKV as HeatKV
    from vtc.generators.kv_cache.policy import KVPolicy as KVPolicy
    from vtc.generators.kv_cache.policy import budget_from_ratio as budget_from_ratio
    from vtc.generators.kv_cache.scalekv import ScaleKV as ScaleKV
    from vtc.generators.kv_cache.schedule import Schedule as Schedule
    from vtc.generators.kv_cache.sliding import SlidingScales as SlidingScales
    from vtc.generators.kv_cache.sliding import StreamingLLM as StreamingLLM
    from vtc.generators.kv_cache.snapkv import PyramidKV as PyramidKV
    from vtc.generators.kv_cache.snapkv import SnapKV as SnapKV
    from vtc.generators.kv_cache.specs import parse_policy as parse_policy
    from vtc.generators.kv_cache.storage import MixedPrecision as MixedPrecision
    from vtc.generators.kv_cache.wrappers import AdaptiveHeads as AdaptiveHeads
    from vtc.generators.kv_cache.wrappers import AtIntervals as AtIntervals
    from vtc.generators.kv_cache.wrappers import PerLayer as PerLayer
    from vtc.generators.llamagen import LlamaGen as LlamaGen
    from vtc.generators.memory import estimate_memory as estimate_memory
    from vtc.generators.pretrained import GenerationConfig as GenerationConfig
    from vtc.generators.pretrained import LoadedGenerator as LoadedGenerator
    from vtc.generators.sampling import Guidance as Guidance
    from vtc.generators.sampling import Sampling as Sampling
    from vtc.generators.sampling import seeded as seeded
    from vtc.generators.speculative import generate_speculatively as generate_speculatively
    from vtc.generators.upstream import load_generator_checkpoint as load_generator_checkpoint
    from vtc.generators.var import VAR as VAR
    from vtc.images import LoadedImage as LoadedImage
    from vtc.images import load_image as load_image
    from vtc.images import save_image as save_image
    from vtc.models import load_codec as load_codec
    from vtc.models import load_generator as load_generator
    from vtc.models import load_tokenizer as load_tokenizer
    from vtc.tokenizers.base import Latents as Latents
    from vtc.tokenizers.base import Quantized as Quantized
    from vtc.tokenizers.base import Tokenizer as Tokenizer
    from vtc.tokenizers.base import TokenLayout as TokenLayout
    from vtc.tokenizers.base import Tokens as Tokens
    from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer as BinarySphericalQuantizer
    from vtc.tokenizers.codebook_clustering import CodebookFamily as CodebookFamily
    from vtc.tokenizers.codebook_clustering import cluster_codebook as cluster_codebook
    from vtc.tokenizers.codebook_clustering import with_codebook as with_codebook
    from vtc.tokenizers.codebook_finetuning import CodebookFinetuning as CodebookFinetuning
    from vtc.tokenizers.codebook_stats import CodebookStatistics as CodebookStatistics
    from vtc.tokenizers.composed import ComposedPyramid as ComposedPyramid
    from vtc.tokenizers.composed import ComposedTokenizer as ComposedTokenizer
    from vtc.tokenizers.composed import compose as compose
    from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder as DiffusersAutoencoder
    from vtc.tokenizers.diffusers_adapters import DiffusersVQ as DiffusersVQ
    from vtc.tokenizers.discriminators import BlurPatchGAN as BlurPatchGAN
    from vtc.tokenizers.discriminators import PatchGAN as PatchGAN
    from vtc.tokenizers.discriminators import SpectralDiscriminator as SpectralDiscriminator
    from vtc.tokenizers.equivariance import draw_transform as draw_transform
    from vtc.tokenizers.equivariance import scale_and_turn as scale_and_turn
    from vtc.tokenizers.finite_scalar import FiniteScalarQuantizer as FiniteScalarQuantizer
    from vtc.tokenizers.ibq import IBQ as IBQ
    from vtc.tokenizers.index_backprop import IndexBackpropQuantizer as IndexBackpropQuantizer
    from vtc.tokenizers.infinity_vae import InfinityVAE as InfinityVAE
    from vtc.tokenizers.kmeans import kmeans as kmeans
    from vtc.tokenizers.llamagen_vq import LlamaGenVQ as LlamaGenVQ
    from vtc.tokenizers.local_vq import LocalVQ as LocalVQ
    from vtc.tokenizers.lookup_free import LFQ as LFQ
    from vtc.tokenizers.lookup_free import GroupLFQ as GroupLFQ
    from vtc.tokenizers.lookup_free import annealed_entropy_weight as annealed_entropy_weight
    from vtc.tokenizers.losses import LeCAM as LeCAM
    from vtc.tokenizers.losses import adaptive_weight as adaptive_weight
    from vtc.tokenizers.losses import discriminator_loss as discriminator_loss
    from vtc.tokenizers.losses import generator_loss as generator_loss
    from vtc.tokenizers.losses import gradient_penalty as gradient_penalty
    from vtc.tokenizers.losses import hinge_discriminator_loss as hinge_discriminator_loss
    from vtc.tokenizers.losses import hinge_generator_loss as hinge_generator_loss
    from vtc.tokenizers.losses import non_saturating_generator_loss as non_saturating_generator_loss
    from vtc.tokenizers.losses import patch_mse as patch_mse
    from vtc.tokenizers.losses import scale_consistency_loss as scale_consistency_loss
    from vtc.tokenizers.losses import vanilla_discriminator_loss as vanilla_discriminator_loss
    from vtc.tokenizers.losses import warm_up as warm_up
    from vtc.tokenizers.lpips import LPIPS as LPIPS
    from vtc.tokenizers.multi_scale_binary import INFINITY_1M as INFINITY_1M
    from vtc.tokenizers.multi_scale_binary import MultiScaleBinaryQuantizer as MultiScaleBinaryQuantizer
    from vtc.tokenizers.multi_scale_residual import VAR_256 as VAR_256
    from vtc.tokenizers.multi_scale_residual import VAR_512 as VAR_512
    from vtc.tokenizers.multi_scale_residual import MultiScaleResidualQuantizer as MultiScaleResidualQuantizer
    from vtc.tokenizers.open_magvit2 import OpenMAGVIT2 as OpenMAGVIT2
    from vtc.tokenizers.patch_vae import PatchVAE as PatchVAE
    from vtc.tokenizers.product_quantizer import ProductQuantizer as ProductQuantizer
    from vtc.tokenizers.pyramid_vq import PyramidVQ as PyramidVQ
    from vtc.tokenizers.quantizer import Quantizer as Quantizer
    from vtc.tokenizers.residual_quantizer import ResidualQuantizer as ResidualQuantizer
    from vtc.tokenizers.scale_consistent_vae import DecodedWithFeatures as DecodedWithFeatures
    from vtc.tokenizers.scale_consistent_vae import ScaleConsistentVAE as ScaleConsistentVAE
    from vtc.tokenizers.scale_consistent_vae import doubled_conv as doubled_conv
    from vtc.tokenizers.tiling import decode_tiled as decode_tiled
    from vtc.tokenizers.tiling import encode_tiled as encode_tiled
    from vtc.tokenizers.tokenizer_family import TokenizerFamily as TokenizerFamily
    from vtc.tokenizers.upstream import import_checkpoint as import_checkpoint
    from vtc.tokenizers.upstream import load_checkpoint as load_checkpoint
    from vtc.tokenizers.var_vqvae import VARVQVAE as VARVQVAE
    from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer as GradientVectorQuantizer
    from vtc.tokenizers.vector_quantizer import VectorQuantizer as VectorQuantizer
    from vtc.tokenizers.vqgan import VQGAN as VQGAN
    from vtc.tokenizers.wavelet_loss import WaveletLoss as WaveletLoss
    from vtc.tokenizers.wavelet_loss import estimate_clean as estimate_clean
    from vtc.tokenizers.wavelets import WaveletBands as WaveletBands
    from vtc.tokenizers.wavelets import WaveletTransform as WaveletTransform
    from vtc.tokenizers.wetok import WeTok as WeTok
    from vtc.training.token_shards import TokenShards as TokenShards
    from vtc.training.token_shards import TrainingTokens as TrainingTokens
else:

    def __getattr__(name: str) -> Any:
        """The public name, imported on its first use (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'vtc' has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


__all__ = ["__version__", *_MODULE_OF]
