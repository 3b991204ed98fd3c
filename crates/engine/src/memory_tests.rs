//! [`Memory`] against a naive one: whole prefixes in a list, searched from end to end.

use super::*;
use proptest::prelude::*;
use std::time::Duration;
use types::{ClientId, SessionId};

/// Blocks of the pool: few, so that most operations evict something.
const BLOCKS: usize = 24;
/// Sequences at once.
const SEQUENCES: usize = 4;
/// Session names.
const SESSIONS: usize = 3;

/// A text: blocks of its own kind after blocks that all share, so that chains fork.
#[derive(Debug, Clone, Copy)]
struct Text {
    shared: usize,
    kind: u32,
    tokens: usize,
}

impl Text {
    fn tokens(self) -> Vec<TokenId> {
        let kind = |at: usize| if at < self.shared * BLOCK_TOKENS { 0 } else { self.kind };
        (0..self.tokens).map(|at| kind(at) * 1000 + at as u32).collect()
    }
}

#[derive(Debug, Clone)]
enum Operation {
    /// A new sequence in this place, unless there is one.
    Open(usize, Text),
    /// So many of its tokens are computed.
    Advance(usize, usize),
    /// It ends, and a session keeps what it left.
    Close(usize, Option<usize>),
    EndSession(usize),
    Expire,
}

#[derive(Debug)]
struct NaiveEntry {
    prefix: Vec<TokenId>,
    used: u64,
}

#[derive(Debug)]
struct NaiveSequence {
    tokens: Vec<TokenId>,
    computed: usize,
    stored: usize,
    blocks: usize,
}

#[derive(Debug)]
struct NaiveSession {
    name: usize,
    tokens: Vec<TokenId>,
    blocks: usize,
    used: u64,
}

/// In order of storing, so that parents are before their children.
#[derive(Debug, Default)]
struct Naive {
    entries: Vec<NaiveEntry>,
    sequences: [Option<NaiveSequence>; SEQUENCES],
    sessions: Vec<NaiveSession>,
    tick: u64,
}

impl Naive {
    fn find(&self, prefix: &[TokenId]) -> Option<usize> {
        self.entries.iter().position(|entry| entry.prefix == prefix)
    }

    fn matched(&self, tokens: &[TokenId], most: usize) -> usize {
        (0..most).take_while(|blocks| self.find(&tokens[..(blocks + 1) * BLOCK_TOKENS]).is_some()).count()
    }

    fn use_up_to(&mut self, tokens: &[TokenId], from: usize, to: usize) {
        self.tick += 1;
        for blocks in from..to {
            let index = self.find(&tokens[..(blocks + 1) * BLOCK_TOKENS]).expect("stored");
            self.entries[index].used = self.tick;
        }
    }

    fn is_used(&self, prefix: &[TokenId]) -> bool {
        let uses = |sequence: &NaiveSequence| {
            prefix.len() <= sequence.stored * BLOCK_TOKENS && sequence.tokens.starts_with(prefix)
        };
        self.sequences.iter().flatten().any(uses)
    }

    fn is_pinned(&self, prefix: &[TokenId]) -> bool {
        let pins = |session: &NaiveSession| {
            prefix.len() <= session.blocks * BLOCK_TOKENS && session.tokens.starts_with(prefix)
        };
        self.sessions.iter().any(pins)
    }

    fn free(&self) -> usize {
        let own = |sequence: &NaiveSequence| sequence.blocks - sequence.stored;
        BLOCKS - self.entries.len() - self.sequences.iter().flatten().map(own).sum::<usize>()
    }

    fn unused(&self) -> usize {
        self.entries.iter().filter(|entry| !self.is_used(&entry.prefix)).count()
    }

    /// A block is taken; false where none can be had.
    fn take(&mut self) -> bool {
        if self.free() > 0 {
            return true;
        }
        if self.unused() == 0 {
            return false;
        }
        loop {
            let leaf = |entry: &&NaiveEntry| {
                let parent = |other: &NaiveEntry| {
                    other.prefix.len() > entry.prefix.len() && other.prefix.starts_with(&entry.prefix)
                };
                !self.entries.iter().any(parent)
                    && !self.is_used(&entry.prefix)
                    && !self.is_pinned(&entry.prefix)
            };
            // The first of those used at one time was stored first.
            let oldest = self.entries.iter().filter(leaf).min_by_key(|entry| entry.used);
            if let Some(prefix) = oldest.map(|entry| entry.prefix.clone()) {
                self.entries.retain(|entry| entry.prefix != prefix);
                return true;
            }
            let longest_unused = self.sessions.iter_mut().min_by_key(|session| session.used).expect("a pin");
            longest_unused.blocks -= 1;
            self.sessions.retain(|session| session.blocks > 0);
        }
    }

    fn pinned(&self) -> usize {
        self.entries.iter().filter(|entry| self.is_pinned(&entry.prefix)).count()
    }
}

fn session(name: usize) -> SessionKey {
    (ClientId(1), SessionId::try_from(format!("session-{name}")).expect("a valid name"))
}

