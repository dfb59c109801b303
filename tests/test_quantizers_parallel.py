"""Two processes that train together see one batch: common entropy histograms, common moving averages."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.codebook_stats import CodebookStatistics
from vtc.tokenizers.index_backprop import IndexBackpropQuantizer
from vtc.tokenizers.lookup_free import GroupLFQ
from vtc.tokenizers.multi_scale_binary import MultiScaleBinaryQuantizer
from vtc.tokenizers.quantizer import Quantizer
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer


def codebook() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 2, 16)[:, None]


def quantizers(together: bool) -> dict[str, Quantizer]:
    """One of each kind whose loss has a codebook entropy; `together`: that of all processes."""
    ibq = IndexBackpropQuantizer(16, 8, entropy=1.0, temperature=0.1, reduce_across_ranks=together)
    gradient = GradientVectorQuantizer(16, 8, entropy=1.0, temperature=0.1, reduce_across_ranks=together)
    for learned in (ibq, gradient):
        learned.load_state_dict({"codebook": codebook()})
    return {"GroupLFQ": GroupLFQ(2, 4, reduce_across_ranks=together),
            "BSQ": BinarySphericalQuantizer(8, 4, temperature=0.1, reduce_across_ranks=together),
            "BSQ, bits": BinarySphericalQuantizer(8, 4, temperature=0.1, codebook_entropy="bit",
                                                  reduce_across_ranks=together),
            "Infinity": MultiScaleBinaryQuantizer(8, (1, 3), temperature=0.1, reduce_across_ranks=together),
            "IBQ": ibq, "gradient VQ": gradient}


def step(quantizer: Quantizer, z: Tensor) -> dict[str, Tensor]:
    """Loss, codebook entropy, and the gradients of the loss at z and at the codebook."""
    z = z.clone().requires_grad_()
    loss = quantizer(z).loss
    grads = torch.autograd.grad(loss, [z, *quantizer.parameters()])
    return {"loss": loss.detach(), "entropy": quantizer.loss_terms(z)["codebook_entropy"].detach(),
            "z": grads[0], **({"codebook": grads[1]} if len(grads) > 1 else {})}


def half_of_the_batch(rank: int, folder: str) -> None:
    """What one of the two processes does."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # dead codewords are redrawn at random, and yet alike
    z = torch.load(f"{folder}/z.pt")[rank : rank + 1]
    steps = {together: {name: step(q, z) for name, q in quantizers(together).items()} for together in (True, False)}

    average = VectorQuantizer(16, 8, dead_below=0)
    average.load_state_dict({"codebook": codebook()})
    average(50 * z)
    reviving = VectorQuantizer(16, 8, dead_below=0.99)
    reviving.load_state_dict({"codebook": codebook()})
    reviving(50 * z)
    started = VectorQuantizer(16, 8)
    started.start_from(torch.randn(64, 8))
    if rank == 0:  # one process alone may load: nothing waits for the other
        VectorQuantizer(16, 8).load_state_dict({"codebook": codebook()})
    statistics = CodebookStatistics(average.vocab)
    statistics.update(average.eval()(50 * z).indices)
    statistics.reduce_across_ranks()
    torch.save({"steps": steps, "average": average.codebook, "reviving": reviving.codebook,
                "started": started.codebook, "counts": statistics.counts[0]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 8, 3, 3).mul_(0.01)
    torch.save(z, tmp_path / "z.pt")
    mp.spawn(half_of_the_batch, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    for name, quantizer in quantizers(together=True).items():
        whole, halves = step(quantizer, z), [process["steps"][True][name] for process in (first, second)]
        alone = [step(quantizer, z[i : i + 1]) for i in range(2)]
        assert not torch.isclose(alone[0]["entropy"], alone[1]["entropy"], rtol=1e-4), name  # else all shows nothing
        # The histogram is common; sample entropy and commitment are each process's own: their mean is the whole's.
        for half in halves:
            torch.testing.assert_close(half["entropy"], whole["entropy"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((halves[0]["loss"] + halves[1]["loss"]) / 2, whole["loss"], rtol=1e-5, atol=1e-6)
        # Averaging gradients over processes, as DistributedDataParallel does for weights, halves each sample's share.
        torch.testing.assert_close(torch.cat([half["z"] for half in halves]) / 2, whole["z"], rtol=1e-4, atol=1e-6)
        if "codebook" in whole:
            mean = (halves[0]["codebook"] + halves[1]["codebook"]) / 2
            torch.testing.assert_close(mean, whole["codebook"], rtol=1e-4, atol=1e-6)
        # With the option off, each process is by itself, to the last bit.
        for process, own in zip((first, second), alone, strict=True):
            assert all(torch.equal(process["steps"][False][name][key], own[key]) for key in own), name

    average = VectorQuantizer(16, 8, dead_below=0)
    average.load_state_dict({"codebook": codebook()})
    indices = average(50 * z).indices
    for process in (first, second):
        torch.testing.assert_close(process["average"], average.codebook, rtol=1e-5, atol=1e-6)
        assert process["counts"].sum() == indices.numel()
    assert torch.equal(first["reviving"], second["reviving"])
    assert not torch.equal(first["reviving"], first["average"])
    assert torch.equal(first["started"], second["started"])
