"""The Python API: every name is there without loading torch for it too soon, and every misuse of an argument is one clear line."""

import ast
import importlib
import pickle
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import llmkd
from llmkd.losses import fused
from llmkd.teachers.mixture import Mixed, RoutedSignal
from llmkd.teachers.sparse import TopK

PACKAGE = Path(llmkd.__file__).parent
N, V, H = 6, 11, 4


def head(vocab=V, width=H, rows=None, seed=0, **options) -> llmkd.Head:
    torch.manual_seed(seed)
    return llmkd.Head(nn.Linear(width, rows or vocab, bias=False), vocab, **options)


def hidden(n=N, width=H, seed=1) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def labels(n=N) -> torch.Tensor:
    return torch.arange(n)


def dense(n=N, vocab=V, seed=2) -> llmkd.Dense:
    return llmkd.Dense(hidden(n, seed=seed), head(vocab, seed=seed))


OBJECTIVE = llmkd.Objective(kd_ratio=0.5, temperature=2.0)


# what is exported


@pytest.mark.parametrize("name", llmkd.__all__)
def test_every_name_is_there_and_documented(name):
    found = getattr(llmkd, name)
    assert name in dir(llmkd) and (name in ("__version__", "Divergence") or found.__doc__)


def test_the_stub_for_type_checkers_names_the_same_objects():
    assert (PACKAGE / "py.typed").exists()
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    told = {"__version__": llmkd.__version__}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(f"llmkd.{node.module}")
            for alias in node.names:
                assert alias.asname == alias.name, "a stub exports only what it names so"
                told[alias.name] = getattr(module, alias.name, None) or importlib.import_module(f"llmkd.{node.module}.{alias.name}")
    assert told.keys() == set(llmkd.__all__) and all(getattr(llmkd, name) is found for name, found in told.items())


def test_no_torch_before_it_is_needed():
    code = (
        "import sys, llmkd; llmkd.load_recipe; llmkd.Recipe; llmkd.UserError; dir(llmkd); "
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(); llmkd.TeacherCache; assert 'torch' not in sys.modules; "
        "llmkd.Objective; assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", ["the file", "the function"])
def test_the_file_train_py_does_not_take_the_functions_name(monkeypatch, first):
    monkeypatch.delitem(sys.modules, "llmkd.train", raising=False)
    monkeypatch.delitem(vars(llmkd), "train", raising=False)
    if first == "the function":
        assert callable(llmkd.train)
    importlib.import_module("llmkd.train")
    assert llmkd.train is llmkd.api.train and importlib.import_module("llmkd.train") is llmkd.api.train


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'llmkd' has no attribute 'distil'"):
        llmkd.distil  # noqa: B018


# the loss


def test_the_loss_is_the_formula_and_that_of_the_training_loop():
    student, teacher = hidden().requires_grad_(), dense()
    total, terms = llmkd.fused_loss(student, head(), labels(), OBJECTIVE, teacher)
    total.backward()
    again = student.detach().clone().requires_grad_()
    logits, told = head().logits(again), teacher.head.logits(teacher.hidden_NH).detach()
    ce = nn.functional.cross_entropy(logits, labels(), reduction="none")
    kd = 4 * nn.functional.kl_div((logits / 2).log_softmax(-1), (told / 2).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    (0.5 * ce + 0.5 * kd).sum().backward()
    torch.testing.assert_close(terms["ce"], ce.detach())
    torch.testing.assert_close(terms["kd"], kd.detach())
    torch.testing.assert_close(student.grad, again.grad)
    assert torch.equal(total, fused.fused_loss(student, head(), labels(), OBJECTIVE, teacher)[0])


@pytest.mark.parametrize(
    "signal",
    [
        dense(),
        TopK.of(torch.randn(N, V).log_softmax(-1), 3, labels()),
        Mixed([dense(), dense(seed=5)], [-0.69, -0.69], labels()),
        RoutedSignal([dense(2), dense(4)], torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2, 3])),
        None,
    ],
)
def test_what_fits_is_accepted(signal):
    objective = llmkd.Objective(0.5 if signal else 0.0)
    total, terms = llmkd.fused_loss(hidden(), head(), labels(), objective, signal, chunk_size=2)
    assert total.isfinite() and set(terms) == ({"ce", "kd"} if signal else {"ce"})
    assert llmkd.fused_loss(hidden(0), head(), labels(0), llmkd.Objective())[0] == 0


