# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A training command, from its options to the saved adapter."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import transformers
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import ModelConfig, get_peft_config

from .. import __version__, compat
from ..core.config import ProjectionConfig
from ..core.files import check_writable
from ..core.full_parameter import FullParameterConfig
from ..references.lookalikes import lookalike_rows, safety_rows, with_lookalikes
from ..references.refusals import refusals_from_prompts
from ..references.sets import AnsweredSet, ReferenceSet
from ..sharing.card import check_card, save_card
from ..sharing.evaluation_record import read_evaluation
from ..sharing.folder import weights_digest
from ..sharing.hub import push_adapter
from ..sharing.run_record import save_run
from ..text.tokenization import as_messages, columns_of, encode_row, tokenizer_of
from ..trainer.callback import OGPSACallback, examples_per_step
from ..trainer.checkpoint import STATE_NAME, CheckpointError, last_whole
from ..tuner.config import SIDECAR_NAME, OGPSAConfig
from ..tuner.model import projector_of
from . import tables
from .arguments import (
    DataArguments,
    MethodConfig,
    OGPSAArguments,
    RunArguments,
    adapter_config,
    parser,
    whole_config,
)
from .datasets import PromptSet, check_prompts, load_rows, prompt_set, reference_sets, training_rows
from .dryrun import dry_run, save_nothing
from .errors import input_errors
from .launch import check_saves_whole_model, shard_on_cpu
from .loading import load_adapter, load_base, read_adapter_config
from .random_weights import RandomWeights
from .resuming import KeepOptions, options_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

LOOKALIKE_TOKENS = 512
"""Maximum number of tokens of a look-alike and its answer."""
LOOKALIKE_PROMPTS = 200
"""How many look-alikes the base model answers, unless the rows need more."""

_BECOMES_MESSAGES = "{}: plain text becomes messages, because the tokenizer has a chat template."
_FILE_ERRORS = (OSError, SafetensorError, RuntimeError)
_CARD_ERRORS = (ValueError, yaml.YAMLError)  # of this package's card and of PEFT's
_LAST = ("last", "true")  # values of resume_from_checkpoint; transformers takes True for the newest checkpoint


@dataclass(frozen=True)
class _Options:
    """What the user asked for: the command, and its options in the parser's groups."""

    stage: Literal["sft", "dpo"]
    ogpsa: OGPSAArguments
    data: DataArguments
    run: RunArguments
    training: SFTConfig | DPOConfig
    model: ModelConfig


def train(
    stage: Literal["sft", "dpo"],
    training_class: type[SFTConfig | DPOConfig],
    trainer_class: type[SFTTrainer | DPOTrainer],
    arguments: Sequence[str],
) -> None:
    """Run a training command.

    Args:
        stage: The command's name.
        training_class: TRL's `SFTConfig` or `DPOConfig`.
        trainer_class: TRL's `SFTTrainer` or `DPOTrainer`.
        arguments: The command-line arguments after the command's name.
    """
    console = tables.console()
    with contextlib.ExitStack() as cleanup:
        with input_errors(stage):
            options = _Options(stage, *parser(stage, training_class).parse_args_and_config(list(arguments)))
            run, training = options.run, options.training
            _check_launch(options)
            _check_training(options)
            _choose_checkpoint(options)
            if training.process_index:  # only one process prints
                console.quiet = True
            if run.dry_run:
                save_nothing(training, cleanup.enter_context(tempfile.TemporaryDirectory()))
            trainer, config, lookalikes = _prepare(options, trainer_class, console)
            # Read this before training, which may save to the same folder.
            started_from = weights_digest(run.adapter) if run.adapter else None
        try:
            if run.dry_run:
                dry_run(trainer, config, console)
                return
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        except ValueError as error:
            # Before the first step is done, the input is at fault. Later errors need a traceback.
            if trainer.state.global_step and not isinstance(error, CheckpointError):
                raise
            raise SystemExit(f"ogpsa {stage}: {error}") from error
        except _FILE_ERRORS as error:
            _raise_others(error)
            raise SystemExit(f"ogpsa {stage}: {_stopped(error, trainer)}") from error
    try:
        if run.full_parameter:
            _save_whole(options, trainer, config, lookalikes)
        else:
            _save_adapter(options, trainer, config, lookalikes, started_from)
    except (*_FILE_ERRORS, *_CARD_ERRORS) as error:
        _raise_others(error)
        raise SystemExit(f"ogpsa {stage}: {_unsaved(error, trainer)}") from error
    what = "the model" if run.full_parameter else "a plain LoRA adapter"
    console.print(f"Saved {what}: {Path(_folder(training)).resolve()}", soft_wrap=True)
    if training.push_to_hub:
        _push_adapter(training, trainer, console)
    compat.end(trainer)


