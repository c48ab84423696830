"""Whole runs, step by step, beside a loop written out here: plain torch, the logits of transformers, and nothing of llmkd's training.

Of llmkd it takes what the run reads (which examples are in which step, their ids and marks, the adapter's first values), and what the
run leaves: metrics.jsonl and a checkpoint of every step.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmkd.config.target_weights import Keep
from llmkd.files import read_jsonl
from llmkd.training.features import sample_batches
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.kit.models import load_student

#: Relative to the largest entry, in float64. Every bound is a thousand times or more what is found.
BOUND = 1e-9
#: Six steps: two epochs of 20 rows, of which the last step of each has four.
COMMON = {"data__train__limit": 20, "train__epochs": 2, "checkpoint__every": 1, "checkpoint__keep": 99, "validation__teacher_check": 0}
TOTAL = 6


def optim(**settings) -> dict:
    return {f"optim__{name}": value for name, value in ({"warmup_steps": None, "weight_decay": 0.0} | settings).items()}


RUNS = {
    "cosine, warm-up, clipped, lora": (
        {"loss__temperature": 2.0, "loss__kd_ratio": 0.7},
        optim(schedule="cosine", warmup_steps=2, min_lr_ratio=0.1, max_grad_norm=0.05, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    ),
    "linear, warm-up by ratio, clipped, full": (
        {"student__method": "full", "loss__temperature": 0.5},
        optim(schedule="linear", warmup_ratio=0.3, min_lr_ratio=0.2, max_grad_norm=0.3, weight_decay=0.3, betas=(0.5, 0.9), eps=1e-4),
    ),
    "constant, never clipped, full, attention maps": (
        {"student__method": "full", "loss__kd_ratio": 0.2, "loss__attention": {"weight": 0.6, "layers": [[1, 2], [2, 1]]}},
        optim(schedule="constant", max_grad_norm=None),
    ),
    "constant, warm-up, lora, attention relations": (
        {
            "student__lora": {"rank": 3, "alpha": 12.0},
            "loss__attention": {"weight": 0.3, "layers": "last", "what": "relations", "relation_heads": 4},
        },
        optim(schedule="constant", warmup_steps=3, eps=1e-5),
    ),
    "linear, no warm-up, rslora, reverse": (
        {"student__lora": {"rank": 4, "rslora": True}, "loss__divergence": "reverse_kl", "loss__temperature": 3.0},
        optim(schedule="linear", weight_decay=0.01, max_grad_norm=1e6, eps=1e-5),
    ),
    "linear, warm-up, clipped, full, hidden states": (
        {
            "student__method": "full",
            "loss__kd_ratio": 0.4,
            "loss__features": {"weight": 0.7, "layers": [[1, 1], [0, 1]], "lr": 0.003},
        },
        optim(schedule="linear", warmup_steps=2, max_grad_norm=0.3, weight_decay=0.2, eps=1e-5),
    ),
    "cosine, lora, hidden states alone": (
        {"loss__kd_ratio": 0, "loss__features": {"weight": 1.5, "distance": "cosine", "scale": "none"}},
        optim(schedule="cosine", weight_decay=0.3, eps=1e-5),
    ),
    "cosine, warm-up by ratio, full, no teacher": (
        {"student__method": "full", "teacher": None},
        optim(schedule="cosine", warmup_ratio=0.5, weight_decay=0.5, max_grad_norm=0.5),
    ),
    "schedules of the loss, a rule before the head": (
        {
            "loss__kd_ratio": {"from": 1.0, "to": 0.0, "shape": "cosine"},
            "loss__temperature": {"from": 3.0, "to": 1.0, "steps": 4},
            "loss__target_weights": {"by": "position", "invert": True, "half_life": 2.0},
        },
        optim(schedule="constant"),
    ),
    "weighted targets, divergences by source": ({"loss__temperature": 2.0, "loss__kd_ratio": 0.3}, optim(max_grad_norm=0.05)),
    "weighted targets, each term by its weights, packed": (
        {"loss__normalize": "weights", "data__packing": True, "train__micro_batch_size": 3},
        optim(weight_decay=0.1),
    ),
    "kept targets and a rule, each term by its weights, packed": (
        {
            "loss__normalize": "weights",
            "loss__temperature": 2.0,
            "loss__target_weights": {"by": "divergence", "power": 0.5, "terms": ["ce", "kd"]},
            "loss__keep": {"share": 0.6, "by": "student_entropy", "invert": True},
            "data__packing": True,
            "train__micro_batch_size": 3,
        },
        optim(weight_decay=0.1),
    ),
}
#: Of the two sources where targets are weighted, {rows: (ce, kd, divergence)}. Of the second kind some micro-batches have no target with a label.
WEIGHTS = {
    "weighted targets, divergences by source": {12: (-0.5, 1000.0, "reverse_kl"), 8: (0.0, 1.0, None)},
    "weighted targets, each term by its weights, packed": {15: (0.0, 0.25, None), 5: (1.0, 1.0, None)},
    "kept targets and a rule, each term by its weights, packed": {15: (-0.5, 1.0, None), 5: (1.0, 2.0, None)},
}


def rate(step: int, optim) -> float:
    """Up to `lr` in equal strides, the last of which ends after the warm-up; then down to the least, which a step after the last would have."""
    warmup = optim.warmup_steps or math.ceil((optim.warmup_ratio or 0) * TOTAL)
    if step <= warmup:
        return optim.lr * step / (warmup + 1)
    least, way = optim.lr * optim.min_lr_ratio, (step - 1 - warmup) / (TOTAL - warmup)
    if optim.schedule == "linear":
        return optim.lr + (least - optim.lr) * way
    return optim.lr if optim.schedule == "constant" else least + (optim.lr - least) * (1 + math.cos(math.pi * way)) / 2


class Student:
    """Weights of a base model, and with LoRA the adapter's: W + scale B A."""

    def __init__(self, recipe, vocab: int):
        from transformers import LlamaForCausalLM

        self.base = LlamaForCausalLM.from_pretrained(recipe.student.model)
        self.whole = dict(self.base.named_parameters())
        self.lora = recipe.student.lora if recipe.student.method == "lora" else None
        first = load_student(recipe.student, vocab, "cpu", recipe.seed).trainable() if self.lora else self.whole
        self.trained = {name: p.detach().clone().requires_grad_() for name, p in first.items()}

    def run(self, ids: torch.Tensor):
        """The logits and the hidden states, as transformers gives them."""
        weights = {name: p for name, p in self.trained.items() if not name.startswith("terms.")}
        if self.lora:
            scale, weights = self.lora.alpha / (math.sqrt(self.lora.rank) if self.lora.rslora else self.lora.rank), dict(self.whole)
            for name, a in self.trained.items():
                if ".lora_A." in name:
                    own = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                    weights[own] = self.whole[own].detach() + scale * self.trained[name.replace("lora_A", "lora_B")] @ a
        return torch.func.functional_call(self.base, weights, (ids[None],), {"output_hidden_states": True})


