//! What else is told of tokens: log-probabilities from logits, in the same graph as the tokens.

use crate::raw;
use engine::grammar::TokenMask;
use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{argpartition_axis, gt, logsumexp_axis, select},
};
use types::{TokenId, TokenLogprobs};

/// Bits of a mask's word.
const WORD_BITS: i32 = 32;

/// Log-probabilities of some rows on the device.
#[derive(Debug)]
pub(crate) struct Logprobs {
    /// Of the rows' tokens, `[rows, 1]`.
    of_tokens: Array,
    /// The most probable tokens in no order, `[rows, top]`, and theirs; where any are asked for.
    top: Option<(Array, Array)>,
}

impl Logprobs {
    /// Of `tokens [rows]`, i32, by `logits [rows, vocabulary]` as they are, with the `top` most probable ones.
    pub(crate) fn new(logits: &Array, tokens: &Array, top: u32) -> Result<Self> {
        let logits = logits.as_dtype(Dtype::Float32)?;
        let total = logsumexp_axis(&logits, -1, true)?;
        let at = |tokens: &Array| logits.take_along_axis(tokens, -1)?.subtract(&total);
        let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
        let top = i32::try_from(top).unwrap_or(i32::MAX).min(vocabulary);
        let top = match top {
            0 => None,
            _ => {
                let parted = argpartition_axis(logits.negative()?, top - 1, -1)?;
                let most = raw::slice(&parted, &[0, 0], &[rows, top])?;
                let of_most = at(&most)?;
                Some((most, of_most))
            }
        };
        Ok(Self { of_tokens: at(&tokens.reshape(&[rows, 1])?)?, top })
    }

    /// What is to be evaluated.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        let top = self.top.iter().flat_map(|(tokens, logprobs)| [tokens, logprobs]);
        std::iter::once(&self.of_tokens).chain(top)
    }

    /// The same as words of 32 bits: of the tokens, then the most probable tokens, then theirs.
    pub(crate) fn words(&self) -> Result<Vec<Array>> {
        let flat = |array: &Array| array.reshape(&[-1])?.view_dtype(Dtype::Uint32);
        let mut words = vec![flat(&self.of_tokens)?];
        if let Some((tokens, logprobs)) = &self.top {
            words.extend([tokens.reshape(&[-1])?.as_dtype(Dtype::Uint32)?, flat(logprobs)?]);
        }
        Ok(words)
    }

    /// From such words, of `rows` rows with `top` most probable tokens each.
    pub(crate) fn of_words(words: &[u32], rows: usize, top: usize) -> Self {
        let floats = |words: &[u32], width: usize| {
            let values: Vec<f32> = words.iter().map(|&bits| f32::from_bits(bits)).collect();
            Array::from_slice(&values, &[rows as i32, width as i32])
        };
        let (of_tokens, rest) = words.split_at(rows);
        let (tokens, logprobs) = rest.split_at(rows * top);
        let top =
            (top > 0).then(|| (Array::from_slice(tokens, &[rows as i32, top as i32]), floats(logprobs, top)));
        Self { of_tokens: floats(of_tokens, 1), top }
    }

    /// On the host, each with as many of the most probable tokens as asked for, the most probable first.
    pub(crate) fn read(&self, tops: impl Iterator<Item = u32>) -> Result<Vec<TokenLogprobs>> {
        self.of_tokens.eval()?;
        let of_tokens = self.of_tokens.as_slice::<f32>();
        let (mut tokens, mut logprobs, mut width) = (Vec::new(), Vec::new(), 0);
        if let Some((most, of_most)) = &self.top {
            let most = most.as_dtype(Dtype::Int32)?;
            most.eval()?;
            of_most.eval()?;
            (tokens, logprobs) = (most.as_slice::<i32>().to_vec(), of_most.as_slice::<f32>().to_vec());
            width = most.dim(1) as usize;
        }
        let told = of_tokens.iter().zip(tops).enumerate().map(|(row, (&logprob, top))| {
            let of_row = row * width..(row + 1) * width;
            let pairs = tokens[of_row.clone()].iter().zip(&logprobs[of_row]);
            let mut most: Vec<(TokenId, f32)> = pairs.map(|(&token, &of)| (token as TokenId, of)).collect();
            most.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            most.truncate(top as usize);
            TokenLogprobs { logprob, top: most }
        });
        Ok(told.collect())
    }
}