def _raise_others(error: Exception) -> None:
    """Raise an error again that does not come from reading or writing a file."""
    if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save on a full disk
        raise error


def _stopped(error: Exception, trainer: SFTTrainer | DPOTrainer) -> str:
    """Say that a file could not be read or written, for example on a full disk, and how to go on."""
    whole = last_whole(trainer.args.output_dir or ".", subspace=False)
    after = "there is no whole checkpoint" if whole is None else f"the newest whole checkpoint is {whole}"
    return (
        f"training stopped after step {trainer.state.global_step}: {error}. Of this run, {after}. To continue from "
        "it, remove the cause and run the command again with resume_from_checkpoint=last."
    )


def _unsaved(error: Exception, trainer: SFTTrainer | DPOTrainer) -> str:
    """Say that the result could not be saved, and save the weights elsewhere if there is no checkpoint of them."""
    state, whole = trainer.state, last_whole(trainer.args.output_dir or ".", subspace=False)
    said = f"training is finished, but the result cannot be saved: {error}. "
    if whole is not None and whole.name.endswith(f"-{state.global_step}"):
        return said + (
            f"Its weights are in {whole}. To save the result, remove the cause and run the command again with "
            "resume_from_checkpoint=last."
        )
    if trainer.accelerator.num_processes > 1:  # not all of them may have come here
        return said + "There is no checkpoint of the last step."
    folder = tempfile.mkdtemp(prefix="ogpsa-")
    try:
        trainer.save_model(folder, _internal_call=True)
    except _FILE_ERRORS as second:
        _raise_others(second)
        return said + f"Its weights cannot be saved in {folder} either: {second}."
    return said + f"Its weights are saved in {folder}."


def _check_launch(options: _Options) -> None:
    """Reject options that cannot be combined with full-parameter training, or with several processes."""
    run, training = options.run, options.training
    if not run.full_parameter:
        if training.world_size > 1:
            raise ValueError(
                f"the command trains LoRA in a single process, but it was launched in {training.world_size} "
                "processes. To train in several processes, set full_parameter, or use examples/full_parameter.py, "
                "which can also train LoRA."
            )
        return
    for name in ("load_in_4bit", "load_in_8bit", "use_peft"):
        if getattr(options.model, name):
            raise ValueError(f"{name} cannot be combined with full_parameter. Leave out one of them.")
    if training.push_to_hub:
        raise ValueError(
            "push_to_hub only uploads adapters. With full_parameter, leave it out and upload the saved folder "
            "afterwards: hf upload OWNER/NAME OUTPUT_DIR."
        )
    if not run.dry_run and (Path(_folder(training)) / CONFIG_NAME).is_file():
        raise ValueError(
            f"output_dir={training.output_dir!r} contains a LoRA adapter. transformers would load it on top of the "
            "saved model. Give another folder, or delete the adapter."
        )


def _check_training(options: _Options) -> None:
    """Reject options of the trainer that would do something else than what the command says."""
    training, eval_dataset = options.training, options.data.eval_dataset
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs={training.num_train_epochs} trains no step. Give num_train_epochs above 0, or "
            "max_steps of at least 1."
        )
    if training.push_to_hub and training.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy={str(getattr(training.hub_strategy, 'value', training.hub_strategy))!r} uploads "
            "training_args.bin at every save: a pickle with local paths and the hub token. Leave out hub_strategy. "
            "Then the command uploads the adapter and its card once, at the end."
        )
    if eval_dataset and training.eval_strategy == "no":
        raise ValueError(
            f"eval_dataset={eval_dataset!r} is not used without eval_strategy. Set eval_strategy to epoch or steps, "
            "or leave out eval_dataset."
        )
    if path := getattr(training, "chat_template_path", None):  # SFT alone has it
        raise ValueError(
            f"chat_template_path={path!r} would only change the template of the training rows. The base model answers "
            "prompts with its own template, and the adapter would later be used with that one, too. Leave it out. To "
            "use another template everywhere, set tokenizer.chat_template, save the tokenizer and the model to a "
            "folder, and give that folder as model_name_or_path."
        )


