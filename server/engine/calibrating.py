"""What calibration adds to vLLM's workers, whatever their device."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm.config import CompilationMode, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from calibrators import registry
from server.engine.arriving import with_reports
from server.engine.context import StepContext
from server.engine.facts import calibrators_of, model_facts
from server.engine.programs import HeadShard
from server.engine.progress import Reports
from server.engine.ranks import across, heads_across
from server.engine.requests import RequestTable
from server.engine.residual import ResidualStream
from server.engine.stack import HOST

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig


class CalibrationUnavailable(RuntimeError):
    """This worker's model cannot be calibrated as it is configured."""


class Calibrating:
    """Put before one of vLLM's workers, it keeps the state of calibrated requests."""

    vllm_config: Any
    model_runner: Any
    rank: int
    calibration: StepContext | None = None
    _residual: ResidualStream
    _reports: Reports = MappingProxyType({})

    @property
    def _stock(self) -> Any:  # noqa: ANN401 - the worker behind this class
        return super()

    def load_model(self, **options: Any) -> None:  # noqa: ANN401
        """Load as vLLM does, then find the decoder layers; compilation comes next."""
        self._stock.load_model(**options)
        self._residual = ResidualStream(
            self.model_runner.model,
            {name: extract_layer_index(name) for name, _ in self._decoders()},
            compiled=self.vllm_config.compilation_config.mode != CompilationMode.NONE,
        )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Set up the KV cache as vLLM does, then wire calibration to builders and layers."""
        self._stock.initialize_from_config(kv_cache_config)
        facts, ranks = model_facts(self.vllm_config), get_tp_group()
        local = facts.query_heads // ranks.world_size
        shard = HeadShard(ranks.rank_in_group * local, (ranks.rank_in_group + 1) * local)
        self._attach_layers(local)
        self.calibration = StepContext(
            RequestTable(registry.load(calibrators_of(self.vllm_config)), facts, shard),
            self._request_ids,
            across(ranks),
            heads_across(ranks),
            self._residual.follow,
            self.layer_device(),
        )
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    builder.calibration = self.calibration

    def unreadable(self, layer: Any) -> str | None:  # noqa: ANN401 - vLLM's Attention module
        """Why a layer cannot be calibrated, None where it can."""
        raise NotImplementedError

    def compile_for(self, layer: Any) -> None:  # noqa: ANN401 - vLLM's Attention module
        """Compile the kernels for a layer's types, so that no request waits for it."""
        raise NotImplementedError

    def layer_device(self) -> torch.device:
        """Where the layers are computed."""
        return HOST

    def calibration_status(self) -> dict[str, Any]:
        """What this worker can do; asked of every worker before the port opens."""
        return {"rank": self.rank, "ready": self.calibration is not None}

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:  # noqa: ANN401
        """Run a step with its calibrated requests known to builders and layers."""
        if self.calibration is None:
            return self._stock.execute_model(scheduler_output)
        self.calibration.begin(scheduler_output)
        output = self._stock.execute_model(scheduler_output)
        self._reports = self.calibration.finish()
        return self._with_reports(output)

    def sample_tokens(self, grammar_output: Any) -> Any:  # noqa: ANN401
        """Sample, and hand the reports of the step to the scheduler."""
        return self._with_reports(self._stock.sample_tokens(grammar_output))

    def _with_reports(self, output: Any) -> Any:  # noqa: ANN401
        carrying = with_reports(output, self._reports) if self._reports else None
        if carrying is None:
            return output
        self._reports = MappingProxyType({})
        return carrying

    def _request_ids(self, metadata: CommonAttentionMetadata) -> Sequence[str]:
        """Ids by row of the batch that attention metadata is built for right now."""
        slots, runner = metadata.req_idx, self.model_runner
        if slots is None:
            known: Sequence[str] = runner.input_batch.req_ids
            return known
        # The V2 runner keeps requests in slots, and batches are in any order of these.
        names = runner.req_states.index_to_req_id
        return [names[slot] for slot in slots.tolist()]

    def _decoders(self) -> list[tuple[str, Any]]:
        """Names and attention layers of the language model."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        return [pair for pair in layers.items() if pair[1].attn_type == "decoder"]

    def _attach_layers(self, query_heads: int) -> None:
        for name, layer in self._decoders():
            reason = self.unreadable(layer)
            if layer.num_heads != query_heads:
                reason = f"a rank has {layer.num_heads} of its query heads, not {query_heads}"
            if reason is not None:
                raise CalibrationUnavailable(f"layer {name} cannot be calibrated: {reason}")
            layer.impl.calibrate_as(extract_layer_index(name))
            if layer.impl.layer_index == 0:
                self.compile_for(layer)
