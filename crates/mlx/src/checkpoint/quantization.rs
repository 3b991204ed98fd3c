//! What a `config.json` says of quantization, as MLX's tools write it.

use super::LoadError;
use super::packed::{BITS, GROUP_SIZES, Mode, Packing};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, path::Path};

/// Entries of the object that are not layers.
const SETTINGS: [&str; 3] = ["group_size", "bits", "mode"];

/// A model's quantization, and the layers that differ.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Quantization {
    default: Option<Packing>,
    layers: BTreeMap<String, Option<Packing>>,
}

impl Quantization {
    /// Parses the `quantization` or `quantization_config` of a configuration read from `path`.
    pub(crate) fn parse(config: &Value, path: &Path) -> Result<Self, LoadError> {
        let section = ["quantization", "quantization_config"]
            .into_iter()
            .find_map(|key| config.get(key).filter(|value| !value.is_null()).map(|value| (key, value)));
        let Some((key, section)) = section else { return Ok(Self::default()) };
        let Value::Object(fields) = section else {
            return Err(LoadError::damaged(path, format!("{key:?} is not an object")));
        };
        // OpenAI's own files: experts in MXFP4, which are told by their tensors' names; everything else is dense.
        if fields.get("quant_method").and_then(Value::as_str) == Some("mxfp4") {
            return Ok(Self::default());
        }
        if let Some(method) = fields.get("quant_method") {
            return Err(LoadError::unsupported(
                path,
                format!(
                    "weights quantized with {method}; use a version made for MLX (hub: mlx-community), \
                     or the original weights"
                ),
            ));
        }
        let default = params(fields, key, path)?;
        let mut layers = BTreeMap::new();
        for (name, value) in fields.iter().filter(|(name, _)| !SETTINGS.contains(&name.as_str())) {
            let layer = match value {
                Value::Bool(false) => None,
                Value::Bool(true) => Some(default),
                Value::Object(fields) => Some(params(fields, name, path)?),
                // Notes that tools leave there.
                _ => continue,
            };
            layers.insert(name.clone(), layer);
        }
        Ok(Self { default: Some(default), layers })
    }

    /// How the layer of that name is packed, if it is.
    pub(crate) fn of(&self, prefix: &str) -> Option<Packing> {
        self.layers.get(prefix).copied().unwrap_or(self.default)
    }
}

fn params(fields: &Map<String, Value>, key: &str, path: &Path) -> Result<Packing, LoadError> {
    let named = fields.get("mode").map_or("affine", |mode| mode.as_str().unwrap_or_default());
    let Some(mode) = Mode::named(named) else {
        let known = Mode::ALL.map(Mode::name).join(", ");
        let reason = format!("the quantization mode {named:?} of {key:?}; supported: {known}");
        return Err(LoadError::unsupported(path, reason));
    };
    let (group_sizes, bits) = match mode.fixed() {
        Some((group_size, bits)) => (vec![group_size], vec![bits]),
        None => (GROUP_SIZES.to_vec(), BITS.to_vec()),
    };
    let number = |name: &str, allowed: &[i32]| match fields.get(name).and_then(Value::as_i64) {
        Some(value) if allowed.iter().any(|&known| i64::from(known) == value) => Ok(value as i32),
        _ => {
            let found = fields.get(name).unwrap_or(&Value::Null);
            let reason = format!("{name:?} of {key:?} is {found}; supported: {allowed:?}");
            Err(LoadError::unsupported(path, reason))
        }
    };
    Ok(Packing { group_size: number("group_size", &group_sizes)?, bits: number("bits", &bits)?, mode })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn checkpoint_quantization_is_read_as_published() {
        let check = |config: Value, layer: &str, expected: Option<(i32, i32)>| {
            let parsed = Quantization::parse(&config, Path::new("config.json")).unwrap();
            let found = parsed.of(layer).map(|params| (params.group_size, params.bits));
            assert_eq!(found, expected, "{layer} of {config}");
        };
        check(json!({}), "lm_head", None);
        check(json!({"quantization": null}), "lm_head", None);
        let plain = json!({"group_size": 64, "bits": 4});
        check(json!({"quantization": plain, "quantization_config": plain}), "lm_head", Some((64, 4)));
        check(json!({"quantization_config": plain}), "lm_head", Some((64, 4)));
        let mixed = json!({"quantization": {
            "group_size": 64, "bits": 4, "mode": "affine",
            "lm_head": false, "model.embed_tokens": {"group_size": 32, "bits": 8},
        }});
        check(mixed.clone(), "lm_head", None);
        check(mixed.clone(), "model.embed_tokens", Some((32, 8)));
        check(mixed, "model.layers.0.mlp.up_proj", Some((64, 4)));
        check(
            json!({"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}),
            "lm_head",
            Some((16, 4)),
        );
        check(json!({"quantization_config": {"quant_method": "mxfp4"}}), "lm_head", None);
    }

    #[test]
    fn checkpoint_quantization_refusals_name_what_is_wrong() {
        let check = |config: Value, words: &[&str]| {
            let error = Quantization::parse(&config, Path::new("dir/config.json")).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        check(
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            &["dir/config.json", "gptq", "mlx-community"],
        );
        check(
            json!({"quantization": {"group_size": 32, "bits": 4, "mode": "fp3"}}),
            &["fp3", "affine", "mxfp4"],
        );
        check(
            json!({"quantization": {"group_size": 64, "bits": 4, "mode": "mxfp4"}}),
            &["group_size", "64", "32"],
        );
        check(json!({"quantization": {"group_size": 48, "bits": 4}}), &["group_size", "48"]);
        check(json!({"quantization": {"group_size": 64}}), &["bits", "null"]);
        check(
            json!({"quantization": {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 7}}}),
            &["lm_head", "7"],
        );
        check(json!({"quantization": 4}), &["not an object"]);
    }
}
