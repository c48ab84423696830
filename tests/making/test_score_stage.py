"""The stages score and select: columns with fingerprints, nothing computed twice, rows without a score, the versions of a row."""

import contextlib
import dataclasses
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmkd.config.data import Source
from llmkd.config.make_score import Score as Settings
from llmkd.config.make_score import ScoringModel, Select, score_contradictions, select_contradictions
from llmkd.data.reading.skills import tokenizer as skills_tokenizer
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError
from llmkd.making.computed import NAME
from llmkd.making.prompts import load_prompts
from llmkd.making.rows import Row, made_row, row_id
from llmkd.making.scores.hidden import mean_states
from llmkd.making.scores.scorer import Scorer
from llmkd.making.stage import Work
from llmkd.making.stages import score as stage
from llmkd.making.stages.select import Select as SelectStage
from llmkd.rollouts.sampling import Sampling
from tests.kit.making import Function, lines, run_make, write_make
from tests.making.test_scores import ce_by_loops, parts

ALL = ("ce", "ifd", "rifd", "teacher_ce", "kl")


def row(question: str, answer: str | None, parents: tuple[str, ...] = (), columns: dict | None = None, **notes) -> Row:
    messages = [{"role": "user", "content": question}] + ([] if answer is None else [{"role": "assistant", "content": answer}])
    return made_row("seeds", None, messages, parents, columns=columns, **notes)


ROWS = [row("Say 1", "Yes."), row("And the owl?", "It flies at night."), row("Why?", None), row("How long?", "No! " * 60)]


def work(folder) -> Work:
    return Work("2_score", 0, "w", {}, Sampling(0.0, 1), load_prompts("score", None, "prompt"), folder, lambda asks: [])


def settings(world, **given) -> Settings:
    student = ScoringModel(model=str(world / "student"))
    return Settings(**{"student": student, "max_length": 120} | given)


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """What the stage makes of the rows with all scores, and its folder."""
    folder = tmp_path_factory.mktemp("scored")
    one = settings(world, scores=ALL, teacher=ScoringModel(model=str(world / "teacher")))
    return stage.Score(one).run(ROWS, work(folder)), one, folder


