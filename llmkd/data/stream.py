"""Training rows that are read and tokenised during training: the first batch is ready within seconds, and memory is constant.

Optimizer step k (from 1) consumes rows (k - 1) * batch_size to k * batch_size of an endless stream: passes over the source, each with its
rows shuffled within blocks of `shuffle_buffer` rows by (seed, pass, block). Rows that are too long or have no answer make their step
smaller, and the loss stays exact, since it is divided by the step's targets. Step k always uses the same rows, so a resumed run skips the
earlier rows without tokenising them. The rows of the first pass are hashed in the order in which steps take them, and a run resumes only
if they are unchanged; a bad row that ended the run was not taken by a step, so it may be corrected.
"""

import dataclasses
import functools
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..config.recipe import Data, Source
from ..console import info, warn
from ..errors import UserError, fix_of
from .batch_source import ExampleSource, Step
from .batching import Batching
from .encoding.encode import encode
from .encoding.end_tokens import end_tokens
from .encoding.formats import refuse_without_template
from .examples import ALL_TEACHERS, TokenExamples
from .notes import example_notes
from .reading import skills
from .reading.class_names import names_of_data
from .reading.files import Records, kind_of, raw, records, row_of
from .reading.problems import BadRow, ErrorCollector
from .reading.row_checks import check_row
from .reading.sources import Rows, from_hub, hub_revision, local, no_rows
from .reading.unread import note_unread
from .reading.where import Chosen


