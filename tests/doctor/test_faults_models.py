"""Faults planted in models, teachers and files: each is caught by the check that is for it."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from llmkd.doctor import data, files, weights
from llmkd.models import adapters, merge
from llmkd.models.language_model import LanguageModel
from llmkd.signals import Dense
from llmkd.tasks import causal_lm
from llmkd.teachers.cached import CachedTeacher

VOCAB, LOGITS, ADAPTER, TWICE, BETTER = "tokenizers and", "the model's own forward", "adapter changes", "logits twice", "knows the rows"
SAVED, EXPORTED, ENDS, CACHE, DISK = "the saved student", "the exported student", "learns to end", "teacher cache", "room on the disk"


@pytest.fixture
def changed(monkeypatch):
    """Replace a function by one that gets the original first."""

    def go(owner, name: str, other) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: other(original, *args, **more))

    return go


# ---- models


def test_another_tokenizer_that_was_let_through(make_setup, world, tmp_path, caught, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(world / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (one, a), (two, b) = sorted(vocab.items(), key=lambda item: item[1])[-2:]
    vocab[one], vocab[two] = b, a
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(causal_lm, "check_same_tokenizer", lambda *args: None)
    setup = make_setup(teacher__model=str(other))
    assert "2 tokens" in caught(setup, VOCAB)


def test_a_vocabulary_that_is_cut(setup, caught, monkeypatch):
    monkeypatch.setattr(setup.student.head, "vocab", setup.prepared.vocab - 1)
    assert "student:" in caught(setup, VOCAB)


def test_a_head_without_its_scale(setup, caught, monkeypatch):
    monkeypatch.setattr(setup.live["teacher"].head, "scale", 1.5)
    assert "teacher: llmkd's logits and the model's own differ" in caught(setup, LOGITS)


def test_logits_that_are_not_finite(setup, caught, monkeypatch):
    monkeypatch.setattr(setup.student.head, "scale", float("nan"))
    assert "not finite" in caught(setup, LOGITS)


# ---- teachers


def test_an_adapter_that_was_not_read(setup, caught):
    weights = {name: p for name, p in setup.live["teacher"].model.named_parameters() if "lora_B" in name}
    before = {name: p.clone() for name, p in weights.items()}
    try:
        for p in weights.values():
            p.zero_()
        assert "changes nothing" in caught(setup, ADAPTER)
    finally:
        for name, p in weights.items():
            p.copy_(before[name])


def test_a_teacher_that_draws(setup, caught, changed):
    changed(LanguageModel, "hidden", lambda whole, self, view: (h := whole(self, view)) + 1e-3 * torch.randn_like(h))
    assert "two passes" in caught(setup, TWICE)


def test_a_teacher_in_training_mode(setup, caught):
    setup.live["teacher"].train()
    try:
        assert "training mode" in caught(setup, TWICE)
    finally:
        setup.live["teacher"].eval()


def test_a_teacher_that_knows_less_and_one_that_knows_more(setup, caught, asked, monkeypatch):
    head = setup.live["teacher"].head
    monkeypatch.setattr(head, "scale", -3.0)
    assert "the teacher's cross-entropy is" in caught(setup, BETTER)
    monkeypatch.setattr(head, "scale", 0.0)  # evenly over all tokens: better than the random student
    assert asked(setup, BETTER).status == "passed"


def test_a_teacher_that_is_the_student_is_warned_of(setup, asked, monkeypatch):
    monkeypatch.setattr(
        setup, "teacher", type("Same", (), {"metrics": setup.teacher.metrics, "__call__": lambda self, batch: same(batch)})()
    )

    def same(batch):
        return Dense(setup.student.hidden(batch.student), setup.student.head)

    result = asked(setup, BETTER)
    assert result.status == "warned" and result.fix


# ---- files


def test_an_adapter_saved_with_other_values(setup, caught, changed):
    def halved(whole, adapted, *args):
        weights = [p for name, p in adapted.named_parameters() if "lora_B" in name]
        for p in weights:
            p.data.div_(2)
        whole(adapted, *args)
        for p in weights:
            p.data.mul_(2)

    changed(adapters, "save", halved)
    assert "the saved student's logits differ" in caught(setup, SAVED)


def test_a_merge_that_forgets_the_adapter(setup, caught, changed):
    changed(merge, "merge", lambda whole, found, vocab, **how: merge.pretrained.load_pretrained(found.base, "export"))
    assert "the student merged in float64 differs" in caught(setup, EXPORTED)


@pytest.fixture(scope="session")
def narrow_setup(make_setup, tmp_path_factory):
    """A bfloat16 student of rank 2, whose logits the rounding of its weights moves by more than a percent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_setup(student__dtype="bfloat16", student__lora__rank=2, teacher=None)


