//! Rotary position embedding: frequencies of the variants that Llama-like models use, and two ways to apply them.

use crate::{attention::Look, checkpoint::LoadError, layers::Path, native};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    fast,
    ops::{concatenate, cos, sin, zeros_dtype},
};
use serde::Deserialize;

/// `rope_scaling` of a `config.json`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub(crate) struct RopeScaling {
    #[serde(alias = "type", default)]
    pub(crate) rope_type: Option<String>,
    #[serde(default = "one")]
    pub(crate) factor: f32,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    pub(crate) original_max_position_embeddings: Option<f32>,
    /// LongRoPE: for each pair, what its wavelength is stretched by.
    long_factor: Option<Vec<f32>>,
    /// Of LongRoPE and YaRN, instead of what follows from the rest.
    attention_factor: Option<f32>,
    beta_fast: Option<f32>,
    beta_slow: Option<f32>,
    mscale: Option<f32>,
    pub(crate) mscale_all_dim: Option<f32>,
    /// YaRN: whether the ramp begins and ends at whole pairs.
    truncate: Option<bool>,
}

fn one() -> f32 {
    1.0
}

/// The rotations of a kind of layer, before any position is known.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Waves {
    /// Angular wavelengths `[rotated dimensions / 2]`: position `p` turns pair `i` by `p / lengths[i]`.
    pub(crate) lengths: Vec<f32>,
    /// What rotated dimensions are multiplied with.
    pub(crate) magnitude: f32,
}

/// What `rope_type`s there are.
const KINDS: [&str; 7] = ["default", "none", "linear", "llama3", "longrope", "su", "yarn"];

impl Waves {
    /// Of `rotated` dimensions, in a model of `context` tokens.
    ///
    /// # Errors
    /// A `rope_type` that is not known here, or that lacks a number.
    pub(crate) fn new(
        rotated: usize,
        theta: f32,
        scaling: Option<&RopeScaling>,
        context: usize,
    ) -> std::result::Result<Self, LoadError> {
        let plain: Vec<f32> =
            (0..rotated / 2).map(|pair| theta.powf(2.0 * pair as f32 / rotated as f32)).collect();
        let lengths_of = |lengths: Vec<f32>| Ok(Self { lengths, magnitude: 1.0 });
        let Some(scaling) = scaling else { return lengths_of(plain) };
        match scaling.rope_type.as_deref().unwrap_or("default") {
            "default" | "none" => lengths_of(plain),
            "linear" => lengths_of(plain.into_iter().map(|length| length * scaling.factor).collect()),
            "llama3" => lengths_of(plain.into_iter().map(|length| llama3(length, scaling)).collect()),
            "longrope" | "su" => long(plain, scaling, context),
            "yarn" | "deepseek_yarn" => Ok(yarn(plain, theta, scaling)),
            other => Err(LoadError::Config {
                reason: format!("rope_scaling.rope_type is {other:?}; supported: {}", KINDS.join(", ")),
            }),
        }
    }
}

/// LongRoPE (arXiv 2402.13753) with the factors for long texts, whatever the text's length: what is in the cache was
/// turned by them.
fn long(plain: Vec<f32>, scaling: &RopeScaling, context: usize) -> std::result::Result<Waves, LoadError> {
    let refused = |reason: String| Err(LoadError::Config { reason });
    let Some(factors) = &scaling.long_factor else {
        return refused("rope_scaling has no long_factor".to_owned());
    };
    let Some(original) = scaling.original_max_position_embeddings else {
        return refused("original_max_position_embeddings is missing, which longrope needs".to_owned());
    };
    if factors.len() != plain.len() {
        let (given, wanted) = (factors.len(), plain.len());
        return refused(format!("rope_scaling.long_factor has {given} numbers; {wanted} pairs are rotated"));
    }
    let stretch = context as f32 / original;
    let magnitude = match scaling.attention_factor {
        Some(factor) => factor,
        None if stretch <= 1.0 => 1.0,
        None => (1.0 + stretch.ln() / original.ln()).sqrt(),
    };
    let lengths = plain.into_iter().zip(factors).map(|(length, factor)| length * factor).collect();
    Ok(Waves { lengths, magnitude })
}

/// YaRN (arXiv 2309.00071): long waves are stretched, short ones kept, a ramp over pairs between.
fn yarn(plain: Vec<f32>, theta: f32, scaling: &RopeScaling) -> Waves {
    let dims = 2.0 * plain.len() as f32;
    let original = scaling.original_max_position_embeddings.unwrap_or(4096.0);
    // The pair that turns so often in the original context.
    let pair =
        |turns: f32| dims * (original / (turns * 2.0 * std::f32::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) =
        (pair(scaling.beta_fast.unwrap_or(32.0)), pair(scaling.beta_slow.unwrap_or(1.0)));
    if scaling.truncate.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
    if low == high {
        high += 0.001;
    }
    let lengths = plain.into_iter().enumerate().map(|(pair, kept)| {
        let ramp = ((pair as f32 - low) / (high - low)).clamp(0.0, 1.0);
        let stretched = kept * scaling.factor;
        stretched * kept / (stretched * (1.0 - ramp) + kept * ramp)
    });
    let ratio = match (scaling.mscale, scaling.mscale_all_dim) {
        (mscale, Some(all)) if all != 0.0 => {
            yarn_magnitude(scaling.factor, mscale.unwrap_or(1.0)) / yarn_magnitude(scaling.factor, all)
        }
        (mscale, _) => yarn_magnitude(scaling.factor, mscale.unwrap_or(1.0)),
    };
    Waves { lengths: lengths.collect(), magnitude: scaling.attention_factor.unwrap_or(ratio) }
}

/// What YaRN multiplies with where positions are stretched by `factor`.
pub(crate) fn yarn_magnitude(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
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
    magnitude: f32,
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
        magnitude: f32,
    },
    /// Our GPU kernels rotate what they read.
    Fused {
        wavelengths: &'a Array,
        half: i32,
    },
}

