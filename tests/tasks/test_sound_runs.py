"""Classifiers of sound: whole runs against a loop written out here, the same clips however a step is cut, and what is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, pipeline

from llmkd.config import loader
from llmkd.data.audio.feature_extractor import LogMelFeatureExtractor
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.models.builtin_cnn import BuiltinCnnConfig, BuiltinCnnForClassification
from llmkd.models.classifier import ClassifierKind
from llmkd.models.pretrained import new_model
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.kit.by_hand import adam_steps, logged

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("audiomentations")

CLASSES = ("crow", "owl", "wren")
AUGMENT = {"audio": [{"AddGaussianSNR": {"p": 1.0}}], "teacher_sees": "clean"}


def save_teacher(folder: Path, names: tuple[str, ...]) -> None:
    torch.manual_seed(7)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    BuiltinCnnForClassification(BuiltinCnnConfig(width=3, blocks=2, **labels)).double().save_pretrained(folder)
    LogMelFeatureExtractor(8, 8_000, seconds=0.2).save_pretrained(folder)


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    """Folders train (12 clips) and held (6) of three classes, and a teacher of these."""
    root, draw = tmp_path_factory.mktemp("birds"), np.random.default_rng(0)
    for split, n in (("train", 12), ("held", 6)):
        for i in range(n):
            name = CLASSES[i % 3]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            time = np.arange(1_000 + 100 * i) / 8_000
            soundfile.write(
                root / split / name / f"{i}.wav",
                0.3 * np.sin(2 * np.pi * (400 + 900 * (i % 3)) * time) + draw.normal(0, 0.05, len(time)),
                8_000,
            )
    save_teacher(root / "teacher", CLASSES)
    return root


def made(root: Path, out: Path, **changes):
    settings = {
        "output_dir": str(out),
        "task": "classification",
        "student": {"architecture": {"model_type": "builtin_cnn", "width": 2, "blocks": 2}, "method": "full", "dtype": "float64"},
        "teacher": {"model": str(root / "teacher"), "dtype": "float64"},
        "data": {
            "train": {"path": str(root / "train"), "format": "audio"},
            "validation": {"path": str(root / "held"), "format": "audio"},
            "features": {"kind": "log_mel", "rate": 8_000, "mels": 8, "seconds": 0.2},
            "too_long": "truncate",
        },
        "loss": {"kd_ratio": 0.9, "temperature": 10.0},
        "optim": {"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": None},
        "train": {"batch_size": 4, "micro_batch_size": 3, "epochs": 2},
        "validation": {"every": 3, "micro_batch_size": 4},
        "checkpoint": {"every": 1, "keep": 99, "best_by": "f1"},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(settings))
    return loader.load_recipe(path, {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def whole(birds, tmp_path_factory):
    recipe = made(birds, tmp_path_factory.mktemp("whole") / "out", data__augment=AUGMENT)
    run(recipe)
    return recipe


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "model/model.safetensors")


def test_a_run_is_the_loop_by_hand(whole):
    """0.1 CE and 0.9 T^2 KL as `batchmean` at T = 10, the student on augmented clips and the teacher on clean ones; Adam by torch."""
    torch.manual_seed(whole.seed)
    student = new_model(whole.student, ClassifierKind("", CLASSES).architecture(3), "AutoModelForAudioClassification").train()
    teacher = AutoModelForAudioClassification.from_pretrained(whole.teacher.model, dtype=torch.float64).eval()
    prepared, alpha, T = prepare(whole), 0.1, 10.0

    def losses():
        for _, batches in prepared.source.steps():
            logits, theirs, labels = [], [], torch.cat([batch.labels_N for batch in batches])
            for batch in batches:
                assert not torch.equal(batch.student.inputs["input_features"], batch.teacher.inputs["input_features"])
                logits.append(student(batch.student.inputs["input_features"].double()).logits)
                theirs.append(teacher(batch.teacher.inputs["input_features"].double()).logits.detach())
            logits, theirs = torch.cat(logits), torch.cat(theirs)
            soft = F.kl_div(F.log_softmax(logits / T, 1), F.softmax(theirs / T, 1), reduction="batchmean") * T * T
            yield alpha * F.cross_entropy(logits, labels) + (1 - alpha) * soft

    found = adam_steps(student, whole, losses())
    assert len(found) == 6 and np.allclose(found, logged(whole), rtol=1e-9, atol=0)
    got = weights(whole.output_dir)
    assert all(torch.allclose(got[name], value, rtol=1e-9, atol=1e-12) for name, value in student.state_dict().items())


def test_the_student_is_an_ordinary_model_with_its_classes(whole):
    folder = f"{whole.output_dir}/model"
    model, extractor = AutoModelForAudioClassification.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(CLASSES)) and extractor.sampling_rate == 8_000
    clip = np.random.default_rng(1).normal(0, 0.1, 900).astype(np.float32)
    found = pipeline("audio-classification", model=model.float(), feature_extractor=extractor)({"raw": clip, "sampling_rate": 8_000})
    wanted = model(**extractor(clip, return_tensors="pt")).logits.softmax(-1)[0]
    assert {one["label"]: pytest.approx(one["score"], abs=1e-5) for one in found} == dict(zip(CLASSES, wanted.tolist(), strict=True))


def test_validation_reads_clean_clips_and_counts_classes(whole):
    from sklearn.metrics import f1_score

    model = AutoModelForAudioClassification.from_pretrained(f"{whole.output_dir}/model", dtype=torch.float64)
    batch = prepare(whole).validation.batch(range(6))
    assert batch.teacher is batch.student
    answers = model(batch.student.inputs["input_features"].double()).logits.argmax(-1)
    values = [record["validation"] for record in read_jsonl(Path(whole.output_dir) / "metrics.jsonl") if "validation" in record][-1]
    assert values["accuracy"] == pytest.approx((answers == batch.labels_N).double().mean().item())
    assert values["f1"] == pytest.approx(f1_score(batch.labels_N, answers, labels=range(3), average="macro", zero_division=0))


def test_a_resumed_run_is_the_run_that_was_not_stopped(whole, tmp_path):
    out, step = tmp_path / "out", 4  # in the second epoch
    shutil.copytree(whole.output_dir, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    run(dataclasses.replace(whole, output_dir=str(out)), resume=True)
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(whole.output_dir).items())


def test_ranks_micro_batches_and_workers_give_the_same_clips(whole):
    def seen(ranks: int, micro: int, workers: int) -> dict:
        train = dataclasses.replace(whole.train, micro_batch_size=micro)
        source, found = prepare(dataclasses.replace(whole, train=train, data=dataclasses.replace(whole.data, workers=workers))).source, {}
        for rank in range(ranks):
            for step, batches in source.for_rank(rank, ranks).steps():
                for batch in batches:
                    for n, i in enumerate(batch.example_N.tolist()):
                        found[step.number, i] = [
                            view.inputs["input_features"][n].numpy().tobytes() for view in (batch.student, batch.teacher)
                        ]
        return found

    once = seen(1, 4, 1)
    assert len(once) == 24 and len({student for student, _ in once.values()}) == 24 and len({teacher for _, teacher in once.values()}) == 12
    assert seen(3, 1, 2) == once


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__validation__path": "more"}, "jay/0.wav: the label 'jay' is none of"),
        ({"data__train__path": "more"}, "teacher.model: its classes are others than the student's"),
        (
            {"teacher__model": "turned", "student__model": "teacher", "student__architecture": None, "data__features": None},
            "teacher.model: its classes are in another order than the student's",
        ),
        ({"teacher__model": "nameless"}, "write teacher.model's names as id2label"),
        ({"data__too_long": "refuse"}, "s long, and data.train reads 0.20 s"),
        ({"data__augment": {"audio": [{"Gian": {}}]}}, "data.augment.audio.0: audiomentations"),
        (
            {"data__augment": AUGMENT | {"teacher_sees": "same"}, "teacher__cache": {"path": "c"}},
            "data.augment.teacher_sees: found same with teacher.cache",
        ),
        ({"task": "causal_lm"}, "data.train.format: found audio, which task: causal_lm does not read"),
        ({"data__features__rate": 8_100}, "data.features.rate: found 8100, expected a multiple of 200"),
        ({"data__features": None}, "data.features: not given, and builtin_cnn has no way of its own to read files"),
        ({"data__packing": True}, "data.packing: set with task: classification"),
        ({"data__train__pattern": "(?P<audio>.*)"}, "data.train.pattern: found the group 'audio'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(birds, tmp_path, changes, says):
    shutil.copytree(birds, root := tmp_path / "birds")
    (root / "more").mkdir()
    shutil.copytree(root / "held/owl", root / "more/owl")
    (root / "more/jay").mkdir()
    shutil.copy(root / "held/crow/0.wav", root / "more/jay/0.wav")
    save_teacher(root / "turned", CLASSES[::-1])
    save_teacher(root / "nameless", ("LABEL_0", "LABEL_1", "LABEL_2"))
    changes = {name: str(root / value) if isinstance(value, str) and (root / value).exists() else value for name, value in changes.items()}
    with pytest.raises(UserError) as caught:
        prepare(made(root, tmp_path / "out", **changes))
    assert says in str(caught.value)


def test_a_row_that_is_marked_as_not_trained_on_is_none(birds, tmp_path, capsys):
    files = sorted((birds / "train").glob("*/*.wav"))
    rows = [{"audio": str(file), "label": file.parent.name, "train": i != 4} for i, file in enumerate(files)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(made(birds, tmp_path / "out", data__train__path=str(tmp_path / "rows.jsonl")))
    assert prepared.train.row.tolist() == [i for i in range(12) if i != 4] and prepared.places[4].endswith(":6")
    assert prepared.train.labels.tolist() == [CLASSES.index(row["label"]) for i, row in enumerate(rows) if i != 4]
    assert "1 marked as not trained on, dropped" in capsys.readouterr().err
