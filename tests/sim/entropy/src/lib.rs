//! The system's random numbers, as far as a simulation is concerned: each thread's come from a seed.
//!
//! The two `getrandom` beside this stand in for those of the dependencies (ring's and quinn's), so that keys, connection
//! ids and everything else that QUIC draws are the same in each run. Not for anything but tests.

use rand::{RngCore, SeedableRng, rngs::SmallRng};
use std::cell::RefCell;

thread_local! {
    static RANDOM: RefCell<SmallRng> = RefCell::new(SmallRng::seed_from_u64(0));
}

/// Starts this thread's numbers anew.
pub fn seed(seed: u64) {
    RANDOM.with_borrow_mut(|random| *random = SmallRng::seed_from_u64(seed));
}

/// This thread's next numbers.
pub fn fill(bytes: &mut [u8]) {
    RANDOM.with_borrow_mut(|random| random.fill_bytes(bytes));
}
