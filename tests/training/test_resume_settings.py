"""Which settings a resumed run may change: every setting of a recipe with two values, and whether `--resume` takes the second for the first."""

from pathlib import Path

import pytest

from llmkd.config import loader
from llmkd.config.schema import describe
from llmkd.errors import UserError
from llmkd.output.run_folder import RunFolder

PLAIN = {
    "student.model": "models/student",
    "teacher.model": "models/teacher",
    "data.train.path": "rows.jsonl",
    "data.validation.path": "held.jsonl",
}
NF4 = {"type": "nf4"}
FROM_HUB = {"data.train.path": "owner/rows", "data.validation.path": "owner/rows"}
CHAT = {"data.train.format": "chat", "data.validation.format": "chat"}
CACHE = {"teacher.cache.path": "caches/one"}
TWO = [{"model": "models/teacher", "name": "a"}, {"model": "models/other", "name": "b"}]
SEVERAL = {"teacher": TWO}
CHOICES = {"data.choices.path": "questions.jsonl"}
SERVER = {"teacher.server": "http://one:8000"}
ON_POLICY = {"on_policy.share": 0.5}
AVERAGE = {"teacher": None, "teacher.ema": 0.9, "on_policy.share": 0.5}
SOUNDS = {f"data.{part}.format": "audio" for part in ("train", "validation")} | {"task": "classification"}
IMAGES = {f"data.{part}.format": "image" for part in ("train", "validation")} | {"task": "classification"}
NAMES = r"(?P<label>\d)_(?P<take>\d+)\.wav"
SPEECH = {f"data.{part}.format": "speech" for part in ("train", "validation")} | {"task": "speech_recognition", "student.freeze": "encoder"}
ENGINE = ON_POLICY | {"on_policy.engine.server": "http://one:8000"}

