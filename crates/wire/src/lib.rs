//! What nodes, routers and engine children say to each other: messages, frames, their version and their limits.
//!
//! Data flows `message → encode → bytes` and `bytes → Decoder → message`; whoever owns a socket or a pipe moves the
//! bytes (`transport` between machines, `node` to its engine child). Nothing here does I/O or reads a clock.
//!
//! A connection's control stream starts with a [`preface`] that any version of this program can read, so that a peer
//! of another version can be refused by name. Changing what any message looks like in bytes means bumping [`VERSION`];
//! golden tests insist on it.
#![warn(missing_docs)]

mod codec;
mod frame;
mod message;
pub mod preface;

pub use codec::CodecError;
pub use frame::{Decoder, FrameClass, FrameError, HEADER_BYTES, encode};
pub use message::{Control, EngineCommand, EngineReport, Hello, Reply, Request};
pub use preface::PrefaceError;

/// The version of everything in this crate. Peers of different versions do not talk.
pub const VERSION: u32 = 8;
