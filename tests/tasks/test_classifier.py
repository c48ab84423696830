"""One step of a classifier against ten lines of float64, for each of transformers' kinds; the source documents' function; examples and their cuts."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.nn import functional as F

from llmkd.batch import View
from llmkd.config.recipe import Loss, Optim
from llmkd.data.collate import select_examples
from llmkd.data.dataset import Dataset
from llmkd.data.examples import Draw, concat
from llmkd.data.inputs import Reading
from llmkd.data.labelled import LabelledExamples, TextInputs
from llmkd.errors import UserError
from llmkd.losses.divergences import make_divergence
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm, StudentOutputs
from llmkd.models.classifier import Classifier, ClassifierKind, head_modules, labelled
from llmkd.models.dropout import follow_examples
from llmkd.models.lora import Lora, add_lora
from llmkd.signals import Dense, Taps
from llmkd.tasks.classification import ClassMeasures, names_of, refuse_unknown_classes
from llmkd.teachers.live import LiveTeacher
from llmkd.training.build_student import build_student
from llmkd.training.distiller import Distiller
from llmkd.training.loop import forward_backward

NAMES = ("bad", "fine", "good", "best")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KINDS = {
    "AutoModelForSequenceClassification": {"model_type": "bert", "vocab_size": 40, "pad_token_id": 0, **SMALL},
    "AutoModelForAudioClassification": {
        "model_type": "wav2vec2",
        "conv_dim": (8, 8),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "feat_extract_norm": "layer",
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        **SMALL,
    },
    "AutoModelForImageClassification": {"model_type": "vit", "image_size": 8, "patch_size": 4, **SMALL},
}


@dataclass
class Given:
    """Inputs of one shape by name, as sound or images are."""

    arrays: dict
    positions = False

    @property
    def lengths(self):
        return np.ones(len(next(iter(self.arrays.values()))), np.int64)

    def content(self, i):
        return next(iter(self.arrays.values()))[i].tobytes()

    def take(self, chosen):
        return Given({name: array[chosen] for name, array in self.arrays.items()})

    def batch(self, indices, draw):
        return {name: torch.from_numpy(array[list(indices)]) for name, array in self.arrays.items()}


def texts(lengths=(5, 9, 3, 7, 4, 6), left=False) -> TextInputs:
    rng, offsets = np.random.default_rng(0), np.cumsum([0, *lengths], dtype=np.int64)
    return TextInputs(rng.integers(1, 40, offsets[-1]).astype(np.int32), offsets, None, 0, left)


def examples(auto: str) -> LabelledExamples:
    rng = np.random.default_rng(1)
    inputs = {
        "AutoModelForSequenceClassification": texts,
        "AutoModelForAudioClassification": lambda: Given({"input_values": rng.normal(size=(6, 400)).astype(np.float32)}),
        "AutoModelForImageClassification": lambda: Given({"pixel_values": rng.normal(size=(6, 3, 8, 8)).astype(np.float32)}),
    }[auto]()
    return LabelledExamples(inputs, np.array([0, 3, 1, 1, 2, 0]), np.arange(6), NAMES, {"rows": 6})


def model_of(auto: str, seed: int, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    still |= {"activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0}
    own = KINDS[auto] | changes
    known = transformers.AutoConfig.for_model(own["model_type"]).to_dict()
    config = transformers.AutoConfig.for_model(**own, **{k: v for k, v in still.items() if k in known}, **labelled(NAMES))
    return getattr(transformers, auto).from_config(config).double().train()


@pytest.mark.parametrize("auto", KINDS)
def test_a_step_is_that_of_ten_lines(auto):
    """alpha CE(z, y) + (1 - alpha) T^2 KL(softmax(z_T / T), softmax(z / T)), batchmean, at alpha 0.1 and T 10; the gradient of every weight."""
    student, teacher, data = model_of(auto, 0), model_of(auto, 1).eval(), examples(auto)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in data.inputs.batch(range(6), None).items()}
    labels = torch.from_numpy(data.labels)
    z = student(**inputs).logits
    with torch.no_grad():
        z_T = teacher(**inputs).logits
    hard = -torch.log_softmax(z, 1)[torch.arange(6), labels].mean()
    p, q = torch.softmax(z_T / 10, 1), torch.log_softmax(z / 10, 1)
    soft = (p * (p.log() - q)).sum() / 6
    loss = 0.1 * hard + 0.9 * 100 * soft
    loss.backward()
    expected = {name: x.grad.clone() for name, x in student.named_parameters() if x.grad is not None}
    student.zero_grad(set_to_none=True)

    kind = ClassifierKind(auto, NAMES, examples=data)
    models = [
        kind.checked(Classifier(one, 4), f"{who}.model") for who, one in (("student", student), ("teacher", teacher.requires_grad_(False)))
    ]
    distiller = Distiller(models[0], [HeadTerm(Objective(0.9, 10.0))])
    cut, total = [[1, 3, 0], [5], [4, 2], []], 0.0  # as micro-batches
    for some in cut:
        batch = data.batch(some, Draw(0, 0, 1))
        found = distiller(batch, LiveTeacher(models[1])(batch))
        (found.total / 6).backward()
        total += found.total.item() / 6
    assert total == pytest.approx(loss.item(), abs=1e-12)
    assert expected.keys() == {name for name, x in student.named_parameters() if x.grad is not None}
    for name, x in student.named_parameters():
        if name in expected:
            assert (x.grad - expected[name]).abs().max() < 1e-12, name
    assert set(kind.without_gradient(models[0], "student.model")) == {f"{n}" for n, x in student.named_parameters() if n not in expected}


def test_the_source_documents_function():
    """Its text, in float64: F.cross_entropy, nn.KLDivLoss(reduction="batchmean") times T^2, alpha 0.1 and T 10."""
    torch.manual_seed(0)
    z, z_T, y = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), 3 * torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5
    alpha, T = 0.1, 10
    student_loss = F.cross_entropy(input=z, target=y)
    distillation_loss = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(z / T, dim=1), F.softmax(z_T / T, dim=1)) * (T * T)
    (alpha * student_loss + (1 - alpha) * distillation_loss).backward()
    expected, z_own = z.grad.clone(), z.detach().clone().requires_grad_()
    data = dataclasses.replace(examples("AutoModelForSequenceClassification"), names=tuple("abcde"))
    head = Classifier(model_of("AutoModelForSequenceClassification", 0), 5).head
    batch = dataclasses.replace(data.batch(range(6)), labels_N=y, example_N=torch.arange(8))
    found = HeadTerm(Objective(1 - alpha, T))(StudentOutputs(z_own, head), Dense(z_T, head), batch)
    (found.total / 8).backward()
    assert found.total.item() / 8 == pytest.approx((alpha * student_loss + (1 - alpha) * distillation_loss).item(), abs=1e-12)
    assert (z_own.grad - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["reverse_kl", "generalized_jsd", "total_variation"])
def test_other_divergences_and_weights(name):
    """A divergence by its definition in float64; targets of weight 0 and 2."""
    torch.manual_seed(1)
    z, z_T, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    p, q = torch.softmax(z_T / 2, 1), torch.softmax(z / 2, 1)
    m = (p + q) / 2
    by_hand = {
        "reverse_kl": (q * (q / p).log()).sum(1),
        "generalized_jsd": ((p * (p / m).log()) / 2 + (q * (q / m).log()) / 2).sum(1),
        "total_variation": (p - q).abs().sum(1) / 2,
    }[name]
    data = examples("AutoModelForSequenceClassification")
    data.weights = {"kd": np.array([1, 0, 2, 1, 1, 1], np.float32)}
    batch = dataclasses.replace(data.batch(range(6)), labels_N=y)
    head = Classifier(model_of("AutoModelForSequenceClassification", 0), 4).head
    term = HeadTerm(Objective(0.7, 2.0, make_divergence(name)))
    found = term(StudentOutputs(z.requires_grad_(), head), Dense(z_T, head), batch)
    ce = -torch.log_softmax(z, 1)[torch.arange(6), y]
    expected = 0.3 * ce.sum() + 0.7 * 4 * (by_hand * torch.tensor([1.0, 0, 2, 1, 1, 1], dtype=torch.float64)).sum()
    assert found.total.item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize(("family", "left"), [("bert", False), ("llama", False), ("llama", True), ("vit", False)])
def test_padding_and_cuts_do_not_matter_also_with_dropout_in_the_adapter(family, left):
    auto = "AutoModelForImageClassification" if family == "vit" else "AutoModelForSequenceClassification"
    data = examples(auto) if family == "vit" else dataclasses.replace(examples(auto), inputs=texts(left=left))
    changes = {"model_type": family, "num_key_value_heads": 1} if family == "llama" else {}
    base = model_of(auto, 0, **changes)
    model = add_lora(base, Lora(rank=2, dropout=0.5), None, kind=None if family == "vit" else "SEQ_CLS", copies=head_modules(base))
    follow_examples(model)
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p.data, std=0.3)
    student = Classifier(model, 4).train()
    assert {n.split(".")[-2] for n in student.trainable() if "lora" not in n} == {"default"}  # the head's copy

    def gradients(cut, step=1):
        student.zero_grad(set_to_none=True)
        for some in cut:
            batch = data.batch(some, Draw(0, 0, step))
            Distiller(student, [HeadTerm(Objective())])(batch, None).total.backward()
        return torch.cat([p.grad.flatten() for p in student.trainable().values()])

    whole = gradients([range(6)])
    close = 1e-5 if left else 1e-12  # rotary embeddings of shifted positions round otherwise
    assert (gradients([[2], [5, 1], [0, 3, 4]]) - whole).abs().max() < close
    assert (gradients([range(6)], step=2) - whole).abs().max() > 1e-3


def test_spec_augment_follows_the_seed():
    """Its masks are numpy's, whose generator anything may have moved."""
    auto = "AutoModelForAudioClassification"
    model = Classifier(model_of(auto, 0, mask_time_prob=0.6, mask_time_length=2), 4).train()
    accelerator, batch = Accelerator(cpu=True), examples(auto).batch(range(6), Draw(0, 0, 1))
    state = build_student(Loss(kd_ratio=0.0), Optim(), model, 1, accelerator)

    def gradients(seed):
        model.zero_grad(set_to_none=True)
        forward_backward(batch, {0: state}, None, seed, 1.0, accelerator, True)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one = gradients(2**62 + 5)
    assert torch.equal(gradients(2**62 + 5), one) and not torch.equal(gradients(2**62 + 6), one)


