//! Vendoring of an app's requirements: which packages it needs, and a
//! directory with them for the guest.
//!
//! pip does the work, driven by `vendor.py` in the private environment of the
//! [`Toolchain`]. Here are the reading of what is required, the key of it, and
//! the words for what can not be had: the guest runs pure Python only.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::Tool;
use super::target::Packages;
use super::toolchain::{Toolchain, clean, tail};
use crate::artifact::Package;
use crate::cache::{Key, Links, sha256, walk};
use crate::error::UserError;

/// Runs in the private environment; its header says what passes to and fro.
const SCRIPT: &str = include_str!("vendor.py");

/// Packages that only exist as native code, and what to use in their place.
/// Their source is not even fetched; others are refused when they do not build.
const NATIVE: &[(&[&str], &str)] = &[
    (
        &["psycopg2", "psycopg2-binary", "psycopg-c", "psycopg-binary", "asyncpg"],
        "use `pg8000`, a PostgreSQL driver in pure Python",
    ),
    (&["mysqlclient", "mysql-connector-python"], "use `PyMySQL`, a MySQL driver in pure Python"),
    (&["pymssql", "pyodbc"], "use `python-tds`, an SQL Server driver in pure Python"),
    (&["pysqlite3", "pysqlite3-binary"], "use the standard library's `sqlite3`"),
    (&["pydantic-core"], "require `pydantic<2`, which is pure Python, or use dataclasses"),
    (&["rpds-py"], "require `jsonschema<4.18`, which does without it"),
    (
        &["cryptography", "pynacl", "pycryptodome", "pycryptodomex", "pyopenssl", "m2crypto"],
        "use `hashlib`, `hmac` and `secrets` of the standard library; `PyJWT` without its \
         `crypto` extra signs with HS256",
    ),
    (
        &["bcrypt", "argon2-cffi-bindings", "scrypt", "py-bcrypt"],
        "hash passwords with PBKDF2 or scrypt, as Django and Werkzeug do unless told otherwise",
    ),
    (&["lxml", "xmlsec"], "use `xml.etree.ElementTree`, or `beautifulsoup4` with its `html.parser`"),
    (&["orjson", "ujson", "python-rapidjson", "msgspec"], "use the standard library's `json`"),
    (&["regex", "google-re2"], "use the standard library's `re`"),
    (&["hiredis"], "require `redis` without its `hiredis` extra"),
    (&["greenlet"], "require `sqlalchemy` without its `asyncio` extra"),
    (
        &["uvloop", "gevent", "httptools", "watchfiles", "pyuwsgi", "uwsgi", "mod-wsgi"],
        "leave it out: the host serves the app, without a Python server or event loop",
    ),
    (&["brotli", "zstandard"], "use the standard library's `gzip` or `zlib`"),
    (
        &[
            "numpy",
            "pandas",
            "scipy",
            "scikit-learn",
            "matplotlib",
            "polars",
            "pyarrow",
            "duckdb",
            "torch",
            "tensorflow",
            "tokenizers",
            "tiktoken",
            "opencv-python",
            "pillow",
            "shapely",
            "grpcio",
            "confluent-kafka",
        ],
        "there is no pure-Python substitute: let the app call a service that has it",
    ),
    (&["cffi", "psutil", "pywin32", "pyzmq", "python-ldap"], REMEDY_NATIVE),
];

/// What to do about a native package that we know nothing of.
const REMEDY_NATIVE: &str = "look for a package in pure Python that does the same, or for an older \
     version of this one that has a wheel that ends in `-none-any.whl`; if only an extra or a \
     development tool wants it, leave that out of the app's requirements";

/// Names of directories that are not part of a local package, for its key.
const NOT_PACKAGED: &[&str] = &["__pycache__", "build", "dist", "node_modules", "venv"];

/// What an app says it needs.
#[derive(Debug)]
pub struct Requirements {
    /// Where that is said.
    source: Source,
    /// Digest of it, and of how we vendor.
    key: String,
}

/// Where requirements are.
#[derive(Debug)]
enum Source {
    /// Nowhere: the app needs nothing.
    Nothing,
    /// In a file in pip's format.
    File(PathBuf),
    /// In a `pyproject.toml`, whose dependencies are here in pip's format.
    Project {
        /// The `pyproject.toml`.
        path: PathBuf,
        /// One dependency a line.
        list: String,
    },
}

