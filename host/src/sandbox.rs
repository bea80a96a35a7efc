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
    /// To make sockets in, and to remove them.
    pub sockets: Vec<PathBuf>,
    /// To make sockets in that stay.
    pub lasting_sockets: Vec<PathBuf>,
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
    tracing::warn!("the server's own process is confined: {}, but not by {missing}", standing.join(", "));
    Ok(())
}

#[cfg(target_os = "linux")]
mod wall {
    use std::collections::BTreeMap;
    use std::path::Path;

    use landlock::{
        ABI, Access as _, AccessFs, BitFlags, LandlockStatus, RestrictionStatus, Ruleset, RulesetAttr as _,
        RulesetCreatedAttr as _, RulesetError, RulesetStatus, path_beneath_rules,
    };
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, sock_filter,
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

    /// The newest rights that are asked for. Older kernels do not know all.
    const RIGHTS: ABI = ABI::V5;

    pub(super) fn landlock(paths: &Paths) -> Result<(), String> {
        let status = restrict(paths).map_err(|error| error.to_string())?;
        judge(&status.ruleset, &status.landlock)
    }

    /// Whether all that was asked for holds.
    pub(super) fn judge(ruleset: &RulesetStatus, kernel: &LandlockStatus) -> Result<(), String> {
        match (ruleset, kernel) {
            (RulesetStatus::FullyEnforced, _) => Ok(()),
            (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
                let missing = AccessFs::from_all(RIGHTS) & !AccessFs::from_all(*effective_abi);
                Err(format!("in part only: this kernel does not check {missing:?}"))
            }
            (RulesetStatus::PartiallyEnforced, _) => Err("in part only".into()),
            (RulesetStatus::NotEnforced, _) => Err("not in this kernel".into()),
        }
    }

    fn restrict(paths: &Paths) -> Result<RestrictionStatus, RulesetError> {
        let abi = RIGHTS;
        let run = AccessFs::from_read(abi);
        let read = run & !AccessFs::Execute;
        let write = AccessFs::from_all(abi) & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock);
        let lasting_sockets = read | AccessFs::MakeSock;
        let sockets = lasting_sockets | AccessFs::RemoveFile;
        fn rules<P: AsRef<Path>>(
            paths: impl IntoIterator<Item = P>,
            access: BitFlags<AccessFs>,
        ) -> impl Iterator<Item = Result<landlock::PathBeneath<landlock::PathFd>, RulesetError>> {
            // A path that does not exist needs no rule.
            path_beneath_rules(paths, access)
        }
        // A compiling child is this program itself.
        let program = std::env::current_exe().ok();
        Ruleset::default()
            .handle_access(AccessFs::from_all(abi))?
            .create()?
            .add_rules(rules(SYSTEM, read))?
            .add_rules(rules(LIBRARIES, run))?
            .add_rules(rules(program, run))?
            .add_rules(rules(&paths.read, read))?
            .add_rules(rules(&paths.write, write))?
            .add_rules(rules(&paths.sockets, sockets))?
            .add_rules(rules(&paths.lasting_sockets, lasting_sockets))?
            .restrict_self()
    }

    /// System calls that no part of the server makes once it runs.
    const FORBIDDEN: [libc::c_long; 62] = [
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
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_quotactl_fd,
    ];
    /// The same, where there is such a thing.
    #[cfg(target_arch = "x86_64")]
    const FORBIDDEN_HERE: [libc::c_long; 5] =
        [libc::SYS_mknod, libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_kexec_file_load];
    #[cfg(not(target_arch = "x86_64"))]
    const FORBIDDEN_HERE: [libc::c_long; 0] = [];

    /// What makes a new process or thread a new namespace too.
    pub(super) const NAMESPACES: [libc::c_int; 7] = [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWCGROUP,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
    ];

    pub(super) fn seccomp() -> Result<(), String> {
        for program in filters().map_err(|error| error.to_string())? {
            seccompiler::apply_filter_all_threads(&program).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub(super) fn filters() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
        Ok([absent(), filter()?])
    }

    /// Calls that look as if this kernel had none such. seccompiler compares
    /// numbers for equality only, so this one is written by hand.
    fn absent() -> BpfProgram {
        let (load, jump_equal, jump_from, end) = (0x20, 0x15, 0x35, 0x06);
        let then = |code, jt, jf, k| sock_filter { code, jt, jf, k };
        let clone3 = u32::try_from(libc::SYS_clone3).unwrap_or(u32::MAX);
        vec![
            // The number of the call.
            then(load, 0, 0, 0),
            // Its flags are behind a pointer, where no filter can look. The C
            // library then takes `clone`.
            then(jump_equal, 1, 0, clone3),
            // On x86-64 the second set of numbers, for x32 programs. It has all
            // calls again, and no 64-bit program uses it.
            then(jump_from, 0, 1, 0x4000_0000),
            then(end, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
            then(end, 0, 0, libc::SECCOMP_RET_ALLOW),
        ]
    }

    fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
            FORBIDDEN.into_iter().chain(FORBIDDEN_HERE).map(|call| (call, Vec::new())).collect();
        // Sockets but for the internet's and local ones; netlink is how a
        // lookup finds out which of IPv4 and IPv6 there is.
        let other_families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]
            .into_iter()
            .map(|family| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family as u64))
            .collect::<Result<_, _>>()?;
        rules.insert(libc::SYS_socket, vec![SeccompRule::new(other_families)?]);
        let namespaces = NAMESPACES.into_iter().map(|flag| {
            let is_set = SeccompCmpOp::MaskedEq(flag as u64);
            SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, is_set, flag as u64)?])
        });
        rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        SeccompFilter::new(rules, SeccompAction::Allow, refused, std::env::consts::ARCH.try_into()?)?
            .try_into()
    }
}

