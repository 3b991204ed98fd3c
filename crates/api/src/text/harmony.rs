//! gpt-oss's messages: each has a header that says what it is, and the answer is several of them.
//!
//! `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. A header that names a function
//! (`to=functions.NAME`) makes the message a call; what is in the channel `analysis` is reasoning; everything else is content.

use super::{Hold, Parts};

const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
/// What ends a message; a model's end of text may be among them, and then nothing comes of it.
const ENDS: [&str; 4] = ["<|end|>", "<|call|>", "<|return|>", START];
const START: &str = "<|start|>";
/// Says that what follows is constrained; a part of headers.
const CONSTRAIN: &str = "<|constrain|>";
/// Bytes of a header: a role, a channel, a recipient and a type.
const HEADER_BYTES_MAX: usize = 512;

/// Tells the messages of an answer apart.
#[derive(Debug)]
pub(crate) struct HarmonyParser {
    at: At,
    header: String,
    hold: Hold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first header, or between two messages. Text without one is content.
    Between,
    Header,
    Reasoning,
    Content,
    Call,
}

impl HarmonyParser {
    /// All markers of the format.
    pub(crate) const MARKERS: [&'static str; 7] =
        [CHANNEL, MESSAGE, CONSTRAIN, ENDS[0], ENDS[1], ENDS[2], START];

    /// Whether a chat template is of this format.
    pub(crate) fn is_of_template(source: &str) -> bool {
        source.contains(CHANNEL) && source.contains(MESSAGE)
    }

    pub(crate) fn new() -> Self {
        Self { at: At::Between, header: String::new(), hold: Hold::default() }
    }

    pub(crate) fn is_reasoning(&self) -> bool {
        self.at == At::Reasoning
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Parts) {
        for char in text.chars() {
            let mut plain = String::new();
            let marker = self.hold.feed(char, &[&Self::MARKERS], |char| plain.push(char));
            self.plain(&plain, out);
            if let Some(marker) = marker {
                self.marker(marker, out);
            }
        }
    }

    /// Gives out what is held back: nothing follows.
    pub(crate) fn finish(&mut self, out: &mut Parts) {
        let held = self.hold.take();
        self.plain(&held, out);
        match self.at {
            At::Call => out.call_end(),
            At::Header => out.content(&self.header),
            At::Between | At::Reasoning | At::Content => {}
        }
        self.at = At::Between;
    }

    fn plain(&mut self, text: &str, out: &mut Parts) {
        if text.is_empty() {
            return;
        }
        match self.at {
            At::Between if text.trim().is_empty() => {}
            At::Between => {
                self.at = At::Content;
                out.content(text);
            }
            At::Header => {
                self.header.push_str(text);
                if self.header.len() > HEADER_BYTES_MAX {
                    out.content(&std::mem::take(&mut self.header));
                    self.at = At::Content;
                }
            }
            At::Reasoning => out.reasoning(text),
            At::Content => out.content(text),
            At::Call => out.arguments(text),
        }
    }

    fn marker(&mut self, marker: &str, out: &mut Parts) {
        match (self.at, marker) {
            (At::Header, MESSAGE) => self.open(out),
            (At::Header, _) => self.header.push_str(if marker == CONSTRAIN { " " } else { marker }),
            (_, CHANNEL | START) => {
                self.close(out);
                self.at = At::Header;
                self.header = if marker == CHANNEL { marker.to_owned() } else { String::new() };
            }
            (_, _) if ENDS.contains(&marker) => {
                self.close(out);
                self.at = At::Between;
            }
            // Where no header is, it belongs to the text.
            (_, _) => self.plain(marker, out),
        }
    }

    /// A header is complete.
    fn open(&mut self, out: &mut Parts) {
        let header = std::mem::take(&mut self.header);
        let recipient = header.split_once("to=").map(|(_, rest)| rest);
        let recipient = recipient.map(|rest| rest.split([' ', '<']).next().unwrap_or_default());
        let channel = header.split_once(CHANNEL).map_or("", |(_, rest)| rest).trim_start();
        self.at = match recipient.filter(|recipient| !recipient.is_empty()) {
            Some(recipient) => {
                out.call(recipient.strip_prefix("functions.").unwrap_or(recipient));
                At::Call
            }
            None if channel.starts_with("analysis") => At::Reasoning,
            None => At::Content,
        };
    }

    fn close(&mut self, out: &mut Parts) {
        if self.at == At::Call {
            out.call_end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Part;
    use proptest::{collection::vec, prelude::*};

    fn parts<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
        let mut parser = HarmonyParser::new();
        let mut out = Parts::default();
        pieces.into_iter().for_each(|piece| parser.push(piece, &mut out));
        parser.finish(&mut out);
        out.0
    }

    #[test]
    fn messages_are_told_apart() {
        let check = |text: &str, expected: &[Part]| assert_eq!(parts([text]), expected, "{text}");
        let (reasoning, content) = (Part::Reasoning("Hm <|x".to_owned()), Part::Content("Yes.".to_owned()));
        let call = |name: &str, json: &str| {
            [Part::Call(name.to_owned()), Part::Arguments(json.to_owned()), Part::CallEnd]
        };
        let thought = "<|channel|>analysis<|message|>Hm <|x<|end|>";
        check(
            &format!("{thought}<|start|>assistant<|channel|>final<|message|>Yes."),
            &[reasoning.clone(), content.clone()],
        );
        check("<|channel|>final<|message|>Yes.<|return|>", std::slice::from_ref(&content));
        check("Yes.", std::slice::from_ref(&content));
        for header in [
            "<|channel|>commentary to=functions.time <|constrain|>json",
            " to=functions.time<|channel|>commentary json",
            "<|channel|>analysis to=functions.time code",
        ] {
            let text = format!("{thought}<|start|>assistant{header}<|message|>{{\"a\": 1}}<|call|>");
            check(&text, &[&[reasoning.clone()][..], &call("time", "{\"a\": 1}")].concat());
        }
        check("<|channel|>commentary<|message|>Yes.<|end|>", &[content]);
        check("<|channel|>final", &[Part::Content("<|channel|>final".to_owned())]);
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(
            fragments in vec(prop::sample::select([&HarmonyParser::MARKERS[..], &["analysis", "final", "to=functions.a ", "é", "<|", "x y", "{}"]].concat()), 0..16),
            cut in 0..200_usize,
        ) {
            let text = fragments.concat();
            let whole = parts([text.as_str()]);
            let cut = (0..=cut.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            prop_assert_eq!(parts([&text[..cut], &text[cut..]]), whole.clone());
            let chars: Vec<String> = text.chars().map(String::from).collect();
            prop_assert_eq!(parts(chars.iter().map(String::as_str)), whole.clone());
            let mut open = false;
            for part in &whole {
                match part {
                    Part::Call(_) => { prop_assert!(!open); open = true; }
                    Part::CallEnd => { prop_assert!(open); open = false; }
                    Part::Arguments(_) => prop_assert!(open),
                    Part::Content(_) | Part::Reasoning(_) => prop_assert!(!open),
                }
            }
            prop_assert!(!open);
        }
    }
}
