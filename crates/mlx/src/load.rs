//! From a model's files to something that generates.

pub(crate) mod inspect;
pub(crate) mod layout;

use crate::{
    checkpoint::{self, Checkpoint, LoadError},
    kernels,
    layers::{Compute, Path},
    models::{self, Family, Part, Spec},
    native,
    products::Products,
    runner::Runner,
    selftest,
};
use engine::{Model, ModelLimits};
use mlx_rs::{Device, DeviceType, Dtype, transforms::eval};
use std::path::PathBuf;
use types::{BLOCK_TOKENS, BlockHash, ModelAssets, ModelCard, TokenId};

/// Whether quantized weights are turned into dense ones at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dequantize {
    /// On a CPU, where quantized products do not use BLAS and grow with the batch; not on a GPU.
    #[default]
    Auto,
    /// Keep them as they are.
    Never,
    /// Always.
    Always,
}

/// What to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The GPU where there is one.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU; an error where there is none.
    Gpu,
}

/// What to load and how.
#[derive(Debug, Clone)]
pub struct LoadSettings {
    /// A folder or a `.gguf` file.
    pub model: PathBuf,
    /// The name that clients ask for.
    pub name: String,
    /// Sequences at once.
    pub slots: usize,
    /// Tokens of context, if fewer than the model's own.
    pub context_tokens: Option<usize>,
    /// Bytes for KV; by default a part of what the weights leave.
    pub kv_bytes: Option<u64>,
    /// Bits of a key's or value's element, 4 or 8; by default they are kept as they are computed. Packed KV is computed
    /// with by MLX's operations alone, which are slower than ours.
    pub kv_bits: Option<i32>,
    /// Whether the files are held to their checksums first.
    pub verify: bool,
    /// What to do with quantized weights.
    pub dequantize: Dequantize,
    /// What to compute on.
    pub device: DeviceChoice,
}

/// Of the memory that the weights leave, the share that KV may take: activations and the system need the rest.
const KV_SHARE: f64 = 0.6;
/// From how many rows on CUDA's quantized products are slower than turning the weight into a dense one first (measured on
/// an H100, `docs/performance.md`); Metal's are not.
const CUDA_DENSE_ROWS: i32 = 8;
/// Up to how many rows our own products of dense weights are taken: two tiles, for which they read the weight as fast as
/// cuBLAS does, without its time on the host.
const DENSE_PRODUCT_ROWS: i32 = 16;
/// The same of weights in 4 bits: a step of 64 rows took longer so than by dequantizing, one of 16 a third of the time.
const FOUR_BIT_PRODUCT_ROWS: i32 = 32;
/// A context below this many tokens is of no use; with less memory than for that, loading fails.
const CONTEXT_MIN: usize = 1024;
/// Freed buffers that MLX keeps for reuse on a GPU: some steps' activations.
const GPU_CACHE_BYTES: usize = 1 << 30;
/// Memory assumed where the system does not tell how much there is.
const KV_BYTES_UNKNOWN: u64 = 4 << 30;
/// Groups of weights evaluated at once: enough for a moving progress bar, few enough to read files in long runs.
const EVALUATIONS: usize = 20;

