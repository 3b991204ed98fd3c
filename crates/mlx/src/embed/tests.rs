//! Encoders against transformers, in tiny models whose weights both sides make by one formula
//! (`tests/goldens/embeddings.py`); decoders against the logits that mlx-lm makes of the same states
//! (`tests/goldens/families.py`).

use super::*;
use crate::{
    checkpoint::Tensors,
    layers::Compute,
    models::{self, goldens, weight},
    products::Products,
};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Goldens {
    texts: Vec<Vec<TokenId>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Value,
    tensors: BTreeMap<String, (Vec<i32>, f64, f64)>,
    /// By pooling, of each text.
    vectors: BTreeMap<String, Vec<Vec<f32>>>,
}

/// How far a number may be from the other side's.
const NEAR: f32 = 1e-4;

fn compute(path: ComputePath) -> Compute {
    let activations = Dtype::Float32;
    Compute { path, activations, dequantize: true, products: Products::default(), dense_rows: i32::MAX }
}

fn tensors(described: &BTreeMap<String, (Vec<i32>, f64, f64)>, config: &Value) -> Tensors {
    let arrays = described.iter().map(|(name, description)| (name.clone(), weight(name, description)));
    Tensors::of_arrays(arrays, config).unwrap()
}

fn card(context: usize, vocabulary: u32, hidden: i32) -> ModelCard {
    ModelCard {
        name: "tiny".to_owned(),
        root: types::BlockHash(0),
        context_tokens: context as u32,
        vocab_size: vocabulary,
        eos_tokens: Vec::new(),
        assets: types::AssetsHash([0; 32]),
        created_s: 0,
        kind: kind(hidden).unwrap(),
    }
}

fn assert_near(got: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (got, wanted) in got.iter().zip(wanted) {
        assert!((got - wanted).abs() <= NEAR, "{what}: {got} for {wanted}");
    }
}

#[test]
fn encoders_compute_like_transformers_alone_and_together() {
    mlx_rs::Device::set_default(&mlx_rs::Device::cpu());
    let goldens: Goldens =
        serde_json::from_str(include_str!("../../../../tests/goldens/embeddings.json")).unwrap();
    let poolings = [("cls", Pooling::First), ("mean", Pooling::Mean), ("last", Pooling::Last)];
    let texts: Vec<&[TokenId]> = goldens.texts.iter().map(Vec::as_slice).collect();
    for case in &goldens.cases {
        for (name, pooling) in poolings {
            let mut tensors = tensors(&case.tensors, &case.config);
            let bert = Bert::load(&mut tensors, &case.config, compute(ComputePath::Pure)).unwrap();
            assert_eq!(tensors.leftovers().collect::<Vec<_>>(), Vec::<&str>::new(), "{}", case.name);
            assert_eq!(bert.context, 24, "{}", case.name);
            let card = card(bert.context, bert.vocabulary, bert.hidden);
            let mut model = TextEmbedder { card, encoder: Encoder::Bert(Box::new(bert)), pooling };
            // Filled up, all in one pass.
            let filled = model.together(&texts).unwrap();
            let sorted = model.embed(&texts).unwrap();
            for (index, wanted) in case.vectors[name].iter().enumerate() {
                let what = |how: &str| format!("{}, {name}, text {index}, {how}", case.name);
                assert_near(&filled[index], wanted, &what("together"));
                assert_near(&sorted[index], wanted, &what("by length"));
                let alone = model.embed(&[texts[index]]).unwrap().remove(0);
                assert_near(&alone, wanted, &what("alone"));
            }
        }
    }
}

/// What the norm gives, multiplied by the output layer, is mlx-lm's logits.
#[test]
fn decoders_without_output_layer_give_the_states_that_logits_are_made_of() {
    mlx_rs::Device::set_default(&mlx_rs::Device::cpu());
    let goldens = goldens();
    let mut checked = 0;
    for case in goldens.cases.iter().filter(|case| case.name == "qwen3" || case.name == "llama") {
        for path in [ComputePath::Pure, ComputePath::Native] {
            let mut tensors = tensors(&case.tensors, &case.config);
            let head = ["lm_head.weight", "model.embed_tokens.weight"];
            let head = head.iter().find(|name| case.tensors.contains_key(**name)).unwrap();
            let head = weight(head, &case.tensors[*head]);
            let mut spec = models::spec(&case.config).unwrap();
            spec.headless = true;
            let part = Part::of(&spec, &(0..spec.layers.len())).unwrap();
            let family = models::load_tensors(&mut tensors, spec, compute(path), part).unwrap();
            let dims = family.dims();
            let kv = KvPool::new(dims.kv, 32, path).unwrap();
            let card = card(dims.context, dims.vocabulary, dims.hidden);
            let decoder = Box::new(Headless { family, kv, path, blocks: 32 });
            let mut model = TextEmbedder { card, encoder: Encoder::Decoder(decoder), pooling: Pooling::Last };
            // Each text ends where logits are known; one has a single token.
            let texts: Vec<&[TokenId]> = goldens.positions.iter().map(|&at| &goldens.tokens[..=at]).collect();
            let together = model.together(&texts).unwrap();
            for ((&at, vector), logits) in goldens.positions.iter().zip(&together).zip(&case.logits) {
                let state = Array::from_slice(vector, &[1, vector.len() as i32]);
                let made = state.matmul(head.t()).unwrap();
                eval([&made]).unwrap();
                // Vectors have length 1, so both are compared as directions.
                let got = of_length_1(&made.as_slice::<f32>()[..logits.len()]);
                assert_near(&got, &of_length_1(logits), &format!("{} at {at}, {path:?}", case.name));
            }
            let sorted = model.embed(&texts).unwrap();
            for (one, other) in together.iter().zip(&sorted) {
                assert_near(one, other, &case.name);
            }
            checked += 1;
        }
    }
    assert!(checked >= 2, "{checked}");
}

#[test]
fn what_folders_say_of_pooling_is_read() {
    let folder = std::env::temp_dir().join(format!("mlx-pooling-{}", std::process::id()));
    fs::create_dir_all(folder.join("1_Pooling")).unwrap();
    let check = |config: &str, expected: std::result::Result<Pooling, &str>| {
        fs::write(folder.join("1_Pooling/config.json"), config).unwrap();
        match (Pooling::of(&folder, true), expected) {
            (Ok(pooling), Ok(expected)) => assert_eq!(pooling, expected, "{config}"),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (got, _) => panic!("{config}: {got:?}"),
        }
    };
    check(r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#, Ok(Pooling::First));
    check(r#"{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": true}"#, Ok(Pooling::Mean));
    check(r#"{"pooling_mode_lasttoken": true, "include_prompt": true}"#, Ok(Pooling::Last));
    check(r#"{"pooling_mode": "lasttoken"}"#, Ok(Pooling::Last));
    check(r#"{"pooling_mode_max_tokens": true}"#, Err("pooling_mode_max_tokens"));
    check(r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#, Err("supported: one of"));
    check("{", Err("it is not JSON"));
    let modules = |text: &str| {
        fs::write(folder.join("modules.json"), text).unwrap();
        check_modules(&folder).map_err(|error| error.to_string())
    };
    let module = |kind: &str| format!("[{{\"type\": \"sentence_transformers.models.{kind}\"}}]");
    assert_eq!(modules(&module("Normalize")), Ok(()));
    let refused = modules(&module("Dense")).unwrap_err();
    assert!(
        refused.ends_with("the module \"Dense\"; supported: Transformer, Pooling, Normalize"),
        "{refused}"
    );
    fs::remove_dir_all(&folder).unwrap();
}
