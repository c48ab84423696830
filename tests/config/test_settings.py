"""A recipe is read strictly: what is wrong is named with its place, what is right survives a round trip."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from llmkd import cli, console
from llmkd.config import loader, schema
from llmkd.config.dotted import flatten
from llmkd.config.recipe import DIVERGENCES, Recipe
from llmkd.config.validation import check
from llmkd.errors import UserError

REPO = Path(__file__).parents[2]
BASE = """\
output_dir: runs/x
student: {model: base}
data:
  train: {path: t.jsonl}
"""


def case(text: str, start: str, *words: str):
    """A bad recipe, how its one problem starts, and words that must be in it."""
    return text, start, words


@pytest.fixture
def load(tmp_path):
    """Load a recipe's text (or bytes) with overrides."""

    def go(text, overrides=None, read=loader.load_recipe):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(path, overrides)

    return go


@pytest.fixture
def refused(load, tmp_path):
    """The problems found in a recipe, without the folder's name."""

    def go(text, overrides=None, read=loader.load_recipe) -> list[str]:
        with pytest.raises(UserError) as info:
            load(text, overrides, read)
        return [problem.replace(f"{tmp_path}/", "") for problem in info.value.problems]

    return go


def found(problems: list[str], *expected: tuple[str, ...]) -> None:
    """Exactly these problems in this order: each the start of the line, then words it holds."""
    assert len(problems) == len(expected), problems
    for problem, (start, *words) in zip(problems, expected, strict=True):
        assert problem.startswith(start), problem
        assert all(word in problem for word in words), problem


# ---- one bad setting: its line, its path, what was found, what is allowed, the nearest name

BAD = [
    case("lerning_rate: 1", "r.yaml:5: lerning_rate: ", "unknown", "did you mean optim.lr?"),
    case("learning_rate: 1", "r.yaml:5: learning_rate: ", "did you mean optim.lr?"),
    case("optim: {lerning_rate: 1}", "r.yaml:5: optim.lerning_rate: ", "did you mean optim.lr?"),
    case("loss:\n  temprature: 2", "r.yaml:6: loss.temprature: ", "did you mean loss.temperature?"),
    case("zzz: 1", "r.yaml:5: zzz: ", "known here: output_dir, seed, student"),
    case("loss: {top_k: 8}", "r.yaml:5: loss.top_k: ", "did you mean teacher.cache.k?"),
    case("optm: {lr: 1}", "r.yaml:5: optm: ", "did you mean optim?"),
    case("train: {gradient_accumulation_steps: 3}", "r.yaml:5: train.gradient_accumulation_steps: ", "did you mean train.batch_size?"),
    case("lora: {rank: 8}", "r.yaml:5: lora: ", "did you mean student.lora?"),
    case("student.lora: {rank: 8}", "r.yaml:5: student.lora: ", "nested: student: {lora: ...}"),
    case("optim: {lr: '1e-4'}", "r.yaml:5: optim.lr: ", 'found "1e-4"', "expected a number > 0"),
    case("optim:\n\n  lr: -1", "r.yaml:7: optim.lr: ", "found -1", "a number > 0"),
    case("optim: {lr: 0}", "r.yaml:5: optim.lr: ", "found 0", "a number > 0"),
    case("optim: {lr: true}", "r.yaml:5: optim.lr: ", "found true", "a number"),
    case("optim: {lr: .inf}", "r.yaml:5: optim.lr: ", "found Infinity"),
    case("optim: {lr: -.inf}", "r.yaml:5: optim.lr: ", "found -Infinity"),
    case("optim: {lr: .nan}", "r.yaml:5: optim.lr: ", "found NaN"),
    case("optim: {lr: 1e999}", "r.yaml:5: optim.lr: ", "found Infinity"),
    case("optim: {lr: [1]}", "r.yaml:5: optim.lr: ", "found [1]", "a number"),
    case("optim: {betas: 0.9}", "r.yaml:5: optim.betas: ", "a list of 2 numbers"),
    case("optim: {betas: '0.9, 0.95'}", "r.yaml:5: optim.betas: ", "a list of 2 numbers; write [0.9, 0.95]"),
    case(
        "optim: {schedule: \u201ccosine\u201d}",
        "r.yaml:5: optim.schedule: ",
        'found \u201ccosine\u201d, in quotation marks of a text processor; write "cosine"',
    ),
    case("optim: {betas: [0.9, 0.9, 0.9]}", "r.yaml:5: optim.betas: ", "a list of 2 numbers"),
    case("optim: {betas: [0.9, 1.5]}", "r.yaml:5: optim.betas.1: ", "found 1.5", "less than 1"),
    case("optim: {schedule: cosin}", "r.yaml:5: optim.schedule: ", "cosine, linear or constant", "did you mean cosine?"),
    case("optim: 3", "r.yaml:5: optim: ", "found 3", "a mapping of settings"),
    case("optim:", "r.yaml:5: optim: ", "found null", "a mapping of settings"),
    case("optim: {warmup_ratio: 1.01}", "r.yaml:5: optim.warmup_ratio: ", ">= 0, <= 1"),
    case("train: {epochs: 1.0}", "r.yaml:5: train.epochs: ", "found 1.0", "a whole number >= 1"),
    case("train: {epochs: true}", "r.yaml:5: train.epochs: ", "found true", "a whole number"),
    case("train: {epochs: 12:30}", "r.yaml:5: train.epochs: ", 'found "12:30"', "a whole number"),
    case("train: {batch_size: 1_000}", "r.yaml:5: train.batch_size: ", 'found "1_000"', "a whole number"),
    case("optim: {schedule: cosin}", "r.yaml:5: optim.schedule: ", "cosine, linear or constant", "did you mean cosine?"),
    case("seed: -1", "r.yaml:5: seed: ", "found -1", "a whole number >= 0"),
    case("seed: 5000000000", "r.yaml:5: seed: ", "42949672"),
    case("loss: {kd_ratio: 2}", "r.yaml:5: loss.kd_ratio: ", ">= 0, <= 1"),
    case("loss: {temperature: 0}", "r.yaml:5: loss.temperature: ", ">= 0.001, <= 1000"),
    case(
        "loss: {divergence: generalised_jsd}",
        "r.yaml:5: loss.divergence: ",
        ", ".join(list(DIVERGENCES)[:-1]),
        "did you mean generalized_jsd?",
    ),
    case("loss: {divergence_options: {beta: x}}", "r.yaml:5: loss.divergence_options.beta: ", 'found "x"', "a number"),
    case("checkpoint: {keep: 0}", "r.yaml:5: checkpoint.keep: ", "found 0", ">= 1"),
    case("teacher: {}", "r.yaml:5: teacher.model: ", "not given"),
    case("teacher: base", "r.yaml:5: teacher: ", 'found "base"', "a mapping of settings"),
    case("teacher: {model: t, dtype: bf16}", "r.yaml:5: teacher.dtype: ", "found 'bf16'", "did you mean bfloat16?"),
    case("teacher: {model: t, dtype: fp16}", "r.yaml:5: teacher.dtype: ", "did you mean float16?"),
    case('optim: {lr: "1e-3"}', "r.yaml:5: optim.lr: ", "expected a number > 0, <= 1000; remove the quotation marks"),
    case("optim: {lr: 1_000}", "r.yaml:5: optim.lr: ", 'found "1_000", expected a number > 0, <= 1000; write 1000'),
    case("train: {batch_size: 010}", "r.yaml:5: train.batch_size: ", "expected a whole number >= 1; write 10"),
    case("optim:\n  <<: {lr: 1}", "r.yaml:6: optim: ", "a merge key (<<); write the settings out by name"),
    case("? [a, b]\n: 1", "r.yaml:5: settings: ", "found a list or mapping as a name"),
    case('"a\\nb": 1', "r.yaml:5: a\\nb: ", "unknown setting"),
    case(f"train: {{max_steps: {2**53 + 1}}}", "r.yaml:5: train.max_steps: ", "found 9007199254740993, expected a number of at most"),
    case(f"  shuffle_buffer: {10**30}", "r.yaml:5: data.shuffle_buffer: ", "expected a number of at most"),
    case("optim:\n  lr: 1\n   eps: 1", "r.yaml:7: not valid YAML", "indent the settings of one section alike, and quote"),
    case("optim: {lr: 1", "r.yaml:", "not valid YAML", "close the bracket or brace that is still open"),
    case("optim:\n    lr: 1\n  eps: 1", "r.yaml:7: not valid YAML", "indent the settings of one section alike"),
    case("optim:\n\tlr: 1", "r.yaml:6: not valid YAML", "indent by spaces, not by tabs"),
    case("loss: {beta: 0.5}", "r.yaml:5: loss.beta: ", "did you mean loss.divergence_options.beta?"),
    case("trackers: [wandb]", "r.yaml:5: trackers: ", "did you mean report_to?"),
    case("teacher: {model: t, dtyp: x}", "r.yaml:5: teacher.dtyp: ", "did you mean teacher.dtype?"),
    case("teacher: {model: null}", "r.yaml:5: teacher.model: ", "not given"),
    case("seed: 1\nseed: 2", "r.yaml:6: seed: ", "given twice", "line 5"),
    case("optim:\n  lr: 1\n  eps: 1\n  lr: 1", "r.yaml:8: optim.lr: ", "given twice", "line 6"),
]


