//! Stands in for `getrandom` 0.2, as far as ring uses it.

/// Never comes.
#[derive(Debug, Clone, Copy)]
pub struct Error;

/// Fills `bytes`.
///
/// # Errors
/// None.
pub fn getrandom(bytes: &mut [u8]) -> Result<(), Error> {
    entropy::fill(bytes);
    Ok(())
}