#: (settings that both runs have, {setting: (its value before, its value now)}); None stands for null.
REFUSED = [
    (
        {},
        {
            "seed": (0, 1),
            "student.model": ("models/student", "models/other"),
            "student.revision": (None, "main"),
            "student.base": (None, "models/base"),
            "student.layers": (None, [0, 2]),
            "student.tokenizer": (None, "models/tokenizer"),
            "student.method": ("lora", "full"),
            "student.quantization": (None, NF4),
            "student.dtype": ("auto", "float32"),
            "student.attention": ("auto", "eager"),
            "student.mixed_precision": ("no", "bf16"),
            "student.lora.rank": (16, 8),
            "student.lora.alpha": (32.0, 16.0),
            "student.lora.dropout": (0.0, 0.1),
            "student.lora.target_modules": ("all-linear", ["q_proj"]),
            "student.lora.modules_to_save": ([], ["lm_head"]),
            "student.lora.rslora": (False, True),
            "student.lora.dora": (False, True),
            "teacher": ({"model": "models/teacher"}, TWO),
            "teacher.name": (None, "a"),
            "teacher.model": ("models/teacher", "models/other"),
            "teacher.revision": (None, "main"),
            "teacher.base": (None, "models/base"),
            "teacher.quantization": (None, NF4),
            "teacher.merge_adapter": (False, True),
            "teacher.dtype": ("auto", "float32"),
            "teacher.attention": ("auto", "eager"),
            "teacher.cache": (None, {"path": "caches/one"}),
            "data.train": ({"path": "rows.jsonl"}, [{"path": "rows.jsonl"}, {"path": "more.jsonl"}]),
            "data.train.path": ("rows.jsonl", "more.jsonl"),
            "data.train.format": ("alpaca", "text"),
            "data.train.fields": ({}, {"output": "answer"}),
            "data.train.ignore": ([], ["system"]),
            "data.train.chat_template": (False, True),
            "data.train.where": ({}, {"clean": True}),
            "data.train.limit": (None, 5),
            "data.train.divergence": (None, "reverse_kl"),
            "data.train.weight": (1.0, 2.0),
            "data.validation": ({"path": "held.jsonl"}, [{"path": "held.jsonl"}, {"path": "more.jsonl"}]),
            "data.validation.path": ("held.jsonl", "more.jsonl"),
            "data.validation.format": ("alpaca", "text"),
            "data.validation.fields": ({}, {"output": "answer"}),
            "data.validation.ignore": ([], ["system"]),
            "data.validation.chat_template": (False, True),
            "data.validation.where": ({"clean": True}, {"clean": False}),
            "data.validation.limit": (None, 5),
            "data.max_length": (512, 256),
            "data.too_long": ("drop", "truncate"),
            "data.train_on_input": (False, True),
            "data.teacher_context": (None, "Be brief."),
            "data.shuffle_buffer": (10_000, 100),
            "loss.kd_ratio": (0.5, 0.9),
            "loss.divergence": ("forward_kl", "reverse_kl"),
            "loss.temperature": (1.0, 2.0),
            "loss.normalize": ("targets", "weights"),
            "data.train.loss.ce": (1.0, 0.0),
            "data.train.loss.kd": (1.0, 2.0),
            "data.validation.loss.ce": (1.0, 3.0),
            "data.validation.loss.kd": (1.0, 0.0),
            "loss.target_weights": (None, {"by": "position"}),
            "loss.features": (None, {"weight": 1.0}),
            "loss.attention": (None, {"weight": 1.0}),
            "loss.keep": (1.0, 0.5),
            "on_policy": (None, {"share": 0.5}),
            "optim.name": ("adamw", "adamw_8bit"),
            "optim.lr": (2e-4, 1e-4),
            "optim.weight_decay": (0.0, 0.1),
            "optim.betas": ([0.9, 0.999], [0.9, 0.95]),
            "optim.eps": (1e-8, 1e-6),
            "optim.max_grad_norm": (1.0, None),
            "optim.schedule": ("cosine", "linear"),
            "optim.warmup_steps": (None, 2),
            "optim.warmup_ratio": (None, 0.1),
            "optim.min_lr_ratio": (0.0, 0.1),
            "train.batch_size": (32, 16),
            "train.epochs": (1, 2),
            "train.group_by_length": (1, 4),
            "validation.compare_to_teacher": (False, True),
        },
    ),
    ({"student.lora": None, "student.method": "full"}, {"student.lora": (None, {"rank": 4})}),
    ({"student.layers": {"count": 2}}, {"student.layers.count": (2, 3), "student.layers.by": ("block_influence", "even")}),
    (
        CHAT | {f"data.{part}.path": "builtin:skills" for part in ("train", "validation")},
        {"data.train.noise": (0.0, 0.4), "data.validation.noise": (0.4, 0.2)},
    ),
    (
        {"student.model": None, "student.method": "full", "student.tokenizer": "models/tokenizer"},
        {"student.architecture": ({"model_type": "llama"}, {"model_type": "llama", "hidden_size": 64})},
    ),
    (
        {"student.quantization": NF4},
        {
            "student.quantization.type": ("nf4", "fp4"),
            "student.quantization.double_quant": (True, False),
            "student.quantization.compute_dtype": ("auto", "float32"),
        },
    ),
    (
        {"teacher.quantization": NF4},
        {
            "teacher.quantization.type": ("nf4", "int8"),
            "teacher.quantization.double_quant": (True, False),
            "teacher.quantization.compute_dtype": ("auto", "float32"),
        },
    ),
    (CACHE, {"teacher.cache.path": ("caches/one", "caches/two"), "teacher.cache.kind": (None, "topk"), "teacher.cache.k": (None, 8)}),
    (
        CACHE,
        {
            "teacher.cache.value_bits": (None, 6),
            "teacher.cache.num_samples": (None, 7),
            "teacher.cache.temperature": (None, 1.0),
            "teacher.cache.seed": (None, 3),
            "teacher.cache.hidden_dtype": (None, "float32"),
        },
    ),
    (
        {"loss.features": {"weight": 1.0}},
        {
            "loss.features.weight": (1.0, 0.5),
            "loss.features.layers": ("middle", [[1, 2]]),
            "loss.features.distance": ("mse", "cosine"),
            "loss.features.projection": ("linear", "none"),
            "loss.features.init": ("least_squares", "xavier"),
            "loss.features.scale": ("teacher_variance", "none"),
            "loss.features.lr": (None, 0.1),
        },
    ),
    (
        {"loss.target_weights": {"by": "position"}},
        {
            "loss.target_weights.by": ("position", "divergence"),
            "loss.target_weights.power": (1.0, 2.0),
            "loss.target_weights.invert": (False, True),
            "loss.target_weights.half_life": (None, 8.0),
            "loss.target_weights.terms": (["kd"], ["ce", "kd"]),
        },
    ),
    (
        {"loss.attention": {"weight": 1.0}},
        {
            "loss.attention.weight": (1.0, 0.5),
            "loss.attention.layers": ("last", "middle"),
            "loss.attention.what": ("maps", "relations"),
            "loss.attention.heads": (None, "mean"),
        },
    ),
    (
        {"loss.attention": {"weight": 1.0, "what": "relations"}},
        {"loss.attention.relation_heads": (None, 2)},
    ),
    (
        SEVERAL | {"loss.features": {"teacher": "a"}},
        {"loss.features.teacher": ("a", "b")},
    ),
    (
        SEVERAL,
        {
            "teacher.1.weight": (1.0, 2.0),
            "mixture.combine": ("probabilities", "log_probabilities"),
            "mixture.weights": ("fixed", "confidence"),
            "data.train.teacher": (None, "a"),
            "data.validation.teacher": (None, "b"),
        },
    ),
    (
        CHAT,
        {
            "data.train.roles": ({}, {"user": "human"}),
            "data.train.answers": ("all", "last"),
            "data.train.call_values": ("refuse", "json"),
            "data.validation.roles": ({}, {"user": "human"}),
            "data.validation.answers": ("all", "last"),
            "data.validation.call_values": ("refuse", "template"),
        },
    ),
    (
        FROM_HUB,
        {
            f"data.{part}.{name}": value
            for part in ("train", "validation")
            for name, value in (("name", (None, "en")), ("revision", (None, "v1")))
        },
    ),
    (FROM_HUB, {f"data.{part}.split": ("train", "test") for part in ("train", "validation")}),
    (
        {"data.train.limit": 9, "data.validation.limit": 9},
        {"data.train.seed": (None, 1), "data.validation.seed": (None, 1)},
    ),
    ({"data.validation": None}, {"data.validation_fraction": (0.1, 0.2)}),
    ({"train.max_steps": 5}, {"data.streaming": (False, True)}),
    ({"train.epochs": None}, {"train.max_steps": (5, 6)}),
    ({"loss.divergence": "generalized_jsd"}, {"loss.divergence_options": ({"beta": 0.5}, {"beta": 0.25})}),
    (SERVER, {"teacher.api": ("vllm", "sglang"), "teacher.top_k": (64, 20)}),
    (
        {"data.train.divergence": "generalized_jsd"},
        {"data.train.divergence_options": ({"beta": 0.5}, {"beta": 0.25})},
    ),
    ({"loss.features": {"weight": 1.0}}, {"data.train.loss.features": (1.0, 0.0)}),
    ({"loss.attention": {"weight": 1.0}}, {"data.train.loss.attention": (1.0, 0.0)}),
    (
        {"loss.keep": {"share": 0.5, "by": "divergence"}},
        {
            "loss.keep.share": (0.5, 0.25),
            "loss.keep.by": ("divergence", "position"),
            "loss.keep.invert": (False, True),
        },
    ),
    (
        ON_POLICY,
        {
            "on_policy.share": (0.5, 1.0),
            "on_policy.max_new_tokens": (128, 64),
            "on_policy.temperature": (1.0, 0.5),
            "on_policy.top_p": (1.0, 0.9),
            "on_policy.top_k": (None, 5),
            "on_policy.min_p": (0.0, 0.1),
            "on_policy.samples": (1, 2),
            "on_policy.teacher_writes": (0.0, 0.25),
            "on_policy.replay": (None, {"capacity": 5}),
            "on_policy.engine": ("local", {"server": "http://one:8000"}),
        },
    ),
    (
        {"data.validation.path": "held.jsonl", "validation.every": 2, "on_policy.share.adaptive.start": 0.1},
        {
            "on_policy.share.adaptive.start": (0.1, 0.2),
            "on_policy.share.adaptive.step": (0.1, 0.2),
            "on_policy.share.adaptive.tolerance": (0.1, 0.0),
        },
    ),
    (ON_POLICY | {"on_policy.replay.capacity": 7}, {"on_policy.replay.capacity": (7, 8), "on_policy.replay.ratio": ("decreasing", 0.5)}),
    (ENGINE, {"on_policy.engine.push_every": (1, 2), "on_policy.engine.importance": (None, 2.0)}),
    (AVERAGE, {"teacher.ema": (0.9, 0.99)}),
    (
        SOUNDS,
        {
            "data.train.pattern": (None, NAMES),
            "data.validation.pattern": (None, NAMES),
            "data.features": (None, {"kind": "log_mel", "seconds": 1.0}),
            "data.augment": (None, {"audio": [{"Shift": {}}]}),
        },
    ),
    (
        SOUNDS | {"data.features.kind": "log_mel", "data.features.seconds": 1.0},
        {"data.features.rate": (16_000, 8_000), "data.features.mels": (80, 40), "data.features.seconds": (1.0, 2.0)},
    ),
    (
        SOUNDS | {"data.augment.audio": [{"Shift": {}}]},
        {"data.augment.audio": ([{"Shift": {}}], [{"Normalize": {}}]), "data.augment.teacher_sees": ("same", "clean")},
    ),
    (IMAGES | {"data.features.kind": "pixels", "data.features.size": 32}, {"data.features.size": (32, 64)}),
    (SOUNDS, {"teacher.reads": (None, "text")}),
    (
        IMAGES | {"data.features.kind": "pixels", "data.features.size": 32, "data.augment.image": [{"HorizontalFlip": {}}]},
        {"data.augment.image": ([{"HorizontalFlip": {}}], [{"VerticalFlip": {}}])},
    ),
    ({"data.augment.prompt": [{"swap": 0.1}]}, {"data.augment.prompt": ([{"swap": 0.1}], [{"swap": 0.2}])}),
    (
        {"data.train.format": "prompt_completion", "data.validation.format": "prompt_completion"},
        {"task": ("causal_lm", "text_to_text")},
    ),
    (
        SPEECH,
        {
            "student.freeze": ("encoder", None),
            "data.target_prefix": (None, "<|en|>"),
            "validation.error_rates": (None, {"limit": 5}),
        },
    ),
    (
        SPEECH | {"validation.error_rates.limit": 5},
        {
            "validation.error_rates.limit": (5, 6),
            "validation.error_rates.max_tokens": (64, 32),
            "validation.error_rates.normaliser": ("basic", "none"),
        },
    ),
    (ON_POLICY | {"data.train.format": "text"}, {"on_policy.prompt_tokens": (8, 16)}),
    (ON_POLICY | {"loss.divergence": "reverse_kl"}, {"on_policy.long_horizon": (None, {"gamma": 0.9})}),
    (
        ON_POLICY | {"on_policy.long_horizon.gamma": 0.9, "loss.divergence": "reverse_kl"},
        {
            "on_policy.long_horizon.gamma": (0.9, 1.0),
            "on_policy.long_horizon.length_normalized": (True, False),
            "on_policy.long_horizon.rewards": ("sampled", "exact"),
            "on_policy.long_horizon.teacher_mix": (0.0, 0.2),
        },
    ),
    (
        ON_POLICY | {"on_policy.long_horizon": {"teacher_mix": 0.2}, "loss.divergence": "reverse_kl"},
        {"on_policy.long_horizon.mix_weights": ("token", "product")},
    ),
]
ACCEPTED = [
    (
        {},
        {
            "output_dir": ("out", "moved"),
            "student.gradient_checkpointing": (False, 0.5),
            "teacher.share_base": (True, False),
            "teacher.device": (None, "cpu"),
            "data.choices": (None, {"path": "questions.jsonl"}),
            "data.packing": (False, True),
            "data.cache_dir": (None, "tokens"),
            "loss.chunk_size": (None, 7),
            "train.micro_batch_size": (4, 2),
            "train.log_every": (1, 5),
            "train.compile": (False, True),
            "validation.every": (None, 3),
            "validation.micro_batch_size": (8, 2),
            "validation.teacher_check": (64, 0),
            "checkpoint.every": (None, 3),
            "checkpoint.keep": (2, 1),
            "checkpoint.best_by": (None, "ce"),
            "report_to": ([], ["tensorboard"]),
            "push_to_hub": (None, {"repo": "owner/name"}),
        },
    ),
    (
        {"data.validation.path": "held.jsonl"},
        {"validation.samples": (0, 3), "validation.sample_tokens": (64, 9)},
    ),
    ({"train.micro_batch_size": None}, {"train.micro_batch_tokens": (100, "auto")}),
    (
        SERVER,
        {
            "teacher.server": ("http://one:8000", "http://other:8000"),
            "teacher.requests": (None, 2),
            "teacher.timeout": (None, 30.0),
            "teacher.patience": (None, 60.0),
            "teacher.api_key_env": (None, "KEY"),
        },
    ),
    (ON_POLICY, {"on_policy.validation_prompts": (64, 0), "on_policy.batch_size": (32, 8), "on_policy.record": (2, 0)}),
    (
        ENGINE,
        {
            "on_policy.engine.server": ("http://one:8000", "http://other:8000"),
            "on_policy.engine.model": (None, "base"),
            "on_policy.engine.tolerance": (0.1, 0.2),
            "on_policy.engine.adapters": (None, "pushed"),
            "on_policy.engine.requests": (32, 2),
            "on_policy.engine.timeout": (300.0, 30.0),
            "on_policy.engine.patience": (600.0, 60.0),
            "on_policy.engine.api_key_env": (None, "KEY"),
        },
    ),
    (SOUNDS, {"data.workers": (1, 2)}),
    (SPEECH, {"student.keep_encoded": (None, 5)}),
    ({}, {"train.shard": ("none", "full"), "train.timeout": (600.0, 60.0), "teacher.shard": (None, "full")}),
    ({"data.packing": True}, {"data.share_prefixes": (False, True)}),
    ({"push_to_hub.repo": "owner/name"}, {"push_to_hub.repo": ("owner/name", "owner/other"), "push_to_hub.private": (True, False)}),
    (
        CHOICES,
        {
            "data.choices.path": ("questions.jsonl", "others.jsonl"),
            "data.choices.format": ("alpaca", "prompt_completion"),
            "data.choices.fields": ({}, {"choices": "options"}),
            "data.choices.ignore": ([], ["system"]),
            "data.choices.chat_template": (False, True),
            "data.choices.name": (None, "en"),
            "data.choices.split": ("train", "test"),
            "data.choices.revision": (None, "v1"),
            "data.choices.where": ({}, {"clean": True}),
            "data.choices.limit": (None, 5),
        },
    ),
    (CHOICES | {"data.choices.limit": 9}, {"data.choices.seed": (None, 1)}),
    (
        CHOICES | {"data.choices.format": "prompt_completion"},
        {
            "data.choices.roles": ({}, {"user": "human"}),
            "data.choices.answers": ("all", "last"),
            "data.choices.call_values": ("refuse", "json"),
        },
    ),
]
#: Settings that a recipe may name, but for which it accepts no value than the default: there is nothing to change.
ONE_VALUE = {"on_policy.engine.api", "data.validation.weight", "data.choices.weight", "data.choices.teacher", "data.choices.noise"}
ONE_VALUE |= {"data.features.kind", "data.choices.pattern"}  # another kind is of another format of rows
ONE_VALUE |= {f"data.choices.loss.{term}" for term in ("ce", "kd", "features", "attention")}
ONE_VALUE |= {f"data.validation.loss.{term}" for term in ("features", "attention")}
ONE_VALUE |= {f"data.{part}.{name}" for part in ("validation", "choices") for name in ("divergence", "divergence_options")}

