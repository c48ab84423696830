"""TRL's ways of a distillation step, on the models and examples of eval/speed/step.py: its GKD trainer, and its chunked loss."""

import copy
import tempfile

import torch
from torch import nn

from llmkd.models.families import decoder_of

from .step_cases import Clock, Measurement
from .step_examples import MICRO, counted, padded
from .step_setup import IGNORE, Setup


def plain_copy(model: nn.Module) -> nn.Module:
    """The same parameters in a module of its own, which a trainer may wrap as it likes."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def gkd(setup: Setup) -> Measurement:
    """TRL's trainer on top of transformers', with its own loss; nothing of it is generated."""
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Marking(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.clock = Clock(setup.device)

        def on_step_end(self, *_, **__):
            self.clock.mark()

    class Trainer(GKDTrainer):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            told.append(loss.detach())
            return loss

    steps, rows, slots = padded(setup)
    setup.fresh_adapter()
    told, marking, passes = [], Marking(), setup.options.batch // MICRO
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
            use_cpu=setup.device.type == "cpu",
            bf16=setup.dtype == torch.bfloat16,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=None,
        )
        trainer = Trainer(
            plain_copy(setup.student.model),
            plain_copy(setup.teacher.model),
            config,
            data_collator=DataCollatorForLanguageModeling(0),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[marking],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return counted(setup, marking.clock, steps, passes, slots, kl=float(sum(told[:passes])))


def tokenizer():
    """One that is never asked anything."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def chunked(setup: Setup) -> Measurement:
    """A step as TRL's DistillationTrainer takes it, on given text: bodies on padded batches, its chunked loss, clipping, AdamW."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    steps, rows, slots = padded(setup)
    parameters = list(setup.fresh_adapter().values())
    optimizer = torch.optim.AdamW(parameters, 2e-4, weight_decay=0.0, fused=True)
    collator, batch, passes = DataCollatorForLanguageModeling(0), setup.options.batch, setup.options.batch // MICRO
    student, teacher = decoder_of(setup.student.base_model), decoder_of(setup.teacher.base_model)
    weights = [model.base_model.get_output_embeddings().weight for model in (setup.student, setup.teacher)]
    clock, told = Clock(setup.device), []
    for k in range(len(steps)):
        micro = [collator(rows[a : a + MICRO]) for a in range(k * batch, (k + 1) * batch, MICRO)]
        count = sum(int((one["labels"][:, 1:] != IGNORE).sum()) for one in micro)
        for one in micro:
            one = {name: value.to(setup.device) for name, value in one.items()}
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
    return counted(setup, clock, steps, passes, slots, kl=float(sum(told[:passes])))
