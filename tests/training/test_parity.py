"""The first law of the project: how an optimizer step is cut into micro-batches and ranks changes nothing."""

import json
import subprocess
import sys

import pytest

from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import train_on_two

BOUND = 1e-12  # float64, after five steps; the last window has 5 of 8 examples
METHODS = {"lora": {"student.lora.dropout": 0.3}, "full": {"student.method": "full"}}
DROPOUT = METHODS["lora"]


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """One micro-batch of all eight examples, per method of training the student."""
    from llmkd.config import loader
    from llmkd.training.run import run

    done = {}

    def get(method: str):
        if method not in done:
            root = tmp_path_factory.mktemp(method)
            (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / "out")))
            run(loader.load_recipe(root / "r.yaml", {"train.micro_batch_size": 8} | METHODS[method]))
            done[method] = weights(root / "out")
        return done[method]

    return get


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_do_not_matter(trained, reference, method, micro):
    got = trained("cut", train__micro_batch_size=micro, **METHODS[method])
    assert all(t.dtype.itemsize == 8 for t in got.values())
    assert distance(got, reference(method)) < BOUND


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("tokens", [1, 90, 10_000])
def test_budgets_of_tokens_do_not_matter(trained, reference, tokens, packing):
    got = trained("budget", train__micro_batch_size=None, train__micro_batch_tokens=tokens, data__packing=packing, **DROPOUT)
    assert distance(got, reference("lora")) < BOUND


def test_chunks_of_the_head_do_not_matter(trained, reference):
    assert distance(trained("chunk", train__micro_batch_size=8, loss__chunk_size=5, **DROPOUT), reference("lora")) < BOUND


def test_gradient_checkpointing_does_not_matter(trained, reference):
    assert distance(trained("gc", train__micro_batch_size=8, student__gradient_checkpointing=True, **DROPOUT), reference("lora")) < BOUND


def test_the_reference_moves(world, trained, reference):
    """The laws above would hold for a trainer that does nothing, or has no dropout."""
    assert distance(trained("still"), reference("lora")) > 1e-4
    assert distance(trained("other", optim__lr=2e-2, **DROPOUT), reference("lora")) > 1e-4
    assert distance(trained("ce", loss__kd_ratio=0.0, **DROPOUT), reference("lora")) > 1e-4


@pytest.mark.slow
def test_torchrun_starts_them(world, reference, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "llmkd", "train"]
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "r.yaml"), "--student.lora.dropout", "0.3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(weights(tmp_path / "out"), reference("lora")) < BOUND


@pytest.mark.slow
def test_two_processes_are_one_where_some_weights_are_never_used(world, trained, tmp_path):
    """BART's decoder alone has an attention to an encoder that is not there: no gradient ever comes for it."""
    from llmkd.data.reading.skills import tokenizer
    from tests.kit.families import tiny

    student, changes = tmp_path / "bart", {"student.method": "full", "train.micro_batch_size": 2, "train.max_steps": 3}
    changes["optim.eps"] = 1e-6  # the gradient of a bias of keys is 0 but for rounding, which Adam would make a step of
    tiny("bart", vocab_size=640, max_position_embeddings=256, dropout=0.0).save_pretrained(student)
    tokenizer().save_pretrained(student)
    one = trained("one", **changes, **{"student.model": str(student)})
    (tmp_path / "two.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "two")))
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    done = train_on_two(["--config", str(tmp_path / "two.yaml"), "--student.model", str(student), *words])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "get no gradient from a small batch" in done.stderr
    assert distance(weights(tmp_path / "two"), one) < BOUND


def test_a_refusal_reaches_the_other_processes_with_all_its_lines_and_its_arm(monkeypatch):
    """They get it as `broadcast_object_list` carries it."""
    import pickle

    from llmkd.errors import UserError, attribute_to_student, on_main_process

    class First:
        is_main_process, num_processes = True, 1

    def refuse():
        with attribute_to_student(3):
            raise UserError("one: a", "two: b")

    with pytest.raises(UserError) as info:
        on_main_process(First(), refuse)
    there = pickle.loads(pickle.dumps(info.value))
    assert there.problems == ("one: a", "two: b") and there.student == 3 and str(there) == "one: a\ntwo: b"
    assert on_main_process(First(), lambda: 7) == 7
    sent = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", sent.append)
    First.num_processes = 2
    with pytest.raises(UserError, match="one: a\ntwo: b"):
        on_main_process(First(), refuse)
    assert len(sent) == 1 and sent[0][1].problems == ("one: a", "two: b"), "the others wait for ever"
