//! Whole checkpoints, made small by the tests themselves; and the real model that `MLX_TEST_MODEL` names, if any.

use super::gguf::{Encoding, Value as Meta};
use super::gguf_writer::GgufWriter;
use super::*;
use mlx_rs::{Array, Dtype, ops};
use serde_json::{Value, json};
use std::{fs, path::PathBuf};
use tokenizers::Tokenizer;

/// A folder with one layer's worth of files; `change` may break it.
fn folder(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| fs::write(folder.path().join(name), value.to_string()).unwrap();
    write(
        "config.json",
        json!({"model_type": "llama", "hidden_size": 64, "eos_token_id": [2, 5], "quantization": {
        "group_size": 32, "bits": 4, "model.wide": {"group_size": 64, "bits": 8}}}),
    );
    write("generation_config.json", json!({"eos_token_id": 2}));
    write(
        "tokenizer.json",
        json!({"added_tokens": [{"id": 7, "content": "</s>"}], "model": {"type": "BPE"}}),
    );
    write(
        "tokenizer_config.json",
        json!({
        "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}),
    );
    let dense = ops::arange::<_, f32>(None, 8 * 64, None).unwrap().reshape(&[8, 64]).unwrap();
    let mut first = vec![("model.dense.weight".to_owned(), dense.clone())];
    let mut second = Vec::new();
    for (name, group, bits, into) in [("model.narrow", 32, 4, &mut first), ("model.wide", 64, 8, &mut second)]
    {
        let (words, scales, biases) = ops::quantize(&dense, Some(group), Some(bits)).unwrap();
        into.extend(
            [("weight", words), ("scales", scales), ("biases", biases)]
                .map(|(part, array)| (format!("{name}.{part}"), array)),
        );
    }
    let mut map = serde_json::Map::new();
    for (file, arrays) in [("model-1.safetensors", first), ("model-2.safetensors", second)] {
        map.extend(arrays.iter().map(|(name, _)| (name.clone(), file.into())));
        let arrays: Vec<_> = arrays.iter().map(|(name, array)| (name.as_str(), array)).collect();
        Array::save_safetensors(arrays, None, folder.path().join(file)).unwrap();
    }
    write(INDEX, json!({"weight_map": map}));
    change(folder.path());
    folder
}

fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let mut last = 0.0;
    Checkpoint::open(path, &mut |what, fraction| {
        assert!(!what.is_empty() && (last..=1.0).contains(&fraction), "{what} {fraction} after {last}");
        last = fraction;
    })
}

#[test]
fn checkpoint_folder_opens() {
    let folder = folder(|_| ());
    let mut checkpoint = open(folder.path()).unwrap();
    assert_eq!(checkpoint.config["hidden_size"], 64);
    assert_eq!(checkpoint.eos_tokens, [2, 5, 7]);
    let assets = &checkpoint.assets;
    assert_eq!((assets.bos_token.as_deref(), assets.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
    assert_eq!(assets.chat_template.as_deref(), Some("D"));
    assert!(checkpoint.bytes > 8 * 64 * 4 && checkpoint.created_s > 0);
    assert_eq!(checkpoint.fingerprint, open(folder.path()).unwrap().fingerprint);

    let tensors = &mut checkpoint.tensors;
    let dense = tensors.take_shaped("model.dense.weight", &[8, 64]).unwrap();
    assert!(dense.as_slice::<f32>().iter().enumerate().all(|(index, &value)| value == index as f32));
    for (prefix, params) in [("model.narrow", (32, 4)), ("model.wide", (64, 8))] {
        let weight = tensors.weight_shaped(prefix, [8, 64]).unwrap();
        let Weight::Packed(packed) = weight else { panic!("{prefix}") };
        assert_eq!((packed.packing.group_size, packed.packing.bits), params);
        let back = packed.dense(Dtype::Float32).unwrap();
        assert!(back.all_close(&dense, 0.05, 1.5, None).unwrap(), "{prefix}");
    }
    assert_eq!(tensors.leftovers().count(), 0);
    assert!(tensors.take_optional("model.norm.bias").unwrap().is_none());
    let error = tensors.take("model.norm.weight").unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains(INDEX), "{error}");
}

#[test]
fn checkpoint_wrong_shape_names_both() {
    let folder = folder(|_| ());
    let mut tensors = open(folder.path()).unwrap().tensors;
    let error = tensors.take_shaped("model.dense.weight", &[8, 32]).unwrap_err().to_string();
    assert!(["model-1.safetensors", "[8, 64]", "[8, 32]"].iter().all(|word| error.contains(word)), "{error}");
    let error = tensors.weight_shaped("model.wide", [8, 65]).unwrap_err().to_string();
    assert!(["model-2.safetensors", "[8, 64]", "[8, 65]"].iter().all(|word| error.contains(word)), "{error}");
}

/// Changes one key of a JSON file of the folder.
fn edit(folder: &Path, file: &str, key: &str, value: Value) {
    let path = folder.join(file);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    json[key] = value;
    fs::write(path, json.to_string()).unwrap();
}

fn cut(path: PathBuf, bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn checkpoint_broken_folder_is_refused_by_name() {
    let check = |change: &dyn Fn(&Path), words: &[&str]| {
        let folder = folder(change);
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error:?}");
    };
    let remove = |name: &'static str| move |at: &Path| fs::remove_file(at.join(name)).unwrap();
    let write =
        |name: &'static str, text: &'static str| move |at: &Path| fs::write(at.join(name), text).unwrap();
    check(&remove("config.json"), &["config.json", "no such file"]);
    check(&write("config.json", "{\"a\": "), &["config.json", "not JSON", "line 1"]);
    check(&write("config.json", "[]"), &["config.json", "not a JSON object"]);
    check(&remove("tokenizer.json"), &["tokenizer.json", "no such file"]);
    check(&write("tokenizer.json", "{}"), &["tokenizer.json", "model"]);
    check(&remove("model-2.safetensors"), &["model-2.safetensors", "no such file", INDEX]);
    check(&remove(INDEX), &[SINGLE, INDEX]);
    check(
        &|at| {
            remove(INDEX)(at);
            write("x.gguf", "")(at);
        },
        &["x.gguf", "give the path"],
    );
    check(
        &|at| {
            remove(INDEX)(at);
            write("pytorch_model.bin", "")(at);
        },
        &["PyTorch"],
    );
    check(
        &write(INDEX, "{\"weight_map\": {\"a\": \"../secret.safetensors\"}}"),
        &[INDEX, "../secret.safetensors"],
    );
    check(&write(INDEX, "{\"weight_map\": {}}"), &[INDEX, "empty"]);
    check(
        &write(INDEX, "{\"weight_map\": {\"lm_head.weight\": \"model-1.safetensors\"}}"),
        &["lm_head.weight", "model-1.safetensors"],
    );
    check(&|at| cut(at.join("model-1.safetensors"), 2000), &["model-1.safetensors", "incomplete"]);
    check(&|at| cut(at.join("model-1.safetensors"), 20), &["model-1.safetensors", "cut off"]);
    check(
        &|at| edit(at, "config.json", "quantization", json!({"quant_method": "awq"})),
        &["config.json", "awq"],
    );
    let error = open(Path::new("nowhere/at-all")).unwrap_err().to_string();
    assert!(error.contains("nowhere/at-all") && error.contains("no such file"), "{error}");
}

#[test]
fn checkpoint_quantization_must_fit_the_tensors() {
    let check = |quantization: Value, words: &[&str]| {
        let folder = folder(|at| edit(at, "config.json", "quantization", quantization.clone()));
        let error = open(folder.path()).unwrap().tensors.weight("model.narrow").unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    check(json!({"group_size": 32, "bits": 8}), &["model.narrow.weight", "8 bits in groups of 32"]);
    check(json!({"group_size": 64, "bits": 4}), &["model-1.safetensors", "groups of 64"]);
    check(Value::Null, &["model.narrow.weight", "not quantized"]);
    let folder = folder(|at| {
        let scales = Array::load_safetensors(at.join("model-2.safetensors")).unwrap();
        let kept: Vec<_> = scales
            .iter()
            .filter(|(name, _)| !name.ends_with("biases"))
            .map(|(name, array)| (name.as_str(), array))
            .collect();
        Array::save_safetensors(kept, None, at.join("new.safetensors")).unwrap();
        fs::rename(at.join("new.safetensors"), at.join("model-2.safetensors")).unwrap();
        let mut index: Value = serde_json::from_str(&fs::read_to_string(at.join(INDEX)).unwrap()).unwrap();
        index["weight_map"].as_object_mut().unwrap().remove("model.wide.biases");
        fs::write(at.join(INDEX), index.to_string()).unwrap();
    });
    let error = open(folder.path()).unwrap().tensors.weight("model.wide").unwrap_err().to_string();
    assert!(error.contains("model.wide.biases") && error.contains("missing"), "{error}");
}

#[test]
fn checkpoint_chat_template_files_come_in_order() {
    let check = |change: &dyn Fn(&Path), expected: Option<&str>| {
        let folder = folder(change);
        assert_eq!(open(folder.path()).unwrap().assets.chat_template.as_deref(), expected);
    };
    let without = |at: &Path| edit(at, "tokenizer_config.json", "chat_template", Value::Null);
    check(&without, None);
    check(&|at| edit(at, "tokenizer_config.json", "chat_template", "S".into()), Some("S"));
    check(&|at| fs::write(at.join("chat_template.jinja"), "J").unwrap(), Some("J"));
    check(
        &|at| {
            without(at);
            fs::write(at.join("chat_template.json"), r#"{"chat_template": "F"}"#).unwrap();
        },
        Some("F"),
    );
}

/// A one-layer llama as a `.gguf` file, with a tokenizer of bytes and two merges.
fn tiny_gguf() -> GgufWriter {
    let floats =
        |count: usize| (0..count).flat_map(|value| (value as f32).to_le_bytes()).collect::<Vec<u8>>();
    let text = |text: &str| Meta::String(text.to_owned());
    let tokens = ["<|end|>", "<|im|>", "a", "b", "Ġ", "1", "2", "ab", "Ġab", "Ċ"].map(str::to_owned).to_vec();
    GgufWriter::new()
        .value("general.architecture", text("llama"))
        .value("llama.block_count", Meta::Int(1))
        .value("llama.context_length", Meta::Int(128))
        .value("llama.embedding_length", Meta::Int(32))
        .value("llama.feed_forward_length", Meta::Int(64))
        .value("llama.attention.head_count", Meta::Int(4))
        .value("llama.attention.head_count_kv", Meta::Int(2))
        .value("llama.attention.layer_norm_rms_epsilon", Meta::Float32(1e-5))
        .value("llama.rope.freq_base", Meta::Float32(500_000.0))
        .value("tokenizer.ggml.model", text("gpt2"))
        .value("tokenizer.ggml.pre", text("smollm"))
        .value("tokenizer.ggml.token_type", Meta::Ints([vec![3; 2], vec![1; 8]].concat()))
        .value("tokenizer.ggml.merges", Meta::Strings(vec!["a b".to_owned(), "Ġ ab".to_owned()]))
        .value("tokenizer.ggml.tokens", Meta::Strings(tokens))
        .value("tokenizer.ggml.eos_token_id", Meta::Int(0))
        .value("tokenizer.ggml.eot_token_id", Meta::Int(1))
        .value("tokenizer.ggml.bos_token_id", Meta::Int(0))
        .value("tokenizer.chat_template", text("{{ messages }}"))
        .tensor("token_embd.weight", &[10, 32], Encoding::F32, &floats(320))
        .tensor("output_norm.weight", &[32], Encoding::F32, &floats(32))
        .tensor("blk.0.attn_q.weight", &[32, 32], Encoding::F32, &floats(32 * 32))
        .tensor(
            "blk.0.attn_k.weight",
            &[16, 32],
            Encoding::Q8_0,
            &(0..16 * 34).map(|at| (at / 34) as u8).collect::<Vec<_>>(),
        )
        .tensor("blk.0.attn_v.weight", &[16, 32], Encoding::F16, &[0; 1024])
        .tensor("rope_freqs.weight", &[4], Encoding::F32, &floats(4))
}

fn open_gguf(writer: GgufWriter) -> Result<Checkpoint, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, writer.finish()).unwrap();
    open(&path)
}

#[test]
fn checkpoint_gguf_becomes_a_hugging_face_model() {
    let mut checkpoint = open_gguf(tiny_gguf()).unwrap();
    let expected = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": null, "max_position_embeddings": 128, "vocab_size": 10, "tie_word_embeddings": true,
        "attention_bias": false, "mlp_bias": false, "eos_token_id": [0, 1], "bos_token_id": 0,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&checkpoint.config[key], value, "{key}");
    }
    assert_eq!(checkpoint.eos_tokens, [0, 1]);
    assert_eq!(checkpoint.assets.chat_template.as_deref(), Some("{{ messages }}"));
    assert_eq!(checkpoint.assets.eos_token.as_deref(), Some("<|end|>"));

    // The file's rows 0 and 1 of a head are the first rows of its two halves.
    let rows = |array: &Array| {
        array.as_slice::<f32>().chunks(32).map(|row| row[0] as usize / 32).collect::<Vec<_>>()
    };
    let query = checkpoint.tensors.take("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(rows(&query)[..16], [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
    let key = checkpoint.tensors.weight_shaped("model.layers.0.self_attn.k_proj", [16, 32]).unwrap();
    let Weight::Packed(Packed { words, .. }) = key else { panic!("quantized") };
    let order: Vec<_> = words.as_slice::<u32>().chunks(8).map(|row| row[0] & 0x7f).collect();
    assert_eq!(order, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
    let value = checkpoint.tensors.weight("model.layers.0.self_attn.v_proj").unwrap();
    assert!(matches!(value, Weight::Dense(array) if array.dtype() == Dtype::Float16));
    checkpoint.tensors.take_shaped("model.embed_tokens.weight", &[10, 32]).unwrap();
    checkpoint.tensors.take("model.norm.weight").unwrap();
    assert_eq!(checkpoint.tensors.leftovers().collect::<Vec<_>>(), ["rope_freqs.weight"]);
    let freqs = checkpoint.tensors.take_optional("rope_freqs.weight").unwrap().unwrap();
    assert_eq!(freqs.as_slice::<f32>(), [0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn checkpoint_gguf_refusals_name_the_key() {
    let check = |writer: GgufWriter, words: &[&str]| {
        let error = open_gguf(writer).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error:?}");
    };
    let start = || GgufWriter::new().value("general.architecture", Meta::String("llama".to_owned()));
    check(GgufWriter::new(), &["tiny.gguf", "general.architecture"]);
    check(
        GgufWriter::new().value("general.architecture", Meta::String("gemma3".to_owned())),
        &["gemma3", "supported: llama"],
    );
    check(
        GgufWriter::new().value("general.architecture", Meta::Int(3)),
        &["general.architecture", "Int(3)", "not a text"],
    );
    check(start(), &["llama.embedding_length"]);
    check(start().value("llama.expert_count", Meta::Int(8)), &["8 experts"]);
    check(start().value("split.count", Meta::Int(3)), &["3 parts", "gguf-split"]);
    check(tiny_gguf().value("llama.rope.dimension_count", Meta::Int(4)), &["4 of a head's 8"]);
    check(tiny_gguf().value("llama.expert_count", Meta::Bool(true)), &["llama.expert_count", "Bool(true)"]);
    check(
        tiny_gguf().tensor("blk.1.attn_q.weight", &[6, 32], Encoding::F32, &[0; 768]),
        &["blk.1.attn_q.weight", "6 rows"],
    );
    check(
        tiny_gguf()
            .value("tokenizer.ggml.unused", Meta::Int(0))
            .value("tokenizer.ggml.eom_token_id", Meta::Int(10)),
        &["eom_token_id", "10"],
    );
}

#[test]
fn checkpoint_gguf_byte_level_tokenizer_works() {
    let check = |writer: GgufWriter, text: &str, expected: &[u32]| {
        let checkpoint = open_gguf(writer).unwrap();
        let tokenizer = Tokenizer::from_bytes(checkpoint.assets.tokenizer_json).unwrap();
        let found = tokenizer.encode(text, true).unwrap();
        assert_eq!(found.get_ids(), expected, "{text:?}");
        let found = tokenizer.decode(expected, false).unwrap();
        assert!(found.ends_with(text), "{found:?}");
    };
    check(tiny_gguf(), "ab ab12\n", &[7, 8, 5, 6, 9]);
    check(tiny_gguf(), "ab<|im|> b", &[7, 1, 4, 3]);
    check(tiny_gguf().value("tokenizer.ggml.add_bos_token", Meta::Bool(true)), "ab", &[0, 7]);
    check(tiny_gguf().value("tokenizer.ggml.add_bos_token", Meta::Bool(false)), "ab", &[7]);
}

#[test]
fn checkpoint_gguf_tokenizer_refusals_name_the_key() {
    let check = |changes: &[(&str, Meta)], words: &[&str]| {
        let mut header_writer = GgufWriter::new();
        let base = [
            ("tokenizer.ggml.model", Meta::String("gpt2".to_owned())),
            ("tokenizer.ggml.pre", Meta::String("gpt-2".to_owned())),
            ("tokenizer.ggml.tokens", Meta::Strings(vec!["a".to_owned(), "b".to_owned(), "ab".to_owned()])),
            ("tokenizer.ggml.merges", Meta::Strings(vec!["a b".to_owned()])),
        ];
        let kept = base.iter().filter(|(key, _)| !changes.iter().any(|(changed, _)| changed == key));
        for (key, value) in kept.chain(changes) {
            header_writer = header_writer.value(key, value.clone());
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        fs::write(&path, header_writer.finish()).unwrap();
        let found = gguf_tokenizer::build(&gguf::Header::open(&path).unwrap(), &path);
        match words {
            [] => assert!(found.is_ok(), "{found:?}"),
            words => {
                let error = found.unwrap_err().to_string();
                assert!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error:?}");
            }
        }
    };
    let text = |text: &str| Meta::String(text.to_owned());
    check(&[], &[]);
    check(&[("tokenizer.ggml.model", text("t5"))], &["tiny.gguf", "t5", "gpt2"]);
    check(&[("tokenizer.ggml.pre", text("tekken"))], &["tekken", "smollm"]);
    check(&[("tokenizer.ggml.merges", Meta::Strings(vec!["a c".to_owned()]))], &["a c"]);
    check(&[("tokenizer.ggml.token_type", Meta::Ints(vec![1]))], &["3 tokens", "1"]);
    check(&[("tokenizer.ggml.tokens", text("a"))], &["tokenizer.ggml.tokens", "list of texts"]);
    check(&[("tokenizer.ggml.model", text("llama"))], &["tokenizer.ggml.scores"]);
}

#[test]
fn checkpoint_gguf_sentence_piece_tokenizer_works() {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let words = ["▁", "t", "h", "e", "c", "a", "at", "th", "▁th", "he", "▁the", "▁c", "▁cat", "cat"]
        .map(str::to_owned);
    let tokens: Vec<String> =
        ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).chain(words).collect();
    let types = (0..tokens.len()).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    });
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 259.0 - id as f64 });
    let writer = || {
        let scores = scores.clone().collect();
        GgufWriter::new()
            .value("tokenizer.ggml.model", Meta::String("llama".to_owned()))
            .value("tokenizer.ggml.tokens", Meta::Strings(tokens.clone()))
            .value("tokenizer.ggml.token_type", Meta::Ints(types.clone().collect()))
            .value("tokenizer.ggml.scores", Meta::Floats(scores))
            .value("tokenizer.ggml.bos_token_id", Meta::Int(1))
            .value("tokenizer.ggml.eos_token_id", Meta::Int(2))
            .value("tokenizer.ggml.unknown_token_id", Meta::Int(0))
    };
    let check = |writer: GgufWriter, text: &str, expected: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        fs::write(&path, writer.finish()).unwrap();
        let built = gguf_tokenizer::build(&gguf::Header::open(&path).unwrap(), &path).unwrap();
        let tokenizer = Tokenizer::from_bytes(built.assets.tokenizer_json).unwrap();
        let found = tokenizer.encode(text, true).unwrap();
        assert_eq!(found.get_tokens(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(found.get_ids(), true).unwrap(), text.replace("</s>", ""));
    };
    check(writer(), "the cat", &["<s>", "▁the", "▁cat"]);
    check(writer(), "that", &["<s>", "▁th", "at"]);
    check(writer(), "é", &["<s>", "▁", "<0xC3>", "<0xA9>"]);
    check(writer(), "the</s>", &["<s>", "▁the", "</s>"]);
    check(
        writer().value("tokenizer.ggml.add_space_prefix", Meta::Bool(false)),
        "cat the",
        &["<s>", "cat", "▁the"],
    );
    check(writer().value("tokenizer.ggml.add_bos_token", Meta::Bool(false)), "the", &["▁the"]);
}

