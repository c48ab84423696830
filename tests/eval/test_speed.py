"""eval/speed measures what it says: every row is correct, and a wrong row is marked."""

import argparse
import ast
import contextlib
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))

from eval.speed import gpu_facts, head, head_cases, plots, profile_step, step, step_cases, students, terms, turns
from eval.speed.step_setup import Setup
from llmkd import signals
from llmkd.head import Head
from llmkd.training.launch import start

SPEED = Path(__file__).parents[2] / "eval/speed"
TINY = ["--hidden", "32", "--layers", "1", "--vocab", "211", "--batch", "4", "--tokens", "512", "--steps", "1", "--repeats", "1"]


def setup_of(family: str) -> Setup:
    return Setup(step.parser().parse_args([*TINY, "--family", family]), start())


@pytest.fixture(scope="module")
def setup():
    return setup_of("llama")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_a_step_are_right_and_a_wrong_one_is_not_shown_as_equal(family):
    setup = setup_of(family)

    def wrong(setup):
        one = step_cases.ours(setup, 4, 0.5)
        one.kl *= 1.001
        return one

    def other_way(setup):
        one = step_cases.ours(setup, 4, 0.5)
        one.gradient[0.5] *= 1.001
        return one

    known = [*step_cases.cases(setup), step_cases.Case("wrong", wrong), step_cases.Case("other way", other_way)]
    *_, (measurements, unable) = step.measured(setup, known)
    assert not unable and set(measurements) == set(known)
    text = step.report(setup, measurements, unable)
    rows = {line.split("|")[2].strip(): line for line in text if line.startswith("| live")}
    assert len(rows) == 11 and "not equal" in rows.pop("wrong") and "not equal" in rows.pop("other way")
    assert "not equal" not in "".join(rows.values()) and "100%" in rows["the matrix products alone"]
    for case, (one,) in measurements.items():
        if not case.lower_bound:
            wrong = {"wrong": "KL", "other way": "gradient"}.get(case.name)
            assert all((off > 1e-5) == (name == wrong) for name, off in step.distances(setup, [one]).items())
            students = 4 if "four" in case.name else 1
            assert one.tokens[0] == students * setup.tokens(one.first)
            assert one.targets[0] == students * sum(map(setup.targets, one.first))


def test_the_truth_is_that_of_whole_logits(setup):
    example = setup.order[0]
    reference, (ids, marks) = setup.reference([example]), setup.data.example(example)
    with torch.no_grad():
        log_q, log_p = (
            m.base_model(torch.from_numpy(ids)[None].long()).logits[0, :-1].double().log_softmax(-1) for m in (setup.student, setup.teacher)
        )
    at = torch.from_numpy(marks[1:])
    ce = torch.nn.functional.nll_loss(log_q[at], torch.from_numpy(ids[1:]).long()[at])
    kl = torch.nn.functional.kl_div(log_q[at], log_p[at], log_target=True, reduction="sum") / at.sum()
    assert reference.ce == pytest.approx(ce.item(), rel=1e-6) and reference.kl == pytest.approx(kl.item(), rel=1e-6)
    assert reference.targets == at.sum() and reference.kl > 0.1