class Features:
    """loss.features by hand: a map for each pair, which numpy's least squares start, and the scale of each."""

    def __init__(self, recipe, prepared, student: Student, teacher):
        self.pairs = {"middle": [(1, 1)]}.get(recipe.loss.features.layers, recipe.loss.features.layers)
        self.recipe, states = recipe.loss.features, [([], []) for _ in self.pairs]
        chosen = sample_batches(prepared.train, range(len(prepared.train)), 16, 8, "cpu")[0]
        for example in (one for batch in chosen for one in batch.examples):
            number = next(i for i in range(len(prepared.train)) if prepared.train.content_hash(i) == example.content_hash)
            ids, mask = prepared.train.example(number)
            at, ids = torch.from_numpy(mask).nonzero()[:, 0] - 1, torch.from_numpy(ids).long()
            with torch.no_grad():
                ours, theirs = student.run(ids).hidden_states, teacher(ids[None], output_hidden_states=True).hidden_states
            for (xs, ys), (s, t) in zip(states, self.pairs, strict=True):
                xs.append(ours[s][0, at].double().numpy())
                ys.append(theirs[t][0, at].double().numpy())
        self.scales = []
        for n, (x, y) in enumerate((np.concatenate(xs), np.concatenate(ys)) for xs, ys in states):
            solution = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], 1), y, rcond=None)[0]
            student.trained[f"terms.features.maps.{n}.weight"] = torch.tensor(solution[:-1].T).requires_grad_()
            student.trained[f"terms.features.maps.{n}.bias"] = torch.tensor(solution[-1]).requires_grad_()
            self.scales.append(((y - y.mean(0)) ** 2).mean() if self.recipe.scale == "teacher_variance" else 1.0)

    def of(self, trained: dict, ours, theirs, at: torch.Tensor) -> torch.Tensor:
        """Of each target of one example."""
        total = 0
        for n, ((s, t), scale) in enumerate(zip(self.pairs, self.scales, strict=True)):
            mapped = ours[s][0, at] @ trained[f"terms.features.maps.{n}.weight"].T + trained[f"terms.features.maps.{n}.bias"]
            y = theirs[t][0, at]
            if self.recipe.distance == "mse":
                each = (mapped - y).square().sum(-1) / y.shape[1]
            else:
                each = 1 - (mapped * y).sum(-1) / mapped.norm(dim=-1) / y.norm(dim=-1)
            total = total + each / scale / len(self.pairs)
        return total


