"""Faults in how processes hold and exchange models."""

from tests.planted.fault import in_file

PASSES = "training/test_accumulation.py"
FOUR = "training/test_four_processes.py::test_a_run_goes_on_by_any_number_of_processes_and_either_strategy"
PARALLEL = "training/test_parallel.py::test_sharded_models_train_as_whole_ones"

FAULTS = [
    *in_file(
        "llmkd/training/parallel.py",
        (
            "no-sync-swapped",
            "DDP exchanges gradients with every micro-batch but the last",
            "if now else accelerator.no_sync",
            "if not now else accelerator.no_sync",
            PASSES,
        ),
        (
            "sharded-never-exchanged",
            "sharded gradients are not exchanged with the last micro-batch",
            "set_requires_gradient_sync(now)",
            "set_requires_gradient_sync(not now)",
            PARALLEL,
        ),
        (
            "checkpoint-in-parts",
            "a sharded run's checkpoint holds the first process's part of each tensor",
            "lambda part: whole(part).cpu() if first else whole(part).new_empty(0)",
            "lambda part: local(part).cpu() if first else local(part).new_empty(0)",
            FOUR,
        ),
        (
            "maps-never-exchanged",
            "the gradients of maps of hidden states stay with the processes of a sharded student",
            "                    fully_shard(module, mesh=self.mesh, reshard_after_forward=True)",
            "                    pass",
            PARALLEL,
        ),
        (
            "teacher-whole",
            "a sharded teacher is held whole",
            'dict.fromkeys([*(["student"] if strategy.mesh else []), *asked], mesh)',
            'dict.fromkeys(["student"] if strategy.mesh else [], mesh)',
            "training/test_parallel.py::test_each_process_holds_its_rows_and_no_more",
        ),
    ),
    *in_file(
        "llmkd/models/sharding.py",
        (
            "head-by-itself",
            "the root's weights are let go of after the body, before the head has read them",
            "reshard_after_forward=unit is not base",
            "reshard_after_forward=True",
            PARALLEL,
        ),
        (
            "cut-as-stored",
            "a sharded model keeps the type of its files",
            "p.data = p.data.to(types_of[id(p)])",
            "pass",
            PARALLEL,
        ),
    ),
    *in_file(
        "llmkd/models/pretrained.py",
        (
            "adapter-of-the-files-type",
            "a new adapter on a base that is cast when it is sharded is drawn in the type of the base's files",
            "p.data = torch.zeros((), dtype=types[id(p)]).expand(p.shape)",
            "pass",
            "models/test_sharding.py",
        ),
        (
            "buffers-as-stored",
            "a model that is cast when it is sharded keeps the buffers of its files' type",
            "            held[which] = module._buffers[which]",
            "            continue",
            "models/test_sharding.py",
        ),
    ),
    *in_file(
        "llmkd/models/adapters.py",
        (
            "copies-before-the-cast",
            "an adapter that copies weights of its base is put on one that has none yet",
            '"modules_to_save", "trainable_token_indices",',
            '"trainable_token_indices",',
            "models/test_sharding.py",
        ),
    ),
    *in_file(
        "llmkd/models/load.py",
        (
            "directions-of-nothing",
            "a new DoRA is computed from a base that has no values yet",
            "(lora.dora or lora.modules_to_save",
            "(lora.modules_to_save",
            "models/test_sharding.py",
        ),
        (
            "told-of-as-stored",
            "a student is warned of the type of its files, which it does not train in",
            "dtype = casts.get(id(first), first.dtype)",
            "dtype = first.dtype",
            "models/test_sharding.py",
        ),
        (
            "cast-whole",
            "a teacher is cast to another type before it is cut",
            "base, casts = pretrained.load_as_stored(files.base, name, settings.dtype, settings.attention, kind.auto, bool(files.adapter))",
            "base = pretrained.load_pretrained(files.base, name, settings.dtype, settings.attention, None)",
            "training/test_parallel.py::test_no_process_loads_a_whole_model",
        ),
    ),
    *in_file(
        "llmkd/training/fsdp_variables.py",
        (
            "fsdp1-passes",
            "FSDP1 runs as FSDP2",
            '"FSDP_VERSION": (("2",)',
            '"FSDP_VERSION": (("1", "2")',
            "training/test_launched.py",
        ),
    ),
]
