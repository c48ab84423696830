"""The stage keep: each filter by its setting, their order, the reasons, and shares that hold in the end."""

import json
from collections import Counter

import pytest

from llmkd.config.make_keep import Keep as Settings
from llmkd.config.make_keep import keep_contradictions
from llmkd.config.validation import check
from llmkd.errors import UserError
from llmkd.making.clusters import by_words
from llmkd.making.prompts import NO_PROMPTS
from llmkd.making.rows import Row, made_row
from llmkd.making.stage import Outcome, Work
from llmkd.making.stages.keep import Keep
from llmkd.rollouts.sampling import Sampling


def row(question: str, answer: str | None = "It is so.", number: int = 0, columns: dict | None = None, **notes) -> Row:
    messages = [{"role": "user", "content": question}] + ([] if answer is None else [{"role": "assistant", "content": answer}])
    return made_row("seeds", None, messages, number=number, columns=columns, **notes)


def work(folder, seed: int = 0) -> Work:
    return Work("2_keep", seed, "w", {}, Sampling(0.0, 1), NO_PROMPTS, folder, lambda asks: [])


def settings(**given) -> Settings:
    return check(Settings, json.loads(json.dumps(given)), "make.yaml", {}, [], set())


def kept(rows: list[Row], folder, **given) -> Outcome:
    outcome = Keep(settings(**given)).run(rows, work(folder))
    assert not outcome.passed
    assert Counter(id(one) for one in rows) == Counter([*map(id, outcome.kept), *(id(one.row) for one in outcome.rejected)])
    return outcome


def test_without_settings_only_empty_answers_are_left_out(tmp_path):
    rows = [row("a"), row("b", " \n"), row("c", None), row("a", number=1)]
    outcome = kept(rows, tmp_path)
    assert outcome.kept == [rows[0], rows[2], rows[3]] and [one.reason for one in outcome.rejected] == ["empty"]


LONG = "the quick brown fox jumps over the lazy dog and runs through the deep green wood to its old den "
CASES = [
    ({"finish": "stop"}, row("q", "Half a", finish="length"), "cut_off"),
    ({"min_words": 4}, row("q"), "too_short"),
    ({"max_words": 2}, row("q"), "too_long"),
    ({"refusals": True}, row("q", "I'm sorry, but no."), "refusal"),
    ({"refusals": True, "refusal_phrases": ["nein"]}, row("q", "Nein!"), "refusal"),
    ({"echo": 0.8}, row("Name three rivers of Asia", "name three rivers of Asia"), "echo"),
    ({"repetition": 2.4}, row("q", LONG * 9), "repetition"),
    ({"repeated_words": 0.5}, row("q", LONG * 3), "repetition"),
    ({"scripts": ["latin"], "script_share": 0.5}, row("Привет", "мир"), "script"),
    ({"sums": True}, row("q", "<<2+2=5>>"), "wrong_sum"),
]


@pytest.mark.parametrize(("given", "bad", "reason"), CASES)
def test_a_filter_is_on_where_its_setting_is_given(given, bad, reason, tmp_path):
    good = row("What is it, then?", "It is so, and 2 + 2 is <<2+2=4>>4." if "max_words" not in given else "So.")
    outcome = kept([bad, good], tmp_path, **given)
    assert outcome.kept == [good] and [(one.row, one.reason) for one in outcome.rejected] == [(bad, reason)]
    assert kept([bad, good], tmp_path).kept == [bad, good]