@pytest.mark.parametrize(("text", "start", "words"), BAD)
def test_a_bad_setting_is_named(refused, text, start, words):
    found(refused(BASE + text + "\n"), (start, *words))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("data.train.path", "b\udcff.jsonl"), ("student.lora.target_modules", ["q", "\udce9"]), ("data.train.fields", {"\udcff": "a"})],
)
def test_a_file_name_that_is_not_utf8_is_refused_in_one_line(refused, setting, value):
    """As Python gives it: of arguments in a locale without UTF-8, too."""
    (problem,) = refused(BASE, {setting: value})
    assert problem.startswith(f"--{setting}") and "which is not UTF-8; rename the file, or set a locale with UTF-8" in problem
    assert console.printable(problem).isascii()


@pytest.mark.parametrize("text", ["NaN", "inf", "8.5e"])
def test_a_text_that_is_no_number_gets_no_advice_on_how_to_write_it(refused, text):
    (problem,) = refused(BASE + f"optim: {{lr: {text}}}\n")
    assert problem.endswith(f'found "{text}", expected a number > 0, <= 1000')


@pytest.mark.parametrize(
    ("old", "new", "start", "words"),
    [
        (
            "{model: base}",
            "{model: base, gradient_checkpointing: yes}",
            "r.yaml:2: student.gradient_checkpointing: ",
            ['found "yes"', "true or false"],
        ),
        ("{model: base}", "{model: base, method: qlora}", "r.yaml:2: student.method: ", ["lora or full", "did you mean lora?"]),
        ("{model: base}", "{model: base, lora: {rnk: 3}}", "r.yaml:2: student.lora.rnk: ", ["did you mean student.lora.rank?"]),
        ("{model: base}", "{model: base, lora: {rank: 0}}", "r.yaml:2: student.lora.rank: ", ["found 0", ">= 1"]),
        ("{model: base}", "{model: base, lora: {dropout: 1}}", "r.yaml:2: student.lora.dropout: ", [">= 0, < 1"]),
        (
            "{model: base}",
            "{model: base, lora: {target_modules: 3}}",
            "r.yaml:2: student.lora.target_modules: ",
            ["text or a list of texts"],
        ),
        ("{model: base}", "{model: base, lora: {target_modules: []}}", "r.yaml:2: student.lora.target_modules", []),
        ("{model: base}", "{model: base, lora: {target_modules: [a, 1]}}", "r.yaml:2: student.lora.target_modules", []),
        ("{model: base}", "{model: 3}", "r.yaml:2: student.model: ", ["found 3", "text"]),
        ("{model: base}", "{model: base, lora: {r: 8}}", "r.yaml:2: student.lora.r: ", ["did you mean student.lora.rank?"]),
        ("{model: base}", "{model: a,lr=0.1/b}", "r.yaml:2: student.lr=0.1/b: ", ["put a text that has a comma in quotes"]),
        ("t.jsonl", "a,b.jsonl", "r.yaml:4: data.train.b.jsonl: ", ["put a text that has a comma in quotes"]),
        (
            "t.jsonl",
            "t.jsonl, format: sharegpt",
            "r.yaml:4: data.train.format: ",
            ["did you mean chat with fields: {messages: conversations, role: from, content: value}, roles: {user: human, assistant: gpt}?"],
        ),
        ("t.jsonl", "t.jsonl, format: messages", "r.yaml:4: data.train.format: ", ["did you mean chat?"]),
        ("runs/x", "[a]", "r.yaml:1: output_dir: ", ["found", "text"]),
        ("runs/x", '"  "', "r.yaml:1: output_dir: ", ["not given"]),
        (
            "t.jsonl",
            "t.jsonl, format: alpca",
            "r.yaml:4: data.train.format: ",
            ["alpaca, chat, prompt_completion, text or tokens", "did you mean alpaca?"],
        ),
        ("t.jsonl", "t.jsonl, limit: 0", "r.yaml:4: data.train.limit: ", ["found 0", ">= 1"]),
        ("t.jsonl", "builtin:skill", "r.yaml:4: data.train.path: ", ["builtin:skills"]),
        ("{path: t.jsonl}", "t.jsonl", "r.yaml:4: data.train: ", ['found "t.jsonl"', "a mapping"]),
        ("{path: t.jsonl}", "{}", "r.yaml:4: data.train.path: ", ["not given"]),
        ("{path: t.jsonl}", "{path: t.jsonl}\n  max_lenght: 5", "r.yaml:5: data.max_lenght: ", ["did you mean data.max_length?"]),
        ("{path: t.jsonl}", "{path: t.jsonl}\n  max_length: 1", "r.yaml:5: data.max_length: ", ["found 1", ">= 2"]),
        ("runs/x", '"\\ud800"', "r.yaml:1: output_dir: ", []),
    ],
)
def test_a_bad_setting_is_named_where_it_stands(refused, old, new, start, words):
    found(refused(BASE.replace(old, new)), (start, *words))


