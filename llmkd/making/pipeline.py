"""`llmkd make`: runs the stages in order and writes the data, the rejected rows, the counts and a data card.

The only state is the file of answers: the stages are computed from it anew each time. So a run continues where it was killed, a finished
run asks for nothing, and after a change of a prompt only the asks that depend on it are new.
"""

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.make import MakeSettings, StageSettings, dump_make
from ..config.make import Writer as WriterSettings
from ..console import count, info, table, warn
from ..errors import UserError
from ..files import Damaged, read_sealed, remove_leftovers, sha256_file, write_atomic, write_sealed
from ..rollouts.sampling import Sampling
from .answers import NAME, Answers
from .asks import CUT, Answer, Ask, estimated_tokens
from .card import data_card
from .progress import shown
from .prompts import NO_PROMPTS, Prompts, has_prompts, load_prompts
from .registry import STAGES
from .rows import Row, has_answer
from .seeds import read_seeds
from .sounds import written_sounds
from .stage import Outcome, Rejected, Stage, Work
from .writers.writer import Writer

TRAIN, REJECTED, SUMMARY, SETTINGS, CARD = "train.jsonl", "rejected.jsonl", "make.json", "make.yaml", "README.md"
_THINKS = re.compile(r"</?think>")  # some chat templates write the opening tag themselves, and the text has only the closing one
#: Keys of a line of rejected.jsonl that do not come from the row. Columns of the row with these names are moved below the last one.
_COLUMNS = "columns"
_WHY = ("stage", "reason", "detail", "answer", _COLUMNS)
_FEW = 20  # up to so many candidates, all may be rejected


@dataclass
class StageCount:
    """Counts of a stage: passed + candidates - rejected = out.

    asks                    different asks, of which `new` were not in the file of answers
    prompt_tokens, tokens   tokens read and written for these asks; in a dry run an estimate of the most there can be
    """

    stage: str
    rows: int
    passed: int = 0
    asks: int = 0
    new: int = 0
    candidates: int = 0
    rejected: int = 0
    out: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


