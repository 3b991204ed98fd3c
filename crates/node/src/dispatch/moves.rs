//! What a router remembers of requests that did not stay where they were sent: counts, and the last few.

use std::collections::VecDeque;
use std::time::Instant;
use types::{MoveCounts, MoveKind, RequestMove};

/// Moves that are remembered one by one: what a person looks through.
const RECENT_MAX: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct Moves {
    pub(super) counts: MoveCounts,
    /// The newest last.
    recent: VecDeque<(Instant, RequestMove)>,
}

impl Moves {
    pub(super) fn note(&mut self, moved: RequestMove, now: Instant) {
        let count = match moved.kind {
            MoveKind::Retried => &mut self.counts.retried,
            MoveKind::Resumed => &mut self.counts.resumed,
            MoveKind::Hedged => &mut self.counts.hedged,
            MoveKind::HedgeWon => &mut self.counts.hedge_won,
        };
        *count += 1;
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((now, moved));
    }

    pub(super) fn recent(&self, now: Instant) -> Vec<RequestMove> {
        let age = |at: Instant| now.saturating_duration_since(at).as_secs_f32();
        self.recent.iter().map(|(at, moved)| RequestMove { age_s: age(*at), ..moved.clone() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use types::RequestId;

    #[test]
    fn all_are_counted_and_the_last_are_kept() {
        let (mut moves, start) = (Moves::default(), crate::dispatch::now());
        let kinds = [MoveKind::Retried, MoveKind::Resumed, MoveKind::Hedged, MoveKind::HedgeWon];
        for turn in 0..RECENT_MAX * 2 {
            let moved = RequestMove {
                request: RequestId(turn as u128),
                kind: kinds[turn % kinds.len()],
                from: "a".to_owned(),
                to: "b".to_owned(),
                tokens: 0,
                why: "lost".to_owned(),
                age_s: 0.0,
            };
            moves.note(moved, start + Duration::from_secs(turn as u64));
        }
        let each = RECENT_MAX as u64 / 2;
        let expected = MoveCounts { retried: each, resumed: each, hedged: each, hedge_won: each, tripped: 0 };
        assert_eq!(moves.counts, expected);
        let recent = moves.recent(start + Duration::from_secs(RECENT_MAX as u64 * 2));
        let requests: Vec<u128> = recent.iter().map(|moved| moved.request.0).collect();
        assert_eq!(requests, (RECENT_MAX as u128..RECENT_MAX as u128 * 2).collect::<Vec<_>>());
        assert_eq!((recent[0].age_s, recent[RECENT_MAX - 1].age_s), (RECENT_MAX as f32, 1.0));
    }
}
