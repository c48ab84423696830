"""Classifiers whose teachers read another column: steps by hand, mixtures of several modalities, caches, and what is refused by name."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from llmkd.commands.pipeline import stage_recipes
from llmkd.commands.preview_examples import preview
from llmkd.config import loader
from llmkd.config.loader import load_pipeline
from llmkd.data.audio import sounds
from llmkd.data.audio.feature_extractor import LogMelFeatureExtractor
from llmkd.data.audio.way import SoundWay
from llmkd.data.examples import Draw
from llmkd.data.labelled import TextInputs
from llmkd.errors import UserError
from llmkd.models.builtin_cnn import BuiltinCnnConfig, BuiltinCnnForClassification
from llmkd.models.classifier import ClassifierKind
from llmkd.models.pretrained import new_model
from llmkd.tasks import sound
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.kit.by_hand import adam_steps, logged
from tests.kit.processes import assert_one_end, launch, train_each

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

CLASSES = ("crow", "owl", "wren")
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "high", "low", "caw", "hoot", "song"]


def text_model(folder: Path, name: str, width: int = 16) -> None:
    torch.manual_seed(11)
    config = transformers.BertConfig(**SMALL | {"hidden_size": width}, **STILL, **LABELS, vocab_size=len(WORDS), max_position_embeddings=16)
    transformers.BertForSequenceClassification(config).double().save_pretrained(folder / name)
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    """9 rows of a clip, a text, an image and a class; and teachers of each."""
    root, draw = tmp_path_factory.mktemp("views"), np.random.default_rng(0)
    rows = []
    for i in range(9):
        clip = 0.3 * np.sin(np.arange(1_000 + 60 * i) * (0.2 + 0.3 * (i % 3))) + draw.normal(0, 0.05, 1_000 + 60 * i)
        soundfile.write(root / f"{i}.wav", clip.astype(np.float32), 8_000)
        Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)).save(root / f"{i}.png")
        text = f"a {('low caw', 'low hoot', 'high song')[i % 3]}{' high' * (i % 4)}"
        rows.append({"audio": f"{i}.wav", "text": text, "image": f"{i}.png", "label": CLASSES[i % 3]})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text_model(root, "reads")
    torch.manual_seed(7)
    BuiltinCnnForClassification(BuiltinCnnConfig(width=3, blocks=2, **LABELS)).double().save_pretrained(root / "listens")
    LogMelFeatureExtractor(8, 8_000, seconds=0.2).save_pretrained(root / "listens")
    vit = transformers.ViTConfig(**SMALL, **STILL, **LABELS, image_size=4, patch_size=2)
    transformers.ViTForImageClassification(vit).double().save_pretrained(root / "sees")
    transformers.ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(root / "sees")
    return root


def made(root: Path, name: str, teacher=None, **changes):
    """A student of sound with a teacher of text, unless the changes say otherwise."""
    source = {"path": str(root / "rows.jsonl"), "format": "audio", "ignore": ["image", "text"]}
    settings = {
        "output_dir": str(root / name),
        "task": "classification",
        "student": {"architecture": {"model_type": "builtin_cnn", "width": 2, "blocks": 2}, "method": "full", "dtype": "float64"},
        "teacher": teacher or {"model": str(root / "reads"), "reads": "text"},
        "data": {
            "train": source | {"ignore": ["image"]},
            "validation": source | {"ignore": ["image"], "limit": 4},
            "features": {"kind": "log_mel", "rate": 8_000, "mels": 8, "seconds": 0.2},
            "max_length": 16,
        },
        "loss": {"kd_ratio": 0.75, "temperature": 3.0},
        "optim": {"lr": 1e-2, "schedule": "constant", "max_grad_norm": None},
        "train": {"batch_size": 9, "micro_batch_size": 4, "max_steps": 2},
        "validation": {"teacher_check": 0},
    }
    (root / f"{name}.yaml").write_text(json.dumps(settings))
    return loader.load_recipe(root / f"{name}.yaml", {key.replace("__", "."): value for key, value in changes.items()})


def mixture(root: Path, name: str, **changes):
    """A student of text with teachers of sound, text and an image; one source names its teacher."""
    text_model(root, "smaller", width=8)
    named = [("ear", "listens", "audio", 2.0), ("own", "reads", None, 1.0), ("eye", "sees", "image", 1.0)]
    teacher = [{"name": of, "model": str(root / model), "reads": reads, "weight": weight} for of, model, reads, weight in named]
    source = {"path": str(root / "rows.jsonl"), "format": "labelled", "where": {"label": ["crow", "owl"]}}
    train = [source, source | {"where": {"label": "wren"}, "teacher": "eye"}]
    student = {"model": str(root / "smaller"), "method": "full", "dtype": "float64"}
    given = {"data__train": train, "data__validation": None, "data__features": None, "student": student, "loss__kd_ratio": 1.0}
    return made(root, name, teacher, **given | changes)


@pytest.fixture(scope="module")
def logits(birds) -> dict[str, torch.Tensor]:
    """[9, 3] of each teacher by transformers alone: from the rows' own text, clip or image, each by itself."""
    rows = [json.loads(line) for line in (birds / "rows.jsonl").read_text().splitlines()]
    tokenizer, extractor = transformers.BertTokenizerFast.from_pretrained(birds / "reads"), LogMelFeatureExtractor(8, 8_000, seconds=0.2)
    read = {
        "reads": lambda row: tokenizer(row["text"], return_tensors="pt"),
        "listens": lambda row: {
            "input_features": extractor([soundfile.read(birds / row["audio"], dtype="float32")[0]], return_tensors="pt")[
                "input_features"
            ].double()
        },
        "sees": lambda row: {
            "pixel_values": torch.from_numpy(np.array(Image.open(birds / row["image"]))).permute(2, 0, 1)[None].double() / 127.5 - 1
        },
    }
    kinds = {
        "reads": transformers.BertForSequenceClassification,
        "listens": BuiltinCnnForClassification,
        "sees": transformers.ViTForImageClassification,
    }
    with torch.no_grad():
        return {
            name: torch.cat([model(**read[name](row)).logits for row in rows])
            for name, kind in kinds.items()
            for model in [kind.from_pretrained(birds / name).eval()]
        }


