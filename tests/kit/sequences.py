"""Small encoder-decoder models with random weights, in folders with the tokenizer of the generated corpus, and rows for them."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

from llmkd.data.reading import skills
from llmkd.data.sequences import SequenceExamples

END, PAD = skills.tokenizer().eos_token_id, 0
V = len(skills.tokenizer())
FAMILIES = ("t5", "t5 untied", "bart", "whisper")


def tiny(family: str, layers: int = 2, seed: int = 0, width: int = 16) -> transformers.PreTrainedModel:
    """In float64, with 3 rows of padding past the tokenizer's entries."""
    torch.manual_seed(seed)
    common = {"vocab_size": V + 3, "d_model": width, "pad_token_id": PAD, "eos_token_id": END}
    if family.startswith("t5"):
        sizes = {"d_kv": 8, "d_ff": 24, "num_layers": layers, "num_decoder_layers": layers, "num_heads": 2, "dropout_rate": 0.0}
        config = transformers.T5Config(**common, **sizes, decoder_start_token_id=PAD, tie_word_embeddings=family == "t5")
        return transformers.T5ForConditionalGeneration(config).double().eval()
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", layers), ("ffn_dim", 24))}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "decoder_start_token_id": 2, "bos_token_id": 2}
    if family == "bart":
        config = transformers.BartConfig(**common, **sizes, max_position_embeddings=128, forced_eos_token_id=None)
        return transformers.BartForConditionalGeneration(config).double().eval()
    frames = {"num_mel_bins": 4, "max_source_positions": 50, "max_target_positions": 48}
    config = transformers.WhisperConfig(**common, **sizes, **frames, begin_suppress_tokens=[5, END], suppress_tokens=None)
    return transformers.WhisperForConditionalGeneration(config).double().eval()


def saved(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    if model.config.model_type != "whisper":
        skills.tokenizer().save_pretrained(folder)
        return folder
    speech_tokenizer().save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=4, chunk_length=1).save_pretrained(folder)
    return folder


def speech_tokenizer() -> transformers.WhisperTokenizer:
    """Of bytes, with Whisper's control tokens."""
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    found = transformers.WhisperTokenizer(vocab={one: i for i, one in enumerate(bytes_)}, merges=[])
    found.add_tokens(["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|nospeech|>", "<|notimestamps|>"], special_tokens=True)
    found.set_prefix_tokens()
    return found


def speech_model() -> transformers.WhisperForConditionalGeneration:
    """A small Whisper with the tokens of `speech_tokenizer`, in float32."""
    reader = speech_tokenizer()
    model = tiny("whisper", 3).float()
    named = {"eos_token_id": reader.eos_token_id, "bos_token_id": reader.eos_token_id, "pad_token_id": reader.eos_token_id}
    named |= {"decoder_start_token_id": reader.convert_tokens_to_ids("<|startoftranscript|>"), "begin_suppress_tokens": None}
    for where in (model.config, model.generation_config):
        for name, value in named.items():
            setattr(where, name, value)
    model.generation_config.no_timestamps_token_id = reader.convert_tokens_to_ids("<|notimestamps|>")
    model.generation_config.is_multilingual = False
    return model


class Frames:
    """Random features of sounds, as `data.inputs.Inputs`."""

    positions = False

    def __init__(self, features: np.ndarray):
        self.features, self.lengths = features, np.full(len(features), 100, np.int64)

    def take(self, chosen):
        return Frames(self.features[chosen])

    def content(self, i: int) -> bytes:
        return self.features[i].tobytes()

    def batch(self, indices, draw):
        return {"input_features": torch.from_numpy(self.features[list(indices)])}


def examples(family: str, prefix: int = 0, count: int = 4) -> SequenceExamples:
    """Sources of several lengths, and targets of 2 to 5 tokens after `prefix` tokens that are given."""
    from llmkd.data.labelled import TextInputs

    rng, start = np.random.default_rng(3), 2 if family in ("bart", "whisper") else PAD
    given = [start, *range(7, 7 + prefix)]
    sequences = [np.array([*given, *rng.integers(10, V, 1 + i % 4), END], np.int32) for i in range(count)]
    masks = [np.arange(len(ids)) >= len(given) for ids in sequences]
    if family == "whisper":
        inputs = Frames(rng.normal(size=(count, 4, 100)))
    else:
        lengths = [3 + 2 * i for i in range(count)]
        inputs = TextInputs(rng.integers(10, V, sum(lengths)).astype(np.int32), np.cumsum([0, *lengths]), None, PAD)
    offsets = np.cumsum([0, *map(len, sequences)])
    flat = np.concatenate(sequences), np.concatenate(masks), offsets, np.arange(count)
    return SequenceExamples(inputs, *flat, [f"text {i}" for i in range(count)], PAD)


def text_rows(folder: Path) -> tuple[Path, Path]:
    rows = [{"prompt": f"what is {a} plus {b} ?", "completion": f"it is {a + b} ."} for a in range(4) for b in range(4)]
    return _written(folder, rows[:10], rows[10:])


def speech_rows(folder: Path) -> tuple[Path, Path]:
    """Clips of 8 kHz, as files next to the rows, and one as long as the extractor reads."""
    import soundfile

    rng, rows, words = np.random.default_rng(0), [], ("zero", "one", "two", "three")
    for i in range(8):
        n = 2000 + 200 * i
        tone = 0.3 * np.sin(np.arange(n) * 0.05 * (1 + i % 4)) + rng.normal(0, 0.02, n)
        soundfile.write(folder / f"{i}.wav", tone.astype(np.float32), 8000)
        rows.append({"audio": f"{i}.wav", "text": words[i % 4]})
    return _written(folder, rows[:5], rows[5:])


def _written(folder: Path, *parts: list[dict]) -> tuple[Path, ...]:
    paths = tuple(folder / name for name in ("train.jsonl", "held.jsonl"))
    for path, rows in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths
