"""Environment variables of Accelerate, torch and transformers that could change results: each is refused, reported, or known to be harmless.

`accelerate launch` passes the settings of its config file to a run as such variables, so the table covers that file too. Settings that a
program (a notebook, sitecustomize) made in torch itself are checked in `training/process_state.py`. No torch here.
"""

import fnmatch
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..console import info
from ..errors import UserError
from .fsdp_variables import ASKED, OPTIONS, fsdp2_asked
from .launch_variables import refuse_broken_launch

REFUSED, SAID, HARMLESS = "refused", "said", "harmless"
_OFF = ("0", "false", "no", "off", "n", "f")


@dataclass(frozen=True)
class Rule:
    """How variables are treated.

    names    patterns of their names, as in fnmatch. The first rule that matches a name applies
    kind     REFUSED: a UserError; SAID: allowed, and a run reports it; HARMLESS: no result depends on it
    why      its effect; for a harmless variable, why it has none
    fix      how to resolve a refusal
    allowed  values, in lower case, that change nothing, in addition to the empty one
    """

    names: tuple[str, ...]
    kind: str
    why: str
    fix: str = ""
    allowed: tuple[str, ...] = ()


_PARALLEL = "llmkd's processes share the batch, or shard models with FSDP2"
_PLAIN_LAUNCH = "start with accelerate launch --multi_gpu, or leave the section out of Accelerate's config file"
_SHARD = "use recipes/accelerate/gpus_8_fsdp2.yaml, or torchrun and train.shard: full"
RULES = (
    # Accelerate, and its config file by way of accelerate launch
    Rule(
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS",),
        REFUSED,
        "Accelerate would divide every gradient by it; here train.batch_size and train.micro_batch_size set the accumulation",
        "unset it, or give 1 in Accelerate's config file (accelerate launch --gradient_accumulation_steps 1)",
        ("1",),
    ),
    Rule(
        ("ACCELERATE_GRADIENT_CLIPPING",),
        REFUSED,
        "gradients are clipped by optim.max_grad_norm",
        "unset it, or take gradient_clipping out of Accelerate's config file",
        ("none",),
    ),
    Rule(
        ("ACCELERATE_MIXED_PRECISION",),
        REFUSED,
        "number formats are set by student.dtype, student.mixed_precision and teacher.dtype",
        "unset it, or give no in Accelerate's config file (accelerate launch --mixed_precision no)",
        ("no",),
    ),
    Rule(
        ("ACCELERATE_DYNAMO_BACKEND",),
        REFUSED,
        "layers are compiled by train.compile; Accelerate would also allow TF32",
        "unset it, or give no in Accelerate's config file (accelerate launch --dynamo_backend no)",
        ("no",),
    ),
    Rule(("ACCELERATE_DYNAMO_*",), HARMLESS, "read only with a backend, which is refused"),
    Rule(
        ("ACCELERATE_USE_DEEPSPEED",),
        REFUSED,
        f"{_PARALLEL}; DeepSpeed has its own backward pass, clipping and optimizer",
        _SHARD,
        _OFF,
    ),
    Rule((ASKED,), REFUSED, "only llmkd train with a recipe shards models", _PLAIN_LAUNCH, _OFF),
    Rule(("ACCELERATE_USE_MEGATRON_LM",), REFUSED, f"{_PARALLEL}; Megatron-LM has its own models and loop", _SHARD, _OFF),
    Rule(
        ("ACCELERATE_USE_PARALLELISM_CONFIG",),
        REFUSED,
        f"{_PARALLEL}, so there is no tensor, context or sequence parallelism",
        _PLAIN_LAUNCH,
        _OFF,
    ),
    Rule(("ACCELERATE_USE_SAGEMAKER",), REFUSED, "llmkd does not run under SageMaker's launcher", _PLAIN_LAUNCH, _OFF),
    Rule(
        (
            "ACCELERATE_DEEPSPEED_*",
            "ACCELERATE_CONFIG_DS_FIELDS",
            "MEGATRON_LM_*",
            "PARALLELISM_CONFIG_*",
            "ACCELERATE_SAGEMAKER_*",
        ),
        HARMLESS,
        "options of what is refused by ACCELERATE_USE_...",
    ),
    Rule(tuple(OPTIONS), HARMLESS, "read only with ACCELERATE_USE_FSDP; a value that asks for what llmkd does not do is then refused"),
    Rule(("FSDP_*",), HARMLESS, "for Accelerate's own way to shard a model; in llmkd each layer is a unit, and checkpoints are whole"),
    Rule(("ACCELERATE_FP8_*", "FP8_*"), HARMLESS, "read only with mixed precision fp8, which is refused"),
    Rule(
        ("ACCELERATE_TORCH_DEVICE",),
        REFUSED,
        "every process would compute on that one device",
        "unset it, and choose GPUs with CUDA_VISIBLE_DEVICES",
    ),
    Rule(("ACCELERATE_USE_CPU",), HARMLESS, "it chooses the device; a run that uses the CPU although there is a GPU says so"),
    Rule(
        ("ACCELERATE_DOWNCAST_BF16", "XLA_*", "USE_TORCH_XLA", "ACCELERATE_IN_TPU_POD", "PJRT_DEVICE"),
        HARMLESS,
        "for TPUs, on which llmkd does not start",
    ),
    Rule(
        ("ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_INIT_INCLUDE_BUFFERS", "ACCELERATE_ALLOW_CP_STANDALONE"),
        HARMLESS,
        "for ways to load or shard a model that llmkd does not use",
    ),
    Rule(
        (
            "ACCELERATE_DEBUG_MODE",
            "ACCELERATE_DEBUG_RDV_FILE",
            "ACCELERATE_LOG_LEVEL",
            "ACCELERATE_ENABLE_RICH",
            "ACCELERATE_NUM_PROCESSES",
        ),
        HARMLESS,
        "checks and messages",
    ),
    Rule(("ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED"), HARMLESS, "where processes run; the number of threads is OMP_NUM_THREADS"),
    Rule(("ACCELERATE_*",), SAID, "not known to llmkd"),
    # the precision of matrix products
    Rule(
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",),
        REFUSED,
        "float32 products would be rounded to TF32, the loss's too",
        "unset it; student.mixed_precision: bf16 makes a run faster and leaves the loss alone",
        ("0",),
    ),
    Rule(
        ("NVIDIA_TF32_OVERRIDE",),
        REFUSED,
        "float32 products would be rounded to TF32, the loss's too",
        "unset it; student.mixed_precision: bf16 makes a run faster and leaves the loss alone",
        ("0",),
    ),
    Rule(
        ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
        REFUSED,
        "float32 products on a CPU would be rounded to a shorter type, the loss's too",
        "unset it, or give strict",
        ("strict",),
    ),
    Rule(
        ("MKL_BLAS_COMPUTE_MODE",),
        REFUSED,
        "float32 products would be rounded to a shorter type, the loss's too",
        "unset it, or give STANDARD",
        ("standard",),
    ),
    Rule(("TRITON_F32_DEFAULT",), REFUSED, "float32 products of Triton kernels would be rounded", "unset it, or give ieee", ("ieee",)),
    Rule(
        ("CUBLAS_EMULATE_*", "CUBLAS_EMULATION_*", "CUBLAS_FIXEDPOINT_EMULATION_*"),
        REFUSED,
        "float32 and float64 products would be composed of products in shorter types",
        "unset it",
        ("0",),
    ),
    Rule(
        ("TRITON_INSTRUMENTATION_MODE", "TRITON_FPSAN_HOMOMORPHIC_CASTS"),
        REFUSED,
        "Triton's floating-point sanitizer replaces the arithmetic of its kernels",
        "unset it",
        _OFF,
    ),
    Rule(("TRITON_KERNEL_OVERRIDE",), REFUSED, "kernels would be replaced by others", "unset it", _OFF),
    # other kernels, so other rounding
    Rule(
        ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
        SAID,
        "other CPU instructions, so other rounding",
    ),
    Rule(
        (
            "MKL_CBWR",
            "MKL_ENABLE_INSTRUCTIONS",
            "MKL_DEBUG_CPU_TYPE",
            "MKL_DISABLE_FAST_MM",
            "OPENBLAS_CORETYPE",
            "BLIS_ARCH_TYPE",
            "GLIBC_TUNABLES",
        ),
        SAID,
        "other CPU instructions, so other rounding",
    ),
    Rule(
        ("TORCH_MKLDNN_MATMUL_*", "TORCH_LINEAR_FLATTEN_3D", "TORCH_BLAS_PREFER_*", "TORCH_LINALG_PREFER_*", "TORCH_CUDNN_*"),
        SAID,
        "another library for matrix products, so other rounding",
    ),
    Rule(
        (
            "CUBLAS_WORKSPACE_CONFIG",
            "CUBLASLT_WORKSPACE_SIZE",
            "DISABLE_ADDMM_CUDA_LT",
            "PYTORCH_TUNABLEOP_*",
            "BNB_CUDA_VERSION",
            "BNB_ROCM_VERSION",
            "ROCBLAS_*",
            "HIPBLASLT_*",
            "MIOPEN_*",
            "TORCH_ROCM_FA_PREFER_CK",
        ),
        SAID,
        "another choice of GPU kernels, so other rounding",
    ),
    Rule(
        (
            "FLASH_ATTENTION_DETERMINISTIC",
            "TRANSFORMERS_SDPA_FORCE_GQA",
            "TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR",
            "PYTORCH_JIT",
            "TORCH_DISABLE_NATIVE_JIT",
            "TORCH_PYTHON_NATIVE_USER_GRAPH_ORDER_FN",
        ),
        SAID,
        "another kernel of transformers or torch, so other rounding",
    ),
    Rule(
        ("USE_HUB_KERNELS",),
        SAID,
        "transformers may fetch kernels, which are programs, from the hub; llmkd sets NO where nothing is set",
        allowed=(*_OFF,),
    ),
    Rule(
        (
            "NCCL_ALGO",
            "NCCL_PROTO",
            "NCCL_NVLS_ENABLE",
            "NCCL_COLLNET_ENABLE",
            "NCCL_MIN_*",
            "NCCL_MAX_*",
            "NCCL_NTHREADS",
            "NCCL_BUFFSIZE",
            "NCCL_TUNER_*",
            "NCCL_GRAPH_FILE",
            "NCCL_TOPO_FILE",
            "NCCL_CONF_FILE",
            "TORCH_DISTRIBUTED_USE_TORCHCOMMS",
        ),
        SAID,
        "another order of sums over GPUs, so other rounding",
    ),
    Rule(
        (
            "TORCHINDUCTOR_CACHE_DIR",
            "TORCHINDUCTOR_COMPILE_THREADS",
            "TORCHINDUCTOR_WORKER_*",
            "TORCHINDUCTOR_FX_GRAPH_CACHE",
            "TORCH_COMPILE_JOB_ID",
        ),
        HARMLESS,
        "where and how fast torch.compile compiles",
    ),
    Rule(
        (
            "TORCHINDUCTOR_*",
            "TORCHDYNAMO_*",
            "TORCH_DYNAMO_*",
            "TORCH_COMPILE_*",
            "TORCH_BISECT_*",
            "TENSORIFY_PYTHON_SCALARS",
            "CUTLASS_*",
            "CUTEDSL_*",
            "ENABLE_PERSISTENT_TMA_MATMUL",
            "ENABLE_TEMPLATE_TMA_STORE",
            "ENABLE_TMA_LOAD_FOR_TEMPLATE_EPILOGUE",
        ),
        SAID,
        "a setting of torch.compile; train.compile compares compiled layers with plain ones at the start",
    ),
    Rule(
        (
            "TRITON_DEFAULT_FP_FUSION",
            "TRITON_FORCE_DISABLE_FP_FUSION",
            "TRITON_INTERPRET",
            "TRITON_OVERRIDE_*",
            "TRITON_USE_META_WS",
            "TRITON_PTXAS_PATH",
            "TRITON_LIBDEVICE_PATH",
            "DISABLE_PTXAS_OPT",
            "PTXAS_OPTIONS",
            "DISABLE_LLVM_OPT",
        ),
        SAID,
        "a setting of Triton's compiler; the kernel is compared with plain PyTorch at the start",
    ),
    # harmless
    Rule(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DYNAMIC", "OMP_DYNAMIC"),
        HARMLESS,
        "the number of threads; with the same number a resumed run is bitwise the same",
    ),
    Rule(
        ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "HF_DATASETS_IN_MEMORY_MAX_SIZE"),
        HARMLESS,
        "speed; order and content stay the same",
    ),
    Rule(
        ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_LAUNCH_BLOCKING"),
        HARMLESS,
        "memory, and the order in which kernels are launched",
    ),
    Rule(("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"), HARMLESS, "for pickled files, which llmkd does not read"),
    Rule(("PYTHONHASHSEED",), HARMLESS, "no result depends on the order of a set"),
)


