//! What a placement needs to know of a member: how long layers take here, and how much room there is.
//!
//! Only the last layers are loaded: all kinds of layers but the first few of some mixtures of experts are among them, and
//! so are norm and head. Once with several layers and once with one: the difference is what layers take, the rest what a
//! pass takes beside them.

use super::times;
use crate::{
    checkpoint::LoadError,
    load::{LoadSettings, Opened},
    models::Part,
};
use std::ops::Range;
use types::{BLOCK_TOKENS, StageProfile};

/// Layers that are measured beside the last one: enough to tell them from the head, few enough to be read soon.
const LAYERS: usize = 4;
/// Of a pass's time in some layers, the least share that layers are taken to have: clocks and neighbours disturb.
const LAYERS_SHARE_MIN: f64 = 0.25;
/// Rows beyond these are not measured.
const ROWS_MAX: u32 = 128;
/// Tokens of KV beyond those of rows, so that the least that a model needs to be loaded is there.
const KV_TOKENS: usize = 1024;

/// Measures a model on the calling thread for a placement with up to `rows` rows: a few layers are loaded, and passes are
/// computed for some seconds at most. `memory_bytes` is what there is now, for everything.
///
/// # Errors
/// As loading the model would give it; [`LoadError::Config`] for a model with one layer.
pub fn measure(
    settings: &LoadSettings,
    rows: u32,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<StageProfile, LoadError> {
    let settings = LoadSettings { verify: false, ..settings.clone() };
    let opened = Opened::new(&settings, None, progress)?;
    let (layout, weights, memory_bytes) = (opened.layout(), opened.root(), opened.memory_bytes());
    let (count, path) = (layout.layers.len(), opened.compute.path);
    if count < 2 {
        let reason = format!("a model with {count} layers has no stages");
        return Err(LoadError::Config { reason });
    }
    let several = count - LAYERS.min(count - 1) - 1..count;
    let more = (several.len() - 1) as f64;
    let rows = rows.clamp(1, ROWS_MAX);
    let of_several = of_layers(opened, several, &settings, rows, progress)?;
    progress("measuring", 0.5);
    let opened = Opened::new(&settings, Some(path), progress)?;
    let of_one = of_layers(opened, count - 1..count, &settings, rows, progress)?;
    let (layer_s, head_s) = apart(&of_several, &of_one, more);
    Ok(StageProfile {
        memory_bytes,
        weights,
        layer_s,
        head_s,
        layer_bytes: layout.layers,
        embedding_bytes: layout.embedding,
        head_bytes: layout.head,
        hidden_bytes: layout.hidden,
        kv_bytes_per_token: layout.kv_per_token,
    })
}

/// Seconds of passes of rows in some of the last layers and what follows them.
fn of_layers(
    opened: Opened,
    layers: Range<usize>,
    settings: &LoadSettings,
    rows: u32,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<Vec<(u32, f64)>, LoadError> {
    let part = Part::of(&opened.spec, &layers)?;
    let tokens = KV_TOKENS + rows as usize * times::ROW_BLOCKS * BLOCK_TOKENS;
    let settings = LoadSettings {
        slots: rows as usize,
        kv_bytes: Some(tokens as u64 * opened.kv_bytes_per_token(layers)),
        ..settings.clone()
    };
    let loaded = opened.load(part, &settings, progress)?;
    let blocks = loaded.blocks;
    let (mut runner, _) = loaded.runner(&settings, blocks)?;
    Ok(times::of_rows(&mut runner)?)
}

type Times = Vec<(u32, f64)>;

/// Seconds of one layer, and of what is beside layers, of those of a pass in `1 + more` layers and in one.
fn apart(several: &[(u32, f64)], one: &[(u32, f64)], more: f64) -> (Times, Times) {
    let (mut layer_s, mut head_s): (Times, Times) = (Vec::new(), Vec::new());
    for &(rows, all_s) in several {
        // Measuring ends where there is no time left, not always at the same number of rows.
        let Some(&(_, one_s)) = one.iter().find(|entry| entry.0 == rows) else { break };
        let each = ((all_s - one_s) / more).max(LAYERS_SHARE_MIN * all_s / (1.0 + more));
        // More rows never take less.
        let before = |of: &Times| of.last().map_or(0.0, |entry| entry.1);
        let each = each.max(before(&layer_s));
        let beside = (one_s - each).max(0.0).max(before(&head_s));
        layer_s.push((rows, each));
        head_s.push((rows, beside));
    }
    (layer_s, head_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_what_is_beside_them_are_told_apart() {
        let check =
            |several: &[(u32, f64)], one: &[(u32, f64)], layer_s: &[(u32, f64)], head_s: &[(u32, f64)]| {
                let (layers, heads) = apart(several, one, 4.0);
                let same = |got: &[(u32, f64)], expected: &[(u32, f64)]| {
                    got.len() == expected.len()
                        && got.iter().zip(expected).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-9)
                };
                assert!(same(&layers, layer_s) && same(&heads, head_s), "{layers:?} {heads:?}");
            };
        check(
            &[(1, 0.05), (2, 0.07)],
            &[(1, 0.01), (2, 0.03)],
            &[(1, 0.01), (2, 0.01)],
            &[(1, 0.0), (2, 0.02)],
        );
        check(&[(1, 0.05), (2, 0.07)], &[(1, 0.03)], &[(1, 0.005)], &[(1, 0.025)]);
        // Where one layer seems to take longer than five, the shares are guessed.
        check(&[(1, 0.05)], &[(1, 0.06)], &[(1, 0.0025)], &[(1, 0.0575)]);
        check(
            &[(1, 0.05), (2, 0.04)],
            &[(1, 0.01), (2, 0.01)],
            &[(1, 0.01), (2, 0.01)],
            &[(1, 0.0), (2, 0.0)],
        );
    }
}