def test_rows_in_other_languages_are_left_out_where_they_are_long_enough_to_tell(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^languages: needs py3langid; pip install llmkd\[make\]"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        Keep(settings(languages=["en"]))
    pytest.importorskip("py3langid")
    english, german = "Name three rivers of Europe, and say where they end.", "Der Rhein mündet bei Rotterdam in die Nordsee."
    rows = [row(english, "The Rhine, which ends in the North Sea."), row(english, german), row("Was ist das, was wir heute hier sehen?")]
    rows += [row("def f(x): return x + 1", "1 2 3 4 5 6 7"), row("Danke schön", "Bitte sehr")]
    outcome = kept(rows, tmp_path, languages=["en"])
    assert outcome.kept == [rows[0], *rows[3:]] and [one.detail[:3] for one in outcome.rejected] == ["de ", "de "]
    assert kept(rows, tmp_path, languages=["en", "de"]).kept == rows
    with pytest.raises(UserError, match="languages: found eng, which is no code of a language; did you mean en"):
        Keep(settings(languages=["eng"]))


def test_held_out_rows_are_read_from_files_whatever_their_columns(tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text(json.dumps({"q": {"parts": [1, f"Story: {LONG}"]}, "label": 3}) + "\n" + json.dumps({"q": "What is 2 + 2?"}) + "\n")
    rows = [row("Tell me.", f"Well: {LONG.upper()}"), row("what is 2+2"), row("Tell me.", " ".join(LONG.split()[:12]))]
    outcome = kept(rows, tmp_path, contamination={"path": str(file)})
    assert outcome.kept == rows[2:] and [one.detail.split(" has")[0] for one in outcome.rejected] == [f"{file}:1", f"it asks what {file}:2"]
    with pytest.raises(UserError, match="none.jsonl"):
        Keep(settings(contamination={"path": str(tmp_path / "none.jsonl")}))


def test_the_test_and_validation_rows_of_tasks_are_found_by_their_task_files(tmp_path):
    """As `llmkd tasks` writes them: what is included counts where it is not changed, code that is named is not run, and rows to train on may be trained on."""
    ends = ["and walks home to bed", f"Then: {LONG}"]
    for name, text in (("train", "alpha " * 13), ("val", "x"), ("test", "What is the sum of two and three?")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"ctx": text, "endings": ends if name == "val" else [], "label": 1}) + "\n")
    (tmp_path / "own.txt").write_text("task: other\ndoc_to_text: !function code.f\ntraining_split: train\nvalidation_split: validation\n")
    files = {"train": ["train.jsonl"], "validation": [str(tmp_path / "val.jsonl")], "test": "test.jsonl"}
    task = {"include": "own.txt", "task": "hella", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    (tmp_path / "tasks.yaml").write_text(json.dumps(task))
    (tmp_path / "hub.yaml").write_text('{"task": "far", "dataset_path": "a/b"}')
    held = {"tasks": ["hella"], "tasks_dir": str(tmp_path)}
    rows = [row("Tell me.", f"So it goes: {LONG}"), row("what is the sum of two and three"), row("alpha " * 13), row("Go on.", ends[0])]
    outcome = kept(rows, tmp_path, contamination=held)
    assert outcome.kept == rows[2:] and [one.detail.split(":1 ")[0].split("/")[-1] for one in outcome.rejected] == [
        "val.jsonl",
        "test.jsonl",
    ]
    (tmp_path / "part.yaml").write_text(json.dumps(task | {"task": "part", "dataset_kwargs": {"data_files": {"test": "test.jsonl"}}}))
    for tasks, said in (
        (["hela"], "found hela, and .* has no such task; it has far, hella, part"),
        (["far"], ".*hub.yaml names no data of test"),
        (["part"], ".*part.yaml names no file of validation in its data_files; name the data themselves"),
    ):
        with pytest.raises(UserError, match=f"contamination.tasks: {said}"):
            Keep(settings(contamination={**held, "tasks": tasks}))
    with pytest.raises(UserError, match=r"contamination.tasks_dir: .*none holds no task files \(\*.yaml\)"):
        Keep(settings(contamination={**held, "tasks_dir": str(tmp_path / "none")}))


def test_several_answers_to_one_question_must_agree_and_single_ones_do(tmp_path):
    rows = [row("a", "so 4"), row("a", "#### 5"), row("b", "7"), row("a", "4.0"), row("c", "1"), row("c", "2")]
    outcome = kept(rows, tmp_path, agreement=0.6)
    assert outcome.kept == [rows[0], rows[2], rows[3]]
    assert [(one.row, one.detail) for one in outcome.rejected] == [
        (rows[1], "comes to '5'"),
        (rows[4], "comes to '1'"),
        (rows[5], "comes to '2'"),
    ]
    by_words_of_them = kept(
        [row("a", "the cat sat"), row("a", "the cat ran"), row("a", "dogs")], tmp_path, agreement=0.3, agreement_by="words"
    )
    assert [one.answer for one in by_words_of_them.kept] == ["the cat sat", "the cat ran"]


def test_near_duplicates_of_questions_of_answers_or_of_both(tmp_path):
    rows = [row("Which bird sings?", "The wren sings."), row("Which bird sings??", "No one knows it."), row("Why?", "The wren sings!")]
    assert kept(rows, tmp_path, near_duplicate=0.7).kept == [rows[0], rows[2]]
    outcome = kept(rows, tmp_path, near_duplicate=0.7, near_duplicate_of="answer")
    assert outcome.kept == rows[:2] and outcome.rejected[0].detail.endswith(f" of {rows[0].id}")
    assert kept(rows, tmp_path, near_duplicate=0.7, near_duplicate_of="both").kept == rows


def test_rows_above_a_quantile_of_the_teachers_cross_entropy(tmp_path):
    rows = [row(f"q {i}", columns={"teacher_ce": float(i % 10)}) for i in range(20)]
    outcome = kept(rows, tmp_path, teacher_ce=0.9)
    assert {one.row.columns["teacher_ce"] for one in outcome.rejected} == {9.0} and len(outcome.kept) == 18
    with pytest.raises(UserError, match=r"^teacher_ce: found teacher_ce, and the row [0-9a-f]{16} has no such column"):
        kept([*rows, row("q")], tmp_path, teacher_ce=0.9)


@pytest.mark.parametrize("wrong", [True, "1", float("nan")])
def test_a_column_that_is_no_number_is_refused(wrong, tmp_path):
    with pytest.raises(UserError, match="add a stage score before"):
        kept([row("q", columns={"teacher_ce": wrong})], tmp_path, teacher_ce=0.9)


def test_shares_hold_of_what_the_other_filters_leave(tmp_path):
    rows = [row(f"question {i} {'x' * i}", "yes" if i % 2 else "", columns={"kind": "abc"[i % 3]}) for i in range(30)]
    rows += [row(f"another {i} {'y' * i}", columns={"kind": "a"}) for i in range(20)]
    outcome = kept(rows, tmp_path, balance={"column": "kind", "max_share": 0.4})
    counted = Counter(one.columns["kind"] for one in outcome.kept)
    assert counted == {"a": 6, "b": 5, "c": 5} and max(counted.values()) <= 0.4 * counted.total()
    assert Counter(one.reason for one in outcome.rejected) == {"empty": 15, "too_many_of_its_kind": 19}
    with pytest.raises(UserError, match="found 0.2, and the 35 rows are of 3 kinds"):
        kept(rows, tmp_path, balance={"column": "kind", "max_share": 0.2})
    with pytest.raises(
        UserError, match="35 rows of 35 have no text or number as sort, the first made by seeds: .question 1 x.; give every seed one"
    ):
        kept(rows, tmp_path, balance={"column": "sort", "max_share": 0.4})


def test_kinds_are_clusters_of_words(tmp_path):
    rows = [row(f"Translate the French word number {i} into English") for i in range(12)]
    rows += [row(f"Compute the sum {i} plus {i + 1}, digits only") for i in range(4)]
    labels = by_words([one.instruction for one in rows], 2, 0)
    assert labels == [0] * 12 + [1] * 4
    outcome = kept(rows, tmp_path, balance={"clusters": 2, "max_share": 0.5})
    assert Counter(one.instruction.split()[0] for one in outcome.kept) == {"Translate": 4, "Compute": 4}
    assert by_words(["a", ""], 5, 0) == [0, 1]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"refusal_phrases": ["no"]}, "refusal_phrases"),
        ({"script_share": 0.5}, "script_share"),
        ({"agreement_by": "words"}, "agreement_by"),
        ({"near_duplicate_of": "both"}, "near_duplicate_of"),
        ({"min_words": 3, "max_words": 2}, "min_words"),
        ({"balance": {"max_share": 0.5, "column": "a", "clusters": 3}}, "balance.clusters"),
        ({"balance": {"max_share": 0.5, "on": "hidden"}}, "balance.model"),
        ({"balance": {"max_share": 0.5, "model": {"model": "m"}}}, "balance.model"),
        ({"balance": {"max_share": 0.1, "clusters": 9}}, "balance.max_share"),
        ({"contamination": {"split": "test"}}, "contamination.path"),
        ({"contamination": {"tasks": ["a"]}}, "contamination.tasks_dir"),
        ({"contamination": {"path": "f", "tasks_dir": "d"}}, "contamination.tasks_dir"),
        ({"contamination": [{"path": "f"}, {"tasks": ["a"], "tasks_dir": "d", "split": "test"}]}, "contamination.1.split"),
    ],
)
def test_settings_that_do_not_go_together(given, name):
    assert [found for found, _ in keep_contradictions(settings(**given))] == [name]


def test_settings_that_go_together():
    given = {"refusals": True, "refusal_phrases": ["no"], "min_words": 2, "max_words": 2, "balance": {"max_share": 0.1, "clusters": 10}}
    assert not list(keep_contradictions(settings(**given)))
