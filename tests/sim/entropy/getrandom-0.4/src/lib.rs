//! Stands in for `getrandom` 0.4, as far as rand 0.10 uses it.

use rand_core::{TryCryptoRng, TryRng};
use std::fmt;

/// Never comes.
#[derive(Debug, Clone, Copy)]
pub struct Error;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no random numbers")
    }
}

impl std::error::Error for Error {}

/// The thread's numbers.
#[derive(Debug, Clone, Copy, Default)]
pub struct SysRng;

impl TryRng for SysRng {
    type Error = Error;

    fn try_next_u32(&mut self) -> Result<u32, Error> {
        let mut bytes = [0; 4];
        entropy::fill(&mut bytes);
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Error> {
        let mut bytes = [0; 8];
        entropy::fill(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        entropy::fill(bytes);
        Ok(())
    }
}

impl TryCryptoRng for SysRng {}
