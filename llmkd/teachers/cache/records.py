"""The record formats of a teacher cache: what is stored for each target, how it is computed from a signal, and how it is read back.

    kind      bytes per target (V = 128,256)            what is lost, and when to use it
    topk      K = 50: 147, 64: 182, 128: 334 (8 bits)   the shape of the tail; the general choice, for any divergence and temperature
              122, 150, 270 (4 bits)                    also the rounding of 4 bits: see `codec`
    sampled   50 samples: 89                            nothing on average, but it is noisy; the smallest, for forward KL at one temperature
    hidden    2 H (bfloat16), H + 4 (int8)              nothing (int8: see `HiddenFormat`); if the disk is large enough, and for measuring.
                                                        A step costs a product with the teacher's head; the other formats cost almost nothing

A record is a row of bytes, its parts one after another. All records of a cache have the same size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...batch import Example
from ...config.teacher import TAIL_EXPONENTS, Cache
from ...errors import UserError
from ...head import Passed
from ...losses.fused import default_chunk
from ...signals import TEACHER_METRICS, Dense, Signal
from ..sparse import Sampled, TopK, entropy
from .codec import decode_ids, decode_values, encode_ids, encode_values, id_bytes, packed_bytes
from .stored_head import StoredHead


class RecordFormat(Protocol):
    """What is stored for each target."""

    metrics: tuple[str, ...]  # the TEACHER_METRICS that its signals support
    bytes: int  # per target

    def options(self) -> dict:
        """The format in the cache's header, by the names of the settings. `read_record_format` is the inverse."""

    def record(self, signal: Signal, labels_N: Tensor, examples: Sequence[Example]) -> np.ndarray:
        """The records of a batch's targets, uint8 [N, bytes], computed in chunks: no [N, V] tensor is held."""

    def signal(self, records_NR: Tensor, device) -> Signal:
        """The signal that the records store, on the device."""


@dataclass(frozen=True)
class TopKFormat:
    """The k most likely tokens with log-probabilities of `value_bits` bits, and the tail mass at `tail_exponents`."""

    vocab: int
    k: int
    value_bits: int
    tail_exponents: tuple[float, ...] = TAIL_EXPONENTS
    metrics = TEACHER_METRICS

    @property
    def widths(self) -> tuple[int, ...]:
        return id_bytes(self.k, self.vocab), packed_bytes(self.k, self.value_bits), 2, 2 * len(self.tail_exponents), 2, 2

    @property
    def bytes(self) -> int:
        return sum(self.widths)

    def options(self) -> dict:
        return {"name": "topk", "k": self.k, "value_bits": self.value_bits, "tail_exponents": list(self.tail_exponents)}

    def record(self, signal: Signal, labels_N: Tensor, examples: Sequence[Example]) -> np.ndarray:
        return _in_chunks(self, labels_N, lambda rows: self.encode(TopK.of(_log_probs(signal, rows), self.k, labels_N[rows])))

    def encode(self, known: TopK) -> Tensor:
        values, range_N = encode_values(known.log_p_NK, self.value_bits)
        ids = encode_ids(known.ids_NK, self.vocab)
        return _pack_bytes(ids, values, range_N, known.tail_NS.half(), known.label_log_p_N.half(), known.entropy_N.half())

    def signal(self, records_NR: Tensor, device) -> TopK:
        """The largest log-probability is not stored: it follows, since the K tokens and the tail sum to one."""
        ids, values, *halves = records_NR.to(device, non_blocking=True).split(self.widths, 1)
        range_N1, tail_NS, label_N1, entropy_N1 = (_halves(part) for part in halves)
        log_p_NK = decode_values(values, range_N1[:, 0], self.k, self.value_bits)
        rest_N1 = tail_NS[:, self.tail_exponents.index(1), None]
        log_p_NK = log_p_NK - log_p_NK.logsumexp(1, keepdim=True) + torch.log(-torch.expm1(rest_N1))
        log_p_NK.nan_to_num_(-math.inf, neginf=-math.inf)  # no token stored: all of the mass is in the tail
        ids_NK = decode_ids(ids, self.k, self.vocab)
        return TopK(ids_NK, log_p_NK, tail_NS, self.vocab, label_N1[:, 0], entropy_N1[:, 0], self.tail_exponents)


