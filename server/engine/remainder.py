"""What is left of a batch for the stock kernel where calibrated rows are computed by our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

Metadata = TypeVar("Metadata")


@dataclass(frozen=True, slots=True)
class Part(Generic[Metadata]):
    """Some requests of a batch, as a batch of their own.

    Attributes:
        tokens: int64 `[rows]`, their rows of the query and output tensors.
        metadata: theirs alone; None where there are none.
    """

    tokens: Tensor
    metadata: Metadata | None


class Remainder(Generic[Metadata]):
    """Batches without some of their requests, each built once per step.

    Args:
        common: the whole batch.
        build: makes an attention backend's metadata.
    """

    def __init__(
        self,
        common: CommonAttentionMetadata,
        build: Callable[[CommonAttentionMetadata], Metadata],
    ) -> None:
        self._common = common
        self._build = build
        self._parts: dict[frozenset[int], Part[Metadata]] = {}

    def without(self, rows: frozenset[int]) -> Part[Metadata]:
        """The batch without these rows of its block table."""
        part = self._parts.get(rows)
        if part is None:
            part = self._parts[rows] = self._part(rows)
        return part

    def _part(self, rows: frozenset[int]) -> Part[Metadata]:
        left = [row for row in range(self._common.num_reqs) if row not in rows]
        starts = self._common.query_start_loc_cpu.tolist()
        spans = [range(starts[row], starts[row + 1]) for row in left]
        tokens = torch.tensor([token for span in spans for token in span], dtype=torch.int64)
        if not left:
            return Part(tokens, None)
        return Part(tokens, self._build(_batch(self._common, left, spans, tokens)))


def _batch(
    common: CommonAttentionMetadata, rows: Sequence[int], spans: Sequence[range], tokens: Tensor
) -> CommonAttentionMetadata:
    index = torch.tensor(rows)
    starts = torch.tensor([0, *map(len, spans)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = common.seq_lens[index]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=max(map(len, spans)),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[tokens],
        causal=common.causal,
    )