def test_steps_of_a_student_of_sound_with_a_teacher_of_text(birds, logits):
    """0.25 CE + 0.75 T^2 KL(p_T || q_T) at T 3, the teacher's logits from the texts; two steps of Adam by torch, in float64."""
    recipe = made(birds, "by_hand")
    summary = run(recipe)
    prepared = prepare(recipe)
    torch.manual_seed(recipe.seed)
    student = new_model(recipe.student, ClassifierKind("", CLASSES).architecture(3), "AutoModelForAudioClassification").train()

    def losses():
        for _, batches in prepared.source.steps():
            z = torch.cat([student(batch.student.inputs["input_features"].double()).logits for batch in batches])
            y, which = torch.cat([batch.labels_N for batch in batches]), torch.cat([batch.example_N for batch in batches]).tolist()
            assert y.tolist() == [i % 3 for i in which]
            p, log_q = (logits["reads"][which] / 3).softmax(1), (z / 3).log_softmax(1)
            yield 0.25 * F.cross_entropy(z, y) + 0.75 * 9 * (p * (p.log() - log_q)).sum(1).mean()

    found = adam_steps(student, recipe, losses())
    assert len(found) == 2 and np.allclose(found, logged(recipe), rtol=1e-9, atol=0)
    got = load_file(f"{recipe.output_dir}/model/model.safetensors")
    assert all(torch.allclose(got[name], value, rtol=1e-8, atol=1e-11) for name, value in student.state_dict().items())
    own = F.cross_entropy(logits["reads"][:4], torch.tensor([0, 1, 2, 0])).item()
    assert summary["validation"]["teacher_ce"] == pytest.approx(own, rel=1e-9)


