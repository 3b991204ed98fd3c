//! What the system says of this process; where it says nothing without a library of its own (macOS), nothing.

/// Memory and descriptors of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProcessFigures {
    pub(super) resident_bytes: u64,
    pub(super) open_fds: u64,
}

/// As Linux tells in `/proc/self`.
pub(super) fn figures() -> Option<ProcessFigures> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let open_fds = std::fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    Some(ProcessFigures { resident_bytes: resident_bytes(&status)?, open_fds })
}

fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_read() {
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t    2048 kB\nThreads:\t1\n"), Some(2 << 20));
        assert_eq!(resident_bytes("VmRSS:\tmuch\n"), None);
        assert_eq!(figures().is_some(), cfg!(target_os = "linux"));
    }
}
