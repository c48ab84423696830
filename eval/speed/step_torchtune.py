"""torchtune's knowledge distillation recipe, in its own loop, on the models and examples of eval/speed/step.py."""

import contextlib
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from .step_cases import Clock, Measurement
from .step_examples import MICRO, counted, examples_of
from .step_setup import ALPHA, IGNORE, LONGEST, RANK, Setup, Shape


class Torchtune:
    """recipes/knowledge_distillation_single_device.py, set up part by part as its `setup` does, without files of weights and tokens.

    Packed rows are as long as a quarter of the budget, so that a micro-batch of its default size fills it; it is smaller where a step has
    less, and halved where memory runs out on a GPU. One student is made and compiled once; every round has the adapter anew, an optimizer
    and a schedule.
    """

    def __init__(self, packed: bool):
        self.packed, self.micro, self.recipe = packed, MICRO, None

    def __call__(self, setup: Setup) -> Measurement:
        while True:
            with contextlib.suppress(torch.OutOfMemoryError) if self.micro > 1 else contextlib.nullcontext():
                return self.measure(setup)
            self.micro //= 2
            torch.cuda.empty_cache()

    def measure(self, setup: Setup) -> Measurement:
        recipe = self.recipe = self.recipe or self.build(setup)
        adapter = adapter_of(setup, recipe.rules)
        for name, p in recipe._model.named_parameters():
            if p.requires_grad:
                p.data.copy_(adapter[name])
                p.grad = None
        steps, slots = self.data(setup, recipe)
        recipe._optimizer = recipe._setup_optimizer(recipe.config.optimizer)
        recipe._lr_scheduler = recipe._setup_lr_scheduler(recipe.config.lr_scheduler, num_training_steps=len(steps), last_epoch=-1)
        recipe._metric_logger = logger = Marks(setup)
        recipe.epochs_run = recipe.global_step = 0
        recipe.max_steps_per_epoch = recipe._steps_per_epoch = len(steps)
        recipe.train()
        entropy = setup.reference(steps[0]).entropy  # its KL leaves that out
        passes = recipe._gradient_accumulation_steps
        remark = f"; {self.micro} at a time" if self.micro < MICRO else ""
        told = {"ce": logger.first["class_loss"], "kl": logger.first["kd_loss"] - entropy}
        return counted(setup, logger.clock, steps, passes, slots, **told, remark=remark)

    def build(self, setup: Setup):
        from omegaconf import OmegaConf

        logging.disable(logging.WARNING)
        cls, rules = recipe_class(), Rules.of(setup.shapes["student"].family)
        lora = {
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
        }
        config = OmegaConf.create(
            {
                "device": setup.device.type,
                "dtype": "bf16" if setup.dtype == torch.bfloat16 else "fp32",
                "output_dir": "",
                "seed": 0,
                "epochs": 1,
                "max_steps_per_epoch": None,
                "resume_from_checkpoint": False,
                "gradient_accumulation_steps": 1,
                "kd_ratio": 0.5,
                "model": {"_component_": f"{rules.module}.lora_{rules.builder}", **lora, **rules.arguments(setup, "student")},
                "teacher_model": {"_component_": f"{rules.module}.{rules.builder}", **rules.arguments(setup, "teacher")},
                "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.01, "lr": 3e-4},
                "lr_scheduler": {
                    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                    "num_warmup_steps": 100,
                },
                "dataset": {"_component_": f"{__name__}.torchtune_data", "packed": self.packed},
            }
        )
        recipe = cls(config)
        recipe.config, recipe.rules, recipe._compile = config, rules, self.packed
        states = {who: base_of(setup, who, rules) for who in ("student", "teacher")}
        recipe._model = recipe._setup_model(config.model, False, self.packed, states["student"], adapter_of(setup, rules))
        recipe._teacher_model = recipe._setup_teacher_model(config.teacher_model, states["teacher"])
        for who, model in (("student", recipe._model), ("teacher", recipe._teacher_model)):
            for name, p in model.named_parameters():
                if name in states[who]:
                    p.data = states[who][name].to(p.dtype)  # one copy in memory where no permutation makes another
        from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss
        from torchtune.training import compile_loss

        recipe._loss_fn, recipe._kd_loss_fn = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
        if self.packed:
            recipe._loss_fn, recipe._kd_loss_fn = compile_loss(recipe._loss_fn), compile_loss(recipe._kd_loss_fn)
        for model in (recipe._model, recipe._teacher_model):
            model.set_num_output_chunks(recipe._loss_fn.num_output_chunks)
        recipe._profiler = recipe._setup_profiler(None)
        return recipe

    def data(self, setup: Setup, recipe) -> tuple[list[list[int]], int]:
        """The recipe's own dataset, batches and accumulation; the examples of each step, and how many tokens all take with padding."""
        length, count = max(setup.options.tokens // MICRO, int(setup.data.lengths.max())), setup.options.steps + 1
        if self.packed:
            self.micro = max(1, min(self.micro, round(setup.window[0] / length)))  # a step has no more than that
        recipe._tokenizer = SimpleNamespace(pad_id=0, examples=examples_of(setup), max_seq_len=length)
        recipe._dataloader = recipe._setup_data(recipe.config.dataset, shuffle=False, batch_size=self.micro)
        recipe.ignore_labels_cache = torch.full((self.micro, 1), IGNORE, device=setup.device)
        if self.packed:
            held = [int((pack["input_pos"] == 0).sum()) for pack in recipe._dataloader.dataset.packs]  # padding goes on counting
            passes = min(round(setup.window[0] / (self.micro * length)), len(held) // (count * self.micro))
            if not passes:
                raise ValueError(f"{len(held)} packed rows for {count} steps; a larger --batch has more")
            slots = passes * self.micro * length * count
        else:
            held, passes = [1] * len(setup.order), setup.options.batch // self.micro
            lengths = setup.data.lengths[setup.order][: count * passes * self.micro]
            slots = int(lengths.reshape(-1, self.micro).max(1).sum()) * self.micro
        recipe._gradient_accumulation_steps = passes
        ends = [sum(held[: k * passes * self.micro]) for k in range(count + 1)]
        return [setup.order[a:b] for a, b in zip(ends, ends[1:], strict=False)], slots


def torchtune_data(tokenizer, packed: bool):
    """As torchtune.datasets.alpaca_cleaned_dataset and its like: a list, or that packed."""
    from torchtune.datasets import PackedDataset

    return PackedDataset(tokenizer.examples, max_seq_len=tokenizer.max_seq_len) if packed else tokenizer.examples


def recipe_class():
    """The recipe, which is a script in torchtune's wheel and no module; it leaves no checkpoint here."""
    import torchtune

    path = Path(torchtune.__file__).parents[1] / "recipes/knowledge_distillation_single_device.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return type("Recipe", (module.KDRecipeSingleDevice,), {"save_checkpoint": lambda self, epoch: None})


class Marks:
    """Stands where the recipe's metric logger does, which is called at every step."""

    def __init__(self, setup: Setup):
        self.first, self.clock = {}, Clock(setup.device)

    def log_dict(self, payload: dict, step: int) -> None:
        self.clock.mark()
        self.first = self.first or {name: float(payload[name]) for name in ("class_loss", "kd_loss")}


class Rules:
    """Where torchtune builds a family, and how it names and permutes transformers' weights."""

    @staticmethod
    def of(family: str) -> "Rules":
        return {"llama": Rules("torchtune.models.llama3_2", "llama3_2"), "qwen2": Rules("torchtune.models.qwen2", "qwen2")}[family]

    def __init__(self, module: str, builder: str):
        self.module, self.builder = module, builder

    def arguments(self, setup: Setup, who: str) -> dict:
        shape: Shape = setup.shapes[who]
        found = {
            "vocab_size": setup.vocab,
            "num_layers": shape.layers,
            "num_heads": shape.heads,
            "num_kv_heads": shape.kv,
            "embed_dim": shape.hidden,
            "intermediate_dim": shape.inner,
            "max_seq_len": LONGEST,
            "norm_eps": shape.eps,
            "tie_word_embeddings": shape.tied,
        }
        return found | ({"scale_factor": shape.stretch} if self.builder == "llama3_2" else {})

    def converted(self, state: dict[str, Tensor], shape: Shape, width: int) -> dict[str, Tensor]:
        from torchtune.models import convert_weights
        from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

        convert = convert_weights.hf_to_tune if self.builder == "llama3_2" else qwen2_hf_to_tune
        return convert(state, shape.heads, shape.kv, width, shape.hidden // shape.heads)

    def key(self, name: str) -> str:
        from torchtune.models import convert_weights
        from torchtune.models.qwen2 import _convert_weights as qwen2

        return convert_weights.get_mapped_key(name, (convert_weights if self.builder == "llama3_2" else qwen2)._FROM_HF)


def base_of(setup: Setup, who: str, rules: Rules) -> dict[str, Tensor]:
    """The frozen weights, in torchtune's form."""
    shape, model = setup.shapes[who], getattr(setup, who).base_model
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    if shape.tied:
        del state["lm_head.weight"]
    return rules.converted(state, shape, shape.hidden)


def adapter_of(setup: Setup, rules: Rules) -> dict[str, Tensor]:
    """A fresh adapter, in torchtune's form: outputs of queries and keys are permuted as their weights are."""
    setup.fresh_adapter()
    found = {}
    for name, value in setup.student.base_model.state_dict().items():
        for letter in "AB":
            if f".lora_{letter}." in name:
                key = name.replace(f".lora_{letter}.default", "")
                (new,) = (
                    rules.converted({key: value}, setup.shapes["student"], RANK) if letter == "B" else {rules.key(key): value}
                ).items()
                found[new[0].replace(".weight", f".lora_{letter.lower()}.weight")] = new[1].to(setup.dtype)
    return found
