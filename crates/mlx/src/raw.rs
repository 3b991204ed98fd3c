//! Three operations that `mlx-rs` offers only behind its indexing traits, which add reshapes and broadcasts of their own.
#![expect(unsafe_code, reason = "calls of the C API, each with its conditions beside it")]

use mlx_rs::{
    Array, Stream,
    error::{Exception, Result},
};
use std::sync::Once;

/// `array[start..stop]` in every axis: a view, no copy.
pub(crate) fn slice(array: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
    let strides = vec![1; start.len()];
    let stream = Stream::thread_local_or_default();
    call("slice", array, |res| {
        // SAFETY: `res` is a valid handle to be filled; the pointers outlive the call and carry their lengths.
        unsafe {
            mlx_sys::mlx_slice(
                res,
                array.as_ptr(),
                start.as_ptr(),
                start.len(),
                stop.as_ptr(),
                stop.len(),
                strides.as_ptr(),
                strides.len(),
                stream.as_ptr(),
            )
        }
    })
}

/// `array` with `update` in place of `array[start..stop]`. In place where nothing else holds `array`'s buffer.
pub(crate) fn slice_update(array: &Array, update: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
    let strides = vec![1; start.len()];
    let stream = Stream::thread_local_or_default();
    call("slice_update", array, |res| {
        // SAFETY: as in `slice`.
        unsafe {
            mlx_sys::mlx_slice_update(
                res,
                array.as_ptr(),
                update.as_ptr(),
                start.as_ptr(),
                start.len(),
                stop.as_ptr(),
                stop.len(),
                strides.as_ptr(),
                strides.len(),
                stream.as_ptr(),
            )
        }
    })
}

/// `array` with `updates[i]` at `array[indices[0][i], .., indices[1][i], ..]`, the indices being along `axes`.
/// `updates` is `[n]` followed by `array`'s shape with 1 along `axes`. In place as [`slice_update`].
pub(crate) fn scatter(array: &Array, indices: &[&Array], updates: &Array, axes: &[i32]) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    // SAFETY: a fresh vector, filled with live handles (it keeps references of its own) and freed below.
    let vector = unsafe { mlx_sys::mlx_vector_array_new() };
    let filled = indices.iter().all(|index| {
        // SAFETY: both handles are live.
        unsafe { mlx_sys::mlx_vector_array_append_value(vector, index.as_ptr()) == 0 }
    });
    let result = if filled {
        call("scatter", array, |res| {
            // SAFETY: as in `slice`.
            unsafe {
                mlx_sys::mlx_scatter(
                    res,
                    array.as_ptr(),
                    vector,
                    updates.as_ptr(),
                    axes.as_ptr(),
                    axes.len(),
                    stream.as_ptr(),
                )
            }
        })
    } else {
        Err(Exception::custom("out of memory in scatter"))
    };
    // SAFETY: made above, not used afterwards.
    unsafe { mlx_sys::mlx_vector_array_free(vector) };
    result
}

/// Runs a C function that fills a handle; `array` is named in the error.
pub(crate) fn call(
    name: &str,
    array: &Array,
    operation: impl FnOnce(*mut mlx_sys::mlx_array) -> i32,
) -> Result<Array> {
    // mlx-rs sets its error handler at its first fallible call; mlx-c's own one ends the process.
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| drop(mlx_rs::memory::active_memory()));
    // SAFETY: an empty handle, owned by the `Array` it becomes or freed with it.
    let mut res = unsafe { mlx_sys::mlx_array_new() };
    let status = operation(&mut res);
    // SAFETY: `res` is a handle of ours, and nobody else's.
    let result = unsafe { Array::from_ptr(res) };
    if status == 0 {
        Ok(result)
    } else {
        Err(Exception::custom(format!("{name} on an array of shape {:?} failed", array.shape())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_written_where_the_indices_say() {
        let array = Array::from_slice(&[0.0_f32; 2 * 4 * 3], &[2, 1, 4, 3]);
        let rows = Array::from_slice(&[1, 0], &[2]);
        let positions = Array::from_slice(&[3, 1], &[2]);
        let updates = Array::from_slice(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 1, 1, 1, 3]);
        let result = scatter(&array, &[&rows, &positions], &updates, &[0, 2]).unwrap();
        let row = |at: i32, position: i32| {
            slice(&result, &[at, 0, position, 0], &[at + 1, 1, position + 1, 3])
                .unwrap()
                .contiguous()
                .unwrap()
                .as_slice::<f32>()
                .to_vec()
        };
        assert_eq!(row(1, 3), [1.0, 2.0, 3.0]);
        assert_eq!(row(0, 1), [4.0, 5.0, 6.0]);
        assert_eq!(row(0, 3), [0.0; 3]);
    }

    #[test]
    fn a_wrong_shape_is_an_error() {
        let array = Array::from_slice(&[0.0_f32; 4], &[2, 2]);
        assert!(slice_update(&array, &Array::from_slice(&[0.0_f32; 9], &[3, 3]), &[0, 0], &[2, 2]).is_err());
    }
}
