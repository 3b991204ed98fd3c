//! The seam between scheduling and tensors: what the engine asks of a model, in one forward pass per step.
//!
//! A model holds the KV of a fixed number of blocks and knows nothing of who uses which: sequences, sharing and the
//! prefix cache are the engine's. A pass is asked for with [`Model::submit`] and its tokens are read with
//! [`Model::collect`], one pass later, so that the device never waits for the host. Where what may be drawn depends on the
//! tokens of the pass before, that is told in between, with [`Model::draw`]: the device computes logits meanwhile.

use crate::grammar::TokenMask;
use std::fmt;
use types::{ModelCard, SamplingParams, TokenId, TokenLogprobs};

/// One sequence inside an engine; never reused while the engine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A place for the KV of [`types::BLOCK_TOKENS`] consecutive tokens; below [`ModelLimits::blocks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// What a model can hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelLimits {
    /// Sequences that may be in one step.
    pub slots: usize,
    /// Blocks of KV; at least what the context of the model's card takes, so that every valid request fits alone.
    pub blocks: usize,
    /// Bytes of KV a token takes.
    pub kv_bytes_per_token: u64,
}

/// Everything the sampler needs to draw one token of one row.
#[derive(Debug, Clone, Copy)]
pub struct RowSampling<'a> {
    /// How to draw.
    pub params: &'a SamplingParams,
    /// Index in the output of the token to draw: the key of its random number.
    pub position: u32,
    /// The whole prompt, for the repetition penalty.
    pub prompt: &'a [TokenId],
    /// The output so far, for all penalties; without its last token where that is still being drawn
    /// ([`Input::Drawn`]). In a [`Slice`], with the tokens guessed behind it.
    pub output: &'a [TokenId],
    /// Whether only tokens of a mask may be drawn, which comes with [`Model::draw`].
    pub masked: bool,
    /// Tell the log-probabilities of the token and of so many of the most probable ones.
    pub logprobs: Option<u32>,
}

impl<'a> RowSampling<'a> {
    /// Of a row that is not masked and of which nothing else is told.
    pub fn plain(
        params: &'a SamplingParams,
        position: u32,
        prompt: &'a [TokenId],
        output: &'a [TokenId],
    ) -> Self {
        Self { params, position, prompt, output, masked: false, logprobs: None }
    }
}

/// Tokens of a prompt whose log-probabilities are asked for.
#[derive(Debug, Clone, Copy)]
pub struct Scoring<'a> {
    /// The tokens that follow the slice's first one, second one and so on: as many as the slice has, or, at the end of a
    /// prompt, fewer. At least one.
    pub targets: &'a [TokenId],
    /// Tell so many of the most probable ones at each place, too.
    pub top: u32,
}

/// What a step brought.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Of each slice that samples, in their order: [`Slice::draws`] tokens.
    pub drawn: Vec<DrawnToken>,
    /// Of each slice with [`Slice::score`], in their order: of each of its targets.
    pub scores: Vec<Vec<TokenLogprobs>>,
}

impl StepOutput {
    /// The tokens drawn, in the order of their slices.
    pub fn tokens(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.drawn.iter().map(|drawn| drawn.token)
    }
}

/// A token that was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawnToken {
    /// Which.
    pub token: TokenId,
    /// Where asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Which tokens a slice appends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input<'a> {
    /// These; at least one.
    Tokens(&'a [TokenId]),
    /// The one that the step before, not yet collected, draws: the one at this index of what it returns.
    Drawn(usize),
}

impl Input<'_> {
    /// How many tokens.
    pub fn count(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Drawn(_) => 1,
        }
    }
}

/// One sequence's part of a step: tokens appended to its KV, and perhaps a token drawn after the last of them.
///
/// A decode row is a slice of one token that samples; a part of a long prompt is a slice of many that does not.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    /// Whose.
    pub sequence: SequenceId,
    /// Where its KV lies: position `p` in `blocks[p / BLOCK_TOKENS]`. Room for everything up to the slice's last token.
    pub blocks: &'a [BlockId],
    /// Tokens of the sequence whose KV is there already, which is also the position of the first appended one.
    pub start: usize,
    /// What to append.
    pub input: Input<'a>,
    /// Draw the token that follows; none in the middle of a prompt.
    pub sample: Option<RowSampling<'a>>,
    /// So many of the last tokens are guesses: a token is drawn at the place of each, too ([`Slice::rows`]). 0 where nothing
    /// is drawn, and fewer than the tokens.
    pub drafts: usize,
    /// Tell the log-probabilities of the prompt's tokens.
    pub score: Option<Scoring<'a>>,
}

