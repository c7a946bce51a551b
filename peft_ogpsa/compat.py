# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The uses of internals of PEFT, transformers, accelerate, TRL and bitsandbytes, one function each.

Internals may change in any release. Each function says what it relies on, and `tests/test_compat.py` has a test for
each that fails when a library changes it. Methods of PEFT's classes that `OGPSAModel` overrides stay in `OGPSAModel`.
Libraries are imported inside the functions, because `core` uses this module and works with torch alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, PeftType
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

# Python


def when_imported(library: str, act: Callable[[], object]) -> None:
    """Call a function as soon as a library is imported: at once if it has been.

    So `import peft_ogpsa` takes no seconds, and a program that imports PEFT after it knows OGPSA adapters.

    Relies on: the finders in `sys.meta_path` are asked in their order, and a module is created by its loader's
    `exec_module`.
    """
    if sys.modules.get(library) is not None:
        act()
    else:
        sys.meta_path.insert(0, _Finder(library, act))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, library: str, act: Callable[[], object]) -> None:
        self.library, self.act = library, act

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the library as if this finder were not there, and add the call."""
        if name != self.library:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # who asks may only want to know whether the library is there
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            self.act()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


# PEFT


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` with this name, which is added if it is missing.

    Relies on: `PeftType` is an `enum.Enum` of strings. PEFT accepts only its members as types, also in
    `register_peft_method`, and code around PEFT reads `peft_type.value`.
    """
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)  # Python 3.13: `in PeftType` reads this list
    return member


def register_lora_like(name: str, config_cls: type[LoraConfig], model_cls: type[LoraModel]) -> None:
    """Make a LoRA-like tuner a PEFT type, with the prefix and the hotswap checks of LoRA. Again: replace its classes.

    Relies on: `register_peft_method` refuses a type that is already in the three mappings of `peft.mapping`;
    `CONFIG_KEYS_TO_CHECK` in `peft.utils.hotswap` holds the settings that two adapters must share, by type.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method
    from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

    own = peft_type(name.upper())
    mappings: tuple[dict, ...] = (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    for mapping in mappings:
        mapping.pop(own, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    CONFIG_KEYS_TO_CHECK[own] = CONFIG_KEYS_TO_CHECK[PeftType.LORA]


def after_reading_configs(act: Callable[[PeftConfig, str, str | None, dict[str, Any]], PeftConfig]) -> None:
    """Pass every adapter configuration that is read through `act`. Calling this again replaces `act`.

    Relies on: all loading functions of PEFT and transformers read configurations with
    `PeftConfigMixin.from_pretrained(name_or_path, subfolder=None, **kwargs)`, and `_split_kwargs` returns first those
    of `kwargs` that `hf_hub_download` takes.

    Args:
        act: Gets the configuration, the name or path, the subfolder and the arguments of the download. It returns the
            configuration to use.
    """
    from peft.config import PeftConfigMixin

    original = PeftConfigMixin.__dict__["from_pretrained"].__func__
    original = getattr(original, "_without_ogpsa", original)

    @functools.wraps(original)
    def from_pretrained(
        cls: type[PeftConfigMixin], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfigMixin:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return act(config, pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])

    from_pretrained._without_ogpsa = original  # type: ignore[attr-defined]
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]


def before_model_cards(act: Callable[[PeftModel, str], None]) -> None:
    """Call `act` before PEFT writes the card of a model. Calling this again replaces `act`.

    Relies on: `PeftModel.save_pretrained` calls `create_or_update_model_card(output_dir)` before it saves the weights.
    An error in it, as from a `README.md` that is no card, costs the weights.

    Args:
        act: Gets the model and the folder.
    """
    from peft import PeftModel

    original = PeftModel.create_or_update_model_card
    original = getattr(original, "_without_ogpsa", original)

    @functools.wraps(original)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        act(self, output_dir)
        original(self, output_dir)

    create_or_update_model_card._without_ogpsa = original  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]


@contextlib.contextmanager
def treated_as_lora(config: PeftConfig) -> Iterator[None]:
    """Give a configuration the type LORA for a while.

    Relies on: PEFT compares `config.peft_type` with `PeftType.LORA` where it adds layers (the check of Mamba's layers,
    the conversion of targets in mixtures of experts), and reads it anew each time.
    """
    from peft import PeftType

    own = config.peft_type
    config.peft_type = PeftType.LORA
    try:
        yield
    finally:
        config.peft_type = own


def converted_for_transformers(
    model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """An adapter's state dict, with the keys and shapes that the model's layers have in this version of transformers.

    Relies on: PEFT's tuners get a state dict to convert in `_remap_adapter_state_dict_for_load` before it is loaded,
    and `peft.utils.transformers_weight_conversion` converts it for configurations of the type LORA alone.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # before PEFT 0.19, which knows no version of transformers that needs it
        return state_dict
    return convert_peft_adapter_state_dict_for_transformers(model, config, state_dict, adapter_name)