CONTRADICTIONS = [
    ("loss: {kd_ratio: 0.5}", ("r.yaml:5: loss.kd_ratio: ", "without a teacher")),
    ("loss: {divergence: generalized_jsd, divergence_options: {bta: 1}}", ("r.yaml:5: loss.divergence_options.bta: ", "it has: beta")),
    (
        "loss: {divergence: generalized_jsd, divergence_options: {beta: 3}}",
        ("r.yaml:5: loss.divergence_options.beta: ", "found 3", "0 to 1"),
    ),
    (
        "loss: {divergence: alpha_beta, divergence_options: {alpha: 0, beta: 0}}",
        ("r.yaml:5: loss.divergence_options: ", "add up to less than 0.01"),
    ),
    ("optim: {warmup_steps: 1, warmup_ratio: 0.1}", ("r.yaml:5: optim.warmup_ratio: ", "keep one")),
    ("train: {max_steps: 3}\noptim: {warmup_steps: 5}", ("r.yaml:6: optim.warmup_steps: ", "found 5", "train.max_steps (3)")),
    ("train: {epochs: 1, max_steps: 3}", ("r.yaml:5: train.max_steps: ", "keep one")),
    ("train: {micro_batch_size: 4, micro_batch_tokens: auto}", ("r.yaml:5: train.micro_batch_tokens: ", "keep one")),
    ("train: {micro_batch_tokens: all}", ("r.yaml:5: train.micro_batch_tokens: found", "a whole number >= 1 or auto or null")),
    ("validation: {every: 5}", ("r.yaml:5: validation.every: ", "needs held-out rows, but there are none")),
    ("checkpoint: {best_by: ce}", ("r.yaml:5: checkpoint.best_by: ", "needs held-out rows, but there are none")),
    ("  validation_fraction: 0.1\ncheckpoint: {best_by: top1_agreement}", ("r.yaml:6: checkpoint.best_by: ", "needs a teacher")),
    ("  validation: {path: v.jsonl}\n  validation_fraction: 0.1", ("r.yaml:6: data.validation_fraction: ", "keep one")),
    ("  too_long: split", ("r.yaml:5: data.too_long: ", "format: text")),
]