def scored(by: str, z: torch.Tensor, y: torch.Tensor, half_life: float | None = None) -> torch.Tensor:
    """The score of a rule at each target of one example, from the logits of student and teacher."""
    if by == "position":
        return 0.5 ** (torch.arange(len(z), dtype=torch.float64) / half_life)
    q = z.detach().softmax(-1)
    if by == "student_entropy":
        return -(q * q.log()).sum(-1) / math.log(q.shape[1])
    return ((q.sqrt() - y.softmax(-1).sqrt()).square().sum(-1) / 2).sqrt()


class Attention:
    """loss.attention by hand, from what the projections of both models return: rotated, multiplied, and normalised over what lies before."""

    def __init__(self, settings, student, teacher):
        self.settings, self.pairs = settings, [(2, 2)] if settings.layers == "last" else settings.layers
        self.models, self.seen = (student.model, teacher.base_model.model.model), ({}, {})
        for model, seen in zip(self.models, self.seen, strict=True):
            for number, layer in enumerate(model.layers, 1):
                for name in "qkv":
                    module = getattr(layer.self_attn, f"{name}_proj")
                    module.register_forward_hook(lambda _, args, out, seen=seen, key=(number, name): seen.update({key: out[0]}))

    def vectors(self, side: int, number: int) -> dict[str, torch.Tensor]:
        """Queries, keys and values [T, heads, d] of a layer: each pair (x_i, x_{i + d/2}) of the first two is turned by its position's angle."""
        heads, found = 2, {name: self.seen[side][number, name] for name in "qkv"}
        T, d = len(found["q"]), found["q"].shape[1] // heads
        cos, sin = (x[0, :, None] for x in self.models[side].rotary_emb(found["q"], torch.arange(T)[None]))
        for name in "qk":
            x = found[name].view(T, heads, d)
            found[name] = x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin
        return found | {"v": found["v"].view(T, heads, d)}

    def of(self, at: torch.Tensor) -> torch.Tensor:
        """Of each target of one example."""
        total = 0
        for numbers in self.pairs:
            both = [self.vectors(side, number) for side, number in enumerate(numbers)]
            if self.settings.what == "maps":
                compared = [[(one["q"], one["k"]) for one in both]]
            else:
                parts = [{name: x.reshape(len(x), self.settings.relation_heads, -1) for name, x in one.items()} for one in both]
                compared = [[(one[name], one[name]) for one in parts] for name in "qkv"]
            for pair in compared:
                rows = []
                for t in at.tolist():
                    log_q, log_p = (
                        (torch.einsum("hd,mhd->hm", a[t], b[: t + 1]) / math.sqrt(a.shape[-1])).log_softmax(-1) for a, b in pair
                    )
                    rows.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
                total = total + torch.stack(rows) / len(self.pairs)
        return total


