"""The scores of rows, by models in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...config.make_score import OF_TEACHER, SCORES, Score
from ...data.encoding import template_process
from ...teachers.live import LiveTeacher
from ...training.launch import start
from ...training.validate import Evaluator
from ..rows import Message, Row
from .cross_entropy import instruction_following_difficulty, mean_per_target, refuse_unknown
from .scorer import Scorer, vocabulary
from .views import in_context, start_token


class Measuring:
    """Computes the scores of rows with loaded models.

    models   student, and teacher if a score needs one
    """

    def __init__(self, models: dict[str, Scorer], settings: Score):
        self.settings, self.tokenizer = settings, models["student"].tokenizer
        accelerator, vocab = start(), vocabulary(models)
        self.student = models["student"].load(accelerator.device, vocab)
        self.teacher = LiveTeacher(models["teacher"].load(accelerator.device, vocab)) if "teacher" in models else None
        self.evaluator = Evaluator(accelerator, settings.batch_size)

    def scores(self, rows: Sequence[Row], backwards: Sequence[Sequence[Message]] | None) -> list[dict[str, float] | list[str]]:
        """The scores of each row, by name, or the reason and detail why it has none.

        backwards   for r-IFD, the conversations that ask for the instruction of each answer
        """
        wanted = {column for score in self.settings.scores for column in SCORES[score]}
        found: list[dict[str, float]] = [{} for _ in rows]
        left_out: dict[int, list[str]] = {}
        for name, conversations in (("", [row.messages for row in rows]), ("instruction ", backwards)):
            if conversations is None:
                continue
            names = [f"{name}of the row {row.id}" if name else f"the row {row.id}" for row in rows]
            examples, reasons = in_context(conversations, names, self.settings.format, self.tokenizer, self.settings.max_length)
            left_out = {i: list(reason) for i, reason in reasons.items()} | left_out
            columns = self._of(examples, backwards=bool(name)) if len(examples) else {}
            refuse_unknown(columns, [names[i] for i in examples.row])
            for number, i in enumerate(examples.row.tolist()):
                found[i] |= {column: float(values[number]) for column, values in columns.items() if column in wanted}
        template_process.close()
        return [left_out.get(i, scores) for i, scores in enumerate(found)]

    def _of(self, examples: Any, backwards: bool) -> dict[str, np.ndarray]:
        begin = start_token(self.tokenizer)
        if backwards:
            return {"rifd": instruction_following_difficulty(self.evaluator, self.student, examples, begin)["ifd"]}
        columns: dict[str, np.ndarray] = {}
        if set(self.settings.scores) & set(OF_TEACHER):
            found = mean_per_target(self.evaluator, self.student, examples, self.teacher)
            columns |= {"ce": found["ce"], "teacher_ce": found["teacher_ce"], "kl": found["forward_kl"]}
        if "ifd" in self.settings.scores:
            columns |= instruction_following_difficulty(self.evaluator, self.student, examples, begin)
        elif "ce" in self.settings.scores and "ce" not in columns:
            columns["ce"] = mean_per_target(self.evaluator, self.student, examples)["ce"]
        return columns