TABLE = [
    (setting, common, *values, taken)
    for table, taken in ((REFUSED, False), (ACCEPTED, True))
    for common, part in table
    for setting, values in part.items()
]


def without_numbers(setting: str) -> str:
    return ".".join(part for part in setting.split(".") if not part.isdigit())


def test_the_table_is_complete():
    """A new setting fails here until it says what a resumed run makes of another value."""
    settings = [path for path, *_ in describe()]
    listed = [without_numbers(setting) for setting, *_ in TABLE]
    assert sorted([*listed, *ONE_VALUE]) == sorted(settings)


@pytest.mark.parametrize(("setting", "common", "before", "now", "taken"), TABLE, ids=[one[0] for one in TABLE])
def test_a_resumed_run_takes_or_refuses_another_value(setting, common, before, now, taken, tmp_path):
    (tmp_path / "recipe.yaml").write_text("output_dir: out")
    folder = RunFolder(recipe(tmp_path, common, setting, now), True)
    (tmp_path / "recipe.yaml").write_text(loader.dump(recipe(tmp_path, common, setting, before)))
    folder.path = tmp_path
    if taken:
        folder.check()
        return
    with pytest.raises(UserError) as refused:
        folder.check()
    named = {problem.partition(": ")[0] for problem in refused.value.problems}
    inside = {name for name in named if f"{name}.".startswith(f"{setting}.")}
    assert inside and all("in the run that is to be resumed" in problem for problem in refused.value.problems)
    assert all(setting == "student.method" and name.startswith("student.lora") for name in named - inside)  # whose default is filled in


