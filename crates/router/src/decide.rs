//! The decision: from a request, what is known of the nodes, and the time, to a route.

use crate::choice::{Candidate, Occasion, TIE_S};
use crate::cost::{Cost, Job};
use crate::index::Matches;
use crate::learned::DRIFT_MAX;
use crate::plan::Plan;
use crate::query::{Considered, Excluded, Route, RouteError, RouteQuery, RouteReason};
use crate::router::Router;
use crate::settings::Policy;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, EngineState};

/// The least time after which a refused client is asked to come back.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// The most: beyond it no prediction is worth much.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// How much slower than the best a node has to seem before it is tried for that alone: what is less does not keep requests
/// from it for long.
const SLOWER_MIN: f64 = 1.5;

impl Router {
    /// Where the request should go, or why nowhere.
    ///
    /// # Errors
    /// [`RouteError`], which tells "never heard of it", "not now" and "busy" apart.
    pub fn route(&self, query: &RouteQuery<'_>, now: Instant) -> Result<Route, RouteError> {
        self.route_after(query, &mut Plan::default(), now)
    }

    /// The same for one that waits behind others: for which of them which node is meant, `plan` knows. Where the node that
    /// is best for this one is full, that is [`RouteError::AllBusy`], and `plan` knows it from then on.
    ///
    /// # Errors
    /// See [`Self::route`].
    pub fn route_after(
        &self,
        query: &RouteQuery<'_>,
        plan: &mut Plan,
        now: Instant,
    ) -> Result<Route, RouteError> {
        plan.begin();
        let waits = self.settings.policy.waits();
        let mut free_s = None::<f64>;
        let mut all = self.candidates(query, plan, now);
        all.retain(|one| {
            if matches!(one.excluded, Some(Excluded::Full | Excluded::Refused)) {
                free_s = Some(free_s.map_or(one.first_token_s, |least| least.min(one.first_token_s)));
            }
            one.excluded.is_none() || waits && one.excluded == Some(Excluded::Full)
        });
        let occasion = Occasion {
            settings: &self.settings,
            hashes: query.hashes,
            prompt_tokens: query.prompt_tokens,
            session: query.session.and_then(|session| self.sessions.node(session)),
            turn: self.booked,
            usual: self.usual(),
            now,
        };
        let chosen = occasion.choose(&all);
        if let Some(one) = chosen.and_then(|best| self.trial(query, &all, &all[best], now)) {
            let cost = self.cost(one, one.matched_tokens, query, plan, now);
            return Ok(Route {
                node: one.node,
                matched_tokens: one.matched_tokens,
                cost,
                reason: RouteReason::Trial,
            });
        }
        match (chosen, free_s) {
            (Some(best), wait_s) => {
                let one = &all[best];
                let cost = self.cost(one, one.matched_tokens, query, plan, now);
                if one.excluded.is_some() {
                    plan.waits(one.node, cost.prefill_s, now);
                    return Err(busy(wait_s.unwrap_or(one.first_token_s)));
                }
                // It was the cache if without it another node would have been cheaper, or as cheap as makes no difference.
                let cold_s = self.cost(one, 0, query, plan, now).total_s();
                let cheaper =
                    |other: &Candidate<'_>| other.node != one.node && other.total_s <= cold_s + TIE_S;
                let reason = if all.len() == 1 {
                    RouteReason::OnlyNode
                } else if one.matched_tokens > 0 && all.iter().any(cheaper) {
                    RouteReason::Affinity
                } else {
                    RouteReason::LeastWork
                };
                Ok(Route { node: one.node, matched_tokens: one.matched_tokens, cost, reason })
            }
            (None, Some(wait_s)) => Err(busy(wait_s)),
            (None, None) => Err(self.no_node(query)),
        }
    }

