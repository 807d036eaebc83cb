"""Where classes that saved configs name have moved to: one name for each, and none is imported.

A name goes through the table once, from old places to the newest. Then a preset, which is a class
that only sets other defaults (``Llama3Config8B``), stands for the class it presets; the values it
had in force are in the config that was saved.
"""

from __future__ import annotations

import re

_NEMO = "nemo.collections.llm.gpt.model"
_BRIDGE = "megatron.bridge.models"

_LONGEST = 300

MOVED = {
    "bionemo.esm2.api.ESM2Config": "bionemo.esm2.model.model.ESM2Config",
    "bionemo.esm2.api.ESM2GenericConfig": "bionemo.esm2.model.model.ESM2GenericConfig",
    "bionemo.esm2.api.ESM2Model": "bionemo.esm2.model.model.ESM2Model",
    "bionemo.esm2.model.finetune.finetune_regressor.ESM2FineTuneSeqConfig": (
        "bionemo.esm2.model.finetune.sequence_model.ESM2FineTuneSeqConfig"
    ),
    "bionemo.esm2.model.finetune.finetune_token_classifier.ESM2FineTuneTokenConfig": (
        "bionemo.esm2.model.finetune.token_model.ESM2FineTuneTokenConfig"
    ),
    "bionemo.geneformer.model.model.GeneformerConfig": "bionemo.geneformer.api.GeneformerConfig",
    "bionemo.llm.model.biobert.lightning.BioBertLightningModule": (
        "bionemo.llm.lightning.BionemoLightningModule"
    ),
    "megatron.core.transformer.enums.ModelType": "megatron.core.enums.ModelType",
    "nemo.lightning.io.api.TrainerContext": "nemo.lightning.io.pl.TrainerContext",
    "nemo.lightning.io.TrainerContext": "nemo.lightning.io.pl.TrainerContext",
    "nemo_run.config.Config": "fiddle._src.config.Config",
    "nemo_run.config.Partial": "fiddle._src.partial.Partial",
    "torch._C._nn.gelu": "torch.nn.functional.gelu",
}

_NEMO_FAMILIES = (
    (r"(?:MLPerf)?Llama4\w*Config\w*", "llama.Llama4Config"),
    (r"(?:Code)?[Ll]lama\d*Config\w*", "llama.LlamaConfig"),
    # The other Llama-Nemotrons have layers that differ from one another.
    (r"Llama31Nemotron(?:Nano8B|70B)Config", "llama.LlamaConfig"),
    (r"Mistral(?:NeMo)?(?:2407)?Config\w*", "mistral.MistralConfig7B"),
    (r"MixtralConfig\w*", "mixtral.MixtralConfig"),
    (r"Nemotron\d*Config\w*", "nemotron.NemotronConfig"),
    (r"CodeGemmaConfig\w*|GemmaConfig\w*", "gemma.GemmaConfig"),
    (r"Gemma2Config\w*", "gemma2.Gemma2Config"),
    (r"Qwen2\d?Config\w*", "qwen2.Qwen2Config"),
    (r"Qwen3(?:MoE)?Config\w*", "qwen3.Qwen3Config"),
    (r"Phi3Config\w*", "phi3mini.Phi3Config"),
    (r"StarcoderConfig\w*", "starcoder.StarcoderConfig"),
    (r"Starcoder2Config\w*", "starcoder2.Starcoder2Config"),
    (r"Baichuan2Config\w*", "baichuan.Baichuan2Config"),
    (r"ChatGLM\d?Config\w*", "chatglm.ChatGLMConfig"),
    (r"DeepSeek(?:V\d)?Config\w*", "deepseek.DeepSeekConfig"),
    (r"GPTConfig\w*", "base.GPTConfig"),
    (r"(?:Nv)?Hyena\w*Config\w*", "hyena.HyenaConfig"),
)
_BRIDGE_FAMILIES = (
    (r"Llama4\w*ModelProvider\w*", "llama.llama_provider.Llama4ModelProvider"),
    (r"(?:Code)?Llama\d*ModelProvider\w*", "llama.llama_provider.LlamaModelProvider"),
    (r"Mistral(?:Small3)?ModelProvider\w*", "mistral.mistral_provider.MistralModelProvider"),
    (r"(?:Code)?GemmaModelProvider\w*", "gemma.gemma_provider.GemmaModelProvider"),
    (r"Gemma2ModelProvider\w*", "gemma.gemma2_provider.Gemma2ModelProvider"),
    (r"Nemotron\d?ModelProvider\w*", "nemotron.nemotron_provider.NemotronModelProvider"),
    (r"Qwen2\d?ModelProvider\w*", "qwen.qwen_provider.Qwen2ModelProvider"),
    (r"Qwen3MoEModelProvider\w*", "qwen.qwen_provider.Qwen3MoEModelProvider"),
    (r"Qwen3ModelProvider\w*", "qwen.qwen_provider.Qwen3ModelProvider"),
    (r"GPTProvider\w*|GPTModelProvider\w*", "gpt_provider.GPTModelProvider"),
)
_PRESETS = (
    # `from nemo.collections import llm` offers what is defined one file per family.
    (re.compile(r"nemo\.collections\.llm(?:\.\w+)*\."), _NEMO, _NEMO_FAMILIES),
    (re.compile(rf"{re.escape(_BRIDGE)}(?:\.\w+)*\."), _BRIDGE, _BRIDGE_FAMILIES),
)


def canonical(name: str) -> str:
    """The one name by which we know the class or function that a saved config calls ``name``.

    >>> canonical("nemo.collections.llm.gpt.model.llama.Llama3Config8B")
    'nemo.collections.llm.gpt.model.llama.LlamaConfig'
    >>> canonical("nemo.collections.llm.gpt.Llama3Config8B")
    'nemo.collections.llm.gpt.model.llama.LlamaConfig'
    >>> canonical("somebody.elses.Config")
    'somebody.elses.Config'
    """
    if len(name) > _LONGEST:
        return name
    name = MOVED.get(name, name)
    short = name.rpartition(".")[2]
    for package, at, families in _PRESETS:
        found = package.match(name)
        if found is None or found.end() + len(short) != len(name):
            continue
        for pattern, base in families:
            if re.fullmatch(pattern, short):
                return f"{at}.{base}"
    return name
