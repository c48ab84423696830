"""What Accelerate's config files and variables ask for is what runs, or is refused in a line before anything is loaded."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.run import get_args_parser

from llmkd.commands import arguments
from llmkd.config.recipe import Recipe
from llmkd.errors import UserError
from llmkd.training import fsdp_variables
from llmkd.training.environment import check_environment
from llmkd.training.fsdp_variables import ASKED, OPTIONS, fsdp2_asked, unseen
from llmkd.training.run import as_launched

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = {  # processes on each machine, machines, sharded
    "gpu_1": (1, 1, False),
    "gpus_8_ddp": (8, 1, False),
    "gpus_8_fsdp2": (8, 1, True),
    "nodes_2_gpus_8_fsdp2": (8, 2, True),
    "cpu_2_ddp": (2, 1, False),
    "cpu_2_fsdp2": (2, 1, True),
}


def launched(config: Path, *words: str):
    """The launcher's own reading of a config file: its arguments, and the variables that it gives to each process."""
    parser = accelerate_launch.launch_command_parser()
    args, *_ = accelerate_launch._validate_launch_command(parser.parse_args(["--config_file", str(config), *words, "-m", "llmkd", "train"]))
    if args.multi_gpu or args.use_fsdp:
        return args, prepare_multi_gpu_env(args)
    return args, prepare_simple_launcher_cmd_env(args)[1]


def test_every_shipped_config_file_has_its_line():
    assert {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_file_starts_what_its_name_says(name):
    path, (processes, machines, sharded) = RECIPES / f"accelerate/{name}.yaml", SHIPPED[name]
    args, variables = launched(path)
    assert (args.num_processes, int(args.num_machines)) == (processes * machines, machines)
    if processes > 1:
        assert (int(args.nproc_per_node), int(getattr(args, "nnodes", 1))) == (processes, machines)
    assert fsdp2_asked(variables) == sharded
    check_environment(variables, shards=True)
    command = path.read_text().splitlines()[2].removeprefix("# Run: ")
    assert shlex.split(command)[:4] == ["accelerate", "launch", "--config_file", f"recipes/accelerate/{name}.yaml"]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"fsdp_version": 1}, "FSDP_VERSION: found 1; set fsdp_version: 2"),
        ({"fsdp_version": None}, "FSDP_VERSION: found "),
        ({"fsdp_offload_params": True}, "FSDP_OFFLOAD_PARAMS: found true; set fsdp_offload_params: false"),
        ({"fsdp_reshard_after_forward": False}, "FSDP_RESHARD_AFTER_FORWARD: found false"),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY: found SIZE_BASED_WRAP"),
        ({"fsdp_activation_checkpointing": True}, "FSDP_ACTIVATION_CHECKPOINTING: found true"),
    ],
)
def test_options_of_fsdp_that_llmkd_does_not_follow_are_refused(changes, setting, tmp_path):
    data = yaml.safe_load((RECIPES / "accelerate/gpus_8_fsdp2.yaml").read_text())
    data["fsdp_config"] = {name: value for name, value in (data["fsdp_config"] | changes).items() if value is not None}
    (tmp_path / "own.yaml").write_text(yaml.dump(data))
    with pytest.raises(UserError) as info:
        check_environment(launched(tmp_path / "own.yaml")[1], shards=True)
    (line,) = info.value.problems
    assert line.startswith(setting)


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"mixed_precision": "bf16"}, "ACCELERATE_MIXED_PRECISION"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "ACCELERATE_DYNAMO_BACKEND"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ],
)
def test_what_else_a_config_file_asks_for_is_refused(changes, variable, tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.dump(yaml.safe_load((RECIPES / "accelerate/gpus_8_fsdp2.yaml").read_text()) | changes))
    with pytest.raises(UserError) as info:
        check_environment(launched(tmp_path / "own.yaml")[1], shards=True)
    assert [line.split(":")[0] for line in info.value.problems] == [variable]


def test_fsdp2_is_refused_where_nothing_is_sharded():
    asked = {ASKED: "true", "FSDP_VERSION": "2"}
    check_environment(asked, shards=True)
    with pytest.raises(UserError, match=f"{ASKED}: found true; only llmkd train with a recipe shards"):
        check_environment(asked)


def test_fsdp2_of_a_config_file_is_the_recipes_setting(make_recipe, monkeypatch):
    recipe: Recipe = make_recipe()
    assert as_launched(recipe) is recipe
    monkeypatch.setenv(ASKED, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert as_launched(recipe) == make_recipe(train__shard="full")
    with pytest.raises(UserError, match=r"^optim.name: found adamw_8bit .*ACCELERATE_USE_FSDP, asks for it"):
        as_launched(make_recipe(optim__name="adamw_8bit"))
    with unseen():  # or transformers would load the weights on the first process alone
        assert not fsdp2_asked(os.environ)
    assert fsdp2_asked(os.environ)


def test_every_option_that_is_read_is_one_of_accelerates():
    source = (Path(accelerate_launch.__file__).parents[1] / "utils/launch.py").read_text()
    assert all(f'"{name}"' in source for name in OPTIONS) and fsdp_variables.ASKED in source


def run_slurm_script(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script as a job of SLURM's runs it, and the words of its `srun`. The commands of SLURM say what they were given."""
    said = folder / "words"
    commands = {"scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"', "srun": f"printf '%s\\n' \"$@\" > {said}"}
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    done = subprocess.run(["bash", RECIPES / "accelerate/slurm.sh", *words], env=environment, capture_output=True, text=True)
    return done, said.read_text().splitlines() if said.exists() else []


def test_the_script_for_slurm_starts_one_torchrun_on_each_machine(tmp_path):
    done, given = run_slurm_script(tmp_path, "my recipe.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    start = given.index("torchrun")
    assert given[:start] == ["--kill-on-bad-exit=1"]
    args = get_args_parser().parse_args(given[start + 1 :])  # torchrun's own reading
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id) == (
        "2",
        "8",
        "c10d",
        "node7:29500",
        "77",
    )
    assert args.module and args.training_script == "llmkd"
    options, overrides = arguments.parse(args.training_script_args[0], args.training_script_args[1:])
    assert str(options.config) == "my recipe.yaml" and options.resume and overrides == {"train.shard": "full"}


def test_the_script_for_slurm_asks_for_what_it_uses():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (RECIPES / "accelerate/slurm.sh").read_text(), re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "1", "8")
    assert asked["signal"] == "TERM@120"  # without B: it goes to the steps' processes, which save


def test_the_script_for_slurm_starts_nothing_without_a_recipe(tmp_path):
    done, given = run_slurm_script(tmp_path)
    assert done.returncode and not given