def recipe(folder: Path, common: dict, setting: str, value):
    """PLAIN with the settings of a group and one more."""
    unset = [f"{path}." for path, given in common.items() if given is None or isinstance(given, list)]
    plain = {path: given for path, given in PLAIN.items() if not f"{path}.".startswith((f"{setting}.", *unset))}
    # a section before what is in it, and a null that unsets something before what takes its place
    changes = sorted(({**plain, **common, setting: value}).items(), key=lambda one: (one[0].count("."), one[1] is not None))
    return loader.load_recipe(folder / "recipe.yaml", dict(changes))


def test_one_folder_under_two_names_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("output_dir: out")
    both = [recipe(tmp_path, {}, "student.model", name) for name in ("models/../models/student", str(tmp_path / "models/student"))]
    assert both[0].student.model != both[1].student.model
    (tmp_path / "recipe.yaml").write_text(loader.dump(both[0]))
    folder = RunFolder(both[1], True)
    folder.path = tmp_path
    folder.check()


def test_a_source_that_is_gone_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output_dir: out")
    two, one = (recipe(tmp_path, {}, "data.train", [{"path": name} for name in names]) for names in (("a.jsonl", "b.jsonl"), ("a.jsonl",)))
    (tmp_path / "recipe.yaml").write_text(loader.dump(two))
    folder = RunFolder(one, True)
    folder.path = tmp_path
    with pytest.raises(UserError, match=r"data.train.1.path: '.*b.jsonl' in the run that is to be resumed and None now"):
        folder.check()
