"""OGPSA for ms-swift: swift sft --external_plugins examples/ms_swift_plugin.py --callbacks ogpsa ..."""

from peft_ogpsa.integrations.swift import register

register(
    {
        "references": {
            "general": "prompts:general",
            "arithmetic": "prompts:arithmetic",
            "lookalikes": "prompts:lookalikes",
        },
        "reference_samples": 48,
    }
)
