//! The page at `/`: plain files inside the program, and what keeps them up to date.
//!
//! The files say nothing of the cluster and need no key; what they show comes from `/v1/cluster/events`, which does.

mod events;
mod files;

pub(crate) use events::{Readers, events};
pub(crate) use files::{is_page, page};