def test_scores_are_those_of_loops_over_the_models(scored, world):
    outcome, tokenizer = scored[0], skills_tokenizer()
    assert [one.id for one in outcome.kept] == [one.id for one in ROWS[:2]]
    student, teacher = (AutoModelForCausalLM.from_pretrained(world / name, dtype="float64") for name in ("student", "teacher"))
    begin, sections = tokenizer.bos_token_id or tokenizer.eos_token_id, load_prompts("score", None, "prompt").sections
    for one in outcome.kept:
        prompt, targets = parts(tokenizer, list(one.messages))
        asked = {"role": "user", "content": sections["user"].replace("{answer}", one.answer)}
        backwards = parts(tokenizer, [asked, {"role": "assistant", "content": one.instruction}])
        with torch.no_grad():
            ce, ce_alone = ce_by_loops(student, prompt, targets), ce_by_loops(student, [begin], targets)
            wanted = {"ce": ce, "ce_alone": ce_alone, "ifd": math.exp(ce - ce_alone), "teacher_ce": ce_by_loops(teacher, prompt, targets)}
            wanted["rifd"] = math.exp(ce_by_loops(student, *backwards) - ce_by_loops(student, [begin], backwards[1]))
            log_q, log_p = (
                model(torch.tensor([prompt + targets])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (student, teacher)
            )
            wanted["kl"] = float((log_p.exp() * (log_p - log_q)).sum() / len(targets))
        by = one.columns[stage.BY]
        assert {name: one.columns[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
        assert set(one.columns) == {*wanted, stage.BY} and set(by) == {*wanted, "row"}
        assert (
            by["ifd"].startswith("student:") and by["teacher_ce"].startswith("teacher:") and by["kl"] == f"{by['ifd']}+{by['teacher_ce']}"
        )


def test_rows_without_a_score_are_rejected_with_their_reason_or_stop_the_stage(scored, world, tmp_path):
    rejected = {one.row.id: (one.reason, one.detail) for one in scored[0].rejected}
    assert rejected[ROWS[2].id] == ("no_answer", "there is nothing to score")
    reason, detail = rejected[ROWS[3].id]
    assert reason == "too_long_to_score" and detail.endswith("more than max_length 120") and int(detail.split()[0]) > 120
    with pytest.raises(UserError, match=rf"^score: the row {ROWS[3].id} has no score \(too_long_to_score: \d+ tokens, more"):
        stage.Score(settings(world, too_long="refuse")).run(ROWS, work(tmp_path))
    assert not list(tmp_path.iterdir())  # before anything is computed


def test_nothing_is_computed_twice_and_a_kill_changes_nothing(scored, world, monkeypatch, tmp_path):
    outcome, one, folder = scored
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "2_score" / NAME
    whole = file.read_bytes()

    def refuse(*_):
        raise AssertionError("a model is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "load", refuse)
        assert stage.Score(one).run(ROWS, work(tmp_path / "copy")) == outcome
        with pytest.raises(AssertionError, match="is loaded"):
            stage.Score(one).run(ROWS[:1], work(tmp_path / "copy"))  # other rows
    other = dataclasses.replace(one, student=ScoringModel(model=str(world / "stranger")))
    for row, before in zip(stage.Score(other).run(ROWS, work(tmp_path / "copy")).kept, outcome.kept, strict=True):
        assert row.columns["ifd"] != before.columns["ifd"] and row.columns["teacher_ce"] == before.columns["teacher_ce"]
    file.write_bytes(whole[: len(whole) // 2])
    assert stage.Score(one).run(ROWS, work(tmp_path / "copy")) == outcome and file.read_bytes() == whole
    file.write_bytes(whole.replace(b'"ifd": ', b'"ifd": 1'))
    with pytest.raises(UserError, match=r"computed.jsonl:1 is damaged"):
        stage.Score(one).run(ROWS, work(tmp_path / "copy"))


def test_a_row_that_is_scored_keeps_no_score_of_other_messages(scored):
    outcome, one, folder = scored
    of = ["0", row_id(ROWS[1].messages)]
    rows = [
        row.with_columns(old=9.0, row="mine", **{stage.BY: {"old": "student:a", "row": said}}) for row, said in zip(ROWS, of, strict=False)
    ]
    found = stage.Score(one).run([*rows, *ROWS[2:]], work(folder)).kept
    wanted = [row.columns | {"row": "mine"} for row in outcome.kept]
    wanted[1] |= {"old": 9.0, stage.BY: {"old": "student:a"} | wanted[1][stage.BY]}
    assert [row.columns for row in found] == wanted


def test_another_model_has_another_fingerprint(scored, world):
    one, other = (Scorer(ScoringModel(model=str(world / name)).loaded, "student") for name in ("student", "stranger"))
    in_another_type = Scorer(ScoringModel(model=str(world / "student"), dtype="float32").loaded, "student")
    assert len({stage.fingerprint(model) for model in (one, other, in_another_type)}) == 3
    assert f"student:{stage.fingerprint(one)}" == scored[0].kept[0].columns[stage.BY]["ifd"]


def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(world, tmp_path):
    with pytest.raises(UserError, match=r"^student.model: .* has 256 positions, and max_length is 512; lower it"):
        stage.Score(settings(world, max_length=512))
    with pytest.raises(UserError, match=r"^student.model: "):
        stage.Score(settings(world, student=ScoringModel(model=str(tmp_path / "none"))))


def test_mean_hidden_states_are_those_of_a_loop(world):
    scorer, texts = (
        Scorer(ScoringModel(model=str(world / "student")).loaded, "model"),
        ["Say 1", "Why the owl?", "Yes. It is so."],
    )
    found = mean_states(scorer, texts, 2)
    model, begin = AutoModelForCausalLM.from_pretrained(world / "student", dtype="float64"), scorer.tokenizer.eos_token_id
    for text, state in zip(texts, found, strict=True):
        ids = [begin, *scorer.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            mean = model.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.tensor(state).double() == pytest.approx(mean / mean.norm(), abs=1e-6)


# ---- select


def versions(name: str, **scores: tuple[float, float]) -> list[Row]:
    """The versions of a row, made of one another as the stages of reflection make them, with IFD and r-IFD."""
    parents, made = {"original": None, "instruction": "original", "response": "original", "both": "instruction"}, {}
    for version, (ifd, rifd) in scores.items():
        parent = made.get(parents[version])
        notes = {} if version == "original" else {"version": version, "original": made["original"].id}
        columns = {"ifd": ifd, "rifd": rifd, stage.BY: {"ifd": "student:a", "rifd": "student:a"}}
        made[version] = row(f"{name} {version}?", "yes", (parent.id,) if parent else (), columns, **notes)
    return list(made.values())


def test_one_version_of_each_row_stays():
    first = versions("a", original=(0.5, 0.9), instruction=(0.6, 0.8), response=(0.4, 0.1), both=(0.7, 0.7))
    second = versions("b", original=(0.5, 0.9), instruction=(0.4, 0.1), response=(1.2, 0.8))
    third = versions("c", original=(0.5, 0.5))
    rows = [one for group in zip(first, [*second, third[0]], strict=True) for one in group]
    outcome = SelectStage(Select(rule="reflection")).run(rows, None)
    assert [one.instruction for one in outcome.kept] == ["a both?", "c original?"]
    assert {one.row.instruction: one.reason for one in outcome.rejected} == {
        "a original?": "other_version",
        "a instruction?": "other_version",
        "a response?": "other_version",
        "b original?": "other_version",
        "b instruction?": "other_version",
        "b response?": "ifd_not_below_1",
    }
    without = SelectStage(Select(rule="reflection", originals="drop")).run(rows, None)
    assert [one.instruction for one in without.kept] == ["a both?"]
    gone = SelectStage(Select(rule="reflection")).run(first[1:], None)
    assert not gone.kept and {one.reason for one in gone.rejected} == {"no_original"}
    with pytest.raises(UserError, match="is a second response version of"):
        SelectStage(Select(rule="reflection")).run([*second, second[2]], None)


def test_rows_are_chosen_by_a_column(tmp_path):
    rows = [row(f"q {i}", "yes", columns={"ifd": i / 10}) for i in range(20)]
    outcome = SelectStage(Select(by="ifd", below=1, top=0.2)).run(rows, work(tmp_path))
    assert [one.columns["ifd"] for one in outcome.kept] == [0.8, 0.9] and len(outcome.rejected) == 18
    with pytest.raises(UserError, match=r"^by: found ifd, and the row [0-9a-f]{16} has 10+ there"):
        SelectStage(Select(by="ifd", below=1)).run([row("q", "yes", columns={"ifd": 10**400})], work(tmp_path))
    with pytest.raises(UserError, match=r"^by: found ce, and the row [0-9a-f]{16} has no such column"):
        SelectStage(Select(by="ce", below=1)).run(rows, work(tmp_path))
    (scored,) = [row("q", "yes", columns={"ifd": 0.5, stage.BY: {"ifd": "student:b", "row": "0"}})]
    with pytest.raises(UserError, match="has it from the row that it was made of; add a stage score before"):
        SelectStage(Select(by="ifd", below=1)).run([scored.child("3_evolve", "w", scored.messages)], work(tmp_path))
    known = dataclasses.replace(scored, columns={"ifd": 0.5, stage.BY: {"ifd": "student:b", "row": row_id(scored.messages)}})
    for one, why in (
        (known, None),
        (known.child("3_evolve", "w", scored.messages), None),
        (known.child("3_evolve", "w", known.asking("p")), "made of"),
    ):
        with pytest.raises(UserError, match=why) if why else contextlib.nullcontext():  # a score belongs to the messages
            assert len(SelectStage(Select(by="ifd", below=1)).run([one], work(tmp_path)).kept) == 1
    other = row("q", "yes", columns={"ifd": 0.5, stage.BY: {"ifd": "student:b"}})
    with pytest.raises(UserError, match="^ifd: the rows have scores of 2 different models"):
        SelectStage(Select(by="ifd", below=1)).run([*rows, other], work(tmp_path))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"by": "ifd"}, "by"),
        ({"below": 1.0}, "by"),
        ({"by": "ifd", "below": 1.0, "originals": "drop"}, "originals"),
        ({"by": "ifd", "below": 1.0, "clusters": 3}, "clusters"),
        ({"by": "ifd", "below": 1.0, "above": 1.0}, "above"),
        ({"by": "ifd", "middle": (0.5, 0.5)}, "middle"),
        ({"rule": "reflection", "below": 0.9}, "below"),
        ({"rule": "reflection"}, None),
        ({"by": "ifd", "top": 0.5, "clusters": 3}, None),
    ],
)
def test_settings_of_select_that_do_not_go_together(given, name):
    assert [found for found, _ in select_contradictions(Select(**given))] == ([name] if name else [])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"scores": ("kl",)}, "teacher"),
        ({"teacher": ScoringModel(model="t")}, "teacher"),
        ({"prompt": "p.txt"}, "prompt"),
        ({"scores": ("ce", "ce")}, "scores"),
        ({"scores": ALL, "teacher": ScoringModel(model="t"), "prompt": "p.txt"}, None),
    ],
)
def test_settings_of_score_that_do_not_go_together(given, name):
    found = [found for found, _ in score_contradictions(Settings(**{"student": ScoringModel(model="s")} | given))]
    assert found == ([name] if name else [])