def test_the_products_of_a_step_are_as_many_as_arithmetic_says(setup):
    """Multiplications of the linear layers: the teacher's once, the student's twice but for three of the first layer, the heads' 2 + 1."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes, (tokens, targets) = setup.shapes, map(round, setup.window)

    def layer(s):
        return 2 * s.hidden**2 + 2 * s.hidden * s.hidden // s.heads * s.kv + 3 * s.hidden * s.inner

    student, teacher = shapes["student"], shapes["teacher"]
    kv = student.hidden // student.heads * student.kv
    frozen = 2 * student.layers * layer(student) - student.hidden * (student.hidden + 2 * kv)
    sides = 9 * student.hidden + 2 * kv + 3 * student.inner  # inputs and outputs of a layer's seven
    low = 64 * (3 * student.layers * sides - 3 * student.hidden)
    heads = setup.vocab * (2 * student.hidden + teacher.hidden)
    assert tokens <= setup.options.tokens  # in one piece, or pieces would be rounded up
    body, of_teacher, steps = teacher.layers * layer(teacher), setup.vocab * teacher.hidden, setup.options.steps + 1
    for options, each in (({}, body + frozen + low), ({"body": False}, frozen + low), ({"students": 3}, body + 3 * (frozen + low))):
        with FlopCounterMode(display=False) as counter:
            step_cases.products(setup, teacher=True, **options)
        of_heads = heads + (options.get("students", 1) - 1) * (heads - of_teacher)
        assert counter.get_total_flops() == steps * 2 * (tokens * each + targets * of_heads)


def test_rows_of_the_head_are_right_with_the_head_frozen_and_trained():
    options = argparse.Namespace(
        dtype="float32", device="cpu", width=16, teacher_width=24, vocab=300, rows=24, supervised=0.5, chunk=5, peers=None
    )
    p = head_cases.problem(options)
    known = [case for case in head_cases.cases(options) if not case.lower_bound]
    assert sum(case.trains for case in known) == 2
    for case in known:
        value, grads = case.run(p)
        loss, right = head.exact(p, *head.exact_key(case))
        assert value.item() == pytest.approx(loss, rel=1e-5) and len(grads) == 1 + case.trains
        for found, grad in zip(grads, right, strict=True):
            assert (found - grad).norm() < 1e-5 * grad.norm(), case.name
    assert not p.student_head.weight.requires_grad


def test_a_profile_names_the_parts_of_a_step(setup):
    options = argparse.Namespace(**vars(setup.options) | {"packed": False, "alone": False, "trace": None, "steps": 1})
    setup.options.steps = 1 + profile_step.WARM_UP
    try:
        text = profile_step.profiled(setup, options)
    finally:
        setup.options.steps = 1
    shares = {line.split("|")[1].strip(): float(line.split("|")[3].strip(" %")) for line in text if line.endswith("% |")}
    assert all(shares[part] > 0 for part in (profile_step.TEACHER, profile_step.STUDENT, profile_step.HEADS, profile_step.BACKWARD))
    assert sum(shares[part] for part in (*profile_step.PARTS, "everything else")) == pytest.approx(100, abs=0.5)


def test_terms_are_compared_with_the_step_without_of_the_same_turn(setup, monkeypatch):
    monkeypatch.delitem(terms.ROWS, "features, every layer")  # the student has one
    seconds = terms.measured(setup)
    assert list(seconds) == list(terms.ROWS) and all(len(own) == 1 and own[0] > 0 for own in seconds.values())
    text = turns.report({"without": [1.0, 2.0, 4.0], "other": [1.5, 2.2, 8.0]}, "further term")
    assert text[2:4] == ["| without | 2000.0 | 1.000 (1.000 to 1.000) |", "| other | 2200.0 | 1.500 (1.300 to 1.750) |"]
    monkeypatch.setattr(terms, "terms_of", lambda setup, settings: [])
    with pytest.raises(ValueError, match="features, the middle layers: the loss has the terms ce, kd, loss"):
        terms.measured(setup)


def test_rows_take_their_steps_in_turns_each_first_once(setup, monkeypatch):
    """The first turn is not measured, and each row begins a turn."""
    monkeypatch.setattr(setup.options, "steps", 3)
    order, checked = [], []

    def loop_of(row):
        yield from (f"{row}{n}" for n in range(4))

    seconds = turns.in_turns(setup, "abc", loop_of, order.append, lambda row, found: checked.append(found))
    assert {row: len(own) for row, own in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "abcbcacababc"
    assert checked == "a0 b0 c0 b1 c1 a1 c2 a2 b2 a3 b3 c3".split()


def test_students_compute_the_teachers_head_once_or_each(setup, monkeypatch):
    """Three students at the targets of two steps, all in one chunk."""
    calls, own = [], Head.logits

    def logits(head, *args):
        calls.append(head.vocab if head is not setup.teacher.head else "teacher")
        return own(head, *args)

    monkeypatch.setattr(Head, "logits", logits)
    kept = signals.MOST_KEPT
    seconds = students.measured(setup, 3)
    assert {row: len(own) for row, own in seconds.items()} == {
        row: 1 for row in ("one", "3", "3, each with the teacher's head computed for itself")
    }
    assert calls.count("teacher") == 2 * (1 + 1 + 3) and kept == signals.MOST_KEPT


def test_a_trace_of_a_gpu_gives_idle_time_and_the_part_that_launched_a_kernel():
    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    trace = profile_step.Trace(
        [
            event("user_annotation", profile_step.TEACHER, 0, 10),
            event("user_annotation", profile_step.BACKWARD, 10, 20),
            event("cuda_runtime", "cudaLaunchKernel", 5, 1, correlation=1),
            event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=2),
            event("cuda_runtime", "cudaStreamSynchronize", 20, 5),
            event("kernel", "gemm", 8, 10, correlation=1),  # while the next part has begun
            event("kernel", "add", 16, 4, correlation=2),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 30, 10, correlation=3, bytes=8),
        ]
    )
    shares = trace.shares()
    assert (trace.length, trace.busy(), trace.gaps()) == (40, 22, [10, 8])
    assert shares[profile_step.TEACHER] == profile_step.Share(10, 10, 1) and shares[profile_step.BACKWARD] == profile_step.Share(20, 4, 1)
    assert shares[""] == profile_step.Share(10, 10, 0)
    text = "\n".join(profile_step.on_device(trace, 1))
    assert (
        "| idle | 45.0% of the time |" in text and "| synchronisations | 1.0 |" in text and "| copies from device to host | 1.0 (" in text
    )


def test_a_plot_and_its_table_are_of_the_same_points(tmp_path):
    plan, known = plots.sweeps("cpu"), list(plots.LINES)
    points = {
        plots.key_of(sweep, value, line): {"mib": 10.0 * value, "ms": [1.0, 2.0 * value, 1e9]}
        for sweep in plan
        for value in sweep.values
        for line in plots.lines_of(sweep, known)
    }
    points[plots.key_of(plan[0], 128, known[1])] = None  # that case failed there
    plots.draw(points, known, plan, tmp_path / "a.png", "cpu")
    assert 10_000 < (tmp_path / "a.png").stat().st_size < 150_000
    lines = plots.table(points, known, plan, argparse.Namespace(out=tmp_path / "a", device="cpu", rounds=3, peers=None, data=None))
    assert any(line.startswith("| 64 | 256 / 1,280 | failed | 256 / 1,280 |") for line in lines)


def test_a_peer_may_fail_and_llmkd_may_only_run_out_of_memory(setup):
    def case(name, error):
        def broken(setup):
            raise error

        return step_cases.Case(name, broken)

    *_, (measurements, unable) = step.measured(
        setup, [case("peer", ImportError("no such peer")), case("llmkd, large", torch.OutOfMemoryError("full"))]
    )
    assert not measurements and [line.split(" (")[1] for line in unable] == ["ImportError: no such peer).  ", "OutOfMemoryError: full).  "]
    with pytest.raises(ImportError):
        list(step.measured(setup, [case("llmkd, broken", ImportError("no such module"))]))


def test_a_round_that_ran_fewer_steps_than_it_was_to_is_an_error():
    with pytest.raises(ValueError, match="1 steps ran, and 2 were to"):
        step_cases.Measurement([1.0], [5, 5], [3, 3])


def test_what_a_gpu_found_is_one_table(tmp_path, capsys):
    """Of parts that ended, one that was cut off in a test, one that a signal stopped, and one for which no time was left."""
    (tmp_path / "parts.tsv").write_text(
        "primitives\t0\t12\t60\ntests\t124\t90\t90\nhead\t0\t9\t60\nplan\tstopped\t3\t110\nqwen\tskipped\t0\t0\n"
    )
    (tmp_path / "primitives.log").write_text("noise\nFACT kernel\tFails: a|b\t0.1 s\n")
    (tmp_path / "tests.log").write_text("tests/a.py::one PASSED [ 33%]\ntests/a.py::two FAILED [ 66%]\ntests/a.py::three \n")
    (tmp_path / "head_gpu.md").write_text("# Head\n\n| case | ms | MiB |\n|---|---|---|\n| ours | 4 | |\n")
    assert gpu_facts.table(str(tmp_path))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| primitives | well | 12 of 60 | | |",
        "| | | | kernel | Fails: a/b |",
        "| tests | cut off | 90 of 90 | | |",
        "| | | | tests | 1 passed, 1 failed |",
        "| | | | not passed | tests/a.py::two |",
        "| | | | not passed | tests/a.py::three |",
        "| | | | last line | tests/a.py::three |",
        "| head | well | 9 of 60 | | |",
        "| | | | head: case | ms; MiB |",
        "| | | | head: ours | 4 |",
        "| plan | stopped by a signal | 3 of 110 | | |",
        "| qwen | left out | 0 of 0 | | |",
    ]
    script = Path(gpu_facts.__file__).with_name("gpu.sh").read_text()
    parts = [line.split()[2] for line in script.splitlines() if line.strip().startswith("part ")]
    assert parts[:5] == ["imports", "primitives", "tests", "head", "plan"]
    limits = [int(line.split()[1]) for line in script.splitlines() if line.strip().startswith("part ")]
    assert len(limits) == 9 and sum(limits[:5]) <= 480  # what comes first has its time, whatever the others take


def problems_of(tree: ast.Module) -> list[str]:
    """Names from llmkd in a script that are not there, and its calls of them with arguments that they do not have."""
    known, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmkd."):
            module = importlib.import_module(node.module)
            for one in node.names:
                with contextlib.suppress(ModuleNotFoundError):
                    importlib.import_module(f"{node.module}.{one.name}")
                known[one.asname or one.name] = value = getattr(module, one.name, None)
                found += [f"{node.module}.{one.name}"] if value is None else []
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and inspect.ismodule(known.get(node.value.id)):
            found += [] if hasattr(known[node.value.id], node.attr) else [f"{node.value.id}.{node.attr}"]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in own and known.get(node.func.id):
            if any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords):
                continue
            try:
                inspect.signature(known[node.func.id]).bind(*node.args, **{one.arg: one.value for one in node.keywords})
            except TypeError as error:
                found.append(f"{ast.unparse(node)}: {error}")
    return found


@pytest.mark.parametrize("script", sorted(path.name for path in SPEED.glob("*.py")))
def test_scripts_use_llmkd_as_it_is(script):
    """Also those that take too long for tests to run them."""
    assert problems_of(ast.parse((SPEED / script).read_text(encoding="utf-8"))) == []


def test_a_name_that_has_moved_and_a_wrong_call_are_found():
    text = "from llmkd.commands import plan\nfrom llmkd.training.build import build_setup, gone\nplan.gone()\nbuild_setup(1)"
    assert [problem.split(":")[0] for problem in problems_of(ast.parse(text))] == [
        "llmkd.training.build.gone",
        "build_setup(1)",
        "plan.gone",
    ]