def test_teachers_of_three_modalities_are_one_mixture_for_a_student_of_text(birds, logits):
    """p = 0.5 p_sound + 0.25 p_text + 0.25 p_image at the examples of all; those of a source that names a teacher have that one's alone."""
    recipe = mixture(birds, "mixture")
    run(recipe)
    prepared = prepare(recipe)
    model = transformers.BertForSequenceClassification.from_pretrained(birds / "smaller").train()
    row = [*np.flatnonzero(np.arange(9) % 3 < 2), 2, 5, 8]  # of each example

    def losses():
        for _, batches in prepared.source.steps():
            z = torch.cat([model(**batch.student.inputs).logits for batch in batches])
            which = torch.tensor([row[i] for batch in batches for i in batch.example_N])
            one = {name: (of[which] / 3).softmax(1) for name, of in logits.items()}
            p = torch.where((which % 3 == 2)[:, None], one["sees"], 0.5 * one["listens"] + 0.25 * one["reads"] + 0.25 * one["sees"])
            yield 9 * (p * (p.log() - (z / 3).log_softmax(1))).sum(1).mean()

    found = adam_steps(model, recipe, losses())
    assert len(found) == 2 and np.allclose(found, logged(recipe), rtol=1e-9, atol=0)
    batch = prepared.train.batch([0, 1])
    assert batch.view_of("teacher.1.model") is batch.student and batch.view_of("teacher.0").inputs.keys() == {"input_features"}
    readers = prepared.processor.readers
    assert set(prepared.processor.provenance) == {"tokenizer", "what reads files", "labels"}
    fewer = dataclasses.replace(readers, teachers={name: one for name, one in readers.teachers.items() if one.kind != "image"})
    assert fewer.provenance["what reads files"] != readers.provenance["what reads files"]


@pytest.mark.slow
def test_two_processes_end_at_what_one_does(birds):
    """Of a mixture of three modalities in which a source names its teacher, and of clips that are augmented for a student next to a teacher of text."""
    pytest.importorskip("audiomentations")
    held = {"path": str(birds / "rows.jsonl"), "format": "labelled", "limit": 5}
    two = [{"model": str(birds / "reads"), "reads": "text"}, {"model": str(birds / "listens")}]
    augmented = {"data__augment": {"audio": [{"AddGaussianSNR": {"p": 0.5}}]}, "train__max_steps": 3}
    recipes = {
        "mixed": lambda name: mixture(birds, name, data__validation=held, loss__kd_ratio=0.5, train__max_steps=3),
        "drawn": lambda name: made(birds, name, two, **augmented),
    }
    commands = []
    for name, of in recipes.items():
        run(of(f"{name}_one"))
        (birds / f"{name}_two.yaml").write_text(loader.dump(of(f"{name}_two")))
        commands.append(["--config", str(birds / f"{name}_two.yaml")])
    done = launch(2, train_each, commands)
    assert not done.returncode, done.stderr
    for name in recipes:
        assert_one_end(birds / f"{name}_one", birds / f"{name}_two")


@pytest.mark.slow
def test_a_cache_of_another_column_is_its_teacher_and_resume_and_adapters_go(birds):
    from llmkd.commands.cache import cache

    student = {"model": str(birds / "reads"), "lora": {"rank": 2, "dropout": 0.2}}
    eye = {"model": str(birds / "sees"), "reads": "image"}
    source = {"path": str(birds / "rows.jsonl"), "format": "labelled", "ignore": ["audio"]}
    given = {"student": student, "data__train": source, "data__validation": source, "data__features": None, "checkpoint__every": 1}
    live = run(made(birds, "live", eye, **given))
    cached = eye | {"cache": {"path": str(birds / "cache")}}
    cache(made(birds, "unused", cached, **given))
    kept = run(made(birds, "kept", cached, **given))
    assert kept["validation"] == pytest.approx(live["validation"], rel=1e-5, abs=1e-7)  # it is kept in float32
    (birds / "kept/summary.json").unlink()
    for path in (birds / "kept/checkpoints/step-2").iterdir():
        path.unlink()
    (birds / "kept/checkpoints/step-2").rmdir()
    assert run(made(birds, "kept", cached, **given), resume=True)["validation"] == kept["validation"]
    alone = source | {"ignore": ["audio", "image"]}
    given |= {"data__train": alone, "data__validation": alone}
    with pytest.raises(UserError, match="of sounds or images that were read otherwise|lacks 9 of 9 examples"):
        prepare(made(birds, "refused", {"cache": {"path": str(birds / "cache")}}, **given))