def sources(recipe, name: str) -> list[dict]:
    """The rows as two sources, each with weights of its own."""
    lines = Path(recipe.data.train.path).read_text().splitlines()
    found, first = [], 0
    for rows, (ce, kd, divergence) in WEIGHTS[name].items():
        path = Path(recipe.output_dir).parent / f"{rows}.jsonl"
        path.write_text("\n".join(lines[first : first + rows]) + "\n")
        found.append({"path": str(path), "loss": {"ce": ce, "kd": kd}} | ({"divergence": divergence} if divergence else {}))
        first += rows
    return found


def by_hand(recipe, weights):
    """Each step's loss, cross-entropy, divergence, gradient norm, learning rate, and the weights after it."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    prepared = prepare(recipe)
    student, teacher = Student(recipe, prepared.vocab), None
    if recipe.teacher:
        adapter = Path(recipe.teacher.model)
        teacher = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(adapter.parent / "teacher"), adapter).eval()
    features = Features(recipe, prepared, student, teacher) if recipe.loss.features else None
    m = {name: torch.zeros_like(p) for name, p in student.trained.items()}
    v = {name: torch.zeros_like(p) for name, p in student.trained.items()}
    attention = Attention(recipe.loss.attention, student.base, teacher) if recipe.loss.attention else None
    optim, loss, rule, ratio, T = recipe.optim, recipe.loss, recipe.loss.target_weights, recipe.loss.kd_ratio, recipe.loss.temperature
    scheduled = isinstance(ratio, dict)
    for step, _, examples in prepared.source.plan.steps(0):
        if scheduled:  # a cosine over six steps, and a straight line over four of them
            ratio, T = (1 + math.cos(math.pi * (step - 1) / 5)) / 2, 3.0 - 2.0 * min(step - 1, 3) / 3
        sums, mass, carriers, targets, count = {}, {}, {}, 0, 0
        for example in examples:
            ids, mask = prepared.train.example(example)
            *of_source, divergence = weights[prepared.train.source[example]]
            ids, at = torch.from_numpy(ids).long(), torch.from_numpy(mask).nonzero()[:, 0]
            own = student.run(ids)
            z = own.logits[0][at - 1]
            values, y = {"ce": -z.log_softmax(-1)[torch.arange(len(at)), ids[at]]}, None
            if teacher:
                with torch.no_grad():
                    theirs = teacher(ids[None], output_hidden_states=True)
                y = theirs.logits[0][at - 1]
                log_p, log_q = ((x / T).log_softmax(-1) for x in (y, z))
                a, b = (log_q, log_p) if "reverse_kl" in (divergence, loss.divergence) else (log_p, log_q)
                values |= {"kd": T**2 * (a.exp() * (a - b)).sum(-1)} if ratio or scheduled else {}
                values |= {"features": features.of(student.trained, own.hidden_states, theirs.hidden_states, at - 1)} if features else {}
                values |= {"attention": attention.of(at - 1)} if attention else {}
            kept = torch.ones(len(at), dtype=torch.float64)
            if isinstance(loss.keep, Keep):
                order = sorted(range(len(at)), key=(scored(loss.keep.by, z, y) * (1 if loss.keep.invert else -1)).tolist().__getitem__)
                kept[order[math.ceil(loss.keep.share * len(at)) :]] = 0
            for term, value in values.items():
                w = kept * dict(zip(("ce", "kd"), of_source, strict=True)).get(term, 1.0)
                if rule and term in rule.terms:
                    w = w * ((1 - scored(rule.by, z, y, rule.half_life)) if rule.invert else scored(rule.by, z, y)) ** rule.power
                for into, number in ((sums, (w * value).sum()), (mass, w.abs().sum().item()), (carriers, int((w != 0).sum()))):
                    into[term] = into.get(term, 0) + number
            targets, count = targets + len(at), count + int(kept.sum())
        found = {term: value / mass[term] for term, value in sums.items() if mass[term]}
        parts = {term: value / ((mass[term] or 1) if loss.normalize == "weights" else count) for term, value in sums.items()}
        found["loss"] = (1 - ratio) * parts["ce"] + ratio * parts["kd"] if "kd" in parts else parts["ce"]
        for term in ("features", "attention"):
            found["loss"] = found["loss"] + getattr(loss, term).weight * parts[term] if term in parts else found["loss"]
        more = {"kd_ratio": ratio, "temperature": T} if scheduled else {}
        more |= {f"{term}_targets": number for term, number in carriers.items() if number < count}
        more |= {f"{term}_weight": mass[term] / count for term in sums if rule and term in rule.terms}
        more |= {"kept": count / targets} if count < targets else {}
        later = targets / count  # transformers' norms round gradients to float32: so what a run multiplies after them is here too
        grads = torch.autograd.grad(found["loss"] / later, list(student.trained.values()))
        grads = {name: g * later for name, g in zip(student.trained, grads, strict=True)}
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        lr, clip = rate(step, optim), 1.0
        if optim.max_grad_norm is not None and norm > optim.max_grad_norm:
            clip = optim.max_grad_norm / (norm + 1e-6)  # torch's clipping has this term
        with torch.no_grad():
            for name, p in student.trained.items():
                g, (b1, b2) = clip * grads[name], optim.betas
                m[name] = b1 * m[name] + (1 - b1) * g
                v[name] = b2 * v[name] + (1 - b2) * g * g
                mapping = name.startswith("terms.")
                decay = optim.weight_decay if p.dim() > 1 and not mapping else 0.0  # norms go without
                own = lr * (recipe.loss.features.lr or optim.lr) / optim.lr if mapping else lr
                p -= lr * decay * p + own * (m[name] / (1 - b1**step)) / ((v[name] / (1 - b2**step)).sqrt() + optim.eps)
        yield (
            {name: value.item() for name, value in found.items()} | {"grad_norm": norm, "lr": lr, "targets": targets} | more,
            student.trained,
        )


@pytest.mark.parametrize("name", RUNS)
def test_every_step_is_the_one_worked_out_by_hand(make_recipe, tmp_path, name):
    settings, optim = RUNS[name]
    recipe, of_sources = make_recipe(**COMMON, **settings, **optim), [(1.0, 1.0, None)]
    if name in WEIGHTS:
        common = {key: value for key, value in COMMON.items() if key != "data__train__limit"}
        recipe = make_recipe(**common, **settings, **optim, data__train=sources(recipe, name))
        of_sources = list(WEIGHTS[name].values())
    run(recipe)
    records = [record for record in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" in record]
    clipped = []
    for step, (expected, weights) in enumerate(by_hand(recipe, of_sources), 1):
        record = records[step - 1]
        assert record["step"] == step and ({*record} - {"epoch", "step", "targets_per_s", "peak_memory"} == {*expected})
        for key, value in expected.items():
            assert record[key] == pytest.approx(value, rel=BOUND, abs=1e-15 * (key == "kd_ratio")), (step, key)
        clipped.append(recipe.optim.max_grad_norm is not None and expected["grad_norm"] > recipe.optim.max_grad_norm)
        saved = load_file(tmp_path / f"out/checkpoints/step-{step}/student.safetensors")
        if recipe.loss.features:
            assert saved.pop("terms.features.scales").shape == ({"middle": 1}.get(recipe.loss.features.layers, 2),)
        assert saved.keys() == weights.keys()
        for key, p in weights.items():
            assert (saved[key] - p).abs().max() <= BOUND * p.abs().max(), (step, key)
    assert len(records) == step == TOTAL
    if "never" in name or "no warm-up" in name:
        assert not any(clipped)
    elif "clipped" in name:
        assert all(clipped)
