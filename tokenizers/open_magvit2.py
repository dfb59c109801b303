"""Open-MAGVIT2: WeTok's network with all bits in one group.

Luo et al., "Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-Regressive Visual Generation" (2409.04410),
after Yu et al., MAGVIT-v2 (2310.05737). WeTok is a fork of its code: encoder and decoder are those of `wetok.py`, block
diagram included. One code has 18 bits (14 in a pretrained model); a generator may read it as two tokens, 6 and 12 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtc.tokenizers.wetok import WeTok


class OpenMAGVIT2(WeTok):
    """The published f = 16 model has 128 channels, multipliers 1, 1, 2, 2, 4 and 4 blocks a level.

    bits: of a code. token_bits: of each index, for example (6, 12); by default one index. The other arguments are
    WeTok's. Decoding is plain; `to_generative` is WeTok's.
    """

    def __init__(self, channels: int = 128, channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
                 num_res_blocks: int = 4, bits: int = 18, token_bits: Sequence[int] | None = None,
                 generative: bool = False) -> None:
        super().__init__(channels, channel_multipliers, num_res_blocks, 1, bits, generative, token_bits=token_bits)

    def to_generative(self) -> OpenMAGVIT2:
        """A copy with a generative decoder that ignores its noise so far; see `WeTok.to_generative`."""
        return self._grown(OpenMAGVIT2(self.channels, self.channel_multipliers, self.num_res_blocks,
                                       self.quantizer.bits, self.quantizer.token_bits, generative=True))