@pytest.mark.parametrize("auto", KINDS)
def test_hidden_states_of_a_layer_are_the_mean_over_an_examples_positions(auto):
    model, data = Classifier(model_of(auto, 0).eval(), 4), examples(auto)
    batch = data.batch(range(6))
    found = model.outputs(batch.student, Taps(frozenset({0, 1}))).layers
    for i in range(6):
        alone = {k: v.double() if v.is_floating_point() else v for k, v in data.inputs.batch([i], None).items()}
        own = model.model(**alone, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            assert (found[layer][i] - own[layer][0].mean(0)).abs().max() < 1e-9
    assert model.depth("x") == 2
    with pytest.raises(UserError, match="x has 2 layers: found layer 3, expected 0"):
        model.widths([0, 3], "x")


def test_hidden_states_of_sound_are_a_mean_over_what_is_left_of_a_clip():
    """Wav2Vec2's convolutions make positions of samples; those of padding are no part of it."""
    model = Classifier(model_of("AutoModelForAudioClassification", 0).eval(), 4)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 200:] = 0
    view = View({"input_values": torch.randn(2, 400).double() * mask, "attention_mask": mask}, torch.arange(2))
    own = model.model(**view.inputs, output_hidden_states=True).hidden_states[1]
    n = int(model.model._get_feat_extract_output_lengths(torch.tensor(200)))
    found = model.outputs(view, Taps(frozenset({1}))).layers[1]
    assert 1 <= n < own.shape[1] and (found[1] - own[1, :n].mean(0)).abs().max() < 1e-9
    assert (found[0] - own[0].mean(0)).abs().max() < 1e-9