    /// A node to be tried instead of the best one: one that is due, is taken to be slower than the best, and would begin as
    /// soon were it as wrong about itself as is believed possible at all. One that is merely without the prefix has nothing
    /// to prove.
    fn trial<'a, 'b>(
        &self,
        query: &RouteQuery<'_>,
        all: &'b [Candidate<'a>],
        best: &Candidate<'_>,
        now: Instant,
    ) -> Option<&'b Candidate<'a>> {
        if self.settings.policy != Policy::Cost {
            return None;
        }
        let pace = |one: &Candidate<'_>| {
            let work = one.known.work(self.usual(), 0.0, now);
            (work.predictor.read_s(f64::from(query.prompt_tokens)), work.step_s(1))
        };
        let (read_s, step_s) = pace(best);
        let seems_slower = |one: &Candidate<'_>| {
            let (its_read_s, its_step_s) = pace(one);
            its_read_s > read_s * SLOWER_MIN || its_step_s > step_s * SLOWER_MIN
        };
        let possible = |one: &&Candidate<'_>| {
            one.excluded.is_none()
                && one.node != best.node
                && one.first_token_s <= best.first_token_s.max(TIE_S) * DRIFT_MAX
                && one.known.is_due(self.booked, self.nodes.len())
                && seems_slower(one)
        };
        all.iter().filter(possible).min_by_key(|one| one.known.last_turn)
    }

    /// Whether some node that serves the model has room for one more: only then is it worth asking for who waits.
    pub fn has_room(&self, model: &str, now: Instant) -> bool {
        self.nodes.values().any(|known| {
            let work = || known.work(self.usual(), 0.0, now);
            known.is_ready() && known.serves(model) && known.lacks_room(&work(), &self.settings).is_none()
        })
    }

    /// What each node would cost, and why it cannot be chosen; in order of id.
    pub fn explain(&self, query: &RouteQuery<'_>, now: Instant) -> Vec<Considered> {
        let plan = Plan::default();
        let all = self.candidates(query, &plan, now).into_iter();
        let considered = all.map(|one| Considered {
            node: one.node,
            matched_tokens: one.matched_tokens,
            cost: self.cost(&one, one.matched_tokens, query, &plan, now),
            requests: one.requests,
            excluded: one.excluded,
        });
        considered.collect()
    }

    /// Seconds that reading its prompt would take where that is done soonest: what it brings to the queue.
    pub fn work_s(&self, query: &RouteQuery<'_>, now: Instant) -> f64 {
        let considered = self.explain(query, now).into_iter();
        let able = considered.filter(|one| one.excluded.is_none_or(|excluded| excluded == Excluded::Full));
        able.map(|one| one.cost.prefill_s).min_by(f64::total_cmp).unwrap_or(0.0)
    }

    fn shared_tokens(&self, query: &RouteQuery<'_>) -> u32 {
        (self.speculation.shared(query.hashes) * BLOCK_TOKENS) as u32
    }

    fn matches(&self, query: &RouteQuery<'_>) -> Matches {
        let mut matches = self.index.matches(query.hashes);
        self.speculation.matches(query.hashes, &mut matches);
        matches
    }

    /// All nodes as candidates, in order of id.
    fn candidates<'a>(&'a self, query: &RouteQuery<'_>, plan: &Plan, now: Instant) -> Vec<Candidate<'a>> {
        let (matches, shared_tokens) = (self.matches(query), self.shared_tokens(query));
        let tokens = u64::from(query.prompt_tokens) + u64::from(query.max_tokens);
        let mut fits_somewhere = false;
        let all = self.nodes.iter().map(|(&node, known)| {
            let card = known.card(query.model);
            let work = known.work(self.usual(), plan.planned_s(node), now);
            // The last token is always computed: its logits are the answer.
            let reusable = query.prompt_tokens.saturating_sub(1) as usize;
            let matched_tokens = (matches.blocks(known.slot) * BLOCK_TOKENS).min(reusable) as u32;
            let job = Job::new(query, matched_tokens, shared_tokens, self.answer_tokens);
            let cost = work.cost(&job, &self.settings.cost, self.token_s);
            let fits = card.is_some_and(|card| tokens <= u64::from(card.context_tokens));
            let excluded = if !known.is_ready() {
                Some(Excluded::NotReady)
            } else if card.is_none() {
                Some(Excluded::OtherModel)
            } else {
                fits_somewhere |= fits;
                if query.exclude.contains(&node) {
                    Some(Excluded::Tried)
                } else if !fits {
                    Some(Excluded::SmallContext)
                } else {
                    known.lacks_room(&work, &self.settings)
                }
            };
            let (requests, total_s, first_token_s) = (work.requests, cost.total_s(), cost.first_token_s());
            Candidate { node, known, matched_tokens, requests, total_s, first_token_s, excluded }
        });
        let mut all: Vec<_> = all.collect();
        if !fits_somewhere {
            // A node says so, with the numbers.
            for one in all.iter_mut().filter(|one| one.excluded == Some(Excluded::SmallContext)) {
                let work = one.known.work(self.usual(), 0.0, now);
                one.excluded = one.known.lacks_room(&work, &self.settings);
            }
        }
        all
    }

    fn cost(
        &self,
        one: &Candidate<'_>,
        matched_tokens: u32,
        query: &RouteQuery<'_>,
        plan: &Plan,
        now: Instant,
    ) -> Cost {
        let work = one.known.work(self.usual(), plan.planned_s(one.node), now);
        let job = Job::new(query, matched_tokens, self.shared_tokens(query), self.answer_tokens);
        work.cost(&job, &self.settings.cost, self.token_s)
    }

    fn no_node(&self, query: &RouteQuery<'_>) -> RouteError {
        let serving = || self.nodes.iter().filter(|(_, known)| known.serves(query.model));
        let waits =
            |known: &crate::KnownNode| !matches!(known.state, EngineState::Ready | EngineState::Pipeline(_));
        let unfinished = self.nodes.values().any(|known| known.models.is_empty() && waits(known));
        let reason = if self.nodes.is_empty() {
            "no node is connected".to_owned()
        } else if serving().next().is_none() && unfinished {
            "nodes are still loading their models".to_owned()
        } else if serving().next().is_none() && self.models_seen.contains(query.model) {
            "no connected node serves it any more".to_owned()
        } else if serving().next().is_none() {
            let served = self.models().into_iter().map(|card| card.name).collect();
            return RouteError::UnknownModel { model: query.model.to_owned(), served };
        } else {
            let states = serving().map(|(id, known)| match &known.state {
                EngineState::Loading => "a node is loading it".to_owned(),
                EngineState::Ready if query.exclude.contains(id) => {
                    "a node failed on this request".to_owned()
                }
                EngineState::Ready => "a node is ready".to_owned(),
                EngineState::Draining => "a node is leaving".to_owned(),
                EngineState::Restarting(seen) => format!("a node is restarting ({seen})"),
                EngineState::Pipeline(how) => how.clone(),
            });
            let states: BTreeSet<String> = states.collect();
            states.into_iter().collect::<Vec<_>>().join(", ")
        };
        RouteError::NoNode { reason }
    }
}

fn busy(wait_s: f64) -> RouteError {
    let wait = Duration::try_from_secs_f64(wait_s).unwrap_or(RETRY_AFTER_MAX);
    RouteError::AllBusy { retry_after: wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX) }
}
