"""Decoder layers read from a checkpoint one at a time: the source for models that fit neither GPU nor host memory."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.checkpoint.index import open_checkpoint
from core.checkpoint.reader import Reader
from core.models.build import build_meta, read_config
from core.models.load import (
    LoadedModel,
    Passthrough,
    choose,
    load_tokenizer,
    place,
    plan_reader,
    restore_buffers,
)
from qat.layer_io import find_decoder

WIDE = "e_score_correction_bias"  # router selection biases stay FP32, as in core.models.load


class CheckpointSource:
    """`LayerSource` over a folder. The model's layers stay on the meta device; embeddings and norm are loaded.

    `store` keeps nothing: a finished layer is a file of the run, and `tensors` takes it from there.
    """

    def __init__(self, loaded: LoadedModel, reader: Reader, device: torch.device | str) -> None:
        self.loaded, self.reader, self.device = loaded, reader, torch.device(device)
        name, self.shell = find_decoder(loaded.model)
        self.decoder = f"{name}." if name else ""
        self.prefix = f"{self.decoder}layers."
        self.num_layers = len(self.shell.layers)
        layers, self.shell.layers = self.shell.layers, nn.ModuleList()
        try:
            self._fill(self.shell, self.decoder)
            restore_buffers(self.shell, self.device)
        finally:
            self.shell.layers = layers

    def _fill(self, module: nn.Module, prefix: str) -> None:
        parameters = dict(module.named_parameters())
        for name, meta in module.state_dict().items():
            wide = name.endswith(WIDE)
            tensor = torch.empty(meta.shape, dtype=torch.float32 if wide else torch.bfloat16, device=self.device)
            self.reader.fill(prefix + name, tensor)
            place(module, name, nn.Parameter(tensor) if name in parameters else tensor)

    def load(self, index: int) -> nn.Module:
        layer = copy.deepcopy(self.shell.layers[index])
        self._fill(layer, f"{self.prefix}{index}.")
        return layer

    def store(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: see the class."""

    def tensors(self, finished: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, one at a time: the finished ones, and the others from the checkpoint."""
        done = set()
        for name, tensor in finished:
            done.add(name)
            yield name, tensor
        yield from self.reader.stream([n for n in self.reader.plan.recipes if n not in done])


def open_layers(folder: Path | str, device: torch.device | str, attention: str, experts: str) -> CheckpointSource:
    """Open a checkpoint without loading its decoder layers; errors as `core.models.load.load_model`."""
    folder = Path(folder)
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    model = build_meta(config)
    reader = plan_reader(model, checkpoint, checkpoint.config.get("model_type", config.model_type))
    choose(model, attention, experts)
    model.eval()
    carried = tuple(Passthrough(k, checkpoint.entries[k].nbytes) for k in reader.plan.carried)
    return CheckpointSource(LoadedModel(model, config, load_tokenizer(folder), carried, folder), reader, device)
