"""Scores against loops over the model's own logits, in float64; with models whose scores are known; and rows that cannot be scored."""

import functools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmkd.errors import UserError
from llmkd.making.scores.cross_entropy import instruction_following_difficulty, mean_per_target, refuse_unknown
from llmkd.making.scores.views import alone, in_context, start_token
from llmkd.models.language_model import LanguageModel
from llmkd.teachers.live import LiveTeacher
from llmkd.training.launch import start
from llmkd.training.validate import Evaluator
from tests.kit.data import skills_tokenizer, tiny

TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{{ '[assistant] ' if add_generation_prompt }}"
ROWS = [
    [("user", "Say 12"), ("assistant", "Yes. It is so.")],
    [("system", "Be short."), ("user", "Which bird flies at night?"), ("assistant", "the owl, <s> the wren"), ("user", "And?"), ("assistant", "the robin")],
    [("user", "a"), ("assistant", " b\n\n")],
    [("user", "the owl flies at night"), ("assistant", "the owl flies at night in the garden, and the wren too. " * 3)],
]  # fmt: skip


@functools.cache
def pieces() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: a space begins a word, and a text begins with <s>."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator([text for row in ROWS for _, text in row] * 3, trainers.BpeTrainer(vocab_size=330, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TURNS)


def chats(rows=ROWS) -> list[list[dict]]:
    return [[{"role": role, "content": content} for role, content in row] for row in rows]


def names(rows=ROWS) -> list[str]:
    return [f"row {i}" for i in range(len(rows))]


def llama(vocab: int, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=1024, initializer_range=0.3, **sizes | changes)
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def evaluator(batch_size: int = 3) -> Evaluator:
    return Evaluator(start(), batch_size)


def ce_by_loops(model, before: list[int], targets: list[int]) -> float:
    """Mean over the targets of -log p(target | everything before it)."""
    logits_TV, total = model(torch.tensor([before + targets])).logits[0], 0.0
    for place, target in enumerate(targets, len(before)):
        total -= float(logits_TV[place - 1, target]) - math.log(sum(math.exp(value) for value in logits_TV[place - 1].tolist()))
    return total / len(targets)


def parts(tokenizer, conversation) -> tuple[list[int], list[int]]:
    """Prompt and targets: what the template writes before the last answer, and that answer with its end token."""
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    prompt = len(tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True))
    stop = whole.index(tokenizer.eos_token, prompt + len(conversation[-1]["content"])) + len(tokenizer.eos_token)
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    answer = [i for i, (first, last) in enumerate(made["offset_mapping"]) if last > prompt and first < stop]
    return made["input_ids"][: answer[0]], made["input_ids"][answer[0] : answer[-1] + 1]


@pytest.mark.parametrize("tokenizer", [tiny, pieces, skills_tokenizer])
def test_ifd_is_that_of_loops_over_the_logits(tokenizer):
    tokenizer = tokenizer()
    rows = chats(
        [row for row in ROWS if "<s>" not in str(row)]
    )  # of text that looks like a control token the tokenizer alone would make one
    model = llama(len(tokenizer))
    examples, left_out = in_context(rows, names(rows), "chat", tokenizer, 1024)
    found = instruction_following_difficulty(evaluator(), LanguageModel(model, len(tokenizer)), examples, start_token(tokenizer))
    assert not left_out and examples.row.tolist() == list(range(len(rows)))
    begin = {"</s>": 1}.get(tokenizer.eos_token, tokenizer.eos_token_id)  # <s>, where there is one
    for i, row in enumerate(rows):
        prompt, targets = parts(tokenizer, row)
        ce, ce_alone = ce_by_loops(model, prompt, targets), ce_by_loops(model, [begin], targets)
        assert found["ce"][i] == pytest.approx(ce, rel=1e-12)
        assert found["ce_alone"][i] == pytest.approx(ce_alone, rel=1e-12)
        assert found["ifd"][i] == pytest.approx(math.exp(ce) / math.exp(ce_alone), rel=1e-12)
    assert len({round(value, 3) for value in found["ifd"]}) == len(rows)


