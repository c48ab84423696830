"""Settings are read strictly: a wrong one is named with its place, what was found and what is allowed; contradictions too."""

import functools
import re

import pytest

from llmkd import console
from llmkd.config import schema
from llmkd.config.recipe import DIVERGENCES, Recipe
from llmkd.config.validation import check
from llmkd.errors import UserError
from tests.kit.settings import BASE, found


def case(text: str, start: str, *words: str):
    """A bad recipe, how its one problem starts, and words that must be in it."""
    return text, start, words


BAD = [
    case("lerning_rate: 1", "r.yaml:5: lerning_rate: ", "unknown", "did you mean optim.lr?"),
    case("learning_rate: 1", "r.yaml:5: learning_rate: ", "did you mean optim.lr?"),
    case("optim: {lerning_rate: 1}", "r.yaml:5: optim.lerning_rate: ", "did you mean optim.lr?"),
    case("loss:\n  temprature: 2", "r.yaml:6: loss.temprature: ", "did you mean loss.temperature?"),
    case("zzz: 1", "r.yaml:5: zzz: ", "known here: output_dir, task, seed, student"),
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
            ["alpaca, chat, prompt_completion, text, tokens, labelled, audio, image or speech", "did you mean alpaca?"],
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