def loss(hidden_NH=None, student=None, labels_N=None, objective=OBJECTIVE, signal="dense", **options):
    hidden_NH, labels_N = hidden() if hidden_NH is None else hidden_NH, labels() if labels_N is None else labels_N
    return llmkd.fused_loss(hidden_NH, student or head(), labels_N, objective, dense() if signal == "dense" else signal, **options)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"labels_N": labels(10)}, "labels_N: found 10 labels for 6 rows of hidden_NH; give one label for each row"),
        (
            {"labels_N": torch.tensor([0, 1, -100, 3, -100, 5])},
            r"labels_N: found -100 at row 2 \(2 of 6 rows\), expected 0 to 10; select the supervised rows first: keep = labels != -100, ",
        ),
        ({"labels_N": torch.tensor([0, 1, 2, 3, 4, 11])}, r"labels_N: found 11 at row 5 \(1 of 6 rows\), expected 0 to 10; .* tokenizer"),
        ({"labels_N": labels().float()}, r"labels_N: found a tensor float32 \[6\], expected an int64 tensor \[N\]"),
        ({"labels_N": labels()[None]}, r"labels_N: found a tensor int64 \[1, 6\]"),
        ({"hidden_NH": hidden().view(2, 3, H)}, r"hidden_NH: found a tensor float32 \[2, 3, 4\], expected .*select the supervised"),
        ({"hidden_NH": torch.ones(N, H, dtype=torch.int64)}, "hidden_NH: found a tensor int64"),
        ({"hidden_NH": [1.0]}, "hidden_NH: found a list"),
        ({"hidden_NH": hidden(width=5)}, "head: takes hidden states of width 4, and hidden_NH has 5"),
        ({"student": nn.Linear(H, V)}, r"head: found a Linear, expected a Head; write llmkd.Head\(model.lm_head, vocab\)"),
        ({"student": head(12, rows=11), "signal": dense(vocab=12)}, "head: has 11 rows, and vocab is 12"),
        ({"student": head(7), "signal": dense()}, "signal: is over 11 tokens, and the student's head over 7"),
        ({"signal": None}, "signal: not given, and objective.kd_ratio is 0.5; give the teacher's output"),
        ({"signal": torch.randn(N, V)}, "signal: found a Tensor, expected a Signal"),
        ({"signal": dense(5)}, "signal: has 5 targets, and hidden_NH 6 rows"),
        ({"signal": Mixed([dense(), dense(5)], [0.0, 0.0], labels())}, "signal: has 5 targets"),
        ({"signal": llmkd.Dense(hidden(width=5), head())}, "signal.head: takes hidden states of width 4, and signal.hidden_NH has 5"),
        ({"signal": TopK.of(torch.randn(N, 9).log_softmax(-1), 3, labels())}, "signal: is over 9 tokens"),
        ({"objective": 0.5}, r"objective: found a float, expected an Objective; write llmkd.Objective\(kd_ratio=0.5\)"),
        ({"chunk_size": 0}, "chunk_size: found 0, expected a whole number >= 1"),
        ({"labels_N": labels().to("meta")}, "labels_N: is on meta, and hidden_NH on cpu; move one of them"),
        ({"student": llmkd.Head(nn.Linear(H, V, device="meta"), V)}, "head: is on meta, and hidden_NH on cpu"),
        ({"signal": llmkd.Dense(hidden().to("meta"), dense().head)}, "signal: is on meta, and hidden_NH on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, line):
    with pytest.raises(llmkd.ArgumentError, match=line) as caught:
        loss(**arguments)
    assert isinstance(caught.value, llmkd.UserError) and isinstance(caught.value, ValueError)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as caught:
        loss(labels_N=labels(3), signal=None, chunk_size=-1)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["labels_N", "chunk_size", "signal"]


def test_the_check_of_labels_can_be_left_out_and_no_other_reads_values(monkeypatch):
    """On a GPU reading a value waits for the device. Here every way to read one raises."""

    def read(*_):
        raise AssertionError("a value was read")

    arguments = hidden(), head(), labels(), OBJECTIVE, dense()
    for name in ("item", "__bool__", "__int__", "__float__", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, read)
    with pytest.raises(AssertionError, match="a value was read"):
        llmkd.fused_loss(*arguments)
    llmkd.fused_loss(*arguments, check_labels=False)


class Wrong(llmkd.FullDistribution):
    def log_probs(self, rows, log_q_nV=None, temperature=1.0):
        return torch.zeros(1, V)


def test_a_signal_of_ones_own_with_the_wrong_shape():
    with pytest.raises(llmkd.ArgumentError, match=r"signal: Wrong returned log-probabilities of shape \(1, 11\), expected \(6, 11\)"):
        loss(signal=Wrong())


def test_a_divergence_of_ones_own_that_reduces():
    own = llmkd.Objective(0.5, divergence=lambda log_q, log_p: (log_q - log_p).abs().sum())
    with pytest.raises(llmkd.ArgumentError, match=r"divergence: returned a tensor of shape \(\), expected one value for each of 6 rows"):
        loss(objective=own)


class Callable:
    def __call__(self, log_q, log_p):
        return (log_q.exp() - log_p.exp()).square().sum(-1)


@pytest.mark.parametrize("divergence", [Callable(), partial(Callable())])
def test_a_divergence_needs_no_name(divergence):
    assert loss(objective=llmkd.Objective(0.5, divergence=divergence))[0].isfinite()


def test_a_function_with_the_name_of_a_built_in_one_is_not_taken_for_it():
    def forward_kl(log_q, log_p):
        return (log_q.exp() - log_p.exp()).square().sum(-1)

    objective = llmkd.Objective(1.0, divergence=forward_kl)
    student, teacher = head().logits(hidden()).detach(), dense()
    right = forward_kl(student.log_softmax(-1), teacher.log_probs(slice(None)))
    torch.testing.assert_close(loss(objective=objective)[1]["kd"], right)
    kernels = pytest.importorskip("llmkd.losses.kernels")
    assert kernels.kind(objective) is None and kernels.kind(llmkd.Objective(1.0)) is not None


# the objective, divergences, training


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kd_ratio": 1.5}, "kd_ratio: found 1.5, expected 0 to 1"),
        ({"kd_ratio": -0.1}, "kd_ratio: found -0.1"),
        ({"kd_ratio": float("nan")}, "kd_ratio: found nan"),
        ({"kd_ratio": "half"}, "kd_ratio: found 'half'"),
        ({"kd_ratio": True}, "kd_ratio: found True"),
        ({"temperature": None}, "temperature: found None, expected a number above 0"),
        ({"temperature": 0.0}, "temperature: found 0.0, expected a number above 0"),
        ({"temperature": -1}, "temperature: found -1"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"divergence": "forward_kl"}, r"divergence: found 'forward_kl', expected a function .* llmkd.make_divergence\(name\)"),
    ],
)
def test_an_objective_is_checked(options, line):
    with pytest.raises(llmkd.ArgumentError, match=line):
        llmkd.Objective(**options)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("foward_kl", {}, "name: found 'foward_kl', expected one of forward_kl, .*; did you mean forward_kl?"),
        ("jsd", {}, "did you mean generalized_jsd?"),
        (3, {}, "name: found 3"),
        (["forward_kl"], {}, r"name: found \['forward_kl'\]"),
        ("generalized_jsd", {"beta": 2}, "beta: found 2, expected 0 to 1"),
        ("generalized_jsd", {"beta": "half"}, "beta: found 'half', expected 0 to 1"),
        ("skewed_forward_kl", {"alpha": 1.0}, "alpha: found 1.0, expected 0 to 0.99"),
        ("forward_kl", {"beta": 0.5}, "beta: forward_kl has no such option; it has: none"),
        ("alpha_beta", {"alpha": 0, "beta": 0}, "alpha, beta: both are 0"),
    ],
)
def test_a_divergence_is_checked(name, options, line):
    with pytest.raises(llmkd.ArgumentError, match=line):
        llmkd.make_divergence(name, **options)


