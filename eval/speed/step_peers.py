"""Peers' whole training steps, for eval/speed/step.py, on the models and examples that llmkd's rows have.

torchtune's and TRL's own trainers run here, each in its own loop; what they are given by us is models, weights and examples. Only the
row of TRL's chunked loss is a loop of ours, after its DistillationTrainer, which trains on what the student itself writes.
"""

import contextlib
import copy
import importlib.util
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from llmkd.families import decoder_of

from .step_cases import Case, Clock, Round
from .step_world import ALPHA, IGNORE, LONGEST, RANK, Shape, World

MICRO = 4  # examples, or packed rows: torchtune's default


def peers(world: World) -> list[Case]:
    torchtune = "its recipe's own train(); adapters on all linear layers; divides its gradient by the targets twice"
    return [
        Case("torchtune, batches of 4", Torchtune(packed=False), remark=torchtune),
        Case("torchtune, packed, compiled", Torchtune(packed=True), remark=torchtune),
        Case("TRL GKDTrainer, lmbda 0, batches of 4", gkd, remark="no CE; gradient checkpointing off, where its default is on"),
        Case("TRL's chunked divergence, batches of 4", chunked, remark="no CE; in a plain loop, on transformers' bodies"),
    ]


def examples_of(world: World) -> list[dict]:
    """All examples step after step, as both take them: labels stand under their own tokens."""
    found = []
    for ids_L, marks_L in map(world.data.example, world.order):
        ids = ids_L.tolist()
        found.append({"tokens": ids, "labels": [y if m else IGNORE for y, m in zip(ids, marks_L.tolist(), strict=True)]})
    return found


def counted(world: World, clock: Clock, steps: list[list[int]], passes: float, slots: int, **terms) -> Round:
    """`steps`: the examples of each."""
    tokens, targets = [world.tokens(one) for one in steps], [sum(map(world.targets, one)) for one in steps]
    return Round(clock.seconds, tokens, targets, passes, slots, steps[0], bytes=clock.gauge.taken, **terms)


