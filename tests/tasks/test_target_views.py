"""Encoder-decoder students whose teachers read a text: one step by hand, and what is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch.nn import functional as F

from llmkd.config import loader
from llmkd.data.encoding.token_cache import tokenizer_hash
from llmkd.data.encoding.tokenizer import load_tokenizer
from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.kit.by_hand import logged
from tests.kit.processes import assert_one_end, train_on_two
from tests.kit.sequences import saved, speech_model, speech_rows, speech_tokenizer

pytest.importorskip("soundfile")

END = 256  # of speech_tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Clips with transcripts and prompts; Whisper, and BART and GPT-2 with the same bytes as tokens and without Whisper's control tokens."""
    root, rows = tmp_path_factory.mktemp("words"), []
    train, held = speech_rows(root)
    for path in (train, held):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"prompt": f"{'the digit ' * (i % 3)}{row['text'].upper()} is "} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved(speech_model().double(), root / "listens")
    vocab = {one: i for i, one in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    reader = transformers.GPT2Tokenizer(vocab=vocab | {"<|endoftext|>": END}, merges=[])
    torch.manual_seed(3)
    sizes = {
        f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 24), ("attention_heads", 2))
    }
    ends = {"pad_token_id": 0, "eos_token_id": END, "bos_token_id": END}
    bart = transformers.BartConfig(
        vocab_size=END + 1,
        d_model=16,
        **sizes,
        dropout=0.0,
        max_position_embeddings=64,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        **ends,
    )
    transformers.BartForConditionalGeneration(bart).double().save_pretrained(root / "reads")
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt = transformers.GPT2Config(vocab_size=END + 1, n_embd=16, n_layer=1, n_head=2, n_positions=64, **still, **ends)
    transformers.GPT2LMHeadModel(gpt).double().save_pretrained(root / "goes_on")
    for name in ("reads", "goes_on"):
        reader.save_pretrained(root / name)
    return root


def speech(root: Path, name: str, teacher, **changes):
    settings = {
        "output_dir": str(root / name),
        "task": "speech_recognition",
        "student": {"model": str(root / "listens"), "layers": {"decoder": 1}, "method": "full", "dtype": "float64"},
        "teacher": teacher,
        "data": {"train": {"path": str(root / "train.jsonl"), "format": "speech"}, "max_length": 40},
        "loss": {"kd_ratio": 0.6, "temperature": 2.0},
        "train": {"batch_size": 5, "micro_batch_size": 2, "max_steps": 1},
        "validation": {"teacher_check": 0},
    }
    (root / f"{name}.yaml").write_text(json.dumps(settings))
    return loader.load_recipe(root / f"{name}.yaml", {key.replace("__", "."): value for key, value in changes.items()})


def test_a_student_of_speech_with_teachers_that_read_a_prompt(words):
    """0.4 CE + 0.6 T^2 KL at T 2 over the 257 tokens that all have; p is the mean of an encoder-decoder model's and a causal model's distributions."""
    teachers = [{"model": str(words / name), "reads": "prompt"} for name in ("reads", "goes_on")]
    recipe = speech(words, "student", teachers)
    run(recipe)
    prepared = prepare(recipe)
    bart = transformers.BartForConditionalGeneration.from_pretrained(words / "reads").eval()
    gpt = transformers.GPT2LMHeadModel.from_pretrained(words / "goes_on").eval()
    student = transformers.WhisperForConditionalGeneration.from_pretrained(prepared.student.base, dtype=torch.float64)
    rows, losses = [json.loads(line) for line in (words / "train.jsonl").read_text().splitlines()], []
    ids = lambda text: [sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()).index(one) for one in text.replace(" ", "Ġ")]  # noqa: E731
    assert prepared.vocab == END + 1 and prepared.processor.frame.given == (257, 261) and prepared.processor.longest == 48
    known, theirs = prepared.processor.provenance, load_tokenizer(str(words / "reads"), "")
    assert json.loads(known["frame"]) == [[257, [261], END], [END, [], END]]
    assert known["tokenizer"].count(tokenizer_hash(theirs, template=False)) == 2 and known["tokenizer"].count("prompt and target") == 1
    with torch.no_grad():
        for i, row in enumerate(rows):
            target, prompt = [*ids(row["text"]), END], ids(row["prompt"])
            features = prepared.train.inputs.batch([i], None)["input_features"].double()
            z = student(features, decoder_input_ids=torch.tensor([[257, 261, *target[:-1]]])).logits[0, 1:, : END + 1]
            of_bart = bart(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[END, *target[:-1]]])).logits[0]
            of_gpt = gpt(torch.tensor([[*prompt, *target[:-1]]])).logits[0, len(prompt) - 1 :]
            p = ((of_bart / 2).softmax(1) + (of_gpt / 2).softmax(1)) / 2
            kl = (p * (p.log() - (z / 2).log_softmax(1))).sum(1)
            losses.append(0.4 * F.cross_entropy(z, torch.tensor(target), reduction="none") + 0.6 * 4 * kl)
    assert logged(recipe) == pytest.approx([torch.cat(losses).mean().item()], rel=1e-9)


