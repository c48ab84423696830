"""Teacher and student: a model parted into its body and its head; loading them as the recipe says, and saving."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from . import adapters, last_layer, loading, selftest
from .console import say
from .data.tokenizer import save_tokenizer
from .errors import UserError, blamed_on
from .families import beside_text, decoder_of, head_of
from .float8 import refuse_without_products
from .head import Head
from .honing import Asked, hone
from .model_files import RECORD, ModelFiles, find, fingerprint, read_json
from .placing import OFFLOAD, device_of, head_on, offload
from .recipe import Lora, Quantization
from .recipe import Student as StudentSettings
from .recipe import Teacher as TeacherSettings
from .recompute import recompute
from .signals import View


class LanguageModel(nn.Module):
    """A causal language model, with or without an adapter, parted into its body (`hidden`) and its `head`.

    `autocast` is the type in which the body's products are computed, where that is not the weights' own. Several students may be
    adapters on one base, side by side in `model`: then `adapter` is this one's name there, and it is switched to when it is used.
    """

    def __init__(self, model: nn.Module, vocab: int, adapter: str | None = None):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.autocast: torch.dtype | None = None
        self.own_forward = False
        self.varlen = False  # whether packed rows have llmkd's attention
        self.last_layer: last_layer.LastLayer | None = None  # where it is computed at the rows alone
        self.runs_on: torch.device | None = None  # where its inputs go, if that is not where its weights are
        self.untouched: list[str] = []  # trainable parameters that a small batch gave no gradient
        self.fidelity: dict[str, float] = {}  # how far it was moved since it was loaded: see `honing.compare`
        self.head = head_of(self.plain, vocab, adapter)

    def activate(self) -> None:
        """Of several adapters in `model`, this one alone is used, and requires a gradient."""
        if self.adapter and self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter)

    @property
    def plain(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it but without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.runs_on or self.plain.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the unquantised weights are held in."""
        return self.plain.get_input_embeddings().weight.dtype

    def become(self, model: nn.Module) -> None:
        """Go on as another form of the same model, frozen and in eval mode: with its adapter merged, say."""
        self.model = model.requires_grad_(False).eval()
        if not self.own_forward:
            self.head = head_of(self.plain, self.head.vocab)

    def use_own_forward(self) -> None:
        """For a family whose head is not known: what `hidden` gives are the model's own logits, and the head passes them on."""
        self.own_forward = True
        self.head = Head(nn.Identity(), self.head.vocab)

    def hidden(self, view: View) -> Tensor:
        """Last hidden states [N, H] at the view's rows."""
        self.activate()
        autocast = torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None)
        with autocast, last_layer.only_at(self.last_layer, view):
            if self.own_forward:
                return self._logits(view)
            hidden_BTH = decoder_of(self.plain)(**self._inputs(view), use_cache=False)[0]
        return hidden_BTH.flatten(0, 1).index_select(0, view.rows_N)

    def _inputs(self, view: View) -> dict[str, Tensor]:
        return view.inputs | ({"attention_mask": view.packed.mask()} if view.packed and self.varlen else {})

    def _logits(self, view: View) -> Tensor:
        """The model's own logits [N, V] at the view's rows; of the other positions no more than those in the same column."""
        T = view.inputs["input_ids"].shape[1]
        columns, wanted = (view.rows_N % T).unique(return_inverse=True)
        if "logits_to_keep" not in inspect.signature(self.plain.forward).parameters or not len(columns):
            return self.plain(**self._inputs(view), use_cache=False).logits.flatten(0, 1).index_select(0, view.rows_N)
        logits_BCV = self.plain(**self._inputs(view), use_cache=False, logits_to_keep=columns).logits
        return logits_BCV.flatten(0, 1).index_select(0, view.rows_N // T * len(columns) + wanted)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, by the names that it has where the student is alone."""
        self.activate()
        own = re.compile(rf"\.{self.adapter}(?=\.|$)")
        return {own.sub(".default", name): p for name, p in self.model.named_parameters() if p.requires_grad}


def load_teacher(
    settings: TeacherSettings,
    vocab: int,
    device,
    packing: int = 0,
    setting: str = "teacher",
    files: ModelFiles | None = None,
    base: nn.Module | None = None,
    asked: Asked | None = None,
) -> LanguageModel:
    """The teacher, frozen and in eval mode. A model, or an adapter on its base, merged or not.

    device        where the student is, and where the head of a teacher that is held elsewhere (`settings.device`) is too
    packing       packed rows of so many tokens must be safe
    files, base   what was found and loaded already
    asked         some of what it will be asked, by its setting: where it is not used as it was loaded, it is said how far that moves it
    """
    name, held = f"{setting}.model", device_of(setting, settings.device, device)
    files = files or find(settings.model, name, settings.revision, settings.base)
    if settings.float8:
        refuse_without_products(held, setting)
    model = base or loading.base(files.base, name, settings.dtype, settings.attention, held, settings.loaded_in)
    if files.adapter:
        note_quantization(files, settings.loaded_in, setting)
        model = adapters.load(model, files, name).to(held)
    teacher = LanguageModel(model, _fits(model, vocab, name))
    teacher.requires_grad_(False).eval()
    if settings.device == OFFLOAD:
        teacher.head, teacher.runs_on = head_on(teacher.head, torch.device(device)), torch.device(device)
        offload(teacher.plain, device)
    selftest.check(teacher, name, packing, settings.attention)
    if settings.honed:
        hone(teacher, settings, files, setting, asked)
        last_layer.spare(teacher, selftest.tolerance(teacher))  # which has other modules now
    if settings.device not in (None, OFFLOAD):
        teacher.head = head_on(teacher.head, torch.device(device))
    return teacher


def load_student(settings: StudentSettings, vocab: int, device, seed: int, packing: int = 0) -> LanguageModel:
    """The student in training mode; exactly what `method` names requires a gradient. `packing`: packed rows of so many tokens must be safe."""
    return load_students([settings], vocab, device, seed, packing)[0]


def load_students(
    many: list[StudentSettings],
    vocab: int,
    device,
    seed: int,
    packing: int = 0,
    found: list[ModelFiles] | None = None,
    base: nn.Module | None = None,
) -> list[LanguageModel]:
    """Students that differ in their adapters only, on one base in memory: each as it would be alone. One may be of any method.

    found, base   what was found of each and loaded already
    """
    settings = many[0]
    found = found or [find(one.model, "student.model", one.revision, one.base) for one in many if one.model]
    torch.manual_seed(seed)
    if found:
        model = base or loading.base(found[0].base, "student.model", settings.dtype, settings.attention, device, settings.quantization)
    else:
        model = loading.new_model(settings, vocab).to(device)
    if settings.method == "full":
        _check_full(model, found[0] if found else None)
        for parameter in beside_text(model):
            parameter.requires_grad_(False)
    if settings.gradient_checkpointing:
        recompute(model, settings.gradient_checkpointing)
    if settings.mixed_precision == "bf16" and next(model.parameters()).dtype != torch.float32:
        say("note: student.mixed_precision: bf16 is for weights held in float32; these are not, and it changes little or nothing")
    names: list[str | None] = [None]
    if settings.method == "lora":
        model.requires_grad_(False)
        names = [f"arm{k}" for k in range(len(many))] if len(many) > 1 else ["default"]
        model = _adapted(model, found, many, names, seed).to(device)
    students = [LanguageModel(model, _fits(model, vocab, "student.model"), name) for name in names]
    for k, (student, own) in enumerate(zip(students, many, strict=True)):
        with blamed_on(k):
            _ready(student, own, packing)
    return students


def _adapted(model: nn.Module, found: list[ModelFiles], many: list[StudentSettings], names: list[str], seed: int) -> nn.Module:
    """One adapter after the other, each from the same seed. Those of all-linear come first: it means the layers of the bare base."""
    order = sorted(range(len(many)), key=lambda k: (found[k].adapter is not None, (many[k].lora or Lora()).target_modules != "all-linear"))
    for k in order:
        torch.manual_seed(seed)
        with blamed_on(k):
            model = (_kept_adapter if found[k].adapter else _fresh_adapter)(model, found[k], many[k], names[k])
    if len(many) > 1:
        model.set_adapter(names[0])
    return model


def _ready(student: LanguageModel, settings: StudentSettings, packing: int) -> None:
    student.autocast = torch.bfloat16 if settings.mixed_precision == "bf16" else None
    selftest.check(student.train(), "student.model", packing, settings.attention)
    _check_narrow(student, settings)
    student.untouched = selftest.untouched(student, "student.model")
    if student.untouched:
        some = f"{len(student.untouched)} of {len(student.trainable())} trainable tensors, such as {student.untouched[0]}"
        say(f"note: student: {some}, get no gradient from a small batch; they are never used, or seldom")


def _check_full(model: nn.Module, files: ModelFiles | None) -> None:
    if files and files.adapter:
        raise UserError(
            f"student.method: found full, and {files.adapter} is an adapter; merge it first (llmkd export), or go on with method: lora"
        )
    if getattr(model, "is_quantized", False):
        raise UserError(f"student.method: found full, and {files.base} is quantised; quantised weights cannot be trained, use method: lora")
    dtype = next(model.parameters()).dtype
    if dtype == torch.float16:
        raise UserError("student.dtype: float16 weights cannot be trained in full; set float32, with mixed_precision: bf16 for speed")
    if dtype == torch.bfloat16:
        say("note: bfloat16 weights lose updates below 1/256 of a weight; dtype: float32 with mixed_precision: bf16 keeps them")


def _check_narrow(student: LanguageModel, settings: StudentSettings) -> None:
    """LoRA's own matrices are in float32 at least; copies of modules and biases are in the base's type, and train in it."""
    narrow = {name: p.dtype for name, p in student.trainable().items() if p.dtype in (torch.bfloat16, torch.float16)}
    if settings.method == "full" or not narrow:
        return
    some = f"{len(narrow)} tensors, such as {min(narrow)}"
    if torch.float16 in narrow.values():
        raise UserError(f"student.dtype: {some}, would train in float16; set student.dtype: float32, with mixed_precision: bf16 for speed")
    say(f"note: student: {some}, train in bfloat16 and lose updates below 1/256 of a weight; student.dtype: float32 keeps them")


def _fresh_adapter(model: nn.Module, files: ModelFiles, settings: StudentSettings, name: str) -> nn.Module:
    adapted = adapters.fresh(model, settings.lora or Lora(), settings.revision, name)
    path = Path(settings.model)
    adapted.peft_config[name].base_model_name_or_path = str(path.resolve()) if path.is_dir() else settings.model
    return adapted


def _kept_adapter(model: nn.Module, files: ModelFiles, settings: StudentSettings, name: str) -> nn.Module:
    """An adapter that exists is trained on, with its own rank and modules; a recipe that says otherwise is refused."""
    config = read_json(files.adapter / "adapter_config.json", "student.model")
    if config.get("peft_type") != "LORA":
        raise UserError(f"student.model: {settings.model} is an adapter of type {config.get('peft_type')}; only LORA can be trained on")
    _refuse_other_settings(settings, config)
    note_quantization(files, settings.quantization, "student")
    adapted = adapters.load(model, files, "student.model", trainable=True, name=name)
    if settings.base:
        adapted.peft_config[name].base_model_name_or_path = str(files.base.resolve())
    say(f"student: going on with the adapter {settings.model} (rank {config.get('r')}, alpha {config.get('lora_alpha')})")
    return adapted


def _refuse_other_settings(settings: StudentSettings, config: dict) -> None:
    """An adapter keeps its own shape, so a recipe that gives it another one is refused; what was set first, then defaults."""
    lora, default = settings.lora, Lora()
    if lora is None or (lora == default and not Path(settings.model).is_dir()):  # a hub id's defaults were written out unasked
        return
    own = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save") or (),
        "rslora": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
    }
    for name in sorted(own, key=lambda name: getattr(lora, name) == getattr(default, name)):
        here, there = getattr(lora, name), own[name]
        if name == "target_modules" and here == default.target_modules:
            continue
        same = set(here) == set(there) if isinstance(here, tuple) and isinstance(there, list | tuple) else here == there
        if there is not None and not same:
            raise UserError(
                f"student.lora.{name}: found {here}, and the adapter {settings.model} has {there}; leave student.lora out to train it on"
            )


