//! One model on several machines: each rank of a [`Group`] holds a range of its layers.
//!
//! The first rank is the **head** ([`load_head`]): it embeds tokens, computes the first layers, and is the
//! [`engine::Model`] that an engine drives. The others are **stages** ([`run_stage`]), each the next range of layers; the
//! last one has norm and head, draws tokens and tells log-probabilities. A pass goes once around the circle: a frame with
//! its plan from rank to rank (`frame`, `plan`), behind it hidden states, and from the last rank back to the head what it
//! brought (`results`). Masks follow their plan. Each rank has the KV of its own layers; blocks are numbered by the head's
//! engine, so that its prefix cache, sessions and preemption need no word between ranks.
//!
//! Ranks compute different passes at a time: as many are in flight as fill them, and rows are divided among these where
//! [`engine::StageTimes`] says that this pays, from times that each rank measured as it started and, one pass
//! in a few, measures while it serves (`clock`): it tells them in the frames that pass through it.
//!
//! A group cannot be mended: after an error a rank ends, and whoever started the ranks starts all of them anew.

mod clock;
mod frame;
mod head;
mod hello;
mod link;
mod measure;
mod plan;
mod results;
mod stage;
mod times;

pub use frame::FrameError;
pub use head::Head;
pub use measure::measure;
pub use plan::PlanError;
pub use stage::{StageEvent, run_stage};

use crate::{
    checkpoint::LoadError,
    distributed::{Group, GroupError, MEMBERS_MAX},
    load::{LoadSettings, Opened},
    models::Part,
    runner::Runner,
};
use hello::{Hello, Ready};
use link::Link;
use std::ops::Range;
use types::{BLOCK_TOKENS, ModelAssets};

/// Why a rank is none, or is none any more.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// Its part of the model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The group refused.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The layers given to the ranks are not those of the model, or not of this group.
    #[error("the pipeline's layers: {reason}")]
    Place {
        /// What is wrong.
        reason: String,
    },
    /// Another rank has something else, or failed.
    #[error("rank {rank} {reason}")]
    Rank {
        /// Which.
        rank: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// What came from the rank before is no frame.
    #[error("from the rank before: {0}")]
    Frame(#[from] FrameError),
    /// What came from the rank before is no plan.
    #[error("from the rank before: {0}")]
    Plan(#[from] PlanError),
    /// What came is not what should have come now.
    #[error("{0}")]
    Unexpected(String),
    /// A rank was lost, or the device failed.
    #[error("{what}: {message}")]
    Lost {
        /// What was being done.
        what: &'static str,
        /// What MLX said.
        message: String,
    },
}

impl PipelineError {
    fn lost(what: &'static str, error: &mlx_rs::error::Exception) -> Self {
        Self::Lost { what, message: error.what().to_owned() }
    }
}

/// Loads the first range of layers onto the calling thread and returns the whole pipeline as a model, once all other ranks
/// have loaded theirs and said that they have the same. `ranges`: the layers of each rank, in order. `kv_tokens`: tokens of KV
/// that there is to be room for, instead of what the settings say in bytes.
///
/// # Errors
/// [`PipelineError`] names the rank, file or setting that is wrong.
pub fn load_head(
    settings: &LoadSettings,
    group: Group,
    ranges: &[Range<usize>],
    kv_tokens: Option<u64>,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<(Head, ModelAssets), PipelineError> {
    if group.rank() != 0 {
        let reason = format!("the head is rank 0, and this is rank {}", group.rank());
        return Err(PipelineError::Place { reason });
    }
    let joined = Joined::new(settings, group, ranges, kv_tokens, progress)?;
    Head::new(joined)
}

/// A rank that has loaded its layers, and knows what the others have.
struct Joined {
    link: Link,
    runner: Runner,
    assets: ModelAssets,
    /// Of each rank.
    ready: Vec<Ready>,
    /// Layers of the model.
    layers: usize,
}

impl Joined {
    fn new(
        settings: &LoadSettings,
        group: Group,
        ranges: &[Range<usize>],
        kv_tokens: Option<u64>,
        progress: &mut dyn FnMut(&str, f32),
    ) -> Result<Self, PipelineError> {
        let link = Link::new(group);
        let (rank, size) = (link.rank(), link.size());
        if ranges.len() != size || !(2..=MEMBERS_MAX).contains(&size) {
            let reason = format!("{} ranges in a group of {size}; from 2 to {MEMBERS_MAX}", ranges.len());
            return Err(PipelineError::Place { reason });
        }
        let opened = Opened::new(settings, None, progress);
        let hello = opened.as_ref().ok().map(|opened| Hello {
            weights: opened.root(),
            layers: opened.spec.layers.len() as u32,
            hidden: opened.spec.hidden as u32,
            activations: opened.compute.activations as u32,
            ranges: ranges.iter().map(|range| range.start as u32..range.end as u32).collect(),
        });
        let all = link.gather(&hello.as_ref().map_or_else(hello::failed, Hello::words))?;
        let opened = opened?;
        if let Some(hello) = hello {
            hello.agree(rank, &all)?;
        }
        let layers = opened.spec.layers.len();
        let kv_bytes = kv_tokens.map(|tokens| {
            let tokens = tokens.next_multiple_of(BLOCK_TOKENS as u64);
            tokens.saturating_mul(opened.kv_bytes_per_token(ranges[rank].clone()))
        });
        let settings = &LoadSettings { kv_bytes: kv_bytes.or(settings.kv_bytes), ..settings.clone() };
        let loaded =
            Part::of(&opened.spec, &ranges[rank]).and_then(|part| opened.load(part, settings, progress));
        let room = |blocks: usize| Ready { blocks: blocks as u32, times: Vec::new() }.words();
        let all =
            link.gather(&loaded.as_ref().map_or_else(|_| hello::failed(), |loaded| room(loaded.blocks)))?;
        let loaded = loaded?;
        // What one rank has no room for, none can use.
        let blocks = each(&all)?.iter().map(|ready| ready.blocks).min().unwrap_or(0);
        let measured = loaded.runner(settings, blocks as usize).and_then(|(mut runner, assets)| {
            let times = times::of_rows(&mut runner)?;
            Ok((runner, assets, times))
        });
        let words = measured.as_ref().map(|(_, _, times)| Ready { blocks, times: times.clone() }.words());
        let all = link.gather(&words.unwrap_or_else(|_| hello::failed()))?;
        let (runner, assets, _) = measured?;
        Ok(Self { link, runner, assets, ready: each(&all)?, layers })
    }
}

fn each(all: &[Vec<u32>]) -> Result<Vec<Ready>, PipelineError> {
    all.iter().enumerate().map(|(rank, words)| Ready::of(rank, words)).collect()
}
