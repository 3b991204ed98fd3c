//! What each protocol calls the fields that errors tell of.
//!
//! Conversations and parameters are checked once for all protocols, and tell of fields as OpenAI's chat names them; who
//! writes an error says it in the client's words. Names that only one protocol has pass through.

use crate::shape::Protocol;

/// OpenAI's names in a chat, and what another protocol has for them.
type Names = &'static [(&'static str, &'static str)];

const RESPONSES: Names =
    &[("max_tokens", "max_output_tokens"), ("messages", "input"), ("reasoning_effort", "reasoning.effort")];
const ANTHROPIC: Names =
    &[("stop", "stop_sequences"), ("user", "metadata.user_id"), ("reasoning_effort", "output_config.effort")];
const OLLAMA: Names = &[
    ("max_tokens", "options.num_predict"),
    ("temperature", "options.temperature"),
    ("top_k", "options.top_k"),
    ("top_p", "options.top_p"),
    ("min_p", "options.min_p"),
    ("seed", "options.seed"),
    ("stop", "options.stop"),
    ("repetition_penalty", "options.repeat_penalty"),
    ("presence_penalty", "options.presence_penalty"),
    ("frequency_penalty", "options.frequency_penalty"),
    ("reasoning_effort", "think"),
];

impl Protocol {
    /// The client's name for a field, or for what is inside it.
    pub(crate) fn name(self, ours: &str) -> String {
        let (root, rest) = ours.split_at(ours.find(['.', '[']).unwrap_or(ours.len()));
        let named =
            |names: Names| names.iter().find(|(ours, _)| *ours == root).map_or(root, |(_, theirs)| theirs);
        // Tools are functions in an object of their own only at OpenAI's chat and at Ollama.
        let inside = |parameters: &str| match root {
            "tools" => rest.replacen(".function.parameters", parameters, 1).replacen(".function", "", 1),
            _ => rest.to_owned(),
        };
        match self {
            Self::OpenAi => ours.to_owned(),
            Self::Responses => format!("{}{}", named(RESPONSES), inside(".parameters")),
            Self::Anthropic => {
                let inside = inside(".input_schema").replace('[', ".").replace(']', "");
                format!("{}{inside}", named(ANTHROPIC))
            }
            Self::Ollama => format!("{}{rest}", named(OLLAMA)),
        }
    }

    /// A message that may begin with a field's name, with the client's name for it.
    pub(crate) fn message(self, field: &str, message: &str) -> String {
        // What is inside the field, too: `stop[0] has …` is about `stop`.
        let end = message.find([' ', ':']).unwrap_or(message.len());
        let (name, rest) = message.split_at(end);
        if name.starts_with(field) { format!("{}{rest}", self.name(name)) } else { message.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_the_names_of_their_protocol() {
        use Protocol::{Anthropic as A, Ollama as L, OpenAi as O, Responses as R};
        for (protocol, ours, theirs) in [
            (O, "tools[0].function.name", "tools[0].function.name"),
            (R, "max_tokens", "max_output_tokens"),
            (R, "max_output_tokens", "max_output_tokens"),
            (R, "messages", "input"),
            (R, "tools[2].function.parameters", "tools[2].parameters"),
            (R, "text.format", "text.format"),
            (A, "messages[0].content[1]", "messages.0.content.1"),
            (A, "stop[3]", "stop_sequences.3"),
            (A, "tools[2].function.parameters", "tools.2.input_schema"),
            (A, "tools[2].function.name", "tools.2.name"),
            (A, "max_tokens", "max_tokens"),
            (L, "temperature", "options.temperature"),
            (L, "stop[0]", "options.stop[0]"),
            (L, "options.stop[0]", "options.stop[0]"),
            (L, "tools[0].function.name", "tools[0].function.name"),
        ] {
            assert_eq!(protocol.name(ours), theirs, "{protocol:?} {ours}");
        }
    }

    #[test]
    fn messages_begin_with_them() {
        for (field, message, theirs) in [
            ("stop", "stop[0] has 0 bytes", "stop_sequences.0 has 0 bytes"),
            ("stop", "the stop strings", "the stop strings"),
            ("messages[0].content", "messages[0].content: a stop", "messages.0.content: a stop"),
            ("temperature", "temperature", "temperature"),
            ("tools", "", ""),
        ] {
            assert_eq!(Protocol::Anthropic.message(field, message), theirs, "{message}");
        }
    }
}
