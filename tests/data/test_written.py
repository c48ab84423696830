"""What becomes of a row whose answer a model writes: its prompt is the template's, up to the answer, and behind it stand the model's ids and nothing more."""

import numpy as np
import pytest

from llmkd.config.recipe import Data
from llmkd.data.written import answered, prompts_of
from tests.kit.data import END, PLAIN, encode, rows_of, talk, tiny

#: An empty thought before the last answer, and a word after its end, as templates of reasoning models have it.
THINKS = PLAIN.replace("{{ m.content }}<|im_end|>", "{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>") + "the owl"


@pytest.mark.parametrize("template", [PLAIN, THINKS])
def test_behind_the_templates_prompt_stand_the_models_own_ids_and_nothing(template):
    tokenizer = tiny(template)
    examples = encode(rows_of(talk("u at night", "a the wren"), talk("u q", "a x", "u r", "a y")), "chat", Data(), tokenizer)
    prompts = prompts_of(examples, ["f:1", "f:2"], 8, 64, None)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "owl"] + [tokenizer.convert_tokens_to_ids(END)]
    again = tokenizer("owl", add_special_tokens=False)["input_ids"]
    assert again != letters[:3], "the tokenizer would encode this answer otherwise"
    found = answered(examples, prompts, [0, 0], [letters, letters[:2]])
    thought = "<think></think>" * (template == THINKS)
    begin = f"<|im_start|>user\nat night{END}\n<|im_start|>assistant\n{thought}"
    for i, own in enumerate((letters, letters[:2])):
        ids, mask = found.example(i)
        assert tokenizer.decode(ids[~mask]) == begin and ids.tolist() == [*prompts.ids(examples, [0])[0], *own]
        assert np.flatnonzero(mask).tolist() == list(range(len(ids) - len(own), len(ids))), "the end too, and what is cut off has none"
    of_several = tokenizer.decode(prompts.ids(examples, [1])[0])
    assert of_several.count("assistant") == 1 and not of_several.endswith("y"), "the first answer of several is written"
