"""A recipe's file: what its YAML means, what is no recipe, and a written one that loads as an equal one."""

import pytest

from llmkd.config import loader
from tests.kit.settings import BASE, found

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
