"""The setup of eval/speed/step.py: two models with random weights, data with Alpaca's lengths, and reference values of a step's loss."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import nn

from llmkd.config.recipe import Lora
from llmkd.data.batch_source import PlannedSource
from llmkd.data.batching import BatchPlan, TokenBudget
from llmkd.data.collate import collate
from llmkd.data.examples import Collator, TokenExamples
from llmkd.models import float8, shared_weights
from llmkd.models.compile import compile_layers, configure_torch_compile
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import checked
from llmkd.models.lora import add_lora
from llmkd.models.lora_product import add_in_place

IGNORE, LONGEST = -100, 131_072
RANK, ALPHA = 64, 128.0


@dataclass(frozen=True)
class Shape:
    family: str  # "llama" or "qwen2"
    hidden: int
    inner: int
    layers: int
    heads: int
    kv: int
    tied: bool

    def config(self, vocab: int):
        common = {
            "vocab_size": vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": LONGEST,
            "rms_norm_eps": self.eps,
            "initializer_range": max(0.02, self.hidden**-0.5),  # narrow models would else agree on everything
        }
        if self.family == "qwen2":
            return transformers.Qwen2Config(**common, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": float(self.stretch), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return transformers.LlamaConfig(**common, rope_parameters=rope | {"original_max_position_embeddings": 8192})

    @property
    def eps(self) -> float:
        return 1e-6 if self.family == "qwen2" else 1e-5

    @property
    def stretch(self) -> int:
        """Of the rotary positions, in Llama 3.1 and 3.2."""
        return 32 if self.tied else 8


def shapes_of(options) -> tuple[dict[str, Shape], int]:
    """Teacher's and student's, and the vocabulary."""
    if options.shapes == "llama":  # Llama-3.1-8B to Llama-3.2-1B
        teacher = Shape("llama", 4096, 14336, 32, 32, 8, False)
        return {"teacher": teacher, "student": Shape("llama", 2048, 8192, 16, 32, 8, True)}, 128_256
    if options.shapes == "qwen":  # Qwen2.5-1.5B to Qwen2.5-0.5B
        teacher = Shape("qwen2", 1536, 8960, 28, 12, 2, True)
        return {"teacher": teacher, "student": Shape("qwen2", 896, 4864, 24, 14, 2, True)}, 151_936
    if options.shapes == "quickstart":
        return {"teacher": Shape("llama", 160, 448, 4, 5, 5, True), "student": Shape("llama", 96, 256, 3, 4, 4, True)}, 640
    h, n = options.hidden, options.layers
    teacher = Shape(options.family, 2 * h, 4 * h, 2 * n, 4, 2, options.family == "qwen2")
    return {"teacher": teacher, "student": Shape(options.family, h, 2 * h, n, 4, 2, True)}, options.vocab


@dataclass(frozen=True)
class Reference:
    """Reference values for some examples: the number of targets, and means over them by plain transformers with whole logits."""

    targets: int
    ce: float
    kl: float
    entropy: float  # the teacher's
    gradients: dict[float, float]  # by kd_ratio, 0 or 0.5, the norm of the mean loss's gradient


class Setup:
    """Models, data and options that all cases share."""

    def __init__(self, options, accelerator):
        self.options, self.accelerator = options, accelerator
        self.shapes, self.vocab = shapes_of(options)
        if options.equal:
            self.shapes["teacher"] = self.shapes["student"]
        self.device = accelerator.device
        self.dtype = getattr(torch, options.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        made = {}
        for who, shape in self.shapes.items():
            torch.manual_seed(0)
            with torch.device(self.device):
                model = transformers.AutoModelForCausalLM.from_config(shape.config(self.vocab), dtype=self.dtype)
            made[who] = model.requires_grad_(False)
        self._bare = shared_weights.copy_sharing_weights(made["student"])
        student = add_lora(made["student"], Lora(rank=RANK, alpha=ALPHA), None).to(self.device)
        add_in_place(student)
        self.student = checked(LanguageModel(student, self.vocab).train(), "student.model", options.tokens)
        self.teacher = checked(LanguageModel(made["teacher"], self.vocab).eval(), "teacher.model", options.tokens)
        lengths = {"median": 23, "spread": 0.2, "supervised": 0.26} if options.shapes == "quickstart" else {}
        self.data = random_examples(options.batch * (options.steps + 2), self.vocab, **lengths)
        self.fresh_adapter()

    @functools.cached_property
    def float8_teacher(self) -> LanguageModel:
        """The teacher's body in 8-bit floats, next to the one it is made of. Made before anything is compiled."""
        float8.refuse_without_products(self.device, "--float8")
        model = LanguageModel(shared_weights.copy_sharing_weights(self.teacher.base_model), self.vocab).eval()
        float8.convert(model.base_model)
        return checked(model, "teacher.model", self.options.tokens)

    @functools.cache  # noqa: B019
    def students_on_one_base(self, count: int) -> list[LanguageModel]:
        """So many more students on one base that has the student's weights."""
        model, names = shared_weights.copy_sharing_weights(self._bare), [f"arm{k}" for k in range(count)]
        for name in names:
            model = add_lora(model, Lora(rank=RANK, alpha=ALPHA), None, name)
        model = model.to(self.device)
        add_in_place(model)
        return [checked(LanguageModel(model, self.vocab, name).train(), "student.model", self.options.tokens) for name in names]

    @functools.cache  # noqa: B019
    def compile(self) -> None:
        """Student and teachers, once; with torch.compiler.set_stance("force_eager") they are what they were."""
        models = [("student", self.student), ("teacher", self.teacher)]
        models += [("teacher", self.float8_teacher)] if self.options.float8 else []
        configure_torch_compile(self.device)
        for who, model in models:
            compile_layers(model, f"{who}.model", packing=True)

    def source(self, size: int | TokenBudget) -> PlannedSource:
        """Batches of one warm-up step and the measured steps."""
        plan = BatchPlan(self.data.lengths, 0, self.options.batch, None, self.options.steps + 1)
        data = dataclasses.replace(self.data, collator=Collator(packing=isinstance(size, TokenBudget) and size.packing))
        return PlannedSource(data, (), plan, size).for_rank(0, 1, self.device)

    @functools.cached_property
    def order(self) -> list[int]:
        """All examples, step after step."""
        return [i for batch in self.source(1).plan.step_batches(0) for i in batch]

    @functools.cached_property
    def window(self) -> tuple[float, float]:
        """Tokens and targets of a measured step, on average. A token is one that is read: the last of an example is not."""
        measured = self.order[self.options.batch : self.options.batch * (self.options.steps + 1)]
        return self.tokens(measured) / self.options.steps, sum(self.targets(i) for i in measured) / self.options.steps

    def tokens(self, examples: list[int]) -> int:
        return int(self.data.lengths[examples].sum()) - len(examples)

    def targets(self, example: int) -> int:
        return int(self.data.example(example)[1][1:].sum())

    def fresh_adapter(self, student: LanguageModel | None = None) -> dict[str, nn.Parameter]:
        """Every round starts from the same adapter, one that is no longer zero."""
        parameters = (student or self.student).trainable()
        torch.manual_seed(0)
        for name, p in parameters.items():
            torch.nn.init.normal_(p.data, std=0.02) if "lora_B" in name else torch.nn.init.kaiming_uniform_(p.data, a=math.sqrt(5))
        return parameters

    def reference(self, examples: list[int]) -> Reference:
        """With a fresh adapter."""
        return self._reference(tuple(examples))

    @functools.cache  # noqa: B019
    def _reference(self, examples: tuple[int, ...]) -> Reference:
        parameters = list(self.fresh_adapter().values())
        sums, count, of_ce, of_kl = torch.zeros(3, dtype=torch.float64), 0, *([0.0] * len(parameters) for _ in range(2))
        for start in range(0, len(examples), 4):
            batch = collate(self.data, list(examples[start : start + 4]), pad=0).to(self.device)
            log_q, log_p = self._log_probs(self.student.model, batch), self._log_probs(self.teacher.model, batch)
            ce, kl = -log_q.gather(1, batch.labels_N[:, None]).sum(), (log_p.exp() * (log_p - log_q)).sum()
            of_ce = [a + b for a, b in zip(of_ce, torch.autograd.grad(ce, parameters, retain_graph=True), strict=True)]
            of_kl = [a + b for a, b in zip(of_kl, torch.autograd.grad(kl, parameters), strict=True)]
            sums += torch.stack([ce.detach(), kl.detach(), -(log_p.exp() * log_p).sum()]).cpu()
            count += batch.num_targets
        mixed = [0.5 * (a + b) for a, b in zip(of_ce, of_kl, strict=True)]
        norms = {kd: torch.nn.utils.get_total_norm(grads).item() / count for kd, grads in ((0.0, of_ce), (0.5, mixed))}
        return Reference(count, *(sums / count).tolist(), norms)

    def _log_probs(self, model: nn.Module, batch) -> torch.Tensor:
        logits_BTV = model(**batch.student.inputs, use_cache=False).logits
        return logits_BTV.flatten(0, 1)[batch.student.rows_N].double().log_softmax(-1)


def random_examples(count: int, vocab: int, median: float = 105, spread: float = 0.6, supervised: float = 0.56) -> TokenExamples:
    """Random tokens of log-normal lengths, whose last part is supervised: as Alpaca's, unless told otherwise."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(median), spread, count), median // 5, 512).astype(int)
    marks = np.concatenate([np.arange(n) >= round((1 - supervised) * n) for n in lengths])
    ids = rng.integers(0, vocab, lengths.sum(), np.int32)
    return TokenExamples(ids, marks, np.cumsum([0, *lengths]), np.arange(count), {})