impl Requirements {
    /// An app without requirements.
    pub fn none() -> Requirements {
        Requirements { source: Source::Nothing, key: base_key().finish() }
    }

    /// The requirements file at `path`, with all that pip understands in one:
    /// nested files, constraints, hashes, extras, markers, URLs, local paths.
    /// As with pip, relative paths to packages start at the directory of this
    /// file, also in nested ones; those to files at the file they are in.
    ///
    /// # Errors
    ///
    /// If a file can not be read.
    pub fn from_requirements(path: &Path) -> Result<Requirements> {
        let path = canonical(path)?;
        let mut key = base_key();
        add_file(&mut key, &path, directory_of(&path), 0)?;
        Ok(Requirements { source: Source::File(path), key: key.finish() })
    }

    /// `[project] dependencies` of the `pyproject.toml` at `path`. A file
    /// without a project, with settings of tools only, requires nothing.
    ///
    /// # Errors
    ///
    /// If the file can not be read or parsed, or says what the app needs in a
    /// way that only another tool understands.
    pub fn from_pyproject(path: &Path) -> Result<Requirements> {
        let path = canonical(path)?;
        let list = dependencies(&path, &read(&path)?)?;
        let mut key = base_key();
        add_lines(&mut key, &list, &path, directory_of(&path), 0)?;
        Ok(Requirements { source: Source::Project { path, list }, key: key.finish() })
    }

    /// Whether there are any.
    pub fn packages(&self) -> Packages {
        match &self.source {
            Source::Nothing => Packages::None,
            Source::Project { list, .. } if list.is_empty() => Packages::None,
            Source::File(_) | Source::Project { .. } => Packages::Some,
        }
    }

    /// A digest of what is required: the files with the files they name, the
    /// content of local packages, and the way we vendor. What an index offers
    /// for an unpinned requirement is not in it.
    pub fn key(&self) -> &str {
        &self.key
    }
}

/// Fills the directory `target`, which must be empty if it is there, with the packages that
/// `requirements` resolve to for the guest, and returns them sorted by name.
/// `tzdata` is always among them: WASI has no time zone data. Unless something
/// else requires it, it is ours, required by `wsgi-wasm`.
///
/// The same packages give the same bytes: no scripts, no bytecode, no paths of
/// this machine. After an error `target` may be there in part.
///
/// # Errors
///
/// If a requirement can not be had, or not in pure Python.
pub fn vendor(
    toolchain: &Toolchain,
    requirements: &Requirements,
    target: &Path,
    progress: &dyn Fn(&str),
) -> Result<Vec<Package>> {
    // Beside the target, to be removed with it if this process is stopped.
    let beside = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let scratch = tempfile::tempdir_in(beside).context("failed to create a temporary directory")?;
    let write = |name: &str, content: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        fs::write(&path, content).with_context(|| format!("failed to write `{}`", path.display()))?;
        Ok(path)
    };
    let script = write("vendor.py", SCRIPT)?;
    let (file, directory, label) = match &requirements.source {
        Source::Nothing => (None, scratch.path(), None),
        Source::File(path) => (Some(path.clone()), directory_of(path), None),
        Source::Project { path, list } => {
            let stand_in = write("requirements.txt", list)?;
            (Some(stand_in), directory_of(path), path.file_name())
        }
    };
    let report = scratch.path().join("report.json");
    let target = std::path::absolute(target).context("failed to find the working directory")?;
    let request = serde_json::json!({
        "requirements": file.as_deref().map(utf8).transpose()?,
        "label": label.map(|name| name.to_string_lossy()),
        "directory": utf8(directory)?,
        "target": utf8(&target)?,
        "report": utf8(&report)?,
        "native": NATIVE.iter().flat_map(|(names, _)| *names).collect::<Vec<_>>(),
    });
    let request = write("request.json", &request.to_string())?;

    let mut command = Command::new(toolchain.python());
    clean(command.arg("-I").arg(&script));
    let mut child = command
        .env("TMPDIR", scratch.path())
        .stdin(fs::File::open(&request).context("failed to open the request")?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to run `{}`", toolchain.python().display()))?;
    let _watched = Tool::watch(&child);
    let errors = child.stderr.take().map(|mut stream| {
        // Read beside standard output: a full pipe would stop the child.
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    });
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).split(b'\n')) {
        let line = line.context("failed to read the progress of vendoring")?;
        progress(String::from_utf8_lossy(&line).trim_end());
    }
    let status = child.wait().context("failed to wait for vendoring")?;
    let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    if !status.success() {
        bail!("vendoring ended with {status}:\n{}", tail(&errors));
    }
    let text = fs::read_to_string(&report).context("failed to read the report of vendoring")?;
    match serde_json::from_str(&text).context("failed to parse the report of vendoring")? {
        Report::Error(fault) => Err(fault.explain().into()),
        Report::Packages(mut packages) => {
            for package in &mut packages {
                // Copied from the private environment, which knows no digest.
                if package.sha256.is_none()
                    && let Some((version, digest)) = Toolchain::pin(&package.name)
                    && version == package.version
                {
                    package.sha256 = Some(digest.to_owned());
                }
            }
            Ok(packages)
        }
    }
}

