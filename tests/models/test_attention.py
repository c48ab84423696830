"""Attention of packed rows (segments, sliding windows, shared prefixes) against transformers' own on rows apart."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmkd.batch import PackedLayout
from llmkd.data.collate import collate, select_examples
from llmkd.data.examples import TokenExamples
from llmkd.data.shared_prefixes import SHORTEST, shared_prefixes
from llmkd.errors import UserError
from llmkd.models import attention, startup_checks
from llmkd.models.language_model import Capabilities, LanguageModel
from llmkd.models.load import checked
from tests.conftest import distance
from tests.kit.families import tiny

STILL = {"attention_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def examples(beginnings=((), range(40, 52), (7, *range(40, 60))), each=3, answer=(1, 9)) -> TokenExamples:
    """So many of each beginning, mixed; the last tokens are supervised."""
    rng = np.random.default_rng(0)
    ids, marks = [], []
    for _, start in itertools.product(range(each), beginnings):
        own, said = rng.integers(0, 90, rng.integers(1, 12)), rng.integers(0, 90, rng.integers(*answer))
        ids.append(np.array([3, *start, *own, *said], np.int32))
        marks.append(np.arange(len(ids[-1])) >= len(ids[-1]) - len(said))
    offsets = np.cumsum([0, *map(len, ids)])
    return TokenExamples(np.concatenate(ids), np.concatenate(marks), offsets, np.arange(len(ids)))


def model_of(family: str, checkpointing: bool = False, **changes) -> LanguageModel:
    model = LanguageModel(tiny(family, **STILL, **changes), 90)
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model = checked(model, "student.model", packing=1000)
    return model.train()


def outcome(model: LanguageModel, encoded: TokenExamples, **how):
    """Logits at the targets, and every gradient of their log-partition functions, unequally weighted."""
    batch = collate(encoded, list(range(len(encoded))), 0, **how)
    model.zero_grad(set_to_none=True)
    logits_NV = model.head.logits(model.hidden(batch.student))
    weights_N = torch.linspace(0.5, 2, batch.num_targets, dtype=logits_NV.dtype)
    (logits_NV.logsumexp(-1) * weights_N).sum().backward()
    return logits_NV.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gemma3_text", {"sliding_window": 6}),
        ("olmo3", {"sliding_window": 6}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("deepseek_v3", {}),
    ],
    ids=str,
)
def test_packed_and_shared_rows_equal_rows_apart(family, changes, checkpointing):
    model, encoded = model_of(family, checkpointing, **changes), examples()
    assert model.capabilities.packed_attention
    expected, gradients, apart = outcome(model, encoded)
    single = family in ("gemma3_text",)  # attention in float32
    for how in ({"packing": True}, {"packing": True, "share": True}):
        found, got, batch = outcome(model, encoded, **how)
        assert (batch.student.inputs["input_ids"].numel() < apart.student.inputs["input_ids"].numel()) and torch.equal(
            batch.labels_N, apart.labels_N
        )
        tolerance = 1e-4 if single else 1e-10
        assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert got.keys() == gradients.keys()
        if (
            "share" in how and family != "gpt2"
        ) or family == "deepseek_v3":  # norms, and a router, are in float32 and round another gradient
            tolerance = max(tolerance, 1e-6)
        for name, grad in gradients.items():
            assert_close(
                got[name], grad, rtol=tolerance, atol=tolerance * max(1.0, float(grad.abs().max())), msg=lambda t, n=name: f"{n}: {t}"
            )


def test_the_windows_above_are_narrower_than_the_examples():
    """Or the test above could not tell: without the window the logits are others."""
    encoded = examples()
    narrow, wide = (model_of("mistral", sliding_window=size) for size in (5, 100))
    wide.load_state_dict(narrow.state_dict())
    a, b = (outcome(model, encoded, packing=True)[0] for model in (narrow, wide))
    assert (a - b).abs().max() > 1e-3


def test_under_autocast_products_are_in_its_type(monkeypatch):
    types, real = set(), attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda q, k, v, *rest, **more: (types.update({q.dtype, k.dtype, v.dtype}), real(q, k, v, *rest, **more))[1],
    )
    model, encoded = model_of("llama"), examples()
    model = model.float().replaced(autocast=torch.bfloat16)
    apart = outcome(model, encoded)[0]
    types.clear()
    packed = outcome(model, encoded, packing=True)[0]
    assert types == {torch.bfloat16} and (packed - apart).abs().max() < 0.05 * apart.abs().max()


def test_no_score_is_computed_between_two_examples(monkeypatch):
    """Not even to be dropped: the pairs of tokens are those of the examples alone."""
    pairs, real = [], attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda q, k, *rest, **more: (pairs.append(q.shape[2] * k.shape[2]), real(q, k, *rest, **more))[1],
    )
    model, encoded = model_of("llama"), examples()
    pairs.clear()
    batch = outcome(model, encoded, packing=True)[2]
    layers = model.base_model.config.num_hidden_layers
    assert sum(pairs) == layers * sum(n * n for n in batch.student.packed.lengths)


@pytest.mark.parametrize("family", ["gemma2", "llama4_text", "gpt_oss"])
def test_a_family_whose_attention_is_more_than_that_keeps_its_own(family):
    """Soft caps, chunks, sinks."""
    plain = tiny(family)
    before = plain.config._attn_implementation
    model = LanguageModel(plain, 90)
    try:
        model = checked(model, "student.model", packing=1000)
    except UserError as error:
        assert "data.packing" in str(error)
    assert not model.capabilities.packed_attention and plain.config._attn_implementation == before


def test_an_attention_that_was_asked_for_is_kept():
    model = LanguageModel(tiny("llama"), 90)
    model = checked(model, "student.model", 1000, "sdpa")
    assert not model.capabilities.packed_attention and model.base_model.config._attn_implementation == "sdpa"


def test_one_whose_packed_rows_would_leak_is_found_out_and_left(monkeypatch):
    monkeypatch.setattr(PackedLayout, "mask", lambda self: torch.ones(1, 1, 1, 1, dtype=torch.bool))
    model = LanguageModel(tiny("llama"), 90)
    model = checked(model, "student.model", packing=1000)
    assert not model.capabilities.packed_attention and model.base_model.config._attn_implementation == "sdpa"


def test_the_checks_leave_the_model_as_it_was():
    model = LanguageModel(tiny("llama"), 90).train()
    found = startup_checks.check(model, "student.model", packing=1000)
    assert found.packed_attention and found.last_layer and model.capabilities == Capabilities()
    assert model.base_model.config._attn_implementation == "sdpa" and all(module.training for module in model.modules())


def test_a_model_on_the_same_base_that_keeps_its_attention_leaves_the_others_theirs(monkeypatch):
    first, encoded = model_of("llama"), examples()
    expected = outcome(first, encoded, packing=True)[0]
    with monkeypatch.context() as patched:
        patched.setattr(PackedLayout, "mask", lambda self: torch.ones(1, 1, 1, 1, dtype=torch.bool))
        second = checked(LanguageModel(first.base_model, 90), "student.model", packing=1000)
    assert first.capabilities.packed_attention and not second.capabilities.packed_attention
    assert torch.equal(outcome(first, encoded, packing=True)[0], expected)
    assert_close(outcome(second, encoded, packing=True)[0], expected, rtol=1e-10, atol=1e-10)


# ---- shared prefixes


def best(ids, most) -> int:
    """Tokens saved by the best way to cut the sorted examples into groups, by trying all."""
    order = sorted(range(len(ids)), key=lambda i: ids[i].tolist())

    def common(group):
        n = min(min(len(ids[i]), most[i]) for i in group)
        while n and any(ids[i][:n].tolist() != ids[group[0]][:n].tolist() for i in group):
            n -= 1
        return n if n >= SHORTEST else 0

    found = 0
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        groups, group = [], [order[0]]
        for i, cut in zip(order[1:], cuts, strict=True):
            groups, group = (groups + [group], [i]) if cut else (groups, [*group, i])
        found = max(found, sum((len(g) - 1) * common(g) for g in [*groups, group]))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_groups_save_as_much_as_groups_can(seed):
    rng = np.random.default_rng(seed)
    starts = [rng.integers(0, 3, 30) for _ in range(3)]
    ids = [np.concatenate([starts[rng.integers(3)][: rng.integers(0, 30)], rng.integers(0, 3, rng.integers(1, 10))]) for _ in range(8)]
    most = [int(rng.integers(0, len(x))) for x in ids]
    groups = shared_prefixes(ids, most)
    assert sorted(i for _, members in groups for i in members) == list(range(8))
    for shared, members in groups:
        assert len({tuple(ids[i][:shared]) for i in members}) == 1 and all(shared <= most[i] for i in members)
        assert shared == 0 or (shared >= SHORTEST and len(members) > 1)
    assert sum((len(members) - 1) * shared for shared, members in groups) == best(ids, most)


def test_a_beginning_is_in_the_row_once_and_ends_before_what_is_supervised():
    encoded = examples()
    batch = collate(encoded, list(range(9)), 0, packing=True, share=True)
    view, packed = batch.student, batch.student.packed
    apart = collate(encoded, list(range(9)), 0, packing=True).student.inputs["input_ids"].numel()
    assert sorted(n for n, of in zip(packed.lengths, packed.examples, strict=True) if of < 0) == [13, 22]
    assert view.inputs["input_ids"].numel() == apart - 2 * 13 - 2 * 22
    assert len(set(view.rows_N.tolist())) == batch.num_targets
    ids = np.tile(np.arange(20, dtype=np.int32), 3)
    everything = TokenExamples(ids, np.ones(60, bool), np.arange(0, 61, 20), np.arange(3))
    rows = collate(everything, [0, 1, 2], 0, packing=True, share=True).student.packed
    assert rows.prefix_of == (-1, -1, -1)  # a first token that is supervised is no beginning


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("mine", [[4, 1, 7], [0], list(range(9))], ids=str)
def test_a_part_of_a_batch_is_the_batch_of_that_part(share, mine):
    """But for the order in which beginnings lie, and for one that only a single example is left of."""
    encoded, model = examples(), model_of("llama")
    whole = collate(encoded, list(range(9)), 0, packing=True, share=share)
    part = select_examples(whole, [i in mine for i in range(9)])
    alone = collate(encoded, sorted(mine), 0, packing=True, share=share)
    assert torch.equal(part.labels_N, alone.labels_N) and part.examples == alone.examples
    with torch.no_grad():
        assert_close(model.hidden(part.teacher), model.hidden(alone.teacher), rtol=1e-10, atol=1e-10)
    if not share:
        assert torch.equal(part.teacher.inputs["input_ids"], alone.teacher.inputs["input_ids"])


def test_a_run_that_shares_ends_with_the_weights_of_one_that_does_not(trained):
    changes = {"data.packing": True, "train.micro_batch_size": 8}
    shared, apart = (trained(f"{share}", **changes, **{"data.share_prefixes": share}) for share in (True, False))
    assert 0 < distance(shared, apart) < 1e-6  # norms round in float32


def test_sharing_is_refused_where_it_cannot_be(make_recipe, monkeypatch):
    from llmkd.training.run import run

    changes = {"data.packing": True, "data.share_prefixes": True}
    with pytest.raises(UserError, match="data.share_prefixes: found true, but teacher.attention is set"):
        make_recipe(**changes, **{"teacher.attention": "eager"})
    monkeypatch.setattr(attention, "enable", lambda model: False)
    with pytest.raises(UserError, match=r"data.share_prefixes: student.model \(llama\) uses its own attention in packed rows"):
        run(make_recipe(**changes))


def test_a_row_is_no_longer_than_attention_by_place_allows():
    """Llama 4 scales attention by the place in the row, from floor_scale on; its chunks keep it from llmkd's attention."""
    changes = {"attn_temperature_tuning": True, "floor_scale": 300}
    checked(LanguageModel(tiny("llama4_text", **changes), 90), "student.model", 299)
    with pytest.raises(
        UserError, match=r"\(llama4_text\) a packed row may hold 299 tokens, but this run's rows may have 300 \(train.*\); lower that, or"
    ):
        checked(LanguageModel(tiny("llama4_text", **changes), 90), "student.model", 300)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_the_one_call_is_one_that_torch_takes(window, repeat):
    """Shapes alone, on no device: forward and backward."""
    packed = PackedLayout.of([20, 40, 7, 33], [-1, 0, 0, -1]).each(lambda x: x.to("meta"))
    sizes = ((100, 4, 64), (sum(packed.kv_lengths), 2, 64), (sum(packed.kv_lengths), 2, 64))
    given = [torch.empty(*size, device="meta", dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    out = attention.flash_attention(*given, packed, 0.125, 2, window, repeat)
    out.sum().backward()
    assert (out.shape, out.dtype) == ((100, 4, 64), torch.bfloat16) and [x.grad.shape for x in given] == [
        torch.Size(size) for size in sizes
    ]


@pytest.mark.parametrize("windowed", [False, True])
def test_the_one_call_is_used_where_it_is_right(windowed, capsys):
    def kernel(takes, changed=lambda out: out):
        def flash(query, key, value, packed, scale, groups, window, repeat):
            if repeat not in takes:
                raise RuntimeError("heads differ")
            return changed(attention.by_segment(query, key, value, packed, 0.0, scale, groups, window))

        return attention.right_form(flash, torch.device("cpu"), windowed)

    assert [kernel(takes).keywords["repeat"] for takes in ((False, True), (True,))] == [False, True]
    assert capsys.readouterr().err == ""
    assert kernel(()) is None and "heads differ)" in capsys.readouterr().err
    assert kernel((False, True), lambda out: out * 1.05) is None and "does not agree" in capsys.readouterr().err


@pytest.mark.parametrize("window", [None, 9])
def test_the_one_call_is_given_what_torch_documents(window, monkeypatch, capsys):
    """A kernel after the documentation stands for torch's: with it the call agrees, and not with one that forgets the window or the causal mask."""

    def kernel(sees):
        def varlen_attn(query, key, value, queries, keys, max_q, max_k, *, scale=None, window_size, enable_gqa=False):
            parts, (left, right) = [], window_size
            assert (max_q, max_k) == (queries.diff().max(), keys.diff().max()) and enable_gqa == (query.shape[1] > key.shape[1])
            for (q0, q1), (k0, k1) in zip(queries.unfold(0, 2, 1).tolist(), keys.unfold(0, 2, 1).tolist(), strict=True):
                q, k, v = (x.transpose(0, 1).float() for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
                back = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
                mask = sees(back, left, right)
                parts.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
            return torch.cat(parts).to(query.dtype)

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        return attention.right_form(attention.flash_attention, torch.device("cpu"), window is not None)

    def whole(back, left, right):
        return (back >= -right) & ((back <= left) | (left < 0))

    assert kernel(whole) and capsys.readouterr().err == ""
    assert kernel(lambda back, left, right: (back <= left) | (left < 0)) is None
    assert (kernel(lambda back, left, right: back >= -right) is None) == (window is not None)


@pytest.mark.parametrize("beyond", [0, 1, 2])
def test_examples_with_one_and_the_same_prompt_or_with_one_other_token_equal_rows_apart(beyond):
    """Two equal prompts whose answers begin alike, and otherwise; two equal examples; a prompt with another token at the first place that
    is too early to be shared, at the last one before the answer, and in between."""
    prompt, answer = list(range(40, 40 + SHORTEST + beyond)), [7, 8, 9, 10]
    others = [[*prompt[:at], 5, *prompt[at + 1 :]] for at in (0, SHORTEST - 1, len(prompt) - 1)]
    prompts = [prompt, prompt, prompt, prompt, *others]
    answers = [answer, [7, 8, 11], [12, 13, 14, 15, 16], answer, answer, [7, 8, 17], [7]]
    ids = [np.array([*p, *a], np.int32) for p, a in zip(prompts, answers, strict=True)]
    marks = [np.arange(len(p) + len(a)) >= len(p) for p, a in zip(prompts, answers, strict=True)]
    encoded = TokenExamples(np.concatenate(ids), np.concatenate(marks), np.cumsum([0, *map(len, ids)]), np.arange(len(ids)))
    model = model_of("llama")
    expected, gradients, apart = outcome(model, encoded)
    found, got, batch = outcome(model, encoded, packing=True, share=True)
    assert torch.equal(batch.labels_N, apart.labels_N) and torch.equal(batch.example_N, apart.example_N)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, grad in gradients.items():
        assert_close(got[name], grad, rtol=1e-6, atol=1e-6 * max(1.0, float(grad.abs().max())))  # norms round in float32
    places = batch.student.inputs["input_ids"].numel()
    plain = collate(encoded, list(range(len(ids))), 0, packing=True).student.inputs["input_ids"].numel()
    # the last token of a prompt predicts a target, so it is never shared: in the shortest prompts nothing is
    assert (places < plain) == (beyond > 0)
