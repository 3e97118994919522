"""Where a run's BF16 model comes from: a checkpoint folder, or the embedded nano MiMo-V2 trained here once.

The nano model has every part of its big relatives (window and full attention, sinks, value scale, partial rotary,
sigmoid router with correction bias, dense first layer), so the demo walks the real code path on real text.
"""

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from core.errors import ConfigError
from core.models.load import save_model
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.run import Run, start_run
from core.train.config import OptimConfig, ParallelConfig, RunConfig
from core.train.data import document_texts, train_stream
from core.train.device import device
from core.train.engines import build_engine
from core.train.loop import Loop, NoHook
from core.train.tokenizer import load_tokenizer, train_tokenizer
from qat.config import NANO, LossConfig, NanoConfig, QATConfig
from qat.losses import make_loss
from qat.select import select

ROPE = {"rope_type": "default", "partial_rotary_factor": 0.334}


def model_folder(config: QATConfig) -> Path:
    """The checkpoint folder to start from; trains and caches the nano base when it is asked for and missing.

    Raises:
        ConfigError: no path was given, or it is no folder; says what to download or set.
    """
    model = config.model
    if model.name == NANO and model.path is None:
        return nano_base(config)
    if model.path is None:
        fetch = f"download it with `hf download {model.hub} --local-dir DIR` and " if model.hub else ""
        raise ConfigError(f"model={model.name} has no weights here: {fetch}set model.path=DIR")
    folder = Path(model.path)
    if not (folder / "config.json").exists():
        raise ConfigError(f"model.path={folder} is not a checkpoint folder (no config.json); set it to one")
    return folder


def nano_config(nano: NanoConfig, pad: int, eos: int) -> MiMoV2Config:
    """Geometry of the embedded model: full attention first and last, windows between, dense first layer."""
    layers = nano.num_hidden_layers
    kinds = ["full_attention" if i in (0, layers - 1) else "sliding_attention" for i in range(layers)]
    return MiMoV2Config(
        vocab_size=nano.vocab_size,
        hidden_size=nano.hidden_size,
        intermediate_size=nano.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=nano.num_attention_heads,
        num_key_value_heads=nano.num_key_value_heads,
        swa_num_key_value_heads=2 * nano.num_key_value_heads,
        head_dim=nano.head_dim,
        v_head_dim=nano.v_head_dim,
        moe_intermediate_size=nano.moe_intermediate_size,
        n_routed_experts=nano.n_routed_experts,
        num_experts_per_tok=nano.num_experts_per_tok,
        sliding_window=nano.sliding_window,
        layer_types=kinds,
        mlp_layer_types=["dense"] + ["sparse"] * (layers - 1),
        rope_parameters={
            "full_attention": ROPE | {"rope_theta": 5_000_000.0},
            "sliding_attention": ROPE | {"rope_theta": 10_000.0},
        },
        max_position_embeddings=4096,
        pad_token_id=pad,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )


def nano_base(config: QATConfig) -> Path:
    """The trained BF16 nano model for this geometry, text (Python's own) and seed; from the cache when it is there."""
    nano, data = config.model.nano, config.data
    assert nano is not None, "configs/model/nano_mimo_v2.yaml sets it"
    text = [data.source, data.root, data.train, data.max_bytes, data.seq_len, data.shuffle_buffer, data.loss_on]
    key = json.dumps([asdict(nano), text, config.train.seed, sys.version], default=str, sort_keys=True)
    cache = Path(config.run.cache)
    name = f"nano-base-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    result = cache / name / "model"
    if (result / "config.json").exists():
        print(f"BF16 base: {result} (cached)")
        return result
    with torch.device("meta"):
        select(MiMoV2ForCausalLM(nano_config(nano, 0, 0)), config.quant)  # refuse a geometry before it is trained
    print(
        f"BF16 base: none cached for this geometry and text; training one first ({nano.steps} steps) "
        f"into {cache / name}"
    )
    tokens = cache / name / "tokenizer"
    if not (tokens / "tokenizer.json").exists():
        train_tokenizer(document_texts(data), nano.vocab_size, tokens)
    tokenizer = load_tokenizer(tokens)
    resume = (cache / name / "run.json").exists()
    run_config = RunConfig(root=str(cache), name=name, resume=name if resume else None)
    run = start_run(run_config, "base", "nano", key, config.train.seed)
    train_base(config, nano, tokenizer, run)
    return result


def train_base(config: QATConfig, nano: NanoConfig, tokenizer: object, run: Run) -> None:
    torch.manual_seed(config.train.seed)
    model = MiMoV2ForCausalLM(nano_config(nano, tokenizer.pad_token_id, tokenizer.eos_token_id)).to(torch.bfloat16)
    model.set_experts_implementation("fp4flash")
    train = replace(
        config.train,
        steps=nano.steps,
        batch_size=nano.batch_size,
        micro_batch_size=0,
        eval_every=0,
        save_every=nano.steps // 4,
    )
    optim = OptimConfig(lr=nano.lr, weight_decay=0.1)
    engine = build_engine(
        model,
        make_loss(LossConfig(kl=0.0, ce=1.0), None),
        optim,
        ParallelConfig(),
        micro_batches=1,
        device=device(train),
    )
    stream = train_stream(config.data, tokenizer, batch_size=nano.batch_size, seed=train.seed)
    model.train()
    Loop(engine, stream, train, optim, run, NoHook(), title="BF16 base").run()
    save_model(engine.full_tensors(), model.config, run.model, tokenizer=tokenizer)
    run.update(state="finished")