class StreamSource(ExampleSource):
    """A batch source that reads an endless stream of rows. `examples` and `places` are those of its first step."""

    reads_while_training = True

    def __init__(self, source: Source, data: Data, tokenizer, batching: Batching, teacher: int = ALL_TEACHERS):
        super().__init__(batching.seed, batching.max_steps, batching.micro_batch_size)
        self.source, self.data, self.tokenizer, self.setting = source, data, tokenizer, "data.train"
        self.batch_size, self.teacher = batching.batch_size, teacher
        self.counts: dict[str, int] = {}
        self.end_tokens: set[int] = set()  # of the steps read so far; all copies of this source share the set
        self._pass_rows: int | None = None  # the number of rows, known after the first pass
        self._hashes: dict[int, str] = {}  # for each of the last few steps, the hash of all rows up to it
        self._expected: str | None = None
        self.files = None if source.path == "builtin:skills" else local(source, self.setting)
        listed = next((name for name, path in self.files or [] if kind_of(path) == ".json"), None)
        if listed:
            raise UserError(
                f"data.streaming: {listed} is one list, which must be read as a whole; write its rows to a .jsonl file, or set it to false"
            )
        self.origin = {"path": source.path, "name": source.name, "split": source.split, "revision": source.revision, "rows": None}
        self.examples, self.places = self._first()

    def _first(self) -> tuple[TokenExamples, list[str]]:
        """The first step's examples and places. All rows of the first block are checked too, before a model is loaded."""
        chosen = Chosen(self.source, self.setting)
        block = list(itertools.islice(self._records(chosen), self.data.shuffle_buffer))
        if not block:
            chosen.refuse_none()
            raise no_rows(self.source, self.setting)
        unread = self._checked(block).unread
        self._named = set(unread)
        note_unread(self.setting, self.source, unread, len(block), "of the first {}")
        chosen.report(" so far")
        return self._encode([(place, get) for _, place, get in itertools.islice(self.rows_from(0), self.batch_size)])

    @property
    def content(self) -> str:
        """A hash of the source's name and files, by which a resumed run recognises it; `state` identifies the rows. Hashing all of them here would
        take as long as reading them."""
        named = [self.source.path, self.source.name, self.source.split, self.origin["revision"], [name for name, _ in self.files or []]]
        return f"stream {hashlib.sha256(repr(named).encode()).hexdigest()}"

    def state(self, step: int) -> dict:
        """The hash of the rows of steps 1 to `step`, for a checkpoint. It is known for the last few steps only."""
        return {"rows": self._hashes.get(step)}

    def restore(self, state: dict) -> None:
        """Refuse rows that do not have the hash of a checkpoint's state, once the stream arrives there."""
        self._expected = state.get("rows")

    def steps(self, done: int = 0):
        """The steps after the first `done`. The rows of the next step are read and tokenised in the background; an error in them is raised when
        that step is due."""
        yield from super().steps(done)
        c = self.counts
        if c:
            for note in example_notes(c):
                warn(note.replace(": ", ": train: ", 1))
            marked = f", {c['marked']} marked as not trained on" if c["marked"] else ""
            dropped = f"{c['too_long']} too long, {c['unsupervised']} with nothing supervised{marked}"
            info(f"train: {c['rows']} rows streamed, {c['examples']} examples ({dropped})")

    def schedule(self, done: int = 0) -> Iterator[Step]:
        digest = hashlib.sha256()

        def arrived() -> None:
            if self._expected not in (None, digest.hexdigest()):
                raise UserError(
                    f"{self.setting}: the rows of the first {done} steps, or their order, have changed; give {self.source.path} as it was "
                    "(a bad row may be corrected, not removed), or choose another output_dir"
                )

        rows, barren = self.rows_from(done * self.batch_size, digest, arrived if done else None), 0
        for number in range(done + 1, self.total_steps + 1):
            taken = list(itertools.islice(rows, self.batch_size))
            self._hashes[number] = digest.hexdigest()
            self._hashes.pop(number - 8, None)
            data, places = self._encode([(place, get) for _, place, get in taken])
            for key, count in data.counts.items():
                self.counts[key] = self.counts.get(key, 0) + count
            barren = 0 if len(data) else barren + len(taken)
            if self._pass_rows and barren >= self._pass_rows:
                raise UserError(
                    f"{self.setting}: none of {self.source.path}'s rows gives a supervised token; check data.max_length and the rows"
                )
            examples = list(range(len(data)))
            split = self.split(examples, data.max_lengths)
            yield Step(number, taken[0][0], int(data.num_targets.sum()), data.weighted(examples), examples, split, data, places)

    def rows_from(self, skip: int, digest=None, arrived: Callable[[], None] | None = None) -> Iterator[tuple[int, str, Any]]:
        """(pass, place, function that returns the row) for the rows of the endless stream after the first `skip`.

        digest    a hash that all rows of the first pass are added to in their order, skipped ones too
        arrived   called once, before the first row that is not skipped
        """
        turn = 0
        while True:
            source, count, hashed = self._records(), 0, digest is not None and turn == 0
            for number in itertools.count():
                block = list(itertools.islice(source, self.data.shuffle_buffer))
                if not block:
                    break
                count += len(block)
                if skip >= len(block) and not hashed:
                    skip -= len(block)
                    continue
                random.Random(f"stream {self.seed} {turn} {number}").shuffle(block)
                for place, get in block:
                    if not skip and arrived:
                        arrived, _ = None, arrived()
                    if hashed:
                        digest.update(raw(get) + b"\n")
                    if skip:
                        skip -= 1
                    else:
                        yield turn, place, get
            if not count:
                raise no_rows(self.source, self.setting)
            self._pass_rows = count
            turn += 1 + skip // count
            skip %= count

    def _records(self, chosen: Chosen | None = None) -> Records:
        """One pass over the rows that the source's `where` and `limit` choose."""
        chosen = chosen or Chosen(self.source, self.setting)
        return itertools.islice(chosen.records(self._local() if self.files is not None else self._elsewhere()), self.source.limit)

    def _local(self) -> Records:
        for name, path in self.files:
            try:
                with open(path, "rb") as file:
                    yield from records(file, name, path)
            except OSError as error:
                raise UserError(
                    f"{self.setting}.path: {name}: {error.strerror}; {fix_of(error, 'fetch or write the file again')}"
                ) from error

    def _elsewhere(self) -> Records:
        if self.source.path == "builtin:skills":
            rows, names = skills.rows(self.source.split, self.source.name or "questions", self.source.noise), {}
        else:
            rows = from_hub(self.source, self.setting, streaming=True)
            names = names_of_data(rows)
            self.origin["revision"] = hub_revision(rows, self.source)
        place = f"{self.source.path}[{self.source.split}]"
        try:
            for number, row in enumerate(rows, 1):
                yield f"{place}:{number}", functools.partial(row_of, row, names)
        except Exception as error:  # the network may fail days into a run
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{place}: reading stopped ({type(error).__name__}: {reason[:160]}); try again, with --resume") from None

    def _checked(self, taken: list[tuple[str, Any]]) -> Rows:
        problems, rows, places, unread = ErrorCollector(), [], [], Counter()
        for place, get in taken:
            try:
                rows.append(check_row(get(), place, self.source, problems, unread=unread))
                places.append(place)
            except BadRow as error:
                problems.add(f"{place}: {error}", alike=error.alike)
        problems.raise_if_any()
        return Rows(rows, places, "", unread=unread)

    def _encode(self, taken: list[tuple[str, Any]]) -> tuple[TokenExamples, list[str]]:
        """The examples of some rows, and each example's place."""
        rows = self._checked(taken)
        if new := Counter({name: number for name, number in rows.unread.items() if name not in self._named}):
            self._named |= set(new)
            note_unread(self.setting, self.source, new, len(taken), f"of the {{}} of a step (near {taken[0][0]})")
        refuse_without_template(self.source, rows.rows, self.tokenizer, self.setting)
        examples = encode(rows, self.source, self.data, self.tokenizer)
        examples.teacher_index[:] = self.teacher
        examples.weigh(dataclasses.asdict(self.source.loss))
        self.end_tokens |= end_tokens(examples, self.data, self.tokenizer)
        return examples, [rows.places[i] for i in examples.row]