/// What `vendor.py` reports.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Report {
    /// It vendored these.
    Packages(Vec<Package>),
    /// It can not.
    Error(Fault),
}

/// Why requirements can not be vendored.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Fault {
    /// A package has native code.
    Native {
        /// Which one.
        #[serde(flatten)]
        package: Refused,
        /// The file that gives it away; `None` if there is no wheel to look in.
        file: Option<String>,
    },
    /// A package has no wheel, and its source does not build.
    Build {
        /// Which one.
        #[serde(flatten)]
        package: Refused,
        /// Whether it was for want of a compiler.
        compiler: bool,
        /// The end of what the build said.
        output: Vec<String>,
    },
    /// An index does not answer.
    Network {
        /// Its address and the reason.
        message: String,
    },
    /// pip does not find or accept something, in its words.
    Pip {
        /// Those words.
        message: String,
    },
}

/// A package that is refused.
#[derive(Deserialize)]
struct Refused {
    /// Its name, normalised.
    name: String,
    /// Its version, if it came to that.
    version: Option<String>,
    /// The packages through which the app requires it, nearest first.
    required_by: Vec<String>,
    /// The place in a requirements file.
    origin: Option<String>,
}

impl Refused {
    /// Name, version, and who wants it: "`a` 1.0 (required by `b`, from
    /// requirements.txt line 2)".
    fn describe(&self) -> String {
        let mut text = format!("`{}`", self.name);
        if let Some(version) = &self.version {
            text += &format!(" {version}");
        }
        let chain: Vec<_> = self
            .required_by
            .iter()
            .map(|name| format!("required by `{name}`"))
            .chain(self.origin.iter().map(|origin| format!("from {origin}")))
            .collect();
        if !chain.is_empty() {
            text += &format!(" ({})", chain.join(", "));
        }
        text
    }

    /// What to do without it. Advice for a package that wants it is as good:
    /// that may be the one the user can change.
    fn remedy(&self) -> &'static str {
        let known = |name: &String| NATIVE.iter().find(|(names, _)| names.contains(&name.as_str()));
        std::iter::once(&self.name)
            .chain(&self.required_by)
            .find_map(known)
            .map_or(REMEDY_NATIVE, |(_, remedy)| remedy)
    }
}

impl Fault {
    /// The message for the user.
    fn explain(&self) -> UserError {
        match self {
            Fault::Native { package, file } => {
                let why = match file {
                    Some(file) => format!("contains native code (`{file}`)"),
                    None => "has no pure-Python wheel, only native code".to_owned(),
                };
                UserError::new(format!("{} {why}, and the guest runs pure Python only", package.describe()))
                    .remedy(package.remedy())
            }
            Fault::Build { package, compiler: true, .. } => UserError::new(format!(
                "{} has no pure-Python wheel, and its source does not build without a compiler; \
                 the guest runs pure Python only",
                package.describe()
            ))
            .remedy(package.remedy()),
            Fault::Build { package, output, .. } => UserError::new(format!(
                "{} has no pure-Python wheel, and its source does not build:\n{}",
                package.describe(),
                tail(&output.join("\n"))
            ))
            .remedy(match package.remedy() {
                REMEDY_NATIVE => {
                    "install what the build asks for, require a version with a wheel that ends in \
                     `-none-any.whl`, or build such a wheel yourself and require it by its path"
                }
                remedy => remedy,
            }),
            Fault::Network { message } => UserError::new(format!("can not get packages from {message}"))
                .remedy(
                    "check the network and pip's settings: PIP_INDEX_URL, PIP_PROXY, PIP_CERT and pip.conf \
                     are honoured",
                ),
            Fault::Pip { message } => {
                // The words of a conflict take several lines.
                let message = if message.contains('\n') {
                    format!("\n    {}", message.replace('\n', "\n    "))
                } else {
                    format!(" {message}")
                };
                UserError::new(format!("can not resolve the requirements:{message}")).remedy(
                    "correct the requirements; they are resolved for the guest, CPython 3.14 on WASI, from \
                     the index in pip's settings",
                )
            }
        }
    }
}

