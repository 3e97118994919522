"""The `qat=layerwise` stage of `qat.train`: calibration rows, every layer in turn, the trained model on disk."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.errors import ConfigError, UnsupportedError
from core.models.load import LoadedModel, save_model
from core.run import Run
from core.train.data.stream import TrainStream
from core.train.device import device
from core.train.tracker import Tracker
from qat.config import QATConfig
from qat.layer_checkpoint import CheckpointSource
from qat.layer_io import ModelSource
from qat.layer_train import Targets
from qat.layerwise import train_layerwise
from qat.select import Selection, set_trainable


def layerwise_run(
    config: QATConfig,
    run: Run,
    loaded: LoadedModel | CheckpointSource,
    selection: Selection,
    rows: TrainStream,
    tracker: Tracker,
) -> None:
    """Calibrate, train every layer, write run.model; continues an interrupted run.

    Args:
        rows: global batches of `layerwise.batch_size` packed rows.
        loaded: a model in host memory, or layers on demand from its checkpoint (`qat.layer_checkpoint.open_layers`).
    Raises:
        UnsupportedError: more than one process.
        ConfigError: a parameter outside the decoder layers is to be trained.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            "qat=layerwise runs in one process on one GPU; start it without torchrun or accelerate launch"
        )
    source = loaded if isinstance(loaded, CheckpointSource) else ModelSource(loaded.model, device(config.train))
    loaded = source.loaded if isinstance(source, CheckpointSource) else loaded
    trained = set_trainable(loaded.model, config.trainable.patterns, selection)
    outside = next((n for n in [*trained, *selection.names] if not n.startswith(source.prefix)), None)
    if outside:
        raise ConfigError(
            f"qat=layerwise trains decoder layers only, not {outside}; "
            f"set trainable.patterns and quant.select to names under {source.prefix}*"
        )
    cfg = config.layerwise
    count = max(1, cfg.tokens // (cfg.batch_size * config.data.seq_len))
    batches = [next(rows) for _ in range(count)]
    targets = Targets({t.name: t.dim for t in selection.tensors}, trained, config.quant.rule)
    run.rewind(0)
    with tqdm(total=source.num_layers, desc="QAT, layer by layer", unit="layer") as bar:

        def log(record: dict[str, float | int]) -> None:
            run.log(step=record["layer"] + 1, **record)
            tracker.log(int(record["layer"]) + 1, record)
            bar.update(record["layer"] + 1 - bar.n)
            bar.set_postfix_str(
                f"error {record['loss_ptq']:.4f} -> {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s"
            )

        result = train_layerwise(
            source, targets, batches, cfg, run.folder / "layerwise", seed=config.train.seed, log=log
        )
        bar.update(source.num_layers - bar.n)
    whole = source.tensors(result.tensors()) if isinstance(source, CheckpointSource) else cpu_tensors(loaded.model)
    save_model(whole, loaded, run.model)


def cpu_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        yield name, tensor.cpu()