def test_a_model_is_tried_before_training(capsys):
    auto = "AutoModelForSequenceClassification"
    kind, model = ClassifierKind(auto, NAMES, examples=examples(auto)), model_of(auto, 0).eval()
    kind.checked(Classifier(model, 4), "student.model")
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="teacher.model: has 4 classes, and the data 5"):
        kind.refuse_misfit(model, 5, "teacher.model")
    model.register_forward_hook(lambda m, a, given, out: type(out)(logits=out.logits + given["input_ids"].shape[1]), with_kwargs=True)
    kind.checked(Classifier(model, 4), "student.model")
    assert "logits of an example change when a longer one is in its batch" in capsys.readouterr().err


def test_classes_are_in_the_order_of_their_numbers_and_f1_counts_weights():
    assert names_of({"id2label": {str(i): f"c{i}" for i in reversed(range(11))}}) == tuple(f"c{i}" for i in range(11))
    sums = {"label": np.array([0.0, 1, 1]), "answer": np.array([0.0, 1, 0])}
    found = ClassMeasures(("a", "b")).metrics({"accuracy": 0.5}, sums, np.array([1.0, 1, 0]))
    assert found == {"accuracy": 0.5, "f1": 1.0}


def test_examples_are_joined_chosen_and_known_by_their_content():
    one = examples("AutoModelForSequenceClassification")
    both = concat([one, one.take(np.array([4, 1]))], [0, 6], {"rows": 8}, np.array([0] * 6 + [1] * 2))
    assert len(both) == 8 and both.content_hash(6) == one.content_hash(4) and both.labels.tolist()[6:] == [2, 3]
    assert len({one.content_hash(i) for i in range(6)}) == 6
    other = dataclasses.replace(one, labels=(one.labels + 1) % 4)
    assert all(other.content_hash(i) != one.content_hash(i) for i in range(6))
    batch, alone = both.batch([7, 0, 6]), one.batch([1, 0, 4])
    assert torch.equal(batch.labels_N, alone.labels_N) and torch.equal(batch.student.inputs["input_ids"], alone.student.inputs["input_ids"])
    assert [len(row.nonzero()) for row in batch.student.inputs["attention_mask"]] == [9, 5, 4]
    left = texts(left=True).batch([0, 1], None)
    assert left["attention_mask"][0].tolist() == [0] * 4 + [1] * 5 and left["input_ids"][0, -1] == batch.student.inputs["input_ids"][1, 4]
    assert both.row.tolist() == [0, 1, 2, 3, 4, 5, 10, 7]
    pairs = TextInputs(np.array([5, 6, 7] * 2, np.int32), np.array([0, 3, 6]), np.array([0, 0, 1, 0, 1, 1], np.int32), 0)
    assert pairs.content(0) != pairs.content(1) == pairs.take(np.array([1])).content(0)
    assert both.batch([]).num_targets == 0 and both.described.startswith("4 classes: bad 2, fine 2")