impl<'a> Slice<'a> {
    /// Tokens that it draws.
    pub fn draws(&self) -> usize {
        self.sample.map_or(0, |_| self.drafts + 1)
    }

    /// How each of these is drawn: the first one after the last token that is no guess, the i-th as if the guesses before it
    /// were the output.
    pub fn rows(&self) -> impl Iterator<Item = RowSampling<'a>> + use<'a> {
        let (sample, drafts) = (self.sample, self.drafts);
        sample.into_iter().flat_map(move |sample| {
            let known = sample.output.len() - drafts;
            (0..=drafts).map(move |at| RowSampling {
                position: sample.position + at as u32,
                output: &sample.output[..known + at],
                ..sample
            })
        })
    }
}

/// Why a model could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// One sequence cannot go on; the others can.
    #[error("{message}")]
    Sequence {
        /// Whose fault it is.
        sequence: SequenceId,
        /// What happened.
        message: String,
    },
    /// The backend failed; nothing that the model holds can be trusted, and its process should end.
    #[error("the model's backend failed: {0}")]
    Backend(String),
}

/// How a model's passes follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// A device, which computes one pass after another: a second one may be submitted before the first is collected, and
    /// take in what that draws ([`Input::Drawn`]).
    Lookahead,
    /// A pipeline, whose stages compute different passes at a time, none of which takes in what another one draws.
    Stages {
        /// Passes that may be in flight: as many as keep all stages busy with parts of prompts. At least `groups`.
        flights: usize,
        /// Passes into which rows are divided, at least 1.
        groups: usize,
    },
}

impl Overlap {
    /// Passes that may be in flight.
    pub fn flights(self) -> usize {
        match self {
            Self::Lookahead => 2,
            Self::Stages { flights, groups } => flights.max(groups).max(1),
        }
    }

    /// Passes into which rows are divided: each row is in one of so many.
    pub fn groups(self) -> usize {
        match self {
            Self::Lookahead => 1,
            Self::Stages { groups, .. } => groups.max(1),
        }
    }
}

/// A model with the KV of its blocks. All calls come from one thread.
///
/// Contract: steps are collected in the order in which they were submitted, and at most [`Overlap::flights`] are in
/// flight. Where a step has masked rows, its `draw` comes before the next `submit` and before its own `collect`. A step's slices
/// name different sequences, no two of them append to the same block, and every position before a slice's start was
/// written by an earlier step. Steps take effect in the order of their submission: what one writes the next one reads,
/// and a block may be given to someone else while a step that wrote to it is still in flight.
pub trait Model: fmt::Debug {
    /// What this model is.
    fn card(&self) -> &ModelCard;

    /// What it can hold.
    fn limits(&self) -> ModelLimits;

    /// How its passes follow one another while `rows` rows decode. Whether it is a pipeline never changes.
    fn overlap(&self, _rows: usize) -> Overlap {
        Overlap::Lookahead
    }

    /// Starts one forward pass over all slices together.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where the pass failed; [`ModelError::Sequence`] where one of the sequences made it
    /// impossible, with nothing started: the engine ends that one and goes on with the others.
    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError>;

    /// Starts drawing the tokens of the newest step, which has masked rows: a mask for each of these, in their order, and
    /// for each of their guesses. Every mask is of the card's vocabulary and allows at least one token.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where that failed.
    fn draw(&mut self, masks: &[TokenMask]) -> Result<(), ModelError>;

    /// Waits for the oldest step in flight; returns what it drew and found.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where the pass failed.
    fn collect(&mut self) -> Result<StepOutput, ModelError>;

    /// While there is nothing else to do: a part, of seconds at most, of what makes later steps faster. False: nothing is
    /// left of it.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where that failed.
    fn prepare(&mut self) -> Result<bool, ModelError> {
        Ok(false)
    }
}
