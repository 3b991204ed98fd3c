//! Whether weights fit into this machine's memory, asked before they are loaded.

use super::LoadError;

/// Refuses `needed` bytes where the machine has fewer to give. Where that cannot be told, nothing is refused.
///
/// # Errors
/// [`LoadError::TooLittleMemory`].
pub fn memory_check(needed: u64) -> Result<(), LoadError> {
    match available() {
        Some(available) if available < needed => Err(LoadError::TooLittleMemory { needed, available }),
        _ => Ok(()),
    }
}

/// Bytes that programs can still take without the system swapping.
#[cfg(target_os = "linux")]
pub(crate) fn available() -> Option<u64> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

#[cfg(any(target_os = "linux", test))]
fn parse_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes that Metal lets one process use: a fixed share of the memory, since macOS compresses and evicts the rest.
#[cfg(target_os = "macos")]
#[expect(unsafe_code, reason = "mlx-rs does not wrap device information")]
pub(crate) fn available() -> Option<u64> {
    let mut size = 0;
    // SAFETY: `device` and `info` are made, used and freed here and nowhere else; the key ends with a zero byte.
    let status = unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let mut info = mlx_sys::mlx_device_info_new();
        let mut status = mlx_sys::mlx_device_info_get(&mut info, device);
        if status == 0 {
            let key = c"max_recommended_working_set_size";
            status = mlx_sys::mlx_device_info_get_size(&mut size, info, key.as_ptr());
        }
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        status
    };
    (status == 0 && size > 0).then_some(size as u64)
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub(crate) fn available() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_memory_is_checked() {
        let text = "MemTotal:       24689000 kB\nMemFree:  1 kB\nMemAvailable:   23003344 kB\n";
        assert_eq!(parse_meminfo(text), Some(23_003_344 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 3 kB"), None);
        assert!(memory_check(1 << 20).is_ok());
        let error = memory_check(1 << 60).unwrap_err().to_string();
        assert!(error.contains("1152921504.6 GB") && error.contains("available"), "{error}");
    }
}
