"""Encode a target's token ids and log-probabilities in a fixed number of bytes, and decode them.

Sorted token ids use the Elias-Fano code: the low l = floor(log2(V / K)) bits of each id as they are, and the high parts as a
unary bit vector, about l + 2 bits an id instead of log2(V). Log-probabilities are stored relative to the largest one, rounded to
levels that are denser near it, since an error in log p counts in proportion to p.

Bytes of ids and values at V = 128,256, and the KL that rounding the values causes (nats; mean over 96 random Zipf-like
distributions, entropies 0.8 to 7.6):

    K     ids   4 bits           5 bits           6 bits           7 bits           8 bits
    50     83   108   3.2e-3     115   7.1e-4     121   1.6e-4     127   3.9e-5     133   9.5e-6
    64    104   136   3.7e-3     144   7.5e-4     152   1.7e-4     160   4.6e-5     168   1.1e-5
    128   192   256   4.6e-3     272   1.0e-3     288   2.2e-4     304   6.1e-5     320   1.4e-5

All functions work on whole tensors, on a CPU or a GPU, for which none waits.
"""

import math

import torch
from torch import Tensor

_BEND = 3.0  # levels are 1 + _BEND times as dense at the largest log-probability as at the smallest
_WIDEST = 6e4  # limit of the range, so that it fits a float16


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack(numbers_NK: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits: uint8 [N, packed_bytes(K, bits)]."""
    return _to_bytes(_to_bits(numbers_NK, bits))


def unpack(bytes_NB: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`, for at most 25 bits: int64 [N, count]."""
    start_K = torch.arange(count, device=bytes_NB.device) * bits
    padded_NB = torch.nn.functional.pad(bytes_NB, (0, 4)).long()
    word_NK = sum(padded_NB[:, start_K // 8 + i] << 8 * i for i in range(4))
    return word_NK >> start_K % 8 & (1 << bits) - 1


def id_bytes(count: int, vocab: int) -> int:
    low, high = _parts(count, vocab)
    return packed_bytes(count * low + high, 1)


def encode_ids(ids_NK: Tensor, vocab: int) -> Tensor:
    """Encode ids in [0, vocab), each row in non-decreasing order: uint8 [N, id_bytes(K, vocab)]."""
    count = ids_NK.shape[1]
    low, high = _parts(count, vocab)
    high_NM = torch.zeros(len(ids_NK), high, dtype=torch.long, device=ids_NK.device)
    high_NM.scatter_(1, (ids_NK >> low) + torch.arange(count, device=ids_NK.device), 1)
    return _to_bytes(torch.cat([_to_bits(ids_NK & (1 << low) - 1, low), high_NM], 1))


def decode_ids(bytes_NB: Tensor, count: int, vocab: int) -> Tensor:
    """The inverse of `encode_ids`, int64 [N, count]."""
    low, high = _parts(count, vocab)
    first = count * low
    high_NM = _to_bits(bytes_NB[:, first // 8 :], 8)[:, first % 8 :]
    place_M, number_K = (torch.arange(n, device=bytes_NB.device) for n in (high_NM.shape[1], count))
    rank_NM = torch.where(high_NM > 0, high_NM.cumsum(1) - 1, count)  # of each bit that is set; of no other
    place_NK = place_M.new_empty(len(bytes_NB), count + 1).scatter_(1, rank_NM, place_M.expand_as(rank_NM))[:, :count]
    return place_NK - number_K << low | unpack(bytes_NB, count, low)


def encode_values(log_p_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Encode log-probabilities in `bits` bits each: uint8 [N, packed_bytes(K, bits)], and the range of each row, float16 [N].

    -inf has its own code, the largest.
    """
    kept_NK = log_p_NK > -math.inf
    depth_NK = torch.where(kept_NK, log_p_NK.amax(1, True) - log_p_NK, 0.0)
    range_N = depth_NK.amax(1).clamp_max(_WIDEST).half()
    share_NK = (depth_NK / range_N.to(depth_NK).clamp_min(1e-7)[:, None]).clamp_max(1)
    levels = (1 << bits) - 2
    code_NK = (levels * torch.log1p(_BEND * share_NK) / math.log1p(_BEND)).round().long()
    return pack(torch.where(kept_NK, code_NK, levels + 1), bits), range_N


def decode_values(bytes_NB: Tensor, range_N: Tensor, count: int, bits: int) -> Tensor:
    """Log-probabilities relative to the row's largest, float32 [N, count]."""
    code_NK = unpack(bytes_NB, count, bits)
    levels = (1 << bits) - 2
    share_NK = torch.expm1(code_NK.float() * (math.log1p(_BEND) / levels)) / _BEND
    return (-range_N.float()[:, None] * share_NK).masked_fill_(code_NK > levels, -math.inf)


def _parts(count: int, vocab: int) -> tuple[int, int]:
    """The number of low bits of an id, and the length of the unary bit vector."""
    low = max(0, (vocab // count).bit_length() - 1)
    return low, count + (vocab - 1 >> low)


def _to_bits(numbers_NK: Tensor, bits: int) -> Tensor:
    """Bits [N, K * bits], the lowest bit of each number first."""
    return (numbers_NK[..., None] >> torch.arange(bits, dtype=numbers_NK.dtype, device=numbers_NK.device) & 1).flatten(1)


def _to_bytes(bits_NM: Tensor) -> Tensor:
    padded_NM = torch.nn.functional.pad(bits_NM, (0, -bits_NM.shape[1] % 8))
    return (padded_NM.view(len(bits_NM), -1, 8) << torch.arange(8, device=bits_NM.device)).sum(-1).to(torch.uint8)