@pytest.mark.parametrize(("text", "expected"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_named(refused, text, expected):
    found(refused(BASE + text + "\n"), expected)


def test_no_setting_shows_the_checkers_own_words():
    """A mapping where none is expected, for every setting that has several forms: refused in the words of the settings' list."""
    data = {"output_dir": "x", "student": {"model": "m"}, "data": {"train": {"path": "a.jsonl"}}}
    paths = [path for path, type_, *_ in schema.describe() if (" or " in type_ or "list" in type_) and "mapping" not in type_]
    for path in paths:
        *parents, last = path.split(".")
        functools.reduce(lambda section, key: section.setdefault(key, {}), parents, data)[last] = {"no such setting": 1}
    with pytest.raises(UserError) as error:
        check(Recipe, data, "r.yaml", {}, [], set())
    assert {"loss.features.layers", "loss.attention.layers", "train.micro_batch_tokens"} < set(paths)
    for line in error.value.problems:
        assert not re.search(r"literal|tuple|constrained|array|Input|dictionary|expected a '", line), line


def test_an_empty_recipe_names_everything_that_is_needed(refused):
    for text in ("", "# nothing\n", "{}"):
        found(
            refused(text),
            ("r.yaml: output_dir: ", "not given"),
            ("r.yaml: student.model: ", "not given"),
            ("r.yaml: data.train: ", "not given"),
        )


def test_new_weights_need_a_tokenizer_a_model_type_and_full_training(refused):
    problems = refused(BASE.replace("{model: base}", "{architecture: {hidden_size: 8}}"))
    found(
        problems,
        ("r.yaml:2: student.tokenizer: ",),
        ("r.yaml:2: student.architecture: ", "model_type"),
        ("r.yaml:2: student.method: ", "full"),
    )


def test_all_problems_are_found_at_once(refused):
    """Duplicate keys, wrong fields and contradictions in one round; a contradiction about a wrong field is left out."""
    text = BASE + "optim: {lr: -1}\ntrain: {epochs: 1, max_steps: 2, batchsize: 3}\nloss: {kd_ratio: 0.5}\nseed: 1\nseed: 2\n"
    found(
        sorted(refused(text, {"optim.eps": 0})),
        ("--optim.eps: ", "found 0"),
        ("r.yaml:5: optim.lr: ", "found -1"),
        ("r.yaml:6: train.batchsize: ", "did you mean train.batch_size?"),
        ("r.yaml:6: train.max_steps: ", "keep one"),
        ("r.yaml:7: loss.kd_ratio: ", "without a teacher"),
        ("r.yaml:9: seed: ", "given twice"),
    )


@pytest.mark.parametrize("wrong", ["teacher: {model: 3}", "  validation: {path: 3}", "  choices: {path: 3}"])
def test_a_wrong_required_setting_hides_no_contradiction(refused, wrong):
    assert any("train.max_steps: given together" in p for p in refused(BASE + wrong + "\ntrain: {epochs: 1, max_steps: 3}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "teacher: 3\nloss: {kd_ratio: 0.5}",
        "train: {batch_size: x, micro_batch_size: 48}",
        "  validation_fraction: x\nvalidation: {every: 5}",
        "  validation: {pth: v.jsonl}\nvalidation: {every: 5}",
        "loss: {divergence: generalised_jsd, divergence_options: {beta: 0.3}}",
        "  validation_fraction: 0.1\nteacher: {modle: t}\ncheckpoint: {best_by: forward_kl}",
    ],
)
def test_a_wrong_setting_accuses_no_other(refused, text):
    problems = refused(BASE + text + "\n")
    assert not [p for p in problems if "without" in p or "more than" in p or "no such option" in p or "needs a teacher" in p], problems


# ---- YAML

SCALARS = [
    ("optim: {lr: 1e-4}", lambda r: r.optim.lr, 1e-4),
    ("optim: {lr: 1.5E+1}", lambda r: r.optim.lr, 15.0),
    ("optim: {lr: .5}", lambda r: r.optim.lr, 0.5),
    ("optim: {lr: 2}", lambda r: r.optim.lr, 2.0),
    ("optim: {max_grad_norm: ~}", lambda r: r.optim.max_grad_norm, None),
    ("optim: {max_grad_norm: null}", lambda r: r.optim.max_grad_norm, None),
    ("optim: {max_grad_norm: }", lambda r: r.optim.max_grad_norm, None),
    ("  cache_dir: no", lambda r: r.data.cache_dir, "no"),
    ("train: {batch_size: 10}", lambda r: r.train.batch_size, 10),
    ("  cache_dir: no", lambda r: r.data.cache_dir, "no"),
    ("  cache_dir: on", lambda r: r.data.cache_dir, "on"),
    ("  cache_dir: 12:30", lambda r: r.data.cache_dir, "12:30"),
    ("  cache_dir: 2026-11-21", lambda r: r.data.cache_dir, "2026-11-21"),
    ("  cache_dir: 0x1f", lambda r: r.data.cache_dir, "0x1f"),
    ("  cache_dir: '1e-4'", lambda r: r.data.cache_dir, "1e-4"),
]


@pytest.mark.parametrize(("text", "get", "value"), SCALARS)
def test_plain_scalars_mean_what_they_say(load, text, get, value):
    got = get(load(BASE + text + "\n"))
    assert got == value and type(got) is type(value)


def test_an_anchor_is_a_value_used_twice(load):
    recipe = load("output_dir: &a runs/x\nstudent: {model: *a}\ndata:\n  train: &t {path: t.jsonl}\n  validation: *t\n")
    assert recipe.student.model == "runs/x" and recipe.data.validation == recipe.data.train


NOT_YAML = [
    ("a: b: c\n", "r.yaml:1: not valid YAML"),
    ("seed: 1\n\tx: 1\n", "r.yaml:2: not valid YAML"),
    ("seed: [1\n", "r.yaml:2: not valid YAML"),
    (BASE + "---\nseed: 2\n", "r.yaml:5: not valid YAML"),
    ("- 1\n- 2\n", "r.yaml: holds a list; a recipe is a mapping"),
    ("just text\n", "r.yaml: holds a text; a recipe is a mapping"),
    ("3\n", "r.yaml: holds one value; a recipe is a mapping"),
    (b"seed: 1\noutput_dir: caf\xe9\n", "r.yaml:2: not UTF-8"),
    (BASE.encode("utf-16"), "r.yaml:1: not UTF-8"),
    (b"x" * (2 << 20), "r.yaml: 2097152 bytes; a recipe is at most"),
    (b"seed: 1\noutput_dir: a\x00b\n", "r.yaml:2: not valid YAML"),
    ("[" * 2000 + "]" * 2000, "r.yaml"),
    ("a: " + "{a: " * 2000 + "}" * 2000, "r.yaml"),
]


@pytest.mark.parametrize(("text", "start"), NOT_YAML, ids=range(len(NOT_YAML)))
def test_a_file_that_is_no_recipe_is_refused_with_its_line(refused, text, start):
    problems = refused(text)
    found(problems, (start,))
    assert len(problems[0].splitlines()) == 1


def test_a_byte_order_mark_is_no_problem(load):
    assert load(b"\xef\xbb\xbf" + BASE.encode()) == load(BASE)


def test_an_anchors_bomb_is_refused(refused):
    names = "abcdefghi"
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip(names, names[1:], strict=False)
    )
    found(refused(text), ("r.yaml: more than 100000 values",))


@pytest.mark.parametrize(
    "text",
    [
        "seed: !foo 3",
        "seed: !!python/name:os.system x",
        "  cache_dir: !!binary aGVsbG8=",
        "  cache_dir: !!timestamp 2026-11-21",
        "seed: !!python/object/apply:os.system ['true']",
        "optim: !!python/object:os.system {lr: 1}",
        "optim: {betas: !!python/tuple [0.9, 0.99]}",
        "seed: !!int x",
        "optim: {lr: !!float x}",
        "train: {group_by_length: !!bool x}",
    ],
)
def test_tags_are_refused_and_nothing_is_built(refused, text):
    assert any(p.startswith("r.yaml:5: ") and ("tag" in p or "is not a valid" in p) for p in refused(BASE + text + "\n"))


@pytest.mark.parametrize("text", ["a: &a {b: *a}", "a: &a [*a]", "seed: " + "1" * 5000])
def test_no_text_makes_a_bug_of_a_user_error(refused, text):
    assert refused(BASE + text + "\n")[0].startswith("r.yaml:5: ")


# ---- overrides


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optim.lr", "1e-4"], {"optim.lr": 1e-4}),
        (["--optim.lr=1e-4"], {"optim.lr": 1e-4}),
        (["--seed", "-1"], {"seed": -1}),
        (["--seed=-1", "--optim.lr", "-.5"], {"seed": -1, "optim.lr": -0.5}),
        (["--teacher", "null"], {"teacher": None}),
        (["--teacher="], {"teacher": None}),
        (["--optim.betas", "[0.8, 0.9]"], {"optim.betas": [0.8, 0.9]}),
        (["--data.train", "{path: x.json, format: chat}"], {"data.train": {"path": "x.json", "format": "chat"}}),
        (["--loss.divergence_options", "{}"], {"loss.divergence_options": {}}),
        (["--train.mixed_precision", "no"], {"train.mixed_precision": "no"}),
        (["--student.model", "a=b"], {"student.model": "a=b"}),
        (["--student.model=a=b"], {"student.model": "a=b"}),
        ([], {}),
        (["--checkpoint", "{every: 2}"], {"checkpoint": {"every": 2}}),
        (["--output_dir", "runs/a #1"], {"output_dir": "runs/a #1"}),
    ],
)
def test_overrides_are_read_as_yaml(words, expected):
    assert loader.parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--seed"], "--seed: no value given"),
        (["--seed", "--optim.lr", "1"], "--seed: no value given"),
        (["seed", "3"], "seed: not understood"),
        (["--", "3"], "--: not understood"),
        (["--seed", "1", "--seed=2"], "--seed: given twice"),
        (["--seed", "[1"], "--seed:1: not valid YAML"),
        (["--data.train", "{path: x, path: y}"], "--data.train:1: path: given twice"),
        (["--seed", "!!int x"], "--seed"),
        (["--=3"], "--"),
    ],
)
def test_bad_overrides_are_refused(words, start):
    with pytest.raises(UserError) as info:
        loader.parse_overrides(words)
    found(info.value.problems, (start,))


