//! Drafts from texts that there are: a request's own, the answer that its client expects, and earlier answers.

use super::{Draft, DraftRow, DraftSource, index::Index};
use crate::SequenceId;
use std::collections::{BTreeMap, VecDeque};
use types::{BlockHash, DraftOrigin, TokenId};

/// Last tokens of a prompt that are read: more would stop all rows for milliseconds when its answer begins.
const PROMPT_TOKENS_MAX: usize = 1 << 16;
/// Tokens of one generation of answers. A salt has two, of which the older one is dropped when the newer one is full: 5 MiB.
const GENERATION_TOKENS: usize = 1 << 16;
/// Salts whose answers are kept; the one used longest ago yields.
const SALTS_MAX: usize = 8;
/// Ends an answer among others: no token.
const END: TokenId = TokenId::MAX;

/// What follows where a text stood as it ends now: the longer the same, the likelier the same again.
#[derive(Debug, Default)]
pub(super) struct ContextSource {
    texts: BTreeMap<SequenceId, Followed>,
}

/// What a client expects.
#[derive(Debug, Default)]
pub(super) struct PredictionSource {
    texts: BTreeMap<SequenceId, Followed>,
}

/// A text in which a sequence is followed.
#[derive(Debug, Default)]
struct Followed {
    index: Index,
    /// Where it was found last, and its length then.
    found: Option<(usize, usize)>,
}

impl Followed {
    /// What follows the end of `query` in `text`, which is one with it where `grows`: it goes on into the draft itself.
    fn draft(&mut self, text: &[TokenId], query: &[TokenId], most: usize, grows: bool) -> Draft {
        self.index.extend(text);
        let follow = self.found.and_then(|(at, length)| (at + query.len()).checked_sub(length));
        let found = self.index.find(text, query, follow);
        self.found = found.map(|found| (found.at, query.len()));
        let Some(found) = found else { return Draft::default() };
        let mut tokens: Vec<TokenId> = text[found.at..].iter().copied().take(most).collect();
        while grows && tokens.len() < most {
            tokens.push(tokens[tokens.len() - (text.len() - found.at)]);
        }
        Draft { tokens, matched: found.tokens }
    }
}

impl DraftSource for ContextSource {
    fn origin(&self) -> DraftOrigin {
        DraftOrigin::Context
    }

    fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Draft> {
        let draft = |row: &DraftRow<'_>| {
            let text = &row.text[row.prompt_tokens.saturating_sub(PROMPT_TOKENS_MAX)..];
            self.texts.entry(row.sequence).or_default().draft(text, text, row.most, true)
        };
        rows.iter().map(draft).collect()
    }

    fn forget(&mut self, sequence: SequenceId) {
        self.texts.remove(&sequence);
    }
}

impl DraftSource for PredictionSource {
    fn origin(&self) -> DraftOrigin {
        DraftOrigin::Prediction
    }

    fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Draft> {
        let draft = |row: &DraftRow<'_>| {
            let (output, prediction) = (row.output(), row.prediction);
            if prediction.is_empty() {
                return Draft::default();
            }
            let text = self.texts.entry(row.sequence).or_default();
            if output.is_empty() {
                // It begins as expected, until it does not.
                text.found = Some((0, 0));
                return Draft { tokens: prediction.iter().copied().take(row.most).collect(), matched: 1 };
            }
            let draft = text.draft(prediction, output, row.most, false);
            match output {
                // Too little to be found by.
                [first] if prediction[0] == *first => {
                    text.found = Some((1, 1));
                    let tokens = prediction[1..].iter().copied().take(row.most).collect();
                    Draft { tokens, matched: 2 }
                }
                _ => draft,
            }
        };
        rows.iter().map(draft).collect()
    }

    fn forget(&mut self, sequence: SequenceId) {
        self.texts.remove(&sequence);
    }
}

/// What followed in earlier answers to requests of the same salt: nobody else's text can be told by how fast one's own comes.
#[derive(Debug, Default)]
pub(super) struct AnswersSource {
    salts: BTreeMap<BlockHash, Answers>,
    uses: u64,
}

/// Answers under one salt.
#[derive(Debug, Default)]
struct Answers {
    used: u64,
    /// The newest first.
    generations: VecDeque<Generation>,
}

#[derive(Debug, Default)]
struct Generation {
    text: Vec<TokenId>,
    index: Index,
}

impl AnswersSource {
    fn draft(&self, row: &DraftRow<'_>) -> Draft {
        let Some(answers) = self.salts.get(&row.salt) else { return Draft::default() };
        let find = |generation: &Generation| {
            let found = generation.index.find(&generation.text, row.text, None)?;
            let after = generation.text[found.at..].iter().copied();
            let tokens: Vec<_> = after.take_while(|&token| token != END).take(row.most).collect();
            (!tokens.is_empty()).then_some(Draft { tokens, matched: found.tokens })
        };
        // The newer one of equal ones.
        answers
            .generations
            .iter()
            .rev()
            .filter_map(find)
            .max_by_key(|draft| draft.matched)
            .unwrap_or_default()
    }
}

impl DraftSource for AnswersSource {
    fn origin(&self) -> DraftOrigin {
        DraftOrigin::Answers
    }

    fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Draft> {
        self.uses += 1;
        rows.iter()
            .map(|row| {
                if let Some(answers) = self.salts.get_mut(&row.salt) {
                    answers.used = self.uses;
                }
                self.draft(row)
            })
            .collect()
    }