/// SmolLM2-135M-Instruct as a `.gguf` file: what its makers say of it.
#[test]
fn checkpoint_real_model_opens() {
    let Some(path) = std::env::var_os("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL does not name SmolLM2-135M-Instruct as a .gguf file");
        return;
    };
    let mut checkpoint = open(Path::new(&path)).unwrap();
    let expected = json!({
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "rope_theta": 100000.0, "vocab_size": 49152, "tie_word_embeddings": true,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&checkpoint.config[key], value, "{key}");
    }
    assert_eq!(checkpoint.eos_tokens, [2]);
    let tokenizer = Tokenizer::from_bytes(&checkpoint.assets.tokenizer_json).unwrap();
    // Ids from Python's tokenizers package, set up from the same file by other code.
    for (text, ids) in [
        ("Hello, world!", &[19556, 28, 905, 17][..]),
        ("<|im_start|>user\n", &[1, 4093, 198]),
        ("In 2024", &[788, 216, 34, 32, 34, 36]),
    ] {
        let found = tokenizer.encode(text, true).unwrap();
        assert_eq!(found.get_ids(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, false).unwrap(), text);
    }
    let names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    for layer in 0..30 {
        for name in names {
            checkpoint.tensors.weight(&format!("model.layers.{layer}.{name}")).unwrap();
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            checkpoint.tensors.take_shaped(&format!("model.layers.{layer}.{name}.weight"), &[576]).unwrap();
        }
    }
    checkpoint.tensors.weight_shaped("model.embed_tokens", [49152, 576]).unwrap();
    checkpoint.tensors.take("model.norm.weight").unwrap();
    assert_eq!(checkpoint.tensors.leftovers().count(), 0);
}