@pytest.mark.parametrize(
    ("text", "overrides", "path", "value"),
    [
        ("", {"optim.lr": 3}, "optim.lr", 3.0),
        ("optim: {lr: 1, eps: 2}", {"optim.lr": 3}, "optim.eps", 2.0),
        ("", {"teacher.model": "x"}, "teacher.model", "x"),
        ("teacher: null", {"teacher.model": "x"}, "teacher.model", "x"),
        ("teacher: {model: x}", {"teacher": None}, "teacher", None),
        ("", {"optim.betas": [0.8, 0.9]}, "optim.betas", (0.8, 0.9)),
        ("", {"data.train": {"path": "x.json", "format": "chat"}}, "data.train.format", "chat"),
        ("seed: wrong", {"seed": 3}, "seed", 3),
        ("", {"teacher": None, "teacher.model": "x"}, "teacher.model", "x"),
    ],
)
def test_an_override_replaces_one_setting(load, text, overrides, path, value):
    assert flatten(load(BASE + text + "\n", overrides))[path] == value


@pytest.mark.parametrize(
    ("overrides", "start", "words"),
    [
        ({"seed": -1}, "--seed: ", ["found -1"]),
        ({"optim.lr": float("inf")}, "--optim.lr: ", ["found Infinity"]),
        ({"lr": 3}, "--lr: ", ["did you mean optim.lr?"]),
        ({"optim.lerning_rate": 3}, "--optim.lerning_rate: ", ["did you mean optim.lr?"]),
        ({"data.train": {"path": "x", "formt": "chat"}}, "--data.train.formt: ", ["did you mean data.train.format?"]),
        ({"output_dir.x": 3}, "--output_dir.x: output_dir is ", ["and has no settings of its own (text); write --output_dir VALUE"]),
        (
            {"loss.kd_ratio": 0.0, "loss.kd_ratio.from": 1},
            "--loss.kd_ratio.from: loss.kd_ratio is 0.0 here, ",
            ["whole: --loss.kd_ratio '{from: 1, ...}'"],
        ),
        ({"data.train.0.limit": 3}, "--data.train.0.limit: data.train is one, and no list; ", ["write --data.train.limit"]),
        (
            {"loss.target_weights": "divergence"},
            "--loss.target_weights: ",
            ["expected a mapping of settings; did you mean {by: divergence}?"],
        ),
        ({"loss.features": 0.5}, "--loss.features: found 0.5, ", ["did you mean {weight: 0.5}?"]),
        ({"teacher": "m"}, "--teacher: ", ["or a list of them; did you mean {model: m}?"]),
        ({"teacher": "http://h:1"}, "--teacher: ", ["did you mean {server: http://h:1}?"]),
        ({"student": "m"}, "--student: ", ["did you mean {model: m}?"]),
        ({"student.lora": 16}, "--student.lora: ", ["did you mean {rank: 16}?"]),
        ({"student.quantization": "nf4"}, "--student.quantization: ", ["did you mean {type: nf4}?"]),
        ({"optim.lr": "1,5"}, '--optim.lr: found "1,5", ', ["; write 1.5"]),
        ({"report_to": "wandb"}, "--report_to: ", ["; write [wandb]"]),
        ({"student.lora.modules_to_save": "lm_head"}, "--student.lora.modules_to_save: ", ["expected a list of texts; write [lm_head]"]),
        ({"push_to_hub": "me/x"}, "--push_to_hub: ", ["did you mean {repo: me/x}?"]),
        ({"loss.divergence": "kl"}, "--loss.divergence: ", ["did you mean forward_kl?"]),
        (
            {"loss.divergence_options.beta": 0.5},
            "--loss.divergence_options.beta: ",
            ["has no such option", "beta belongs to generalized_jsd, alpha_beta"],
        ),
        ({"data.train": {"path": "x.csv", "format": "csv"}}, "--data.train.format: ", ["the kind of a file is known by its ending"]),
        ({"data.train": "x.jsonl"}, "--data.train: ", ["did you mean {path: x.jsonl}?"]),
        ({"teacher.dtype": "float32"}, "", ["teacher.model: not given"]),
        ({"optim.lr.x": 3}, "--optim.lr", []),
        ({"checkpoint": {"evry": 2}}, "--checkpoint.evry: ", ["did you mean checkpoint.every?"]),
        ({"optm.lr": 3}, "--optm", ["did you mean optim"]),
    ],
)
def test_a_bad_override_is_named_as_it_was_given(refused, overrides, start, words):
    found(refused(BASE, overrides), (start, *words))


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_number_out_of_its_range_is_not_proposed_in_a_mapping(refused, share):
    assert refused(BASE, {"loss.keep": share}) == [f"--loss.keep: found {share}, expected a number > 0, <= 1, or a mapping of settings"]


