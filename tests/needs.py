"""The tests that need newer libraries than the oldest that work, each with the reason. `conftest.py` skips them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement
from transformers.integrations.peft import MIN_PEFT_VERSION

_8_BIT = "8-bit optimizers on a CPU"
_DELETE = "before, transformers' delete_adapter takes the type's name for the prefix of its weights"
_TRAINER = "the trainer, or the setting, is newer"

NEEDS = [
    (r"bnb-(paged-)?adamw8bit|bnb-paged-adamw\b", "bitsandbytes>=0.50", _8_BIT),
    (r"test_paged_8_bit_optimizer|accumulation\[options0|test_code_runs\[qlora\]", "bitsandbytes>=0.50", _8_BIT),
    (r"\[MiCA-|baselines\.mica\]", "peft>=0.21", "MiCA"),
    (r"\[MonteCLoRA\]", "peft>=0.21", "MonteCLoRA"),
    (r"pass_through_the_tuner_before_they_are_loaded", "peft>=0.21", "before, compat.state_dicts_like_lora does it"),
    (r"test_adapters_in_one_memory_are_refused", "peft>=0.19", "before, PEFT does not tie adapters"),
    (r"test_experts_of_transformers_4", "peft>=0.20", "0.19 with transformers 5 cannot load it as plain LoRA either"),
    (r"test_transformers_hotswap", "transformers>=5.0", "transformers' own hotswap"),
    (
        r"test_card.*(push|hub)|test_a_pushed_folder_names",
        "transformers>=5.15",
        "the stand-in for the hub replaces a part of it",
    ),
    (
        r"test_accumulated_batches_train_as_one_large_batch",
        "transformers>=5.15",
        "before, plain LoRA may fail it, too",
    ),
    (r"test_transformers_(add_set|may_delete)", "transformers>=5.15", _DELETE),
    (
        r"test_injected_adapter_is_projected|test_transformers_(saves|refuses|may|add)|every_way_.*-transformers\]",
        f"peft>={MIN_PEFT_VERSION}",
        "transformers' own add_adapter and load_adapter ask for it",
    ),
    (r"test_the_end_of_training_is_told", "transformers>=5.18", "Trainer.end"),
    (
        r"test_checkpointing_and_preparation_leave_the_gradients_whole",
        "transformers>=5.0",
        "before, checkpointing changes the gradients of plain LoRA, too: the base rounds otherwise",
    ),
    (
        r"test_a_step_costs_the_rows_more",
        "torch>=2.9",
        "before, a step on a CPU takes less memory than the estimate says",
    ),
    (
        r"test_compiles\[.*_solve|test_they_are_off_unless_asked_for|test_kernels_train_as_torch_does",
        "triton>=3.6",
        "its compiler fails on the kernels",
    ),
    (
        r"test_llama_guard_4_has_a_class",
        "transformers!=5.24.*",
        "its Llama 4 fails in every forward pass",
    ),
    (r"test_random_states_are_put_back\[npu\]", "torch>=2.12", "before, torch does not know the device"),
    (r"test_trainer.*\[(TPO|GMPO|A2PO|SDPO|Distillation)|test_moving_average_teacher", "trl>=1.16", _TRAINER),
    (r"test_resumed_run_equals_one_that_never_stopped\[DPO\]", "transformers>=5.23", "before, it is an error"),
]
"""(pattern in a test's name, requirement, reason)"""


def missing(nodeid: str) -> str | None:
    """Why a test cannot run beside the installed libraries, or `None`."""
    for pattern, needed, reason in NEEDS:
        if re.search(pattern, nodeid) and not _installed(Requirement(needed)):
            return f"needs {needed}: {reason}"
    return None


def _installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
