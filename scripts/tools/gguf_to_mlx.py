#!/usr/bin/env python3
"""Turn a Llama-architecture GGUF file into the folder that mlx-lm loads, with dense f32 weights.

    gguf_to_mlx.py MODEL.gguf FOLDER

For comparisons with mlx-lm, which reads no GGUF: goldens (tests/goldens) and scripts/compare-mlx-lm.
Needs the packages gguf, mlx, numpy and tokenizers. Byte-level BPE tokenizers only.
"""
import json
import sys
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # a value of tokenizer.ggml.token_type

TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def weights_of(reader, heads):
    """All tensors under mlx-lm's names; heads says how many each of attn_q and attn_k has."""
    result = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        kind = parts[-2]
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:  # the format interleaves the two halves of each head
            rows = dense.reshape(heads[kind], -1, 2, dense.shape[1])
            dense = rows.swapaxes(1, 2).reshape(dense.shape)
        result[f"{prefix}{TENSORS[kind]}.weight"] = mx.array(dense)
    return result


def tokenizer_of(meta):
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    smollm = meta.get("tokenizer.ggml.pre") == "smollm"
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_]) if smollm else bytes_
    result.decoder = decoders.ByteLevel()
    control = [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == CONTROL]
    result.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
    return result


def main():
    source, folder = sys.argv[1], Path(sys.argv[2])
    mx.set_default_device(mx.cpu)
    reader = gguf.GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    get = lambda key: meta[f"llama.{key}"]
    heads, kv_heads, hidden = get("attention.head_count"), get("attention.head_count_kv"), get("embedding_length")
    weights = weights_of(reader, {"attn_q": heads, "attn_k": kv_heads})
    tokens = meta["tokenizer.ggml.tokens"]
    bos, eos = meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    tokenizer_of(meta).save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "vocab_size": len(tokens),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "clean_up_tokenization_spaces": False,
        "model_max_length": get("context_length"),
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    for name, value in {"config": config, "tokenizer_config": tokenizer_config}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
