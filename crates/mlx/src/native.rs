//! CPU operations of our own (`cpp/native.cpp`), each one pass where MLX takes several; f32 only.
//!
//! Used on Linux after [`works`] has compared each with MLX's at start; everywhere else, and where a comparison fails,
//! MLX's operations are used.
#![cfg_attr(
    native_cpu,
    expect(unsafe_code, reason = "calls of our own C++, each checked for its shapes beside it")
)]

use mlx_rs::{Array, error::Result};

#[cfg(native_cpu)]
mod ffi {
    use mlx_sys::{mlx_array, mlx_stream};
    use std::ffi::{c_float, c_int};

    unsafe extern "C" {
        pub(super) fn mlx_node_swiglu(res: *mut mlx_array, x: mlx_array, stream: mlx_stream) -> c_int;
        pub(super) fn mlx_node_rms_norm(
            res: *mut mlx_array,
            x: mlx_array,
            weight: mlx_array,
            eps: c_float,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) safe fn mlx_node_product_rows() -> c_int;
        pub(super) fn mlx_node_product(
            res: *mut mlx_array,
            x: mlx_array,
            weight: mlx_array,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) fn mlx_node_rope(
            res: *mut mlx_array,
            x: mlx_array,
            cos: mlx_array,
            sin: mlx_array,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) fn mlx_node_attend_rows(
            res: *mut mlx_array,
            q: mlx_array,
            k: mlx_array,
            v: mlx_array,
            keys: mlx_array,
            values: mlx_array,
            rows: mlx_array,
            sinks: mlx_array,
            scale: c_float,
            cap: c_float,
            window: c_int,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) fn mlx_node_attend_run(
            res: *mut mlx_array,
            q: mlx_array,
            k: mlx_array,
            v: mlx_array,
            keys: mlx_array,
            values: mlx_array,
            table: mlx_array,
            sinks: mlx_array,
            scale: c_float,
            cap: c_float,
            window: c_int,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) fn mlx_node_append_run(
            res: *mut mlx_array,
            k: mlx_array,
            v: mlx_array,
            keys: mlx_array,
            values: mlx_array,
            table: mlx_array,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) fn mlx_node_sample(
            res: *mut mlx_array,
            logits: mlx_array,
            draws: mlx_array,
            changes: mlx_array,
            late: mlx_array,
            stream: mlx_stream,
        ) -> c_int;
        pub(super) fn mlx_node_reserve(
            res: *mut mlx_array,
            shape: *const c_int,
            rank: usize,
            stream: mlx_stream,
        ) -> c_int;
    }
}