# ---- in a pipeline


def test_a_pipeline_filters_scores_and_selects_and_its_data_can_be_chosen_by_scores(world, tmp_path):
    stages = [{"do": "answer"}, {"do": "keep", "min_words": 2}]
    stages += [{"do": "score", "student": {"model": str(world / "student")}, "max_length": 200}, {"do": "select", "by": "ifd", "top": 0.5}]
    path = write_make(tmp_path, stages, 7)
    writer = Function(lambda ask: "No" if "6" in ask.messages[-1]["content"] else f"It is so. {ask.messages[-1]['content']}")
    pipeline = run_make(path, writer)
    assert [(one.candidates, one.rejected, one.out) for one in pipeline.counts] == [(7, 0, 7), (7, 1, 6), (6, 0, 6), (6, 3, 3), (3, 0, 3)]
    out = lines(pipeline.folder / "train.jsonl")
    assert sorted(one["reason"] for one in lines(pipeline.folder / "rejected.jsonl")) == ["below_the_top"] * 3 + ["too_short"]
    limit = sorted(one["ifd"] for one in out)[1]
    where = {"ifd": {"at_least": limit}}
    found = read_source(Source(path=str(pipeline.folder / "train.jsonl"), format="chat", where=where), "data.train")
    assert len(found.rows) == 2 and len(writer.asked) == 7
    run_make(path, writer)
    assert lines(pipeline.folder / "train.jsonl") == out and len(writer.asked) == 7


def test_a_stage_that_cannot_run_is_named_before_anything_is_asked(world, tmp_path):
    stages = [{"do": "answer"}, {"do": "score", "student": {"model": str(world / "student")}, "max_length": 999}]
    writer = Function()
    with pytest.raises(UserError, match=r"^stages.1 \(score\): student.model: .* has 256 positions"):
        run_make(write_make(tmp_path, stages), writer)
    assert not writer.asked