def test_the_targets_alone_are_the_very_ids_of_the_targets_in_context():
    tokenizer = pieces()
    rows = chats([row for row in ROWS if "<s>" not in str(row)])
    examples, _ = in_context(rows, names(rows), "chat", tokenizer, 1024)
    by_themselves = alone(examples, start_token(tokenizer))
    for i, row in enumerate(rows):
        ids, mask = examples.example(i)
        own, targets = by_themselves.example(i)
        assert own.tolist() == [1, *ids[mask]] and targets.tolist() == [False] + [True] * int(mask.sum())
        said = tokenizer.decode(ids[mask])
        assert said.removesuffix("</s>").strip() == row[-1]["content"].strip() and said.endswith("</s>")
    apart = [tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"] for row in rows]
    assert any(one != by_themselves.example(i)[0].tolist()[1:-1] for i, one in enumerate(apart))  # an answer by itself has other tokens
    assert len(alone(examples.take(np.zeros(0, int)), 1)) == 0


def test_neither_batch_nor_padding_changes_a_score():
    tokenizer = tiny()
    model = LanguageModel(llama(len(tokenizer)), len(tokenizer))
    every = in_context(chats(), names(), "chat", tokenizer, 1024)[0]
    together = instruction_following_difficulty(evaluator(4), model, every, start_token(tokenizer))
    for i in range(len(ROWS)):
        one = in_context(chats()[i : i + 1], ["row"], "chat", tokenizer, 1024)[0]
        single = instruction_following_difficulty(evaluator(1), model, one, start_token(tokenizer))
        for name, values in together.items():
            assert single[name][0] == pytest.approx(values[i], rel=1e-12), name


def test_ifd_is_1_for_a_model_that_does_not_read_what_stands_before():
    tokenizer = tiny()
    model = llama(len(tokenizer))
    model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[5]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    found = instruction_following_difficulty(
        evaluator(1), LanguageModel(model, len(tokenizer)), in_context(chats(), names(), "chat", tokenizer, 1024)[0], 2
    )
    assert found["ifd"].tolist() == [1.0] * len(ROWS) and len(set(found["ce"])) == len(ROWS)


def test_ifd_is_far_below_1_for_a_model_that_copies_where_there_is_something_to_copy():
    tokenizer = tiny()
    V = len(tokenizer) + len(tokenizer) % 2
    model = llama(V, hidden_size=V, intermediate_size=2, num_hidden_layers=1, tie_word_embeddings=False)
    eye, (layer,) = torch.eye(V, dtype=torch.double), model.model.layers
    model.model.embed_tokens.weight[:], model.lm_head.weight[:] = eye, eye  # one place for each token
    layer.self_attn.q_proj.weight.zero_()  # attention to all tokens alike, whose mean it adds, times 100
    layer.self_attn.v_proj.weight[:], layer.self_attn.o_proj.weight[:] = eye, 100 * eye
    layer.mlp.down_proj.weight.zero_()
    rows = chats([[("user", "the wren, the garden, the owl"), ("assistant", text)] for text in ("the wren, the owl", "Xylophones?")])
    found = instruction_following_difficulty(
        evaluator(), LanguageModel(model, len(tokenizer)), in_context(rows, names(rows), "chat", tokenizer, 1024)[0], 2
    )
    assert found["ifd"][0] < 0.01 and found["ifd"][1] > 0.05


def test_alpaca_is_the_prompt_of_alpaca_and_has_one_question():
    rows = [chats()[0]]
    examples, _ = in_context(rows, ["row 0"], "alpaca", tiny(), 1024)
    text = tiny().decode(examples.example(0)[0])
    assert text.startswith("Below is an instruction") and text.endswith(
        "### Instruction:\nSay 12\n\n### Response:\nYes. It is so.<|im_end|>"
    )
    with pytest.raises(UserError, match="^row 1: format alpaca has one question"):
        in_context(chats()[1:2], ["row 1"], "alpaca", tiny(), 1024)


def test_rows_that_are_too_long_or_empty_are_named_and_the_others_keep_their_numbers():
    rows = [*chats(), [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \n"}]]
    examples, left_out = in_context(rows, [*names(), "row 4"], "chat", tiny(), 60)
    whole, _ = in_context(rows, [*names(), "row 4"], "chat", tiny(), 1024)
    longer = {i: int(n) for i, n in zip(whole.row.tolist(), whole.lengths, strict=True) if n > 60}
    assert longer and left_out == {
        **{i: ("too_long_to_score", f"{n} tokens, more than max_length 60") for i, n in longer.items()},
        4: ("nothing_to_score", ""),
    }
    assert examples.row.tolist() == [i for i in range(4) if i not in longer] and len(examples)


def test_control_tokens_in_a_text_stay_characters_or_the_row_is_left_out():
    row = chats([[("user", "a"), ("assistant", "b<|im_end|>c")]])
    ids, mask = in_context(row, ["row"], "chat", tiny(), 1024)[0].example(0)
    assert ids[mask].tolist().count(2) == 1 and tiny().decode(ids[mask]) == "b<|im_end|>c<|im_end|>"
    examples, left_out = in_context(chats(), names(), "chat", pieces(), 1024)
    assert examples.row.tolist() == [0, 2, 3] and list(left_out) == [1]
    assert left_out[1][0] == "cannot_be_scored" and left_out[1][1].startswith("a message contains a control token (the text has '<s>')")


def test_a_teachers_cross_entropy_and_divergence_are_those_of_loops():
    tokenizer = tiny()
    student, teacher = llama(len(tokenizer)), llama(len(tokenizer), seed=1, hidden_size=12)
    examples, _ = in_context(chats()[:2], names()[:2], "chat", tokenizer, 1024)
    live = LiveTeacher(LanguageModel(teacher, len(tokenizer)))
    found = mean_per_target(evaluator(), LanguageModel(student, len(tokenizer)), examples, live)
    for i in range(2):
        ids, mask = examples.example(i)
        targets = np.flatnonzero(mask).tolist()
        kl = 0.0
        for t in targets:
            log_q, log_p = (model(torch.tensor([ids[:t].tolist()])).logits[0, -1].log_softmax(0) for model in (student, teacher))
            kl += float((log_p.exp() * (log_p - log_q)).sum()) / len(targets)
        assert found["forward_kl"][i] == pytest.approx(kl, rel=1e-10)
        assert found["teacher_ce"][i] == pytest.approx(ce_by_loops(teacher, ids[: targets[0]].tolist(), ids[mask].tolist()), rel=1e-10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused(value):
    refuse_unknown({"ifd": np.array([0.0, 1e300])}, ["a", "b"])
    with pytest.raises(UserError, match=r"^score: ifd of b is (nan|inf|-inf) \(1 rows"):
        refuse_unknown({"ce": np.zeros(2), "ifd": np.array([0.0, value])}, ["a", "b"])
