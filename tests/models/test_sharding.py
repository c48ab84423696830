"""Models to be sharded are read as they lie in their files; what the processes then do with them is in training/test_parallel.py."""

import torch

from llmkd.models.pretrained import load_as_stored, load_pretrained
from tests.kit.families import tiny


def test_a_model_that_is_cast_later_is_the_one_that_is_cast_as_it_is_read(tmp_path):
    """Gemma's scale of embeddings is a buffer in the type of the weights: the square root of the width, which bfloat16 rounds."""
    tiny("gemma3_text", torch.bfloat16, hidden_size=40).save_pretrained(tmp_path)
    right = load_pretrained(tmp_path, "student.model", "float32")
    model, types = load_as_stored(tmp_path, "student.model", "float32", "auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and set(types.values()) == {torch.float32}
    for name, p in model.named_parameters():
        p.data = p.data.to(types[name])
    for kind in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(one, kind)()) for one in (right, model))
        assert expected.keys() == found.keys()
        assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in expected.items())
    assert model.config.dtype == right.config.dtype == torch.float32


def test_a_model_of_its_files_type_is_only_read(tmp_path):
    tiny("llama", torch.bfloat16).save_pretrained(tmp_path)
    for dtype in ("auto", "bfloat16"):
        model, types = load_as_stored(tmp_path, "student.model", dtype, "auto")
        assert not types and {p.dtype for p in model.parameters()} == {torch.bfloat16}