/// `logits [rows, vocabulary]` where a row's mask allows the token, else minus infinity: then every path draws the same, and
/// no penalty or bias brings a token back. Rows without a mask, and those that fill up, stay as they are.
pub(crate) fn masked(logits: &Array, masks: &[Option<&TokenMask>]) -> Result<Array> {
    let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
    let width = (vocabulary + WORD_BITS - 1) / WORD_BITS;
    let mut words = vec![u32::MAX; (rows * width) as usize];
    for (row, mask) in words.chunks_mut(width as usize).zip(masks) {
        if let Some(mask) = mask {
            // A vocabulary of fewer tokens than there are logits has none of the others.
            row.fill(0);
            row.iter_mut().zip(mask.words()).for_each(|(word, &given)| *word = given);
        }
    }
    let words = Array::from_slice(&words, &[rows, width, 1]);
    let shifts: Vec<u32> = (0..WORD_BITS as u32).collect();
    let shifts = Array::from_slice(&shifts, &[1, 1, WORD_BITS]);
    let bits = raw::bits(&words, &shifts)?.reshape(&[rows, width * WORD_BITS])?;
    let bits = raw::slice(&bits, &[0, 0], &[rows, vocabulary])?;
    let allowed = gt(bits, Array::from_slice(&[0_u32], &[1]))?;
    select(allowed, logits, Array::from_f32(f32::NEG_INFINITY).as_dtype(logits.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_a_softmax() {
        let vocabulary = 100;
        let value = |row: usize, token: usize| ((token * 37 + row * 11) % 101) as f32 / 10.0;
        let logits: Vec<f32> =
            (0..2).flat_map(|row| (0..vocabulary).map(move |token| value(row, token))).collect();
        let array = Array::from_slice(&logits, &[2, vocabulary as i32]);
        let told = Logprobs::new(&array, &Array::from_slice(&[3, 99], &[2]), 5).unwrap();
        let words = told.words().unwrap();
        let words: Vec<u32> = words
            .iter()
            .flat_map(|part| {
                part.eval().unwrap();
                part.as_slice::<u32>().to_vec()
            })
            .collect();
        let told = told.read([2, 5].into_iter()).unwrap();
        let again = Logprobs::of_words(&words, 2, 5).read([2, 5].into_iter()).unwrap();
        assert_eq!(again, told, "as words and back");
        for (row, (token, count)) in [(3, 2), (99, 5)].into_iter().enumerate() {
            let of_row = &logits[row * vocabulary..(row + 1) * vocabulary];
            let total = of_row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let of = |token: usize| (f64::from(of_row[token]) - total) as f32;
            let mut order: Vec<usize> = (0..vocabulary).collect();
            order.sort_by(|&a, &b| of_row[b].total_cmp(&of_row[a]).then(a.cmp(&b)));
            assert!((told[row].logprob - of(token)).abs() < 1e-5, "{told:?}");
            let tokens: Vec<usize> = told[row].top.iter().map(|top| top.0 as usize).collect();
            assert_eq!(tokens, order[..count], "{told:?}");
            assert!(told[row].top.iter().all(|&(token, got)| (got - of(token as usize)).abs() < 1e-5));
        }
    }

    #[test]
    fn masks_leave_what_they_allow() {
        for vocabulary in [5, 32, 33, 1000] {
            let logits: Vec<f32> = (0..3 * vocabulary).map(|at| at as f32).collect();
            let array = Array::from_slice(&logits, &[3, vocabulary]);
            let mut mask = TokenMask::none(vocabulary as u32);
            for token in (0..vocabulary as u32).step_by(3) {
                mask.allow(token);
            }
            let masked = masked(&array, &[None, Some(&mask)]).unwrap();
            masked.eval().unwrap();
            for (at, (&got, &given)) in masked.as_slice::<f32>().iter().zip(&logits).enumerate() {
                let (row, token) = (at / vocabulary as usize, at % vocabulary as usize);
                let expected = if row == 1 && token % 3 != 0 { f32::NEG_INFINITY } else { given };
                assert_eq!(got, expected, "row {row}, token {token} of {vocabulary}");
            }
        }
    }
}
