"""Models that are sharded over two processes: the run of one process, a part of the bytes, and the same files."""

import ctypes
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmkd.cli import main
from llmkd.commands.sweep import run_sweep
from llmkd.config import loader
from llmkd.config.recipe import Teacher
from llmkd.errors import UserError
from llmkd.models.load import LoadContext, load_models
from llmkd.training.launch import start
from llmkd.training.parallel import mesh_of
from llmkd.training.run import run
from llmkd.training.trainer import Trainer
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch, train_each
from tests.training.test_resume import comparable, unfinish

#: A model of many layers.
DEEP = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
BOUND = 1e-12  # float64, after five steps; the last has 5 of 8 examples, so that a process has none in some micro-batches
TOKENS = {"data.packing": True, "train.micro_batch_size": None, "train.micro_batch_tokens": 90}
#: A validation comes before the checkpoint of its step, and leaves embeddings and head gathered.
SAVED = {"checkpoint.every": 2, "checkpoint.keep": 9, "validation.every": 2, "data.validation.path": "held.jsonl"}
RELATIONS = {"what": "relations", "relation_heads": 2, "layers": "last"}
QUANTISED = {  # in float32, which is all that 4-bit products have
    "student.quantization": {"type": "nf4"},
    "student.dtype": "float32",
    "teacher.dtype": "float32",
    "teacher.quantization": {"type": "nf4"},
    "train.max_steps": 3,
    "data.packing": True,
}
#: Each with its settings: every kind of sharded student, and what cuts steps, layers and teachers in another way.
RUNS = {
    "lora": {
        "train.micro_batch_size": 3,
        **SAVED,
        "validation.samples": 2,
        "validation.sample_tokens": 4,
        "loss.features": {"layers": [[0, 1], [2, 2]]},
        "loss.attention": RELATIONS,
    },
    "tied": {
        "student.model": "tied",
        "student.dtype": "float64",  # its files are in float32
        "student.method": "full",
        **TOKENS,
        **SAVED,
        "teacher.shard": "none",
        "loss.attention": {"heads": "mean"},
    },
    "alone": {  # a process never has an example
        "student.model": "tied",
        "student.dtype": "float64",
        "train.batch_size": 1,
        "train.max_steps": 3,
        "loss.features": {"init": "xavier"},
        "loss.attention": {"heads": "mean"},
        "on_policy": {"share": 0.7, "max_new_tokens": 5},
    },
    "more": {
        "train.max_steps": 3,
        "student.lora.dora": True,
        "student.lora.dropout": 0.3,
        "student.lora.target_modules": ["q_proj", "down_proj", "lm_head"],
        "student.lora.modules_to_save": ["norm"],
        "student.gradient_checkpointing": "offload",
        "teacher": [{"model": "adapter", "merge_adapter": True}, {"model": "stranger"}],
        "loss.keep": {"share": 0.5, "by": "divergence"},  # weights that the models' outputs tell, by a pass more
        "loss.normalize": "weights",
        "loss.target_weights": {"by": "divergence", "power": 0.5, "terms": ["ce", "kd"]},
    },
    "unsharded": {
        "train.max_steps": 3,
        "train.shard": "none",
        "teacher.shard": "full",
        "student.method": "full",
        "on_policy": {"share": 0.4, "teacher_writes": 0.4, "max_new_tokens": 5, "validation_prompts": 3},
        "data.validation.path": "held.jsonl",
    },
    "nf4": QUANTISED | {"train.micro_batch_size": None, "train.micro_batch_tokens": "auto"},
    "fp8": {
        "teacher": {"model": "student", "dtype": "float32", "quantization": {"type": "fp8"}},
        "student.dtype": "float32",
        "train.max_steps": 2,
    },
    "base": {"student.model": "teacher", "data.streaming": True, "train.micro_batch_size": 1, "train.max_steps": 2},  # the teacher's too
    "average": {
        "teacher": {"ema": 0.7},
        "student.model": "tied",
        "student.dtype": "float64",
        "student.method": "full",
        **SAVED,
        "train.max_steps": 3,
    },
}


def words(world: Path, root: Path, name: str, **more) -> list[str]:
    """The command line of one of `RUNS`, sharded, with its output in `root`."""
    (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / name)))
    changes = {"output_dir": str(root / name), "train.shard": "full"} | placed(world, RUNS[name]) | more
    return [
        "--config",
        str(root / "r.yaml"),
        *(word for key, value in changes.items() for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))),
    ]


RESUMED = ("lora", "tied")  # of one process's run, by two; other numbers of processes are in test_four_processes.py
#: Runs side by side on one base: another rank, an adapter on the head, maps; with several micro-batches, and a validation between.
ARMS = {
    "kd": {},
    "head": {"student.lora": {"rank": 2, "target_modules": ["up_proj", "lm_head"]}, "loss.kd_ratio": 0.25},
    "states": {"loss.features": {"init": "xavier"}},
}


