//! The Python tools of `wsgi-wasm build`: componentize-py, which makes the
//! component, and pip, which vendors requirements.
//!
//! Both live in a private virtual environment in the cache, in pinned versions
//! with pinned hashes. A componentize-py that happens to be on PATH is not
//! used, even in the right version: its bytes can not be verified, and what it
//! embeds (CPython, the standard library) runs in every app that is built.
//! Who needs another one, say on a system without a published wheel, names it
//! in [`COMPONENTIZE_VARIABLE`].

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::cache::{Bucket, Cache, Key};
use crate::error::UserError;

/// Names the interpreter that the private environment is made from.
pub const PYTHON_VARIABLE: &str = "WSGI_WASM_PYTHON";
/// Names a componentize-py to use in place of the pinned one.
pub const COMPONENTIZE_VARIABLE: &str = "WSGI_WASM_COMPONENTIZE_PY";

/// The componentize-py that apps are built with.
pub const COMPONENTIZE_PY_VERSION: &str = "0.25.1";

/// pip and the data that it does not fetch for each app.
const TOOLS: &str = include_str!("requirements-tools.txt");
/// componentize-py, apart because an override replaces it.
const COMPONENTIZE: &str = include_str!("requirements-componentize.txt");

/// The oldest Python that the pinned pip runs on.
const OLDEST: (u32, u32) = (3, 10);
/// Interpreters to look for, in this order. The plain name may be an old one.
const INTERPRETERS: &[&str] =
    &["python3", "python", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10"];

/// Has an interpreter describe itself: one line with the fields of [`Python`]
/// between tabs. Any Python can parse it, so that an old one gets to say its
/// version.
const PROBE: &str = r#"
import sys
missing = []
for name in ("venv", "ensurepip"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
kind = "CPython" if "PyPy" not in sys.version else "PyPy"
if sys.maxsize < 2 ** 32:
    kind = "32-bit " + kind
if not getattr(sys, "_is_gil_enabled", lambda: True)() or "free-threading" in sys.version:
    kind = "free-threaded " + kind
print("\t".join([
    "%d.%d.%d" % sys.version_info[:3],
    kind,
    ",".join(missing),
    getattr(sys, "_base_executable", None) or sys.executable,
    sys.version.replace("\n", " "),
]))
"#;

/// Runs componentize-py's command line. Its script in `bin` has a path of the
/// environment's first directory in it, and the package can not be run by `-m`.
/// Failures come as an `AssertionError` around the message.
const RUN_COMPONENTIZE: &str = r#"
import sys
from componentize_py import script
sys.argv[0] = "componentize-py"
try:
    script()
except AssertionError as error:
    sys.exit(str(error))
"#;

/// Variables of pip that would put packages elsewhere than into the private
/// environment, or make it run another interpreter. Those that say where to
/// get packages (indexes, proxies, certificates) stay.
const PIP_VARIABLES: &[&str] = &[
    "PIP_CONSTRAINT",
    "PIP_DRY_RUN",
    "PIP_NO_BINARY",
    "PIP_ONLY_BINARY",
    "PIP_PLATFORM",
    "PIP_PREFIX",
    "PIP_PYTHON",
    "PIP_PYTHON_VERSION",
    "PIP_REPORT",
    "PIP_REQUIREMENT",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_ROOT",
    "PIP_TARGET",
    "PIP_USER",
];

/// The tools, ready to run.
#[derive(Debug)]
pub struct Toolchain {
    /// The environment's interpreter.
    python: PathBuf,
    /// A componentize-py that the user names; else it is in the environment.
    componentize: Option<PathBuf>,
    /// An empty directory, the PATH of componentize-py.
    no_programs: PathBuf,
}

impl Toolchain {
    /// Finds the tools in the cache or installs them, which takes some seconds
    /// and a package index. `progress` is told when that happens.
    ///
    /// # Errors
    ///
    /// If there is no suitable Python, or the installation fails.
    pub fn ensure(cache: &Cache, progress: &dyn Fn(&str)) -> Result<Toolchain> {
        let python = Python::find()?;
        let componentize = set(COMPONENTIZE_VARIABLE).map(PathBuf::from);
        // With an override the pinned wheel may not even exist for this system.
        let requirements = match componentize {
            Some(_) => vec![TOOLS],
            None => vec![TOOLS, COMPONENTIZE],
        };
        let key = Key::new(Bucket::Toolchains)
            .with(requirements.concat())
            .with(python.executable.as_os_str().as_encoded_bytes())
            .with(&python.build)
            .finish();
        let entry = cache.get_or_make(Bucket::Toolchains, &key, |entry| {
            install(&python, &requirements, entry, progress)
        })?;
        let toolchain =
            Toolchain { python: interpreter(&entry), componentize, no_programs: entry.join(NO_PROGRAMS) };
        if let Some(given) = &toolchain.componentize {
            toolchain.check_given(given)?;
        }
        Ok(toolchain)
    }

    /// The environment's interpreter, which has the pinned pip. Run it with `-I`.
    pub fn python(&self) -> &Path {
        &self.python
    }

    /// componentize-py, ready to get arguments.
    ///
    /// It adds site-packages of the host to the guest's path: those of
    /// `VIRTUAL_ENV`, else those that `pipenv` tells, else those that `python3`
    /// tells. So it runs without the first and with a PATH that has neither.
    pub fn componentize(&self) -> Command {
        let mut command = match &self.componentize {
            Some(given) => Command::new(given),
            None => {
                let mut command = Command::new(&self.python);
                command.args(["-I", "-c", RUN_COMPONENTIZE]);
                command
            }
        };
        command.env("PATH", &self.no_programs);
        // The app's traceback is to end the message, not a backtrace of the tool.
        command.env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
        clean(&mut command);
        command
    }

    /// The pinned version and digest of a tool's wheel, if `name` is one with a
    /// wheel that fits all systems.
    pub fn pin(name: &str) -> Option<(&'static str, &'static str)> {
        let (_, rest) = TOOLS.split_once(&format!("\n{name}=="))?;
        let (version, rest) = rest.split_once(' ')?;
        let (_, digest) = rest.split_once("--hash=sha256:")?;
        Some((version, digest.get(..64)?))
    }

    /// Refuses the componentize-py that the user names unless it is the right
    /// version and runs without PATH.
    fn check_given(&self, given: &Path) -> Result<()> {
        let found = match run(self.componentize().arg("--version")) {
            Ok(output) => output.trim().to_owned(),
            Err(error) => error,
        };
        let wanted = format!("componentize-py {COMPONENTIZE_PY_VERSION}");
        if found == wanted {
            return Ok(());
        }
        Err(UserError::new(format!(
            "`{}`, from {COMPONENTIZE_VARIABLE}, is not {wanted}; it says:\n{}",
            given.display(),
            tail(&found)
        ))
        .remedy(format!(
            "name the program of {wanted} itself, not a shim that looks it up on PATH, \
             or unset {COMPONENTIZE_VARIABLE} to use the pinned one"
        ))
        .into())
    }
}

/// A Python on this machine.
struct Python {
    /// Its program; of a virtual environment, the program that it was made from.
    executable: PathBuf,
    /// All that it says of its version.
    build: String,
}

impl Python {
    /// The interpreter that the user names, or the first one on PATH that will do.
    fn find() -> Result<Python> {
        let named = set(PYTHON_VARIABLE);
        let candidates: Vec<&OsStr> = match &named {
            Some(named) => vec![named],
            None => INTERPRETERS.iter().map(OsStr::new).collect(),
        };
        let mut faults = Vec::new();
        for candidate in candidates {
            let mut command = Command::new(candidate);
            clean(command.args(["-I", "-c", PROBE]));
            match command.stdin(Stdio::null()).output() {
                Ok(output) => match Python::judge(&String::from_utf8_lossy(&output.stdout)) {
                    Ok(python) => return Ok(python),
                    Err(fault) => faults.push(format!("`{}` {fault}", candidate.display())),
                },
                // Not installed is no fault of one of many candidates.
                Err(error) if named.is_some() => {
                    faults.push(format!("`{}` can not be run: {error}", candidate.display()));
                }
                Err(_) => {}
            }
        }
        let (major, minor) = OLDEST;
        let what = match &named {
            Some(_) => format!("the Python that {PYTHON_VARIABLE} names will not do"),
            None => "found no suitable Python on PATH".to_owned(),
        };
        let message = match faults.len() {
            0 => what,
            1 => format!("{what}: {}", faults.concat()),
            _ => format!("{what}:\n  {}", faults.join("\n  ")),
        };
        Err(UserError::new(message)
            .remedy(format!(
                "install CPython {major}.{minor} or newer with its `venv` module \
                 (on Debian and Ubuntu: `apt install python3-venv`), \
                 or name one in {PYTHON_VARIABLE}"
            ))
            .into())
    }

    /// Takes an interpreter by what it prints for [`PROBE`], or says its fault.
    fn judge(output: &str) -> Result<Python, String> {
        let line = output.lines().next_back().unwrap_or_default();
        let [version, kind, missing, executable, build] = line.split('\t').collect::<Vec<_>>()[..] else {
            return Err("does not behave like Python 3".to_owned());
        };
        let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
        let (major, minor) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if (major, minor) < OLDEST {
            return Err(format!("is Python {version}, older than {}.{}", OLDEST.0, OLDEST.1));
        }
        if kind != "CPython" {
            return Err(format!("is {kind}, which componentize-py does not support"));
        }
        if !missing.is_empty() {
            let modules = missing.replace(',', "` and `");
            return Err(format!("is Python {version} without the module `{modules}`"));
        }
        Ok(Python { executable: PathBuf::from(executable), build: build.to_owned() })
    }
}

/// A digest of what the tools are, for the keys of what they make. It takes no
/// tools to know it, so that a build that is in the cache needs none.
pub fn identity() -> String {
    let given = set(COMPONENTIZE_VARIABLE).unwrap_or_default();
    Key::default().with(TOOLS).with(COMPONENTIZE).with(given.as_encoded_bytes()).finish()
}

/// The directory without programs in an environment.
const NO_PROGRAMS: &str = "no-programs";

/// Makes the environment at `entry`, which then moves: nothing in it may be run
/// by way of a script, which has its interpreter's path in its first line.
fn install(python: &Python, requirements: &[&str], entry: &Path, progress: &dyn Fn(&str)) -> Result<()> {
    let fault = |what: &str, output: &str| {
        UserError::new(format!("failed to {what}:\n{}", tail(output))).remedy(format!(
            "the build tools come from a package index once: check the network and pip's \
             settings (PIP_INDEX_URL, PIP_PROXY, PIP_CERT are honoured). componentize-py is \
             published for Linux with glibc, macOS and Windows; elsewhere name one in {COMPONENTIZE_VARIABLE}"
        ))
    };
    progress("making a private Python environment");
    let mut command = Command::new(&python.executable);
    clean(command.args(["-I", "-m", "venv"]).arg(entry));
    run(&mut command).map_err(|output| {
        UserError::new(format!(
            "`{}` failed to make a virtual environment:\n{}",
            python.executable.display(),
            tail(&output)
        ))
        .remedy(format!(
            "install its `venv` module (on Debian and Ubuntu: `apt install python3-venv`), \
             or name another Python in {PYTHON_VARIABLE}"
        ))
    })?;
    let no_programs = entry.join(NO_PROGRAMS);
    fs::create_dir(&no_programs).with_context(|| format!("failed to create `{}`", no_programs.display()))?;

    let requirements = requirements.concat();
    for line in requirements.lines() {
        if let Some((name, version)) = line.split_once("==") {
            progress(&format!("installing {name} {}", version.trim_end_matches([' ', '\\'])));
        }
    }
    let list = entry.join("requirements.txt");
    fs::write(&list, &requirements).with_context(|| format!("failed to write `{}`", list.display()))?;
    let mut command = Command::new(interpreter(entry));
    command
        .args(["-I", "-m", "pip", "install", "--no-input", "--no-user"])
        .args(["--disable-pip-version-check", "--progress-bar=off", "--no-deps"])
        .args(["--require-hashes", "--only-binary=:all:", "--requirement"])
        .arg(&list);
    clean(&mut command);
    run(&mut command).map_err(|output| fault("install the build tools", &output))?;
    if requirements.contains(COMPONENTIZE) {
        // The wheel may be for a newer C library than this system's.
        let mut command = Command::new(interpreter(entry));
        clean(command.args(["-I", "-c", RUN_COMPONENTIZE, "--version"]));
        run(&mut command).map_err(|output| fault("run componentize-py", &output))?;
    }
    Ok(())
}

/// The interpreter of the environment at `entry`.
fn interpreter(entry: &Path) -> PathBuf {
    if cfg!(windows) { entry.join("Scripts").join("python.exe") } else { entry.join("bin").join("python") }
}

/// Takes out of a command's environment what would mix other Pythons' packages
/// or places in.
pub(super) fn clean(command: &mut Command) {
    let python = ["PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "PIPENV_ACTIVE", "__PYVENV_LAUNCHER__"];
    for name in python.iter().chain(PIP_VARIABLES) {
        command.env_remove(name);
    }
}

/// Runs a command to its end: its standard output, or all that it said if it
/// failed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(text + &String::from_utf8_lossy(&output.stderr))
}

/// The last lines of a program's output, indented: where it says what failed.
pub(super) fn tail(output: &str) -> String {
    let lines: Vec<_> = output.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(15)..];
    format!("    {}", last.join("\n    "))
}

/// An environment variable, unless it is empty.
fn set(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pins_say_what_the_constants_say() {
        assert!(COMPONENTIZE.contains(&format!("\ncomponentize-py=={COMPONENTIZE_PY_VERSION} ")));
        for requirements in [TOOLS, COMPONENTIZE] {
            let pins = requirements.lines().filter(|line| line.contains("==")).count();
            let hashes = requirements.matches("--hash=sha256:").count();
            assert!(pins > 0 && hashes >= pins);
        }
        let (version, digest) = Toolchain::pin("tzdata").unwrap();
        assert!(version.starts_with("20") && digest.len() == 64, "{version} {digest}");
        assert!(Toolchain::pin("flask").is_none());
    }

    #[test]
    fn an_interpreter_is_judged_by_what_it_says() {
        let judge = |line: &str| Python::judge(line).map(|python| python.executable);
        assert_eq!(
            judge("3.12.1\tCPython\t\t/usr/bin/python3\t3.12.1 (main)\n").unwrap(),
            Path::new("/usr/bin/python3")
        );
        let fault = |line: &str| judge(line).unwrap_err();
        assert_eq!(fault("2.7.18\tCPython\tvenv\t/p\t2.7"), "is Python 2.7.18, older than 3.10");
        assert_eq!(
            fault("3.11.2\tCPython\tvenv,ensurepip\t/p\t3.11"),
            "is Python 3.11.2 without the module `venv` and `ensurepip`"
        );
        assert!(fault("3.13.0\tfree-threaded CPython\t\t/p\t3.13").starts_with("is free-threaded"));
        assert_eq!(fault("pyenv: python3: command not found"), "does not behave like Python 3");
        assert_eq!(fault(""), "does not behave like Python 3");
    }

    #[test]
    fn a_tail_is_short() {
        let output: String = (0..100).map(|line| format!("line {line}\n\n")).collect();
        let tail = tail(&output);
        assert_eq!(tail.lines().count(), 15);
        assert!(tail.ends_with("    line 99"));
    }
}