def _choose_checkpoint(options: _Options) -> None:
    """Replace `resume_from_checkpoint=last` by the newest whole checkpoint, and check that results can be saved."""
    training, run, plain = options.training, options.run, options.ogpsa.method == "plain"
    if run.dry_run:
        return
    check_writable(_folder(training), "output_dir")
    if not run.full_parameter:
        check_card(_folder(training))
        read_evaluation(Path(_folder(training)))  # the card reads it at the end
    if str(training.resume_from_checkpoint).lower() in _LAST:
        whole = last_whole(_folder(training), subspace=not plain)
        if whole is None:
            raise ValueError(
                f"resume_from_checkpoint={training.resume_from_checkpoint!r}, but output_dir="
                f"{training.output_dir!r} has no whole checkpoint. Leave out resume_from_checkpoint to start from the "
                "beginning."
            )
        training.resume_from_checkpoint = str(whole)
    resume = training.resume_from_checkpoint
    if plain and isinstance(resume, str) and (Path(resume) / STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume!r} was saved by a run with a projection, and method='plain' would go on "
            "without it. Give the method of that run, or leave out resume_from_checkpoint to start from the beginning."
        )


def _folder(training: SFTConfig | DPOConfig) -> str:
    assert training.output_dir is not None  # transformers has set its default
    return training.output_dir


def _save_whole(options: _Options, trainer: SFTTrainer | DPOTrainer, config: MethodConfig, lookalikes: float) -> None:
    """Save the model in the usual format, and how it was trained. All processes must call this."""
    folder = _folder(options.training)
    shard_on_cpu(trainer)  # again: accelerate lost this setting when it prepared the optimizer
    trainer.save_model(folder, _internal_call=True)
    if trainer.args.should_save:
        record = _record(options, trainer, config, lookalikes)
        record["started_from"] = cast("PreTrainedModel", trainer.model).config._name_or_path
        record["revision"] = options.model.model_revision
        save_run(folder, record | {"full_parameter": {} if config is None else asdict(config)})


def _save_adapter(
    options: _Options,
    trainer: SFTTrainer | DPOTrainer,
    config: MethodConfig,
    lookalikes: float,
    started_from: str | None,
) -> None:
    """Save the adapter with its card."""
    folder = _folder(options.training)
    model = cast(PeftModel, trainer.model)
    if "ref" in model.peft_config:
        model.delete_adapter("ref")  # DPO's copy of the adapter that it started from
    if not isinstance(config, OGPSAConfig):  # an earlier run may have left one
        (Path(folder) / SIDECAR_NAME).unlink(missing_ok=True)
    trainer.save_model(folder, _internal_call=True)  # this does not push to the hub
    record = _record(options, trainer, config, lookalikes)
    save_card(folder, run=record | {"started_from_weights": started_from})


def _push_adapter(training: SFTConfig | DPOConfig, trainer: SFTTrainer | DPOTrainer, console: Console) -> None:
    """Upload the saved adapter."""
    url = push_adapter(
        _folder(training),
        cast(str, trainer.hub_model_id),
        private=training.hub_private_repo,
        token=training.hub_token,
        revision=training.hub_revision,
    )
    console.print(f"Pushed: {url}", soft_wrap=True)


def _record(
    options: _Options, trainer: SFTTrainer | DPOTrainer, config: MethodConfig, lookalikes: float
) -> dict[str, Any]:
    """Return what the model card says about the run."""
    data, training, state = options.data, trainer.args, trainer.state
    record = {
        "stage": options.stage,
        "method": options.ogpsa.method,
        "started_from": options.run.adapter,
        "dataset": data.dataset,
        **({"own_refusals": True} if data.own_refusals else {}),
        **({"lookalikes": lookalikes} if lookalikes else {}),
        "steps": state.global_step,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
        | {"peft-ogpsa": __version__},
    }
    if (name := _class_of_base(trainer)) is not None:
        record["model_class"] = name
    if training.load_best_model_at_end and state.best_model_checkpoint is not None:
        record["best_step"] = state.best_global_step
    summary = [entry for entry in state.log_history if "train_runtime" in entry]
    if summary and not training.resume_from_checkpoint:  # after a resume, it is the time of the last part alone
        record["seconds"] = summary[-1]["train_runtime"]
    if isinstance(config, ProjectionConfig):
        # The trainer may have found a smaller batch that fits into memory.
        batch_size = (training.auto_find_batch_size and state.train_batch_size) or training.train_batch_size
        examples = state.global_step * examples_per_step(training, batch_size)
        record["references"] = dict(entry.split("=", 1) for entry in data.references)
        record["reference_share"] = (
            projector_of(cast(nn.Module, trainer.model)).diagnostics.reference_examples / examples
        )
    return record