def test_the_divergences_are_those_of_the_module():
    log_q, log_p = (torch.randn(3, 7).log_softmax(-1) for _ in range(2))
    found = llmkd.make_divergence("generalized_jsd", beta=0.3)(log_q, log_p)
    assert torch.equal(found, llmkd.divergences.generalized_jsd(log_q, log_p, beta=0.3))
    assert llmkd.divergences.DIVERGENCES.keys() == importlib.import_module("llmkd.config.recipe").DIVERGENCES.keys()


@pytest.mark.parametrize("error", [llmkd.UserError("a", "b"), llmkd.NonFinite(3, "kd", ["a:1"]), llmkd.Stopped("c")], ids=repr)
def test_errors_can_be_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_train_wants_a_recipe():
    with pytest.raises(llmkd.ArgumentError, match=r"recipe: found a str, expected a Recipe; llmkd.load_recipe\(path\) gives one"):
        llmkd.train("recipe.yaml")


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
def test_train_returns_the_summary(make_recipe, thread):
    """Signals can be handled in the main thread alone; training needs none."""
    recipe, found = make_recipe(train__max_steps=1, optim__warmup_steps=0), []
    worker = threading.Thread(target=lambda: found.append(llmkd.train(recipe)))
    if thread:
        worker.start()
        worker.join()
    else:
        found.append(llmkd.train(recipe))
    assert found[0]["steps"] == 1
    with pytest.raises(llmkd.UserError, match="output_dir"):
        llmkd.train(recipe)
