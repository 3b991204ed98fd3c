"""A tiny embedder of BERT's kind with random weights, in a folder as such models are published."""

import json
import math
import pathlib
import random
import struct

SEED = 7
HIDDEN, INNER, LAYERS, HEADS = 32, 48, 2, 4
CONTEXT = 48
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *("##" + letter for letter in LETTERS), "the", "cat", "dog", "sat", "on"]


def shapes():
    """Names and shapes of the tensors."""
    def linear(name, outputs, inputs):
        return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}

    def norm(name):
        return {f"{name}.LayerNorm.weight": [HIDDEN], f"{name}.LayerNorm.bias": [HIDDEN]}

    tables = {"word": len(WORDS), "position": CONTEXT, "token_type": 2}
    result = {f"embeddings.{name}_embeddings.weight": [rows, HIDDEN] for name, rows in tables.items()} | norm("embeddings")
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            result |= linear(f"{layer}.attention.{part}", HIDDEN, HIDDEN)
        result |= norm(f"{layer}.attention.output") | linear(f"{layer}.intermediate.dense", INNER, HIDDEN)
        result |= linear(f"{layer}.output.dense", HIDDEN, INNER) | norm(f"{layer}.output")
    return result


def write_safetensors(path):
    numbers = random.Random(SEED)
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, shape in shapes().items():
        center = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        spread = 0.25 if len(shape) == 1 else 1.75 / shape[-1] ** 0.5
        values = [center + spread * numbers.uniform(-1, 1) for _ in range(math.prod(shape))]
        packed = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(packed)]}
        data += packed
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write(folder):
    """Writes the model into a folder, and returns its path."""
    folder = pathlib.Path(folder)
    (folder / "1_Pooling").mkdir(parents=True)
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "intermediate_size": INNER, "vocab_size": len(WORDS), "layer_norm_eps": 1e-6,
        "hidden_act": "gelu", "max_position_embeddings": CONTEXT, "type_vocab_size": 2, "pad_token_id": 0,
    }
    special = [
        {"id": index, "content": WORDS[index], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for index in range(4)
    ]
    around = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                       "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": around,
            "pair": [*around, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {word: {"id": word, "ids": [WORDS.index(word)], "tokens": [word]} for word in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": {word: index for index, word in enumerate(WORDS)}},
    }
    modules = [{"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for index, (kind, path) in enumerate([("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])]
    files = {
        "config.json": config, "tokenizer.json": tokenizer, "modules.json": modules,
        "tokenizer_config.json": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
        "1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    write_safetensors(folder / "model.safetensors")
    return str(folder)