# ---- round trip

TEXTS = [
    "no",
    "null",
    "~",
    "true",
    "12:30",
    "010",
    "0x1f",
    "1_000",
    "-1",
    ".5",
    "1.",
    "=",
    "é😀",
    "'q'",
    "",
    "# x",
    "a: b",
    "a\nb",
    " a ",
    "x" * 200,
]
ROUND = [
    {},
    {"teacher.model": "t", "loss.kd_ratio": 0.25, "loss.divergence": "alpha_beta", "loss.divergence_options": {"alpha": 1, "beta": 0.1}},
    {"optim.lr": 1e-7, "optim.eps": 1e-30, "optim.betas": [0, 0.5], "optim.max_grad_norm": None, "seed": 2**32 - 1},
    {"student.lora.target_modules": ["q_proj", "v_proj"], "student.lora.alpha": 3},
    {
        "student": {
            "architecture": {"model_type": "llama", "rope": {"theta": 1e6, "x": [1, None, True, "no"]}},
            "method": "full",
            "tokenizer": "t",
        }
    },
    {"data.validation": {"path": "v.json", "format": "chat", "limit": 3}, "validation.every": 5, "checkpoint.best_by": "ce"},
    {"train.max_steps": 7, "optim.warmup_ratio": 0.1},
    *({"student.revision": text} for text in TEXTS),
    *({"student.revision": text} for text in ("7e45121", "1e-4", "08")),
    {"student.revision": "a\x85b"},
]


@pytest.mark.parametrize("changes", ROUND, ids=str)
def test_a_written_recipe_loads_as_an_equal_one(load, changes):
    recipe = load(BASE, changes)
    assert load(loader.dump(recipe)) == recipe


def test_resolved_defaults_are_written_out(load):
    plain, distilled = load(BASE), load(BASE, {"teacher.model": "t", "train.max_steps": 3})
    assert (plain.loss.kd_ratio, plain.train.epochs) == (0.0, 1)
    assert (distilled.loss.kd_ratio, distilled.train.epochs) == (0.5, None)
    assert (plain.train.micro_batch_size, load(BASE, {"train.micro_batch_tokens": 99}).train.micro_batch_size) == (4, None)
    assert loader.resolve(distilled) == distilled


# ---- pipelines

PIPELINE = "output_dir: r\nstages:\n  a: {recipe: a.yaml}\n  b: {recipe: b.yaml, set: {teacher.model: x}}\nteacher: a\nstudents: [b]\n"


def test_a_pipeline_loads(load, tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).touch()
    pipeline = load(PIPELINE, None, loader.load_pipeline)
    assert list(pipeline.stages) == ["a", "b"] and pipeline.stages["b"].set == {"teacher.model": "x"} and pipeline.students == ("b",)
    assert load(PIPELINE, "elsewhere", loader.load_pipeline).output_dir == "elsewhere"


@pytest.mark.parametrize(
    ("old", "new", "start", "words"),
    [
        ("[b]", "[c]", "r.yaml:", ["students: found c, which is no stage; the stages are a, b"]),
        ("teacher: a", "teacher: c", "r.yaml:", ["teacher: found c, which is no stage"]),
        ("students: [b]", "students: [b]\nseed: 1", "r.yaml:7: seed: ", ["unknown", "output_dir, stages"]),
        ("  a: ", "  ../c: {recipe: a.yaml}\n  a: ", "r.yaml:3: stages.../c: ", ["letters, digits"]),
        ("output_dir: r", "output_dir: ''", "r.yaml:1: output_dir: ", []),
        ("set: {teacher.model: x}", "set: 3", "r.yaml:4: stages.b.set: ", ["found 3", "a mapping"]),
        ("{recipe: a.yaml}", "{}", "r.yaml:3: stages.a: ", ["has a recipe, or a file of llmkd make"]),
        ("{recipe: a.yaml}", "{recipe: a.yaml, st: {}}", "r.yaml:3: stages.a.st", ["did you mean stages.a.set"]),
        ("[b]", "[]", "r.yaml:6: students: ", []),
    ],
)
def test_a_bad_pipeline_is_refused(refused, old, new, start, words):
    found(refused(PIPELINE.replace(old, new), None, loader.load_pipeline), (start, *words))


@pytest.mark.parametrize(
    ("text", "read", "place"),
    [
        (PIPELINE, loader.load_pipeline, "r.yaml:4: stages.b.recipe: there is no file "),
        ("output_dir: r\nrecipe: b.yaml\nseeds: [1]\n", loader.load_sweep, "r.yaml:2: recipe: there is no file "),
    ],
)
def test_a_missing_recipe_is_named_where_it_is_written(refused, tmp_path, text, read, place):
    (tmp_path / "a.yaml").touch()
    found(refused(text, None, read), (place, "b.yaml; did you mean "))
    (tmp_path / "b.yaml").mkdir()
    found(refused(text, None, read), (place.replace("there is no file ", ""), "b.yaml is a folder; name a file in it"))


# ---- sources

SOURCES = BASE.replace("  train: {path: t.jsonl}\n", "  train:\n    - {path: a.jsonl}\n    - path: b.jsonl\n      FORMAT\n")


