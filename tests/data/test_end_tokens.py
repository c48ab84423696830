"""The end tokens that training teaches are those that close what is supervised, whatever wrote them and wherever a cut falls."""

import numpy as np
import pytest

from llmkd.config.recipe import Data
from llmkd.data.encoding.end_tokens import end_tokens, report_end_tokens
from llmkd.data.examples import TokenExamples
from tests.kit.data import END, FORGETS, PLAIN, encode, rows_of, talk, tiny

OTHER = "<|im_start|>"
#: The thought is closed by the token that closes other turns, the answer by another one.
CHANNELS = (
    "{% for m in messages %}{{ m.role }}\n{% if m.thinking %}{{ m.thinking }}<|im_end|>{% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}<|im_start|>{% else %}<|im_end|>{% endif %}\n{% endfor %}"
)
#: A turn that calls a tool ends otherwise than an answer.
CALLS = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}call{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}<|im_start|>"
    "{% else %}<|im_end|>{% endif %}{% endfor %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "x", "arguments": {"a": "b"}}}]}


def names(examples, data, tokenizer) -> list[str]:
    return tokenizer.convert_ids_to_tokens(sorted(end_tokens(examples, data, tokenizer)))


@pytest.mark.parametrize("template", [PLAIN, FORGETS])
@pytest.mark.parametrize("data", [Data(), Data(train_on_input=True), Data(max_length=64, too_long="truncate")])
def test_of_a_chat_it_is_the_templates_token_and_not_the_tokenizers(template, data):
    tokenizer = type(tiny())(tokenizer_object=tiny().backend_tokenizer, eos_token="<|pad|>", chat_template=template)
    rows = rows_of(talk("u q", "a yes", "u r", "a no"), talk("u q", "a yes", "u trailing"))
    assert names(encode(rows, "chat", data, tokenizer), data, tokenizer) == [END]


def test_of_plain_text_it_is_the_tokenizers():
    rows = rows_of({"prompt": "a", "completion": " b<|im_start|>"})
    assert names(encode(rows, "prompt_completion", Data(), tiny()), Data(), tiny()) == [END]


def test_a_token_inside_what_is_supervised_ends_nothing_and_a_call_has_an_end_of_its_own():
    thinks = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "thinking": "hm", "content": "a"}]}
    assert names(encode(rows_of(thinks), "chat", Data(), tiny(CHANNELS)), Data(), tiny(CHANNELS)) == [OTHER]
    calls = {"messages": [*talk("u q")["messages"], CALL, {"role": "tool", "content": "r"}, *talk("a yes")["messages"]]}
    assert names(encode(rows_of(calls), "chat", Data(), tiny(CALLS)), Data(), tiny(CALLS)) == [OTHER, END]


def by_hand(*examples: str) -> TokenExamples:
    """Examples from tokens by their letters: p pad, s start, e end, others a word; in upper case they are supervised."""
    ids = {"p": 0, "s": 1, "e": 2}
    letters, offsets = "".join(examples), np.cumsum([0, *map(len, examples)])
    return TokenExamples(
        np.array([ids.get(c.lower(), 70) for c in letters], np.int32),
        np.array([c.isupper() for c in letters]),
        offsets,
        np.arange(len(examples)),
    )


@pytest.mark.parametrize(
    ("examples", "ends"),
    [
        (["wWE", "wWwWE"], {2}),
        (["wWwW"], set()),
        (["wWEWS", "wWE"], {1}),
        (["wWEE"], {2}),
        (["wWEeeWS"], {1, 2}),
        (["wWwwwwwE", "wS"], {1}),
    ],
)
def test_ends_by_hand(examples, ends):
    assert end_tokens(by_hand(*examples), Data(max_length=8, too_long="truncate"), tiny()) == ends


def test_an_example_that_is_cut_teaches_no_end():
    data = Data(max_length=8, too_long="truncate")
    found = end_tokens(encode(rows_of({"text": f"the owl {END} " * 4}), "text", data, tiny()), data, tiny())
    assert found == set()
    whole = encode(rows_of({"text": "the owl"}), "text", data, tiny())
    assert end_tokens(whole, data, tiny()) == {tiny().eos_token_id}


@pytest.mark.parametrize(
    ("ends", "settings", "line"),
    [
        ({2}, {"eos_token_id": 2}, "answers end with '<|im_end|>' (2), at which the saved student's generation stops"),
        (
            {1, 2},
            {"eos_token_id": [0, 1]},
            "answers end with '<|im_start|>' (1) or '<|im_end|>' (2), at which the saved student's generation stops; that of the model "
            "it is trained from stops at '<|pad|>' (0) and '<|im_start|>' (1)",
        ),
        (
            {2},
            {},
            "answers end with '<|im_end|>' (2), at which the saved student's generation stops; that of the model it is trained from stops at no token",
        ),
        (
            {2},
            {"eos_token_id": [-1, 9999]},
            "answers end with '<|im_end|>' (2), at which the saved student's generation stops; that of the model it is trained from stops at no "
            "token of the tokenizer (-1) and no token of the tokenizer (9999)",
        ),
        (set(), {"eos_token_id": 2}, "note: no example is supervised up to an end token, so the student does not learn to stop"),
    ],
)
def test_one_line_says_where_the_student_stops(capsys, ends, settings, line):
    report_end_tokens(ends, settings, tiny())
    assert capsys.readouterr().err == line + "\n"
