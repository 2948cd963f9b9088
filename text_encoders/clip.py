"""CLIP text tower: a causal pre-norm transformer (Radford et al. 2021, section 2.4) with the parameter names of transformers' files.

Takes the text encoders of SD 1.x (CLIP ViT-L/14), SD 2.x (OpenCLIP ViT-H) and SDXL (ViT-L and OpenCLIP bigG) as they are on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend, attention, join_heads, split_heads
from ..errors import ModelError
from ..offload import changed
from .config import config_values, require_epsilon, require_heads, require_layers, require_positive

_LEGACY_EOS = 2
_PREFIX = "text_model."


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702 x), the sigmoid approximation of GELU (Hendrycks & Gimpel 2016, section 2) that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a CLIP text tower; fields and defaults are those of transformers' `CLIPTextConfig`.

    Attributes:
        hidden_act: `quick_gelu` (OpenAI) or `gelu` (OpenCLIP).
        use_attention_mask: whether prompts are encoded with their pad mask; none of the Stable Diffusion families is.
        eos_token_id: the id whose first position is pooled; the legacy value 2 means the position of the largest id.
        projection_dim: width of the projected pooled vector; used with `CLIPText(projection=True)`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407
    use_attention_mask: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Read a parsed `config.json` of a `clip_text_model`.

        Raises:
            ModelError: another architecture or activation, or a size that cannot be.
        """
        if data.get("model_type") != "clip_text_model":
            raise ModelError(
                f"the text encoder is of type {data.get('model_type')!r:.100}; clip_text_model was wanted; use the library's own loader for it"
            )
        config = cls(**config_values(cls, data, "CLIP"))
        if config.hidden_act not in _ACTIVATIONS:
            raise ModelError(
                f"the CLIP config has hidden_act = {config.hidden_act!r:.100}; one of {', '.join(_ACTIVATIONS)} was wanted; repair its config.json"
            )
        require_positive(
            "CLIP",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            projection_dim=config.projection_dim,
        )
        require_layers("CLIP", "num_hidden_layers", config.num_hidden_layers)
        require_epsilon("CLIP", config.layer_norm_eps)
        require_heads("CLIP", config.hidden_size, config.num_attention_heads)
        return config


@dataclass(frozen=True, eq=False)
class CLIPTextOutput:
    """What the tower says about a batch of token ids.

    Attributes:
        hidden_states: layers + 1 tensors (batch, tokens, width): the embeddings, then each layer's output; none has the final norm.
        last_hidden_state: (batch, tokens, width), the last of them after the final norm.
        pooled: (batch, width), last_hidden_state at the end token.
        projected: (batch, projection_dim), or None for a tower without projection.
    """

    hidden_states: tuple[Tensor, ...]
    last_hidden_state: Tensor
    pooled: Tensor
    projected: Tensor | None


class _Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))


class _SelfAttention(nn.Module):
    def __init__(self, config: CLIPTextConfig, backend: AttentionBackend) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.backend = backend
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join_heads(attention(query, key, value, bias=bias, causal=bias is None, backend=self.backend)))


class _MLP(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, config: CLIPTextConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config, backend)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), bias)
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, backend) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], bias))
        return tuple(states)


class _TextModel(nn.Module):
    def __init__(self, config: CLIPTextConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config, backend)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPText(nn.Module):
    """The tower. `load_state_dict(clip_state_dict(file), strict=True)` takes transformers' files.

    Args:
        config: its shape.
        projection: whether the file carries `text_projection.weight` (SDXL's second encoder, OpenCLIP).
        backend: attention kernel.
    """

    def __init__(self, config: CLIPTextConfig, projection: bool, backend: AttentionBackend = AttentionBackend.AUTO) -> None:
        super().__init__()
        self.config = config
        self.text_model = _TextModel(config, backend)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projection else None

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> CLIPTextOutput:
        """Encode token ids.

        Args:
            ids: (batch, tokens) int64, at most `max_position_embeddings` tokens, each row with an end token.
            mask: (batch, tokens) bool, True where a token may be attended to, on top of the causal mask; None for all, as the
                Stable Diffusion families do.

        Returns:
            All hidden states, the final one after its norm, and the pooled vector with and without projection.
        """
        hidden_states = self.text_model.encoder(self.text_model.embeddings(ids), _causal_pad_bias(mask))
        last = self.final_norm(hidden_states[-1])
        pooled = last[torch.arange(len(ids), device=ids.device), self._end_positions(ids)]
        return CLIPTextOutput(hidden_states, last, pooled, None if self.text_projection is None else self.text_projection(pooled))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the final layer norm to a hidden state (batch, tokens, width), as `clip_skip` on SD 1.x and 2.x does."""
        return self.text_model.final_layer_norm(hidden)

    def _end_positions(self, ids: Tensor) -> Tensor:
        if self.config.eos_token_id == _LEGACY_EOS:
            return ids.argmax(dim=-1)
        return (ids == self.config.eos_token_id).int().argmax(dim=-1)


def _causal_pad_bias(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    tokens = mask.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    return causal & mask[:, None, None, :]


def with_rows(model: CLIPText, rows: Mapping[int, Tensor]) -> CLIPText:
    """A copy of a tower whose table of tokens has more rows; all other weights are shared with the original, which stays as it is.

    A legacy config pools at the largest id, which is the end token's only as long as there are no new ones, so the copy names the end token.

    Args:
        model: the tower.
        rows: new id, not below the vocabulary's size -> (width,).
    """
    length, config = max(rows) + 1, model.config

    def lengthen(table: Tensor) -> Tensor:
        longer = table.new_zeros(length, table.shape[1])
        longer[: len(table)] = table
        for row, vector in rows.items():
            longer[row] = vector.to(longer)
        return longer

    extended = changed(model, {"text_model.embeddings.token_embedding.weight": lengthen})
    end = config.vocab_size - 1 if config.eos_token_id == _LEGACY_EOS else config.eos_token_id
    extended.config = replace(config, vocab_size=length, eos_token_id=end)
    return extended


def clip_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIP text file's tensors for `CLIPText.load_state_dict(strict=True)`.

    The prefix `text_model.` is added where it lacks (transformers >= 5.6 has no such level in `CLIPTextModel` and saves without it);
    the buffer `position_ids` of older files is left out: it only counts 0, 1, 2, …
    """
    renamed = {name if name.startswith((_PREFIX, "text_projection.")) else _PREFIX + name: tensor for name, tensor in weights.items()}
    renamed.pop(f"{_PREFIX}embeddings.position_ids", None)
    return renamed


def initialise_clip(model: CLIPText) -> None:
    """Draw the weights for training from scratch as CLIP does (Radford et al. 2021, section 2.5; the scales are those of its released code).

    Embeddings N(0, 0.02²), positions N(0, 0.01²), projections in width^-½, residual outputs in width^-½ (2·layers)^-½.
    """
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    residual = width**-0.5 * (2 * layers) ** -0.5
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.01)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = {"out_proj": residual, "fc2": residual, "fc1": (2 * width) ** -0.5}.get(name.rpartition(".")[2], width**-0.5)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(module.bias)