/// The key of no requirements: how we vendor.
fn base_key() -> Key {
    Key::default().with("requirements").with(SCRIPT)
}

/// Adds the requirements file at `path` to `key`. Local packages that it
/// names are relative to `base`.
fn add_file(key: &mut Key, path: &Path, base: &Path, depth: u32) -> Result<()> {
    // Files that include each other would never end.
    if depth > 32 {
        return Err(UserError::new(format!(
            "`{}` is included by requirements files more than 32 deep",
            path.display()
        ))
        .remedy("look for a file that includes itself with `-r` or `-c`")
        .into());
    }
    add_lines(key, &read(path)?, path, base, depth)
}

/// Adds the lines of a requirements file to `key`, with the files and the
/// local packages that they name. pip judges the lines; this only has to find
/// all paths in them, so it takes every word that is one.
fn add_lines(key: &mut Key, text: &str, path: &Path, base: &Path, depth: u32) -> Result<()> {
    let text = text.replace("\r\n", "\n").replace("\\\n", " ");
    for line in text.lines() {
        let line = expand(line.split(" #").next().unwrap_or(line).trim());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        key.add(&line);
        if let Some(nested) = nested_file(&line) {
            // pip fetches those that are URLs.
            if !nested.contains("://") {
                add_file(key, &directory_of(path).join(nested), base, depth + 1)?;
            }
            continue;
        }
        for word in line.split_whitespace() {
            let word = word.trim_matches(['"', '\'']);
            // `--find-links=./wheels`, `-e./foo`, `foo @ file:./foo`, `./foo[extra]`
            let word = word.split_once('=').filter(|_| word.starts_with("--")).map_or(word, |(_, w)| w);
            let word = word.strip_prefix("-e").or(word.strip_prefix("-f")).unwrap_or(word);
            let word = word.strip_prefix("file://").or(word.strip_prefix("file:")).unwrap_or(word);
            let word = word.split(['[', ';', '#']).next().unwrap_or(word);
            let is_path = word.contains(['/', '\\']) || word.starts_with('.') || line.starts_with('-');
            if is_path && !word.is_empty() {
                add_content(key, &base.join(word))?;
            }
        }
    }
    Ok(())
}

/// The file that a line includes: `-r FILE`, `-c FILE`, and their long forms.
fn nested_file(line: &str) -> Option<&str> {
    let options = ["--requirement", "--constraint", "--build-constraint", "-r", "-c"];
    let rest = options.iter().find_map(|option| line.strip_prefix(option))?;
    Some(rest.trim_start_matches(['=', ' ', '\t']).trim_matches(['"', '\'']))
}

/// Adds a local package, an archive or a source tree, to `key`, if it is there.
fn add_content(key: &mut Key, path: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("failed to read `{}`", path.display()));
    if path.is_file() {
        key.add(sha256(&read(path)?));
    } else if path.is_dir() {
        let files = walk(path, Links::Follow, &mut |relative, metadata| {
            let name = relative.file_name().unwrap_or_default().to_string_lossy();
            !(metadata.is_dir()
                && (name.starts_with('.')
                    || name.ends_with(".egg-info")
                    || NOT_PACKAGED.contains(&name.as_ref())))
        })?;
        for file in files {
            key.add(file.as_os_str().as_encoded_bytes());
            key.add(sha256(&read(&path.join(&file))?));
        }
    }
    Ok(())
}

/// `line` with each `${NAME}` replaced by that environment variable, as pip
/// does; unset ones stay.
fn expand(line: &str) -> String {
    let mut parts = line.split("${");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let value = part.split_once('}').and_then(|(name, rest)| Some((std::env::var(name).ok()?, rest)));
        match value {
            Some((value, rest)) => text.extend([value.as_str(), rest]),
            None => text.extend(["${", part]),
        }
    }
    text
}

