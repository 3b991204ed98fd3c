//! Kernels of our own for GPUs (`gpu/`), compiled by MLX at their first use: one text for CUDA and Metal.
//!
//! They read KV blocks where they lie and write new ones in place, which MLX's operations cannot. Used after
//! [`crate::selftest`] has compared what they compute with MLX's own operations on the device at hand.
#![expect(unsafe_code, reason = "calls of the C API, each with its conditions beside it")]

use crate::{
    attention::{Look, Qkv, RowGroup, Run, ShortRuns},
    kv::{KvPool, LayerKv},
    models::Heads,
};
use mlx_rs::{
    Array, Dtype, Stream,
    error::{Exception, Result},
};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::{CStr, CString},
};

/// Threads of a warp, on every device these kernels run on.
pub(crate) const WARP: i32 = 32;
/// Bytes of a thread group's memory that partial sums may take; the least that any device offers is 32 KiB.
const PARTIAL_BYTES_MAX: i32 = 16 << 10;
/// Thread groups of decoding below which each gets more warps: a GPU has about this many cores.
const GROUPS_FEW: i32 = 256;
/// Bytes of a thread group's memory that attention of tiles takes at most: what any device offers.
const TILE_BYTES_MAX: i32 = 32 << 10;
/// Queries of a tile, of all its heads: so many sums fit into a lane's registers.
const TILE_QUERIES_MAX: i32 = 16;
/// Tokens of a tile: more would fill up more where runs end.
const TILE_TOKENS_MAX: i32 = 8;
/// Tokens of a tile on matrix units, whose side it is.
const MATRIX_TILE_TOKENS: i32 = 16;
/// Warps that draw a row's token.
const SAMPLE_WARPS: i32 = 16;

/// A kernel's text, with the names by which it knows its arrays.
pub(crate) struct Source {
    pub(crate) name: &'static CStr,
    pub(crate) inputs: &'static [&'static CStr],
    pub(crate) outputs: &'static [&'static CStr],
    pub(crate) body: &'static str,
    /// Whether strided inputs are copied first; if not, the kernel is told their strides.
    pub(crate) contiguous: bool,
}

const ATTEND_ROWS: Source = Source {
    name: c"attend_rows",
    inputs: &[c"qkv", c"keys", c"values", c"rows", c"numbers", c"fence"],
    outputs: &[c"out", c"after"],
    body: include_str!("../gpu/attend_rows.h"),
    contiguous: false,
};
const APPEND_RUN: Source = Source {
    name: c"append_run",
    inputs: &[c"qkv", c"keys", c"values", c"table", c"numbers", c"fence"],
    outputs: &[c"all_keys", c"all_values", c"after"],
    body: include_str!("../gpu/append_run.h"),
    contiguous: false,
};
const TURN_RUN: Source = Source {
    name: c"turn_run",
    inputs: &[c"qkv", c"table", c"numbers"],
    outputs: &[c"turned"],
    body: include_str!("../gpu/turn_run.h"),
    contiguous: false,
};
const APPEND_TOKENS: Source = Source {
    name: c"append_tokens",
    inputs: &[c"qkv", c"keys", c"values", c"tiles", c"numbers", c"fence"],
    outputs: &[c"after"],
    body: include_str!("../gpu/append_tokens.h"),
    contiguous: false,
};
const ATTEND_TILES: Source = Source {
    name: c"attend_tiles",
    inputs: &[c"qkv", c"keys", c"values", c"tiles", c"numbers", c"fence"],
    outputs: &[c"out", c"after"],
    body: include_str!("../gpu/attend_tiles.h"),
    contiguous: false,
};
/// CUDA's own: it needs what `gpu/half.h` has.
const ATTEND_TILES_HALF: Source =
    Source { name: c"attend_tiles_half", body: include_str!("../gpu/attend_tiles_half.h"), ..ATTEND_TILES };
const SWIGLU: Source = Source {
    name: c"swiglu",
    inputs: &[c"x"],
    outputs: &[c"out"],
    body: include_str!("../gpu/swiglu.h"),
    contiguous: true,
};
const SAMPLE: Source = Source {
    name: c"sample",
    inputs: &[c"logits", c"draws", c"changes", c"late"],
    outputs: &[c"tokens"],
    body: include_str!("../gpu/sample.h"),
    contiguous: true,
};
const EMBED: Source = Source {
    name: c"embed",
    inputs: &[c"table", c"tokens"],
    outputs: &[c"out"],
    body: include_str!("../gpu/embed.h"),
    contiguous: true,
};
const RESERVE: Source =
    Source { name: c"reserve", inputs: &[c"x"], outputs: &[c"out"], body: "", contiguous: true };

/// A value fixed when a kernel is compiled.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Constant {
    Int(i32),
    Type(Dtype),
}

/// How often and with what one kernel runs.
pub(crate) struct Launch<'a> {
    /// Threads in all; a multiple of `group` in every direction.
    pub(crate) grid: [i32; 3],
    /// Threads of a group.
    pub(crate) group: [i32; 3],
    pub(crate) constants: &'a [(&'static CStr, Constant)],
    pub(crate) outputs: &'a [(&'a [i32], Dtype)],
}

/// Whether these kernels take such heads.
pub(crate) fn fit(heads: Heads) -> bool {
    let Heads { queries, keys, dim } = heads;
    queries % keys == 0 && dim % WARP == 0 && dim <= 256 && warps(dim, queries / keys, GROUPS_FEW) >= 1
}

/// Memory of a shape that nothing is written to.
pub(crate) fn reserve(shape: &[i32], dtype: Dtype) -> Result<Array> {
    let launch =
        Launch { grid: [WARP, 1, 1], group: [WARP, 1, 1], constants: &[], outputs: &[(shape, dtype)] };
    first(run(&RESERVE, &[&Array::from_slice(&[0_i32; 8], &[8])], &launch)?)
}

/// The rows `[tokens, width]` of a table that `tokens` name. MLX's own gather takes as long as a layer on CUDA.
pub(crate) fn embed(table: &Array, tokens: &Array) -> Result<Array> {
    let (rows, width) = (tokens.dim(0), table.dim(1));
    let launch = Launch {
        grid: [threads(width, 256), rows, 1],
        group: [256, 1, 1],
        constants: &[],
        outputs: &[(&[rows, width], table.dtype())],
    };
    first(run(&EMBED, &[table, tokens], &launch)?)
}

/// `silu(gate) · up` of `[rows, 2·n]` that holds gate and up side by side.
pub(crate) fn swiglu(x: &Array) -> Result<Array> {
    let (rows, width) = (x.dim(0), x.dim(1) / 2);
    let launch = Launch {
        grid: [threads(width, 256), rows, 1],
        group: [256, 1, 1],
        constants: &[(c"T", Constant::Type(x.dtype())), (c"WIDTH", Constant::Int(width))],
        outputs: &[(&[rows, width], x.dtype())],
    };
    first(run(&SWIGLU, &[x], &launch)?)
}

/// Rotates, appends and attends: rows of one token each, the first ones of `qkv`; `[rows, heads · head_dim]`.
pub(crate) fn attend_rows(
    qkv: &Qkv,
    kv: &mut KvPool,
    (layer, look): (usize, &Look),
    rows: &RowGroup,
    (numbers, half): (&Array, i32),
) -> Result<Array> {
    let Heads { queries, keys, dim } = qkv.heads();
    let (count, group) = (rows.count, queries / keys);
    let warps = warps(dim, group, count * keys);
    let [window, capped, sinks] = look.constants();
    let most = (c"WARPS_MAX", Constant::Int(warps_max(dim, group)));
    let appended = match &rows.appended {
        Some(table) => {
            let tile = (c"TILE", Constant::Int(1));
            Some(append_tokens(qkv, &kv.layers[layer], table, (numbers, half), tile, &kv.fence)?)
        }
        None => None,
    };
    let writes = (c"WRITES", Constant::Int(i32::from(appended.is_none())));
    let constants = qkv.constants(half, &[most, window, capped, sinks, writes]);
    let launch = Launch {
        grid: [keys * warps * WARP, count, 1],
        group: [warps * WARP, 1, 1],
        constants: &constants,
        outputs: &[(&[count, queries * dim], qkv.product.dtype()), (&[8], Dtype::Int32)],
    };
    let pool = &kv.layers[layer];
    let fence = appended.as_ref().unwrap_or(&kv.fence);
    let inputs = [&qkv.product, &pool.keys, &pool.values, &rows.table, numbers, fence];
    let [out, after] = exactly(run(&ATTEND_ROWS, &inputs, &launch)?)?;
    kv.fence = after;
    Ok(out)
}

/// Rotates and appends the tokens that a table of tiles names, see [`ShortRuns::table`]; the next fence.
fn append_tokens(
    qkv: &Qkv,
    pool: &LayerKv,
    table: &Array,
    (numbers, half): (&Array, i32),
    tile: (&'static CStr, Constant),
    fence: &Array,
) -> Result<Array> {
    let Heads { keys, dim, .. } = qkv.heads();
    let Constant::Int(tokens) = tile.1 else { return Err(Exception::custom("a tile has tokens")) };
    let launch = Launch {
        grid: [threads(dim, WARP), keys, threads(table.dim(0) * tokens, 8)],
        group: [WARP, 1, 8],
        constants: &qkv.constants(half, &[tile]),
        outputs: &[(&[8], Dtype::Int32)],
    };
    let inputs = [&qkv.product, &pool.keys, &pool.values, table, numbers, fence];
    first(run(&APPEND_TOKENS, &inputs, &launch)?)
}

/// Rotates and appends a run; returns queries `[1, heads, count, dim]`, and keys and values of everything up to its end,
/// `[1, kv_heads, length, dim]`.
pub(crate) fn append_run(
    qkv: &Qkv,
    kv: &mut KvPool,
    layer: usize,
    of: &Run,
    (numbers, half): (&Array, i32),
) -> Result<(Array, Array, Array)> {
    let Heads { queries, keys, dim } = qkv.heads();
    let dtype = qkv.product.dtype();
    let count = of.rows.1 - of.rows.0;
    let length = of.start as i32 + count;
    let all = [keys, length, dim];
    let constants = qkv.constants(half, &[]);
    let launch = Launch {
        grid: [threads(dim, WARP), threads(length, 8), keys],
        group: [WARP, 8, 1],
        constants: &constants,
        outputs: &[(&all, dtype), (&all, dtype), (&[8], Dtype::Int32)],
    };
    let pool = &kv.layers[layer];
    let inputs = [&qkv.product, &pool.keys, &pool.values, &of.table, numbers, &kv.fence];
    let [all_keys, all_values, after] = exactly(run(&APPEND_RUN, &inputs, &launch)?)?;
    kv.fence = after;
    let turn = Launch {
        grid: [threads(dim, WARP), threads(count, 8), queries],
        group: [WARP, 8, 1],
        constants: &constants,
        outputs: &[(&[1, queries, count, dim], dtype)],
    };
    let turned = first(run(&TURN_RUN, &[&qkv.product, &of.table, numbers], &turn)?)?;
    Ok((turned, all_keys.expand_dims(0)?, all_values.expand_dims(0)?))
}

impl Qkv {
    fn heads(&self) -> Heads {
        Heads { queries: self.heads, keys: self.kv_heads, dim: self.product.dim(2) }
    }

    /// What the kernels that read it are told: type, dimensions, query heads to a key-value head, key-value heads, pairs
    /// that are rotated.
    fn constants(&self, half: i32, more: &[(&'static CStr, Constant)]) -> Vec<(&'static CStr, Constant)> {
        let Heads { queries, keys, dim } = self.heads();
        let same = [
            (c"T", Constant::Type(self.product.dtype())),
            (c"D", Constant::Int(dim)),
            (c"G", Constant::Int(queries / keys)),
            (c"KV", Constant::Int(keys)),
            (c"HALF", Constant::Int(half)),
        ];
        same.into_iter().chain(more.iter().copied()).collect()
    }
}

impl Look {
    /// What the kernels are told when they are compiled.
    fn constants(&self) -> [(&'static CStr, Constant); 3] {
        let flag = |set: bool| Constant::Int(i32::from(set));
        [
            (c"WINDOW", Constant::Int(self.window.unwrap_or(0))),
            (c"CAPPED", flag(self.cap.is_some())),
            (c"SINKS", flag(self.sinks.is_some())),
        ]
    }
}

/// How tokens of short runs attend together; not at all where a device's memory does not suffice. `plain`: whether all
/// layers see everything and nothing else, which is all that the matrix units' kernel knows.
pub(crate) fn tile(heads: Heads, dtype: Dtype, plain: bool) -> Option<Tile> {
    let Heads { queries, keys, dim } = heads;
    let group = queries / keys;
    // As many as have registers: about 140 a lane, or 210.
    let warps_max = match dim {
        64 => 12,
        128 => 8,
        _ => 0,
    };
    let sets = (warps_max / group).min(4);
    if cfg!(not(target_os = "macos")) && dtype != Dtype::Float32 && sets > 0 && plain {
        return Some(Tile { tokens: MATRIX_TILE_TOKENS, kind: TileKind::Matrix { sets } });
    }
    let fits = |tokens: &i32| tokens.count_ones() == 1 && tokens * group <= TILE_QUERIES_MAX;
    let warps = |tokens: i32| {
        let rows = tokens * group;
        // Queries; for each warp weights, partial sums, and two numbers a query.
        (TILE_BYTES_MAX / 4 - rows * dim) / (rows * (WARP + dim + 2))
    };
    // Fewer tokens where heads are so large that more have no room.
    let tokens = (1..=TILE_TOKENS_MAX).rev().filter(fits).find(|&tokens| warps(tokens) >= 1)?;
    Some(Tile { tokens, kind: TileKind::Lanes { warps: warps(tokens).min(4) } })
}

/// See [`tile`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    /// Tokens of one.
    pub(crate) tokens: i32,
    pub(crate) kind: TileKind,
}

/// Which kernel attends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TileKind {
    /// A lane for each token of a block; so many warps share a context.
    Lanes { warps: i32 },
    /// CUDA's matrix units; so many sets of warps share a context.
    Matrix { sets: i32 },
}

/// Rotates, appends and attends: the tokens of short runs, `[tokens, heads · head_dim]`; only appends where the KV alone is
/// `wanted`.
pub(crate) fn attend_tiles(
    qkv: &Qkv,
    kv: &mut KvPool,
    (layer, look): (usize, &Look),
    runs: &ShortRuns,
    (numbers, half): (&Array, i32),
    wanted: bool,
) -> Result<Option<Array>> {
    let Heads { queries, keys, dim } = qkv.heads();
    let Tile { tokens, kind } = runs.tile;
    let (tiles, group) = (runs.table.dim(0), queries / keys);
    let pool = &kv.layers[layer];
    let tile = (c"TILE", Constant::Int(tokens));
    let appended = append_tokens(qkv, pool, &runs.table, (numbers, half), tile, &kv.fence)?;
    if !wanted {
        kv.fence = appended;
        return Ok(None);
    }
    let (source, warps, shared) = match kind {
        TileKind::Lanes { warps } => (&ATTEND_TILES, warps, (c"WARPS", Constant::Int(warps))),
        TileKind::Matrix { sets } => (&ATTEND_TILES_HALF, group * sets, (c"SETS", Constant::Int(sets))),
    };
    let [window, capped, sinks] = look.constants();
    let constants = match kind {
        TileKind::Lanes { .. } => qkv.constants(half, &[tile, shared, window, capped, sinks]),
        TileKind::Matrix { .. } if look.is_plain() => qkv.constants(half, &[tile, shared]),
        TileKind::Matrix { .. } => {
            return Err(Exception::custom(format!("the matrix units' kernel does not know {look:?}")));
        }
    };
    let attend = Launch {
        grid: [keys * warps * WARP, tiles, 1],
        group: [warps * WARP, 1, 1],
        constants: &constants,
        outputs: &[(&[tiles * tokens, queries * dim], qkv.product.dtype()), (&[8], Dtype::Int32)],
    };
    let inputs = [&qkv.product, &pool.keys, &pool.values, &runs.table, numbers, &appended];
    let [out, after] = exactly(run(source, &inputs, &attend)?)?;
    kv.fence = after;
    Ok(Some(out))
}

/// Draws one token a row, `[rows]` as i32. The logits `[rows, vocabulary]` must be used by nothing else.
pub(crate) fn sample(logits: &Array, draws: &Array, changes: &Array, late: &Array) -> Result<Array> {
    let rows = logits.dim(0);
    let launch = Launch {
        grid: [rows * SAMPLE_WARPS * WARP, 1, 1],
        group: [SAMPLE_WARPS * WARP, 1, 1],
        constants: &[(c"T", Constant::Type(logits.dtype())), (c"WARPS", Constant::Int(SAMPLE_WARPS))],
        outputs: &[(&[rows], Dtype::Int32)],
    };
    first(run(&SAMPLE, &[logits, draws, changes, late], &launch)?)
}

/// Threads for `count` things in groups of `group`.
fn threads(count: i32, group: i32) -> i32 {
    (count + group - 1) / group * group
}

/// Warps that share one row's context: more where there are few rows.
fn warps(dim: i32, group: i32, groups: i32) -> i32 {
    warps_max(dim, group).min(if groups < GROUPS_FEW { 16 } else { 8 })
}

/// Warps of a row whose partial sums there is memory for.
fn warps_max(dim: i32, group: i32) -> i32 {
    (PARTIAL_BYTES_MAX / (4 * group * dim)).min(16)
}

thread_local! {
    /// MLX's handles of the kernels in use, by name. Belongs to the thread that computes, as all of MLX's state does.
    static HANDLES: RefCell<BTreeMap<&'static CStr, Handle>> = const { RefCell::new(BTreeMap::new()) };
}

#[cfg(not(target_os = "macos"))]
use cuda as gpu;
use gpu::Handle;
#[cfg(target_os = "macos")]
use metal as gpu;

pub(crate) fn run(source: &Source, inputs: &[&Array], launch: &Launch<'_>) -> Result<Vec<Array>> {
    HANDLES.with_borrow_mut(|handles| {
        let handle = handles.entry(source.name).or_insert_with(|| Handle::new(source));
        let outputs = handle.apply(inputs, launch);
        outputs.ok_or_else(|| {
            let shapes: Vec<_> = inputs.iter().map(|input| input.shape().to_vec()).collect();
            Exception::custom(format!("the kernel {:?} on arrays of shapes {shapes:?} failed", source.name))
        })
    })
}

pub(crate) fn first(outputs: Vec<Array>) -> Result<Array> {
    exactly::<1>(outputs).map(|[output]| output)
}

fn exactly<const N: usize>(outputs: Vec<Array>) -> Result<[Array; N]> {
    outputs
        .try_into()
        .map_err(|outputs: Vec<Array>| Exception::custom(format!("{} outputs instead of {N}", outputs.len())))
}

/// The whole header of a kernel for one backend.
fn header(words: &str) -> CString {
    CString::new([words, include_str!("../gpu/group.h")].concat()).unwrap_or_default()
}

/// A C vector of strings, freed with it.
struct Names(mlx_sys::mlx_vector_string);

impl Names {
    fn new(names: &[&CStr]) -> Self {
        // SAFETY: a fresh vector, owned by the result.
        let vector = unsafe { mlx_sys::mlx_vector_string_new() };
        for name in names {
            // SAFETY: `vector` is live and copies the string.
            unsafe { mlx_sys::mlx_vector_string_append_value(vector, name.as_ptr()) };
        }
        Self(vector)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // SAFETY: made in `new`, not used afterwards.
        unsafe { mlx_sys::mlx_vector_string_free(self.0) };
    }
}

macro_rules! backend {
    ($module:ident, $kernel:ident, $config:ident, $new:ident, $free:ident, $apply:ident, $config_new:ident,
     $config_free:ident, $output:ident, $grid:ident, $group:ident, $int:ident, $dtype:ident, $words:expr, $prefix:expr,
     ($($extra:expr),*)) => {
        mod $module {
            use super::*;

            /// MLX's handle of a kernel.
            pub(super) struct Handle(mlx_sys::$kernel);

            impl Handle {
                pub(super) fn new(source: &Source) -> Self {
                    let (inputs, outputs) = (Names::new(source.inputs), Names::new(source.outputs));
                    let body = CString::new([$prefix, source.body].concat()).unwrap_or_default();
                    let header = header($words);
                    // SAFETY: all pointers are live for the call, which copies what it keeps.
                    Self(unsafe {
                        mlx_sys::$new(
                            source.name.as_ptr(),
                            inputs.0,
                            outputs.0,
                            body.as_ptr(),
                            header.as_ptr(),
                            source.contiguous,
                            $($extra),*
                        )
                    })
                }

                pub(super) fn apply(&self, inputs: &[&Array], launch: &Launch<'_>) -> Option<Vec<Array>> {
                    let stream = Stream::thread_local_or_default();
                    let [gx, gy, gz] = launch.grid;
                    let [tx, ty, tz] = launch.group;
                    // SAFETY: the configuration is fresh, filled with live pointers and freed below.
                    let (config, filled) = unsafe {
                        let config = mlx_sys::$config_new();
                        let mut filled = mlx_sys::$grid(config, gx, gy, gz) == 0
                            && mlx_sys::$group(config, tx, ty, tz) == 0;
                        for (shape, dtype) in launch.outputs {
                            let dtype = *dtype as mlx_sys::mlx_dtype;
                            filled &= mlx_sys::$output(config, shape.as_ptr(), shape.len(), dtype) == 0;
                        }
                        for (name, constant) in launch.constants {
                            filled &= match constant {
                                Constant::Int(value) => mlx_sys::$int(config, name.as_ptr(), *value) == 0,
                                Constant::Type(dtype) => {
                                    mlx_sys::$dtype(config, name.as_ptr(), *dtype as mlx_sys::mlx_dtype) == 0
                                }
                            };
                        }
                        (config, filled)
                    };
                    let outputs = crate::raw::call_many(inputs, |res, inputs| {
                        // SAFETY: live handles; the function keeps references of its own and fills `res`.
                        if filled { unsafe { mlx_sys::$apply(res, self.0, inputs, config, stream.as_ptr()) } } else { 1 }
                    });
                    // SAFETY: made above, not used afterwards.
                    unsafe { mlx_sys::$config_free(config) };
                    outputs
                }
            }

            impl Drop for Handle {
                fn drop(&mut self) {
                    // SAFETY: made in `new`, not used afterwards.
                    unsafe { mlx_sys::$free(self.0) };
                }
            }
        }
    };
}

#[cfg(not(target_os = "macos"))]
backend! {
    cuda, mlx_fast_cuda_kernel, mlx_fast_cuda_kernel_config, mlx_fast_cuda_kernel_new, mlx_fast_cuda_kernel_free,
    mlx_fast_cuda_kernel_apply, mlx_fast_cuda_kernel_config_new, mlx_fast_cuda_kernel_config_free,
    mlx_fast_cuda_kernel_config_add_output_arg, mlx_fast_cuda_kernel_config_set_grid,
    mlx_fast_cuda_kernel_config_set_thread_group, mlx_fast_cuda_kernel_config_add_template_arg_int,
    mlx_fast_cuda_kernel_config_add_template_arg_dtype, concat!(include_str!("../gpu/cuda.h"), include_str!("../gpu/half.h")), "", (0)
}

#[cfg(target_os = "macos")]
backend! {
    metal, mlx_fast_metal_kernel, mlx_fast_metal_kernel_config, mlx_fast_metal_kernel_new, mlx_fast_metal_kernel_free,
    mlx_fast_metal_kernel_apply, mlx_fast_metal_kernel_config_new, mlx_fast_metal_kernel_config_free,
    mlx_fast_metal_kernel_config_add_output_arg, mlx_fast_metal_kernel_config_set_grid,
    mlx_fast_metal_kernel_config_set_thread_group, mlx_fast_metal_kernel_config_add_template_arg_int,
    mlx_fast_metal_kernel_config_add_template_arg_dtype, include_str!("../gpu/metal.h"),
    // MLX gives a kernel those positions whose names are in its text.
    "// threadgroup_position_in_grid thread_position_in_threadgroup thread_position_in_grid threads_per_threadgroup\n", (false)
}