def test_hidden_states_are_compared_across_modalities(birds):
    student = {"model": str(birds / "reads"), "method": "full", "dtype": "float64"}
    source = {"path": str(birds / "rows.jsonl"), "format": "labelled", "ignore": ["audio"]}
    features = {"layers": [[2, 1]], "projection": "none", "scale": "none"}
    recipe = made(
        birds, "features", {"model": str(birds / "sees"), "reads": "image"}, student=student, data__train=source, data__validation=None,
        data__features=None, loss__features=features, loss__kd_ratio=0, train__max_steps=1,
    )  # fmt: skip
    run(recipe)
    rows, tokenizer = (
        [json.loads(line) for line in (birds / "rows.jsonl").read_text().splitlines()],
        transformers.BertTokenizerFast.from_pretrained(birds / "reads"),
    )
    reads, sees = (
        transformers.BertForSequenceClassification.from_pretrained(birds / "reads"),
        transformers.ViTForImageClassification.from_pretrained(birds / "sees"),
    )
    pixels = [torch.from_numpy(np.array(Image.open(birds / row["image"]))).permute(2, 0, 1)[None].double() / 127.5 - 1 for row in rows]
    with torch.no_grad():
        ours = torch.cat(
            [reads(**tokenizer(row["text"], return_tensors="pt"), output_hidden_states=True).hidden_states[2].mean(1) for row in rows]
        )
        theirs = torch.cat([sees(pixel_values=x, output_hidden_states=True).hidden_states[1].mean(1) for x in pixels])
    assert logged(recipe, "features") == pytest.approx([((ours - theirs) ** 2).mean().item()], rel=1e-9)


def test_augmentation_does_not_touch_a_teacher_that_reads_another_column(birds, monkeypatch):
    """The draw reaches the clip that the student reads, and neither the text nor the clean clip of a second teacher."""
    monkeypatch.setattr(sounds, "way_of", lambda rate, augment: SoundWay(rate))
    drawn, ear = [], {"model": str(birds / "listens")}
    monkeypatch.setattr(sound.SoundInputs, "batch", lambda self, indices, draw: drawn.append(draw) or {"input_features": torch.zeros(1)})
    monkeypatch.setattr(TextInputs, "batch", lambda self, indices, draw: drawn.append(draw) or {"input_ids": torch.zeros(1, 1)})
    augment = {"audio": [{"PolarityInversion": {"p": 1.0}}], "teacher_sees": "clean"}
    two = [{"model": str(birds / "reads"), "reads": "text"}, ear]
    prepared = prepare(made(birds, "augmented", two, data__augment=augment))
    prepared.train.batch([4], Draw(0, 1, 2))
    assert drawn == [Draw(0, 1, 2), None, None]
    same = prepare(made(birds, "augmented", [two[0], two[1]], data__augment=augment | {"teacher_sees": "same"})).train
    drawn.clear()
    batch = same.batch([4], Draw(0, 1, 2))
    assert drawn == [Draw(0, 1, 2), None] and batch.view_of("teacher.1") is batch.student  # which reads what the student reads