/// The dependencies in the `pyproject.toml` at `path`, one a line.
fn dependencies(path: &Path, text: &str) -> Result<String> {
    let fault = |what: String| UserError::new(format!("`{}` {what}", path.display()));
    let table: toml::Table = text
        .parse()
        .map_err(|error| fault(format!("is not valid TOML: {error}")).remedy("correct the file"))?;
    let project = table.get("project");
    let tool = |name: &str| table.get("tool").and_then(|tool| tool.get(name));
    let Some(list) = project.and_then(|project| project.get("dependencies")) else {
        let dynamic = project
            .and_then(|project| project.get("dynamic")?.as_array())
            .is_some_and(|names| names.iter().any(|name| name.as_str() == Some("dependencies")));
        if dynamic {
            return Err(fault("leaves its dependencies to its build tool (`dynamic`)".to_owned())
                .remedy("write them to a requirements file and build with `-r FILE`")
                .into());
        }
        if tool("poetry").is_some_and(|poetry| poetry.get("dependencies").is_some()) {
            return Err(fault("has dependencies that only Poetry understands".to_owned())
                .remedy("run `poetry export -o requirements.txt` and build with `-r requirements.txt`")
                .into());
        }
        return Ok(String::new());
    };
    // To pip such a name is a package of the index, perhaps somebody else's.
    if let Some(sources) = tool("uv").and_then(|uv| uv.get("sources")?.as_table())
        && let Some(name) = sources.keys().next()
    {
        return Err(fault(format!(
            "takes `{name}` from a source that only uv understands (`tool.uv.sources`)"
        ))
        .remedy("run `uv export -o requirements.txt` and build with `-r requirements.txt`")
        .into());
    }
    let malformed = || {
        fault("has `dependencies` that are not a list of strings".to_owned())
            .remedy("write `dependencies = [\"flask>=3\", ...]` in the `[project]` table")
    };
    let mut lines = String::new();
    for dependency in list.as_array().ok_or_else(malformed)? {
        let dependency = dependency.as_str().ok_or_else(malformed)?;
        // A line break or a leading dash would be more than a dependency to pip.
        if dependency.contains(['\n', '\r']) || dependency.trim_start().starts_with('-') {
            return Err(malformed().into());
        }
        lines += dependency;
        lines += "\n";
    }
    Ok(lines)
}

/// Reads a file that the user names, as text.
fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| missing(path, &error).into())
}

/// The absolute path of a file that the user names.
fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| missing(path, &error).into())
}

/// A file that the user names can not be read.
fn missing(path: &Path, error: &std::io::Error) -> UserError {
    UserError::new(format!("can not read `{}`: {error}", path.display()))
        .remedy("check the path; nested files are relative to the file that names them")
}

/// A path as text, as JSON has no other.
fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        UserError::new(format!("the path `{}` is not valid UTF-8", path.display()))
            .remedy("rename what is not")
            .into()
    })
}

