"""One whole training step: padded micro-batches of four, a budget of tokens, packed rows; with a live teacher and with none.

    python eval/speed/step.py [--hidden 128 --layers 2 --vocab 8192] [--batch 64] [--tokens 2048] [--steps 4] [--repeats 3]
    python eval/speed/step.py --shapes llama [--tokens 16384] [--batch 512]       # a GPU: Llama-3.1-8B to Llama-3.2-1B, random weights in bfloat16

The models are made on the spot, a teacher twice as wide and deep as the student, and so are the data: random tokens of log-normal lengths,
of which the last 56 % are supervised, roughly as in Alpaca. LoRA of rank 64, forward KL and CE by halves, AdamW. Everything is what a run
does in a step, by the same loop; settings take turns. Tokens are real ones: padding is not counted. On a CPU seconds are of CPU time, so give it one thread
(OMP_NUM_THREADS=1). Prints Markdown.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from llmkd import adapters, optimizers  # noqa: E402
from llmkd.ahead import ahead  # noqa: E402
from llmkd.data.collate import collate  # noqa: E402
from llmkd.data.encode import Encoded  # noqa: E402
from llmkd.distiller import Distiller  # noqa: E402
from llmkd.fitting import gauge_of  # noqa: E402
from llmkd.loop import Learner, train  # noqa: E402
from llmkd.losses.divergences import named  # noqa: E402
from llmkd.losses.objective import Objective  # noqa: E402
from llmkd.models import LanguageModel  # noqa: E402
from llmkd.order import Budget, Plan  # noqa: E402
from llmkd.recipe import Lora, Optim  # noqa: E402
from llmkd.teachers.live import Live  # noqa: E402
from llmkd.training import start  # noqa: E402

#: hidden, MLP, layers, heads, key-value heads, tied head
LLAMA = {"teacher": (4096, 14336, 32, 32, 8, False), "student": (2048, 8192, 16, 32, 8, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["small", "llama"], default="small")
    for name, value in (("hidden", 128), ("layers", 2), ("vocab", 8192), ("batch", 64), ("tokens", 2048), ("steps", 4), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.shapes == "llama":
        options.vocab = 128_256
    accelerator = start()
    student, teacher = models(options, accelerator.device)
    data = alpaca_like(options.batch * (options.steps + 1), options.vocab)
    settings = {
        (who, name): (size, packing, kd)
        for who, kd in (("live", 0.5), ("none", 0.0))
        for name, size, packing in (
            ("micro_batch_size 4", 4, False),
            (f"micro_batch_tokens {options.tokens}", Budget(options.tokens), False),
            ("the same, packed", Budget(options.tokens, packing=True), True),
        )
    }
    runs = {key: [] for key in settings}
    for _ in range(options.repeats):
        for key, (size, packing, kd) in settings.items():
            runs[key].append(timed(options, data, student, teacher if kd else None, size, packing, kd, accelerator))
    report(options, data, student, teacher, runs, accelerator.device)


def models(options, device) -> tuple[LanguageModel, LanguageModel]:
    """Student with its adapter, and frozen teacher."""
    h, n = options.hidden, options.layers
    shapes = {"teacher": (2 * h, 4 * h, 2 * n, 4, 2, False), "student": (h, 2 * h, n, 4, 2, True)}
    made = {}
    for who, (hidden, inner, layers, heads, kv, tied) in (LLAMA if options.shapes == "llama" else shapes).items():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            tie_word_embeddings=tied,
            max_position_embeddings=8192,
        )
        with torch.device(device):
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            made[who] = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    student = adapters.fresh(made["student"], Lora(rank=64, alpha=128.0), None).to(device)
    return LanguageModel(student, options.vocab).train(), LanguageModel(made["teacher"], options.vocab).eval()


def alpaca_like(count: int, vocab: int) -> Encoded:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(105), 0.6, count), 20, 512).astype(int)
    marks = np.concatenate([np.arange(n) >= round(0.44 * n) for n in lengths])
    ids = rng.integers(0, vocab, lengths.sum(), np.int32)
    return Encoded(ids, marks, np.cumsum([0, *lengths]), np.arange(count), {})


def timed(options, data: Encoded, student: LanguageModel, teacher, size, packing: bool, kd: float, accelerator) -> dict:
    """Seconds of every step but the first, its loss, and the most memory that was taken beside weights."""
    parameters = student.trainable()
    torch.manual_seed(0)
    for name, p in parameters.items():  # every run from the same adapter, one that is no longer zero
        torch.nn.init.normal_(p.data, std=0.02) if "lora_B" in name else torch.nn.init.kaiming_uniform_(p.data, a=math.sqrt(5))
    optimizer = optimizers.build(Optim(), parameters)
    distiller = accelerator.prepare_model(Distiller(student, Objective(kd, 1.0, named("forward_kl"))))
    learner = Learner(distiller, optimizer, parameters, lambda step: 2e-4, 1.0)
    plan = Plan(data.lengths, 0, options.batch, size, 1, None)
    batch_of = partial(collate, data, pad=0, packing=packing)
    clock = time.perf_counter if accelerator.device.type == "cuda" else time.process_time
    gauge, times, losses, targets = gauge_of(accelerator.device), [clock()], [], []
    for progress in train(plan, batch_of, [learner], Live(teacher) if teacher else None, accelerator, ahead=ahead):
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock())
        losses.append(progress.terms[0]["ce"])
        targets.append(progress.targets)
    batches = [batch_of(m) for step in plan.steps(1) for m in step.micro_batches]
    slots = sum(batch.student.inputs["input_ids"].numel() for batch in batches)
    tokens = sum(int(data.lengths[m].sum()) - len(m) for step in plan.steps(1) for m in step.micro_batches)
    return {
        "seconds": np.diff(times)[1:],
        "tokens": tokens / (len(times) - 2),
        "targets": sum(targets[1:]) / (len(times) - 2),
        "padding": 1 - tokens / slots,
        "passes": len(batches) / (len(times) - 2),
        "ce": losses[0],
        "bytes": gauge.taken,
    }


def report(options, data: Encoded, student, teacher, runs: dict, device) -> None:
    print("# One training step\n")
    print(f"`{' '.join(['python eval/speed/step.py', *sys.argv[1:]])}`  ")
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()}"
    )
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}  ")
    sizes = [sum(p.numel() for p in model.plain.parameters()) / 1e6 for model in (teacher, student)]
    weights = sum(p.nbytes for model in (teacher, student) for p in model.parameters()) / 1e9
    print(f"teacher {sizes[0]:,.1f} M, student {sizes[1]:,.1f} M parameters ({weights:.2f} GB); V = {options.vocab:,}; ", end="")
    print(f"{options.batch} examples of {data.lengths.mean():.0f} tokens on average a step\n")
    print(
        "| teacher | micro-batches | tokens/s (slowest to fastest step) | of the first row's | targets/s | passes a step | padding | peak GB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    first = {}
    for (who, name), rounds in runs.items():
        one, seconds = rounds[0], np.concatenate([r["seconds"] for r in rounds])
        tokens, middle = one["tokens"], statistics.median(seconds)
        base = first.setdefault(who, (middle, one["ce"]))
        if abs(one["ce"] - base[1]) > (1e-5 if device.type == "cpu" else 5e-3) * base[1]:
            raise SystemExit(f"{name}: the first step's CE is {one['ce']}, and {base[1]} in the first row")
        spread = f"{tokens / middle:,.0f} ({tokens / seconds.max():,.0f} to {tokens / seconds.min():,.0f})"
        peak = max(r["bytes"] for r in rounds) / 1e9
        row = [who, name, spread, f"{base[0] / middle:.2f} x", f"{one['targets'] / middle:,.0f}", f"{one['passes']:.1f}"]
        print(f"| {' | '.join(row)} | {one['padding']:.1%} | {peak:.2f} |")
    print(
        "\nMedians over all steps but each round's first. Peak: beside the weights, the largest of the rounds. The first step's CE, from the"
    )
    print("same adapter on the same examples, is equal in all rows (1e-5 in float32, 5e-3 in bfloat16), or there would be no table.")
    print("Packed rows are slow where attention computes every pair of a row's tokens and drops those of two examples, as sdpa does:")
    print("at T tokens a row and width H that is about T / 6H of the body's own products.")
    print("--shapes llama has not yet been run on a GPU." if device.type == "cpu" else "")


if __name__ == "__main__":
    main()
