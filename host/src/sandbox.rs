//! The second wall: what the server's own process may still do once all apps
//! are loaded, should a guest ever get out of its instance.
//!
//! - *No new privileges*: no set-user-id program gives any.
//! - *Landlock*: of the file system only the paths in use.
//! - *seccomp*: none of the system calls that only serve an attacker. The
//!   filter lists those, not the ones in use: what the C library and the
//!   kernel use differs from one machine to the next, and a server that dies
//!   of a call nobody thought of protects nobody.
//!
//! Landlock holds for threads that start after it, so this comes before the
//! runtime.

use std::path::PathBuf;

use anyhow::Result;

use crate::error::UserError;

/// When to set up the wall.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sandbox {
    /// As far as the kernel can.
    #[default]
    Auto,
    /// All of it, or do not start.
    On,
    /// Not at all.
    Off,
}

/// The paths that stay in use.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    /// To read from.
    pub read: Vec<PathBuf>,
    /// To read from and write to.
    pub write: Vec<PathBuf>,
}

/// Sets up the wall around this process and says in the log what stands.
///
/// # Errors
///
/// A [`UserError`] if it was demanded and the kernel can not.
pub fn apply(sandbox: Sandbox, paths: &Paths) -> Result<()> {
    if sandbox == Sandbox::Off {
        tracing::warn!("the server's own process is not confined: --sandbox off");
        return Ok(());
    }
    let mut standing = vec!["no new privileges"];
    let mut missing = Vec::new();
    for (name, applied) in [("landlock", wall::landlock(paths)), ("seccomp", wall::seccomp())] {
        match applied {
            Ok(()) => standing.push(name),
            Err(reason) => missing.push(format!("{name} ({reason})")),
        }
    }
    if missing.is_empty() {
        tracing::info!("the server's own process is confined: {}", standing.join(", "));
        return Ok(());
    }
    let missing = missing.join(", ");
    if sandbox == Sandbox::On {
        return Err(UserError::new(format!("this system can not confine the server: {missing}"))
            .remedy("use `--sandbox auto` to take what there is")
            .into());
    }
    tracing::warn!("the server's own process is not confined by {missing}");
    Ok(())
}

#[cfg(target_os = "linux")]
mod wall {
    use std::collections::BTreeMap;
    use std::path::Path;

