"""Plans of classifiers and encoder-decoder models, against PyTorch's own record of what a real run allocates and against sums by hand."""

import json
import math
from pathlib import Path

import pytest
import transformers

from llmkd.commands.plan_runs import runs_of
from llmkd.config import loader
from llmkd.data.reading import skills, sounds
from llmkd.errors import UserError
from llmkd.models.builtin_cnn import BuiltinCnnConfig, BuiltinCnnForClassification
from llmkd.models.classifier import labelled
from llmkd.planning.find import find
from llmkd.planning.plan import plan
from llmkd.tasks.sound import find_extractor
from tests.kit.sequences import saved, speech_model, speech_rows, text_rows, tiny
from tests.planning.test_held_to_measurement import allocated

RECIPES = Path(__file__).parents[2] / "recipes"
SOUNDS, VIEWS, TEXTS = (RECIPES / name / "2_distill.yaml" for name in ("sounds", "views", "classifier"))
FEW = {"data.train.limit": 40, "train.batch_size": 20, "train.micro_batch_size": 10, "train.epochs": 2}
ALONE = {"data.validation": None, "checkpoint.best_by": None, "validation.every": None}  # without held-out rows
LARGER = {"student.architecture": {"model_type": "builtin_cnn", "width": 12}}  # than what makes the features of its sounds
LORA = {"student.method": "lora", "student.lora": {"rank": 4}}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Teachers `cnn` and `bert`, models `speech_recognition` and `text_to_text` with rows and a recipe of each."""
    root = tmp_path_factory.mktemp("planned")
    of_sounds, of_texts = (
        labelled(sorted({row["label"] for row in rows})) for rows in (sounds.rows("train"), skills.rows("train", "kinds"))
    )
    BuiltinCnnForClassification(BuiltinCnnConfig(width=6, **of_sounds)).save_pretrained(root / "cnn")
    find_extractor(None, loader.load_recipe(SOUNDS).data.features, "").save_pretrained(root / "cnn")
    for name, names in (("bert", of_texts), ("views", of_sounds)):
        config = transformers.BertConfig(vocab_size=len(skills.tokenizer()), pad_token_id=0, **WIDE, **names)
        saved(transformers.BertForSequenceClassification(config), root / name)
    for task, model, rows, form in (
        ("speech_recognition", speech_model(), speech_rows, "speech"),
        ("text_to_text", tiny("t5", 3).float(), text_rows, "prompt_completion"),
    ):
        (root / task).mkdir()
        train, _ = rows(root / task)
        settings = {
            "task": task,
            "output_dir": str(root / "out"),
            "student": {"model": str(saved(model, root / task / "model")), "layers": {"decoder": [0, 2]}, "method": "full"},
            "teacher": {"model": str(root / task / "model")},
            "data": {"train": {"path": str(train), "format": form}, "max_length": 40},
            "loss": {"kd_ratio": 0.5},
        }
        (root / f"{task}.yaml").write_text(json.dumps(settings))
    return root


FROZEN = {"student.freeze": "encoder"}
SMALL_BERT = {"student.architecture": None, "student.model": "bert", "student.tokenizer": None}
#: By name a recipe, the folder of its teacher if that is not in it, and changes.
PLANNED = {
    "sounds": (SOUNDS, "cnn", ALONE | LARGER),
    "texts with an adapter": (TEXTS, "bert", ALONE | LORA | SMALL_BERT),
    "speech, the encoder's states kept": ("speech_recognition.yaml", None, FROZEN | {"student.keep_encoded": 3}),
    "text to text with an adapter on the decoder's layers that are left": (
        "text_to_text.yaml",
        None,
        LORA | FROZEN | {"student.layers": None},
    ),
}
SLOW = {
    "texts": (TEXTS, "bert", ALONE),
    "a teacher that reads descriptions": (VIEWS, "views", ALONE | LARGER),
    "speech": ("speech_recognition.yaml", None, {}),
    "text to text": ("text_to_text.yaml", None, {}),
    "text to text with an adapter": ("text_to_text.yaml", None, LORA | {"student.layers": None}),
}


@pytest.mark.parametrize("name", [*PLANNED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_peak_is_within_five_percent_of_what_is_allocated(folder, name):
    path, teacher, changes = (PLANNED | SLOW)[name]
    if teacher:
        changes = changes | {"teacher.model": str(folder / teacher)}
    if changes.get("student.model"):
        changes = changes | {"student.model": str(folder / changes["student.model"])}
    recipe = loader.load_recipe(folder / path, FEW | changes)
    planned, real = plan([recipe], find([recipe], (folder / path).parent), None, gpu=False), allocated([recipe])
    without_inputs = planned.peak - planned.parts["inputs"]  # a thread makes them, of which the record says nothing
    assert math.isclose(without_inputs, real, rel_tol=0.05), (without_inputs / real, planned.parts)


def cnn(width: int) -> int:
    """Bytes of the built-in classifier of log-mel features with six classes: three blocks of 3 x 3 convolutions and their norms, then a layer on means and maxima."""
    widths = [1, width, 2 * width, 4 * width]
    convolutions = sum(9 * before * after for before, after in zip(widths, widths[1:], strict=False))
    return 4 * (convolutions + 2 * sum(widths[1:]) + 6 * (2 * widths[-1] + 1))


@pytest.mark.slow
def test_a_sweep_is_planned_before_its_teacher_is_there(tmp_path):
    teacher, *arms = runs_of(str(RECIPES / "sounds" / "study.yaml"), {"output_dir": str(tmp_path / "out")}).runs[:3]
    planned = teacher.plan(None, False)
    assert (planned.parts["trained"], planned.work.targets, planned.work.steps) == (cnn(8), 20 * 300, 20 * 19)
    for arm in arms:  # the first learns by labels alone, and is compared with the teacher
        parts = arm.plan(None, False).parts
        assert (parts["trained"], parts["teacher's weights"]) == (cnn(3), cnn(8))


def test_a_model_to_come_is_read_by_what_its_recipe_reads_with(tmp_path):
    """A teacher of descriptions, whose tokenizer its own recipe names, next to a student of sounds."""
    model = str(tmp_path / "runs" / "views" / "1_teacher")
    first = VIEWS.parent / "1_teacher.yaml"
    coming = {Path(model): (first, loader.load_recipe(first).student, None)}
    recipe = loader.load_recipe(VIEWS, FEW | ALONE | {"teacher.model": f"{model}/model"})
    found = plan([recipe], find([recipe], tmp_path, coming), None, gpu=False).parts["teacher's weights"]
    words, width, mlp = len(skills.tokenizer()), 48, 96
    layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    rest = (words + 64 + 2 + 2) * width + width * width + width + 6 * (width + 1)  # embeddings and their norm, pooler, head
    assert found == pytest.approx(4 * (2 * layer + rest), abs=8 * 2 * 64)  # and the numbers of its positions


def test_rows_that_are_not_here_are_as_long_as_may_be(folder):
    """A second of sound, and 40 tokens of which the first four are given; eight classes of a teacher. Without one the classes are not known."""
    here = loader.load_recipe(folder / "speech_recognition.yaml", FEW | {"data.train.path": "somebody/clips"})
    planned = plan([here], found := find([here], folder), None, gpu=False)
    work = planned.work
    # two micro-batches of this step and two of the next: ten sounds in float32, and of their 40 tokens all but the last in int64
    assert planned.parts["inputs"] == 2 * 2 * 10 * (4 * 100 * 4 + 39 * 8)
    assert work.batch.student.inputs["input_features"].shape == (10, 4, 100) and work.tokens is None
    given = len(found.data.examples.example(0)[0]) - int(found.data.examples.num_targets[0])
    assert work.batch.num_targets == 10 * (40 - given) and "somebody/clips is not on this machine" in found.data.assumed
    texts = FEW | ALONE | {"data.train.path": "somebody/texts", "data.train.name": None, "data.train.limit": None, "data.train.seed": None}
    of_classes = find([loader.load_recipe(TEXTS, texts | {"teacher.model": str(folder / "bert")})], TEXTS.parent)
    assert of_classes.vocab == 8 and of_classes.data.examples.batch([0]).student.shape == (1, 64)
    with pytest.raises(UserError, match="its classes are unknown; provide its rows, or name a model that has the classes"):
        find([loader.load_recipe(TEXTS, texts | {"teacher": None, "loss.kd_ratio": 0})], TEXTS.parent)
