"""Train the T5 encoder of the embedded model by span corruption (Raffel et al. 2020, section 3.1.4) on scene documents.

    python scripts/embedded/train_t5.py --text build/text --out build/t5 --checkpoints build/runs/t5

A document says one scene in two or three phrasings, so a masked colour, shape or relation can be told from the other phrasing: filling it in
teaches which word belongs to which. The decoder is thrown away. Run the same command again to resume.

The usual initialisation stays at guessing word frequencies for over a thousand steps, since position biases begin near zero and move by no more
than the learning rate a step. `begin_local` gives the heads a direction and a reach from the start (slopes as in ALiBi, Press et al. 2022), and lets
the decoder find a sentinel in the encoder by its own embedding.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from train_tokenizers import SENTINELS
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention
from tu_diffuse.text_encoders.tokenizer import Tokenizer, load_tokenizer
from tu_diffuse.training.loop import train
from tu_diffuse.training.train_config import TrainConfig
from world import STAGES, document, sample_scene

CORRUPTED = 0.2  # share of tokens that are masked
MEAN_SPAN = 1.5
SLOPES = ((2.0, 99.0), (99.0, 2.0), (0.7, 0.7), (0.2, 0.2), (0.0, 0.0))  # of each head: bias lost per token of distance, to tokens before and after
_BIAS_FLOOR = -6.0
_IGNORED = -100  # label that the loss leaves out
_END = 1


def corrupt(ids: list[int], first_sentinel: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Replace random spans of `ids` by sentinels.

    Returns:
        The encoder's input (kept tokens and sentinels) and the decoder's target (each sentinel followed by what it stands for), both ended.
    """
    source: list[int] = []
    target: list[int] = []
    at, used = 0, 0
    while at < len(ids):
        if used < SENTINELS and rng.random() < CORRUPTED / MEAN_SPAN:
            length = 1 + (rng.random() < MEAN_SPAN - 1)
            source.append(first_sentinel + used)
            target += [first_sentinel + used, *ids[at : at + length]]
            at, used = at + length, used + 1
        else:
            source.append(ids[at])
            at += 1
    return [*source, _END], [*target, _END]


def padded(rows: list[list[int]], pad: int) -> Tensor:
    """Rows of ids as one (batch, longest) tensor."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def batch(tokenizer: Tokenizer, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Corrupted documents and their targets for one step."""
    rng = random.Random(f"{seed} {step}")
    first_sentinel = tokenizer.backend.token_to_id("<extra_id_0>")
    pairs: list[tuple[list[int], list[int]]] = []
    for _ in range(size):
        stage = STAGES[rng.choice(("shapes", "stickers", "full"))]
        ids = tokenizer.backend.encode(document(sample_scene(rng, stage), rng), add_special_tokens=False).ids
        pairs.append(corrupt(ids, first_sentinel, rng))
    return padded([source for source, _ in pairs], 0), padded([target for _, target in pairs], _IGNORED)


@torch.no_grad()
def begin_local(model: T5ForConditionalGeneration) -> None:
    """Initialise position biases by distance (SLOPES), and the decoder's cross-attention queries along its keys."""
    farthest, count = model.config.relative_attention_max_distance, model.config.relative_attention_num_buckets
    offsets = torch.arange(-farthest, farthest + 1)
    for stack, both_ways in ((model.encoder, True), (model.decoder, False)):
        biases = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        buckets = T5Attention._relative_position_bucket(offsets, both_ways, count, farthest)
        for bucket in buckets.unique().tolist():
            members = offsets[buckets == bucket]
            distance, backward = int(members.abs().min()), bool(members[0] < 0)
            for head, (before, after) in enumerate(SLOPES):
                biases[bucket, head] = max(_BIAS_FLOOR, -distance * (before if backward else after))
            if distance == 0:
                biases[bucket, :2] = -2.0  # the two sharp heads look at a neighbour, not at the token itself
    for block in model.decoder.block:
        cross = block.layer[1].EncDecAttention
        cross.q.weight.copy_(0.4 * cross.k.weight)


def main() -> None:
    """Train, then write `text_encoder_2/` in transformers' layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with tokenizer_2/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="checkpoints")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.text / "tokenizer_2")
    shape = T5Config(
        vocab_size=tokenizer.backend.get_vocab_size(),
        d_model=160,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=5,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,  # transformers ties them all the same, but then does not scale the logits down: that learns faster here
    )
    model = T5ForConditionalGeneration(shape)
    begin_local(model)
    config = TrainConfig(steps=options.steps, lr=2e-3, warmup=50, cooldown=options.steps // 3, ema_decay=0.99, save_every=200, weight_decay=0.0)

    first_sentinel = tokenizer.backend.token_to_id("<extra_id_0>")

    def loss_at(step: int) -> dict[str, Tensor]:
        source, target = batch(tokenizer, options.batch_size, config.seed, step)
        with torch.autocast("cpu", torch.bfloat16):
            result = model(input_ids=source, attention_mask=(source != 0).long(), labels=target)
        words = (target != _IGNORED) & (target < first_sentinel) & (target != _END)
        right = (result.logits.argmax(-1) == target)[words].float().mean()
        return {"loss": result.loss, "accuracy": right.detach()}

    trained = train(model, loss_at, config, options.checkpoints, lambda line: print(line, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in trained.state_dict().items() if name == "shared.weight" or name.startswith("encoder.")}
    weights.pop("encoder.embed_tokens.weight")
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    (options.out / "config.json").write_text(json.dumps({**shape.to_dict(), "architectures": ["T5EncoderModel"]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