def scaled(adapted):
    for layer in adapters_of(adapted):
        layer.scaling = {name: value * 1.01 for name, value in layer.scaling.items()}


def of_another_layer(adapted):
    a, b = [layer for layer in adapters_of(adapted) if layer.in_features == layer.out_features][:2]
    a.lora_B, b.lora_B = b.lora_B, a.lora_B


def left_out(adapted):
    for layer in adapters_of(adapted):
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)


def adapters_of(adapted) -> list:
    return [layer for layer in adapted.modules() if hasattr(layer, "lora_B")]


@pytest.mark.parametrize("fault", [scaled, of_another_layer, left_out])
def test_a_wrong_merge_is_told_from_the_rounding_of_bfloat16(narrow_setup, caught, changed, fault):
    def other(whole, *args):
        fault(adapted := whole(*args))
        return adapted

    changed(merge.adapters, "load", other)
    assert "merged in float32 differs" in caught(narrow_setup, EXPORTED)


def test_a_rounded_export_passes_and_one_that_is_not_the_merge_does_not(narrow_setup, asked, caught, changed):
    result = asked(narrow_setup, EXPORTED)
    assert result.status == "passed" and int(re.search(r"differ by (\d+)%", result.found)[1]) >= 30

    def another(whole, found, vocab, **how):
        return whole(found, vocab, **how) if how else merge.pretrained.load_pretrained(found.base, "export")

    changed(merge, "merge", another)
    assert "and the exported model from that by" in caught(narrow_setup, EXPORTED)
    assert "the merge is right" in asked(narrow_setup, EXPORTED).fix


def test_weights_are_widened_for_a_while_and_rounded_by_half_a_gap_at_most():
    model = torch.nn.Linear(64, 64).bfloat16()
    model.bias.data[0] = 0.0
    before = [p.clone() for p in model.parameters()]
    with weights.widened(model):
        assert model.weight.dtype == torch.float32
        weights.round_at_random_(model, torch.bfloat16)
        gap = (model.weight - before[0].float()).abs() / before[0].float().abs()
        assert 2**-9 < gap.max().item() <= 2**-8 and model.bias[0] == 0
    assert model.weight.dtype == torch.bfloat16
    again = model.weight.clone()
    with weights.widened(model):
        pass
    assert torch.equal(model.weight, again)


def test_a_student_that_would_write_on(setup, caught, changed):
    changed(causal_lm, "stopping_at", lambda whole, settings, ends: {"eos_token_id": 5})
    assert "it would write on after its answer" in caught(setup, ENDS)


def test_answers_without_an_end_are_warned_of(setup, asked, monkeypatch):
    whole = data.controls(setup.prepared.tokenizer)
    monkeypatch.setattr(data, "controls", lambda tokenizer: dataclasses.replace(whole, any=re.compile("never")))
    assert asked(setup, ENDS).status == "warned"


def test_a_full_disk(setup, caught, monkeypatch):
    usage = shutil.disk_usage(setup.folder)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 0.0 GB free" in caught(setup, DISK)


@pytest.fixture(scope="session")
def cached_setup(make_setup, caches, tmp_path_factory):
    def go(kind: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMKD_CACHE", str(tmp_path_factory.mktemp("cache")))
            path = {"teacher.cache.path": str(caches / kind), "teacher.dtype": "float32", "data.validation_fraction": 0.2}
            return make_setup(**path)

    return go


def test_a_cache_that_is_the_teacher_and_one_that_is_not(cached_setup, asked, caught):
    for kind in ("narrow", "hidden", "sampled"):
        setup = cached_setup(kind)
        result = asked(setup, CACHE)
        assert result.status == "passed", result
        with pytest.MonkeyPatch.context() as patch:
            of_next = {"narrow": ("ids_NK", "log_p_NK", "tail_NS"), "hidden": ("hidden_NH",), "sampled": ("label_log_p_N",)}[kind]
            whole = CachedTeacher.__call__
            patch.setattr(CachedTeacher, "__call__", lambda self, batch: of_the_next(whole(self, batch), of_next))  # noqa: B023
            caught(setup, CACHE)


def of_the_next(signal, names):
    """The signal with the records of the next target, as far as `names` go."""
    return dataclasses.replace(signal, **{name: getattr(signal, name).roll(1, 0) for name in names})


def test_a_cache_that_is_not_written_yet(make_setup, tmp_path, asked, monkeypatch):
    monkeypatch.setenv("LLMKD_CACHE", str(tmp_path / "cache"))
    setup = make_setup(**{"teacher.cache.path": str(tmp_path / "none"), "teacher.cache.k": 8})
    result = asked(setup, CACHE)
    assert result.status == "passed" and "not written yet" in result.found
    assert not (tmp_path / "none").exists()