def _class_of_base(trainer: SFTTrainer | DPOTrainer) -> str | None:
    """Return the name of the base's class, if `AutoModelForCausalLM` would load another one."""
    model: Any = trainer.accelerator.unwrap_model(cast(nn.Module, trainer.model))
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base.config.model_type)
    return name if name != usual and hasattr(transformers, name) else None


def _prepare(
    options: _Options, trainer_class: Callable[..., SFTTrainer | DPOTrainer], console: Console
) -> tuple[SFTTrainer | DPOTrainer, MethodConfig, float]:
    """Return the trainer, ready to train, the method's configuration, and the look-alikes' share in the training rows.

    Quick checks come first.
    """
    data, run, training = options.data, options.run, options.training
    config = _method_config(options, console)
    train_rows, held_out = _rows(options)
    sets, lookalikes = _prompts(options, config, len(train_rows))
    base, processing_class, policy = _load(options)
    tokenizer = tokenizer_of(processing_class)
    _set_end_token(training, tokenizer)
    if data.own_refusals:
        refusals = refusals_from_prompts(train_rows.to_list(), base, processing_class)
        console.print(f"Own refusals: {refusals}.", soft_wrap=True)
        train_rows = Dataset.from_list(refusals.rows)
    templated = tokenizer.chat_template is not None
    if templated:
        train_rows = _as_chat(train_rows, "dataset", console)
        held_out = held_out and _as_chat(held_out, "eval_dataset", console)
        sets = [_reference_as_chat(s, console) if isinstance(s, ReferenceSet) else s for s in sets]
    share = 0.0
    if lookalikes is not None:
        safety_rows(train_rows, conversational=templated)  # before the base answers
        answered = _answered(lookalikes, "lookalike_prompts", base, processing_class, console)
        mixed = with_lookalikes(train_rows, answered, data.lookalikes)
        added = len(mixed) - len(train_rows)
        share = added / len(mixed)  # what was asked for, in whole rows
        used = min(added, len(lookalike_rows(answered)))
        console.print(f"lookalikes: {added} rows are added, made from {used} prompts.", soft_wrap=True)
        train_rows = Dataset.from_list(mixed)
    known = [
        _answered(s, f"references: {s.name}", base, processing_class, console) if isinstance(s, PromptSet) else s
        for s in sets
    ]
    resume = training.resume_from_checkpoint
    callback = partial(
        OGPSACallback,
        config=config if isinstance(config, FullParameterConfig) else None,
        seed=training.seed,
        resume_from=resume if isinstance(resume, str) else None,
    )
    model: PreTrainedModel | PeftModel = base
    if run.adapter:
        model = load_adapter(base, run.adapter, cast(LoraConfig, config), trainable=True)
        model.peft_config["default"].base_model_name_or_path = base.name_or_path  # it may name another one
    asked = options_of(options.stage, options.ogpsa, options.model, training, train_rows)
    held_out = held_out if training.eval_strategy != "no" else None  # a dry run does not evaluate
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=processing_class,
        peft_config=config if isinstance(config, LoraConfig) and not run.adapter else None,
        callbacks=[*([callback(known)] if known else []), KeepOptions(asked)],
        **policy,
    )
    packing, eval_packing = (getattr(training, name, None) for name in ("packing", "eval_packing"))  # of SFT alone
    if not packing:  # packed rows are other rows
        _count_cut("dataset", train_rows, trainer.train_dataset, training, processing_class, console)
    if held_out is not None and not (packing if eval_packing is None else eval_packing):
        _count_cut("eval_dataset", held_out, trainer.eval_dataset, training, processing_class, console)
    if run.full_parameter:
        shard_on_cpu(trainer)
        if not run.dry_run:
            check_saves_whole_model(trainer)
        if policy and getattr(training, "precompute_ref_log_probs", False):
            cast("DPOTrainer", trainer).ref_model = None  # no longer needed
    # TRL's card would replace ours at every checkpoint.
    trainer.create_model_card = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return trainer, config, share


