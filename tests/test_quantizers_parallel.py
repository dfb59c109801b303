"""Two processes that train together see one batch: common entropy histogram, common moving averages."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vtc.tokenizers.codebook_stats import CodebookStatistics
from vtc.tokenizers.lookup_free import GroupLFQ
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer


def codebook() -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 2, 16)[:, None]


def half_of_the_batch(rank: int, folder: str) -> None:
    """What one of the two processes does."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # dead codewords are redrawn at random, and yet alike
    z = torch.load(f"{folder}/z.pt")[rank : rank + 1].requires_grad_()
    loss = GroupLFQ(2, 4)(z).loss
    loss.backward()

    average = VectorQuantizer(16, 8, dead_below=0)
    average._set_codebook(codebook())
    average(50 * z)
    reviving = VectorQuantizer(16, 8, dead_below=0.99)
    reviving._set_codebook(codebook())
    reviving(50 * z)
    entropic = GradientVectorQuantizer(16, 8, entropy=1.0, temperature=10.0)
    entropic._set_codebook(codebook())
    statistics = CodebookStatistics(average.vocab)
    statistics.update(average.eval()(50 * z).indices)
    statistics.reduce_across_ranks()
    torch.save({"loss": loss.detach(), "grad": z.grad, "average": average.codebook, "reviving": reviving.codebook,
                "entropy": entropic.loss_terms(50 * z)["codebook_entropy"].detach(), "counts": statistics.counts[0]},
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 8, 3, 3).mul_(0.01)
    torch.save(z, tmp_path / "z.pt")
    mp.spawn(half_of_the_batch, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    z.requires_grad_()
    quantizer = GroupLFQ(2, 4)
    whole = quantizer(z).loss
    whole.backward()
    alone, other = (quantizer.loss_terms(z[i : i + 1])["codebook_entropy"] for i in range(2))
    assert not torch.isclose(alone, other, rtol=1e-3)  # else the rest would show nothing
    # The histogram is common; sample entropy and commitment are each process's own: their mean is the whole's.
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole.detach(), rtol=1e-5, atol=1e-7)
    # Averaging gradients over processes, as DistributedDataParallel does for weights, halves each sample's share.
    assert z.grad is not None
    torch.testing.assert_close(torch.cat([first["grad"], second["grad"]]) / 2, z.grad, rtol=1e-4, atol=1e-7)

    average = VectorQuantizer(16, 8, dead_below=0)
    average._set_codebook(codebook())
    indices = average(50 * z.detach()).indices
    for process in (first, second):
        torch.testing.assert_close(process["average"], average.codebook, rtol=1e-5, atol=1e-6)
    assert torch.equal(first["reviving"], second["reviving"])
    assert not torch.equal(first["reviving"], first["average"])

    entropic = GradientVectorQuantizer(16, 8, temperature=10.0)
    entropic._set_codebook(codebook())
    expected = entropic.loss_terms(50 * z.detach())["codebook_entropy"].detach()
    for process in (first, second):
        torch.testing.assert_close(process["entropy"], expected, rtol=1e-5, atol=1e-6)
        assert process["counts"].sum() == indices.numel()
