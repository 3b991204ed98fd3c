//! Opens a `.gguf` file: header, configuration, tokenizer, and the list of tensors to be read later.

use super::{
    Checkpoint, LoadError, Parts, directory,
    fingerprint::WeightFile,
    gguf::Header,
    gguf_blocks::DataFile,
    gguf_config, gguf_tokenizer,
    quantization::Quantization,
    tensors::{Entry, Tensors},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    rc::Rc,
};

/// Opens the file at `path`.
pub(crate) fn open(path: &Path, progress: &mut dyn FnMut(&str, f32)) -> Result<Checkpoint, LoadError> {
    progress("metadata", 0.0);
    let header = Header::open(path)?;
    let (mut config, heads) = gguf_config::config(&header, path)?;

    progress("tokenizer", 0.3);
    let tokenizer = gguf_tokenizer::build(&header, path)?;
    config["bos_token_id"] = tokenizer.bos_token.into();
    config["eos_token_id"] = tokenizer.eos_tokens.clone().into();

    progress("weights", 0.9);
    let file = Rc::new(DataFile::open(path)?);
    let described = header
        .tensors
        .iter()
        .map(|tensor| format!("{} {:?} {:?}", tensor.name, tensor.encoding, tensor.shape));
    let described = [WeightFile { path, tensors: described.collect() }];
    let anew: BTreeSet<_> = header.tensors.iter().map(|tensor| tensor.encoding).collect();
    for encoding in anew.into_iter().filter(|encoding| encoding.packed_anew()) {
        let packing = encoding.packing().map(|packing| packing.to_string());
        tracing::warn!(?encoding, packing, "MLX does not know these weights: they are packed anew");
    }
    let mut entries = BTreeMap::new();
    for tensor in header.tensors {
        let (name, heads) = gguf_config::tensor_name(&tensor.name, heads);
        let unpermute_heads = heads.map(|heads| heads as usize);
        let rows = tensor.shape.first().map_or(0, |&rows| rows as usize);
        if unpermute_heads.is_some_and(|heads| rows == 0 || rows % (2 * heads) != 0) {
            let reason =
                format!("tensor {:?} has {rows} rows, which is not a number of whole heads", tensor.name);
            return Err(LoadError::damaged(path, reason));
        }
        let entry = if tensor.shape.len() < 2 {
            // Norms, biases and rotation factors: kilobytes.
            let array = file.read_dense(&tensor, unpermute_heads)?;
            Entry::Lazy { array, file: path.into() }
        } else {
            Entry::Gguf { file: file.clone(), unpermute_heads, tensor }
        };
        if entries.insert(name, entry).is_some() {
            return Err(LoadError::damaged(path, "it has a tensor twice"));
        }
    }
    let eos_tokens = directory::token_ids(&config, "eos_token_id");
    let origin = path.display().to_string();
    let tensors = Tensors::new(entries, Quantization::default(), origin);
    Checkpoint::from_parts(Parts { config, tensors, assets: tokenizer.assets, eos_tokens, files: &described })
}