def test_a_teacher_may_read_other_tokens_and_what_is_not_augmented():
    data = examples("AutoModelForSequenceClassification")
    theirs = dataclasses.replace(data, of_teachers={"teacher": Reading(texts((4, 4, 4, 4, 4, 4)))})
    batch = theirs.batch([0, 1], Draw(0, 0, 1))
    assert batch.student.inputs["input_ids"].shape == (2, 9) and batch.teacher.inputs["input_ids"].shape == (2, 4)
    assert theirs.max_lengths.tolist() == [5, 9, 4, 7, 4, 6] and data.one_input and not theirs.one_input
    assert theirs.content_hash(0) != data.content_hash(0) and theirs.student_hash(0) == data.student_hash(0)
    seen = []

    class Drawn(Given):
        def batch(self, indices, draw):
            seen.append(draw)
            return super().batch(indices, draw)

    inputs = Drawn({"input_values": np.zeros((6, 4), np.float32)})
    drawn = dataclasses.replace(data, inputs=inputs, of_teachers={"teacher": Reading(inputs, augmented=False)})
    assert not drawn.one_input and drawn.batch([0], Draw(0, 1, 2)).teacher is not None and seen == [Draw(0, 1, 2), None]
    seen.clear()
    same = dataclasses.replace(drawn, of_teachers={"teacher": Reading(inputs)}).batch([0], Draw(0, 1, 2))
    assert same.teacher is same.student and len(seen) == 1


def test_a_class_that_only_held_out_rows_have_is_refused():
    whole = examples("AutoModelForSequenceClassification")
    sets = [Dataset("x", whole.take(np.array(some)), [f"rows:{i}" for i in some], []) for some in ([0, 1, 2, 3, 5], [5, 4])]
    with pytest.raises(UserError, match=r"rows:4: the class 'good' is in held-out rows and in no training row \(1 such"):
        refuse_unknown_classes(*sets)
    refuse_unknown_classes(sets[0], sets[0])


def test_a_teacher_of_some_examples_is_asked_for_those_alone():
    data, model = examples("AutoModelForSequenceClassification"), Classifier(model_of("AutoModelForSequenceClassification", 0).eval(), 4)
    part, alone = select_examples(data.batch([3, 0, 4]), [True, False, True]), data.batch([3, 4])
    assert torch.equal(part.labels_N, alone.labels_N)
    with torch.no_grad():
        found, expected = (LiveTeacher(model)(batch).log_probs(slice(None)) for batch in (part, alone))
    assert (found - expected).abs().max() < 1e-12
