"""TRL's ways of a distillation step, on the models and examples of eval/speed/step.py: its GKD trainer, and its chunked loss."""

import copy
import tempfile

import torch
from torch import nn

from llmkd.models.families import decoder_of

from .step_cases import Clock, Round
from .step_examples import MICRO, counted, padded
from .step_world import IGNORE, World


def plain_copy(model: nn.Module) -> nn.Module:
    """The same parameters in a module of its own, which a trainer may wrap as it likes."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


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
            bf16=world.dtype == torch.bfloat16,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=None,
        )
        trainer = Trainer(
            plain_copy(world.student.model),
            plain_copy(world.teacher.model),
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
    student, teacher = decoder_of(world.student.base_model), decoder_of(world.teacher.base_model)
    weights = [model.base_model.get_output_embeddings().weight for model in (world.student, world.teacher)]
    clock, told = Clock(world.device), []
    for k in range(len(steps)):
        micro = [collator(rows[a : a + MICRO]) for a in range(k * batch, (k + 1) * batch, MICRO)]
        count = sum(int((one["labels"][:, 1:] != IGNORE).sum()) for one in micro)
        for one in micro:
            one = {name: value.to(world.device) for name, value in one.items()}
            inputs = {"input_ids": one["input_ids"], "attention_mask": one["attention_mask"], "use_cache": False}
            hidden_BTH = student(**inputs)[0][:, :-1]
            with torch.no_grad():
                teacher_BTH = teacher(**inputs)[0][:, :-1]
            loss, *_ = _chunked_divergence_loss(hidden_BTH, teacher_BTH, *weights, one["labels"][:, 1:] != IGNORE, 0.0, count)
            loss.backward()
            told.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
    return counted(world, clock, steps, passes, slots, kl=float(sum(told[:passes])))