class Torchtune:
    """recipes/knowledge_distillation_single_device.py, set up part by part as its `setup` does, without files of weights and tokens.

    Packed rows are as long as a quarter of the budget, so that a micro-batch of its default size fills it; where memory runs out on a
    GPU it is halved. One student is made and compiled once; every round has the adapter anew, an optimizer and a schedule.
    """

    def __init__(self, packed: bool):
        self.packed, self.micro, self.recipe = packed, MICRO, None

    def __call__(self, world: World) -> Round:
        while True:
            with contextlib.suppress(torch.OutOfMemoryError) if self.micro > 1 else contextlib.nullcontext():
                return self.round(world)
            self.micro //= 2
            torch.cuda.empty_cache()

    def round(self, world: World) -> Round:
        recipe = self.recipe = self.recipe or self.made(world)
        adapter = adapter_of(world, recipe.rules)
        for name, p in recipe._model.named_parameters():
            if p.requires_grad:
                p.data.copy_(adapter[name])
                p.grad = None
        steps, slots = self.data(world, recipe)
        recipe._optimizer = recipe._setup_optimizer(recipe.config.optimizer)
        recipe._lr_scheduler = recipe._setup_lr_scheduler(recipe.config.lr_scheduler, num_training_steps=len(steps), last_epoch=-1)
        recipe._metric_logger = logger = Marks(world)
        recipe.epochs_run = recipe.global_step = 0
        recipe.max_steps_per_epoch = recipe._steps_per_epoch = len(steps)
        recipe.train()
        entropy = world.truth(steps[0]).entropy  # its KL leaves that out
        passes = recipe._gradient_accumulation_steps
        return counted(world, logger.clock, steps, passes, slots, ce=logger.first["class_loss"], kl=logger.first["kd_loss"] - entropy)

    def made(self, world: World):
        from omegaconf import OmegaConf

        logging.disable(logging.WARNING)
        cls, rules = recipe_class(), Rules.of(world.shapes["student"].family)
        lora = {
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
        }
        config = OmegaConf.create(
            {
                "device": world.device.type,
                "dtype": "bf16" if world.dtype == torch.bfloat16 else "fp32",
                "output_dir": "",
                "seed": 0,
                "epochs": 1,
                "max_steps_per_epoch": None,
                "resume_from_checkpoint": False,
                "gradient_accumulation_steps": 1,
                "kd_ratio": 0.5,
                "model": {"_component_": f"{rules.module}.lora_{rules.builder}", **lora, **rules.arguments(world, "student")},
                "teacher_model": {"_component_": f"{rules.module}.{rules.builder}", **rules.arguments(world, "teacher")},
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
        states = {who: base_of(world, who, rules) for who in ("student", "teacher")}
        recipe._model = recipe._setup_model(config.model, False, self.packed, states["student"], adapter_of(world, rules))
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

    def data(self, world: World, recipe) -> tuple[list[list[int]], int]:
        """The recipe's own dataset, batches and accumulation; the examples of each step, and how many tokens all take with padding."""
        length = world.options.tokens // MICRO
        recipe._tokenizer = SimpleNamespace(pad_id=0, examples=examples_of(world), max_seq_len=length)
        recipe._dataloader = recipe._setup_data(recipe.config.dataset, shuffle=False, batch_size=self.micro)
        recipe.ignore_labels_cache = torch.full((self.micro, 1), IGNORE, device=world.device)
        count = world.options.steps + 1
        if self.packed:
            held = [int((pack["input_pos"] == 0).sum()) for pack in recipe._dataloader.dataset.packs]  # padding goes on counting
            passes = max(1, min(round(world.window[0] / (self.micro * length)), len(held) // (count * self.micro)))
            slots = passes * self.micro * length * count
        else:
            held, passes = [1] * len(world.order), world.options.batch // self.micro
            lengths = world.data.lengths[world.order][: count * passes * self.micro]
            slots = int(lengths.reshape(-1, self.micro).max(1).sum()) * self.micro
        recipe._gradient_accumulation_steps = passes
        ends = [sum(held[: k * passes * self.micro]) for k in range(count + 1)]
        return [world.order[a:b] for a, b in zip(ends, ends[1:], strict=False)], slots


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
    """Stands where the recipe's metric logger does, which hears of every step."""

    def __init__(self, world: World):
        self.first, self.clock = {}, Clock(world.device)

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

    def arguments(self, world: World, who: str) -> dict:
        shape: Shape = world.shapes[who]
        found = {
            "vocab_size": world.vocab,
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


def base_of(world: World, who: str, rules: Rules) -> dict[str, Tensor]:
    """The frozen weights, in torchtune's form."""
    shape, model = world.shapes[who], getattr(world, who).plain
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    if shape.tied:
        del state["lm_head.weight"]
    return rules.converted(state, shape, shape.hidden)


def adapter_of(world: World, rules: Rules) -> dict[str, Tensor]:
    """A fresh adapter, in torchtune's form: outputs of queries and keys are permuted as their weights are."""
    world.fresh_adapter()
    found = {}
    for name, value in world.student.plain.state_dict().items():
        for letter in "AB":
            if f".lora_{letter}." in name:
                key = name.replace(f".lora_{letter}.default", "")
                (new,) = (
                    rules.converted({key: value}, world.shapes["student"], RANK) if letter == "B" else {rules.key(key): value}
                ).items()
                found[new[0].replace(".weight", f".lora_{letter.lower()}.weight")] = new[1].to(world.dtype)
    return found


def twin(model: nn.Module) -> nn.Module:
    """The same parameters in a module of its own, which a trainer may wrap as it likes."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def padded(world: World) -> tuple[list[list[int]], list[dict], int]:
    """The examples of each step, all in order, and how many tokens batches of four take with padding."""
    batch = world.options.batch
    steps = [world.order[k * batch : (k + 1) * batch] for k in range(world.options.steps + 1)]
    rows = [{"input_ids": one["tokens"], "labels": one["labels"]} for one in examples_of(world)[: batch * len(steps)]]
    lengths = world.data.lengths[world.order][: len(rows)]
    return steps, rows, int(lengths.reshape(-1, MICRO).max(1).sum()) * MICRO


def gkd(world: World) -> Round:
    """TRL's trainer on top of transformers', with its own loss; nothing of it is generated."""
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Marking(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.clock = Clock(world.device)

        def on_step_end(self, *_, **__):
            self.clock.mark()

    class Trainer(GKDTrainer):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            told.append(loss.detach())
            return loss

    steps, rows, slots = padded(world)
    world.fresh_adapter()
    told, marking, passes = [], Marking(), world.options.batch // MICRO
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            folder,
            lmbda=0.0,
            beta=0.0,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=passes,
            max_steps=len(steps),
            learning_rate=2e-4,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            use_cpu=world.device.type == "cpu",
            bf16=world.device.type == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=None,
        )
        trainer = Trainer(
            twin(world.student.model),
            twin(world.teacher.model),
            config,
            data_collator=DataCollatorForLanguageModeling(0),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[marking],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return counted(world, marking.clock, steps, passes, slots, kl=float(sum(told[:passes])))


def tokenizer():
    """One that is never asked anything."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def chunked(world: World) -> Round:
    """A step as TRL's DistillationTrainer takes it, on given text: bodies on padded batches, its chunked loss, clipping, AdamW."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    steps, rows, slots = padded(world)
    parameters = list(world.fresh_adapter().values())
    optimizer = torch.optim.AdamW(parameters, 2e-4, weight_decay=0.0, fused=True)
    collator, batch, passes = DataCollatorForLanguageModeling(0), world.options.batch, world.options.batch // MICRO
    student, teacher = decoder_of(world.student.plain), decoder_of(world.teacher.plain)
    weights = [model.plain.get_output_embeddings().weight for model in (world.student, world.teacher)]
    clock, told = Clock(world.device), []
    for k in range(len(steps)):
        micro = [collator(rows[a : a + MICRO]) for a in range(k * batch, (k + 1) * batch, MICRO)]
        count = sum(int((one["labels"][:, 1:] != IGNORE).sum()) for one in micro)
        for one in micro:
            one = {name: value.to(world.device) for name, value in one.items()}
            inputs = {"input_ids": one["input_ids"], "attention_mask": one["attention_mask"], "use_cache": False}
            hidden_BTH = student(**inputs)[0][:, :-1]
            with torch.no_grad():
                taught_BTH = teacher(**inputs)[0][:, :-1]
            loss, *_ = _chunked_divergence_loss(hidden_BTH, taught_BTH, *weights, one["labels"][:, 1:] != IGNORE, 0.0, count)
            loss.backward()
            told.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
    return counted(world, clock, steps, passes, slots, kl=float(sum(told[:passes])))