def state_dicts_like_lora(name: str) -> None:
    """Make PEFT's functions for state dicts treat a LoRA-like type as LoRA where they compare types: before PEFT 0.21.

    Without this, older versions would lose DoRA's magnitudes when they load, and save them under other names.

    Relies on: from 0.21 on, tuners have `_remap_adapter_state_dict_for_load`, and `save_and_load` asks the tuner.
    Before, `get_peft_model_state_dict` and `set_peft_model_state_dict` read the type in
    `model.peft_config[adapter_name]`, and other modules import these functions by name.
    """
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import save_and_load

    if hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        return
    for function in ("get_peft_model_state_dict", "set_peft_model_state_dict"):
        original = getattr(save_and_load, function)
        if not hasattr(original, "_without_ogpsa"):
            _replace_everywhere(function, original, _treating_as_lora(original, name.upper()))


def _treating_as_lora(original: Callable, name: str) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def treating(*arguments: Any, **options: Any) -> Any:
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        config = given.arguments["model"].peft_config[given.arguments["adapter_name"]]
        with treated_as_lora(config) if config.peft_type == name else contextlib.nullcontext():
            return original(*arguments, **options)

    treating._without_ogpsa = original  # type: ignore[attr-defined]
    return treating


def _replace_everywhere(name: str, old: Callable, new: Callable) -> None:
    for module in list(sys.modules.values()):
        library = getattr(module, "__name__", "").partition(".")[0]
        if library in ("peft", "transformers", "trl", "accelerate") and vars(module).get(name) is old:
            setattr(module, name, new)


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of an adapter, or a copy of a module that is trained whole (`modules_to_save`).

    Relies on: both kinds have `enable_adapters(bool)` and `disable_adapters`, and hold the base's own parameters as
    `base_layer` or `original_module`. `AuxiliaryTrainingWrapper` is not exported by PEFT.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def adapter_names(layer: Any) -> list[str]:
    """The names of a layer's adapters.

    Relies on: `BaseTunerLayer._all_available_adapter_names`, which also finds those without trainable weights.
    """
    return layer._all_available_adapter_names()


# transformers


