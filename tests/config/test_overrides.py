"""Settings on the command line replace those of the file, and a bad one is named as it was given."""

import pytest

from llmkd.config import loader
from llmkd.config.dotted import flatten
from llmkd.errors import UserError
from tests.kit.settings import BASE, found


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