@dataclass(frozen=True)
class SampledFormat:
    """Tokens sampled with replacement. They depend on the seed, the example and the target's position in it alone, not on the batch."""

    vocab: int
    num_samples: int
    temperature: float
    seed: int

    @property
    def metrics(self) -> tuple[str, ...]:
        """Validation metrics are at temperature 1, and samples estimate forward_kl only at their own temperature."""
        return (*(("forward_kl",) if self.temperature == 1 else ()), "teacher_ce", "teacher_entropy")

    @property
    def widths(self) -> tuple[int, ...]:
        return id_bytes(self.num_samples, self.vocab), 2, 2, 2

    @property
    def bytes(self) -> int:
        return sum(self.widths)

    def options(self) -> dict:
        return {"name": "sampled", "num_samples": self.num_samples, "temperature": self.temperature, "seed": self.seed}

    def record(self, signal: Signal, labels_N: Tensor, examples: Sequence[Example]) -> np.ndarray:
        uniform_ND = torch.from_numpy(uniform_draws(self.seed, examples, self.num_samples)).to(labels_N.device)

        def chunk(rows: slice) -> Tensor:
            log_p_nV = _log_probs(signal, rows)
            soft_nV = log_p_nV if self.temperature == 1 else (log_p_nV / self.temperature).log_softmax(1)
            below_nV = soft_nV.double().exp().cumsum(1)
            ids_nD = torch.searchsorted(below_nV, uniform_ND[rows] * below_nV[:, -1:], right=True).clamp_max(self.vocab - 1)
            label_n = log_p_nV.gather(1, labels_N[rows, None])[:, 0]
            halves = [x.half() for x in (entropy(soft_nV), label_n, entropy(log_p_nV))]
            return _pack_bytes(encode_ids(ids_nD.sort().values, self.vocab), *halves)

        return _in_chunks(self, labels_N, chunk)

    def signal(self, records_NR: Tensor, device) -> Sampled:
        ids, *halves = records_NR.to(device, non_blocking=True).split(self.widths, 1)
        soft, label, plain = (_halves(part)[:, 0] for part in halves)
        return Sampled(decode_ids(ids, self.num_samples, self.vocab), self.vocab, self.temperature, soft, label, plain)


@dataclass(frozen=True)
class HiddenFormat:
    """The last hidden state. With the head, which is stored in the cache's folder, it gives the teacher's whole distribution.

    float32 and bfloat16 are exact if the teacher computes in them. int8 rounds to 127ths of the largest entry of a state: a KL of
    8e-6 and 3e-4 nats per target for two small trained models (H = 128 and 64).
    """

    vocab: int
    width: int
    dtype: str
    head: StoredHead
    metrics = TEACHER_METRICS

    @property
    def bytes(self) -> int:
        return self.width + 4 if self.dtype == "int8" else self.width * getattr(torch, self.dtype).itemsize

    def options(self) -> dict:
        return {"name": "hidden", "width": self.width, "hidden_dtype": self.dtype, "head": self.head.options()}

    def record(self, signal: Dense, labels_N: Tensor, examples: Sequence[Example]) -> np.ndarray:
        def chunk(rows: slice) -> Tensor:
            hidden_nH = _finite(signal.hidden_NH[rows])
            if self.dtype != "int8":
                return _pack_bytes(hidden_nH.to(getattr(torch, self.dtype)))
            step_n1 = hidden_nH.float().abs().amax(1, True).clamp_min(1e-30) / 127
            return _pack_bytes(step_n1, (hidden_nH / step_n1).round().to(torch.int8))

        return _in_chunks(self, labels_N, chunk)

    def signal(self, records_NR: Tensor, device) -> Dense:
        records_NR = records_NR.to(device, non_blocking=True)
        if self.dtype != "int8":
            return Dense(_dense(records_NR).view(getattr(torch, self.dtype)), self.head.on(device))
        step_N1, code_NH = records_NR.split((4, self.width), 1)
        return Dense(code_NH.view(torch.int8) * _dense(step_N1).view(torch.float32), self.head.on(device))


