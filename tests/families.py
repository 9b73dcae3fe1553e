"""Tiny models of published families: their configs, with what each does to attention, rope and layers."""

import copy
from typing import Any

import torch
from conftest import SIZE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + n for n in range(8)],
}
# A name -> the model type, and what its config has beside conftest's SIZE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 16}),
    "qwen3-moe-mixed": ("qwen3_moe", {**_EXPERTS, "head_dim": 16, "mlp_only_layers": [0]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _WINDOWS),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOWS}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 128}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None}),
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": None}),
    "cohere2": ("cohere2", {"head_dim": 16, **_WINDOWS}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "exaone4": ("exaone4", _WINDOWS),
    "stablelm": ("stablelm", {}),
    "granite": ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4-moe": (
        "glm4_moe",
        {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16}
        | {"n_group": 1, "topk_group": 1},
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "num_key_value_heads": 4}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "num_key_value_heads": 4}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    ),
    "ernie-moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 48}
        | {"moe_layer_start_index": 1},
    ),
    "dots1": (
        "dots1",
        {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2},
    ),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "hunyuan-moe": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2, 2], "head_dim": 16}),
    "diffllama": ("diffllama", {"head_dim": 16}),
}


def family_model(name: str) -> PreTrainedModel:
    """A two-layer float32 decoder with weights large enough that attention matters, in eager attention."""
    model_type, options = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**SIZE, **copy.deepcopy(options)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()