/// Loads a model onto the calling thread, which must be the one that uses it.
///
/// # Errors
/// [`LoadError`] names the file, tensor or setting that is wrong, and the memory that is lacking.
pub fn load(
    settings: &LoadSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<(Box<dyn Model>, ModelAssets), LoadError> {
    let (runner, assets) = load_with(settings, None, progress)?;
    Ok((Box::new(runner), assets))
}

/// [`load`], by a path of the caller's choice.
fn load_with(
    settings: &LoadSettings,
    path: Option<Path>,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<(Runner, ModelAssets), LoadError> {
    let opened = Opened::new(settings, path, progress)?;
    let part = Part::of(&opened.spec, &(0..opened.spec.layers.len()))?;
    let loaded = opened.load(part, settings, progress)?;
    let blocks = loaded.blocks;
    loaded.runner(settings, blocks)
}

/// A model's files, and how it is to be computed; no weight was read yet.
pub(crate) struct Opened {
    checkpoint: Checkpoint,
    pub(crate) spec: Spec,
    pub(crate) compute: Compute,
    on_gpu: bool,
}

/// The weights of a model, or of a part of it, and the memory that they leave.
pub(crate) struct Loaded {
    pub(crate) family: Box<dyn Family>,
    pub(crate) assets: ModelAssets,
    eos_tokens: Vec<TokenId>,
    created_s: u64,
    root: BlockHash,
    pub(crate) path: Path,
    /// Blocks of KV that there is room for.
    pub(crate) blocks: usize,
}

impl Opened {
    pub(crate) fn new(
        settings: &LoadSettings,
        path: Option<Path>,
        progress: &mut dyn FnMut(&str, f32),
    ) -> Result<Self, LoadError> {
        if settings.verify {
            checkpoint::verify(&settings.model, progress)?;
        }
        let checkpoint = Checkpoint::open(&settings.model, progress)?;
        let Placement { on_gpu, activations, dequantize } =
            Placement::of(&checkpoint, settings.device, settings.dequantize)?;
        let spec = models::spec(&checkpoint.config)?.with_kv_bits(settings.kv_bits)?;
        let spec = match settings.context_tokens {
            Some(tokens) => spec.within(tokens),
            None => spec,
        };
        let works = |path| selftest::works(path, activations, &spec);
        let path = path.unwrap_or_else(|| match on_gpu {
            _ if spec.kv_packing.is_some() => Path::Pure,
            true if spec.kernels_rotate() && kernels::fit(spec.heads) && works(Path::Kernel) => Path::Kernel,
            false if native::works() && works(Path::Native) => Path::Native,
            _ => Path::Pure,
        });
        let on_cuda = on_gpu && cfg!(target_os = "linux");
        let products = match on_cuda && path == Path::Kernel {
            true if dequantize || !checkpoint.tensors.quantized() => {
                let works = selftest::products_work(activations, true);
                Products { dense: if works { DENSE_PRODUCT_ROWS } else { 0 }, four_bits: 0 }
            }
            true => {
                let works = selftest::products_work(activations, false);
                Products { four_bits: if works { FOUR_BIT_PRODUCT_ROWS } else { 0 }, dense: 0 }
            }
            false if path == Path::Native => Products { dense: native::product_rows(), four_bits: 0 },
            false => Products::default(),
        };
        let dense_rows = if on_cuda { CUDA_DENSE_ROWS } else { i32::MAX };
        let compute = Compute { path, activations, dequantize, products, dense_rows };
        Ok(Self { checkpoint, spec, compute, on_gpu })
    }

    /// Names weights and the form of their KV: equal where both can be shared.
    pub(crate) fn root(&self) -> BlockHash {
        let packing = self.spec.kv_packing.map_or([0; 2], |packing| [packing.bits, packing.group_size]);
        let [bits, group_size] = packing.map(i32::unsigned_abs);
        self.checkpoint.fingerprint.child(&[self.compute.activations as u32, bits, group_size])
    }

    /// Reads the weights of a part.
    pub(crate) fn load(
        mut self,
        part: Part,
        settings: &LoadSettings,
        progress: &mut dyn FnMut(&str, f32),
    ) -> Result<Loaded, LoadError> {
        let (root, on_gpu) = (self.root(), self.on_gpu);
        let family = models::load(&mut self.checkpoint, self.spec, self.compute, part)?;
        let arrays = family.arrays();
        let weight_bytes: u64 = arrays.iter().map(|array| array.nbytes() as u64).sum();
        checkpoint::memory_check(weight_bytes)?;
        if on_gpu {
            // What was joined, and freed buffers of odd sizes later, would otherwise be kept up to the whole memory.
            mlx_rs::memory::set_cache_limit(GPU_CACHE_BYTES)?;
        }
        let chunk = arrays.len().div_ceil(EVALUATIONS).max(1);
        for (index, arrays) in arrays.chunks(chunk).enumerate() {
            eval(arrays.iter().copied())?;
            progress("weights", ((index + 1) * chunk) as f32 / (chunk * EVALUATIONS) as f32);
        }
        drop(self.checkpoint.tensors);

        let kv_bytes_per_token = family.dims().kv.bytes_per_token();
        if on_gpu {
            // Parts of what was joined are of no more use.
            mlx_rs::memory::clear_cache()?;
            // macOS unmaps what a GPU has not used for a second, and the next step would wait for the weights. KV stays
            // out of it: its pools are larger than what is used of them. Elsewhere this does nothing.
            if let Err(error) = mlx_rs::memory::set_wired_limit(weight_bytes as usize) {
                tracing::warn!(%error, weight_bytes, "the weights are not kept in the GPU's memory");
            }
        }
        let available = kv_memory(on_gpu, weight_bytes);
        let kv_bytes = settings.kv_bytes.unwrap_or((available as f64 * KV_SHARE) as u64);
        let blocks =
            (kv_bytes / (kv_bytes_per_token * BLOCK_TOKENS as u64)).min(u64::from(u32::MAX)) as usize;
        // As the engine counts, so that every request that fits the context fits the memory alone.
        let least = family.dims().context.min(CONTEXT_MIN).div_ceil(BLOCK_TOKENS);
        if blocks < least {
            return Err(LoadError::TooLittleMemory {
                needed: weight_bytes + (least * BLOCK_TOKENS) as u64 * kv_bytes_per_token,
                available: weight_bytes + kv_bytes,
            });
        }
        tracing::info!(
            model = settings.name,
            device = if on_gpu { "gpu" } else { "cpu" },
            weights_mb = weight_bytes >> 20,
            kv_tokens = blocks * BLOCK_TOKENS,
            layers = ?part.layers(),
            activations = ?self.compute.activations,
            path = ?self.compute.path,
            dequantize = self.compute.dequantize,
            "model loaded"
        );
        Ok(Loaded {
            family,
            assets: self.checkpoint.assets,
            eos_tokens: self.checkpoint.eos_tokens,
            created_s: self.checkpoint.created_s,
            root,
            path: self.compute.path,
            blocks,
        })
    }
}

impl Loaded {
    /// What routers need to know of it, with so many blocks of KV.
    pub(crate) fn card(&self, settings: &LoadSettings, blocks: usize) -> ModelCard {
        let dims = self.family.dims();
        let wanted_context = dims.context;
        let context = wanted_context.min(blocks * BLOCK_TOKENS);
        if context < wanted_context {
            tracing::warn!(
                context,
                wanted_context,
                blocks,
                "the context is cut to what the memory for KV holds"
            );
        }
        ModelCard {
            name: settings.name.clone(),
            root: self.root,
            context_tokens: context as u32,
            vocab_size: dims.vocabulary,
            eos_tokens: self.eos_tokens.clone(),
            assets: self.assets.hash(),
            created_s: self.created_s,
            kind: types::ModelKind::Generator,
        }
    }

    /// What computes, with so many blocks of KV: no more than there is room for.
    pub(crate) fn runner(
        self,
        settings: &LoadSettings,
        blocks: usize,
    ) -> Result<(Runner, ModelAssets), LoadError> {
        let card = self.card(settings, blocks);
        let dims = self.family.dims();
        let kv_bytes_per_token = dims.kv.bytes_per_token();
        let limits = ModelLimits { slots: settings.slots, blocks, kv_bytes_per_token };
        Ok((Runner::new(card, limits, self.family, self.path)?, self.assets))
    }
}

/// Opens an encoder's files and says how it is computed: by MLX's operations, with all tokens of some texts at once.
pub(crate) fn open_encoder(
    settings: &LoadSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<(Checkpoint, Compute), LoadError> {
    let checkpoint = Checkpoint::open(&settings.model, progress)?;
    let Placement { activations, dequantize, .. } =
        Placement::of(&checkpoint, settings.device, settings.dequantize)?;
    checkpoint::memory_check(checkpoint.bytes)?;
    let (products, dense_rows) = (Products::default(), i32::MAX);
    Ok((checkpoint, Compute { path: Path::Pure, activations, dequantize, products, dense_rows }))
}

/// Where a model computes, and with what numbers.
struct Placement {
    on_gpu: bool,
    activations: Dtype,
    dequantize: bool,
}

impl Placement {
    /// Makes the device that is chosen the default one.
    fn of(checkpoint: &Checkpoint, device: DeviceChoice, dequantize: Dequantize) -> Result<Self, LoadError> {
        let on_gpu = choose_device(device)?;
        let dequantize = match dequantize {
            Dequantize::Auto => !on_gpu,
            Dequantize::Never => false,
            Dequantize::Always => true,
        };
        let activations = if on_gpu { stored_dtype(checkpoint) } else { Dtype::Float32 };
        Ok(Self { on_gpu, activations, dequantize })
    }
}

/// Bytes of a number in dense weights and hidden states.
fn element_bytes(activations: Dtype) -> u64 {
    if activations == Dtype::Float32 { 4 } else { 2 }
}

/// Bytes that are left once the weights are loaded.
fn kv_memory(on_gpu: bool, weight_bytes: u64) -> u64 {
    if on_gpu && cfg!(target_os = "linux") {
        // MLX's own limit is what the card has; the system's memory says nothing of it.
        let limit = mlx_rs::memory::memory_limit().map_or(KV_BYTES_UNKNOWN, |bytes| bytes as u64);
        return limit.saturating_sub(weight_bytes);
    }
    let available = checkpoint::available_memory().unwrap_or(KV_BYTES_UNKNOWN);
    // macOS tells what a process may use in all, Linux what is free now, with the weights loaded.
    if cfg!(target_os = "macos") { available.saturating_sub(weight_bytes) } else { available }
}

/// Whether computation goes to a GPU, after making it the default or not.
fn choose_device(choice: DeviceChoice) -> Result<bool, LoadError> {
    let default = Device::try_default().and_then(|device| device.get_type());
    let has_gpu = matches!(default, Ok(DeviceType::Gpu));
    match choice {
        DeviceChoice::Auto => Ok(has_gpu),
        DeviceChoice::Gpu if has_gpu => Ok(true),
        DeviceChoice::Gpu => Err(LoadError::Config {
            reason: "device is \"gpu\", but this build of MLX finds none; use \"auto\" or \"cpu\"".to_owned(),
        }),
        DeviceChoice::Cpu => {
            Device::set_default(&Device::cpu());
            Ok(false)
        }
    }
}

/// The type that the model was published in: half precision is twice as fast on a GPU.
fn stored_dtype(checkpoint: &Checkpoint) -> Dtype {
    let named = ["torch_dtype", "dtype"].into_iter().find_map(|key| checkpoint.config.get(key)?.as_str());
    match named {
        Some("bfloat16") => Dtype::Bfloat16,
        Some("float32") => Dtype::Float32,
        _ => Dtype::Float16,
    }
}

#[cfg(test)]
mod tests;