def test_a_teacher_reads_another_text_which_is_not_edited(birds):
    """One of the student's own kind, by the column `prompt`; of two such teachers one reads what the student reads, edited."""
    rows = [json.loads(line) for line in (birds / "rows.jsonl").read_text().splitlines()]
    (birds / "texts.jsonl").write_text(
        "".join(json.dumps(row | {"long": f"{row['text']} a song", "text_pair": "low"}) + "\n" for row in rows)
    )
    source = {"path": str(birds / "texts.jsonl"), "format": "labelled", "fields": {"prompt": "long"}, "ignore": ["audio", "image"]}
    teachers = [{"model": str(birds / "reads"), "reads": "prompt"}, {"model": str(birds / "reads")}]
    given = {"student": {"model": str(birds / "reads"), "method": "full"}, "data__features": None, "data__validation": None}
    train = prepare(
        made(birds, "texts", teachers, **given, data__train=source, data__augment={"prompt": [{"swap": 1.0}], "teacher_sees": "same"})
    ).train
    batch, tokenizer = train.batch([4, 1], Draw(0, 0, 1)), transformers.BertTokenizerFast.from_pretrained(birds / "reads")
    texts = lambda view: [tokenizer.decode(ids, skip_special_tokens=True) for ids in view.inputs["input_ids"]]  # noqa: E731
    assert texts(batch.view_of("teacher.0")) == [f"{rows[i]['text']} a song" for i in (4, 1)]
    assert batch.view_of("teacher.1") is batch.student and texts(train.batch([4, 1]).student) == [f"{rows[i]['text']} low" for i in (4, 1)]
    assert texts(batch.student) != [f"{rows[i]['text']} low" for i in (4, 1)]


def test_layers_are_compared_with_clean_clips_nowhere_and_with_another_column(birds):
    augment = {"audio": [{"PolarityInversion": {"p": 1.0}}], "teacher_sees": "clean"}
    ear, text = {"name": "ear", "model": str(birds / "listens")}, {"name": "text", "model": str(birds / "reads"), "reads": "text"}
    layers = {"layers": [[2, 1]], "init": "xavier"}
    for teacher, of in (([ear, text], {"teacher": "text"}), (text, {})):
        made(birds, "layers", teacher, data__augment=augment, loss__features=layers | of)
    for teacher, of in (([ear, text], {"teacher": "ear"}), (ear, {})):
        with pytest.raises(UserError, match="loss.features: compares layers, and with teacher_sees: clean"):
            made(birds, "layers", teacher, data__augment=augment, loss__features=layers | of)


def test_rows_that_are_too_long_for_one_of_the_models_are_left_out_and_counted(birds):
    """Clips 7 and 8 are longer than 0.17 s, and texts 3 and 7 than 7 tokens; row 0 is marked as not trained on."""
    rows = [json.loads(line) for line in (birds / "rows.jsonl").read_text().splitlines()]
    (birds / "marked.jsonl").write_text("".join(json.dumps(row | ({} if i else {"train": False})) + "\n" for i, row in enumerate(rows)))
    given = {"data__train__path": str(birds / "marked.jsonl"), "data__features__seconds": 0.17, "data__max_length": 7}
    train = prepare(made(birds, "long", **given)).train
    assert train.row.tolist() == [1, 2, 4, 5, 6] and (train.counts["too_long"], train.counts["marked"]) == (3, 1)
    assert train.inputs.files.num_samples.tolist() == [1_060, 1_120, 1_240, 1_300, 1_360]
    assert train.of_teachers["teacher"].inputs.lengths.tolist() == [6, 7, 5, 6, 7] and train.labels.tolist() == [1, 2, 1, 2, 0]


def test_an_example_is_all_that_student_and_teachers_read(birds):
    prepared = prepare(made(birds, "hashes"))
    text = prepared.train.of_teachers["teacher"].inputs
    changed = dataclasses.replace(text, ids=text.ids + (np.arange(len(text.ids)) == text.offsets[4] + 1))
    other = dataclasses.replace(prepared.train, of_teachers={"teacher": prepared.train.of_teachers["teacher"]._replace(inputs=changed)})
    same = [other.content_hash(i) == prepared.train.content_hash(i) for i in range(9)]
    assert same == [i != 4 for i in range(9)] and other.student_hash(4) == prepared.train.student_hash(4)


