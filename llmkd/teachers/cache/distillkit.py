"""The files of published sets of teachers' log-probabilities in DistillKit's forms: raw top-k, polynomials (its older form), and quantised, bit-packed ones.

A set is Parquet files with a row for each text: input_ids, and for each place the k most likely next tokens, as `token_ids` and `top_values`; as
`packed_indices`, `exact_values` and `coeffs`; or as `compressed_logprobs` and `bytepacked_indices`. Place t predicts token t + 1; the last place may be missing.
How the last two are packed is in compression_config.yaml next to the files, as DistillKit writes it, or under its names `logprob_compressor` and
`legacy_logit_compression`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, fix_of

CONFIG = "compression_config.yaml"
TYPES = ("float16", "bfloat16", "float32", "float64")
_FORMS = (("token_ids", "top_values"), ("packed_indices", "exact_values", "coeffs"), ("compressed_logprobs", "bytepacked_indices"))


@dataclass(frozen=True)
class Bin:
    """Consecutive residuals that are quantised with one scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Packed:
    """How log-probabilities are packed: the first ones exactly, the others as a function of their rank plus quantised residuals."""

    d: int
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...] = ()
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] | None = None
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False


@dataclass(frozen=True)
class Polynomials:
    """The older form: the first log-probabilities exactly, the others as a polynomial of their rank (from 1), or of its inverse."""

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"


class ParquetSet:
    """The rows of a Parquet file, or of all in a folder, in the order of their names."""

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise UserError(
                f"--import: {path}: is a folder that holds no .parquet file; name a file of log-probabilities, or a folder of such files"
            )
        self.form: Packed | Polynomials | None = None
        self.config = (path if path.is_dir() else path.parent) / CONFIG
        if self.config.exists():
            self.form = read_config(self.config)
        self._at: tuple[Path, int, Iterator[Any]] | None = None

    @property
    def parts(self) -> list[Path]:
        """All files that the rows depend on."""
        return [*self.files, *([self.config] if self.config.exists() else [])]

    def rows(self) -> Iterator[tuple[str, Any, Any]]:
        """(place, position, the row as Arrow has it) of each."""
        for file in self.files:
            for n, row in enumerate(self._of(file)):
                yield f"{file}:{n + 1}", (file, n), row

    def at(self, position: tuple[Path, int]) -> dict[str, Any]:
        """The row at a position. Rows that are asked for in order are read only once."""
        file, n = position
        if self._at is None or self._at[0] != file or self._at[1] > n:
            self._at = file, 0, self._of(file)
        _, before, rows = self._at
        for _ in range(n - before):
            next(rows)
        row = next(rows)
        self._at = file, n + 1, rows
        return self.parsed(row)

    def refuse_unreadable(self) -> None:
        """UserError for a file without the columns of a known form, and for a packed form without its settings."""
        import pyarrow.parquet

        for file in self.files:
            try:
                columns = set(pyarrow.parquet.ParquetFile(file).schema_arrow.names)
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(file, error) from error
            form = next((names for names in _FORMS if columns >= {*names, "input_ids"}), None)
            if form is None and "logprobs" not in columns:
                raise UserError(
                    f"{file}: has the columns {', '.join(sorted(columns))}, and of no known form: input_ids with "
                    f"{', or '.join(' and '.join(names) for names in _FORMS)}; or logprobs"
                )
            if form in _FORMS[1:] and not isinstance(self.form, Polynomials if form == _FORMS[1] else Packed):
                raise UserError(f"{file}: {form[0]} is packed by settings that are not here; write them to {CONFIG} next to the file")

    def _of(self, file: Path) -> Iterator[Any]:
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).iter_batches(1):
                yield from ({name: batch.column(name)[i] for name in batch.schema.names} for i in range(len(batch)))
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(file, error) from error

    def parsed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as plain Python values; in one of DistillKit's forms its token ids and `listed` tokens. ValueError if it cannot be decoded."""
        names = next((names for names in _FORMS if row.keys() >= {*names, "input_ids"}), None)
        if names is None:
            return {name: value.as_py() for name, value in row.items()}
        matrices = {name: _matrix(row[name], name) for name in names}
        if names == _FORMS[0]:
            listed = matrices["token_ids"].astype(np.int64), matrices["top_values"].astype(np.float64)
        else:
            from . import distillkit_codec

            listed = distillkit_codec.decoded(self.form, matrices)
        if listed[0].shape != listed[1].shape:
            raise ValueError(f"has {listed[0].shape} ids and {listed[1].shape} log-probabilities")
        return {"input_ids": row["input_ids"].as_py(), "listed": listed}


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read ({(str(error).splitlines() or [''])[0][:160]}); {fix_of(error, 'copy it again')}")


def _matrix(lists: Any, name: str) -> np.ndarray:
    """A list of lists of one length as a matrix."""
    import pyarrow.compute

    inner = lists.values
    if inner is None or inner.null_count or len(pyarrow.compute.list_value_length(inner).unique()) > 1:
        raise ValueError(f"{name}: expected lists of one length, one for each token")
    return inner.flatten().to_numpy(zero_copy_only=False).reshape(len(inner), -1)


def read_config(path: Path) -> Packed | Polynomials:
    """The settings by which a set is packed. UserError if the file does not hold such settings."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0][:160]}); {fix_of(error, 'copy it again')}") from error
    for outer in ("teacher", "logprob_compressor", "legacy_logit_compression"):
        found = found.get(outer, found) if isinstance(found, dict) else found
    kind = Polynomials if isinstance(found, dict) and "polynomial_degree" in found else Packed
    try:
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if name != "kind"}
        if kind is Packed:
            found["residual_bins"] = tuple(Bin(**one) for one in found.get("residual_bins") or ())
        form = kind(**found)
        types = [getattr(form, field.name) for field in dataclasses.fields(form) if field.name.endswith("_dtype")]
        types += [one.scale_dtype for one in getattr(form, "residual_bins", ())]
        if not set(types) <= set(TYPES) or not 0 <= form.exact_k <= form.k:
            raise ValueError("an unknown type, or exact_k above k")
        return form
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not what DistillKit writes ({error}); copy the settings of the set into it") from None
