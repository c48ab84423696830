"""Encoder-decoder models: one step against the model's own loss, the checks at the start, greedy text, kept states, and fewer layers."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmkd.config.recipe import PartLayers
from llmkd.data.collate import select_examples
from llmkd.data.examples import Draw
from llmkd.data.inputs import Reading
from llmkd.errors import UserError
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm
from llmkd.model_folder.files import find
from llmkd.models.depth_parts import cut_parts
from llmkd.models.encoder_decoder import EncoderDecoder, EncoderDecoderKind
from llmkd.models.encoder_states import EncoderStates, keep_states
from llmkd.models.greedy import greedy
from llmkd.models.pretrained import load_pretrained
from llmkd.teachers.live import LiveTeacher
from llmkd.training.distiller import Distiller
from tests.kit.sequences import END, FAMILIES, PAD, V, examples, saved, tiny

AUTO = {"whisper": "AutoModelForSpeechSeq2Seq"}


def kind(family: str, data=None) -> EncoderDecoderKind:
    return EncoderDecoderKind(AUTO.get(family, "AutoModelForSeq2SeqLM"), V, data)


def padded(data, value: int, of=lambda ids, mask: ids) -> torch.Tensor:
    rows = [of(*data.example(i)) for i in range(len(data))]
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return torch.from_numpy(out)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_models_own_loss_and_a_divergence_by_hand(family, prefix):
    """CE as `model(labels=...)` has it, which shifts labels itself; KL at a temperature, in ten lines; and all gradients."""
    student, teacher, data, r, t = tiny(family, 1, 1), tiny(family, 2, 2), examples(family, prefix), 0.4, 3.0
    batch = data.batch(range(len(data)))
    distiller = Distiller(EncoderDecoder(student, V), [HeadTerm(Objective(r, t))])
    ours = distiller(batch, LiveTeacher(EncoderDecoder(teacher, V))(batch)).total / batch.num_targets
    ours.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)

    read = {name: x for name, x in batch.student.inputs.items() if name != "decoder_input_ids"}
    labels = padded(data, -100, lambda ids, mask: np.where(mask, ids, -100)[1:])
    ids = padded(data, PAD)[:, :-1]
    own = student(**read, labels=labels) if not prefix else student(**read, decoder_input_ids=ids, labels=labels)
    keep, rows = labels != -100, V  # the models have more rows than the tokenizer has entries
    q, p = (model(**read, decoder_input_ids=ids).logits[keep][:, :rows] for model in (student, teacher))
    ce = -q.log_softmax(-1).gather(1, labels[keep][:, None]).mean()
    wide = student(**read, decoder_input_ids=ids).logits[keep]
    assert own.loss.item() == pytest.approx((wide.logsumexp(-1) - wide.gather(1, labels[keep][:, None])[:, 0]).mean().item(), rel=1e-12)
    log_q, log_p = (q / t).log_softmax(-1), (p.detach() / t).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    theirs = (1 - r) * ce + r * t**2 * kl
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-10)
    assert len(found) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_head_is_used_and_an_unknown_one_is_found(family, capsys):
    data = examples(family)
    model = kind(family, data).checked(EncoderDecoder(tiny(family), V), "student.model")
    assert not model.capabilities.own_forward and not capsys.readouterr().err
    if family == "bart":
        plain = tiny(family)
        plain.final_logits_bias += torch.arange(V + 3)[None] / V
        other = kind(family, data).checked(EncoderDecoder(plain, V), "student.model")
        assert other.capabilities.own_forward and "does not know bart's head" in capsys.readouterr().err
        view = data.batch([0, 1]).student
        want = plain(**view.inputs).logits.flatten(0, 1)[view.rows_N][:, :V]
        torch.testing.assert_close(other.head.logits(other.hidden(view)), want)


def test_a_decoder_that_looks_ahead_is_refused_and_padding_that_counts_is_said(capsys):
    model, data = tiny("bart"), examples("bart")
    inside = model.model.decoder.layers[1]
    hook = inside.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserError, match="lets a position see the tokens after it"):
        kind("bart", data).checked(EncoderDecoder(model, V), "student.model")
    hook.remove()
    model.model.encoder.register_forward_hook(lambda m, a, out: type(out)(last_hidden_state=out[0] + out[0].mean(1, keepdim=True)))
    kind("bart", data).checked(EncoderDecoder(model, V), "student.model")
    assert "logits for a source change when a longer one is in its batch" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_batches_have_the_logits_of_examples_alone(family):
    """Also parts for one teacher, and batches of none."""
    data, model = examples(family, 1), EncoderDecoder(tiny(family), V)
    alone = torch.cat([model.hidden(data.batch([i]).student) for i in (2, 0, 3)])
    batch = data.batch([2, 0, 3], Draw(0, 0, 1))
    torch.testing.assert_close(model.hidden(batch.student), alone)
    assert batch.labels_N.tolist() == [x for i in (2, 0, 3) for x in data.example(i)[0][2:].tolist()]
    part = select_examples(batch, [True, False, True])
    torch.testing.assert_close(model.hidden(part.teacher), torch.cat([alone[:4], alone[6:]]))
    none = data.batch([])
    assert none.num_targets == 0 and model.hidden(none.student).shape == (0, 16)
    again = type(data).joined([data.take(np.array([0, 1])), data.take(np.array([2, 3]))], [0, 2], {}) if family == "t5" else data
    assert [again.content_hash(i) for i in range(4)] == [data.content_hash(i) for i in range(4)]
    one_source = dataclasses.replace(data, inputs=data.inputs.take(np.zeros(4, np.int64)))
    assert len({one_source.content_hash(i) for i in range(4)}) == 4 and data.num_targets.tolist() == [2, 3, 4, 5]


def test_examples_are_chosen_and_joined_with_all_that_is_theirs():
    data = examples("t5")
    other = data.inputs.take(np.array([3, 0, 0, 1]))  # 9, 3, 3 and 5 tokens for a teacher
    data = dataclasses.replace(data, of_teachers={"teacher": Reading(other)}, weights={"ce": np.array([1.0, 2, 3, 4], np.float32)})
    parts = [data.take(np.array([2, 0])), data.take(np.array([3]))]
    both = type(data).joined(parts, [0, 10], {})
    assert both.texts == ["text 2", "text 0", "text 3"] and both.row.tolist() == [2, 0, 13]
    assert [both.content_hash(i) for i in range(3)] == [data.content_hash(i) for i in (2, 0, 3)]
    assert data.content_hash(0) != data.student_hash(0) == examples("t5").content_hash(0)
    assert data.max_lengths.tolist() == [9 + 3, 5 + 4, 7 + 5, 9 + 6] and not data.one_input
    batch = both.batch([2, 1])
    assert batch.weights["ce"].tolist() == [4.0] * 5 + [1.0] * 2 and batch.student.given == 5
    assert batch.teacher.inputs["input_ids"].shape == (2, 9) and batch.student.inputs["input_ids"].shape == (2, 9)
    assert both.batch([1]).teacher.inputs["input_ids"].shape == (1, 9) and both.batch([1]).student.inputs["input_ids"].shape == (1, 3)
    several = {"teacher.0": Reading(other), "teacher.1": Reading(other, given=(5, 6))}
    batch, first = dataclasses.replace(data, of_teachers=several).batch([0]), data.example(0)[0][1].item()
    one, longer = (batch.view_of(f"{name}.model") for name in several)
    assert (one.inputs["decoder_input_ids"].tolist(), one.rows_N.tolist()) == ([[PAD, first]], [0, 1])
    assert (longer.inputs["decoder_input_ids"].tolist(), longer.rows_N.tolist()) == ([[5, 6, first]], [1, 2])
    given = dataclasses.replace(data, loss_mask=data.loss_mask & (np.arange(len(data.ids)) != 1))
    assert given.content_hash(0) != data.content_hash(0) and given.num_targets.tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_greedy_text_is_what_transformers_generates(family):
    data, model = examples(family), tiny(family, seed=4)
    read = {name: x for name, x in data.batch(range(4)).student.inputs.items() if name != "decoder_input_ids"}
    start = data.example(0)[0][0].item()
    ours = greedy(EncoderDecoder(model, V + 3), read, [start], END, 8)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    if family == "whisper":
        model.generation_config.begin_suppress_tokens = [5, END]
        theirs = super(type(model), model).generate(**read, **settings, decoder_input_ids=torch.full((4, 1), start))
        assert all(ids[0] not in (5, END) for ids in ours)
    else:
        theirs = model.generate(**read, **settings)
    written = [ids[1:] if ids[0] == start else ids for ids in theirs.tolist()]
    cut = [ids[: ids.index(END)] if END in ids else ids for ids in written]
    assert [ids[: len(other)] for ids, other in zip(ours, cut, strict=True)] == cut and max(map(len, cut)) >= 7


def test_a_text_ends_at_its_end_token_and_suppressed_tokens_are_not_chosen():
    """Of a model whose most likely tokens are written down, and the next likely one after them is always 3."""
    script = torch.tensor([[5, 6, END, 7], [8, 5, 9, 9]])

    def decoded(source, ids_BT, cache, use_cache):
        step = cache or 0
        logits = torch.zeros(2, 1, 12).index_fill(2, torch.tensor([3]), 0.5)
        return logits.scatter(2, script[:, step, None, None], 1.0), step + 1

    def model(**settings):
        base = SimpleNamespace(generation_config=SimpleNamespace(**settings))
        head, source = SimpleNamespace(logits=lambda x: x), SimpleNamespace(states_BSH=torch.zeros(2, 1, 1))
        own = {"set_active_adapter": lambda: None, "encoded": lambda inputs: source, "decoded": decoded}
        return SimpleNamespace(base_model=base, head=head, **own)

    assert greedy(model(), {}, [2], END, 4) == [[5, 6], [8, 5, 9, 9]]
    assert greedy(model(suppress_tokens=[5]), {}, [2], END, 4) == [[3, 6], [8, 3, 9, 9]]
    assert greedy(model(begin_suppress_tokens=[5]), {}, [2], END, 2) == [[3, 6], [8, 5]]


def test_kept_states_are_computed_once_for_student_and_teacher():
    data, plain = examples("whisper"), tiny("whisper")
    student, teacher, calls = EncoderDecoder(plain, V), EncoderDecoder(tiny("whisper", seed=9), V), []
    for own, other in zip(teacher.base_model.get_encoder().parameters(), plain.get_encoder().parameters(), strict=True):
        own.data = other.data
    want = [model.hidden(data.batch([0, 1, 2]).student) for model in (student, teacher)]
    for model in (student, teacher):
        model.base_model.get_encoder().requires_grad_(False)
        model.base_model.get_encoder().register_forward_hook(lambda m, args, out: calls.append(len(out[0])))
    keep_states([student], [("teacher", teacher)], 3)
    for model, before in zip((student, teacher, student), [*want, want[0]], strict=True):
        torch.testing.assert_close(model.hidden(data.batch([0, 1, 2]).student), before, rtol=1e-9, atol=1e-12)
    assert calls == [1, 1, 1]
    student.hidden(data.batch([3]).student), student.hidden(data.batch([0]).student)  # the first one has made room
    assert calls == [1] * 5
    teacher.states = None
    student.base_model.get_encoder().requires_grad_(True)
    keep_states([student], [("teacher", teacher)], 3)
    assert teacher.states is None
    student.base_model.get_encoder().requires_grad_(False)
    keep_states([student], [("teacher", teacher.replaced(autocast=torch.bfloat16))], 3)
    assert student.replaced(autocast=None).states is student.states and teacher.states is None
    teacher.base_model.get_encoder().layers[0].fc1.weight.data = torch.randn(24, 16, dtype=torch.float64)
    keep_states([student], [("teacher", teacher)], 3)
    assert teacher.states is None


def test_states_that_were_used_last_are_kept_and_none_of_a_source_with_padding():
    kept, computed = EncoderStates(2), []

    def encode(inputs):
        computed.append(int(inputs["x"]))
        return inputs["x"][:, None].double()

    for value in (0, 1, 0, 2, 0, 1):
        assert kept({"x": torch.tensor([value])}, encode).tolist() == [[value]]
    assert computed == [0, 1, 2, 1]
    text = EncoderDecoder(tiny("bart"), V)
    text.states = kept
    assert text.encoded(examples("bart").batch([0, 1]).student.inputs).mask is not None and len(computed) == 4


def test_states_that_generation_keeps_are_those_of_training():
    """With bfloat16 products too: else a resumed run, which has not written the same texts before, would train on others."""
    plain = tiny("whisper").float()
    view = examples("whisper").batch([0]).student.each(lambda x: x.float() if x.is_floating_point() else x)
    model = EncoderDecoder(plain.requires_grad_(False), V, autocast=torch.bfloat16).eval()
    want, exact = model.hidden(view), model.replaced(autocast=None).hidden(view)
    narrow, wide = (one.encoded(view.inputs).states_BSH for one in (model, model.replaced(autocast=None)))
    assert not torch.equal(narrow, wide)
    keep_states([model], [], 3)
    greedy(model, view.inputs, [2], END, 2)
    assert torch.equal(model.hidden(view), want) and not torch.equal(exact, want)


def test_an_encoder_that_does_not_train_is_in_eval_mode_and_keeps_nothing():
    model = EncoderDecoder(tiny("bart"), V).train()
    assert model.base_model.get_encoder().training
    model.base_model.get_encoder().requires_grad_(False)
    model.train()
    assert not model.base_model.get_encoder().training and model.base_model.get_decoder().training
    assert not model.encoded(examples("bart").batch([0]).student.inputs).states_BSH.requires_grad


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_fewer_layers_are_an_ordinary_model(family, tmp_path):
    """Its logits are those of the whole model whose other layers are taken out by hand."""
    whole, batch = tiny(family, 4), examples(family).batch([0, 1]).student
    files = find(str(saved(whole, tmp_path / "whole")), "student.model")
    cut = cut_parts(files, PartLayers(encoder=(0, 3), decoder=2))
    few = load_pretrained(cut.base, "student.model", auto=kind(family).auto)
    inside = "block" if family == "t5" else "layers"
    for part in (whole.get_encoder(), whole.get_decoder()):
        layers = getattr(part, inside)
        setattr(part, inside, torch.nn.ModuleList([layers[0], layers[3]]))
    for layer in (one for part in (whole.get_decoder(),) for one in getattr(part, inside)[1:]):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 1
    torch.testing.assert_close(few(**batch.inputs, use_cache=False).logits, whole(**batch.inputs, use_cache=False).logits)
    assert cut_parts(files, PartLayers(encoder=(0, 3), decoder=2)).base == cut.base
    for wanted, said in (
        (PartLayers(), "keeps all layers"),
        (PartLayers(decoder=5), "has 4 layers"),
        (PartLayers(decoder=(0, 4)), "found layer 4"),
    ):
        with pytest.raises(UserError, match=said):
            cut_parts(files, wanted)
    if family == "t5":
        with pytest.raises(UserError, match="layer 1 of student.model .t5. would not be the same as layer 0"):
            cut_parts(files, PartLayers(decoder=(1, 2)))


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_dropout_of_an_adapter_follows_the_example(family):
    """Examples alone, in another order and together, in a batch of a seed and step, and otherwise in the next step."""
    from peft import LoraConfig, get_peft_model

    from llmkd.models.dropout import follow_examples

    adapted = get_peft_model(tiny(family).float(), LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False))
    follow_examples(adapted)
    model, data = EncoderDecoder(adapted, V).train(), examples(family)
    if family == "whisper":
        data.inputs.features = data.inputs.features.astype(np.float32)
    own = [model.hidden(data.batch([i], Draw(0, 0, 1)).student) for i in (0, 1, 2)]
    together = model.hidden(data.batch([2, 0, 1], Draw(0, 0, 1)).student)
    torch.testing.assert_close(together, torch.cat([own[2], own[0], own[1]]), rtol=1e-4, atol=1e-4)
    again = model.hidden(data.batch([0], Draw(0, 0, 2)).student)
    assert (again - own[0]).abs().max() > 1e-3
    first, second = own[0][0], own[1][0]  # the same start, other sources and other masks
    assert (first - second).abs().max() > 1e-3