/// Runs `act` confined, in a thread of its own, since what is taken from it
/// does not come back. Not at all on a kernel that can not.
#[cfg(test)]
#[cfg(target_os = "linux")]
pub fn confined(paths: &Paths, act: impl FnOnce() + Send + 'static) {
    let paths = paths.clone();
    let thread = std::thread::spawn(move || {
        if let Err(reason) = wall::landlock(&paths) {
            assert!(reason.contains("not in this kernel") || reason.contains("in part only"), "{reason}");
            if reason.contains("not in this kernel") {
                return;
            }
        }
        for filter in wall::filters().unwrap() {
            seccompiler::apply_filter(&filter).unwrap();
        }
        act();
    });
    thread.join().unwrap();
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn only_the_paths_in_use_are_left() {
        let (granted, read, other) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for directory in [&granted, &read, &other] {
            std::fs::write(directory.path().join("f"), "x").unwrap();
        }
        let paths =
            Paths { read: vec![read.path().into()], write: vec![granted.path().into()], ..Paths::default() };
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

    #[test]
    fn a_wall_with_gaps_is_not_whole() {
        use landlock::{ABI, LandlockStatus, RulesetStatus};
        let old = LandlockStatus::Available { effective_abi: ABI::V2, kernel_abi: None };
        assert_eq!(wall::judge(&RulesetStatus::FullyEnforced, &old), Ok(()));
        let gaps = wall::judge(&RulesetStatus::PartiallyEnforced, &old).unwrap_err();
        assert!(gaps.contains("Truncate") && gaps.contains("IoctlDev") && !gaps.contains("Refer"), "{gaps}");
        assert!(wall::judge(&RulesetStatus::NotEnforced, &old).is_err());
    }

    #[test]
    fn no_door_leads_to_a_new_namespace() {
        // In another program, so that it can make any call by its number.
        let script = format!(
            r#"
import ctypes, os, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    before, made = os.getpid(), libc.syscall(ctypes.c_long(number), *arguments, 0, 0, 0, 0)
    if os.getpid() != before or made == 0:
        os._exit(0)
    return ctypes.get_errno() if made == -1 else made
print(call({clone3}), *[call({clone}, flag | 17) for flag in ({namespaces})], call({unshare}, {user}))
print(call(0x40000000 | 39))
thread = threading.Thread(target=lambda: print("thread"), daemon=True)
thread.start()
thread.join()
print(subprocess.run(["true"]).returncode, os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn("/bin/true", ["true"], {{}}), 0)[1]))
"#,
            clone3 = libc::SYS_clone3,
            clone = libc::SYS_clone,
            unshare = libc::SYS_unshare,
            user = libc::CLONE_NEWUSER,
            namespaces = wall::NAMESPACES.map(|flag| flag.to_string()).join(", "),
        );
        let thread = std::thread::spawn(move || {
            for filter in wall::filters().unwrap() {
                seccompiler::apply_filter(&filter).unwrap();
            }
            std::process::Command::new("python3").arg("-c").arg(script).output().unwrap()
        });
        let output = thread.join().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        // ENOSYS is 38, EPERM 1.
        assert_eq!(said, "38 1 1 1 1 1 1 1 1\n38\nthread\n0 0\n", "{errors}");
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
