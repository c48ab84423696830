"""Python for the model card that loads a trained model or adapter and uses it once."""

from ..config.recipe import Quantization, Student
from ..model_folder.files import ModelFiles, hub_origin, loaded_dtype

#: The names of transformers' pipelines for decoders and, on the hub, for encoder-decoders: transformers itself has no longer a pipeline for these.
GENERATION = "text-generation"
TEXT_TO_TEXT = "text2text-generation"

#: An example input for each of the other pipelines.
INPUTS = {
    "text-classification": "A text in the form of the training data.",
    "audio-classification": "clip.wav",
    "image-classification": "picture.png",
    "automatic-speech-recognition": "clip.wav",
}

_GENERATE = """
inputs = tokenizer("Write the prompt in the format of the training data.", return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""

#: `pretrained.load_pretrained` does the same.
_NO_REPACKING = (
    "for module in base.modules():  # else bitsandbytes may repack weights on a CPU into a form that supports neither DoRA nor gradients\n"
    "    if hasattr(module, 'support_avx512bf16_for_cpu'):\n"
    "        module.support_avx512bf16_for_cpu = False\n"
)


def usage_snippet(settings: Student, student: ModelFiles | None, place: str, pipeline: str = GENERATION) -> str:
    """Python that loads the student as it was trained.

    student    the files that it was trained from; None for new weights
    place      its folder, or its id on the hub
    pipeline   the name of transformers' pipeline that uses the model
    """
    here = f"{place!r}  # this folder, or its id on the hub"
    if pipeline == TEXT_TO_TEXT:
        return _text_to_text_snippet(here)
    if pipeline != GENERATION:
        return _pipeline_snippet(here, pipeline)
    return _adapter_snippet(here, settings, student) if settings.method == "lora" else full_model_snippet(here)


def full_model_snippet(here: str) -> str:
    """Python that loads a decoder with all of its weights and generates. `here`: its folder or id, as Python."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"here = {here}\n"
        'model = AutoModelForCausalLM.from_pretrained(here, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(here)\n" + _GENERATE
    )


def _adapter_snippet(here: str, settings: Student, student: ModelFiles) -> str:
    """Python that loads a LoRA adapter on its base, quantised as it was in training, and generates."""
    origin, quantization, dtype = hub_origin(student.base), settings.quantization, settings.dtype
    arguments = [repr(origin[0] if origin else str(student.base))] + ([f"revision={origin[1]!r}"] if origin else []) + [f"dtype={dtype!r}"]
    if quantization:
        arguments.append(f"quantization_config={_bitsandbytes_config(quantization, dtype, student.config)}")
    more = ", BitsAndBytesConfig" if quantization else ""
    return (
        "from peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig{more}\n\n"
        f"here = {here}\n"
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})\n"
        f"{_NO_REPACKING if quantization and quantization.type != 'int8' else ''}"
        "model = PeftModel.from_pretrained(base, here)\n"
        "model.generation_config = GenerationConfig.from_pretrained(here)  # it stops where answers end\n"
        "tokenizer = AutoTokenizer.from_pretrained(here)\n" + _GENERATE
    )


def _text_to_text_snippet(here: str) -> str:
    """Python that loads an encoder-decoder for text and generates."""
    return (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
        f"here = {here}\n"
        "model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(here), AutoTokenizer.from_pretrained(here)\n"
        'inputs = tokenizer("A text in the form of the training data.", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
    )


def _pipeline_snippet(here: str, pipeline: str) -> str:
    """Python that uses the model by transformers' pipeline for its task."""
    read = INPUTS.get(pipeline, "FILE")
    return f"from transformers import pipeline\n\nhere = {here}\nmodel = pipeline({pipeline!r}, model=here)\nprint(model({read!r}))"


def _bitsandbytes_config(q: Quantization, dtype: str, config: dict) -> str:
    """A quantisation setting as the Python of a BitsAndBytesConfig. `config`: the base's config.json, for the type of an `auto` dtype."""
    if q.type == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    compute = loaded_dtype(config, dtype) if q.compute_dtype == "auto" else q.compute_dtype
    return (
        f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={q.type!r}, "
        f"bnb_4bit_use_double_quant={q.double_quant}, bnb_4bit_compute_dtype={compute!r})"
    )
