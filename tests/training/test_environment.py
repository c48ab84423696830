"""No variable, config file or setting of a library changes what a run computes without a word."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from llmkd.errors import UserError
from llmkd.training import environment, launch, process_state
from llmkd.training.environment import HARMLESS, REFUSED, RULES, SAID, check_environment, rule_for
from llmkd.training.run import run

ONE_STEP = {"train__max_steps": 1, "optim__warmup_steps": None, "teacher": None, "loss__kd_ratio": 0.0}
OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(environment, "told", set())
    monkeypatch.setattr(process_state, "told", set())


def examples(kind: str) -> list[tuple[str, environment.Rule]]:
    """Every pattern of the table as a name that it fits."""
    return [(pattern.replace("*", "X"), rule) for rule in RULES if rule.kind == kind for pattern in rule.names]


@pytest.mark.parametrize(("name", "rule"), examples(REFUSED))
def test_what_changes_the_arithmetic_is_refused_by_name_with_its_fix(name, rule):
    assert rule.fix
    with pytest.raises(UserError) as info:
        check_environment({name: "2.5", "HOME": "/"})
    (line,) = info.value.problems
    assert line.startswith(f"{name}: found 2.5; ") and line.endswith(rule.fix)
    for value in ("", *rule.allowed, *(allowed.upper() for allowed in rule.allowed)):
        check_environment({name: value})


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found two in the environment, expected a whole number; "),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: found -1 in the environment, expected a whole number; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found 0 in the environment, expected at least 1; "),
        ({"RANK": "5"}, "RANK: found 5 in the environment, expected a number below WORLD_SIZE, 1; "),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE: found 2 in the environment, without MASTER_ADDR, MASTER_PORT; "),
    ],
)
def test_variables_that_no_launcher_gives_are_refused(variables, line):
    with pytest.raises(UserError) as info:
        check_environment(variables)
    assert info.value.problems == (f"{line}unset it, or start with accelerate launch or torchrun",)
    check_environment({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    check_environment({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": ""})


@pytest.mark.parametrize(("name", "rule"), examples(SAID))
def test_what_changes_the_rounding_is_said_once(name, rule, capsys):
    for _ in range(2):
        check_environment({name: "2"})
    assert capsys.readouterr().err == f"environment: {name}: found 2; {rule.why}\n"


@pytest.mark.parametrize(("name", "rule"), examples(HARMLESS))
def test_what_is_harmless_is_passed_over(name, rule, capsys):
    check_environment({name: "true"})
    assert capsys.readouterr().err == "" and rule.why


def test_several_variables_are_refused_at_once():
    with pytest.raises(UserError) as info:
        check_environment({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    assert [line.split(":")[0] for line in info.value.problems] == [
        "ACCELERATE_DYNAMO_BACKEND",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_FSDP",
    ]


def test_every_variable_that_accelerate_reads_has_a_rule_of_its_own():
    """A new version of Accelerate brings new ones: they need a decision. (`ACCELERATE_*` alone is for what is not known.)"""
    folder = Path(importlib.util.find_spec("accelerate").origin).parent
    pattern = re.compile(r"[\"']((?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|XLA|FORK)_[A-Z0-9_]*[A-Z0-9])[\"']")
    files = [path for path in folder.rglob("*.py") if "test" not in str(path.relative_to(folder))]
    names = {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}
    names |= {f"ACCELERATE_DYNAMO_{name}" for name in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC")}
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in names and len(names) > 20
    constants = {"FSDP_PYTORCH_VERSION", "FSDP_MODEL_NAME"}
    assert {name for name in names - constants if rule_for(name) in (None, rule_for("ACCELERATE_OF_TOMORROW"))} == set()


def test_the_tables_of_the_documents_hold_the_rules_and_no_others():
    """So a rule that is lost here is missed there."""
    text = OPERATIONS.read_text(encoding="utf-8")
    text = text[text.index("### What may change the arithmetic") : text.index("**In Python.**")]
    for kind, title in ((REFUSED, "Refused"), (SAID, "Reported"), (HARMLESS, "Harmless")):
        table = text[text.index(f"| {title} |") :].split("\n\n")[0]
        first = [line.split("|")[1] for line in table.splitlines()[2:]]
        listed = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
        rules = {name for rule in RULES if rule.kind == kind for name in rule.names}
        assert listed == rules | (set(launch._OF_MPI) if kind == REFUSED else set()), kind


def norm(recipe) -> float:
    run(recipe)
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    return next(record["grad_norm"] for record in map(json.loads, lines) if "grad_norm" in record)


@pytest.fixture
def plain_norm(make_recipe) -> float:
    return norm(make_recipe("plain", **ONE_STEP))


def test_accelerates_accumulation_is_refused_and_would_divide_nothing(command, make_recipe, plain_norm, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, lines = command()
    assert code == 2 and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: found 4" in lines[0] and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="GRADIENT_ACCUMULATION_STEPS: found 4"):
        run(make_recipe(**ONE_STEP))
    for module in ("llmkd.training.run", "llmkd.training.launch"):  # as if the table did not hold it
        monkeypatch.setattr(f"{module}.check_environment", lambda **_: None)
    assert norm(make_recipe("four", **ONE_STEP)) == plain_norm


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend: found inductor"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "device: found meta"),
    ],
)
def test_an_accelerator_that_does_more_is_refused_whatever_set_it(name, value, found, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "check_environment", lambda: None)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(UserError, match=found):
            launch.start()
    finally:
        AcceleratorState._reset_state(True)


def test_a_notebooks_own_accelerator_is_refused():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(UserError, match="Accelerate does not start"):
            launch.start()
    finally:
        AcceleratorState._reset_state(True)


def set_and_restored(set_it, restore):
    class Context:
        def __enter__(self):
            set_it()

        def __exit__(self, *_):
            restore()

    return Context


def attribute(owner, name: str, value):
    before = getattr(owner, name)
    return set_and_restored(lambda: setattr(owner, name, value), lambda: setattr(owner, name, before))


STATES = {
    "default dtype": set_and_restored(lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
    "default device": lambda: torch.device("meta"),
    "gradients": lambda: torch.no_grad(),
    "inference mode": lambda: torch.inference_mode(),
    "autocast on the CPU": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast on a GPU": set_and_restored(
        lambda: torch.set_autocast_enabled("cuda", True), lambda: torch.set_autocast_enabled("cuda", False)
    ),
    "precision of float32 matrix products": set_and_restored(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    ),
    "TF32": attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "sums in float16": attribute(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    "precision of oneDNN's matrix products": attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("setting", process_state.SETTINGS, ids=lambda setting: setting.name)
def test_a_programs_setting_of_torch_is_refused_by_name(setting, make_recipe, tmp_path):
    recipe = make_recipe(**ONE_STEP)
    with STATES[setting.name](), pytest.raises(UserError) as info:
        run(recipe)
    (line,) = [line for line in info.value.problems if line.startswith(f"torch: {setting.name}: found")]
    assert setting.fix in line and not (tmp_path / "out").exists()
    process_state.check_process_state()


def test_deterministic_algorithms_are_said_and_change_nothing_here(make_recipe, plain_norm, capsys):
    torch.use_deterministic_algorithms(True)
    try:
        assert norm(make_recipe(**ONE_STEP)) == pytest.approx(plain_norm, rel=1e-12)
    finally:
        torch.use_deterministic_algorithms(False)
    assert capsys.readouterr().err.count("torch: deterministic algorithms are on") == 1


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_a_launch_by_mpi_alone_is_refused_before_anything_waits(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        UserError,
        match=rf"^{name}: found 2 \(mpirun or srun has set it\), and Accelerate would wait .*; start with accelerate launch or torchrun",
    ):
        launch.start()
