//! What a node tells a router, from its connection on: state, cache and load, each when it is news.
//!
//! [`Teller`] turns the node's reports into [`Control`] messages; an uplink sends them, and the router of the same process
//! takes them as they are. It owns what that router has been told.

use crate::cache_mirror::{CacheCursor, CacheNews, blocks_of};
use crate::engine_handle::{EngineHandle, NodeReport};
use types::{
    CacheEvent, CacheSnapshot, EngineState, ModelCard, PipelineReport, limits::CACHE_BLOCKS_SENT_MAX,
};
use wire::Control;

pub(crate) struct Teller {
    engine: EngineHandle,
    state: Option<(EngineState, Vec<ModelCard>)>,
    pipeline: Option<PipelineReport>,
    cache: Option<CacheCursor>,
}

impl Teller {
    pub(crate) fn new(engine: EngineHandle) -> Self {
        Self { engine, state: None, pipeline: None, cache: None }
    }

    /// The router has to be told the whole cache again.
    pub(crate) fn forget_cache(&mut self) {
        self.cache = None;
    }

    /// What is new, in the order in which it is to be told: what a load counts as done is in the cache before.
    pub(crate) fn news(&mut self, report: NodeReport) -> Vec<Control> {
        let NodeReport { state, models, load, pipeline } = report;
        let mut news = Vec::new();
        // First, as it says whether a state without an engine will pass.
        if let Some(report) = pipeline.filter(|report| self.pipeline.as_ref() != Some(report)) {
            self.pipeline = Some(report.clone());
            news.push(Control::Pipeline(report));
        }
        let now = (state, models);
        if self.state.as_ref() != Some(&now) {
            let (state, models) = now.clone();
            let leaving = state == EngineState::Draining;
            news.push(Control::State { state, models });
            if leaving {
                news.push(Control::Leaving);
            }
            self.state = Some(now);
        }
        if let Some((cache, told)) = self.engine.cache_news(self.cache) {
            match cache {
                CacheNews::Snapshot(snapshot) => push_snapshot(snapshot, &mut news),
                CacheNews::Events { epoch, first_seq, events } => {
                    push_events(epoch, first_seq, events, &mut news);
                }
            }
            self.cache = Some(told);
        }
        news.extend(load.map(Control::Load));
        news
    }
}

fn push_snapshot(CacheSnapshot { epoch, seq, blocks }: CacheSnapshot, news: &mut Vec<Control>) {
    let mut parts: Vec<Vec<_>> = blocks.chunks(CACHE_BLOCKS_SENT_MAX).map(<[_]>::to_vec).collect();
    let end = parts.pop().unwrap_or_default();
    news.extend(parts.into_iter().map(|blocks| Control::CacheSnapshot { epoch, seq, blocks, last: false }));
    news.push(Control::CacheSnapshot { epoch, seq, blocks: end, last: true });
}

fn push_events(epoch: u64, mut first_seq: u64, events: Vec<CacheEvent>, news: &mut Vec<Control>) {
    let (mut part, mut blocks) = (Vec::new(), 0);
    let mut end = |part: &mut Vec<CacheEvent>| {
        let events = std::mem::take(part);
        let count = events.len() as u64;
        news.push(Control::CacheEvents { epoch, first_seq, events });
        first_seq += count;
    };
    for event in events {
        if blocks + blocks_of(&event) > CACHE_BLOCKS_SENT_MAX && !part.is_empty() {
            end(&mut part);
            blocks = 0;
        }
        blocks += blocks_of(&event);
        part.push(event);
    }
    if !part.is_empty() {
        end(&mut part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::BlockHash;

    #[test]
    fn caches_travel_in_parts() {
        let check = |counts: &[usize], expected: &[(u64, usize)]| {
            let events =
                counts.iter().map(|&count| CacheEvent::Removed { blocks: vec![BlockHash(1); count] });
            let mut news = Vec::new();
            push_events(1, 10, events.collect(), &mut news);
            let parts = news.iter().map(|control| match control {
                Control::CacheEvents { epoch: 1, first_seq, events } => (*first_seq, events.len()),
                other => panic!("{other:?}"),
            });
            assert_eq!(parts.collect::<Vec<_>>(), expected, "{counts:?}");
        };
        check(&[1, 2, 3], &[(10, 3)]);
        check(&[4096, 4096], &[(10, 1), (11, 1)]);
        check(&[4000, 96, 1, 4096], &[(10, 2), (12, 1), (13, 1)]);
        let check = |blocks: usize, expected: &[(usize, bool)]| {
            let blocks = vec![BlockHash(1); blocks];
            let mut news = Vec::new();
            push_snapshot(CacheSnapshot { epoch: 1, seq: 2, blocks }, &mut news);
            let parts = news.iter().map(|control| match control {
                Control::CacheSnapshot { epoch: 1, seq: 2, blocks, last } => (blocks.len(), *last),
                other => panic!("{other:?}"),
            });
            assert_eq!(parts.collect::<Vec<_>>(), expected);
        };
        check(0, &[(0, true)]);
        check(4096, &[(4096, true)]);
        check(10_000, &[(4096, false), (4096, false), (1808, true)]);
    }
}
