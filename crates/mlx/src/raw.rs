//! What `mlx-rs` offers only behind its indexing traits, which add reshapes and broadcasts of their own, or with wrappers
//! that cost more than the call.
#![expect(unsafe_code, reason = "calls of the C API, each with its conditions beside it")]

use mlx_rs::{
    Array, Stream,
    error::{Exception, Result},
};
use std::{
    cell::{Cell, RefCell},
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    rc::Rc,
    sync::Once,
};

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

/// Bit `at` of each word, 0 or 1; both are u32 and broadcast to each other.
pub(crate) fn bits(words: &Array, at: &Array) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    let one = Array::from_slice(&[1_u32], &[1]);
    let shifted = call("right_shift", words, |res| {
        // SAFETY: `res` is a valid handle to be filled, the others are live.
        unsafe { mlx_sys::mlx_right_shift(res, words.as_ptr(), at.as_ptr(), stream.as_ptr()) }
    })?;
    call("bitwise_and", &shifted, |res| {
        // SAFETY: as above.
        unsafe { mlx_sys::mlx_bitwise_and(res, shifted.as_ptr(), one.as_ptr(), stream.as_ptr()) }
    })
}

/// `array` with `updates[i]` at `array[indices[0][i], .., indices[1][i], ..]`, the indices being along `axes`.
/// `updates` is `[n]` followed by `array`'s shape with 1 along `axes`. In place where nothing else holds `array`'s
/// buffer.
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

/// `array`, which counts as there once `others` are, too.
pub(crate) fn depends(array: &Array, others: &[Array]) -> Result<Array> {
    // SAFETY: a fresh vector, filled with live handles (it keeps references of its own) and freed below.
    let vector = unsafe { mlx_sys::mlx_vector_array_new() };
    let filled = others.iter().all(|other| {
        // SAFETY: both handles are live.
        unsafe { mlx_sys::mlx_vector_array_append_value(vector, other.as_ptr()) == 0 }
    });
    let outputs = if filled {
        call_many(&[array], |res, inputs| {
            // SAFETY: live handles; `res` is filled with references of its own.
            unsafe { mlx_sys::mlx_depends(res, inputs, vector) }
        })
    } else {
        None
    };
    // SAFETY: made above, not used afterwards.
    unsafe { mlx_sys::mlx_vector_array_free(vector) };
    outputs.and_then(|mut outputs| outputs.pop()).ok_or_else(|| Exception::custom("depends failed"))
}

/// Runs a C function that fills a handle; `array` is named in the error.
pub(crate) fn call(
    name: &str,
    array: &Array,
    operation: impl FnOnce(*mut mlx_sys::mlx_array) -> i32,
) -> Result<Array> {
    keep_errors();
    // SAFETY: an empty handle, owned by the `Array` it becomes or freed with it.
    let mut res = unsafe { mlx_sys::mlx_array_new() };
    let status = operation(&mut res);
    // SAFETY: `res` is a handle of ours, and nobody else's.
    let result = unsafe { Array::from_ptr(res) };
    if status == 0 {
        Ok(result)
    } else {
        let (shape, message) = (array.shape(), take_error());
        Err(Exception::custom(format!("{name} on an array of shape {shape:?} failed: {message}")))
    }
}

thread_local! {
    static LAST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

unsafe extern "C" {
    /// mlx-rs's handler, which keeps the message where only mlx-rs can read it.
    safe fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

/// Keeps a message for [`take_error`], and for mlx-rs.
extern "C" fn keep_error(message: *const c_char, data: *mut c_void) {
    // SAFETY: mlx-c passes a C string that outlives the call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    LAST_ERROR.set(Some(text));
    default_mlx_error_handler(message, data);
}

/// What MLX said last on this thread, once.
pub(crate) fn take_error() -> String {
    LAST_ERROR.take().unwrap_or_else(|| "MLX does not say why".to_owned())
}

/// Sets our error handler, once mlx-rs has set its own, which it does at its first fallible call; mlx-c's own one ends
/// the process.
pub(crate) fn keep_errors() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        drop(mlx_rs::memory::active_memory());
        // SAFETY: a function that may be called from any thread, without data of its own.
        unsafe { mlx_sys::mlx_set_error_handler(Some(keep_error), std::ptr::null_mut(), None) };
    });
}

/// Runs a C function from a vector of arrays to another.
pub(crate) fn call_many(
    inputs: &[&Array],
    operation: impl FnOnce(*mut mlx_sys::mlx_vector_array, mlx_sys::mlx_vector_array) -> i32,
) -> Option<Vec<Array>> {
    keep_errors();
    // SAFETY: fresh vectors, freed below; appending keeps a reference of the vector's own.
    let (mut outputs, vector) = unsafe { (mlx_sys::mlx_vector_array_new(), mlx_sys::mlx_vector_array_new()) };
    let filled = inputs.iter().all(|input| {
        // SAFETY: both handles are live.
        unsafe { mlx_sys::mlx_vector_array_append_value(vector, input.as_ptr()) == 0 }
    });
    let done = filled && operation(&mut outputs, vector) == 0;
    let result = if done { arrays_of(outputs) } else { None };
    // SAFETY: made above, not used afterwards.
    unsafe {
        mlx_sys::mlx_vector_array_free(vector);
        mlx_sys::mlx_vector_array_free(outputs);
    }
    result
}

