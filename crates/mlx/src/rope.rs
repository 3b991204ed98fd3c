//! Rotary position embedding: frequencies of the variants that Llama-like models use, and two ways to apply them.

use crate::{checkpoint::LoadError, layers::Path, native};
use mlx_rs::{
    Array,
    error::Result,
    fast,
    ops::{concatenate, cos, sin},
};
use serde::Deserialize;

/// `rope_scaling` of a `config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct RopeScaling {
    #[serde(alias = "type", default)]
    rope_type: Option<String>,
    #[serde(default = "one")]
    factor: f32,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
}

fn one() -> f32 {
    1.0
}

/// Angular wavelengths `[head_dim / 2]`: position `p` turns pair `i` by `p / wavelengths[i]`.
///
/// # Errors
/// A `rope_type` that is not known here.
pub(crate) fn wavelengths(
    head_dim: usize,
    theta: f32,
    scaling: Option<&RopeScaling>,
) -> std::result::Result<Vec<f32>, LoadError> {
    let plain = (0..head_dim / 2).map(|pair| theta.powf(2.0 * pair as f32 / head_dim as f32));
    let Some(scaling) = scaling else { return Ok(plain.collect()) };
    match scaling.rope_type.as_deref().unwrap_or("default") {
        "default" | "none" => Ok(plain.collect()),
        "linear" => Ok(plain.map(|wavelength| wavelength * scaling.factor).collect()),
        "llama3" => Ok(plain.map(|wavelength| llama3(wavelength, scaling)).collect()),
        other => Err(LoadError::Config {
            reason: format!("rope_scaling.rope_type is {other:?}; supported: default, linear, llama3"),
        }),
    }
}

/// Llama 3.1's interpolation: long waves are stretched by `factor`, short ones kept, those between blended
/// (Meta's reference, `apply_scaling`).
fn llama3(wavelength: f32, scaling: &RopeScaling) -> f32 {
    let context = scaling.original_max_position_embeddings.unwrap_or(8192.0);
    let (low, high) = (scaling.low_freq_factor.unwrap_or(1.0), scaling.high_freq_factor.unwrap_or(4.0));
    let turns = context / (2.0 * std::f32::consts::PI * wavelength);
    if turns > high {
        wavelength
    } else if turns < low {
        wavelength * scaling.factor
    } else {
        let smooth = (turns - low) / (high - low);
        wavelength / ((1.0 - smooth) / scaling.factor + smooth)
    }
}

/// The rotations of one model.
#[derive(Debug)]
pub(crate) struct Rope {
    path: Path,
    wavelengths: Array,
    /// Wavelengths, then the scale of attention scores: what our GPU kernels need to know.
    numbers: Array,
    half: i32,
}

/// The rotations of one step's tokens.
#[derive(Debug)]
pub(crate) enum StepRope<'a> {
    Shared {
        cos: Array,
        sin: Array,
    },
    Separate {
        positions: Array,
        wavelengths: &'a Array,
        half: i32,
    },
    /// Our GPU kernels rotate what they read.
    Fused {
        wavelengths: &'a Array,
        half: i32,
    },
}

impl Rope {
    pub(crate) fn new(path: Path, wavelengths: &[f32], scale: f32) -> Self {
        let half = wavelengths.len() as i32;
        let numbers: Vec<f32> = wavelengths.iter().copied().chain([scale]).collect();
        let numbers = Array::from_slice(&numbers, &[half + 1]);
        Self { path, wavelengths: Array::from_slice(wavelengths, &[half]), numbers, half }
    }

    /// Prepares rotations for tokens at `positions`.
    pub(crate) fn at(&self, positions: &[i32]) -> Result<StepRope<'_>> {
        let count = positions.len() as i32;
        match self.path {
            Path::Kernel => Ok(StepRope::Fused { wavelengths: &self.numbers, half: self.half }),
            Path::Pure => {
                let positions = Array::from_slice(positions, &[count]);
                Ok(StepRope::Separate { positions, wavelengths: &self.wavelengths, half: self.half })
            }
            Path::Native => {
                let exact: Vec<f32> = positions.iter().map(|&position| position as f32).collect();
                let angles = Array::from_slice(&exact, &[count, 1, 1]).divide(&self.wavelengths)?;
                Ok(StepRope::Shared { cos: cos(&angles)?, sin: sin(&angles)? })
            }
        }
    }
}