class Pipeline:
    """The stages of one file, run with a writer. `dry_run`: count the asks and tokens, and ask nothing."""

    def __init__(self, settings: MakeSettings, writer: Writer, dry_run: bool = False):
        self.make, self.stages, self.writer, self.dry_run = settings.make, settings.stages, writer, dry_run
        self.settings, self.folder = settings, Path(settings.make.output_dir).expanduser()
        self.prompts = [_prompts_of(one) for one in self.stages]
        self.made = [_stage_of(one) for one in self.stages]
        self.answers = Answers(self.folder / NAME)
        self.rows: list[Row] = []
        self.counts: list[StageCount] = []
        self.rejected: list[tuple[str, Rejected]] = []
        self.unanswered = 0  # asks that got no answer in this run
        self.reasoned = 0  # answers whose reasoning stood apart from the text

    def run(self) -> list[StageCount]:
        """Run all stages. UserError for a user's mistake; Stopped after a signal: what is written is kept, and the same call continues."""
        rows = read_seeds(self.make.seeds) if self.make.seeds else []
        if self.dry_run:
            self.answers.read()
            self.rows = self._stages(rows)
            return self.counts
        refuse_foreign(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.answers.open():
            refuse_changed(self.folder)
            remove_leftovers(self.folder)
            rows = written_sounds(rows, self.folder)
            if not self.answers.known:
                self.writer.check()
            self.rows = self._stages(rows)
            self._write(self.rows)
        return self.counts

    def _stages(self, rows: list[Row]) -> list[Row]:
        for one, stage, prompts in zip(self.stages, self.made, self.prompts, strict=True):
            counted = StageCount(one.label, len(rows))
            work = self._work(one, prompts, counted)
            with contextlib.nullcontext() if one.asks else _named(one):  # an error of the writer is not the stage's
                outcome = Outcome(list(rows)) if self.dry_run and not one.asks else stage.run(rows, work)
            rows = outcome.rows
            self._count(counted, outcome, stage)
            if not rows and not self.dry_run:
                raise self._too_few(f"stages.{one.number - 1} ({one.do}): no row is left: {self._reasons(counted)}")
        return self._with_answers(rows)

    def _with_answers(self, rows: list[Row]) -> list[Row]:
        """The rows that have an answer; the others are rejected."""
        outcome, counted = Outcome(), StageCount("train", len(rows))
        for row in rows:
            outcome.take(row, row if has_answer(row) or self.dry_run else Rejected(row, "no_answer", "no stage has answered it"))
        self._count(counted, outcome, None)
        if not outcome.kept and not self.dry_run:
            raise self._too_few("stages: no row has an answer to train on; add the stage answer, as in {do: answer}")
        return outcome.kept

    def _count(self, counted: StageCount, outcome: Outcome, stage: Stage | None) -> None:
        counted.passed, counted.rejected = len(outcome.passed), len(outcome.rejected)
        counted.candidates, counted.out = len(outcome.kept) + len(outcome.rejected), len(outcome.rows)
        counted.reasons = dict(Counter(one.reason for one in outcome.rejected).most_common())
        self.counts.append(counted)
        self.rejected += [(counted.stage, one) for one in outcome.rejected]
        if self.dry_run or getattr(stage, "chooses", False):
            return
        if counted.candidates > _FEW and counted.rejected > self.make.max_rejected * counted.candidates:
            raise self._too_few(
                f"{counted.stage}: {counted.rejected:,} of {counted.candidates:,} candidates are rejected (max_rejected is "
                f"{self.make.max_rejected:g}): {self._reasons(counted)}"
            )

    def _too_few(self, problem: str) -> UserError:
        """The error that stops the command; writes the rejected rows, so that they can be looked at."""
        (self.folder / SUMMARY).unlink(missing_ok=True)
        self._write_rejected()
        return UserError(f"{problem}; {self.folder / REJECTED} has each with its reason")

    def _reasons(self, counted: StageCount) -> str:
        """The number of rejected rows by reason, each with its most frequent detail."""
        out = []
        for reason, number in counted.reasons.items():
            details = Counter(one.detail for stage, one in self.rejected if stage == counted.stage and one.reason == reason and one.detail)
            out.append(f"{reason} {number:,}" + (f" ({details.most_common(1)[0][0]})" if details else ""))
        return ", ".join(out) or "it had none to begin with"

    # ---- asking

    def _work(self, one: StageSettings, prompts: Prompts, counted: StageCount) -> Work:
        writer = self.make.writer or WriterSettings()
        sampling = Sampling(writer.temperature, writer.max_new_tokens, 0, writer.top_p, writer.top_k, writer.min_p)

        def answer(asks: Sequence[Ask]) -> list[Answer]:
            return self._answer(asks, counted, one)

        return Work(
            one.label, self.make.seed, self.writer.label, self.writer.identity, sampling, prompts, self.folder, answer, self.dry_run
        )

    def _answer(self, asks: Sequence[Ask], counted: StageCount, one: StageSettings) -> list[Answer]:
        """The answers to asks, in their order. Missing ones are asked of the writer and added to the file."""
        known, found = self.answers.known, {}
        different = {ask.key: ask for ask in asks}
        missing = [ask for key, ask in different.items() if key not in known]
        counted.asks += len(different)
        counted.new += len(missing)
        if self.dry_run:
            found = {ask.key: _pretended(ask) for ask in missing}
        while missing and not self.dry_run:
            allowed = self._within_limit(missing)
            if not allowed:
                raise UserError(
                    f"limit_tokens: the answers have cost {self.answers.tokens:,} of {self.make.limit_tokens:,} tokens, and the next ask "
                    f"might exceed that ({one.label}, {count(len(missing), 'ask')} left); what is written is kept: raise it, and the same command goes on"
                )
            wanted = {ask.key for ask in allowed} | known.keys() | found.keys()
            these = [ask for ask in different.values() if ask.key in wanted]
            written = self.writer.write(these, known.keys() | found.keys())
            for ask, said in shown(written, one.label, len(allowed), "answer", tokens=lambda pair: pair[1].tokens):
                if said.problem is None:
                    self.answers.add(ask, said)
                else:
                    self.answers.lose(ask, said)
                    found[ask.key] = said
                if self.make.limit_tokens is not None and self.answers.tokens > self.make.limit_tokens:
                    break  # the writer counts more tokens than `_most_tokens` allows for
            missing = [ask for ask in missing if ask.key not in known and ask.key not in found]
        self.unanswered += sum(said.problem is not None for said in found.values())
        answers = [known.get(ask.key) or found[ask.key] for ask in asks]
        per_key = {ask.key: said for ask, said in zip(asks, answers, strict=True)}
        counted.prompt_tokens += sum(said.prompt_tokens for said in per_key.values())
        counted.tokens += sum(said.tokens for said in per_key.values())
        self.reasoned += sum(said.reasoning is not None for said in per_key.values())
        return answers

    def _within_limit(self, missing: list[Ask]) -> list[Ask]:
        """The first of the asks: so many that limit_tokens holds however long their answers are."""
        if self.make.limit_tokens is None:
            return missing
        left, out = self.make.limit_tokens - self.answers.tokens, []
        for ask in missing:
            most = _most_tokens(ask)
            if most > left:
                break
            left -= most
            out.append(ask)
        return out

    # ---- what is left

    def _write(self, rows: list[Row]) -> None:
        (self.folder / SUMMARY).unlink(missing_ok=True)  # it has the hashes of the other files, so it is written last
        write_atomic(self.folder / TRAIN, "".join(_line(row.as_json()) for row in rows))
        self._write_rejected()
        write_atomic(self.folder / SETTINGS, dump_make(self.settings, self.folder))
        used = [(one.label, prompts) for one, prompts in zip(self.stages, self.prompts, strict=True) if prompts is not NO_PROMPTS]
        write_atomic(self.folder / CARD, data_card(self.settings, self.writer, self.counts, used, self.answers, len(rows)))
        sums = {name: sha256_file(self.folder / name) for name in (TRAIN, REJECTED)}
        write_sealed(self.folder / SUMMARY, {"rows": len(rows), "stages": [dataclasses.asdict(one) for one in self.counts], "sha256": sums})

    def _write_rejected(self) -> None:
        lines = []
        for stage, one in self.rejected:
            why = {"stage": stage, "reason": one.reason} | ({"detail": one.detail} if one.detail else {})
            row, own = one.row.as_json(), [name for name in _WHY if name in one.row.columns]
            columns = {_COLUMNS: {name: row.pop(name) for name in own}} if own else {}
            lines.append(_line(why | ({} if one.answer is None else {"answer": one.answer}) | row | columns))
        write_atomic(self.folder / REJECTED, "".join(lines))


def refuse_foreign(folder: Path) -> None:
    """UserError for a folder with files that `llmkd make` did not write."""
    if not folder.is_dir() or (folder / NAME).exists():
        return
    if others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise UserError(f"output_dir: {folder} holds something else ({others[0]}); choose another folder")


def refuse_changed(folder: Path) -> None:
    """UserError if a file has changed since `llmkd make` wrote it. For the one process that writes to the folder."""
    if not (folder / SUMMARY).exists():
        return
    try:
        known = [*read_sealed(folder / SUMMARY)["sha256"].items()]
    except (Damaged, KeyError, AttributeError, OSError):
        raise UserError(f"{folder / SUMMARY}: is damaged; delete it, and the same command writes it again") from None
    for name, digest in known:
        if (folder / name).exists() and sha256_file(folder / name) != digest:
            raise UserError(
                f"{folder / name}: has changed since it was written; move it to where it is to be kept, and the same command writes it again"
            )


def _prompts_of(one: StageSettings) -> Prompts:
    """The prompts of a stage. UserError if its prompt file is wrong."""
    if not has_prompts(one.do):
        return NO_PROMPTS
    places = getattr(STAGES[one.do], "places", lambda settings: None)(one.settings)
    return load_prompts(one.do, one.settings.prompt, f"stages.{one.number - 1}.prompt", places)


def _stage_of(one: StageSettings) -> Stage:
    """A stage. It checks its files, models and packages now, before anything is asked; UserError with the stage's name."""
    with _named(one):
        return STAGES[one.do](one.settings)


@contextlib.contextmanager
def _named(one: StageSettings) -> Iterator[None]:
    """Put the stage's name before the problems of a UserError raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"stages.{one.number - 1} ({one.do}): {problem}" for problem in error.problems)) from None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _most_tokens(ask: Ask) -> int:
    """The most tokens that an ask and its answer can have: every token is at least a byte, and a chat template adds a few."""
    return sum(len(one["content"].encode()) + 8 for one in ask.messages) + ask.sampling.max_new_tokens


def _pretended(ask: Ask) -> Answer:
    read = estimated_tokens(*(one["content"] for one in ask.messages))
    return Answer(ask.pretend or "Text.", tokens=ask.sampling.max_new_tokens, prompt_tokens=read)


def report(counts: Sequence[StageCount], dry_run: bool) -> str:
    """The counts as a table, and below it a line for each stage and reason of rejection."""
    names = ("stage", "rows", "asks", "new", "passed", "candidates", "rejected", "out", "prompt_tokens", "tokens")
    lines = [table([{name.replace("_", " "): getattr(one, name) for name in names} for one in counts])]
    for one in counts:
        lines += [f"{one.stage}: {reason} {number:,}" for reason, number in one.reasons.items()]
    if dry_run:
        lines.append(
            f"{sum(one.new for one in counts):,} asks are not answered yet. Rows, asks and tokens are upper bounds: every new answer counts max_new_tokens, "
            "nothing is rejected except rows beyond the number asked for, and the tokens of prompts are estimated"
        )
    return "\n".join(lines)


def say_end(pipeline: Pipeline) -> None:
    """Print one line on the data that was made, and notes on answers that may be unintended."""
    done = pipeline.counts[-1]
    info(
        f"{pipeline.folder / TRAIN}: {count(done.out, 'row')}; {count(pipeline.answers.new, 'new answer')} of {len(pipeline.answers.known):,}, "
        f"{pipeline.answers.tokens:,} tokens in all"
    )
    if cut := sum(row.notes.get("finish") == CUT for row in pipeline.rows):
        warn(
            f"note: {count(cut, 'answer')} of {done.out:,} ended at writer.max_new_tokens; training gives them an end token all the same: "
            "{do: keep, finish: stop} leaves them out"
        )
    if pipeline.reasoned:
        warn(
            f"note: {count(pipeline.reasoned, 'answer')} came with reasoning apart from the text; it is not kept, and the student does not learn it"
        )
    if thinking := sum(bool(row.writer and _THINKS.search(row.answer)) for row in pipeline.rows):
        warn(
            f"note: {count(thinking, 'answer')} of {done.out:,} have <think> in the text, and the student learns it; a server leaves it out with "
            "writer.body: {chat_template_kwargs: {enable_thinking: false}}, or with its reasoning parser"
        )
    if pipeline.unanswered:
        warn(f"note: {count(pipeline.unanswered, 'ask')} got no answer ({REJECTED} says why); the same command asks for these again")


def make(settings: MakeSettings, writer_of: Callable[[], Writer], dry_run: bool = False) -> dict[str, Any]:
    """Run a file's stages and return counts, as `--json` writes them."""
    writer = writer_of()
    pipeline = Pipeline(settings, writer, dry_run)
    try:
        counts = pipeline.run()
    finally:
        writer.close()
    if not dry_run:
        say_end(pipeline)
    return {
        "file": None if dry_run else str(pipeline.folder / TRAIN),
        "rows": counts[-1].out,
        "new_answers": pipeline.answers.new,
        "answers": len(pipeline.answers.known),
        "all_tokens": pipeline.answers.tokens,
        "unanswered": pipeline.unanswered,
        "stages": [dataclasses.asdict(one) for one in counts],
    }
