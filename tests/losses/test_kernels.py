"""The Triton kernel against float64. In Triton's interpreter, which a process is in from its start or not at all."""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkd.head import Head
from llmkd.losses import fused
from llmkd.losses.divergences import make_divergence
from llmkd.losses.objective import Objective
from llmkd.signals import Dense

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
KINDS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("symmetric_kl", {"forward_weight": 0.2}),
    ("generalized_jsd", {}),
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 1.0}),
]
each_kind = pytest.mark.parametrize("name, options", KINDS, ids=str)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="inside already")
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", __file__],  # conftest.py imports much
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode and "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("the interpreter of this Triton (3.6 is such a one) cannot count with NumPy 2.4 or later")
    assert run.returncode == 0, run.stdout[-3000:]


#: By the number of a GPU's kind, A100 and H100: bytes of shared memory that a block may have (CUDA C++ Programming Guide, table of technical specifications).
SHARED = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 64 << 10  # of a multiprocessor, for the threads of a block at least
#: Vocabularies: of Llama 3, whose rows of logits begin at multiples of 16 numbers, and of Qwen 2.5's tokenizer, whose do not.
VOCABULARIES = (128_256, 151_665)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def launches(monkeypatch, arguments) -> list[tuple[dict, dict]]:
    """What `loss_and_grad` launches the kernel with, by the names of its arguments, and its options; nothing is run."""
    from llmkd.losses import kernels

    own, found = kernels.rows_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, num_warps, **flags: found.append(
                (dict(zip(own.arg_names, args, strict=False)) | flags, {"num_warps": num_warps})
            )

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "rows_kernel", Recorded())
        for name, options, V, dtype, taught, weights, objective in arguments:
            logits, labels = torch.zeros(2, V), torch.zeros(2, dtype=torch.int64)
            grad = None if dtype is None else logits.view(dtype)[:, :V]  # over the logits
            by_row = {term: torch.ones(2) for term in weights}
            given = logits.clone() if taught else None
            kernels.loss_and_grad(Objective(*objective, make_divergence(name, **options)), logits, labels, grad, given, weights=by_row)
    return found


def compiled(launch: dict, options: dict, kind: int):
    """The kernel for a GPU of that kind, specialised as Triton does for such arguments."""
    import triton
    from triton.backends.compiler import GPUTarget

    from llmkd.losses import kernels

    names = kernels.rows_kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value, constant = launch[name], name.isupper() and name != "V"
        whole = isinstance(value, int) and not constant
        signature[name] = "constexpr" if constant else TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" if whole else "fp32"
        if constant:
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn=kernels.rows_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", kind, 32), options=options)


