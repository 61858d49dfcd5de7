"""The configuration of a training run."""

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from effnet_fast.scaling import get_family, get_variant

# What a checkpoint's tensors and its place in the training data depend on.
FIXED_ON_RESUME = (
    *("variant", "family", "strides", "dataset", "resolution", "augment", "crop_pct", "erase", "seed"),
    *("limit_train", "batch_size", "accumulate", "optimizer", "freeze", "processes"),
)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; config.json holds it, with what follows from it."""

    variant: str
    family: str
    strides: list
    dataset: str
    data_dir: str | None
    verify: bool
    resolution: int
    epochs: int
    batch_size: int
    lr: float
    augment: str
    crop_pct: float
    erase: float
    amp: str
    memory: str
    seed: int
    limit_train: int | None
    limit_val: int | None
    num_workers: int
    device: str
    backend: str
    optimizer: str
    weight_decay: float
    schedule: str
    warmup_epochs: int
    label_smoothing: float
    drop_rate: float | None
    drop_path_rate: float | None
    ema_decay: float
    ema_warmup: bool
    accumulate: int
    mixup: float
    cutmix: float
    autoaugment: str | None
    randaugment: int | None
    freeze: str | None
    weights: str | None
    compile: bool
    profile: bool
    processes: int
    sync_bn: bool
    clip_grad: float | None
    max_bad_steps: int
    checkpoint_minutes: float
    keep_checkpoints: int

    @property
    def input_size(self) -> int:
        """Height and width of the network's input in pixels."""
        return get_family(self.family).input_size(get_variant(self.variant, self.family).scaling, self.resolution)


def stored_options(stored: Any) -> dict[str, Any]:
    """The options in a configuration that was read from a file; those that are newer than the file are left out.

    Raises ValueError for a value of another type than the option's.
    """
    if not isinstance(stored, dict):
        raise ValueError("config: not a run's configuration")
    types = get_type_hints(Config)
    options = {field.name: stored[field.name] for field in fields(Config) if field.name in stored}
    for name, value in options.items():
        if not isinstance(value, types[name]):
            raise ValueError(f"config: {name} is {value!r}, not a run's configuration")
    return options


def fixed_difference(stored: dict[str, Any], options: dict[str, Any]) -> str | None:
    """The first option that a run can't go on with because it is another one than before; None if there is none.

    Options that are newer than the run do not count.
    """
    different = (name for name in FIXED_ON_RESUME if name in stored and stored[name] != options.get(name))
    return next(different, None)