def write_sweep(world: Path, root: Path, shard: str) -> Path:
    recipe = plain_recipe(world, root) | {
        "validation": {"every": 2},
        "train": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 3, "shard": shard},
    }
    recipe["data"]["validation"] = {"path": str(world / "held.jsonl")}
    (root / "base.yaml").write_text(json.dumps(recipe))
    (root / "sweep.yaml").write_text(json.dumps({"output_dir": str(root / "sweep"), "recipe": "base.yaml", "arms": ARMS}))
    return root / "sweep.yaml"


def placed(world: Path, value):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = {key: placed(world, one) for key, one in items}
        return found if isinstance(value, dict) else list(found.values())
    return str(world / value) if isinstance(value, str) and (world / value).exists() else value


def peak_of_loading(folder: str, sharded: bool) -> int:
    """Bytes of its own, not of files that it has mapped, which the process holds at most while it loads a teacher, less those before."""

    def held() -> int:
        return next(
            int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
        )

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(held())

    accelerator, settings = start(), Teacher(model=folder, dtype="float32")
    mesh = {"teacher": mesh_of(accelerator)} if sharded else {}
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back
    done, seen = threading.Event(), [held()]
    thread = threading.Thread(target=watch)
    thread.start()
    load_models([], [("teacher", settings)], LoadContext(641, "cpu", sharded=mesh))
    done.set()
    thread.join()
    return max(seen) - seen[0]