def move_to_front(callback: TrainerCallback) -> bool:
    """Make a callback the first of its trainer, from within one of its events.

    The trainer puts its reporting callbacks (TensorBoard, W&B) before the user's, so they see only what the trainer
    itself logs. It does not give callbacks their handler. This function therefore looks for it in the calling frames.

    Relies on: `CallbackHandler.callbacks` is a list that is read anew at each event, and its methods have the handler
    as `self`.

    Returns:
        Whether the handler was found.
    """
    from transformers.trainer_callback import CallbackHandler

    for handler in _callers():
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # Create a new list, because the handler is iterating over the old one.
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return True
    return False


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The trainer whose event a callback is handling, from within that event; `None` if it is not found.

    Relies on: a trainer does not give itself to its callbacks. Its own methods cause their events, with the trainer as
    `self`, and its `callback_handler.callbacks` holds them.
    """
    from transformers import Trainer

    for trainer in _callers():
        if isinstance(trainer, Trainer) and callback in trainer.callback_handler.callbacks:
            return trainer
    return None


def kept_in_float32(model: PreTrainedModel, dtype: Any) -> Callable[[str], bool]:
    """Return whether a model's weight of a given name stays in float32 when the model is loaded in `dtype`.

    Relies on: `PreTrainedModel._keep_in_fp32_modules` names parts of dotted names for float16, and
    `_keep_in_fp32_modules_strict` for bfloat16, too.
    """
    import torch

    lists = {torch.float16: ("", "_strict"), torch.bfloat16: ("_strict",)}.get(dtype, ())
    parts = [part for own in lists for part in getattr(model, f"_keep_in_fp32_modules{own}", None) or ()]
    pattern = re.compile("|".join(rf"(?:^|\.){part}(?:\.|$)" for part in map(re.escape, parts)) or r"(?!)")
    return lambda name: pattern.search(name) is not None


def use_one_gpu(args: TrainingArguments) -> TrainingArguments:
    """Keep a trainer on one GPU where there are several. It would copy the model to all of them (`DataParallel`).

    Relies on: `TrainingArguments.n_gpu` reads `_n_gpu`.
    """
    args._n_gpu = min(1, args.n_gpu)
    return args


def output_directory(trainer: Trainer | None, args: TrainingArguments) -> str:
    """The folder of a trainer's checkpoints: in a hyperparameter search that of the trial.

    Relies on: `Trainer._get_output_dir`, and `Trainer._trial`, which a search sets.
    """
    trial = getattr(trainer, "_trial", None)
    if trainer is None or trial is None or not trainer.state.is_hyper_param_search:
        return args.output_dir or "."
    return trainer._get_output_dir(trial)


def after_checkpoints(trainer: Trainer, act: Callable[[], None]) -> None:
    """Let a trainer call `act` after each checkpoint that it writes. A second call replaces the first.

    Relies on: `Trainer._save_checkpoint` writes a checkpoint. `enable_jit_checkpoint` calls it without the event
    `on_save`.
    """
    save = trainer._save_checkpoint
    save = getattr(save, "without_ogpsa", save)

    @functools.wraps(save)
    def save_both(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        act()

    save_both.without_ogpsa = save  # type: ignore[attr-defined]
    trainer._save_checkpoint = save_both  # type: ignore[method-assign]


def reference_adapter(trainer: Trainer | None) -> str | None:
    """The adapter that is a trainer's reference policy, if there is one.

    Relies on: TRL's trainers name it `ref`, or take `ref_adapter_name` (before TRL 1.0).
    """
    name = getattr(trainer, "ref_adapter_name", None) or "ref"
    return name if name in getattr(getattr(trainer, "model", None), "peft_config", {}) else None


def _callers() -> Iterator[Any]:
    """The `self` of every method that is being called, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def forgets_default_adapter() -> bool:
    """Whether a resumed trainer does not load the adapter `default` of a checkpoint with others, such as TRL's `ref`.

    Relies on: PEFT saves `default` in the checkpoint's own folder, and every other adapter in a subfolder. If there
    are subfolders, `Trainer._load_from_checkpoint` loads them alone, without a warning, before transformers 5.23.
    """
    import transformers

    return _release(transformers.__version__) < (5, 23)


def all_weights_in_every_process() -> contextlib.AbstractContextManager[None]:
    """Make `from_pretrained` load a model's weights in every process, also under FSDP.

    By default, only the first process loads them under `accelerate launch` with FSDP. accelerate copies the policy to
    the other processes when it shards it. TRL shards a reference policy without copying it.

    Relies on: `from_pretrained` reads the variable `FSDP_CPU_RAM_EFFICIENT_LOADING` in each call. If it is true, older
    releases of transformers (5.17, but not 5.24) load zeros in all processes but the first of each machine.
    """
    from accelerate.utils import patch_environment

    return patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false")


def end(trainer: Trainer) -> None:
    """Tell a trainer's callbacks that everything is done.

    Relies on: `Trainer.end`, which came after transformers 5.17. Before, there was nothing to end.
    """
    getattr(trainer, "end", lambda: None)()


