//! [`FakeEmbedder`]: vectors that anybody can compute from a text's tokens.

use crate::VirtualClock;
use engine::{Embedder, ModelError};
use std::time::Duration;
use types::{BlockHash, ModelAssets, ModelCard, ModelKind, TokenId};

/// An embedder without weights. Instead of computing it moves a clock.
#[derive(Debug)]
pub struct FakeEmbedder {
    card: ModelCard,
    token_time: Duration,
    clock: VirtualClock,
}

impl FakeEmbedder {
    /// Numbers of a vector.
    pub const DIMENSIONS: usize = 8;
    /// A text that begins with it makes the backend fail.
    pub const FAILING_TOKEN: TokenId = 991;

    /// Of that name; a token takes so long.
    pub fn new(name: &str, token_time: Duration, clock: VirtualClock) -> Self {
        let card = ModelCard {
            name: name.to_owned(),
            root: BlockHash::root(&[name.as_bytes()]),
            context_tokens: 4096,
            vocab_size: 1000,
            eos_tokens: Vec::new(),
            assets: Self::assets().hash(),
            created_s: 0,
            kind: ModelKind::Embedder { dimensions: Self::DIMENSIONS as u32 },
        };
        Self { card, token_time, clock }
    }

    /// What its card names.
    pub fn assets() -> ModelAssets {
        ModelAssets { tokenizer_json: "{}".to_owned(), chat_template: None, bos_token: None, eos_token: None }
    }

    /// The vector of a text: the angles of its tokens' sums, and of length 1.
    pub fn vector(text: &[TokenId]) -> Vec<f32> {
        let sum: f64 = text.iter().zip(1..).map(|(&token, place)| f64::from(token) * f64::from(place)).sum();
        let numbers = (0..Self::DIMENSIONS).map(|index| (sum * (index + 1) as f64 * 0.01).sin());
        let numbers: Vec<f64> = numbers.map(|number| number + 1e-3).collect();
        let length = numbers.iter().map(|number| number * number).sum::<f64>().sqrt();
        numbers.into_iter().map(|number| (number / length) as f32).collect()
    }
}

impl Embedder for FakeEmbedder {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn embed(&mut self, texts: &[&[TokenId]]) -> Result<Vec<Vec<f32>>, ModelError> {
        for text in texts {
            assert!(!text.is_empty() && text.len() <= self.card.context_tokens as usize);
            assert!(text.iter().all(|&token| token < self.card.vocab_size));
        }
        let tokens: u32 = texts.iter().map(|text| text.len() as u32).sum();
        self.clock.advance(self.token_time * tokens);
        if texts.iter().any(|text| text[0] == Self::FAILING_TOKEN) {
            return Err(ModelError::Backend("as asked".to_owned()));
        }
        Ok(texts.iter().map(|text| Self::vector(text)).collect())
    }
}