fn arrays_of(vector: mlx_sys::mlx_vector_array) -> Option<Vec<Array>> {
    // SAFETY: a live vector.
    let count = unsafe { mlx_sys::mlx_vector_array_size(vector) };
    let array = |index| {
        // SAFETY: an empty handle, filled with a reference of its own and owned by the `Array` it becomes.
        unsafe {
            let mut handle = mlx_sys::mlx_array_new();
            let status = mlx_sys::mlx_vector_array_get(&mut handle, vector, index);
            let array = Array::from_ptr(handle);
            (status == 0).then_some(array)
        }
    };
    (0..count).map(array).collect()
}

type Function = dyn Fn(&[Array]) -> Result<Vec<Array>>;

/// A function whose graph MLX builds once for each combination of its inputs' shapes and then repeats.
///
/// Arrays that it captures are constants of the graph. Belongs to the thread that computes.
pub(crate) struct Compiled {
    closure: mlx_sys::mlx_closure,
    traced: Rc<Cell<u64>>,
}

struct Payload {
    function: Box<Function>,
    traced: Rc<Cell<u64>>,
}

impl Compiled {
    pub(crate) fn new(function: impl Fn(&[Array]) -> Result<Vec<Array>> + 'static) -> Result<Self> {
        keep_errors();
        let traced = Rc::new(Cell::new(0));
        let payload = Box::new(Payload { function: Box::new(function), traced: Rc::clone(&traced) });
        // SAFETY: the payload is given away here and taken back by `forget_payload`, once.
        let plain = unsafe {
            mlx_sys::mlx_closure_new_func_payload(
                Some(call_payload),
                Box::into_raw(payload).cast::<c_void>(),
                Some(forget_payload),
            )
        };
        // SAFETY: an empty handle to be filled; `plain` is live, and the compiled closure keeps what it needs of it.
        let (status, closure) = unsafe {
            let mut closure = mlx_sys::mlx_closure_new();
            let status = mlx_sys::mlx_compile(&mut closure, plain, false);
            mlx_sys::mlx_closure_free(plain);
            (status, closure)
        };
        let compiled = Self { closure, traced };
        if status == 0 { Ok(compiled) } else { Err(Exception::custom("a function cannot be compiled")) }
    }

    pub(crate) fn call(&self, inputs: &[&Array]) -> Result<Vec<Array>> {
        let outputs = call_many(inputs, |res, inputs| {
            // SAFETY: live handles; `res` is filled with references of its own.
            unsafe { mlx_sys::mlx_closure_apply(res, self.closure, inputs) }
        });
        outputs.ok_or_else(|| Exception::custom("a compiled step failed"))
    }

    /// How many graphs were built.
    #[cfg(test)]
    pub(crate) fn traced(&self) -> u64 {
        self.traced.get()
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").field("traced", &self.traced.get()).finish_non_exhaustive()
    }
}

impl Drop for Compiled {
    fn drop(&mut self) {
        // SAFETY: made in `new`, not used afterwards.
        unsafe { mlx_sys::mlx_closure_free(self.closure) };
    }
}

/// Called by MLX, on the thread that calls the compiled function.
unsafe extern "C" fn call_payload(
    res: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
    payload: *mut c_void,
) -> c_int {
    // SAFETY: the payload of `Compiled::new`, alive as long as the closure.
    let payload = unsafe { &*payload.cast::<Payload>() };
    payload.traced.set(payload.traced.get() + 1);
    let Some(inputs) = arrays_of(inputs) else { return 1 };
    // A panic must not pass through MLX.
    let outputs = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (payload.function)(&inputs)));
    match outputs {
        Ok(Ok(outputs)) => {
            // SAFETY: `res` is a handle of MLX's to be set; the new vector keeps references of its own.
            unsafe {
                let vector = mlx_sys::mlx_vector_array_new();
                let appended = outputs
                    .iter()
                    .all(|output| mlx_sys::mlx_vector_array_append_value(vector, output.as_ptr()) == 0);
                let set = appended && mlx_sys::mlx_vector_array_set(res, vector) == 0;
                mlx_sys::mlx_vector_array_free(vector);
                c_int::from(!set)
            }
        }
        Ok(Err(error)) => {
            tracing::error!(%error, "a step cannot be compiled");
            1
        }
        Err(_) => 1,
    }
}

/// Called by MLX when it has no more use for the closure.
unsafe extern "C" fn forget_payload(payload: *mut c_void) {
    // SAFETY: from `Box::into_raw` in `Compiled::new`; MLX calls this once.
    drop(unsafe { Box::from_raw(payload.cast::<Payload>()) });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compiled_functions_are_traced_once_a_shape() {
        let factor = Array::from_f32(2.0);
        let compiled = Compiled::new(move |inputs| Ok(vec![inputs[0].multiply(&factor)?])).unwrap();
        for (count, traced) in [(3, 1), (3, 1), (5, 2), (3, 2)] {
            let input = Array::from_slice(&vec![1.5_f32; count], &[count as i32]);
            // Not evaluated: on the CPU device that would need a compiler.
            let outputs = compiled.call(&[&input]).unwrap();
            assert_eq!(outputs[0].shape(), [count as i32]);
            assert_eq!(compiled.traced(), traced);
        }
        let failing = Compiled::new(|_| Err(Exception::custom("no"))).unwrap();
        assert!(failing.call(&[&Array::from_int(1)]).is_err());
    }

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
        assert!(slice(&array, &[0], &[1]).is_err());
    }
}
