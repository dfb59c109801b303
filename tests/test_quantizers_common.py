"""What holds for every quantizer: one interface, a loss of named terms, clear refusals, odd inputs."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from vtc.errors import ConfigError
from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.codebook_stats import CodebookStatistics
from vtc.tokenizers.finite_scalar import FiniteScalarQuantizer
from vtc.tokenizers.index_backprop import IndexBackpropQuantizer
from vtc.tokenizers.lookup_free import LFQ, GroupLFQ
from vtc.tokenizers.multi_scale_binary import MultiScaleBinaryQuantizer
from vtc.tokenizers.multi_scale_residual import MultiScaleResidualQuantizer
from vtc.tokenizers.product_quantizer import ProductQuantizer
from vtc.tokenizers.quantizer import Quantizer
from vtc.tokenizers.residual_quantizer import ResidualQuantizer
from vtc.tokenizers.scales import MultiScaleQuantizer
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer

#: every kind, for latents of eight channels
MAKE: dict[str, Callable[[], Quantizer]] = {
    "GroupLFQ": lambda: GroupLFQ(2, 4),
    "GroupLFQ, published form": lambda: GroupLFQ(2, 4, compat="upstream"),
    "LFQ": lambda: LFQ(8, token_bits=(3, 5)),
    "BSQ": lambda: BinarySphericalQuantizer(8, 4),
    "BSQ, bits": lambda: BinarySphericalQuantizer(8, 4, codebook_entropy="bit"),
    "FSQ": lambda: FiniteScalarQuantizer((3,) * 8),
    "IBQ": lambda: IndexBackpropQuantizer(16, 8, entropy=0.1),
    "VQ": lambda: VectorQuantizer(16, 8),
    "VQ on the sphere": lambda: VectorQuantizer(16, 8, normalize=True),
    "gradient VQ": lambda: GradientVectorQuantizer(16, 8, entropy=0.1),
    "gradient VQ, legacy": lambda: GradientVectorQuantizer(16, 8, legacy=True),
    "product": lambda: ProductQuantizer([LFQ(3), VectorQuantizer(5, 3), FiniteScalarQuantizer((3, 3))]),
    "residual": lambda: ResidualQuantizer([VectorQuantizer(9, 8), GroupLFQ(2, 4), BinarySphericalQuantizer(8, 4)]),
    "VAR": lambda: MultiScaleResidualQuantizer(16, 8, (1, 2, 4)),
    "Infinity": lambda: MultiScaleBinaryQuantizer(8, (1, 2, 4)),
}


@pytest.fixture(params=MAKE)
def quantizer(request) -> Quantizer:
    torch.manual_seed(0)
    return MAKE[request.param]()


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 8, 4, 4)), generator=torch.Generator().manual_seed(1))


def test_the_loss_is_the_weighted_sum_of_its_named_terms(quantizer):
    z = latents().requires_grad_()
    before = copy.deepcopy(quantizer.state_dict())
    terms = quantizer.loss_terms(z)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    weights = quantizer.loss_weights
    assert set(terms) == set(weights) and all(term.shape == () for term in terms.values())
    in_eval = copy.deepcopy(quantizer).eval().loss_terms(z)
    out = quantizer(z)
    if not terms:
        assert isinstance(quantizer, FiniteScalarQuantizer) and out.loss == 0
        return
    for name, term in terms.items():
        torch.testing.assert_close(term, in_eval[name])
    total = sum(weights[name] * term for name, term in terms.items())
    torch.testing.assert_close(out.loss, total, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(*(torch.autograd.grad(loss, [z, *quantizer.parameters()], allow_unused=True)
                              for loss in (out.loss, total)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_codes_of_its_indices_are_its_codes(quantizer):
    quantizer.eval()
    out = quantizer(latents())
    assert quantizer.grouped_indices == (out.indices.shape[-1] == len(quantizer.vocab))
    for dtype in (torch.int64, torch.int32):
        codes = quantizer.indices_to_codes(out.indices.to(dtype))
        torch.testing.assert_close(codes, out.z_q, rtol=0, atol=1e-6)
    assert out.loss == 0
    statistics = CodebookStatistics(quantizer.vocab)
    statistics.update(out.indices)
    assert (statistics.perplexity() >= 1).all() and (statistics.usage() > 0).all()


def test_indices_without_a_word_are_refused(quantizer):
    indices = quantizer.eval()(latents()).indices
    for wrong in (-1, quantizer.vocab[0]):
        changed = indices.clone()
        (changed[..., 0] if quantizer.grouped_indices else changed).view(-1)[:1] = wrong
        with pytest.raises(ConfigError, match="outside"):
            quantizer.indices_to_codes(changed)
    for nonsense in (indices.float(), indices > 0):
        with pytest.raises(ConfigError, match="integers"):
            quantizer.indices_to_codes(nonsense)
    with pytest.raises(ConfigError):
        quantizer.indices_to_codes(torch.tensor(0))


def test_a_batch_of_nothing_has_no_tokens_and_no_training_step(quantizer):
    nothing = latents()[:0]
    out = quantizer.eval()(nothing)
    assert out.z_q.shape == (0, 8, 4, 4) and len(out.indices) == 0 and out.loss == 0
    assert quantizer.indices_to_codes(out.indices).shape == (0, 8, 4, 4)
    for step in (quantizer.train(), quantizer.loss_terms):
        with pytest.raises(ConfigError, match="at least one latent"):
            step(nothing)


def test_wrong_latents_are_refused(quantizer):
    for wrong in (torch.zeros(2, 7, 4, 4), torch.zeros(8), torch.zeros(2, 8, 4, 4, dtype=torch.long)):
        with pytest.raises(ConfigError, match="latents"):
            quantizer(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_keeps_its_type_and_stays_finite(quantizer, dtype):
    for scale in (0.0, 1e-6, 1.0, 1e4):
        z = (latents() * scale).to(dtype).requires_grad_()
        out = copy.deepcopy(quantizer)(z)
        assert out.z_q.dtype == dtype and out.z_q.isfinite().all() and out.loss.isfinite()
        grad = torch.autograd.grad(out.z_q.float().sum() + out.loss, z)[0]
        assert grad.isfinite().all()
    cast = copy.deepcopy(quantizer).to(dtype)  # and a model that was cast
    for _ in range(2):
        assert cast(latents().to(dtype)).loss.isfinite()
    assert all(term.isfinite() for term in cast.loss_terms(latents()).values())


def test_a_latent_that_is_no_number_still_has_an_index(quantizer):
    z = latents()
    z[0, :3, 0, 0] = torch.nan
    out = quantizer.train()(z)
    assert out.indices.min() >= 0
    CodebookStatistics(quantizer.vocab).update(out.indices)  # which refuses what has no word
    if quantizer.loss_weights:
        assert out.loss.isnan()  # and it is not hidden


def test_rows_and_volumes(quantizer):
    if isinstance(quantizer, MultiScaleQuantizer):
        with pytest.raises(ConfigError, match="latents"):
            quantizer(latents(2, 8))
        return
    for shape in ((3, 8), (2, 8, 5), (1, 8, 2, 3, 2)):
        z = latents(*shape)
        out = quantizer.train()(z)
        assert out.z_q.shape == z.shape and out.loss.isfinite()
        assert out.indices.shape[: z.ndim - 1] == (shape[0], *shape[2:])
        out = quantizer.eval()(z)
        torch.testing.assert_close(quantizer.indices_to_codes(out.indices), out.z_q, rtol=0, atol=1e-6)


def test_copies_and_pickles_work_alike(quantizer):
    expected = quantizer.eval()(latents()).z_q
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(latents()).z_q, expected)