def checkpointing(module: Any) -> Callable | None:
    """The function that checkpoints a layer's activations, if it is a layer of transformers and checkpointing is on.

    Relies on: such layers have a class `GradientCheckpointingLayer` (found by name, without importing transformers), a
    flag `gradient_checkpointing`, and `_gradient_checkpointing_func`, which they call only in training mode.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    if "GradientCheckpointingLayer" not in names or not module.gradient_checkpointing:
        return None
    return getattr(module, "_gradient_checkpointing_func", None)


def set_checkpointing(module: Any, function: Callable) -> None:
    """Replace the result of `checkpointing`, which has to be a function and not `None`."""
    module._gradient_checkpointing_func = function


# accelerate


def fsdp_plugin() -> Any:
    """The FSDP settings of the current accelerate state, or `None`.

    Relies on: `AcceleratorState._shared_state` holds the attributes of all instances. Creating an instance to read
    them would reset the distributed type (accelerate 1.15).
    """
    from accelerate.state import AcceleratorState

    return AcceleratorState._shared_state.get("fsdp_plugin")


def shard_on_cpu(trainer: Trainer) -> None:
    """Make a trainer on CPUs use FSDP2. accelerate itself supports FSDP2 only on accelerators.

    Relies on: accelerate's state has `distributed_type` and `fsdp_plugin`, which `Accelerator.prepare` reads anew, and
    the trainer has `is_fsdp_enabled`.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        trainer.is_fsdp_enabled = True


# TRL


def create_model(source: str, **options: Any) -> PreTrainedModel:
    """Load a model with the class that its configuration names, as TRL's scripts do.

    Relies on: `trl.trainer.utils.create_model_from_path`, which TRL does not export.
    """
    from trl.trainer.utils import create_model_from_path

    return create_model_from_path(source, **options)


def trusts_remote_code(*configs: Any) -> bool:
    """Whether one of TRL's configurations allows code that comes with a model.

    Relies on: the field `trust_remote_code`. It moved from `ModelConfig` to the trainers' configurations.
    """
    return any(getattr(config, "trust_remote_code", False) for config in configs)


def takes_base_as_reference(trainer: Any) -> bool:
    """Whether a trainer's reference policy is the base, also if the adapter that it trains is trained already.

    Relies on: before TRL 0.29, `DPOTrainer` turns the adapter off for the reference policy, unless it has a
    `ref_model` or a `ref_adapter_name`. From 0.29 on, it copies the adapter that it gets to the adapter `ref`. unsloth
    renames its copy of the class. LLaMA-Factory has a subclass, which also serves the losses `orpo` and `simpo`; like
    `reference_free`, they use no reference policy.
    """
    names = [cls.__name__.removeprefix("_").removeprefix("Unsloth") for cls in type(trainer).__mro__]
    if "DPOTrainer" not in names or _release(sys.modules["trl"].__version__) >= (0, 29):
        return False
    explicit = any(getattr(trainer, name, None) for name in ("ref_model", "ref_adapter_name", "reference_free"))
    return not explicit and getattr(trainer, "loss_type", None) not in ("orpo", "simpo")


# bitsandbytes


def evaluation_breaks_gradients(module: nn.Module) -> bool:
    """Whether a layer gives wrong gradients for good after a pass in evaluation mode.

    Relies on: `Linear4bit.forward` of bitsandbytes 0.50 repacks the weight on a CPU when it first runs in evaluation
    mode, and its backward pass does not know the new form. The class is found by name, without importing bitsandbytes.
    """
    return type(module).__name__ == "Linear4bit" and next(module.parameters()).device.type == "cpu"


# torch


def skips_step(optimizer: Any) -> bool:
    """Whether a gradient scaler has found an overflow, so that the optimizer's step does nothing.

    Relies on: `GradScaler.step` sets `found_inf` on an optimizer that unscales by itself (fused ones), and calls it
    also after an overflow. It does not call other optimizers then.
    """
    return bool(getattr(optimizer, "found_inf", False))


def gradient_scale(optimizer: Any) -> Tensor | None:
    """The factor by which gradients are still scaled in the optimizer's step, if it unscales them by itself.

    Relies on: `GradScaler.step` sets `grad_scale` on such an optimizer, and on no other.
    """
    return getattr(optimizer, "grad_scale", None)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
