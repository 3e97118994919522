"""A causal language model as generation and drafting see it: logits, and the outputs of tapped layers.

Taps are forward hooks on the decoder layers: layer id's output is transformers' `hidden_states[id + 1]`. Only those
tensors are kept, not the list of all hidden states.

Legend: R rows, T tokens, F taps x hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.generate.slots import SlotCache, by_kind, masks
from core.models.ops import flex_mask
from core.train.batch import document_ids

SHORTEST = 128  # a block of flex_attention


class Target:
    """`model` with its taps. Frozen: everything here runs without gradients."""

    def __init__(self, model: Any, taps: tuple[int, ...] = ()) -> None:
        layers = model.model.layers
        wrong = [t for t in taps if not 0 <= t < len(layers)]
        if wrong:
            raise ConfigError(f"draft.taps has layer {wrong[0]}; the target has layers 0 to {len(layers) - 1}")
        self.model, self.taps = model, taps
        self.layers: list[nn.Module] = [layers[t] for t in taps]
        self.head: nn.Linear = model.get_output_embeddings()
        self.embedding: nn.Embedding = model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def compiles_shapes(self) -> bool:
        """Whether rows had better have few shapes: on a GPU block-sparse attention compiles for each (and after eight
        no longer does)."""
        return self.device.type == "cuda"

    def room(self, tokens: int) -> int:
        """How long to make rows for texts of many lengths. What is behind a text is seen by nobody in it."""
        return max(SHORTEST, 1 << (tokens - 1).bit_length()) if self.compiles_shapes else tokens

    @contextmanager
    def tapping(self) -> Iterator[list[Tensor]]:
        """Outputs of the tapped layers during one forward, in the order of the taps."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output).detach())

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def packed(self, ids_RT: Tensor, position_RT: Tensor) -> tuple[Tensor, Tensor]:
        """(last hidden states [R, T, G], features [R, T, F]) of packed rows; documents begin at position 0."""
        with self.tapping() as found:
            out = self.model.model(
                input_ids=ids_RT,
                attention_mask=self.packed_mask(position_RT),
                position_ids=position_RT,
                use_cache=False,
            )
        return out.last_hidden_state, torch.cat(found, dim=-1) if found else out.last_hidden_state.new_empty(0)

    def packed_mask(self, position_RT: Tensor) -> Any:
        """Under transformers' flex_attention our block mask, made on the device alone; else None: the model's own."""
        config = self.model.config
        if config._attn_implementation != "flex_attention":
            return None
        documents = document_ids(position_RT)
        return by_kind(config, lambda window: flex_mask(documents, window, self.dtype))

    @torch.no_grad()
    def step(
        self, ids_RT: Tensor, position_RT: Tensor, cache: SlotCache, used: int, last_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits, features [R, T, F]) of tokens that go into the cache at their positions.

        Args:
            used: one more than the largest position. last_R: index of the only token of each row to give logits for;
                the result is then [R, V], else [R, T, V].
        """
        mask = masks(self.model.config, position_RT, max(used, cache.used), self.dtype)
        with self.tapping() as found:
            out = self.model.model(
                input_ids=ids_RT,
                attention_mask=mask,
                position_ids=position_RT,
                past_key_values=cache.at(position_RT, used),
                use_cache=True,
            )
        hidden = out.last_hidden_state
        if last_R is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last_R]
        return self.head(hidden), torch.cat(found, dim=-1) if found else hidden.new_empty(0)
