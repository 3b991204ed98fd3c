//! Texts that a grammar allows: compiled once, then a [`Matcher`] for each sequence says which tokens may come next.
//!
//! Data flows `tokenizer.json → Vocabulary → Grammars`, there `Grammar → Matcher`, and with each token `Matcher → TokenMask`.
//! The work is `llguidance`'s: an Earley parser over a lexer of derivatives, which walks a trie of the vocabulary. Here is
//! what bounds it, and what an engine needs of it. Compiling takes from a millisecond to some hundred, so it is done beside
//! the engine and given to [`crate::Engine::submit_under`].
//!
//! A grammar is that of the answer alone: it begins where the prompt ends, also in the middle of a word or a token. What a
//! prompt holds is never read again as other tokens, and any tokens whose bytes are an allowed text are allowed, not only
//! those into which a tokenizer would cut it: the model chooses.

mod mask;
mod matcher;
mod vocabulary;

pub use mask::TokenMask;
pub use matcher::{Matcher, MatcherError};
pub use vocabulary::{Vocabulary, VocabularyError};

use llguidance::{
    ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::InferenceCapabilities,
};
use std::{collections::BTreeMap, fmt, sync::Arc, thread};
use types::{GenerateError, Grammar, TokenId};

/// Grammars that are kept compiled; the one used longest ago yields. Applications have a handful each.
const CACHED_MAX: usize = 64;
/// What a grammar is limited to. Its size bounds memory; fuel bounds time, at about 50,000 units a millisecond while it is
/// compiled and 14,000 while a mask is computed; a state of the lexer takes up to 2 kB, and each sequence has its own.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 2_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 50_000,
    max_grammar_size: 500_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};
/// Stack of the thread that compiles: the compiler calls itself for each rule, terminal and reference of a chain, and takes up
/// to 7 kB of stack for each in a debug build. A chain in a grammar of the largest size that may be has 32,000. What is not
/// used is never given to the process.
const STACK_BYTES: usize = 512 << 20;
/// Characters of what the compiler says that are passed on: it may quote the grammar.
const MESSAGE_CHARS_MAX: usize = 400;

/// Compiles grammars for one vocabulary, and keeps those that were used last.
pub struct Grammars {
    factory: ParserFactory,
    ends: Arc<[TokenId]>,
    vocab_size: u32,
    /// Each with when it was used last.
    compiled: BTreeMap<Grammar, (u64, Matcher)>,
    uses: u64,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("compiled", &self.compiled.len()).finish_non_exhaustive()
    }
}

impl Grammars {
    /// For the texts of a vocabulary. Takes a second for the largest.
    ///
    /// # Errors
    /// [`VocabularyError::Unusable`] where the vocabulary is not one of texts.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, VocabularyError> {
        let tokens = vocabulary.environment()?;
        let slices = SlicedBiasComputer::json_slices();
        let factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices);
        let mut factory =
            factory.map_err(|error| VocabularyError::Unusable { reason: message_of(&error) })?;
        *factory.limits_mut() = LIMITS;
        factory.quiet();
        Ok(Self {
            factory,
            ends: vocabulary.ends().into(),
            vocab_size: vocabulary.size(),
            compiled: BTreeMap::new(),
            uses: 0,
        })
    }

    /// A matcher at the beginning of a grammar's texts.
    ///
    /// # Errors
    /// [`GenerateError::Invalid`] for a grammar that means nothing, is too large, or uses what is not supported, which the
    /// message names.
    pub fn compile(&mut self, grammar: &Grammar) -> Result<Matcher, GenerateError> {
        self.uses += 1;
        let uses = self.uses;
        if let Some((used, matcher)) = self.compiled.get_mut(grammar) {
            *used = uses;
            return Ok(matcher.clone());
        }
        let matcher = self.parse_aside(grammar).map_err(invalid)?;
        if self.compiled.len() >= CACHED_MAX {
            let oldest = self.compiled.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(oldest) = oldest.map(|(grammar, _)| grammar.clone()) {
                self.compiled.remove(&oldest);
            }
        }
        self.compiled.insert(grammar.clone(), (uses, matcher.clone()));
        Ok(matcher)
    }

    /// On a thread of its own, whose stack is large enough for whatever there is to parse.
    fn parse_aside(&self, grammar: &Grammar) -> Result<Matcher, String> {
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            let parsing = builder.spawn_scoped(scope, || self.parse(grammar));
            let parsing = parsing.map_err(|error| format!("no thread to compile it on: {error}"))?;
            parsing.join().unwrap_or_else(|_| Err("the compiler failed on it".to_owned()))
        })
    }

    fn parse(&self, grammar: &Grammar) -> Result<Matcher, String> {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => {
                let schema = serde_json::from_str(schema)
                    .map_err(|error| format!("the schema is not JSON: {error}"))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let parser = self.factory.create_parser(grammar).map_err(|error| message_of(&error))?;
        Ok(Matcher::new(parser, self.ends.clone(), self.vocab_size))
    }
}

fn invalid(message: String) -> GenerateError {
    GenerateError::Invalid { message: format!("grammar: {message}"), param: Some("grammar".to_owned()) }
}

/// What `llguidance` says, without what follows it for those who debug it.
fn message_of(error: &dyn fmt::Display) -> String {
    let message = error.to_string();
    let message = message.split("\n<").next().unwrap_or_default();
    // It cannot say more than that it failed, or does not name the keywords.
    let message = if message.starts_with("panic: ") {
        "the compiler failed on it; a keyword may have a value that it cannot have".to_owned()
    } else if message.starts_with("Failed to generate regex for") {
        format!("minimum, maximum, exclusiveMinimum or exclusiveMaximum cannot be kept to: {message}")
    } else {
        message.to_owned()
    };
    message.chars().take(MESSAGE_CHARS_MAX).collect()
}
