"""Prompts to token ids, with the tokenizer files that checkpoints carry, and the words that did not fit.

A tokenizer folder holds `tokenizer.json`, or `vocab.json` and `merges.txt` (CLIP: byte-level BPE, Sennrich et al. 2016), or `spiece.model`
(T5: unigram, Kudo 2018); they become the same `tokenizers` pipeline, the one that transformers' CLIPTokenizer and T5Tokenizer build.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from ..errors import DataError, ModelError, UsageError
from ..model_files import read_json, within_single_file
from .clip_vocabulary import clip_merges, clip_words
from .prompts import Part
from .sentencepiece_file import read_sentencepiece

_CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_T5_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_LONGEST = 4096  # transformers writes 1e30 for "no limit known"
_MOST_EXTRA = 10_000


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of prompts as ids.

    Attributes:
        ids: (batch, length) int64, padded on the right.
        mask: (batch, length) bool, False at pads.
        overflow: for each prompt the text of the words that did not fit, empty when all did. A word that fits in part is named whole.
    """

    ids: Tensor
    mask: Tensor
    overflow: list[str]


@dataclass(frozen=True, eq=False)
class Chunks:
    """One prompt as ids, in one row or more.

    Attributes:
        ids: (chunks, length) int64, each with begin and end tokens, padded on the right.
        mask: (chunks, length) bool, False at pads.
        weights: (chunks, length) float32, how much each token weighs, 1 where it is not of the prompt; None where all are 1.
        overflow: the text of the words that did not fit.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor | None
    overflow: str


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its limit and special ids; `load_tokenizer` makes one.

    Attributes:
        backend: the pipeline, without truncation, padding or special tokens of its own accord.
        length: tokens of every row, special ones counted.
        prefix: ids before the words: (bos,) for CLIP, () for T5.
        suffix: ids after the words: (eos,).
        pad_id: the id of the rest: CLIP-L's is eos, OpenCLIP's 0, T5's 0.
        spelled: new words (in lower case) that stand for several tokens -> these tokens, with spaces between.
    """

    backend: Backend
    length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int
    spelled: Mapping[str, str] = field(default_factory=dict[str, str])

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Turn prompts into ids, each padded or cut to `length`.

        Raises:
            DataError: a prompt that is not valid Unicode.
        """
        rows = [self.chunks((Part(text),), split=False) for text in texts]
        return Tokens(
            ids=torch.cat([torch.empty(0, self.length, dtype=torch.int64), *(row.ids for row in rows)]),
            mask=torch.cat([torch.empty(0, self.length, dtype=torch.bool), *(row.mask for row in rows)]),
            overflow=[row.overflow for row in rows],
        )

    def chunks(self, parts: Sequence[Part], split: bool, least: int = 1) -> Chunks:
        """Turn a prompt into rows of `length` ids.

        A token weighs what the last character of its text weighs. Rows are cut where a word begins, or inside of one that is longer than a row.

        Args:
            parts: each begins a row.
            split: whether a part goes on in further rows; if not, each is cut to one.
            least: number of rows, empty ones being added.

        Raises:
            DataError: a prompt that is not valid Unicode.
        """
        room = self.length - len(self.prefix) - len(self.suffix)
        rows: list[tuple[list[int], list[float]]] = []
        overflow: list[str] = []
        for part in map(self._spelled, parts):
            encoding = self._split(part.text)
            edges = _edges(part.text, encoding, room) if split else [0, min(room, len(encoding.ids))]
            weights = [1.0] * len(encoding.ids) if part.weights is None else [part.weights[max(end - 1, 0)] for _, end in encoding.offsets]
            rows += [(encoding.ids[first:end], weights[first:end]) for first, end in pairwise(edges)]
            overflow.append("" if split else _beyond(part.text, encoding, room))
        rows += [([], [])] * (least - len(rows))
        before, after = len(self.prefix), len(self.suffix)
        counts = torch.tensor([before + len(ids) + after for ids, _ in rows])
        return Chunks(
            ids=torch.tensor([[*self.prefix, *ids, *self.suffix, *[self.pad_id] * (room - len(ids))] for ids, _ in rows], dtype=torch.int64),
            mask=torch.arange(self.length) < counts[:, None],
            weights=None
            if all(part.weights is None for part in parts)
            else torch.tensor([[*[1.0] * before, *weights, *[1.0] * (room - len(weights) + after)] for _, weights in rows]),
            overflow=" ".join(words for words in overflow if words),
        )

    def _spelled(self, part: Part) -> Part:
        for word, tokens in self.spelled.items():
            part = part.with_spelling(word_pattern(word), tokens)
        return part

    def _split(self, text: str) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the prompt {text!r} holds a lone surrogate at position {error.start}; valid Unicode was wanted; retype it") from error
        return self.backend.encode(text, add_special_tokens=False)


def _edges(text: str, encoding: Encoding, room: int) -> list[int]:
    """Where rows of at most `room` tokens begin, and the end: before a word after white space, else before a token that begins one, else anywhere."""
    edges, tokens = [0], len(encoding.ids)
    while tokens - edges[-1] > room:
        begun = [i for i in range(edges[-1] + room, edges[-1], -1) if encoding.word_ids[i] != encoding.word_ids[i - 1]]
        spaced = [i for i in begun if text[encoding.offsets[i][0] - 1].isspace()]
        edges.append(next(iter([*spaced, *begun, edges[-1] + room])))
    return [*edges, tokens]


def _beyond(text: str, encoding: Encoding, room: int) -> str:
    """The part of the text from the first word that is not whole within `room` tokens."""
    if len(encoding.ids) <= room:
        return ""
    first = room
    while first > 0 and encoding.word_ids[first] is not None and encoding.word_ids[first - 1] == encoding.word_ids[first]:
        first -= 1
    return text[encoding.offsets[first][0] :].strip()


def word_pattern(word: str) -> str:
    """A regular expression for a new word in a prompt: a word of letters stands alone, a word in brackets may stand anywhere."""
    return (r"(?<!\w)" if word[0].isalnum() else "") + re.escape(word) + (r"(?!\w)" if word[-1].isalnum() else "")


def with_words(tokenizer: Tokenizer, counts: Mapping[str, int]) -> tuple[Tokenizer, dict[str, list[int]]]:
    """A copy of a tokenizer that knows new words; each is as many tokens as its count says, `word`, `word_1` and so on, as in diffusers.

    Returns:
        The copy, and the new ids of each word.

    Raises:
        UsageError: the tokenizer knows one of the words already.
    """
    backend = Backend.from_str(tokenizer.backend.to_str())
    ids: dict[str, list[int]] = {}
    spelled: dict[str, str] = {}
    for word, count in counts.items():
        tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
        known = next((token for token in tokens if backend.token_to_id(token) is not None or backend.token_to_id(token.lower()) is not None), None)
        if known is not None:
            raise UsageError(f"the tokenizer knows the word {known!r:.100} already; give the embedding another with --embedding FILE=WORD.")
        backend.add_tokens([AddedToken(token, single_word=token[0].isalnum() and token[-1].isalnum(), normalized=True) for token in tokens])
        ids[word] = [number for token in tokens if (number := backend.token_to_id(token)) is not None]
        if count > 1:
            spelled[word] = " ".join(tokens)
    return replace(tokenizer, backend=backend, spelled={**tokenizer.spelled, **spelled}), ids


def load_tokenizer(folder: Path, length: int | None = None) -> Tokenizer:
    """Read a checkpoint's tokenizer folder.

    Args:
        folder: holds `tokenizer.json`, `vocab.json` + `merges.txt`, or `spiece.model`, looked for in this order; `tokenizer_config.json`
            and `special_tokens_map.json` name the special tokens. In a single-file checkpoint it is CLIP's own tokenizer.
        length: tokens of every row; what `model_max_length` says when None.

    Raises:
        ModelError: no such files, files that are not valid, or no length known.
    """
    settings = _settings(folder)
    try:
        backend = _backend(folder, settings)
        backend.no_truncation()
        backend.no_padding()
        special = backend.encode("", add_special_tokens=True).ids
        if len(special) not in (1, 2):
            raise ModelError(f"the tokenizer in {folder} adds {len(special)} special tokens to a text; an end token, or begin and end, were wanted")
        default_pad = (_CLIP_SPECIAL if isinstance(backend.model, models.BPE) else _T5_SPECIAL)["pad_token"]
        _, pad_id = _known(backend, settings.get("pad_token", default_pad))
    except ModelError:
        raise
    except Exception as error:  # what `tokenizers` raises has no class of its own, and settings may be of any shape
        raise ModelError(f"the tokenizer in {folder} cannot be read ({error!s:.200}); valid tokenizer files were wanted; fetch them again") from error
    if length is None:
        length = settings.get("model_max_length")
    if not isinstance(length, int | float) or not len(special) < length <= _LONGEST:
        raise ModelError(
            f"the tokenizer in {folder} has model_max_length = {length!r:.100}; {len(special) + 1} to {_LONGEST} was wanted; state the length"
        )
    return Tokenizer(backend, int(length), tuple(special[:-1]), (special[-1],), pad_id)


def _backend(folder: Path, settings: Mapping[str, Any]) -> Backend:
    if (folder / "tokenizer.json").is_file():
        return Backend.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _clip_backend(*models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt")), settings)
    if within_single_file(folder) is not None:
        merges = clip_merges()
        return _clip_backend(clip_words(merges, _CLIP_SPECIAL["bos_token"], _CLIP_SPECIAL["eos_token"]), merges, settings)
    if (folder / "spiece.model").is_file():
        return _t5_backend(folder / "spiece.model", settings)
    raise ModelError(f"{folder} holds no tokenizer.json, vocab.json with merges.txt, or spiece.model; one of them was wanted")


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with `special_tokens_map.json` over it where the former does not list its added tokens itself."""
    if within_single_file(folder) is not None:
        return read_json(folder / "tokenizer_config.json")
    config, special = (read_json(path) if path.is_file() else {} for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"))
    return config if "added_tokens_decoder" in config else config | special


def _added_token(value: str | Mapping[str, Any]) -> AddedToken:
    """A special token from its JSON form: the bare text, or an object with its matching flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: value[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
    return AddedToken(value["content"], special=value.get("special", True), **flags)


def _known(backend: Backend, value: str | Mapping[str, Any]) -> tuple[str, int]:
    """A special token's text and id."""
    token = _added_token(value).content
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ModelError(f"the tokenizer names {token!r} as a special token; one of its vocabulary was wanted; repair its tokenizer_config.json")
    return token, token_id


def _add_special_tokens(backend: Backend, settings: Mapping[str, Any], defaults: Mapping[str, str], extra: Sequence[str]) -> None:
    """Make the special tokens be matched in raw text, as transformers does: a prompt's "!" is the pad token of OpenCLIP's tokenizer."""
    listed = settings.get("added_tokens_decoder", {})
    tokens = [_added_token(listed[token_id]) for token_id in sorted(listed, key=int)]
    known = {token.content for token in tokens}
    named = [_added_token(settings.get(name, default)) for name, default in defaults.items()]
    tokens += [token for token in [*named, *map(_added_token, extra)] if token.content not in known]
    for token in tokens:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def clip_pipeline(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Backend:
    """CLIP's byte-level BPE without special tokens: NFC, white space collapsed, lower case, words by its pattern, `</w>` at their ends."""
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_CLIP_PATTERN), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def _clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Mapping[str, Any]) -> Backend:
    backend = clip_pipeline(vocab, merges, _added_token(settings.get("unk_token", _CLIP_SPECIAL["unk_token"])).content)
    _add_special_tokens(backend, settings, _CLIP_SPECIAL, extra=())
    bos, eos = (_known(backend, settings.get(name, _CLIP_SPECIAL[name])) for name in ("bos_token", "eos_token"))
    backend.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False, add_prefix_space=False)
    return backend


def _t5_backend(path: Path, settings: Mapping[str, Any]) -> Backend:
    file = read_sentencepiece(path)
    sentinels = [f"<extra_id_{i}>" for i in range(min(settings.get("extra_ids", 100), _MOST_EXTRA))]
    backend = Backend(models.Unigram(file.pieces + [(token, 0.0) for token in reversed(sentinels)], unk_id=file.unk_id, byte_fallback=False))
    if file.charsmap:
        backend.normalizer = normalizers.Precompiled(file.charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    _add_special_tokens(backend, settings, _T5_SPECIAL, extra=sentinels)
    eos = _known(backend, settings.get("eos_token", _T5_SPECIAL["eos_token"]))
    backend.post_processor = processors.TemplateProcessing(single=["$A", eos[0]], special_tokens=[eos])
    return backend
