"""What layer-by-layer training reads and writes: one decoder layer at a time, and the hidden states between layers.

Three small things, each replaceable by a test double:

`LayerSource`  hands out BF16 decoder layers one by one and takes finished tensors back. `ModelSource` serves a model
               that lies in host memory; a checkpoint that does not fit there is served from its files.
`LayerCalls`   what a model passes to its decoder layers besides hidden states (rotary tables, masks per layer type,
               position ids). It is not rebuilt here: the model's own forward runs with every layer replaced by a
               recorder that returns its input. That works for any transformers-v5 decoder, packing included.
`HiddenStore`  hidden states [rows, T, H] in BF16, in memory-mapped files (written beside, then renamed: a file that
               exists is complete) or in host memory.

Legend: N calibration rows, B rows of one call, T tokens in a row, H hidden size.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core.errors import CheckpointError, UnsupportedError
from core.train.batch import Batch


class LayerSource(Protocol):
    """Decoder layers of one model, `prefix + str(index) + "."` before every tensor name of a layer."""

    prefix: str
    num_layers: int
    shell: nn.Module  # the decoder whose forward calls the layers; its own tensors (embeddings, norm) are loaded

    def load(self, index: int) -> nn.Module:
        """A fresh copy of the unquantised layer on the training device; the caller drops it before the next."""
        ...

    def store(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the finished tensors of a layer (full parameter names, BF16, CPU)."""
        ...


def find_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, module) of the submodule that owns the decoder layers as `.layers`.

    Raises:
        UnsupportedError: the model has no such submodule, or more than one.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)]
    if len(found) != 1:
        raise UnsupportedError(
            f"qat=layerwise needs one stack of decoder layers, {type(model).__name__} has {len(found)}; use qat=snap"
        )
    return found[0]


class ModelSource:
    """Layers of a model in host memory. The base weights of a layer are kept until `store` replaces them."""

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        name, self.shell = find_decoder(model)
        self.prefix = f"{name}.layers." if name else "layers."
        self.layers: nn.ModuleList = self.shell.layers
        self.num_layers = len(self.layers)
        self.device = torch.device(device)
        for child_name, child in self.shell.named_children():
            if child_name != "layers":
                child.to(self.device)

    def load(self, index: int) -> nn.Module:
        return copy.deepcopy(self.layers[index]).to(self.device)

    def store(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.layers[index].named_parameters())
        for name, tensor in tensors.items():
            parameters[name.removeprefix(f"{self.prefix}{index}.")].data.copy_(tensor)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes its keyword arguments and returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "stands_for", layer)  # not a submodule: nothing is moved, saved or counted through it
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise UnsupportedError(
                f"{type(self.stands_for).__name__} gets positional arguments; layerwise needs keywords: use qat=snap"
            )
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.stands_for, name)  # some decoders read layer.attention_type


class LayerCalls:
    """Recorded arguments of decoder-layer calls."""

    def __init__(self, shell: nn.Module) -> None:
        self.shell = shell
        self.recorders = nn.ModuleList(_Recorder(layer) for layer in shell.layers)

    def shell_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters outside the decoder layers (embeddings, final norm)."""
        return (p for name, child in self.shell.named_children() if name != "layers" for p in child.parameters())

    @torch.no_grad()
    def record(self, index: int, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """(embeddings [B, T, H], keyword arguments of layer `index`) for packed rows on the shell's device."""
        layers, self.shell.layers = self.shell.layers, self.recorders
        try:
            self.shell(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        finally:
            self.shell.layers = layers
        recorder = self.recorders[index]
        hidden, kwargs = recorder.hidden, recorder.kwargs
        for other in self.recorders:
            other.hidden, other.kwargs = None, {}
        return hidden, kwargs


def run_layer(layer: nn.Module, x_BTH: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Output hidden states [B, T, H] of one layer call."""
    out = layer(x_BTH, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class StreamShape:
    rows: int
    tokens: int
    hidden: int

    @property
    def dims(self) -> tuple[int, int, int]:
        return self.rows, self.tokens, self.hidden

    @property
    def nbytes(self) -> int:
        return 2 * self.rows * self.tokens * self.hidden


class MemoryStore:
    """Hidden states in host memory; lost with the process, so a resumed run recomputes them from the embeddings."""

    durable = False

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        self._done: dict[str, Tensor] = {}

    def create(self) -> Tensor:
        return torch.empty(self.shape.dims, dtype=torch.bfloat16)

    def commit(self, key: str, hidden_NTH: Tensor) -> None:
        self._done[key] = hidden_NTH

    def has(self, key: str) -> bool:
        return key in self._done

    def open(self, key: str) -> Tensor:
        return self._done[key]

    def keep_only(self, keys: set[str]) -> None:
        self._done = {key: value for key, value in self._done.items() if key in keys}


class DiskStore:
    """Hidden states in memory-mapped files `<key>.bf16`; the page cache, not this process, holds what is read."""

    durable = True

    def __init__(self, shape: StreamShape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        folder.mkdir(parents=True, exist_ok=True)

    def _map(self, path: Path) -> Tensor:
        count = self.shape.nbytes // 2
        return torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16).view(self.shape.dims)

    def create(self) -> Tensor:
        path = self.folder / "writing.tmp"
        path.unlink(missing_ok=True)
        try:
            with path.open("wb") as file:
                # Reserve the space now: writing to a mapped file on a full disk would kill the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, self.shape.nbytes)
            return self._map(path)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder}: cannot hold {self.shape.nbytes / 2**30:.2f} GiB of hidden states ({error}); "
                "free space, lower layerwise.tokens or set layerwise.hidden=recompute"
            ) from error

    def commit(self, key: str, hidden_NTH: Tensor) -> None:
        del hidden_NTH  # lies in writing.tmp already
        (self.folder / "writing.tmp").replace(self.folder / f"{key}.bf16")

    def has(self, key: str) -> bool:
        path = self.folder / f"{key}.bf16"
        return path.is_file() and path.stat().st_size == self.shape.nbytes

    def open(self, key: str) -> Tensor:
        if not self.has(key):
            raise CheckpointError(
                f"{self.folder / key}.bf16: hidden states are missing or of another size; start a new run"
            )
        return self._map(self.folder / f"{key}.bf16")

    def keep_only(self, keys: set[str]) -> None:
        for path in self.folder.glob("*.bf16"):
            if path.stem not in keys:
                path.unlink()


HiddenStore = MemoryStore | DiskStore