/// The directory that a file is in.
fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with files, given as name and content.
    fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        directory
    }

    fn key_of(directory: &tempfile::TempDir) -> String {
        let path = directory.path().join("requirements.txt");
        Requirements::from_requirements(&path).unwrap().key().to_owned()
    }

    #[test]
    fn the_key_changes_with_everything_that_is_named() {
        let directory = project(&[
            ("requirements.txt", "-r sub/more.txt\n-c=sub/pins.txt\n-e ./libs/foo[x]\n./b.whl # b\n"),
            ("sub/more.txt", "--requirement deep.txt\n"),
            ("sub/deep.txt", "flask \\\n  >=3\n"),
            ("sub/pins.txt", "flask==3.1\n"),
            ("libs/foo/src/foo.py", "x = 1"),
            ("b.whl", "bytes"),
        ]);
        let mut keys = vec![key_of(&directory)];
        for (name, content) in [
            ("sub/deep.txt", "flask >=2\n"),
            ("sub/pins.txt", "flask==3.2\n"),
            ("libs/foo/src/foo.py", "x = 2"),
            ("libs/foo/src/new.py", ""),
            ("b.whl", "other"),
        ] {
            fs::write(directory.path().join(name), content).unwrap();
            keys.push(key_of(&directory));
        }
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());

        // Neither a comment nor what a build leaves behind is a requirement.
        let before = key_of(&directory);
        fs::write(directory.path().join("sub/deep.txt"), "# why\nflask >=2 # so\n\n").unwrap();
        fs::create_dir_all(directory.path().join("libs/foo/build")).unwrap();
        fs::write(directory.path().join("libs/foo/build/x"), "x").unwrap();
        assert_eq!(before, key_of(&directory));
    }

    #[test]
    fn files_that_are_missing_or_include_themselves_are_named() {
        let directory = project(&[("requirements.txt", "-r nope.txt\n")]);
        let path = directory.path().join("requirements.txt");
        let error = Requirements::from_requirements(&path).unwrap_err();
        assert!(error.is::<UserError>() && error.to_string().contains("nope.txt"), "{error}");
        fs::write(&path, "-r requirements.txt\n").unwrap();
        let error = Requirements::from_requirements(&path).unwrap_err();
        assert!(error.to_string().contains("32 deep"), "{error}");
    }

    #[test]
    fn variables_are_expanded_as_pip_does() {
        let path = std::env::var("PATH").unwrap();
        assert_eq!(expand("a${PATH}b"), format!("a{path}b"));
        assert_eq!(expand("${WSGI_WASM_UNSET}/x ${"), "${WSGI_WASM_UNSET}/x ${");
    }

    #[test]
    fn a_pyproject_gives_its_dependencies_or_a_reason() {
        let parse = |text: &str| dependencies(Path::new("pyproject.toml"), text);
        let list = "[project]\nname = 'x'\ndependencies = ['flask>=3', \"idna; python_version > '3'\"]";
        assert_eq!(parse(list).unwrap(), "flask>=3\nidna; python_version > '3'\n");
        assert_eq!(parse("[tool.ruff]\nline-length = 88").unwrap(), "");
        assert_eq!(parse("[project]\nname = 'x'").unwrap(), "");
        for (text, remedy) in [
            ("[project]\ndynamic = ['dependencies']", "-r FILE"),
            ("[tool.poetry.dependencies]\npython = '^3'", "poetry export"),
            ("[project]\ndependencies = ['a']\n[tool.uv.sources]\na = { path = '../a' }", "uv export"),
            ("[project]\ndependencies = 'a'", "dependencies = ["),
            ("[project]\ndependencies = ['--index-url x']", "dependencies = ["),
            ("[project", "correct the file"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.is::<UserError>(), "{error}");
            assert!(error.to_string().contains(remedy), "{error}");
        }
    }

    #[test]
    fn native_packages_are_known_once_by_their_normal_name() {
        let mut names: Vec<_> = NATIVE.iter().flat_map(|(names, _)| *names).collect();
        assert!(names.iter().all(|name| !name.contains(['_', '.', ' ']) && **name == name.to_lowercase()));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn faults_name_the_package_the_chain_and_the_remedy() {
        let explain = |json: &str| match serde_json::from_str(json).unwrap() {
            Report::Error(fault) => fault.explain().to_string(),
            Report::Packages(_) => panic!("an error"),
        };
        assert_eq!(
            explain(
                r#"{"error": {"kind": "native", "name": "pydantic-core", "version": "2.50.4",
                    "required_by": ["pydantic"], "origin": "requirements.txt line 1"}}"#
            ),
            "`pydantic-core` 2.50.4 (required by `pydantic`, from requirements.txt line 1) has no \
             pure-Python wheel, only native code, and the guest runs pure Python only\n  help: \
             require `pydantic<2`, which is pure Python, or use dataclasses"
        );
        let file = explain(
            r#"{"error": {"kind": "native", "name": "foo", "version": null, "required_by": [],
                "origin": null, "file": "foo/_c.so"}}"#,
        );
        assert!(file.starts_with("`foo` contains native code (`foo/_c.so`)"), "{file}");
        let compiler = explain(
            r#"{"error": {"kind": "build", "name": "foo", "version": null, "compiler": true,
                "required_by": ["mysqlclient"], "origin": null, "output": []}}"#,
        );
        assert!(compiler.contains("without a compiler") && compiler.contains("PyMySQL"), "{compiler}");
        let broken = explain(
            r#"{"error": {"kind": "build", "name": "foo", "version": "1", "compiler": false,
                "required_by": [], "origin": null, "output": ["SyntaxError"]}}"#,
        );
        assert!(broken.contains("build:\n    SyntaxError\n  help: install"), "{broken}");
        let pip = explain(r#"{"error": {"kind": "pip", "message": "no"}}"#);
        assert!(pip.starts_with("can not resolve the requirements: no\n"), "{pip}");
    }
}