@pytest.mark.slow
def test_two_processes_end_at_what_one_does(words):
    """Of a teacher that reads the clip, and two that read the prompt; of the 5 rows of a step one process has three, in two micro-batches."""
    teachers = [{"model": str(words / name), "reads": "prompt"} for name in ("reads", "goes_on")] + [{"model": str(words / "listens")}]
    held = {"data__validation": {"path": str(words / "held.jsonl"), "format": "speech"}, "train__max_steps": 2}
    run(speech(words, "one", teachers, **held))
    (words / "two.yaml").write_text(loader.dump(speech(words, "two", teachers, **held)))
    done = train_on_two(["--config", str(words / "two.yaml")])
    assert not done.returncode, done.stderr
    assert_one_end(words / "one", words / "two")


def test_of_a_target_that_is_cut_a_teacher_predicts_as_much(words):
    """Of zero, one, two, three and zero with an end 3 tokens are left after the two that are given. Teachers that read alike have one view."""
    reads = {"model": str(words / "reads"), "reads": "prompt"}
    train = prepare(speech(words, "cut", [reads, reads], data__max_length=5, data__too_long="truncate")).train
    batch = train.batch([3])
    view, other = (batch.view_of(f"teacher.{n}.model") for n in (0, 1))
    assert train.num_targets.tolist() == [3] * 5 and len(train.others) == 1 and view is other
    assert view.inputs["decoder_input_ids"][0, 1:].tolist() == train.example(3)[0][2:-1].tolist()


def test_a_prompt_that_is_too_long_with_its_target_is_left_out_and_not_cut(words):
    """With their targets and an end the texts have 13, 21, 31, 15 and 23 bytes; another row has no target."""
    goes_on, rows = {"model": str(words / "goes_on"), "reads": "prompt"}, (words / "train.jsonl").read_text()
    (words / "one_empty.jsonl").write_text(rows + json.dumps(json.loads(rows.splitlines()[0]) | {"text": ""}) + "\n")
    given = {"data__train__path": str(words / "one_empty.jsonl"), "data__max_length": 22, "data__too_long": "truncate"}
    train = prepare(speech(words, "long", goes_on, **given)).train
    assert train.row.tolist() == [0, 1, 3] and (train.counts["too_long"], train.counts["unsupervised"]) == (2, 1)


def test_targets_that_are_not_the_students_are_refused_by_row(words):
    rows = [json.loads(line) for line in (words / "train.jsonl").read_text().splitlines()]
    (words / "empty.jsonl").write_text("".join(json.dumps(row | {"prompt": "" if i == 2 else "a "}) + "\n" for i, row in enumerate(rows)))
    goes_on = {"model": str(words / "goes_on"), "reads": "prompt"}
    empty = {"path": str(words / "empty.jsonl"), "format": "speech"}
    with pytest.raises(UserError, match=r"empty.jsonl:3: the targets of teacher are not the student's: 'w' where the student has 't'"):
        prepare(speech(words, "refused", goes_on, data__train=empty))
    with pytest.raises(UserError, match="teacher.model: found gpt2, which has no encoder and decoder"):
        prepare(speech(words, "refused", {"model": str(words / "goes_on")}))
    shutil.copytree(words / "listens", words / "other_tokens")
    reader = speech_tokenizer()
    reader.add_tokens(["<|more|>"], special_tokens=True)
    reader.save_pretrained(words / "other_tokens")
    with pytest.raises(UserError, match="teacher.model: .* are not the same: .*token ids must mean the same to all models"):
        prepare(speech(words, "refused", {"model": str(words / "other_tokens")}))
    with pytest.raises(UserError, match="rows.jsonl:1: no column 'prompt'|train.jsonl:1: no column 'hint'"):
        prepare(speech(words, "refused", goes_on, data__train__fields={"prompt": "hint"}))
