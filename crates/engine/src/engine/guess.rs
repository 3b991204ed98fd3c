//! What an [`Engine`] guesses ahead of its rows, and whether it waits for tokens in order to.
//!
//! A guess needs the token before it, so a pass with guesses is planned once nothing that its rows draw is in flight, and
//! ends before the next one is planned: the device waits for the host meanwhile, which is a part of what guessing costs.

use super::{Engine, flight::Flight};
use crate::{
    cost::StepShape,
    scheduler::Part,
    speculation::{DraftRow, Proposal, Speculate, Stakes},
};

impl Engine {
    /// Whether `flight` is to be collected before the next pass is planned: it has guesses in it, or what comes after it is
    /// likely to be worth guessing.
    pub(super) fn is_awaited(&mut self, flight: &Flight) -> bool {
        if flight.has_guesses() {
            return true;
        }
        if self.settings.speculation == Speculate::Off {
            return false;
        }
        let (at, rows): (Vec<usize>, Vec<DraftRow<'_>>) = self
            .running
            .iter()
            .enumerate()
            .filter_map(|(index, sequence)| Some((index, sequence.draft_row(true)?)))
            .unzip();
        if rows.is_empty() {
            return false;
        }
        let proposals = self.speculation.propose(&rows);
        for (proposal, index) in proposals.iter().zip(at) {
            self.running[index].expect(proposal.as_ref().map(|draft| (draft.tokens[0], draft.why)));
        }
        // What may follow the token that is being drawn is known for those rows whose draft holds that token.
        let known =
            |proposal: &Option<Proposal>| proposal.as_ref().is_some_and(|draft| draft.tokens.len() > 1);
        if !proposals.iter().any(known) {
            return false;
        }
        let mut shape = StepShape::default();
        let decoding = self.running.iter().filter(|sequence| sequence.is_runnable() && sequence.decodes());
        decoding.for_each(|sequence| shape.add_row(sequence.submitted() + 1));
        let others = self.running.iter().filter(|sequence| sequence.is_runnable()).count() - proposals.len();
        let stakes = Stakes {
            when: self.settings.speculation,
            others,
            plain_s: self.cost.seconds(shape),
            drawing: 1,
            trusted: self.cost.trusted_drafts(),
        };
        let chosen = self
            .speculation
            .choose(&proposals, stakes, |drafts| self.cost.seconds(guessed(shape, drafts, true)));
        chosen.iter().any(|&tokens| tokens > 0)
    }

    /// Guesses tokens behind those of a pass of these parts, as many as pay and have blocks; returns the pass' shape with them.
    pub(super) fn guess(&mut self, parts: &[Part], shape: StepShape) -> StepShape {
        if self.settings.speculation == Speculate::Off {
            return shape;
        }
        let mut at = Vec::new();
        let mut rows = Vec::new();
        let vocab_size = self.model.card().vocab_size;
        for part in parts {
            if let Some(row) = self.running[part.index].draft_row(false) {
                at.push(part.index);
                rows.push(row);
            }
        }
        if rows.is_empty() {
            return shape;
        }
        let mut proposals = self.speculation.propose(&rows);
        for (proposal, &index) in proposals.iter_mut().zip(&at) {
            if let Some(draft) = proposal {
                let fitting = self.running[index].fitting(&draft.tokens, vocab_size);
                draft.truncate(fitting);
                if draft.tokens.is_empty() {
                    *proposal = None;
                }
            }
        }
        if proposals.iter().all(Option::is_none) {
            return shape;
        }
        let waits = !self.is_staged();
        let stakes = Stakes {
            when: self.settings.speculation,
            others: parts.len() - at.len(),
            plain_s: self.cost.seconds(shape),
            drawing: 0,
            trusted: self.cost.trusted_drafts(),
        };
        let chosen = self
            .speculation
            .choose(&proposals, stakes, |drafts| self.cost.seconds(guessed(shape, drafts, waits)));
        let mut count = 0;
        for ((proposal, tokens), index) in proposals.into_iter().zip(chosen).zip(at) {
            let Some(draft) = proposal.filter(|_| tokens > 0) else { continue };
            let sequence = &mut self.running[index];
            let before = sequence.submitted() + 1;
            let room = self.memory.grow(&mut sequence.held, before + tokens).saturating_sub(before);
            if room > 0 {
                sequence.guess(&draft.tokens[..room], draft.why);
                count += room;
            }
        }
        if count == 0 { shape } else { guessed(shape, count, waits) }
    }
}

/// The same pass with so many tokens guessed.
fn guessed(mut shape: StepShape, drafts: usize, waits: bool) -> StepShape {
    if drafts > 0 {
        shape.add_drafts(drafts);
        if waits {
            shape.wait();
        }
    }
    shape
}
