"""DistillKit's packed log-probabilities as numbers: see `distillkit.py`."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .distillkit import CONFIG, TYPES, Packed, Polynomials

_TYPES = {name: getattr(torch, name) for name in TYPES}

#: For one text: token ids and log-probabilities of each place, both [places, K].
Listed = tuple[np.ndarray, np.ndarray]


def decoded(form: Packed | Polynomials, row: Mapping[str, np.ndarray]) -> Listed:
    """Decode one row's columns, each a matrix with a row for each place. ValueError if they are not packed in this way."""
    return _of_bits(form, row) if isinstance(form, Packed) else _of_polynomials(form, row)


def _of_bits(form: Packed, row: Mapping[str, np.ndarray]) -> Listed:
    values = _log_probs(form, torch.from_numpy(row["compressed_logprobs"].astype(np.uint8)))
    bits = max(1, (form.d - 1).bit_length())
    return _unpacked(torch.from_numpy(row["bytepacked_indices"].astype(np.uint8)), bits, form.k).numpy(), values.double().numpy()


def _log_probs(form: Packed, bytes_LB: Tensor) -> Tensor:
    read, rest, out = _Bytes(bytes_LB), form.k - form.exact_k, _TYPES[form.exact_dtype]
    exact_LE = read.numbers(form.exact_k, out)
    terms_LP = read.numbers(len(form.polynomial_terms or ()), _TYPES[form.term_dtype])
    residual_LR = torch.zeros(len(bytes_LB), rest)
    start = 0
    for one in form.residual_bins:
        scale_L1 = read.numbers(1, _TYPES[one.scale_dtype])
        whole = read.whole_numbers(one.num_elements, one.element_bits).float()
        centred = whole * 2 - 1 if one.element_bits == 1 else whole - 2 ** (one.element_bits - 1)
        residual_LR[:, start : start + one.num_elements] = centred * scale_L1
        start += one.num_elements
    read.refuse_more()
    values_LR = residual_LR.to(out)
    if form.polynomial_terms:  # in the type of the coefficients, as the residuals were measured
        kind = terms_LP.dtype
        places = torch.linspace(0, 1, rest, dtype=kind) if form.normalize_t else torch.arange(rest, dtype=kind)
        basis = torch.stack([_term(places, term) for term in form.polynomial_terms], -1)
        values_LR = (basis * terms_LP[:, None]).sum(-1) + values_LR
    values_LK = torch.cat([exact_LE, values_LR], -1)
    return values_LK.float().cumsum(-1).to(out) if form.delta_encoding else values_LK


def _of_polynomials(form: Polynomials, row: Mapping[str, np.ndarray]) -> Listed:
    bits = max(1, (form.vocab_size - 1).bit_length())
    per_number = 64 // bits
    packed_LM = row["packed_indices"].astype(np.uint64)
    shifts = (np.arange(per_number, dtype=np.uint64) * np.uint64(bits))[None, None]
    ids_LK = (packed_LM[..., None] >> shifts & np.uint64((1 << bits) - 1)).reshape(len(packed_LM), -1)[:, : form.k].astype(np.int64)
    places = np.arange(1, form.k - form.exact_k + 1, dtype=np.float64)
    powers = [places ** (-i if form.invert_polynomial else i) for i in range(form.polynomial_degree + 1)]
    basis = np.stack([*powers, *([np.sqrt(places)] if form.with_sqrt_term else [])], -1)
    exact_LE, terms_LP = row["exact_values"].astype(np.float64), row["coeffs"].astype(np.float64)
    wanted = (len(packed_LM), form.exact_k), (len(packed_LM), basis.shape[1] if form.k > form.exact_k else terms_LP.shape[1])
    if (exact_LE.shape, terms_LP.shape) != wanted or ids_LK.shape[1] != form.k:
        raise ValueError(f"has {exact_LE.shape[1]} exact values and {terms_LP.shape[1]} coefficients, which {CONFIG} does not say")
    return ids_LK, np.concatenate([exact_LE, terms_LP @ basis.T if form.k > form.exact_k else terms_LP[:, :0]], 1)


def _term(places: Tensor, term: int | str) -> Tensor:
    return places**term if isinstance(term, int) else {"sqrt": torch.sqrt, "exp": torch.exp}[term](places)


class _Bytes:
    """Numbers one after another in each row of bytes."""

    def __init__(self, bytes_LB: Tensor):
        self.left = bytes_LB

    def _next(self, count: int) -> Tensor:
        if self.left.shape[1] < count:
            raise ValueError(f"compressed_logprobs has fewer bytes than {CONFIG} says")
        found, self.left = self.left[:, :count].clone(memory_format=torch.contiguous_format), self.left[:, count:]
        return found

    def numbers(self, count: int, kind: torch.dtype) -> Tensor:
        return self._next(count * kind.itemsize).flatten().view(kind).reshape(len(self.left), count)

    def whole_numbers(self, count: int, bits: int) -> Tensor:
        return _unpacked(self._next((count * bits + 7) // 8), bits, count)

    def refuse_more(self) -> None:
        if self.left.shape[1]:
            raise ValueError(f"compressed_logprobs has {self.left.shape[1]} bytes more than {CONFIG} says")


def _unpacked(bytes_LB: Tensor, bits: int, count: int) -> Tensor:
    """Whole numbers of so many bits each, the highest bit first, without gaps."""
    if bytes_LB.shape[1] != (count * bits + 7) // 8:
        raise ValueError(f"has {bytes_LB.shape[1]} bytes where {count} numbers of {bits} bits are wanted; {CONFIG} is another set's")
    found = np.unpackbits(bytes_LB.numpy(), axis=1, count=count * bits).reshape(len(bytes_LB), count, bits)
    filled = np.concatenate([np.zeros((len(found), count, 64 - bits), np.uint8), found], -1)  # the highest bit first
    return torch.from_numpy(np.packbits(filled, axis=-1).view(">u8")[..., 0].astype(np.int64))