    fn finish(&mut self, row: &DraftRow<'_>) {
        let output = &row.output()[..row.output().len().min(GENERATION_TOKENS - 1)];
        if output.is_empty() {
            return;
        }
        self.uses += 1;
        if self.salts.len() >= SALTS_MAX && !self.salts.contains_key(&row.salt) {
            let oldest = self.salts.iter().min_by_key(|(_, answers)| answers.used);
            if let Some(oldest) = oldest.map(|(salt, _)| *salt) {
                self.salts.remove(&oldest);
            }
        }
        let answers = self.salts.entry(row.salt).or_default();
        answers.used = self.uses;
        let room = |generation: &Generation| generation.text.len() + output.len() < GENERATION_TOKENS;
        if !answers.generations.front().is_some_and(room) {
            answers.generations.truncate(1);
            answers.generations.push_front(Generation::default());
        }
        if let Some(Generation { text, index }) = answers.generations.front_mut() {
            text.extend_from_slice(output);
            text.push(END);
            index.extend(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row<'a>(text: &'a [TokenId], prompt_tokens: usize, prediction: &'a [TokenId]) -> DraftRow<'a> {
        let (sequence, salt) = (SequenceId(1), BlockHash(1));
        DraftRow { sequence, salt, text, prompt_tokens, prediction, most: 4 }
    }

    fn tokens(source: &mut dyn DraftSource, row: DraftRow<'_>) -> Vec<TokenId> {
        source.propose(&[row]).remove(0).tokens
    }

    #[test]
    fn a_text_is_expected_to_go_on_as_it_did() {
        let check = |text: &[TokenId], expected: &[TokenId]| {
            assert_eq!(tokens(&mut ContextSource::default(), row(text, 1, &[])), expected, "{text:?}");
        };
        check(&[1, 2, 3, 4, 5, 6, 9, 2, 3], &[4, 5, 6, 9]);
        // A loop goes on.
        check(&[7, 1, 2, 1, 2], &[1, 2, 1, 2]);
        check(&[5, 5, 5], &[5, 5, 5, 5]);
        check(&[1, 2, 3], &[]);
        check(&[], &[]);
    }

    #[test]
    fn a_place_is_followed_while_it_goes_on() {
        let mut source = ContextSource::default();
        // Of two places before which the same stands, the one that came true is kept.
        let mut text = vec![1, 2, 8, 3, 4, 50, 51, 1, 2, 9, 3, 4, 60, 61, 1, 2, 8];
        assert_eq!(tokens(&mut source, row(&text, 1, &[])), [3, 4, 50, 51]);
        text.extend([3, 4]);
        assert_eq!(tokens(&mut source, row(&text, 1, &[])), [50, 51, 1, 2]);
        source.forget(SequenceId(1));
        assert!(source.texts.is_empty());
    }

    #[test]
    fn a_prediction_is_followed_from_its_beginning_and_found_again() {
        let prediction = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let check = |output: &[TokenId], expected: &[TokenId]| {
            let text = [&[100], output].concat();
            let mut source = PredictionSource::default();
            assert_eq!(tokens(&mut source, row(&text, 1, &prediction)), expected, "{output:?}");
        };
        check(&[], &[1, 2, 3, 4]);
        check(&[1], &[2, 3, 4, 5]);
        check(&[1, 2], &[3, 4, 5, 6]);
        check(&[1, 2, 44], &[]);
        check(&[1, 2, 44, 4, 5], &[6, 7, 8, 9]);
        check(&[8, 9], &[]);
        assert!(tokens(&mut PredictionSource::default(), row(&[1, 2], 1, &[])).is_empty());
    }

    #[test]
    fn answers_are_found_under_their_own_salt_and_forgotten_in_time() {
        let mut source = AnswersSource::default();
        let under =
            |salt: u128, text: &'static [TokenId]| DraftRow { salt: BlockHash(salt), ..row(text, 1, &[]) };
        source.finish(&under(1, &[0, 1, 2, 3, 4, 5]));
        source.finish(&under(1, &[0, 6, 7, 3, 4, 8]));
        assert_eq!(tokens(&mut source, under(1, &[9, 2, 3])), [4, 5], "up to the answer's end");
        assert_eq!(tokens(&mut source, under(1, &[9, 3, 4])), [8], "the latest");
        assert_eq!(tokens(&mut source, under(1, &[9, 4, 5])), [0; 0], "at the end");
        assert_eq!(tokens(&mut source, under(2, &[9, 2, 3])), [0; 0], "another salt");
        for salt in 2..=SALTS_MAX as u128 + 1 {
            source.finish(&under(salt, &[0, 1, 2]));
        }
        assert_eq!(source.salts.len(), SALTS_MAX);
        assert_eq!(tokens(&mut source, under(1, &[9, 2, 3])), [0; 0], "the salt used longest ago");
        let long = vec![7; GENERATION_TOKENS / 2];
        for _ in 0..10 {
            let text = [&[0], long.as_slice()].concat();
            source.finish(&DraftRow { salt: BlockHash(2), ..row(&text, 1, &[]) });
        }
        let kept = source.salts[&BlockHash(2)].generations.iter().map(|generation| generation.text.len());
        assert!(kept.sum::<usize>() <= 2 * GENERATION_TOKENS);
    }
}
