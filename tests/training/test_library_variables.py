"""Every environment variable that the Python sources of torch and transformers read has a decision: a rule of llmkd's, or a reason here.

A new version brings new ones, so the sources are held to the versions of constraints.txt alone; with others the test is skipped. What the
libraries' compiled parts read is not seen here.
"""

import fnmatch
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from llmkd.training.environment import rule_for

#: Variables without a rule of llmkd's that change nothing of what a run computes: names, or files that alone read them, and why.
HARMLESS = {
    "torch": (
        (("testing/*", "_inductor/test_*", "_dynamo/test_*", "_numpy/testing/*"), "torch's own tests"),
        (("distributed/elastic/*", "distributed/launcher/*", "distributed/run.py", "backends/xeon/*"), "launchers: what reaches a run is set for it"),
        (("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK", "USE_LIBUV"), "who the processes are"),
        (
            ("distributed/distributed_c10d.py", "distributed/device_mesh.py", "distributed/rendezvous.py", "TORCHELASTIC_*", "TORCH_DISTRIBUTED_DEBUG"),
            "how processes meet, and what they say of errors",
        ),
        (
            ("distributed/checkpoint/*", "distributed/_symmetric_memory/*", "distributed/flight_recorder/*", "distributed/debug/*", "distributed/config.py"),
            "ways to save, share and inspect that llmkd does not use",
        ),
        (("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_*", "cuda/__init__.py"), "which devices there are"),
        (("profiler/*", "_strobelight/*", "utils/collect_env.py", "utils/benchmark/*", "_logging/*", "LOGLEVEL", "*_CUPTI*"), "messages, reports and profiles"),
        (
            ("utils/cpp_extension.py", "utils/hipify/*", "_inductor/cpp_builder.py", "_inductor/codecache.py", "_inductor/codegen/*", "CONDA_*", "CUDA_HOME"),
            "where compilers and their files are",
        ),
        (("CUDA_PATH*", "ROCM_*", "PYTORCH_ROCM_ARCH", "WINDOWS_CUDA_HOME", "CXX", "PATH", "LD_LIBRARY_PATH", "NVTOOLSEXT_PATH"), "where files are"),
        (("hub.py", "_appdirs.py", "TRITON_CACHE_DIR", "TORCH_CUSTOM_PYTHONPATH", "USER", "USERNAME"), "where files are"),
        (
            ("AOT_INDUCTOR_*", "AOTINDUCTOR_*", "AOTI_*", "INDUCTOR_*", "AOT_PARTITIONER_*", "DUMP_AOTI_*", "LOG_*", "PT2_*", "MAST_*", "PYTORCH_GEN_PATTERNS"),
            "what torch.compile logs, draws and writes, and compiling ahead of time, which llmkd does not do",
        ),
        (("PARTITIONER_MEMORY_BUDGET_PARETO*", "_inductor/async_compile.py", "_inductor/config_comms.py"), "plots, workers, and collectives in a graph"),
        (
            ("TORCH_CACHING_PRECOMPILE", "TORCH_STRICT_PRECOMPILE", "TORCH_COMPILER_COLLECTIVES", "TORCH_FAKE_TENSOR_*", "FAKE_ALLOW_META", "TORCH_CUDAGRAPH_GC"),
            "caches and checks of torch.compile",
        ),
        (("UNSAFE_SKIP_FSDP_MODULE_GUARDS", "TVM_SCHEDULER", "_lazy/*", "_vendor/quack/*", "sparse/*"), "for FSDP, TVM, lazy tensors and layouts that llmkd does not use"),
        (("fx/*", "jit/_trace.py", "serialization.py", "_native/common_utils.py"), "how graphs are drawn and traced, and what is checked"),
        (("backends/cudnn/*", "TORCH_CUDA_SANITIZER", "TORCH_DEVICE_BACKEND_AUTOLOAD", "TORCH_USE_RTLD_GLOBAL"), "what is checked and loaded when torch is imported"),
        (("nn/parallel/distributed.py", "multiprocessing/spawn.py"), "on which stream DDP copies inputs, and how processes are started"),
    ),
    "transformers": (
        (
            ("CLEARML_*", "COMET_*", "MLFLOW_*", "HF_MLFLOW_*", "HF_DAGSHUB_*", "HF_DVCLIVE_*", "SWANLAB_*", "WANDB_*", "TENSORBOARD_*", "RAY_SCOPE"),
            "trackers of the Trainer, which llmkd does not use",
        ),
        (("BRANCH", "DISABLE_*_INTEGRATION", "KUBEFLOW_*"), "trackers of the Trainer, which llmkd does not use"),
        (("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_*", "SMDATAPARALLEL_*"), "who the processes are"),
        (("trainer*.py", "training_args*.py", "testing_utils.py"), "the Trainer, its command line and tests"),
        (("NCCL_GRAPH_MIXING_SUPPORT", "generation/*"), "transformers' own generation, which llmkd does not use"),
        (("AWS_*", "SM_*", "SAGEMAKER_*", "ECS_*", "TRAINING_JOB_ARN", "DATABRICKS_*", "VSCODE_PID", "TRANSFORMERS_IS_CI"), "on what machine this runs"),
        (("NPU_*", "ASCEND_*", "HCCL_*", "PT_HPU_*", "PYTORCH_CNDEV_*"), "for accelerators on which llmkd does not start"),
        (("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "NETWORK_DEBUG_*", "TRANSFORMERS_DISABLE_TORCH_CHECK"), "messages"),
        (("HF_MODULES_CACHE", "CUDA_HOME", "CUDA_PATH"), "where files are"),
        (("HF_DEACTIVATE_ASYNC_LOAD", "DISABLE_SAFETENSORS_CONVERSION"), "how weights are read; only safetensors are"),
        (("TRUST_REMOTE_CODE",), "for a model's retriever; llmkd runs no code of a model's folder"),
    ),
}  # fmt: skip

_NAME = r"[\"']([A-Z][A-Z0-9_]{2,})[\"']"
_READ = r"(?:environ(?:\.get|\.pop|\.setdefault)?|\w*getenv\w*|\w*env_?(?:bool|var|val|int|flag)\w*|(?:get|parse|is)_env\w*)\s*[(\[]\s*"
_FORMS = (re.compile(_READ + "f?" + _NAME), re.compile(_NAME + r"\s*(?:not\s+)?in\s+(?:os\.)?environ"))
_BY_CONSTANT, _CONSTANT = re.compile(_READ + r"([A-Za-z_]\w*)\s*[,)\]]"), re.compile(r"^\s*(\w+)(?::\s*\w+)?\s*=\s*" + _NAME, re.MULTILINE)
_OF_SETTING = re.compile(r"env_name\w*\s*=\s*(\[[^\]]*\]|" + _NAME + ")")
_HINT = re.compile("environ|getenv|env_name|_env")


def variables(text: str) -> Iterator[str]:
    """The names of the environment variables that a Python text reads or writes, as far as they stand in it."""
    for form in _FORMS:
        yield from form.findall(text)
    for found in _OF_SETTING.finditer(text):
        yield from re.findall(_NAME, found[1])
    wanted = {*_BY_CONSTANT.findall(text)}
    yield from (value for name, value in _CONSTANT.findall(text) if name in wanted)


def read_by(package: str) -> dict[str, set[str]]:
    """Of each variable the files of an installed package in which its name stands."""
    folder, found = Path(importlib.util.find_spec(package).origin).parent, defaultdict(set)
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        for name in variables(text) if _HINT.search(text) else ():
            found[name].add(path.relative_to(folder).as_posix())
    return found


def undecided(package: str, found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Variables with neither a rule of llmkd's nor a reason here. What a file under one of the patterns reads needs none."""
    out = {}
    for name, files in found.items():
        groups = [patterns for patterns, _ in HARMLESS[package]]
        by_name = any(fnmatch.fnmatchcase(name, pattern) for patterns in groups for pattern in patterns)
        left = {one for one in files if not any(fnmatch.fnmatchcase(one, pattern) for patterns in groups for pattern in patterns)}
        if rule_for(name) is None and not by_name and left:
            out[name] = left
    return out


def pinned(package: str) -> str:
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


@pytest.mark.slow
@pytest.mark.parametrize(("package", "known"), [("torch", {"TORCHINDUCTOR_MAX_AUTOTUNE", "TORCH_LOGS", "PYTORCH_JIT"}), ("transformers", {"USE_HUB_KERNELS", "WORLD_SIZE"})])  # fmt: skip
def test_every_variable_that_a_library_reads_has_a_decision(package, known):
    if (installed := version(package).partition("+")[0]) != pinned(package):
        pytest.skip(f"{package} {installed}, and the decisions are those on {pinned(package)}")
    found = read_by(package)
    assert known <= found.keys() and len(found) > 60
    lines = [f"{name} (in {', '.join(sorted(files)[:3])})" for name, files in sorted(undecided(package, found).items())]
    assert not lines, (
        f"{package} {installed} reads variables without a decision. Does one change what a run computes? Then refuse it, or say so, by a rule in "
        "llmkd/training/environment.py (and the table of docs/operations.md); else give it, or the file that reads it, a reason in HARMLESS here:\n"
        + "\n".join(lines)
    )
    used = [*found, *(one for files in found.values() for one in files)]
    unused = [
        pattern for patterns, _ in HARMLESS[package] for pattern in patterns if not any(fnmatch.fnmatchcase(one, pattern) for one in used)
    ]
    assert not unused, f"nothing of {package} {installed} fits these patterns; take them out of HARMLESS: {', '.join(unused)}"


def test_a_variable_is_found_in_every_way_in_which_it_is_read():
    text = """
LOG_VAR = "OF_A_CONSTANT"
NOT_READ: str = "A_TEXT_ALONE"
os.environ["SUBSCRIPT"], os.environ.get('GOT', "DEFAULT_VALUE"), os.getenv("GETENV"), environ.get("SHORT"), os.environ.pop( "POPPED")
"CONTAINED" in os.environ; "MISSING" not in os.environ; get_env_val("HELPER"); parse_env("PARSED", 1); is_env_variable_true("FLAGGED")
os.environ.get(LOG_VAR); x = Config(default=True, env_name_force="FORCED", env_name_default=["FIRST", "SECOND"])
"""
    expected = {"OF_A_CONSTANT", "SUBSCRIPT", "GOT", "GETENV", "SHORT", "POPPED", "CONTAINED", "MISSING", "HELPER", "PARSED", "FLAGGED"}
    assert {*variables(text)} == expected | {"FORCED", "FIRST", "SECOND"}


def test_a_new_variable_is_undecided_wherever_llmkd_may_come():
    found = {"TORCH_OF_TOMORROW": {"nn/functional.py", "testing/x.py"}, "ONLY_IN_TESTS": {"testing/x.py"}, "TORCHINDUCTOR_NEW": {"nn/x.py"}}
    assert undecided("torch", found) == {"TORCH_OF_TOMORROW": {"nn/functional.py"}}
