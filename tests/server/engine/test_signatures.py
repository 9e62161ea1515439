"""What the engine glue leans on in the installed vLLM; says what changed.

Modules of the GPU can be imported without one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

ATTENTION = "vllm.v1.attention"
V2 = "vllm.v1.worker.gpu"
PARALLEL = "vllm.distributed.parallel_state"
FORWARD = "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
BUILD = "self common_prefix_len common_attn_metadata fast_build"
INIT = (
    "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
    "logits_soft_cap attn_type kv_sharing_target_layer_name sinks"
)

# Module, dotted name, parameters that have to be there in this order before any others.
FUNCTIONS = [
    (f"{ATTENTION}.backends.cpu_attn", "CPUAttentionBackendImpl.forward", FORWARD),
    (f"{ATTENTION}.backends.cpu_attn", "CPUAttentionMetadataBuilder.build", BUILD),
    (f"{ATTENTION}.backends.flash_attn", "FlashAttentionImpl.forward", FORWARD),
    (f"{ATTENTION}.backends.flash_attn", "FlashAttentionImpl.__init__", INIT),
    (f"{ATTENTION}.backends.flash_attn", "FlashAttentionMetadataBuilder.build", BUILD),
    (f"{ATTENTION}.backends.triton_attn", "TritonAttentionImpl.forward", FORWARD),
    (f"{ATTENTION}.backends.triton_attn", "TritonAttentionImpl.__init__", INIT),
    (f"{ATTENTION}.backends.triton_attn", "TritonAttentionMetadataBuilder.build", BUILD),
    (f"{ATTENTION}.backends.registry", "register_backend", "backend class_path"),
    ("vllm.v1.worker.gpu_worker", "Worker.load_model", "self"),
    ("vllm.v1.worker.gpu_worker", "Worker.initialize_from_config", "self kv_cache_config"),
    ("vllm.v1.worker.gpu_worker", "Worker.execute_model", "self scheduler_output"),
    ("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", "self grammar_output"),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.execute_model", "self scheduler_output"),
    ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", "self num_tokens"),
    (f"{V2}.cudagraph_utils", "CudaGraphManager.dispatch", "self num_reqs num_tokens"),
    (PARALLEL, "GroupCoordinator.all_gather", "self input_ dim"),
    (PARALLEL, "GroupCoordinator.gather", "self input_ dst dim"),
    (f"{V2}.async_utils", "AsyncOutput.get_output", "self"),
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput.get_output", "self"),
]

# Parameters that are passed by name.
NAMED = [
    ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", "invalid_modes"),
    ("vllm.vllm_flash_attn.flash_attn_interface", "flash_attn_varlen_func", "return_softmax_lse"),
]

FIELDS = [
    (
        f"{ATTENTION}.backend",
        "CommonAttentionMetadata",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
        "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "req_idx",
    ),
    (f"{V2}.cudagraph_utils", "BatchExecutionDescriptor", "cg_mode num_tokens num_reqs"),
    (
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "scheduled_new_reqs finished_req_ids preempted_req_ids num_scheduled_tokens",
    ),
    (f"{ATTENTION}.backends.flash_attn", "FlashAttentionMetadata", "block_table"),
    (f"{ATTENTION}.backends.triton_attn", "TritonAttentionMetadata", "block_table"),
    (f"{ATTENTION}.backends.cpu_attn", "CPUAttentionMetadata", "block_table"),
]

# Phrases of a source whose meaning our code repeats.
PHRASES = [
    (
        PARALLEL,
        "GroupCoordinator.__init__",
        "self.cpu_group = self_cpu_group",
        "a group of GPUs has one beside it for what is on the host",
    ),
    (
        PARALLEL,
        "GroupCoordinator.__init__",
        'self.device = torch.device(f"cuda:{visible_device_index}")',
        "a group knows where its collectives take tensors from",
    ),
    (
        f"{V2}.model_states.default",
        "DefaultModelState.prepare_attn",
        "req_idx=input_batch.idx_mapping_np",
        "metadata says which slot each row of the batch is",
    ),
    (
        f"{V2}.states",
        "RequestState.add_request",
        "self.index_to_req_id[req_idx] = req_id",
        "slots are told apart by the ids in them",
    ),
    (
        f"{V2}.model_runner",
        "GPUModelRunner.initialize_kv_cache",
        "self.cudagraph_manager = ModelCudaGraphManager(",
        "the V2 runner has its graph manager once the KV cache is set up",
    ),
    (
        f"{V2}.dp_utils",
        "dispatch_cg_and_sync_dp",
        "batch_desc = cudagraph_manager.dispatch( num_reqs, num_tokens,",
        "the V2 runner asks the manager's attribute for each step",
    ),
    (
        f"{V2}.cudagraph_utils",
        "_is_compatible",
        "(desc.num_reqs is None or desc.num_reqs >= num_reqs)",
        "a full graph is for so many requests at most, and one of pieces for any number",
    ),
    (
        f"{V2}.model_runner",
        "GPUModelRunner.execute_model",
        "model_output = self.cudagraph_manager.run_fullgraph(batch_desc)",
        "nothing but a full graph is replayed without the model's own Python",
    ),
    (
        "vllm.v1.core.sched.scheduler",
        "Scheduler.schedule",
        "scheduled_new_reqs.extend(scheduled_resumed_reqs)",
        "the V2 runner is told of a preempted request anew",
    ),
    (
        "vllm.v1.executor.multiproc_executor",
        "WorkerProc.enqueue_output",
        "if isinstance(output, AsyncModelRunnerOutput): try: output = output.get_output()",
        "executors wait for outputs by `get_output` alone",
    ),
    (
        f"{ATTENTION}.backends.flash_attn",
        "FlashAttentionImpl.forward",
        "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)",
        "a page holds keys and values of a token side by side",
    ),
    (
        f"{ATTENTION}.backends.flash_attn",
        "FA4DenseAttentionKernel.kernel",
        "return flash_attn_varlen_func(*args, **kwargs)",
        "the function is looked up by its name in the module, where ours takes its place",
    ),
    (
        f"{ATTENTION}.backends.flash_attn",
        "FlashAttentionImpl.__init__",
        "self.sliding_window = (sliding_window - 1, 0)",
        "a window is kept as the keys before a row's own",
    ),
    (
        f"{ATTENTION}.backends.triton_attn",
        "TritonAttentionImpl.forward",
        "kv_cache = kv_cache.transpose(1, 2)",
        "a page holds keys and values of a token side by side",
    ),
    (
        f"{ATTENTION}.backends.triton_attn",
        "TritonAttentionImpl.__init__",
        "self.sliding_window = (sliding_window - 1, 0)",
        "a window is kept as the keys before a row's own",
    ),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._determine_batch_execution_and_padding",
        "self.cudagraph_dispatcher.dispatch(",
        "the V1 runner asks the dispatcher's attribute for each step",
    ),
]


def found(module, name):
    value = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(value, part), f"vLLM's {module} has no {name} any more"
        value = getattr(value, part)
    return value


def parameters(module, name):
    return list(inspect.signature(found(module, name)).parameters)


def label(case):
    return case[1] if isinstance(case, tuple) else None


@pytest.mark.parametrize("case", FUNCTIONS, ids=label)
def test_parameters_come_in_the_order_that_we_pass_them_in(case):
    module, name, expected = case
    got, wanted = parameters(module, name), expected.split()
    assert got[: len(wanted)] == wanted, f"vLLM's {name} takes {got}, and we pass {wanted}"


@pytest.mark.parametrize("case", NAMED, ids=label)
def test_parameters_have_the_names_that_we_pass_them_by(case):
    module, name, parameter = case
    assert parameter in parameters(module, name), f"vLLM's {name} takes no {parameter} any more"


@pytest.mark.parametrize("case", FIELDS, ids=label)
def test_fields_are_where_we_read_them(case):
    module, name, expected = case
    fields = {field.name for field in dataclasses.fields(found(module, name))}
    missing = set(expected.split()) - fields
    assert not missing, f"vLLM's {name} has no {', '.join(sorted(missing))} any more"


@pytest.mark.parametrize("case", PHRASES, ids=label)
def test_sources_still_say_what_ours_repeats(case):
    module, name, phrase, meaning = case
    source = " ".join(inspect.getsource(found(module, name)).split())
    assert phrase in source, (
        f"vLLM's {name} no longer says `{phrase}`: does it still hold that {meaning}?"
    )


@pytest.mark.parametrize("module", ["flash_attn", "triton_attn"])
def test_backends_can_be_subclassed_by_name(module):
    prefix = {"flash_attn": "Flash", "triton_attn": "Triton"}[module]
    backend = found(f"{ATTENTION}.backends.{module}", f"{prefix}AttentionBackend")
    for method in ("get_impl_cls", "get_builder_cls", "get_name"):
        assert callable(getattr(backend, method, None)), (
            f"{prefix}AttentionBackend.{method} is gone"
        )