    use landlock::{
        ABI, Access as _, AccessFs, BitFlags, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
        RulesetError, RulesetStatus, path_beneath_rules,
    };
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule,
    };

    use super::Paths;

    /// What name lookups, time zones and the threads of the host read.
    const SYSTEM: [&str; 10] = [
        "/etc",
        "/run/systemd/resolve",
        "/usr/share/zoneinfo",
        "/dev/null",
        "/dev/urandom",
        "/proc/self",
        "/proc/sys/vm/overcommit_memory",
        "/sys/devices/system/cpu",
        "/sys/fs/cgroup",
        "/sys/kernel/mm/transparent_hugepage",
    ];
    /// Where libraries are, which lookups and a compiling child load.
    const LIBRARIES: [&str; 5] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store"];

    pub(super) fn landlock(paths: &Paths) -> Result<(), String> {
        match restrict(paths) {
            Ok(RulesetStatus::NotEnforced) => Err("not in this kernel".into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn restrict(paths: &Paths) -> Result<RulesetStatus, RulesetError> {
        // Rights that older kernels do not know are left out.
        let abi = ABI::V5;
        let run = AccessFs::from_read(abi);
        let read = run & !AccessFs::Execute;
        let write = AccessFs::from_all(abi) & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock);
        fn rules<P: AsRef<Path>>(
            paths: impl IntoIterator<Item = P>,
            access: BitFlags<AccessFs>,
        ) -> impl Iterator<Item = Result<landlock::PathBeneath<landlock::PathFd>, RulesetError>> {
            // A path that does not exist needs no rule.
            path_beneath_rules(paths, access)
        }
        // A compiling child is this program itself.
        let program = std::env::current_exe().ok();
        let status = Ruleset::default()
            .handle_access(AccessFs::from_all(abi))?
            .create()?
            .add_rules(rules(SYSTEM, read))?
            .add_rules(rules(LIBRARIES, run))?
            .add_rules(rules(program, run))?
            .add_rules(rules(&paths.read, read))?
            .add_rules(rules(&paths.write, write))?
            .restrict_self()?;
        Ok(status.ruleset)
    }

    /// System calls that no part of the server makes once it runs.
    const FORBIDDEN: [libc::c_long; 60] = [
        // Other processes.
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_kcmp,
        libc::SYS_pidfd_getfd,
        libc::SYS_perf_event_open,
        // Other views of the file system.
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_mount_setattr,
        libc::SYS_name_to_handle_at,
        libc::SYS_open_by_handle_at,
        libc::SYS_mknodat,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_quotactl,
        // Other namespaces and identities.
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
        libc::SYS_setfsuid,
        libc::SYS_setfsgid,
        libc::SYS_capset,
        libc::SYS_personality,
        // The kernel's younger and larger doors.
        libc::SYS_bpf,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_fanotify_init,
        libc::SYS_vhangup,
        libc::SYS_memfd_secret,
        // The machine itself.
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_acct,
        libc::SYS_syslog,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_adjtimex,
    ];

    pub(super) fn seccomp() -> Result<(), String> {
        let program = filter().map_err(|error| error.to_string())?;
        seccompiler::apply_filter_all_threads(&program).map_err(|error| error.to_string())
    }

    pub(super) fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
            FORBIDDEN.into_iter().map(|call| (call, Vec::new())).collect();
        // Sockets but for the internet's and local ones; netlink is how a
        // lookup finds out which of IPv4 and IPv6 there is.
        let other_families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]
            .into_iter()
            .map(|family| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family as u64))
            .collect::<Result<_, _>>()?;
        rules.insert(libc::SYS_socket, vec![SeccompRule::new(other_families)?]);
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        SeccompFilter::new(rules, SeccompAction::Allow, refused, std::env::consts::ARCH.try_into()?)?
            .try_into()
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// In a thread of its own, since what is taken from it does not come back.
    fn confined(paths: &Paths, act: impl FnOnce() + Send + 'static) {
        let paths = paths.clone();
        let thread = std::thread::spawn(move || {
            if let Err(reason) = wall::landlock(&paths) {
                // A kernel without it has nothing to test.
                assert!(reason.contains("not in this kernel"), "{reason}");
                return;
            }
            seccompiler::apply_filter(&wall::filter().unwrap()).unwrap();
            act();
        });
        thread.join().unwrap();
    }

    #[test]
    fn only_the_paths_in_use_are_left() {
        let (granted, read, other) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for directory in [&granted, &read, &other] {
            std::fs::write(directory.path().join("f"), "x").unwrap();
        }
        let paths = Paths { read: vec![read.path().into()], write: vec![granted.path().into()] };
        let (granted, read, other) =
            (granted.path().to_path_buf(), read.path().to_path_buf(), other.path().to_path_buf());
        confined(&paths, move || {
            std::fs::write(granted.join("f"), "y").unwrap();
            std::fs::create_dir(granted.join("d")).unwrap();
            assert_eq!(std::fs::read(read.join("f")).unwrap(), b"x");
            assert!(std::fs::write(read.join("f"), "y").is_err());
            assert!(std::fs::read(other.join("f")).is_err());
            assert!(std::fs::read_dir("/").is_err());
            assert!(std::process::Command::new("/bin/true").status().is_err());
            assert!(std::os::unix::fs::chroot(&granted).is_err());
            // What the server does all the time.
            assert!(std::net::TcpListener::bind("127.0.0.1:0").is_ok());
            std::thread::spawn(|| ()).join().unwrap();
        });
    }
}

#[cfg(not(target_os = "linux"))]
mod wall {
    use super::Paths;

    pub(super) fn landlock(_: &Paths) -> Result<(), String> {
        Err("only on Linux".into())
    }

    pub(super) fn seccomp() -> Result<(), String> {
        Err("only on Linux".into())
    }
}