@pytest.mark.parametrize(
    ("line", "start", "words"),
    [
        ("format: alpca", "r.yaml:7: data.train.1.format: ", ["alpaca, chat, prompt_completion, text or tokens", "did you mean alpaca?"]),
        ("fromat: chat", "r.yaml:7: data.train.1.fromat: ", ["did you mean data.train.1.format?"]),
        ("limit: 0", "r.yaml:7: data.train.1.limit: ", ["found 0", "a whole number >= 1"]),
        ("weight: 0", "r.yaml:7: data.train.1.weight: ", ["found 0", "a number > 0"]),
        ("weight: 1000000000", "r.yaml:7: data.train.1.weight: ", ["found 1000000000", "a number > 0, <= 1000"]),
        ("seed: 3", "r.yaml:7: data.train.1.seed: ", ["without limit"]),
        ("chat_template: 3", "r.yaml:7: data.train.1.chat_template: ", ["found 3", "true or false"]),
        ("fields: [a]", "r.yaml:7: data.train.1.fields: ", ["a mapping"]),
        ("fields: {instruction: 3}", "r.yaml:7: data.train.1.fields.instruction: ", ["found 3"]),
        ("fields: {messages: x}", "r.yaml:7: data.train.1.fields.messages: ", ["no such column", "instruction, input, output"]),
        ("roles: {user: human}", "r.yaml:7: data.train.1.roles: ", ["has no roles"]),
    ],
)
def test_a_bad_setting_in_a_list_of_sources_is_named_where_it_stands(refused, line, start, words):
    found(refused(SOURCES.replace("FORMAT", line)), (start, *words))


SOURCE_CONTRADICTIONS = [
    ("  validation: {path: v.jsonl, weight: 2}", "r.yaml:5: data.validation.weight: ", "only training sources"),
    ("  validation: [{path: v.jsonl}, {path: w.jsonl, weight: 2}]", "r.yaml:5: data.validation.1.weight: ", "only training sources"),
    ("  choices: {path: v.jsonl, weight: 2}", "r.yaml:5: data.choices.weight: ", "only training sources"),
    ("  choices: {path: v.jsonl, format: text}", "r.yaml:5: data.choices.format: ", "no answer that choices could replace"),
    ("  validation: []", "r.yaml:5: data.validation: ", "empty list"),
    ("  validation: [{path: builtin:skill}]", "r.yaml:5: data.validation.0.path: ", "builtin:skills"),
    ("  validation: {path: v, format: chat, chat_template: true}", "r.yaml:5: data.validation.chat_template: ", "always rendered"),
    ("  validation: {path: v, format: alpaca, answers: last}", "r.yaml:5: data.validation.answers: ", "one answer each"),
    ("  validation: {path: v, format: alpaca, call_values: json}", "r.yaml:5: data.validation.call_values: ", "no calls; leave it out"),
    ("  validation: {path: v, format: text, chat_template: true}", "r.yaml:5: data.validation.chat_template: ", "no turns"),
    (
        "  validation: {path: v, format: chat, roles: {usr: human}}",
        "r.yaml:5: data.validation.roles.usr: ",
        "system, developer, user, assistant, tool",
    ),
    ("  validation: {path: v, format: chat, roles: {user: assistant}}", "r.yaml:5: data.validation.roles.user: ", "another role"),
    ("  validation: {path: v, format: text, fields: {txt: x}}", "r.yaml:5: data.validation.fields.txt: ", "it has text"),
    (
        "  validation: {path: v, format: prompt_completion, fields: {prompt: text, completion: text}}",
        "r.yaml:5: data.validation.fields.prompt: ",
        "found 'text', which is also read as completion",
    ),
    ("  validation: {path: v, fields: {instruction: output}}", "r.yaml:5: data.validation.fields.instruction: ", "also read as output"),
    ("  validation: {path: v, format: chat, fields: {role: content}}", "r.yaml:5: data.validation.fields.role: ", "also read as content"),
    ("  validation: {path: v, ignore: [output]}", "r.yaml:5: data.validation.ignore: ", "found 'output', which format alpaca reads"),
    ("  validation: {path: v, format: chat, ignore: [role]}", "r.yaml:5: data.validation.ignore: ", "found 'role'"),
    ("  streaming: true", "r.yaml:5: data.streaming: ", "without train.max_steps"),
    ("  streaming: true\n  validation_fraction: 0.1\ntrain: {max_steps: 3}", "r.yaml:6: data.validation_fraction: ", "use data.validation"),
    ("  streaming: true\ntrain: {max_steps: 3, group_by_length: 2}", "r.yaml:6: train.group_by_length: ", "use 1"),
]


@pytest.mark.parametrize(("text", "start", "words"), SOURCE_CONTRADICTIONS)
def test_what_makes_no_sense_of_a_source_is_named(refused, text, start, words):
    found(refused(BASE + text + "\n"), (start, words))


@pytest.mark.parametrize("train", ["[{path: a}, {path: b}]", "{path: a, weight: 2}", "{path: a, limit: 3, seed: 1}"])
def test_what_a_stream_cannot_do_is_named(refused, train):
    text = BASE.replace("{path: t.jsonl}", train) + "  streaming: true\ntrain: {max_steps: 3}\n"
    found(refused(text), ("r.yaml:4: data.train: ", "data.streaming"))


def test_data_in_one_word_and_several_files_in_one_source(refused):
    assert refused(BASE, {"data": "rows.jsonl"})[0].endswith("a mapping of settings; did you mean {train: {path: rows.jsonl}}?")
    (line,) = refused(BASE, {"data.train.path": ["a.jsonl", "b.jsonl"]})
    assert line.endswith("write a list of sources, data.train: [{path: a.jsonl}, {path: b.jsonl}]")


