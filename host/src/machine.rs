//! What the machine has, or the container that we are in.

use std::fs;
use std::path::Path;

/// Bytes that all tenants together may hold where nothing is said: three
/// quarters of what there is. The rest is for the host itself and the cache of
/// files. Without bound where we can not know.
pub fn memory_for_tenants() -> u64 {
    memory().map_or(u64::MAX, |memory| memory / 4 * 3)
}

/// Bytes of memory that we may use: the machine's, or as much as our control
/// group allows.
fn memory() -> Option<u64> {
    let total = total(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(allowed(&groups, Path::new("/sys/fs/cgroup")).map_or(total, |allowed| allowed.min(total)))
}

/// The whole memory, in the words of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that the control groups in `groups`, which is `/proc/self/cgroup`,
/// and those above them allow.
fn allowed(groups: &str, root: &Path) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        // Version 2 has one hierarchy, version 1 one for each controller.
        let (root, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let own = root.join(path.trim_start_matches('/'));
        // In a container the path may be that of the host; the root is ours then.
        let above = own.ancestors().take_while(|group| group.starts_with(&root));
        // No limit is a word, or a number beyond all memory.
        above.filter_map(|group| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok()).min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_of_all_limits_counts() {
        assert_eq!(total("MemTotal:       24689764 kB\nMemFree: 1 kB\n"), Some(24_689_764 << 10));
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("a/b");
        fs::create_dir_all(&own).unwrap();
        let limit = |path: &Path, text: &str| fs::write(path.join("memory.max"), text).unwrap();
        assert_eq!(allowed("0::/a/b\n", root.path()), None);
        limit(&own, "max\n");
        assert_eq!(allowed("0::/a/b\n", root.path()), None);
        limit(&root.path().join("a"), "4096\n");
        assert_eq!(allowed("0::/a/b\n", root.path()), Some(4096));
        limit(&own, "1024\n");
        assert_eq!(allowed("1:cpu:/x\n0::/a/b\n", root.path()), Some(1024));
        // Version 1, from within a container.
        fs::create_dir(root.path().join("memory")).unwrap();
        fs::write(root.path().join("memory/memory.limit_in_bytes"), "2048\n").unwrap();
        assert_eq!(allowed("4:memory:/docker/0\n", root.path()), Some(2048));
    }
}