impl Rope {
    /// For heads of `dim` dimensions whose scores are multiplied with `scale`.
    pub(crate) fn new(path: Path, waves: &Waves, dim: i32, scale: f32) -> Self {
        let Waves { lengths, magnitude } = waves;
        let half = lengths.len() as i32;
        // Our GPU kernels know no magnitude: where whole heads are turned, it is a part of the scale.
        let scale = if 2 * half == dim { scale * magnitude * magnitude } else { scale };
        let numbers: Vec<f32> = lengths.iter().copied().chain([scale]).collect();
        let numbers = Array::from_slice(&numbers, &[half + 1]);
        let wavelengths = Array::from_slice(lengths, &[half]);
        Self { path, wavelengths, numbers, half, magnitude: *magnitude }
    }

    /// What our GPU kernels need to know of a layer that caps scores or has sinks, for that many query heads.
    pub(crate) fn numbers_with(&self, look: &Look, heads: i32) -> Result<Array> {
        let cap = Array::from_slice(&[look.cap.unwrap_or(0.0)], &[1]);
        let sinks = match &look.sinks {
            Some(sinks) => sinks.as_dtype(Dtype::Float32)?,
            None => zeros_dtype(&[heads], Dtype::Float32)?,
        };
        concatenate(&[&self.numbers, &cap, &sinks], 0)
    }

    /// Prepares rotations for tokens at `positions`.
    pub(crate) fn at(&self, positions: &[i32]) -> Result<StepRope<'_>> {
        let count = positions.len() as i32;
        match self.path {
            Path::Kernel => Ok(StepRope::Fused { wavelengths: &self.numbers, half: self.half }),
            Path::Pure => {
                let positions = Array::from_slice(positions, &[count]);
                let (wavelengths, half, magnitude) = (&self.wavelengths, self.half, self.magnitude);
                Ok(StepRope::Separate { positions, wavelengths, half, magnitude })
            }
            Path::Native => {
                let exact: Vec<f32> = positions.iter().map(|&position| position as f32).collect();
                let angles = Array::from_slice(&exact, &[count, 1, 1]).divide(&self.wavelengths)?;
                let (cos, sin) = (cos(&angles)?, sin(&angles)?);
                if self.magnitude == 1.0 {
                    return Ok(StepRope::Shared { cos, sin });
                }
                let magnitude = Array::from_f32(self.magnitude);
                Ok(StepRope::Shared { cos: cos.multiply(&magnitude)?, sin: sin.multiply(&magnitude)? })
            }
        }
    }
}

impl StepRope<'_> {
    /// Turns `x [tokens, heads, head_dim]`, each token by its position.
    pub(crate) fn apply(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Shared { cos, sin } => native::rope(x, cos, sin),
            Self::Separate { positions, wavelengths, half, magnitude } => {
                let (tokens, heads, dim) = (x.dim(0), x.dim(1), x.dim(2));
                // Contiguous: strided slices of a fused product crashed MLX 0.32.2's CUDA kernel.
                let rows = x.contiguous()?.reshape(&[tokens, heads, 1, dim])?;
                let rows = if *magnitude == 1.0 { rows } else { enlarged(&rows, 2 * half, *magnitude)? };
                let turned =
                    fast::rope_dynamic(rows, 2 * half, false, None, 1.0, positions, Some(*wavelengths))?;
                turned.reshape(&[tokens, heads, dim])
            }
            Self::Fused { .. } => Ok(x.clone()),
        }
    }
}

/// The first `rotated` of the last axis times `magnitude`.
fn enlarged(x: &Array, rotated: i32, magnitude: f32) -> Result<Array> {
    let dim = x.dim(-1);
    let factors: Vec<f32> = (0..dim).map(|at| if at < rotated { magnitude } else { 1.0 }).collect();
    x.multiply(Array::from_slice(&factors, &[dim]).as_dtype(x.dtype())?)
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
            let waves = Waves::new(16, 500_000.0, scaling, 8192).unwrap();
            let lengths = &waves.lengths;
            let key = mlx_rs::random::key(7).unwrap();
            let x = mlx_rs::random::normal::<f32>(&[5, 3, 16], None, None, &key).unwrap();
            // An angle of p radians in f32 is off by up to p · 6e-8 on either path.
            let positions = [0, 1, 17, 500, 4000];
            let separate = Rope::new(Path::Pure, &waves, 16, 1.0);
            let exact: Vec<f32> = positions.iter().map(|&position| position as f32).collect();
            let angles = Array::from_slice(&exact, &[5, 1, 1])
                .divide(Array::from_slice(lengths, &[lengths.len() as i32]))
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
        let plain = Waves::new(8, 10_000.0, None, 4096).unwrap().lengths;
        let check = |json: &str, expected: &dyn Fn(usize) -> f32| {
            let scaling: RopeScaling = serde_json::from_str(json).unwrap();
            let scaled = Waves::new(8, 10_000.0, Some(&scaling), 4096).unwrap().lengths;
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
        let unknown: RopeScaling = serde_json::from_str(r#"{"rope_type":"dynamic","factor":2.0}"#).unwrap();
        let error = Waves::new(8, 1e4, Some(&unknown), 4096).unwrap_err().to_string();
        assert!(error.contains("dynamic") && error.contains("llama3"), "{error}");
    }
}
