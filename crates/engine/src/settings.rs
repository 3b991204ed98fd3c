//! [`EngineSettings`]: how an engine schedules and what it keeps.

use crate::Speculate;
use std::time::Duration;
use types::NodeRates;

/// Speed assumed of a machine that was not measured: a small CPU with a small model. Corrected within a few steps.
pub(crate) const RATES_UNMEASURED: NodeRates =
    NodeRates { prefill_tokens_per_s: 200.0, decode_step_s: 0.05, decode_row_s: 0.01 };
/// Targets above this mean "no hurry"; it keeps deadlines within what an `Instant` can hold.
pub(crate) const TARGET_MAX: Duration = Duration::from_secs(3600);

/// How an engine schedules and what it keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineSettings {
    /// Time from a request's arrival to its first token that is aimed at, for a prompt of no length.
    pub ttft_target: Duration,
    /// Time from token to token that is aimed at. A shorter one is used to read prompts faster.
    pub tpot_target: Duration,
    /// How long a session keeps its KV after its last request.
    pub session_ttl: Duration,
    /// Share of the KV that all sessions together may keep, from 0 to 1.
    pub session_quota: f64,
    /// Whether the KV of what was read and written is kept for other requests.
    pub prefix_cache: bool,
    /// When tokens are guessed ahead.
    pub speculation: Speculate,
    /// How fast the model was measured to be; corrected as it runs.
    pub rates: NodeRates,
    /// Measured seconds of decode steps, by rows: what `rates` say where empty.
    pub decode_step_s: Vec<(u32, f32)>,
}

impl Default for EngineSettings {
    /// One second to the first token and ten tokens a second: twice what people read.
    fn default() -> Self {
        Self {
            ttft_target: Duration::from_secs(1),
            tpot_target: Duration::from_millis(100),
            session_ttl: Duration::from_secs(30 * 60),
            session_quota: 0.5,
            prefix_cache: true,
            speculation: Speculate::Auto,
            rates: RATES_UNMEASURED,
            decode_step_s: Vec::new(),
        }
    }
}