@functools.cache
def rule_for(name: str) -> Rule | None:
    """The first rule that matches the name of a variable; None if none does."""
    return next((rule for rule in RULES if any(fnmatch.fnmatchcase(name, pattern) for pattern in rule.names)), None)


def check_environment(variables: Mapping[str, str] = os.environ, shards: bool = False) -> None:
    """UserError that names every refused variable; otherwise one message per process for each variable that has an effect.

    shards  whether the command can shard models; then FSDP2 is not refused
    """
    refuse_broken_launch(variables)
    if shards and fsdp2_asked(variables):
        variables = {name: value for name, value in variables.items() if name != ASKED}
    refused = [line for rule, line in _effective(variables) if rule.kind == REFUSED]
    if refused:
        raise UserError(*refused)
    for _, line in _effective(variables):
        if line not in told:
            told.add(line)
            info(f"environment: {line}")
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # read when transformers is imported


told: set[str] = set()


def _effective(variables: Mapping[str, str]) -> Iterator[tuple[Rule, str]]:
    """The rules of the variables that are refused or reported, each with its line."""
    for name in sorted(variables):
        rule, value = rule_for(name), variables[name]
        if rule is None or rule.kind == HARMLESS or value.strip().lower() in ("", *rule.allowed):
            continue
        yield rule, f"{name}: found {value}; {rule.why}" + (f"; {rule.fix}" if rule.fix else "")