macro_rules! native {
    ($(#[$doc:meta])* $name:ident, $symbol:ident, ($first:ident $(, $array:ident)*), ($($value:ident: $type:ty),*)) => {
        $(#[$doc])*
        #[cfg(native_cpu)]
        pub(crate) fn $name($first: &Array $(, $array: &Array)* $(, $value: $type)*) -> Result<Array> {
            let stream = mlx_rs::Stream::thread_local_or_default();
            crate::raw::call(stringify!($name), $first, |res| {
                // SAFETY: live handles; the function keeps references of its own and fills `res`.
                unsafe {
                    ffi::$symbol(res, $first.as_ptr() $(, $array.as_ptr())* $(, $value)*, stream.as_ptr())
                }
            })
        }

        $(#[$doc])*
        #[cfg(not(native_cpu))]
        pub(crate) fn $name($first: &Array $(, $array: &Array)* $(, $value: $type)*) -> Result<Array> {
            let _ = ($(&$array,)* $($value,)*);
            let message = format!("{} of {:?} is not built here", stringify!($name), $first.shape());
            Err(mlx_rs::error::Exception::custom(message))
        }
    };
}

native! {
    /// `silu(gate) · up` of `[.., 2·n]` that holds gate and up side by side.
    swiglu, mlx_node_swiglu, (x), ()
}
native! {
    /// Root-mean-square normalization of the last axis, times `weight`.
    rms_norm, mlx_node_rms_norm, (x, weight), (eps: f32)
}
native! {
    /// `x [rows, width]` times the transpose of `weight [outputs, width]`; an error where [`product_fits`] says no.
    product, mlx_node_product, (x, weight), ()
}
native! {
    /// Rotation of `x [tokens, heads, dim]` by `cos` and `sin` `[tokens, 1, half]`; heads of a token are adjacent.
    rope, mlx_node_rope, (x, cos, sin), ()
}
native! {
    /// Appends one token a row and attends to everything before and itself: `q [rows, heads, dim]`, `k` and `v`
    /// `[rows, kv_heads, dim]` rotated, pools as [`crate::kv::LayerKv`], `rows [rows, 1 + blocks]` position and table;
    /// `sinks [heads]` or `[0]`, `cap` and `window` as [`crate::attention::Look`], 0 for none.
    #[expect(clippy::too_many_arguments, reason = "what attention takes")]
    attend_rows, mlx_node_attend_rows, (q, k, v, keys, values, rows, sinks), (scale: f32, cap: f32, window: i32)
}
native! {
    /// Appends a run of tokens of one sequence and attends, each to everything before and itself: as [`attend_rows`], with
    /// `table [1 + blocks]`, start and block table.
    #[expect(clippy::too_many_arguments, reason = "what attention takes")]
    attend_run, mlx_node_attend_run, (q, k, v, keys, values, table, sinks), (scale: f32, cap: f32, window: i32)
}
native! {
    /// Only appends such a run; gives `[1]` of no meaning, to be evaluated.
    append_run, mlx_node_append_run, (k, v, keys, values, table), ()
}
native! {
    /// Draws a token a row, `[rows]` as i32; inputs as [`crate::sampler::Draws`].
    sample, mlx_node_sample, (logits, draws, changes, late), ()
}

/// Memory of a shape, f32, that takes no memory until it is written.
#[cfg(native_cpu)]
pub(crate) fn reserve(shape: &[i32]) -> Result<Array> {
    let stream = mlx_rs::Stream::thread_local_or_default();
    crate::raw::call("reserve", &Array::from_slice(shape, &[shape.len() as i32]), |res| {
        // SAFETY: the shape outlives the call; the function fills `res`.
        unsafe { ffi::mlx_node_reserve(res, shape.as_ptr(), shape.len(), stream.as_ptr()) }
    })
}

/// Memory of a shape, f32, that takes no memory until it is written.
#[cfg(not(native_cpu))]
pub(crate) fn reserve(shape: &[i32]) -> Result<Array> {
    Err(mlx_rs::error::Exception::custom(format!("reserve of {shape:?} is not built here")))
}

/// Whether [`product`] takes this weight: whole vectors of the widest kind.
pub(crate) fn product_fits(weight: &Array) -> bool {
    weight.ndim() == 2 && weight.dim(1) % 16 == 0
}

/// Up to how many rows [`product`] is faster than a BLAS on this machine's processor; 0 where it does not work.
#[cfg(native_cpu)]
pub(crate) fn product_rows() -> i32 {
    if product_agrees().unwrap_or(false) { ffi::mlx_node_product_rows() } else { 0 }
}

/// Up to how many rows [`product`] is faster than a BLAS on this machine's processor; 0 where it does not work.
#[cfg(not(native_cpu))]
pub(crate) fn product_rows() -> i32 {
    0
}

#[cfg(native_cpu)]
fn product_agrees() -> Result<bool> {
    let mut same = true;
    // Whole and broken tiles of every number of rows, in one unit of work and several.
    for (rows, outputs, width) in
        [(1, 7, 16), (2, 50, 32), (3, 13, 48), (5, 49, 64), (7, 20, 80), (12, 100, 2048)]
    {
        let x = mlx_rs::random::normal::<f32>(&[rows, width], None, None, None)?;
        let weight = mlx_rs::random::normal::<f32>(&[outputs, width], None, None, None)?;
        same &= mlx_rs::ops::all_close(product(&x, &weight)?, x.matmul(weight.t())?, 1e-4, 1e-3, false)?;
    }
    Ok(same)
}

/// Whether every operation here agrees with MLX's own on this machine.
pub(crate) fn works() -> bool {
    cfg!(native_cpu) && agrees().unwrap_or(false)
}

fn agrees() -> Result<bool> {
    use mlx_rs::ops::{all_close, cos, sin};
    let x =
        mlx_rs::random::normal::<f32>(&[3, 4, 5, 70], None, None, None)?.multiply(Array::from_f32(5.0))?;
    let close = |ours: Array, theirs: Array| all_close(ours, theirs, 1e-5, 1e-6, false);
    let gated = close(swiglu(&x)?, crate::layers::swiglu_of_parts(&x)?)?;

    let weight = mlx_rs::random::normal::<f32>(&[70], None, None, None)?;
    let normed = close(rms_norm(&x, &weight, 1e-5)?, mlx_rs::fast::rms_norm(&x, Some(&weight), 1e-5)?)?;

    let tokens = x.reshape(&[12, 5, 70])?;
    let part = crate::raw::slice(&tokens, &[0, 1, 0], &[12, 4, 70])?;
    let angles = Array::from_slice(&(0..12 * 32).map(|at| at as f32).collect::<Vec<_>>(), &[12, 1, 32]);
    let (cos, sin) = (cos(&angles)?, sin(&angles)?);
    let turned = close(rope(&part, &cos, &sin)?, crate::rope::rotate(&part, &cos, &sin, 32)?)?;
    Ok(gated && normed && turned)
}

#[cfg(all(test, native_cpu))]
mod tests {
    use super::*;

    #[test]
    fn native_operations_agree_with_mlx() {
        assert!(agrees().unwrap());
    }

    #[test]
    fn products_agree_with_mlx() {
        // Processors without AVX2 have none.
        if ffi::mlx_node_product_rows() > 0 {
            assert!(product_agrees().unwrap());
        }
    }

    #[test]
    fn rows_of_products_do_not_see_their_neighbours() {
        if product_rows() == 0 {
            return;
        }
        let x = mlx_rs::random::normal::<f32>(&[13, 64], None, None, None).unwrap();
        let weight = mlx_rs::random::normal::<f32>(&[70, 64], None, None, None).unwrap();
        let together = product(&x, &weight).unwrap();
        for row in 0..13 {
            let alone = product(&crate::raw::slice(&x, &[row, 0], &[row + 1, 64]).unwrap(), &weight).unwrap();
            let same = crate::raw::slice(&together, &[row, 0], &[row + 1, 70]).unwrap();
            assert_eq!(alone.as_slice::<f32>(), same.contiguous().unwrap().as_slice::<f32>(), "row {row}");
        }
    }

    #[test]
    fn extreme_values_stay_finite() {
        let x = Array::from_slice(
            &[-1e30_f32, -200.0, -88.0, 0.0, 88.0, 200.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            &[1, 12],
        );
        let gated = swiglu(&x).unwrap();
        assert!(gated.as_slice::<f32>().iter().all(|value| value.is_finite()), "{gated}");
    }
}