def note_quantization(files: ModelFiles, now: Quantization | None, who: str) -> None:
    """An adapter fits the base it was trained on, errors of its quantisation included."""
    then, now = record_of(files.adapter).get("quantization", now), now and now.type
    then = then["type"] if isinstance(then, dict) else then and then.type
    if then != now:
        was, now = then or "an unquantised base", now or "an unquantised one"
        say(f"note: {who}.quantization: the adapter {files.adapter} was trained on {was}, and is used on {now}")


def as_trained(folder: Path, base: Path | None = None) -> TeacherSettings:
    """A student, to be loaded for measuring it: an adapter on its base in the type and quantisation it was trained on."""
    record = record_of(folder)
    quantization = record.get("quantization")
    return TeacherSettings(
        model=str(folder),
        base=base and str(base),
        dtype=record.get("dtype", "auto"),
        quantization=quantization and Quantization(**quantization),
    )


def record_of(adapter: Path) -> dict:
    """What llmkd left beside an adapter that it trained: base_fingerprint, dtype, quantization. Empty for others'."""
    return read_json(adapter / RECORD, "model") if (adapter / RECORD).exists() else {}


def student_folder(run: str | Path) -> Path:
    """Where a finished run keeps its student: `adapter` or `model`."""
    for name in ("adapter", "model"):
        if (Path(run) / name).is_dir():
            return Path(run) / name
    raise UserError(f"{run}: holds neither adapter nor model; is the run finished?")


def save(model: LanguageModel, tokenizer, folder: Path, settings: StudentSettings) -> None:
    """The student in Hugging Face's form: an adapter (PEFT) or a whole model, with tokenizer and generation config.

    Beside an adapter stands what it was trained on: which base, and how that was held (`as_trained` reads it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model.model, "peft_config"):
        adapters.save(model.model, folder, model.adapter or "default")
        if model.plain.generation_config is not None:
            model.plain.generation_config.save_pretrained(folder)
        base = Path(model.plain.config._name_or_path)
        record = {
            "base_fingerprint": fingerprint(base, "student.model"),
            "dtype": settings.dtype,
            "quantization": settings.quantization and dataclasses.asdict(settings.quantization),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    else:
        model.model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def _fits(model: nn.Module, vocab: int, setting: str) -> int:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab:
        raise UserError(f"{setting}: the tokenizer has {vocab} entries and the model's embedding {rows}; they do not belong together")
    return vocab