def train_and_weigh(runs: list[list[str]], out: str) -> int:
    """Train, and write how many bytes each process held when it loaded a model, and at the end of each run: of every weight of the student, its
    moments and the teacher."""
    peaks = [peak_of_loading(f"{out}/deep", sharded) for sharded in (True, False)]
    Path(out, f"peaks-{os.environ['RANK']}.json").write_text(json.dumps(peaks))
    found, real = [], Trainer.finish

    def part(tensor: torch.Tensor) -> int:
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes

    def finish(self):
        state, teacher = self.students[0].state, getattr(self.teacher, "model", None)
        moments = [value for one in state.optimizer.state.values() for value in one.values() if value.ndim]
        state.strategy.is_finite(state, self.accelerator)  # which leaves nothing of the student gathered
        if hasattr(teacher and teacher.base_model, "reshard"):
            teacher.base_model.reshard()
        sums = {"moments": sum(map(part, moments)), "teacher": sum(map(part, teacher.parameters())) if teacher else None}
        found.append({name: part(p) for name, p in self.students[0].model.base_model.named_parameters()} | sums)
        real(self)

    Trainer.finish = finish
    code = train_each(runs)
    Path(out, f"bytes-{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of all runs, by one process and by two, which also resume what one has begun."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    torch.manual_seed(7)
    config = LlamaConfig(  # odd numbers, which do not divide among processes
        vocab_size=641,
        hidden_size=12,
        intermediate_size=33,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(world / "tied")  # of another type than it trains in
    LlamaForCausalLM(LlamaConfig(**DEEP, vocab_size=641)).bfloat16().save_pretrained(two / "deep")
    for file in (world / "student").glob("token*"):
        shutil.copy(file, world / "tied")
    for name in RUNS:
        run(loader.load_recipe(one / "r.yaml", loader.parse_overrides(words(world, one, name)[2:])))
    run_sweep(write_sweep(world, one, "none"), {}, False)
    resumed = {name: begun(world, one / name, two / f"resumed_{name}", "full") for name in RESUMED}
    mine = [*(words(world, two, name) for name in RUNS), *resumed.values()]
    done = launch(2, train_and_weigh, mine, str(two), limit=500)  # one that waits for ever is ended
    assert done.returncode == 0 and done.stderr.count("resuming after step 2 of 5") == len(RESUMED), done.stderr[-3000:]
    done = launch(2, main, ["sweep", "--config", str(write_sweep(world, two, "full"))], limit=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


def begun(world: Path, done: Path, out: Path, shard: str) -> list[str]:
    """A copy of a run as if it had been stopped after its second step; the command line that goes on with it."""
    shutil.copytree(done, out)
    if (out / "model").exists():
        (out / "model").rename(out / "adapter")
    unfinish(out, 2)
    return [*words(world, out.parent, done.name, **{"output_dir": str(out), "train.shard": shard}), "--resume"]


def flat(record: dict) -> dict:
    """A record of metrics with those of its sections as SECTION.NAME."""
    return {
        f"{key}.{name}": one for key, value in record.items() for name, one in (value if isinstance(value, dict) else {"": value}).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sharded_models_train_as_whole_ones(runs, name):
    one, two = (root / name for root in runs)
    bound, relative = (1e-4, 1e-5) if RUNS[name].get("student.dtype") == "float32" else (BOUND, 1e-9)
    assert distance(weights(two), weights(one)) < bound
    for a, b in zip(map(flat, comparable(one)), map(flat, comparable(two)), strict=True):
        assert b == pytest.approx(a, rel=relative, abs=1e-12)
    for file in ("checkpoints/step-2/student.safetensors",) if "checkpoint.every" in RUNS[name] else ():
        kept = [load_file(root / file) for root in (one, two)]
        assert kept[0].keys() == kept[1].keys() and distance(*kept) < BOUND
    texts = [(root / "samples.jsonl").read_text() if "validation.samples" in RUNS[name] else "" for root in (one, two)]
    assert texts[0] == texts[1] and bool(texts[0]) == ("validation.samples" in RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_the_same_file_and_is_resumed_by_any_strategy(world, runs, name, tmp_path, capsys):
    one, two = runs
    for file in ("student.safetensors", "optimizer.safetensors"):
        whole, gathered = (load_file(root / name / "checkpoints/step-2" / file) for root in runs)
        assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in gathered.items()}
        assert distance(whole, gathered) < BOUND
    assert distance(weights(two / f"resumed_{name}"), weights(one / name)) < BOUND  # by other numbers of processes, of one process's
    words = begun(world, two / name, tmp_path / "back", "none")  # by one process, of a sharded run's
    run(loader.load_recipe(tmp_path / "r.yaml", loader.parse_overrides(words[2:-1])), resume=True)
    assert "resuming after step 2 of 5" in capsys.readouterr().err
    assert distance(weights(tmp_path / "back"), weights(one / name)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_students_of_a_sweep_share_one_sharded_base(runs, arm):
    one, two = (root / "sweep/arms" / arm for root in runs)
    assert distance(weights(two), weights(one)) < BOUND
    for a, b in zip(map(flat, comparable(one)), map(flat, comparable(two)), strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-12)


@pytest.mark.slow
def test_each_process_holds_its_rows_and_no_more(world, runs):
    """Rows are cut as torch.chunk cuts: of 641 one process has 321 and the other 320. AdamW has two moments."""
    one, two = runs
    teacher = load_file(world / "teacher/model.safetensors") | load_file(world / "adapter/adapter_model.safetensors")
    for rank in range(2):

        def part(whole: dict[str, torch.Tensor], rank: int = rank) -> dict[str, int]:
            rows = {key: (value.shape[0] + 1 - rank) // 2 for key, value in whole.items()}
            return {key: rows[key] * value[0].numel() * value.element_size() for key, value in whole.items()}

        found = dict(zip(RUNS, json.loads((two / f"bytes-{rank}.json").read_text()), strict=False))
        student, whole = (load_file(one / name / "model/model.safetensors") for name in ("tied", "unsharded"))
        every = sum(value.nbytes for value in teacher.values())
        assert found["tied"] == part(student) | {"moments": 2 * sum(part(student).values()), "teacher": every}
        bytes_of = {key: value.nbytes for key, value in whole.items()}
        assert found["unsharded"] == bytes_of | {"moments": 2 * sum(bytes_of.values()), "teacher": sum(part(teacher).values())}
        trained = load_file(one / "lora/checkpoints/step-4/student.safetensors")  # the adapter, and maps of hidden states and their scales
        assert found["lora"]["moments"] == 2 * sum(size for name, size in part(trained).items() if not name.endswith(".scales"))


@pytest.mark.slow
def test_no_process_loads_a_whole_model(runs):
    """Of 86 MB (in float32, from files in bfloat16) a process holds its half, and embeddings, head and some layers more while they compute."""
    every = 4 * sum(value.numel() for value in load_file(runs[1] / "deep/model.safetensors").values())
    for rank in range(2):
        sharded, whole = json.loads((runs[1] / f"peaks-{rank}.json").read_text())
        assert every < whole
        assert every / 2 < sharded < 0.75 * every


REFUSED = {
    "on_policy": {"share": 0.5, "engine": {"server": "http://localhost:1"}},
    "student.quantization": {"type": "int8"},
    "optim.name": "adamw_8bit",
    "teacher": {"ema": 0.9, "shard": "none"},
    "teacher.device": "cpu",
    "teacher.quantization": {"type": "int8"},
}
GOES = {"train.compile": True, "train.micro_batch_tokens": "auto", "teacher.quantization": {"type": "fp8"}}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_go_with_sharded_models_is_refused_by_name(make_recipe, setting):
    given = {setting: REFUSED[setting], "data.validation_fraction": 0.2}
    make_recipe(**given)
    with pytest.raises(UserError) as info:
        make_recipe(train__shard="full", **given)
    named = [f"{setting}{more}: found" for more in ("", ".type", ".shard", ".engine")]
    assert any(name in line for line in info.value.problems for name in named), info.value.problems


def test_a_sharded_teacher_alone_refuses_what_it_cannot_have_itself(make_recipe):
    given = {"teacher.shard": "full"}
    make_recipe(**given, data__validation_fraction=0.2, on_policy={"share": 0.5, "engine": {"server": "http://localhost:1"}})
    make_recipe(**given, **GOES, train__micro_batch_size=None)
    make_recipe(**given, **GOES, train__micro_batch_size=None, train__shard="full")
    with pytest.raises(UserError, match=r"teacher.device: found cpu"):
        make_recipe(**given, teacher__device="cpu")
    make_recipe(**given, student__quantization={"type": "int8"}, optim__name="adamw_8bit")
