"""From YAML and the command line to one typed object, once, at the door.

Hydra composes `configs/<command>.yaml` with its groups and the command line's overrides; the result is merged into
a dataclass schema, so that a key that does not exist or a value of the wrong type is an error in one line, and is
handed on as plain dataclasses. Nothing behind an entry point sees Hydra or OmegaConf.

Hydra's compose API is used rather than its decorator: a bad override then ends in our one line instead of a
traceback, and nothing changes the working directory. The price is Hydra's multirun and shell completion.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from packaging.version import Version

from core.errors import ConfigError, Fp4FlashError, resource_line

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
EXTRA = ("experiment", "debug")  # groups added with a plus sign
FLAGS = {"--help", "-h", "--cfg"}


@dataclass(frozen=True)
class Command:
    """One entry point: `python -m <module>`, its YAML file, its schema and its help text."""

    module: str
    config: str
    schema: type
    help: str
    check: Callable[[Any], None] = lambda _: None  # ranges and combinations that types cannot say


def load(command: Command, overrides: list[str]) -> tuple[object, str]:
    """Compose and validate.

    Args:
        command: the entry point.
        overrides: Hydra override strings as typed, e.g. `["model=path", "+experiment=mimo_fp4"]`.
    Returns:
        An instance of `command.schema`, and the resolved configuration as YAML.
    Raises:
        ConfigError: an unknown key or group, a wrong type, a missing required value; one line.
    """
    ConfigStore.instance().store(name=f"{command.config}_schema", node=command.schema)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose(config_name=command.config, overrides=overrides)
            plain = compose(config_name=command.config)
        merged = continued(strict(composed, command), strict(plain, command))
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=...")
        config = OmegaConf.to_object(merged)
        command.check(config)
        return config, OmegaConf.to_yaml(merged)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error


def strict(composed: DictConfig, command: Command) -> DictConfig:
    """The composed values in the schema's own node: a key that `+key=` smuggled in is an error too."""
    merged = OmegaConf.merge(OmegaConf.structured(command.schema), OmegaConf.to_container(composed))
    assert isinstance(merged, DictConfig)
    return merged


# What may differ between the command that started a run and the one that resumes it: how it is run, not what it is.
RESUME_MAY_CHANGE = (
    "run",
    "parallel",
    "tracker",
    "dry_run",
    "train.micro_batch_size",
    "train.device",
    "train.keep_last",
    "eval",
    "data.root",
)


def continued(merged: DictConfig, plain: DictConfig) -> DictConfig:
    """For `run.resume`: the run's own configuration, with what the command line changes of how it is run.

    Args:
        merged: as the command line says. plain: as it would be without overrides; what differs was said.

    Raises:
        ConfigError: the command line asks for another configuration than the run's; names the first key.
    """
    if "run" not in merged or not merged.run.resume:
        return merged
    stored_path = Path(merged.run.root) / merged.run.resume / "config.yaml"
    if not stored_path.exists():
        stored_path = Path(merged.run.resume) / "config.yaml"
    if not stored_path.exists():
        raise ConfigError(f"run.resume={merged.run.resume} is no run under {merged.run.root} (no config.yaml)")
    stored = OmegaConf.merge(merged, OmegaConf.load(stored_path))
    assert isinstance(stored, DictConfig)
    stored.run = merged.run
    said, default, theirs = flat(merged), flat(plain), flat(stored)
    for key in sorted(k for k in said if said[k] != default.get(k) and said[k] != theirs.get(k)):
        if not any(key == k or key.startswith(f"{k}.") for k in RESUME_MAY_CHANGE):
            raise ConfigError(
                f"{key}={said[key]} differs from the run being resumed ({theirs.get(key)}); "
                "drop it, or start a new run without run.resume"
            )
        OmegaConf.update(stored, key, OmegaConf.select(merged, key))
    return stored


def flat(config: DictConfig) -> dict[str, Any]:
    """Dotted keys of the leaves."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    return dict(walk(plain, ""))


def one_line(error: BaseException) -> str:
    """The sentences of a Hydra or OmegaConf error that name the key, the value and the rule, on one line."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        for raw in str(seen).splitlines():
            line = raw.strip()
            noise = line.startswith(
                (
                    "full_key:",
                    "object_type=",
                    "reference_type=",
                    "To append to your config",
                    "Set the env",
                    "See https",
                    "Config search",
                    "provider=",
                )
            )
            if line and not noise and line not in parts:
                parts.append(line)
        key = getattr(seen, "full_key", None)
        if key:
            parts.append(f"(key: {key})")
        seen = seen.__cause__
    text = " ".join(dict.fromkeys(parts))
    return re.sub(r"\s+", " ", text) + " -- see --help for the groups and --cfg job for every key"


def groups(command: Command) -> dict[str, list[str]]:
    """{group: choices} of a command: those its YAML chooses from, and the `+` groups' files that name its module.

    The head of every experiment has the command that runs it; the first `python -m` there decides whose it is.
    """
    plain = OmegaConf.load(CONFIG_DIR / f"{command.config}.yaml")
    own = {key for entry in plain.defaults if not isinstance(entry, str) for key in entry}
    found: dict[str, list[str]] = {}
    for folder in sorted(p for p in CONFIG_DIR.iterdir() if p.is_dir()):
        for file in sorted(folder.glob("*.yaml")):
            named = re.search(r"python -m ([\w.]+)", file.read_text()) if folder.name in EXTRA else None
            if folder.name in own:
                found.setdefault(folder.name, []).append(file.stem)
            elif named and named[1] == command.module:
                found.setdefault(f"+{folder.name}", []).append(file.stem)
    return found


def entry(command: Command, main: Callable[[object, str], int | None], argv: list[str] | None = None) -> int:
    """Run `main(config, resolved_yaml)`; our own errors end in one line and status 2, Ctrl-C in 130.

    `--help` prints the command's help and every group's choices; `--cfg job` prints the resolved configuration.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return run(command, main, arguments)
    except Fp4FlashError as error:
        print(f"{command.module}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command.module}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = resource_line(error)
        if line is None:
            raise
        print(f"{command.module}: {line}", file=sys.stderr)
        return 2


def run(command: Command, main: Callable[[object, str], int | None], arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(f"{command.help}\n\nGroups (choose with group=name, change a value with key=value):")
        print("\n".join(f"  {group}={' | '.join(names)}" for group, names in groups(command).items()) + "\n")
        print(f"python -m {command.module} --cfg job   prints every key with its value")
        return 0
    show = "--cfg" in arguments
    if show:
        place = arguments.index("--cfg")
        arguments = arguments[:place] + arguments[place + 2 :]
    unknown = [a for a in arguments if a.startswith("-") and a not in FLAGS]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not an option; values are set as key=value, e.g. train.steps=100")
    config, resolved = load(command, arguments)
    if show:
        print(resolved, end="")
        return 0
    check_name_clash()
    return main(config, resolved) or 0


def check_name_clash() -> None:
    """Refuse to start where transformers would import our kernels/ folder in place of the PyPI package `kernels`.

    transformers probes for a distribution of that name and, if its version suits, imports names from it; from a
    checkout Python finds our folder first. Must run before the first transformers model is imported.
    """
    try:
        installed = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

    if Version(KERNELS_MIN_VERSION) <= Version(installed) < Version(KERNELS_MAX_VERSION):
        raise ConfigError(
            f"the PyPI package 'kernels' {installed} is installed; transformers would look for its functions in "
            "fp4flash's kernels/ folder: run `pip uninstall kernels` in this environment"
        )
