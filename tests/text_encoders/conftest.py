"""Small tokenizers trained here: CLIP's byte-level BPE with merges, and T5's unigram, in every file layout that checkpoints use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [
    "a red apple left of a blue star",
    "two green leaves on a white table, isn't it?",
    "An oil painting of 3 cats & a dog; they're sleeping!",
    "the café at night — naïve lights, 12 people",
    "日本語のテキスト and emoji 🍎⭐ and ½ or ﬁ",
    "snow on the mountain, a river below the bridge",
] * 20


@pytest.fixture(scope="session")
def clip_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt, "!" at id 0, begin and end last, as in CLIP's own."""
    backend = Backend(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    trained = json.loads(backend.to_str())["model"]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += [word for word in sorted(trained["vocab"], key=trained["vocab"].get) if word not in set(words)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert words[0] == "!"
    folder = tmp_path_factory.mktemp("clip_vocab")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in trained["merges"])]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def clip_folder(clip_vocab: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a CLIP tokenizer folder with the given tokenizer_config.json and special_tokens_map.json."""

    def make(config: dict[str, object], special: dict[str, object] | None = None) -> Path:
        folder = tmp_path / "tokenizer"
        shutil.copytree(clip_vocab, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **config}))
        if special is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special))
        return folder

    return make


def train_spiece(folder: Path, **options: object) -> Path:
    """Train a T5-like spiece.model (pad 0, end 1, unknown 2, no begin) in a folder."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        **{"vocab_size": 150, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2, "hard_vocab_limit": False, **options},
    )
    return folder


@pytest.fixture(scope="session")
def t5_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """T5 tokenizer folders with spiece.model and its config, by normalisation rule (T5's own is nmt_nfkc)."""
    folders = {rule: train_spiece(tmp_path_factory.mktemp(rule), normalization_rule_name=rule) for rule in ("nmt_nfkc", "identity")}
    for folder in folders.values():
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64, "tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    return folders
