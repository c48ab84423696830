"""A small world: one tokenizer, two tiny models that share it, an adapter on the larger one, ragged data."""

import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd import console
from llmkd.cli import main
from llmkd.config import loader
from llmkd.config.recipe import Source
from llmkd.data.reading.sources import Rows, read_source
from llmkd.errors import UserError
from llmkd.training.run import run
from tests.kit.quick_runs import leave_out

torch.set_num_threads(1)
console.show_messages()  # as on the command line: tests of runs read stderr

ANSWERS = "Yes. It is so. The answer is that nobody knows what a robin does in the garden at night. No! Perhaps the owl, the wren and the crow know.".split()


def pytest_collection_modifyitems(items) -> None:
    """Slow tests first, so that the last minutes of a run on several cores are not one test's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _signals_not_ignored():
    """A background job's SIGINT and nohup's SIGHUP are ignored, and a run leaves ignored signals so: tests of signals need them back."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch.setattr)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Iterator[Path]:
    root = make_world(tmp_path_factory.mktemp("world"))
    gc.collect()
    gc.freeze()  # what is imported by now: a collection that a test asks for then takes milliseconds, not half a second
    yield root
    gc.unfreeze()


def make_world(root: Path) -> Path:
    """Folders student, teacher (bases, float64), adapter (LoRA on teacher); train.jsonl of 37 ragged rows, held.jsonl of 9."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    tok = tokenizer()
    for name, width, seed in (("student", 16, 1), ("teacher", 24, 2), ("stranger", 24, 3)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tok),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=1,
            bos_token_id=None,
            pad_token_id=0,
            initializer_range=0.3,
        )
        model = LlamaForCausalLM(config).double()
        model.save_pretrained(root / name)
        tok.save_pretrained(root / name)
    base = LlamaForCausalLM.from_pretrained(root / "teacher")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(root / "adapter")
    for name, count, shift in (("train", 37, 0), ("held", 9, 40)):
        write_rows(root / f"{name}.jsonl", count, shift)
    return root


def write_rows(path: Path, count: int, shift: int = 0) -> None:
    rows = [{"instruction": f"Say {i}", "output": " ".join(ANSWERS[: 1 + (i * 7) % len(ANSWERS)])} for i in range(shift, shift + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make_recipe(world, tmp_path):
    """A recipe of the small world, with overrides by dotted path."""

    def make(out: str = "out", **changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(plain_recipe(world, tmp_path / out)))
        return loader.load_recipe(path, {k.replace("__", "."): v for k, v in changes.items()})

    return make


def plain_recipe(world: Path, out: Path) -> dict:
    return {
        "output_dir": str(out),
        "student": {"model": str(world / "student"), "lora": {"rank": 4}},
        "teacher": {"model": str(world / "adapter")},
        "data": {"train": {"path": str(world / "train.jsonl")}, "max_length": 256},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.01},
        "train": {"batch_size": 8, "micro_batch_size": 4},
        "validation": {"teacher_check": 4},
    }


@pytest.fixture
def mesh_of_one() -> Iterator:
    """A process group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def caches(world, tmp_path_factory) -> Path:
    """A folder of caches of the small world's teacher: hidden, topk (all of V), narrow (K = 8), sampled."""
    from llmkd.commands.cache import cache

    root = tmp_path_factory.mktemp("caches")
    kinds = {
        "hidden": {"kind": "hidden"},
        "topk": {"kind": "topk", "k": 4096, "value_bits": 16},
        "narrow": {"kind": "topk", "k": 8},
        "sampled": {"kind": "sampled", "num_samples": 64},
    }
    fixed = {"teacher.dtype": "float32", "data.validation_fraction": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKD_CACHE", str(root / "tokens"))
        for name, kind in kinds.items():
            file = root / f"{name}.yaml"
            file.write_text(json.dumps(plain_recipe(world, root / "out")))
            options = {f"teacher.cache.{key}": value for key, value in ({"path": str(root / name)} | kind).items()}
            cache(loader.load_recipe(file, fixed | options))
    return root


@pytest.fixture
def damaged(caches, tmp_path):
    """A copy of a teacher cache, to be damaged."""
    from shutil import copytree

    def make(kind="topk") -> Path:
        copytree(caches / kind, tmp_path / "damaged")
        return tmp_path / "damaged"

    return make


@pytest.fixture
def trained(make_recipe):
    """Train a recipe of the small world and give its weights."""

    def go(out: str, resume: bool = False, **changes) -> dict[str, torch.Tensor]:
        recipe = make_recipe(out, **changes)
        run(recipe, resume)
        return weights(Path(recipe.output_dir))

    return go


def weights(out: Path) -> dict[str, torch.Tensor]:
    return (
        load_file(out / "adapter" / "adapter_model.safetensors")
        if (out / "adapter").exists()
        else load_file(out / "model" / "model.safetensors")
    )


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture
def read(tmp_path):
    """Write a data file and read it as a source."""

    def go(content: str | bytes, name: str = "t.jsonl", format: str = "alpaca", choices: bool = False, **settings) -> Rows:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_source(Source(path=str(path), format=format, **settings), "data.train", choices)

    return go


@pytest.fixture
def refused(read, tmp_path):
    """The problems found in a data file, without the folder's name."""

    def go(*args, **settings) -> list[str]:
        with pytest.raises(UserError) as info:
            read(*args, **settings)
        return [problem.replace(f"{tmp_path}/", "") for problem in info.value.problems]

    return go


def said(capsys) -> str:
    return capsys.readouterr().err


@pytest.fixture
def command(world, tmp_path, capsys):
    """`llmkd train` on a recipe of the small world, in this process: exit code and the lines it said."""

    def go(*arguments: str, out: str = "out") -> tuple[int, list[str]]:
        (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / out)))
        code = main(["train", "--config", str(tmp_path / "r.yaml"), *arguments])
        return code, [line for line in said(capsys).splitlines() if line.startswith("llmkd: ")]

    return go


def tie(world: Path, to: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(world / "student", to)
    tensors = load_file(to / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text()) | {"tie_word_embeddings": True}
    (to / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture(scope="session")
def distributions(world):
    """The small world's base teacher and its adapter, as a server has them: see `tests/kit/served.py`."""
    from tests.kit.served import distribution_of

    return {"base": distribution_of(world / "teacher"), "adapter": distribution_of(world / "teacher", world / "adapter")}


@pytest.fixture
def server(distributions, world):
    """A server of these two, `adapter` being an adapter on `base`."""
    from transformers import AutoTokenizer

    from tests.kit.served import serving

    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    with serving(distributions, lambda token: tokenizer.decode([token])) as fake:
        fake.parents = {"adapter": "base"}
        yield fake
