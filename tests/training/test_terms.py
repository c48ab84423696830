"""Terms are an open list: one that nobody knows, with a parameter of its own, trains, is logged, saved, resumed and never exported."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmkd.cli import main
from llmkd.config import loader
from llmkd.errors import NonFinite
from llmkd.files import read_jsonl
from llmkd.losses.long_horizon import LongHorizonTerm
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm, RowTerm, by_name
from llmkd.training import build_student
from llmkd.training.distiller import Distiller
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch
from tests.training.test_resume import LONG, comparable, unfinish

WIDTH, WEIGHT = 16, 0.3
BUILD_TERMS = build_student.build_terms


class Probe(RowTerm):
    """A learned linear of the student's last hidden states that is to say 1 at every target."""

    def __init__(self):
        super().__init__("probe", WEIGHT)
        self.map = nn.Linear(WIDTH, 1, dtype=torch.float64)
        with torch.no_grad():
            self.map.weight.copy_(torch.arange(WIDTH) / WIDTH)
            self.map.bias.zero_()

    def rows(self, student, signal, batch, targets):
        return (self.map(student.hidden_NH[targets])[:, 0] - 1) ** 2


def with_probe(loss, *sizes):
    return [*BUILD_TERMS(loss, *sizes), Probe()]


@pytest.fixture
def probed(monkeypatch):
    monkeypatch.setattr(build_student, "build_terms", with_probe)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The folder of a run of six steps with the term."""
    root = tmp_path_factory.mktemp("whole")
    (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / "out")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_student, "build_terms", with_probe)
        run(loader.load_recipe(root / "r.yaml", {name.replace("__", "."): value for name, value in LONG.items()}))
    return root / "out"


def of_checkpoint(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step}/student.safetensors")


PROBE = {"terms.probe.map.weight", "terms.probe.map.bias"}


def test_it_trains_with_the_student_is_logged_and_is_not_exported(whole):
    exported, out = weights(whole), whole
    first, last = of_checkpoint(out, 1), of_checkpoint(out, 6)
    assert {name for name in first if name.startswith("terms.")} == PROBE
    assert all(not torch.equal(first[name], last[name]) for name in PROBE)
    moments = load_file(out / "checkpoints/step-6/optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} >= PROBE
    assert exported and not [name for name in exported if "probe" in name or "terms" in name]
    steps = [record for record in read_jsonl(out / "metrics.jsonl") if "loss" in record]
    for record in steps:
        assert record["loss"] == pytest.approx(0.5 * record["ce"] + 0.5 * record["kd"] + WEIGHT * record["probe"], rel=1e-12)
    assert steps[-1]["probe"] < steps[0]["probe"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["train"] == {name: steps[-1][name] for name in ("loss", "ce", "kd", "probe")}


def test_it_moves_the_student_and_its_gradient_is_clipped_with_the_others(probed, trained, tmp_path, monkeypatch):
    one = {"train__max_steps": 2, "student__method": "full", "optim__max_grad_norm": None}
    with_it = trained("with", **one)
    norm = read_jsonl(tmp_path / "with/metrics.jsonl")[-1]["grad_norm"]
    monkeypatch.setattr(build_student, "build_terms", BUILD_TERMS)
    without = trained("without", **one)
    assert with_it.keys() == without.keys(), "a whole model holds no term either"
    assert distance(with_it, without) > 1e-6 and norm != read_jsonl(tmp_path / "without/metrics.jsonl")[-1]["grad_norm"]


@pytest.mark.parametrize("step", [1, 4])
def test_it_resumes_bit_for_bit(probed, whole, make_recipe, tmp_path, step):
    shutil.copytree(whole, tmp_path / "again")
    unfinish(tmp_path / "again", step)
    run(make_recipe("again", **LONG), resume=True)
    assert distance(weights(tmp_path / "again"), weights(whole)) == 0
    assert comparable(tmp_path / "again") == comparable(whole)
    assert distance(of_checkpoint(tmp_path / "again", 6), of_checkpoint(whole, 6)) == 0


def test_micro_batches_do_not_matter_to_it(probed, trained, tmp_path):
    for micro in (4, 1, 3, 8):
        trained(str(micro), train__micro_batch_size=micro, data__train__limit=20, checkpoint__every=3)
        assert distance(of_checkpoint(tmp_path / str(micro), 3), of_checkpoint(tmp_path / "4", 3)) < 1e-12


def test_its_values_that_are_not_finite_are_named(probed, make_recipe, monkeypatch, tmp_path):
    real = Probe.rows

    def rows(self, student, signal, batch, targets):
        return real(self, student, signal, batch, targets) / (batch.example_N != 11)

    monkeypatch.setattr(Probe, "rows", rows)
    with pytest.raises(NonFinite, match=r"probe is not finite at .*train.jsonl:12;"):
        run(make_recipe())
    assert json.loads((tmp_path / "out/nonfinite.json").read_text())["term"] == "probe"


def test_names_belong_to_one_term():
    with pytest.raises(ValueError, match="two terms are named probe"):
        by_name([Probe(), HeadTerm(Objective(0.5)), Probe()])


def test_the_long_horizon_halves_its_chunks_and_says_so():
    term = LongHorizonTerm(0.5, 1.0, True, 1000)
    said = [term.halve_chunks(100, "cpu", 300) for _ in range(3)]
    assert said == ["the long horizon in chunks of 500 rows", "the long horizon in chunks of 300 rows", ""] and term.chunk_size == 300


def test_a_term_without_chunks_does_not_keep_another_from_halving_its_own():
    student = SimpleNamespace(head=SimpleNamespace(vocab=100))
    head = HeadTerm(Objective(0.5), 1000)
    distiller = SimpleNamespace(student=student, terms=by_name([Probe(), head]))
    assert Distiller.halve_chunks(distiller, "cpu", 300) == ["chunks of 500 rows"] and head.chunk_size == 500
    assert Distiller.halve_chunks(distiller, "cpu", 300) == ["chunks of 300 rows"] and head.chunk_size == 300
    assert Distiller.halve_chunks(distiller, "cpu", 300) == []


def test_only_the_term_that_is_asked_about_explains(monkeypatch):
    monkeypatch.setattr(Probe, "explain_nonfinite", lambda self, name, *_: f"why {name}")
    distiller = SimpleNamespace(terms=by_name([Probe(), HeadTerm(Objective(0.5))]))
    found = [Distiller.explain_nonfinite(distiller, name, None, [0], None) for name in ("probe", "ce", "gradient")]
    assert found == ["why probe", "", ""]


def train_with_probe(recipe: str) -> int:
    build_student.build_terms = with_probe
    return main(["train", "--config", recipe])


@pytest.mark.slow
def test_two_ranks_exchange_its_gradients(probed, trained, world, tmp_path):
    loss = {"features": {"layers": [[1, 1], [2, 2]]}, "attention": {"layers": [[1, 2], [2, 1]]}}
    trained("one", checkpoint__every=5, **{f"loss__{name}": settings for name, settings in loss.items()})
    recipe = plain_recipe(world, tmp_path / "two") | {"checkpoint": {"every": 5}, "loss": loss}
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    done = launch(2, train_with_probe, str(tmp_path / "two.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    one = of_checkpoint(tmp_path / "one", 5)
    assert {name for name in one if name.startswith("terms.")} > PROBE, "and maps of hidden states"
    records = [[record for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "attention" in record] for name in ("one", "two")]
    for a, b in zip(*records, strict=True):
        assert a["attention"] > 1e-3 and b["attention"] == pytest.approx(a["attention"], rel=1e-9)
    assert distance(of_checkpoint(tmp_path / "two", 5), one) < 1e-9
