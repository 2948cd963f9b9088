"""Train the two tokenizers of the embedded model on captions of the world: byte-level BPE for CLIP, unigram for T5.

    python scripts/embedded/train_tokenizers.py --out build/text

Writes `tokenizer/` (vocab.json, merges.txt) and `tokenizer_2/` (tokenizer.json) as real checkpoints carry them. Takes a few seconds.
"""

import argparse
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from world import STAGES, document, sample_scene

CLIP_TOKENS = 48  # longest prompt, special tokens counted
T5_TOKENS = 64
SENTINELS = 20
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def texts(count: int, seed: int) -> list[str]:
    """Captions of `count` scenes of the full world, several phrasings each."""
    rng = random.Random(seed)
    return [document(sample_scene(rng, STAGES["full"]), rng) for _ in range(count)]


def train_clip(corpus: list[str], folder: Path, merges: int = 700) -> None:
    """Byte-level BPE with the end-of-word mark of CLIP (Sennrich et al. 2016; Radford et al. 2021)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    learned = json.loads(backend.to_str())["model"]["merges"]
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in pairs), *_SPECIAL]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, "bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]}
    settings |= {"unk_token": _SPECIAL[1], "pad_token": _SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_t5(corpus: list[str], folder: Path) -> None:
    """Unigram (Kudo 2018): every word of the world is a piece with its log frequency, and letters spell what is no word of it."""
    counts = Counter(word for text in corpus for word in re.findall(r"[a-z]+|[^a-z\s]", text))
    total = sum(counts.values())
    words = [(f"▁{word}", math.log(number / total)) for word, number in counts.most_common()]
    letters = [(letter, -20.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-&"]
    backend = Tokenizer(models.Unigram([*((token, 0.0) for token in ("<pad>", "</s>", "<unk>")), *words, *letters], unk_id=2))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": T5_TOKENS, "extra_ids": SENTINELS}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Train both and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives tokenizer/ and tokenizer_2/")
    parser.add_argument("--count", type=int, default=30_000, help="scenes to draw captions from")
    options = parser.parse_args()
    corpus = texts(options.count, seed=7)
    train_clip(corpus, options.out / "tokenizer")
    train_t5(corpus, options.out / "tokenizer_2")


if __name__ == "__main__":
    main()