fn operation() -> impl Strategy<Value = Operation> {
    let text =
        (0..4_usize, 1..4_u32, 1..300_usize).prop_map(|(shared, kind, tokens)| Text { shared, kind, tokens });
    let place = 0..SEQUENCES;
    prop_oneof![
        3 => (place.clone(), text).prop_map(|(place, text)| Operation::Open(place, text)),
        6 => (place.clone(), 1..200_usize).prop_map(|(place, tokens)| Operation::Advance(place, tokens)),
        3 => (place, proptest::option::of(0..SESSIONS))
            .prop_map(|(place, session)| Operation::Close(place, session)),
        1 => (0..SESSIONS).prop_map(Operation::EndSession),
        1 => Just(Operation::Expire),
    ]
}

fn run(operations: &[Operation]) {
    let quota = BLOCKS / 3;
    let settings = EngineSettings {
        session_quota: quota as f64 / BLOCKS as f64,
        session_ttl: Duration::from_secs(10),
        ..EngineSettings::default()
    };
    let mut memory = Memory::new(BLOCKS, &settings);
    let mut held: [Option<Held>; SEQUENCES] = Default::default();
    let mut naive = Naive::default();
    let root = BlockHash::root(&[b"test"]);
    let begin = Instant::now();
    for (second, operation) in operations.iter().enumerate() {
        let now = begin + Duration::from_secs(second as u64);
        match operation {
            Operation::Open(place, text) if held[*place].is_none() => {
                let tokens = text.tokens();
                let mut new = Held::new(Some(root), &tokens);
                let adopted = memory.adopt(&mut new, tokens.len());
                let matched = naive.matched(&tokens, (tokens.len() - 1) / BLOCK_TOKENS);
                assert_eq!(adopted, matched * BLOCK_TOKENS, "blocks found");
                naive.use_up_to(&tokens, 0, matched);
                held[*place] = Some(new);
                let computed = adopted;
                naive.sequences[*place] =
                    Some(NaiveSequence { tokens, computed, stored: matched, blocks: matched });
            }
            Operation::Advance(place, more) => {
                let Some(held) = &mut held[*place] else { continue };
                let wanted =
                    naive.sequences[*place].as_ref().map(|own| (own.computed + more).min(own.tokens.len()));
                let wanted = wanted.expect("held");
                let fitting = memory.grow(held, wanted);
                while let Some(own) = &mut naive.sequences[*place]
                    && own.blocks * BLOCK_TOKENS < wanted
                {
                    if !naive.take() {
                        break;
                    }
                    naive.sequences[*place].as_mut().expect("held").blocks += 1;
                }
                let own = naive.sequences[*place].as_mut().expect("held");
                assert_eq!(fitting, wanted.min(own.blocks * BLOCK_TOKENS), "tokens that fit");
                own.computed = own.computed.max(fitting);
                let (tokens, computed) = (own.tokens.clone(), own.computed);
                memory.store(held, &tokens, computed);
                for blocks in own.stored..computed / BLOCK_TOKENS {
                    let prefix = tokens[..(blocks + 1) * BLOCK_TOKENS].to_vec();
                    if naive.find(&prefix).is_some() {
                        naive.use_up_to(&tokens, blocks, blocks + 1);
                    } else {
                        naive.entries.push(NaiveEntry { prefix, used: naive.tick });
                    }
                    naive.sequences[*place].as_mut().expect("held").stored = blocks + 1;
                }
            }
            Operation::Close(place, name) => {
                let Some(mut held) = held[*place].take() else { continue };
                let own = naive.sequences[*place].as_ref().expect("held");
                let (tokens, stored) = (own.tokens.clone(), own.stored);
                if let Some(name) = *name {
                    memory.keep(session(name), &held, now);
                    naive.sessions.retain(|session| session.name != name);
                    let blocks = stored.min(quota);
                    if blocks > 0 {
                        naive.sessions.push(NaiveSession {
                            name,
                            tokens: tokens.clone(),
                            blocks,
                            used: second as u64,
                        });
                        while naive.pinned() > quota {
                            let oldest =
                                naive.sessions.iter().map(|session| session.used).min().expect("one");
                            naive.sessions.retain(|session| session.used != oldest);
                        }
                    }
                }
                memory.release(&mut held);
                naive.use_up_to(&tokens, 0, stored);
                naive.sequences[*place] = None;
            }
            Operation::EndSession(name) => {
                let was = naive.sessions.iter().any(|session| session.name == *name);
                assert_eq!(memory.end_session(&session(*name)), was, "whether there was a session");
                naive.sessions.retain(|session| session.name != *name);
            }
            Operation::Expire => {
                memory.expire(now);
                naive.sessions.retain(|session| second as u64 - session.used < 10);
            }
            Operation::Open(..) => {}
        }
        memory.check(held.iter().flatten());
        assert_eq!(memory.cached(), naive.entries.len(), "cached blocks after {operation:?}");
        assert_eq!(memory.available(), naive.free() + naive.unused(), "available after {operation:?}");
        for entry in &naive.entries {
            let found = memory.matched(&Held::new(Some(root), &entry.prefix).chain).0;
            assert_eq!(found * BLOCK_TOKENS, entry.prefix.len(), "after {operation:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn memory_does_what_a_naive_one_does(operations in proptest::collection::vec(operation(), 1..120)) {
        run(&operations);
    }
}