def make_record_format(cache: Cache, vocab: int, teacher=None) -> RecordFormat:
    """The format of a cache to be written, from its settings and the defaults of its kind. `hidden` needs the teacher (a `Model`); of a
    classifier, whose logits are few, it is the default."""
    name = cache.kind or ("hidden" if teacher is not None and isinstance(teacher.head.project, Passed) else "topk")
    options = cache.options(name)
    if name == "topk":
        return TopKFormat(vocab, min(options["k"], vocab), options["value_bits"])
    if name == "sampled":
        return SampledFormat(vocab, **options)
    head = StoredHead.of(teacher.head)
    own = str(teacher.dtype).removeprefix("torch.")
    dtype = {"float64": "float32"}.get(own, own) if options["hidden_dtype"] == "auto" else options["hidden_dtype"]
    return HiddenFormat(vocab, head.weights["weight"].shape[1], dtype, head)


def read_record_format(options: dict, vocab: int, folder=None) -> RecordFormat:
    """The format of a cache from its header's "kind"; `folder` holds the head of kind hidden."""
    options = dict(options)
    name = options.pop("name")
    if name == "topk":
        return TopKFormat(vocab, options["k"], options["value_bits"], tuple(options["tail_exponents"]))
    if name == "sampled":
        return SampledFormat(vocab, **options)
    return HiddenFormat(vocab, options["width"], options["hidden_dtype"], StoredHead.read(folder, options["head"]))


def uniform_draws(seed: int, examples: Sequence[Example], num_samples: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for sampling at a batch's targets, float64 [N, num_samples].

    A hash of seed, example, the target's position in the example and the sample's number (counter-based, so no state is kept).
    """
    identity_N = np.repeat(np.array([int(e.content_hash, 16) for e in examples], np.uint64), [e.num_targets for e in examples])
    place_N = np.concatenate([np.zeros(0, np.uint64), *(np.arange(e.num_targets, dtype=np.uint64) for e in examples)])
    state_N = _splitmix64(_splitmix64(identity_N ^ _splitmix64(np.full_like(identity_N, seed))) ^ place_N)
    return (_splitmix64(state_N[:, None] ^ np.arange(num_samples, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea, Flood 2014), on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _halves(part_NB: Tensor) -> Tensor:
    return _dense(part_NB).view(torch.float16).float()


def _dense(x: Tensor) -> Tensor:
    """A contiguous copy, which `view(dtype)` accepts. `contiguous()` would return a tensor of one row or none with its old strides."""
    return x.clone(memory_format=torch.contiguous_format)


def _in_chunks(record_format: RecordFormat, labels_N: Tensor, records) -> np.ndarray:
    out_NR = np.empty((len(labels_N), record_format.bytes), np.uint8)
    step = default_chunk(record_format.vocab, labels_N.device.type)
    with torch.no_grad():
        for start in range(0, len(labels_N), step):
            rows = slice(start, start + step)
            out_NR[rows] = records(rows).cpu().numpy()
    return out_NR


def _log_probs(signal: Signal, rows: slice) -> Tensor:
    return _finite(signal.log_probs(rows))


def _finite(outputs: Tensor) -> Tensor:
    """The same tensor; UserError if it holds a NaN (-inf is a probability of 0)."""
    if outputs.isnan().any():
        raise UserError("teacher.model: its output at a target is NaN; check its weights, or set teacher.dtype: float32")
    return outputs


def _pack_bytes(*parts: Tensor) -> Tensor:
    """Tensors [N] or [N, ...] of any types as bytes, one after another, uint8 [N, R]."""
    return torch.cat([_dense(part.reshape(len(part), -1)).view(torch.uint8) for part in parts], 1)
