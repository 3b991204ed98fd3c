//! What this machine is: its name, chip and memory, for people to read.

use std::{fs, process::Command};

/// The host's name without its domain.
pub(crate) fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| output_of("uname", &["-n"]));
    let name = name.unwrap_or_default();
    let first = name.trim().split('.').next().unwrap_or_default();
    if first.is_empty() { "unnamed".to_owned() } else { first.to_owned() }
}

/// Chip and memory, such as `Apple M4 Max, 64 GiB`.
pub(crate) fn describe() -> String {
    let described = if cfg!(target_os = "macos") { from_sysctl() } else { from_proc() };
    described.unwrap_or_else(|| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        format!("{} {}, {cores} cores", std::env::consts::OS, std::env::consts::ARCH)
    })
}

fn from_sysctl() -> Option<String> {
    let text = output_of("sysctl", &["-n", "machdep.cpu.brand_string", "hw.memsize"])?;
    let (chip, bytes) = text.trim().split_once('\n')?;
    Some(format!("{}, {}", chip.trim(), gibibytes(bytes.trim().parse().ok()?)))
}

fn from_proc() -> Option<String> {
    from_proc_texts(&fs::read_to_string("/proc/cpuinfo").ok()?, &fs::read_to_string("/proc/meminfo").ok()?)
}

fn from_proc_texts(cpuinfo: &str, meminfo: &str) -> Option<String> {
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    // On aarch64 no line names the model.
    let chip = value(cpuinfo, "model name").unwrap_or_else(|| format!("CPU {}", std::env::consts::ARCH));
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let kib: u64 = value(meminfo, "MemTotal")?.split(' ').next()?.parse().ok()?;
    Some(format!("{chip}, {cores} cores, {}", gibibytes(kib << 10)))
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.0} GiB", bytes as f64 / f64::from(1 << 30))
}

fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read() {
        let check = |cpuinfo: &str, expected: Option<&str>| {
            let meminfo = "MemTotal:       65808824 kB\nMemFree: 1 kB\n";
            assert_eq!(from_proc_texts(cpuinfo, meminfo).as_deref(), expected);
        };
        let x86 = "processor\t: 0\nmodel name\t: Xeon 9\n\nprocessor\t: 1\nmodel name\t: Xeon 9\n";
        check(x86, Some("Xeon 9, 2 cores, 63 GiB"));
        assert_eq!(from_proc_texts(x86, "MemTotal: much"), None);
        assert!(!host_name().is_empty() && !describe().is_empty());
    }
}