def usage(cubin: bytes, folder) -> dict[str, int]:
    """What the kernel in a binary takes of a GPU, by cuobjdump, which is in Triton's wheel: registers of a thread (REG), bytes of its memory (STACK, LOCAL)."""
    import triton

    (folder / "kernel.cubin").write_bytes(cubin)
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([dump, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def fits(launch: dict, options: dict, kind: int, folder) -> None:
    found = compiled(launch, options, kind)
    taken = usage(found.asm["cubin"], folder)
    flags = {name: value for name, value in launch.items() if not isinstance(value, torch.Tensor)}
    ragged_mixture = kind == 90 and launch["KIND"] == 2 and launch["V"] % 16
    # A register that is spilt, or an array, lies in either. Of a mixture of rows that begin anywhere an H100 has room for 128 registers, and spills six.
    assert taken["LOCAL"] == 0 and taken["STACK"] <= (24 if ragged_mixture else 0), (kind, flags, taken)
    assert 32 * options["num_warps"] * taken["REG"] <= REGISTERS and found.metadata.shared <= SHARED[kind]


not_compiled = pytest.mark.skipif(INTERPRETED, reason="an interpreted function is not compiled")


@not_compiled
def test_compiles_for_a_gpu_that_is_not_here(monkeypatch, tmp_path):
    """What keeps most in registers: a mixture, and both directions at once."""
    wanted = [
        ("generalized_jsd", {}, VOCABULARIES[0], torch.bfloat16, True, ("ce", "kd"), (0.5, 2.0)),
        ("symmetric_kl", {}, VOCABULARIES[1], torch.bfloat16, True, (), (0.5, 1.0)),
    ]
    for (launch, options), kind in zip(launches(monkeypatch, wanted), (90, 80), strict=True):
        fits(launch, options, kind, tmp_path)


@not_compiled
@pytest.mark.slow
def test_every_form_compiles_for_an_a100_and_an_h100_without_a_spill(monkeypatch, tmp_path):
    """Each divergence and cross-entropy alone, at each temperature and vocabulary; types, weights and shares of the loss take turns among them."""
    forms = [("forward_kl", {}), ("reverse_kl", {}), ("symmetric_kl", {}), ("generalized_jsd", {}), None]
    turns, wanted = itertools.cycle([torch.bfloat16, torch.float16, torch.float32, None, torch.bfloat16]), []
    for number, (form, T, V) in enumerate(itertools.product(forms, (1.0, 2.0), VOCABULARIES)):
        weights = ((), ("ce", "kd"), ("kd",))[number % 3] if form else ("ce",)[: number % 2]
        name, options = form or forms[0]
        wanted.append((name, options, V, next(turns), form is not None, weights, ((0.5, 1.0)[number // 2 % 2] if form else 0.0, T)))
    found = launches(monkeypatch, wanted)
    every = {"KIND": {0, 1, 2}, "SOFT": {True, False}, "GRADIENT": {True, False}, "HARD": {True, False}, "TAUGHT": {True, False}}
    every |= dict.fromkeys(("FORWARD", "REVERSE", "CE_BY_ROW", "KD_BY_ROW"), {True, False})
    assert {flag: {launch[flag] for launch, _ in found} for flag in every} == every
    for (launch, options), kind in itertools.product(found, SHARED):
        fits(launch, options, kind, tmp_path)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(name, options, student, teacher, labels, kd_ratio=0.5, temperature=1.0, dtype=torch.float32, **more):
    """Terms and gradient by the kernel, which writes over the logits, and by the PyTorch path in float64."""
    from llmkd.losses import kernels

    objective, held = Objective(kd_ratio, temperature, make_divergence(name, **options)), {}
    wide, exact = student.double(), torch.empty_like(student, dtype=torch.float64)
    given = None if teacher is None else teacher.double() / temperature
    right = objective.loss_and_grad(wide, labels, lambda k: held.setdefault(k, torch.empty_like(wide)), exact, given, **more)
    tile = student.clone()
    grad = tile.view(dtype)[:, : tile.shape[1]]
    return (kernels.loss_and_grad(objective, tile, labels, grad, teacher, **more), grad), (right, exact)


def agree(found, right, bound=1e-4, floor=2e-7):
    (terms, grad), (exact, slope) = found, right
    assert terms.keys() == exact.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term.double(), exact[name], rtol=bound, atol=floor)
    assert (grad.double() - slope).norm() <= max(bound, 2 * torch.finfo(grad.dtype).eps) * slope.norm()


@inside
@pytest.mark.parametrize(
    "n, V, spread, temperature", [(1, 1, 1, 2.0), (1, 7, 1, 1.0), (3, 256, 3, 2.0), (5, 1000, 2, 1.0), (2, 4097, 4, 2.0), (2, 9000, 1, 1.0)]
)
@each_kind
def test_equals_float64(name, options, n, V, spread, temperature):
    student, teacher = spread * randn(n, V), spread * randn(n, V, seed=1) + 5
    agree(*pair(name, options, student, teacher, torch.arange(n) * 5 % V, 0.3, temperature))


@inside
@pytest.mark.parametrize("names", [("ce",), ("kd",), ("ce", "kd")], ids=str)
@each_kind
def test_rows_have_weights_of_their_own(name, options, names):
    every = {"ce": torch.tensor([0.0, 2.0, -1.0, 1e4]), "kd": torch.tensor([1.0, -0.5, 0.0, 300.0])}
    weights = {term: every[term] for term in names}
    student, teacher = randn(4, 700), randn(4, 700, seed=1)
    agree(*pair(name, options, student, teacher, torch.arange(4), 0.3, 2.0, weights=weights))
    agree(*pair(name, options, student, None, torch.arange(4), 0.3, weights={"ce": every["ce"]}, shares={"ce": 0.7, "kd": 0.3}))


@inside
@pytest.mark.parametrize("kd_ratio", [0.0, 1.0])
@each_kind
def test_one_term_alone(name, options, kd_ratio):
    agree(*pair(name, options, randn(3, 500), randn(3, 500, seed=1), torch.arange(3), kd_ratio, 2.0))


@inside
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
@each_kind
def test_a_student_close_to_its_teacher(name, options, apart):
    teacher = 3 * randn(4, 3000)
    found, right = pair(name, options, teacher + apart * randn(4, 3000, seed=1), teacher, torch.zeros(4, dtype=torch.long), 1.0)
    assert (found[0]["kd"] >= 0).all()
    agree(found, right, {1e-1: 1e-4, 1e-2: 3e-4, 1e-3: 3e-3}[apart], floor=0)


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_kind
def test_a_gradient_in_half_precision_over_the_logits(name, options, dtype):
    agree(*pair(name, options, 3 * randn(4, 9000), 3 * randn(4, 9000, seed=1), torch.arange(4), dtype=dtype))


@inside
@pytest.mark.parametrize(
    "name, options", [kind for kind in KINDS if kind[0] in ("forward_kl", "generalized_jsd") and kind[1].get("beta") != 1]
)
def test_tokens_that_the_teacher_rules_out(name, options):
    teacher = randn(4, 5000, seed=1)
    teacher[:, ::3], teacher[2, :4500] = -math.inf, -math.inf
    agree(*pair(name, options, randn(4, 5000), teacher, torch.arange(4)))


@inside
@each_kind
def test_no_weight_where_the_divergence_is_infinite(name, options):
    """Of three rows whose teacher rules tokens out two have no weight, and the last has one for the labels alone."""
    student, teacher = randn(4, 700), randn(4, 700, seed=1)
    teacher[1, 3] = teacher[2, 600] = teacher[3, 5] = -math.inf
    weights = {"ce": torch.tensor([1.0, 0.0, 1.0, 2.0]), "kd": torch.tensor([1.0, 0.0, -0.0, 0.0])}
    found, right = pair(name, options, student, teacher, torch.arange(4), 0.3, 2.0, weights=weights)
    agree(found, right)
    assert found[1].isfinite().all() and not found[1][1].any()
    finite = name == "forward_kl" or options in ({}, {"beta": 0.1}) and name == "generalized_jsd"
    assert found[0]["kd"].isinf().tolist() == [False] + 3 * [not finite]


@inside
@each_kind
def test_tokens_that_both_rule_out(name, options):
    student, teacher = randn(4, 5000), randn(4, 5000, seed=1)
    student[:, :4200] = teacher[:, :4200] = -math.inf
    agree(*pair(name, options, student, teacher, torch.full((4,), 4900)))


@inside
@pytest.mark.parametrize("who", ["student", "teacher"])
@each_kind
def test_a_nan_is_seen(name, options, who):
    student, teacher = randn(3, 100), randn(3, 100, seed=1)
    (student if who == "student" else teacher)[1, 5] = math.nan
    (terms, grad), _ = pair(name, options, student, teacher, torch.arange(3))
    assert terms["kd"].isnan().tolist() == grad.isnan().any(-1).tolist() == [False, True, False]


@inside
def test_without_a_teacher():
    agree(*pair("forward_kl", {}, 3 * randn(4, 5000), None, torch.arange(4)))


@inside
@pytest.mark.parametrize("train", [False, True])
@each_kind
def test_the_whole_head_by_the_kernel(monkeypatch, name, options, train):
    n, V, H, calls = 8, 300, 8, []
    hidden, labels, taught = randn(n, H), torch.arange(n), randn(n, 12, seed=1)
    heads = [torch.nn.Linear(width, V, bias=False) for width in (H, 12)]
    for head in heads:
        head.requires_grad_(train and head is heads[0]).weight.data.copy_(randn(*head.weight.shape, seed=3))
    from llmkd.losses import kernels

    assert fused.kernels_run(torch.device("cpu"))  # looks at the kernel once, by itself
    monkeypatch.setattr(
        kernels, "loss_and_grad", lambda *args, loss_and_grad=kernels.loss_and_grad: calls.append(1) or loss_and_grad(*args)
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        h = hidden.to(dtype).requires_grad_()
        student, teacher = (Head(head.to(dtype), V) for head in heads)
        objective = Objective(0.4, 2.0, make_divergence(name, **options))
        total, _ = fused.fused_loss(h, student, labels, objective, Dense(taught.to(dtype), teacher), 3)
        results.append((total.detach(), *torch.autograd.grad(total, [h, *student.trainable()])))
    assert len(calls) == 3  # float64 goes through PyTorch
    for found, right in zip(*results, strict=True):
        assert (found.double() - right).norm() <= 1e-4 * right.norm()


@inside
def test_a_kernel_that_is_wrong_is_found_out_before_it_is_used(monkeypatch):
    from llmkd.losses import kernels

    cpu, right = torch.device("cpu"), kernels.loss_and_grad
    assert kernels.agrees(cpu)

    def off(objective, logits_nV, labels_n, grad_nV, teacher_nV, **weights):
        terms = right(objective, logits_nV, labels_n, grad_nV, teacher_nV, **weights)
        grad_nV[2] *= 1.1
        return terms

    monkeypatch.setattr(kernels, "loss_and_grad", off)
    assert not kernels.agrees(cpu)
    monkeypatch.setattr(kernels, "loss_and_grad", lambda *args, **w: {name: 1.01 * term for name, term in right(*args, **w).items()})
    assert not kernels.agrees(cpu)
    monkeypatch.setattr(kernels, "loss_and_grad", lambda *args, weights: right(*args))
    assert not kernels.agrees(cpu), "it looks at the weights of rows too"
    with pytest.raises(RuntimeError, match="does not agree"):
        fused.kernels_run.__wrapped__(cpu)