def test_sources_on_the_command_line(load, refused):
    several = SOURCES.replace("FORMAT", "weight: 2")
    recipe = load(several)
    assert [(Path(s.path).name, s.weight) for s in recipe.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]
    assert load(loader.dump(recipe)) == recipe
    words = ["--data.train", "[{path: c.jsonl}, {path: d.jsonl, format: chat}]", "--data.validation.path", "v.jsonl"]
    recipe = load(BASE, loader.parse_overrides(words))
    assert [s.path for s in recipe.data.train] == ["c.jsonl", "d.jsonl"] and recipe.data.validation.path == "v.jsonl"
    assert load(BASE, loader.parse_overrides(["--data.train.path", "x.jsonl"])).data.train.path == "x.jsonl"
    assert load(several, loader.parse_overrides(["--data.train.1.path", "x.jsonl"])).data.train[1].path == "x.jsonl"
    for name in ("data.train.2.weight", "data.train.2"):
        found(refused(several, {name: 3}), (f"--{name}: ", "data.train is a list of 2; it has no 2, but 0 and 1"))
    found(refused(several, {"data.train.path": "x"}), ("--data.train.path: ", "is a list of 2; name one, such as --data.train.0.path"))
    found(refused(several, {"data.train.1.format": "x"}), ("--data.train.1.format: ", "alpaca, chat"))
    found(refused(BASE, {"data.train": [{"path": "a"}, {"path": "b", "limit": 0}]}), ("--data.train.1.limit: ", "found 0"))
    found(refused(BASE, {"data.train": []}), ("--data.train: ", "not given"))


# ---- help and the command


def leaves(kind=Recipe, prefix=""):
    """Path, field and whether it is a section, straight from the dataclasses."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inside = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)]
        yield prefix + field.name, field, bool(inside)
        if inside:
            yield from leaves(inside[0], f"{prefix}{field.name}.")


def test_help_lists_every_setting_with_its_default_and_one_sentence():
    lines = schema.help_text().splitlines()
    shown = {head.split()[0]: (head, sentence) for head, sentence in zip(lines[::2], lines[1::2], strict=True)}
    expected = [(f"--{path}", field) for path, field, section in leaves() if not section]
    sections = {f"--{path}" for path, _, section in leaves() if section}
    assert [path for path in shown if path not in sections] == [path for path, _ in expected]
    for path, field in expected:
        head, sentence = shown[path]
        assert field.default.description and sentence.strip() == field.default.description
        assert sentence.rstrip().endswith(".")
        assert "default " in head
    for path, default in {"optim.lr": "0.0002", "train.epochs": "null", "optim.betas": "[0.9, 0.999]", "student.method": "lora"}.items():
        assert shown[f"--{path}"][0].endswith(f"default {default})")


def test_help_says_what_an_optional_section_is():
    text = schema.help_text()
    assert not [
        path
        for path, field, section in leaves()
        if section and getattr(field.default, "description", None) and field.default.description not in text
    ]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--help"], "llmkd train"),
        ([], "llmkd train"),
        (["--version"], "llmkd "),
        (["train", "--help"], "--optim.lr"),
        (["export", "--help"], "export"),
    ],
)
def test_asking_for_help_is_no_failure(capsys, argv, text):
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert text in out and not err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["--config: not given"]),
        (["train", "--config"], ["--config: no value"]),
        (["train", "--config", "nope.yaml"], ["--config nope.yaml: No such file"]),
        (["train", "--config", "."], ["--config .: Is a directory"]),
        (["train", "nope.yaml"], ["nope.yaml: not understood"]),
        (["train", "\u2013config", "BAD"], ["\u2013config: begins with a dash that is no hyphen; write --config"]),
        (["train", "--config", "BAD", "\u2014resume"], ["\u2014resume: begins with a dash that is no hyphen; write --resume"]),
        (
            ["train", "--config", "BAD", "--resume", "out/checkpoints/step-2"],
            ["--resume: found out/checkpoints/step-2, and it takes no value"],
        ),
        (["train", "-c", "BAD"], ["-c: not understood; the recipe is given by --config FILE"]),
        (["train", "--recipe", "BAD"], ["--recipe: not understood; the recipe is given by --config FILE"]),
        (
            ["train", "--config", "/dev/null"],
            ["--config /dev/null: is a pipe or a device, and a recipe is read more than once; write it to a file"],
        ),
        (["--config", "r.yaml"], ["--config: not understood; name the command first, such as llmkd train --config r.yaml"]),
        (
            ["trian"],
            [
                "trian: no such command; did you mean train? there are train, sweep, cache, data, roll, make, plan, doctor, sample, export, eval, tasks, compare, report"
            ],
        ),
        (["export", "run", "--too", "x"], ["--too: export has no such option"]),
        (["train", "--config", "BAD"], [":5: optim.lr: ", ":6: sed: ", ":7: train.max_steps: "]),
        (["train", "--config", "BAD", "--optim.lr", "1", "--train.epochs", "null"], [":6: sed: "]),
        (["train", "--config", "BAD", "--resume", "--optim.lr=x"], ["--optim.lr: ", ":6: sed: ", ":7: train.max_steps: "]),
    ],
)
def test_what_the_user_can_mend_ends_with_2_and_a_line_each(capsys, tmp_path, argv, words):
    bad = tmp_path / "bad.yaml"
    bad.write_text(BASE + "optim: {lr: -1}\nsed: 3\ntrain: {epochs: 1, max_steps: 2}\n")
    assert cli.main([str(bad) if word == "BAD" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == len(words) and "Traceback" not in err
    assert all(line.startswith("llmkd: ") and word in line for line, word in zip(lines, words, strict=True)), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml"]


def test_a_name_with_characters_of_a_terminal_stays_one_line_that_shows_them(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text(BASE + '"a\\nb\\e[31m": 1\n')
    assert cli.main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"bad.yaml:5: a\nb\x1b[31m: unknown setting" in line


def test_debug_shows_where(capsys):
    assert cli.main(["train", "--config", "nope.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_recipe_is_checked_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "r.yaml").write_text(BASE)
    (tmp_path / "bad.yaml").write_text(BASE + "sed: 1\n")
    code = (
        "import json, sys, llmkd, llmkd.config.loader, llmkd.cli, llmkd.training.early_checks, llmkd.commands.cache_selection\n"
        "llmkd.config.loader.load_recipe('r.yaml')\n"
        "codes = [llmkd.cli.main(a) for a in (['train', '--help'], ['--help'], ['train', '--config', 'bad.yaml'])]\n"
        "print(json.dumps([codes, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 2]
    assert not {"torch", "transformers", "datasets", "peft", "accelerate", "tokenizers", "safetensors", "matplotlib"} & set(modules)
