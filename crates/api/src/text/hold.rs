//! Markers in a text that arrives in pieces: what may yet become one is held back, and nothing more.

/// The end of a text that is the beginning of a marker: shorter than the longest of them.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    held: String,
}

impl Hold {
    /// Takes a character, gives those that belong to no marker to `plain`, and returns the marker that is complete now.
    /// None of the markers may be the beginning of another.
    pub(crate) fn feed<'a>(
        &mut self,
        char: char,
        markers: &[&[&'a str]],
        mut plain: impl FnMut(char),
    ) -> Option<&'a str> {
        self.held.push(char);
        while !self.held.is_empty() {
            let begun = markers.iter().copied().flatten().find(|marker| marker.starts_with(&self.held));
            match begun {
                Some(marker) if marker.len() == self.held.len() => {
                    self.held.clear();
                    return Some(marker);
                }
                Some(_) => return None,
                None => plain(self.held.remove(0)),
            }
        }
        None
    }

    /// Gives out what is held: no marker follows.
    pub(crate) fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
