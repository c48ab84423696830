"""Write a teacher cache from top-k log-probabilities that were computed elsewhere: by vLLM, an OpenAI-style API, DistillKit, axolotl, or in our own format.

The file is JSON lines, or Parquet (a file, or a folder of them): one line or row for each example, in the order of the examples, or with "row", the
number of the data's row (from 1). It has one of these forms:

    {"labels": [5, 7], "top": [[[5, -0.1], [9, -3.2]], [[7, -0.02]]]}                    ids and log-probabilities, target by target
    {"prompt_token_ids": [1, 5, 7], "prompt_logprobs": [null, {"5": {"logprob": -0.1}, ...}, ...]}      vLLM, the whole text; each has its own token
    {"logprobs": {"content": [{"token": " so", "logprob": -0.1, "top_logprobs": [{"token": ..., "logprob": ...}, ...]}, ...]}}
    {"logprobs": [[{"token": "token_id:5", "logprob": -0.1}, ...], ...]}       axolotl: a list for each token at the end of the text, or in two columns:
    {"logprobs": [[-0.1, ...], ...], "target_token_ids": [[5, ...], ...]}      half of all targets at least must be in their own lists
    input_ids, and one of DistillKit's three forms, in Parquet (`distillkit.py`): in any order, since the ids name the example

(the third also inside "choices", as the API returns it; only for examples with one answer). Log-probabilities are natural logarithms of
the model's own distribution at temperature 1. Tokens that are not listed form the tail, and so do tokens below exp(-100) and strings that
match no token or several. Every target is compared with the example's own label. The last target of an example may have no entry
(APIs seldom return one for the end of the turn): it then adds nothing to the loss.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...config.teacher import LISTED_EXPONENTS
from ...data.examples import TokenExamples
from ...data.reading.problems import ErrorCollector
from ...errors import UserError
from ...servers.logprobs import SLACK
from .. import listed
from ..sparse import TopK
from .import_lines import entries_of, rows_in
from .records import TopKFormat
from .shards import Writer
from .told import Entry, Told


@dataclass(frozen=True)
class Line:
    place: str  # as file:line
    position: Any  # in its file
    example: int


def make_format(vocab: int, k: int, value_bits: int) -> TopKFormat:
    """The record format of an imported cache. If the file lists more than `k` tokens for a target, the others become part of the tail."""
    return TopKFormat(vocab, min(k, vocab), value_bits, LISTED_EXPONENTS)


def write(path: str | Path, encoded: TokenExamples, tokenizer, writer: Writer, progress=iter) -> dict[str, int]:
    """Check the whole file, then write the cache. UserError names file and line.

    Returns counts: `unknown_tokens`, strings that match no single token and became part of the tail; `unknown_targets`, last targets without
    an entry; `unused`, lines about rows without an example; `rounded`, targets whose probabilities were scaled to 1.

    writer   with a format from `make_format`; this calls its `begin`
    """
    reader = AnswersReader(Path(path), encoded, tokenizer, writer.format)
    lines = reader.lines(progress)
    if not writer.begin():
        for number in progress(writer.left()):
            shard = writer.shard(number)
            for i, count in zip(shard.examples.tolist(), shard.targets_E.tolist(), strict=True):
                shard.put([encoded.content_hash(i)], [count], reader.records(lines[i]))
            shard.write()
        writer.finish()
    return dict(reader.counts)


class AnswersReader:
    def __init__(self, path: Path, encoded: TokenExamples, tokenizer, record_format: TopKFormat):
        self.path, self.encoded, self.tokenizer, self.format = path, encoded, tokenizer, record_format
        self.counts = Counter(unknown_tokens=0, unknown_targets=0, unused=0, rounded=0)
        self.file = rows_in(path) if path else None
        self.by_ids: dict[bytes, list[int]] = {}  # examples by their token ids, for lines that have these
        self.targets = self.own = 0  # in axolotl's forms: all targets, and those whose own token is in their list
        self._texts: list[str] | None = None
        self.ids_of_strings: dict[str, int] = {}

    def lines(self, progress) -> dict[int, Line]:
        """Read and check all lines; returns the line of each example, by its index."""
        problems, found = ErrorCollector(), {}
        for before, (place, position, content) in enumerate(progress(self.file.rows())):
            try:
                line = self.file.parsed(content)
                i = self._example(line, before)
                if i is None:
                    self.counts["unused"] += 1
                    continue
                if i in found:
                    raise ValueError(f"row {int(self.encoded.row[i]) + 1} is also in {found[i].place}; remove one of them")
                self._targets(line, i, self.counts)
                found[i] = Line(place, position, i)
            except ValueError as error:
                problems.add(f"{place}: {error}")
        problems.raise_if_any()
        if self.targets and self.own < self.targets / 2:
            raise UserError(
                f"{self.path}: only {self.own:,} of {self.targets:,} targets are in their own lists of tokens; the lists are another text's, or shifted: their last "
                "one is to be about the example's last token"
            )
        if len(found) < len(self.encoded):
            lacking = next(i for i in range(len(self.encoded)) if i not in found)
            raise UserError(
                f"{self.path}: has lines for {len(found)} of {len(self.encoded)} examples; the first one missing is that of row {int(self.encoded.row[lacking]) + 1}; add them"
                + (f" ({self.counts['unused']} lines are about other texts or token ids)" if self.counts["unused"] else "")
            )
        return found

    def records(self, line: Line) -> np.ndarray:
        return self.format.encode(self._known(*self._targets(self.file.at(line.position), line.example, Counter()))).numpy()

    def _example(self, line: dict, before: int) -> int | None:
        """The index of a line's example, by its row or else by the number of lines before it. None for a row without an example."""
        row = line.get("row")
        if row is None and "listed" in line:
            return self._of_ids(line["input_ids"])
        if row is None:
            if before >= len(self.encoded):
                raise ValueError(f"there are {len(self.encoded)} examples, and this is line {before + 1}; give every line its row")
            return before
        of_row = np.flatnonzero(self.encoded.row == row - 1) if type(row) is int else []
        if len(of_row) > 1 or type(row) is not int:
            raise ValueError(f"row: found {row!r}, which makes {len(of_row)} examples; leave row out, and give a line for each")
        return int(of_row[0]) if len(of_row) else None

    def _of_ids(self, ids: list[int]) -> int | None:
        """The index of the example with these token ids, or of a truncated one with the first of them; of several equal ones the next."""
        if not self.by_ids:
            for i in reversed(range(len(self.encoded))):
                self.by_ids.setdefault(self.encoded.example(i)[0].tobytes(), []).append(i)
        given = np.asarray(ids, np.int64).astype(self.encoded.ids.dtype)
        for key in (given.tobytes(), given[: int(self.encoded.lengths.max(initial=0))].tobytes()):
            if self.by_ids.get(key):
                return self.by_ids[key].pop()
        return None

    def _targets(self, line: dict, i: int, counts: Counter) -> tuple[Told, np.ndarray]:
        """The listed tokens of each target, and its label. ValueError if the line is not about this example."""
        ids, marks = self.encoded.example(i)
        labels = ids[marks].tolist()
        entries = entries_of(line)
        if entries is not None:
            self._same(line["labels"], labels)
        elif "listed" in line:
            entries = self._distillkit(line, marks, counts)
        elif "prompt_logprobs" in line:
            entries = self._vllm(line, ids, marks)
        elif isinstance(line["logprobs"], list):
            entries = self._axolotl(line, ids, marks)
        else:
            entries = self._openai(line["logprobs"].get("content"), labels, counts)
        if isinstance(entries, Told):
            told, doubtful = entries, ((n, entries.entry(n)) for n in entries.doubtful(self.format.vocab).tolist())
        else:
            told, doubtful = None, enumerate(self._one_each(entries, labels))
        for n, entry in doubtful:
            if not entry and n + 1 < len(labels):
                raise ValueError(f"target {n + 1} ({self._shown(labels[n])}) has no log-probabilities")
            self._check(entry, n)
        told = Told.of(entries) if told is None else told
        counts["unknown_targets"] += not told.known_NM[-1].any()
        return told, ids[marks]

    def _one_each(self, entries: list[Entry], labels: list[int]) -> list[Entry]:
        """One entry for each target; the last one may be missing, and is then empty."""
        if len(entries) == len(labels) - 1:
            entries.append({})
        if len(entries) != len(labels):
            raise ValueError(
                f"has {len(entries)} targets, and the example {len(labels)}; it was made with another text, template or tokenizer"
            )
        return entries

    def _distillkit(self, line: dict, marks: np.ndarray, counts: Counter) -> Told:
        given, (ids_LK, log_p_LK) = len(line["input_ids"]), line["listed"]
        if len(ids_LK) not in (given, given - 1):
            raise ValueError(f"has {len(ids_LK)} lists of tokens for {given} tokens, expected one for each that follows another")
        places = np.flatnonzero(marks) - 1  # a place's list is about the token after it
        told = Told(ids_LK[places], log_p_LK[places])
        if (twice_N := told.twice_N()).any():
            raise ValueError(f"names a token twice at token {places[twice_N][0] + 1}")
        counts["rounded"] += told.scale_rounded()
        return told

    def _axolotl(self, line: dict, ids: np.ndarray, marks: np.ndarray) -> Told | list[Entry]:
        lists, tokens = line["logprobs"], line.get("target_token_ids")
        if len(lists) > len(ids) or (isinstance(tokens, list) and len(tokens) != len(lists)):
            raise ValueError(f"has {len(lists)} lists of log-probabilities, and the example {len(ids)} tokens")
        places = np.flatnonzero(marks) - (len(ids) - len(lists))  # lists are about the last tokens
        self.targets += len(places)
        if isinstance(tokens, list) and (told := _of_columns(tokens, lists, places)):
            self.own += int((~np.isnan(told.of_labels(ids[marks]))).sum())
            return told
        entries = []
        try:
            for t in places:
                if tokens is None:
                    pairs = [(int(one["token"].removeprefix("token_id:")), one["logprob"]) for one in (lists[t] if t >= 0 else ()) or ()]
                else:
                    pairs = list(zip(tokens[t] or (), lists[t] or (), strict=True)) if t >= 0 else []
                entries.append({int(token): value for token, value in pairs if value != -math.inf})
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            raise ValueError(
                'logprobs: expected [{"token": "token_id:5", "logprob": x}, ...] for each token, or numbers with target_token_ids'
            ) from None
        self.own += sum(label in entry for label, entry in zip(ids[marks].tolist(), entries, strict=True))
        return entries

    def _vllm(self, line: dict, ids: np.ndarray, marks: np.ndarray) -> list[Entry]:
        given, top = line.get("prompt_token_ids"), line["prompt_logprobs"]
        if not isinstance(given, list) or not isinstance(top, list) or len(given) != len(top):
            raise ValueError("expected lists of one length as prompt_token_ids and prompt_logprobs")
        last = int(np.flatnonzero(marks)[-1]) + 1
        self._same(given[:last], ids[:last].tolist(), "token")
        places = np.flatnonzero(marks)
        try:
            entries = [{int(token): x["logprob"] if isinstance(x, dict) else x for token, x in (top[t] or {}).items()} for t in places]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError('prompt_logprobs: expected {"id": {"logprob": x}, ...} for each token') from None
        for n, (entry, label) in enumerate(zip(entries, ids[marks].tolist(), strict=True), 1):
            if entry and label not in entry:  # vLLM lists every token of the prompt itself
                raise ValueError(
                    f"prompt_logprobs: target {n} ({self._shown(label)}) is not in its own list; is the list shifted by one token?"
                )
        return entries

    def _openai(self, content, labels: list[int], counts: Counter) -> list[Entry]:
        texts, entries = self.token_strings(), []
        try:
            if len(content) > len(labels):
                raise ValueError(f"has {len(content)} targets, and the example {len(labels)}")
            for n, (given, label) in enumerate(zip(content, labels, strict=False), 1):
                if given["token"] != texts[label]:
                    raise ValueError(f"target {n} is {given['token']!r} here, and {self._shown(label)} in the example")
                entry = {label: given["logprob"]}
                for other in given.get("top_logprobs") or ():
                    token = self.ids_of_strings.get(other["token"], -1)
                    if token >= 0:
                        entry.setdefault(token, other["logprob"])
                    elif other["token"] != given["token"]:
                        counts["unknown_tokens"] += 1
                entries.append(entry)
        except (AttributeError, KeyError, TypeError):
            raise ValueError("logprobs.content: expected token, logprob and top_logprobs for each target") from None
        return entries

    def token_strings(self) -> list[str]:
        """The string of each token in the middle of a text. `ids_of_strings` maps the strings that belong to a single token to it."""
        if self._texts is None:
            before = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
            plain = {"clean_up_tokenization_spaces": False, "skip_special_tokens": False}
            start = len(self.tokenizer.decode(before, **plain))
            self._texts = [text[start:] for text in self.tokenizer.batch_decode([[*before, i] for i in range(self.format.vocab)], **plain)]
            often = Counter(self._texts)
            self.ids_of_strings = {text: i for i, text in enumerate(self._texts) if often[text] == 1}
        return self._texts

    def _same(self, given: list, wanted: list[int], what: str = "target") -> None:
        for n, (a, b) in enumerate(zip(given, wanted, strict=False), 1):
            if a != b:
                raise ValueError(f"{what} {n} is {self._shown(a)} here, and {self._shown(b)} in the example")
        if len(given) != len(wanted):
            raise ValueError(
                f"has {len(given)} {what}s, and the example {len(wanted)}; it was made with another text, template or tokenizer"
            )

    def _shown(self, token) -> str:
        known = type(token) is int and 0 <= token < self.format.vocab
        return f"{token} {self.tokenizer.convert_ids_to_tokens(token)!r}" if known else repr(token)

    def _check(self, entry: Entry, n: int) -> None:
        for token, value in entry.items():
            if not 0 <= token < self.format.vocab:
                raise ValueError(f"target {n + 1}: token {token} is not one of the vocabulary's {self.format.vocab}")
            if type(value) not in (int, float) or not value <= SLACK:
                raise ValueError(f"target {n + 1}: found {value!r} for token {self._shown(token)}, expected a log-probability (at most 0)")
        total = math.fsum(math.exp(value) for value in entry.values())
        if total > 1 + SLACK:
            raise ValueError(f"target {n + 1}: the probabilities sum to {total:.4f}, more than 1; log-probabilities are natural logarithms")

    def _known(self, told: Told, labels_N: np.ndarray) -> TopK:
        return listed.top_k(told.ids_NM, told.log_p_NM, told.of_labels(labels_N), self.format.k, self.format.vocab)


def _of_columns(tokens: list, values: list, places: np.ndarray) -> Told | None:
    """The lists of two columns at some places, if they are lists of numbers with one length; else None. Of a token that is listed twice, the later
    one counts."""
    if not len(places) or places[0] < 0:
        return None
    rows = [[column[t] for t in places.tolist()] for column in (tokens, values)]
    if not all(type(one) is list for one in chain(*rows)) or len({len(one) for one in chain(*rows)}) != 1:
        return None
    if set(map(type, chain.from_iterable(rows[0]))) != {int} or not set(map(type, chain.from_iterable(rows[1]))) <= {int, float}:
        return None
    try:
        told = Told(np.array(rows[0], np.int64), np.array(rows[1], np.float64))
    except OverflowError:
        return None
    for n in np.flatnonzero(told.twice_N()):
        told.put(n, told.entry(n))
    return told
