//! Texts to vectors, for every protocol: in parts that nodes compute side by side.

use super::resolve;
use crate::openai::values::Prompts;
use crate::{AppState, caller::Caller, error::ApiError, openai::parameters::check_tokens, prompt::ModelText};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::time::Instant;
use types::{EmbedDraft, EmbedRequest, ModelCard, RequestId, Service, TokenId, limits};

/// Tokens of the texts that are asked about at once, but for one that is longer alone: a node is given no more than takes it
/// seconds, and several nodes share what is more.
const PART_TOKENS_MAX: usize = 8192;
/// Parts that are asked about at the same time: enough for some nodes, and others' requests come in between.
const PARTS_AT_ONCE: usize = 8;

/// What is to become vectors.
#[derive(Debug)]
pub(crate) struct Wanted<const MAX: usize> {
    pub(crate) model: Option<String>,
    pub(crate) inputs: Prompts<MAX>,
    /// Bytes of the request: many of them are turned into tokens on a thread of their own.
    pub(crate) bytes: usize,
    /// Whether texts that are too long are cut; else they are an error.
    pub(crate) cut: bool,
    /// Numbers of each vector, if fewer than all.
    pub(crate) dimensions: Option<u32>,
}

/// What texts became.
#[derive(Debug)]
pub(crate) struct Embedded {
    /// The model's name.
    pub(crate) model: String,
    /// Of each text, in order.
    pub(crate) vectors: Vec<Vec<f32>>,
    /// Of all texts.
    pub(crate) tokens: usize,
}

/// The vectors that a request wants.
pub(crate) async fn embed<const MAX: usize>(
    state: &AppState,
    caller: &Caller,
    wanted: Wanted<MAX>,
) -> Result<Embedded, ApiError> {
    let card = resolve(state, wanted.model.as_deref())?;
    let dimensions = dimensions(&card, wanted.dimensions)?;
    let inputs = read_inputs(state, &card, wanted.inputs, wanted.bytes, wanted.cut).await?;
    vectors(state, caller, &card, inputs, dimensions).await
}

/// Texts in tokens, with those that the tokenizer puts around every text; texts in tokens are taken as they are. One that is
/// too long is an error, or cut if `cut`: its last token stays, which stands for the end of a text.
async fn read_inputs<const MAX: usize>(
    state: &AppState,
    card: &ModelCard,
    inputs: Prompts<MAX>,
    bytes: usize,
    cut: bool,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let mut inputs = match inputs {
        Prompts::Tokens(inputs) => {
            inputs.iter().try_for_each(|input| check_tokens("input", input, card))?;
            inputs
        }
        Prompts::Texts(texts) => {
            let text = state.texts.get(card).await?;
            let encode = move |text: &ModelText| {
                let inputs = texts.iter().map(|input| text.encode(input, true));
                inputs.collect::<Result<Vec<_>, _>>().map_err(|message| ApiError::Tokenizer { message })
            };
            state.texts.run(&text, bytes, encode).await?
        }
    };
    let most = card.context_tokens as usize;
    for (index, input) in inputs.iter_mut().enumerate() {
        if input.len() > most && cut {
            input.drain(most - 1..input.len() - 1);
        }
        let wrong = match input.len() {
            0 => "is empty".to_owned(),
            tokens if tokens > most => format!("has {tokens} tokens; the model's context is {most} tokens"),
            _ => continue,
        };
        return Err(ApiError::parameter("input", format!("input {index} {wrong}")));
    }
    Ok(inputs)
}

/// Numbers of the vectors that a request wants, of a model that makes vectors.
fn dimensions(card: &ModelCard, wanted: Option<u32>) -> Result<usize, ApiError> {
    let all = card.must_embed()?;
    match wanted {
        Some(wanted) if !(1..=all).contains(&wanted) => {
            let message = format!("dimensions is {wanted}; it must be from 1 to {all}");
            Err(ApiError::parameter("dimensions", message))
        }
        wanted => Ok(wanted.unwrap_or(all) as usize),
    }
}

/// The vectors of texts, each of so many numbers: the first ones, of length 1 again.
async fn vectors(
    state: &AppState,
    caller: &Caller,
    card: &ModelCard,
    inputs: Vec<Vec<TokenId>>,
    dimensions: usize,
) -> Result<Embedded, ApiError> {
    let tokens = inputs.iter().map(Vec::len).sum();
    let service = Service { client: caller.client, ..Service::default() };
    let requests = parts(inputs).into_iter().enumerate().map(|(index, inputs)| {
        let id = RequestId(caller.id.0.wrapping_add(index as u128));
        let draft = EmbedDraft { id, model: card.name.clone(), inputs, service };
        EmbedRequest::try_from(draft).map_err(|error| ApiError::parameter("input", error.to_string()))
    });
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    let asked = stream::iter(requests).map(async |request| {
        let tokens = request.tokens();
        let embeddings = state.embed.embed(request).await?;
        state.rates.book(caller.client, tokens, Instant::now());
        Ok::<_, ApiError>(embeddings.vectors)
    });
    let vectors: Vec<Vec<Vec<f32>>> = asked.buffered(PARTS_AT_ONCE).try_collect().await?;
    let vectors = vectors.into_iter().flatten().map(|vector| shortened(vector, dimensions)).collect();
    Ok(Embedded { model: card.name.clone(), vectors, tokens })
}

fn parts(inputs: Vec<Vec<TokenId>>) -> Vec<Vec<Vec<TokenId>>> {
    let (mut parts, mut part, mut tokens) = (Vec::new(), Vec::new(), 0);
    for input in inputs {
        let full = part.len() == limits::EMBED_INPUTS_MAX || tokens + input.len() > PART_TOKENS_MAX;
        if full && !part.is_empty() {
            parts.push(std::mem::take(&mut part));
            tokens = 0;
        }
        tokens += input.len();
        part.push(input);
    }
    parts.push(part);
    parts
}

fn shortened(mut vector: Vec<f32>, dimensions: usize) -> Vec<f32> {
    if dimensions < vector.len() {
        vector.truncate(dimensions);
        let length = vector.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt();
        if length > 0.0 {
            vector.iter_mut().for_each(|number| *number = (f64::from(*number) / length) as f32);
        }
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_texts_are_asked_about_in_parts() {
        let check = |lengths: &[usize], expected: &[usize]| {
            let inputs = lengths.iter().map(|&length| vec![1; length]).collect();
            let counts: Vec<usize> = parts(inputs).iter().map(Vec::len).collect();
            assert_eq!(counts, expected, "{lengths:?}");
        };
        check(&[1, 2], &[2]);
        check(&[1; 70], &[32, 32, 6]);
        check(&[8000, 192, 1], &[2, 1]);
        check(&[9000, 9000, 1], &[1, 1, 1]);
    }

    #[test]
    fn a_part_of_a_vector_has_length_1_again() {
        assert_eq!(shortened(vec![0.6, 0.0, 0.8], 3), [0.6, 0.0, 0.8]);
        assert_eq!(shortened(vec![0.6, 0.0, 0.8], 2), [1.0, 0.0]);
        assert_eq!(shortened(vec![0.0, 1.0], 1), [0.0]);
    }
}
