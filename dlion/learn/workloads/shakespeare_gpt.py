"""``shakespeare-gpt``: the next character of tinyshakespeare (Karpathy, 2015), by a transformer of about a million
parameters, in torch.

Law: reads one text file; its first 90 % are learnt from, the rest is held out. A sample is a window of text, and
accuracy the share of characters foretold. ``partition = "iid"`` deals windows evenly, ``"writer"`` gives each speaker
of the plays to one peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from dlion.learn import partition
from dlion.learn.data import DataError
from dlion.learn.workload import Indices, Workload, WorkloadSpec
from dlion.learn.workloads.torch_module import TorchData, TorchWorkload

FILE = "tinyshakespeare.txt"
CONTEXT = 64
"""Characters of a window."""
STRIDE = 32
"""From the start of one window to the next."""
HELD_OUT = 0.1
TEXT_BYTES_MAX = 64 << 20
WIDTH, HEADS, LAYERS = 144, 4, 4


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    if spec.data_dir is None:
        raise DataError(f"workload {spec.name!r} needs the folder of {FILE} (--data)")
    text = load(spec.data_dir)
    dealt = _shards(text, spec.partition, spec.seed, spec.train_limit, tuple(shares))
    train, test = Windows(text.train, dealt[peer_index]), Windows(text.test, _starts(text.test))
    samples = TorchData(train, test, sum(map(len, dealt)), peer_index)
    return TorchWorkload(lambda: Gpt(len(text.alphabet)), cross_entropy, samples)


@dataclass(frozen=True, eq=False)
class Text:
    """Characters as their numbers in ``alphabet``."""

    alphabet: str
    train: npt.NDArray[np.uint8] = field(repr=False)
    test: npt.NDArray[np.uint8] = field(repr=False)
    speakers: npt.NDArray[np.int64] = field(repr=False)
    """Who speaks at each character of ``train``, numbered in order of entrance."""


@lru_cache(maxsize=2)
def load(data_dir: Path) -> Text:
    """From ``data_dir`` or its subfolder ``text``; cached for the peers of one process. Raises DataError."""
    folder = data_dir / "text" if (data_dir / "text").is_dir() else data_dir
    path = folder / FILE
    try:
        with path.open("rb") as file:
            raw = file.read(TEXT_BYTES_MAX).decode("ascii")
    except FileNotFoundError:
        raise DataError(f"{FILE} not found in {folder}: give the folder that holds it (--data)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as plain ASCII text: {error}") from error
    alphabet = "".join(sorted(set(raw)))
    numbers = np.zeros(128, dtype=np.uint8)
    numbers[np.frombuffer(alphabet.encode(), dtype=np.uint8)] = np.arange(len(alphabet))
    codes = numbers[np.frombuffer(raw.encode(), dtype=np.uint8)]
    cut = len(codes) - int(HELD_OUT * len(codes))
    if cut <= CONTEXT or len(codes) - cut <= CONTEXT:
        raise DataError(f"{path}: {len(codes)} characters are too few")
    return Text(alphabet, codes[:cut], codes[cut:], _speakers(raw[:cut]))


def _speakers(text: str) -> npt.NDArray[np.int64]:
    """A speech begins after an empty line with ``NAME:``; its characters belong to that name."""
    names: dict[str, int] = {}
    speakers = np.zeros(len(text), dtype=np.int64)
    start = 0
    for speech in text.split("\n\n"):
        stop = start + len(speech) + 2
        name, colon, _ = speech.partition(":\n")
        speakers[start:stop] = names.setdefault(name if colon else "", len(names))
        start = stop
    return speakers


def _starts(codes: npt.NDArray[np.uint8]) -> Indices:
    return np.arange(0, len(codes) - CONTEXT, STRIDE, dtype=np.int64)


@lru_cache(maxsize=4)
def _shards(text: Text, scheme: str, seed: int, limit: int | None, shares: tuple[float, ...]) -> tuple[Indices, ...]:
    """Each peer's windows by where they start: a pure function, cached for the peers of one process."""
    starts = _starts(text.train)
    if limit is not None and limit < len(starts):
        starts = np.sort(np.random.default_rng((seed, 2)).permutation(starts)[:limit])
    rng = np.random.default_rng((seed, 3))
    if scheme == "iid":
        dealt = partition.iid(len(starts), shares, rng)
    elif scheme == "writer":
        dealt = partition.by_writer(text.speakers[starts], shares, rng)
    else:
        raise ValueError(f"partition {scheme!r} needs labels, which a text has not: expected 'iid' or 'writer'")
    return tuple(starts[chosen] for chosen in dealt)


class Windows:
    """Windows of ``CONTEXT`` characters from ``starts``, each with the characters one further on as targets."""

    def __init__(self, codes: npt.NDArray[np.uint8], starts: Indices) -> None:
        self._codes = codes
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.gather(slice(index, index + 1))
        return inputs[0], targets[0]

    def gather(self, indices: Indices | slice) -> tuple[torch.Tensor, torch.Tensor]:
        places = self._starts[indices][:, None] + np.arange(CONTEXT + 1)
        window = torch.from_numpy(self._codes[places].astype(np.int64))
        return window[:, :-1], window[:, 1:]


class Gpt(nn.Module):
    """Decoder-only transformer with layer norm first (GPT-2, Radford et al., 2019); embedding and head share a matrix.

    (samples, characters) -> (samples, alphabet, characters): logits with the classes second, as cross entropy has them.
    """

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(alphabet, WIDTH)
        self.place = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, alphabet, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith("out.weight")  # what each layer adds to the stream shrinks with their number
                nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** 0.5 if deep else 0.02)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        stream = self.embed(codes) + self.place[: codes.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(stream)))
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Attention to what came before, then a small network at each place; both add to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Attention()
        self.think = nn.Sequential()
        self.think.add_module("norm", nn.LayerNorm(WIDTH))
        self.think.add_module("in", nn.Linear(WIDTH, 4 * WIDTH))
        self.think.add_module("gelu", nn.GELU())
        self.think.add_module("out", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        stream = stream + self.attend(stream)
        result: torch.Tensor = stream + self.think(stream)
        return result


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.ask = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        samples, places, _ = stream.shape
        parts = self.ask(self.norm(stream)).view(samples, places, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        heard = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        result: torch.Tensor = self.out(heard.transpose(1, 2).reshape(samples, places, WIDTH))
        return result
