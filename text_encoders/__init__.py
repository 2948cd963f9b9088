"""From prompts to a `Conditioning`: tokenizers, CLIP and T5 towers, and their join; `encode.py` is the way in."""
