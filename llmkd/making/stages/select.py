"""*select*: keeps rows by their scores, or the version of each row that Selective Reflection-Tuning chooses."""

from collections.abc import Iterator, Sequence

from ...config.make_score import Select as Settings
from ...errors import UserError
from ..clusters import by_words, refuse_without_clusters
from ..rows import Row
from ..selection import ORIGINAL, ByScore, reflection
from ..stage import Outcome, Rejected, Work
from .reflect import as_version
from .score import column_of, scored_by


class Select:
    chooses = True

    def __init__(self, settings: Settings):
        self.settings = settings
        if settings.clusters:
            refuse_without_clusters("clusters")

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        return self._by_reflection(rows) if self.settings.rule == "reflection" else self._by_score(rows, work)

    def _by_score(self, rows: Sequence[Row], work: Work) -> Outcome:
        one, outcome = self.settings, Outcome()
        scores = [column_of(row, one.by, "by") for row in rows]
        refuse_several_models(rows, one.by)
        clusters = by_words([row.instruction for row in rows], one.clusters, work.draw("clusters")) if one.clusters and rows else None
        rule = ByScore(one.above, one.below, one.top, one.middle, one.per_cluster)
        for row, reason in zip(rows, rule.choose(scores, [row.id for row in rows], clusters), strict=True):
            outcome.take(row, Rejected(row, *reason) if reason else row)
        return outcome

    def _by_reflection(self, rows: Sequence[Row]) -> Outcome:
        outcome = Outcome()
        for name in ("ifd", "rifd"):
            refuse_several_models(rows, name)
        for versions in _versions(rows):
            if ORIGINAL not in versions:
                outcome.rejected += [Rejected(row, "no_original", "an earlier stage has left it out") for row in versions.values()]
                continue
            scores = {name: (column_of(row, "ifd", "rule"), column_of(row, "rifd", "rule")) for name, row in versions.items()}
            chosen, reason = reflection(scores, self.settings.originals == "keep")
            for name, row in versions.items():
                if name == chosen:
                    outcome.take(row, Rejected(row, *reason) if reason else row)
                else:
                    outcome.rejected.append(Rejected(row, "other_version", f"{chosen} is chosen"))
        return outcome


def refuse_several_models(rows: Sequence[Row], column: str) -> None:
    """UserError if the scores come from different models, and so cannot be compared."""
    models = {scored_by(row).get(column) for row in rows}
    if len(models) > 1:
        raise UserError(
            f"{column}: the rows have scores of {len(models)} different models or ways to score, which cannot be compared; score all rows with one stage"
        )


def _versions(rows: Sequence[Row]) -> Iterator[dict[str, Row]]:
    """The versions of each row, by name, in the order of the rows."""
    groups: dict[str, dict[str, Row]] = {}
    for row in map(as_version, rows):
        version, versions = row.notes["version"], groups.setdefault(row.notes["original"], {})
        if version in versions:
            raise UserError(
                f"rule: the row {row.id} is a second {version} version of {row.notes['original']}; put reflect_instruction and reflect_response before, once each"
            )
        versions[version] = row
    yield from groups.values()