def _set_end_token(training: SFTConfig | DPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Apply `eos_token` before the base model answers. The trainer does so only when it is made."""
    token = getattr(training, "eos_token", None)  # SFT alone has it
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"eos_token={token!r} is not in the vocabulary of the tokenizer. Give one of its tokens, for example "
            f"{tokenizer.eos_token!r}."
        )
    tokenizer.eos_token = token


def _answered(
    own: PromptSet,
    option: str,
    base: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    console: Console,
) -> AnsweredSet:
    """Let the base model answer the prompts, and print the counts."""
    answered = own.answered(base, processing_class)
    console.print(f"{option}: {answered.counts.summary}", soft_wrap=True, markup=False)
    return answered


def _count_cut(
    option: str,
    given: Dataset,
    used: Any,
    training: SFTConfig | DPOConfig,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    console: Console,
) -> None:
    """Print how many rows lose their answer because of `max_length`. The trainer has dropped them or keeps the rest.

    Raises:
        ValueError: If no row has an answer left.
    """
    told = f"{option}: max_length={training.max_length} cuts off the "
    remedy = "Raise max_length, or shorten the prompts."
    dropped = len(given) - len(used)
    if dropped:
        cut, told = dropped, f"{told}answers of {dropped} of {len(given)} rows, so they are not used. {remedy}"
        none_left = cut == len(given)
    else:
        without = _kept_without_answer(given, used, training, processing_class)
        cut, none_left = len(without), len(without) == len(given) and max(map(_answers, without), default=0) == 1
        so = "so none of them has one" if none_left else "but these rows stay, without it"
        told = f"{told}last answer of {cut} of {len(given)} rows, {so}. {remedy}"
    if cut and none_left:
        raise ValueError(told)
    if cut:
        console.print(told, soft_wrap=True)


def _kept_without_answer(
    given: Dataset,
    used: Dataset,
    training: SFTConfig | DPOConfig,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
) -> list[Mapping[str, Any]]:
    """Return the rows that are trained on up to their last answer. TRL keeps them if its loss is of all tokens."""
    length, columns = training.max_length, given.column_names
    of_all_tokens = "messages" in columns or getattr(training, "completion_only_loss", None) is False
    cut_at_end = getattr(training, "truncation_mode", "keep_start") == "keep_start"
    if length is None or not of_all_tokens or not cut_at_end or "input_ids" in columns:
        return []
    if "input_ids" not in used.column_names:  # rows with images are tokenized during training
        return []
    longest = [
        columns_of({**row, "label": None}, "row")  # TRL ignores a label in these formats
        for row, ids in zip(given, used["input_ids"], strict=True)
        if len(ids) >= length
    ]
    return [row for row in longest if encode_row(processing_class, row, "row").cut(length) is None]


def _answers(row: Mapping[str, Any]) -> int:
    """Count the answers of a row."""
    return sum(turn["role"] == "assistant" for turn in row["messages"]) if "messages" in row else 1


def _method_config(options: _Options, console: Console) -> MethodConfig:
    """Return the method's configuration. This also finds the base model and its revision, which an adapter names."""
    run, model = options.run, options.model
    revision = (cast(dict, options.training.model_init_kwargs) or {}).get("revision") or model.model_revision
    if run.full_parameter:
        model.model_revision = revision or "main"
        return whole_config(options.ogpsa, run, options.stage)
    model.use_peft = True
    lora = read_adapter_config(run.adapter) if run.adapter else get_peft_config(model)
    assert isinstance(lora, LoraConfig)
    modules = lora.target_modules
    if isinstance(modules, str) and modules.isidentifier():  # TRL turns a list of one name into a pattern
        lora.target_modules = [modules]
    named = lora.base_model_name_or_path, lora.revision
    base = model.model_name_or_path or named[0]
    if base == named[0]:
        revision = revision or lora.revision
    if run.adapter and (base, revision) != named:
        console.print(
            f"adapter={run.adapter!r} names the base {_at(*named)}. This run trains it on {_at(base, revision)}, and "
            "the saved adapter names that model.",
            soft_wrap=True,
            markup=False,
        )
    model.model_name_or_path, model.model_revision, lora.revision = base, revision or "main", revision
    return adapter_config(options.ogpsa, lora, options.stage)


def _at(base: str | None, revision: str | None) -> str:
    return f"{base!r}, revision {revision!r}" if revision else f"{base!r}"


def _rows(options: _Options) -> tuple[Dataset, Dataset | None]:
    """Load the training rows and the held-out ones."""
    data = options.data
    assert data.dataset is not None
    rows = load_rows(data.dataset, "dataset", data.dataset_samples)
    if data.dataset_samples is not None:
        rows = rows.select(range(min(data.dataset_samples, len(rows))))
    if data.own_refusals:
        _check_own_refusals(options)
        check_prompts(rows, "dataset", data.dataset)
    else:
        rows = training_rows(rows, options.stage, "dataset", data.dataset)
    if data.eval_dataset is None:
        return rows, None
    held_out = load_rows(data.eval_dataset, "eval_dataset")
    return rows, training_rows(held_out, options.stage, "eval_dataset", data.eval_dataset)


def _as_chat(rows: Dataset, option: str, console: Console) -> Dataset:
    """Turn plain text into messages, as `ogpsa eval` does with prompts, so that training has the same template."""
    if as_messages(rows[0]) == rows[0]:  # all rows have the form of the first
        return rows
    console.print(_BECOMES_MESSAGES.format(option), soft_wrap=True)
    return rows.map(as_messages)


def _reference_as_chat(own: ReferenceSet, console: Console) -> ReferenceSet:
    """Do the same with the rows of a reference set that are used."""
    rows = own.rows()
    chat = [as_messages(row) for row in rows]
    if chat == rows:
        return own
    console.print(_BECOMES_MESSAGES.format(f"references: {own.name}"), soft_wrap=True)
    return replace(own, dataset=chat)


def _check_own_refusals(options: _Options) -> None:
    if options.stage != "sft":
        raise ValueError(
            f"own_refusals makes rows for `ogpsa sft`. `ogpsa {options.stage}` needs pairs. Leave out own_refusals."
        )
    if options.training.world_size > 1:
        raise ValueError(
            "own_refusals needs answers from the base model. The base model can give them only in a single process. "
            "Train in a single process, or give refusals as dataset."
        )


def _prompts(
    options: _Options, config: MethodConfig, rows: int
) -> tuple[list[ReferenceSet | PromptSet], PromptSet | None]:
    """Return the reference sets and the look-alikes. Those without answers need a base model in a single process."""
    data, training = options.data, options.training
    sets = []
    if isinstance(config, ProjectionConfig):
        beta = getattr(training, "beta", ReferenceSet.beta)
        sets = reference_sets(data.references, data.reference_samples, data.reference_max_length, beta)
    if training.world_size > 1 and any(isinstance(s, PromptSet) for s in sets):
        raise ValueError(
            "references has prompts without answers. The base model can answer them only in a single process. Give "
            "references with answers."
        )
    if not data.lookalikes:
        return sets, None
    needed = int(rows * data.lookalikes / (1 - data.lookalikes))
    samples = max(LOOKALIKE_PROMPTS, needed)
    lookalikes = prompt_set(
        "lookalike_prompts", data.lookalike_prompts, "lookalikes", samples, LOOKALIKE_TOKENS, "answer"
    )
    if training.world_size > 1:
        raise ValueError(
            f"lookalikes={data.lookalikes} needs answers from the base model. The base model can give them only in a "
            "single process. Train in a single process, or leave out lookalikes."
        )
    return sets, lookalikes


def _load(
    options: _Options,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin, dict[str, PreTrainedModel]]:
    """Load the model, its tokenizer or processor, and `ref_model` if the trainer needs a copy of the model for it."""
    run, training = options.run, options.training
    init_kwargs = cast(dict[str, Any] | None, training.model_init_kwargs)  # TRL has parsed a string
    loading: dict[str, Any] = {
        "trust_remote_code": compat.trusts_remote_code(training, options.model),
        "init_kwargs": init_kwargs,
        "random": None
        if run.random_layers is None
        else RandomWeights(run.random_layers, run.random_width, training.seed),
    }
    policy = {}
    if run.full_parameter:
        # Do not spread the model over this machine's GPUs, because each process has one of them.
        loading["init_kwargs"] = {"device_map": None, **(init_kwargs or {})}
        # The model itself can give the reference log-probabilities before training, but not while it is unsharded.
        precomputed = getattr(training, "precompute_ref_log_probs", False)
        if options.stage == "dpo" and not (precomputed and training.world_size == 1):
            with compat.all_weights_in_every_process():
                policy["ref_model"], _ = load_base(options.model, **loading)
    base, processing_class = load_base(options.model, **loading)
    training.model_init_kwargs = None  # already used; the trainer would warn that it cannot use them
    return base, processing_class, policy