impl StepRope<'_> {
    /// Turns `x [tokens, heads, head_dim]`, each token by its position.
    pub(crate) fn apply(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Shared { cos, sin } => native::rope(x, cos, sin),
            Self::Separate { positions, wavelengths, half } => {
                let (tokens, heads, dim) = (x.dim(0), x.dim(1), x.dim(2));
                // Contiguous: strided slices of a fused product crashed MLX 0.32.2's CUDA kernel.
                let rows = x.contiguous()?.reshape(&[tokens, heads, 1, dim])?;
                let turned =
                    fast::rope_dynamic(rows, 2 * half, false, None, 1.0, positions, Some(*wavelengths))?;
                turned.reshape(&[tokens, heads, dim])
            }
            Self::Fused { .. } => Ok(x.clone()),
        }
    }
}

/// The same by MLX's basic operations: turns the first `2 · half` dimensions of `x [tokens, heads, head_dim]` by angles `[tokens, 1, half]`.
pub(crate) fn rotate(x: &Array, cos: &Array, sin: &Array, half: i32) -> Result<Array> {
    let parts = x.split_at_indices(&[half, 2 * half], -1)?;
    let (first, second) = (&parts[0], &parts[1]);
    let turned = [
        first.multiply(cos)?.subtract(second.multiply(sin)?)?,
        second.multiply(cos)?.add(first.multiply(sin)?)?,
    ];
    // A partial rotation leaves the last dimensions as they are.
    match parts.get(2).filter(|rest| rest.dim(-1) > 0) {
        Some(rest) => concatenate(&[&turned[0], &turned[1], rest], -1),
        None => concatenate(&turned, -1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::ops::all_close;

    #[test]
    fn both_paths_agree() {
        let scaling: RopeScaling = serde_json::from_str(
            r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
                "original_max_position_embeddings":8192}"#,
        )
        .unwrap();
        for scaling in [None, Some(&scaling)] {
            let lengths = wavelengths(16, 500_000.0, scaling).unwrap();
            let key = mlx_rs::random::key(7).unwrap();
            let x = mlx_rs::random::normal::<f32>(&[5, 3, 16], None, None, &key).unwrap();
            // An angle of p radians in f32 is off by up to p · 6e-8 on either path.
            let positions = [0, 1, 17, 500, 4000];
            let separate = Rope::new(Path::Pure, &lengths, 1.0);
            let exact: Vec<f32> = positions.iter().map(|&position| position as f32).collect();
            let angles = Array::from_slice(&exact, &[5, 1, 1])
                .divide(Array::from_slice(&lengths, &[lengths.len() as i32]))
                .unwrap();
            let turned = [
                separate.at(&positions).unwrap().apply(&x).unwrap(),
                rotate(&x, &cos(&angles).unwrap(), &sin(&angles).unwrap(), lengths.len() as i32).unwrap(),
            ];
            let close = all_close(&turned[0], &turned[1], 1e-3, 1e-3, None).unwrap();
            assert!(close, "{} {}", turned[0], turned[1]);
        }
    }

    #[test]
    fn scaling_follows_the_definition() {
        let plain = wavelengths(8, 10_000.0, None).unwrap();
        let check = |json: &str, expected: &dyn Fn(usize) -> f32| {
            let scaling: RopeScaling = serde_json::from_str(json).unwrap();
            let scaled = wavelengths(8, 10_000.0, Some(&scaling)).unwrap();
            for (pair, value) in scaled.iter().enumerate() {
                assert!((value / expected(pair) - 1.0).abs() < 1e-6, "{json} {pair}: {value}");
            }
        };
        check(r#"{"type":"linear","factor":4.0}"#, &|pair| plain[pair] * 4.0);
        check(r#"{"rope_type":"default"}"#, &|pair| plain[pair]);
        // Wavelengths 1, 10, 100, 1000 turn 20.4, 2.04, 0.2 and 0.02 times in 128 positions.
        let llama3 = r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":128}"#;
        let smooth = (128.0 / (20.0 * std::f32::consts::PI) - 1.0) / 3.0;
        let blended = plain[1] / ((1.0 - smooth) / 8.0 + smooth);
        check(llama3, &|pair| [plain[0], blended, plain[2] * 8.0, plain[3] * 8.0][pair]);
        let unknown: RopeScaling = serde_json::from_str(r#"{"rope_type":"yarn","factor":2.0}"#).unwrap();
        let error = wavelengths(8, 1e4, Some(&unknown)).unwrap_err().to_string();
        assert!(error.contains("yarn") && error.contains("llama3"), "{error}");
    }
}