READS = {"reads": "text"}


@pytest.mark.parametrize(
    ("teacher", "changes", "said"),
    [
        (
            {"model": "reads", "reads": "audio"},
            {},
            "teacher.reads: found 'audio', which is what the student reads of format audio; leave it out",
        ),
        (
            {"model": "reads", "reads": "transcript"},
            {},
            "teacher.reads: found 'transcript' with data.train.format: audio, expected text or image",
        ),
        ({"reads": "text", "cache": {"path": "none"}}, {}, "teacher.reads: set without a model, which says how the column is read"),
        ({"server": "http://localhost:1", "reads": "text"}, {}, "teacher.reads: set with server, which reads text alone"),
        ({"ema": 0.9, "reads": "text"}, {}, "teacher.reads: set with ema, which is the student's own average"),
        (
            {"model": "reads"},
            {},
            r"teacher.model: BertForSequenceClassification reads text, and its column 'audio' is audio; set teacher.reads",
        ),
        (
            {"model": "listens", "reads": "image"},
            {"data__train__ignore": ["text"]},
            "teacher.model: BuiltinCnnForClassification reads audio, and its column 'image'",
        ),
        (
            {"model": "reads", "reads": "text"},
            {"data__train__fields": {"text": "caption"}},
            r"rows.jsonl:1: no column 'caption'; found 'audio', ",
        ),
        (
            {"model": "reads", "reads": "text"},
            {"data__train__fields": {"image": "png"}},
            r"data.train.fields.image: names a column that no model reads",
        ),
        (
            {"model": "reads", "reads": "text"},
            {"data__augment": {"audio": [{"PolarityInversion": {"p": 1.0}}]}},
            "data.augment.teacher_sees: found same with teacher.reads: text, a column that is not augmented; set it to clean",
        ),
    ],
)
def test_mistakes_are_one_line(birds, teacher, changes, said):
    teacher = teacher | ({"model": str(birds / teacher["model"])} if "model" in teacher else {})
    with pytest.raises(UserError, match=said):
        prepare(made(birds, "refused", teacher, **changes))


def test_rows_are_shown_as_a_run_reads_them(birds):
    """Without a teacher that is used nothing reads its column."""
    changes, out = {"data__train__fields": {"text": "caption"}}, io.StringIO()
    with pytest.raises(UserError, match="rows.jsonl:1: no column 'caption'"):
        preview(made(birds, "shown", **changes), out=out)
    preview(made(birds, "shown", **changes, loss__kd_ratio=0), count=1, out=out)
    assert out.getvalue().count("s of sound") == 1 and " reads " not in out.getvalue()
    two = [{"model": "not/trained", "reads": "text"}, {"model": str(birds / "sees"), "reads": "image"}, {"model": str(birds / "listens")}]
    source = {"path": str(birds / "rows.jsonl"), "format": "audio", "where": {"label": "wren"}}
    preview(
        made(birds, "shown", two, data__train=[source | {"where": {"label": "owl"}}, source], data__validation=None),
        example=4,
        out=(out := io.StringIO()),
    )
    said = out.getvalue()[out.getvalue().index("example 4") :].splitlines()
    assert said[0].startswith("example 4 of 6") and "rows.jsonl:6  " in said[0] and said[1].endswith("s of sound")
    assert said[2:] == ["teacher.0 reads text  a high song high", "teacher.1 reads image  5.png"]


def test_a_pipeline_does_not_measure_a_teacher_on_what_its_students_read(birds):
    made(birds, "stage")
    (birds / "base.yaml").write_text(
        json.dumps(
            {
                "output_dir": str(birds / "pipe"),
                "stages": {name: {"recipe": "stage.yaml"} for name in "ab"},
                "teacher": "a",
                "students": ["b"],
            }
        )
    )
    with pytest.raises(UserError, match="students: the teacher of b reads another column"):
        stage_recipes(load_pipeline(birds / "base.yaml", None), birds / "base.yaml", {})
